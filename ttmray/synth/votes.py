"""Made-up votes about the clips of a corpus, for demos and tests of the ranker.

    python -m ttmray.synth.votes RUN TABLE.csv [--count N] [--prefer COLUMN] [--seed S]

A made-up listener prefers the clip with the higher `reward_score`, or more of another number of the index, but for
chance: P(a) = sigmoid(4 * difference / sd of all).

    python -m ttmray.synth.votes RUN TABLE.csv --world WORLD/world.parquet [--held-out] [--vocal-bias X] ...

Of a corpus of synthetic songs the listeners are those of `ttmray.synth.listeners`, who know the true quality of what
they hear and like singing.
"""

import argparse
import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ttmray import runs
from ttmray.console import console
from ttmray.corpus import index
from ttmray.corpus.scores import require_column, with_columns
from ttmray.errors import UserError, run_program
from ttmray.storage import Folder, read_parquet, split_path
from ttmray.synth.composer import compose
from ttmray.synth.listeners import COLUMNS, Heard, Listeners, best_accuracy, votes

CERTAINTY = 4.0
TIE = 0.05
"""A difference of less than this many standard deviations is a tie."""
PANEL = ("certainty", "vocal_bias", "tie_width", "lapse")
"""What can be said of the listeners, see `Listeners`."""


def draw_votes(keys: list[str], rewards: np.ndarray, count: int, seed: int) -> list[dict[str, str]]:
    """Rows `a`, `b`, `label` about random pairs of different ones of n clips, with rewards (n,).

    Raises:
        UserError: fewer than two clips, or rewards that are all equal.
    """
    spread = float(np.std(rewards)) if len(rewards) else 0.0
    if len(keys) < 2 or spread == 0:
        raise UserError(f"{len(keys)} clips with a reward spread of {spread:g} give no votes.", "Score more songs.")
    draw = np.random.default_rng(seed)
    votes = []
    for _ in range(count):
        a, b = draw.choice(len(keys), 2, replace=False)
        gap = (rewards[a] - rewards[b]) / spread
        label = "a" if draw.random() < 1 / (1 + np.exp(-CERTAINTY * gap)) else "b"
        votes.append({"a": keys[a], "b": keys[b], "label": "tie" if abs(gap) < TIE else label})
    return votes


def heard_clips(rows: Sequence[Mapping[str, Any]], world: Sequence[Mapping[str, Any]]) -> list[Heard]:
    """What listeners judge, of clips of a corpus of synthetic songs.

    Args:
        rows: of the index of the corpus, ok ones.
        world: of the `world.parquet` of its songs.

    Raises:
        UserError: a clip is of no song of the table.
    """
    songs = {row["path"].removeprefix("songs/"): row for row in world}
    clips = []
    for row in rows:
        if (song := songs.get(row["source"])) is None:
            raise UserError(f"{row['source']} is no song of that world.", "Name the world.parquet of the corpus.")
        sings = bool(song["voice"])
        if row["duration_s"] < song["seconds"] - 0.1:  # a part, in which the voice of the song may be silent
            piece = compose(song["seed"], song["index"])
            if song["start_s"] == 0 and piece.seconds != song["seconds"]:  # a whole one of another length
                piece = compose(song["seed"], song["index"], seconds=song["seconds"])
            sings = bool(piece.heard(song["start_s"] + row["start_s"], row["duration_s"]).voice)
        clips.append(Heard(row["key"], song["quality"], sings, row["caption"] or ""))
    return clips


def main(arguments: list[str] | None = None) -> int:
    """Write the table that the command names; returns the exit code.

    Raises:
        UserError: an argument that makes no sense, or a run that is no corpus or lacks the column.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder of the corpus job")
    parser.add_argument("table", help="CSV file to write")
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument(
        "--prefer", default="reward_score", metavar="COLUMN", help="score column (default reward_score)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--world", metavar="TABLE", help="world.parquet of the songs: listeners know their quality")
    parser.add_argument("--held-out", action="store_true", help="with --world: only clips of validation and test")
    for name in PANEL:
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=getattr(Listeners(), name))
    options = parser.parse_args(arguments)
    if options.count < 1:
        raise UserError(f"--count is {options.count}, but a table needs at least one vote.", "Give 1 or more.")
    runs.read(Folder.at(options.run), "corpus")
    run = Folder.at(options.run)
    if options.world is not None:
        return _listen(run, options)
    table = with_columns(run, index.read_index(run), [options.prefer])
    require_column(run, options.prefer)  # one of text is no score
    rows = [row for row in table.to_pylist() if row["status"] == "ok" and row[options.prefer] is not None]
    rewards = np.array([row[options.prefer] for row in rows], np.float64)
    drawn = draw_votes([row["key"] for row in rows], rewards, options.count, options.seed)
    _write(options.table, ["a", "b", "label"], drawn)
    console.print(f"{len(drawn)} votes about {len(rows)} clips: {options.table}")
    return 0


def _listen(run: Folder, options: argparse.Namespace) -> int:
    """Votes of listeners who know the truth."""
    splits = ("validation", "test") if options.held_out else ("train", "validation", "test")
    rows = [row for row in index.read_index(run).to_pylist() if row["status"] == "ok" and row["split"] in splits]
    clips = heard_clips(rows, read_parquet(options.world).to_pylist())
    try:
        panel = Listeners(**{name: getattr(options, name) for name in PANEL})
    except ValueError as error:
        raise UserError(str(error), "certainty is above 0, tie-width at least 0, lapse from 0 to 1.") from error
    drawn = votes(clips, options.count, options.seed, panel)
    _write(options.table, COLUMNS, drawn)
    best = best_accuracy(clips, panel)
    console.print(f"{len(drawn)} votes about {len(clips)} clips: {options.table}")
    console.print(
        f"best possible accuracy: {best.knowing_all:.3f}; knowing true quality alone: {best.knowing_quality:.3f}"
    )
    return 0


def _write(table: str, columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    folder, name = split_path(table)
    folder.write(name, text.getvalue().encode())


if __name__ == "__main__":
    run_program(main)
