"""The command that trains the parts."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from damages import DAMAGES, content
from safetensors.torch import load_file

from ttmray.cli import main
from ttmray.config import load_config
from ttmray.models.folder_bundle import describe_folder
from ttmray.pretraining.clips import SHARD
from ttmray.pretraining.job import FACTS, PARTS
from ttmray.recipes.micro import MicroConfig

REPO = Path(__file__).resolve().parents[2]


def arguments(clips, output: Path, *sets: str) -> list[str]:
    data = f"data={{cache: {clips.folder}, seed: {clips.seed}, clips: {SHARD}, stems: 4, seconds: {clips.seconds}, "
    data += f"fresh_seed: {clips.seed}, fresh_clips: 10, fresh_stems: 2, workers: 1}}"
    text = "text={steps: 6, batch: 4, warmup: 1, dim: 32, layers: 1, vocabulary: 300}"
    every = ["parts=[text]", data, text, f"output={output}", "log_every=2", *sets]
    return ["train-micro", *[word for assignment in every for word in ("--set", assignment)]]


def test_a_part_is_trained_measured_written_and_then_complete(clips, tmp_path, capsys):
    assert main(arguments(clips, tmp_path)) == 0
    facts = json.loads((tmp_path / "text/facts.json").read_text())
    assert facts["updates"] == facts["planned"] == 6
    assert facts["items"] == 24
    assert facts["bytes"] == (tmp_path / "text/model.safetensors").stat().st_size
    assert facts["measured"].keys() == facts["untrained"].keys() >= {"tempo_word", "chance_tempo_word"}
    weights = (tmp_path / "text/model.safetensors").read_bytes()
    capsys.readouterr()
    assert main(arguments(clips, tmp_path)) == 0
    assert "text is complete" in capsys.readouterr().out
    assert main(arguments(clips, tmp_path / "again")) == 0
    assert (tmp_path / "again/text/model.safetensors").read_bytes() == weights


def test_a_budget_stops_a_part_and_a_larger_one_goes_on_to_the_same_weights(clips, tmp_path):
    assert main(arguments(clips, tmp_path / "whole")) == 0
    assert main(arguments(clips, tmp_path / "parts", "text.budget_s=1e-6")) == 0
    facts = json.loads((tmp_path / "parts/text/facts.json").read_text())
    assert facts["updates"] == 1
    assert main(arguments(clips, tmp_path / "parts")) == 0
    names = "whole", "parts"
    whole, parts = ((tmp_path / name / "text/model.safetensors").read_bytes() for name in names)
    assert whole == parts


def test_a_part_of_a_bundle_that_the_same_settings_made_is_copied_and_another_is_trained(clips, tmp_path, capsys):
    bundle = tmp_path / "bundle"
    assert main(arguments(clips, tmp_path / "first")) == 0
    (bundle / "text").mkdir(parents=True)
    for name in ("model.safetensors", "config.json", "tokenizer.json", FACTS):
        shutil.copy(tmp_path / "first/text" / name, bundle / "text" / name)
    describe_folder(bundle, "mine", "a note", clips.seconds)
    capsys.readouterr()
    assert main(arguments(clips, tmp_path / "second", f"reuse={bundle}")) == 0
    out = capsys.readouterr().out
    assert "text is that of" in out
    assert "updates in" not in out  # nothing was trained
    for name in ("model.safetensors", FACTS):
        assert (tmp_path / "second/text" / name).read_bytes() == (bundle / "text" / name).read_bytes()
    assert main(arguments(clips, tmp_path / "second", f"reuse={bundle}")) == 0
    assert "text is complete" in capsys.readouterr().out
    assert main(arguments(clips, tmp_path / "third", f"reuse={bundle}", "text.lr=0.002")) == 0
    assert "updates in" in capsys.readouterr().out
    (bundle / "text/config.json").write_text("{}")
    assert main(arguments(clips, tmp_path / "fourth", f"reuse={bundle}")) == 2
    assert "text/config.json" in capsys.readouterr().err
    assert main(arguments(clips, tmp_path / "fifth", "reuse=debug")) == 2
    assert "debug has no files" in capsys.readouterr().err


def test_the_second_clap_goes_on_from_the_first_which_must_be_there(clips, tmp_path, capsys):
    small = "steps: 2, batch: 2, warmup: 1, audio_dim: 16, depths: [1, 1, 1, 1], text_dim: 32, text_layers: 1"
    shape = f"clap={{{small}, vocabulary: 400}}"
    second = f"clap_condition={{{small}, vocabulary: 400, start: clap, lr: 1e-9, seed: 1}}"
    assert main(arguments(clips, tmp_path, shape, second, "parts=[clap_condition]")) == 2
    assert "clap_condition.start is clap, which is not trained yet" in capsys.readouterr().err
    assert main(arguments(clips, tmp_path, shape, second, "parts=[clap, clap_condition]")) == 0
    one, other = (load_file(tmp_path / part / "model.safetensors") for part in ("clap", "clap_condition"))
    name = "text_model.encoder.layer.0.output.dense.weight"
    assert torch.allclose(one[name], other[name], atol=1e-3)  # as good as nothing was learned since
    capsys.readouterr()
    assert main(arguments(clips, tmp_path, shape, second.replace("400", "450"), "parts=[clap_condition]")) == 2
    assert "part.vocabulary: 400 -> 450" in capsys.readouterr().err
    wider = second.replace("text_dim: 32", "text_dim: 48")
    assert main(arguments(clips, tmp_path / "wider", shape, wider, "parts=[clap, clap_condition]")) == 2
    assert "is of another shape" in capsys.readouterr().err


def test_other_settings_are_another_run(clips, tmp_path, capsys):
    assert main(arguments(clips, tmp_path, "text.budget_s=1e-6")) == 0
    assert main(arguments(clips, tmp_path, "text.lr=0.5")) == 2
    assert "part.lr: 0.001 -> 0.5" in capsys.readouterr().err


def test_the_config_of_the_bundle_is_valid_and_trains_every_part():
    config = load_config(MicroConfig, str(REPO / "configs/micro/train.yaml"), ["output=/tmp/x"])
    assert config.parts == PARTS
    assert config.data.seed != config.data.fresh_seed


@pytest.mark.parametrize("wrong", ["parts=[drums]", "vae.hidden=8", "data.cache=s3://bucket/clips"])
def test_what_cannot_be_trained_is_said_before_anything_is_done(wrong, clips, tmp_path, capsys):
    assert main(arguments(clips, tmp_path / "out", wrong)) == 2
    assert not (tmp_path / "out").exists()
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model.safetensors", "facts.json", "checkpoint.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("way", ["deleted", "flipped"])
def test_a_damaged_file_of_a_part_is_found_and_the_same_command_makes_it_again(clips, tmp_path, capsys, name, way):
    assert main(arguments(clips, tmp_path)) == 0
    part = tmp_path / "text"
    whole = content(part)
    DAMAGES[way](part / name, part)
    assert main(["verify", str(part)]) == 2
    assert main(arguments(clips, tmp_path)) == 0
    assert "it is made again" in capsys.readouterr().out
    assert main(["verify", str(part)]) == 0
    again = content(part)
    assert again.keys() == whole.keys()
    assert again["model.safetensors"] == whole["model.safetensors"]
