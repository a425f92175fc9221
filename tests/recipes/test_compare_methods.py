"""Tuning methods side by side: the whole chain on the debug bundle, and what is refused before it starts."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ttmray.cli import main
from ttmray.config import load_config
from ttmray.errors import UserError
from ttmray.generation.prompts import read_prompts
from ttmray.models.backbone_weights import load_backbone
from ttmray.recipes.compare_methods import CompareMethodsConfig, compare_methods
from ttmray.recipes.hearing import read_heard
from ttmray.storage import Folder

REPO = Path(__file__).resolve().parents[2]
DEBUG = str(REPO / "configs/debug/methods.yaml")


def configured(*sets: str) -> CompareMethodsConfig:
    return load_config(CompareMethodsConfig, DEBUG, sets)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison of all methods; do not change it."""
    output = tmp_path_factory.mktemp("methods") / "run"
    assert main(["compare-methods", "--config", DEBUG, "--set", f"output={output}"]) == 0
    return output


def table(run: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((run / "comparison/methods.json").read_text())
    return result


def rows(run: Path, name: str) -> list[dict[str, str]]:
    return list(csv.DictReader((run / "comparison" / name).open(newline="")))


@pytest.mark.slow
def test_every_method_is_tuned_judged_and_paid_for(run):
    result = table(run)
    by_name = {row["name"]: row for row in result["rows"]}
    assert set(by_name) == {"parent", *configured().methods}
    accounts = {name: row["account"] for name, row in by_name.items() if name != "parent"}
    assert {account["clips"] for account in accounts.values()} == {16}
    assert all(40 <= one["passes"] <= 48 for name, one in accounts.items() if name != "best-of-n")
    assert all(one["cpu_seconds"] > 0 for one in accounts.values())
    assert all(one["weight_distance"] > 0 for name, one in accounts.items() if name != "best-of-n")
    assert accounts["best-of-n"]["weight_distance"] == accounts["best-of-n"]["passes"] == 0
    for name in configured().methods:
        assert set(by_name[name]["sets"]) == {"vendi", "fad", "kad"}
        assert len(by_name[name]["sets"]["fad"]["seeds"]) == 2
    assert by_name["best-of-n"]["changes"]["reward"]["value"] > 0  # it has chosen by it
    assert (run / "comparison/methods.md").read_text().count("\n| grpo |") == 2
    text = (run / "index.html").read_text()
    assert "no method is named as better" in text[: text.index("<main")]
    assert text.index("Changes against the parent") < text.index("<h2>Curves") < text.index("<h2>Listen")
    assert all(f"<figcaption>{name}</figcaption>" in text for name in by_name)


@pytest.mark.slow
def test_the_tables_are_the_means_of_the_clips_that_lie_beside_them(run):
    clips = rows(run, "clips.csv")
    prompts = [prompt.id for prompt in read_prompts(str(run / "held_out.csv"))]
    for name in ("unselected", "grpo"):
        ends = [row for row in clips if row["row"] == name and float(row["share"]) == 1]
        assert sorted(row["prompt_id"] for row in ends) == sorted(prompts * 2)
        (told,) = (row for row in table(run)["rows"] if row["name"] == name)
        assert told["means"]["quality"] == pytest.approx(np.mean([float(row["quality"]) for row in ends]))
        parent = {row["prompt_id"]: float(row["reward"]) for row in clips if row["row"] == "parent"}
        change = np.mean([float(row["reward"]) - parent[row["prompt_id"]] for row in ends])
        assert told["changes"]["reward"]["value"] == pytest.approx(change)
        assert told["changes"]["reward"]["low"] <= change <= told["changes"]["reward"]["high"]
    curve = rows(run, "curves.csv")
    assert [float(row["share"]) for row in curve if row["row"] == "crpo"] == [0, 0.5, 1]
    assert [float(row["share"]) for row in curve if row["row"] == "best-of-n"] == [0, 0.5, 1]
    figure = (run / "comparison/hacking-light.svg").read_text()
    assert all(f"{name}" in figure for name in ("expert-iteration-2", "trained reward", "true quality"))


@pytest.mark.slow
def test_held_out_clips_are_of_the_same_noise_and_learned_prompts_are_others(run):
    held_out = read_prompts(str(run / "held_out.csv"))
    learned = [read_prompts(str(run / f"seed-{seed}/prompts.csv")) for seed in (0, 1)]
    assert learned[0] != learned[1]
    assert not {prompt.text for prompt in held_out} & {prompt.text for some in learned for prompt in some}
    parent, best = (read_heard(Folder(str(run / f"heard/{name}"))) for name in ("parent", "best-of-n-0"))
    first = [row["reward_score"] for row in best.rows if row["sample"] == 0]
    assert first == [row["reward_score"] for row in parent.rows]


@pytest.mark.slow
def test_the_parent_is_the_backbone_of_the_bundle(run):
    from ttmray.models.bundle import open_bundle
    from ttmray.models.loading import LoadOptions

    ours, theirs = load_backbone(run / "parent.safetensors"), open_bundle("debug").load(["backbone"], LoadOptions())
    pairs = zip(ours.state_dict().items(), theirs.backbone.state_dict().items(), strict=True)
    assert all(a == b and (x == y).all() for (a, x), (b, y) in pairs)


@pytest.mark.slow
def test_a_second_launch_has_nothing_to_do_and_a_lost_result_is_made_again_alone(run, capsys):
    before = {path: path.stat().st_mtime_ns for path in run.glob("seed-*/*/weights-*.safetensors")}
    assert len(before) > 10
    assert compare_methods(configured(f"output={run}")) == 0
    assert "nothing to do" in capsys.readouterr().out
    (run / "heard/grpo-0/heard.parquet").unlink()
    result = (run / "comparison/methods.csv").read_bytes()
    assert compare_methods(configured(f"output={run}")) == 0
    assert (run / "comparison/methods.csv").read_bytes() == result
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["methods={dpo: {}}"], "there is no such method; known: best-of-n"),
        (["methods={parent: {method: grpo}}"], "cannot name a row"),
        (["seeds=[1, 1]"], "one is there twice"),
        (["composed=null"], "needs composed, or both prompts and held_out"),
        (["prompts=a.csv"], "needs composed, or both prompts and held_out"),
        (["rewards={reward_score: 0}"], "all weights are 0"),
        (["rewards={beauty: 1}"], "rewards"),
    ],
)
def test_configs_that_mean_nothing_are_refused(sets, message):
    with pytest.raises(UserError, match=message):
        configured(*sets)


def test_a_row_can_be_taken_out_and_a_method_stand_in_two():
    config = configured("methods={grpo: null, crpo: {}, second: {method: crpo}}")
    assert "grpo" not in config.methods
    assert (config.method("crpo"), config.method("second")) == ("crpo", "crpo")


def test_held_out_prompts_among_the_others_stop_the_first_step(tmp_path, capsys):
    (tmp_path / "learn.txt").write_text("slow piano\nA loud organ\nfast drums\na flute\n")
    (tmp_path / "judge.txt").write_text("a loud organ\na calm harp\n")
    sets = ["composed=null", f"prompts={tmp_path / 'learn.txt'}", f"held_out={tmp_path / 'judge.txt'}"]
    sets += [f"output={tmp_path / 'run'}"]
    words = [word for one in sets for word in ("--set", one)]
    assert main(["compare-methods", "--config", DEBUG, *words, "--until", "prompts"]) == 2
    assert "1 prompts are held out" in capsys.readouterr().err
