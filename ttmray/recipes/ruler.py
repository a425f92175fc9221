"""How well a bundle's reward ranks true quality: `ttmray synth check`.

Songs of the small world have a quality that is known, so a reward can be held against it. Three questions:

- of clips as they come, with faults of all kinds: does the reward rise with true quality?
- of one piece with a single fault, weak to strong: does it fall? A fault that the reward
  does not hear leaves it as it is.
- of one piece with and without its voice: does it prefer singing? True quality does not.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.table import Table

from ttmray import pages
from ttmray.console import console, meter
from ttmray.errors import EXIT_OK, UserError
from ttmray.models import one_thread
from ttmray.models.bundle import open_bundle
from ttmray.models.loading import LoadOptions
from ttmray.models.scoring import Scorer
from ttmray.recipes.floors import rewards_of
from ttmray.statistics import Correlation, spearman
from ttmray.storage import Folder
from ttmray.synth.faults import KINDS
from ttmray.synth.world import clip

STRENGTHS = (0.0, 0.35, 0.7, 1.0)
RESULT = "ruler.json"
HEADER = ("fault", "heard", "clean above worst", "fall in standard deviations", "true cost")


@dataclass(frozen=True)
class FaultRow:
    """How a reward hears a kind of fault.

    Attributes:
        heard: mean over the pieces of minus Spearman's correlation of strength and reward: 1 where every step makes the
            reward fall, 0 where it does not care.
        told: share of the pieces whose clean clip has a higher reward than the one with the fault at full strength.
        fall: mean fall of the reward from clean to full strength, in standard deviations of the reward over clips as
            they come.
        cost: fall of true quality from clean to full strength.
    """

    kind: str
    heard: float
    told: float
    fall: float
    cost: float


@dataclass(frozen=True)
class Ruler:
    """`ttmray synth check` of a bundle.

    Attributes:
        quality: Spearman's correlation of reward and true quality over clips as they come, with its interval.
        reward_std: of those clips' rewards.
        vocal_bias: mean difference of the reward with and without the voice of the same clip, in `reward_std`; None
            where no clip sings.
    """

    bundle: str
    protocol: str
    note: str
    seed: int
    pieces: int
    seconds: float
    quality: Correlation
    reward_std: float
    vocal_bias: float | None
    faults: tuple[FaultRow, ...]


def check_bundle(
    bundle: str,
    *,
    pieces: int = 24,
    seed: int = 99,
    kinds: Sequence[str] | None = None,
    device: str = "auto",
    out: str | None = None,
) -> int:
    """Measure a bundle's reward against true quality, print the table, and write it to a folder if there is one.

    Args:
        bundle: name, folder, or either with another head (`paper+runs/ranker`).
        pieces: songs per kind of fault; three times as many clips are drawn as they come.
        seed: of the songs; another one than a bundle was trained on.
        kinds: of faults; default: all.

    Raises:
        UserError: too few pieces, an unknown fault, or the bundle's weights are not there.
    """
    result = measure(bundle, pieces, seed, kinds or tuple(KINDS), device)
    console.print(_table(result))
    console.print(_summary(result), markup=False)
    if result.note:
        console.print(result.note, style="yellow")
    if out is not None:
        target = Folder.at(out)
        target.write(RESULT, json.dumps(asdict(result), indent=1).encode())
        target.write("ruler.md", _page(result).encode())
        console.print(f"wrote {target.path('ruler.md')}", markup=False)
    return EXIT_OK


def measure(name: str, pieces: int, seed: int, kinds: Sequence[str], device: str = "auto") -> Ruler:
    """The numbers of `check_bundle`.

    Raises:
        UserError: see `check_bundle`.
    """
    if pieces < 4:
        raise UserError(f"--pieces is {pieces}, too few to correlate anything.", "Give 4 or more.")
    unknown = set(kinds) - set(KINDS)
    if unknown:
        raise UserError(f"--fault {min(unknown)}: there is no such fault.", f"Known: {', '.join(KINDS)}.")
    bundle = open_bundle(name)
    protocol = bundle.protocol("empty")
    scorer = Scorer(bundle.load(Scorer.roles, LoadOptions(device=device)), protocol)
    one_thread()
    seconds = min(bundle.clip_s, 10.0)
    with meter("clips scored", pieces * (3 + len(kinds) * len(STRENGTHS) + 1)) as progress:

        def rewards(waves: Iterator[np.ndarray]) -> np.ndarray:
            scores = []
            for wave in waves:
                scores.append(float(rewards_of(scorer, [wave])[0]))
                progress.advance(1)
            return np.array(scores)

        drawn = [clip(seed, index, seconds) for index in range(3 * pieces)]
        natural = rewards(item.mix.mean(axis=0) for item in drawn)
        std = float(natural.std(ddof=1))
        quality = spearman(natural, np.array([item.quality for item in drawn]))
        singing = [item for item in drawn if item.heard.voice][:pieces]
        silenced = rewards((item.mix - item.stems["vocals"]).mean(axis=0) for item in singing)
        sung = natural[[i for i, item in enumerate(drawn) if item.heard.voice][:pieces]]
        rows = []
        for kind in kinds:
            steps = [
                rewards(clip(seed, index, seconds, faults={kind: strength} if strength else {}).mix.mean(axis=0)
                        for strength in STRENGTHS)
                for index in range(pieces)
            ]  # fmt: skip
            rows.append(_fault_row(kind, np.stack(steps), std))
    return Ruler(
        bundle=bundle.name,
        protocol=f"{bundle.name}/{protocol.id()}",
        note=bundle.note,
        seed=seed,
        pieces=pieces,
        seconds=seconds,
        quality=quality,
        reward_std=std,
        vocal_bias=float((sung - silenced).mean()) / std if len(singing) else None,
        faults=tuple(rows),
    )


def _fault_row(kind: str, scores: np.ndarray, std: float) -> FaultRow:
    """`scores` (pieces, strengths) of one fault."""
    strength = np.arange(scores.shape[1], dtype=float)
    heard = [_rank_correlation(strength, row) for row in scores]
    fall = scores[:, 0] - scores[:, -1]
    return FaultRow(kind, -float(np.mean(heard)), float((fall > 0).mean()), float(fall.mean()) / std, KINDS[kind].cost)


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's, 0 where a side is constant."""
    return spearman(a, b).rho if np.ptp(b) > 0 else 0.0


def _summary(ruler: Ruler) -> str:
    lines = [
        f"reward against true quality of {3 * ruler.pieces} clips of {ruler.seconds:g} s: Spearman "
        f"{ruler.quality.rho:.2f}{_interval(ruler.quality)}"
    ]
    if ruler.vocal_bias is not None:
        lines.append(f"the same clips with and without their voice: {ruler.vocal_bias:+.2f} standard deviations")
    missed = [row.kind for row in ruler.faults if row.heard < 0.3]
    lines.append(f"faults that it hardly hears: {', '.join(missed) or 'none'}")
    lines.append(f"scores by {ruler.protocol}")
    return "\n".join(lines)


def _interval(of: Correlation) -> str:
    return "" if of.low is None or of.high is None else f" ({of.low:.2f} to {of.high:.2f})"


def rows_of(ruler: Ruler) -> list[Sequence[Any]]:
    """Cells of the table by kind of fault, best heard first."""
    ordered = sorted(ruler.faults, key=lambda row: -row.heard)
    return [(r.kind, f"{r.heard:+.2f}", f"{r.told:.0%}", f"{r.fall:+.2f}", f"{r.cost:.2f}") for r in ordered]


def _page(ruler: Ruler) -> str:
    strengths = ", ".join(f"{strength:g}" for strength in STRENGTHS)
    return pages.render(
        "ruler.md.j2",
        ruler=ruler,
        summary=_summary(ruler).splitlines(),
        header=HEADER,
        rows=rows_of(ruler),
        strengths=strengths,
    )


def _table(ruler: Ruler) -> Table:
    table = Table(*HEADER, title=f"the quality ruler: {ruler.bundle}")
    for row in rows_of(ruler):
        table.add_row(*row)
    return table
