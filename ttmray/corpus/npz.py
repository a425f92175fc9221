"""Latents in the layout of the public FluxAudio trainer, as a corpus: what others have extracted is not computed again.

    train-npz/0.npz 1.npz ...   text_features (77, 1024), text_features_c (512,), mean and std (frames, channels)
    train-npz.tsv               id and caption; row i belongs to i.npz

An id ends in the number of its clip (`1085700_3`). Such a corpus has latents and text features, and neither embeddings
nor rewards, so models without a score head are trained on it.
"""

import hashlib
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from ttmray import runs
from ttmray.config import identity
from ttmray.console import console, meter
from ttmray.corpus import index
from ttmray.corpus.catalogue import SAFE_ID
from ttmray.corpus.config import CorpusConfig, SeparationConfig
from ttmray.corpus.finalise import finalise
from ttmray.corpus.plan import SCHEMA, Plan, pack_units
from ttmray.corpus.stages import Write
from ttmray.corpus.unit import Unit
from ttmray.errors import EXIT_OK, UserError
from ttmray.json_text import as_read
from ttmray.models.bundle import open_bundle
from ttmray.storage import Folder, absolute
from ttmray.tables import read_rows

SPLITS = ("train", "validation", "test")
ARRAYS = {"text_features": 2, "text_features_c": 1, "mean": 2, "std": 2}
"""Arrays of a file and their dimensions."""
MOST_BYTES = 1 << 30
"""Of a file's arrays once unpacked; those of a clip of ten seconds have 1 MB."""
PROTOCOL = "none"
_CLIP = re.compile(r"(.+)_([0-9]{1,6})")


class WriteLatents(Write):
    """Commit a unit of clips that have latents alone."""

    arrays: ClassVar[tuple[str, ...]] = ("latent_mean", "latent_std")
    reads: ClassVar[tuple[str, ...]] = (*arrays, "texts")


@dataclass(frozen=True)
class NpzClip:
    """A clip of such a folder: its file, and what its row of the table says."""

    file: Path
    track_id: str
    number: int
    caption: str
    split: str


def import_npz(train: str, out: str, *, validation: str | None = None, test: str | None = None, bundle: str) -> int:
    """`ttmray attm import`: write, or go on writing, a corpus run of folders of NPZ files; returns the exit code.

    Args:
        train, validation, test: folders of NPZ files, each with its table beside it.
        out: run folder, local or s3://.
        bundle: whose VAE and text encoders made them: `public-16k` for the baseline's, `paper` at 44.1 kHz.

    Raises:
        UserError: files and rows that do not fit each other, or arrays that are not what they should be.
    """
    started = time.perf_counter()
    folders = {split: path for split, path in zip(SPLITS, (train, validation, test), strict=True) if path is not None}
    clips = [clip for split, path in folders.items() for clip in _clips(path, split)]
    plan, of_track = _plan(clips, absolute(train))
    config = CorpusConfig(
        input=train, output=out, bundle=bundle, unit_clips=32, separation=SeparationConfig(scope="none")
    )
    run = Folder.at(config.output)
    what = {"config": identity(config), "plan": plan.identity(), "catalogue": "npz", "protocol": PROTOCOL}
    what |= {"bundle": open_bundle(bundle).name, "latents": _shapes(clips[0].file)}
    note = "latents and text features of others: no rewards and no embeddings"
    described = runs.describe("corpus", what, config, ("numpy", "pyarrow"), protocol_id=PROTOCOL, note=note)
    if (existing := runs.existing(run, "corpus")) is not None:
        runs.refuse_another(run, existing, described)
    else:
        runs.write(run, described)
        plan.save(run)
    write, done = WriteLatents(run, fingerprint=described["fingerprint"]), set(index.committed_units(run))
    units = list(plan.units())
    with meter("units", len(units)) as progress:
        for name, tracks in units:
            if name not in done:
                write(_unit(name, tracks, of_track))
            progress.advance(1)
    finalise(run, plan, described, time.perf_counter() - started)
    console.print(f"{run}: {len(clips)} clips of {len(of_track)} tracks, without rewards", markup=False)
    return EXIT_OK


def _clips(path: str, split: str) -> Iterator[NpzClip]:
    """The clips of a folder in the order of its table.

    Raises:
        UserError: no table beside it, another number of files than rows, or ids that cannot be those of tracks.
    """
    folder = Path(absolute(path))
    table = folder.with_name(f"{folder.name}.tsv")
    if not folder.is_dir() or not table.is_file():
        raise UserError(f"{folder} and {table.name} beside it are needed.", "Name the folder of the .npz files.")
    rows = list(read_rows(str(table), {"id", "caption"}))
    files = len(list(folder.glob("*.npz")))
    if files != len(rows):
        way_out = "Extract the rest." if files < len(rows) else f"Name each in {table.name}, or remove the others."
        raise UserError(f"{folder} has {files} .npz files, {table.name} {len(rows)} rows.", way_out)
    for i, (place, row) in enumerate(rows):
        match = _CLIP.fullmatch(str(row.get("id", "")).strip())
        track, number = (match[1], int(match[2])) if match else (str(row.get("id", "")).strip(), 0)
        if not SAFE_ID.fullmatch(track):
            raise UserError(f"{place}: {row.get('id')!r} is no id.", "Letters, digits, _ and -, at most 64.")
        yield NpzClip(folder / f"{i}.npz", track, number, " ".join(str(row.get("caption", "")).split()), split)


def _plan(clips: Sequence[NpzClip], root: str) -> tuple[Plan, dict[str, list[NpzClip]]]:
    """The plan of these tracks, and the clips of each in the order of their numbers.

    Raises:
        UserError: a track in two splits, with two captions, a clip twice, or more clips than a unit takes.
    """
    of_track: dict[str, list[NpzClip]] = {}
    for clip in clips:
        of_track.setdefault(clip.track_id, []).append(clip)
    for track, own in of_track.items():
        own.sort(key=lambda clip: clip.number)
        if len({(clip.split, clip.caption) for clip in own}) > 1:
            raise UserError(f"{track} is in two splits, or has two captions.", "Its clips must agree.")
        if len({clip.number for clip in own}) < len(own):
            raise UserError(f"{track} has a clip twice.", "Ids must be unique.")
    counts = [len(own) for own in of_track.values()]
    captions = [own[0].caption for own in of_track.values()]
    first = {text: row for row, text in reversed(list(enumerate(captions)))}
    empty = [""] * len(of_track)
    columns: dict[str, Sequence[Any]] = {
        "unit": pack_units(counts, [0.0] * len(counts), 32),
        "track_id": list(of_track),
        "path": [str(own[0].file.relative_to(Path(own[0].file).parent.parent)) for own in of_track.values()],
        "size": [-1] * len(counts),
        "duration_s": [10.0 * count for count in counts],
        "clips": counts,
        "split": [own[0].split for own in of_track.values()],
        "caption": captions,
        "caption_id": [hashlib.sha256(text.encode()).hexdigest()[:16] if text else "" for text in captions],
        "caption_owner": [bool(text) and first[text] == row for row, text in enumerate(captions)],
        "status": ["ok"] * len(counts),
    }
    table = pa.table({name: columns.get(name, empty) for name in SCHEMA.names}).cast(SCHEMA)
    return Plan(table, root), of_track


def _unit(name: str, tracks: Sequence[dict[str, Any]], of_track: dict[str, list[NpzClip]]) -> Unit:
    rows: list[dict[str, Any]] = []
    owned: list[str] = []
    means: list[np.ndarray] = []
    stds: list[np.ndarray] = []
    texts: dict[str, list[np.ndarray]] = {"t5": [], "clap": []}
    for track in tracks:
        for segment, clip in enumerate(of_track[track["track_id"]]):
            arrays = read_npz(clip.file)
            facts = {"key": f"{clip.track_id}_{segment}", "segment": segment, "start_s": 10.0 * clip.number}
            rows.append(index.new_row(dict(track), name, PROTOCOL) | facts | {"duration_s": 10.0})
            means.append(arrays["mean"].astype(np.float16))
            stds.append(arrays["std"].astype(np.float16))
            if segment == 0 and track["caption_owner"]:
                owned.append(track["caption_id"])
                texts["t5"].append(arrays["text_features"].astype(np.float16))
                texts["clap"].append(arrays["text_features_c"].astype(np.float32))
    order = sorted(range(len(owned)), key=owned.__getitem__)
    stacked = {key: np.stack([some[i] for i in order]) for key, some in texts.items() if some}
    clips = {"latent_mean": np.stack(means), "latent_std": np.stack(stds)}
    return Unit(name, list(tracks), rows, clips, [owned[i] for i in order], stacked)


def read_npz(file: Path) -> dict[str, np.ndarray]:
    """The arrays of one file, any shape of the right number of axes, float32.

    Raises:
        UserError: missing, damaged, or not finite.
    """
    try:
        with np.load(file, allow_pickle=False) as content:
            if (size := sum(one.file_size for one in content.zip.infolist())) > MOST_BYTES:
                raise ValueError(f"it unpacks to {size:,} bytes")
            arrays = {name: np.asarray(content[name], np.float32) for name in ARRAYS}
    except Exception as error:  # a damaged archive raises what zipfile, zlib, numpy and Python's tokenizer have
        raise UserError(f"{file} cannot be read: {error!r}", "Extract it again.") from error
    for name, axes in ARRAYS.items():
        array = arrays[name]
        if array.ndim != axes or not np.isfinite(array).all():
            raise UserError(f"{file}: {name} has the shape {array.shape}, or is not finite.", "Extract it again.")
    if arrays["mean"].shape != arrays["std"].shape or (arrays["std"] < 0).any():
        raise UserError(f"{file}: mean and std do not fit each other.", "Extract it again.")
    return arrays


def _shapes(file: Path) -> dict[str, list[int]]:
    return as_read({name: array.shape for name, array in read_npz(file).items()})
