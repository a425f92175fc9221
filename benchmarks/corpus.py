"""The corpus job against its bounds and against the plain way of doing the same.

    python benchmarks/corpus.py [--quick] [--only decode plan ...] [--output FILE.json]

Ratios are taken within one run, with both sides in alternation; the table gives the median and the extremes.

decode    CPU time of the decode stage against a bare soundfile.read + soxr loop that cuts the same clips, on one
          core. The loop checks nothing, hashes nothing and leaves mono files mono.
pool      Wall time of a straight loop over the stages in one process, divided by that of the local runner with 2
          processes; one thread each. The runner's clock starts when its first unit starts (the time at which the
          unit came back minus its stages' wall time), so loading models is in neither side; the second worker's
          later start and the uneven end are in.
ray       CPU seconds per clip of the Ray runner divided by those of the local runner, both as they are by default
          but with one worker, on a bundle of more than 0.3 CPU-seconds per clip. CPU is that of the whole process
          tree, Ray's daemons included (sampled from /proc; see benchmarks/common.py), from the first commit to the
          last, so that starting Python, Ray and models is not in it; what it costs is a line of its own. Once more
          with stages in five processes, where audio travels. Memory is the peak of the tree's summed PSS.
plan      `ttmray plan` on the MTG-Jamendo catalogue, as a process from start to end.
relaunch  `jobs/score_corpus.py` on a finished run, as a process from start to end; it must not import ray.

Songs come from $TTMRAY_DATA (default ../shared/data); without it from the built-in generator, and the catalogue
is a synthetic one of the same size. Exit code 1 if a target is missed. A full run takes about 9 minutes on 2
cores and wants an otherwise idle machine; --quick only shows that everything runs, and judges nothing.
"""

import os

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before numpy and torch are imported

import argparse
import csv
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import soundfile
import soxr
from common import Line, Measured, machine, one_core, report, run_measured, spread

from ttmray.audio import segment
from ttmray.config import load_config
from ttmray.corpus.assembly import CorpusJob
from ttmray.corpus.catalogue import build_catalogue
from ttmray.corpus.config import CorpusConfig
from ttmray.corpus.pipeline import run_local
from ttmray.corpus.plan import build_plan
from ttmray.corpus.running import run_stages
from ttmray.corpus.unit import OK, Unit
from ttmray.models.scoring import SAMPLE_RATE
from ttmray.synth.songs import write_demo_songs

Argument = TypeVar("Argument")
Result = TypeVar("Result")

REPO = Path(__file__).resolve().parents[1]
DECODE_BOUND = 530.0
"""Times real time per core that plans count on for MP3 (docs/performance.md)."""
CLIPS_PER_TRACK = 8
TRACK_S = 10 * CLIPS_PER_TRACK + 0.5
SPREAD = (
    "runtime.decode={cpus: 0.5, workers: [1, 1]}",
    "runtime.models={cpus: 1, workers: [1, 1]}",
    "runtime.write={cpus: 0.5, workers: [1, 1]}",
)
COMMON = ("splits.validation=0", "splits.test=0", "runtime.device=cpu", "catalogue.captions=null")


@dataclass(frozen=True)
class Size:
    """How much is run. Tracks have 8 clips."""

    repeats: int
    decode_repeats: int
    pool_tracks: int
    ray_bundle: str
    ray_tracks: int


FULL = Size(repeats=3, decode_repeats=7, pool_tracks=8, ray_bundle="debug-wide", ray_tracks=4)
QUICK = Size(repeats=1, decode_repeats=2, pool_tracks=2, ray_bundle="debug", ray_tracks=3)


@dataclass(frozen=True)
class Inputs:
    """Where songs, tables and results lie: `work` is temporary, `mp3` a folder of MP3s at 44.1 kHz."""

    work: Path
    mp3: Path
    real: bool
    data: Path

    def songs(self, count: int, seconds: float = TRACK_S) -> Path:
        """A folder of `count` MP3s of `seconds` each, cut from the songs at different places."""
        folder = self.work / f"songs-{count}-{seconds:g}"
        if not folder.exists():
            folder.mkdir()
            audio = _joined(self.mp3)
            for i in range(count):
                part = np.roll(audio, -i * 7 * SAMPLE_RATE, axis=0)[: round(seconds * SAMPLE_RATE)]
                soundfile.write(folder / f"track{i:03d}.mp3", part, SAMPLE_RATE, format="MP3")
        return folder


def prepare(work: Path) -> Inputs:
    data = Path(os.environ.get("TTMRAY_DATA", REPO.parent / "shared" / "data"))
    if (data / "tracks").is_dir():
        return Inputs(work, data / "tracks", True, data)
    write_demo_songs(work / "demo")
    return Inputs(work, work / "demo", False, data)


def _joined(folder: Path) -> np.ndarray:
    """The stereo songs of a folder one after the other, at 44.1 kHz, repeated to at least 3 minutes."""
    parts = []
    for path in sorted(folder.rglob("*.mp3")):
        if "odd" in path.parts:
            continue
        audio, rate = soundfile.read(path, dtype="float32", always_2d=True)
        if (audio.shape[1], rate) == (2, SAMPLE_RATE):
            parts.append(audio)
    joined = np.concatenate(parts)
    return np.tile(joined, (max(1, -(-180 * SAMPLE_RATE // len(joined))), 1))


def configure(*sets: str) -> CorpusConfig:
    return load_config(CorpusConfig, None, [*COMMON, *sets])


def decode_lines(inputs: Inputs, size: Size) -> list[Line]:
    lines = []
    folder48 = inputs.work / "songs-48k"
    folder48.mkdir()
    for path in sorted(inputs.songs(2).glob("*.mp3")):
        audio, rate = soundfile.read(path, dtype="float32", always_2d=True)
        resampled = soxr.resample(audio, rate, 48000, quality="HQ")
        soundfile.write(folder48 / path.name, resampled, 48000, format="MP3")
    for folder, label in ((inputs.mp3, "44.1 kHz"), (folder48, "48 kHz")):
        paths = [path for path in sorted(folder.rglob("*.mp3")) if "odd" not in path.parts]
        config = configure(f"input={folder}", "output=unused")
        (stage,) = CorpusJob(config.model_dump_json(), str(folder), "benchmark").build(["decode"]).stages
        tracks = [_track(folder, path) for path in paths]
        seconds = sum(soundfile.info(path).duration for path in paths)
        ratios, rates, bare_rates = [], [], []
        with one_core():
            for repeat in range(size.decode_repeats + 1):
                ours = theirs = 0.0
                for path, track in zip(paths, tracks, strict=True):
                    bare_s, clips = _cpu(bare_decode, path)
                    ours_s, unit = _cpu(stage, Unit("u000000", [track]))
                    if len(unit.clips["mix"]) != len(clips):
                        raise RuntimeError(f"{path}: {len(unit.clips['mix'])} clips, the bare loop has {len(clips)}")
                    ours, theirs = ours + ours_s, theirs + bare_s
                if repeat:  # the first round warms caches
                    ratios.append(theirs / ours)
                    rates.append(seconds / ours)
                    bare_rates.append(seconds / theirs)
        source = f"{len(paths)} {'real' if inputs.real else 'synthetic'} MP3s, {seconds:.0f} s"
        lines += [
            Line(f"decode, {label}: speed against the bare loop", spread(ratios), "", 0.85, note=source),
            Line(
                f"decode, {label}: times real time per core",
                spread(rates, 0),
                "x",
                note=f"the plan counts on {DECODE_BOUND:g}x",
            ),
            Line(f"decode, {label}: the bare loop, times real time", spread(bare_rates, 0), "x"),
        ]
    return lines


def bare_decode(path: Path) -> list[np.ndarray]:
    """What one would write without this project: clips (samples, channels) at 44.1 kHz, nothing checked."""
    audio, rate = soundfile.read(path, dtype="float32", always_2d=True)
    clips = []
    for start, end in segment.partition(len(audio), rate):
        clip = audio[start:end]
        if len(clip) < end - start:
            clip = np.pad(clip, ((0, end - start - len(clip)), (0, 0)))
        clips.append(soxr.resample(clip, rate, SAMPLE_RATE, quality="HQ") if rate != SAMPLE_RATE else clip.copy())
    return clips


def _track(folder: Path, path: Path) -> dict[str, object]:
    return {
        "track_id": path.stem,
        "path": path.relative_to(folder).as_posix(),
        "size": path.stat().st_size,
        "split": "train",
        "caption": "",
        "caption_id": "",
        "status": OK,
    }


def _cpu(work: Callable[[Argument], Result], argument: Argument) -> tuple[float, Result]:
    started = time.process_time()
    result = work(argument)
    return time.process_time() - started, result


def pool_lines(inputs: Inputs, size: Size) -> list[Line]:
    config = configure(
        f"input={inputs.songs(size.pool_tracks)}",
        f"output={inputs.work / 'pool'}",
        "bundle=debug",
        f"unit_clips={max(10, CLIPS_PER_TRACK)}",
        "runtime.runner=local",
        "runtime.workers=2",
    )
    catalogue = build_catalogue(config.input, config.catalogue)
    units = [(name, tracks) for name, tracks in build_plan(catalogue, config).units()]

    def job(output: Path) -> CorpusJob:
        return CorpusJob(config.model_copy(update={"output": str(output)}).model_dump_json(), config.input, "benchmark")

    with tempfile.TemporaryDirectory(dir=inputs.work) as scratch:
        straight = job(Path(scratch) / "straight")
        chain = straight.build([stage.name for stage in straight.stages()])
        run_stages(chain, Unit(*units[0]))  # warm caches
        straight_s, pool_s, clips = [], [], 0
        for repeat in range(size.repeats):
            started = time.perf_counter()
            for name, tracks in units:
                run_stages(chain, Unit(name, tracks))
            straight_s.append(time.perf_counter() - started)

            begun: list[float] = []
            ended: list[float] = []
            finished: list[Unit] = []

            def done(
                unit: Unit, begun: list[float] = begun, ended: list[float] = ended, finished: list[Unit] = finished
            ) -> None:
                ended.append(time.perf_counter())
                begun.append(ended[-1] - sum(times["wall_s"] for times in unit.timing.values()))
                finished.append(unit)

            run_local(job(Path(scratch) / f"pool{repeat}"), [Unit(name, tracks) for name, tracks in units], done)
            pool_s.append(max(ended) - min(begun))
            clips = sum(len(unit.ok_rows()) for unit in finished)
    return [
        Line(
            "pool: local runner on 2 processes against a straight loop",
            spread([a / b for a, b in zip(straight_s, pool_s, strict=True)]),
            "x",
            1.7,
            note=f"{clips} clips in {len(units)} units, bundle debug",
        ),
        Line("pool: straight loop", spread([1000 * s / clips for s in straight_s], 0), "ms/clip"),
        Line("pool: local runner", spread([1000 * s / clips for s in pool_s], 0), "ms/clip"),
    ]


def ray_lines(inputs: Inputs, size: Size) -> list[Line]:
    songs = inputs.songs(size.ray_tracks)
    runners = {
        "local": ("runtime.runner=local", "runtime.workers=1"),
        "ray": ("runtime.runner=ray", "runtime.models={workers: [1, 1]}"),
    }
    per_clip: dict[str, list[float]] = {name: [] for name in runners}
    peaks: dict[str, list[float]] = {name: [] for name in runners}
    before: dict[str, list[float]] = {name: [] for name in runners}
    for repeat in range(size.repeats):
        for name, sets in runners.items():
            measured, cost = _job(inputs, songs, f"{name}-{repeat}", size, sets)
            per_clip[name].append(cost)
            peaks[name].append(measured.peak_pss / 2**20)
            before[name].append(measured.cpu_s - cost * size.ray_tracks * CLIPS_PER_TRACK)
    spread_out = ("runtime.runner=ray", "runtime.workers=5", "runtime.fuse=none", *SPREAD)
    measured, cost = _job(inputs, songs, "ray-models", size, spread_out)
    # Decoding runs ahead of the window, as far as all the way: count it whole, which can only be too much.
    stages = json.loads((inputs.work / "ray-models" / "summary.json").read_text())["stages"]
    ahead = sum(stages[stage]["cpu_ms_per_clip"] for stage in ("decode", "measure")) / 1000
    local = float(np.median(per_clip["local"]))
    note = f"{size.ray_tracks} units of {CLIPS_PER_TRACK} clips, bundle {size.ray_bundle}, 1 worker"
    ratios = [a / b for a, b in zip(per_clip["ray"], per_clip["local"], strict=True)]
    return [
        Line("ray: CPU per clip against the local runner", spread(ratios), "x", 1.15, low=True, note=note),
        Line("ray: the same with five processes (fuse=none)", spread([(cost + ahead) / local]), "x", note="at most"),
        Line(
            "ray: cost of a clip, local runner", spread(per_clip["local"]), "CPU-s", 0.3, note="the claim's condition"
        ),
        Line("ray: cost of a clip, Ray runner", spread(per_clip["ray"]), "CPU-s"),
        Line("ray: start and end of the job, local runner", spread(before["local"], 1), "CPU-s"),
        Line("ray: start and end of the job, Ray runner", spread(before["ray"], 1), "CPU-s"),
        Line("ray: peak memory, local runner", spread(peaks["local"], 0), "MiB", note="PSS of the tree"),
        Line("ray: peak memory, Ray runner", spread(peaks["ray"], 0), "MiB", note="PSS of the tree"),
        Line("ray: peak memory, five processes", spread([measured.peak_pss / 2**20], 0), "MiB", note="PSS of the tree"),
    ]


def _job(inputs: Inputs, songs: Path, name: str, size: Size, sets: Sequence[str]) -> tuple[Measured, float]:
    """A whole corpus job, and its CPU seconds per clip between the first and the last commit."""
    output = inputs.work / name
    arguments = (f"input={songs}", f"output={output}", f"bundle={size.ray_bundle}", "unit_clips=10", *COMMON, *sets)
    command = [sys.executable, "jobs/score_corpus.py", *(word for item in arguments for word in ("--set", item))]
    measured = run_measured(command, REPO, lambda: len(list((output / "index").glob("*.parquet"))))
    rows, clips = json.loads((output / "summary.json").read_text())["rows"], size.ray_tracks * CLIPS_PER_TRACK
    if rows != {"total": clips, "ok": clips, "rejected": 0, "failed": 0}:
        raise RuntimeError(f"{name}: expected {clips} ok clips, found {rows}")
    (first, cpu_first), (last, cpu_last) = measured.marks[1], measured.marks[-1]
    return measured, (cpu_last - cpu_first) / ((last - first) * CLIPS_PER_TRACK)


def plan_lines(inputs: Inputs, size: Size) -> list[Line]:
    table = inputs.data / "jamendo" / "tracks.tsv.gz"
    note = "MTG-Jamendo: 55,525 tracks, 537,626 clips"
    expected: tuple[int, int | None] = (55_525, 537_626)
    if not table.exists():
        table, note, expected = synthetic_table(inputs.work / "tracks.csv"), "synthetic table", (55_525, None)
    wall, cpu = [], []
    for repeat in range(max(size.repeats, 2)):
        output = inputs.work / f"plan{repeat}"
        command = [sys.executable, "-m", "ttmray", "plan", "--set", f"input={table}", "--set", f"output={output}"]
        seconds = _timed(command)
        wall.append(seconds[0])
        cpu.append(seconds[1])
        numbers = json.loads((output / "plan.json").read_text())
        planned = numbers["tracks"]["value"], numbers["expected clips"]["value"]
        if planned[0] != expected[0] or expected[1] not in (None, planned[1]):
            raise RuntimeError(f"the plan has {planned} tracks and clips, expected {expected}")
    return [
        Line("plan: 55,525 tracks", spread(wall, 2), "s", 5.0, low=True, note=note),
        Line("plan: CPU", spread(cpu, 2), "CPU-s"),
    ]


def synthetic_table(path: Path) -> Path:
    rng = np.random.default_rng(0)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "artist_id", "duration"))
        for i, seconds in enumerate(rng.uniform(30, 600, 55_525)):
            writer.writerow((f"{i % 100:02d}/{i}.mp3", f"artist{i // 12}", f"{seconds:.1f}"))
    return path


def relaunch_lines(inputs: Inputs, size: Size) -> list[Line]:
    sets = (f"input={inputs.songs(2)}", f"output={inputs.work / 'relaunch'}", *COMMON)
    command = [sys.executable, "jobs/score_corpus.py", *(word for item in sets for word in ("--set", item))]
    # the runner is no part of a run's identity: made without Ray, relaunched with the default, which is Ray
    _timed([*command, "--set", "runtime.runner=local", "--set", "runtime.workers=0"])
    wall, cpu = [], []
    for _ in range(max(size.repeats, 3)):
        seconds = _timed(command)
        wall.append(seconds[0])
        cpu.append(seconds[1])
    imported = subprocess.run(
        [sys.executable, "-X", "importtime", *command[1:]], cwd=REPO, capture_output=True, text=True, check=True
    )
    modules = {line.rpartition("|")[2].strip() for line in imported.stderr.splitlines()}
    if "ray" in modules or "nothing to do" not in imported.stdout:
        raise RuntimeError(f"the relaunch imported ray or worked again:\n{imported.stdout[-2000:]}")
    return [
        Line("relaunch of a finished run", spread(wall, 2), "s", 3.0, low=True, note="ray is not imported"),
        Line("relaunch: CPU", spread(cpu, 2), "CPU-s"),
    ]


def _timed(command: Sequence[str]) -> tuple[float, float]:
    """Wall and CPU seconds of a command."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} exited with {done.returncode}:\n{done.stdout}{done.stderr}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


PARTS: dict[str, Callable[[Inputs, Size], list[Line]]] = {
    "decode": decode_lines,
    "pool": pool_lines,
    "ray": ray_lines,
    "plan": plan_lines,
    "relaunch": relaunch_lines,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smallest sizes, no verdict")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run")
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    arguments = parser.parse_args()
    facts = machine()
    lines: list[Line] = []
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="ttmray-benchmark-") as work:
        inputs = prepare(Path(work))
        for part in arguments.only:
            lines += PARTS[part](inputs, QUICK if arguments.quick else FULL)
    facts |= {"seconds": round(time.perf_counter() - started), "load_at_end": round(os.getloadavg()[0], 2)}
    name = "corpus (quick: not judged)" if arguments.quick else "corpus"
    return report(name, lines, facts, arguments.output, judged=not arguments.quick)


if __name__ == "__main__":
    sys.exit(main())
