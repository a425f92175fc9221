"""Weights files as tensors, and tensors into a model: all of them and no others."""

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ttmray.errors import UserError


def read_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    """Tensors of a `.safetensors` file, or of a torch checkpoint read without running code from it.

    Raises:
        UserError: no such file, unreadable, or not a dictionary (a single level of nesting such as
            {"generator": ...} is left to the caller).
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"weights file not found: {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(
            f"{path} was not read: {error}",
            "Only safetensors and torch checkpoints of plain tensors are accepted.",
        ) from error
    if not isinstance(loaded, dict):
        raise UserError(f"{path} holds a {type(loaded).__name__}, not a dictionary of weights")
    return loaded


def load_exactly(model: nn.Module, state: Mapping[str, torch.Tensor], what: str) -> None:
    """Gives `model` (usually built on the meta device) the tensors of `state` as float32: all and no others.

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
