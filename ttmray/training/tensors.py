"""Named tensors with a description, as the bytes of one safetensors file."""

import json
from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ttmray.errors import UserError
from ttmray.json_text import read_json
from ttmray.models.state_dicts import DIGEST, KEY, altered, content_digest


def pack(tensors: Mapping[str, Tensor], about: Mapping[str, Any] | None = None) -> bytes:
    """Bytes of a safetensors file of tensors of any shape; `about` goes as JSON into its metadata, under "ttmray", and
    with it a hash of all
    (`models.state_dicts.content_digest`): the format itself has none."""
    plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    if about is None:
        return save(plain)
    data = save(plain, {KEY: json.dumps(about, sort_keys=True)})
    start = 8 + int.from_bytes(data[:8], "little")
    header, numbers = read_json(data[8:start]), memoryview(data)[start:]
    digest = content_digest(header, [numbers])
    header["__metadata__"][KEY] = json.dumps({**about, DIGEST: digest}, sort_keys=True)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join((len(text).to_bytes(8, "little"), text, numbers))


def unpack(data: bytes, what: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of any shape on the CPU, and the description (empty in files that are not ours).

    Raises:
        UserError: not a complete safetensors file, or not what was written; `what` names it.
    """
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise UserError(f"{what} is damaged or no safetensors file: {error}", "Fetch or make it again.") from error
    # The reader does not give the metadata of bytes; it has checked the header by now.
    start = 8 + int.from_bytes(data[:8], "little")
    header = read_json(data[8:start])
    try:
        about = read_json(header.get("__metadata__", {}).get(KEY, "{}"))
    except ValueError as error:
        raise UserError(f"{what}: its description is no JSON: {error}") from error
    if not isinstance(about, dict):
        raise UserError(f"{what}: its description is a {type(about).__name__}, not a mapping.")
    if about.pop(DIGEST, None) not in (None, content_digest(header, [memoryview(data)[start:]])):
        raise altered(what)
    return tensors, about
