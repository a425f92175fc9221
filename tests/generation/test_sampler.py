"""The sampler against the reference's numbers, and what makes a sample independent of how it is made."""

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from ttmray.config import load_config
from ttmray.errors import UserError
from ttmray.generation.sampler import (
    Branches,
    Draw,
    Sampler,
    SamplerConfig,
    guided,
    integrate,
    make_branches,
    noise,
    time_grid,
)
from ttmray.models.backbone import BackboneConfig, Conditions, FluxAudio
from ttmray.models.backbone_weights import debug_backbone
from ttmray.models.clap import Clap, debug_clap
from ttmray.models.t5 import TextEncoder, debug_text_encoder

FAST = SamplerConfig(steps=2)
CHECKSUM = "239f6025e9a1e4a8ba04d6b594a6a6a66278a47e1ac5d9a8be1069f25285af0f"
DRAWS = [Draw(f"p{i}", text, 42) for i, text in enumerate(["a calm piano", "drums", "strings", "a flute", "a choir"])]
DRAWS += [replace(DRAWS[0], candidate=1), replace(DRAWS[1], seed=55)]


@pytest.fixture(scope="module")
def backbone() -> FluxAudio:
    return debug_backbone(0)


@pytest.fixture(scope="module")
def encoders() -> tuple[TextEncoder, Clap]:
    return debug_text_encoder(0), debug_clap(1)


@pytest.fixture(params=["rope", "norope"])
def golden(request: pytest.FixtureRequest, golden_dir: Path) -> tuple[FluxAudio, dict[str, torch.Tensor]]:
    tensors = load_file(golden_dir / f"flux_tiny_{request.param}.safetensors")
    config = json.loads((golden_dir / f"flux_tiny_{request.param}.json").read_text())["config"]
    names = {"latent_seq_len": "latent_len", "text_seq_len": "text_len", "hidden_dim": "hidden"}
    names |= {"num_heads": "heads", "use_rope": "rope"}
    model = FluxAudio(BackboneConfig(**{names.get(key, key): value for key, value in config.items()}))
    model.load_state_dict({k[3:]: v for k, v in tensors.items() if k.startswith("sd.")}, strict=True)
    return model.eval(), tensors


def close(ours: torch.Tensor, reference: torch.Tensor, tolerance: float) -> None:
    assert ours.shape == reference.shape
    assert (ours - reference).abs().max() <= tolerance * max(1.0, reference.abs().max().item())


def golden_branches(model: FluxAudio, g: dict[str, torch.Tensor], negative: bool) -> Branches:
    away = model.conditions(g["in.neg_text_f"], g["in.neg_text_f_c"]) if negative else model.empty_conditions(1)
    return make_branches(model, model.conditions(g["in.text_f"], g["in.text_f_c"]), away, None)


def cases(g: dict[str, torch.Tensor], pattern: str) -> list[re.Match[str]]:
    """Tensors whose name has the parameters in it."""
    found = [match for name in g if (match := re.fullmatch(pattern, name))]
    assert found, pattern
    return found


@torch.inference_mode()
def test_golden_guided_velocities(golden):
    model, g = golden
    for case in cases(g, r"out\.ode_cfg(?P<weight>.+)_(?P<away>neg|empty)_t(?P<t>.+)"):
        branches = golden_branches(model, g, case["away"] == "neg")
        weight = max(1.0, float(case["weight"]))  # below 1 the reference does not guide
        v = guided(model.velocity, g["in.latent"], torch.tensor(float(case["t"])), branches, (weight,))
        close(v, g[case[0]], 1e-4)


@torch.inference_mode()
def test_golden_euler_with_guidance_and_without(golden):
    model, g = golden
    branches = golden_branches(model, g, negative=True)
    states = []

    def velocity(x: torch.Tensor, t: torch.Tensor, step: int, weight: float) -> torch.Tensor:
        states.append(x)
        return guided(model.velocity, x, t, branches, (weight,))

    for case in cases(g, r"out\.(euler(\d+))_cfg(.+)_neg\.norm"):
        states.clear()
        weight, grid = float(case[3]), time_grid(int(case[2]), min_sigma=0.0)
        x = integrate(lambda x, t, step, w=weight: velocity(x, t, step, w), g["in.x0"], grid)
        close(torch.stack([*states, x]), g[f"out.{case[1]}_traj"], 1e-4)
        close(x, g[case[0]], 1e-4)
        close(model.unnormalise(x), g[case[0].removesuffix("norm") + "unnorm"], 1e-4)
    for case in cases(g, r"out\.euler(\d+)_nocfg\.norm"):
        x = integrate(lambda x, t, step: velocity(x, t, step, 1.0), g["in.x0"], time_grid(int(case[1]), min_sigma=0.0))
        close(x, g[case[0]], 1e-4)


def test_golden_euler_in_both_directions(golden_dir):
    g = load_file(golden_dir / "flow_matching.safetensors")

    def field(x: torch.Tensor, t: torch.Tensor, step: int) -> torch.Tensor:
        return x @ g["in.A"] + g["in.b"] * torch.cos(3 * t)

    for case in cases(g, r"out\.euler_n(\d+)_minsigma(.+)_to_data"):
        ours = integrate(field, g["in.x0"], time_grid(int(case[1]), float(case[2])))
        close(ours, g[case[0]], 2e-5)
    for start, end in (("in.x1", "to_prior"), ("in.x0", "to_data_forwardconv")):
        for case in cases(g, rf"out\.euler_n(\d+)_{end}"):
            close(integrate(field, g[start], torch.linspace(0, 1, int(case[1]) + 1)), g[case[0]], 2e-5)


def test_heun_is_of_second_order_and_spares_the_last_evaluation():
    """dx/dt = x from 1 to 0: the exact end is x / e. Its last step is Euler's, so errors shrink as those of O(h^2)."""
    calls = []

    def error(steps: int, solver: str) -> float:
        calls.clear()
        x = integrate(
            lambda x, t, step: calls.append((t.item(), step)) or x, torch.ones(1).double(), time_grid(steps), solver
        )
        return abs(x.item() - np.exp(-1))

    for solver, ratio in (("euler", 2), ("heun", 4)):
        assert error(20, solver) / error(40, solver) == pytest.approx(ratio, rel=0.1)
    error(3, "heun")
    assert [step for _, step in calls] == [0, 0, 1, 1, 2]
    assert [t for t, _ in calls] == pytest.approx([1, 2 / 3, 2 / 3, 1 / 3, 1 / 3])


def conditions(backbone: FluxAudio, encoders: tuple[TextEncoder, Clap], texts: list[str]) -> Conditions:
    text, pooled = encoders
    return backbone.conditions(torch.from_numpy(text.encode(texts)), torch.from_numpy(pooled.embed_text(texts)))


@torch.inference_mode()
def test_the_branches_are_those_of_the_formulas(backbone, encoders):
    """One forward of 3 x 2 rows against single forwards, for unequal weights; equal ones are Eq. 2."""
    text, away = conditions(backbone, encoders, ["a flute", "drums"]), conditions(backbone, encoders, ["noise"])
    x, t = torch.stack([noise(1, "a", (430, 40)), noise(1, "b", (430, 40))]), torch.tensor(0.6)
    branches = make_branches(backbone, text, away, 2.5, two_axis=True)
    ours = guided(backbone.velocity, x, t, branches, (3.0, 1.5))
    for i in range(2):
        row, time, one = x[i : i + 1], t[None], text[i : i + 1]
        null = backbone.velocity(row, time, away)
        text_only = backbone.velocity(row, time, one)
        full = backbone.velocity(row, time, one, torch.tensor([2.5]))
        expected = null + 3.0 * (text_only - null) + 1.5 * (full - text_only)
        assert (full - text_only).abs().max() > 1e-3  # else the test could not tell the branches apart
        close(ours[i : i + 1], expected, 1e-5)
    joint = guided(backbone.velocity, x, t, make_branches(backbone, text, away, 2.5), (4.0,))
    close(guided(backbone.velocity, x, t, branches, (4.0, 4.0)), joint, 1e-5)
    assert (ours - joint).abs().max() > 1e-3


def test_weights_follow_their_schedules():
    config = SamplerConfig(steps=5, weight=4.0, low_weight=2.0, schedule="anneal")
    assert [config.weights(i)[0] for i in range(5)] == pytest.approx([4.0, 3.6, 3.2, 2.8, 2.4])
    config = SamplerConfig(steps=25, schedule="interval", guidance="two_axis", text_weight=3.0, score_weight=2.0)
    full = [i for i in range(25) if config.weights(i) == (3.0, 2.0)]
    assert full == list(range(5, 21))  # 0.2 and 0.8 themselves belong to the interval
    assert config.weights(4) == (1.0, 1.0)


@given(st.integers(1, 60), st.floats(0, 1), st.sampled_from(["single", "crossover", "crossover_reverse", "average"]))
def test_shares_of_checkpoints_add_up_and_hand_over_once(steps, share, mode):
    config = SamplerConfig(steps=steps, mode=mode, handoff=share, first_share=share)
    shares = [config.shares(step) for step in range(steps)]
    assert all(sum(part for _, part in step) == pytest.approx(1) for step in shares)
    order = [step[0][0] for step in shares]
    if mode.startswith("crossover"):
        early = 1 if mode == "crossover" else 0
        assert order == [early] * round(share * steps) + [1 - early] * (steps - round(share * steps))


def test_the_noise_never_changes():
    x = noise(42, "prompt-1", (430, 40))
    assert hashlib.sha256(x.numpy().tobytes()).hexdigest() == CHECKSUM
    assert abs(x.mean()) < 0.03
    assert abs(x.std() - 1) < 0.02


def test_noise_differs_by_seed_prompt_and_candidate():
    keys = [(42, "1", 0), (43, "1", 0), (42, "2", 0), (42, "1", 1), (4, "21", 0), (42, "11", 0)]
    noises = [noise(seed, name, (50, 40), k).flatten() for seed, name, k in keys]
    correlation = torch.corrcoef(torch.stack(noises)) - torch.eye(len(keys))
    assert correlation.abs().max() < 0.1


def test_a_sample_is_the_same_alone_in_a_batch_in_any_order_and_on_any_thread(backbone, encoders):
    seven = Sampler([backbone], *encoders, FAST).sample(DRAWS)
    assert seven.normalised.shape == (7, 430, 40)
    assert len({row.tobytes() for row in seven.latents}) == 7
    mixed = Sampler([backbone], *encoders, FAST, batch=3, threads=2).sample(DRAWS[::-1])
    np.testing.assert_array_equal(mixed.latents[::-1], seven.latents)
    alone = Sampler([backbone], *encoders, FAST).sample(DRAWS[3:4])
    np.testing.assert_array_equal(alone.latents[0], seven.latents[3])


def test_a_batch_of_clips_in_one_forward_agrees_with_single_clips(backbone, encoders):
    """What GPUs do, here on the CPU."""
    one_by_one = Sampler([backbone], *encoders, FAST)
    together = Sampler([backbone], *encoders, FAST)
    together._batch = 3
    close(torch.from_numpy(together.sample(DRAWS).latents), torch.from_numpy(one_by_one.sample(DRAWS).latents), 1e-4)


def test_every_text_is_encoded_once(backbone, encoders, monkeypatch):
    text, pooled = encoders
    seen: list[str] = []
    encode = text.encode
    monkeypatch.setattr(text, "encode", lambda texts: seen.extend(texts) or encode(texts))
    sampler = Sampler([backbone], text, pooled, SamplerConfig(steps=1))
    for draws in (DRAWS, DRAWS[:2]):
        sampler.sample(draws)
    prefix, negative = SamplerConfig().prefix, SamplerConfig().negative_prompt
    assert sorted(seen) == sorted([negative, *{prefix + draw.prompt for draw in DRAWS}])


def test_prompt_score_and_negative_prompt_change_the_sample(backbone, encoders):
    def sample(**changes: object) -> bytes:
        config = SamplerConfig(**{"steps": 1, **changes})
        return Sampler([backbone], *encoders, config).sample(DRAWS[:1]).latents.tobytes()

    different = [{}, {"score": 2.0}, {"score": None}, {"negative_prompt": ""}, {"prefix": ""}, {"weight": 1.0}]
    assert len({sample(**changes) for changes in different}) == len(different)


def test_two_checkpoints_are_mixed_as_the_mode_says(backbone, encoders):
    other = debug_backbone(1)

    def sample(*backbones: FluxAudio, **changes: object) -> torch.Tensor:
        config = SamplerConfig(**{"steps": 4, **changes})
        return torch.from_numpy(Sampler(backbones, *encoders, config).sample(DRAWS[:1]).latents)

    first, second = sample(backbone), sample(other)
    assert torch.equal(sample(backbone, other, mode="crossover", handoff=0.0), first)
    assert torch.equal(sample(backbone, other, mode="crossover", handoff=1.0), second)
    assert torch.equal(sample(backbone, other, mode="crossover_reverse", handoff=1.0), first)
    half = sample(backbone, other, mode="crossover")
    assert torch.equal(half, sample(other, backbone, mode="crossover_reverse"))
    assert not torch.equal(half, first)
    close(sample(backbone, backbone, mode="average", first_share=0.3), first, 1e-5)
    assert torch.equal(sample(backbone, other, mode="average", first_share=1.0), first)
    assert torch.equal(
        sample(backbone, backbone, mode="crossover", handoff=1.0, second_score=2.0), sample(backbone, score=2.0)
    )


def test_bf16_is_close_to_fp32_and_keeps_the_state_in_float32(backbone, encoders):
    plain = Sampler([backbone], *encoders, FAST).sample(DRAWS[:1]).normalised
    half = Sampler([backbone], *encoders, SamplerConfig(steps=2, precision="bf16")).sample(DRAWS[:1]).normalised
    assert half.dtype == np.float32
    assert 0 < np.abs(half - plain).max() < 0.1 * np.abs(plain).max()


@torch.inference_mode()
def test_no_step_waits_for_the_device():
    """On the meta device every read of a value (`.item()`, `bool`, indexing by a mask) raises."""
    config = SamplerConfig(steps=3, guidance="two_axis", solver="heun", schedule="interval")
    backbone = debug_backbone(0).to("meta")
    text = Conditions(torch.zeros(2, 77, 64, device="meta"), torch.zeros(2, 1, 64, device="meta"))
    branches = make_branches(backbone, text, text[:1], 5.0, two_axis=True)
    x = torch.zeros(2, 430, 40, device="meta")

    def velocity(x: torch.Tensor, t: torch.Tensor, step: int) -> torch.Tensor:
        return guided(backbone.velocity, x, t, branches, config.weights(step))

    assert integrate(velocity, x, time_grid(3), "heun").shape == x.shape
    with pytest.raises(RuntimeError, match="meta"):
        integrate(lambda x, t, step: x * t.item(), x, time_grid(3))


@pytest.mark.slow
def test_a_compiled_backbone_gives_the_same_numbers(backbone, encoders):
    plain = Sampler([backbone], *encoders, FAST).sample(DRAWS[:2]).latents
    compiled = Sampler([backbone], *encoders, FAST, compile=True).sample(DRAWS[:2]).latents
    np.testing.assert_allclose(compiled, plain, atol=1e-4 * np.abs(plain).max())


def test_latents_that_are_not_finite_are_named(backbone, encoders):
    broken = debug_backbone(0)
    broken.final_layer.conv.bias.fill_(float("inf"))
    with pytest.raises(RuntimeError, match=r"not finite for items \[0, 1\]"):
        Sampler([broken], *encoders, FAST).sample(DRAWS[:2])


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["score=.nan"], "score: Input should be a finite number"),
        (["score=.inf"], "score: Input should be a finite number"),
        (["score=1e9"], "score: Input should be less than or equal to 100"),
        (["second_score=.nan"], "second_score"),
        (["second_score=101"], "second_score must lie within"),
        (["steps=0"], "steps: Input should be greater than or equal to 1"),
        (["weight=-1"], "weight: Input should be greater than or equal to 0"),
        (["interval=[0.9, 0.1]"], "interval needs 0 <= first <= last <= 1"),
        (["guidance=two_axis", "score=null"], "guidance two_axis needs a score"),
        (["stepps=3"], "did you mean steps"),
    ],
)
def test_settings_that_make_no_sense_are_refused(sets, message):
    with pytest.raises(UserError, match=message):
        load_config(SamplerConfig, None, sets)


def test_models_that_do_not_fit_are_refused_before_anything_runs(backbone, encoders):
    with pytest.raises(UserError, match=r"checkpoint: the backbone takes 77 x 1024 token.*encoders give 77 x 64"):
        Sampler([FluxAudio(BackboneConfig(hidden=64, heads=2, depth=3, fused_depth=1))], *encoders, FAST)
    with pytest.raises(UserError, match=r"sampler.score is 5, but the backbone of checkpoint has no score head"):
        Sampler([debug_backbone(0, "none")], *encoders, FAST)
    with pytest.raises(UserError, match=r"sampler.second_score is 5, but the backbone of second_checkpoint has no"):
        Sampler([backbone, debug_backbone(0, "none")], *encoders, SamplerConfig(mode="average"))
    with pytest.raises(UserError, match="takes 2 checkpoints; there are 1"):
        Sampler([backbone], *encoders, SamplerConfig(mode="average"))
    other = debug_backbone(1)
    other.latent_std.fill_(2.0)
    with pytest.raises(UserError, match="other latents"):
        Sampler([backbone, other], *encoders, SamplerConfig(mode="average"))
