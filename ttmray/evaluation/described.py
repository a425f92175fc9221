"""What is said of every system of an evaluation: metrics of its clips together, and means of those of single clips."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from ttmray.errors import UserError
from ttmray.evaluation.compare import COMPARED, plain
from ttmray.evaluation.config import EvaluateConfig
from ttmray.evaluation.fad import fad, fad_inf, half_distances
from ttmray.evaluation.measure import OK, embedding_protocol
from ttmray.evaluation.metrics import Metric, cosine_distances, diversity, kad, near_duplicate_rate, vendi
from ttmray.evaluation.reference import Embedded
from ttmray.evaluation.systems import SystemFolder
from ttmray.models.bundle import Bundle
from ttmray.plugins import function_named
from ttmray.statistics import CROSSED_INTERVAL, MEAN_INTERVAL, crossed, mean_interval

SETS = ("fad", "fad_inf", "kad", "diversity", "vendi", "near_duplicates", "parent_fad", "parent_distance")
"""Metrics of a system's clips together."""
LEVELS = {
    "lufs": ("lufs", "ITU-R BS.1770-4"),
    "true_peak": ("true_peak_db", "dBTP, ITU-R BS.1770-4 annex 2"),
    "silence": ("silence", "share of 100 ms frames under -60 dBFS RMS"),
}
"""Metric -> column of its clips, and protocol."""


def described_systems(
    systems: Sequence[SystemFolder],
    rows: Sequence[Mapping[str, Any]],
    claps: np.ndarray,
    config: EvaluateConfig,
    bundle: Bundle,
    reference: Embedded | None,
    training: Embedded | None,
    extra: Mapping[str, str],
) -> tuple[list[dict[str, Any]], list[str]]:
    """Counts and metrics of every system, and warnings.

    Args:
        claps: (n, 512) of all n rows, NaN where a clip is not ok.
        extra: further columns of the rows -> what made them.
    """
    described, warnings = [], []
    for system in systems:
        metrics, of_metrics = _system_metrics(system.name, rows, claps, config, bundle, reference, training, extra)
        ok = [row for row in rows if row["system"] == system.name and row["status"] == OK]
        counts = {"clips": len(ok), "failed": sum(row["system"] == system.name for row in rows) - len(ok)}
        counts["prompts"] = len({row["prompt_id"] for row in ok})
        described.append({"name": system.name, "folder": system.folder, **counts, "metrics": metrics})
        warnings += of_metrics
    if reference and len({system["clips"] for system in described}) > 1:
        warnings.append("systems have other numbers of clips: their FAD cannot be compared, KAD can.")
    return described, warnings


def _system_metrics(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    claps: np.ndarray,
    config: EvaluateConfig,
    bundle: Bundle,
    reference: Embedded | None,
    training: Embedded | None,
    extra: Mapping[str, str],
) -> tuple[dict[str, Any], list[str]]:
    mine = [i for i, row in enumerate(rows) if row["system"] == name and row["status"] == OK]
    clips, clap = [rows[i] for i in mine], claps[mine]
    audio = embedding_protocol(bundle.name, bundle.protocol("empty"))
    how: dict[str, Any] = {"protocol": audio, "resamples": config.resamples, "seed": config.seed}
    sets: dict[str, tuple[int, Callable[[], Metric]]] = {}
    """Metric -> least number of clips, and what makes it."""
    if reference is not None:
        against = reference.for_fad()
        halves = half_distances(clap, against, **how) if len(clips) >= 2 else None
        sets["fad"] = 2, lambda: fad(clap, against, halves=halves, **how)
        sets["fad_inf"] = 8, lambda: fad_inf(clap, against, halves=halves, **how)
        sets["kad"] = 2, lambda: kad(clap, reference.for_kad, **how)
    sets["diversity"] = 2, lambda: diversity(clap, **how)
    sets["vendi"] = 2, lambda: vendi(clap, **how)
    if config.parent is not None and name != config.parent:
        parent = [i for i, row in enumerate(rows) if row["system"] == config.parent and row["status"] == OK]
        if len(parent) >= 2:
            sets["parent_fad"] = 2, lambda: fad(clap, claps[parent], **how)
        theirs = {(rows[i]["prompt_id"], rows[i]["sample"]): i for i in parent}
        both = [(i, theirs[key]) for i in mine if (key := (rows[i]["prompt_id"], rows[i]["sample"])) in theirs]
        if both:
            a, b = np.array(both).T
            far = zip(a, cosine_distances(claps[a], claps[b]).tolist(), strict=True)
            values = {(rows[i]["prompt_id"], rows[i]["sample"]): value for i, value in far}
            sets["parent_distance"] = 1, lambda: _mean("parent_distance", values, audio, config)
    if training is not None:
        sets["near_duplicates"] = (
            1,
            lambda: near_duplicate_rate(
                clap,
                iter(training.clap),
                protocol=audio,
                threshold=config.near_duplicate,
                training_clips=training.about["n"],
            ),
        )
    for entry in config.metrics:
        function = function_named(entry, "metrics")
        sets[function.__name__] = 1, partial(_own, function, clap, clips, audio)
    metrics = {metric: make() for metric, (least, make) in sets.items() if len(clips) >= least}
    warnings = [
        f"{name}: {len(clips)} clips are too few for {metric}, which needs {least}."
        for metric, (least, _) in sets.items()
        if len(clips) < least
    ]
    protocols = dict.fromkeys(COMPARED, f"{bundle.name}/{bundle.protocol(config.reward_text).id()}")
    protocols |= {"clap_score": audio} | ({"ccs": config.judge.name} if config.judge else {})
    own = {column: (column, made_by) for column, made_by in extra.items()}
    for metric, (column, made_by) in ({one: (one, protocols[one]) for one in COMPARED} | own | LEVELS).items():
        known = {(row["prompt_id"], row["sample"]): row[column] for row in clips if row.get(column) is not None}
        if known:
            metrics[metric] = _mean(metric, known, made_by, config)
    warnings += [f"{name}: {metric}: {text}" for metric, result in metrics.items() for text in result.warnings]
    return {metric: plain(asdict(result)) for metric, result in metrics.items()}, warnings


def _own(function: Callable[..., Any], clap: np.ndarray, rows: Sequence[Mapping[str, Any]], protocol: str) -> Metric:
    """The number of a metric from outside, without an interval.

    Raises:
        UserError: it is no finite number.
    """
    value = float(function(clap, rows))
    if not np.isfinite(value):
        raise UserError(f"metrics: {function.__name__} gave {value} for {len(rows)} clips.", "Return a finite number.")
    return Metric(function.__name__, value, len(rows), 0, clap.shape[1], protocol, None, None, 0.95)


def _mean(name: str, values: Mapping[tuple[str, int], float], protocol: str, config: EvaluateConfig) -> Metric:
    """Mean of the prompts' means, with its interval over prompts, and over crossed seeds.

    Args:
        values: (prompt id, sample) -> value.
    """
    prompts: dict[str, dict[int, float]] = {}
    for (prompt, sample), value in values.items():
        prompts.setdefault(prompt, {})[sample] = value
    means = np.array([np.mean(list(of.values())) for of in prompts.values()])
    interval: tuple[float | None, float | None] = (None, None)
    how = MEAN_INTERVAL if config.seeds == "nested" else CROSSED_INTERVAL
    details = {"prompts": float(len(means))}
    warnings: tuple[str, ...] = ()
    if len(means) > 1:
        details["sd"] = float(means.std(ddof=1))
        samples = sorted({sample for _, sample in values})
        if config.seeds == "nested":
            interval = mean_interval(means) or interval
        elif len(samples) > 1 and len(values) == len(prompts) * len(samples):
            table = np.array([[of[k] for k in samples] for of in prompts.values()])
            both = crossed(table)
            interval = (both.low, both.high) if both else interval
        else:
            warnings = ("no interval: some samples of some prompts have no value, and crossed seeds need all.",)
    value, n = float(means.mean()), len(values)
    return Metric(name, value, n, 0, 0, protocol, *interval, 0.95, warnings, details, how)
