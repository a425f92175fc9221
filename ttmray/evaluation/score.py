"""`ttmray score FILE...`: reward, CLAP score, loudness and true peak of any audio files, as a table, JSON or CSV.

Folders stand for the audio in them, at any depth, those of a generation run with their prompts as captions; tables
(.csv and others with a column `path`, and `caption` where there are captions) for their rows.

A file of half a clip to a whole one (5 to 10 s, but for small bundles) has the numbers that the corpus job gives its
one clip, which is padded with zeros. Shorter files are scored as they are. Longer ones are scored under the protocol of
the released TuneJury tables: the 10 s in the middle for CLAP, all of it for MERT (`heard` says so); or in pieces.
"""

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from ttmray.audio.clip import CLIP_S, Reading, clip_of, read_clip, read_whole
from ttmray.audio.io import AUDIO_EXTENSIONS
from ttmray.console import console, errors
from ttmray.errors import EXIT_OK, EXIT_TOO_MANY_FAILURES, ClipError, UserError
from ttmray.evaluation.systems import audio_files
from ttmray.evaluation.warnings import WINDOW_S
from ttmray.generation import manifest
from ttmray.models import one_thread
from ttmray.models.bundle import DEFAULT, Bundle, means_nothing, open_bundle
from ttmray.models.cache import EmbeddingCache
from ttmray.models.loading import LoadOptions
from ttmray.models.scoring import Scorer
from ttmray.storage import BAD_NAME, Folder, absolute, is_remote, name_problem, shown_name, split_path
from ttmray.tables import is_table, read_rows

CACHE_BYTES = 8 * 2**30
ScoreRow = dict[str, Any]
PATHS, CAPTIONS = ("path", "file", "audio"), ("caption", "prompt", "text")
"""Columns of tables of sounds."""
KNOWN = frozenset((*PATHS, *CAPTIONS))
FACTS = ("duration_s", "sample_rate", "channels", "lufs", "true_peak_db")


def read_mono(path: str, clip_s: float = CLIP_S) -> tuple[np.ndarray, dict[str, Any]]:
    """A file as (samples,) mono float32 at 44.1 kHz, as the corpus job makes it, and its level facts.

    Args:
        clip_s: length of the bundle's clips, in seconds.

    Raises:
        ClipError: why the file cannot be scored.
    """
    return _mono(read_clip(path, clip_s))


def _mono(reading: Reading) -> tuple[np.ndarray, dict[str, Any]]:
    return reading.mono(), {name: reading.facts[name] for name in FACTS}


def open_scorer(bundle: Bundle, reward_text: str, options: LoadOptions, cache: str | None = None) -> Scorer:
    """What scores files and samples: for `ttmray score` and for the Python API.

    Args:
        reward_text: `empty` or `caption`: what the reward sees.
        cache: folder of the embedding cache; None computes all.

    Raises:
        UserError: an unknown `reward_text`, or weights that are not there.
    """
    if reward_text not in ("empty", "caption"):
        raise UserError(f"reward_text must be empty or caption, not {reward_text!r}.")
    protocol = bundle.protocol("caption" if reward_text == "caption" else "empty")
    models = bundle.load(Scorer.roles, options)
    return Scorer(models, protocol, cache=EmbeddingCache(cache, CACHE_BYTES) if cache else None)


def score_sounds(scorer: Scorer, sounds: Iterable[tuple[str, Reading]], captions: Iterable[str]) -> Iterator[ScoreRow]:
    """The numbers of every sound, one by one, in one torch thread.

    Args:
        sounds: name and what was read, in their order.
        captions: of each, for its CLAP score; empty leaves that out.

    Yields:
        `file`, `start_s`, `status`, `reason`, `message`; where the status is ok also `FACTS`, `reward`, `clap_score`
        and `heard`, which part of a longer file the models have seen.
    """
    one_thread()  # as in the corpus job, so that scores are the same to the bit
    for (name, reading), caption in zip(sounds, captions, strict=False):
        row: ScoreRow = {"file": name, "start_s": reading.facts.get("start_s", 0.0)}
        row |= {"status": "ok", "reason": "", "message": "", "heard": ""}
        try:
            wave, facts = _mono(reading)
            embeddings, text = scorer.embed([wave]), scorer.texts([caption])
            row |= facts | {"reward": float(scorer.rewards(embeddings, text)[0])}
            row["clap_score"] = float(embeddings.clap[0] @ text[0]) if caption else None
            row["heard"] = heard(facts["duration_s"])
        except ClipError as error:
            row |= {"status": error.status, "reason": error.reason, "message": error.message}
        yield row


def heard(duration_s: float) -> str:
    """Which part of a file the encoders see; empty where it is all of it."""
    if duration_s <= WINDOW_S + 0.05:
        return ""
    start = (duration_s - WINDOW_S) / 2
    return f"CLAP {start:.1f} to {start + WINDOW_S:.1f} s, MERT all {duration_s:.1f} s"


def pieces_of(path: str, clip_s: float) -> Iterator[Reading]:
    """A file in pieces of a clip's length, one after the other; a rest of half a clip or more is one, too. What is no
    longer than a clip is one piece, as is what cannot be read."""
    try:
        audio, rate = read_whole(path)
    except (ClipError, UserError):
        yield read_clip(path, clip_s)  # the same error, as a reading
        return
    length = round(clip_s * rate)
    starts = [start for start in range(0, audio.shape[1], length) if start == 0 or audio.shape[1] - start >= length / 2]
    for start in starts:
        reading = clip_of(audio[:, start : start + length], rate, clip_s)
        reading.facts["start_s"] = start / rate
        yield reading


class NamedFile(NamedTuple):
    """A file to be scored; `problem`: why its name cannot be used, "" where it can."""

    path: str
    caption: str
    problem: str = ""


def sounds_of(sources: Sequence[str], caption: str) -> list[NamedFile]:
    """Every sound that some sources stand for.

    Args:
        sources: files, folders and tables, local or remote.
        caption: of sounds that have none of their own.

    Raises:
        UserError: a folder without audio, or a table without paths.
    """
    sounds: list[NamedFile] = []
    for source in sources:
        if is_table(source):
            sounds += _of_table(source, caption)
        elif _is_folder(source):
            folder = Folder.at(source)
            prompts = {row["file"]: row["prompt"] for row in manifest.read_rows(folder).values() if row["file"]}
            for name in audio_files(folder):
                sounds.append(NamedFile(f"{folder.uri}/{name}", caption or prompts.get(name, ""), name_problem(name)))
        else:
            sounds.append(NamedFile(source, caption, name_problem(split_path(source)[1])))
    return sounds


def _of_table(source: str, caption: str) -> list[NamedFile]:
    """Paths of a table count from its folder."""
    rows, folder = read_rows(absolute(source), KNOWN), split_path(source)[0]
    sounds = []
    for place, row in rows:
        path = next((str(row[name]).strip() for name in PATHS if row.get(name)), "")
        if not path:
            raise UserError(f"{place} names no sound.", f"A column of these: {', '.join(PATHS)}.")
        own = next((str(row[name]) for name in CAPTIONS if row.get(name)), "")
        anywhere = is_remote(path) or os.path.isabs(os.path.expanduser(path))
        path = path if anywhere else f"{folder}/{path}"
        sounds.append(NamedFile(path, caption or own, name_problem(split_path(path)[1])))
    if not sounds:
        raise UserError(f"{source} has no rows.", "Check that it is the right file.")
    return sounds


def _is_folder(source: str) -> bool:
    if is_remote(source):
        return os.path.splitext(source)[1].lower() not in AUDIO_EXTENSIONS
    return os.path.isdir(os.path.expanduser(source))


def score(
    files: Sequence[str],
    *,
    bundle: str = DEFAULT,
    caption: str = "",
    reward_text: str = "empty",
    device: str = "auto",
    batch: int = 8,
    cache: str | None = None,
    as_json: bool = False,
    csv_to: str | None = None,
    pieces: bool = False,
) -> int:
    """Print one row per sound, or per piece of a clip's length of it; exit code 3 when one could not be scored.

    Args:
        files: files, folders and tables of sounds, see `sounds_of`.
        caption: for the CLAP score, of all; empty: those that folders and tables have.
        csv_to: write the rows there as CSV, local or s3://; replaces a file.
        reward_text: `empty` or `caption`: what the reward sees.
        cache: folder of the embedding cache; None computes all.

    Raises:
        UserError: an unknown bundle or `reward_text`, weights that are not there, or sources without sounds.
    """
    if csv_to is not None and not csv_to.endswith(".csv"):
        raise UserError(f"{csv_to} must end in .csv.", "Name the file of the table.")
    if all(not is_remote(file) and not os.path.exists(absolute(file)) for file in files):
        raise UserError(f"{', '.join(files)}: not found.", "Check the path.")  # of some, a row says it
    named = sounds_of(files, caption)
    chosen = open_bundle(bundle)
    scorer = open_scorer(chosen, reward_text, LoadOptions(device=device, batch=batch), cache)
    protocol = f"{chosen.name}/{scorer.protocol.id()}"
    rows: list[ScoreRow] = []
    for path, text, problem in named:
        shown = shown_name(path) if problem else path
        if problem:
            readings = iter([Reading(error=ClipError("rejected", BAD_NAME, problem))])
        else:
            readings = pieces_of(path, chosen.clip_s) if pieces else iter([read_clip(path, chosen.clip_s)])
        for row in score_sounds(scorer, ((shown, reading) for reading in readings), repeat(text)):
            rows.append(row | {"caption": text})
            if as_json:
                whole = row | {"protocol": protocol, "note": chosen.note}
                console.print(json.dumps(whole, ensure_ascii=False), markup=False)
    if csv_to is not None:
        _write(rows, protocol, csv_to, chosen.note if means_nothing(bundle) else "")
    elif not as_json:
        _print(rows, protocol, chosen.note, chosen.clip_s)
    return EXIT_OK if all(row["status"] == "ok" for row in rows) else EXIT_TOO_MANY_FAILURES


def _write(rows: Sequence[ScoreRow], protocol: str, csv_to: str, note: str) -> None:
    """Full precision; numbers that a sound does not have are empty. Where they mean nothing, each row says it."""
    names = ("file", "start_s", "status", "reason", "message", *FACTS, "reward", "clap_score", "heard", "caption")
    sink = io.StringIO(newline="")
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow((*names, "protocol", *(["note"] if note else [])))
    for row in rows:
        values = ("" if row.get(name) is None else row[name] for name in names)
        writer.writerow((*values, protocol, *([note] if note else [])))
    folder, name = split_path(csv_to)
    folder.write(name, sink.getvalue().encode("utf-8", "surrogateescape"))
    ok = sum(row["status"] == "ok" for row in rows)
    console.print(f"{ok} of {len(rows)} sounds scored by {protocol}: {csv_to}", markup=False)


def _print(rows: list[ScoreRow], protocol: str, note: str, clip_s: float) -> None:
    pieces, partly = any(row["start_s"] for row in rows), any(row["heard"] for row in rows)
    columns = ("reward", "clap_score", "lufs", "true_peak_db", "duration_s")
    table = Table("file", *(["from s"] if pieces else []), *columns, *(["heard"] if partly else []), "status")
    for row in rows:
        cells = [f"{row['start_s']:.1f}"] if pieces else []
        cells += ["" if row.get(name) is None else f"{row[name]:.3f}" for name in columns]
        cells += [row["heard"]] if partly else []
        status = "ok" if row["status"] == "ok" else f"{row['status']}: {row['reason']}: {row['message']}"
        table.add_row(row["file"], *cells, status)
    console.print(table)
    if partly:
        said = f"a reward of a long file is about what was heard of it; --pieces gives one per {clip_s:g} s"
        console.print(said, style="yellow")
    elif not pieces and any((row.get("duration_s") or 0) > clip_s + 0.05 for row in rows):
        said = f"this bundle knows clips of {clip_s:g} s: rewards of longer files are off their scale; "
        console.print(f"{said}--pieces gives one per {clip_s:g} s", style="yellow")
    console.print(f"scores by {protocol}")
    if note:
        errors.print(note, style="yellow")
