"""Made-up votes about the clips of a corpus, for demos and tests of the ranker.

    python -m ttmray.synth.votes RUN TABLE.csv [--count N] [--prefer COLUMN] [--seed S]

A made-up listener prefers the clip with the higher `reward_score`, or more of another number of the index, but for
chance: P(a) = sigmoid(4 * difference / sd of all).
"""

import argparse
import csv
import io

import numpy as np

from ttmray import runs
from ttmray.corpus import index
from ttmray.corpus.scores import require_column, with_columns
from ttmray.errors import UserError, run_program
from ttmray.storage import Folder, split_path

CERTAINTY = 4.0
TIE = 0.05
"""A difference of less than this many standard deviations is a tie."""


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
    options = parser.parse_args(arguments)
    if options.count < 1:
        raise UserError(f"--count is {options.count}, but a table needs at least one vote.", "Give 1 or more.")
    runs.read(Folder.at(options.run), "corpus")
    run = Folder.at(options.run)
    table = with_columns(run, index.read_index(run), [options.prefer])
    require_column(run, options.prefer)  # one of text is no score
    rows = [row for row in table.to_pylist() if row["status"] == "ok" and row[options.prefer] is not None]
    rewards = np.array([row[options.prefer] for row in rows], np.float64)
    votes = draw_votes([row["key"] for row in rows], rewards, options.count, options.seed)
    text = io.StringIO()
    writer = csv.DictWriter(text, ["a", "b", "label"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(votes)
    folder, name = split_path(options.table)
    folder.write(name, text.getvalue().encode())
    print(f"{len(votes)} votes about {len(rows)} clips: {options.table}")
    return 0


if __name__ == "__main__":
    run_program(main)
