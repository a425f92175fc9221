import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from ttmray.config import load_config
from ttmray.errors import UserError
from ttmray.models.backbone import BackboneConfig, FluxAudio
from ttmray.training.flow_matching import (
    Batch,
    FlowMatchingConfig,
    drop_text,
    flow_losses,
    interpolate,
    logit_normal_t,
    noise_level_report,
    noise_level_sums,
    sample_losses,
)

TINY = BackboneConfig(
    latent_dim=4, latent_len=9, text_dim=6, text_len=3, text_c_dim=5, hidden=16, heads=2, depth=2, fused_depth=1
)


@pytest.fixture(scope="module")
def golden(golden_dir):
    return load_file(golden_dir / "flow_matching.safetensors")


def assert_within(got, expected, tolerance=2e-6):
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= tolerance * max(1.0, expected.abs().max())


def tiny_model(head="v1"):
    """A backbone whose every input matters, with statistics and an empty text."""
    torch.manual_seed(3)
    model = FluxAudio(TINY.with_head(head))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
        model.latent_std.copy_(torch.rand(1, 1, 4) + 0.5)
    return model


def draw(count: int, seed: int = 0, score: bool = True) -> Batch:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g)

    latents = (count, TINY.latent_len, TINY.latent_dim)
    return Batch(
        mean=normal(*latents),
        std=torch.rand(latents, generator=g),
        text=normal(count, TINY.text_len, TINY.text_dim),
        text_c=normal(count, TINY.text_c_dim),
        posterior_noise=normal(*latents),
        z=normal(count),
        noise=normal(*latents),
        u_text=torch.rand(count, generator=g),
        u_score=torch.rand(count, generator=g),
        score=normal(count) if score else None,
    )


def test_golden_times(golden):
    """Mean and scale stand in the names."""
    cases = [match for name in golden if (match := re.fullmatch(r"out\.t_lognormal_m(.+)_s(.+)", name))]
    assert len(cases) >= 2
    for case in cases:
        assert_within(logit_normal_t(golden["in.z_for_t"], float(case[1]), float(case[2])), golden[case[0]])


@pytest.mark.parametrize(("reverse", "suffix"), [(True, ""), (False, "_forwardconv")])
def test_golden_path_and_loss(golden, reverse, suffix):
    x_t, target = interpolate(golden["in.x1"], golden["in.x0"], golden["in.t"], reverse)
    assert_within(x_t, golden[f"out.xt{suffix}"])
    losses = sample_losses(golden["in.pred_v"], target)
    assert_within(losses, golden[f"out.loss_per_sample{suffix}"])
    if reverse:
        assert_within(target, golden["out.target_v"])
        assert_within(losses.mean(), golden["out.loss_mean"])


def test_ends_of_the_path_are_data_and_noise_to_the_bit():
    x1, x0 = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    x_t, _ = interpolate(x1, x0, torch.tensor([0.0, 1.0]))
    assert torch.equal(x_t[0], x1[0])
    assert torch.equal(x_t[1], x0[1])


def test_text_is_dropped_as_a_whole_or_not_at_all():
    text, text_c, empty, empty_c = torch.randn(3, 2, 4), torch.randn(3, 5), torch.randn(2, 4), torch.randn(5)
    tokens, pooled = drop_text(text.half(), text_c, empty, empty_c, torch.tensor([False, True, False]))
    assert tokens.dtype == torch.float32
    assert torch.equal(tokens[1], empty)
    assert torch.equal(pooled[1], empty_c)
    assert torch.equal(tokens[::2], text.half().float()[::2])
    assert torch.equal(pooled[::2], text_c[::2])


def seen_by_the_network(batch: Batch, config: FlowMatchingConfig, head="v1"):
    """What `flow_losses` hands to the network."""
    model, seen = tiny_model(head), []

    def forward(*inputs):
        seen.extend(inputs)
        return model(*inputs)

    losses, t = flow_losses(model, batch, config, forward)
    return model, losses, t, seen


@torch.no_grad()
def test_the_loss_is_that_of_the_formulas():
    batch = draw(6)
    model, losses, t, (x, seen_t, text, text_c, score, null) = seen_by_the_network(batch, FlowMatchingConfig())
    x1 = (batch.mean + batch.std * batch.posterior_noise - model.latent_mean) / model.latent_std
    assert torch.equal(t, torch.sigmoid(batch.z))
    assert torch.equal(t, seen_t)
    assert_within(x, (1 - t)[:, None, None] * x1 + t[:, None, None] * batch.noise)
    velocity = model.velocity(x, t, model.conditions(text, text_c), score, null)
    expected = [(velocity[i] - (batch.noise[i] - x1[i])).square().mean() for i in range(6)]
    assert_within(losses, torch.stack(expected))
    assert torch.equal(flow_losses(model, batch, FlowMatchingConfig())[0], losses)


@torch.no_grad()
def test_score_dropout_has_its_own_draw_or_the_one_of_the_text():
    batch = draw(4)._replace(u_text=torch.tensor([0.05, 0.05, 0.5, 0.5]), u_score=torch.tensor([0.05, 0.5, 0.05, 0.5]))
    for mode, expected in (("independent", [True, False, True, False]), ("joint", [True, True, False, False])):
        config = FlowMatchingConfig(score_dropout=mode)
        model, _, _, (_, _, text, _, score, null) = seen_by_the_network(batch, config)
        assert null.tolist() == expected
        assert torch.equal(score, batch.score)
        assert torch.equal(text[:2], model.empty_string_feat.expand(2, -1, -1))
        assert torch.equal(text[2:], batch.text[2:])


@torch.no_grad()
def test_rates_of_zero_and_one_drop_nothing_and_everything():
    batch = draw(8)
    for rate in (0, 1):
        config = FlowMatchingConfig(text_dropout=rate, score_dropout_rate=rate)
        model, _, _, (_, _, text, text_c, _, null) = seen_by_the_network(batch, config)
        assert null.all() == bool(rate)
        assert torch.equal(text, model.empty_string_feat.expand(8, -1, -1) if rate else batch.text)
        assert torch.equal(text_c, model.empty_string_feat_c.expand(8, -1) if rate else batch.text_c)


@torch.no_grad()
def test_a_sample_has_the_same_loss_in_any_batch():
    model, batch = tiny_model(), draw(6)
    whole, _ = flow_losses(model, batch, FlowMatchingConfig())
    for i in range(6):
        alone, _ = flow_losses(
            model, Batch(*(part if part is None else part[i : i + 1] for part in batch)), FlowMatchingConfig()
        )
        assert_within(alone, whole[i : i + 1], 1e-5)


def test_a_backbone_without_a_head_takes_a_batch_without_scores():
    batch = draw(2, score=False)
    model, losses, _, (*_, score, null) = seen_by_the_network(batch.to("cpu"), FlowMatchingConfig(), head="none")
    assert score is None
    assert null is None
    losses.mean().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}


def test_scores_of_another_shape_are_refused():
    batch = draw(3)
    with pytest.raises(ValueError, match=r"\(3, 1\)"):
        flow_losses(tiny_model(), batch._replace(score=batch.score[:, None]), FlowMatchingConfig())


def test_half_precision_features_give_a_float32_loss_under_autocast():
    batch = draw(2)
    half = batch._replace(mean=batch.mean.half(), std=batch.std.half(), text=batch.text.half())
    model = tiny_model()
    with torch.autocast("cpu", torch.bfloat16):
        losses, t = flow_losses(model, half, FlowMatchingConfig())
    assert losses.dtype == t.dtype == torch.float32
    exact, _ = flow_losses(model, half, FlowMatchingConfig())
    assert_within(losses.detach(), exact.detach(), 0.05)


@settings(deadline=None)  # the first call loads kernels
@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 100)), min_size=1, max_size=40),
    st.integers(1, 12),
    st.integers(0, 40),
)
def test_losses_by_noise_level_add_up_over_micro_batches(samples, bins, cut):
    t, losses = torch.tensor(samples, dtype=torch.float64).T
    whole = noise_level_sums(t, losses, bins)
    parts = noise_level_sums(t[:cut], losses[:cut], bins) + noise_level_sums(t[cut:], losses[cut:], bins)
    torch.testing.assert_close(whole, parts)
    report = noise_level_report(whole)
    assert sum(row["count"] for row in report) == len(samples)
    assert sum((row["loss"] or 0) * row["count"] for row in report) == pytest.approx(float(losses.sum()), abs=1e-9)
    assert [row["loss"] is None for row in report] == [row["count"] == 0 for row in report]


def test_noise_levels_are_equal_intervals_of_t():
    t = torch.tensor([0.0, 0.24, 0.25, 0.99, 1.0])
    report = noise_level_report(noise_level_sums(t, torch.tensor([1.0, 3.0, 5.0, 7.0, 9.0]), bins=4))
    assert [(row["from"], row["to"], row["loss"], row["count"]) for row in report] == [
        (0.0, 0.25, 2.0, 2),
        (0.25, 0.5, 5.0, 1),
        (0.5, 0.75, None, 0),
        (0.75, 1.0, 8.0, 2),
    ]


@pytest.mark.parametrize("wrong", ["text_dropout=1.5", "t_scale=0", "score_dropout=sometimes"])
def test_impossible_configs_are_refused(wrong):
    with pytest.raises(UserError, match=wrong.split("=")[0]):
        load_config(FlowMatchingConfig, None, [wrong])
