"""Named tensors with a description, as the bytes of one safetensors file."""

import json
from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ttmray.errors import UserError

# The only metadata key: safetensors writes several in random order, and equal states should give equal bytes.
_KEY = "ttmray"


def pack(tensors: Mapping[str, Tensor], about: Mapping[str, Any] | None = None) -> bytes:
    """Bytes of a safetensors file of tensors of any shape; `about` goes as JSON into its metadata, under "ttmray"."""
    metadata = None if about is None else {_KEY: json.dumps(about, sort_keys=True)}
    return save({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, metadata)


def unpack(data: bytes, what: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of any shape on the CPU, and the description (empty in files that are not ours).

    Raises:
        UserError: not a complete safetensors file; `what` names it.
    """
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise UserError(f"{what} is damaged or no safetensors file: {error}", "Fetch or make it again.") from error
    # The reader does not give the metadata of bytes; it has checked the header by now.
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    try:
        about = json.loads(header.get("__metadata__", {}).get(_KEY, "{}"))
    except json.JSONDecodeError as error:
        raise UserError(f"{what}: its description is no JSON: {error}") from error
    if not isinstance(about, dict):
        raise UserError(f"{what}: its description is a {type(about).__name__}, not a mapping.")
    return tensors, about
