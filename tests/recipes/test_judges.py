"""Judges of generated clips, against the truth of composed ones."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ttmray.models.bundle import open_bundle
from ttmray.models.loading import LoadOptions
from ttmray.models.scoring import SAMPLE_RATE, Scorer
from ttmray.recipes.judges import corrected, features, judge
from ttmray.synth.world import clip


@pytest.fixture(scope="module")
def known():
    bundle = open_bundle("micro")
    options = LoadOptions(device="cpu", clip_samples=round(bundle.clip_s * SAMPLE_RATE), instrumental="residual")
    scorer = Scorer(bundle.load(set(Scorer.roles), options), bundle.protocol("empty"))
    clips = [clip(77, index, bundle.clip_s) for index in range(120)]
    return features(scorer, [item.mix.mean(axis=0) for item in clips]), [bool(item.heard.voice) for item in clips]


@pytest.mark.slow  # 120 clips are composed and embedded
def test_a_judge_hears_whether_somebody_sings_and_says_how_often_it_is_right(known):
    rows, sings = known
    verdicts = judge(rows[:100], sings[:100], rows[100:])
    assert verdicts.right >= 0.75
    assert (verdicts.yes == np.array(sings[100:])).mean() >= 0.75


def test_a_judge_knows_that_it_only_guesses():
    rng = np.random.default_rng(0)
    rows, truth = rng.normal(size=(300, 20)), (rng.random(300) < 0.5).tolist()
    assert 0.35 < judge(rows, truth, rows[:5]).right < 0.65
    told = np.concatenate([rows, 5.0 * np.array(truth)[:, None]], axis=1)
    verdicts = judge(told, truth, told[:5])
    assert verdicts.right == 1.0
    assert verdicts.yes.tolist() == truth[:5]


@given(st.floats(0, 1), st.floats(0.6, 1))
def test_the_share_that_a_judge_of_known_errors_says_gives_the_true_share(share, right):
    said = share * right + (1 - share) * (1 - right)
    assert corrected(said, right) == pytest.approx(share, abs=1e-9)


def test_nothing_follows_from_what_a_guesser_says():
    assert np.isnan(corrected(0.9, 0.5))
    assert corrected(0.99, 0.9) == 1.0
    assert corrected(0.05, 0.9) == 0.0
