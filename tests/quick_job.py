"""A corpus job whose stages do nothing but wait and commit: for tests of the runner, which needs no models."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ttmray.corpus import index
from ttmray.corpus.assembly import CorpusJob
from ttmray.corpus.config import CorpusConfig
from ttmray.corpus.ray_runner import run_ray
from ttmray.corpus.running import Makers
from ttmray.corpus.stage import Stage
from ttmray.corpus.unit import OK, Unit
from ttmray.storage import Folder


def node() -> str:
    import ray

    return ray.get_runtime_context().get_node_id()


class QuickDecode(Stage):
    name, scope, resources = "decode", "unit", "decode"
    writes = ("mix",)

    def __init__(self, frames: int) -> None:
        self.frames = frames

    def __call__(self, unit: Unit) -> Unit:
        unit.rows = [index.new_row(track, unit.name, "quick") | {"segment": 0} for track in unit.tracks]
        unit.clips = {"mix": np.ones((len(unit.rows), 2, self.frames), np.float32)}
        return unit


class QuickModels(Stage):
    """Every stage with models at once. On nodes named in the file `sick` of the run it is what that file says."""

    name, scope, resources = "score", "unit", "score"
    reads = ("mix",)
    writes = ("mert",)

    def __init__(self, run: Path, pace_s: float, crowd: int) -> None:
        self.run, self.pace_s = run, pace_s
        begun = run.with_name("begun")
        begun.mkdir(exist_ok=True)
        (begun / node()).touch()
        if self.sickness() == "cannot be built":
            raise RuntimeError("no kernel image is available")
        deadline = time.monotonic() + 300
        while len(list(begun.iterdir())) < crowd and time.monotonic() < deadline:
            time.sleep(0.1)

    def sickness(self) -> str:
        sick = self.run.with_name("sick.json")
        return json.loads(sick.read_text()).get(node(), "") if sick.exists() else ""

    def __call__(self, unit: Unit) -> Unit:
        if self.sickness() == "breaks":
            raise RuntimeError("CUDA error: device-side assert triggered")
        time.sleep(10 * self.pace_s if self.sickness() == "slow" else self.pace_s)
        unit.clips = {"mert": unit.clips["mix"][:, 0, :10].copy()}
        return unit


class QuickWrite(Stage):
    """Commits a unit: a file with its name that says on which node."""

    name, scope, resources = "write", "unit", "write"
    reads = ("mert",)

    def __init__(self, run: Folder) -> None:
        self.run = run

    def __call__(self, unit: Unit) -> Unit:
        assert all(row["status"] == OK for row in unit.rows), unit.rows
        self.run.create(f"index/{unit.name}.parquet", node().encode())
        return unit


@dataclass(frozen=True)
class QuickJob(CorpusJob):
    """The models take `pace_s` for a unit, and begin when they are there on `crowd` nodes. A unit that is decoded takes
    8 bytes times `frames`."""

    pace_s: float = 0.2
    crowd: int = 0
    frames: int = 50_000

    def makers(self) -> Makers:
        return {
            QuickDecode: lambda _: QuickDecode(self.frames),
            QuickModels: lambda _: QuickModels(Path(self.output), self.pace_s, self.crowd),
            QuickWrite: lambda _: QuickWrite(Folder(self.output)),
        }

    def stages(self, names: Sequence[str] | None = None) -> list[type[Stage]]:
        """Of those names that it has: groups are laid out by the real stages."""
        return [stage for stage in self.makers() if names is None or stage.name in names]


@dataclass
class Runs:
    """A run of a quick job, and what came of it."""

    folder: Path
    count: int
    seen: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir()
        (self.folder / "run.json").write_text("{}")

    def ail(self, **sicknesses: str) -> None:
        """What ails nodes from here on, by id."""
        self.folder.with_name("sick.tmp").write_text(json.dumps(sicknesses))
        self.folder.with_name("sick.tmp").rename(self.folder.with_name("sick.json"))

    @property
    def units(self) -> list[Unit]:
        tracks = [
            {"track_id": f"t{i}", "split": "train", "caption": "", "caption_id": "", "path": ""}
            for i in range(self.count)
        ]
        return [Unit(f"u{i:06d}", [track]) for i, track in enumerate(tracks)]

    def job(self, *, pace_s: float = 0.2, crowd: int = 0, frames: int = 50_000, **runtime: object) -> QuickJob:
        settings = {"device": "cpu", "no_progress_timeout_s": 900} | runtime
        config = CorpusConfig.model_validate({"input": "s3://b", "output": str(self.folder), "runtime": settings})
        return QuickJob(config.model_dump_json(), "", "quick", pace_s=pace_s, crowd=crowd, frames=frames)

    def committed(self) -> dict[str, str]:
        """Unit -> the node that committed it."""
        return {path.stem: path.read_text() for path in (self.folder / "index").glob("u*.parquet")}

    def go(self, then: Callable[[int], None] = lambda _: None, **settings: Any) -> None:
        """Run it; `then` gets the number of units done after each."""

        def done(unit: Unit) -> None:
            self.seen.append(unit.name)
            then(len(self.seen))

        run_ray(self.job(**settings), self.units, done)
        assert sorted(self.seen) == [unit.name for unit in self.units]
        assert sorted(self.committed()) == sorted(self.seen)
