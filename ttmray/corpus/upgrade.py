"""Where the numbers of latents and text features lie, for runs by versions that did not note it in the index.

The writer notes it now (`index.PLACES`). Here the headers of tars, arrays and safetensors files are read once, by
`ttmray corpus upgrade`, by the end of a job that an older version began, and by `ttmray corpus verify`, which compares.
"""

import io
import mmap
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any, BinaryIO, TypeVar, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ttmray.corpus import index, shards
from ttmray.corpus.unit import OK
from ttmray.errors import UserError
from ttmray.inventory import finished
from ttmray.runs import RUN
from ttmray.storage import Folder, explained

T = TypeVar("T")
_THREADS = 16  # that read files side by side


def upgrade(run: Folder) -> int:
    """Add the columns of `index.PLACES` to the merged index of a finished run; returns the number of clips that had
    none. The index is replaced whole or not at all; units' files stay as they were committed.

    Raises:
        UserError: no finished run, or a damaged file.
    """
    if not run.exists(RUN) or not finished(run):
        raise UserError(
            f"{run} is not a finished corpus or pool.", "Start its job again: its end adds what is missing."
        )
    rows = index.read_merged(run)
    lacking = lacking_places(rows)
    if lacking:
        units = [data for _, metadata in index.blocks(run, index.committed_units(run)) for data in metadata]
        rows = located(run, rows, units, index.TextPlaces())
        run.write(index.MERGED, index.parquet_bytes(rows))
    return lacking


def lacking_places(rows: pa.Table) -> int:
    """How many ok clips do not say where their latents or their text features lie."""
    null = pc.or_(pc.is_null(rows["latent_mean_at"]), pc.is_null(rows["caption_file"]))
    return int(pc.sum(pc.and_(pc.equal(rows["status"], OK), null)).as_py() or 0)


def located(
    run: Folder, rows: pa.Table, metadata: Sequence[Mapping[str, Any]], places_of: index.TextPlaces
) -> pa.Table:
    """Rows of units with all of `index.PLACES`: as the writers noted them, else as the files' headers say.

    Args:
        metadata: of the units.
        places_of: captions of the units before them; takes those of these units.

    Raises:
        UserError: a file whose header is needed is missing or damaged.
    """
    files = [name for unit in metadata for name, facts in unit["files"].items() if _unknown(name, facts)]
    texts = dict(zip(files, _each(run, files, shards.text_places), strict=True))
    for unit in metadata:
        places_of.note({name: facts | texts.get(name, {}) for name, facts in unit["files"].items()})
    rows = places_of.fill(rows)
    unknown = pc.and_(pc.equal(rows["status"], OK), pc.is_null(rows["latent_mean_at"]))
    names = rows.filter(unknown)["shard"].unique().to_pylist()
    if not names:
        return rows
    places = [places for shard in _each(run, names, latent_places) for places in shard.items()]
    of = pc.index_in(rows["key"].combine_chunks(), pa.array([key for key, _ in places], pa.string()))
    for column in index.LATENT_PLACES:
        field = index.SCHEMA.field(column)
        positions = pa.array([place[column] for _, place in places], field.type).take(of)
        values = pc.coalesce(rows[column].combine_chunks(), positions)
        rows = rows.set_column(rows.schema.get_field_index(column), field, values)
    absent = rows.filter(pc.and_(pc.equal(rows["status"], OK), pc.is_null(rows["latent_mean_at"])))
    if absent.num_rows:
        shard, key = absent["shard"][0].as_py(), absent["key"][0].as_py()
        raise UserError(f"{run.path(shard)} is damaged: clip {key} is not there.", shards.mend(run))
    return rows


def latent_places(file: BinaryIO) -> dict[str, dict[str, int]]:
    """Key -> `index.LATENT_PLACES` of all clips of a shard whose two latents are float16 and of one shape.

    Raises:
        ValueError: no tar, or members that are no such arrays.
    """
    places: dict[str, dict[str, int]] = {}
    members = {f"{name}.npy": f"{name}_at" for name in shards.LATENTS}
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                data = tar.extractfile(member) if extension in members else None
                if data is None:
                    continue
                frames, channels = _matrix(cast(BinaryIO, data), f"{key}.{extension}")
                if data.tell() + 2 * frames * channels != member.size:
                    raise ValueError(f"{member.name} is cut short")
                place = places.setdefault(key, {"latent_frames": frames, "latent_channels": channels})
                if (place["latent_frames"], place["latent_channels"]) != (frames, channels):
                    raise ValueError(f"the latents of {key} have two shapes")
                place[members[extension]] = member.offset_data + data.tell()
    except (tarfile.TarError, EOFError, KeyError, OverflowError) as error:
        raise ValueError(str(error)) from error
    return {key: place for key, place in places.items() if len(place) == len(index.LATENT_PLACES)}


def _matrix(file: BinaryIO, name: str) -> tuple[int, int]:
    """Shape of a float16 matrix by its npy header, behind which the file then stands."""
    try:
        np.lib.format.read_magic(file)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    except Exception as error:  # numpy parses the header with Python's tokenizer, whose errors are many
        raise ValueError(f"{name} is no array: {error}") from error
    if dtype != np.dtype("<f2") or fortran or len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"{name} is an array of {shape} {dtype}, not frames x channels of float16")
    return shape


def _unknown(name: str, facts: Mapping[str, Any]) -> bool:
    return name.startswith(f"{shards.CAPTIONS}/") and "places" not in facts


def _each(run: Folder, names: Sequence[str], find: Callable[[BinaryIO], T]) -> list[T]:
    """`find` of every file, several at a time; of local files nothing but what it looks at is read."""

    def one(name: str) -> T:
        try:
            with _opened(run, name) as file:
                return find(file)
        except ValueError as error:
            raise UserError(f"{run.path(name)} is damaged: {error}.", shards.mend(run)) from error

    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(one, names))


@contextmanager
def _opened(run: Folder, name: str) -> Iterator[BinaryIO]:
    if run.remote:
        yield io.BytesIO(run.read(name))
        return
    with ExitStack() as stack:
        with explained(run.path(name)):
            file = stack.enter_context(open(run.path(name), "rb"))
        yield cast(BinaryIO, stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))
