import json
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from ttmray.errors import UserError
from ttmray.storage import Folder
from ttmray.training.ema import PowerEMA, beta_of, gamma_of, synthesis_weights, synthesise


@pytest.fixture(scope="module")
def golden(golden_dir):
    return load_file(golden_dir / "posthoc_ema.safetensors")


@pytest.fixture(scope="module")
def facts(golden_dir):
    return json.loads((golden_dir / "posthoc_ema.json").read_text())


class Net(nn.Module):
    """A trainable tensor, a frozen one, a buffer, and an integer parameter."""

    def __init__(self, shape=(3, 4), frozen=(1.25, -3.0)):
        super().__init__()
        self.w = nn.Parameter(torch.randn(shape))
        self.frozen = nn.Parameter(torch.tensor(frozen), requires_grad=False)
        self.register_buffer("table", torch.arange(3.0))
        self.count = nn.Parameter(torch.tensor([7]), requires_grad=False)


def assert_within(got, expected, tolerance):
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= tolerance * max(1.0, expected.abs().max())


def widths(golden, variant):
    """sigma_rel -> averages after every update; in the order of the checkpointed EMAs."""
    name = re.compile(rf"out\.{variant}\.ema_sigma(.+)")
    found = {float(match[1]): value for key, value in golden.items() if (match := name.fullmatch(key))}
    assert found
    return dict(sorted(found.items()))


def run(golden, facts, variant, folder):
    """The golden trajectory of one variant, compared at every update, with snapshots in `folder`."""
    rules, averages, values = facts["variants"][variant], widths(golden, variant), golden[f"in.{variant}.param"]
    assert len(values) == rules["n_updates"]
    model = Net(values[0].shape, golden[f"in.{variant}.frozen"].tolist())
    ema = PowerEMA(model, tuple(averages), rules["step_size_correction"], rules["update_every"])
    with torch.no_grad():
        for k, value in enumerate(values, 1):
            model.w.copy_(value)
            ema.update(model)
            for sigma, expected in averages.items():
                assert_within(ema.averages[sigma][0], expected[k - 1], 3e-6)
            if k % rules["checkpoint_every"] == 0:
                ema.write_snapshots(folder, model)
    return model, ema, rules


def test_golden_gammas(facts):
    for sigma, gamma in facts["gammas"].items():
        assert gamma_of(float(sigma)) == pytest.approx(gamma, rel=1e-12)


def test_golden_decays(golden, facts):
    for key, betas in golden.items():
        if match := re.fullmatch(r"out\.(.+)\.beta_sigma(.+)\.f64", key):
            rules, gamma = facts["variants"][match[1]], gamma_of(float(match[2]))
            options = {"correction": rules["step_size_correction"], "update_every": rules["update_every"]}
            assert len(betas) == rules["n_updates"]
            for k, expected in enumerate(betas.tolist(), 1):
                assert beta_of(k, gamma, **options) == pytest.approx(expected, abs=1e-12), (key, k)


def test_golden_averages_snapshots_and_synthesis(golden, facts, tmp_path):
    for variant in facts["variants"]:
        assert_variant(golden, facts, variant, Folder.at(str(tmp_path / variant)))


@pytest.mark.parametrize("name", ["step_size_correction", "update_every", "checkpoint_every"])
def test_another_value_of_any_rule_gives_other_averages(golden, facts, name, tmp_path):
    for variant, rules in facts["variants"].items():
        other = {"variants": {variant: rules | {name: 1 - rules[name] if name[0] == "s" else rules[name] + 1}}}
        with pytest.raises((AssertionError, FileNotFoundError)):  # without the snapshot of a step
            assert_variant(golden, other, variant, Folder.at(str(tmp_path / variant)))


def assert_variant(golden, facts, variant, folder):
    model, _, rules = run(golden, facts, variant, folder)
    sigmas = list(widths(golden, variant))
    files = [name.split(".")[:2] for name in rules["checkpoint_files"]]
    for i, step in files:
        snapshot = load_file(folder.path(f"sigma-{sigmas[int(i)]:g}-step-{int(step):08d}.safetensors"))
        assert_within(snapshot["w"], golden[f"out.{variant}.ckpt.{i}.{step}"], 3e-6)
        assert torch.equal(snapshot["frozen"], model.frozen)
    for target in rules["synth"]:
        name = f"out.{variant}.synth{target['index']}"
        tensors, step = synthesise(folder, target["sigma_rel"], target["step"])
        assert step == (target["step"] or rules["n_updates"])
        assert_within(tensors["w"], golden[f"{name}.w"], 1e-5)
        assert torch.equal(tensors["frozen"], model.frozen)
        assert torch.equal(tensors["count"], model.count)
        order = [name.split(".")[:2] for name in target["checkpoint_order"]]
        weights = synthesis_weights(
            [int(s) for _, s in order], [sigmas[int(i)] for i, _ in order], step, target["sigma_rel"]
        )
        np.testing.assert_allclose(weights, golden[f"{name}.weights.f64"].numpy(), rtol=0, atol=1e-4)


def test_where_the_public_synthesis_scales_frozen_tensors_ours_does_not(golden, facts, tmp_path):
    variant = next(iter(facts["variants"]))
    model, _, rules = run(golden, facts, variant, Folder.at(str(tmp_path)))
    target = rules["synth"][0]
    scaled = golden[f"out.{variant}.synth{target['index']}.frozen"]
    assert not torch.allclose(scaled, model.frozen, rtol=1e-4)
    ours, _ = synthesise(Folder.at(str(tmp_path)), target["sigma_rel"], target["step"])
    assert torch.equal(ours["frozen"], golden[f"in.{variant}.frozen"])


def test_synthesis_of_an_averaged_width_gives_that_snapshot():
    weights = synthesis_weights([10, 20, 10, 20], [0.05, 0.05, 0.1, 0.1], 20, 0.05)
    np.testing.assert_allclose(weights, [0, 1, 0, 0], atol=1e-9)


def test_a_synthesised_average_is_close_to_one_that_was_running(tmp_path):
    torch.manual_seed(0)
    model, folder = Net((50,)), Folder.at(str(tmp_path))
    ema, direct = PowerEMA(model, (0.05, 0.1)), PowerEMA(model, (0.075,))
    for k in range(1, 401):
        with torch.no_grad():
            model.w += 0.1 * torch.randn(50)
        ema.update(model)
        direct.update(model)
        if k % 50 == 0:
            ema.write_snapshots(folder, model)
    wanted = direct.averages[0.075][0]
    error = (synthesise(folder, 0.075)[0]["w"] - wanted).square().mean().sqrt()
    nearest = min((ema.averages[sigma][0] - wanted).square().mean().sqrt() for sigma in (0.05, 0.1))
    assert error < 0.1 * nearest


@given(st.floats(0.005, 0.28))
def test_gamma_gives_its_sigma_rel_back(sigma):
    gamma = gamma_of(sigma)
    assert gamma > 0
    assert math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) == pytest.approx(sigma, rel=1e-9)


@given(st.floats(0.01, 0.2), st.floats(1.01, 1.4))
def test_a_wider_window_has_a_smaller_gamma(sigma, factor):
    assert gamma_of(sigma * factor) < gamma_of(sigma)


@given(st.integers(1, 10**6), st.floats(0.01, 0.28), st.booleans(), st.integers(1, 16))
def test_decays_lie_between_0_and_1_and_grow_with_the_step(step, sigma, correction, every):
    gamma, options = gamma_of(sigma), {"correction": correction, "update_every": every}
    beta, following = (beta_of(k, gamma, **options) for k in (step, step + every))
    assert 0 <= beta < following < 1
    assert beta_of(step, gamma * 1.1, **options) <= beta


@pytest.mark.parametrize("sigma", [0, -0.1, 0.3, float("nan")])
def test_impossible_widths_are_refused(sigma):
    with pytest.raises(ValueError, match="sigma_rel"):
        gamma_of(sigma)


def test_an_average_that_never_saw_a_change_is_the_weights_to_the_bit():
    model = Net()
    ema = PowerEMA(model)
    for _ in range(100):
        ema.update(model)
    assert all(torch.equal(average[0], model.w) for average in ema.averages.values())


def test_averages_are_swapped_in_and_the_weights_come_back_to_the_bit():
    model = Net()
    ema = PowerEMA(model)
    ema.update(model)
    with torch.no_grad():
        model.w.mul_(3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def validate():
        with ema.applied(model, 0.05):
            assert torch.is_grad_enabled()
            assert torch.equal(model.w, ema.averages[0.05][0])
            assert not torch.equal(model.w, before["w"])
            assert torch.equal(model.frozen, before["frozen"])
            raise RuntimeError("validation broke")

    with pytest.raises(RuntimeError, match="validation broke"):
        validate()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(UserError, match=r"0\.07") as caught, ema.applied(model, 0.07):
        pass
    assert "0.05, 0.1" in caught.value.hint


def test_swapping_is_seen_by_caches_that_watch_versions():
    model = Net()
    ema, seen = PowerEMA(model), [model.w._version]
    with ema.applied(model, 0.05):
        seen.append(model.w._version)
    seen.append(model.w._version)
    assert len(set(seen)) == 3


def test_bfloat16_weights_are_averaged_in_float32():
    model = Net().bfloat16()
    ema = PowerEMA(model)
    for _ in range(5):
        ema.update(model)
        with torch.no_grad():
            model.w.add_(0.01)
    assert ema.averages[0.1][0].dtype == torch.float32
    with ema.applied(model, 0.1):
        assert torch.equal(model.w, ema.averages[0.1][0].bfloat16())


def test_a_resumed_average_goes_on_to_the_bit():
    torch.manual_seed(1)
    model = Net()
    values = torch.randn(20, 3, 4)

    def train(ema, steps):
        for k in steps:
            with torch.no_grad():
                model.w.copy_(values[k])
            ema.update(model)
        return ema

    whole = train(PowerEMA(model, update_every=3), range(20))
    first = train(PowerEMA(model, update_every=3), range(11))
    second = PowerEMA(model, update_every=3)
    second.load({name: tensor.clone() for name, tensor in first.tensors().items()}, first.step)
    train(second, range(11, 20))
    assert second.step == whole.step == 20
    assert all(torch.equal(tensor, whole.tensors()[name]) for name, tensor in second.tensors().items())
    with pytest.raises(UserError, match=r"0\.2/w"):
        second.load({"0.2/w": torch.zeros(3, 4)}, 1)


def test_what_cannot_be_synthesised_is_one_message(tmp_path):
    folder = Folder.at(str(tmp_path / "ema"))
    with pytest.raises(UserError, match="no EMA snapshots"):
        synthesise(folder, 0.08)
    model = Net()
    ema = PowerEMA(model)
    ema.update(model)
    ema.write_snapshots(folder, model)
    with pytest.raises(UserError, match="newest snapshot is of step 1"):
        synthesise(folder, 0.08, step=2)
    with pytest.raises(UserError, match="sigma_rel"):
        synthesise(folder, 0.5)
    name = "sigma-0.1-step-00000001.safetensors"
    folder.write(name, folder.read(name)[:-3])
    with pytest.raises(UserError, match="damaged"):
        synthesise(folder, 0.08)
