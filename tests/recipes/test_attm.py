"""The challenge kit: the official layout and split, checked submissions."""

import json
import random
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ttmray.cli import main
from ttmray.config import load_config
from ttmray.corpus.catalogue import build_catalogue
from ttmray.corpus.config import CatalogueConfig, CorpusConfig, SplitConfig
from ttmray.corpus.splits import assign_splits
from ttmray.errors import EXIT_BAD_INPUT, EXIT_OK, UserError
from ttmray.generation.config import GenerateConfig
from ttmray.models.backbone import SIZES
from ttmray.models.backbone_weights import CHALLENGE_LIMIT, count_parameters, debug_backbone
from ttmray.recipes.attm_metrics import AttmConfig
from ttmray.training.config import TrainConfig
from ttmray.training.memory import FREE_SHARE, split_batch

REPO = Path(__file__).resolve().parents[2]
RATE = 44_100
IDS = [str(1_085_700 + i) for i in range(12)]


@pytest.fixture
def songs(tmp_path: Path) -> Path:
    """The official layout with mixes beside the separated songs, and captions of more songs than there is audio."""
    root = tmp_path / "separated"
    for one in IDS[:10]:
        (root / one[-2:]).mkdir(parents=True, exist_ok=True)
        (root / one[-2:] / f"{one}_instrumental.mp3").write_bytes(one.encode())
        (root / one[-2:] / f"{one}.mp3").write_bytes(b"mix of " + one.encode())
    entries = [{"path": f"{one[-2:]}/{one}.mp3", "caption": f"Song\t{one}\nof many"} for one in IDS]
    (tmp_path / "jamendo_qwen.json").write_text(json.dumps(entries))
    return root


def test_the_split_is_the_baseline_s_and_a_corpus_takes_it(songs, tmp_path):
    captions, out = tmp_path / "jamendo_qwen.json", tmp_path / "splits"
    command = ["attm", "split", str(captions), "--audio", str(songs), "--out", str(out)]
    assert main([*command, "--validation", "2", "--test", "3"]) == EXIT_OK
    ids = IDS[:10]  # in caption order, those that have audio
    random.seed(42)
    random.shuffle(ids)
    for name, part in (("test", ids[:3]), ("val", ids[3:5]), ("train", ids[5:]), ("all", ids)):
        lines = (out / f"jamendo_{name}.tsv").read_text()
        assert lines == "id\tcaption\n" + "".join(f"{one}\tSong {one} of many\n" for one in part)
    config = CatalogueConfig(stem="_instrumental", captions=str(captions))
    catalogue = build_catalogue(str(songs), config)
    assert sorted(track.track_id for track in catalogue.tracks) == sorted(ids)
    assert all(track.path.endswith("_instrumental.mp3") for track in catalogue.tracks)
    assert all(track.caption == f"Song {track.track_id} of many" for track in catalogue.tracks)
    assert catalogue.report["audio_without_stem"] == 10
    splits = assign_splits(catalogue.tracks, SplitConfig(table=str(out / "splits.csv")))
    of = {track.track_id: split for track, split in zip(catalogue.tracks, splits, strict=True)}
    assert {one for one, split in of.items() if split == "test"} == set(ids[:3])
    assert {one for one, split in of.items() if split == "validation"} == set(ids[3:5])


def test_a_layout_without_mixes_is_the_same_catalogue(songs):
    config = CatalogueConfig(stem="_instrumental", captions=None)
    both = build_catalogue(str(songs), config).tracks
    for mix in songs.rglob("*.mp3"):
        if "_instrumental" not in mix.name:
            mix.unlink()
    alone = build_catalogue(str(songs), config).tracks
    assert [(one.track_id, one.path) for one in alone] == [(one.track_id, one.path) for one in both]
    with pytest.raises(UserError, match="_vocals"):
        build_catalogue(str(songs), CatalogueConfig(stem="_vocals", captions=None))


def test_splits_that_cannot_be_used_are_named(songs, tmp_path):
    tracks = build_catalogue(str(songs), CatalogueConfig(stem="_instrumental", captions=None)).tracks
    for text, message in (
        ("id,split\n1085700,holdout\n", "holdout"),
        ("id,split\n1085700,test\n1085700,train\n", "two splits"),
        ("id,split\nother,test\n", "none of the 10 tracks"),
    ):
        (tmp_path / "splits.csv").write_text(text)
        with pytest.raises(UserError, match=message):
            assign_splits(tracks, SplitConfig(table=str(tmp_path / "splits.csv")))


def clips(folder: Path, names: list[str], seconds: float = 10.0, rate: int = RATE, level: float = 0.1) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        noise = np.random.default_rng(i).normal(scale=level, size=round(seconds * rate))
        soundfile.write(folder / name, noise, rate, subtype="PCM_16")
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    (tmp_path / "prompts.csv").write_text("id,prompt\np1,a harp\np2,a choir\n")
    return str(tmp_path / "prompts.csv")


def test_a_submission_that_passes_is_a_flat_zip_with_equal_bytes(tmp_path, prompts, capsys):
    folder, out = clips(tmp_path / "clips", ["p1.wav", "p2.wav"]), tmp_path / "sub.zip"
    assert main(["attm", "submit", str(folder), "--prompts", prompts, "--out", str(out)]) == EXIT_OK
    with zipfile.ZipFile(out) as archive:
        assert archive.namelist() == ["p1.wav", "p2.wav"]
        assert archive.read("p1.wav") == (folder / "p1.wav").read_bytes()
    first = out.read_bytes()
    assert main(["attm", "submit", str(folder), "--prompts", prompts, "--out", str(out)]) == EXIT_OK
    assert out.read_bytes() == first
    assert "parameters are not counted" in capsys.readouterr().out


def test_everything_that_is_wrong_with_a_submission_is_said_at_once_and_nothing_is_written(tmp_path, prompts, capsys):
    folder, out = clips(tmp_path / "clips", ["p1.wav", "other.wav"]), tmp_path / "sub.zip"
    clips(folder, ["p1.wav"], seconds=9.98)
    clips(folder, ["p2.wav"], rate=16_000, level=0.0)
    (folder / "p1.flac").write_bytes(b"nothing" * 20)
    assert main(["attm", "submit", str(folder), "--prompts", prompts, "--out", str(out)]) == EXIT_BAD_INPUT
    said = capsys.readouterr().out
    for problem in ("other.wav is of no prompt", "two clips of one prompt", "p2.wav: silent", "not_audio"):
        assert problem in said
    clips(folder, ["p2.wav"], rate=16_000)
    (folder / "p1.flac").unlink()
    assert main(["attm", "submit", str(folder), "--prompts", prompts, "--out", str(out)]) == EXIT_BAD_INPUT
    said = capsys.readouterr().out
    assert "p1.wav: 9.9800 s, not 10 s" in said
    assert "2 sample rates" in said
    assert not out.exists()


def test_the_parameters_of_the_efficiency_track_are_counted(tmp_path, prompts, monkeypatch, capsys):
    import torch

    folder, out = clips(tmp_path / "clips", ["p1.wav", "p2.wav"]), tmp_path / "sub.zip"
    torch.save(debug_backbone(0, "none").state_dict(), tmp_path / "w.pth")
    command = ["attm", "submit", str(folder), "--prompts", prompts, "--out", str(out)]
    command += ["--checkpoint", str(tmp_path / "w.pth")]
    assert main(command) == EXIT_OK
    monkeypatch.setattr("ttmray.recipes.attm.CHALLENGE_LIMIT", 1000)
    assert main(command) == EXIT_BAD_INPUT
    assert "more than 1,000" in capsys.readouterr().out
    assert main([*command, "--track", "performance"]) == EXIT_OK
    for size in ("s_44k", "l_44k"):
        assert sum(a + b for _, a, b in count_parameters(SIZES[size])) <= CHALLENGE_LIMIT


@pytest.mark.parametrize("gigabytes", [16, 24, 48])
def test_presets_of_cards_state_the_memory_that_is_counted_and_it_fits(gigabytes, monkeypatch):
    monkeypatch.chdir(REPO)
    path = REPO / f"configs/attm/stage1-{gigabytes}gb.yaml"
    config = load_config(TrainConfig, str(path))
    said = re.search(r"(\d+) samples at a time, ([\d.]+) GiB by count", path.read_text())
    assert said is not None
    split = split_batch(
        SIZES["s_44k"], share=config.batch, device_batch=config.runtime.device_batch, averages=2, bf16=True,
        checkpointing=False, free_bytes=None,
    )  # fmt: skip
    assert (split.device_batch, f"{split.bytes / 2**30:.1f}") == (int(said[1]), said[2])
    assert split.bytes < FREE_SHARE * gigabytes * 1e9
    assert 2 * split.device_batch * split.sample_bytes > 0.4 * FREE_SHARE * gigabytes * 1e9, "and it uses the card"
    assert (config.model.head, config.batch, config.steps) == ("none", 128, 200_000)


def test_the_other_presets_load(monkeypatch):
    monkeypatch.chdir(REPO)
    corpus = load_config(CorpusConfig, "configs/attm/corpus.yaml")
    assert (corpus.separation.scope, corpus.catalogue.stem) == ("none", "_instrumental")
    clip = load_config(GenerateConfig, "configs/attm/generate.yaml")
    assert (clip.sampler.weight, clip.sampler.score, clip.format) == (4.5, None, "wav16")
    metrics = load_config(AttmConfig, "configs/attm/evaluate.yaml", ["judge.model=some/listener"])
    assert metrics.folders == (f"ours={clip.output.removeprefix(f'{REPO}/')}",)
    assert metrics.judge is not None
