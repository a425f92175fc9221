"""What stages declare is what they do, and an array lives no longer than its last reader."""

import gc
import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ttmray.config import load_config
from ttmray.corpus.running import Chain, Job, run_stages
from ttmray.corpus.stage import Stage, alive, reads
from ttmray.corpus.unit import Unit
from ttmray.generation.pool import choose_prompts, plan_pool
from ttmray.generation.pool_worker import CandidatesConfig, PoolJob, candidates


class Watched(dict[str, Any]):
    """Notes which of its values are taken out."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)


def pool_job(folder: Path, *sets: str) -> tuple[Job, Unit]:
    (folder / "prompts.csv").write_text("id,prompt\na,calm piano\nb,drums\n")
    usual = (f"prompts={folder}/prompts.csv", f"output={folder}/pool", "sampler.steps=1", "candidates=1")
    usual += ("bundle=debug", "runtime.device=cpu", "runtime.threads=1")
    config = load_config(CandidatesConfig, None, [*usual, *sets])
    name, tracks = next(plan_pool(choose_prompts(config).chosen, config).units())
    unit = Unit(name, tracks)
    unit.rows = candidates(config, unit, "debug/test")
    return PoolJob(config.model_dump_json(), "", "debug/test"), unit


CORPORA = [(), ("separation.scope=track",), ("keep_audio=true", "latent_peak=0.95")]
POOLS = [("pool",), ("pool", "keep_audio=true")]


@pytest.fixture(params=CORPORA + POOLS, ids=" ".join)
def job_and_unit(request, songs, make_config, prepare, tmp_path) -> tuple[Job, Unit]:
    if request.param[:1] == ("pool",):
        return pool_job(tmp_path, *request.param[1:])
    job, _, (unit, *_) = prepare(make_config(songs, tmp_path / "run", "unit_clips=8", *request.param))
    return job, unit


def test_every_stage_reads_and_writes_what_it_declares_and_nothing_else(job_and_unit):
    job, unit = job_and_unit
    written: set[str] = set()
    for stage in job.build([stage.name for stage in job.stages()]).stages:
        clips, tracks = Watched(unit.clips), Watched(unit.track_audio)
        unit.clips, unit.track_audio = clips, tracks
        before, tracks_before, captions = set(clips), set(tracks), unit.caption_ids
        unit = run_stages(Chain([stage], frozenset({*clips, *stage.writes, "track_audio", "texts"})), unit)
        read = clips.read | ({"track_audio"} if tracks.read else set())
        read |= {"texts"} if stage.name == "write" and captions else set()
        there = written & set(stage.reads)
        assert read == there, stage.name
        added = set(unit.clips) - before
        added |= {"track_audio"} if set(unit.track_audio) > tracks_before else set()
        added |= {"texts"} if unit.texts and not captions else set()
        assert added == set(stage.writes), stage.name
        written |= added
    assert unit.ok_rows()


class Probe(Stage):
    """Notes what is there between two stages."""

    name, scope = "probe", "unit"

    def __init__(self) -> None:
        self.there: set[str] = set()
        self.arrays: dict[str, weakref.ref[np.ndarray]] = {}

    def __call__(self, unit: Unit) -> Unit:
        gc.collect()
        self.there = {*unit.clips, *(["track_audio"] if unit.track_audio else []), *(["texts"] if unit.texts else [])}
        self.arrays = {name: weakref.ref(array) for name, array in unit.clips.items()}
        self.before = {name for probe in self.others() for name, ref in probe.arrays.items() if ref() is not None}
        return unit

    def others(self) -> Iterator["Probe"]:
        return iter(())


def test_an_array_is_gone_after_its_last_reader(job_and_unit):
    job, unit = job_and_unit
    classes = job.stages()
    probes = [Probe() for _ in classes]
    for number, probe in enumerate(probes):
        probe.others = lambda number=number: iter(probes[:number])  # type: ignore[method-assign]
    chain = job.build([stage.name for stage in classes])
    pairs = zip(chain.stages, probes, strict=True)
    unit = run_stages(Chain([stage for pair in pairs for stage in pair]), unit)
    for position, (stage, probe) in enumerate(zip(classes, probes, strict=True), 1):
        assert probe.there == alive(classes, position), stage.name
        # a pool's instrumental is a view of its mix
        view = {"mix"} if isinstance(job, PoolJob) and "instrumental" in probe.there else set()
        assert probe.before - view <= probe.there, f"memory of an array that nobody reads after {stage.name}"
    there = {stage.name: probe.there for stage, probe in zip(classes, probes, strict=True)}
    if "separate" in there:
        assert "mix" in there["measure"]
        assert there["separate"] & {"mix", "track_audio"} == set()
        assert "mix_mono" not in there["score"]
        assert ("instrumental" in there["encode"]) == ("instrumental" in classes[-1].reads)
    assert there["write"] == set()
    assert (unit.clips, unit.texts, unit.caption_ids) == ({}, {}, [])


def test_in_a_process_that_ends_early_only_what_others_read_is_left(songs, make_config, prepare, tmp_path):
    job, _, (unit, *_) = prepare(make_config(songs, tmp_path / "run", "unit_clips=8"))
    decoded = run_stages(job.build(["decode", "measure"]), unit)
    assert set(decoded.clips) == {"mix"}
    scored = run_stages(job.build(["separate", "score"]), decoded)
    assert set(scored.clips) == {"instrumental", "clap_audio", "mert"}
    assert reads([stage for stage in job.stages() if stage.name in ("encode", "text", "write")]) >= set(scored.clips)


def test_a_job_of_another_kind_travels_as_text_too(tmp_path):
    job, _ = pool_job(tmp_path)
    assert Job.from_json(job.to_json()) == job
    assert json.loads(job.to_json())["job"] == "ttmray.generation.pool_worker:PoolJob"
