"""A model's own best score: pools that differ in the score alone, and the highest mean reward."""

import json
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from safetensors.torch import save_file

from ttmray.cli import main
from ttmray.config import load_config
from ttmray.errors import UserError
from ttmray.generation.choose_score import ScoreChoiceConfig, _trained_scores, choose_score, chosen_score
from ttmray.generation.filter import numbers, read_pool
from ttmray.models.backbone_weights import METADATA, debug_backbone, read_support
from ttmray.models.bundle import open_bundle
from ttmray.models.score_support import ScoreSupport


def choice(output: Path, *sets: str) -> ScoreChoiceConfig:
    prompts = output.parent / "prompts.csv"
    prompts.write_text("id,prompt\na,a calm piano\nb,loud drums\n")
    usual = [
        "bundle=debug",
        f"prompts={prompts}",
        f"output={output}",
        "candidates=1",
        "scores=[-2, 4]",
        "sampler.steps=2",
    ]
    usual += ["max_clipping=1", "silence_dbfs=-200", "runtime.threads=1"]
    return load_config(ScoreChoiceConfig, None, [*usual, *sets])


def test_the_score_with_the_highest_mean_reward_is_chosen(tmp_path, capsys):
    out = tmp_path / "choice"
    assert choose_score(choice(out)) == 0
    means = {
        score: float(np.mean(numbers(read_pool(str(out / f"score{score}"))[0], "reward_score"))) for score in (-2, 4)
    }
    assert means[-2] != means[4]
    assert chosen_score(str(out)) == max(means, key=lambda score: means[score])
    choice_file = json.loads((out / "choice.json").read_text())
    assert "mean nothing" in choice_file["note"]
    assert choice_file["mean_reward"] == pytest.approx({"-2": means[-2], "4": means[4]})
    assert f"# Score {chosen_score(str(out)):g}" in (out / "choice.md").read_text()
    before = (out / "choice.json").stat().st_mtime_ns, (out / "score4/index.parquet").stat().st_mtime_ns
    assert choose_score(choice(out)) == 0
    assert (out / "score4/index.parquet").stat().st_mtime_ns == before[1]


def test_prompts_of_the_comparison_are_not_among_those_of_the_choice(tmp_path):
    held_out = tmp_path / "held.csv"
    held_out.write_text("id,prompt\nx,a calm piano\n")
    with pytest.raises(UserError, match="held"):
        choose_score(choice(tmp_path / "choice", f"held_out={held_out}"))


def test_the_scores_of_a_bundles_own_backbone_are_known(tmp_path):
    config = choice(tmp_path / "choice", "bundle=micro", "scores=[]", "points=3")
    support = read_support(open_bundle("micro").backbone_file())
    scores = _trained_scores(config)
    assert scores == support.grid(3)
    with pytest.raises(UserError, match="the backbone of bundle debug does not say which scores"):
        _trained_scores(choice(tmp_path / "choice", "scores=[]"))


def test_one_score_is_no_choice_and_a_choice_that_was_not_made_is_named(tmp_path):
    with pytest.raises((UserError, ValidationError), match="scores"):
        choice(tmp_path / "choice", "scores=[1]")
    with pytest.raises(UserError, match=r"choice\.json"):
        chosen_score(str(tmp_path))
    (tmp_path / "choice.json").write_text("{}")
    with pytest.raises(UserError, match=r"choice\.json names no score"):
        chosen_score(str(tmp_path))


def test_scores_are_by_default_those_of_the_training_and_generation_takes_the_choice(tmp_path):
    support = ScoreSupport(min=-2.0, p5=-1.0, p95=0.5, max=2.0).to_dict()
    for seed, more in ((1, {"score_support": support}), (2, {})):
        model = debug_backbone(seed)
        about = {"backbone": model.config.to_dict(), **more}
        save_file(model.state_dict(), tmp_path / f"{seed}.safetensors", {METADATA: json.dumps(about)})
    weights, other = (str(tmp_path / f"{seed}.safetensors") for seed in (1, 2))
    (tmp_path / "prompts.csv").write_text("id,prompt\na,a calm piano\n")
    sets = ["sampler.steps=2", "max_clipping=1", "silence_dbfs=-200", "runtime.threads=1", "points=3"]
    command = [
        "choose-score",
        "--bundle",
        "debug",
        "--prompts",
        str(tmp_path / "prompts.csv"),
        "--output",
        str(tmp_path / "choice"),
    ]
    command += [f"--set={one}" for one in sets]
    assert main([*command, "--checkpoint", weights]) == 0
    assert {path.name for path in (tmp_path / "choice").glob("score*")} == {"score-1", "score0.5", "score2"}
    made = [
        "generate",
        "--bundle",
        "debug",
        "--prompt",
        "drums",
        "--output",
        str(tmp_path / "clips"),
        "--set=runtime.threads=1",
    ]
    made += ["--set=sampler.steps=1", "--score-from", str(tmp_path / "choice")]
    assert main([*made, "--checkpoint", weights]) == 0
    described = json.loads((tmp_path / "clips/run.json").read_text())
    assert described["config"]["sampler"]["score"] == chosen_score(str(tmp_path / "choice"), weights)
    assert main([*made, "--checkpoint", other]) == 2
    with pytest.raises(UserError, match="is not of the weights"):
        chosen_score(str(tmp_path / "choice"), other)
    with pytest.raises(UserError, match="does not say which scores it was trained on"):
        choose_score(choice(tmp_path / "other", f"checkpoint={other}", "scores=[]"))
