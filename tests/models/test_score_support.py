"""The range of a training's scores: as drawn, widened along a chain, and a word to who asks for more."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from ttmray.errors import UserError
from ttmray.models.backbone_weights import METADATA, debug_backbone, read_support
from ttmray.models.score_support import NUMBERS, ScoreSupport

scores = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=50).map(lambda x: np.array(x, np.float32))


@given(scores)
def test_it_comes_back_from_json_and_has_the_percentiles_of_numpy(values):
    support = ScoreSupport.of(values, "reward_score", "p")
    assert ScoreSupport.from_dict(json.loads(json.dumps(support.to_dict()))) == support
    assert (support.p5, support.p95) == pytest.approx(tuple(np.percentile(values.astype(float), (5, 95))))
    assert support.max == values.max()
    assert support.trainings[0]["clips"] == len(values)


@given(scores, scores)
def test_a_later_training_widens_and_never_narrows(first, second):
    parent, own = ScoreSupport.of(first, "a"), ScoreSupport.of(second, "b")
    both = own.after(parent)
    assert own.after(None) == own
    assert both.p5 == min(parent.p5, own.p5)
    assert both.p95 == max(parent.p95, own.p95)
    assert both.max == max(first.max(), second.max())
    assert both.min == min(first.min(), second.min())
    assert [one["column"] for one in both.trainings] == ["a", "b"]
    assert ScoreSupport.from_dict(both.to_dict()) == both
    other = ScoreSupport.of(second, "b", "another reward head").after(parent)
    assert (other.min, other.max) == (second.min(), second.max())
    again = own.after(other)
    assert (again.min, again.max) == (both.min, both.max)
    assert len(again.trainings) == 3


@given(scores, st.floats(-200, 200))
def test_only_scores_beyond_p5_and_p95_are_warned_of_and_with_the_numbers(values, score):
    support = ScoreSupport.of(values, "a")
    line = support.warning(score, "sampler.score")
    assert (line is None) == (support.p5 <= score <= support.p95)
    if line is not None:
        assert support.text() in line
        assert ("above all" in line) == (score > support.max)
        assert ("below all" in line) == (score < support.min)
    assert support.warning(None, "sampler.score") is None


@given(scores, st.integers(2, 20))
def test_the_grid_lies_within_the_support(values, points):
    support = ScoreSupport.of(values, "a")
    grid = support.grid(points)
    assert 1 <= len(grid) <= points
    assert len(set(grid)) == len(grid)
    assert all(support.p5 <= score <= support.max for score in grid)


NAN, DISORDER = dict.fromkeys(NUMBERS, float("nan")), dict(zip(NUMBERS, (0, 3, 1, 4), strict=True))


SOUND = ScoreSupport(min=0, p5=1, p95=2, max=3).to_dict()


@pytest.mark.parametrize(
    "found", [5, "x", [1], {"p5": 0}, NAN, DISORDER, SOUND | {"trainings": [{}]}, SOUND | {"trainings": [NAN]}]
)
def test_other_metadata_are_one_message(tmp_path, found):
    path = tmp_path / "a.safetensors"
    save_file(debug_backbone(0).state_dict(), path, {METADATA: json.dumps({"score_support": found})})
    with pytest.raises(UserError, match="metadata"):
        read_support(path)


def test_a_file_that_says_nothing_has_none(tmp_path):
    for name, metadata in (("a.safetensors", None), ("b.safetensors", {METADATA: "{}"})):
        save_file(debug_backbone(0).state_dict(), tmp_path / name, metadata)
        assert read_support(tmp_path / name) is None
    assert read_support(tmp_path / "c.pth") is None
