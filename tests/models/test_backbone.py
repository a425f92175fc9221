"""FluxAudio against the reference's numbers, and what its users rely on."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from ttmray.models.backbone import SIZES, BackboneConfig, Conditions, FluxAudio, gated_width
from ttmray.models.backbone_weights import debug_backbone, forward_flops

Golden = tuple[FluxAudio, dict[str, torch.Tensor]]


@pytest.fixture(params=["rope", "norope"])
def golden(request: pytest.FixtureRequest, golden_dir: Path) -> Golden:
    tensors = load_file(golden_dir / f"flux_tiny_{request.param}.safetensors")
    config = json.loads((golden_dir / f"flux_tiny_{request.param}.json").read_text())["config"]
    names = {"latent_seq_len": "latent_len", "text_seq_len": "text_len", "hidden_dim": "hidden"}
    names |= {"num_heads": "heads", "use_rope": "rope"}
    model = FluxAudio(BackboneConfig(**{names.get(key, key): value for key, value in config.items()}))
    model.load_state_dict({k[3:]: v for k, v in tensors.items() if k.startswith("sd.")}, strict=True)
    return model.eval(), tensors


def close(ours: torch.Tensor, reference: torch.Tensor, tolerance: float = 2e-5) -> None:
    assert ours.shape == reference.shape
    assert (ours - reference).abs().max() <= tolerance * max(1.0, reference.abs().max().item())


@torch.inference_mode()
def test_golden_forward_and_everything_on_the_way(golden):
    model, g = golden
    taps: dict[str, torch.Tensor] = {}

    def tap(name: str, index: int | None = None):
        def hook(module, inputs, output):
            taps[name] = output if index is None else output[index]

        return hook

    def raw_qkv(name: str):
        def hook(attn, inputs, output):  # the module uses the layer's weight in another order
            taps[name] = attn.qkv(inputs[0])

        return hook

    model.audio_input_proj.register_forward_hook(tap("audio_in"))
    model.t_embed.register_forward_hook(tap("t_embed"))
    for i, block in enumerate(model.joint_blocks):
        block.register_forward_hook(tap(f"joint{i}.latent", 0))
        block.register_forward_hook(tap(f"joint{i}.text", 1))
        block.latent_block.attn.register_forward_hook(raw_qkv(f"joint{i}.latent_qkv"))
    for i, block in enumerate(model.fused_blocks):
        block.register_forward_hook(tap(f"fused{i}"))
    close(model(g["in.latent"], g["in.t"], g["in.text_f"], g["in.text_f_c"]), g["out.forward"])
    expected = {name.removeprefix("out.tap."): value for name, value in g.items() if name.startswith("out.tap.")}
    assert len(expected) >= 5
    for name, value in expected.items():
        close(taps[name].reshape(value.shape), value)
    times = {name: float(t[1]) for name in g if (t := re.fullmatch(r"out\.forward_t(\d.*)", name))}
    assert times
    for name, t in times.items():
        at = torch.full_like(g["in.t"], t)
        close(model(g["in.latent"], at, g["in.text_f"], g["in.text_f_c"]), g[name])


@torch.inference_mode()
def test_golden_conditions_of_a_prompt_a_negative_and_the_empty_text(golden):
    model, g = golden
    batch = len(g["in.latent"])
    for name, conditions in (
        ("cond", model.conditions(g["in.text_f"], g["in.text_f_c"])),
        ("neg", model.conditions(g["in.neg_text_f"], g["in.neg_text_f_c"])),
        ("empty", model.empty_conditions(batch)),
    ):
        close(conditions.tokens, g[f"out.{name}.text_f"])
        close(conditions.pooled[:, 0], g[f"out.{name}.text_f_c"])


@torch.inference_mode()
def test_golden_normalisation_and_another_length(golden):
    model, g = golden
    close(model.normalise(g["in.latent"]), g["out.normalize"])
    close(model.unnormalise(g["in.latent"]), g["out.unnormalize"])
    model.resize(g["in.latent_long"].shape[1])
    close(model(g["in.latent_long"], g["in.t"], g["in.text_f"], g["in.text_f_c"]), g["out.forward_long"])


@pytest.mark.parametrize("size", ["s_44k", "s_16k"])
def test_golden_names_and_shapes_are_the_reference_s(size, golden_dir):
    reference = json.loads((golden_dir / f"manifests/fluxaudio_{size}.json").read_text())
    with torch.device("meta"):
        model = FluxAudio(SIZES[size])
        scored = FluxAudio(SIZES[size].with_head("v1"))
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == reference
    assert len(reference) == 198
    added = scored.state_dict().keys() - reference.keys()
    assert len(scored.state_dict()) == 203
    assert all(name.startswith("score_embed.") for name in added)
    assert [name for name in scored.state_dict() if name in reference] == list(model.state_dict())


def test_golden_initial_weights_are_distributed_as_the_reference_s(golden_dir):
    stats = json.loads((golden_dir / "manifests/fluxaudio_s_44k.init_stats.json").read_text())["stats"]
    torch.manual_seed(0)
    model = FluxAudio(SIZES["s_44k"])
    state = model.state_dict()
    assert len(stats) > 50, "it holds some blocks of each kind"
    for name, expected in stats.items():
        tensor = state[name]
        if expected["std"] == 0:
            if torch.isfinite(tensor).all():  # latent statistics are NaN
                assert tensor.std().nan_to_num() == 0, name
                assert abs(tensor.mean().item() - expected["mean"]) < 1e-6, name
        else:
            # one draw against another: five standard errors of a standard deviation
            spread = 5 / tensor.numel() ** 0.5 + 1e-3
            assert abs(tensor.std().item() / expected["std"] - 1) < spread, name
            assert tensor.abs().max() < 1.3 * expected["absmax"] + 3 * expected["std"], name


def test_a_new_model_answers_zero_to_everything():
    model = FluxAudio(BackboneConfig(hidden=64, heads=2, depth=3, fused_depth=1, text_dim=16))
    x, text, pooled = torch.randn(2, 430, 40), torch.randn(2, 77, 16), torch.randn(2, 512)
    assert (model(x, torch.rand(2), text, pooled) == 0).all()


@torch.inference_mode()
def test_a_projected_text_equals_the_text_and_rows_do_not_mix():
    model = debug_backbone(1, "none")
    x, t = torch.randn(3, 430, 40), torch.rand(3)
    text, pooled = torch.randn(3, 77, 64), torch.randn(3, 512)
    together = model(x, t, text, pooled)
    conditions = model.conditions(text, pooled)
    torch.testing.assert_close(model.velocity(x, t, conditions), together, rtol=0, atol=0)
    for i in range(3):
        alone = model.velocity(x[i : i + 1], t[i : i + 1], conditions[i : i + 1])
        torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-4, atol=1e-4)
    rejoined = Conditions.cat([conditions[i : i + 1] for i in range(3)])
    assert torch.equal(rejoined.tokens, conditions.tokens)


def test_checkpointing_changes_memory_and_not_gradients():
    model = debug_backbone(2).requires_grad_(True)
    inputs = torch.randn(1, 430, 40), torch.rand(1), torch.randn(1, 77, 64), torch.randn(1, 512)
    gradients = []
    for checkpointing in (False, True):
        model.checkpointing = checkpointing
        model.zero_grad()
        model(*inputs, torch.ones(1)).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.parametrize("head", ["none", "v1", "v2", "v3", "v4", "v5"])
def test_every_head_compiles_in_one_graph(head):
    model = debug_backbone(0, head)
    inputs: list[torch.Tensor | None] = [torch.randn(1, 430, 40), torch.rand(1)]
    inputs += [torch.randn(1, 77, 64), torch.randn(1, 512), None if head == "none" else torch.ones(1)]
    torch._dynamo.reset()
    found = torch._dynamo.explain(model)(*inputs)
    assert (found.graph_count, found.graph_break_count) == (1, 0)


def test_the_count_of_operations_is_that_of_torch():
    config = BackboneConfig(hidden=64, heads=2, depth=5, fused_depth=2, text_dim=48, text_c_dim=24)
    with torch.device("meta"):
        model = FluxAudio(config)
        x, t = torch.empty(1, 430, 40), torch.empty(1)
        text, pooled = torch.empty(1, 77, 48), torch.empty(1, 24)
    model.latent_rot, model.text_rot = model.latent_rot.to("meta"), model.text_rot.to("meta")
    model.t_embed.freqs = model.t_embed.freqs.to("meta")
    with FlopCounterMode(display=False) as counter:
        model(x, t, text, pooled)
    assert sum(forward_flops(config).values()) == counter.get_total_flops()


def test_the_full_size_costs_what_was_measured_for_the_reference():
    flops = forward_flops(SIZES["s_44k"])
    assert flops["velocity"] == pytest.approx(82.05e9, rel=1e-4)
    assert sum(flops.values()) == pytest.approx(82.39e9, rel=1e-4)


@pytest.mark.parametrize(("hidden", "inner"), [(1792, 1280), (3584, 2560), (256, 256)])
def test_gated_layers_are_two_thirds_wide_rounded_up(hidden, inner):
    assert gated_width(hidden) == inner


def test_wrong_shapes_are_named():
    model = debug_backbone(0, "none")
    text, pooled = torch.randn(1, 77, 64), torch.randn(1, 512)
    with pytest.raises(ValueError, match=r"\(B, 430, 40\), not \(1, 431, 40\)"):
        model(torch.randn(1, 431, 40), torch.rand(1), text, pooled)
    with pytest.raises(ValueError, match=r"text must be \(B, 77, 64\)"):
        model(torch.randn(1, 430, 40), torch.rand(1), text[:, :7], pooled)
    with pytest.raises(ValueError, match="no score head"):
        model(torch.randn(1, 430, 40), torch.rand(1), text, pooled, torch.ones(1))
