"""Is one system better than another, by how much, and were there enough prompts to tell?

The ranker, the evaluation and the recipes take their tests and intervals from here. Everything pairs scores of the same
prompt: prompts differ far more among each other than systems do on one prompt. Distributions are scipy's.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from scipy import stats

from ttmray.errors import UserError

Alternative = Literal["two-sided", "greater", "less"]
Seeds = Literal["nested", "crossed"]
Cell = TypeVar("Cell", bound=Hashable)

EXACT_SPEARMAN = 8
"""Up to 8! = 40,320 orders are counted; the t approximation gives p = 0 for three points in perfect order."""
MOST_PROMPTS = 10_000_000
BOOTSTRAP_CELLS = 2**20
"""Counts of drawn prompts in memory at a time: 8 MB."""


@dataclass(frozen=True)
class Paired:
    """A paired comparison of two systems.

    Attributes:
        difference: mean of A - B over n prompts; sd is its standard deviation (ddof 1).
        low, high: t interval of the mean difference at `confidence`, two-sided whatever the alternative.
        t, p: of the paired t test; p is for `alternative` ("greater": A is better).
        d_z: difference / sd, the effect size that decides how many prompts are needed (Cohen 1988).
        wilcoxon_p: of the signed-rank test, zeros left out; None without the scores of each prompt.
        wins, ties, losses: prompts with A above, equal to and below B; None without the scores of each prompt.
    """

    n: int
    difference: float
    sd: float
    low: float
    high: float
    confidence: float
    t: float
    p: float
    d_z: float
    alternative: Alternative
    wilcoxon_p: float | None = None
    wins: int | None = None
    ties: int | None = None
    losses: int | None = None


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts and seeds with its bootstrap interval."""

    value: float
    low: float
    high: float
    confidence: float
    n_prompts: int
    n_seeds: int


@dataclass(frozen=True)
class Correlation:
    """Spearman's rho, its two-sided p, and an interval, which is None for |rho| = 1 and under four points."""

    rho: float
    p: float
    low: float | None
    high: float | None
    n: int


def paired(a: np.ndarray, b: np.ndarray, *, alternative: Alternative = "two-sided", confidence: float = 0.95) -> Paired:
    """Paired t and Wilcoxon signed-rank tests of A - B.

    Args:
        a, b: (n,) scores of the same prompts in the same order.

    Raises:
        UserError: other shapes, fewer than two prompts, NaN or infinity.
    """
    a, b = _vector(a, "A"), _vector(b, "B")
    if len(a) != len(b):
        raise UserError(f"A has {len(a)} scores and B has {len(b)}.", "Compare systems on the same prompts.")
    if len(a) < 2:
        raise UserError(f"{len(a)} prompts say nothing about a difference.", "Use at least two.")
    difference = a - b
    result = paired_from_summary(
        float(difference.mean()),
        float(difference.std(ddof=1)),
        len(difference),
        alternative=alternative,
        confidence=confidence,
    )
    # scipy gives NaN or an error where every difference is zero
    wilcoxon = float(stats.wilcoxon(difference, alternative=alternative).pvalue) if difference.any() else 1.0
    wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
    return replace(result, wilcoxon_p=wilcoxon, wins=wins, ties=len(difference) - wins - losses, losses=losses)


def paired_from_summary(
    difference: float, sd: float, n: int, *, alternative: Alternative = "two-sided", confidence: float = 0.95
) -> Paired:
    """The paired t test from the mean and standard deviation (ddof 1) of n differences, such as published ones.

    With sd = 0, p is 1 where the difference is 0 as well (a system against itself), and else t is infinite.

    Raises:
        UserError: n < 2, a negative sd, or numbers that are not finite.
    """
    if n < 2 or not np.isfinite(difference) or not np.isfinite(sd) or sd < 0:
        raise UserError(f"No paired test of {n} differences with mean {difference} and sd {sd}.")
    _check_share("confidence", confidence)
    error = sd / np.sqrt(n)
    if sd > 0:
        t, d_z = difference / error, difference / sd
    else:
        t = d_z = float(np.sign(difference) * np.inf) if difference else 0.0
    distribution = stats.t(n - 1)
    p = {
        "two-sided": 2 * distribution.sf(abs(t)),
        "greater": distribution.sf(t),
        "less": distribution.cdf(t),
    }[alternative]
    if sd == 0 and difference == 0:
        p = 1.0
    half = float(distribution.ppf(0.5 + confidence / 2)) * error
    low, high = float(difference - half), float(difference + half)
    return Paired(n, difference, sd, low, high, confidence, float(t), float(p), float(d_z), alternative)


def holm(p_values: Mapping[Cell, float]) -> dict[Cell, float]:
    """Holm-adjusted p of each cell of a table (Holm 1979): below alpha where the step-down procedure rejects.

    The chance of even one false mark in the whole table is then at most alpha, whatever the cells' dependence.

    Raises:
        UserError: a p outside [0, 1] or NaN.
    """
    for cell, p in p_values.items():
        if not 0 <= p <= 1:
            raise UserError(f"The p of cell {cell!r} is {p}, not in [0, 1].")
    adjusted: dict[Cell, float] = {}
    highest = 0.0
    for rank, cell in enumerate(sorted(p_values, key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[cell]))
        adjusted[cell] = highest
    return {cell: adjusted[cell] for cell in p_values}


def bootstrap(
    a: np.ndarray, b: np.ndarray | None = None, *, resamples: int = 10_000, confidence: float = 0.95, seed: int = 0
) -> Estimate:
    """Mean of A, or of A - B, over prompts, with a percentile interval; prompts are drawn for both systems together.

    Several seeds of a prompt are noise within it, as in generation, where another prompt's clip has other noise: the
    scatter of whole rows holds it already, and drawing seeds again within each row would count it twice (Davison &
    Hinkley 1997, section 3.8). Of seeds that all prompts share, `crossed` has the interval.

    Args:
        a, b: (prompts, seeds); the numbers of seeds may differ.
        seed: of the bootstrap.

    Raises:
        UserError: other shapes, fewer than two prompts, NaN or infinity.
    """
    _check_share("confidence", confidence)
    tables = [_scores(table, name) for table, name in ((a, "A"), (b, "B")) if table is not None]
    n = len(tables[0])
    if n < 2 or any(len(table) != n for table in tables):
        counts = " and ".join(str(len(table)) for table in tables)
        raise UserError(f"The bootstrap needs the same two or more prompts on each side, not {counts}.")
    means = tables[0].mean(axis=1) - (tables[1].mean(axis=1) if len(tables) > 1 else 0.0)
    drawn = np.empty(resamples)
    for part, times in _draws(n, resamples, np.random.default_rng(seed)):
        drawn[part] = times / n @ means
    low, high = np.quantile(drawn, [0.5 - confidence / 2, 0.5 + confidence / 2])
    seeds = min(table.shape[1] for table in tables)
    return Estimate(float(means.mean()), float(low), float(high), confidence, n, seeds)


class Crossed(NamedTuple):
    """A mean over prompts and seeds, its interval, and the p of the mean being 0."""

    value: float
    low: float
    high: float
    p: float


def crossed(table: np.ndarray, confidence: float = 0.95) -> Crossed | None:
    """t interval and t test of the mean of a table (prompts, seeds) whose columns share a seed, such as a training run.

    Prompts and seeds are both random: the variance of the mean is (M_p + M_s - M_e) / (P S) with the mean squares of
    prompts, seeds and what is left (Searle, Casella & McCulloch, Variance Components, 1992), its degrees of freedom are
    Satterthwaite's. It is never narrower than the interval of either side alone, because M_p or M_s falls below M_e by
    chance, and the few degrees of freedom of seeds count less in the sum than they should. A few seeds say little, and
    the interval says so; a bootstrap that draws so few columns is too narrow by sqrt(1 - 1/S) and more (Owen 2007).

    Returns:
        None for fewer than two prompts. Of one column what its prompts say, which says nothing of other seeds.

    Raises:
        UserError: another shape, NaN or infinity.
    """
    _check_share("confidence", confidence)
    table = _scores(table, "table")
    p, s = table.shape
    if p < 2:
        return None
    mean = float(table.mean())
    if s == 1:
        errors, freedom = np.array([float(stats.sem(table[:, 0]))]), np.array([p - 1.0])
    else:
        rows, columns = table.mean(axis=1) - mean, table.mean(axis=0) - mean
        left = table - mean - rows[:, None] - columns[None]
        degrees = np.array([p - 1.0, s - 1.0, (p - 1.0) * (s - 1.0)])
        squares = np.array([s * rows @ rows, p * columns @ columns, np.square(left).sum()]) / degrees
        both = squares[0] + squares[1] - squares[2]
        df = both**2 / (squares**2 / degrees).sum() if both > 0 else 1.0
        errors = np.sqrt(np.array([*squares[:2], max(both, 0.0)]) / (p * s))
        freedom = np.array([*degrees[:2], max(df, 1.0)])
    half = float(np.max(stats.t.ppf(0.5 + confidence / 2, freedom) * errors))
    with np.errstate(divide="ignore", invalid="ignore"):  # no scatter at all
        chance = float(np.nanmax(2 * stats.t.sf(abs(mean) / errors, freedom), initial=0.0)) if mean else 1.0
    return Crossed(mean, mean - half, mean + half, chance)


MEAN_INTERVAL = "t over prompts"
"""The interval of a mean over prompts, wherever one is shown: tables, plots, ablations and cards."""
CROSSED_INTERVAL = "t over prompts and seeds"
"""Instead of it where samples of all prompts share seeds, of which others are to be covered, too."""


def mean_interval(values: np.ndarray, confidence: float = 0.95) -> tuple[float, float] | None:
    """t interval of the mean of `values` (n,), one per prompt; None for fewer than two."""
    if len(values) < 2:
        return None
    half = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1) * stats.sem(values))
    return float(np.mean(values)) - half, float(np.mean(values)) + half


def grouped_interval(
    values: np.ndarray,
    groups: Sequence[Hashable] | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values`, such as the share of right answers.

    Args:
        values: (n,) numbers or bool.
        groups: (n,) what is drawn as a whole, e.g. prompts, because its values are not independent; groups may differ
            in size. None: each value for itself.

    Raises:
        UserError: no values, other shapes, NaN or infinity.
    """
    _check_share("confidence", confidence)
    values = _vector(values, "values")
    if not len(values) or (groups is not None and len(groups) != len(values)):
        raise UserError(f"No interval of {len(values)} values in {len(groups or ())} groups.")
    number = {name: i for i, name in enumerate(sorted(set(groups), key=str))} if groups is not None else {}
    group = np.arange(len(values)) if groups is None else np.array([number[name] for name in groups])
    sums, sizes = np.bincount(group, values), np.bincount(group).astype(float)
    means = np.empty(resamples)
    for part, times in _draws(len(sizes), resamples, np.random.default_rng(seed)):
        means[part] = (times @ sums) / (times @ sizes)
    low, high = np.quantile(means, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)


def mcnemar(only_a: int, only_b: int, *, exact: bool = False) -> tuple[float, float]:
    """Statistic and p of McNemar's test on pairs that only A, or only B, got right.

    (b - c)^2 / (b + c) against chi-square with one degree of freedom and no continuity correction, as TuneJury
    does; with `exact` the p of a sign test, which is right for few discordant pairs as well. Without any, p is 1.

    Raises:
        UserError: a negative count.
    """
    if only_a < 0 or only_b < 0:
        raise UserError(f"McNemar's test needs counts, not {only_a} and {only_b}.")
    total = only_a + only_b
    if total == 0:
        return 0.0, 1.0
    statistic = (only_a - only_b) ** 2 / total
    p = stats.binomtest(only_a, total).pvalue if exact else stats.chi2.sf(statistic, 1)
    return float(statistic), float(p)


def spearman(x: np.ndarray, y: np.ndarray, confidence: float = 0.95) -> Correlation:
    """Spearman's rank correlation, ties sharing their mean rank.

    p counts all orders up to 8 points and uses the t approximation above. The interval is Fisher's with the
    standard error of Bonett & Wright (2000, Psychometrika 65).

    Args:
        x, y: (n,).

    Raises:
        UserError: other shapes, fewer than three points, all values equal, NaN or infinity.
    """
    _check_share("confidence", confidence)
    x, y = _vector(x, "x"), _vector(y, "y")
    n = len(x)
    if n != len(y) or n < 3:
        raise UserError(f"A rank correlation needs three or more pairs, not {n} and {len(y)} values.")
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        raise UserError("A rank correlation needs values that differ, but one side is constant.")
    rx, ry = stats.rankdata(x) - (n + 1) / 2, stats.rankdata(y) - (n + 1) / 2
    scale = np.sqrt((rx @ rx) * (ry @ ry))
    rho = float(np.clip(rx @ ry / scale, -1, 1))
    if n <= EXACT_SPEARMAN:
        orders = np.array(list(permutations(ry))) @ rx / scale
        p = float((np.abs(orders) >= abs(rho) - 1e-12).mean())
    else:
        p = float(stats.spearmanr(x, y).pvalue)
    if n < 4 or abs(rho) > 1 - 1e-12:
        return Correlation(rho, p, None, None, n)
    half = stats.norm.ppf(0.5 + confidence / 2) * np.sqrt((1 + rho**2 / 2) / (n - 3))
    return Correlation(rho, p, float(np.tanh(np.arctanh(rho) - half)), float(np.tanh(np.arctanh(rho) + half)), n)


def pearson(x: np.ndarray, y: np.ndarray) -> float | None:
    """Pearson's correlation of (n,) and (n,) values; None where a side is constant or there are fewer than two.

    Raises:
        UserError: values that are not finite, or sides of other lengths.
    """
    x, y = _vector(x, "x"), _vector(y, "y")
    if len(x) != len(y):
        raise UserError(f"A correlation needs pairs, not {len(x)} and {len(y)} values.")
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(stats.pearsonr(x, y).statistic)


def pearson_interval(
    x: np.ndarray, y: np.ndarray, prompts: Sequence[Hashable], confidence: float = 0.95
) -> tuple[float, float] | None:
    """Interval of Pearson's correlation over points of which several share a prompt.

    The points of one prompt are no independent ones: Fisher's interval counts each, and covers too much where prompts
    differ in level, too little where they differ in slope. So whole prompts are resampled: the standard error of
    atanh(r) is the jackknife's that leaves out one prompt at a time, its quantile Student's with prompts - 1 degrees of
    freedom. In simulations it covers as well with 10 prompts as with 100, where the percentile bootstrap over prompts
    needs 100 (Efron & Tibshirani 1993, chapters 11 and 14).

    Args:
        x, y: (n,) values.
        prompts: (n,) the prompt of each.

    Returns:
        Low and high end; None for fewer than three prompts, a constant side, or |r| = 1, with or without any prompt.

    Raises:
        UserError: other shapes, NaN or infinity.
    """
    _check_share("confidence", confidence)
    x, y = _vector(x, "x"), _vector(y, "y")
    if not len(x) == len(y) == len(prompts):
        raise UserError(f"A correlation over prompts needs triples, not {len(x)}, {len(y)} and {len(prompts)} values.")
    number = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    n = len(number)
    if n < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    x, y = x - x.mean(), y - y.mean()  # sums of squares keep their digits
    x, y = x / np.abs(x).max(), y / np.abs(y).max()
    of_prompt = np.zeros((n, 6))
    np.add.at(of_prompt, [number[one] for one in prompts], np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], 1))
    total = of_prompt.sum(axis=0)
    count, sx, sy, sxx, syy, sxy = np.vstack([total, total - of_prompt]).T
    variances = (count * sxx - sx**2) * (count * syy - sy**2)
    if (variances <= 1e-12 * count**4).any():
        return None
    r = (count * sxy - sx * sy) / np.sqrt(variances)
    if (np.abs(r) > 1 - 1e-12).any():
        return None
    z = np.arctanh(r)
    error = np.sqrt((n - 1) / n * np.square(z[1:] - z[1:].mean()).sum())
    half = stats.t.ppf(0.5 + confidence / 2, n - 1) * error
    return float(np.tanh(z[0] - half)), float(np.tanh(z[0] + half))


def power(d_z: float, n: int, *, alpha: float = 0.05, alternative: Alternative = "two-sided") -> float:
    """Chance that a paired t test of n prompts finds a true effect of d_z = difference / sd (noncentral t).

    Raises:
        UserError: n < 2, an alpha outside (0, 1), or a d_z that is not finite.
    """
    _check_share("alpha", alpha)
    if n < 2 or not np.isfinite(d_z):
        raise UserError(f"No power of {n} prompts for an effect of {d_z}.", "Use at least two prompts.")
    df, shift = n - 1, d_z * np.sqrt(n)
    tails = {"two-sided": (1, -1), "greater": (1,), "less": (-1,)}[alternative]
    edge = stats.t.ppf(1 - alpha / len(tails), df)
    # the lower tail as the upper one of the opposite effect: scipy's nct.cdf is NaN far out
    return float(sum(stats.nct.sf(edge, df, sign * shift) for sign in tails))


def prompts_needed(
    difference: float, sd: float, *, target: float = 0.8, alpha: float = 0.05, one_sided: bool = False
) -> int:
    """Fewest prompts with which a paired t test finds a mean difference with a chance of `target`.

    Args:
        difference: either sign.
        sd: of the differences between systems on one prompt.
        one_sided: test in the direction of the difference.

    Raises:
        UserError: a difference of 0, an sd that is not positive, or over ten million prompts.
    """
    _check_share("target", target)
    if not (np.isfinite(difference) and np.isfinite(sd)) or difference == 0 or sd <= 0:
        raise UserError(f"No number of prompts finds a difference of {difference} with sd {sd}.")
    d_z = abs(difference) / sd
    alternative: Alternative = "greater" if one_sided else "two-sided"

    def enough(n: int) -> bool:
        return power(d_z, n, alpha=alpha, alternative=alternative) >= target

    high = 2
    while not enough(high):
        high *= 2
        if high > MOST_PROMPTS:
            raise UserError(f"A difference of {difference:g} with sd {sd:g} needs over {MOST_PROMPTS:,} prompts.")
    low = high // 2  # not enough, or below two
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _draws(n: int, resamples: int, rng: np.random.Generator) -> Iterator[tuple[slice, np.ndarray]]:
    """How often each of n rows is drawn: (positions among the resamples, (some, n) counts), a few resamples at a time.

    A mean over drawn rows is a product with these counts; they are the same however many are drawn at a time.
    """
    step = max(1, BOOTSTRAP_CELLS // n)
    for start in range(0, resamples, step):
        stop = min(start + step, resamples)
        yield slice(start, stop), rng.multinomial(n, np.full(n, 1 / n), size=stop - start)


def _vector(values: np.ndarray, name: str) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not np.isfinite(array).all():
        raise UserError(f"{name}: scores must be finite and of shape (n,), not {array.shape}.")
    return array


def _scores(values: np.ndarray, name: str) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or array.shape[1] == 0 or not np.isfinite(array).all():
        raise UserError(f"{name}: scores must be finite and of shape (prompts, seeds), not {array.shape}.")
    return array


def _check_share(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise UserError(f"{name} must lie between 0 and 1, not {value}.")


def vendi_score(vectors: np.ndarray) -> float:
    """How many different items there are in effect: exp of the entropy of the eigenvalues of K / n, K the cosines.

    1 where all are the same, n where all are at right angles (Friedman and Dieng 2023, order 1).

    Args:
        vectors: (n, d), n >= 1, none of length 0.

    Raises:
        UserError: other vectors.
    """
    rows = _scores(vectors, "vectors")
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    if not len(rows) or not lengths.all():
        raise UserError("vectors: the Vendi score needs at least one, and none of length 0.")
    singular = np.linalg.svd(rows / lengths, compute_uv=False)
    shares = singular**2 / len(rows)  # eigenvalues of K / n
    shares = shares[shares > 1e-12]
    return float(np.exp(-(shares * np.log(shares)).sum()))
