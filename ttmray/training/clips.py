"""Random access to the clips of a corpus run, local or remote, in memory that hardly grows with the corpus.

What is kept per clip is its key, its score and byte offsets, in arrays. Latents and text features are read
straight from where they lie in the tar and safetensors files; files of a remote corpus are copied to a local
cache first, whole and checked.
"""

import functools
import hashlib
import io
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ttmray.corpus import index, scores, shards
from ttmray.corpus.unit import OK
from ttmray.errors import UserError
from ttmray.runs import RUN, SUCCESS
from ttmray.storage import Folder, read_file
from ttmray.tables import is_table, parse_table
from ttmray.training.files import Files, copies_folder, damaged

CLAP_WIDTH = 512
MEMBERS = ("latent_mean.npy", "latent_std.npy")
_BLOCK = 512  # bytes; of tar
_HEADER = 16_384  # bytes; a first read that holds the whole header of nearly every captions file


@dataclass(eq=False)
class Clips:
    """Chosen clips of one corpus in index order. Attributes are arrays over the clips unless said otherwise.

    Attributes:
        corpus: fingerprint of the run.
        chosen: hex SHA-256 over keys, shards (whose names carry hashes), captions, scores and weights.
        waiting: count of clips that a growing corpus holds, but not yet the text of their captions.
        keys: clip keys.
        score: float32, NaN without a score column.
        weight: float32, of the clip's loss; 1 unless the file of keys says something else.
        shape, text_shape: (frames, channels) of latents and (tokens, width) of T5 features.
    """

    files: Files
    corpus: str
    chosen: str
    waiting: int
    keys: pa.StringArray
    score: np.ndarray
    weight: np.ndarray
    shape: tuple[int, int]
    text_shape: tuple[int, int]
    _shard: np.ndarray  # int32, positions in _shards
    _shards: list[str]
    _latent_at: np.ndarray  # (clips, 2) int64 offsets of mean and std in the shard; 0: not looked up yet
    _caption: np.ndarray  # int32, rows of _text_at
    _text_file: np.ndarray  # int32 per caption, positions in _text_files
    _text_files: list[str]
    _text_at: np.ndarray  # (captions, 2) int64 offsets of T5 and CLAP features

    def __len__(self) -> int:
        return len(self.keys)

    def key(self, row: int) -> str:
        return str(self.keys[row])

    def fetch(self, rows: Sequence[int]) -> None:
        """Have the shards of some clips at hand, copied side by side; without it `read` copies one by one."""
        if self.files.run.remote:
            self.files.fetch(self._shards[code] for code in set(self._shard[rows].tolist()))

    def read(self, row: int, mean: np.ndarray, std: np.ndarray, text: np.ndarray, text_c: np.ndarray) -> None:
        """Read one clip into contiguous arrays: `shape` float16 twice, `text_shape` float16, (512,) float32.

        Raises:
            UserError: a file is missing or damaged; names it and the clip.
        """
        name = self._shards[self._shard[row]]
        descriptor = self.files.open(name)
        try:
            if not self._latent_at[row].all():  # another thread may be at it: it finds the same
                self._locate(descriptor, self._shard[row])
            for target, at in zip((mean, std), self._latent_at[row].tolist(), strict=True):
                self._read_into(descriptor, name, row, target, at)
        finally:
            os.close(descriptor)
        caption = self._caption[row]
        name = self._text_files[self._text_file[caption]]
        descriptor = self.files.open(name)
        try:
            for target, at in zip((text, text_c), self._text_at[caption].tolist(), strict=True):
                self._read_into(descriptor, name, row, target, at)
        finally:
            os.close(descriptor)

    def damage(self, row: int, what: str, text: bool = False) -> UserError:
        """The error for a clip whose latents (or text features) cannot be used."""
        file = self._text_files[self._text_file[self._caption[row]]] if text else self._shards[self._shard[row]]
        return damaged(self.files.run.path(file), f"clip {self.key(row)}: {what}")

    def _read_into(self, descriptor: int, name: str, row: int, target: np.ndarray, at: int) -> None:
        if os.preadv(descriptor, [target.data], at) != target.nbytes:
            raise damaged(self.files.run.path(name), f"clip {self.key(row)}: the file is cut short")

    def _locate(self, descriptor: int, shard: int) -> None:
        """Look up all chosen clips of a shard at once."""
        rows = np.flatnonzero(self._shard == shard)
        rows_of = {self.key(row): row for row in rows.tolist()}
        where = self.files.run.path(self._shards[shard])
        for key, member, at, shape in _latent_offsets(descriptor, where):
            if key in rows_of:
                if shape != self.shape:
                    raise damaged(where, f"clip {key}: {MEMBERS[member]} is {shape}, elsewhere {self.shape}")
                self._latent_at[rows_of[key], member] = at
        for row in rows[(self._latent_at[rows] == 0).any(axis=1)].tolist():
            raise damaged(where, f"clip {self.key(row)}: its latents are not there")


def open_clips(corpus: str, split: str, keys: str | None, score_column: str | None, cache: str) -> Clips:
    """The ok clips of a corpus run, finished or still growing.

    Args:
        corpus: run folder, local or remote.
        split: `train`, `validation`, `test` or `all`.
        keys: file of clip keys to keep (see `read_keys`).
        score_column: column of the index or of a table of scores; None: the clips need no score.
        cache: local folder for copies of remote files.

    Raises:
        UserError: no corpus run, no such clips, a clip without score, caption features that are missing.
    """
    run = Folder.at(corpus)
    fingerprint = _fingerprint(run)
    files = Files(run, copies_folder(cache).sub(fingerprint[:16]))
    columns = ["key", "status", "split", "caption_id", "shard", "unit"]
    table = index.read_index(run)
    if score_column is not None:
        table = scores.with_columns(run, table, [score_column])
        columns.append(score_column)
    table = table.select(columns)
    weights = None if keys is None else read_keys(keys)
    rows = _choose(run, table, split, keys, weights)
    captions = rows["caption_id"].combine_chunks().dictionary_encode()
    caption_of, caption_ids = captions.indices.to_numpy(), captions.dictionary.to_pylist()
    units = table.filter(pc.is_in(table["caption_id"], captions.dictionary))["unit"].unique().to_pylist()
    text_files = _caption_files(run, units)
    files.fetch(text_files)
    text_file, text_at, text_shape = _find_captions(files, text_files, caption_ids)
    waiting = text_file[caption_of] < 0
    if waiting.any():
        first = int(np.flatnonzero(waiting)[0])
        if run.exists(SUCCESS) or waiting.all():
            raise UserError(f"{run}: no text features of the caption of clip {rows['key'][first]}.", shards.VERIFY)
        rows, caption_of = rows.filter(pa.array(~waiting)), caption_of[~waiting]
    score = _scores(run, rows, score_column)
    weight = np.array([1.0 if weights is None else weights[key] for key in rows["key"].to_pylist()], np.float32)
    shard = rows["shard"].combine_chunks().dictionary_encode()
    names = shard.dictionary.to_pylist()
    digest = hashlib.sha256(score.astype("<f4").tobytes())
    for column in ("key", "shard", "caption_id"):
        digest.update("\n".join(rows[column].to_pylist()).encode())
    if (weight != 1).any():
        digest.update(weight.astype("<f4").tobytes())
    return Clips(
        files=files,
        corpus=fingerprint,
        chosen=digest.hexdigest(),
        waiting=int(waiting.sum()),
        keys=rows["key"].combine_chunks(),
        score=score,
        weight=weight,
        shape=_first_shape(files, names[0]),
        text_shape=text_shape,
        _shard=shard.indices.to_numpy(),
        _shards=names,
        _latent_at=np.zeros((rows.num_rows, 2), np.int64),
        _caption=caption_of,
        _text_file=text_file,
        _text_files=text_files,
        _text_at=text_at,
    )


def read_keys(path: str) -> dict[str, float]:
    """Clip keys of a file, with their weights in the loss: one key per line, or the columns `key` and, if it is there,
    `weight` of a table (`ttmray.tables`). The weight is 1 where the file has none.

    Raises:
        UserError: it cannot be read, has no such column, is empty, names a clip twice, or has a weight that is not a
            number from 0 on.
    """
    data, way_out = read_file(path), "Write one key per line, or a table with a column `key`."
    weights: list[float | None] = []
    try:
        if is_table(path):
            table = parse_table(path, data, ("key", "weight"), only_known=True)
            keys = table.texts("key")
            weights = [None if cell in (None, "") else float(cell) for cell in table.columns.get("weight", [])]
        else:
            keys = [line.strip() for line in data.decode("utf-8-sig").splitlines() if line.strip()]
    except (UserError, TypeError, ValueError) as error:
        why = error.message if isinstance(error, UserError) else error
        raise UserError(f"{path} holds no clip keys: {why}", way_out) from error
    if not any(keys):
        raise UserError(f"{path} holds no clip keys.", way_out)
    if len(set(keys)) < len(keys):
        twice = Counter(keys).most_common(1)[0][0]
        raise UserError(f"{path} names {twice} twice.", "Use `repeat` to draw clips more often.")
    weight_of: dict[str, float] = {}
    for key, weight in zip(keys, weights or [1.0] * len(keys), strict=True):
        if weight is None or not 0 <= weight < np.inf:
            raise UserError(f"{path}: the weight of {key} is {weight}.", "Weights are numbers from 0 on, 1 on average.")
        weight_of[key] = weight
    return weight_of


def remote_sizes(clips: Clips) -> dict[str, int]:
    """Local path -> bytes of the copies that some clips need; empty for a local corpus."""
    run = clips.files.run
    if not run.remote:
        return {}
    names = {*clips._shards, *clips._text_files}
    listed = [(f"{part}/{e.name}", e.size) for part in (shards.SHARDS, shards.CAPTIONS) for e in run.files(part)]
    return {clips.files.local_path(name): size for name, size in listed if name in names}


def _fingerprint(run: Folder) -> str:
    if not run.exists(RUN):
        raise UserError(f"{run} is not a corpus run: it has no {RUN}.", "Give the output folder of a corpus job.")
    try:
        return str(json.loads(run.read(RUN))["fingerprint"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{run.path(RUN)} does not describe a corpus run.", "Restore it, or make the run again."
        ) from error


def _choose(run: Folder, table: pa.Table, split: str, keys: str | None, weights: Iterable[str] | None) -> pa.Table:
    rows = table.filter(pc.equal(table["status"], OK))
    what = "ok clips"
    if split != "all":
        rows, what = rows.filter(pc.equal(rows["split"], split)), f"ok clips of split {split}"
    if rows.num_rows == 0:
        raise UserError(f"{run} holds no {what}.", "See `ttmray corpus stats` for what it holds.")
    if weights is not None:
        wanted = pa.array(list(weights), pa.string())
        absent = wanted.filter(pc.invert(pc.is_in(wanted, rows["key"].combine_chunks())))
        if len(absent):
            raise UserError(
                f"{keys}: {len(absent)} of {len(wanted)} keys are not among the {what} of {run}, e.g. {absent[0]}.",
                "Remove them, or choose the corpus and split that they come from.",
            )
        rows = rows.filter(pc.is_in(rows["key"], wanted))
    return rows


def _scores(run: Folder, rows: pa.Table, column: str | None) -> np.ndarray:
    if column is None:
        return np.full(rows.num_rows, np.nan, np.float32)
    score = rows[column].to_numpy().astype(np.float32)  # null becomes NaN
    bad = np.flatnonzero(~np.isfinite(score))
    if len(bad):
        raise UserError(
            f"{run}: {len(bad)} clips have no {column}, e.g. {rows['key'][int(bad[0])]}.",
            "Choose another score_column, or score_column: null for a model that takes no score.",
        )
    return score


def _caption_files(run: Folder, units: list[str]) -> list[str]:
    """Captions files of some units. Usually one per unit is listed; where a killed writer left another one, the
    unit's index file knows which counts."""
    found: dict[str, list[str]] = {unit: [] for unit in units}
    for entry in run.files(shards.CAPTIONS, sizes=False):
        unit = entry.name.rpartition("-")[0]
        if unit in found:
            found[unit].append(f"{shards.CAPTIONS}/{entry.name}")
    unclear = [unit for unit, names in found.items() if len(names) > 1]
    for unit, (_, metadata) in zip(unclear, index.read_units(run, unclear), strict=True):
        found[unit] = [name for name in found[unit] if name in metadata["files"]]
    return [name for unit in sorted(found) for name in found[unit]]


def _find_captions(
    files: Files, names: list[str], caption_ids: list[str]
) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """Per caption the position of its file (-1: nowhere) and the two offsets; and the shape of T5 features."""
    position = {caption_id: i for i, caption_id in enumerate(caption_ids)}
    file_of = np.full(len(caption_ids), -1, np.int32)
    offsets = np.zeros((len(caption_ids), 2), np.int64)
    shape: tuple[int, ...] = (0, 0)
    for number, name in enumerate(names):
        where = files.run.path(name)
        for tensor, dtype, tensor_shape, at in _tensors(files, name):
            caption_id, _, kind = tensor.partition(".")
            if caption_id not in position or kind not in ("t5", "clap"):
                continue
            expected = ("F16", shape if any(shape) else tensor_shape) if kind == "t5" else ("F32", (CLAP_WIDTH,))
            if (dtype, tensor_shape) != expected or len(tensor_shape) != (2 if kind == "t5" else 1):
                raise damaged(where, f"{tensor} is {dtype} {tensor_shape}, expected {expected[0]} {expected[1]}")
            if kind == "t5":
                shape = tensor_shape
            file_of[position[caption_id]] = number
            offsets[position[caption_id], int(kind == "clap")] = at
    file_of[(offsets == 0).any(axis=1)] = -1
    return file_of, offsets, (shape[0], shape[1])


def _tensors(files: Files, name: str) -> Iterator[tuple[str, str, tuple[int, ...], int]]:
    """Name, type, shape and offset of every tensor of a safetensors file: 8 bytes of length, then JSON."""
    where = files.run.path(name)
    descriptor = files.open(name)
    try:
        size = os.fstat(descriptor).st_size
        head = os.pread(descriptor, _HEADER, 0)
        length = int.from_bytes(head[:8], "little")
        if 8 + length > size:
            raise ValueError("the header is cut short")
        text = head[8 : 8 + length] if 8 + length <= len(head) else os.pread(descriptor, length, 8)
        for tensor, facts in json.loads(text).items():
            if tensor == "__metadata__":
                continue
            start, end = facts["data_offsets"]
            shape = tuple(facts["shape"])
            width = {"F16": 2, "F32": 4}.get(facts["dtype"])
            fits = 0 <= start < end <= size - 8 - length and min(shape, default=1) > 0
            if width is not None and not (fits and end - start == width * math.prod(shape)):
                raise ValueError(f"{tensor} does not fit")
            yield tensor, facts["dtype"], shape, 8 + length + start
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(where, f"no safetensors file ({error})") from error
    finally:
        os.close(descriptor)


def _latent_offsets(descriptor: int, where: str) -> Iterator[tuple[str, int, int, tuple[int, int]]]:
    """Clip key, 0 for mean or 1 for std, offset of the numbers, and their shape, for all latents of a shard.

    Walks over the headers only; tarfile takes 20 times as long, which the first minutes of training would feel.
    """
    size, at = os.fstat(descriptor).st_size, 0
    try:
        while at + _BLOCK <= size:
            block = os.pread(descriptor, 2 * _BLOCK, at)
            if block[0] == 0:  # the end of the archive
                return
            if block[257:262] != b"ustar":
                raise ValueError("no tar header where one should be")
            key, _, extension = block[:100].rstrip(b"\0").decode().partition(".")
            length = int(block[124:135], 8)
            if length < 0:
                raise ValueError("a member of negative length")
            if extension in MEMBERS:
                shape, start = _npy_header(block[_BLOCK:])
                if length != start + 2 * shape[0] * shape[1] or at + _BLOCK + length > size:
                    raise ValueError(f"clip {key}: {extension} is cut short")
                yield key, MEMBERS.index(extension), at + _BLOCK + start, shape
            at += _BLOCK + -(-length // _BLOCK) * _BLOCK
    except ValueError as error:
        raise damaged(where, str(error)) from error


def _npy_header(data: bytes) -> tuple[tuple[int, int], int]:
    """Shape of a float16 matrix and where its numbers start."""
    return _parse_npy_header(data[: 10 + int.from_bytes(data[8:10], "little")])


@functools.lru_cache(64)  # all clips have the same header
def _parse_npy_header(head: bytes) -> tuple[tuple[int, int], int]:
    try:
        file = io.BytesIO(head)
        np.lib.format.read_magic(file)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    except Exception as error:  # numpy parses the header with Python's tokenizer, whose errors are many
        raise ValueError(f"no array: {error}") from error
    if dtype != np.dtype("<f2") or fortran or len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"an array of {shape} {dtype}, not frames x channels of float16")
    return shape, len(head)


def _first_shape(files: Files, name: str) -> tuple[int, int]:
    """Shape of the latents, by the first clip of a shard."""
    descriptor = files.open(name)
    try:
        for _, _, _, shape in _latent_offsets(descriptor, files.run.path(name)):
            return shape
        raise damaged(files.run.path(name), "it holds no latents")
    finally:
        os.close(descriptor)
