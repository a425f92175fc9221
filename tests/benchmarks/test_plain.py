"""The plain model of the speed benchmarks is a fair peer: the same numbers as ours, from the same weights."""

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ttmray.models.backbone import BackboneConfig
from ttmray.training.ema import PowerEMA
from ttmray.training.flow_matching import FlowMatchingConfig, flow_losses

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TINY = BackboneConfig(latent_len=23, text_len=9, text_dim=32, hidden=64, heads=2, depth=3, fused_depth=1)


def module(name: str):
    """A benchmark as a module; they import each other as scripts do."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def plain():
    return module("plain")


@pytest.mark.parametrize("name", ["rope", "norope"])
@torch.inference_mode()
def test_the_plain_model_gives_the_golden_forward(plain, golden_dir, name):
    g = load_file(golden_dir / f"flux_tiny_{name}.safetensors")
    config = json.loads((golden_dir / f"flux_tiny_{name}.json").read_text())["config"]
    names = {"latent_seq_len": "latent_len", "text_seq_len": "text_len", "hidden_dim": "hidden"}
    names |= {"num_heads": "heads", "use_rope": "rope"}
    model = plain.PlainFluxAudio(BackboneConfig(**{names.get(key, key): value for key, value in config.items()}))
    model.load_state_dict({key[3:]: value for key, value in g.items() if key.startswith("sd.")}, strict=True)
    v = model.velocity(g["in.latent"], g["in.t"], model.conditions(g["in.text_f"], g["in.text_f_c"]), None, None)
    assert (v - g["out.forward"]).abs().max() <= 2e-5 * max(1.0, g["out.forward"].abs().max().item())


@pytest.mark.parametrize("head", ["none", "v1", "v2"])
@torch.inference_mode()
def test_the_plain_model_equals_ours_with_and_without_a_score(plain, head):
    ours = plain.seeded_backbone(TINY.with_head(head)).eval()
    theirs = plain.plain_copy(ours)
    x, t, text, text_c = torch.randn(3, 23, 40), torch.rand(3), torch.randn(3, 9, 32), torch.randn(3, 512)
    score, null = (None, None) if head == "none" else (torch.randn(3), torch.tensor([False, True, False]))
    expected = ours.velocity(x, t, ours.conditions(text, text_c), score, null)
    assert expected.std() > 0.1, "the comparison would be of zeros"
    torch.testing.assert_close(
        theirs.velocity(x, t, theirs.conditions(text, text_c), score, null), expected, rtol=0, atol=2e-5
    )


def test_plain_updates_lead_to_the_weights_and_averages_of_ours(plain):
    training = module("training")
    model = plain.seeded_backbone(TINY.with_head("v1"))
    before = model.audio_input_proj[0].weight.detach().clone()
    trainer = plain.PlainTrainer(plain.plain_copy(model), lambda step: 1e-3, (0.05, 0.1), bf16=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-3, (0.9, 0.95), 1e-6, 1e-6, fused=True)
    ema = PowerEMA(model)
    for step in range(4):
        batch = training.synthetic_samples(model.config, 4, step, pin=False).batch
        loss = flow_losses(model, batch, FlowMatchingConfig())[0].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model)
        torch.testing.assert_close(trainer.update(batch), loss.detach(), rtol=1e-4, atol=1e-4)
    assert (model.audio_input_proj[0].weight - before).abs().max() > 1e-3, "nothing was trained"
    theirs = dict(trainer.model.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(theirs[name], parameter, rtol=0, atol=2e-4)
    names = [name for name, _ in trainer.model.named_parameters()]
    for sigma, averages in zip((0.05, 0.1), trainer.averages, strict=True):
        plainly = dict(zip(names, averages, strict=True))
        for name, average in zip(ema.names, ema.averages[sigma], strict=True):
            torch.testing.assert_close(plainly[name], average, rtol=0, atol=2e-4)


def test_a_side_that_computes_something_else_is_an_error(plain, monkeypatch):
    training = module("training")

    class Other(plain.PlainTrainer):
        def loss(self, batch):
            return 1.01 * super().loss(batch)

    monkeypatch.setattr(training, "PlainTrainer", Other)
    with pytest.raises(RuntimeError, match="losses of both sides differ"):
        training.compare(training.TINY, torch.device("cpu"), 2, 1, "fp32", False, None)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["generation", "training"])
def test_quick_runs_of_the_benchmarks_measure_both_sides(name, tmp_path):
    output = tmp_path / "result.json"
    command = [sys.executable, BENCHMARKS / f"{name}.py", "--quick", "--threads", "1", "--output", output]
    subprocess.run([*command, "--device", "cpu"], check=True, timeout=400)
    result = json.loads(output.read_text())
    assert not result["judged"]
    measured = {line["what"]: line["reached"] for line in result["lines"]}
    assert all(math.isfinite(reached["median"]) and reached["median"] > 0 for reached in measured.values())
    assert any("ours against plain" in what for what in measured)
