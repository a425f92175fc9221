"""Bundles with a released backbone: shapes of the published configurations, and sound from files laid out like them."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from ttmray.config import load_config
from ttmray.console import console
from ttmray.errors import EXIT_OK, UserError
from ttmray.generation.config import GenerateConfig
from ttmray.generation.generate import generate
from ttmray.generation.manifest import read_rows
from ttmray.models import seeded, weights_cli
from ttmray.models.backbone import SIZES, BackboneConfig, FluxAudio
from ttmray.models.backbone_weights import config_of, count_parameters, file_config
from ttmray.models.bigvgan import debug_bigvgan
from ttmray.models.bundle import open_bundle
from ttmray.models.loading import LoadOptions
from ttmray.models.t5 import byte_t5_tokenizer, debug_text_encoder
from ttmray.models.vae import MelVAE, MelVAEConfig
from ttmray.models.weights import open_store, released
from ttmray.storage import Folder

SOUND = {"fluxaudio-s-16k": "s_16k", "fluxaudio-l-16k": "l_16k", "resonate-44k": "m_44k"}
BYTES = {"fluxaudio-s": 4, "fluxaudio-l": 4, "resonate-m": 2}
"""Per parameter, as far as sizes of the files are known."""


def reference(golden: Path, size: str) -> dict[str, list[int]]:
    """Names and shapes of a released backbone: those of FluxAudio-S, changed as the published constructors say."""
    manifests = {
        rate: json.loads((golden / f"manifests/fluxaudio_s_{rate}.json").read_text()) for rate in ("16k", "44k")
    }
    if size == "s_16k":
        return manifests["16k"]
    if size == "l_16k":  # 14 heads of 64 in place of 7: all widths double, those of heads and inputs do not
        doubled = {448: 896, 896: 1792, 1344: 2688, 2688: 5376, 1280: 2560}
        return {
            name: [doubled.get(n, n) if not name.startswith(("empty_", "latent_")) else n for n in shape]
            for name, shape in manifests["16k"].items()
        }
    small = manifests["44k"]  # 16 joint blocks in place of 4, 36 fused in place of 8, pooled text of 1024 numbers
    shapes = {name: shape for name, shape in small.items() if "_blocks." not in name}
    shapes |= {"empty_string_feat_c": [1024], "text_cond_proj.0.weight": [448, 1024]}
    for kind, last, count in (("joint", 3, 16), ("fused", 7, 36)):
        for i in range(count):
            source = f"{kind}_blocks.{last if i == count - 1 else 0}."
            shapes |= {
                name.replace(source, f"{kind}_blocks.{i}."): shape
                for name, shape in small.items()
                if name.startswith(source)
            }
    return shapes


@pytest.mark.parametrize("size", SOUND.values())
def test_names_and_shapes_are_those_of_the_published_configurations(size, golden_dir):
    with torch.device("meta"):
        state = FluxAudio(SIZES[size]).state_dict()
    assert {name: list(tensor.shape) for name, tensor in state.items()} == reference(golden_dir, size)
    assert len(state) == {"s_16k": 198, "l_16k": 198, "m_44k": 27 + 15 * 22 + 17 + 36 * 11}[size]
    assert config_of(state, {}, "the released file") == SIZES[size], "a file without metadata says all of it"


def test_sizes_in_the_registry_are_parameters_times_bytes():
    entries = {entry.name: entry for entry in released().entries}
    for bundle, size in SOUND.items():
        (name,) = (entry.name for entry in entries.values() if entry.role == "backbone" and bundle in entry.bundles)
        parameters = sum(trainable + frozen for _, trainable, frozen in count_parameters(SIZES[size]))
        assert entries[name].approximate_size == pytest.approx(parameters * BYTES[name], rel=0.002)


@pytest.mark.parametrize("bundle", SOUND)
def test_a_bundle_that_makes_sound_pulls_what_that_needs_and_no_more(bundle):
    opened = open_bundle(bundle)
    assert opened.roles() == {"text", "clap_condition", "latents", "vocoder", "backbone"}
    pulled = set(opened.weights())
    assert pulled == set(opened.weights({"text", "clap_condition", "latents", "vocoder", "backbone"}))
    assert ("clap-music-speech" in pulled) == (bundle != "resonate-44k"), "Resonate sees no CLAP"
    assert not pulled & {"mert", "tunejury", "clap-music"}
    assert "not for commercial use" in opened.note
    with pytest.raises(UserError, match=f"bundle {bundle} has no mert, tunejury"):
        opened.load({"mert", "tunejury"}, LoadOptions())


def test_a_released_backbone_is_sampled_as_its_authors_do_and_a_checkpoint_of_ones_own_as_we_do():
    sampler = GenerateConfig(texts=("x",), bundle="resonate-44k").sampler
    assert (sampler.score, sampler.prefix, sampler.negative_prompt) == (None, "", "")
    assert (sampler.steps, sampler.weight, sampler.precision) == (25, 4.5, "bf16")
    own = GenerateConfig(texts=("x",), bundle="fluxaudio-s-16k", sampler={"weight": 3, "prefix": "instrumental "})
    assert (own.sampler.weight, own.sampler.prefix, own.sampler.score) == (3, "instrumental ", None)
    ours = GenerateConfig(texts=("x",), bundle="resonate-44k", checkpoint="w.safetensors").sampler
    assert (ours.score, ours.weight) == (5.0, 4.0)
    typed = load_config(GenerateConfig, None, ["sampler.steps=3"], {"bundle": "fluxaudio-l-16k", "texts": ("x",)})
    assert (typed.sampler.steps, typed.sampler.weight) == (3, 4.5)


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small models in files named and laid out like those of resonate-44k; the backbone has two bytes per number."""
    for name in list(os.environ):
        if name.startswith("TTMRAY_") and name not in ("TTMRAY_GOLDEN", "TTMRAY_DATA"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("TTMRAY_WEIGHTS", str(tmp_path / "cache"))
    root = tmp_path / "weights"
    for entry in released().entries:
        if "resonate-44k" in entry.bundles:
            (root / entry.name).mkdir(parents=True)
            monkeypatch.setenv(entry.variable, str(root / entry.name))
    debug_text_encoder(1).model.save_pretrained(root / "flan-t5-large")
    byte_t5_tokenizer().save_pretrained(root / "flan-t5-large")
    (root / "flan-t5-large" / "spiece.model").touch()
    (root / "flan-t5-large" / "special_tokens_map.json").write_text("{}")
    with seeded(2):
        vae = MelVAE(MelVAEConfig(hidden_dim=8))
        backbone = FluxAudio(
            BackboneConfig(text_dim=64, text_c_dim=64, hidden=64, heads=2, depth=5, fused_depth=3)
        ).bfloat16()
        with torch.no_grad():
            for parameter in backbone.parameters():
                parameter.normal_(std=0.05)
            backbone.latent_std.fill_(1.0)
    torch.save(vae.state_dict(), root / "mmaudio-vae" / "v1-44.pth")
    torch.save({"generator": debug_bigvgan(8).state_dict()}, root / "bigvgan" / "bigvgan_generator.pt")
    shape = {"num_mels": 128, "upsample_initial_channel": 64, "resblock_kernel_sizes": [3]}
    shape |= {"resblock_dilation_sizes": [[1]], "activation": "snakebeta"}
    shape |= {"use_tanh_at_final": False, "use_bias_at_final": False}
    (root / "bigvgan" / "config.json").write_text(json.dumps(shape))
    torch.save(backbone.state_dict(), root / "resonate-m" / "Resonate_GRPO.pth")
    return root


def test_generate_with_a_bundle_name_makes_sound_from_files_laid_out_like_the_released_ones(stand_ins, tmp_path):
    config = {"texts": ["a harp", "a choir"], "bundle": "resonate-44k", "output": str(tmp_path / "run")}
    config = GenerateConfig(**config, sampler={"steps": 2, "precision": "fp32"}, runtime={"device": "cpu"})
    assert generate(config) == EXIT_OK
    rows = read_rows(Folder.at(config.output))
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert {(row["sample_rate"], round(row["duration_s"], 3)) for row in rows.values()} == {(44_100, 10.0)}
    assert len({row["sha256"] for row in rows.values()}) == 2, "the text counts"


def test_resonate_s_pooled_text_is_the_mean_of_all_rows_of_one_t5(stand_ins):
    models = open_bundle("resonate-44k").load({"text", "clap_condition", "backbone"}, LoadOptions())
    rows = models.text.encode(["a harp", ""])
    pooled = models.clap_condition.embed_text(["a harp", ""])
    np.testing.assert_allclose(pooled, rows.mean(axis=1), rtol=1e-5)
    assert pooled.dtype == np.float32
    assert models.clap_condition.encoder is models.text, "3 GB of T5 are loaded once"
    assert {parameter.dtype for parameter in models.backbone.parameters()} == {torch.float32}
    path = str(stand_ins / "resonate-m" / "Resonate_GRPO.pth")
    assert file_config(path)[0].text_c_dim == 64


def test_the_list_says_which_bundles_make_sound_and_what_is_here(stand_ins):
    with console.capture() as capture:
        assert weights_cli.list_weights(open_store()) == EXIT_OK
    lines = {
        cells[0]: cells[1:]
        for line in capture.get().splitlines()
        if len(cells := [cell.strip() for cell in line.split("│")[1:-1]]) == 5 and cells[0]
    }
    assert {name for name, cells in lines.items() if cells[0] == "yes"} == SOUND.keys() | {"micro"}
    assert lines["resonate-44k"][2] == "4 of 4"
    assert lines["fluxaudio-s-16k"][2] == "1 of 6"
    assert lines["paper"][0].startswith("with a")
    assert lines["debug"][0].startswith("noise")
