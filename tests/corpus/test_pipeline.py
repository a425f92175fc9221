"""The runners: whoever runs the stages, in whatever layout, the index and the shards are the same."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ttmray.corpus import index
from ttmray.corpus.assembly import CorpusJob, stage_classes
from ttmray.corpus.config import CorpusConfig
from ttmray.corpus.job import score_corpus
from ttmray.corpus.pipeline import StageWorker, run_alone, run_local
from ttmray.corpus.placement import layout
from ttmray.corpus.plan import Plan
from ttmray.corpus.running import Chain, Job, run_stages
from ttmray.corpus.stage import Stage
from ttmray.corpus.unit import FAILED, OK, Unit
from ttmray.errors import UserError
from ttmray.storage import Folder

Prepare = Callable[[CorpusConfig], tuple[CorpusJob, Plan, list[Unit]]]


def contents(run: Path) -> dict[str, object]:
    """Rows, file hashes and latent sums of a run, unit by unit."""
    folder = Folder.at(str(run))
    names = index.committed_units(folder)
    return {
        name: (rows.to_pylist(), metadata)
        for name, (rows, metadata) in zip(names, index.read_units(folder, names), strict=True)
    }


@pytest.mark.slow
def test_two_processes_give_the_same_index_and_shards_as_one(songs, finished_run, make_config, tmp_path):
    assert score_corpus(make_config(songs, tmp_path / "run", "runtime.workers=2")) == 0
    assert contents(tmp_path / "run") == contents(finished_run)
    assert len(contents(finished_run)) == 3


def test_ray_gives_the_same_index_and_shards_as_one_process(songs, finished_run, make_config, tmp_path):
    import ray

    sets = ("runtime.runner=ray", "runtime.workers=2", "runtime.object_store_gib=0.2")
    try:
        assert score_corpus(make_config(songs, tmp_path / "run", *sets)) == 0
    finally:
        ray.shutdown()
    assert contents(tmp_path / "run") == contents(finished_run)


@pytest.mark.slow
@pytest.mark.parametrize("sets", [("runtime.fuse=none",), ("separation.scope=track",)])
def test_ray_gives_the_same_in_every_layout(songs, make_config, tmp_path, sets):
    import ray

    small = ("runtime.runner=ray", "runtime.workers=4", "runtime.object_store_gib=0.2")
    assert score_corpus(make_config(songs, tmp_path / "local", *sets)) == 0
    try:
        assert score_corpus(make_config(songs, tmp_path / "ray", *sets, *small)) == 0
    finally:
        ray.shutdown()
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")


def test_the_batch_size_does_not_change_the_index(songs, finished_run, make_config, tmp_path):
    assert score_corpus(make_config(songs, tmp_path / "run", "runtime.batch=1")) == 0
    assert contents(tmp_path / "run") == contents(finished_run)


@pytest.mark.parametrize("fuse", ["all", "models", "none"])
def test_the_layout_of_processes_does_not_change_the_index(
    songs, finished_run, make_config, prepare: Prepare, tmp_path, fuse
):
    """Group by group with Arrow tables in between, as Ray's actors do it."""
    config = make_config(songs, tmp_path / "run", f"runtime.fuse={fuse}")
    job, _, units = prepare(config)
    job = replace(job, run=json.loads((finished_run / "run.json").read_text())["fingerprint"])
    made = [StageWorker(job.to_json(), name, stages) for name, stages in layout(config, gpus=1)]
    for unit in units:
        table = unit.to_table()
        for worker in made:
            table = worker(table)
    assert contents(tmp_path / "run") == contents(finished_run)
    assert Folder.at(config.output).files("attempts") == []


@pytest.mark.parametrize("scope", ["clip", "track"])
@pytest.mark.parametrize("fuse", ["all", "models", "none"])
def test_every_layout_runs_each_stage_once_and_in_order(make_config, scope, fuse):
    config = make_config("in", "out", f"runtime.fuse={fuse}", f"separation.scope={scope}")
    groups = layout(config, gpus=1)
    assert [stage for _, stages in groups for stage in stages] == [stage.name for stage in stage_classes(config)]
    assert len({name for name, _ in groups}) == len(groups) <= 5
    if scope == "track":  # whole tracks are too large to travel
        (first,) = [stages for _, stages in groups if "decode" in stages]
        assert "separate" in first


@pytest.mark.parametrize(
    ("scope", "names"), [("clip", ("decode", "measure")), ("track", ("decode", "measure", "separate"))]
)
def test_a_unit_that_runs_alone_ends_as_if_it_had_run_together(
    songs, make_config, prepare: Prepare, tmp_path, scope, names
):
    config = make_config(songs, tmp_path / "run", f"separation.scope={scope}", "unit_clips=8")
    job, _, (unit, *_) = prepare(config)
    together = run_stages(job.build(names), Unit(unit.name, unit.tracks))
    alone = run_alone(job, names, Unit(unit.name, unit.tracks), timeout_s=120)
    assert alone.rows == together.rows
    assert {row["status"] for row in alone.rows} >= {OK, FAILED}
    assert alone.clips.keys() == together.clips.keys()
    for name, array in together.clips.items():
        np.testing.assert_array_equal(alone.clips[name], array)


def test_clips_that_run_alone_are_scaled_by_the_peak_of_their_track(songs, make_config, prepare: Prepare, tmp_path):
    config = make_config(songs, tmp_path / "run", "latent_peak=0.95")
    job, _, (unit, *_) = prepare(config)

    def instrumentals() -> Unit:
        decoded = run_stages(job.build(("decode",)), Unit(unit.name, unit.tracks))
        waves = decoded.clips["mix"].mean(axis=1)
        decoded.clips = {"instrumental": waves * np.geomspace(1, 0.1, len(waves), dtype=np.float32)[:, None]}
        return decoded

    assert len(unit.tracks) < len(instrumentals().rows)
    together = run_stages(job.build(("level", "encode")), instrumentals())
    alone = run_alone(job, ("level", "encode"), instrumentals(), timeout_s=120)
    np.testing.assert_array_equal(alone.clips["latent_mean"], together.clips["latent_mean"])


@pytest.mark.slow
def test_a_unit_that_runs_alone_through_all_stages_is_committed_with_the_same_bytes(
    songs, finished_run, make_config, prepare: Prepare, tmp_path
):
    config = make_config(songs, tmp_path / "run")
    job, _, (unit, *_) = prepare(config)
    job = replace(job, run=json.loads((finished_run / "run.json").read_text())["fingerprint"])
    run_alone(job, [stage.name for stage in job.stages()], unit, timeout_s=120)
    assert contents(tmp_path / "run") == {unit.name: contents(finished_run)[unit.name]}


def test_what_hangs_alone_is_quarantined_and_the_others_go_on(make_config, prepare: Prepare, songs, tmp_path):
    config = make_config(songs, tmp_path / "run", "unit_clips=8")
    job, _, (unit, *_) = prepare(config)
    late = run_alone(job, ("decode",), Unit(unit.name, unit.tracks), timeout_s=0.001)
    assert [row["track_id"] for row in late.rows] == [track["track_id"] for track in unit.tracks]
    assert {(row["status"], row["stage"], row["reason"]) for row in late.rows} == {(FAILED, "decode", "killed")}
    assert all("no answer within 0.001 s" in row["message"] for row in late.rows)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_user_error_of_a_stage_ends_the_run_with_its_message(make_config, prepare: Prepare, songs, tmp_path, workers):
    config = make_config(songs, tmp_path / "run", f"runtime.workers={workers}")
    job, _, units = prepare(config)
    job = replace(job, config=config.model_copy(update={"bundle": "nowhere"}).model_dump_json())
    with pytest.raises(UserError, match="there is no bundle 'nowhere'"):
        run_local(job, units, lambda _: None)


def test_a_job_travels_as_text(make_config, prepare: Prepare, songs, tmp_path):
    config = make_config(songs, tmp_path / "run")
    job, _, _ = prepare(config)
    again = Job.from_json(job.to_json())
    assert isinstance(again, CorpusJob)
    assert again == job
    assert again.corpus == config


def test_what_a_unit_waits_between_processes_is_noted(make_config, prepare: Prepare, songs, tmp_path):
    job, _, (unit, *_) = prepare(make_config(songs, tmp_path / "run", "separation.scope=none"))
    decoded = StageWorker(job.to_json(), "decode", ("decode", "measure"))(unit.to_table())
    time.sleep(0.2)
    timing = Unit.from_table(StageWorker(job.to_json(), "models", ("separate",))(decoded)).timing
    assert [stage for stage, times in timing.items() if "waited_s" in times] == ["separate"]
    assert 0.2 <= timing["separate"]["waited_s"] < 30


def test_seconds_of_stages_with_models_count_for_the_gpu_that_their_process_has(monkeypatch):
    class Modelled(Stage):
        name, model_roles = "score", ("clap",)

        def __call__(self, unit: Unit) -> Unit:
            return unit

    class Plain(Modelled):
        name, model_roles = "measure", ()

    for has_gpu in (False, True):
        monkeypatch.setattr("torch.cuda.is_initialized", lambda has=has_gpu: has)
        timing = run_stages(Chain([Plain(), Modelled()]), Unit("u0", [])).timing
        assert "gpu_s" not in timing["measure"]
        assert timing["score"].get("gpu_s") == (timing["score"]["wall_s"] if has_gpu else None)


def test_nothing_to_do_starts_nothing(make_config, prepare: Prepare, songs, tmp_path):
    job, _, _ = prepare(make_config(songs, tmp_path / "run", "runtime.workers=2"))
    run_local(job, [], lambda _: pytest.fail("there is no unit"))
