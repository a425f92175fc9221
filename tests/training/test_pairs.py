"""Pairs of winner and loser: who wins, who is left out, and what the file says."""

import json
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from synthetic_pool import Candidate, write_pool

from ttmray.errors import UserError
from ttmray.generation.filter import read_pool
from ttmray.training.pairs import PairsConfig, build_pairs, make_pairs, read_pairs

Scores = dict[str, list[float | None]]


def pool_table(claps: Scores, rewards: Scores | None = None) -> pa.Table:
    """A pool's index from the CLAP scores (and rewards) of every prompt's candidates."""
    rows = [
        {
            "key": f"{name}_{i}",
            "prompt_id": name,
            "caption": f"text of {name}",
            "status": "ok",
            "clap_score": clap,
            "instrumental_reward_score": float(i) if rewards is None else rewards[name][i],
        }
        for name, scores in claps.items()
        for i, clap in enumerate(scores)
    ]
    return pa.Table.from_pylist(rows)


def sides(table: pa.Table, **fields: object) -> list[tuple[str, str]]:
    return [(row["winner"], row["loser"]) for row in make_pairs(table, PairsConfig(**fields)).rows]


def test_the_highest_score_wins_and_the_lowest_loses():
    rewards = {"a": [1.0, 0.0, 5.0]}
    table = pool_table({"a": [0.3, 0.1, 0.2]}, rewards)
    assert sides(table) == [("a_0", "a_1")]
    assert sides(table, by="reward") == [("a_2", "a_1")]
    assert sides(table, by="blend", reward_weight=9, clap_weight=1) == [("a_2", "a_1")]
    (row,) = make_pairs(table, PairsConfig()).rows
    assert row["margin"] == pytest.approx(0.2)
    assert (row["winner_reward"], row["loser_reward"]) == (1.0, 0.0)
    assert (row["caption"], row["winner_clap"], row["loser_clap"]) == ("text of a", 0.3, 0.1)


def test_every_way_of_giving_no_pair_is_counted():
    nan = float("nan")
    claps = {
        "pair": [0.5, 0.1],
        "one": [0.5],
        "tie": [0.3, 0.3],
        "near": [0.30, 0.31],
        "lost": [nan, None],
        "half": [0.5, nan],
    }
    made, report = make_pairs(pool_table(claps), PairsConfig(margin=0.05))
    assert [row["prompt_id"] for row in made] == ["pair"]
    assert report["prompts"] == {
        "pool": 6,
        "with pairs": 1,
        "one candidate": 2,
        "margin too small": 2,
        "no usable candidate": 1,
    }
    assert report["clips"] == {"pool": 11, "ok": 10 + 1, "no score": 3}


def test_several_pairs_of_a_prompt_take_the_best_and_the_worst_in_turn():
    table = pool_table({"a": [0.1, 0.5, 0.3, 0.4, 0.2], "b": [0.9, 0.8]})
    assert set(sides(table, per_prompt=2)) == {("a_1", "a_0"), ("a_3", "a_4"), ("b_0", "b_1")}
    assert sides(table, per_prompt=9)[-1] == ("a_3", "a_4")  # second pairs come after all first ones


def test_a_winner_by_domination_is_better_in_every_column_by_its_margin():
    claps = {"a": [0.9, 0.5, 0.1, 0.2], "b": [0.1, 0.9]}
    rewards = {"a": [1.0, 3.0, 0.0, 2.0], "b": [1.0, 0.0]}
    table = pool_table(claps, rewards)
    both = {"clap_score": 0.0, "instrumental_reward_score": 0.0}
    how = {"by": "rewards", "rewards": {"clap_score": 1.0, "instrumental_reward_score": 0.1}}
    assert sides(table, dominate=both, **how) == [("a_0", "a_2")]  # a_3 has the reward, a_1 not the CLAP score
    assert sides(table, dominate=both, per_prompt=3, **how) == [("a_0", "a_2"), ("a_1", "a_3")]
    wide = both | {"instrumental_reward_score": 1.0}
    assert sides(table, dominate=wide, per_prompt=3, **how) == [("a_1", "a_2")]  # exactly 1 is not more
    _, report = make_pairs(table, PairsConfig(dominate=both, **how))
    assert report["prompts"] == {"pool": 2, "with pairs": 1, "no domination": 1, "no usable candidate": 0}


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=8), st.integers(1, 4))
def test_no_clip_is_in_two_pairs_by_domination_and_none_that_holds_is_left(scores, per_prompt):
    table = pool_table({"a": [float(c) for c, _ in scores]}, {"a": [float(r) for _, r in scores]})
    columns = {"clap_score": 0.0, "instrumental_reward_score": 0.0}
    pairs = sides(table, by="reward", dominate=columns, per_prompt=per_prompt)
    used = [clip for pair in pairs for clip in pair]
    assert len(set(used)) == len(used)
    of = {f"a_{i}": both for i, both in enumerate(scores)}
    assert all(of[best][0] > of[worst][0] and of[best][1] > of[worst][1] for best, worst in pairs)
    free = [both for key, both in of.items() if key not in used]
    if len(pairs) < per_prompt:
        assert not any(a[0] > b[0] and a[1] > b[1] for a in free for b in free)


def test_a_weighted_sum_of_columns_ranks_the_candidates():
    table = pool_table({"a": [0.3, 0.1, 0.2]}, {"a": [1.0, 5.0, None]})
    for rewards, pair in (
        ({"clap_score": 100.0, "instrumental_reward_score": 1.0}, ("a_0", "a_1")),
        ({"clap_score": 1.0, "instrumental_reward_score": 1.0}, ("a_1", "a_0")),
        ({"clap_score": -1.0}, ("a_1", "a_0")),
    ):
        assert sides(table, by="rewards", rewards=rewards) == [pair]
    for fields in ({"by": "rewards"}, {"rewards": {"clap_score": 1.0}}):
        with pytest.raises(ValidationError, match="go together"):
            PairsConfig(**fields)


@settings(deadline=None, max_examples=60)
@given(
    st.dictionaries(st.sampled_from("abcdefg"), st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1),
    st.integers(0, 2),
    st.integers(1, 4),
    st.integers(1, 3),
    st.randoms(),
)
def test_pairs_do_not_depend_on_the_order_and_never_break_the_rules(scores, margin, count, per_prompt, shuffle):
    table = pool_table({name: [float(s) for s in some] for name, some in scores.items()})
    config = PairsConfig(margin=margin, count=count, per_prompt=per_prompt)
    rows, report = make_pairs(table, config)
    order = list(range(table.num_rows))
    random.Random(shuffle.random()).shuffle(order)
    assert make_pairs(table.take(order), config) == (rows, report)
    assert len(rows) <= count
    used = [row[side] for row in rows for side in ("winner", "loser")]
    assert len(set(used)) == len(used)
    for row in rows:
        assert row["winner"] != row["loser"]
        assert row["winner_score"] - row["loser_score"] == row["margin"] > margin
        assert row["winner"].startswith(row["prompt_id"])
        assert row["loser"].startswith(row["prompt_id"])


def test_a_choice_among_prompts_is_seeded_and_a_larger_one_begins_with_it():
    table = pool_table({f"p{i}": [0.1, 0.2] for i in range(50)})
    few, more = sides(table, count=10), sides(table, count=20)
    assert more[:10] == few
    assert sides(table, count=10, seed=1) != few


def test_held_out_prompts_are_never_used(tmp_path):
    table = pool_table({f"p{i}": [0.1, 0.2] for i in range(200)})
    held_out = [("p3", "whatever"), ("other", "Text of  p7"), ("another", "TEXT of p9")]
    rows, report = make_pairs(table, PairsConfig(), held_out)
    assert {f"p{i}" for i in range(200)} - {row["prompt_id"] for row in rows} == {"p3", "p7", "p9"}
    assert report["prompts"]["held out"] == 3
    rows, report = make_pairs(table, PairsConfig(held_out_share=0.3))
    assert 30 < report["prompts"]["held out"] < 90
    again, _ = make_pairs(pool_table({f"p{i}": [0.4, 0.2, 0.3] for i in range(200)}), PairsConfig(held_out_share=0.3))
    assert {row["prompt_id"] for row in again} == {row["prompt_id"] for row in rows}


PROMPTS = {f"p{i}": (f"prompt {i}", np.zeros((3, 8))) for i in range(4)}


@pytest.fixture
def pool(tmp_path: Path) -> str:
    clips = [Candidate(f"p{i % 4}", i // 4, np.zeros((5, 4)), i / 10, (i * 7 % 12) / 10) for i in range(12)]
    return str(write_pool(str(tmp_path / "pool"), clips, PROMPTS))


def test_pairs_are_written_read_and_made_again_to_the_same_bytes(pool, tmp_path):
    out = tmp_path / "pairs"
    assert build_pairs(pool, str(out), PairsConfig()) == 0
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    table, fingerprint = read_pool(pool)
    assert read_pairs(str(out / "pairs.parquet"), fingerprint).to_pylist() == make_pairs(table, PairsConfig()).rows
    build_pairs(pool, str(out), PairsConfig())
    assert {path.name: path.read_bytes() for path in out.iterdir()} == files
    assert json.loads(files["pairs.json"])["pairs"] == {"possible": 4, "made": 4}
    assert "the winner has the higher clap in 100.0%" in files["pairs.md"].decode()
    with pytest.raises(UserError, match=r"pairs\.margin"):
        build_pairs(pool, str(out), PairsConfig(margin=0.1))
    with pytest.raises(UserError, match="another pool"):
        read_pairs(str(out / "pairs.parquet"), "0" * 64)


def test_a_list_of_held_out_prompts_is_part_of_what_the_pairs_are(pool, tmp_path):
    evaluation = tmp_path / "evaluation.csv"
    evaluation.write_text("id,prompt\np1,something\nx,Prompt 2\n")
    out = tmp_path / "pairs"
    build_pairs(pool, str(out), PairsConfig(held_out=str(evaluation)))
    assert set(read_pairs(str(out / "pairs.parquet"))["prompt_id"].to_pylist()) == {"p0", "p3"}
    with pytest.raises(UserError, match="holds other pairs"):
        build_pairs(pool, str(out), PairsConfig())


def test_moving_the_list_of_held_out_prompts_changes_nothing(pool, tmp_path):
    for name in ("here.txt", "there.txt"):
        (tmp_path / name).write_text("prompt 1\n")
        build_pairs(pool, str(tmp_path / "pairs"), PairsConfig(held_out=str(tmp_path / name)))


def test_held_out_prompts_are_known_behind_the_prefix_of_their_captions(tmp_path):
    prefix = "music, "
    clips = [Candidate(f"p{i}", k, np.zeros((5, 4)), 0.1 * k, 0.1 * k) for i in range(4) for k in range(3)]
    pool = write_pool(
        str(tmp_path / "pool"), clips, {f"p{i}": (f"{prefix}prompt {i}", np.zeros((3, 8))) for i in range(4)}
    )
    described = json.loads(pool.read("run.json"))
    described["config"] |= {"caption": "prefixed", "sampler": {"prefix": prefix}}
    pool.write("run.json", json.dumps(described).encode())
    (tmp_path / "evaluation.txt").write_text("prompt 1\n")
    build_pairs(pool.uri, str(tmp_path / "pairs"), PairsConfig(held_out=str(tmp_path / "evaluation.txt")))
    used = read_pairs(str(tmp_path / "pairs" / "pairs.parquet"))["prompt_id"].to_pylist()
    assert sorted(used) == ["p0", "p2", "p3"]


def test_a_pool_of_held_out_prompts_alone_needs_other_prompts(pool, tmp_path):
    (tmp_path / "evaluation.txt").write_text("".join(f"prompt {i}\n" for i in range(4)))
    with pytest.raises(UserError, match=r"gives no pair: pool 4, held out 4\.") as caught:
        build_pairs(pool, str(tmp_path / "pairs"), PairsConfig(held_out=str(tmp_path / "evaluation.txt")))
    assert "other prompts" in caught.value.hint


def test_a_pool_without_any_pair_is_an_error_that_says_why(pool, tmp_path):
    with pytest.raises(UserError, match="gives no pair: pool 4, margin too small 4"):
        build_pairs(pool, str(tmp_path / "pairs"), PairsConfig(margin=9))
    assert not (tmp_path / "pairs").exists()


def test_files_that_hold_no_pairs_are_refused(pool, tmp_path):
    out = tmp_path / "pairs"
    build_pairs(pool, str(out), PairsConfig())
    path = out / "pairs.parquet"
    table = pq.read_table(path)
    path.write_bytes(b"no parquet")
    with pytest.raises(UserError, match="is not what was written"):
        read_pairs(str(path))
    (out / "_SUCCESS.json").unlink()  # files of one's own come without
    for changed, message in (
        (table.slice(0, 0), "holds no pairs"),
        (table.set_column(1, "loser", table["winner"]), "winner and loser of one pair"),
        (table.drop_columns(["margin"]), "does not hold preference pairs"),
        (table.replace_schema_metadata(None), "does not hold preference pairs"),
    ):
        pq.write_table(changed, path)
        with pytest.raises(UserError, match=message):
            read_pairs(str(path))
    path.write_bytes(b"no parquet")
    with pytest.raises(UserError, match="does not hold preference pairs"):
        read_pairs(str(path))
    with pytest.raises(UserError, match="not found"):
        read_pairs(str(tmp_path / "nothing.parquet"))
