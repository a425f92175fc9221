"""Made-up votes follow the rewards, but for chance."""

import numpy as np
import pytest

from ttmray.errors import UserError
from ttmray.synth.composer import compose
from ttmray.synth.votes import draw_votes, heard_clips, main


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


def index_row(source: str, start: float = 0.0, duration: float = 5.0) -> dict[str, object]:
    return {
        "key": f"{source}@{start:g}",
        "source": source,
        "start_s": start,
        "duration_s": duration,
        "caption": "a song",
    }


def test_listeners_know_quality_and_voice_of_the_clips_of_a_corpus():
    pieces = [compose(31, i, seconds=20.0) for i in range(6)]
    world = [
        {
            "path": f"songs/{piece.index}.flac",
            "seed": 31,
            "index": piece.index,
            "start_s": 0.0,
            "seconds": piece.seconds,
        }
        | {"quality": 0.1 * piece.index, "voice": "high" if piece.index % 2 else None}
        for piece in pieces
    ]
    rows = [index_row(f"{piece.index}.flac", start) for piece in pieces for start in (0.0, 10.0)]
    clips = heard_clips(rows, world)
    for clip, row, piece in zip(clips, rows, [one for one in pieces for _ in range(2)], strict=True):
        assert (clip.path, clip.quality) == (row["key"], 0.1 * piece.index)
        assert clip.sings == bool(piece.heard(row["start_s"], 5.0).voice)
    assert len({clip.sings for clip in clips}) == 2
    whole = heard_clips([index_row(f"{i}.flac", 0.0, 20.0) for i in (0, 1)], world)
    assert [clip.sings for clip in whole] == [False, True]
    with pytest.raises(UserError, match="is no song of that world"):
        heard_clips([index_row("other.flac")], world)
