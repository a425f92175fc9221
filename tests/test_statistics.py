"""Statistics against scipy, hand-worked values, the published comparison of 100 prompts, and simulations."""

import csv
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from ttmray import statistics
from ttmray.errors import UserError
from ttmray.statistics import (
    bootstrap,
    holm,
    mcnemar,
    paired,
    paired_from_summary,
    pearson,
    pearson_interval,
    power,
    prompts_needed,
    spearman,
)

SCORES = np.array([-0.5, 0.0, 0.5, 1.0, 1.5, 2.0])

# Published scores of 100 prompts: mean difference, t, interval, p, d_z; scipy and pandas made them.
PUBLISHED = {
    "clap sub1 - baseline": (0.1943, 12.499, 0.1634, 0.2251, 4.4e-22, 1.25),
    "clap sub2 - baseline": (0.2084, 13.414, 0.1776, 0.2393, 5.3e-24, 1.34),
    "clap sub1 - sub2": (-0.0142, -1.493, -0.0330, 0.0047, 0.138, -0.15),
    "reward sub1 - baseline": (0.5725, 7.655, 0.4241, 0.7209, 1.3e-11, 0.77),
    "reward sub2 - baseline": (0.5895, 7.839, 0.4403, 0.7387, 5.3e-12, 0.78),
    "reward sub1 - sub2": (-0.0170, -0.389, -0.1036, 0.0696, 0.698, -0.04),
}


def shared_scores(data_dir: Path, column: str, system: str) -> np.ndarray:
    """(24,) scores in the order of the prompt ids."""
    with open(data_dir / "clips" / "clips.csv", newline="") as file:
        scores = {row["prompt_id"]: float(row[column]) for row in csv.DictReader(file) if row["system"] == system}
    return np.array([scores[key] for key in sorted(scores)])


@pytest.mark.parametrize("column", ["clap_score", "tunejury_reward"])
@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
def test_the_shared_prompts_give_scipys_numbers(data_dir: Path, column: str, alternative: str) -> None:
    a, b = (shared_scores(data_dir, column, name) for name in ("sub1", "baseline"))
    got = paired(a, b, alternative=alternative)
    expected = stats.ttest_rel(a, b, alternative=alternative)
    assert got.n == 24
    assert got.difference == pytest.approx(np.mean(a - b), abs=1e-12)
    assert got.t == pytest.approx(expected.statistic, rel=1e-9)
    assert got.p == pytest.approx(expected.pvalue, rel=1e-9)
    interval = stats.ttest_rel(a, b).confidence_interval()
    assert (got.low, got.high) == pytest.approx((interval.low, interval.high), abs=1e-9)
    assert got.wilcoxon_p == pytest.approx(stats.wilcoxon(a, b, alternative=alternative).pvalue, rel=1e-9)
    assert got.d_z == pytest.approx(got.t / np.sqrt(24), rel=1e-12)
    assert (got.wins, got.ties, got.losses) == (np.sum(a > b), np.sum(a == b), np.sum(a < b))


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_comparison_follows_from_its_summary(name: str) -> None:
    difference, t, low, high, p, d_z = PUBLISHED[name]
    sd = (high - low) / 2 / stats.t.ppf(0.975, 99) * 10  # as exact as four digits of an interval allow
    got = paired_from_summary(difference, sd, 100)
    rounding = 5e-5 / abs(difference) + 5e-5 / ((high - low) / 2)  # relative, of what is published
    assert got.t == pytest.approx(t, rel=rounding, abs=5e-4)
    assert got.d_z == pytest.approx(d_z, abs=5e-3 + rounding * abs(d_z))
    assert (got.low, got.high) == pytest.approx((low, high), abs=1.1e-4)
    # p from the published t, which has more digits than p (-1.493 gives 0.1386 where 0.138 is published)
    exact = paired_from_summary(t / 10, 1.0, 100)
    assert exact.t == pytest.approx(t, rel=1e-12)
    assert exact.p == pytest.approx(p, abs=1e-3 if p > 0.01 else 0.06 * 10 ** np.floor(np.log10(p)))


def test_a_system_against_itself_is_no_difference() -> None:
    scores = np.array([0.1, 0.5, 0.3])
    got = paired(scores, scores)
    assert (got.difference, got.t, got.p, got.d_z, got.wilcoxon_p) == (0, 0, 1, 0, 1)
    assert (got.low, got.high, got.ties) == (0, 0, 3)
    always = paired_from_summary(0.5, 0.0, 10)
    assert (always.t, always.p, always.low, always.high) == (np.inf, 0, 0.5, 0.5)


def test_swapping_the_systems_turns_the_sign() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 30))
    one, other = paired(a, b, alternative="greater"), paired(b, a, alternative="less")
    assert (one.p, one.wilcoxon_p) == pytest.approx((other.p, other.wilcoxon_p), rel=1e-12)
    assert (one.low, one.high, one.t) == pytest.approx((-other.high, -other.low, -other.t), rel=1e-12)
    assert (one.wins, one.losses) == (other.losses, other.wins)


def test_holm_gives_the_hand_worked_values() -> None:
    """Sorted .005 .01 .03 .04 times 4 3 2 1 is .02 .03 .06 .04; the last is lifted to the one before it."""
    cells = {("r1", "clap"): 0.01, ("r1", "reward"): 0.04, ("r2", "clap"): 0.03, ("r2", "reward"): 0.005}
    got = holm(cells)
    assert list(got) == list(cells)
    assert list(got.values()) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm({"a": 0.6, "b": 0.5}) == {"a": 1.0, "b": 1.0}
    assert holm({"one": 0.2}) == {"one": 0.2}
    assert holm({}) == {}


@pytest.mark.parametrize("p", [float("nan"), -0.1, 1.1])
def test_holm_refuses_what_is_no_p(p: float) -> None:
    with pytest.raises(UserError, match="cell 'b'"):
        holm({"a": 0.5, "b": p})


def test_holm_keeps_false_marks_rare_over_the_table() -> None:
    rng = np.random.default_rng(0)
    tables = rng.uniform(size=(2000, 16))
    any_mark = np.mean([min(holm(dict(enumerate(table))).values()) < 0.05 for table in tables])
    assert any_mark == pytest.approx(0.05, abs=0.015)


def _covered(prompt_sd: float, seed_sd: float, noise_sd: float, shape: tuple[int, int]) -> float:
    """How often the interval of mean 1 covers it, with effects of prompts, of columns, and noise."""
    rng = np.random.default_rng(0)
    hits = []
    for run in range(1000):
        prompts, columns = rng.normal(size=(shape[0], 1)), rng.normal(size=(1, shape[1]))
        got = bootstrap(
            1 + prompt_sd * prompts + seed_sd * columns + noise_sd * rng.normal(size=shape), resamples=400, seed=run
        )
        hits.append(got.low <= 1 <= got.high)
    return float(np.mean(hits))


def test_bootstrap_intervals_cover_prompts_and_their_noise() -> None:
    assert _covered(1, 0, 1, (40, 3)) == pytest.approx(0.94, abs=0.025)
    assert _covered(0.1, 0, 1, (40, 3)) == pytest.approx(0.94, abs=0.025)
    # what goes wrong when seeds shared by all prompts are taken for noise of each
    assert _covered(1, 0.5, 0.3, (40, 10)) < 0.86


def test_the_bootstrap_of_one_seed_is_the_t_interval() -> None:
    difference = np.random.default_rng(1).normal(0.2, 1, size=(200, 1))
    got = bootstrap(difference)
    expected = paired(difference[:, 0], np.zeros(200))
    assert got.value == pytest.approx(expected.difference, rel=1e-12)
    assert (got.low, got.high) == pytest.approx((expected.low, expected.high), abs=0.01)
    assert (got.n_prompts, got.n_seeds) == (200, 1)


def test_the_bootstrap_pairs_prompts_of_two_systems_with_other_numbers_of_seeds() -> None:
    rng = np.random.default_rng(2)
    prompts = 10 * rng.normal(size=(50, 1))  # far larger than the difference, and shared
    a, b = prompts + 0.5 + 0.2 * rng.normal(size=(50, 3)), prompts + 0.2 * rng.normal(size=(50, 2))
    got = bootstrap(a, b)
    assert got.value == pytest.approx(a.mean() - b.mean(), rel=1e-9)
    assert 0.3 < got.low < 0.5 < got.high < 0.7
    assert got == bootstrap(a, b)


def test_the_bootstrap_draws_in_parts_what_it_drew_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    a, b = rng.normal(size=(30, 3)), rng.normal(size=(30, 2))
    at_once = bootstrap(a, b, resamples=200)
    monkeypatch.setattr(statistics, "BOOTSTRAP_CELLS", 7 * 30)  # 200 is no multiple of 7
    in_parts = bootstrap(a, b, resamples=200)
    assert (in_parts.value, in_parts.low, in_parts.high) == pytest.approx(
        (at_once.value, at_once.low, at_once.high), rel=1e-12
    )


def test_the_bootstrap_of_many_prompts_takes_little_memory() -> None:
    scores = np.random.default_rng(5).normal(size=(5000, 1))
    tracemalloc.start()
    try:
        bootstrap(scores, resamples=2000)
        assert tracemalloc.get_traced_memory()[1] < 40 * 2**20  # all draws at once are 76 MiB, and as much again
    finally:
        tracemalloc.stop()


def test_the_bootstrap_refuses_what_it_cannot_say() -> None:
    with pytest.raises(UserError, match="not 5 and 4"):
        bootstrap(np.ones((5, 2)), np.ones((4, 2)))
    with pytest.raises(UserError, match="two or more prompts"):
        bootstrap(np.ones((1, 2)))
    with pytest.raises(UserError, match=r"B: scores must be finite"):
        bootstrap(np.ones((5, 2)), np.full((5, 2), np.nan))


def test_mcnemar_is_the_uncorrected_chi_square_and_the_sign_test() -> None:
    assert mcnemar(30, 15) == pytest.approx((5.0, 0.025347318677468252), rel=1e-12)  # erfc(sqrt(5 / 2))
    assert mcnemar(15, 30) == mcnemar(30, 15)
    assert mcnemar(1, 5, exact=True)[1] == pytest.approx(2 * (1 + 6) / 64, rel=1e-12)
    assert mcnemar(0, 0) == (0.0, 1.0)
    assert mcnemar(4, 4, exact=True) == (0.0, 1.0)
    with pytest.raises(UserError, match="counts"):
        mcnemar(-1, 3)


def test_spearman_shares_ranks_of_ties() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 4, size=(2, 40)).astype(float)
    y += x
    got, expected = spearman(x, y), stats.spearmanr(x, y)
    assert (got.rho, got.p) == pytest.approx((expected.statistic, expected.pvalue), rel=1e-12)
    assert got.low is not None
    assert got.high is not None
    assert got.low < got.rho < got.high < 1


def test_spearman_counts_orders_of_few_points() -> None:
    sweep = np.arange(4.0)
    got = spearman(sweep, np.array([0.16, 0.2, 0.3, 0.47]))
    assert (got.rho, got.p, got.low) == (1, pytest.approx(2 / 24), None)
    by_scipy = stats.permutation_test(
        (np.array([1.0, 2, 2, 3, 5]),),
        lambda x: stats.spearmanr(x, [2.0, 1, 4, 4, 3]).statistic,
        permutation_type="pairings",
    )
    got = spearman(np.array([1.0, 2, 2, 3, 5]), np.array([2.0, 1, 4, 4, 3]))
    assert (got.rho, got.p) == pytest.approx((by_scipy.statistic, by_scipy.pvalue), rel=1e-9)


def test_the_interval_of_spearman_covers() -> None:
    rng = np.random.default_rng(0)
    pearson, hits = 0.6, []
    truth = 6 / np.pi * np.arcsin(pearson / 2)  # of a bivariate normal
    for _ in range(400):
        x, y = rng.normal(size=(2, 50))
        got = spearman(x, pearson * x + np.sqrt(1 - pearson**2) * y)
        hits.append(got.low <= truth <= got.high)
    assert np.mean(hits) == pytest.approx(0.95, abs=0.03)


def test_spearman_refuses_what_has_no_ranks() -> None:
    with pytest.raises(UserError, match="constant"):
        spearman(np.arange(5.0), np.ones(5))
    with pytest.raises(UserError, match="three or more"):
        spearman(np.arange(2.0), np.arange(2.0))
    with pytest.raises(UserError, match="three or more"):
        spearman(np.arange(4.0), np.arange(5.0))
    with pytest.raises(UserError, match="y: scores must be finite"):
        spearman(np.arange(3.0), np.array([1.0, np.nan, 2.0]))


def responses(
    rng: np.random.Generator,
    prompts: int,
    slope: float,
    level_sd: float,
    slope_sd: float,
    noise: float,
    samples: int = 1,
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Input score, reward and prompt of every clip; prompts differ in their level and in how they follow the score."""
    level = rng.normal(0, level_sd, (prompts, 1, 1))
    slopes = slope + rng.normal(0, slope_sd, (prompts, 1, 1))
    rewards = level + slopes * SCORES[:, None] + rng.normal(0, noise, (prompts, len(SCORES), samples))
    inputs = np.broadcast_to(SCORES[:, None], rewards.shape)
    return inputs.ravel(), rewards.ravel(), np.repeat(np.arange(prompts), rewards[0].size).tolist()


@pytest.mark.parametrize("prompts", [10, 40])
@pytest.mark.parametrize(("slope", "level_sd", "slope_sd"), [(0.15, 0.5, 0.0), (0.15, 0.5, 0.1), (0.6, 0.5, 0.1)])
def test_the_interval_of_pearson_covers_where_points_share_prompts(
    prompts: int, slope: float, level_sd: float, slope_sd: float
) -> None:
    rng = np.random.default_rng(1)
    scores_variance = SCORES.var()
    score_part = slope**2 * scores_variance
    other_part = level_sd**2 + slope_sd**2 * (SCORES**2).mean() + 0.2**2
    true = np.sqrt(score_part / (score_part + other_part))
    covered, widths, fisher = 0, [], []
    for _ in range(600):
        x, y, of = responses(rng, prompts, slope, level_sd, slope_sd, 0.2)
        interval = pearson_interval(x, y, of)
        assert interval is not None
        covered += interval[0] <= true <= interval[1]
        widths.append(interval[1] - interval[0])
        fisher.append(np.diff(stats.pearsonr(x, y).confidence_interval()).item())
    assert 0.90 <= covered / 600 <= 0.98
    if slope < 0.6 and slope_sd == 0:  # only levels differ: points taken for independent say too little
        assert np.mean(fisher) > 1.4 * np.mean(widths)


def test_the_interval_of_pearson_is_the_jackknife_over_prompts_worked_by_hand() -> None:
    x, y, of = responses(np.random.default_rng(3), 7, 0.3, 0.5, 0.1, 0.2, samples=2)
    keep = np.random.default_rng(4).permutation(len(x))[:70]  # some clips failed, in any order
    x, y, of = x[keep] + 1e4, y[keep] - 1e4, [f"prompt {of[i]}" for i in keep]
    z = np.array([np.arctanh(pearson(*(v[np.array(of) != one] for v in (x, y)))) for one in sorted(set(of))])
    half = stats.t.ppf(0.95, 6) * np.sqrt(6 / 7 * ((z - z.mean()) ** 2).sum())
    middle = np.arctanh(stats.pearsonr(x, y).statistic)
    assert pearson_interval(x, y, of, 0.9) == pytest.approx(np.tanh([middle - half, middle + half]), abs=1e-9)
    assert pearson(x, y) == stats.pearsonr(x, y).statistic


def test_copies_of_a_prompts_clips_make_no_interval_narrower() -> None:
    x, y, of = responses(np.random.default_rng(5), 12, 0.3, 0.5, 0.1, 0.2)
    once, thrice = pearson_interval(x, y, of), pearson_interval(np.tile(x, 3), np.tile(y, 3), of * 3)
    assert once == pytest.approx(thrice, abs=1e-12)


def test_pearson_says_nothing_where_there_is_nothing_to_say() -> None:
    x, y = np.arange(6.0), np.array([1.0, 0, 3, 2, 5, 1])
    assert pearson(np.ones(5), np.arange(5.0)) is None
    assert pearson_interval(x, y, list("aabbaa")) is None  # two prompts
    assert pearson_interval(np.ones(6), y, list("aabbcc")) is None
    assert pearson_interval(x, 2 * x, list("aabbcc")) is None
    assert pearson_interval(np.array([0, 0, 0, 0, 0, 1.0]), y, list("aabbcc")) is None  # without c it is constant
    for bad in (lambda: pearson(x, y[:3]), lambda: pearson_interval(x, y, "ab"), lambda: pearson(x, y * np.nan)):
        with pytest.raises(UserError):
            bad()


@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
@pytest.mark.parametrize(("d_z", "n"), [(0.3, 60), (0.5, 20), (0.0, 15), (-0.4, 40)])
def test_power_is_how_often_a_simulation_finds_the_effect(alternative: str, d_z: float, n: int) -> None:
    draws = d_z + np.random.default_rng(0).normal(size=(20_000, n))
    found = (stats.ttest_1samp(draws, 0, axis=1, alternative=alternative).pvalue < 0.05).mean()
    assert power(d_z, n, alternative=alternative) == pytest.approx(found, abs=0.012)


@pytest.mark.parametrize(("d_z", "one_sided", "n"), [(0.2, False, 199), (0.5, False, 34), (0.8, False, 15)])
def test_numbers_of_prompts_are_those_of_the_tables(d_z: float, one_sided: bool, n: int) -> None:
    """G*Power 3.1, matched pairs, alpha 0.05, power 0.8."""
    assert prompts_needed(d_z, 1.0, one_sided=one_sided) == n
    assert prompts_needed(-3 * d_z, 3.0, one_sided=one_sided) == n


@pytest.mark.parametrize("d_z", [0.03, 0.15, 0.77, 1.34, 20.0])
@pytest.mark.parametrize("one_sided", [False, True])
def test_one_prompt_less_is_not_enough(d_z: float, one_sided: bool) -> None:
    n = prompts_needed(d_z, 1.0, target=0.9, one_sided=one_sided)
    kind = "greater" if one_sided else "two-sided"
    assert power(d_z, n, alternative=kind) >= 0.9
    assert n == 2 or power(d_z, n - 1, alternative=kind) < 0.9


def test_power_refuses_what_has_no_answer() -> None:
    with pytest.raises(UserError, match="difference of 0"):
        prompts_needed(0, 1)
    with pytest.raises(UserError, match="sd 0"):
        prompts_needed(1, 0)
    with pytest.raises(UserError, match="over 10,000,000 prompts"):
        prompts_needed(1e-5, 1)
    with pytest.raises(UserError, match="alpha"):
        power(0.5, 10, alpha=5)
    with pytest.raises(UserError, match="at least two"):
        power(0.5, 1)


def test_paired_tests_refuse_what_is_not_paired() -> None:
    with pytest.raises(UserError, match="A has 3 scores and B has 2"):
        paired(np.ones(3), np.ones(2))
    with pytest.raises(UserError, match="1 prompts say nothing"):
        paired(np.ones(1), np.ones(1))
    with pytest.raises(UserError, match="B: scores must be finite"):
        paired(np.ones(2), np.array([1, np.inf]))
    with pytest.raises(UserError, match="No paired test"):
        paired_from_summary(1.0, -1.0, 10)
    with pytest.raises(UserError, match="confidence"):
        paired_from_summary(1.0, 1.0, 10, confidence=95)


def test_the_vendi_score_counts_the_different_items():
    rng = np.random.default_rng(0)
    assert statistics.vendi_score(np.eye(5)) == pytest.approx(5)
    assert statistics.vendi_score(np.ones((5, 3))) == pytest.approx(1)
    assert statistics.vendi_score(np.eye(3)[[0, 0, 1, 1, 2, 2]] * rng.uniform(1, 9, (6, 1))) == pytest.approx(3)
    with pytest.raises(UserError, match="length 0"):
        statistics.vendi_score(np.zeros((2, 3)))


def test_intervals_over_prompts_and_seeds_cover_the_mean_of_both():
    rng = np.random.default_rng(5)
    for of_seed in (0.0, 0.3):
        inside = 0
        for _ in range(400):
            table = rng.normal(0, 0.3, (30, 1)) + rng.normal(0, of_seed, (1, 3)) + rng.normal(0, 0.3, (30, 3))
            one = statistics.crossed(table)
            inside += one.low <= 0 <= one.high
        assert inside / 400 >= 0.93  # with a seed's effect of 0 it may cover more


def test_p_over_prompts_and_seeds_is_small_as_often_as_it_says():
    rng = np.random.default_rng(8)
    for of_seed in (0.0, 0.2, 0.5):
        small = 0
        for _ in range(400):
            table = rng.normal(0, 0.3, (30, 1)) + rng.normal(0, of_seed, (1, 3)) + rng.normal(0, 0.3, (30, 3))
            one = statistics.crossed(table)
            small += one.p < 0.05
            assert (one.p < 0.05) == (one.low > 0 or one.high < 0)
        assert small / 400 <= 0.07


def test_the_interval_over_both_is_not_narrower_than_that_of_seeds_alone():
    rng = np.random.default_rng(9)
    for _ in range(50):
        table = rng.normal(0, 0.3, (30, 1)) + rng.normal(0, 0.2, (1, 3)) + rng.normal(0, 0.3, (30, 3))
        one = statistics.crossed(table)
        alone = statistics.mean_interval(table.mean(axis=0))
        assert one.high - one.low >= alone[1] - alone[0] - 1e-12


def test_one_column_has_the_interval_of_its_prompts_and_one_prompt_none():
    column = np.random.default_rng(6).normal(size=(20, 1))
    one = statistics.crossed(column)
    assert (one.low, one.high) == pytest.approx(statistics.mean_interval(column[:, 0]))
    assert statistics.crossed(np.ones((1, 3))) is None
    assert statistics.crossed(np.ones((4, 3))) == (1.0, 1.0, 1.0, 0.0)
    assert statistics.crossed(np.zeros((4, 3))) == (0.0, 0.0, 0.0, 1.0)
    assert one.p == pytest.approx(stats.ttest_1samp(column[:, 0], 0).pvalue)
    with pytest.raises(UserError, match="finite"):
        statistics.crossed(np.full((4, 3), np.nan))
