"""Simulated listeners: votes A, B or tie about clips of known quality.

    python -m ttmray.synth.listeners WORLD/world.parquet VOTES.csv --count 2000

A listener hears the worth of a clip,

    worth = quality + vocal_bias (if it sings) + fit of prompt and clip (where the prompt is shown) + own taste,

compares two clips with logistic noise (Bradley and Terry, "Rank Analysis of Incomplete Block Designs", 1952),
P(a) = sigmoid(certainty x (worth_a - worth_b)), says `tie` where what they hear differs by less than `tie_width`, leans
towards the clip on the left by `left_bias`, and now and then (`lapse`) answers anything. With ties, a vote is drawn as
difference + logistic noise against -tie_width and +tie_width, the model of Rao and Kupper, "Ties in Paired-Comparison
Experiments", JASA 62, 1967.

The vocal bias is small and on purpose: real listeners, and so rewards that learn from them, rate clips with singing
higher (reported for TuneJury: +0.98 with vocals asked for, +0.54 for instrumental music). 0.15 is a quarter of the
standard deviation of quality: enough to be seen in a few thousand votes, too little to decide most of them.
"""

import argparse
import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ttmray.console import console
from ttmray.errors import UserError, run_program
from ttmray.storage import read_parquet, split_path

COLUMNS = ("id", "a", "b", "prompt", "prompt_id", "label", "listener")

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Listeners:
    """A panel.

    Attributes:
        count: how many; each vote is by one of them.
        certainty: slope of the choice per unit of worth; the noise of a comparison has a standard deviation of
            pi / sqrt(3) / certainty.
        vocal_bias: worth that singing adds.
        taste: standard deviation over listeners of their vocal bias.
        left_bias: worth that being clip a adds.
        tie_width: difference below which they cannot choose, in worth.
        lapse: share of votes that are thrown at random between a and b.
        prompts: the prompt is shown; a clip that is not what was asked for loses `mismatch`.
    """

    count: int = 20
    certainty: float = 2.0
    vocal_bias: float = 0.15
    taste: float = 0.1
    left_bias: float = 0.0
    tie_width: float = 0.5
    lapse: float = 0.03
    prompts: bool = False
    mismatch: float = 0.5

    def __post_init__(self) -> None:
        if self.count < 1 or self.certainty <= 0 or self.tie_width < 0 or not 0 <= self.lapse <= 1:
            raise ValueError(f"no such listeners: {self}")


@dataclass(frozen=True)
class Heard:
    """What listeners judge. `caption` is what the clip was made for."""

    path: str
    quality: float
    sings: bool
    caption: str = ""


def worth(clips: Sequence[Heard], panel: Listeners) -> Floats:
    """Mean worth over the panel, before prompts: (clips,)."""
    return np.array([clip.quality + panel.vocal_bias * clip.sings for clip in clips])


def chances(difference: Floats, panel: Listeners) -> tuple[Floats, Floats, Floats]:
    """Probabilities of a, tie and b for differences of worth (a - b) of any shape, lapses and lean included."""
    lean = np.asarray(difference, np.float64) + panel.left_bias
    a = _sigmoid(panel.certainty * (lean - panel.tie_width))
    b = _sigmoid(panel.certainty * (-lean - panel.tie_width))
    thrown = panel.lapse / 2
    return (1 - panel.lapse) * a + thrown, (1 - panel.lapse) * (1 - a - b), (1 - panel.lapse) * b + thrown


def votes(clips: Sequence[Heard], count: int, seed: int, panel: Listeners | None = None) -> list[dict[str, str]]:
    """Votes about random pairs, as rows that `jobs/train_ranker.py` reads.

    With prompts shown, each pair is judged against the caption of one of its two clips, and the other clip loses
    `mismatch` unless it has the same caption. Without, the cell `prompt` is empty.

    Raises:
        UserError: fewer than two clips.
    """
    panel = panel or Listeners()
    if len(clips) < 2:
        raise UserError(f"{len(clips)} clips give no votes.", "Make at least two.")
    rng = np.random.default_rng(seed)
    base = worth(clips, panel)
    tastes = rng.normal(0, panel.taste, panel.count)
    rows = []
    for number in range(count):
        a, b = (int(i) for i in rng.choice(len(clips), 2, replace=False))
        judge = int(rng.integers(panel.count))
        asked = clips[a if rng.random() < 0.5 else b].caption if panel.prompts else ""
        difference = base[a] - base[b] + tastes[judge] * (float(clips[a].sings) - float(clips[b].sings))
        if panel.prompts:
            difference += panel.mismatch * (float(clips[a].caption == asked) - float(clips[b].caption == asked))
        label = ("a", "tie", "b")[
            int(np.searchsorted(np.cumsum(chances(difference, panel))[:2], rng.random(), "right"))
        ]
        cells = (f"v{number:06d}", clips[a].path, clips[b].path, asked, asked, label, f"listener{judge:03d}")
        rows.append(dict(zip(COLUMNS, cells, strict=True)))
    return rows


@dataclass(frozen=True)
class Best:
    """Best possible accuracy on votes that are no ties.

    Attributes:
        knowing_all: of a judge who knows each clip's worth to the listeners, vocal bias included.
        knowing_quality: of a judge who knows true quality alone.
        ties: expected share of ties.
    """

    knowing_all: float
    knowing_quality: float
    ties: float


def best_accuracy(clips: Sequence[Heard], panel: Listeners, pairs: int = 200_000, seed: int = 0) -> Best:
    """Bayes accuracies for this panel over random pairs, with tastes averaged; prompts are left out of account."""
    rng = np.random.default_rng(seed)
    a = rng.integers(len(clips), size=pairs)
    b = (a + rng.integers(1, len(clips), size=pairs)) % len(clips)
    value, quality = worth(clips, panel), np.array([clip.quality for clip in clips])
    sings = np.array([float(clip.sings) for clip in clips])
    taste = rng.normal(0, panel.taste, pairs) * (sings[a] - sings[b])
    first, tie, second = chances(value[a] - value[b] + taste, panel)
    decided = float(np.sum(first + second))

    def accuracy(score: Floats) -> float:
        sure = np.sign(score[a] - score[b])
        return float(np.sum(np.where(sure > 0, first, np.where(sure < 0, second, (first + second) / 2))) / decided)

    return Best(accuracy(value), accuracy(quality), float(tie.mean()))


def vocal_bias(clips: Sequence[Heard], rows: Sequence[Mapping[str, str]], certainty: float) -> tuple[float, float]:
    """(estimate, standard error) of the vocal bias in units of quality, by logistic regression on decided votes.

    The votes' log odds are modelled as slope x difference in quality + lean x difference in singing + constant; ties
    are left out, and lapses pull slope and lean towards zero alike, so that the bias is their ratio.
    """
    known = {clip.path: clip for clip in clips}
    decided = [row for row in rows if row["label"] in ("a", "b")]
    pairs = [(known[row["a"]], known[row["b"]]) for row in decided]
    x = np.array([[a.quality - b.quality, float(a.sings) - float(b.sings), 1.0] for a, b in pairs])
    y = np.array([float(row["label"] == "a") for row in decided])
    beta = np.array([certainty, 0.0, 0.0])
    for _ in range(30):  # Newton's method
        p = _sigmoid(x @ beta)
        hessian = (x * (p * (1 - p))[:, None]).T @ x + 1e-6 * np.eye(3)
        step = np.linalg.solve(hessian, x.T @ (y - p))
        beta = beta + step
        if np.abs(step).max() < 1e-9:
            break
    error = float(np.sqrt(np.linalg.inv(hessian)[1, 1]))
    return float(beta[1] / beta[0]), error / float(beta[0])


def _sigmoid(x: Floats) -> Floats:
    return np.asarray(0.5 * (1 + np.tanh(0.5 * np.asarray(x, np.float64))))


def read_clips(table: str) -> list[Heard]:
    """The clips of a `world.parquet`.

    Raises:
        UserError: it is not there, or another table.
    """
    rows: list[dict[str, Any]] = read_parquet(table).to_pylist()
    try:
        return [Heard(row["path"], row["quality"], bool(row["voice"]), row["caption"]) for row in rows]
    except KeyError as error:
        raise UserError(f"{table} has no column {error}.", "Name the world.parquet of a small world.") from error


def main(argv: list[str] | None = None) -> int:
    """Write the table that the command names; returns the exit code.

    Raises:
        UserError: an argument that makes no sense, or what cannot be read or written.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", help="world.parquet of a small world")
    parser.add_argument("table", help="CSV file to write; put it beside world.parquet, or name the folder as `audio`")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompts", action="store_true", help="listeners see the prompt")
    for name in ("certainty", "vocal_bias", "left_bias", "tie_width", "lapse"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=getattr(Listeners(), name))
    arguments = parser.parse_args(argv)
    if arguments.count < 1:
        raise UserError(f"--count is {arguments.count}, but a table needs at least one vote.", "Give 1 or more.")
    names = ("certainty", "vocal_bias", "left_bias", "tie_width", "lapse", "prompts")
    try:
        panel = Listeners(**{name: getattr(arguments, name) for name in names})
    except ValueError as error:
        raise UserError(str(error), "certainty is above 0, tie-width at least 0, lapse from 0 to 1.") from error
    clips = read_clips(arguments.world)
    rows = votes(clips, arguments.count, arguments.seed, panel)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    folder, name = split_path(arguments.table)
    folder.write(name, text.getvalue().encode())
    best = best_accuracy(clips, panel)
    console.print(f"{len(rows)} votes about {len(clips)} clips: {arguments.table}")
    console.print(
        f"ties: {sum(row['label'] == 'tie' for row in rows) / len(rows):.3f} (expected {best.ties:.3f} without prompts)"
    )
    console.print(
        f"best possible accuracy: {best.knowing_all:.3f} knowing what listeners like, {best.knowing_quality:.3f} "
        "knowing true quality alone"
    )
    return 0


if __name__ == "__main__":
    run_program(main)
