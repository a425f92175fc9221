"""The challenge's metrics: ours beside the published ones, and CCS by a judge that answers in this process."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from ttmray.cli import main
from ttmray.errors import EXIT_BAD_INPUT, EXIT_OK
from ttmray.recipes.attm_metrics import PUBLISHED

PROMPTS = "id,prompt\np1,a harp\np2,a choir\np3,a drum\n"


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """An evaluation of two of three clips against two files."""
    for folder, names, level in (("ours", ("p1", "p2"), 0.1), ("reference", ("a", "b"), 0.02)):
        (tmp_path / folder).mkdir()
        for i, name in enumerate(names):
            noise = np.random.default_rng(i).normal(scale=level, size=2 * 44_100)
            soundfile.write(tmp_path / folder / f"{name}.wav", noise, 44_100, subtype="PCM_16")
    (tmp_path / "prompts.csv").write_text(PROMPTS)
    words = ["attm", "evaluate", f"mine={tmp_path / 'ours'}", "--prompts", str(tmp_path / "prompts.csv")]
    words += ["--out", str(tmp_path / "out"), "--bundle", "debug", "--device", "cpu"]
    return [*words, "--reference", str(tmp_path / "reference")]


def table(out: Path) -> list[dict[str, str]]:
    with open(out / "attm.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_an_evaluation_has_the_published_figures_beside_ours(command, tmp_path, capsys):
    assert main(command) == EXIT_OK
    said = capsys.readouterr().out
    for words in ("0.6073", "0.2015", "0.763", "hidden reference", "CCS: left out", "mean nothing"):
        assert words in said
    mine, *published = table(tmp_path / "out")
    assert (mine["system"], mine["clips"], mine["windows"], mine["missing"]) == ("mine", "2", "4", "1")
    assert (mine["ccs"], mine["judged"]) == ("", "0")
    assert "mean nothing" in mine["note"]
    assert [(float(row["fad"]), float(row["clap"])) for row in published] == [row[1:3] for row in PUBLISHED]
    assert [row["ccs"] for row in published] == ["", "0.763"]
    assert main([*command[:-1], str(tmp_path / "out/reference.safetensors")]) == EXIT_OK
    assert table(tmp_path / "out")[0] == mine


def test_files_of_no_prompt_are_said_to_be_in_the_distance_as_they_are(command, tmp_path, capsys):
    more = np.random.default_rng(9).normal(scale=0.1, size=2 * 44_100)
    soundfile.write(tmp_path / "ours/of-nobody.wav", more, 44_100, subtype="PCM_16")
    assert main(command) == EXIT_OK
    said = capsys.readouterr().out
    assert "1 files belong to no prompt and have no CLAP score; FAD hears the folder itself" in said
    assert "left out: of-nobody" not in said
    assert table(tmp_path / "out")[0]["clips"] == "3"


def test_a_judge_gives_the_mean_share_of_concepts_that_it_hears(command, tmp_path, server: Any, capsys):
    (tmp_path / "concepts.csv").write_text("id,concepts\np1,piano; harp\np2,piano\np3,drum\n")
    judge = ["--set", f"judge={{endpoint: '{server.url}', model: ears, concepts: {tmp_path / 'concepts.csv'}}}"]
    assert main([*command, *judge]) == EXIT_OK
    mine = table(tmp_path / "out")[0]
    assert (float(mine["ccs"]), mine["judged"]) == (0.75, "2"), "the judge hears a piano in both, and no harp"
    about = json.loads((tmp_path / "out/attm.json").read_text())
    assert about["judge"].startswith("ccs-ears-")
    assert "not the organisers' judge" in " ".join(capsys.readouterr().out.split())
    asked = len(server.requests)
    assert main([*command, *judge]) == EXIT_OK
    assert len(server.requests) == asked, "what was answered is not asked again"


def test_clips_without_an_answer_are_counted_and_no_score_is_made_up(command, tmp_path, server: Any, capsys):
    server.reply = lambda *_: (200, "I hear music.")
    judge = f"judge={{endpoint: '{server.url}', model: ears, attempts: 1, backoff_s: 0}}"
    assert main([*command, "--set", judge]) == EXIT_OK
    assert (table(tmp_path / "out")[0]["ccs"], table(tmp_path / "out")[0]["judged"]) == ("", "0")
    assert "2 clips without CCS" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--reference", "nowhere"], "nowhere"),
        (["--prompts", "nothing.csv"], "nothing.csv"),
        (["--set", "judge.model=/no/such/model"], "/no/such/model"),
        (["--set", "judge.modell=x"], "judge.model"),
        (["--bundle", "payper"], "payper"),
    ],
)
def test_what_is_not_there_is_one_message(command, words, said, capsys):
    assert main([*command, *words]) == EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
