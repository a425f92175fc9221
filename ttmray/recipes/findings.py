"""Which findings of the paper hold in the small world: from the tables of several runs of the chain, one per seed.

`ttmray findings RUN ...` reads what `tables` of `configs/micro/reproduce.yaml` wrote, and decides on differences of
cells (`recipes/effects.py`). What counts as little is `MARGIN` standard deviations of clips. True quality is estimated
from audio (`ttmray.synth.measures`). A claim of which any part is missing in any run cannot be told.
"""

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from ttmray import __version__, pages
from ttmray.console import console
from ttmray.errors import EXIT_OK
from ttmray.evaluation.results import QUALITY
from ttmray.recipes.effects import GAP, MARGIN, NAMES, Effect, Pair, Seed, effect, read_seeds
from ttmray.statistics import pearson
from ttmray.storage import Folder
from ttmray.synth.captions import asks_for_a_voice

Verdict = Literal["holds", "does not hold", "cannot be told"]
BOTH = ("reward", QUALITY)
EXPERT, CONTROL, UNSELECTED = ("chain", "+ expert iteration"), ("chain", "control"), ("expert-iteration", "unselected")
STEPS: tuple[Pair, ...] = (
    ("conditioning on the score", ("chain", "SFT (v1)"), ("chain", "text only")),
    ("expert iteration against its control", EXPERT, CONTROL),
    ("expert iteration against Stage 1", EXPERT, ("chain", "SFT (v1)")),
    ("CRPO", ("chain", "Sub.1"), ("chain", "+ v1 to v2")),
)
"""Steps of the chain at which reward and true quality are compared."""
CHOOSING: Pair = ("the best of its own clips against as many by chance", EXPERT, UNSELECTED)


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
        UserError: a folder without tables, the same results twice, or runs with other prompts.
    """
    seeds = read_seeds(runs)
    results = all_findings(seeds)
    text = page(results, seeds)
    console.print(text, markup=False)
    if out is not None:
        folder = Folder.at(out)
        folder.write("findings.md", text.encode())
        facts: dict[str, Any] = {
            "version": __version__,
            "runs": [dict(seed.about) | {"run": seed.name, "learned": seed.learned} for seed in seeds],
        }
        facts |= {"margin": MARGIN, "findings": [asdict(one) for one in results]}
        folder.write("findings.json", json.dumps(facts, indent=1).encode())
        folder.write("per_prompt.csv", per_prompt(seeds).encode())
    return EXIT_OK


def all_findings(seeds: Sequence[Seed]) -> list[Finding]:
    """(a) to (f)."""
    return [steers(seeds), experts(seeds), crosses(seeds), vocals(seeds), preference(seeds), hacking(seeds)]


def steers(seeds: Sequence[Seed]) -> Finding:
    """(a): in every head the reward at the highest input score is above that at the lowest, and the correlation of
    input score and reward is positive in every seed."""
    claim = "Conditioning on the score steers: Score-r and Δout are positive"
    effects, lines, verdicts = [], [], []
    for head, scores in _heads(seeds).items():
        pair = (f"{head}, s = {scores[0]} to {scores[-1]}", ("heads", head, scores[-1]), ("heads", head, scores[0]))
        moved, quality = (effect(seeds, pair, metric) for metric in BOTH)
        if moved is None:
            return Finding("a", claim, "cannot be told", _missing(f"rewards of {head} at all scores"))
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
    """(b): above the control in the reward and in true quality. The control has no clips of its own; how much of the
    gain is that of choosing the best says the difference from as many clips by chance, where the runs have them."""
    claim = "Expert iteration beats its control in reward and in true quality"
    some, whole = _effects(seeds, STEPS[1:2], BOTH)
    if not whole:
        return Finding("b", claim, "cannot be told", _missing("both metrics of + expert iteration and control"), some)
    verdict: Verdict = "cannot be told"
    if all(one.rises for one in some):
        verdict = "holds"
    elif any(one.falls or one.high < MARGIN for one in some if not one.rises):
        verdict = "does not hold"
    chosen, _ = _effects(seeds, [CHOOSING], BOTH)
    why = f"{_listed(some)}; {_listed(chosen) or 'what choosing the best adds was not measured'}"
    return Finding("b", claim, verdict, why, some + chosen)


def crosses(seeds: Sequence[Seed]) -> Finding:
    """(c): v1 weights in the v2 forward lose less than the margin, v2 weights in the v1 forward more."""
    claim = "v1 weights in the v2 forward are benign, v2 weights in the v1 forward collapse"
    pairs: list[Pair] = [
        ("SFT-only v1 in v2", ("factorial", "SFT-only v1 v2"), ("factorial", "SFT-only v1 v1")),
        ("Chain-end v1 in v2", ("factorial", "Chain-end v1 v2"), ("factorial", "Chain-end v1 v1")),
        ("SFT-only v2 in v1", ("factorial", "SFT-only v2 v1"), ("factorial", "SFT-only v2 v2")),
    ]
    (benign, all_benign), (collapse, all_collapse) = _effects(seeds, pairs[:2], BOTH), _effects(seeds, pairs[2:], BOTH)
    if not all_benign or not all_collapse:
        return Finding("c", claim, "cannot be told", _missing("all crossed cells of the factorial"), benign + collapse)
    stays = _all([_above(one, -MARGIN) for one in benign])
    falls = _all([_above(one, -MARGIN, below=True) for one in collapse])
    first = f'v1 in v2, "benign": {stays} ({_listed(benign)})'
    why = f'{first}; v2 in v1, "collapses": {falls} ({_listed(collapse)})'
    return Finding("c", claim, _all([stays, falls]), why, benign + collapse)


def vocals(seeds: Sequence[Seed]) -> Finding:
    """(d): more vocals where the rewards of the training were those of the full mix, on prompts that ask for none."""
    claim = "Rewards of the full mix as condition insert vocals"
    pair: Pair = ("full mix against instrumental", ("rewards", "full mix"), ("rewards", "instrumental"))
    some, _ = _effects(seeds, [pair], ("vocal_ratio", *BOTH), only=lambda text: not asks_for_a_voice(text))
    heard = [one for one in some if one.metric == "vocal_ratio"]
    if not heard:
        why = "a run without a separator has no instrumentals, hence no contrast `rewards` with clip metric `vocals`"
        return Finding("d", claim, "cannot be told", why, some)
    verdict: Verdict = "cannot be told"
    if heard[0].rises:
        verdict = "holds"
    elif heard[0].high < MARGIN:
        verdict = "does not hold"
    why = f"{heard[0].prompts} prompts that ask for no voice: {_listed(some)}"
    return Finding("d", claim, verdict, why, some)


def preference(seeds: Sequence[Seed]) -> Finding:
    """(e): what CRPO changes lies within the margin, in the reward, in true quality and in the CLAP score by which its
    pairs were made; and it has learned its pairs, without which there is nothing to see."""
    claim = "CRPO adds little"
    some, whole = _effects(seeds, STEPS[3:], (*BOTH, "clap_score"))
    if not whole:
        return Finding("e", claim, "cannot be told", _missing("all metrics of Sub.1 and + v1 to v2"), some)
    shares = [seed.learned for seed in seeds]
    learned = ", ".join("–" if one is None else f"{one:.2f}" for one in shares)
    verdict: Verdict = "cannot be told"
    if all(one.little for one in some):
        verdict = "holds" if all(one is not None and one > 0.5 for one in shares) else "cannot be told"
    elif any(one.low > MARGIN or one.high < -MARGIN for one in some):
        verdict = "does not hold"
    return Finding("e", claim, verdict, f"{_listed(some)}; implicit accuracy at its end by seed {learned}", some)


def hacking(seeds: Sequence[Seed]) -> Finding:
    """(f): a step at which the reward rises by more than a little, quality does not rise, at the most by less than the
    margin, and falls behind the reward, by an interval that is corrected for the number of places (Bonferroni)."""
    claim = "Somewhere the reward rises and true quality does not"
    places = [*STEPS, *_past_training(seeds)]
    lines, effects, hacked, open_questions = [], [], [], []
    for pair in places:
        name = pair[0]
        reward, quality = (effect(seeds, pair, metric) for metric in BOTH)
        gap = effect(seeds, pair, GAP, confidence=1 - 0.05 / len(places))
        if reward is None or quality is None or gap is None:
            lines.append(f"{name}: {_missing('both metrics')}")
            open_questions.append(name)
            continue
        effects += [reward, quality]
        if not reward.rises or reward.little:
            lines.append(f"{name}: no rise of the reward is shown ({reward})")
        elif quality.rises:
            lines.append(f"{name}: both rise ({reward}, {quality})")
        elif quality.high < MARGIN and gap.low > 0:
            hacked.append(name)
            lines.append(f"{name}: reward alone ({reward}, {quality})")
        else:
            open_questions.append(name)
            lines.append(f"{name}: quality open ({reward}, {quality})")
    if not effects:
        return Finding("f", claim, "cannot be told", _missing("steps with reward and estimated quality"))
    verdict: Verdict = "holds" if hacked else "cannot be told" if open_questions else "does not hold"
    return Finding("f", claim, verdict, "; ".join(lines), tuple(effects))


def _heads(seeds: Sequence[Seed]) -> dict[str, list[str]]:
    """Head -> input scores in order."""
    heads: dict[str, list[str]] = {}
    for row in dict.fromkeys(row for seed in seeds for row in seed.rows):
        if row[0] == "heads" and len(row) == 3:
            heads.setdefault(row[1], []).append(row[2])
    return {head: sorted(scores, key=float) for head, scores in heads.items() if len(scores) > 1}


def _past_training(seeds: Sequence[Seed]) -> list[Pair]:
    """Neighbouring scores of every curve of the sweep."""
    steps: list[Pair] = []
    curves: dict[str, list[str]] = {}
    for row in dict.fromkeys(row for seed in seeds for row in seed.rows):
        if row[0] == "sweep" and len(row) == 3:
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
    seeds: Sequence[Seed],
    pairs: Sequence[Pair],
    metrics: Sequence[str],
    only: Callable[[str], bool] | None = None,
) -> tuple[tuple[Effect, ...], bool]:
    """Those that there are, and whether they are all."""
    some = [effect(seeds, pair, metric, only=only) for pair in pairs for metric in metrics]
    return tuple(one for one in some if one is not None), None not in some


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
        (one.letter, e.name, NAMES[e.metric], f"{e.value:+.2f}", f"[{e.low:+.2f}, {e.high:+.2f}]",
         ", ".join(f"{value:+.2f}" for value in e.by_seed.values()), f"{e.raw:+.3f}", str(e.prompts), str(e.failed))
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
