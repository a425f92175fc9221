"""WebDataset shards: one tar per unit, the same bytes for the same clips.

Members of a clip: `<key>.json`, `<key>.clap_audio.npy` (2, 512) float32, `<key>.latent_mean.npy` and
`<key>.latent_std.npy` (430, 40) float16, `<key>.mert.npy` (2, 1024) float32, optionally `<key>.flac`. Row 0
of the embeddings is the mix, row 1 the instrumental, so that another reward head can score the corpus
without touching audio. Shard names carry the start of their hash: a late writer of the same unit can then
never replace the bytes that a committed index describes.
"""

import hashlib
import io
import tarfile
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from typing import Any, BinaryIO

import numpy as np

from ttmray.errors import UserError
from ttmray.json_text import read_json
from ttmray.storage import Folder

SHARDS = "shards"
CAPTIONS = "captions"
LATENTS = ("latent_mean", "latent_std")


def mend(run: Folder) -> str:
    """The way out where a file of a corpus or pool is damaged."""
    return f"`ttmray corpus repair {run.typed}` finds every damaged file of it and makes it again."


def npy_bytes(array: np.ndarray) -> bytes:
    """A `.npy` file of an array of any shape."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


@lru_cache(64)  # all clips have the same one
def npy_header(shape: tuple[int, ...], dtype: str) -> bytes:
    """What stands in front of the numbers in `npy_bytes` of an array of this shape and type, such as `<f2`."""
    empty = np.empty(shape, dtype)
    return npy_bytes(empty)[: -empty.nbytes]


def pack(samples: Mapping[str, Mapping[str, bytes]]) -> tuple[bytes, dict[str, dict[str, int]]]:
    """A tar of samples (key -> extension -> bytes), sorted, with fixed times and owners; and where in it each member's
    bytes start (key -> extension -> offset)."""
    from webdataset.writer import TarWriter  # imports torch, which readers do not need

    buffer = io.BytesIO()
    places: dict[str, dict[str, int]] = {}
    # mtime is an int: a float would get a header of its own
    with TarWriter(buffer, user="", group="", mode=0o644, mtime=0, encoder=False) as tar:
        for key in sorted(samples):
            for extension in sorted(samples[key]):
                data = samples[key][extension]
                tar.write({"__key__": key, extension: data})
                padded = -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                places.setdefault(key, {})[extension] = tar.tarstream.offset - padded
    return buffer.getvalue(), places


def tar_bytes(samples: Mapping[str, Mapping[str, bytes]]) -> bytes:
    """The tar of `pack` alone."""
    return pack(samples)[0]


def latent_places(
    samples: Mapping[str, Mapping[str, bytes]], members: Mapping[str, Mapping[str, int]], shape: tuple[int, int]
) -> dict[str, dict[str, int]]:
    """Per key the index columns that say where the numbers of its latents lie.

    Args:
        samples, members: what `pack` took and gave.
        shape: (frames, channels) of the latents.
    """
    frames, channels = shape
    places = {}
    for key, sample in samples.items():
        ends = {name: members[key][f"{name}.npy"] + len(sample[f"{name}.npy"]) for name in LATENTS}
        at = {f"{name}_at": end - 2 * frames * channels for name, end in ends.items()}
        places[key] = at | {"latent_frames": frames, "latent_channels": channels}
    return places


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
    except (tarfile.TarError, ValueError, EOFError, KeyError, OverflowError) as error:
        raise UserError(
            f"{name} is damaged: {error}", "Delete its index file and start the same command again."
        ) from error


def read_npy(data: bytes) -> np.ndarray:
    """The array of a member, (n, ...) of any dtype but objects.

    Raises:
        ValueError: it is none.
    """
    try:
        array: np.ndarray = np.load(io.BytesIO(data), allow_pickle=False)
        return array
    except Exception as error:  # numpy parses the header with Python's tokenizer, whose errors are many
        raise ValueError(f"no array: {error}") from error


def _decode(extension: str, data: bytes) -> Any:
    if extension.endswith("npy"):
        return read_npy(data)
    if extension == "json":
        return read_json(data)
    return data


def captions_bytes(caption_ids: list[str], texts: Mapping[str, np.ndarray]) -> bytes:
    """Text features of some captions as safetensors `<caption_id>.<name>`.

    Args:
        texts: name -> (n, ...), row i of caption i.
    """
    from safetensors.numpy import save

    tensors = {
        f"{caption_id}.{name}": np.ascontiguousarray(array[i])
        for name, array in texts.items()
        for i, caption_id in enumerate(caption_ids)
    }
    return save(tensors)


def text_places(file: BinaryIO) -> dict[str, Any]:
    """Where the numbers of text features start in a captions file, by its header: 8 bytes of length, then JSON.

    Returns:
        `shape` [tokens, width] of all T5 features; `places` caption id -> [offset of T5, offset of CLAP features].

    Raises:
        ValueError: no safetensors file, or its features are not of one shape.
    """
    file.seek(0, io.SEEK_END)
    size = file.tell()
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if 8 + length > size:
        raise ValueError("the header is cut short")
    shapes: set[tuple[int, int]] = set()
    places: dict[str, list[int]] = {}
    try:
        for tensor, facts in read_json(file.read(length)).items():
            caption_id, _, kind = tensor.partition(".")
            if kind not in ("t5", "clap"):
                continue
            start, end = facts["data_offsets"]
            if not 0 <= start < end <= size - 8 - length:
                raise ValueError(f"{tensor} does not fit")
            places.setdefault(caption_id, [0, 0])[kind == "clap"] = 8 + length + start
            if kind == "t5":
                tokens, width = facts["shape"]
                shapes.add((tokens, width))
            if facts["dtype"] != ("F16" if kind == "t5" else "F32"):
                raise ValueError(f"{tensor} is {facts['dtype']}")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no header of tensors: {error!r}") from error
    if len(shapes) != 1 or not all(map(all, places.values())):
        raise ValueError(f"its T5 features have the shapes {sorted(shapes)}, or some are missing")
    return {"shape": list(shapes.pop()), "places": places}


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
        raise UserError(f"{run.path(name)} is damaged: {error}", mend(run)) from error
    features: dict[str, dict[str, np.ndarray]] = {}
    for tensor, array in tensors.items():
        caption_id, _, kind = tensor.partition(".")
        features.setdefault(caption_id, {})[kind] = array
    return features
