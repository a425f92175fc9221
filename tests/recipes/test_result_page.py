"""The page of a chain or a training run: what it says, and that it is whole at every width and in both themes."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from ttmray.cli import main
from ttmray.config import Config
from ttmray.errors import EXIT_BAD_INPUT, EXIT_OK
from ttmray.evaluation import plots
from ttmray.evaluation.results import Results
from ttmray.recipes.chain import run_chain
from ttmray.recipes.chain_plan import Step
from ttmray.recipes.result_page import curves_of, headline, result_table
from ttmray.storage import Folder
from ttmray.training.config import TrainConfig


def metric(value: float, spread: float = 0.1) -> dict[str, Any]:
    return {"value": value, "low": value - spread, "high": value + spread, "interval": "t over prompts"}


def results(bundle: str = "mine", **more: Any) -> Results:
    systems = [
        {"name": "stage1", "clips": 30, "prompts": 30, "metrics": {"reward": metric(-0.2), "fad": metric(0.5)}},
        {"name": "stage3", "clips": 30, "prompts": 30, "metrics": {"reward": metric(0.4), "lufs": metric(-16.5)}},
    ]
    pair = {"a": "stage3", "b": "stage1", "metric": "reward", "n": 30, "difference": 0.6, "p_holm": 0.004}
    whole = {"kind": "evaluation", "bundle": bundle, "systems": systems, "comparisons": [pair | {"significant": True}]}
    return Results.model_validate(whole | more)


def test_the_headline_names_the_best_system_and_whether_its_gain_is_told_from_chance():
    text = headline(results())
    assert text.startswith("stage3 has the highest mean reward, +0.400 (95 % interval +0.300 to +0.500)")
    assert text.endswith("0.600 more than stage1, told from chance (Holm's p 0.0040, 30 prompts).")
    chance = [{"a": "stage1", "b": "stage3", "metric": "reward", "n": 30, "difference": -0.6, "p_holm": 0.4}]
    assert "which may be chance (Holm's p 0.4000" in headline(results(comparisons=chance))
    untrained = "By untrained models: these numbers mean nothing, and no system is named as better."
    assert headline(results("debug")) == untrained
    assert headline(results("debug", comparisons=[])) == untrained
    assert headline(results(systems=[])) == "No system has a reward."


def test_the_table_has_the_papers_figures_beside_ours_where_it_has_the_row():
    header, (first, third) = result_table(results())
    assert header == ["system", "FAD ↓", "Reward ↑", "LUFS", "paper: FAD", "paper: Reward"]
    assert first[1:4] == [("0.500", "0.400 to 0.600"), ("−0.200", "−0.300 to −0.100"), ("–", "")]
    assert first[4:] == [("", ""), ("≈0.028", "")]
    assert third[4:] == [("0.4238", ""), ("0.533", "")]


@pytest.fixture
def training(tmp_path: Path) -> Path:
    """A finished-looking run folder of a training with two rounds of online tuning, the second of them hacked."""
    run = tmp_path / "chain/stage1"
    (run / "rounds").mkdir(parents=True)
    config = {"bundle": "debug", "steps": 30, "batch": 4, "optimizer": {"lr": 1e-3}}
    described = {"kind": "sft", "config": config, "created": "2026-01-01"}
    (run / "run.json").write_text(json.dumps(described))
    lines = [{"step": step, "loss": 2 - step / 30} for step in (10, 20, 30)] + [{"step": 30, "validation_loss": 1.5}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "{half")
    for number, reward in enumerate((0.1, 0.9)):
        held_out = {"scores": {"clap_score": {"mean": 0.3 - number / 10}}}
        warning = "the policy may be exploiting <b>" if number else None
        report = {"round": number, "reward": reward, "held_out": held_out, "warning": warning}
        (run / f"rounds/round-{number:05d}.json").write_text(json.dumps(report))
    return run


def test_curves_are_losses_by_update_and_rewards_by_round(training):
    curves = curves_of(Folder.at(str(training)), "x")
    assert curves.lines["loss by update"] == {
        "loss": [(10.0, 2 - 1 / 3), (20.0, 2 - 2 / 3), (30.0, 1.0)],
        "validation loss": [(30.0, 1.5)],
    }
    rewards = curves.lines["reward by round"]
    assert rewards["reward of the rounds"] == [(0.0, 0.1), (1.0, 0.9)]
    assert rewards["held out: clap_score"] == [(0.0, 0.3), (1.0, pytest.approx(0.2))]
    assert curves.warnings == ["the policy may be exploiting <b>"]


def test_a_page_of_a_run_has_the_note_of_its_corpora_even_where_its_config_names_no_bundle(training):
    described = json.loads((training / "run.json").read_text())
    described["config"].pop("bundle", None)
    described["note"] = "made by <somebody>"
    (training / "run.json").write_text(json.dumps(described))
    assert main(["report", str(training)]) == EXIT_OK
    assert "made by &lt;somebody&gt;" in (training / "index.html").read_text()


def test_a_training_run_has_a_page_and_other_folders_say_what_they_lack(training, tmp_path, capsys):
    assert main(["report", str(training)]) == EXIT_OK
    text = (training / "index.html").read_text()
    assert "loss 1.667 to 1" in text
    assert "30 of 30" in text
    assert "exploiting &lt;b&gt;" in text
    assert "models are tiny, seeded and untrained" in text
    assert text.count("<svg") == 4  # two figures, each for a light and a dark page
    (tmp_path / "else").mkdir()
    assert main(["report", str(tmp_path / "else")]) == EXIT_BAD_INPUT
    assert "has nothing to show" in capsys.readouterr().err
    (tmp_path / "else/index.html").touch()  # as a chain or generated clips have one
    assert main(["report", str(tmp_path / "else")]) == EXIT_OK
    assert str(tmp_path / "else/index.html") in capsys.readouterr().out


class PageStep(Config):
    output: str = ""
    bundle: str = "debug"


def test_the_page_of_a_chain_shows_results_curves_players_and_systems_and_folds_its_steps(training, tmp_path):
    root = tmp_path / "chain"
    train = TrainConfig.model_validate({"output": str(training), "data": {"sources": [{"corpus": "x"}]}})
    evaluation = PageStep(output=str(root / "evaluation"))
    folder = root / "generated/stage1"
    (folder / "manifest").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"config": {"checkpoint": "w.safetensors", "sampler": {"score": 2.0}}}))
    row = dict.fromkeys(_columns()) | {"name": "a", "prompt_id": "a", "prompt": "slow <i>", "file": "clips/a.wav"}
    (folder / "manifest/a.json").write_text(json.dumps(row))

    def evaluate() -> int:
        whole = results("debug", grave=("3 prompts are too few",), warnings=("3 prompts are too few",)).model_dump()
        whole["systems"][0]["folder"] = str(folder)
        (root / "evaluation").mkdir(exist_ok=True)
        (root / "evaluation/results.json").write_text(json.dumps(whole))
        return 0

    steps = [
        Step("stage1", train, lambda: 0, ("stage1/metrics.jsonl",)),
        Step("evaluate", evaluation, evaluate, ("evaluation/results.json",)),
    ]
    assert run_chain(Folder(str(root)), steps, {"stage1": "1", "evaluate": "2"}) == 0
    text = (root / "index.html").read_text()
    assert "has the highest mean reward" not in text
    assert "these numbers mean nothing, and no system is named as better" in text
    assert text.count("models are tiny, seeded and untrained") == 1, "steps share a bundle, the page says it once"
    assert "≈0.028" in text
    assert text.count("<svg") == 4
    assert "<audio controls preload='none' src='generated/stage1/clips/a.wav'>" in text
    assert "slow &lt;i&gt;" in text
    assert "<dt>weights</dt><dd>w.safetensors</dd>" in text
    assert "<details><summary><h2>Steps</h2>" in text
    assert "exploiting &lt;b&gt;" in text
    assert text.index("too few") < text.index("<h2>Results")
    assert "models are tiny" in (root / "summary.md").read_text()


def _columns() -> list[str]:
    from ttmray.generation.manifest import SCHEMA

    return list(SCHEMA.names)


@pytest.mark.parametrize("steps", [(4,), (2, 4, 6)])
def test_an_axis_of_updates_has_no_half_ones(steps):
    svg = plots.curves({"loss": [(step, 2.0) for step in steps]}, "loss by update", "light").decode()
    texts = re.findall(r">([\d.]+)</text>|<!-- ([\d.]+) -->", svg)
    below = [one or other for one, other in texts if float(one or other) > 2.2 or float(one or other) < 1.8]
    assert below, "no ticks were read"
    assert all(float(text).is_integer() for text in below), below
