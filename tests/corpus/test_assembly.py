"""Stages from outside of the package: a module that nobody here knows adds a column to the index."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from ttmray.config import identity
from ttmray.corpus import index, look, scores, shards
from ttmray.corpus.assembly import stage_classes
from ttmray.corpus.config import CorpusConfig
from ttmray.corpus.job import score_corpus
from ttmray.corpus.placement import layout
from ttmray.corpus.unit import FAILED, OK
from ttmray.corpus.verify import problems
from ttmray.errors import UserError
from ttmray.storage import Folder
from ttmray.training.clips import read_rows

PLUGIN = '''
import numpy as np
import pyarrow as pa

from ttmray.corpus.stage import Stage


class Brightness(Stage):
    """Share of the energy above a frequency."""

    name = "brightness"
    reads = ("mix",)
    writes = ("spectrum",)
    columns = {"brightness": pa.float64()}
    version = "1"

    def __init__(self, models, load, above_hz=4000.0, breaks=""):
        self.above_hz, self.breaks = above_hz, breaks

    def __call__(self, unit):
        power = np.abs(np.fft.rfft(unit.clips["mix"].mean(axis=1))) ** 2
        high = np.fft.rfftfreq(unit.clips["mix"].shape[-1], 1 / 44100) > self.above_hz
        for row, clip in zip(unit.ok_rows(), power, strict=True):
            row.update(stage=self.name, brightness=clip[high].sum() / clip.sum())
            if row["track_id"] == self.breaks:
                row["brightness"] = float("nan")
        unit.clips["spectrum"] = power.astype(np.float32)
        return unit


class Peak(Stage):
    """The loudest frequency, of what another stage from outside has made."""

    name = "peak"
    reads = ("spectrum", "clap_audio")
    columns = {"peak_hz": pa.int32()}

    def __init__(self, models, load):
        assert load.device == "cpu"

    def __call__(self, unit):
        for row, power in zip(unit.ok_rows(), unit.clips["spectrum"], strict=True):
            row["peak_hz"] = int(power.argmax()) // 10
        return unit


class Late(Peak):
    name, reads, columns = "late", ("clap_audio",), {"late": pa.float64()}


class Taken(Peak):
    columns = {"reward_score": pa.float64()}


class Lost(Peak):
    reads = ("nothing",)


class Elsewhere(Peak):
    reads, resources = (), "decode"


class Tracks(Peak):
    scope = "track"


class Half(Stage):
    name = "half"


def function(models, load):
    pass
'''
BRIGHTNESS = "extra_stages=[{stage: 'brightness_plugin:Brightness'}]"
BOTH = "extra_stages=[{stage: 'brightness_plugin:Brightness'}, {stage: 'brightness_plugin:Peak'}]"


@pytest.fixture(autouse=True)
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "brightness_plugin.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{Path(__file__).parents[2]}")  # of Ray's workers
    return folder


def rows_of(run: Path | str) -> list[dict[str, Any]]:
    return index.read_index(Folder.at(str(run))).to_pylist()


def test_a_stage_from_outside_adds_a_column_that_everybody_reads(songs, finished_run, make_config, tmp_path, capsys):
    output = tmp_path / "run"
    assert score_corpus(make_config(songs, output, "runtime.workers=1", BOTH)) == 0
    run = Folder.at(str(output))
    rows, plain = rows_of(output), rows_of(finished_run)
    for row, other in zip(rows, plain, strict=True):
        new = {name: row.pop(name) for name in ("brightness", "peak_hz")}
        assert row | {"shard": None} == other | {"shard": None}, "nothing else changes"
        assert all(value is not None for value in new.values()) == (row["status"] == OK)
    wave = next(row for row in rows_of(output) if row["key"] == "wave_0")
    assert wave["peak_hz"] == 440
    members = dict(shards.read_samples(run.read(wave["shard"]), wave["shard"]))["wave_0"]
    assert members["json"]["brightness"] == wave["brightness"]
    assert "spectrum.npy" not in members
    assert index.read_units(run, ["u000000"])[0][0].schema.field("brightness").type == pa.float64()
    assert list(problems(run)) == []

    assert "brightness" in scores.columns(run)
    with pytest.raises(UserError, match=r"no score column 'darkness'\. It has: .*brightness"):
        scores.require_column(run, "darkness")
    capsys.readouterr()
    look.ls(str(output), None, 0, json=True, columns="key,brightness")
    listed = [json.loads(line) for line in capsys.readouterr().out.replace("\n{", "\0{").split("\0")]
    assert {row["key"]: row["brightness"] for row in listed}["wave_0"] == wave["brightness"]
    for_training = {row["key"]: row["brightness"] for row in read_rows(str(output), "brightness").rows.to_pylist()}
    assert for_training == {row["key"]: row["brightness"] for row in rows_of(output)}


def test_a_clip_whose_value_is_not_a_number_is_quarantined_alone(songs, make_config, tmp_path):
    sets = "extra_stages=[{stage: 'brightness_plugin:Brightness', options: {breaks: kite}}]"
    assert score_corpus(make_config(songs, tmp_path / "run", "unit_clips=8", "max_failures=2", sets)) == 0
    rows = {row["key"]: row for row in rows_of(tmp_path / "run")}
    assert (rows["kite_0"]["status"], rows["kite_0"]["stage"]) == (FAILED, "brightness")
    assert "brightness of kite_0 is nan" in rows["kite_0"]["message"]
    assert rows["kite_0"]["brightness"] is None
    assert {rows[key]["status"] for key in ("tide_0", "tide_1", "wave_0")} == {OK}


def test_other_options_and_another_version_are_another_run(songs, make_config, tmp_path, plugin, monkeypatch):
    import brightness_plugin

    assert score_corpus(make_config(songs, tmp_path / "run", "catalogue.limit=1", "splits.validation=0",
                                    "splits.test=0", BRIGHTNESS)) == 0  # fmt: skip
    same = ("catalogue.limit=1", "splits.validation=0", "splits.test=0")
    other = "extra_stages=[{stage: 'brightness_plugin:Brightness', options: {above_hz: 100}}]"
    with pytest.raises(UserError, match=r"config\.extra_stages"):
        score_corpus(make_config(songs, tmp_path / "run", *same, other))
    monkeypatch.setattr(brightness_plugin.Brightness, "version", "2")
    with pytest.raises(UserError, match=r"stages\.brightness: '1' -> '2'"):
        score_corpus(make_config(songs, tmp_path / "run", *same, BRIGHTNESS))


def test_a_config_without_stages_from_outside_has_the_identity_that_it_always_had(make_config):
    assert "extra_stages" not in identity(make_config("in", "out"))


def names(config: CorpusConfig) -> list[str]:
    return [stage.name for stage in stage_classes(config)]


def test_a_stage_stands_where_its_arrays_are_there_and_keeps_none_alive(make_config):
    late = BOTH[:-1] + ", {stage: 'brightness_plugin:Late'}]"
    order = names(make_config("in", "out", late))
    assert order == ["decode", "measure", "brightness", "separate", "score", "encode", "text", "peak", "late", "write"]
    groups = layout(make_config("in", "out", late, "runtime.fuse=none"), gpus=1)
    assert [stage for _, stages in groups for stage in stages] == order
    assert [(name, stages[0]) for name, stages in groups] == [
        ("decode", "decode"),
        ("separate", "brightness"),
        ("score", "score"),
        ("encode", "encode"),
        ("write", "write"),
    ]
    assert groups[3][1] == ("encode", "text", "peak", "late")
    fused = layout(make_config("in", "out", late, "runtime.fuse=models", "separation.scope=track"), gpus=1)
    assert [name for name, _ in fused] == ["models"], "whoever has the models writes"


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("no_such_module:Stage", "cannot be imported: No module named"),
        ("brightness_plugin:Darkness", "cannot be imported"),
        ("brightness_plugin:function", "is no stage"),
        ("brightness_plugin:Half", "is no stage"),
        ("brightness_plugin:Tracks", "is for whole tracks"),
        ("brightness_plugin:Taken", "no column from outside can be called 'reward_score'"),
        ("brightness_plugin:Peak", "reads 'spectrum'"),
        ("brightness_plugin:Lost", "reads 'nothing'"),
        ("brightness_plugin:Elsewhere", "has the resources 'decode'"),
        ("brightness_plugin:Brightness', options: {volume: 1}, x: '", "unknown field"),
    ],
)
def test_what_is_no_stage_is_said_before_anything_is_written(songs, make_config, tmp_path, stage, message):
    with pytest.raises(UserError, match=message):
        score_corpus(make_config(songs, tmp_path / "run", f"extra_stages=[{{stage: '{stage}'}}]"))
    assert not (tmp_path / "run").exists()


def test_an_option_that_the_class_does_not_take_and_a_stage_twice_are_refused(make_config):
    wrong = "extra_stages=[{stage: 'brightness_plugin:Brightness', options: {volume: 1}}]"
    with pytest.raises(UserError, match="does not take its options: got an unexpected keyword argument 'volume'"):
        stage_classes(make_config("in", "out", wrong))
    twice = BRIGHTNESS[:-1] + ", {stage: 'brightness_plugin:Brightness'}]"
    with pytest.raises(UserError, match="no stage from outside can be called 'brightness'"):
        stage_classes(make_config("in", "out", twice))


@pytest.mark.slow
def test_ray_runs_a_stage_from_outside_in_the_process_of_its_neighbour(songs, make_config, tmp_path):
    import ray

    local, other = tmp_path / "local", tmp_path / "ray"
    assert score_corpus(make_config(songs, local, BOTH)) == 0
    small = ("runtime.runner=ray", "runtime.workers=4", "runtime.object_store_gib=0.2", "runtime.fuse=none")
    try:
        assert score_corpus(make_config(songs, other, BOTH, *small)) == 0
    finally:
        ray.shutdown()
    assert rows_of(other) == rows_of(local)
    shutil.rmtree(other)
