"""Bundles: the released file layouts load under their roles, and identity covers every byte that decides a number."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import soundfile
import torch
import yaml
from demucs.apply import BagOfModels
from demucs.hdemucs import HDemucs
from transformers import HubertConfig, HubertModel, T5Tokenizer

from ttmray.config import load_config
from ttmray.corpus import index
from ttmray.corpus.config import CorpusConfig
from ttmray.corpus.job import score_corpus
from ttmray.corpus.verify import problems
from ttmray.errors import EXIT_OK, UserError
from ttmray.models import init_for_debug, seeded
from ttmray.models.bigvgan import debug_bigvgan
from ttmray.models.bundle import ROLES, open_bundle
from ttmray.models.clap import Clap, debug_clap
from ttmray.models.clap_weights import laion_key_map
from ttmray.models.devices import resolve_device
from ttmray.models.latents import LatentEncoder
from ttmray.models.loading import LoadOptions
from ttmray.models.mert import Mert
from ttmray.models.separator import Separator, save_separator
from ttmray.models.t5 import TextEncoder, debug_text_encoder
from ttmray.models.tunejury import TuneJury, TuneJuryHead
from ttmray.models.vae import MelVAE, MelVAEConfig
from ttmray.models.weights import released
from ttmray.storage import Folder

PAPER = open_bundle("paper")
SCORING = ("clap-music", "roberta-tokenizer", "mert", "tunejury")
CAPTIONS = ["slow piano in a minor key", "death metal"]
CPU = LoadOptions(device="cpu")


@dataclass(frozen=True)
class Originals:
    """The small models whose weights lie in the folder, behind the adapters: what loading must give back."""

    folder: Path
    separator: Separator
    clap: Clap
    clap_condition: Clap
    mert: Mert
    tunejury: TuneJury
    latents: LatentEncoder
    text: TextEncoder


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Originals:
    """One folder per entry of the registry, named and laid out like the released files, with small models."""
    root = tmp_path_factory.mktemp("weights")
    folders = {entry.name: root / entry.name for entry in released().entries if "paper" in entry.bundles}
    for folder in folders.values():
        folder.mkdir()

    clap, condition = debug_clap(1), debug_clap(2)
    clap.model.save_pretrained(folders["clap-music"])  # config.json and model.safetensors
    clap.tokenizer.backend_tokenizer.model.save(str(folders["roberta-tokenizer"]))  # vocab.json and merges.txt
    condition.model.config.save_pretrained(folders["clap-music-speech"])
    checkpoint = {"epoch": 15, "state_dict": _laion_names(condition)}
    torch.save(checkpoint, folders["clap-music-speech"] / "music_speech_audioset_epoch_15_esc_89.98.pt")

    with seeded(3):
        hubert = HubertModel(
            HubertConfig(
                conv_dim=[8] * 7,
                hidden_size=1024,
                num_hidden_layers=1,
                num_attention_heads=16,
                intermediate_size=64,
                num_conv_pos_embeddings=8,
                num_conv_pos_embedding_groups=64,
                do_stable_layer_norm=True,
            )
        )
        init_for_debug(hubert)
    hubert.config.save_pretrained(folders["mert"])
    preprocessor = {"do_normalize": True, "feature_size": 1, "sampling_rate": 24000}
    (folders["mert"] / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    torch.save(hubert.state_dict(), folders["mert"] / "pytorch_model.bin")

    with seeded(4):
        head = TuneJuryHead((2048, 64, 32))
    torch.save(
        {f"net.{key}": value for key, value in head.net.state_dict().items()}, folders["tunejury"] / "tunejury.pt"
    )

    text = _text_encoder(folders["flan-t5-large"])
    bag = _bag(folders["mdx_extra"])

    with seeded(7):
        vae = MelVAE(MelVAEConfig(hidden_dim=8))
    torch.save(vae.state_dict(), folders["mmaudio-vae"] / "v1-44.pth")  # raw, as released
    vocoder = debug_bigvgan(8)
    generator = {"generator": _weight_normed(vocoder.state_dict())}
    torch.save(generator, folders["bigvgan"] / "bigvgan_generator.pt")
    config = {
        "num_mels": 128,
        "upsample_initial_channel": 64,
        "resblock_kernel_sizes": [3],
        "resblock_dilation_sizes": [[1]],
        "activation": "snakebeta",
        "use_tanh_at_final": False,
        "use_bias_at_final": False,
    }
    (folders["bigvgan"] / "config.json").write_text(json.dumps(config))

    return Originals(
        folder=root,
        separator=Separator(bag),
        clap=clap,
        clap_condition=condition,
        mert=Mert(hubert, normalize=True),
        tunejury=TuneJury(head),
        latents=LatentEncoder(vae.normalise_weights(), vocoder=vocoder),
        text=text,
    )


def _laion_names(clap: Clap) -> dict[str, torch.Tensor]:
    config, weights = clap.model.config, clap.model.state_dict()
    names = laion_key_map(list(config.audio_config.depths), config.text_config.num_hidden_layers)
    return {
        f"module.{source}": torch.cat([weights[t] for t in ts]) if ts[1:] else weights[ts[0]]
        for source, ts in names.items()
    }


def _weight_normed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    normed = {key: value for key, value in state.items() if not key.endswith(".weight")}
    for key in state.keys() - normed.keys():
        normed[f"{key}_g"] = state[key].flatten(1).norm(dim=1).view(-1, 1, 1)
        normed[f"{key}_v"] = state[key]
    return normed


def _text_encoder(folder: Path) -> TextEncoder:
    """A small encoder under T5's own kind of tokenizer, a sentencepiece model that was trained on our captions."""
    with open(folder / "spiece.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CAPTIONS * 9), model_writer=file, vocab_size=40, hard_vocab_limit=False,
            pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
        )  # fmt: skip
    tokenizer = T5Tokenizer.from_pretrained(folder, extra_ids=0)
    model = debug_text_encoder(5).model
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "special_tokens_map.json").write_text(json.dumps(tokenizer.special_tokens_map))
    return TextEncoder(model, tokenizer)


def _bag(folder: Path) -> BagOfModels:
    """A bag of four in which each model has one source to itself, under the released signatures."""
    signatures = ["e51eebcc", "a1d90b5c", "5d2d6c55", "cfa93e08"]
    sources = ["drums", "bass", "other", "vocals"]
    with seeded(6):
        models = [
            HDemucs(sources, channels=4, norm_groups=1, dconv_comp=2, segment=11).eval().requires_grad_(False)
            for _ in signatures
        ]
    bag = BagOfModels(models, np.eye(4).tolist())
    save_separator(bag, folder, "mdx_extra")
    for i, signature in enumerate(signatures):
        (folder / f"mdx_extra-{i}.safetensors").rename(folder / f"{signature}.safetensors")
    described = {"models": signatures, "weights": np.eye(4).tolist()}
    (folder / "mdx_extra.yaml").write_text(yaml.safe_dump(described))
    return bag


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith("TTMRAY_") and name not in ("TTMRAY_GOLDEN", "TTMRAY_DATA"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("TTMRAY_WEIGHTS", str(tmp_path / "cache"))  # empty, whatever this machine has


def _point_to(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    for entry in released().entries:
        if "paper" in entry.bundles:
            monkeypatch.setenv(entry.variable, str(root / entry.name))


@pytest.fixture
def local_copies(originals: Originals, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of all weights, which the environment points to. Do not change it: see `own_copies`."""
    _point_to(monkeypatch, originals.folder)
    return originals.folder


@pytest.fixture
def own_copies(originals: Originals, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A copy of the folder of all weights, to damage."""
    folder = Path(shutil.copytree(originals.folder, tmp_path / "weights"))
    _point_to(monkeypatch, folder)
    return folder


def weight_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def noise(samples: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(scale=0.1, size=(channels, samples)).astype(np.float32)


# the released weights


def test_the_paper_bundle_has_no_backbone_and_says_what_to_do():
    with pytest.raises(UserError, match="Name a file of your own"):
        PAPER.load(["backbone"], CPU)


def test_every_role_of_the_paper_bundle_gives_the_numbers_of_the_model_in_its_files(originals, local_copies):
    models = PAPER.load(set(ROLES) - {"backbone"}, CPU)
    wave = noise(480_000)

    assert np.array_equal(models.clap.embed_audio(wave), originals.clap.embed_audio(wave))
    assert np.array_equal(models.clap.embed_text(CAPTIONS), originals.clap.embed_text(CAPTIONS))
    condition = models.clap_condition.embed_text(CAPTIONS)
    assert np.array_equal(condition, originals.clap_condition.embed_text(CAPTIONS))
    assert condition.shape == (2, 512)
    assert not np.allclose(condition, models.clap.embed_text(CAPTIONS), atol=0.01)

    features = models.mert.embed(wave[:, ::2])
    assert features.shape == (1, 1024)
    assert np.array_equal(features, originals.mert.embed(wave[:, ::2]))

    clap_vector = models.clap.embed_audio(wave)
    scores = models.tunejury.score(clap_vector, features)
    assert scores.shape == (1,)
    assert np.array_equal(scores, originals.tunejury.score(clap_vector, features))

    rows = models.text.encode(CAPTIONS)
    assert rows.shape == (2, 77, 64)
    assert np.array_equal(rows, originals.text.encode(CAPTIONS))

    piece = noise(3 * 44100, channels=2)
    (found,), (expected,) = models.separator.separate([piece]), originals.separator.separate([piece])
    assert found.instrumental.shape == piece.shape
    assert np.array_equal(found.instrumental, expected.instrumental)
    assert np.array_equal(found.vocals, expected.vocals)

    mean, std = models.latents.encode(noise(441_000))
    assert mean.shape == std.shape == (1, 430, 40)
    expected_mean, expected_std = originals.latents.encode(noise(441_000))
    assert np.array_equal(mean, expected_mean)
    assert np.array_equal(std, expected_std)
    audio = models.latents.to_audio(mean[:, :20])
    assert audio.shape == (1, 20 * 1024)
    # Weight norm g v / |v| is only equal up to rounding to the weight that it came from.
    np.testing.assert_allclose(audio, originals.latents.to_audio(mean[:, :20]), atol=1e-5)


def test_options_reach_the_models(local_copies):
    options = LoadOptions(device="cpu", clip_samples=5 * 44100, instrumental="residual")
    models = PAPER.load(("latents", "separator"), options)
    assert models.latents.frames == 215
    piece = noise(2 * 44100, channels=2)
    (result,) = models.separator.separate([piece])
    np.testing.assert_allclose(result.instrumental + result.vocals, piece, atol=1e-6)


def test_a_role_that_was_not_asked_for_is_neither_loaded_nor_read(own_copies):
    asked = {"clap", "mert", "tunejury"}
    for name in ("flan-t5-large", "mdx_extra", "mmaudio-vae", "bigvgan", "clap-music-speech"):
        for path in weight_files(own_copies / name):
            path.write_bytes(b"damaged")
    models = PAPER.load(asked, CPU)
    assert {role for role in vars(models) if getattr(models, role) is not None} == asked
    for role in ("text", "separator", "latents", "clap_condition"):
        with pytest.raises((UserError, OSError)):
            PAPER.load([role], CPU)


def test_the_vocoder_is_loaded_only_when_asked_for(own_copies):
    (own_copies / "bigvgan" / "bigvgan_generator.pt").write_bytes(b"damaged")
    models = PAPER.load(["latents"], CPU)
    with pytest.raises(UserError, match="no vocoder"):
        models.latents.to_audio(np.zeros((1, 4, 40), np.float32))
    with pytest.raises(UserError, match=r"bigvgan_generator\.pt"):
        PAPER.load(["latents", "vocoder"], CPU)


def test_identity_holds_the_hash_of_every_file_and_the_protocol_those_of_the_scoring_models(local_copies):
    hashes = {
        f"{path.parent.name}/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest()
        for path in weight_files(local_copies)
    }
    assert len(hashes) == 24
    identity = PAPER.identity()
    assert json.loads(json.dumps(identity)) == identity
    assert sorted(identity["weights"].values()) == sorted(hashes.values())
    scoring = {sha256 for name, sha256 in hashes.items() if name.startswith(tuple(f"{n}/" for n in SCORING))}
    assert {sha256 for _, sha256 in PAPER.protocol("empty").hashes} == scoring


def test_one_changed_byte_anywhere_is_another_identity_and_in_a_scoring_model_another_protocol(own_copies):
    identity, protocol = PAPER.identity(), PAPER.protocol("empty").id()
    for path in weight_files(own_copies):
        good = path.read_bytes()
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        assert PAPER.identity() != identity, path
        assert (PAPER.protocol("empty").id() != protocol) == (path.parent.name in SCORING), path
        path.write_bytes(good)
    assert PAPER.identity() == identity
    assert PAPER.protocol("empty").id() == protocol


def test_missing_weights_name_the_one_command(local_copies, monkeypatch):
    monkeypatch.delenv("TTMRAY_WEIGHTS_MERT")
    for action in (PAPER.identity, lambda: PAPER.protocol("empty"), lambda: PAPER.load(["mert"], CPU)):
        with pytest.raises(UserError, match=r"mert.*no config\.json, preprocessor_config\.json") as caught:
            action()
        assert caught.value.hint == "Get them with: ttmray weights pull mert"


def test_an_incomplete_local_copy_names_the_file_and_the_variable(own_copies):
    (own_copies / "mdx_extra" / "5d2d6c55.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no 5d2d6c55\.safetensors") as caught:
        PAPER.load(["separator"], CPU)
    assert "TTMRAY_WEIGHTS_MDX_EXTRA" in caught.value.hint


def test_scoring_needs_the_weights_of_the_scoring_models_only(local_copies, monkeypatch):
    expected = PAPER.protocol("empty")
    for entry in released().entries:
        if entry.name not in SCORING:
            monkeypatch.delenv(entry.variable, raising=False)
    assert PAPER.protocol("empty") == expected
    assert PAPER.load(("clap", "mert", "tunejury"), CPU).tunejury is not None


def test_the_note_lists_every_licence_and_what_is_not_for_commercial_use():
    lines = PAPER.note.split("; ")
    for entry in released().entries:
        if "paper" in entry.bundles:
            (line,) = [line for line in lines if line.startswith(f"{entry.name}: ")]
            assert entry.licence in line
            assert ("NON-COMMERCIAL" in line) == entry.non_commercial
    (restricted,) = [line for line in lines if line.endswith("not for commercial use.")]
    assert {"mert", "tunejury", "mmaudio-vae"} == set(restricted.partition(":")[0].split(", "))


def test_a_corpus_job_runs_on_the_paper_bundle_and_other_weights_cannot_join_it(own_copies, tmp_path):
    songs, run = tmp_path / "songs", tmp_path / "run"
    songs.mkdir()
    song = noise(441_000, channels=2)
    soundfile.write(songs / "song.wav", song.T, 44100, subtype="FLOAT")
    (songs / "captions.json").write_text(json.dumps([{"path": "song.wav", "caption": CAPTIONS[0]}]))
    sets = (f"input={songs}", f"output={run}", "bundle=paper", "runtime.runner=local", "runtime.workers=0")
    splits = ("splits.validation=0", "splits.test=0", "runtime.device=cpu")
    config = load_config(CorpusConfig, None, [*sets, *splits])
    assert score_corpus(config) == EXIT_OK
    assert list(problems(Folder.at(str(run)))) == []

    (row,) = index.read_index(Folder.at(str(run))).to_pylist()
    assert row["status"] == "ok"
    assert row["protocol"] == f"paper/{PAPER.protocol('empty').id()}"
    assert np.isfinite([row["reward_score"], row["instrumental_reward_score"], row["clap_score"]]).all()

    head = own_copies / "tunejury" / "tunejury.pt"
    head.write_bytes(head.read_bytes() + b"\0")
    with pytest.raises(UserError, match="belongs to another run"):
        score_corpus(config)


# all bundles


def test_debug_identity_is_stable_and_needs_no_framework():
    code = (
        "import json, sys; from ttmray.models.bundle import open_bundle; bundle = open_bundle('debug'); "
        "print(json.dumps([bundle.identity(), bundle.protocol('caption').id()])); "
        "sys.exit(bool({'torch', 'transformers', 'demucs', 'ray'} & sys.modules.keys()))"
    )
    shown = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in "12"]
    bundle = open_bundle("debug")
    expected = [bundle.identity(), bundle.protocol("caption").id()]
    assert [json.loads(process.stdout) for process in shown] == [expected, expected]


def test_bundles_have_identities_and_protocols_of_their_own(local_copies):
    bundles = [open_bundle(name) for name in ("debug", "debug-wide", "paper")]
    assert len({json.dumps(bundle.identity(), sort_keys=True) for bundle in bundles}) == 3
    assert len({bundle.protocol(text).id() for bundle in bundles for text in ("empty", "caption")}) == 6


def test_the_debug_bundle_loads_every_role_and_says_that_it_means_nothing():
    bundle = open_bundle("debug")
    models = bundle.load(ROLES, CPU)
    assert all(model is not None for model in vars(models).values())
    assert "mean nothing" in bundle.note


def test_unknown_bundles_and_roles_are_refused():
    with pytest.raises(UserError, match="papre") as caught:
        open_bundle("papre")
    assert "paper" in caught.value.hint
    with pytest.raises(ValueError, match="drummer"):
        open_bundle("debug").load(["drummer"], CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_on_a_machine_without_a_gpu_is_one_message():
    assert resolve_device("auto") == "cpu"
    for device in ("cuda", "cuda:1"):
        with pytest.raises(UserError, match=f"device is {device}") as caught:
            open_bundle("debug").load(["mert"], LoadOptions(device=device))
        assert "auto" in caught.value.hint


def test_the_16_khz_bundle_decodes_312_latents_to_ten_seconds_and_encodes_nothing():
    models = open_bundle("debug-16k").load({"latents", "vocoder", "backbone"}, LoadOptions())
    decoder = models.latents
    assert (decoder.sample_rate, decoder.channels, decoder.frames) == (16_000, 20, 312)
    assert (models.backbone.config.latent_dim, models.backbone.config.latent_len) == (20, 312)
    latents = np.random.default_rng(0).normal(size=(1, 312, 20)).astype(np.float32)
    wave = decoder.to_audio(latents)
    assert wave.shape == (1, 312 * 2 * 256)
    assert 0 < np.abs(wave).max() <= 1
    with pytest.raises(UserError, match="only decodes"):
        decoder.encode(np.zeros((1, 160_000), np.float32))
    assert open_bundle("debug-16k").identity() != open_bundle("debug").identity()


def test_the_public_16_khz_bundle_shares_all_weights_with_the_paper_s_but_vae_and_vocoder():
    paper, public = (set(open_bundle(name).weights()) for name in ("paper", "public-16k"))
    assert paper - public == {"mmaudio-vae", "bigvgan"}
    assert public - paper == {"mmaudio-vae-16k", "bigvgan-16k"}
    assert set(open_bundle("paper").weights({"clap_condition"})) == {"clap-music-speech", "roberta-tokenizer"}
    assert open_bundle("debug").weights() == []
