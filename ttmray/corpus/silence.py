"""A run that finishes nothing for a while says what it waits for."""

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from ttmray.console import console
from ttmray.corpus.guard import at_work
from ttmray.errors import UserError
from ttmray.storage import Folder

SILENT_S = 300.0
GONE_WITHIN_S = 5.0
NAMED = 5
"""So many units are named."""


class Silence:
    """While it is open, a line whenever no unit was finished for `SILENT_S`.

    Args:
        run: the run folder.
        places: in words, what workers need and what is free.
        ends_s: after so long without progress something else ends the waiting.
    """

    def __init__(self, run: Folder, places: Callable[[], str], ends_s: float) -> None:
        self._run, self._places, self._ends_s = run, places, ends_s
        self._broken, self._closed = threading.Event(), False
        self._thread = threading.Thread(target=self._watch, name="silence", daemon=True)

    def broken(self) -> None:
        """A unit was finished."""
        self._broken.set()

    def _watch(self) -> None:
        silent = 0
        while not self._closed:
            if self._broken.wait(SILENT_S):
                self._broken.clear()
                silent = 0
                continue
            silent += 1
            doing = self._doing()
            if not self._closed:
                console.print(
                    f"no unit was finished for {silent * SILENT_S:g} s; {doing}; {self._places()}. Where nothing moves "
                    f"for {self._ends_s:g} s (runtime.no_progress_timeout_s), the stages are started again",
                    style="yellow",
                    markup=False,
                )

    def _doing(self) -> str:
        try:
            units = at_work(self._run)
        except UserError as error:  # worth saying, and no reason to end: workers that meet it try again, too
            return error.message
        more = f" and {len(units) - NAMED} more" if len(units) > NAMED else ""
        return f"at work: {', '.join(units[:NAMED]) or 'none'}{more}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed = True
        self._broken.set()
        self._thread.join(timeout=GONE_WITHIN_S)  # a store that hangs shall not keep the job from ending
