"""Which findings of the paper hold in the small world: from the tables of several runs of the chain, one per seed.

`ttmray findings RUN ...` reads what `tables` of `configs/micro/reproduce.yaml` wrote. An effect is a mean difference of
two cells on the same prompts, paired over prompts and seeds, with an interval over both
(`statistics.crossed_interval`). What counts as little is `MARGIN` standard deviations of clips, for rewards and true
quality alike. True quality is estimated from audio (`ttmray.synth.measures`).
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from ttmray import __version__, pages
from ttmray.console import console
from ttmray.errors import EXIT_OK, UserError
from ttmray.evaluation.compare import ClipScore, prompt_means
from ttmray.evaluation.results import QUALITY, read_clips, read_results
from ttmray.statistics import crossed_interval, pearson
from ttmray.storage import Folder

MARGIN = 0.2
"""Standard deviations over clips: a small effect (Cohen 1988)."""
METRICS = ("reward", QUALITY, "clap_score", "vocal_ratio")
NAMES = {"reward": "reward", QUALITY: "estimated quality", "clap_score": "CLAP score", "vocal_ratio": "vocals"}
Verdict = Literal["holds", "does not hold", "cannot be told"]
Row = tuple[str, ...]
"""Table and row, as `cells.json` has them; of tables of scores the score, too."""
STEPS: tuple[tuple[str, Row, Row], ...] = (
    ("conditioning on the score", ("chain", "SFT (v1)"), ("chain", "text only")),
    ("expert iteration against its control", ("chain", "+ expert iteration"), ("chain", "control")),
    ("expert iteration against Stage 1", ("chain", "+ expert iteration"), ("chain", "SFT (v1)")),
    ("CRPO", ("chain", "Sub.1"), ("chain", "+ v1 to v2")),
)
"""Steps of the chain at which reward and true quality are compared: name, after, before."""


@dataclass(frozen=True)
class Seed:
    """One run: cell -> metric -> prompt -> mean over samples; row -> cell; and the deviations of single clips.

    Attributes:
        deviations: (cell, metric) -> standard deviation over clips.
        heads: head -> its input scores, ascending.
    """

    name: str
    scores: Mapping[str, Mapping[str, Mapping[str, float]]]
    rows: Mapping[Row, str]
    deviations: Mapping[tuple[str, str], float]
    about: Mapping[str, str] = field(default_factory=dict)

    def of(self, row: Row, metric: str) -> Mapping[str, float]:
        """Prompt -> score of a row; empty where there is none."""
        return self.scores.get(self.rows.get(row, ""), {}).get(metric, {})


@dataclass(frozen=True)
class Effect:
    """A mean difference, with its interval over prompts and seeds; over prompts alone where there is one seed.

    Attributes:
        unit: standard deviation of clips, by which reward and quality can be compared.
        by_seed: mean difference of each seed.
    """

    name: str
    metric: str
    value: float
    low: float
    high: float
    unit: float
    prompts: int
    by_seed: Mapping[str, float]

    @property
    def rises(self) -> bool:
        return self.low > 0

    @property
    def falls(self) -> bool:
        return self.high < 0

    @property
    def little(self) -> bool:
        """Within the margin, with all of its interval."""
        return -MARGIN * self.unit < self.low and self.high < MARGIN * self.unit

    def __str__(self) -> str:
        return f"{NAMES[self.metric]} {self.value:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


@dataclass(frozen=True)
class Finding:
    """A claim of the paper, what the runs say about it, and why."""

    letter: str
    claim: str
    verdict: Verdict
    why: str
    effects: tuple[Effect, ...] = ()


def findings(runs: Sequence[str], *, out: str | None = None) -> int:
    """Print the table of findings, and write it with everything that it is made of to `out`.

    Args:
        runs: run folders of the chain with the step `tables`, or of `ttmray ablate`, one per seed.
        out: folder for `findings.md`, `findings.json` and `per_prompt.csv`.

    Raises:
        UserError: a folder without tables, the same one twice, or runs whose scores are not on one scale.
    """
    seeds = [read_seed(run) for run in runs]
    twice = [one.name for i, one in enumerate(seeds) if one.name in [other.name for other in seeds[:i]]]
    if twice:
        raise UserError(f"{twice[0]} is there twice.", "Name every run once, each with a seed of its own.")
    results = all_findings(seeds)
    text = page(results, seeds)
    console.print(text, markup=False)
    if out is not None:
        folder = Folder.at(out)
        folder.write("findings.md", text.encode())
        facts: dict[str, Any] = {
            "version": __version__,
            "runs": [dict(seed.about) | {"run": seed.name} for seed in seeds],
        }
        facts |= {"margin": MARGIN, "findings": [asdict(one) for one in results]}
        folder.write("findings.json", json.dumps(facts, indent=1).encode())
        folder.write("per_prompt.csv", per_prompt(seeds).encode())
    return EXIT_OK


def read_seed(run: str) -> Seed:
    """The cells of a run.

    Raises:
        UserError: it has no tables, or an evaluation is damaged.
    """
    root = Folder.at(run)
    tables = root.sub("tables") if root.exists("tables/cells.json") else root
    if not tables.exists("cells.json"):
        raise UserError(f"{run} has no tables: cells.json is missing.", "Run the chain with its section `tables`.")
    listed: dict[str, dict[str, Any]] = json.loads(tables.read("cells.json"))
    rows: dict[Row, str] = {}
    for table, cells in listed.items():
        for name, cell in cells.items():
            of_scores = cell if isinstance(cell, dict) else {None: cell}
            for score, one in of_scores.items():
                rows[(table, name) if score is None else (table, name, score)] = one
    scores, deviations, about = {}, {}, {}
    for cell in dict.fromkeys(rows.values()):
        folder = tables.sub(f"cells/{cell}/evaluation")
        results = read_results(folder)
        clips = [row for row in read_clips(folder, results) if row["status"] == "ok"]
        values = [
            ClipScore(cell, row["prompt_id"], metric, row[metric])
            for row in clips
            for metric in METRICS
            if row.get(metric) is not None
        ]
        scores[cell] = {metric: means for (metric, _), means in prompt_means(values).items()}
        for metric in scores[cell]:
            of_metric = [one.value for one in values if one.metric == metric]
            deviations[cell, metric] = float(np.std(of_metric, ddof=1)) if len(of_metric) > 1 else 0.0
        about = {"protocol": results.protocol, "created": results.created}
    return Seed(root.name, scores, rows, deviations, about)


def effect(seeds: Sequence[Seed], name: str, metric: str, after: Row, before: Row) -> Effect | None:
    """The difference of two rows on the prompts that both have in every seed; None where a seed lacks one."""
    sides = [(seed.of(after, metric), seed.of(before, metric)) for seed in seeds]
    common = sorted(set.intersection(*(set(a) & set(b) for a, b in sides))) if sides else []
    if len(common) < 2:
        return None
    table = np.array([[a[one] - b[one] for a, b in sides] for one in common])
    low, high = crossed_interval(table) or (-np.inf, np.inf)
    units = [seed.deviations[seed.rows[before], metric] for seed in seeds]
    by_seed = dict(zip([seed.name for seed in seeds], table.mean(axis=0).tolist(), strict=True))
    return Effect(name, metric, float(table.mean()), low, high, float(np.mean(units)), len(common), by_seed)


def all_findings(seeds: Sequence[Seed]) -> list[Finding]:
    """(a) to (f)."""
    return [steers(seeds), experts(seeds), crosses(seeds), vocals(seeds), preference(seeds), hacking(seeds)]


def steers(seeds: Sequence[Seed]) -> Finding:
    """(a): in every head the reward at the highest input score is above that at the lowest, and the correlation of
    input score and reward is positive in every seed."""
    claim = "Conditioning on the score steers: Score-r and Δout are positive"
    effects, lines, verdicts = [], [], []
    for head, scores in _heads(seeds).items():
        low, high = ("heads", head, scores[0]), ("heads", head, scores[-1])
        moved = effect(seeds, f"{head}, s = {scores[0]} to {scores[-1]}", "reward", high, low)
        if moved is None:
            continue
        quality = effect(seeds, moved.name, QUALITY, high, low)
        effects += [moved, *([quality] if quality else [])]
        follow = [_correlation(seed, head, scores) for seed in seeds]
        positive = all(r is not None and r > 0 for r in follow)
        verdicts.append("does not hold" if moved.falls else "holds" if moved.rises and positive else "cannot be told")
        shown = ", ".join("–" if r is None else f"{r:+.2f}" for r in follow)
        lines.append(f"{head}: {moved}{f', {quality}' if quality else ''}; Score-r by seed {shown}")
    return Finding(
        "a", claim, _all(verdicts), "; ".join(lines) or _missing("heads with several scores"), tuple(effects)
    )


def experts(seeds: Sequence[Seed]) -> Finding:
    """(b): above the control in the reward and in true quality."""
    claim = "Expert iteration beats its control in reward and in true quality"
    some = _effects(seeds, STEPS[1:2], ("reward", QUALITY))
    if len(some) < 2:
        return Finding("b", claim, "cannot be told", _missing("both metrics of + expert iteration and control"), some)
    verdict: Verdict = "cannot be told"
    if all(one.rises for one in some):
        verdict = "holds"
    elif any(one.falls or one.high < MARGIN * one.unit for one in some):
        verdict = "does not hold"
    return Finding("b", claim, verdict, "; ".join(map(str, some)), some)


def crosses(seeds: Sequence[Seed]) -> Finding:
    """(c): v1 weights in the v2 forward lose less than the margin, v2 weights in the v1 forward more."""
    claim = "v1 weights in the v2 forward are benign, v2 weights in the v1 forward collapse"
    pairs = [
        ("SFT-only v1 in v2", ("factorial", "SFT-only v1 v2"), ("factorial", "SFT-only v1 v1")),
        ("Chain-end v1 in v2", ("factorial", "Chain-end v1 v2"), ("factorial", "Chain-end v1 v1")),
        ("SFT-only v2 in v1", ("factorial", "SFT-only v2 v1"), ("factorial", "SFT-only v2 v2")),
    ]
    benign, collapse = _effects(seeds, pairs[:2], ("reward", QUALITY)), _effects(seeds, pairs[2:], ("reward", QUALITY))
    if not benign or not collapse:
        return Finding("c", claim, "cannot be told", _missing("the crossed cells of the factorial"), benign + collapse)
    stays = _all([_above(one, -MARGIN * one.unit) for one in benign])
    falls = _all([_above(one, -MARGIN * one.unit, below=True) for one in collapse])
    first = f'v1 in v2, "benign": {stays} ({_listed(benign)})'
    why = f'{first}; v2 in v1, "collapses": {falls} ({_listed(collapse)})'
    return Finding("c", claim, _all([stays, falls]), why, benign + collapse)


def vocals(seeds: Sequence[Seed]) -> Finding:
    """(d): more vocals where the rewards of the training were those of the full mix."""
    claim = "Rewards of the full mix as condition insert vocals"
    pair = ("full mix against instrumental", ("rewards", "full mix"), ("rewards", "instrumental"))
    some = _effects(seeds, [pair], ("vocal_ratio", "reward", QUALITY))
    heard = [one for one in some if one.metric == "vocal_ratio"]
    if not heard:
        why = "a run without a separator has no instrumentals, hence no contrast `rewards` with clip metric `vocals`"
        return Finding("d", claim, "cannot be told", why, some)
    verdict: Verdict = "holds" if heard[0].rises else "cannot be told"
    if heard[0].high < MARGIN * heard[0].unit:
        verdict = "does not hold"
    return Finding("d", claim, verdict, _listed(some), some)


def preference(seeds: Sequence[Seed]) -> Finding:
    """(e): what CRPO changes lies within the margin, in the reward and in true quality."""
    claim = "CRPO adds little"
    some = _effects(seeds, STEPS[3:], ("reward", QUALITY))
    if not some:
        return Finding("e", claim, "cannot be told", _missing("Sub.1 and + v1 to v2"), some)
    verdict: Verdict = "cannot be told"
    if all(one.little for one in some):
        verdict = "holds"
    elif any(one.low > MARGIN * one.unit or one.high < -MARGIN * one.unit for one in some):
        verdict = "does not hold"
    return Finding("e", claim, verdict, _listed(some), some)


def hacking(seeds: Sequence[Seed]) -> Finding:
    """(f): steps at which the reward rises and true quality does not: the whole interval of its change lies below the
    margin."""
    claim = "Somewhere the reward rises and true quality does not"
    places = [*STEPS, *_past_training(seeds)]
    lines, effects, hacked, open_questions = [], [], [], []
    for name, after, before in places:
        reward, quality = (effect(seeds, name, metric, after, before) for metric in ("reward", QUALITY))
        if reward is None or quality is None:
            continue
        effects += [reward, quality]
        if not reward.rises or reward.little:
            lines.append(f"{name}: no rise of the reward is shown ({reward})")
        elif quality.high < MARGIN * quality.unit:
            hacked.append(name)
            lines.append(f"{name}: reward alone ({reward}, {quality})")
        elif quality.rises:
            lines.append(f"{name}: both rise ({reward}, {quality})")
        else:
            open_questions.append(name)
            lines.append(f"{name}: quality open ({reward}, {quality})")
    if not effects:
        return Finding("f", claim, "cannot be told", _missing("steps with reward and estimated quality"))
    verdict: Verdict = "holds" if hacked else "cannot be told" if open_questions else "does not hold"
    return Finding("f", claim, verdict, "; ".join(lines), tuple(effects))


def _heads(seeds: Sequence[Seed]) -> dict[str, list[str]]:
    """Head -> input scores in order that all seeds have."""
    heads: dict[str, list[str]] = {}
    for row in dict.fromkeys(row for seed in seeds for row in seed.rows):
        if row[0] == "heads" and len(row) == 3 and all(row in seed.rows for seed in seeds):
            heads.setdefault(row[1], []).append(row[2])
    return {head: sorted(scores, key=float) for head, scores in heads.items() if len(scores) > 1}


def _past_training(seeds: Sequence[Seed]) -> list[tuple[str, Row, Row]]:
    """Neighbouring scores of every curve of the sweep."""
    steps: list[tuple[str, Row, Row]] = []
    curves: dict[str, list[str]] = {}
    for row in dict.fromkeys(row for seed in seeds for row in seed.rows):
        if row[0] == "sweep" and len(row) == 3 and all(row in seed.rows for seed in seeds):
            curves.setdefault(row[1], []).append(row[2])
    for name, scores in curves.items():
        ordered = sorted(scores, key=float)
        for low, high in pairwise(ordered):
            steps.append((f"{name}, s = {low} to {high}", ("sweep", name, high), ("sweep", name, low)))
    return steps


def _correlation(seed: Seed, head: str, scores: Sequence[str]) -> float | None:
    points = [(float(score), value) for score in scores for value in seed.of(("heads", head, score), "reward").values()]
    if not points:
        return None
    x, y = np.array(points).T
    return pearson(x, y)


def _effects(
    seeds: Sequence[Seed], pairs: Sequence[tuple[str, Row, Row]], metrics: Sequence[str]
) -> tuple[Effect, ...]:
    some = [effect(seeds, name, metric, after, before) for name, after, before in pairs for metric in metrics]
    return tuple(one for one in some if one is not None)


def _above(one: Effect, edge: float, below: bool = False) -> Verdict:
    """Whether an effect lies above an edge, or below it, with all of its interval."""
    over, under = one.low > edge, one.high < edge
    yes, no = (under, over) if below else (over, under)
    return "holds" if yes else "does not hold" if no else "cannot be told"


def _all(verdicts: Sequence[str]) -> Verdict:
    if not verdicts or ("cannot be told" in verdicts and "does not hold" not in verdicts):
        return "cannot be told"
    return "does not hold" if "does not hold" in verdicts else "holds"


def _listed(some: Sequence[Effect]) -> str:
    return "; ".join(f"{one.name}: {one}" for one in some)


def _missing(what: str) -> str:
    return f"the runs have no {what}"


def page(results: Sequence[Finding], seeds: Sequence[Seed]) -> str:
    """The findings as Markdown."""
    effects = [
        (one.letter, e.name, NAMES[e.metric], f"{e.value:+.3f}", f"[{e.low:+.3f}, {e.high:+.3f}]",
         f"{e.value / e.unit:+.2f}" if e.unit else "–", ", ".join(f"{value:+.3f}" for value in e.by_seed.values()))
        for one in results
        for e in one.effects
    ]  # fmt: skip
    return pages.render(
        "findings.md.j2",
        findings=[(f"({one.letter})", one.claim, one.verdict, one.why) for one in results],
        effects=effects,
        seeds=[(seed.name, seed.about.get("protocol", ""), seed.about.get("created", "")) for seed in seeds],
        prompts=max((e.prompts for one in results for e in one.effects), default=0),
        margin=MARGIN,
    )


def per_prompt(seeds: Sequence[Seed]) -> str:
    """Every number behind the findings, as CSV: run, table, row, input score, prompt, metric, value."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("run", "table", "row", "score", "prompt_id", "metric", "value"))
    for seed in seeds:
        for row, cell in seed.rows.items():
            table, name, score = (*row, "")[:3]
            for metric, values in seed.scores[cell].items():
                writer.writerows(
                    (seed.name, table, name, score, prompt, metric, value) for prompt, value in values.items()
                )
    return text.getvalue()
