"""`ttmray postprocess DIR... --output OUT`: vocals removed, loudness and true peak to target, any folder of audio.

Two variants (`PostprocessConfig.variant`):

- `ours`: N passes of separation, then the target loudness under a true-peak ceiling by a look-ahead limiter
  (`ttmray.audio.limiter`). Mono stays mono and stereo stays stereo.
- `paper`: what the released scripts do (paper III-E). Every pass ends in mono with a sample peak of 0.95; then a gain
  to the target loudness, and if the sample peak is above 0.99 the whole clip is scaled to a peak of 0.95. Such a clip
  is below the target, and its true peak may be above the ceiling: 40 % of the published clips are. Not kept from the
  scripts: their unseeded random shift of Demucs (results differed between runs), a meter for 44.1 kHz used at any rate,
  filters that are 0.05 LU off, NaN for silence, and writing a clip unchanged when its measurement fails.

Separation works at 44.1 kHz and its output stays at that rate; without separation the rate stays as it is.

`table.csv` in the output folder is the manifest: one row per file, and a file is done when its row says so with the
hashes of the input, the output and the settings. A process that is killed loses the rows of its last seconds.
"""

import csv
import hashlib
import io
import math
import os
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np
import soundfile
from pydantic import Field
from rich.table import Table

from ttmray import inventory
from ttmray.audio import io as audio_io
from ttmray.audio.limiter import Levels, to_loudness
from ttmray.audio.limits import AudioLimits
from ttmray.audio.loudness import integrated_loudness, true_peak
from ttmray.cluster import ActorsConfig
from ttmray.config import Config, Device, execution, fingerprint, identity
from ttmray.console import console, errors, meter
from ttmray.errors import EXIT_OK, EXIT_TOO_MANY_FAILURES, ClipError, UserError
from ttmray.models import one_thread
from ttmray.models.bundle import Bundle, BundleName, ReleasedBundle, open_bundle
from ttmray.models.loading import LoadOptions
from ttmray.models.plans import embedding_flops, show_plan, weights_rows
from ttmray.models.protocol import SEPARATION
from ttmray.models.weights import open_store
from ttmray.runs import KINDS_OF_CORPUS, RUN, SUCCESS
from ttmray.storage import Folder, is_remote, split_path

if TYPE_CHECKING:
    from ttmray.models.separator import Separator

LIMITS = AudioLimits(min_duration_s=0.5, min_sample_rate=8000)
"""Two hours and 2 GiB decoded at most; the loudness standard can say nothing about less than 0.4 s."""
TABLE = "table.csv"
SAVE_EVERY_S = 10.0
PAPER_PEAK, PAPER_PEAK_LIMIT = 0.95, 0.99
_ACCELERATOR = threading.Lock()  # its memory is for one file at a time; a CPU separates one in every thread
COLUMNS = (
    *("file", "source", "status", "reason", "message", "duration_s", "sample_rate", "channels"),
    *("lufs_before", "lufs_after", "true_peak_before", "true_peak_after", "gain_db", "reduction_db", "vocal_ratio"),
    *("sha256", "made_sha256", "settings"),
)


class PostprocessConfig(Config):
    """How clips are finished."""

    variant: Literal["ours", "paper"] = "ours"
    """`paper` is the procedure of the paper's submission, which misses its own targets; see the module."""
    passes: int = Field(3, ge=0, le=10)
    """Separation passes, each on the result of the one before (paper III-E: 3); 0 keeps the vocals."""
    bundle: BundleName = "paper"
    """Set of models that the separator is from. The debug bundles are untrained and damage the sound."""
    lufs: float = Field(-16.5, ge=-60, le=0)
    """Target of integrated loudness, LUFS (paper III-E)."""
    ceiling_dbtp: float = Field(-1.0, ge=-30, le=0)
    """Highest true peak, dBTP. The limiter aims 0.2 dB lower. `paper` ignores it."""
    max_reduction_db: float = Field(20.0, ge=0, le=60)
    """A clip that the limiter would have to take more off than this is scaled to the ceiling instead, and misses the
    target (its row says `missed`). 0: never limit."""
    format: Literal["wav", "wav16", "flac"] = "wav"
    """`wav` is float32; `wav16` and `flac` have 16 bits with triangular dither (`paper`: rounded, without)."""
    device: Device = execution("auto")
    """Device of the separator; `auto` is cuda where there is one."""
    workers: int | Literal["auto"] = execution("auto")
    """Files worked on at the same time, each in one thread; `auto` is one per CPU."""


def open_separator(config: PostprocessConfig, bundle: Bundle | None = None) -> "Separator | None":
    """The separator that `postprocess_clip` wants; None for no passes.

    Args:
        bundle: that of the config, where it is open already.

    Raises:
        UserError: the bundle, its weights or the device are not there.
    """
    if config.passes == 0:
        return None
    return (bundle or open_bundle(config.bundle)).load({"separator"}, LoadOptions(device=config.device)).separator


def postprocess_clip(
    wave: np.ndarray, sample_rate: int, config: PostprocessConfig, separator: "Separator | None" = None
) -> tuple[np.ndarray, dict[str, Any]]:
    """One clip as `config` says: separation, loudness, peak.

    Args:
        wave: (channels, frames) float32, full scale 1.0, mono or stereo, at least 0.5 s.
        sample_rate: Hz.
        separator: of one pass, as `open_separator` gives it; needed unless `config.passes` is 0.

    Returns:
        float32 samples, at 44.1 kHz if separated, else at `sample_rate`, and the facts of the table: `outcome`
        (`reached`, `missed` or `silent`, see `limiter.Levels`), `sample_rate` and `channels` of the result,
        `lufs_before`, `lufs_after` (LUFS), `true_peak_before`, `true_peak_after` (dBTP), `gain_db`, `reduction_db`,
        `vocal_ratio` (of the first pass; None without). Before is the input; gain and reduction are what was done
        after separation. What is minus infinity (silence) is None.

    Raises:
        ClipError: too short, not finite, or not separable.
        ValueError: another layout.
    """
    if wave.ndim != 2 or wave.shape[0] not in (1, 2):
        raise ValueError(f"expected (1 or 2 channels, frames), not {wave.shape}")
    if wave.shape[1] < LIMITS.min_duration_s * sample_rate:
        message = f"{wave.shape[1] / sample_rate:.2f} s, shorter than {LIMITS.min_duration_s:g} s"
        raise ClipError("rejected", "too_short", message)
    if not (np.abs(wave) < 1e30).all():  # their squares must be finite, too
        raise ClipError("failed", "non_finite", "samples that are NaN, infinite or beyond 1e30")
    facts: dict[str, Any] = {"vocal_ratio": None}
    y, rate = wave.astype(np.float32, copy=False), sample_rate
    if config.passes:
        if separator is None:
            raise ValueError("passes need a separator")
        rate = separator.sample_rate
        y, facts["vocal_ratio"] = _without_vocals(audio_io.resample(y, sample_rate, rate), config, separator)
    y, levels = _paper_levels(y, rate, config) if config.variant == "paper" else _our_levels(y, rate, config)
    facts |= vars(levels)
    if config.passes:
        facts["lufs_before"] = integrated_loudness(wave, sample_rate)
        facts["true_peak_before"] = true_peak(wave, sample_rate)
    facts |= {"sample_rate": rate, "channels": y.shape[0]}
    return y, {name: None if value == -math.inf else value for name, value in facts.items()}


def _without_vocals(
    wave: np.ndarray, config: PostprocessConfig, separator: "Separator"
) -> tuple[np.ndarray, float | None]:
    """After all passes, and the vocals' share of energy in the first."""
    mono = wave.shape[0] == 1 or config.variant == "paper"
    ratio = None
    for _ in range(config.passes):
        with nullcontext() if separator.device.type == "cpu" else _ACCELERATOR:
            (result,) = separator.separate([wave])
        wave = result.instrumental.mean(axis=0, keepdims=True) if mono else result.instrumental
        if config.variant == "paper":
            wave = wave * np.float32(PAPER_PEAK / (np.abs(wave).max() + 1e-8))
        ratio = result.vocal_ratio if ratio is None else ratio
    return wave, ratio


def _our_levels(wave: np.ndarray, rate: int, config: PostprocessConfig) -> tuple[np.ndarray, Levels]:
    return to_loudness(wave, rate, config.lufs, config.ceiling_dbtp, config.max_reduction_db)


def _paper_levels(wave: np.ndarray, rate: int, config: PostprocessConfig) -> tuple[np.ndarray, Levels]:
    mono = wave.mean(axis=0, keepdims=True)
    before, peak_before = integrated_loudness(mono, rate), true_peak(mono, rate)
    if before == -math.inf:
        return mono, Levels(before, before, peak_before, peak_before, 0.0, 0.0, "silent")
    gain = 10 ** ((config.lufs - before) / 20)
    peak = float(np.abs(mono).max()) * gain
    if peak > PAPER_PEAK_LIMIT:
        gain *= PAPER_PEAK / peak
    y = mono * np.float32(gain)
    levels = (before, integrated_loudness(y, rate), peak_before, true_peak(y, rate), 20 * math.log10(gain), 0.0)
    return y, Levels(*levels, "missed" if peak > PAPER_PEAK_LIMIT else "reached")


def format_of(path: str) -> Literal["wav", "flac"]:
    """The format of an audio file that is to be written, by its ending.

    Raises:
        UserError: another ending.
    """
    ending = os.path.splitext(path)[1].lower()
    if ending == ".wav":
        return "wav"
    if ending == ".flac":
        return "flac"
    raise UserError(f"{path} is neither .wav nor .flac.", "WAV is float32 and keeps every bit, FLAC has 16 bits.")


def encode(wave: np.ndarray, sample_rate: int, config: PostprocessConfig) -> bytes:
    """Bytes of an audio file in `config.format`; the same samples give the same bytes.

    Dither is triangular (two steps of 16 bits wide, independent for channels), drawn from a hash of the samples.

    Args:
        wave: (channels, frames) float32; 16-bit formats clip at full scale.
    """
    file = io.BytesIO()
    if config.format == "wav":
        audio_io.write_audio(file, wave, sample_rate, "wav")
        return file.getvalue()
    if config.variant == "ours":
        seed = hashlib.blake2b(np.ascontiguousarray(wave).tobytes(), digest_size=16).digest()
        rng = np.random.default_rng(int.from_bytes(seed, "big"))
        noise = rng.random(wave.shape, dtype=np.float32) - rng.random(wave.shape, dtype=np.float32)
        wave = wave + noise / 32768
    samples = np.clip(np.rint(wave.T * 32768.0), -32768, 32767).astype(np.int16)
    container = "FLAC" if config.format == "flac" else "WAV"
    soundfile.write(file, samples, sample_rate, format=container, subtype="PCM_16")
    return file.getvalue()


def postprocess(sources: Sequence[str], output: str, config: PostprocessConfig, *, plan_only: bool = False) -> int:
    """Post-process all audio files in folders, at any depth, and single files; exit code 3 when some failed.

    `OUT/<name>` has the name relative to its folder, with several sources `OUT/<folder>/<name>`, and the ending of
    the format.

    Args:
        plan_only: say what would be done, and stop.

    Raises:
        UserError: no audio, names that collide, an output folder that lies in an input or holds other files.
    """
    out = Folder.at(output)
    ending = ".flac" if config.format == "flac" else ".wav"
    jobs = _outputs(sources, out, ending)
    complete = (inventory.read_marker(out) or {}).get("kind") == "postprocess"
    rows = _read_table(out, complete if plan_only else inventory.reopen(out, "postprocess").complete)
    for name, source in jobs.items():
        if name in rows and rows[name]["source"] != source:
            raise UserError(f"{out}/{name} was made from {rows[name]['source']}.", "Choose another --output.")
    if plan_only:
        return _show_plan(jobs, rows, out, config)
    separator = open_separator(config)
    if not out.exists(TABLE):
        _write_table(out, rows)  # from now on the folder is ours
    run = fingerprint(_settings(config))
    if separator is not None and (note := open_bundle(config.bundle).note):
        errors.print(note, style="yellow")

    count = (os.cpu_count() or 1) if config.workers == "auto" else max(1, config.workers)
    shown: list[dict[str, Any]] = []
    done_before = 0  # by an earlier run
    saved = time.monotonic()
    pool = ThreadPoolExecutor(count, initializer=one_thread)
    try:
        with meter("files", len(jobs)) as progress:
            futures = [
                pool.submit(_one, source, out, name, rows.get(name), run, config, separator)
                for name, source in jobs.items()
            ]
            for future in as_completed(futures):
                row, is_new = future.result()
                rows[row["file"]] = row
                shown.append(row)
                done_before += not is_new
                progress.advance(1)
                if is_new and time.monotonic() - saved >= SAVE_EVERY_S:
                    _write_table(out, rows)
                    saved = time.monotonic()
    finally:
        pool.shutdown(cancel_futures=True)
        if done_before < len(shown):
            _write_table(out, rows)
    inventory.note(out, "postprocess", (TABLE, *(name for name, row in rows.items() if row["status"] == "ok")))
    _print(sorted(shown, key=lambda row: row["file"]), done_before, out)
    return EXIT_OK if all(row["status"] == "ok" for row in shown) else EXIT_TOO_MANY_FAILURES


def _show_plan(
    jobs: Mapping[str, str], rows: Mapping[str, dict[str, Any]], out: Folder, config: PostprocessConfig
) -> int:
    bundle, todo = open_bundle(config.bundle), len(jobs.keys() - rows.keys())
    flops, of = embedding_flops(bundle, todo * config.passes, ("separator",))
    show = [
        ("files", f"{todo:,} to do of {len(jobs):,}", "a file of the table is done again where it has changed"),
        ("separation", f"{config.passes} passes", f"bundle {bundle.name}: {bundle.note}" if config.passes else ""),
        *(weights_rows(bundle, ("separator",)) if config.passes else []),
    ]
    runtime = ActorsConfig(device=config.device)
    return show_plan(show, out, todo, flops if config.passes else None, runtime, f"{of}, as if files were of 10 s")


def _settings(config: PostprocessConfig) -> dict[str, Any]:
    """What decides the bytes of an output; of a bundle its separator alone."""
    settings = identity(config)
    del settings["bundle"]
    if config.passes:
        bundle = open_bundle(config.bundle)
        if isinstance(bundle, ReleasedBundle):
            store = open_store()
            entries = [entry.name for entry in store.of_bundle(bundle.name) if entry.role == "separator"]
            settings["separator"] = {name: store.hashes(name) for name in entries}
        else:
            settings["separator"] = bundle.identity(("separator",))
        settings["separation"] = SEPARATION
    return settings


def _outputs(sources: Sequence[str], out: Folder, ending: str) -> dict[str, str]:
    """Name below the output folder -> path of its input file."""
    jobs: dict[str, str] = {}
    inputs: list[str] = []
    for source in sources:
        if _is_folder(source):
            folder = Folder.at(source)
            _refuse_runs_without_songs(folder)
            if f"{out}/".startswith(f"{folder}/"):
                raise UserError(f"the output {out} lies in the input {folder}.", "Choose a folder outside of it.")
            prefix = f"{folder.uri.rsplit('/', 1)[-1]}/" if len(sources) > 1 else ""
            names = [entry.name for entry in folder.files(sizes=False) if _is_audio(entry.name)]
        else:
            folder, name = split_path(source)
            prefix, names = "", [name]
        for name in names:
            path = f"{folder}/{name}"
            target = prefix + os.path.splitext(name)[0] + ending
            if jobs.setdefault(target, path) != path:
                raise UserError(
                    f"{jobs[target]} and {path} would both become {out}/{target}.",
                    "Rename one, or post-process them into different folders.",
                )
            inputs.append(path)
    if not jobs:
        known = ", ".join(sorted(audio_io.AUDIO_EXTENSIONS))
        raise UserError(f"no audio files in {', '.join(sources)}.", f"These endings count: {known}.")
    overwritten = {f"{out}/{name}" for name in jobs}.intersection(inputs)
    if overwritten:
        raise UserError(f"{min(overwritten)} would be overwritten by its own result.", "Choose another --output.")
    return jobs


def _refuse_runs_without_songs(folder: Folder) -> None:
    """
    Raises:
        UserError: the folder is a run or a result whose audio is no input: it lies in shards, is monitoring, or was
            post-processed already.
    """
    if not folder.exists(RUN) and not folder.exists(SUCCESS):
        return
    kind = inventory.kind_of(folder)
    if kind == "generate":
        return
    if kind == "postprocess":
        raise UserError(
            f"{folder} was made by this command: once more would separate and limit what is finished.",
            "Name the folder that it was made from, or copy the files elsewhere to do it all the same.",
        )
    way_out = "ttmray corpus sample RUN --out DIR writes its clips as files." if kind in KINDS_OF_CORPUS else ""
    raise UserError(
        f"{folder} is a run of kind {kind}, no folder of songs.",
        way_out or "Name a folder of audio, or a generation run.",
    )


def _is_folder(source: str) -> bool:
    if is_remote(source):
        return not _is_audio(source)
    if not os.path.exists(os.path.expanduser(source)):
        raise UserError(f"{source}: not found.", "Give audio files or folders of them.")
    return os.path.isdir(os.path.expanduser(source))


def _is_audio(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in audio_io.AUDIO_EXTENSIONS


def _one(
    source: str,
    out: Folder,
    name: str,
    old: Mapping[str, Any] | None,
    run: str,
    config: PostprocessConfig,
    separator: "Separator | None",
) -> tuple[dict[str, Any], bool]:
    """The row of one file, and whether anything was done for it."""
    row: dict[str, Any] = dict.fromkeys(COLUMNS, "") | {"file": name, "source": source, "settings": run}
    try:
        with _opened(source) as file:
            row["sha256"] = _sha256(file)
            if old and all(old[key] == row[key] for key in ("sha256", "settings")) and _is_made(out, old):
                return dict(old), False
            wave, rate = audio_io.decode(file, LIMITS)
        wave, facts = postprocess_clip(wave, rate, config, separator)
    except ClipError as error:
        out.delete(name)  # of an earlier version of the file, and no longer what the table says
        return row | {"status": error.status, "reason": error.reason, "message": error.message}, True
    encoded = encode(wave, facts["sample_rate"], config)
    out.write(name, encoded)
    reason = facts.pop("outcome")
    row |= {"status": "ok", "reason": "" if reason == "reached" else reason}
    row["made_sha256"] = hashlib.sha256(encoded).hexdigest()
    row["duration_s"] = wave.shape[1] / facts["sample_rate"]
    return row | {key: "" if value is None else value for key, value in facts.items()}, True


def _opened(source: str) -> BinaryIO:
    folder, name = split_path(source)
    try:
        return io.BytesIO(folder.read(name)) if folder.remote else folder.open(name)
    except UserError as error:
        raise ClipError("failed", "unreadable", error.message) from error


def _sha256(file: Any) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _is_made(out: Folder, row: Mapping[str, Any]) -> bool:
    """Whether the output is what its row says. A run with other settings may have been killed before its row."""
    if row["status"] != "ok" or not out.exists(row["file"]):
        return False
    with out.open(row["file"]) as file:
        return _sha256(file) == row["made_sha256"]


def _read_table(out: Folder, ours: bool) -> dict[str, dict[str, Any]]:
    """Rows by file; none where the table is gone of a folder that is `ours`, so that all is made again."""
    if not out.exists(TABLE):
        foreign = next(iter(out.files(sizes=False)), None)
        if foreign is not None and not ours:
            raise UserError(
                f"{out} holds {foreign.name} but no {TABLE}: it was not made by this command.",
                "Choose an empty or new --output.",
            )
        return {}
    reader = csv.DictReader(io.StringIO(out.read(TABLE).decode("utf-8", "surrogateescape"), newline=""))
    if tuple(reader.fieldnames or ()) != COLUMNS:
        raise UserError(f"{out}/{TABLE} is no table of this command and version.", "Choose another --output.")
    return {row["file"]: row for row in reader}


def _write_table(out: Folder, rows: Mapping[str, Mapping[str, Any]]) -> None:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows[name] for name in sorted(rows))
    out.write(TABLE, file.getvalue().encode("utf-8", "surrogateescape"))


def _print(rows: Sequence[Mapping[str, Any]], done_before: int, out: Folder) -> None:
    """Counts, levels over all files, and the files that are not as they should be."""
    ok = [row for row in rows if row["status"] == "ok"]
    if done_before == len(rows):
        console.print(f"nothing to do: all {len(rows)} files are done with these settings")
    else:
        console.print(f"{len(ok)} of {len(rows)} files ok ({done_before} were done before)")
    if ok:
        table = Table("", "lowest", "median", "highest")
        for column in ("lufs_before", "lufs_after", "true_peak_before", "true_peak_after", "gain_db", "reduction_db"):
            values = [float(row[column]) for row in ok if row[column] != ""]
            if values:
                table.add_row(column, *(f"{value:.2f}" for value in np.percentile(values, (0, 50, 100))))
        console.print(table)
        console.print(f"{sum(float(row['reduction_db']) > 0 for row in ok)} limited, the others by gain alone")
    odd = [row for row in rows if row["reason"] or _hard_limited(row)]
    if odd:
        table = Table("file", "status", "reason", "details")
        for row in odd:
            details = row["message"] or _level_details(row)
            cells = (row["file"], row["status"], row["reason"] or "limited", details)
            table.add_row(*(cell.encode(errors="replace").decode() for cell in cells))
        console.print(table)
    console.print(f"{out}/{TABLE}", markup=False)


HARD_DB = 6.0
"""Beyond this the limiter is heard: such files are listed."""


def limiting_heard(reduction_db: float | None) -> str:
    """What to say of a clip that the limiter took so much off; empty where that is little."""
    if reduction_db is None or reduction_db <= HARD_DB:
        return ""
    return f"the limiter took {reduction_db:.1f} dB off peaks, more than {HARD_DB:g}: listen to it"


def _hard_limited(row: Mapping[str, Any]) -> bool:
    return row["status"] == "ok" and row["reduction_db"] != "" and float(row["reduction_db"]) > HARD_DB


def _level_details(row: Mapping[str, Any]) -> str:
    if row["reason"] == "silent":
        return "nothing above the gate of -70 LUFS: left at its level"
    if not row["reason"]:
        return limiting_heard(float(row["reduction_db"]))
    return f"{float(row['lufs_after']):.2f} LUFS, {float(row['true_peak_after']):.2f} dBTP"
