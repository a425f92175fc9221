"""What a run has cost: `cost.json` in its folder, wall, CPU and GPU seconds of all its launches.

A job opens an account of its folder around its work. Who takes GPUs says how many for as long as they are held, busy or
not; who commits something notes the time so far, in every account that is open: that of a chain's step has what the
jobs inside of it cost. So a killed launch loses no more than what it has spent since its last commit.

CPU seconds, unlike wall time, are the same on a machine that others use as well. They are those of the process that
opened the account and of its children once they have ended; Ray's workers are nobody's children, so theirs are missing.
"""

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from ttmray.console import console, running
from ttmray.errors import UserError
from ttmray.json_text import read_json
from ttmray.storage import Folder

COST = "cost.json"
LOCAL_S, REMOTE_S = 1.0, 60.0
"""A file is written at most once in so many seconds: commits may be many, and a bucket takes its time."""


@dataclass
class Account:
    """Cost so far, in the fields `seconds`, `cpu_seconds` and `gpu_seconds` of a JSON file; its other fields stay. It
    pickles.

    It also says why the last launch ended early (`stopped`), and `cost.json` when it was written (`noted`, as of
    `time.time`) and how far what is counted was then (`progress`, see `console.Meter.state`).

    Attributes:
        fields: of the file.
        since: time up to which `fields` has the cost, as of `time.time`, which machines share.
        cpu: the same of the CPU time of this process.
        gpus: held since then.
        saved: time of the last write.
        meters: how many were running in this process when it was opened: those are of others.
    """

    folder: Folder
    name: str
    fields: dict[str, Any]
    since: float
    cpu: float
    gpus: float = 0.0
    saved: float = 0.0
    meters: int = 0

    def settle(self) -> None:
        """Add the time since the last call, which a clock that was put back does not make less."""
        now, cpu = time.time(), _cpu()
        spent = max(0.0, now - self.since)
        self.fields["seconds"] += spent
        self.fields["cpu_seconds"] += max(0.0, cpu - self.cpu)
        self.fields["gpu_seconds"] += spent * self.gpus
        self.since, self.cpu = now, cpu

    def save(self) -> None:
        self.settle()
        if self.name == COST:
            self.fields["noted"] = self.since
            self.fields.pop("progress", None)
            if len(running) > self.meters:
                self.fields["progress"] = running[-1].state()
        self.folder.write(self.name, json.dumps(self.fields, indent=1).encode())
        self.saved = self.since


_open: list[Account] = []
"""Accounts of this process, the outermost first."""


@contextmanager
def account(folder: Folder, name: str = COST, since: float | None = None) -> Iterator[None]:
    """Add what the block costs to an account, which is there when it ends, in whatever way.

    Args:
        folder: of a run that has been claimed: nothing is written to those of others.
        since: time at which the work began, as of `time.time`; default: now.

    Raises:
        UserError: the file is damaged, or cannot be written.
    """
    fields = {key: value for key, value in read(folder, name).items() if key not in ("stopped", "progress")}
    gpus, counted = _open[-1].gpus if _open else 0.0, len(running)
    _open.append(Account(folder, name, fields, since or time.time(), _cpu(), gpus, meters=counted))
    try:
        yield
    except BaseException as error:
        fields["stopped"] = error.message if isinstance(error, UserError) else _named(error)
        raise
    finally:
        _open.pop().save()
        del running[counted:]
    if name == COST:
        console.print(f"cost so far: {said(folder)}")


@contextmanager
def holding(gpus: float) -> Iterator[None]:
    """So many GPUs are held inside. Of two blocks, one in the other, the one with more counts."""
    before = [(one, one.gpus) for one in _open]
    _hold((one, max(one.gpus, gpus)) for one, _ in before)
    try:
        yield
    finally:
        _hold(before)


def _cpu() -> float:
    """CPU seconds of this process and of its children that have ended."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def _named(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return f"{type(error).__name__}: {error}"


def _hold(held: Any) -> None:
    for one, gpus in held:
        one.settle()
        one.gpus = gpus


def note() -> None:
    """Something was committed: write the cost so far, unless it was written just now."""
    for one in _open:
        one.settle()
        if not 0 <= one.since - one.saved < (REMOTE_S if one.folder.remote else LOCAL_S):
            one.save()


def opened() -> list[Account]:
    """The accounts that are open, for a process that notes while this one waits for it."""
    return list(_open)


def carry_on(accounts: Sequence[Account]) -> None:
    """Note in accounts of a process that waits for this one."""
    for one in accounts:
        one.cpu, one.meters = _cpu(), len(running)
    _open.extend(accounts)


def read(folder: Folder, name: str = COST) -> dict[str, Any]:
    """The fields of an account; no cost where there is none yet.

    Raises:
        UserError: it is damaged.
    """
    if not folder.exists(name):
        return {"seconds": 0.0, "cpu_seconds": 0.0, "gpu_seconds": 0.0}
    try:
        fields: dict[str, Any] = read_json(folder.read(name))
        fields |= {field: float(fields[field]) for field in ("seconds", "gpu_seconds")}
        fields["cpu_seconds"] = float(fields.get("cpu_seconds", 0.0))  # files of older runs have none
        if "noted" in fields:
            fields["noted"] = float(fields["noted"])
            datetime.fromtimestamp(fields["noted"], UTC)
        if not all(math.isfinite(value) for value in fields.values() if isinstance(value, float)):
            raise ValueError("a number that is none")
    except (ValueError, KeyError, TypeError, OverflowError, OSError) as error:
        raise UserError(f"{folder.path(name)} is damaged.", "Delete it: only what the run has cost is lost.") from error
    return fields


def so_far(folder: Folder) -> dict[str, Any]:
    """The fields of a run's account, up to now where it is open."""
    for one in _open:
        if (one.folder, one.name) == (folder, COST):
            one.settle()
            return one.fields
    return read(folder)


def said(folder: Folder) -> str:
    """The cost of a run in words."""
    fields = read(folder)
    return f"{fields['seconds'] / 3600:.3f} h, {fields['gpu_seconds'] / 3600:.3f} GPU-hours"


def on_cuda(device: str) -> float:
    """GPUs that this process holds with models on a device: 1 or 0."""
    if device != "auto":
        return float(device != "cpu")
    import torch

    return float(torch.cuda.is_available())
