"""A line of JSON for every unit that a launch has made: what came of it and how long each stage took.

So a look at a run in progress needs few requests, where an object store would have to be asked for every unit. While it
runs there is a file of `log/` for some hundred lines (in a bucket thousand), the last one written again and again, as a
bucket cannot append; the end of the job makes one file of them. It is no result: what a killed launch had not yet
written is missing.
"""

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, NamedTuple, Self

from ttmray.corpus.unit import FAILED, OK, REJECTED, Times, Unit, add_times
from ttmray.cost import LOCAL_S, REMOTE_S
from ttmray.errors import UserError
from ttmray.json_text import read_json
from ttmray.storage import Folder

LOG, UNITS = "log", "units.jsonl"
LINES, REMOTE_LINES = 500, 5000
"""Of a file of `log/`, here and in a bucket, where it is written seldom and every file is a request for readers."""
RECENT_S = 600.0
"""The rate of now is that of so many seconds before the last unit."""


class UnitLog:
    """The log of one launch.

    Args:
        run: the run folder.
        since: time at which the launch began, as of `time.time`.
    """

    def __init__(self, run: Folder, since: float) -> None:
        self._run, self._since = run, since
        self._every_s, self._most = (REMOTE_S, REMOTE_LINES) if run.remote else (LOCAL_S, LINES)
        self._saved = 0.0
        self._begin()

    def _begin(self) -> None:
        self._name, self._lines = f"{LOG}/{time.time_ns()}.jsonl", list[str]()

    def add(self, unit: Unit) -> None:
        """Note a unit that was committed."""
        now = time.time()
        line = {
            "unit": unit.name,
            "at": round(now, 3),
            "since": round(self._since, 3),
            "clips": sum(row["segment"] >= 0 for row in unit.rows),
            "rows": dict(Counter(row["status"] for row in unit.rows)),
            "stages": {stage: {name: round(x, 4) for name, x in times.items()} for stage, times in unit.timing.items()},
        }
        self._lines.append(json.dumps(line))
        if len(self._lines) >= self._most:
            self._save()
            self._begin()
        elif not 0 <= now - self._saved < self._every_s:
            self._save()
            self._saved = now

    def _save(self) -> None:
        self._run.write(self._name, ("\n".join(self._lines) + "\n").encode())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lines:
            # why the launch ends matters more than its last lines
            with suppress(*() if error is None else (UserError,)):
                self._save()


def read(run: Folder) -> dict[str, dict[str, Any]]:
    """Unit -> its last line, without `stages`."""
    lines = {}
    for name, text in _texts(run).items():
        lines[name] = read_json(text)
        del lines[name]["stages"]  # which would take most of the memory
    return lines


class Gathered(NamedTuple):
    """Of the units of a log.

    Attributes:
        stages: stage -> the sums of its times over all launches.
        seconds: of each launch from its begin to its last unit, summed.
    """

    stages: dict[str, Times]
    seconds: float


def gather(run: Folder, units: Sequence[str]) -> Gathered:
    """Make one file of the log, in the order of the units, and sum it up."""
    parts = _parts(run)
    texts = _texts(run)
    chosen = [texts[name] for name in units if name in texts]
    run.write(UNITS, "".join(text + "\n" for text in chosen).encode())
    for part in parts:
        run.delete(part)
    ends: dict[float, float] = {}

    def stages() -> Iterator[dict[str, Times]]:
        for line in map(read_json, chosen):  # one at a time
            ends[line["since"]] = max(line["at"], ends.get(line["since"], line["since"]))
            yield line["stages"]

    sums = add_times(stages())
    return Gathered(sums, sum(end - since for since, end in ends.items()))


def _parts(run: Folder) -> list[str]:
    return [f"{LOG}/{entry.name}" for entry in run.files(LOG, sizes=False)]


def _texts(run: Folder) -> dict[str, str]:
    """Unit -> its last line, as it is written."""
    last: dict[str, tuple[float, str]] = {}
    for name in [UNITS] * run.exists(UNITS) + _parts(run):
        for text in run.read(name).decode(errors="replace").splitlines():
            try:
                line = read_json(text)
                unit, at = str(line["unit"]), float(line["at"])
                dict(line["rows"]), dict(line["stages"]), float(line["since"]), int(line["clips"])
            except (ValueError, KeyError, TypeError):  # damaged, and only a log: the unit counts as not logged
                continue
            if unit not in last or at >= last[unit][0]:
                last[unit] = at, text
    return {unit: text for unit, (_, text) in last.items()}


def counts(lines: Iterable[Mapping[str, Any]]) -> Counter[str]:
    """Rows by status."""
    total: Counter[str] = Counter({OK: 0, REJECTED: 0, FAILED: 0})
    for line in lines:
        total.update(line["rows"])
    return total


def rate(lines: Iterable[Mapping[str, Any]]) -> tuple[float, float] | None:
    """Clips per second of the last launch shortly before its last unit, and the time of that, as of `time.time`; None
    where it has made nothing."""
    by_time = sorted(lines, key=lambda line: line["at"])
    if not by_time:
        return None
    last, since = by_time[-1]["at"], by_time[-1]["since"]
    begin = max(last - RECENT_S, since)
    recent = [line["clips"] for line in by_time if line["since"] == since and line["at"] > begin]
    return (sum(recent) / (last - begin), last) if last > begin else None
