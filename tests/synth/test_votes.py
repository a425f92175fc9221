"""Made-up votes follow the rewards, but for chance."""

import numpy as np
import pytest

from ttmray.errors import UserError
from ttmray.synth.votes import draw_votes, main


def test_votes_follow_the_rewards_with_the_stated_certainty():
    rewards = np.random.default_rng(0).normal(size=40)
    keys = [f"clip_{i}" for i in range(40)]
    value = dict(zip(keys, rewards, strict=True))
    votes = draw_votes(keys, rewards, 2000, seed=1)
    assert votes == draw_votes(keys, rewards, 2000, seed=1)
    decided = [vote for vote in votes if vote["label"] != "tie"]
    assert 0.9 < len(decided) / len(votes) < 1
    agreeing = [(value[vote["a"]] > value[vote["b"]]) == (vote["label"] == "a") for vote in decided]
    assert 0.85 < np.mean(agreeing) < 0.99
    assert all(vote["a"] != vote["b"] for vote in votes)


@pytest.mark.parametrize("rewards", [[], [1.0], [2.0, 2.0]])
def test_rewards_that_say_nothing_are_refused(rewards):
    with pytest.raises(UserError, match="no votes"):
        draw_votes([str(i) for i in range(len(rewards))], np.array(rewards), 5, 0)


def test_a_folder_that_is_no_corpus_and_a_count_of_none_are_refused(tmp_path):
    with pytest.raises(UserError, match="is no corpus run"):
        main([str(tmp_path), str(tmp_path / "votes.csv")])
    with pytest.raises(UserError, match="--count is 0"):
        main([str(tmp_path), str(tmp_path / "votes.csv"), "--count", "0"])
    assert not list(tmp_path.iterdir())
