"""A child process that runs stages on units: the local runner's worker, and the place where suspects run alone.

Parent and child speak length-prefixed Arrow IPC over two pipes of their own (not stdin and stdout, which
libraries print to). A child that dies or hangs costs the parent one `WorkerDied`, never more.
"""

import io
import json
import os
import select
import signal
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from typing import IO

import pyarrow as pa

from ttmray.corpus.running import Job, run_stages
from ttmray.corpus.unit import Unit
from ttmray.errors import UserError

_LENGTH = struct.Struct("<Q")
_CLOSED = "the pipe is closed"
START_TIMEOUT_S = 300.0


class WorkerDied(Exception):
    """The child ended or was killed before it answered; `how` says which signal, exit code or time-out."""

    def __init__(self, how: str) -> None:
        super().__init__(how)
        self.how = how


class WorkerError(Exception):
    """The child raised; the text is its traceback."""


class Worker:
    """One child process, started at the first unit and again after a death.

    Args:
        job: JSON of `ttmray.corpus.running.Job`, which the child rebuilds.
        stages: names of the stages to run, in order.
    """

    def __init__(self, job: str, stages: Sequence[str]) -> None:
        self._setup = json.dumps({"job": job, "stages": list(stages)})
        self._child: subprocess.Popen[bytes] | None = None
        self._to: IO[bytes] | None = None
        self._from: IO[bytes] | None = None

    def run(self, unit: Unit, timeout_s: float) -> Unit:
        """The unit after the stages.

        Raises:
            WorkerDied: the child is gone (a new one is started by the next call).
            UserError, WorkerError: what the child raised; it lives on.
        """
        try:
            if self._child is None:
                self._start()
            assert self._to is not None
            assert self._from is not None
            _send(self._to, _encode(unit))
            answer = pa.ipc.open_stream(_receive(self._from, time.monotonic() + timeout_s)).read_all()
        except (BrokenPipeError, EOFError, TimeoutError) as error:
            how = self._bury(timed_out=isinstance(error, TimeoutError), timeout_s=timeout_s)
            raise WorkerDied(how) from None
        if answer.column_names == ["error"]:
            raised = json.loads(answer["error"][0].as_py())
            if raised["kind"] == "UserError":
                raise UserError(raised["message"], raised["hint"])
            raise WorkerError(raised["message"])
        return Unit.from_table(answer)

    def kill(self) -> None:
        """End the child at once."""
        if self._child is not None:
            self._child.kill()
            self._bury(timed_out=False, timeout_s=0)

    def _start(self) -> None:
        read_child, write_parent = os.pipe()
        read_parent, write_child = os.pipe()
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-m", "ttmray.corpus.worker", str(read_child), str(write_child)],
            pass_fds=(read_child, write_child),
            stdin=subprocess.DEVNULL,
        )
        os.close(read_child)
        os.close(write_child)
        self._to, self._from = os.fdopen(write_parent, "wb"), os.fdopen(read_parent, "rb", buffering=0)
        try:
            _send(self._to, self._setup.encode())
            _receive(self._from, time.monotonic() + START_TIMEOUT_S)
        except (BrokenPipeError, EOFError, TimeoutError) as error:
            how = self._bury(timed_out=isinstance(error, TimeoutError), timeout_s=START_TIMEOUT_S)
            # no clip's fault: nothing was sent yet
            raise UserError(f"A worker process cannot start: it {how}.", "Its own message stands above.") from None

    def _bury(self, timed_out: bool, timeout_s: float) -> str:
        child = self._child
        assert child is not None
        if timed_out:
            child.kill()
        code = child.wait()
        for pipe in (self._to, self._from):
            try:
                if pipe is not None:
                    pipe.close()
            except BrokenPipeError:
                continue  # flushing to a dead child; nothing of value is lost
        self._child = self._to = self._from = None
        if timed_out:
            return f"no answer within {timeout_s:g} s"
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"


def _encode(unit: Unit) -> bytes:
    table = unit.to_table()
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def _send(pipe: IO[bytes], data: bytes) -> None:
    pipe.write(_LENGTH.pack(len(data)))
    pipe.write(data)
    pipe.flush()


def _receive(pipe: IO[bytes], deadline: float | None = None) -> bytes:
    (length,) = _LENGTH.unpack(_exactly(pipe, _LENGTH.size, deadline))
    return _exactly(pipe, length, deadline)


def _exactly(pipe: IO[bytes], count: int, deadline: float | None) -> bytes:
    data = bytearray()
    while len(data) < count:
        if deadline is not None:
            ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
        chunk = pipe.read(min(count - len(data), 1 << 20))
        if not chunk:
            raise EOFError(_CLOSED)
        data += chunk
    return bytes(data)


def _serve(read: int, write: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which ends us by closing the pipe
    source, sink = os.fdopen(read, "rb", buffering=0), os.fdopen(write, "wb")
    try:
        setup = json.loads(_receive(source))
        _send(sink, b"ready")
        stages = None
        while True:
            unit = Unit.from_table(pa.ipc.open_stream(_receive(source)).read_all())
            try:
                if stages is None:
                    stages = Job.from_json(setup["job"]).build(setup["stages"])
                answer = _encode(run_stages(stages, unit))
            except UserError as error:
                answer = _error("UserError", error.message, error.hint)
            except Exception:
                answer = _error("Error", traceback.format_exc(), "")
            _send(sink, answer)
    except (EOFError, BrokenPipeError):
        return  # the parent is gone or done


def _error(kind: str, message: str, hint: str) -> bytes:
    table = pa.table({"error": [json.dumps({"kind": kind, "message": message, "hint": hint})]})
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]))
