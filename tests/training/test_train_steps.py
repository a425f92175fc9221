"""The mathematics of whole optimiser steps against the public trainer: flow matching, backbone, AdamW, EMA."""

import json
import re

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


OTHERS = {
    "lr_base": 3.1e-4,
    "weight_decay": 0.03,
    "betas": [0.8, 0.95],
    "eps": 1e-2,
    "clip_grad_norm": 0.5,
    "warmup_steps": 3,
    "num_iterations": 2,
    "lr_schedule": "step, milestones int(0.1*N), gamma 0.1",
    "t_mean": 0.01,
    "t_scale": 1.01,
    "null_condition_probability": 0.999,
    "ema_sigma_rels": [0.06, 0.1],
    "ema_step_size_correction": False,
    "ema_update_every": 2,
}
"""Of every hyper-parameter a value that is not the golden one's."""


@pytest.mark.parametrize("fused", [False, True])
def test_golden_steps(golden, facts, model, fused):
    assert_steps(golden, facts, model, fused)


@pytest.mark.parametrize(("mean", "scale"), [(-0.4, 1.3), (0.5, 0.7)])
def test_golden_steps_of_a_file_with_other_times_are_followed(golden, facts, model, mean, scale):
    """The same times t from other normal draws: what a file with another mean and scale of the logit holds."""
    hyper = facts["hyper"]
    other = {
        key: (value * hyper["t_scale"] + hyper["t_mean"] - mean) / scale if key.endswith(".z_t") else value
        for key, value in golden.items()
    }
    assert_steps(other, facts | {"hyper": hyper | {"t_mean": mean, "t_scale": scale}}, model, fused=False)


def test_golden_steps_take_every_hyper_parameter_from_the_file(facts):
    assert facts["hyper"].keys() == OTHERS.keys()


@pytest.mark.parametrize("name", OTHERS)
def test_another_value_of_any_hyper_parameter_gives_other_steps(golden, facts, model, name):
    assert facts["hyper"][name] != OTHERS[name]
    with pytest.raises(AssertionError):
        assert_steps(golden, facts | {"hyper": facts["hyper"] | {name: OTHERS[name]}}, model, fused=False)


def scheduled(hyper, step):
    """Learning rate of a 0-based step: "step, milestones int(0.8*N), int(0.9*N) ..., gamma 0.1", or "constant"."""
    schedule, _, rule = hyper["lr_schedule"].partition(",")
    options = {}
    if schedule == "step":
        options["milestones"] = [float(share) for share in re.findall(r"int\(([\d.]+)\*N\)", rule)]
        options["gamma"] = float(re.search(r"gamma ([\d.e-]+)", rule)[1])
        assert options["milestones"]
    total, warmup = hyper["num_iterations"], hyper["warmup_steps"]
    return learning_rate(step, hyper["lr_base"], warmup=warmup, total=total, schedule=schedule, **options)


def assert_steps(golden, facts, model, fused):
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
        assert close(logit_normal_t(batch.z, config.t_mean, config.t_scale), golden[f"{name}.t"], 2e-5).all()
        assert (batch.u_text < config.text_dropout).tolist() == facts["dropped"][step - 1]
        losses, _ = flow_losses(model, batch, config)
        assert close(losses, golden[f"{name}.loss"], 2e-5).all()
        optimizer.zero_grad()
        losses.mean().backward()
        if step == 1:
            assert_gradients(model, golden, facts)
        norm = torch.nn.utils.clip_grad_norm_(trained, hyper["clip_grad_norm"])
        assert float(norm) == pytest.approx(facts["grad_norm_before_clip"][step - 1], rel=1e-4)
        lr = scheduled(hyper, step - 1)
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
