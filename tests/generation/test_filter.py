"""The filter of Stage 2: which clips are kept, and what the report says."""

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from synthetic_corpus import write_random_corpus
from synthetic_pool import Candidate, write_pool

from ttmray.errors import UserError
from ttmray.generation.filter import (
    BY_CHANCE,
    FilterConfig,
    Selection,
    blend,
    filter_pool,
    markdown,
    read_pool,
    select,
    z_scores,
)

PROMPTS = {f"p{i}": (f"prompt {i}", np.zeros((3, 8))) for i in range(5)}


def pool_table(rewards: list[float | None], claps: list[float | None], **columns: list) -> pa.Table:
    """A pool's index: clip i is candidate i // 5 of prompt i % 5."""
    count = len(rewards)
    return pa.table(
        {
            "key": [f"p{i % 5}_{i // 5}" for i in range(count)],
            "prompt_id": [f"p{i % 5}" for i in range(count)],
            "status": ["ok"] * count,
            "instrumental_reward_score": pa.array(rewards, pa.float64()),
            "clap_score": pa.array(claps, pa.float64()),
            "silence": pa.array([0.0] * count, pa.float64()),
            "clipping": pa.array([0.0] * count, pa.float64()),
            **columns,
        }
    )


def choose(table: pa.Table, **fields: object) -> Selection:
    return select(table, FilterConfig(**({"max_similarity": None} | fields)), {})


def random_table(count: int, seed: int = 0) -> pa.Table:
    rng = np.random.default_rng(seed)
    return pool_table(rng.normal(1, 2, count).tolist(), rng.normal(0.2, 0.1, count).tolist())


def test_the_kept_clips_are_the_top_decile_of_the_equal_weight_blend():
    table = random_table(630)
    reward, clap = table["instrumental_reward_score"].to_numpy(), table["clap_score"].to_numpy()
    expected = (reward - reward.mean()) / reward.std() + (clap - clap.mean()) / clap.std()
    keys, report, _ = choose(table)
    assert keys == [table["key"][i].as_py() for i in np.argsort(-expected)[:63]]
    assert report["clips"] == {"pool": 630, "eligible": 630, "kept": 63}
    spread = report["distributions"]["reward"]
    assert spread["before"]["mean"] == pytest.approx(reward.mean())
    assert spread["after"]["mean"] > spread["before"]["p75"]
    assert len(choose(table, count=64).keys) == 64
    assert len(choose(random_table(640)).keys) == 64
    assert len(choose(random_table(30)).keys) == 3  # 0.1 * 30 is 3.0000000000000004


def test_weights_move_the_selection_from_one_score_to_the_other():
    table = random_table(100)
    for column, fields in (("instrumental_reward_score", {"clap_weight": 0}), ("clap_score", {"reward_weight": 0})):
        best = np.argsort(-table[column].to_numpy())[:10]
        assert choose(table, **fields).keys == [table["key"][i].as_py() for i in best]
    assert choose(table, reward_weight=3, clap_weight=3).keys == choose(table).keys
    assert blend(np.arange(4.0), np.arange(4.0) ** 2, 1, 0).tolist() == z_scores(np.arange(4.0), "x").tolist()
    with pytest.raises(UserError, match="both 0"):
        choose(table, reward_weight=0, clap_weight=0)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(-2, 2), st.integers(-2, 2)), min_size=10, max_size=40), st.randoms())
def test_the_order_of_the_pool_changes_nothing_and_ties_go_by_key(scores, shuffle: random.Random):
    table = pool_table([float(r) for r, _ in scores], [float(c) for _, c in scores])
    if len({r for r, _ in scores}) == 1 or len({c for _, c in scores}) == 1:
        with pytest.raises(UserError, match="is the same"):
            choose(table)
        return
    keys, report, _ = choose(table, share=0.3)
    order = list(range(len(scores)))
    shuffle.shuffle(order)
    other = choose(table.take(order), share=0.3)
    assert (other.keys, other.report) == (keys, report)
    score_of = dict(zip(table["key"].to_pylist(), scores, strict=True))
    for a, b in itertools.pairwise(keys):
        assert score_of[a] != score_of[b] or a < b


def test_clips_without_scores_or_behind_a_gate_are_counted_and_left_out():
    nan = float("nan")
    table = pool_table([5.0, nan, *range(18)], [1.0, 1.0, None, *np.linspace(0, 1, 17)])
    columns = {"status": ["rejected", *["ok"] * 19], "silence": [0.0] * 3 + [0.9, None] + [0.0] * 15}
    columns["clipping"] = [0.0] * 5 + [0.5] + [0.0] * 14
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(values))
    _, report, _ = choose(table)
    assert report["excluded"] == {
        "clipping > 0.01": 1,
        "no clap_score": 1,
        "no instrumental_reward_score": 1,
        "no silence": 1,
        "rejected": 1,
        "silence > 0.5": 1,
    }
    assert report["clips"] == {"pool": 20, "eligible": 14, "kept": 2}
    _, report, _ = choose(table, max_silence=None, max_clipping=None, clap_weight=0)
    assert report["clips"]["eligible"] == 18
    assert list(report["distributions"]) == ["reward", "blend"]  # a CLAP score is missing


def test_a_quota_keeps_the_best_of_every_prompt():
    table = pool_table([float(i % 5 == 0) * 10 + i / 100 for i in range(50)], [i / 50 for i in range(50)])
    free, bound = choose(table, count=5), choose(table, count=5, per_prompt=1)
    assert free.report["prompts"]["largest_share"] == 1.0
    assert bound.keys == ["p0_9", "p4_9", "p3_9", "p2_9", "p1_9"]
    assert bound.report["prompts"]["each"]["p3"] == {"eligible": 10, "kept": 1}
    with pytest.raises(UserError, match="only 5 of the 6"):
        choose(table, count=6, per_prompt=1)


def test_near_duplicates_of_better_clips_are_passed_over():
    table = random_table(30)
    best = choose(table, count=3).keys
    rng = np.random.default_rng(1)
    vectors = {key: rng.standard_normal(512) for key in table["key"].to_pylist()}
    vectors[best[1]] = 3 * vectors[best[0]] + 0.01 * rng.standard_normal(512)
    keys, report, _ = select(table, FilterConfig(count=3), vectors)
    assert best[0] in keys
    assert best[1] not in keys
    assert report["passed_over"]["near-duplicate"] == 1
    with pytest.raises(UserError, match="only 1 of the 3"):
        select(table, FilterConfig(count=3), dict.fromkeys(vectors, rng.standard_normal(512)))


@pytest.mark.parametrize(
    ("count", "fields", "message"),
    [(9, {}, "at least 10"), (5, {"count": 5}, "at least 6"), (60, {"share": 0.01}, "at least 100"), (0, {}, "0 of 0")],
)
def test_a_pool_that_is_too_small_is_an_error(count, fields, message):
    with pytest.raises(UserError, match=message):
        choose(random_table(count), **fields)


def clips() -> list[Candidate]:
    rng = np.random.default_rng(3)
    numbers = zip(rng.normal(size=40).tolist(), rng.normal(size=40).tolist(), strict=True)
    return [Candidate(f"p{i % 5}", i // 5, rng.normal(size=(5, 4)), r, c) for i, (r, c) in enumerate(numbers)]


@pytest.fixture
def pool(tmp_path: Path) -> str:
    return str(write_pool(str(tmp_path / "pool"), clips(), PROMPTS))


def test_a_pool_on_disk_gives_keys_and_a_report_beside_the_training_rewards(pool, tmp_path):
    corpus = write_random_corpus(
        str(tmp_path / "corpus"), tracks=7, validation=1, latent=(5, 4), text=(3, 8), clips_per_track=3
    )
    out = tmp_path / "selection"
    assert filter_pool(pool, str(out), FilterConfig(), corpus.uri) == 0
    kept = (out / "kept.txt").read_text().split()
    assert kept == choose(read_pool(pool)[0]).keys
    assert len(kept) == 4
    report = json.loads((out / "selection.json").read_text())
    train = read_rewards(corpus.uri)
    assert report["train"]["clips"] == len(train) == 18
    assert report["train"]["share_at_or_above_kept_mean"] == np.mean(train >= report["train"]["kept_mean"])
    assert "of 18 training clips have as much" in (out / "selection.md").read_text()


def test_a_reward_without_weight_may_be_missing_and_is_then_not_compared(tmp_path):
    corpus = write_random_corpus(str(tmp_path / "corpus"), tracks=2, latent=(5, 4), text=(3, 8), clips_per_track=3)
    clips = [Candidate(f"p{i % 5}", i // 5, np.zeros((5, 4)), float(i) if i else None, float(i)) for i in range(20)]
    pool = write_pool(str(tmp_path / "pool"), clips, PROMPTS)
    out = tmp_path / "selection"
    assert filter_pool(pool.uri, str(out), FilterConfig(reward_weight=0), corpus.uri) == 0
    assert "train" not in json.loads((out / "selection.json").read_text())


def read_rewards(corpus: str) -> np.ndarray:
    rows = pq.read_table(f"{corpus}/index.parquet").to_pylist()
    return np.array([row["instrumental_reward_score"] for row in rows if row["split"] == "train"])


def test_the_same_selection_is_made_again_and_another_needs_another_folder(pool, tmp_path):
    out = tmp_path / "selection"
    filter_pool(pool, str(out), FilterConfig())
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    filter_pool(pool, str(out), FilterConfig())
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    with pytest.raises(UserError, match=r"filter.share: 0.1 -> 0.2"):
        filter_pool(pool, str(out), FilterConfig(share=0.2))


def test_what_is_no_pool_is_refused(pool, tmp_path):
    with pytest.raises(UserError, match="not a finished pool"):
        read_pool(str(tmp_path / "nothing"))
    corpus = write_random_corpus(str(tmp_path / "corpus"), tracks=2, latent=(5, 4), text=(3, 8), clips_per_track=3)
    with pytest.raises(UserError, match="no column prompt_id"):
        read_pool(corpus.uri)
    few = write_pool(str(tmp_path / "few"), [replace(clip, reward=None) for clip in clips()], PROMPTS)
    with pytest.raises(UserError, match=r"few: 0 of 40 clips .*: no instrumental_reward_score 40\)"):
        filter_pool(few.uri, str(tmp_path / "out"), FilterConfig())
    assert not (tmp_path / "out").exists()
    shard = next(Path(pool).glob("shards/*.tar"))
    shard.write_bytes(shard.read_bytes()[:5000])
    with pytest.raises(UserError, match="damaged"):
        filter_pool(pool, str(tmp_path / "out"), FilterConfig())


def test_with_a_temperature_all_clips_stay_with_weights_that_follow_the_blend():
    table = random_table(200)
    reward, clap = table["instrumental_reward_score"].to_numpy(), table["clap_score"].to_numpy()
    blended = ((reward - reward.mean()) / reward.std() + (clap - clap.mean()) / clap.std()) / 2
    keys, report, weights = choose(table, temperature=0.5, max_weight=8.0)
    of = dict(zip(table["key"].to_pylist(), np.minimum(np.exp(blended / 0.5), 8.0), strict=True))
    expected = np.array([of[key] for key in keys])
    assert sorted(keys) == sorted(of)
    assert weights == pytest.approx(expected / expected.mean(), rel=1e-9)
    assert weights.mean() == pytest.approx(1)
    assert (np.diff(weights) <= 0).all()
    assert report["weights"]["effective"] == pytest.approx(weights.sum() ** 2 / (weights**2).sum())
    alike = choose(table, temperature=1e9)
    assert alike.weights == pytest.approx(np.ones(200), abs=1e-6)
    assert alike.report["weights"]["effective"] == pytest.approx(200)
    assert "weights of the losses" in markdown(report)
    assert (choose(table).weights == 1).all()


def test_a_weighted_sum_of_columns_ranks_in_place_of_the_blend():
    table = random_table(50)
    reward, clap = table["instrumental_reward_score"].to_numpy(), table["clap_score"].to_numpy()
    total = 2 * reward - 0.5 * clap
    keys, _, _ = choose(table, rewards={"instrumental_reward_score": 2.0, "clap_score": -0.5})
    assert keys == [table["key"][i].as_py() for i in np.argsort(-total)[:5]]
    weights = choose(table, rewards={"instrumental_reward_score": 1.0}, temperature=2.0).weights
    z = np.sort((reward - reward.mean()) / reward.std())[::-1]
    assert weights == pytest.approx(np.exp(z / 2) / np.exp(z / 2).mean())  # of standard deviations, whatever the scale
    lost = pool_table([1.0, 2.0, 3.0], [0.1, None, 0.3])
    assert choose(lost, rewards={"clap_score": 1.0}, count=1).report["excluded"] == {"no clap_score": 1}
    with pytest.raises(ValidationError, match="leave out one"):
        FilterConfig(rule="json:dumps", rewards={"clap_score": 1.0})


def test_weighted_clips_pass_the_same_gates_and_need_no_decile():
    table = pool_table([0.0, 1.0, 2.0, 5.0], [0.1, 0.2, 0.3, 0.4], silence=pa.array([0.0, 0.0, 0.0, 1.0]))
    keys, report, weights = choose(table, temperature=1.0)
    assert keys == ["p2_0", "p1_0", "p0_0"]
    assert report["excluded"] == {"silence > 0.5": 1}
    assert weights[0] > weights[1] > weights[2] > 0
    assert choose(table, temperature=1.0, per_prompt=1).keys == keys


@pytest.mark.parametrize("column", ["caption", "split", "candidate", "segment", "pool_seed", "key"])
def test_what_is_no_score_ranks_no_clips(tmp_path, column):
    pool = write_pool(str(tmp_path / "pool"), clips(), PROMPTS)
    with pytest.raises(UserError, match=f"has no score column '{column}'. It has: .*reward_score"):
        read_pool(str(pool), (column,))


def test_by_chance_clips_are_drawn_alike_in_every_run_and_whatever_their_scores():
    table = random_table(400)
    keys, *_ = choose(table, rule=BY_CHANCE, count=100)
    again, *_ = choose(table.take(list(range(399, -1, -1))), rule=BY_CHANCE, count=100)
    assert keys == again
    rewards = dict(zip(table["key"].to_pylist(), table["instrumental_reward_score"].to_pylist(), strict=True))
    everyone, drawn = np.array(list(rewards.values())), np.array([rewards[key] for key in keys])
    assert abs(drawn.mean() - everyone.mean()) < 4 * everyone.std() / np.sqrt(100)


def test_a_rule_that_fails_is_named():
    with pytest.raises(UserError, match="rule: json:dumps failed: TypeError: "):
        choose(random_table(50), rule="json:dumps")
