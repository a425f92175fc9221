"""Random access to the clips of a corpus run, local or remote, in memory that hardly grows with the corpus.

What is held per clip is its key, its score and byte offsets, in arrays. Latents and text features are read straight
from where the index says that they lie in the tar and safetensors files; files of a remote corpus are copied to a local
cache first, whole and checked. No header is parsed: what stands in front of a clip's latents is compared with what the
writer puts there.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ttmray import inventory
from ttmray.corpus import index, scores, shards
from ttmray.corpus.unit import OK
from ttmray.errors import UserError
from ttmray.json_text import read_json
from ttmray.runs import RUN
from ttmray.storage import Folder
from ttmray.tables import is_table, parse_table
from ttmray.training.files import Files, copies_folder, damaged

CLAP_WIDTH = 512
_NAME = 100  # bytes of the name, at the start of
_BLOCK = 512  # bytes of a tar header


@dataclass(frozen=True)
class CorpusRows:
    """The index of a corpus run, read once: the columns that training needs.

    Attributes:
        fingerprint: of the run.
        rows: in index order, ok or not.
    """

    run: Folder
    fingerprint: str
    rows: pa.Table

    def holds(self, split: str) -> bool:
        """Whether there are ok clips of a split."""
        return bool(pc.any(pc.and_(pc.equal(self.rows["split"], split), pc.equal(self.rows["status"], OK))).as_py())


NO_CAPTION = (hashlib.sha256(b"").hexdigest()[:16], "")
"""`caption_id` of the empty text: of songs, and of latents that others made (`corpus/npz.py`)."""


@dataclass(eq=False)
class Clips:
    """Chosen clips of one corpus in index order. Attributes are arrays over the clips unless said otherwise.

    Attributes:
        corpus: fingerprint of the run.
        chosen: hex SHA-256 over keys, shards (whose names carry hashes), captions, scores and weights.
        waiting: count of clips that a growing corpus holds, but not yet the text of their captions.
        uncaptioned: count of clips whose caption is empty.
        keys: clip keys.
        score: float32, NaN without a score column.
        weight: float32, of the clip's loss; 1 unless the file of keys or `DataConfig.guide` says something else.
        guide: float32, the numbers of the column of `DataConfig.guide`; NaN without one.
        level: float32, the share of all clips whose guide is lower; set where it decides times, else NaN.
        shape, text_shape: (frames, channels) of latents and (tokens, width) of T5 features.
    """

    files: Files
    corpus: str
    chosen: str
    waiting: int
    uncaptioned: int
    keys: pa.StringArray
    score: np.ndarray
    weight: np.ndarray
    guide: np.ndarray
    level: np.ndarray
    shape: tuple[int, int]
    text_shape: tuple[int, int]
    _shard: np.ndarray  # int32, positions in _shards
    _shards: list[str]
    _latent_at: np.ndarray  # (clips, 2) int64 offsets of mean and std in the shard
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
            for member, target, at in zip(shards.LATENTS, (mean, std), self._latent_at[row].tolist(), strict=True):
                self._read_member(descriptor, row, f"{member}.npy", target, at)
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

    def arrays(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Posterior mean and deviation (frames, channels) and text (tokens, width) in float16, and pooled text (512,)
        in float32, all finite.

        Raises:
            UserError: as `read`.
        """
        mean, std = (np.empty(self.shape, np.float16) for _ in range(2))
        text, text_c = np.empty(self.text_shape, np.float16), np.empty(CLAP_WIDTH, np.float32)
        self.read(row, mean, std, text, text_c)
        arrays: dict[str, np.ndarray] = {"mean": mean, "std": std, "text": text, "text_c": text_c}
        for name, array in arrays.items():
            if not np.isfinite(array).all():
                raise self.damage(row, f"{name} is not finite", text=name.startswith("text"))
        return mean, std, text, text_c

    def damage(self, row: int, what: str, text: bool = False) -> UserError:
        """The error for a clip whose latents (or text features) cannot be used."""
        file = self._text_files[self._text_file[self._caption[row]]] if text else self._shards[self._shard[row]]
        return damaged(self.files.run, file, f"clip {self.key(row)}: {what}")

    def _read_into(self, descriptor: int, name: str, row: int, target: np.ndarray, at: int) -> None:
        if os.preadv(descriptor, [target.data], at) != target.nbytes:
            raise damaged(self.files.run, name, f"clip {self.key(row)}: the file is cut short")

    def _read_member(self, descriptor: int, row: int, member: str, target: np.ndarray, at: int) -> None:
        """Read an array of a tar, behind the tar's header with its name and the array's own with shape and type."""
        expected = shards.npy_header(self.shape, "<f2")
        front = bytearray(_BLOCK + len(expected))
        count = os.preadv(descriptor, [front, target.data], at - len(front)) if at >= len(front) else 0
        name = f"{self.key(row)}.{member}".encode()
        if front[:_NAME].rstrip(b"\0") != name or front[_BLOCK:] != expected:
            raise self.damage(row, f"{member} of {self.shape} float16 is not where the index says")
        if count != len(front) + target.nbytes:
            raise self.damage(row, "the file is cut short")


def open_clips(corpus: str, split: str, keys: str | None, score_column: str | None, cache: str) -> Clips:
    """`choose_clips` of `read_rows`: the ok clips of a corpus run."""
    return choose_clips(read_rows(corpus, score_column), split, keys, score_column, cache)


def read_rows(corpus: str, score_column: str | None, guide: str | None = None) -> CorpusRows:
    """The index of a corpus run, finished or still growing.

    Args:
        corpus: run folder, local or remote.
        score_column: column of the index or of a table of scores; None: the clips need no score.
        guide: a further such column.

    Raises:
        UserError: no corpus run, no such scores, or a run by an older version.
    """
    run = Folder.at(corpus)
    fingerprint = _fingerprint(run)
    columns = ["key", "status", "split", "caption_id", "shard", *index.PLACES]
    if score_column is None:
        rows = index.read_index(run, columns)
    elif score_column in scores.OWN:
        rows = index.read_index(run, [*columns, score_column])
    elif "/" in score_column:
        rows = scores.with_columns(run, index.read_index(run, columns), [score_column])
    else:  # of a stage from outside or a pool: whether the index has it shows when it is read
        rows = index.read_index(run)
        if score_column not in scores.numbers(rows):
            scores.require_column(run, score_column)  # says which there are
        rows = rows.select([*columns, score_column])
    if pc.any(pc.and_(pc.equal(rows["status"], OK), pc.is_null(rows["latent_mean_at"]))).as_py():
        way = (
            f"ttmray corpus upgrade {run.typed}"
            if inventory.finished(run)
            else "Start its job again: its end adds them."
        )
        raise UserError(f"{run} is of an older version: its index has no byte offsets.", way)
    if guide not in (None, score_column):
        other = read_rows(corpus, guide).rows  # of a corpus that grows it may hold more by now
        rows = rows.append_column(guide, other[guide].take(pc.index_in(rows["key"], other["key"].combine_chunks())))
    return CorpusRows(run, fingerprint, rows)


def choose_clips(
    corpus: CorpusRows, split: str, keys: str | None, score_column: str | None, cache: str, guide: str | None = None
) -> Clips:
    """The ok clips of a corpus run.

    Args:
        split: `train`, `validation`, `test` or `all`.
        keys: file of clip keys to keep (see `read_keys`).
        score_column, guide: as in `read_rows`.
        cache: local folder for copies of remote files.

    Raises:
        UserError: no such clips, a clip without score, caption features that are missing.
    """
    run = corpus.run
    files = Files(run, copies_folder(cache).sub(corpus.fingerprint[:16]))
    weights = None if keys is None else read_keys(keys)
    rows = _choose(run, corpus.rows, split, keys, weights)
    waiting = rows["caption_file"].null_count
    if waiting:
        if inventory.finished(run) or waiting == rows.num_rows:
            raise _no_text(run, rows.filter(pc.is_null(rows["caption_file"]))["key"][0].as_py())
        rows = rows.filter(pc.is_valid(rows["caption_file"]))
    shape = _one_shape(run, rows, "latent_frames", "latent_channels")
    text_shape = _one_shape(run, rows, "caption_tokens", "caption_width")
    captions = rows["caption_id"].combine_chunks().dictionary_encode()
    _, firsts = np.unique(captions.indices.to_numpy(), return_index=True)  # a clip of every caption
    texts = rows.take(pa.array(firsts))
    text_file = texts["caption_file"].combine_chunks().dictionary_encode()
    text_files = text_file.dictionary.to_pylist()
    _require_texts(run, texts, text_shape)
    files.fetch(text_files)
    score = _scores(run, rows, score_column)
    weight = np.ones(rows.num_rows, np.float32)
    if weights is not None:
        weight[:] = [weights[key] for key in rows["key"].to_pylist()]
    shard = rows["shard"].combine_chunks().dictionary_encode()
    names = shard.dictionary.to_pylist()
    digest = hashlib.sha256(score.astype("<f4").tobytes())
    for column in ("key", "shard", "caption_id"):
        digest.update("\n".join(rows[column].to_pylist()).encode())
    if (weight != 1).any():
        digest.update(weight.astype("<f4").tobytes())
    guides = _scores(run, rows, guide)
    if guide is not None:
        digest.update(guides.astype("<f4").tobytes())
    return Clips(
        files=files,
        corpus=corpus.fingerprint,
        chosen=digest.hexdigest(),
        waiting=waiting,
        uncaptioned=int(pc.sum(pc.is_in(rows["caption_id"], pa.array(NO_CAPTION))).as_py() or 0),
        keys=rows["key"].combine_chunks(),
        score=score,
        weight=weight,
        guide=guides,
        level=np.full_like(guides, np.nan),
        shape=shape,
        text_shape=text_shape,
        _shard=shard.indices.to_numpy(),
        _shards=names,
        _latent_at=_integers(rows, "latent_mean_at", "latent_std_at"),
        _caption=captions.indices.to_numpy(),
        _text_file=text_file.indices.to_numpy(),
        _text_files=text_files,
        _text_at=_integers(texts, "caption_t5_at", "caption_clap_at"),
    )


def read_keys(path: str) -> dict[str, float]:
    """Clip keys of a file, with their weights in the loss: one key per line, or the columns `key` and, if it is there,
    `weight` of a table (`ttmray.tables`). The weight is 1 where the file has none.

    Raises:
        UserError: it cannot be read, has no such column, is empty, names a clip twice, or has a weight that is not a
            number from 0 on.
    """
    data, way_out = inventory.checked(path), "Write one key per line, or a table with a column `key`."
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
        return str(read_json(run.read(RUN))["fingerprint"])
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
        listed = pa.array(list(weights), pa.string())
        absent = listed.filter(pc.invert(pc.is_in(listed, rows["key"].combine_chunks())))
        if len(absent):
            raise UserError(
                f"{keys}: {len(absent)} of {len(listed)} keys are not among the {what} of {run}, e.g. {absent[0]}.",
                "Remove them, or choose the corpus and split that they come from.",
            )
        rows = rows.filter(pc.is_in(rows["key"], listed))
    return rows


def _scores(run: Folder, rows: pa.Table, column: str | None) -> np.ndarray:
    if column is None:
        return np.full(rows.num_rows, np.nan, np.float32)
    score = rows[column].to_numpy().astype(np.float32)  # null becomes NaN
    bad = np.flatnonzero(~np.isfinite(score))
    if len(bad):
        raise UserError(
            f"{run}: {len(bad)} clips have no {column}, e.g. {rows['key'][int(bad[0])]}.",
            "Choose another column, or score_column: null for a model that takes no score.",
        )
    return score


def _integers(rows: pa.Table, *columns: str) -> np.ndarray:
    """(rows, columns) int64; -1 for null."""
    return np.stack([pc.fill_null(rows[column], -1).to_numpy() for column in columns], axis=1).astype(np.int64)


def _one_shape(run: Folder, rows: pa.Table, *columns: str) -> tuple[int, int]:
    """The shape that two columns say, which must be the same for all clips."""
    shapes = _integers(rows, *columns)
    other = np.flatnonzero((shapes != shapes[0]).any(axis=1) | (shapes < 1).any(axis=1))
    if len(other):
        key, names = rows["key"][int(other[0])], " x ".join(columns)
        raise damaged(
            run,
            index.MERGED,
            f"clip {key}: {names} is {shapes[other[0]].tolist()}, elsewhere {shapes[0].tolist()}",
        )
    return int(shapes[0, 0]), int(shapes[0, 1])


def _require_texts(run: Folder, texts: pa.Table, shape: tuple[int, int]) -> None:
    """See that the files of captions are there, and large enough for what the index says is in them.

    Args:
        texts: a row per caption.
    """
    sizes = {f"{shards.CAPTIONS}/{entry.name}": entry.size for entry in run.files(shards.CAPTIONS)}
    starts, lengths = _integers(texts, "caption_t5_at", "caption_clap_at"), (2 * shape[0] * shape[1], 4 * CLAP_WIDTH)
    ends = np.where(starts > 0, np.add(starts, lengths), np.iinfo(np.int64).max)
    for name, key, end in zip(texts["caption_file"].to_pylist(), texts["key"].to_pylist(), ends.max(1), strict=True):
        if name not in sizes:
            raise _no_text(run, key)
        if end > sizes[name]:
            raise damaged(run, name, f"clip {key}: it has no text features at the place that the index says")


def _no_text(run: Folder, key: str) -> UserError:
    return UserError(f"{run}: no text features of the caption of clip {key}.", shards.mend(run))
