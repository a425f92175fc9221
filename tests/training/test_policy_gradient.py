"""The mathematics of online GRPO: parity with the public trainer, an analytic gradient, a toy that learns."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from ttmray.generation.sampler import time_grid
from ttmray.generation.stochastic import make_steps
from ttmray.training.policy_gradient import group_advantages, policy_losses, step_kl

CASES = [f"{kind}.step{step}" for kind in ("sde", "cps") for step in (0, 1, 5, 9)]


@pytest.fixture(scope="module")
def facts(golden_dir):
    return json.loads((golden_dir / "grpo.json").read_text())


@pytest.fixture(scope="module")
def golden(golden_dir):
    return load_file(golden_dir / "grpo.safetensors")


def close(value, expected, tolerance):
    scale = max(1.0, float(expected.abs().max()))
    assert (value.detach() - expected).abs().max().item() <= tolerance * scale


def test_every_case_of_the_public_trainer_is_tested(facts):
    assert [case["name"] for case in facts["cases"]] == CASES


def test_the_grid_is_the_public_trainers(golden, facts):
    assert torch.equal(time_grid(facts["config"]["steps"]), golden["in.timesteps"])


@pytest.mark.parametrize("name", CASES)
def test_a_step_and_its_losses_are_those_of_the_public_trainer(golden, facts, name):
    case = next(case for case in facts["cases"] if case["name"] == name)
    config = facts["config"]
    given = {key.rpartition(".")[2]: value for key, value in golden.items() if key.startswith(f"in.{name}.")}
    expected = {key.rpartition(".")[2]: value for key, value in golden.items() if key.startswith(f"out.{name}.")}
    steps = make_steps(golden["in.timesteps"], case["sde_type"], config["noise_level"])
    number = torch.full((config["batch"],), case["step"])
    assert golden["in.timesteps"][case["step"]].item() == case["t"]

    close(steps.mean(given["x"], given["v"], number), expected["mean"], 2e-6)
    close(steps.std[number], expected["std"], 2e-6)
    old = steps.log_prob(given["prev"], steps.mean(given["x"], given["v"], number), number)
    close(old, expected["log_prob_old"], 2e-5)

    v = given["v_new"].requires_grad_()
    mean = steps.mean(given["x"], v, number)
    log_prob = steps.log_prob(given["prev"], mean, number)
    close(log_prob, expected["log_prob_new"], 2e-5)
    kl = step_kl(mean, steps.mean(given["x"], given["v_ref"], number), steps.std[number])
    losses = policy_losses(
        log_prob,
        expected["log_prob_old"],
        given["advantages"].clamp(-config["adv_clip_max"], config["adv_clip_max"]),
        kl,
        clip_range=config["clip_range"],
        beta=config["beta"],
    )
    close(losses.ratio, expected["ratio"], 2e-5)
    close(losses.policy.mean(), expected["policy_loss"], 2e-5)
    close(losses.total.mean(), expected["loss"], 2e-5)
    if case["kl"]:
        close(kl.mean(), expected["kl"], 2e-5)
    else:
        assert not kl.any()  # nothing is drawn in the last step
    losses.total.mean().backward()
    assert case["finite"]
    assert torch.isfinite(v.grad).all()
    assert float((v.grad - expected["grad_v"]).abs().max()) <= 1e-4 * float(expected["grad_v"].abs().max())


@pytest.mark.parametrize("rule", ["global_std", "group_std"])
def test_advantages_are_those_of_the_public_trainer(facts, rule):
    golden = facts["advantages"]
    found = group_advantages(
        np.array(golden["rewards"]),
        golden["prompts"],
        global_std=rule == "global_std",
        limit=facts["config"]["adv_clip_max"],
    )
    np.testing.assert_allclose(found, golden[rule], rtol=1e-5, atol=1e-6)


def test_a_group_without_differences_has_no_advantages_and_large_ones_are_limited():
    rewards, groups = np.array([0.1, 0.1, 0.1, 9.0, 0.0, 0.0]), ["a", "a", "a", "b", "b", "b"]
    for rule in (True, False):
        found = group_advantages(rewards, groups, global_std=rule, limit=1.0)
        assert found[:3].tolist() == [0, 0, 0]
        assert (found[3], found[4] < 0) == (1.0, True)


@given(st.lists(st.integers(-20, 20), min_size=2, max_size=12), st.integers(-5, 5), st.integers(1, 9))
def test_advantages_do_not_depend_on_the_zero_or_much_on_the_unit_of_a_reward(rewards, zero, unit):
    groups = ["a" if i % 2 else "b" for i in range(len(rewards))]
    first = group_advantages(np.array(rewards, float), groups)
    second = group_advantages(np.array(rewards, float) * unit + zero, groups)
    np.testing.assert_allclose(first, second, atol=2e-3)
    for name in "ab":
        assert abs(sum(a for a, g in zip(first, groups, strict=True) if g == name)) < 1e-9 * len(rewards) + 1e-9


def test_the_deterministic_flow_is_the_limit_without_noise():
    x, v = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    grid = time_grid(7)
    for kind in ("sde", "cps"):
        steps = make_steps(grid, kind, 0.0)
        for i, dt in enumerate(grid.diff().tolist()):
            number = torch.full((2,), i)
            torch.testing.assert_close(steps.mean(x, v, number), x + dt * v, atol=2e-6, rtol=0)
            assert not steps.spread.any()


def drawn(kind: str, count: int, deviation: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """States (20000,) at the last two times, and the grid, with the exact velocity for data N(1, deviation^2)."""
    torch.manual_seed(0)
    grid = time_grid(count)
    steps = make_steps(grid, kind, 0.7)
    x = torch.randn(20_000, 1, 1)
    for i in range(count):
        t = float(grid[i])
        variance = ((1 - t) * deviation) ** 2 + t**2
        v = (t - (1 - t) * deviation**2) / variance * (x - (1 - t)) - 1  # E[noise - data | x]
        before, number = x, torch.full((len(x),), i)
        x = steps.mean(x, v, number) + steps.spread[i] * torch.randn_like(x)
    return before.flatten(), x.flatten(), grid


def test_paths_of_the_sde_end_in_the_data_when_steps_are_small():
    _, x, _ = drawn("sde", 200, 0.5)
    assert x.mean().item() == pytest.approx(1, abs=0.03)
    assert x.std().item() == pytest.approx(0.5, abs=0.03)


def test_states_of_cps_hold_as_much_noise_as_their_time_says_also_in_few_steps():
    before, x, grid = drawn("cps", 6, 0.0)
    assert before.std().item() == pytest.approx(float(grid[-2]), abs=0.01)
    assert before.mean().item() == pytest.approx(1 - float(grid[-2]), abs=0.01)
    torch.testing.assert_close(x, torch.ones_like(x), atol=1e-5, rtol=0)  # nothing is drawn in the last step


def test_a_grid_that_is_none_is_refused():
    for grid in (torch.linspace(0, 1, 5), torch.linspace(1, -0.1, 5), torch.ones(3)):
        with pytest.raises(ValueError, match="must fall"):
            make_steps(grid, "sde", 0.7)


def test_the_policy_gradient_is_the_analytic_one():
    """One step with velocity theta, reward x': d E[reward] / d theta = move, and of a draw A (x' - mean) move / var."""
    torch.manual_seed(0)
    steps, n = make_steps(time_grid(4), "sde", 0.7), 200_000
    number = torch.full((n,), 2)
    theta = torch.tensor(0.3, requires_grad=True)
    x = torch.randn(n, 1, 1)
    mean = steps.mean(x, theta.expand(n, 1, 1), number)
    after = (mean + steps.spread[2] * torch.randn_like(x)).detach()
    rewards = (after - mean).detach().flatten()  # what the state brings is known and taken off
    log_prob = steps.log_prob(after, mean, number)
    zeros = torch.zeros(n)
    losses = policy_losses(log_prob, log_prob.detach(), rewards, zeros, clip_range=1e-4, beta=0.04)
    assert torch.equal(losses.ratio, torch.ones(n))
    (gradient,) = torch.autograd.grad(losses.total.mean(), theta)
    move, spread = steps.move[2], steps.spread[2]
    by_hand = -(rewards * (after - mean).detach().flatten() * move / spread**2).mean()
    assert gradient.item() == pytest.approx(by_hand.item(), rel=1e-4)
    assert gradient.item() == pytest.approx(-move.item(), rel=0.01)


def test_ratios_beyond_the_clip_range_have_no_gradient_where_they_would_gain():
    log_prob = torch.tensor([1e-3, -1e-3, 1e-3, -1e-3], requires_grad=True)
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0])
    zeros = torch.zeros(4)
    policy_losses(log_prob, zeros, advantages, zeros, clip_range=1e-4, beta=0).total.sum().backward()
    assert (log_prob.grad != 0).tolist() == [False, True, True, False]


def learn(kind: str, beta: float, rounds: int = 50) -> tuple[float, float, float]:
    """Mean reward before and after, and the KL of the last rounds: data is N(0, 0.5^2), the reward wants it at 1."""
    generator = torch.Generator().manual_seed(1)
    grid = time_grid(5)
    steps = make_steps(grid, kind, 0.7)
    theta = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.Adam([theta], lr=0.03)

    def velocity(x: torch.Tensor, step: int, shift: torch.Tensor) -> torch.Tensor:
        t = float(grid[step])
        return (t - (1 - t) * 0.25) / (((1 - t) * 0.5) ** 2 + t**2) * x + shift[0] + shift[1] * t

    curve, divergences = [], []
    for _ in range(rounds):
        path, old, references = [torch.randn(256, 1, 1, generator=generator)], [], []
        with torch.no_grad():
            for i in range(5):
                number = torch.full((256,), i)
                mean = steps.mean(path[-1], velocity(path[-1], i, theta), number)
                references.append(steps.mean(path[-1], velocity(path[-1], i, torch.zeros(2)), number))
                path.append(mean + steps.spread[i] * torch.randn(256, 1, 1, generator=generator))
                old.append(steps.log_prob(path[-1], mean, number))
        rewards = -(path[-1].flatten() - 1).square().numpy()
        curve.append(rewards.mean())
        advantages = torch.from_numpy(group_advantages(rewards, ["a", "b"] * 128)).float()
        total, divergence = torch.zeros(()), 0.0
        for i in range(4):  # the last step is not trained
            number = torch.full((256,), i)
            mean = steps.mean(path[i], velocity(path[i], i, theta), number)
            kl = step_kl(mean, references[i], steps.std[number])
            log_prob = steps.log_prob(path[i + 1], mean, number)
            losses = policy_losses(log_prob, old[i], advantages, kl, clip_range=1e-4, beta=beta)
            total = total + losses.total.mean() / 4
            divergence += kl.mean().item() / 4
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        divergences.append(divergence)
    return float(np.mean(curve[:3])), float(np.mean(curve[-3:])), float(np.mean(divergences[-3:]))


@pytest.mark.parametrize(("kind", "beta"), [("sde", 4.0), ("cps", 0.3)])
def test_a_toy_gets_more_reward_and_the_kl_bounds_how_far_it_goes(kind, beta):
    before, after, free = learn(kind, beta=0.0)
    assert after > before + 0.5
    _, held, bounded = learn(kind, beta=beta)
    assert before + 0.05 < held < after
    assert 0 < bounded < 0.5 * free
    assert math.isfinite(free)
