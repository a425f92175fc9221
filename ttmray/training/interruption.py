"""The ends that a run does not choose: a signal, and a hang."""

import faulthandler
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ttmray.console import console


@contextmanager
def watchdog(seconds: float) -> Iterator[Callable[[], None]]:
    """Unless the given function is called every `seconds`, all stacks are dumped and the process ends."""

    def alive() -> None:
        faulthandler.dump_traceback_later(seconds, exit=True, file=2)  # stderr itself, whatever sys.stderr is

    try:
        alive()
        yield alive
    finally:
        faulthandler.cancel_dump_traceback_later()


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM end the run after the update in flight; a second one ends it at once."""
    asked = False

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        console.print("interrupted: this update is finished and saved first; once more to stop at once")

    if threading.current_thread() is not threading.main_thread():  # Ray Train calls from a thread
        yield lambda: False
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
