"""Floors of a bundle in the small world: random weights stay below each of them, and the truth reaches it."""

import numpy as np
import pytest

from ttmray.models.scoring import Embeddings, Scorer
from ttmray.recipes import floors
from ttmray.recipes.floors import Floor, Sizes, World, measure_floors

FEW = Sizes(clips=50, stems=2, copies=3, votes=600, judges=20, generated=8)


@pytest.fixture(scope="module")
def untrained() -> dict[str, Floor]:
    rows = measure_floors("debug", 4242, ("clap", "separator", "latents", "reward"), FEW)
    return {row.name: row for row in rows}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "R@1 of 50",
        "R@1 of 50, unseen wordings",
        "SI-SDR gain of the instrumental, dB",
        "mel error as a share of silence's",
        "accuracy on fresh votes",
        "below the best possible",
    ],
)
def test_random_weights_stay_below_the_floor(untrained, name):
    assert not untrained[name].holds, untrained[name]


@pytest.mark.slow
def test_what_random_weights_generate_stays_below_every_floor():
    rows = measure_floors("debug", 4242, ("generation",), Sizes(judges=40, generated=24))
    bounded = [row for row in rows if row.least is not None]
    assert len(bounded) == 5
    assert not [row for row in bounded if row.holds]


@pytest.mark.slow
def test_a_reward_that_is_the_truth_reaches_every_floor_of_rewards(monkeypatch):
    world = World(4242, 10.0)
    truth = {item.mix.mean(axis=0).tobytes(): item for item in world.first(FEW.clips)}

    def worth(wave: np.ndarray) -> float:
        item = truth.get(wave.tobytes())
        return -3.0 if item is None else item.quality + 0.15 * bool(item.heard.voice)

    scores = iter(())

    def embed(self, waves):
        nonlocal scores
        scores = [worth(np.asarray(wave, np.float32)) for wave in waves]
        return Embeddings(np.zeros((len(waves), 512), np.float32), np.zeros((len(waves), 1), np.float32))

    monkeypatch.setattr(Scorer, "embed", embed)
    monkeypatch.setattr(Scorer, "rewards", lambda self, embeddings, texts: np.array(scores))
    rows = {row.name: row for row in floors.reward(Scorer.__new__(Scorer), world, FEW)}
    assert rows["Spearman with true quality"].value > 0.95
    for name in ("accuracy on fresh votes", "below the best possible", "music above silence", "music above noise"):
        assert rows[name].holds, rows[name]
    assert rows["clean above 20 dB of clipping, share"].holds


@pytest.mark.slow
def test_a_part_is_measured_without_the_models_of_the_others():
    rows = measure_floors("debug", 4242, ("latents",), Sizes(copies=1))
    assert {row.part for row in rows} == {"latents"}


def test_an_unknown_part_is_refused(capsys):
    from ttmray.cli import main

    assert main(["synth", "floors", "--bundle", "debug", "--part", "drummer"]) == 2
    assert "drummer" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("seed", [4242, 5151, 6161])
def test_the_packaged_bundle_reaches_every_floor(seed):
    rows = measure_floors("micro", seed)
    assert {row.part for row in rows} == set(floors.PARTS)
    assert [row for row in rows if not row.holds] == []
