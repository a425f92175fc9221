"""WebDataset shards: one tar per unit, the same bytes for the same clips.

Members of a clip: `<key>.json`, `<key>.clap_audio.npy` (2, 512) float32, `<key>.latent_mean.npy` and
`<key>.latent_std.npy` (430, 40) float16, `<key>.mert.npy` (2, 1024) float32, optionally `<key>.flac`. Row 0
of the embeddings is the mix, row 1 the instrumental, so that another reward head can score the corpus
without touching audio. Shard names carry the start of their hash: a late writer of the same unit can then
never replace the bytes that a committed index describes.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np

from ttmray.errors import UserError
from ttmray.storage import Folder

SHARDS = "shards"
CAPTIONS = "captions"
VERIFY = "Run `ttmray corpus verify` on the corpus: it finds every damaged file and says how to mend it."


def npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def tar_bytes(samples: Mapping[str, Mapping[str, bytes]]) -> bytes:
    """A tar of samples (key -> extension -> bytes), sorted, with fixed times and owners."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key in sorted(samples):
            for extension in sorted(samples[key]):
                data = samples[key][extension]
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size, member.mtime, member.mode = len(data), 0, 0o644
                tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def named_by_content(folder: str, unit: str, data: bytes, suffix: str) -> tuple[str, str]:
    """Name below the run folder and the full SHA-256 of a file that belongs to a unit."""
    digest = hashlib.sha256(data).hexdigest()
    return f"{folder}/{unit}-{digest[:12]}.{suffix}", digest


def read_samples(data: bytes, name: str, only: Collection[str] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Key and decoded members of every sample of a shard: json as dict, npy as array, others as bytes.

    Args:
        only: extensions to decode; the others are left out. Default: all.

    Raises:
        UserError: for a tar that is broken, members out of order, or arrays that are no plain npy.
    """
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            key = ""
            sample: dict[str, Any] = {}
            for member in tar:
                file = tar.extractfile(member)
                if file is None:
                    raise UserError(f"{name}: {member.name} is not a plain file.")
                member_key, _, extension = member.name.partition(".")
                if member_key != key:
                    if sample:
                        yield key, sample
                    key, sample = member_key, {}
                if only is None or extension in only:
                    sample[extension] = _decode(extension, file.read())
            if sample:
                yield key, sample
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise UserError(f"{name} is damaged: {error}", "Delete its index file and start the job again.") from error


def _decode(extension: str, data: bytes) -> Any:
    if extension.endswith("npy"):
        try:
            return np.load(io.BytesIO(data), allow_pickle=False)
        except Exception as error:  # numpy parses the header with Python's tokenizer, whose errors are many
            raise ValueError(f"no array: {error}") from error
    if extension == "json":
        return json.loads(data)
    return data


def captions_bytes(caption_ids: list[str], texts: Mapping[str, np.ndarray]) -> bytes:
    """Text features of some captions as safetensors `<caption_id>.<name>`."""
    from safetensors.numpy import save

    tensors = {
        f"{caption_id}.{name}": np.ascontiguousarray(array[i])
        for name, array in texts.items()
        for i, caption_id in enumerate(caption_ids)
    }
    return save(tensors)


def read_captions(run: Folder, name: str) -> dict[str, dict[str, np.ndarray]]:
    """caption id -> {`t5` (77, D) float16, `clap` (512,) float32, ...} of one captions file.

    Raises:
        UserError: when it is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        tensors = load(run.read(name))
    except SafetensorError as error:
        raise UserError(
            f"{run.path(name)} is damaged: {error}", "Delete its unit's index file and start the job again."
        ) from error
    features: dict[str, dict[str, np.ndarray]] = {}
    for tensor, array in tensors.items():
        caption_id, _, kind = tensor.partition(".")
        features.setdefault(caption_id, {})[kind] = array
    return features
