"""What people see: one console, one progress bar with ETA, plain log lines where nobody watches a terminal."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import IO, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # rich would exit with code 1; `ttmray.cli.main` ends quietly


# Texts of users go everywhere (names of files, captions, ids), so nothing is markup; styles are arguments.
console = _Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
if not console.is_terminal:
    console.width = 160  # tables in logs and pipes
errors = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)

OURS = "\x02"
"""Begins every line of a console that another process reads, and tells it from what libraries print there."""


class Marked:
    """A text stream whose lines begin with `OURS`."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream, self._begins = stream, True

    def write(self, text: str) -> int:
        """As of any stream; it is flushed, because readers take whole lines as they come."""
        for line in text.splitlines(keepends=True):
            self._stream.write(OURS * self._begins + line)
            self._begins = line.endswith("\n")
        self._stream.flush()
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


LOG_EVERY_S = 10.0
NOTEBOOK_EVERY_S = 0.5


class Meter:
    """Counts work towards a total: a bar on a terminal, a line that changes in a notebook, and a line every
    `LOG_EVERY_S` elsewhere."""

    def __init__(self, what: str, total: int, bar: Progress | None, shown: Any = None) -> None:
        self.what, self.total, self.done = what, total, 0
        self.bar, self.shown = bar, shown
        self.task = bar.add_task(what, total=total, note="") if bar else None
        self.started = self.logged = time.monotonic()

    def state(self) -> dict[str, Any]:
        """`what`, `done` and `total` of this launch, and `rate` per second so far."""
        spent = max(time.monotonic() - self.started, 1e-9)
        return {"what": self.what, "done": self.done, "total": self.total, "rate": self.done / spent}

    def advance(self, count: int, note: str = "") -> None:
        self.done += count
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, advance=count, note=note)
            return
        now, ended = time.monotonic(), self.done >= self.total
        if self.shown is not None and (ended or now - self.logged >= NOTEBOOK_EVERY_S):
            self.logged = now
            self.shown.update({"text/plain": self._line(now, note)}, raw=True)
        elif self.shown is None and now - self.logged >= LOG_EVERY_S:
            self.logged = now
            console.print(self._line(now, note))

    def _line(self, now: float, note: str) -> str:
        rate = self.done / max(now - self.started, 1e-9)
        left = timedelta(seconds=round((self.total - self.done) / rate)) if rate > 0 else "?"
        return f"{self.what}: {self.done}/{self.total}, {rate:.2f}/s, ETA {left}{', ' + note if note else ''}"


running: list[Meter] = []
"""Meters of this process that have not come to their end, the innermost last. One that an error ended stays until the
account of its run is closed, which writes down how far it was."""


@contextmanager
def meter(what: str, total: int) -> Iterator[Meter]:
    """A `Meter` for the time of the block."""
    with _meter(what, total) as shown:
        running.append(shown)
        yield shown
        if shown in running:
            running.remove(shown)


@contextmanager
def _meter(what: str, total: int) -> Iterator[Meter]:
    """A `Meter` for the time of the block."""
    if console.is_jupyter:  # rich's bars need widgets there, which saved notebooks do not show
        from IPython.display import display

        yield Meter(what, total, None, display({"text/plain": f"{what}: 0/{total}"}, raw=True, display_id=True))
        return
    if not console.is_terminal:
        yield Meter(what, total, None)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TaskProgressColumn(show_speed=True),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=console) as bar:
        yield Meter(what, total, bar)
