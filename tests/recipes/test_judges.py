"""Judges of generated clips, against the truth of composed ones."""

import numpy as np
import pytest

from ttmray.models.bundle import LoadOptions, open_bundle
from ttmray.models.scoring import SAMPLE_RATE, Scorer
from ttmray.recipes.judges import features, judge
from ttmray.synth.world import clip

pytestmark = pytest.mark.slow  # 120 clips are composed and embedded


@pytest.fixture(scope="module")
def known():
    bundle = open_bundle("micro")
    options = LoadOptions(device="cpu", clip_samples=round(bundle.clip_s * SAMPLE_RATE), instrumental="residual")
    scorer = Scorer(bundle.load(set(Scorer.roles), options), bundle.protocol("empty"))
    clips = [clip(77, index, bundle.clip_s) for index in range(120)]
    return features(scorer, [item.mix.mean(axis=0) for item in clips]), [bool(item.heard.voice) for item in clips]


def test_a_judge_hears_whether_somebody_sings_and_says_how_often_it_is_right(known):
    rows, sings = known
    verdicts = judge(rows[:80], sings[:80], rows[80:100], sings[80:100], rows[100:])
    assert verdicts.right >= 0.75
    assert (verdicts.yes == np.array(sings[100:])).mean() >= 0.75


def test_a_judge_that_learns_from_wrong_answers_knows_that_it_is_wrong(known):
    rows, sings = known
    lies = [not truth for truth in sings[:80]]
    assert judge(rows[:80], lies, rows[80:100], sings[80:100], rows[100:]).right <= 0.25
