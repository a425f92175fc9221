"""The recipe of a whole bundle, with parts of a few updates each."""

import json
from pathlib import Path

import pytest
import soundfile

from ttmray.cli import main
from ttmray.models.bundle import ROLES, open_bundle
from ttmray.models.loading import LoadOptions
from ttmray.pretraining.job import PARTS

SETTINGS = {
    "data": "{seed: 0, clips: 32, stems: 8, seconds: 2.0, fresh_clips: 10, fresh_stems: 4, workers: 1, cache: %s}",
    "clap": "{steps: 3, batch: 4, audio_dim: 16, depths: [1, 1, 1, 1], text_dim: 32, text_layers: 1, vocabulary: 300}",
    "clap_condition": "{steps: 3, batch: 4, audio_dim: 16, depths: [1, 1, 1, 1], text_dim: 32, seed: 1}",
    "mert": "{steps: 3, batch: 2, hidden: 32, layers: 1, channels: 16, clusters: 10}",
    "vae": "{steps: 3, batch: 2, hidden_dim: 16, embed_dim: 8, crop_frames: 64}",
    "text": "{steps: 3, batch: 4, dim: 32, layers: 1, vocabulary: 300}",
    "separator": "{steps: 2, batch: 1, channels: 4, depth: 4, segment_s: 1.0}",
    "listening": "{clips: 12, votes: 60, seed: 2}",
    "ranker": "{variants: [A7], head: {widths: [16], max_epochs: 3}, split: {by: pair}, training: {threads: 1}}",
    "corpus": "{separation: {scope: none}, splits: {validation: 4, test: 4}, runtime: {runner: local, workers: 0}}",
    "stage1": "{model: {size: micro}, batch: 4, steps: 3, precision: fp32, optimizer: {warmup: 1}}",
}


def arguments(folder: Path) -> list[str]:
    sets = [f"output={folder / 'run'}"]
    sets += [f"{name}={value % (folder / 'clips') if '%s' in value else value}" for name, value in SETTINGS.items()]
    return [word for assignment in sets for word in ("--set", assignment)]


@pytest.mark.slow
def test_a_bundle_is_made_from_nothing_loads_in_every_role_and_makes_clips_of_its_length(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "ttmray.models.clap.check_text_tower", lambda clap: None
    )  # three updates tell no captions apart
    assert main(["train-micro", *arguments(tmp_path)]) == 0
    folder = tmp_path / "run/bundle"
    bundle = open_bundle(str(folder))
    assert (bundle.name, bundle.clip_s) == ("micro", 2.0)
    models = bundle.load(ROLES, LoadOptions(clip_samples=88_200))
    assert all(getattr(models, role) is not None for role in ROLES if role != "vocoder"), ROLES
    text = (folder / "README.md").read_text()
    assert all(part.replace("_", r"\_") in text for part in PARTS)
    capsys.readouterr()
    assert main(["train-micro", *arguments(tmp_path)]) == 0
    assert "nothing to do" in capsys.readouterr().out
    words = ["generate", "--set", "texts=[slow piano]", "--set", f"bundle={folder}", "--set", "sampler={steps: 2}"]
    assert main([*words, "--set", f"output={tmp_path / 'generated'}", "--set", "scores=true"]) == 0
    [clip] = (tmp_path / "generated").glob("**/*.wav")
    assert soundfile.info(clip).duration == pytest.approx(2.0, abs=1e-3)
    row = json.loads((folder / "bundle.json").read_text())
    assert "backbone/model.safetensors" in row["files"]


def test_votes_about_clips_that_the_parts_have_seen_are_refused(tmp_path, capsys):
    assert main(["train-micro", *arguments(tmp_path), "--set", "listening.seed=0"]) == 2
    assert "listening.seed is 0" in capsys.readouterr().err
