"""Steering is a movement of what comes out; what another forward keeps of it is measured along that movement."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ttmray.cli import main
from ttmray.generation.steering import Steering, SteeringConfig, compare, lost, steer
from ttmray.models.backbone import BackboneConfig, FluxAudio
from ttmray.models.backbone_weights import METADATA, with_head
from ttmray.models.score_heads import Head

TEXT = torch.randn(3, 77, 64, generator=torch.Generator().manual_seed(1))
POOLED = torch.randn(3, 512, generator=torch.Generator().manual_seed(2))


def model(head: Head, embedding: float = 0.5) -> FluxAudio:
    """A small backbone, short latents of the debug VAE, whose score embedding is this large."""
    torch.manual_seed(0)
    shape = {"latent_len": 16, "text_dim": 64, "hidden": 64, "heads": 2, "depth": 3, "fused_depth": 1}
    made = FluxAudio(BackboneConfig(**shape, head=head))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "adaLN_modulation" in name or name.startswith("final_layer.conv"):
                parameter.normal_(std=0.1)
        made.latent_mean.zero_()
        made.latent_std.fill_(1.0)
        made.score_embed.mlp[2].weight.normal_(std=embedding)
    return made.eval()


def movement(values: list[float]) -> Steering:
    latents = torch.tensor([[0.0] * len(values), values])[:, None, :, None]
    return Steering(latents, latents)


def test_kept_is_what_goes_the_same_way_however_large_the_rest():
    own = movement([1.0, 1.0, 0.0])
    assert own.kept_of(own) == pytest.approx(1.0)
    assert movement([0.5, 0.5, 7.0]).kept_of(own) == pytest.approx(0.5)
    assert movement([0.0, 0.0, 9.0]).kept_of(own) == 0.0
    assert movement([-1.0, -1.0, 0.0]).kept_of(own) == pytest.approx(-1.0)
    assert own.kept_of(movement([0.0, 0.0, 0.001])) is None


def test_a_score_that_says_nothing_moves_nothing_and_cannot_be_lost():
    trained = model("v1", embedding=0.0)
    assert steer(trained, TEXT, POOLED, SteeringConfig(steps=2)).moved == 0.0
    models = {"v1": trained, "v2": with_head(trained, "v2")[0]}
    report = compare(models, TEXT, POOLED, SteeringConfig(steps=2, reward=False), "debug")
    assert report["forwards"]["v2"] == {"moved": 0.0, "kept": None, "reward": None}
    assert not lost(report, "v2")


def test_steering_is_the_same_every_time_and_draws_nothing_from_the_global_generator():
    trained, state = model("v1"), torch.get_rng_state()
    models = {"v1": trained, "v4": with_head(trained, "v4")[0], "v2": with_head(trained, "v2")[0]}
    config = SteeringConfig(steps=3, reward=False)
    report = compare(models, TEXT, POOLED, config, "debug")
    assert torch.equal(torch.get_rng_state(), state)
    assert report == compare(models, TEXT, POOLED, config, "debug")
    kept = {head: found["kept"] for head, found in report["forwards"].items()}
    assert kept["v1"] == pytest.approx(1.0)
    assert kept["v4"] > 0.5 > kept["v2"]  # v4 leaves out the text's stream alone; an added embedding is another thing


def test_the_command_says_what_the_reward_does_with_real_decoders(tmp_path: Path, capsys):
    trained = model("v1")
    state = {name: tensor.contiguous() for name, tensor in trained.state_dict().items()}
    about = {METADATA: json.dumps({"backbone": trained.config.to_dict()})}
    save_file(state, tmp_path / "v1.safetensors", about)
    assert (
        main(["checkpoint", "steer", str(tmp_path / "v1.safetensors"), "--heads", "v4", "v2", "--bundle", "debug"]) == 0
    )
    said = capsys.readouterr().out
    for head in ("v1", "v4", "v2"):
        assert f"{head} forward: latents move by" in said
    assert said.count("delta_out ") == 3
