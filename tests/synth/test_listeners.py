"""Listeners vote as their panel says, and the ranker's reader understands the votes."""

import csv

import numpy as np
import pytest

from ttmray.errors import UserError
from ttmray.ranker.votes import PairSource, read_votes
from ttmray.synth.faults import faults_of, true_quality
from ttmray.synth.listeners import Heard, Listeners, best_accuracy, chances, main, vocal_bias, votes

PLAIN = Listeners(vocal_bias=0.0, taste=0.0, lapse=0.0, tie_width=0.0)


@pytest.fixture(scope="module")
def clips():
    rng = np.random.default_rng(5)
    return [
        Heard(f"songs/{i:06d}.wav", true_quality(faults_of(51, i)), bool(rng.random() < 0.5), f"caption {i % 40}")
        for i in range(400)
    ]


def test_choices_follow_bradley_and_terry():
    for gap in (-0.5, 0.0, 0.3):
        pair = [Heard("a", gap, False), Heard("b", 0.0, False)]
        rows = votes(pair, 4000, 1, PLAIN)
        won = np.mean([(row["label"] == "a") == (row["a"] == "a") for row in rows])
        expected = 1 / (1 + np.exp(-PLAIN.certainty * gap))
        assert won == pytest.approx(expected, abs=4 * np.sqrt(0.25 / 4000))


def test_chances_add_up_and_are_fair():
    panel = Listeners(certainty=5.0, lapse=0.1, tie_width=0.2)
    a, tie, b = chances(np.linspace(-3, 3, 61), panel)
    np.testing.assert_allclose(a + tie + b, 1)
    np.testing.assert_allclose(a, b[::-1])
    assert a[-1] == pytest.approx(0.95, abs=0.001)
    assert b[-1] == pytest.approx(0.05, abs=0.001)
    assert np.argmax(tie) == 30


def test_ties_and_accuracy_are_as_expected(clips):
    panel = Listeners(tie_width=0.1)
    rows = votes(clips, 6000, 2, panel)
    best = best_accuracy(clips, panel)
    ties = np.mean([row["label"] == "tie" for row in rows])
    assert ties == pytest.approx(best.ties, abs=0.012)
    quality = {clip.path: clip.quality for clip in clips}
    decided = [row for row in rows if row["label"] != "tie" and quality[row["a"]] != quality[row["b"]]]
    right = np.mean([(quality[row["a"]] > quality[row["b"]]) == (row["label"] == "a") for row in decided])
    assert right == pytest.approx(best.knowing_quality, abs=0.025)
    assert best.knowing_quality < best.knowing_all < 1


def test_the_vocal_bias_is_small_but_measurable_in_many_votes(clips):
    default = Listeners()
    bias, error = vocal_bias(clips, votes(clips, 8000, 3, default), default.certainty)
    assert bias == pytest.approx(default.vocal_bias, abs=4 * error)
    assert bias > 3 * error
    assert default.vocal_bias < 0.3 * np.std([clip.quality for clip in clips])
    none, error = vocal_bias(clips, votes(clips, 8000, 3, PLAIN), PLAIN.certainty)
    assert abs(none) < 4 * error


def test_leaning_left_and_lapses_cost_accuracy():
    pair = [Heard("x", 0.0, False), Heard("y", 0.0, False)]
    rows = votes(pair, 3000, 4, Listeners(certainty=5.0, left_bias=0.3, taste=0.0))
    decided = [row for row in rows if row["label"] != "tie"]
    assert np.mean([row["label"] == "a" for row in decided]) > 0.7
    far = [Heard("good", 3.0, False), Heard("bad", -3.0, False)]
    rows = votes(far, 3000, 4, Listeners(certainty=5.0, lapse=0.2, taste=0.0))
    wrong = np.mean([row[row["label"]] == "bad" for row in rows if row["label"] != "tie"])
    assert wrong == pytest.approx(0.1, abs=0.025)


def test_a_shown_prompt_favours_the_clip_that_was_made_for_it():
    pair = [Heard("a", 0.0, False, "one"), Heard("b", 0.0, False, "two")]
    rows = [
        row
        for row in votes(pair, 3000, 5, Listeners(certainty=5.0, prompts=True, tie_width=0.0))
        if row["label"] != "tie"
    ]
    asked = {"a": "one", "b": "two"}
    fits = np.mean([asked[row[row["label"]]] == row["prompt"] for row in rows])
    expected = 0.97 / (1 + np.exp(-5 * 0.5)) + 0.015
    assert fits == pytest.approx(expected, abs=0.03)
    assert {row["prompt"] for row in votes(pair, 50, 5)} == {""}


def test_the_same_seed_gives_the_same_votes(clips):
    assert votes(clips, 50, 7) == votes(clips, 50, 7)
    assert votes(clips, 50, 7) != votes(clips, 50, 8)


def test_the_ranker_reads_the_table(clips, tmp_path):
    rows = votes(clips, 200, 6, Listeners(prompts=True))
    table = tmp_path / "votes.csv"
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    pairs, dropped = read_votes([PairSource(name="panel", path=str(table))])
    assert len(pairs) == 200
    assert not dropped
    target = {"a": 1.0, "b": 0.0, "tie": 0.5}
    assert [pair.target for pair in pairs] == [target[row["label"]] for row in rows]
    assert pairs[0].a.endswith(rows[0]["a"])
    assert [pair.text for pair in pairs] == [row["prompt"] for row in rows]


def test_bad_requests_are_refused_with_the_way_out(tmp_path):
    with pytest.raises(UserError, match="give no votes"):
        votes([Heard("a", 0.0, False)], 5, 0)
    with pytest.raises(ValueError, match="no such listeners"):
        Listeners(certainty=0.0)
    with pytest.raises(UserError, match="--count is 0"):
        main([str(tmp_path / "world.parquet"), str(tmp_path / "votes.csv"), "--count", "0"])
    with pytest.raises(UserError, match="lapse from 0 to 1"):
        main([str(tmp_path / "world.parquet"), str(tmp_path / "votes.csv"), "--lapse", "2"])
