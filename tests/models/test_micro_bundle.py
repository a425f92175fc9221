"""The bundle that ships with the package: whole, small, and its scores mean something on songs that it never saw."""

import numpy as np
import pytest

import ttmray
from ttmray.errors import UserError
from ttmray.models.bundle import MICRO, open_bundle
from ttmray.models.folder_bundle import FOLDERS
from ttmray.models.loading import LoadOptions
from ttmray.models.scoring import Scorer
from ttmray.recipes.floors import Sizes, measure_floors, rewards_of
from ttmray.synth.world import clip

SEED = 90_210
"""Of songs that no part was trained or chosen on."""


@pytest.fixture(scope="module")
def scorer():
    bundle = open_bundle("micro")
    return Scorer(bundle.load(Scorer.roles, LoadOptions(device="cpu")), bundle.protocol("empty"))


def test_every_file_is_whole_and_together_they_are_small():
    roles = [role for role in FOLDERS if MICRO.of_role(role)]
    assert {"clap", "mert", "tunejury"} <= set(roles)
    for role in roles:
        assert MICRO.folder(role).is_dir()
    listed = MICRO.description.files
    assert sum(facts.size for facts in listed.values()) < 30e6
    lying = {f.relative_to(MICRO.path).as_posix() for f in MICRO.path.rglob("*") if f.is_file()}
    assert lying - set(listed) <= {"bundle.json", "README.md"}


def test_whoever_uses_it_is_told_that_its_scale_is_its_own():
    assert "say nothing of TuneJury's" in open_bundle("micro").note


def test_a_role_that_it_does_not_have_is_named():
    missing = [role for role in FOLDERS if not MICRO.of_role(role) and role != "vocoder"]
    for role in missing:
        with pytest.raises(UserError, match=f"has no {role}"):
            open_bundle("micro").load({role}, LoadOptions(device="cpu"))


@pytest.mark.parametrize("fault", ["dull", "thin", "noise", "clipping"])
def test_a_song_without_a_fault_is_better_than_the_same_song_with_it(scorer, fault):
    pieces = [[clip(SEED, i, 5.0, faults=faults).mix.mean(axis=0) for faults in ({}, {fault: 1.0})] for i in range(4)]
    clean, spoiled = (rewards_of(scorer, [piece[i] for piece in pieces]) for i in range(2))
    assert np.mean(clean > spoiled) >= 0.75
    assert np.mean(clean - spoiled) > 0


@pytest.mark.slow
def test_clips_that_are_asked_for_a_higher_score_get_a_higher_reward():
    studio = ttmray.load("micro", device="cpu", threads=1)
    prompts = ["a slow ambient piece with a flute", "fast rock with live drums", "a waltz on the piano"]
    low, high = (
        studio.score(studio.generate(prompts, score=score, seed=5, sampler={"steps": 12})) for score in (-1.5, 0.5)
    )
    assert (high["reward"].mean() - low["reward"].mean()) > 0.5
    assert not (high["status"] != "ok").any()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [SEED, SEED + 1, SEED + 2])
def test_clap_and_reward_reach_their_floors_on_fresh_songs(seed):
    rows = measure_floors("micro", seed, ("clap", "reward"), Sizes(clips=300, votes=20_000))
    assert not [row for row in rows if not row.holds]
