"""Ctrl-C and SIGTERM: the first one is a KeyboardInterrupt, which cleans up; the next one ends the process at once.

Whatever a run writes is complete or absent, so a process may end anywhere. What must not be is a traceback: of a second
Ctrl-C that hits the cleaning up, of one that hits the interpreter's own end, or of a child that was still starting.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ttmray.errors import EXIT_INTERRUPTED

MESSAGE = "interrupted; what was committed is kept, the same command goes on from there"
PLAIN = "interrupted"
"""Of commands that commit nothing on the way."""
NUMBERS = (signal.SIGINT, signal.SIGTERM)
_SHOW_CURSOR = b"\x1b[?25h"


class Interruption:
    """Handler of both signals. SIGINT stays ignored where a shell has started us so, in the background."""

    def __init__(self, message: str = MESSAGE) -> None:
        """`message`: what the console says of it."""
        self.message = message
        self.asked = self.said = False
        self._before = {number: signal.getsignal(number) for number in NUMBERS}
        self._console: int | None = None  # 2 itself may lead to a file for a while, see `cluster` and `audio.chatter`

    def install(self) -> None:
        """From here on the signals come here."""
        with suppress(OSError):  # closed: there is no console
            self._console = os.dup(2)
        for number in NUMBERS:
            if self._before[number] is not signal.SIG_IGN:
                signal.signal(number, self)

    def remove(self) -> None:
        """Give the signals back, unless the process is ending because of one."""
        if not self.asked:
            if self._console is not None:
                os.close(self._console)
                self._console = None
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def __call__(self, number: int, frame: Any) -> None:
        if not self.asked:
            self.asked = True
            raise KeyboardInterrupt
        # not by the console or `print`, in the midst of which we may be
        lines = b"" if self.said else f"\n{self.message}\n".encode()
        self.said = True
        if sys.stderr.isatty():
            lines += _SHOW_CURSOR
        os.write(2 if self._console is None else self._console, lines)
        os._exit(EXIT_INTERRUPTED)

    def say(self) -> bool:
        """Whether the message is still to be printed; from now on every signal ends the process."""
        first, self.asked, self.said = not self.said, True, True
        return first


@contextmanager
def deaf_children() -> Iterator[None]:
    """Processes that are started inside get no Ctrl-C, which a terminal sends to all of a command's processes, not even
    while they start. Their parent ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
