"""What the benchmarks share: CPU and memory of a process tree, facts of the machine, one table. Linux only."""

import contextlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))  # what makes made-up corpora

MARKER = "TTMRAY_BENCHMARK"
TICKS = os.sysconf("SC_CLK_TCK")
CPU_EVERY_S = 0.1
PSS_EVERY_S = 1.0  # reading smaps costs milliseconds per process, which must not disturb what is measured


@dataclass(frozen=True)
class Measured:
    """A finished command with all its descendants.

    Attributes:
        cpu_s: CPU seconds in all.
        peak_pss: most bytes of memory at one time.
        marks: (progress, CPU seconds until then) at the start and whenever progress had changed.
    """

    cpu_s: float
    peak_pss: int
    marks: list[tuple[int, float]]


@dataclass
class _Tree:
    """Every process that carries the marker in its environment, or descends from one that does.

    Ray's daemons leave the session and the parent that started them, some ignore SIGCHLD (so nobody inherits
    their children's times) and some overwrite their environment with a title. So each process is judged once,
    when its environment is first seen, and its last seen CPU time counts: what is lost is at most `CPU_EVERY_S`
    per process at its end, and processes that live shorter than that.
    """

    marker: bytes
    known: dict[tuple[int, str], float] = field(default_factory=dict)
    strangers: set[tuple[int, str]] = field(default_factory=set)

    def alive(self) -> list[int]:
        """Process ids of the tree; brings `known` (CPU seconds by pid and start time) up to date."""
        members = {pid for pid, _ in self.known}
        living = []
        for entry in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
            try:
                stat = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
                key = (entry, stat[19])
                if key in self.strangers:
                    continue
                if key not in self.known and int(stat[1]) not in members:
                    environment = Path(f"/proc/{entry}/environ").read_bytes()
                    if self.marker not in environment:
                        if environment:  # it is empty for an instant within exec
                            self.strangers.add(key)
                        continue
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue  # gone in between, or another user's
            self.known[key] = (int(stat[11]) + int(stat[12])) / TICKS
            if stat[0] != "Z":
                members.add(entry)
                living.append(entry)
        return living


def run_measured(command: Sequence[str], cwd: Path, progress: Callable[[], int]) -> Measured:
    """Run a command to its end and measure its whole process tree; leaves no process of it behind.

    Args:
        progress: how far the command is, looked at every `CPU_EVERY_S`.

    Raises:
        RuntimeError: it did not exit with 0; the message holds the end of its output.
    """
    value = uuid.uuid4().hex
    tree = _Tree(f"{MARKER}={value}".encode())
    peak, next_pss = 0, 0.0
    marks = [(0, 0.0)]
    with tempfile.TemporaryFile("w+") as log:
        child = subprocess.Popen(
            command,
            cwd=cwd,
            env=os.environ | {MARKER: value},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while child.poll() is None:
                pids = tree.alive()
                if (now := progress()) != marks[-1][0]:
                    marks.append((now, sum(tree.known.values())))
                if time.perf_counter() >= next_pss:
                    next_pss = time.perf_counter() + PSS_EVERY_S
                    peak = max(peak, sum(_pss(pid) for pid in pids))
                time.sleep(CPU_EVERY_S)
        finally:
            _end(tree)
        log.seek(0)
        output = log.read()
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)} exited with {child.returncode}:\n{output[-4000:]}")
    return Measured(sum(tree.known.values()), peak, marks)


def _pss(pid: int) -> int:
    """Proportional set size in bytes: pages that n processes share count 1/n in each."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0
    return 0


def _end(tree: _Tree) -> None:
    """Wait for stragglers (Ray's agents take seconds), then kill what is left, so that the next run is alone."""
    deadline = time.monotonic() + 3
    while (left := tree.alive()) and time.monotonic() < deadline:
        time.sleep(CPU_EVERY_S)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """This process on one core for the time of the block."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def spread(values: Sequence[float], digits: int = 3) -> dict[str, Any]:
    """Median, least and greatest of some repeats."""
    return {
        "median": round(statistics.median(values), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
        "repeats": len(values),
    }


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    packages = ("torch", "ray", "numpy", "soundfile", "soxr", "pyarrow", "transformers", "demucs")
    return {
        "cpu": next((line.split(":")[1].strip() for line in info if line.startswith("model name")), platform.machine()),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30, 1),
        "load_at_start": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "python": platform.python_version(),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {name: version(name) for name in packages},
    }


@dataclass(frozen=True)
class Line:
    """One line of the table. `low` targets are passed at or below the value, others at or above; None: no target."""

    what: str
    reached: dict[str, Any]
    unit: str
    target: float | None = None
    low: bool = False
    note: str = ""

    @property
    def passed(self) -> bool | None:
        if self.target is None:
            return None
        median = float(self.reached["median"])
        return median <= self.target if self.low else median >= self.target


def report(name: str, lines: Sequence[Line], facts: dict[str, Any], output: Path | None, judged: bool) -> int:
    """Print the table, write it as JSON where asked, and return the exit code: 1 if a target is missed."""
    shown = Table("what", "target", "reached (median)", "min .. max", "n", "", "note", title=name)
    for line in lines:
        sign = "<=" if line.low else ">="
        verdict = {None: "", True: "ok", False: "MISSED"}[line.passed if judged else None]
        shown.add_row(
            line.what,
            f"{sign} {line.target:g} {line.unit}" if line.target is not None else "",
            f"{line.reached['median']:g} {line.unit}",
            f"{line.reached['min']:g} .. {line.reached['max']:g}",
            str(line.reached["repeats"]),
            verdict,
            line.note,
        )
    console = Console(width=None if os.isatty(1) else 200)
    console.print(shown)
    console.print(", ".join(f"{key} {value}" for key, value in facts.items() if key != "versions"))
    if output:
        result = {
            "benchmark": name,
            "machine": facts,
            "judged": judged,
            "lines": [vars(line) | {"passed": line.passed if judged else None} for line in lines],
        }
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n")
    return int(judged and any(line.passed is False for line in lines))
