"""Looking into a run: `ttmray corpus stats | verify | ls | sample | upgrade`, and what `ttmray status` says of corpora.

Nothing but `upgrade` changes it.
"""

import json
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.table import Table

from ttmray import cost, pages
from ttmray.audio import io as audio_io
from ttmray.audio import segment
from ttmray.audio.limits import AudioLimits
from ttmray.console import console
from ttmray.corpus import index, shards, unit_log
from ttmray.corpus.config import CorpusConfig
from ttmray.corpus.finalise import LATENTS, LatentSums, summary_lines
from ttmray.corpus.plan import Plan
from ttmray.corpus.scores import REWARDS, protocols, reward_statistics, table_names, with_columns
from ttmray.corpus.scores import columns as score_columns
from ttmray.corpus.unit import FAILED, OK, REJECTED
from ttmray.errors import EXIT_BAD_INPUT, EXIT_OK, UserError
from ttmray.inventory import checked, kind_of, read_marker
from ttmray.json_text import read_json
from ttmray.runs import KINDS_OF_CORPUS, RUN, SUCCESS, read
from ttmray.storage import Folder, safe_relative

LISTED = ("key", "status", "stage", "reason", "message", "instrumental_reward_score", "lufs", "source")
"""Columns that `ls` prints where nobody chooses."""


def _open(folder: str) -> Folder:
    run = Folder.at(folder)
    if not run.exists(RUN) and not run.exists(SUCCESS):
        raise UserError(f"{run} is not a corpus run: it has no {RUN}.", "Give the output folder of a corpus job.")
    if (kind := kind_of(run)) not in KINDS_OF_CORPUS:
        raise UserError(
            f"{run} is a run of kind {kind}, no corpus.",
            f"Give the output folder of a corpus job. How far this one is: ttmray status {run.typed}",
        )
    return run


def status_lines(run: Folder) -> Iterator[str]:
    """How far a run is: from its marker once it is finished, else from its plan, its log, and the names of index files.

    Raises:
        UserError: the plan or the index is damaged.
    """
    marker = read_marker(run)
    if marker is not None and "summary" in marker:
        units, clips = (marker["summary"][name] for name in ("units", "clips_expected"))
        yield f"{units} of {units} units, about {clips} of {clips} clips"
        return
    plan = Plan.load(run)
    names = index.committed_units(run)
    clips = plan.expected_clips(set(names))
    yield f"{len(names)} of {len(plan.unit_names())} units, about {clips} of {plan.expected_clips()} clips"
    if marker is not None:  # of an earlier version
        return
    lines = unit_log.read(run)
    logged = [lines[name] for name in names if name in lines]
    total = unit_log.counts(logged)
    # what a killed launch had not yet logged
    for rows, _ in index.blocks(run, [name for name in names if name not in lines]):
        total.update(rows["status"].to_pylist())
    for state in (OK, REJECTED, FAILED):
        yield f"  {state}: {total[state]}"
    missing = plan.expected_clips() - clips
    if (now := unit_log.rate(logged)) is not None and now[0] > 0:
        clips_per_s, last = now
        left, ago = (timedelta(seconds=round(s)) for s in (missing / clips_per_s, max(0.0, time.time() - last)))
        yield f"{clips_per_s:.3g} clips/s lately; at this rate {left} are left; the last unit was {ago} ago"
    elif (seconds := cost.read(run)["seconds"]) > 0 and clips:
        left = timedelta(seconds=round(missing * seconds / clips))
        yield f"{clips / seconds:.3g} clips/s over all launches; at this rate {left} are left"


def stats(folder: str) -> int:
    """Print counts, reasons, rewards per split and latent statistics."""
    run = _open(folder)
    columns = ["key", "status", "shard", "split", *REWARDS]
    if (marker := read_marker(run)) is not None and "summary" in marker:
        for line in summary_lines(marker["summary"], run):
            console.print(line, markup=False)
        # not a request for every unit
        table, latents = index.read_merged(run, columns), read_json(checked(run.path(LATENTS)))
    else:
        sums, blocks = LatentSums(), [index.SCHEMA.empty_table().select(columns)]
        for rows, metadata in index.blocks(run, index.committed_units(run)):
            blocks.append(rows.select(columns))
            for unit in metadata:
                sums.add(unit["latents"])
        table, latents = pa.concat_tables(blocks), sums.statistics()
    shown = Table("split", "column", "clips", "mean", "std", "p5", "p95", "max")
    rewards = [*REWARDS, *(f"{name}/{column}" for name in table_names(run) for column in REWARDS)]
    for split, columns in reward_statistics(with_columns(run, table, rewards), rewards).items():
        for name, values in columns.items():
            if name != "clips":
                numbers = [f"{values[key]:+.3f}" for key in ("mean", "std", "p5", "p95", "max")]
                shown.add_row(split, name, str(columns["clips"]), *numbers)
    console.print(shown)
    for name, protocol in protocols(run).items():
        if name:
            console.print(f"scores {name} by {protocol}", markup=False)
    for split, values in latents.items():
        mean, std = np.array(values["mean"]), np.array(values["std_of_samples"])
        console.print(
            f"latents, {split}: {len(mean)} channels, {values['frames']} frames, "
            f"mean {mean.min():+.3f}..{mean.max():+.3f}, std of samples {std.min():.3f}..{std.max():.3f}"
        )
    return EXIT_OK


def verify(folder: str) -> int:
    """Check the whole corpus; exit code 2 when anything is wrong."""
    from ttmray.corpus.verify import problems

    run = _open(folder)
    count = 0
    for line in problems(run):
        count += 1
        console.print(line, style="red")
    if count:
        console.print(f"{run}: {count} problems", markup=False)
        console.print(f"  {shards.mend(run)}", markup=False)
        return EXIT_BAD_INPUT
    rows = index.read_index(run, ["status"])
    clips = pc.sum(pc.equal(rows["status"], OK)).as_py() or 0
    console.print(
        f"{run}: {len(index.committed_units(run))} units, {rows.num_rows} rows, {clips} clips, no problems",
        markup=False,
    )
    return EXIT_OK


def upgrade(folder: str) -> int:
    """Have the index of a run by an older version say where latents and text features lie; returns the exit code."""
    from ttmray.corpus.upgrade import upgrade as add_places

    run = _open(folder)
    count = add_places(run)
    console.print(f"{run.path(index.MERGED)} says where all clips lie, {count} of them since now", markup=False)
    return EXIT_OK


def ls(folder: str, status: str | None, limit: int, json: bool, columns: str | None = None) -> int:
    """Print rows of the index.

    Args:
        columns: names with commas between them, of the index or of tables of scores; default: some, and all in JSON.

    Raises:
        UserError: a column that the run does not have.
    """
    run = _open(folder)
    table = index.read_index(run)
    names = [name.strip() for name in columns.split(",")] if columns else list(LISTED)
    others = [name for name in names if name not in table.column_names]
    known = [*table.column_names, *(name for name in score_columns(run) if "/" in name)] if others else []
    if unknown := [name for name in others if name not in known]:
        raise UserError(
            f"{run} has no column {unknown[0]!r}. It has: {', '.join(known)}.",
            "Take some of them. A head of yours adds columns: ttmray corpus rescore RUN --head HEAD --name NAME",
        )
    table = with_columns(run, table, others)
    if status:
        table = table.filter(pc.equal(table["status"], status))
    shown = table.slice(0, limit) if limit else table
    if json:
        for row in (shown.select(names) if columns else shown).to_pylist():
            console.print(_json(row), markup=False)
        return EXIT_OK
    printed = Table(*names)
    for row in shown.select(names).to_pylist():
        printed.add_row(*(f"{v:+.3f}" if isinstance(v, float) else str(v or "") for v in row.values()))
    console.print(printed)
    console.print(f"{shown.num_rows} of {table.num_rows} rows")
    return EXIT_OK


def _json(row: dict[str, object]) -> str:
    return json.dumps(row, ensure_ascii=False)


def _refuse_strangers(target: Path) -> None:
    """
    Raises:
        UserError: a folder that holds anything but a page and its clips, such as a run with a page of its own.
    """
    if target.is_file():
        raise UserError(f"--out {target} is a file.", "Name a new folder.")
    others = [path.name for path in sorted(target.glob("*")) if path.name != "index.html" and path.suffix != ".flac"]
    if others:
        raise UserError(f"--out {target} holds something else: {others[0]}.", "Name a new folder.")


def sample(folder: str, n: int, seed: int, out: str) -> int:
    """Write a page with `n` random ok clips, cut from their sources again, beside captions and scores.

    The page is for ears: a caption that belongs to another song is found in seconds by listening.

    Raises:
        UserError: no run of this kind, none of its clips is ok, none is asked for, or `out` holds something else.
    """
    if n < 1:
        raise UserError(f"-n is {n}, but a page needs at least one clip.", "Give 1 or more.")
    run, target = _open(folder), Path(out)
    _refuse_strangers(target)
    described = read(run, "corpus")
    config = CorpusConfig.model_validate(described["config"])
    table = index.read_index(run)
    table = table.filter(pc.equal(table["status"], OK))
    if not table.num_rows:
        raise UserError(f"{run} has no ok clips yet.")
    others = [f"{name}/{column}" for name in table_names(run) for column in REWARDS[:2]]
    table = with_columns(run, table, others)
    root = Folder(Plan.load(run).root)
    chosen = sorted(np.random.default_rng(seed).permutation(table.num_rows)[:n].tolist())
    target.mkdir(parents=True, exist_ok=True)
    clips = []
    for row in table.take(chosen).to_pylist():
        if not root.exists(row["source"]):
            raise UserError(
                f"{root.path(row['source'])} is not there: clips of the page are cut from the songs, which a corpus "
                "does not hold.",
                "Run it where the songs are.",
            )
        with root.open(row["source"]) as file:
            audio, rate = audio_io.decode(file, AudioLimits(min_duration_s=0.0), row["source"])
        start = round(row["start_s"] * rate)
        clip = segment.cut(audio, rate, start, start + round(config.segments.clip_s * rate))
        name = safe_relative(f"{row['key']}.flac")
        audio_io.write_audio(str(target / name), clip, rate, "flac")
        clips.append(row | {"file": name})
    text = pages.render(
        "sample.html.j2",
        title=f"{len(clips)} clips of {run.name}",
        protocols=protocols(run),
        note=described["note"],
        clips=clips,
        columns=["reward_score", "instrumental_reward_score", *others, "clap_score", "vocal_ratio", "lufs"],
    )
    (target / "index.html").write_text(text, encoding="utf-8")
    console.print(f"{len(clips)} clips: open {target / 'index.html'}", markup=False)
    return EXIT_OK
