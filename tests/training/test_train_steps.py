"""The mathematics of whole optimiser steps against the public trainer: flow matching, backbone, AdamW, EMA."""

import json

import pytest
import torch
from safetensors.torch import load_file

from ttmray.models.backbone import BackboneConfig, FluxAudio
from ttmray.training.ema import PowerEMA
from ttmray.training.flow_matching import Batch, FlowMatchingConfig, flow_losses, logit_normal_t
from ttmray.training.schedule import learning_rate


@pytest.fixture(scope="module")
def golden(golden_dir):
    return load_file(golden_dir / "train_steps.safetensors")


@pytest.fixture(scope="module")
def facts(golden_dir):
    return json.loads((golden_dir / "train_steps.json").read_text())


@pytest.fixture
def model(golden, facts):
    shape = facts["config"]
    model = FluxAudio(
        BackboneConfig(
            latent_dim=shape["latent_dim"],
            latent_len=shape["latent_seq_len"],
            text_dim=shape["text_dim"],
            text_len=shape["text_seq_len"],
            text_c_dim=shape["text_c_dim"],
            hidden=shape["hidden_dim"],
            heads=shape["num_heads"],
            depth=shape["depth"],
            fused_depth=shape["fused_depth"],
            rope=shape["use_rope"],
        )
    )
    model.load_state_dict({key[3:]: value for key, value in golden.items() if key.startswith("sd.")})
    return model


def batch_of(golden, step):
    given = {key.rpartition(".")[2]: value for key, value in golden.items() if key.startswith(f"in.step{step}.")}
    return Batch(
        mean=given["a_mean"],
        std=given["a_std"],
        text=given["text_f"],
        text_c=given["text_f_c"],
        posterior_noise=given["a_randn"],
        z=given["z_t"],
        noise=given["x0"],
        u_text=given["u_drop"],
        u_score=torch.rand(len(given["z_t"])),
    )


def close(got, expected, tolerance):
    return (got - expected).abs() <= tolerance * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("fused", [False, True])
def test_golden_steps(golden, facts, model, fused):
    hyper = facts["hyper"]
    config = FlowMatchingConfig(
        t_mean=hyper["t_mean"], t_scale=hyper["t_scale"], text_dropout=hyper["null_condition_probability"]
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained,
        weight_decay=hyper["weight_decay"],
        betas=tuple(hyper["betas"]),
        eps=hyper["eps"],
        fused=fused,
        foreach=False if fused else None,
    )
    ema = PowerEMA(model, hyper["ema_sigma_rels"], hyper["ema_step_size_correction"], hyper["ema_update_every"])
    for step in range(1, facts["n_steps"] + 1):
        batch, name = batch_of(golden, step), f"out.step{step}"
        x1 = model.normalise(batch.mean + batch.std * batch.posterior_noise)
        assert close(x1, golden[f"{name}.x1_norm"], 2e-5).all()
        assert close(logit_normal_t(batch.z), golden[f"{name}.t"], 2e-5).all()
        assert (batch.u_text < config.text_dropout).tolist() == facts["dropped"][step - 1]
        losses, _ = flow_losses(model, batch, config)
        assert close(losses, golden[f"{name}.loss"], 2e-5).all()
        optimizer.zero_grad()
        losses.mean().backward()
        if step == 1:
            assert_gradients(model, golden, facts)
        norm = torch.nn.utils.clip_grad_norm_(trained, hyper["clip_grad_norm"])
        assert float(norm) == pytest.approx(facts["grad_norm_before_clip"][step - 1], rel=1e-4)
        lr = learning_rate(
            step - 1, hyper["lr_base"], warmup=hyper["warmup_steps"], total=hyper["num_iterations"], schedule="step"
        )
        assert lr == pytest.approx(facts["lr_used"][step - 1], rel=1e-9)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        ema.update(model)
    assert_mostly_close(model.state_dict(), golden, "out.final.")
    for sigma in hyper["ema_sigma_rels"]:
        assert_mostly_close(ema.weights(model, sigma), golden, f"out.ema_sigma{sigma}.")


def assert_gradients(model, golden, facts):
    parameters = dict(model.named_parameters())
    expected = {key.removeprefix("out.step1.grad."): value for key, value in golden.items() if ".grad." in key}
    assert len(expected) > 10
    for name, gradient in expected.items():
        error = (parameters[name].grad - gradient).abs().max()
        assert error <= 5e-5 * gradient.abs().max() + 1e-7, name
    for name, norm in facts["grad_norm_per_param_step1"].items():
        assert float(parameters[name].grad.norm()) == pytest.approx(norm, rel=1e-4, abs=1e-7), name


def assert_mostly_close(found, golden, prefix):
    """At least 99.9 % of the elements: Adam's step is like a sign where the gradient is near zero."""
    expected = {key.removeprefix(prefix): value for key, value in golden.items() if key.startswith(prefix)}
    assert len(expected) > 10
    within = torch.cat([close(found[name], value, 3e-6).flatten() for name, value in expected.items()])
    assert within.double().mean() >= 0.999
