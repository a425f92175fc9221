"""Complete training state: written atomically, checked by hashes, resumed exactly.

`checkpoints/step-00001234/` holds `model.safetensors`, `ema.safetensors`, `optimizer.safetensors` and `state.json`,
which is written last: that it exists is the commit, and it carries size and SHA-256 of the others and a hash of
itself. Nothing is pickled.
"""

import contextlib
import hashlib
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from ttmray import __version__
from ttmray.config import differences, fingerprint
from ttmray.console import console
from ttmray.errors import UserError
from ttmray.json_text import as_read, read_json
from ttmray.storage import Folder
from ttmray.training.state import TrainingState
from ttmray.training.tensors import pack, unpack

KIND, VERSION = "ttmray training checkpoint", 1
STATE = "state.json"
_PARTS = ("model", "ema", "optimizer")
_STEP = re.compile(r"step-([0-9]{8,})")
_BLOCK = 8 << 20


class Damaged(UserError):
    """A checkpoint that is not what was committed; an older one may be."""


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def save(folder: Folder, state: TrainingState) -> str:
    """Write a checkpoint below `folder`; it counts from the moment its `state.json` exists.

    Saving a step again with equal tensors leaves the committed checkpoint valid at every moment.

    Returns:
        Its name, `step-<8 digits>`.

    Raises:
        UserError: the disk is full, the bucket refuses, ...
    """
    where = folder.sub(step_name(state.step))
    files = {}
    for part in _PARTS:
        data = pack(getattr(state, part))
        where.write(f"{part}.safetensors", data)
        files[f"{part}.safetensors"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    body = {
        "kind": KIND,
        "version": VERSION,
        "step": state.step,
        "samples": state.samples,
        "config": state.config,
        "identity": state.identity,
        "fingerprint": state.fingerprint(),
        "position": state.position,
        "rng": state.rng,
        "facts": state.facts,
        "ema_step": state.ema_step,
        "optimizer_layout": state.optimizer_layout,
        "versions": {"ttmray": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "files": files,
    }
    body = as_read(body)  # as it will be read: tuples are lists, keys are strings
    where.write(STATE, json.dumps({"sha256": fingerprint(body), **body}, indent=1).encode())
    return step_name(state.step)


def read_state(where: Folder) -> dict[str, Any]:
    """`state.json` of one checkpoint folder, after checking itself and the sizes of the files.

    Raises:
        Damaged: not committed, incomplete or altered.
        UserError: from a newer ttmray, or storage that cannot be read.
    """
    sizes = {entry.name: entry.size for entry in where.files()}
    if STATE not in sizes:
        raise Damaged(f"{where} has no {STATE}: it was never committed.")
    data = where.read(STATE)
    try:
        body = read_json(data)
        altered = body.pop("sha256") != fingerprint(body)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise Damaged(f"{where.path(STATE)} is damaged: {error}.") from error
    if altered:
        raise Damaged(f"{where.path(STATE)} is damaged: its hash differs.")
    if body["kind"] != KIND or body["version"] != VERSION:
        raise UserError(
            f"{where} is a {body['kind']} of version {body['version']}; this ttmray reads version {VERSION}.",
            "Use the version of ttmray that wrote it.",
        )
    for name, info in body["files"].items():
        if sizes.get(name) != info["bytes"]:
            raise Damaged(f"{where.path(name)} has {sizes.get(name, 'no')} bytes, expected {info['bytes']}.")
    return body


def verify(where: Folder) -> dict[str, Any]:
    """`read_state` after hashing every file, block by block.

    Raises:
        Damaged, UserError: as `read_state`.
    """
    body = read_state(where)
    for name, info in body["files"].items():
        digest = hashlib.sha256()
        with where.open(name) as file:
            while block := file.read(_BLOCK):
                digest.update(block)
        _require(where.path(name), digest.hexdigest(), info["sha256"])
    return body


def load(folder: Folder, name: str) -> TrainingState:
    """A checkpoint with its tensors on the CPU, every file checked while it is read.

    Raises:
        Damaged, UserError: as `read_state`.
    """
    where = folder.sub(name)
    body = read_state(where)
    tensors: dict[str, Any] = {}
    for part in _PARTS:
        file = f"{part}.safetensors"
        data = where.read(file)
        _require(where.path(file), hashlib.sha256(data).hexdigest(), body["files"][file]["sha256"])
        tensors[part], _ = unpack(data, where.path(file))
    fields = ("step", "samples", "config", "identity", "position", "rng", "ema_step", "optimizer_layout")
    rest: dict[str, Any] = {key: body[key] for key in fields}
    rest["facts"] = body.get("facts", {})  # checkpoints of earlier versions have none
    return TrainingState(**rest, **tensors)


def _require(what: str, actual: str, expected: str) -> None:
    if actual != expected:
        raise Damaged(f"{what} is damaged: its SHA-256 is {actual[:12]}..., expected {expected[:12]}...")


def committed(folder: Folder) -> list[str]:
    """Names of the checkpoints in `folder` that have a `state.json`, newest first."""
    parts = [entry.name.split("/") for entry in folder.files(sizes=False)]
    names = [name[0] for name in parts if len(name) == 2 and name[1] == STATE and _STEP.fullmatch(name[0])]
    return sorted(names, key=_step_of, reverse=True)


def _step_of(name: str) -> int:
    return int(name.removeprefix("step-"))


def newest_valid(folder: Folder) -> str | None:
    """Name of the newest checkpoint whose files are what was committed; None where nothing was ever committed.

    Says which ones it passes over, and why.

    Raises:
        UserError: there are checkpoints and none is valid. Starting over would replace them, so a person decides.
    """
    names = committed(folder)
    newest = _first_valid(folder, names)
    if names and newest is None:
        raise UserError(
            f"{folder}: none of the {len(names)} checkpoints is valid.",
            f"Restore one, or delete {folder} and start the same command again: it trains from the start.",
        )
    return newest


def _first_valid(folder: Folder, names: Sequence[str]) -> str | None:
    for name in names:
        try:
            verify(folder.sub(name))
        except Damaged as error:
            console.print(f"passing over checkpoint {name}: {error.message}", markup=False)
        else:
            return name
    return None


def prune(folder: Folder, keep: int = 2, keep_every: int | None = None) -> list[str]:
    """Delete all but the newest `keep` checkpoints and those whose step is a multiple of `keep_every`.

    Nothing is deleted before one of those that stay was read back and found valid.

    Returns:
        The names that were deleted.
    """
    if keep < 2:
        raise ValueError(f"at least 2 checkpoints are kept, not {keep}: the newest may be damaged")
    names = committed(folder)
    doomed = [name for name in names[keep:] if not keep_every or _step_of(name) % keep_every]
    if not doomed:
        return []
    if _first_valid(folder, [name for name in names if name not in doomed]) is None:
        console.print("older checkpoints stay, because none of the newer ones is valid")
        return []
    for name in doomed:
        _remove(folder, name)
    return doomed


def sweep(folder: Folder) -> list[str]:
    """Delete what killed writers left: checkpoints without a `state.json`, and temporary files.

    For the start of a run, before anything is saved: a checkpoint that is being written has no `state.json` either.

    Returns:
        Names of the checkpoints that were never committed.
    """
    folder.sweep_temporary(older_than_s=0)
    entries = {entry.name.split("/")[0] for entry in folder.files(sizes=False)}
    if not folder.remote and os.path.isdir(folder.uri):
        entries |= set(os.listdir(folder.uri))  # empty folders, too
    left = sorted(name for name in entries - set(committed(folder)) if _STEP.fullmatch(name))
    for name in left:
        _remove(folder, name)
    return left


def _remove(folder: Folder, name: str) -> None:
    """Delete one checkpoint, its commit first."""
    where = folder.sub(name)
    where.delete(STATE)
    for entry in where.files(sizes=False):
        where.delete(entry.name)
    if not folder.remote:
        with contextlib.suppress(OSError):  # a writer that is thought dead may still have a temporary file in it
            os.rmdir(where.uri)


class BackgroundSaver:
    """Saves and prunes in a thread: training waits for a copy to the CPU, not for disk or network.

    One save is in flight at a time; the next one waits for it. What went wrong is raised by the next `save` or `close`.

    Args:
        folder: where the checkpoints go.
        keep: newest checkpoints to keep, at least 2.
        keep_every: steps whose multiples stay for good; None: none.
    """

    def __init__(self, folder: Folder, keep: int = 2, keep_every: int | None = None) -> None:
        self.folder, self.keep, self.keep_every = folder, keep, keep_every
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._in_flight: Future[None] | None = None
        self._copies: dict[str, Tensor] = {}  # reused: new pinned memory costs more than the copy

    def save(self, state: TrainingState) -> None:
        """Copy the tensors of `state` and return; they may change at once.

        Raises:
            UserError: the save before this one failed.
        """
        self._wait()
        copied: dict[str, Any] = {part: self._copy(part, getattr(state, part)) for part in _PARTS}
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._in_flight = self._thread.submit(self._write, replace(state, **copied))

    def _copy(self, part: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        copies = {}
        for name, tensor in tensors.items():
            place = f"{part}/{name}"
            buffer = self._copies.get(place)
            if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
                buffer = self._copies[place] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            copies[name] = buffer.copy_(tensor.detach(), non_blocking=True)
        return copies

    def _write(self, state: TrainingState) -> None:
        save(self.folder, state)
        prune(self.folder, self.keep, self.keep_every)

    def _wait(self) -> None:
        in_flight, self._in_flight = self._in_flight, None
        if in_flight is not None:
            in_flight.result()

    def close(self) -> None:
        """Wait for the save in flight.

        Raises:
            UserError: it failed.
        """
        self._thread.shutdown(wait=True)
        self._wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def refuse_changes(saved: Mapping[str, Any], now: Mapping[str, Any], force: bool = False) -> list[str]:
    """Stop a run that would go on from a checkpoint under another config or on other data.

    Args:
        saved: identity in the checkpoint.
        now: identity of this run.
        force: only say what differs.

    Returns:
        One line per difference.

    Raises:
        UserError: there are differences and `force` is off.
    """
    lines = differences(dict(saved), as_read(dict(now)))
    if not lines:
        return []
    shown = "\n  ".join(lines)
    if not force:
        raise UserError(
            f"The checkpoint was made under another config; going on would change the trajectory:\n  {shown}",
            "Use the old values, another output folder, or --force.",
        )
    console.print(f"going on although the config differs from the checkpoint's:\n  {shown}", markup=False)
    return lines
