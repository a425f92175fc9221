"""The comparison of tuning methods in numbers: a row per method, every pair of methods, curves, and all clips.

A change is a mean over prompts and seeds of (method - parent) on the same prompt, with its t interval and p over both
(`statistics.crossed`), or over prompts where there is one seed. P values are adjusted by Holm over all methods of a
measure, verdicts are of intervals that are corrected for the number of methods (Bonferroni). A clip that failed counts
as the worst that was heard, or whatever collapses would be judged by what is left of it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import torch

from ttmray.errors import EXIT_OK
from ttmray.evaluation import plots
from ttmray.evaluation.compare import plain
from ttmray.evaluation.fad import fad
from ttmray.evaluation.measure import OK, embedding_protocol
from ttmray.evaluation.metrics import kad
from ttmray.evaluation.reference import Embedded, load_reference
from ttmray.models.backbone import BackboneConfig
from ttmray.models.backbone_weights import forward_flops
from ttmray.models.bundle import base_name, means_nothing, open_bundle
from ttmray.models.state_dicts import read_state_dict
from ttmray.models.weights import weights_file
from ttmray.recipes.chain import step_record
from ttmray.recipes.hearing import HeardClips, read_heard
from ttmray.recipes.method_page import FIGURE, JSON, OUT, QUALITY, REWARD, as_csv, flat, markdown
from ttmray.recipes.tuning import Tuned
from ttmray.statistics import crossed, holm, vendi_score
from ttmray.storage import Folder
from ttmray.synth.faults import FLOOR
from ttmray.training.memory import step_flops

CURVE = "true quality by trained reward"


@dataclass(frozen=True)
class MethodComparison:
    """What is compared.

    Attributes:
        rewards: columns and weights of the reward.
        others: names of rewards that nothing was trained on.
        rows: name -> method.
        tuned: (row, seed) -> what its method gave.
        reference: set of FAD and KAD, and its store; None: there are none.
        equal: what all have in common, for people.
    """

    root: Folder
    bundle: str
    shape: BackboneConfig
    parent: str
    rewards: Mapping[Any, float]
    others: tuple[str, ...]
    seeds: tuple[int, ...]
    rows: Mapping[str, str]
    tuned: Mapping[tuple[str, int], Tuned]
    reference: tuple[str, str] | None
    confidence: float
    equal: str

    @property
    def measures(self) -> list[str]:
        """Numbers of clips: the reward, the true quality, and the rewards that nothing was trained on."""
        alone = list(self.rewards) if len(self.rewards) == 1 else []  # the sum says the same
        own = [name for name in ("reward_score", "clap_score") if name not in alone]
        return [REWARD, QUALITY, *own, *self.others]


@dataclass
class Point:
    """Clips of some weights, or the best of k, over seeds.

    Attributes:
        share: of the budget, 0 to 1.
        values: measure -> (prompts, seeds), NaN where a clip failed.
        claps: of each seed, (n, 512) of the clips that are ok.
        distance: of each seed, mean of 1 - cosine between a clip and the parent's of the same prompt and noise.
        failed: clips.
    """

    share: float
    values: dict[str, np.ndarray]
    claps: list[np.ndarray] = field(default_factory=list)
    distance: list[float] = field(default_factory=list)
    failed: int = 0


class Change(NamedTuple):
    """Of a measure against the parent, or of one method against another, over n prompts."""

    value: float
    low: float
    high: float
    p: float
    n: int


def compare(comparison: MethodComparison) -> int:
    """Write `comparison/` of the run folder: tables, figure, every clip; returns an exit code."""
    root, rows = comparison.root, list(comparison.rows)
    parent_sound = read_heard(root.sub("heard/parent"))
    prompts = list(dict.fromkeys(row["prompt_id"] for row in parent_sound.rows))
    parent = points(comparison, [parent_sound], parent_sound, prompts)[0]
    curves = {
        row: points(comparison, [_heard(comparison, row, seed) for seed in comparison.seeds], parent_sound, prompts)
        for row in rows
    }
    reference = _reference(comparison)
    count_failures([parent, *(point for along in curves.values() for point in along)])
    changes = {row: _changes(comparison, curves[row][-1], parent, comparison.confidence) for row in rows}
    adjusted = {
        name: holm({row: changes[row][name].p for row in rows if name in changes[row]}) for name in comparison.measures
    }
    table = [_described(comparison, "parent", parent, {}, {}, reference)]
    for row in rows:
        holms = {name: adjusted[name][row] for name in comparison.measures if row in adjusted[name]}
        described = _described(comparison, row, curves[row][-1], changes[row], holms, reference)
        if changes[row] and not means_nothing(base_name(comparison.bundle)):
            corrected = 1 - (1 - comparison.confidence) / len(rows)
            strict = _changes(comparison, curves[row][-1], parent, corrected)
            described["verdict"] = verdict(strict.get(REWARD), strict.get(QUALITY))
        table.append(described)
    result: dict[str, Any] = {
        "equal": comparison.equal,
        "measures": comparison.measures,
        "rewards": dict(comparison.rewards),
        "seeds": list(comparison.seeds),
        "confidence": comparison.confidence,
        "prompts": len(prompts),
        "note": open_bundle(base_name(comparison.bundle)).note,
        "meaningless": means_nothing(base_name(comparison.bundle)),
        "rows": table,
        "contrasts": contrasts({row: curves[row][-1] for row in rows}, (REWARD, QUALITY), comparison.confidence),
        "curves": _curves(parent, curves),
    }
    out = root.sub(OUT)
    tables = {"clips": _clips(comparison, parent_sound), "methods": [flat(row) for row in table]}
    tables |= {name: result[name] for name in ("contrasts", "curves")}
    for name, listed in tables.items():
        out.write(f"{name}.csv", as_csv(listed, result["note"] if result["meaningless"] else ""))
    lines = {
        row: [
            (_mean(one.values[REWARD]), _mean(one.values[QUALITY]))
            for one in (parent, *curves[row])
            if np.isfinite(one.values[QUALITY]).any()
        ]
        for row in rows
    }
    for theme in ("light", "dark"):
        root.write(FIGURE.format(theme=theme), plots.curves(lines, CURVE, theme))
    result = plain(result)
    root.write(JSON, json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False).encode())
    out.write("methods.md", markdown(result).encode())
    return EXIT_OK


def _heard(comparison: MethodComparison, row: str, seed: int) -> HeardClips:
    return read_heard(comparison.root.sub(f"heard/{row}-{seed}"))


def points(
    comparison: MethodComparison, sounds: Sequence[HeardClips], parent: HeardClips, prompts: list[str]
) -> list[Point]:
    """What was heard along a training, or by the best of 2, 4, ... candidates, in order.

    Args:
        sounds: of every seed; their CLAP vectors are (n, 512).
        parent: its clips, which have the same noise.
    """
    per_seed = [_takes(comparison, sound, _first(parent)) for sound in sounds]
    result = []
    for place in range(len(per_seed[0])):
        takes = [takes[place] for takes in per_seed]
        values = {name: np.full((len(prompts), len(sounds)), np.nan) for name in comparison.measures}
        for column, take in enumerate(takes):
            for row in take.rows:
                for name in comparison.measures:
                    if row["status"] == OK and row[name] is not None:
                        values[name][prompts.index(row["prompt_id"]), column] = row[name]
        point = Point(takes[0].share, values)
        for take in takes:
            point.claps.append(take.clap)
            point.distance.append(take.distance)
            point.failed += sum(row["status"] != OK for row in take.rows)
        result.append(point)
    return result


def count_failures(some: Sequence[Point]) -> None:
    """Give clips that failed the worst that there is of every measure: the lowest of all points, and of quality its
    floor. A measure that no clip has is left alone."""
    for name in dict.fromkeys(name for point in some for name in point.values):
        known = np.concatenate([point.values[name].ravel() for point in some if name in point.values])
        known = known[np.isfinite(known)]
        if len(known):
            worst = FLOOR if name == QUALITY else float(known.min())
            for point in some:
                values = point.values[name]
                values[~np.isfinite(values)] = worst


class _Take(NamedTuple):
    """One clip per prompt."""

    share: float
    rows: list[dict[str, Any]]
    clap: np.ndarray
    distance: float


def _first(sound: HeardClips) -> dict[str, np.ndarray]:
    """Prompt -> CLAP vector (512,) of its first clip that is ok."""
    vectors: dict[str, np.ndarray] = {}
    for row, clap in zip([row for row in sound.rows if row["status"] == OK], sound.clap, strict=True):
        if row["sample"] == 0:
            vectors.setdefault(row["prompt_id"], clap)
    return vectors


def _takes(comparison: MethodComparison, sound: HeardClips, parents: Mapping[str, np.ndarray]) -> list[_Take]:
    """Snapshots of a training; of several candidates the best of 2, 4, ... and of all."""
    claps = iter(sound.clap)
    rows = [row | {"clap": next(claps) if row["status"] == OK else None} for row in sound.rows]
    for row in rows:
        if row["status"] == OK:
            row[REWARD] = sum(weight * row[name] for name, weight in comparison.rewards.items())
    candidates = max(row["sample"] for row in rows) + 1
    if candidates == 1:
        shares = list(dict.fromkeys(row["share"] for row in rows))
        chosen = {share: [row for row in rows if row["share"] == share] for share in shares}
    else:
        parents = _first(sound)  # what the same noise gives without a choice
        counts = [k for k in (2**i for i in range(1, 12)) if k < candidates] + [candidates]
        chosen = {k / candidates: _best_of(rows, k) for k in counts}
    takes = []
    for share, some in chosen.items():
        ok = [row for row in some if row["status"] == OK]
        near = [1 - float(row["clap"] @ parents[row["prompt_id"]]) for row in ok if row["prompt_id"] in parents]
        clap = np.array([row["clap"] for row in ok], np.float64)
        takes.append(_Take(share, some, clap, float(np.mean(near)) if near else float("nan")))
    return takes


def _best_of(rows: Sequence[dict[str, Any]], k: int) -> list[dict[str, Any]]:
    """Of the first k candidates of every prompt the one with the highest reward; one that failed where all did."""
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["sample"] >= k:
            continue
        old = best.get(row["prompt_id"])
        if old is None or (row["status"] == OK and (old["status"] != OK or row[REWARD] > old[REWARD])):
            best[row["prompt_id"]] = row
    return list(best.values())


def change(values: np.ndarray, base: np.ndarray, confidence: float) -> Change | None:
    """Mean of values - base with its interval and p.

    Args:
        values: (prompts, seeds), NaN where there is none; a prompt counts where all of its clips have one.
        base: (prompts, seeds) of another, or (prompts, 1) of the parent.

    Returns:
        None for fewer than two prompts.
    """
    there = np.isfinite(values).all(axis=1) & np.isfinite(base).all(axis=1)
    one = crossed((values - base)[there], confidence) if there.sum() > 1 else None
    return None if one is None else Change(*one, int(there.sum()))


def _changes(comparison: MethodComparison, point: Point, parent: Point, confidence: float) -> dict[str, Change]:
    """Measure -> change against the parent, where there is one."""
    changes = {}
    for name in comparison.measures:
        one = change(point.values[name], parent.values[name], confidence)
        if one is not None:
            changes[name] = one
    return changes


def contrasts(ends: Mapping[str, Point], measures: Sequence[str], confidence: float) -> list[dict[str, Any]]:
    """Every pair of methods by some measures; p adjusted by Holm over the pairs of a measure."""
    rows = []
    for name in measures:
        pairs = {
            (a, b): one
            for a, b in combinations(ends, 2)
            if (one := change(ends[a].values[name], ends[b].values[name], confidence)) is not None
        }
        adjusted = holm({pair: one.p for pair, one in pairs.items()})
        rows += [
            {"measure": name, "a": a, "b": b, **one._asdict(), "p_holm": adjusted[a, b]}
            for (a, b), one in pairs.items()
        ]
    return rows


def _reference(comparison: MethodComparison) -> Embedded | None:
    if comparison.reference is None:
        return None
    bundle = open_bundle(base_name(comparison.bundle))
    return load_reference(*comparison.reference, embedding_protocol(bundle.name, bundle.protocol("empty")))


def _described(
    comparison: MethodComparison,
    row: str,
    point: Point,
    changes: Mapping[str, Change],
    adjusted: Mapping[str, float],
    reference: Embedded | None,
) -> dict[str, Any]:
    """A row of the table as plain JSON types."""
    described: dict[str, Any] = {"name": row, "method": comparison.rows.get(row, ""), "failed": point.failed}
    described["means"] = {name: _mean(values) for name, values in point.values.items()}
    described["changes"] = {
        name: one._asdict() | {"p_holm": adjusted[name], "seeds": _of_seeds(point, name)}
        for name, one in changes.items()
    }
    described["verdict"] = ""
    sets: dict[str, Any] = {"vendi": [vendi_score(clap) for clap in point.claps if len(clap)]}
    if reference is not None:
        bundle = open_bundle(base_name(comparison.bundle))
        how: Any = {"protocol": embedding_protocol(bundle.name, bundle.protocol("empty")), "resamples": 10}
        against = [clap for clap in point.claps if len(clap) > 1]
        sets["fad"] = [fad(clap, reference.for_fad(), **how).value for clap in against]
        sets["kad"] = [kad(clap, reference.for_kad, **how).value for clap in against]
    described["sets"] = {name: {"mean": float(np.mean(v)), "seeds": v} for name, v in sets.items() if v}
    described["distance"] = None if row == "parent" else _mean(np.array(point.distance))
    described["account"] = None if row == "parent" else account(comparison, row)
    return described


def _of_seeds(point: Point, name: str) -> list[float]:
    return [_mean(column) for column in point.values[name].T]


def verdict(reward: Change | None, quality: Change | None) -> str:
    """What the intervals of reward and true quality say together."""
    if reward is None or quality is None:
        return "cannot be told"
    rises = {"reward": _side(reward), "quality": _side(quality)}
    if rises["reward"] > 0:
        return {1: "both rise", 0: "reward rises, quality cannot be told", -1: "hacked: reward rises, quality falls"}[
            rises["quality"]
        ]
    if rises["reward"] < 0:
        return "reward falls"
    return {1: "quality rises without the reward", 0: "no change can be told", -1: "quality falls"}[rises["quality"]]


def _side(one: Change) -> int:
    """1: above 0 with its interval, -1: below, 0: neither."""
    return int(one.low > 0) - int(one.high < 0)


def account(comparison: MethodComparison, row: str) -> dict[str, Any]:
    """What a method has cost, means over seeds: clips, FLOPs, seconds; and how far its weights are from the parent's.

    Seconds are those of its steps; of the pool that several methods share each pays all. Choosing the best of N costs
    the clips of the held-out prompts, training their evaluation nothing.
    """
    each = []
    for seed in comparison.seeds:
        one = comparison.tuned[row, seed]
        names = [f"tune-{row}-{seed}"] if one.phases else [f"hear-{row}-{seed}"]
        names += [f"pool-{seed}"] if one.shares_pool else []
        records = [step_record(comparison.root, name) for name in names]
        spent = {name: sum(record[name] for record in records) for name in ("seconds", "cpu_seconds", "gpu_seconds")}
        each.append(
            {
                "clips": one.clips,
                "updates": one.updates,
                "passes": one.passes,
                "training_tflop": one.passes * step_flops(comparison.shape) / 1e12,
                "sampling_tflop": one.forwards * forward_flops(comparison.shape)["velocity"] / 1e12,
                **spent,
                "weight_distance": (
                    weight_distance(one.snapshots[-1].weights, comparison.parent) if one.snapshots else 0.0
                ),
            }
        )
    return {name: float(np.mean([one[name] for one in each])) for name in each[0]}


def weight_distance(path: str, parent: str) -> float:
    """Length of the difference of two files of weights over that of the second's, over all floating-point tensors."""
    ours, theirs = (read_state_dict(weights_file(one, "checkpoint")) for one in (path, parent))
    names = [name for name, tensor in theirs.items() if isinstance(tensor, torch.Tensor) and tensor.is_floating_point()]
    moved = sum(float((ours[name].double() - theirs[name].double()).square().sum()) for name in names)
    return float((moved / sum(float(theirs[name].double().square().sum()) for name in names)) ** 0.5)


def _curves(parent: Point, curves: Mapping[str, Sequence[Point]]) -> list[dict[str, Any]]:
    """Every point of every curve, of all seeds and of each."""
    rows = []
    for row, along in curves.items():
        for point in (parent, *along):
            means = {name: _mean(values) for name, values in point.values.items()}
            share = 0.0 if point is parent else point.share
            rows.append({"row": row, "share": share, **means, "distance": _mean(np.array(point.distance))})
    return rows


def _clips(comparison: MethodComparison, parent: HeardClips) -> list[dict[str, Any]]:
    """Every clip that was heard."""
    heard = [("parent", "", parent)]
    heard += [(row, str(seed), _heard(comparison, row, seed)) for row in comparison.rows for seed in comparison.seeds]
    rows = []
    for row, seed, sound in heard:
        for one in sound.rows:
            known = {name: one[name] for name in comparison.rewards}
            total = None
            if None not in known.values():
                total = sum(weight * known[name] for name, weight in comparison.rewards.items())
            rows.append({"row": row, "seed": seed, **one, REWARD: total})
    return rows


def _mean(values: np.ndarray) -> float:
    """Of (...,) numbers, those that are NaN left out; NaN where there is none."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")
