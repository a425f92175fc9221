import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ttmray.errors import UserError
from ttmray.models.bigvgan import (
    BigVGAN,
    BigVGANConfig,
    debug_bigvgan,
    fold_weight_norm,
    kaiser_sinc_filter,
    load_bigvgan,
)


@pytest.fixture(scope="module")
def golden(golden_dir):
    info = json.loads((golden_dir / "bigvgan_v2_tiny.json").read_text())
    return info["config"], load_file(golden_dir / "bigvgan_v2_tiny.safetensors"), info["tensors"]


@pytest.fixture(scope="module")
def released_state(golden):
    return {key[3:]: value for key, value in golden[1].items() if key.startswith("sd.")}


@pytest.fixture(scope="module")
def model(golden, released_state, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bigvgan")
    torch.save({"generator": released_state}, folder / "bigvgan_generator.pt")
    (folder / "config.json").write_text(json.dumps(golden[0]))
    return load_bigvgan(folder / "bigvgan_generator.pt")


def restyled(state, gain, direction):
    return {key.replace("weight_g", gain).replace("weight_v", direction): value for key, value in state.items()}


def test_golden_waveform_of_the_released_key_style(golden, model):
    tensors = golden[1]
    with torch.inference_mode():
        wave = model(tensors["in.mel"])
    assert wave.shape == tensors["out.wave"].shape
    assert (wave - tensors["out.wave"]).abs().max() <= 2e-4


def test_golden_taps(golden, model):
    """ups3 is ups[3], res2.act1 is resblocks[2].activations[1]."""
    tensors = golden[1]
    rules = ((r"\bups(\d+)", r"ups.\1"), (r"\bres(\d+)", r"resblocks.\1"), (r"\bact(\d+)", r"activations.\1"))
    modules = {}
    for name in (key.removeprefix("out.tap.") for key in tensors if key.startswith("out.tap.")):
        path = name.replace("act_post", "activation_post")
        for pattern, replacement in rules:
            path = re.sub(pattern, replacement, path)
        modules[name] = model.get_submodule(path)
    assert len(modules) > 3
    taps = {}
    hooks = [
        module.register_forward_hook(lambda _m, _i, out, name=name: taps.setdefault(name, out))
        for name, module in modules.items()
    ]
    with torch.inference_mode():
        model(tensors["in.mel"])
    for hook in hooks:
        hook.remove()
    assert {f"out.tap.{name}" for name in taps} == {key for key in tensors if key.startswith("out.tap.")}
    for name, value in taps.items():
        expected = tensors[f"out.tap.{name}"]
        assert (value - expected).abs().max() <= 1e-4 * max(1.0, expected.abs().max()), name


def test_golden_anti_aliased_activation_and_its_two_resamplers(golden, model):
    tensors = golden[1]
    (text,) = (text for name, text in golden[2].items() if "out.aa_act" in name)
    activation = model.get_submodule(re.search(r"resblocks\.\d+\.activations\.\d+", text)[0])
    parts = {"aa_act": activation, "aa_up": activation.upsample, "aa_down": activation.downsample}
    for name, module in parts.items():
        with torch.inference_mode():
            torch.testing.assert_close(module(tensors["in.aa"]), tensors[f"out.{name}"], rtol=1e-4, atol=1e-5)


def test_golden_folded_weights_and_filter(golden, released_state):
    tensors = golden[1]
    folded = fold_weight_norm(released_state)
    plain = {key.removeprefix("out.plain."): value for key, value in tensors.items() if key.startswith("out.plain.")}
    assert plain
    for key, value in plain.items():
        torch.testing.assert_close(folded[key], value, rtol=1e-5, atol=1e-6)
    (taps,) = (value for key, value in tensors.items() if key.startswith("ref.filter"))
    torch.testing.assert_close(kaiser_sinc_filter(), taps, rtol=0, atol=1e-7)


@pytest.mark.parametrize("style", ["parametrized", "plain"])
def test_golden_other_key_styles_give_the_same_bits(golden, released_state, model, style, tmp_path):
    state = released_state
    if style == "parametrized":
        prefix = "parametrizations.weight."
        state = restyled(state, prefix + "original0", prefix + "original1")
    else:
        state = fold_weight_norm(state)
    save_file(state, tmp_path / "weights.safetensors")
    other = load_bigvgan(tmp_path / "weights.safetensors", BigVGANConfig.from_json(golden[0]))
    mel = golden[1]["in.mel"]
    with torch.inference_mode():
        assert torch.equal(other(mel), model(mel))


@pytest.mark.parametrize("style", ["", ".parametrized_keys", ".weightnorm_removed"])
def test_golden_full_size_names_and_shapes_equal_the_manifest(golden_dir, style):
    path = golden_dir / "manifests" / f"bigvgan_v2_44khz_128band_512x{style}.json"
    manifest = {key: torch.empty(shape, device="meta") for key, shape in json.loads(path.read_text()).items()}
    with torch.device("meta"):
        ours = BigVGAN().state_dict()
    folded = fold_weight_norm(manifest)
    assert {key: value.shape for key, value in ours.items()} == {key: v.shape for key, v in folded.items()}


@pytest.mark.parametrize(
    ("key", "value"),
    [("activation", "snake"), ("resblock", "2"), ("use_tanh_at_final", True), ("upsample_rates", [8, 4])],
)
def test_a_config_that_is_not_v2_or_does_not_fit_together_is_refused(key, value):
    with pytest.raises(UserError, match=r"BigVGAN config"):
        BigVGANConfig.from_json({key: value})


def test_weights_that_do_not_fit_are_refused_with_their_names(tmp_path):
    model = debug_bigvgan(0)
    state = model.state_dict()
    del state["conv_post.weight"]
    save_file(state, tmp_path / "short.safetensors")
    with pytest.raises(UserError, match=r"1 weights missing: conv_post\.weight"):
        load_bigvgan(tmp_path / "short.safetensors", model.config)
    with pytest.raises(UserError, match=r"missing"):
        load_bigvgan(tmp_path / "short.safetensors")  # against the released size
    with pytest.raises(UserError, match=r"without conv_pre\.weight_g"):
        fold_weight_norm({"conv_pre.weight_v": torch.ones(1, 1, 1)})
    with pytest.raises(UserError, match=r"not found"):
        load_bigvgan(tmp_path / "absent.pt")


class Payload:
    def __reduce__(self):
        return (print, ("this ran",))


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path, capsys):
    torch.save({"generator": Payload()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match=r"was not read"):
        load_bigvgan(tmp_path / "evil.pt")
    assert "this ran" not in capsys.readouterr().out


def test_the_debug_generator_is_seeded_leaves_the_global_generator_and_makes_512_samples_per_frame():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = debug_bigvgan(1), debug_bigvgan(1), debug_bigvgan(2)
    assert torch.equal(torch.get_rng_state(), before)
    mel = torch.from_numpy(np.random.default_rng(0).normal(-5, 2, (1, 128, 6)).astype(np.float32))
    with torch.inference_mode():
        wave = first(mel)
        assert wave.shape == (1, 1, 6 * 512)
        assert torch.equal(again(mel), wave)
        assert not torch.equal(other(mel), wave)
    assert wave.std() > 0
