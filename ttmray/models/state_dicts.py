"""Weights files as tensors, and tensors into a model: all of them and no others."""

import codecs
import hashlib
import json
import pickle
import re
import types
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from ttmray.errors import UserError
from ttmray.json_text import read_json

_numpy_scalar = np.float64(0).__reduce__()[0]

# All that a checkpoint of tensors, numbers and strings refers to; torch itself resolves storage classes.
# Nothing here runs code, opens files or unpickles further.
_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("numpy.core.multiarray", "scalar"): _numpy_scalar,  # its place before numpy 2
    ("numpy._core.multiarray", "scalar"): _numpy_scalar,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): codecs.encode,
}


# The only metadata key: safetensors writes several in random order, and equal states should give equal bytes.
KEY, DIGEST = "ttmray", "sha256"
_BLOCK = 8 << 20


def content_digest(header: Mapping[str, Any], numbers: Iterable[bytes | memoryview]) -> str:
    """Hex SHA-256 of all that a safetensors file of ours says: description, names, shapes, types and numbers.

    Args:
        header: of the file; a digest in its description does not count.
        numbers: what follows the header, in blocks.
    """
    about = read_json(header["__metadata__"][KEY]) if KEY in header.get("__metadata__", {}) else {}
    about.pop(DIGEST, None)
    tensors = {name: facts for name, facts in header.items() if name != "__metadata__"}
    digest = hashlib.sha256(json.dumps([about, tensors], sort_keys=True).encode())
    for block in numbers:
        digest.update(block)
    return digest.hexdigest()


def altered(what: str) -> UserError:
    return UserError(f"{what} is damaged: its content is not what was written.", "Fetch or make it again.")


def _require_unaltered(path: Path) -> None:
    """Check a safetensors file against the digest in its description, if it has one: one pass over its bytes.

    Raises:
        UserError: another content.
    """
    with path.open("rb") as file:
        header = read_json(file.read(int.from_bytes(file.read(8), "little")))
        try:
            about = read_json((header.get("__metadata__") or {}).get(KEY, "{}"))
        except ValueError:  # not ours: who reads the description says what is wrong with it
            return
        if isinstance(about, dict) and DIGEST in about:
            blocks = iter(lambda: file.read(_BLOCK), b"")
            if content_digest(header, blocks) != about[DIGEST]:
                raise altered(str(path))


class _RestrictedUnpickler(pickle._Unpickler):
    """In Python: that in C takes as much memory as the largest number of a memo says, 32 GB for 5 bytes."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"refused to load {module}.{name}")
        return _ALLOWED[module, name]


# torch.load takes a module and uses its `Unpickler` for zip checkpoints.
_RESTRICTED_PICKLE = types.SimpleNamespace(Unpickler=_RestrictedUnpickler, __name__="restricted_pickle")


def read_state_dict(path: str | Path) -> dict[str, Any]:
    """What a `.safetensors` file or a torch checkpoint holds, read without running code from it.

    Torch files go to torch's own weights-only reader; where that refuses (pickle protocol 4, numpy scalars, both in
    released checkpoints), to an unpickler that admits tensors, OrderedDict, numpy scalars and nothing else. Their
    tensors are memory-mapped on the CPU.

    Returns:
        Values by name. Nesting such as {"generator": ...} and other values than tensors are left to the caller.

    Raises:
        UserError: no such file, a damaged file, something else than plain data inside, or not a dictionary.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"weights file not found: {path}")
    if not path.stat().st_size:
        raise UserError(f"{path} is empty.", "Fetch or make it again.")
    try:
        if path.suffix == ".safetensors":
            loaded: Any = load_file(path)
            _require_unaltered(path)
        else:
            loaded = _read_torch(path)
    except UserError:
        raise
    except Exception as error:  # a damaged pickle may raise anything, a damaged archive that is mapped an OSError
        raise UserError(
            f"{path} was not read: {reason(error)}",
            "Only safetensors and torch checkpoints of tensors, numbers and strings are accepted; check where the file "
            "comes from.",
        ) from error
    if not isinstance(loaded, dict):
        raise UserError(f"{path} holds a {type(loaded).__name__}, not a dictionary of weights")
    return loaded


def reason(error: Exception) -> str:
    """What a reader says, without torch's advice to switch its protection off."""
    if isinstance(error, KeyError):  # of an opcode that no pickle has
        return "it is no checkpoint"
    text = str(error) or type(error).__name__
    if "weights_only" in text:
        refused = re.search(r"Unsupported (?:global|class|operand)[^\n]*|GLOBAL [\w.]+|refused to load [\w.]+", text)
        return refused[0].rstrip(".") if refused else "it is no checkpoint of plain tensors, or a damaged one"
    return text


def _read_torch(path: Path) -> Any:
    # Files before torch 1.6 are no zip archives; only torch's own reader is trusted with them.
    zipped = zipfile.is_zipfile(path)
    if zipped:
        with zipfile.ZipFile(path) as archive:
            # torch.load would hand such a file to torch.jit.load when the weights-only reader is off.
            if any(Path(name).name == "constants.pkl" for name in archive.namelist()):
                raise pickle.UnpicklingError("it is a TorchScript program, not a checkpoint")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")  # the fallback reads it
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError:
        if not zipped:
            raise
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=_RESTRICTED_PICKLE, mmap=True)


def load_exactly(model: nn.Module, state: Mapping[str, torch.Tensor], what: str) -> None:
    """Gives `model` (usually built on the meta device) the tensors of `state` as float32: all and no others, in
    the shapes of its own.

    Raises:
        UserError: missing or unexpected names, other shapes, or values that are not tensors.
    """
    expected = model.state_dict()
    missing = sorted(expected.keys() - state.keys())
    unexpected = sorted(state.keys() - expected.keys())
    odd = [
        key
        for key in sorted(expected.keys() & state.keys())
        if not isinstance(state[key], torch.Tensor) or state[key].shape != expected[key].shape
    ]
    for kind, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", odd)):
        if keys:
            some = ", ".join(keys[:4]) + (", ..." if len(keys) > 4 else "")
            raise UserError(
                f"{what}: {len(keys)} weights {kind}: {some}",
                "The file belongs to another model or another size of it.",
            )
    model.load_state_dict({key: value.float() for key, value in state.items()}, assign=True)
