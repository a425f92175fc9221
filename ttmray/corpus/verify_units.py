"""Units one by one against what their index files say, block by block: in this process, or in several."""

import hashlib
import io
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from ttmray.corpus import index, shards
from ttmray.corpus.unit import OK
from ttmray.corpus.upgrade import latent_places
from ttmray.corpus.worker import without_main
from ttmray.errors import UserError
from ttmray.signals import deaf_children
from ttmray.storage import Folder

BLOCK = 64
"""Units of one task."""
AHEAD = 2
"""Blocks that wait for each process."""
ALONE = 4
"""Fewer blocks are checked in this process: another one needs more than a second to start."""
Shapes = dict[str, tuple[tuple[Any, ...], str]]
"""Kind of array -> its shape and type, and where it was seen first."""


@dataclass
class Checked:
    """What came of a block of units.

    Attributes:
        problems: a line each.
        rows: of the units' index files.
        files: what the files of the units are (name -> facts); of captions with the places of their features.
        latents: `key` and `index.LATENT_PLACES`, by the headers of the shards.
        captions: ids of those that have text features.
        shapes: that arrays of the block have.
    """

    problems: list[str] = field(default_factory=list)
    rows: pa.Table = field(default_factory=index.SCHEMA.empty_table)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    latents: pa.Table = field(default_factory=lambda: _latents({}))
    captions: set[str] = field(default_factory=set)
    shapes: Shapes = field(default_factory=dict)


def check_units(
    run: Folder, units: Sequence[str], fingerprint: str = "", processes: int | None = None
) -> Iterator[tuple[Sequence[str], Checked]]:
    """Check units, block by block and in order: their names, and what came of them.

    Args:
        fingerprint: that the units must name, where they name one; empty: any.
        processes: at most so many; default: one per CPU.

    Raises:
        UserError: a process died.
    """
    blocks = [list(units[start : start + BLOCK]) for start in range(0, len(units), BLOCK)]
    count = min(processes or os.cpu_count() or 1, len(blocks))
    if len(blocks) < ALONE or count < 2:
        yield from zip(blocks, map(check_block, repeat(run.uri), blocks, repeat(fingerprint)), strict=True)
        return
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"))
    try:
        # few are ahead: what is checked and not yet asked for takes memory
        waiting: deque[tuple[Sequence[str], Future[Checked]]] = deque()
        for block in blocks:
            with without_main(), deaf_children():
                waiting.append((block, pool.submit(check_block, run.uri, block, fingerprint)))
            if len(waiting) > AHEAD * count:
                names, result = waiting.popleft()
                yield names, result.result()
        for names, result in waiting:
            yield names, result.result()
    except BrokenProcessPool:
        raise UserError("A process that was checking units died.", "Usually memory ran out: stop other work.") from None
    finally:
        pool.shutdown(cancel_futures=True)


def check_block(uri: str, units: Sequence[str], fingerprint: str = "") -> Checked:
    """Check some units of the run at `uri`, which has this fingerprint (empty: not looked at)."""
    run, checked, rows = Folder.at(uri), Checked(), list[pa.Table]()
    latents: dict[str, dict[str, int]] = {}
    for name in units:
        try:
            table, metadata = index.read_units(run, [name])[0]
            rows.append(table)
            checked.files |= metadata["files"]
            if fingerprint and metadata.get("run", fingerprint) != fingerprint:
                checked.problems.append(f"unit {name} is of another run")
            checked.problems += _unit_problems(run, table, metadata, checked, latents)
        except UserError as error:
            checked.problems.append(f"unit {name}: {error.message}")
    if rows:
        checked.rows = pa.concat_tables(rows).combine_chunks()
    checked.latents = _latents(latents)
    return checked


def other_shapes(shapes: Shapes, block: Shapes) -> Iterator[str]:
    """Shapes and types must be the same all over the corpus: where those of a block are others. Notes new ones."""
    for kind, (signature, where) in block.items():
        first, _ = shapes.setdefault(kind, (signature, where))
        if first != signature:
            yield f"{where} is {signature}, elsewhere {first}"


def _latents(places: dict[str, dict[str, int]]) -> pa.Table:
    schema = pa.schema([index.SCHEMA.field(name) for name in ("key", *index.LATENT_PLACES)])
    return pa.Table.from_pylist([{"key": key} | place for key, place in places.items()], schema=schema)


def _unit_problems(
    run: Folder,
    rows: pa.Table,
    metadata: dict[str, Any],
    checked: Checked,
    latents: dict[str, dict[str, int]],
) -> Iterator[str]:
    """What is wrong with a unit; notes what its files really hold in `checked`, `latents` and `metadata`."""
    expected: dict[str, set[str]] = {}
    scored: set[str] = set()
    for row in rows.select(["key", "status", "shard", "reward_score"]).to_pylist():
        if row["status"] == OK:
            expected.setdefault(row["shard"], set()).add(row["key"])
            scored |= {row["key"]} if row["reward_score"] is not None else set()
    yield from (f"{shard} is in the index and not described" for shard in expected.keys() - metadata["files"].keys())
    for name, facts in metadata["files"].items():
        try:
            data = run.read(name)
        except UserError as error:
            yield error.message
            continue
        if len(data) != facts["bytes"] or hashlib.sha256(data).hexdigest() != facts["sha256"]:
            yield f"{name}: size or SHA-256 differs from the index"
            continue
        if name.startswith(shards.CAPTIONS):
            features = shards.read_captions(run, name)
            checked.captions.update(features)
            facts.update(_read_places(shards.text_places, data))
            if len(features) != facts["captions"]:
                yield f"{name}: {len(features)} captions, the index says {facts['captions']}"
            for caption_id, arrays in features.items():
                yield from _array_problems(name, caption_id, arrays, checked.shapes)
            continue
        latents.update(_read_places(latent_places, data))
        keys = set()
        for key, sample in shards.read_samples(data, name):
            keys.add(key)
            arrays = {kind: value for kind, value in sample.items() if isinstance(value, np.ndarray)}
            needed = {"json", "latent_mean.npy", "latent_std.npy"}
            needed |= {"clap_audio.npy", "mert.npy"} if key in scored else set()  # latents of others have no rewards
            missing = needed - sample.keys()
            yield from (f"{name}: {key} has no {kind}" for kind in sorted(missing))
            yield from _array_problems(name, key, arrays, checked.shapes)
        if keys != expected.get(name, set()) or len(keys) != facts["clips"]:
            yield f"{name}: holds {len(keys)} clips, the index has {len(expected.get(name, ()))}"


def _read_places(find: Callable[[BinaryIO], dict[str, Any]], data: bytes) -> dict[str, Any]:
    """Places by the headers of a file; none where its arrays are of another kind, which is told of the arrays."""
    try:
        return find(io.BytesIO(data))
    except ValueError:
        return {}


def _array_problems(file: str, key: str, arrays: dict[str, np.ndarray], shapes: Shapes) -> Iterator[str]:
    """Shapes and types must be the same all over the corpus, and every number finite."""
    for kind, array in arrays.items():
        signature = (array.shape, str(array.dtype))
        yield from other_shapes(shapes, {kind: (signature, f"{file}: {key}.{kind}")})
        if not np.isfinite(array).all():
            yield f"{file}: {key}.{kind} is not finite"
