"""Songs of the small world as a step of a chain."""

import csv
from pathlib import Path

import pyarrow.parquet as pq
import soundfile

from ttmray.recipes import compose
from ttmray.recipes.compose import WorldConfig, compose_world
from ttmray.synth.world import clip

SMALL = {"pieces": 3, "seconds": 1.0, "prompts": 2, "workers": 1}


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_songs_have_their_truth_and_a_killed_step_goes_on_with_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(compose, "SHARD", 2)
    config = WorldConfig(seed=77, **SMALL)
    assert compose_world(config, str(tmp_path)) == 0
    rows = pq.read_table(tmp_path / "world.parquet").to_pylist()
    truth = clip(77, 1, 1.0)
    assert rows[1] == {"path": "songs/000001.flac", **truth.row()}
    assert soundfile.info(tmp_path / rows[1]["path"]).frames == truth.mix.shape[1]
    whole = files(tmp_path)
    for name in ("world.parquet", "rows/00001.json", "songs/000002.flac"):
        (tmp_path / name).unlink()
    (tmp_path / "rows/00000.json").touch()
    before = (tmp_path / "songs/000000.flac").stat().st_mtime_ns
    assert compose_world(config, str(tmp_path)) == 0
    assert files(tmp_path) == whole
    assert (tmp_path / "songs/000000.flac").stat().st_mtime_ns == before


def test_prompts_stay_the_same_whatever_songs_are_composed(tmp_path):
    for seed in (1, 2):
        compose_world(WorldConfig(seed=seed, **(SMALL | {"pieces": 2})), str(tmp_path / str(seed)))
    texts = [(tmp_path / f"{seed}/prompts.csv").read_text() for seed in (1, 2)]
    assert texts[0] == texts[1]
    assert [row["id"] for row in csv.DictReader(texts[0].splitlines())] == ["p000", "p001"]
    assert (tmp_path / "1/songs/000000.flac").read_bytes() != (tmp_path / "2/songs/000000.flac").read_bytes()
