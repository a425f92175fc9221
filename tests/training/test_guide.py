"""A column of the index that decides times and weights of clips: distributions, weights, what stays as it was."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from ttmray.config import identity, load_config
from ttmray.errors import UserError
from ttmray.training.config import TrainConfig
from ttmray.training.data import DataConfig, SourceConfig, draws, loader, open_mixture, open_with_held_out
from ttmray.training.flow_matching import FlowMatchingConfig, logit_normal_t
from ttmray.training.guide import BetaTimes, GuideConfig, beta_time, guide_weights, levels

TIMES = BetaTimes(worst=0.8, best=0.4, concentration=5.0)
COLUMN = "reward_score"


def data(corpus, guide=None) -> DataConfig:
    return DataConfig(sources=(SourceConfig(corpus=str(corpus)),), guide=guide, threads=0)


@pytest.mark.parametrize("level", [0.0, 0.25, 1.0])
def test_times_are_beta_distributed_around_a_mean_that_goes_with_the_level(level):
    z = np.random.default_rng(0).standard_normal(40_000)
    t = beta_time(z, np.full(len(z), level), TIMES)
    mean = 0.8 - 0.4 * level
    assert t.dtype == np.float32
    assert t.mean() == pytest.approx(mean, abs=0.005)
    assert t.var() == pytest.approx(mean * (1 - mean) / (5.0 + 1), rel=0.03)
    assert np.array_equal(np.argsort(t[:100], kind="stable"), np.argsort(z[:100], kind="stable"))


def test_extreme_draws_stay_inside():
    t = beta_time(np.array([-40.0, 40.0]), np.array([0.5, 0.5]), TIMES)
    assert ((t > 0) & (t < 1)).all()


def test_levels_are_shares_of_lower_clips_and_ties_share_theirs():
    assert levels(np.array([5.0, 1.0, 3.0, 3.0])).tolist() == [0.875, 0.125, 0.5, 0.5]
    assert levels(np.full(3, 2.0)).tolist() == [0.5] * 3


def test_weights_are_those_of_reward_weighted_regression():
    values = np.random.default_rng(1).normal(7, 3, 1000)
    weights = guide_weights(values, GuideConfig(column=COLUMN, temperature=2.0))
    assert weights.mean() == pytest.approx(1, abs=1e-5)
    z = (values - values.mean()) / values.std()
    np.testing.assert_allclose(np.log(weights[0] / weights[1]), (z[0] - z[1]) / 2.0, rtol=1e-4)
    assert guide_weights(np.full(4, 2.0), GuideConfig(column=COLUMN, temperature=1.0)).tolist() == [1] * 4


def test_samples_have_the_times_of_their_clips_levels_and_all_other_draws_as_before(corpus):
    plain, guided = open_mixture(data(corpus)), open_mixture(data(corpus, GuideConfig(column=COLUMN, times=TIMES)))
    before = next(iter(loader(plain, data(corpus), start=0, batch=18)))
    after = next(iter(loader(guided, data(corpus), start=0, batch=18)))
    assert before.batch.t is None
    assert before.keys == after.keys
    assert torch.equal(before.weights, after.weights)
    for name in ("mean", "z", "noise", "u_text", "score"):
        assert torch.equal(getattr(before.batch, name), getattr(after.batch, name))
    source = guided.sources[0]
    level = dict(zip(source.keys.to_pylist(), source.level.tolist(), strict=True))
    expected = beta_time(after.batch.z.numpy(), np.array([level[key] for key in after.keys]), TIMES)
    np.testing.assert_array_equal(after.batch.t.numpy(), expected)
    assert draws(0, 0, plain.shape).z[0] == after.batch.z[0]
    order = np.argsort(source.guide, kind="stable")
    assert (np.diff(source.level[order]) >= 0).all()


def test_the_loss_is_taken_at_those_times_and_held_out_clips_keep_theirs(debug_corpus, make_train_config, tmp_path):
    from ttmray.training.sft import SftTask

    column = "{column: reward_score, times: {worst: 0.8}, temperature: 1.0}"
    task = SftTask(make_train_config(tmp_path / "run", f"data.guide={column}"), torch.device("cpu"))
    samples = next(task.batches(0, 6, 0, 1, False))
    losses = task.losses(samples, task.model)
    assert torch.equal(losses.t, samples.batch.t)
    assert samples.weights.unique().numel() > 1
    sources = DataConfig(sources=(SourceConfig(corpus=str(debug_corpus)),), guide=task.config.data.guide)
    _, held_out = open_with_held_out(sources)
    assert held_out is not None
    assert held_out.times is None
    assert (held_out.sources[0].weight == 1).all()
    _, times = task.validate(torch.device("cpu"), 0, 1)
    flow = FlowMatchingConfig()
    batch = held_out.read(np.arange(1), [0], [(2, 0)]).batch
    assert batch.t is None
    assert logit_normal_t(batch.z, flow.t_mean, flow.t_scale).shape == (1,)
    assert ((times > 0) & (times < 1)).all()


def test_without_a_guide_a_run_is_the_one_it_was_and_with_one_another(corpus):
    plain, guided = data(corpus), data(corpus, GuideConfig(column=COLUMN, temperature=1.0))
    assert "guide" not in identity(plain)
    assert identity(guided)["guide"]["column"] == COLUMN
    assert open_mixture(plain).fingerprint() != open_mixture(guided).fingerprint()


def test_what_decides_nothing_and_columns_that_are_not_there_are_refused(corpus):
    with pytest.raises(ValidationError, match="decides nothing"):
        GuideConfig(column=COLUMN)
    with pytest.raises(UserError, match="happiness"):
        open_mixture(data(corpus, GuideConfig(column="happiness", temperature=1.0)))
    with pytest.raises(UserError, match=r"data\.guide"):
        load_config(TrainConfig, None, [f"data={{sources: [{{corpus: {corpus}}}], guide: {{column: a}}}}", "output=x"])
