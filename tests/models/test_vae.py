import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ttmray.errors import UserError
from ttmray.models.bigvgan import debug_bigvgan
from ttmray.models.latents import LatentEncoder
from ttmray.models.vae import (
    MelVAE,
    MelVAEConfig,
    debug_vae,
    load_vae,
    normalise_channels,
    normalise_weight,
)


@pytest.fixture(scope="module")
def golden(golden_dir):
    return load_file(golden_dir / "vae_tiny.safetensors")


@pytest.fixture(scope="module")
def config(golden_dir):
    return json.loads((golden_dir / "vae_tiny.json").read_text())["config"]


@pytest.fixture(scope="module")
def raw(golden, tmp_path_factory):
    path = tmp_path_factory.mktemp("vae") / "raw.pth"
    torch.save({key[3:]: value for key, value in golden.items() if key.startswith("sd.")}, path)
    return path


@pytest.fixture(scope="module")
def vae(raw, config):
    return load_vae(raw, config["clip_act"])


def assert_within(got, expected, tolerance=2e-5):
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= tolerance * max(1.0, expected.abs().max())


def test_golden_config_is_read_from_the_checkpoint(config, vae):
    ours = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(vae.config).items()}
    assert ours.keys() | {"attn_layers"} == config.keys()
    assert config["attn_layers"].endswith("attention only in mid")
    assert ours == {name: config[name] for name in ours}


@torch.inference_mode()
def test_the_bound_of_activations_bounds_them(golden, raw, vae):
    tight = load_vae(raw, clip_act=0.5)
    assert not torch.allclose(tight.encode(golden["in.mel"]).mean, vae.encode(golden["in.mel"]).mean)
    taps = []
    hook = tight.encoder.mid.register_forward_hook(lambda _m, _i, out: taps.append(out.abs().max()))
    tight.encode(golden["in.mel"])
    hook.remove()
    assert taps == [0.5]


@torch.inference_mode()
def test_golden_posterior(golden, vae):
    posterior = vae.encode(golden["in.mel"])
    assert_within(posterior.mean, golden["out.mean"])
    assert_within(posterior.logvar, golden["out.logvar"])
    assert_within(posterior.std, golden["out.std"])
    assert_within(posterior.mean + posterior.std * golden["in.noise"], golden["out.sample_given_noise"])
    normalised = (golden["in.mel"] - golden["sd.data_mean"]) / golden["sd.data_std"]
    mean, _ = vae.encoder(normalised).chunk(2, dim=1)
    assert_within(mean, golden["out.encode_normalized_input.mean"])
    assert_within(vae.encode(golden["in.mel"][..., :-1]).mean, golden["out.mean_oddlen"])


@torch.inference_mode()
def test_golden_log_variance_is_clamped_where_the_gain_is_large(golden, vae):
    gain = vae.encoder.learnable_gain.clone()
    cases = [match[1] for name in golden if (match := re.fullmatch(r"out\.logvar_gain(.+)", name))]
    assert cases
    for case in cases:
        try:
            vae.encoder.learnable_gain.fill_(float(case))
            posterior = vae.encode(golden["in.mel"])
        finally:
            vae.encoder.learnable_gain.copy_(gain)
        assert_within(posterior.logvar, golden[f"out.logvar_gain{case}"])
        assert_within(posterior.std, golden[f"out.std_gain{case}"])
        assert posterior.logvar.min() == -30.0 or posterior.logvar.max() == 20.0


@torch.inference_mode()
def test_golden_decoder(golden, vae):
    assert_within(vae.decode(golden["in.z"]), golden["out.decode"])
    assert_within(vae.decoder(golden["in.z"]), golden["out.decode_no_unnorm"])
    assert_within(vae.decode(vae.encode(golden["in.mel"]).mean), golden["out.roundtrip"])
    assert_within(vae.decoder(golden["in.z_big"]), golden["out.decode_clip"], 1e-4)


@torch.inference_mode()
def test_golden_taps(golden, vae):
    """enc.down0.block1 is encoder.down[0].block[1], and so on."""
    modules = {}
    for name in (key.removeprefix("out.tap.") for key in golden if key.startswith("out.tap.")):
        half, _, path = name.partition(".")
        numbered = re.sub(r"\b(down|up|block)(\d+)", r"\1.\2", path)
        modules[name] = vae.get_submodule(f"{ {'enc': 'encoder', 'dec': 'decoder'}[half] }.{numbered}")
    assert len(modules) > 5
    taps = {}
    hooks = [
        module.register_forward_hook(lambda _m, _i, out, name=name: taps.setdefault(name, out))
        for name, module in modules.items()
    ]
    vae.encode(golden["in.mel"])
    vae.decode(golden["in.z"])
    for hook in hooks:
        hook.remove()
    for name, value in taps.items():
        assert_within(value, golden[f"out.tap.{name}"])


def test_golden_normalisation_of_weights_and_channels(golden, vae):
    once = normalise_weight(golden["in.mpconv_raw"])
    assert_within(once, golden["out.mpconv_weight_once"], 1e-6)
    assert_within(normalise_weight(once), golden["out.mpconv_weight_twice"], 1e-6)
    assert not torch.equal(once, golden["out.mpconv_weight_twice"])
    assert_within(normalise_channels(golden["in.pixelnorm"]), golden["out.pixelnorm_dim1"])
    prefix = "out.normed_weight."
    names = [key.removeprefix(prefix) for key in golden if key.startswith(prefix)]
    assert names
    for name in names:
        assert_within(vae.get_parameter(name), golden[prefix + name], 1e-6)


def test_golden_full_size_names_and_shapes_equal_the_manifest(golden_dir):
    manifest = json.loads((golden_dir / "manifests/vae_44k.json").read_text())
    with torch.device("meta"):
        ours = MelVAE().state_dict()
        full = {key: torch.empty(shape) for key, shape in manifest.items()}
    assert {key: list(value.shape) for key, value in ours.items()} == manifest
    assert len(manifest) == 57
    assert MelVAEConfig.from_state_dict(full) == MelVAEConfig()


def test_golden_data_statistics_of_the_checkpoint_survive_loading(golden, vae):
    assert torch.equal(vae.data_mean, golden["sd.data_mean"])
    assert torch.equal(vae.data_std, golden["sd.data_std"])


def test_golden_data_statistics_of_the_released_model_are_of_its_size(golden_dir):
    stats = json.loads((golden_dir / "manifests/vae_data_stats.json").read_text())
    assert len(stats["vae_44k_data_mean"]) == len(stats["vae_44k_data_std"]) == MelVAEConfig().data_dim


def test_weights_are_normalised_exactly_once():
    model = MelVAE(MelVAEConfig(hidden_dim=8, embed_dim=4)).eval()
    mel = torch.zeros(1, 128, 8)
    for run in (lambda: model.encode(mel), lambda: model.decode(torch.zeros(1, 4, 4))):
        with pytest.raises(RuntimeError, match=r"are raw"):
            run()
    raw = {key: value.clone() for key, value in model.state_dict().items()}
    model.normalise_weights()
    assert model.encode(mel).mean.shape == (1, 4, 4)
    with pytest.raises(RuntimeError, match=r"already normalised"):
        model.normalise_weights()
    model.load_state_dict(raw)
    with pytest.raises(RuntimeError, match=r"are raw"):
        model.encode(mel)


def test_weights_of_something_else_are_refused(tmp_path):
    state = MelVAE(MelVAEConfig(hidden_dim=8, embed_dim=4)).state_dict()
    short = {key: value for key, value in state.items() if key != "decoder.mid.attn_1.qkv.weight"}
    for name, weights, message in (
        ("short", short, r"1 weights missing: decoder\.mid\.attn_1\.qkv\.weight"),
        ("extra", {**state, "ema.step": torch.zeros(1)}, r"1 weights unexpected: ema\.step"),
        ("other", {"encoder.weight": torch.zeros(2, 2)}, r"not the weights of a mel VAE"),
    ):
        save_file(weights, tmp_path / f"{name}.safetensors")
        with pytest.raises(UserError, match=message):
            load_vae(tmp_path / f"{name}.safetensors")
    (tmp_path / "garbage.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match=r"was not read"):
        load_vae(tmp_path / "garbage.pth")


@pytest.fixture(scope="module")
def short_encoder():
    return LatentEncoder(debug_vae(3), clip_samples=20 * 1024, vocoder=debug_bigvgan(3))


def noise(batch, samples, seed=0):
    return (np.random.default_rng(seed).standard_normal((batch, samples)) * 0.2).astype(np.float32)


def test_ten_second_clips_have_430_latent_frames_of_40_channels():
    encoder = LatentEncoder(debug_vae(0), vocoder=debug_bigvgan(0))
    assert (encoder.frames, encoder.channels, encoder.decoded_samples) == (430, 40, 440_320)
    mean, std = encoder.encode(noise(1, 441_000))
    assert mean.shape == std.shape == (1, 430, 40)
    assert mean.dtype == std.dtype == np.float32
    assert (std > 0).all()


@pytest.mark.parametrize("samples", [20 * 1024, 20 * 1024 + 1023])
def test_every_length_with_as_many_frames_is_accepted(short_encoder, samples):
    assert short_encoder.encode(noise(1, samples))[0].shape == (1, 20, 40)


@pytest.mark.parametrize("samples", [20 * 1024 - 1, 21 * 1024])
def test_other_lengths_are_refused_with_the_accepted_range(short_encoder, samples):
    with pytest.raises(UserError, match=r"anything from 20480 to 21503 is accepted"):
        short_encoder.encode(noise(1, samples))


def test_samples_that_are_not_finite_are_refused(short_encoder):
    waves = noise(2, 20 * 1024)
    waves[1, 7] = np.nan
    with pytest.raises(ValueError, match=r"not finite"):
        short_encoder.encode(waves)


def test_a_clip_gets_the_same_bits_alone_and_in_a_batch_in_every_direction(short_encoder):
    waves = noise(3, 20 * 1024)
    waves.flags.writeable = False  # as arrays from a shared object store are
    mean, std = short_encoder.encode(waves, batch=3)
    alone_mean, alone_std = short_encoder.encode(waves[1:2])
    assert np.array_equal(mean[1:2], alone_mean)
    assert np.array_equal(std[1:2], alone_std)
    mel, audio = short_encoder.decode(mean), short_encoder.to_audio(mean)
    assert mel.shape == (3, 128, 40)
    assert audio.shape == (3, 20 * 1024)
    assert np.array_equal(short_encoder.decode(mean[2:])[0], mel[2])
    assert np.array_equal(short_encoder.to_audio(mean[2:])[0], audio[2])


def test_different_clips_get_different_latents_and_an_empty_batch_gets_none(short_encoder):
    mean, _ = short_encoder.encode(noise(2, 20 * 1024))
    assert np.abs(mean[0] - mean[1]).max() > 1e-3
    assert short_encoder.encode(noise(0, 20 * 1024))[0].shape == (0, 20, 40)


def test_parts_that_do_not_fit_together_are_refused(short_encoder):
    with pytest.raises(UserError, match=r"the vocoder takes 80 mel bands"):
        LatentEncoder(debug_vae(0), vocoder=debug_bigvgan(0, num_mels=80))
    with pytest.raises(ValueError, match=r"latents must be"):
        short_encoder.decode(np.zeros((1, 5, 39), np.float32))
    with pytest.raises(UserError, match=r"no vocoder"):
        LatentEncoder(debug_vae(0)).to_audio(np.zeros((1, 5, 40), np.float32))


def test_debug_weights_are_seeded_and_leave_the_global_generator():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = debug_vae(1), debug_vae(1), debug_vae(2)
    assert torch.equal(torch.get_rng_state(), before)
    z = torch.ones(1, 40, 4)
    assert torch.equal(first.decode(z), again.decode(z))
    assert not torch.equal(first.decode(z), other.decode(z))
