"""`ttmray postprocess DIR... --output OUT`: every file of any folders of audio, post-processed.

`table.csv` in the output folder is the manifest: one row per file, and a file is done when its row says so with the
hashes of the input, the output and the settings. A process that is killed loses the rows of its last seconds.
"""

import csv
import hashlib
import io
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from rich.table import Table

from ttmray import inventory
from ttmray.audio import io as audio_io
from ttmray.cluster import ActorsConfig
from ttmray.config import fingerprint, identity
from ttmray.console import console, errors, meter
from ttmray.errors import EXIT_OK, EXIT_TOO_MANY_FAILURES, ClipError, UserError
from ttmray.generation.postprocess import (
    HARD_DB,
    LIMITS,
    PostprocessConfig,
    encode,
    limiting_heard,
    open_separator,
    postprocess_clip,
)
from ttmray.models import one_thread
from ttmray.models.bundle import ReleasedBundle, open_bundle
from ttmray.models.plans import embedding_flops, show_plan, weights_rows
from ttmray.models.protocol import SEPARATION
from ttmray.models.weights import open_store
from ttmray.runs import KINDS_OF_CORPUS, RUN, SUCCESS
from ttmray.storage import BAD_NAME, Folder, is_remote, name_problem, shown_name, split_path

if TYPE_CHECKING:
    from ttmray.models.separator import Separator

TABLE = "table.csv"
SAVE_EVERY_S = 10.0
COLUMNS = (
    *("file", "source", "status", "reason", "message", "duration_s", "sample_rate", "channels"),
    *("lufs_before", "lufs_after", "true_peak_before", "true_peak_after", "gain_db", "reduction_db", "vocal_ratio"),
    *("sha256", "made_sha256", "settings"),
)


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
    jobs, odd = _outputs(sources, out, ending)
    complete = (inventory.read_marker(out) or {}).get("kind") == "postprocess"
    rows = _read_table(out, complete if plan_only else inventory.reopen(out, "postprocess").complete)
    for name, source in (jobs | {row["file"]: row["source"] for row in odd}).items():
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
    odd = [row | {"settings": run} for row in odd]
    shown = [*odd]
    done_before = sum(rows.get(row["file"]) == row for row in odd)  # by an earlier run
    rows |= {row["file"]: row for row in odd}
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


def _outputs(sources: Sequence[str], out: Folder, ending: str) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Name below the output folder -> path of its input file; and the rows of files whose names cannot be used."""
    jobs: dict[str, str] = {}
    odd: list[dict[str, Any]] = []
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
            if problem := name_problem(prefix + name):
                row = {"file": shown_name(prefix + name), "source": shown_name(path), "message": problem}
                odd.append(dict.fromkeys(COLUMNS, "") | row | {"status": "rejected", "reason": BAD_NAME})
                continue
            target = prefix + os.path.splitext(name)[0] + ending
            if jobs.setdefault(target, path) != path:
                raise UserError(
                    f"{jobs[target]} and {path} would both become {out}/{target}.",
                    "Rename one, or post-process them into different folders.",
                )
            inputs.append(path)
    if not jobs and not odd:
        known = ", ".join(sorted(audio_io.AUDIO_EXTENSIONS))
        raise UserError(f"no audio files in {', '.join(sources)}.", f"These endings count: {known}.")
    overwritten = {f"{out}/{name}" for name in jobs}.intersection(inputs)
    if overwritten:
        raise UserError(f"{min(overwritten)} would be overwritten by its own result.", "Choose another --output.")
    return jobs, odd


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


def _hard_limited(row: Mapping[str, Any]) -> bool:
    return row["status"] == "ok" and row["reduction_db"] != "" and float(row["reduction_db"]) > HARD_DB


def _level_details(row: Mapping[str, Any]) -> str:
    if row["reason"] == "silent":
        return "nothing above the gate of -70 LUFS: left at its level"
    if not row["reason"]:
        return limiting_heard(float(row["reduction_db"]))
    return f"{float(row['lufs_after']):.2f} LUFS, {float(row['true_peak_after']):.2f} dBTP"
