"""Faults at seeded random moments: the corpus job is killed, starved, lied to or damaged, then started again as its
messages say, and must end with what an undisturbed run has: rows, hashes, quarantine, and no file beside.

    python tests/fault_schedules.py --count 200 --seed 7 [--kinds "disk full,kill the driver"] [--ray]

prints a table by kind, and the seed of every schedule that fails; the same seed makes the same schedule again (where
processes are killed, within what timers allow).
"""

import argparse
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import fault_job
import numpy as np
import pyarrow.parquet as pq
import soundfile
import unruly_store
from damages import DAMAGES, out_of_the_way
from processes import actors, descendants, workers
from raylets import several_nodes

from ttmray import console, object_store
from ttmray.config import load_config
from ttmray.corpus import index
from ttmray.corpus.config import CorpusConfig
from ttmray.corpus.job import score_corpus
from ttmray.corpus.verify import problems
from ttmray.errors import EXIT_OK, EXIT_TOO_MANY_FAILURES, UserError
from ttmray.storage import Folder

LAUNCHES = 12
"""A schedule that needs more has failed."""
SETS = (
    "bundle=debug",
    "segments.max_clips=2",
    "unit_clips=2",
    "splits.validation=1",
    "splits.test=1",
    "max_failures=1",
)
ANSWERS_S = 60.0
COMMITS_S = 10.0
"""Who is killed after a commit is killed after so long without one, too."""
EXACT = ("index", "shards", "captions", "stats", "plan.parquet")
"""Files that are the same to the bit; those of the index in all that is read of them."""
NODE_S = 20.0
"""A node is killed after so long without a commit, too: then while the job begins."""


def make_songs(folder: Path) -> Path:
    """Nine songs of 5 to 21 s, a silent one and a text with an audio name: 13 clips ok, 1 rejected, 1 track failed."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(7)
    for i, seconds in enumerate((5, 21, 9, 20, 10, 21, 6, 20, 7)):
        at = np.arange(seconds * 44100) / 44100
        tone = np.sin(2 * np.pi * (110 + 40 * i) * at) * (1 + np.sin(2 * np.pi * 2 * at)) / 5
        soundfile.write(folder / f"song{i}.wav", tone + 0.02 * rng.standard_normal(len(at)), 44100)
    soundfile.write(folder / "silence.wav", np.zeros(44100 * 6), 44100)
    (folder / "broken.mp3").write_text("no music\n" * 99)
    (folder / "captions.csv").write_text("path,caption\nsong1.wav,Waves.\nsong2.wav,Waves.\nsong3.wav,A kite.\n")
    return folder


class Job:
    """The job on the songs, in this process or in one of its own."""

    def __init__(self, songs: Path, output: Path | str, *sets: str) -> None:
        self.output = str(output)
        self.sets = (f"input={songs}", f"output={output}", "runtime.device=cpu", *SETS, *sets)

    def here(self) -> int:
        """Run it in this process, without children; its exit code.

        Raises:
            UserError: as `score_corpus`.
        """
        config = load_config(CorpusConfig, None, [*self.sets, "runtime.runner=local", "runtime.workers=0"])
        with mock.patch("ttmray.corpus.assembly.CorpusJob", fault_job.FaultJob):
            return score_corpus(config)

    def start(self, stdout: Any = subprocess.DEVNULL) -> "subprocess.Popen[bytes]":
        command = [sys.executable, fault_job.__file__, *(f"--set={one}" for one in self.sets)]
        paths = os.pathsep.join((str(Path(fault_job.__file__).parents[1]), str(Path(fault_job.__file__).parent)))
        return subprocess.Popen(command, stdout=stdout, env=os.environ | {"PYTHONPATH": paths}, cwd="/")

    def committed(self) -> int:
        return len(list(Path(self.output, "index").glob("*.parquet")))


@dataclass
class World:
    """What schedules share.

    Attributes:
        work: an empty folder.
        reference: the folder of an undisturbed run.
        other: that of a run of other songs.
    """

    work: Path
    songs: Path
    reference: Path
    other: Path

    @classmethod
    def at(cls, work: Path) -> "World":
        songs, fewer = make_songs(work / "songs"), work / "fewer"
        fewer.mkdir()
        for name in ("song1.wav", "song2.wav", "song4.wav", "song8.wav"):
            shutil.copy(songs / name, fewer / name)
        world = cls(work, songs, work / "reference", work / "other")
        assert Job(songs, world.reference).here() == EXIT_OK
        assert Job(fewer, world.other).here() == EXIT_OK
        assert differences(world.reference, world.reference) == Counter()
        return world


@dataclass
class Outcome:
    """What came of a schedule: launches and faults that it took, and what differs from the undisturbed run."""

    launches: int = 0
    faults: int = 0
    differs: Counter[str] = field(default_factory=Counter)


def differences(run: Path, reference: Path) -> Counter[str]:
    """How often what is wrong: rows `lost`, `twice` or `other`, files that are `orphans`, `missing` or `changed`, and
    what `verify` says."""
    rows, expected = (pq.read_table(one / "index.parquet").to_pylist() for one in (run, reference))
    keys, expected_keys = Counter(row["key"] for row in rows), Counter(row["key"] for row in expected)
    wrong = Counter(
        lost=(expected_keys - keys).total(),
        twice=sum(count - 1 for count in keys.values()),
        other=sum(row not in expected for row in rows),
    )
    files, known = (
        {str(path.relative_to(one)): path for path in one.rglob("*") if path.is_file()} for one in (run, reference)
    )
    wrong["orphans"] = len(files.keys() - known.keys())
    wrong["missing"] = len(known.keys() - files.keys())
    same = [name for name in files.keys() & known.keys() if name.startswith(EXACT)]
    wrong["changed"] = sum(_content(files[name]) != _content(known[name]) for name in same)
    wrong["verify"] = len(list(problems(Folder.at(str(run)))))
    return +wrong


def _content(file: Path) -> Any:
    """Bytes of a file; of an index file what anybody reads of it: some bytes of a Parquet footer say nothing."""
    data = file.read_bytes()
    if file.parent.name != index.INDEX:
        return data
    rows, metadata = index.from_bytes(data, str(file))
    return rows.to_pylist(), metadata


def finish(job: Job, outcome: Outcome, fault: Callable[[], Any] = nullcontext) -> None:
    """Start the job in this process until it ends well.

    Args:
        fault: makes the context in which a launch runs.
    """
    while outcome.launches < LAUNCHES:
        outcome.launches += 1
        try:
            with fault():
                code = job.here()
        except UserError:
            continue  # as its message says: start the same command again
        if code == EXIT_OK:
            return
    raise AssertionError(f"not finished after {LAUNCHES} launches")


# Kinds. Each takes the world, a generator and a folder, and leaves a finished run in it.


def disk_full(world: World, chance: random.Random, run: Path) -> Outcome:
    """From some write on none works, until somebody frees space."""
    outcome = Outcome()

    @contextmanager
    def full() -> Iterator[None]:
        left, fsync = chance.randrange(60), os.fsync

        def fsync_or_not(descriptor: int) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                os.ftruncate(descriptor, 0)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(descriptor)

        outcome.faults += 1
        with mock.patch("os.fsync", fsync_or_not):
            yield

    count = chance.randint(1, 4)
    finish(Job(world.songs, run), outcome, lambda: full() if outcome.launches <= count else nullcontext())
    return outcome


def _unruly(whims: tuple[str, ...], world: World, chance: random.Random, run: Path) -> Outcome:
    """The store has whims, and at times it is down."""
    outcome = Outcome()
    quick = SimpleNamespace(monotonic=time.monotonic, sleep=lambda s: time.sleep(s / 100))
    patience = {"TTMRAY_STORE_PATIENCE_S": "5"}  # some five attempts
    with (
        unruly_store.serving() as store,
        mock.patch.dict(os.environ, store.environment | patience),
        mock.patch.object(object_store, "time", quick),
    ):
        from s3fs import S3FileSystem

        S3FileSystem.clear_instance_cache()
        share, down_after, down_for = chance.uniform(0.02, 0.3), chance.randrange(300), chance.randint(3, 25)

        def whim(method: str, path: str) -> str:
            if down_after <= len(store.requests) < down_after + down_for:
                outcome.faults += 1
                return "busy"
            if chance.random() >= share:
                return ""
            outcome.faults += 1
            return chance.choice(whims)

        store.whim = whim
        job = Job(world.songs, "s3://bucket/run")
        finish(job, outcome)
        store.whim = lambda method, path: ""
        S3FileSystem.clear_instance_cache()
        _fetch(store, run)
    return outcome


def _fetch(store: unruly_store.Store, run: Path) -> None:
    """Copy the run out of the bucket."""
    for path, data in store.objects.items():
        target = run / path.removeprefix("/bucket/run/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)


def store_busy(world: World, chance: random.Random, run: Path) -> Outcome:
    """503, slow answers, connections that end."""
    return _unruly(("busy", "slow", "cut"), world, chance, run)


def store_half(world: World, chance: random.Random, run: Path) -> Outcome:
    """Uploads whose answer is lost, downloads that end in the middle."""
    return _unruly(("done, but cut", "half"), world, chance, run)


def store_stale(world: World, chance: random.Random, run: Path) -> Outcome:
    """Listings that lack the newest objects."""
    return _unruly(("stale",), world, chance, run)


def damaged_after(world: World, chance: random.Random, run: Path) -> Outcome:
    """Files of a finished run are damaged."""
    shutil.copytree(world.reference, run, dirs_exist_ok=True)
    outcome = Outcome()
    _damage(world, chance, run, outcome)
    _finish_damaged(world, run, outcome)
    return outcome


def damaged_between(world: World, chance: random.Random, run: Path) -> Outcome:
    """Files of a run that was interrupted are cut, emptied or deleted before it goes on."""
    shutil.copytree(world.reference, run, dirs_exist_ok=True)
    for name in ("_SUCCESS.json", "index.parquet", "summary.json", "summary.md", "stats/latents.json"):
        (run / name).unlink()
    for path in chance.sample(sorted((run / "index").iterdir()), chance.randrange(8)):
        path.unlink()
    outcome = Outcome()
    _damage(world, chance, run, outcome, ("deleted", "empty", "cut"), ("run.json",))
    _finish_damaged(world, run, outcome)
    return outcome


def _damage(
    world: World,
    chance: random.Random,
    run: Path,
    outcome: Outcome,
    ways: tuple[str, ...] = tuple(DAMAGES),
    never: tuple[str, ...] = (),
) -> None:
    no_result = (*never, "cost.json", "units.jsonl")
    files = sorted(path for path in run.rglob("*") if path.is_file() and path.name not in no_result)
    for path in chance.sample(files, chance.randint(1, 4)):
        outcome.faults += 1
        DAMAGES[chance.choice(ways)](path, world.other)


def _finish_damaged(world: World, run: Path, outcome: Outcome) -> None:
    """Start the job until it ends well, with folders of a person moved away as its message asks."""
    while True:
        try:
            outcome.launches += 1
            assert Job(world.songs, run).here() == EXIT_OK
            return
        except UserError as error:
            moved = "Move it away" in error.hint or "must be moved" in error.hint
            if not moved or outcome.launches >= LAUNCHES:
                raise
            (mine,) = [path.parent for path in sorted(run.rglob("mine.txt"))][:1]
            out_of_the_way(mine, run.with_name(f"{run.name}-mine{outcome.launches}"))


def _killed(job: Job, chance: random.Random, victims: Callable[[int], list[int]]) -> Outcome:
    """Kill some process of the job a random while after a commit, or after its start."""
    outcome = Outcome()
    planned = chance.randint(1, 3)
    while outcome.launches < LAUNCHES:
        outcome.launches += 1
        driver = job.start()
        while driver.poll() is None and outcome.faults < planned:
            before, begun, pause = job.committed(), time.monotonic(), chance.uniform(0, 0.3)
            while driver.poll() is None and job.committed() == before and time.monotonic() - begun < ANSWERS_S:
                time.sleep(0.01)
                if time.monotonic() - begun > COMMITS_S and victims(driver.pid):
                    break  # on a busy machine all commits may come at once, at the end
            time.sleep(pause)
            if driver.poll() is None and (processes := victims(driver.pid)):
                with suppress(ProcessLookupError):
                    os.kill(chance.choice(sorted(processes)), signal.SIGKILL)
                    outcome.faults += 1
        below = descendants(driver.pid)
        if (code := driver.wait(timeout=560)) in (EXIT_OK, EXIT_TOO_MANY_FAILURES):
            assert code == EXIT_OK
            return outcome
        _gone(below)
    raise AssertionError(f"not finished after {LAUNCHES} launches")


def _gone(processes: dict[int, bytes]) -> None:
    """Wait for what a killed driver leaves behind: children end when their pipe closes."""
    deadline = time.monotonic() + ANSWERS_S
    while any(Path(f"/proc/{process}/cwd").exists() for process in processes) and time.monotonic() < deadline:
        time.sleep(0.02)


def _driver(process: int) -> list[int]:
    return [process]


LOCAL, RAY = ("runtime.runner=local", "runtime.workers=2"), ("runtime.runner=ray", "runtime.workers=2")


def kill_driver(world: World, chance: random.Random, run: Path) -> Outcome:
    """The process that a person has started."""
    return _killed(Job(world.songs, run, *LOCAL), chance, _driver)


def kill_worker(world: World, chance: random.Random, run: Path) -> Outcome:
    """Child processes of the local runner."""
    return _killed(Job(world.songs, run, *LOCAL), chance, workers)


def kill_on_bucket(world: World, chance: random.Random, run: Path) -> Outcome:
    """The driver or its children, whose run is in a bucket that is busy at times."""
    share = chance.choice((0.0, 0.05, 0.15))
    with unruly_store.serving() as store, mock.patch.dict(os.environ, store.environment):
        store.whim = lambda method, path: "busy" if chance.random() < share else ""

        class OnBucket(Job):
            def committed(self) -> int:
                return sum("/index/" in path for path in list(store.objects))

        job = OnBucket(world.songs, "s3://bucket/run", *LOCAL)
        outcome = _killed(job, chance, lambda driver: [driver, *workers(driver)])
        _fetch(store, run)
    return outcome


def kill_driver_of_ray(world: World, chance: random.Random, run: Path) -> Outcome:
    """The driver, whose Ray ends with it."""
    return _killed(Job(world.songs, run, *RAY), chance, _driver)


def kill_actor(world: World, chance: random.Random, run: Path) -> Outcome:
    """Actors of Ray Data."""
    sets = ("runtime.runner=ray", "runtime.fuse=none", "runtime.object_store_gib=0.2")
    return _killed(Job(world.songs, run, *sets), chance, lambda driver: actors(driver, "MapWorker"))


def kill_node(world: World, chance: random.Random, run: Path) -> Outcome:
    """Nodes of a cluster, with all that runs there; others join before or after. The job goes on by itself."""
    outcome = Outcome(launches=1)
    with several_nodes(FAULT_PACE_S="0.5") as nodes, tempfile.TemporaryFile() as log:
        alive = [nodes.add(2), nodes.add(2)]
        job = Job(world.songs, run, "runtime.runner=ray")
        driver = job.start(log)
        try:
            for _ in range(chance.randint(1, 2)):
                before, begun = job.committed(), time.monotonic()
                while driver.poll() is None and job.committed() == before and time.monotonic() - begun < NODE_S:
                    time.sleep(0.01)
                time.sleep(chance.uniform(0, 1))
                if driver.poll() is not None:
                    break
                joins_first, victim = chance.random() < 0.5, chance.randrange(2)
                if joins_first:
                    alive.append(nodes.add(2))
                nodes.kill(alive.pop(victim))
                outcome.faults += 1
                if not joins_first:
                    alive.append(nodes.add(2))
            code = driver.wait(timeout=560)
            log.seek(0)
            assert code == EXIT_OK, log.read()[-2000:].decode()
        finally:
            driver.kill()
    return outcome


Kind = Callable[[World, random.Random, Path], Outcome]
IN_PROCESS: dict[str, Kind] = {
    "disk full": disk_full,
    "store busy or slow": store_busy,
    "transfers half done": store_half,
    "stale listings": store_stale,
    "damaged after the end": damaged_after,
    "damaged in between": damaged_between,
}
KILLS: dict[str, Kind] = {
    "kill the driver": kill_driver,
    "kill a worker": kill_worker,
    "kill on a bucket": kill_on_bucket,
}
ON_RAY: dict[str, Kind] = {
    "kill the driver of Ray": kill_driver_of_ray,
    "kill an actor of Ray": kill_actor,
    "kill a node of Ray": kill_node,
}


def carry_out(world: World, kind: str, seed: int) -> Outcome:
    """One schedule; its run folder stays where something differs.

    Raises:
        Exception: the job did not get to its end.
    """
    run = world.work / f"{kind.replace(' ', '-')}-{seed}"
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir()
    outcome = (IN_PROCESS | KILLS | ON_RAY)[kind](world, random.Random(f"{kind} {seed}"), run)
    outcome.differs = differences(run, world.reference)
    if not outcome.differs:
        shutil.rmtree(run)
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100, help="schedules, spread over the kinds")
    parser.add_argument("--seed", type=int, default=0, help="of the first; the others follow")
    parser.add_argument("--kinds", help="with commas between; default: all that run without Ray")
    parser.add_argument("--ray", action="store_true", help="kinds under Ray, too")
    chosen = parser.parse_args()
    kinds = chosen.kinds.split(",") if chosen.kinds else [*IN_PROCESS, *KILLS, *(ON_RAY if chosen.ray else ())]
    work = Path(tempfile.mkdtemp(prefix="faults-"))
    with _silent():
        world = World.at(work)
    print(f"runs in {work}; seeds {chosen.seed} to {chosen.seed + chosen.count - 1}", flush=True)
    sums: dict[str, Counter[str]] = {kind: Counter() for kind in kinds}
    failed = 0
    for number in range(chosen.count):
        kind, seed, begun = kinds[number % len(kinds)], chosen.seed + number, time.monotonic()
        total = sums[kind]
        total["schedules"] += 1
        try:
            with _silent():
                outcome = carry_out(world, kind, seed)
        except Exception as error:
            failed, total["not ended"] = failed + 1, total["not ended"] + 1
            print(f"FAILED {kind}, seed {seed}: {type(error).__name__}: {error}", flush=True)
        else:
            total.update({"launches": outcome.launches, "faults": outcome.faults}, **outcome.differs)
            if outcome.differs:
                failed += 1
                print(f"FAILED {kind}, seed {seed}: {dict(outcome.differs)}", flush=True)
        total["seconds"] += round(time.monotonic() - begun, 1)
    columns = ("schedules", "launches", "faults", "lost", "twice", "other", "orphans", "missing", "changed", "verify")
    columns += ("not ended", "seconds")
    print("| kind | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|", sep="\n")
    for kind, total in sums.items():
        print(f"| {kind} | " + " | ".join(f"{total[name]:g}" for name in columns) + " |")
    print(f"{chosen.count} schedules, {failed} failed")
    if not failed:
        shutil.rmtree(work)
    return int(failed > 0)


@contextmanager
def _silent() -> Iterator[None]:
    """Without what the job prints."""
    with mock.patch.object(console.console, "quiet", True), mock.patch.object(console.errors, "quiet", True):
        yield


if __name__ == "__main__":
    sys.exit(main())
