"""A child process that runs stages on units: the local runner's worker, and the place where suspects run alone.

Parent and child send Arrow IPC over a pipe of `multiprocessing`; nothing is pickled but the arguments of the start. A
child that dies or hangs costs the parent one `WorkerDied`, never more.
"""

import io
import json
import multiprocessing
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from types import ModuleType

import pyarrow as pa

from ttmray.corpus.running import Job, run_stages
from ttmray.corpus.unit import Unit
from ttmray.errors import UserError
from ttmray.json_text import read_json
from ttmray.signals import deaf_children

START_TIMEOUT_S = 300.0
_READY = b"ready"
_spawn = multiprocessing.get_context("spawn")
_starting = threading.Lock()


class WorkerDied(Exception):
    """The child ended or was killed before it answered; `how` says which signal, exit code or time-out."""

    def __init__(self, how: str) -> None:
        super().__init__(how)
        self.how = how


class WorkerError(Exception):
    """The child raised; the text is its traceback."""


class ChildWorker:
    """One child process, started at the first unit and again after a death.

    Args:
        job: JSON of `ttmray.corpus.running.Job`, which the child rebuilds.
        stages: names of the stages to run, in order.
    """

    def __init__(self, job: str, stages: Sequence[str]) -> None:
        self._job, self._stages = job, tuple(stages)
        self._child: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection | None = None
        self._burial = threading.Lock()

    def run(self, unit: Unit, timeout_s: float) -> Unit:
        """The unit after the stages.

        Raises:
            WorkerDied: the child is gone (a new one is started by the next call).
            UserError, WorkerError: what the child raised; it lives on.
        """
        if self._child is None:
            self._start()
        assert self._pipe is not None
        try:
            self._pipe.send_bytes(_encode(unit.to_table()))
            answer = pa.ipc.open_stream(_receive(self._pipe, timeout_s)).read_all()
        except (OSError, EOFError) as error:  # a broken pipe, and a time-out, are OSErrors
            raise WorkerDied(self._bury(timeout_s if isinstance(error, TimeoutError) else None)) from None
        if answer.column_names == ["error"]:
            raised = read_json(answer["error"][0].as_py())
            if raised["kind"] == "UserError":
                raise UserError(raised["message"], raised["hint"])
            raise WorkerError(raised["message"])
        return Unit.from_table(answer)

    def kill(self) -> None:
        """End the child at once; from any thread, also while another one waits for its answer."""
        child = self._child
        if child is not None:
            with suppress(ValueError):  # closed by now: the other thread was faster
                child.kill()
            self._bury(None)

    def _start(self) -> None:
        pipe, theirs = _spawn.Pipe()
        child = _spawn.Process(target=_serve, args=(theirs, self._job, self._stages), daemon=True)
        with without_main(), deaf_children():
            child.start()
        theirs.close()  # else the child's death would not close the pipe
        self._child, self._pipe = child, pipe  # only now there is something that `kill` could end
        try:
            _receive(pipe, START_TIMEOUT_S)
        except (OSError, EOFError) as error:
            how = self._bury(START_TIMEOUT_S if isinstance(error, TimeoutError) else None)
            # no clip's fault: nothing was sent yet
            raise UserError(f"A worker process cannot start: it {how}.", "Its own message stands above.") from None

    def _bury(self, timeout_s: float | None) -> str:
        """Take leave of the child; returns how it ended.

        Args:
            timeout_s: what it did not answer within; None: it is dead, or dying.
        """
        with self._burial:
            child, pipe = self._child, self._pipe
            if child is None or pipe is None:
                return "was ended"
            if timeout_s is not None:
                child.kill()
            child.join()
            code = child.exitcode or 0
            child.close()
            pipe.close()
            self._child = self._pipe = None
        if timeout_s is not None:
            return f"no answer within {timeout_s:g} s"
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"


@contextmanager
def without_main() -> Iterator[None]:
    """A spawned process imports the parent's main module again, whatever that does; ours needs nothing of it."""
    with _starting:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main


def _encode(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def _receive(pipe: Connection, timeout_s: float) -> bytes:
    if not pipe.poll(timeout_s):
        raise TimeoutError
    return pipe.recv_bytes()


def _serve(pipe: Connection, job: str, names: Sequence[str]) -> None:
    """The child: answers units until the parent is gone or done."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which ends us by closing the pipe
    chain = None
    try:
        pipe.send_bytes(_READY)
        while True:
            unit = Unit.from_table(pa.ipc.open_stream(pipe.recv_bytes()).read_all())
            try:
                if chain is None:
                    chain = Job.from_json(job).build(names)
                answer = run_stages(chain, unit).to_table()
            except UserError as error:
                answer = _error("UserError", error.message, error.hint)
            except Exception:
                answer = _error("Error", traceback.format_exc(), "")
            pipe.send_bytes(_encode(answer))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _error(kind: str, message: str, hint: str) -> pa.Table:
    return pa.table({"error": [json.dumps({"kind": kind, "message": message, "hint": hint})]})
