"""Errors that are written for people, and what they mean for the exit code.

`UserError` is the only exception that a command turns into one message and exit code 2.
Everything else is a bug or broken infrastructure and keeps its traceback.
`ClipError` is what a stage raises for one bad input; the stage's driver turns it into an
index row (see `ttmray.corpus.unit`), so it never stops a job.
"""

import sys
from collections.abc import Callable
from typing import NoReturn

EXIT_OK = 0
EXIT_BAD_INPUT = 2
EXIT_TOO_MANY_FAILURES = 3
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """Bad input or config: what is wrong, which file or field, and the way out.

    Args:
        message: one or two sentences that name the file or field.
        hint: what to do about it; printed on its own line. May be empty.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)  # both in args, so that it survives pickling between processes
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class ClipError(Exception):
    """One input cannot become a clip. It is recorded in the index and the job goes on.

    Args:
        status: `rejected` (a rule of the config says no) or `failed` (it should have worked).
        reason: short stable slug that can be counted, e.g. `too_short`.
        message: the details for a person, e.g. "3.00 s, shorter than 5 s".
    """

    def __init__(self, status: str, reason: str, message: str) -> None:
        if status not in ("rejected", "failed"):
            raise ValueError(f"a ClipError is 'rejected' or 'failed', not {status!r}")
        super().__init__(status, reason, message)
        self.status = status
        self.reason = reason
        self.message = message

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"


def run_program(main: Callable[[], int]) -> NoReturn:
    """For `python -m`: leave with the exit code of `main`, and with one message where the input was wrong."""
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
