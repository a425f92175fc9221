"""Every part: it learns, goes on to the bit after a kill, and its files are what the loaders read."""

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import ClapConfig

from ttmray.errors import UserError
from ttmray.models import init_for_debug
from ttmray.models.bigvgan import load_bigvgan
from ttmray.models.clap import load_laion_clap
from ttmray.models.mert import load_mert
from ttmray.models.separator import Separator, load_separator
from ttmray.models.t5 import load_text_encoder
from ttmray.models.vae import MelVAE, MelVAEConfig, load_vae
from ttmray.pretraining.clap import CLAPConfig, CLAPPart, caption_tokenizer
from ttmray.pretraining.loop import CHECKPOINT, Part, PartConfig, learning_rate, train
from ttmray.pretraining.mert import MERTConfig, MERTPart
from ttmray.pretraining.separator import SeparatorConfig, SeparatorPart
from ttmray.pretraining.text import TextConfig, TextPart, corrupt, unigram_tokenizer
from ttmray.pretraining.vae import VAEConfig, VAEPart
from ttmray.pretraining.vocoder import VocoderConfig, VocoderPart
from ttmray.storage import Folder

CPU = torch.device("cpu")
PARTS: dict[str, tuple[type[Part], PartConfig]] = {
    "vae": (VAEPart, VAEConfig(steps=6, batch=2, warmup=1, hidden_dim=16, embed_dim=8, crop_frames=32)),
    "vocoder": (VocoderPart, VocoderConfig(steps=6, batch=1, warmup=1, channels=64, kernels=(3,), segment_frames=8)),
    "clap": (
        CLAPPart,
        CLAPConfig(
            steps=6,
            batch=2,
            warmup=1,
            audio_dim=16,
            text_dim=32,
            text_layers=1,
            vocabulary=400,
            fault_weight=1.0,
            new_faults=0.5,
        ),
    ),
    "separator": (SeparatorPart, SeparatorConfig(steps=6, batch=1, warmup=1, channels=4, segment_s=1.0)),
    "mert": (
        MERTPart,
        MERTConfig(steps=6, batch=1, warmup=1, hidden=32, layers=1, channels=16, item_s=1.0, clusters=8),
    ),
    "text": (
        TextPart,
        TextConfig(steps=6, batch=4, warmup=1, dim=32, layers=1, vocabulary=300, attribute_weight=1.0),
    ),
}


def build(name: str, clips, **changes) -> tuple[Part, PartConfig]:
    kind, config = PARTS[name]
    config = config.model_copy(update=changes)
    return kind(config, clips, CPU), config  # type: ignore[call-arg]


class Killed(Exception):
    """As if the process had died."""


@pytest.mark.parametrize("name", PARTS)
def test_a_killed_part_goes_on_to_the_same_bits(name, clips, tmp_path):
    straight, config = build(name, clips)
    train(straight, config, Folder.at(str(tmp_path / "straight")), checkpoint_every_s=1e9)
    out = Folder.at(str(tmp_path / "killed"))
    first, config = build(name, clips)
    updates, after_update = 0, first.after_update

    def die() -> None:
        nonlocal updates
        after_update()
        updates += 1
        if updates == 4:  # its fourth update is lost: the last checkpoint is of the third
            raise Killed

    first.after_update = die  # type: ignore[method-assign]
    with pytest.raises(Killed):
        train(first, config, out, checkpoint_every_s=0)
    torch.manual_seed(99)  # another process has other global generators
    np.random.seed(99)
    second, config = build(name, clips)
    progress, interrupted = train(second, config, out)
    assert progress.step == config.steps
    assert not interrupted
    expected, state = straight.model.state_dict(), second.model.state_dict()
    assert all(torch.equal(state[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", PARTS)
def test_a_part_learns_the_clips_that_it_sees(name, clips, tmp_path):
    part, config = build(name, clips, steps=20, warmup=3, lr=1e-2 if name == "separator" else 3e-3)
    first = part.batch(0, config.batch)
    part.batch = lambda position, count: first  # type: ignore[method-assign]
    part.model.train()
    torch.manual_seed(0)
    with torch.no_grad():
        before = float(part.loss(first)["loss"])
    train(part, config, Folder.at(str(tmp_path)))
    with torch.no_grad():
        after = float(part.loss(first)["loss"])
    # the separator begins with silence, whose error is the stems' own level: little is gained in 20 updates
    assert after < (0.95 if name == "separator" else 0.85) * before, (before, after)


@pytest.mark.parametrize("name", PARTS)
def test_items_depend_on_their_position_alone(name, clips):
    part, _ = build(name, clips)
    together = leaves(part.batch(7, 2))
    alone = leaves(part.batch(8, 1))
    for both, one in zip(together, alone, strict=True):
        row, length = both[1], one.shape[1]
        assert torch.equal(row[:length], one[0])  # token rows are as long as the longest of the batch


def leaves(batch) -> list[torch.Tensor]:
    if isinstance(batch, dict):
        return list(batch.values())
    return [batch] if isinstance(batch, torch.Tensor) else list(batch)


def exported(name: str, clips, tmp_path: Path, half: bool) -> Part:
    part, config = build(name, clips, steps=2)
    if name == "clap":  # two updates do not yet tell texts apart, which its loader asks for
        init_for_debug(part.model.clap.text_model)
    train(part, config, Folder.at(str(tmp_path / "run")))
    part.export(Folder.at(str(tmp_path)), half)
    part.model.eval()
    return part


def test_the_vae_is_read_by_its_loader(clips, tmp_path):
    part = exported("vae", clips, tmp_path, half=False)
    mel = part.batch(0, 1)
    loaded = load_vae(tmp_path / "model.safetensors")
    own = MelVAE(part.model.config).eval()
    own.load_state_dict(part.model.state_dict())
    own.normalise_weights()
    with torch.no_grad():
        assert torch.equal(loaded.encode(mel).mean, own.encode(mel).mean)
        part.model.train()
        assert torch.equal(part.model.encode(mel).mean, own.encode(mel).mean)  # what was trained is what runs


def test_the_vocoder_is_read_by_its_loader(clips, tmp_path):
    part = exported("vocoder", clips, tmp_path, half=False)
    mel, _ = part.batch(0, 1)
    with torch.no_grad():
        assert torch.allclose(load_bigvgan(tmp_path / "model.safetensors")(mel), part.model(mel), atol=1e-4)


@pytest.mark.parametrize("half", [False, True])
def test_clap_is_read_by_its_loader(half, clips, tmp_path):
    part = exported("clap", clips, tmp_path, half)
    config = ClapConfig.from_pretrained(tmp_path, local_files_only=True)
    clap = load_laion_clap(tmp_path / "model.safetensors", tmp_path, config=config)
    texts = [clips.truth(i).captions[0] for i in range(3)]
    assert clap.tokenizer(texts)["input_ids"] == part.tokenizer(texts)["input_ids"]
    with torch.no_grad():
        tokens = part._tokens(texts)
        own = part.model.clap.get_text_features(**tokens).pooler_output.numpy()
    np.testing.assert_allclose(clap.embed_text(texts), own, atol=5e-3 if half else 1e-5)


def test_the_separator_is_read_by_its_loader(clips, tmp_path):
    part = exported("separator", clips, tmp_path, half=True)
    result = Separator(load_separator(tmp_path)).separate([clips.mix(0)])[0]
    own = Separator(part.model).separate([clips.mix(0)])[0]
    np.testing.assert_allclose(result.instrumental, own.instrumental, atol=1e-2)


def test_the_music_encoder_is_read_by_its_loader(clips, tmp_path):
    part = exported("mert", clips, tmp_path, half=False)
    wave = part.batch(0, 1)["waves"]
    with torch.no_grad():
        own = part.model.hubert(wave).last_hidden_state.mean(dim=1).numpy()
    np.testing.assert_allclose(load_mert(tmp_path).embed(wave.numpy()), own, atol=1e-5)


def test_the_text_encoder_is_read_by_its_loader(clips, tmp_path):
    part = exported("text", clips, tmp_path, half=True)
    loaded = load_text_encoder(tmp_path)
    texts = [clips.truth(0).captions[0], clips.truth(1).unseen[0]]
    assert loaded.tokenizer(texts)["input_ids"] == part.tokenizer(texts)["input_ids"]
    rows = loaded.encode(texts)
    assert rows.shape == (2, 77, 32)
    tokens = part.tokenizer(texts[:1], return_tensors="pt")
    with torch.no_grad():
        own = part.model.t5.encoder(input_ids=tokens["input_ids"]).last_hidden_state[0].numpy()
    np.testing.assert_allclose(rows[0, : len(own)], own, atol=1e-4)


@pytest.mark.parametrize("name", ["vae", "text"])
def test_a_loss_that_is_no_number_stops_the_part(name, clips, tmp_path):
    part, config = build(name, clips)
    with torch.no_grad():
        next(part.model.parameters()).fill_(math.nan)
    with pytest.raises(UserError, match=rf"{name}: the loss of update 1 is nan.*\n.*Lower {name}\.lr"):
        train(part, config, Folder.at(str(tmp_path)))
    assert not (tmp_path / CHECKPOINT).exists()


def test_a_checkpoint_of_another_size_is_refused(clips, tmp_path):
    part, config = build("text", clips)
    train(part, config, Folder.at(str(tmp_path)))
    other, config = build("text", clips, dim=16)
    with pytest.raises(UserError, match="is of another model"):
        train(other, config, Folder.at(str(tmp_path)))


def test_the_log_has_every_line_once(clips, tmp_path):
    part, config = build("text", clips, budget_s=1e-9)
    for _ in range(3):
        train(part, config.model_copy(update={"budget_s": None, "steps": 6}), Folder.at(str(tmp_path)), log_every=2)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert all(math.isfinite(line["loss"]) and line["samples_per_s"] > 0 for line in lines)


def test_the_learning_rate_rises_and_falls():
    config = PartConfig(steps=100, warmup=10, lr=1.0)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 11)
    assert max(rates) == rates[10] == 1.0
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert rates[-1] < 0.01


def test_in_cycles_the_learning_rate_rises_and_falls_again():
    once, twice = PartConfig(steps=50, lr=1e-2, warmup=10), PartConfig(steps=100, lr=1e-2, warmup=10, cycles=2)
    assert [learning_rate(step, twice) for step in range(100)] == 2 * [learning_rate(step, once) for step in range(50)]


def test_projected_weights_give_what_they_gave():
    torch.manual_seed(0)
    vae = MelVAE(MelVAEConfig(hidden_dim=8, embed_dim=4)).train()
    mel = torch.randn(1, 128, 16)
    with torch.no_grad():
        for parameter in vae.encoder.parameters():
            parameter.mul_(3.0) if parameter.ndim else None
        before = vae.encode(mel).mean
        vae.project_weights()
        torch.testing.assert_close(vae.encode(mel).mean, before, atol=1e-2, rtol=1e-2)
    weight = vae.encoder.conv_in.weight
    assert torch.allclose(weight.square().mean(dim=(1, 2)), torch.ones(8), atol=1e-4)
    vae.encode(mel).mean.sum().backward()
    radial = (weight.grad * weight).sum(dim=(1, 2)).abs()
    assert (radial < 1e-2 * weight.grad.norm(dim=(1, 2)) * weight.norm(dim=(1, 2))).all()
    vae.eval().normalise_weights()
    with pytest.raises(RuntimeError, match="only raw ones are trained"):
        vae.project_weights()


def test_the_same_captions_give_the_same_tokenizers(clips):
    texts = [text for truth in clips.truths() for text in truth.captions]
    for learn in (unigram_tokenizer, caption_tokenizer):
        first, second = learn(texts, 350), learn(texts, 350)
        assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
        assert first.decode(first(texts[0])["input_ids"], skip_special_tokens=True).strip() == texts[0]


def test_masked_spans_and_what_is_left_are_the_caption(clips):
    part, _ = build("text", clips)
    for seed in range(40):
        rng = np.random.default_rng(seed)
        text = clips.truth(seed % clips.count).captions[seed % 4]
        tokens = part.tokenizer(text)["input_ids"][:-1]
        tokens = tokens[: max(1, len(tokens) - seed)]
        source, target = corrupt(tokens, part.tokenizer, rng, 0.25, 3.0)
        assert source.pop() == target.pop() == part.tokenizer.eos_token_id
        sentinels = {part.tokenizer.convert_tokens_to_ids(f"<extra_id_{i}>") for i in range(32)}
        spans: dict[int, list[int]] = {}
        for token in target:
            if token in sentinels:
                spans[token] = []
                last = token
            else:
                spans[last].append(token)
        restored = [piece for token in source for piece in (spans[token] if token in sentinels else [token])]
        assert restored == tokens
        assert sum(map(len, spans.values())) == max(1, round(len(tokens) * 0.25))


def test_the_vae_hears_stems_alone_and_is_told_of_the_steps_between_bands(clips):
    config = VAEConfig(hidden_dim=16, embed_dim=8, ch_mult=(1, 1), num_res_blocks=1, crop_frames=32)
    alone = VAEPart(config.model_copy(update={"alone": 1.0, "detail_weight": 2.0}), clips, CPU)
    assert alone.model.config.ch_mult == (1, 1)
    mixes, stems = VAEPart(config, clips, CPU).batch(0, 4), alone.batch(0, 4)
    assert mixes.shape == stems.shape
    assert stems.mean() < mixes.mean()
    losses = alone.loss(stems)
    expected = losses["reconstruction"] + config.kl_weight * losses["kl"] + 2.0 * losses["detail"]
    torch.testing.assert_close(losses["loss"], expected)
