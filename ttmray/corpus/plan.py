"""What a corpus run will do: splits, units and expected clips, the same every time and without Ray.

A unit is a few whole tracks in catalogue order; it is what travels, is committed and is repeated. Clip counts
are expectations: tables round durations and MP3 headers estimate them, and only decoding knows.
"""

import hashlib
import io
import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ttmray.audio.segment import SegmentRule, count_clips
from ttmray.corpus.catalogue import Catalogue
from ttmray.corpus.config import CorpusConfig
from ttmray.corpus.headers import read_header
from ttmray.corpus.splits import assign_splits, split_rule
from ttmray.errors import UserError
from ttmray.models.plans import TFLOP_PER_CLIP
from ttmray.storage import Folder, parquet_table

PLAN_FILE = "plan.parquet"
PLAN_FILES = (PLAN_FILE, "plan.json", "plan.md")
"""The others are for people; pools have only the first."""
FORMAT = "1"
MAX_UNIT_TRACKS = 64
"""Bounds units of rejected tracks, which have no clips."""
MAX_UNIT_DECODED_BYTES = 120 * 2**20
"""Whole decoded tracks of a unit (float32 stereo at 44.1 kHz) stay below Ray Data's 128 MiB block."""
BLOCK = 256
"""Units whose rows are in memory at once."""
PROBE_THREADS = 16
DECODED_BYTES_PER_S = 44100 * 2 * 4
LONGEST_S = 1e7  # keeps sample counts of absurd durations inside int64

SCHEMA = pa.schema(
    [
        ("unit", pa.string()),
        ("track_id", pa.string()),
        ("path", pa.string()),
        ("size", pa.int64()),
        ("duration_s", pa.float64()),
        ("clips", pa.int32()),
        ("split", pa.string()),
        ("caption", pa.string()),
        ("caption_id", pa.string()),
        ("caption_owner", pa.bool_()),
        ("artist_id", pa.string()),
        ("album_id", pa.string()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("message", pa.string()),
        ("version", pa.string()),
    ]
)
IDENTITY = ("unit", "track_id", "path", "size", "split", "caption", "status")


@dataclass(eq=False)
class Plan:
    """One row per track in catalogue order (`SCHEMA`), and where the paths are relative to.

    Columns: `clips` is expected, not found; `caption_id` is 16 hex digits of the SHA-256 of the caption;
    `caption_owner` marks the one track whose unit stores the text features of its caption; `duration_s` is
    NaN and `size` -1 where unknown.
    """

    table: pa.Table
    root: str

    def identity(self) -> str:
        """Hex SHA-256 of all that changes results: tracks, sizes, captions, splits, units; not the root."""
        digest = hashlib.sha256()
        for name in IDENTITY:
            digest.update(json.dumps([name, self.table.column(name).to_pylist()]).encode())
        return digest.hexdigest()

    def units(self, names: Sequence[str] | None = None) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """Name and rows of some units (default: all), in order; a few are in memory at a time."""
        names = self.unit_names() if names is None else names
        for start in range(0, len(names), BLOCK):
            block = names[start : start + BLOCK]
            rows = iter(self.of(block).table.to_pylist())
            for name in block:
                first, stop = self._ranges[name]
                yield name, list(islice(rows, stop - first))

    @cached_property
    def _ranges(self) -> dict[str, tuple[int, int]]:
        """Rows of each unit, in order."""
        codes = self.table["unit"].combine_chunks().dictionary_encode()
        ends = np.cumsum(np.bincount(codes.indices.to_numpy(), minlength=len(codes.dictionary))).tolist()
        return dict(zip(codes.dictionary.to_pylist(), zip([0, *ends], ends, strict=False), strict=True))

    def unit_names(self) -> list[str]:
        """Of all units, in order."""
        return list(self._ranges)

    def of(self, units: Iterable[str]) -> "Plan":
        """The tracks of some units; names that are no unit's are passed over."""
        ranges = [np.arange(*self._ranges[name]) for name in units if name in self._ranges]
        return Plan(self.table.take(pa.array(np.concatenate([np.empty(0, np.int64), *ranges]))), self.root)

    def expected_clips(self, units: Collection[str] | None = None) -> int:
        """Clips that some units (default: all) are expected to give."""
        clips = self.table["clips"]
        if units is not None:
            clips = clips.filter(pc.is_in(self.table["unit"], pa.array(sorted(units), pa.string())))
        return int(pc.sum(clips).as_py() or 0)

    def at(self, root: str) -> "Plan":
        """The same plan for songs that moved to another folder."""
        return Plan(self.table, root)

    def with_versions(self, versions: Sequence[str]) -> "Plan":
        """The same plan for files as they are now."""
        column = self.table.schema.get_field_index("version")
        return Plan(self.table.set_column(column, "version", pa.array(versions, pa.string())), self.root)

    def save(self, folder: Folder) -> None:
        """Write `plan.parquet`; the same plan gives the same bytes with the same pyarrow."""
        metadata = {"ttmray.format": FORMAT, "ttmray.root": self.root, "ttmray.identity": self.identity()}
        buffer = io.BytesIO()
        pq.write_table(self.table.replace_schema_metadata(metadata), buffer, compression="zstd")
        folder.write(PLAN_FILE, buffer.getvalue())

    @classmethod
    def load(cls, folder: Folder) -> "Plan":
        """Read what `save` wrote.

        Raises:
            UserError: when the file is absent, damaged, of another format or changed since.
        """
        where = folder.path(PLAN_FILE)
        way_out = f"`ttmray corpus repair {folder.typed}` makes it again, as does the command of the run."
        try:
            table = parquet_table(folder.read(PLAN_FILE))
            metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        except (pa.ArrowException, OSError, ValueError) as error:  # pyarrow reports some damage as OSError
            raise UserError(f"{where} is not readable: {error}", way_out) from error
        if "version" not in table.column_names:  # of a run that was planned before there were any
            table = table.append_column("version", pa.array([""] * table.num_rows, pa.string()))
        known = metadata.get("ttmray.format") == FORMAT and "ttmray.root" in metadata
        if not known or not table.schema.equals(SCHEMA):
            raise UserError(f"{where} is no plan of format {FORMAT}.", way_out)
        plan = cls(table.replace_schema_metadata(None), metadata["ttmray.root"])
        if plan.identity() != metadata.get("ttmray.identity"):
            raise UserError(f"{where} does not agree with its own checksum.", way_out)
        return plan


def build_plan(catalogue: Catalogue, config: CorpusConfig) -> Plan:
    """Splits, expected clips and units of a catalogue.

    Reads file headers where durations are unknown and `catalogue.probe` is on.

    Raises:
        UserError: for splits that leave too few tracks for training, and for storage that cannot be read.
    """
    tracks = catalogue.tracks
    splits = assign_splits(tracks, config.splits)
    clips, durations = _expected_clips(catalogue, config)
    decoded = np.zeros(len(tracks))
    if config.separation.scope == "track":
        decoded = np.where(clips > 0, np.nan_to_num(durations) * DECODED_BYTES_PER_S, 0.0)
    units = pack_units(clips.tolist(), decoded.tolist(), config.unit_clips)
    caption_ids = [hashlib.sha256(track.caption.encode()).hexdigest()[:16] for track in tracks]
    owned: set[str] = set()
    owner = []
    for track, caption_id in zip(tracks, caption_ids, strict=True):
        owner.append(track.status == "ok" and caption_id not in owned)
        if owner[-1]:
            owned.add(caption_id)
    table = pa.table(
        {
            "unit": units,
            "duration_s": durations,
            "clips": clips,
            "split": splits,
            "caption_id": caption_ids,
            "caption_owner": owner,
            "size": [track.size for track in tracks],
            **{
                name: [getattr(track, name) for track in tracks]
                for name in (
                    "track_id",
                    "path",
                    "caption",
                    "artist_id",
                    "album_id",
                    "status",
                    "reason",
                    "message",
                    "version",
                )
            },
        }
    )
    return Plan(table.select(SCHEMA.names).cast(SCHEMA), catalogue.root.uri)


def pack_units(clips: Sequence[int], decoded: Sequence[float], unit_clips: int) -> list[str]:
    """Unit name of every track: whole tracks in order, as many as fit.

    Args:
        clips: expected clips per track.
        decoded: bytes that travel decoded per track; 0 where clips are separated one by one. A track larger
            than `MAX_UNIT_DECODED_BYTES` is a unit alone.
        unit_clips: most clips per unit.
    """
    ordinals: list[int] = []
    unit, in_clips, in_bytes, in_tracks = 0, 0, 0.0, 0
    for count, size in zip(clips, decoded, strict=True):
        full = in_clips + count > unit_clips or in_bytes + size > MAX_UNIT_DECODED_BYTES
        if in_tracks and (full or in_tracks == MAX_UNIT_TRACKS):
            unit, in_clips, in_bytes, in_tracks = unit + 1, 0, 0.0, 0
        in_clips, in_bytes, in_tracks = in_clips + count, in_bytes + size, in_tracks + 1
        ordinals.append(unit)
    digits = max(6, len(str(unit)))
    return [f"u{ordinal:0{digits}d}" for ordinal in ordinals]


def plan_difference(old: Plan, new: Plan) -> list[str]:
    """Readable lines that say in what two plans differ; empty when their identity is the same."""
    before, after = ({row[1]: row for row in _identity_rows(plan)} for plan in (old, new))
    lines = [
        _listing("added", [track_id for track_id in after if track_id not in before]),
        _listing("removed", [track_id for track_id in before if track_id not in after]),
    ]
    both = [track_id for track_id in after if track_id in before]
    for position, name in enumerate(IDENTITY):
        if name in ("unit", "track_id"):
            continue
        changed = [track_id for track_id in both if before[track_id][position] != after[track_id][position]]
        detail = f" ({before[changed[0]][position]!r} -> {after[changed[0]][position]!r})" if len(changed) == 1 else ""
        lines.append(_listing(f"with another {name}", changed) + detail)
    moved = [track_id for track_id in both if before[track_id][0] != after[track_id][0]]
    if not any(lines):  # units follow from the tracks, so alone they tell something, otherwise they are noise
        lines.append(_listing("in another unit", moved))
    if not any(lines) and list(before) != list(after):
        lines.append("the order of the tracks")
    return [line for line in lines if line]


def replaced(plan: Plan, catalogue: Catalogue) -> list[str]:
    """A line for people where files have the size of the plan, and were changed since all the same."""
    before = dict(zip(*(plan.table.column(name).to_pylist() for name in ("track_id", "version")), strict=True))
    changed = [
        track.track_id
        for track in catalogue.tracks
        if track.version and before.get(track.track_id, "") not in ("", track.version)
    ]
    line = _listing("changed since the run was planned (time or ETag), though not in size", changed)
    return [f"{line}. What is committed was made of the files as they were (`sha256` in the index)."] if line else []


def _identity_rows(plan: Plan) -> list[tuple[Any, ...]]:
    return list(zip(*(plan.table.column(name).to_pylist() for name in IDENTITY), strict=True))


def _listing(what: str, track_ids: Sequence[str], most: int = 5) -> str:
    if not track_ids:
        return ""
    more = f" and {len(track_ids) - most} more" if len(track_ids) > most else ""
    return f"{len(track_ids)} track{'s' * (len(track_ids) > 1)} {what}: {', '.join(track_ids[:most])}{more}"


def _expected_clips(catalogue: Catalogue, config: CorpusConfig) -> tuple[np.ndarray, np.ndarray]:
    """Clips (int64; 0 for rejected tracks) and duration in seconds (float64; NaN unknown) per track."""
    segments = config.segments
    rule = SegmentRule(segments.clip_s, segments.min_s, segments.max_clips)
    usable = np.array([track.status == "ok" for track in catalogue.tracks], bool)
    durations = np.array([track.duration_s for track in catalogue.tracks], float)
    rates = np.full(len(durations), 44100)
    clips = np.full(len(durations), segments.max_clips)
    unknown = usable & np.isnan(durations)
    # without a size the audio is not there, and there is no header to read
    there = np.array([track.size >= 0 for track in catalogue.tracks], bool)
    if config.catalogue.probe and (unknown & there).any():
        positions = np.flatnonzero(unknown & there)
        with ThreadPoolExecutor(PROBE_THREADS) as pool:
            headers = list(pool.map(lambda i: read_header(catalogue.root, catalogue.tracks[i].path), positions))
        problems = [header for header in headers if isinstance(header, Exception)]
        if len(problems) == len(headers):  # not one file, but the storage
            raise problems[0]
        for i, header in zip(positions, headers, strict=True):
            if header is None or isinstance(header, Exception):
                clips[i] = 1  # decoding will record why; until then it is one row of the index
            else:
                durations[i], rates[i] = header.duration_s, header.sample_rate
    known = usable & ~np.isnan(durations)
    for rate in np.unique(rates[known]):
        at_rate = known & (rates == rate)
        clips[at_rate] = count_clips(np.minimum(durations[at_rate], LONGEST_S), int(rate), rule)
    clips[~usable] = 0
    return clips, durations


# What a run will cost. FLOPs count multiply and add as two, per forward of one 10 s clip.
FORWARDS = {"clap": 2, "mert": 2}
"""CLAP and MERT see the full mix and the instrumental."""
PAPER_TFLOPS = 27.0
DECODE_REALTIME = 530.0
FLAC_RATIO = 0.6
LATENT_BYTES = 430 * 40 * 2


Number = tuple[str, int | float | str, str]
"""Name with its unit, value, reason."""


def derived_numbers(plan: Plan, config: CorpusConfig, bundle_costs: Mapping[str, float] | None = None) -> list[Number]:
    """Everything that follows from a plan, as (name, value, reason); names carry the unit.

    Args:
        bundle_costs: TFLOP per forward of one clip by model, `TFLOP_PER_CLIP` by default. A model called
            `separator` is scaled to whole tracks where `separation.scope` is `track`.
    """
    table, segments = plan.table, config.segments
    usable = table.filter(pc.equal(table["status"], "ok"))
    duration = usable["duration_s"].to_numpy()
    size = usable["size"].to_numpy()
    clips = int(pc.sum(table["clips"]).as_py() or 0)
    per_unit = table.group_by("unit", use_threads=False).aggregate([("clips", "sum"), ("track_id", "count")])
    unit_clips = per_unit["clips_sum"].to_numpy()
    audio_h, clip_h = float(np.nansum(duration)) / 3600, clips * segments.clip_s / 3600
    heard_h = float(np.nansum(np.minimum(duration, usable["clips"].to_numpy() * segments.clip_s))) / 3600
    unknown, unsized = int(np.isnan(duration).sum()), int((size < 0).sum())
    unheaded = int((np.isnan(duration) & (size >= 0) & (usable["clips"].to_numpy() == 1)).sum())
    captions = int(pc.sum(table["caption_owner"]).as_py() or 0)
    written = [_clip_bytes(config) * int(count) + 10240 for count in unit_clips]

    numbers: list[Number] = [
        ("tracks", table.num_rows, "rows of the catalogue"),
        ("usable tracks", usable.num_rows, "catalogue status ok; decoding may still reject or fail some"),
    ]
    for reason, count in sorted(_counts(table.filter(pc.not_equal(table["status"], "ok"))["reason"]).items()):
        numbers.append((f"rejected: {reason}", count, "decided by the catalogue, before decoding"))
    for split in ("train", "validation", "test"):
        count = _counts(usable["split"]).get(split, 0)
        numbers.append((f"{split} tracks", count, split_rule(config.splits)))
    rule = f"per track min({segments.max_clips}, whole {segments.clip_s:g} s), 1 from {segments.min_s:g} s"
    numbers += [
        ("expected clips", clips, rule + (f"; {unknown} tracks of unknown length" if unknown else "")),
        (
            "units",
            len(unit_clips),
            f"whole tracks, at most {config.unit_clips} clips and {MAX_UNIT_TRACKS} tracks",
        ),
        ("clips per unit, mean", round(clips / max(len(unit_clips), 1), 2), "expected clips / units"),
        ("clips per unit, most", int(unit_clips.max(initial=0)), f"bound: unit_clips={config.unit_clips}"),
        ("headers not readable", unheaded, "one row each until decoding, which records why"),
        ("distinct captions", captions, "text features are made once per caption of a usable track"),
        ("audio, h", _rounded(audio_h, 2), "usable tracks, decoded whole" + _lacking(unknown, "duration")),
        (
            "clips, h",
            _rounded(heard_h, 2),
            f"expected clips x {segments.clip_s:g} s, less what shorter songs lack" + _lacking(unknown, "duration"),
        ),
    ]
    if unsized < usable.num_rows or not usable.num_rows:
        numbers.append(("bytes read", int(size[size > 0].sum()), "file sizes" + _lacking(unsized, "size")))
    else:
        numbers.append(("bytes read", "unknown", f"no file of the table was found under {plan.root}"))
    numbers += [
        (
            "bytes written, clips",
            sum(written),
            f"{_clip_bytes(config)} B per clip at the paper bundle's sizes: latent mean and std 2 x "
            f"{LATENT_BYTES}, CLAP 2 x 512 and MERT 2 x 1024 float32"
            + (", FLAC" if config.keep_audio else "")
            + ", tar blocks",
        ),
        (
            "bytes written, captions",
            captions * (77 * 1024 * 2 + 2 * 512 * 4),
            "per caption T5 77 x 1024 float16 and 2 x 512 float32",
        ),
        (
            "decoding, core-h",
            _rounded(audio_h / DECODE_REALTIME, 3),
            f"audio hours / {DECODE_REALTIME:g}: MP3 through libsndfile, times real time per core",
        ),
    ]
    separated_h = {"clip": clip_h, "track": audio_h, "none": 0.0}[config.separation.scope]
    numbers += _model_costs(TFLOP_PER_CLIP if bundle_costs is None else bundle_costs, clip_h, separated_h)
    return [*numbers, _decoder_memory(duration, int(unit_clips.max(initial=0)), config)]


def _decoder_memory(duration: np.ndarray, most_clips: int, config: CorpusConfig) -> Number:
    """For the longest of some tracks (seconds, NaN unknown) and the clips of the largest unit."""
    known = duration[~np.isnan(duration)]
    longest = float(known.max()) if len(known) else config.limits.max_duration_s
    decoded = min(longest * DECODED_BYTES_PER_S, config.limits.max_decoded_bytes)
    carried = most_clips * config.segments.clip_s * DECODED_BYTES_PER_S
    return (
        "decoder memory, bytes",
        int(decoded + carried),
        f"longest track ({longest:.0f} s) and the clips of a full unit as float32 stereo at 44.1 kHz"
        + ("; lengths unknown, so limits.max_duration_s" if len(duration) and not len(known) else ""),
    )


def _model_costs(costs: Mapping[str, float], clip_h: float, separated_h: float) -> list[Number]:
    """FLOPs of every model and of all, for hours of clips, and of what the separator hears."""
    numbers: list[Number] = []
    total = 0.0
    for model, tflop in costs.items():
        scale = separated_h if model == "separator" else clip_h
        forwards = FORWARDS.get(model, 1)
        spent = tflop * forwards * scale * 360  # 360 clips of 10 s per hour
        total += spent
        over = "clips" if scale is clip_h else "whole tracks"
        numbers.append(
            (f"{model}, PFLOP", _rounded(spent / 1000, 3), f"{tflop:g} TFLOP x {forwards} per 10 s of {over}")
        )
    hours = _rounded(total / PAPER_TFLOPS / 3600, 2)
    return [
        *numbers,
        ("models, PFLOP", _rounded(total / 1000, 3), "sum of the models"),
        (
            "models, accelerator-h",
            hours,
            f"at {PAPER_TFLOPS:g} TFLOP/s, the rate of the paper's Stage 1 on an RTX A5000",
        ),
    ]


def _rounded(value: float, digits: int) -> float:
    """Rounded, to two significant digits where that would be less: what is to do is never 0."""
    return round(value, digits) if value >= 10.0 ** (1 - digits) else float(f"{value:.2g}")


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    return {item["values"]: item["counts"] for item in pc.value_counts(column).to_pylist()}


def _lacking(count: int, what: str) -> str:
    return f"; {count} tracks of unknown {what} are not in it" if count else ""


def _clip_bytes(config: CorpusConfig) -> int:
    """Bytes of one clip in a shard: each member has a 512-byte header and is padded to 512-byte blocks."""
    header = 128  # of a .npy file
    members = [LATENT_BYTES + header] * 2 + [2 * 512 * 4 + header, 2 * 1024 * 4 + header, 1024]  # last: JSON
    if config.keep_audio:
        members.append(int(config.segments.clip_s * 44100 * 2 * FLAC_RATIO))
    return sum(512 + math.ceil(member / 512) * 512 for member in members)
