"""`ttmray.load`: the numbers of the commands, for files and samples in memory, and one message for what is wrong."""

import hashlib
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from synthetic_music import RATE, music

import ttmray
from ttmray.cli import main
from ttmray.config import load_config
from ttmray.errors import EXIT_OK, UserError
from ttmray.generation.config import GenerateConfig
from ttmray.models.bundle import DebugBundle
from ttmray.models.loading import LoadOptions
from ttmray.models.scoring import Scorer

CAPTION = "Slow waves of a synthesizer."
STEPS = {"sampler": {"steps": 1}}


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """`main` takes over SIGTERM; give it back."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """A stereo file, a mono one of another rate that is padded to a clip, and one that is no audio."""
    soundfile.write(tmp_path / "a.wav", music(1.5).T, RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "b.wav", music(6.0, 32_000, 1).T, 32_000, subtype="FLOAT")
    (tmp_path / "c.wav").write_text("no music\n" * 9)
    return [str(tmp_path / name) for name in ("a.wav", "b.wav", "c.wav")]


def test_scores_are_those_of_the_command_to_the_bit(studio, files, capsys):
    capsys.readouterr()
    main(["score", "--bundle", "debug", *files, "--json", "--device", "cpu", "--caption", CAPTION])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    table = studio.score(files, CAPTION)
    for i, row in enumerate(rows):
        assert table.attrs["note"] == row.pop("note")
        for name, value in row.items():
            assert table[name][i] == value, name
    assert list(table["status"]) == ["ok", "ok", "failed"]
    assert np.isnan(table["reward"][2])


def test_samples_in_memory_score_like_the_files_that_hold_them(studio, files):
    sounds = [(music(1.5), RATE), ttmray.AudioClip(music(6.0, 32_000, 1), 32_000)]
    columns = ["status", "duration_s", "sample_rate", "channels", "lufs", "true_peak_db", "reward", "clap_score"]
    of_files, of_arrays = studio.score(files[:2], CAPTION), studio.score(sounds, CAPTION)
    assert of_files[columns].equals(of_arrays[columns])
    alone = studio.score(torch.from_numpy(music(6.0, 32_000, 1)[0]), CAPTION, rate=32_000)
    assert alone["reward"][0] == of_files["reward"][1]


def test_sounds_are_padded_to_the_clips_of_their_bundle(tmp_path, monkeypatch, capsys):
    soundfile.write(tmp_path / "a.wav", music(1.5).T, RATE, subtype="FLOAT")
    monkeypatch.setattr(DebugBundle, "clip_s", 2.0)
    capsys.readouterr()
    main(["score", "--bundle", "debug", str(tmp_path / "a.wav"), "--json", "--device", "cpu"])
    row = json.loads(capsys.readouterr().out)
    short = ttmray.load("debug", device="cpu", threads=1)
    table = short.score(
        [str(tmp_path / "a.wav"), (music(1.5), RATE), (np.pad(music(1.5), ((0, 0), (0, 22_050))), RATE)]
    )
    assert short.clip_s == 2.0
    assert table["reward"].tolist() == [row["reward"]] * 3
    assert table["lufs"].tolist() == [row["lufs"]] * 3


def test_every_sound_has_its_own_caption_and_none_is_left_out(studio):
    sounds = [music(1.0), music(1.0), music(1.0)]
    table = studio.score(sounds, [CAPTION, "", "drums"], rate=RATE)
    assert table["clap_score"].isna().tolist() == [False, True, False]
    assert table["clap_score"][0] != table["clap_score"][2]
    shown = studio.score(sounds[:2], ["drums", CAPTION], rate=RATE, reward_text="caption")
    assert shown["reward"][0] != shown["reward"][1]
    assert studio.score([]).shape == (0, len(table.columns))


@pytest.mark.parametrize(
    ("audio", "reason"),
    [
        (np.zeros((2, RATE), np.float32), "silent"),
        (np.full((1, RATE), np.nan, np.float32), "non_finite"),
        (np.full((1, RATE), 20_000.0, np.float32), "too_loud"),
        (music(0.3), "too_short"),
        (music(1.0, channels=6), "channels"),
    ],
    ids=["silence", "NaN", "integers as floats", "0.3 s", "six channels"],
)
def test_samples_that_mean_nothing_have_the_reasons_of_files(studio, tmp_path, audio, reason):
    soundfile.write(tmp_path / "x.wav", audio.T, RATE, subtype="FLOAT")
    table = studio.score([str(tmp_path / "x.wav"), (audio, RATE)])
    assert table["reason"].tolist() == [reason, reason]
    with pytest.raises(UserError, match=f"array 0: {reason}"):
        studio.embed(audio, rate=RATE)


@pytest.mark.parametrize(
    ("sounds", "options", "message"),
    [
        (music(1.0), {}, "array without a rate"),
        (music(1.0).T, {"rate": RATE}, "samples first"),
        (np.zeros(RATE, np.int16), {"rate": RATE}, "not of floats"),
        (np.zeros((2, 2, 9), np.float32), {"rate": RATE}, "has the shape"),
        ([3], {}, "sound 0 is a int"),
        ([music(1.0)], {"rate": RATE, "captions": ["a", "b"]}, "2 captions for 1 sounds"),
        (music(1.0), {"rate": RATE, "reward_text": "prompt"}, "reward_text must be"),
    ],
)
def test_what_is_no_sound_is_one_message(studio, sounds, options, message):
    with pytest.raises(UserError, match=message):
        studio.score(sounds, **options)


def test_embeddings_are_those_behind_the_scores(studio):
    embeddings, text = studio.embed([music(1.0), music(2.0)], rate=RATE), studio.embed_texts(CAPTION)
    table = studio.score([music(1.0), music(2.0)], CAPTION, rate=RATE)
    assert embeddings.clap.shape == (2, 512)
    assert [float(row @ text[0]) for row in embeddings.clap] == table["clap_score"].tolist()
    assert studio.embed([]).mert.shape == (0, embeddings.mert.shape[1])


def test_separation_is_that_of_the_bundles_separator(studio, tmp_path):
    wave = music(1.5)
    soundfile.write(tmp_path / "a.wav", wave.T, RATE, subtype="FLOAT")
    of_file, of_mono = studio.separate([str(tmp_path / "a.wav"), (wave[0], RATE)])
    separator = DebugBundle("debug", width=1).load({"separator"}, LoadOptions(device="cpu")).separator
    (result,) = separator.separate([wave])
    np.testing.assert_array_equal(of_file.instrumental.audio, result.instrumental)
    np.testing.assert_array_equal(of_file.vocals.audio, result.vocals)
    assert of_file.vocal_ratio == result.vocal_ratio
    assert of_mono.vocals.audio.shape == (1, wave.shape[1])
    with pytest.raises(UserError, match="channels"):
        studio.separate(music(1.0, channels=6), rate=RATE)


def test_generated_clips_are_those_of_the_command_to_the_bit(studio, tmp_path):
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("id,prompt\na,a calm piano\nb,driving drums\n")
    run = tmp_path / "run"
    words = ["generate", "--bundle", "debug", "--prompts", str(prompts), "--output", str(run), "--seed", "7"]
    sets = ["sampler.steps=1", "sampler.score=1.5", "scores=true", "runtime.device=cpu", "postprocess={passes: 0}"]
    assert main([*words, *(part for one in sets for part in ("--set", one))]) == EXIT_OK
    how = {"score": 1.5, "seed": 7, "scores": True, "postprocess": {"passes": 0}, **STEPS}
    clips = studio.generate({"a": "a calm piano", "b": "driving drums"}, **how)
    for clip, of_file in zip(clips, studio.generate(prompts, **how), strict=True):
        row = json.loads((run / f"manifest/{clip.name}.json").read_text())
        assert row.pop("row_sha256")
        assert clip.row | {"file": row["file"]} == row
        assert of_file.row == clip.row
        data = (run / row["file"]).read_bytes()
        np.testing.assert_array_equal(clip.audio, soundfile.read(run / row["file"], dtype="float32")[0][None])
        clip.save(tmp_path / "saved.wav")
        assert (tmp_path / "saved.wav").read_bytes() == data
        scored = studio.score(clip, clip.row["prompt"])
        assert (scored["reward"][0], scored["clap_score"][0]) == (row["reward_score"], row["clap_score"])


def test_a_run_folder_holds_the_same_clips_and_goes_on(studio, tmp_path, monkeypatch):
    prompts = ["a calm piano", "driving drums"]
    in_memory = studio.generate(prompts, samples=2, **STEPS)
    studio.generate(prompts[:1], samples=2, output=tmp_path / "run", **STEPS)
    in_folder = studio.generate(prompts, samples=2, output=tmp_path / "run", **STEPS)
    assert [clip.name for clip in in_folder] == [clip.name for clip in in_memory]
    for one, other in zip(in_memory, in_folder, strict=True):
        np.testing.assert_array_equal(one.audio, other.audio)
        assert one.row | {"file": other.row["file"]} == other.row
        assert hashlib.sha256((tmp_path / "run" / other.row["file"]).read_bytes()).hexdigest() == one.row["sha256"]


def test_models_are_loaded_once(tmp_path, monkeypatch):
    loaded: list[str] = []
    makers = DebugBundle._makers

    def counted(self, *arguments):
        one = makers(self, *arguments)
        return {role: lambda role=role, make=make: loaded.append(role) or make() for role, make in one.items()}

    monkeypatch.setattr(DebugBundle, "_makers", counted)
    own = ttmray.load("debug", device="cpu", threads=1)
    for _ in range(2):
        own.score(music(1.0), rate=RATE)
        own.generate("a harp", scores=True, **STEPS)
    assert sorted(loaded) == sorted({*Scorer.roles, "backbone", "clap_condition", "latents", "text"})


def test_torch_has_its_threads_back(studio):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        studio.score(music(1.0), rate=RATE)
        studio.generate("a harp", **STEPS)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_settings_come_from_a_config_and_from_fields(studio):
    sets = ["bundle=debug", "texts=[x]", "sampler.steps=1", "sampler.weight=1", "postprocess={passes: 0}"]
    config = load_config(GenerateConfig, None, sets)
    (whole,) = studio.generate("a harp", config=config, seed=3)
    fields = {"sampler": {"steps": 1, "weight": 1.0}, "postprocess": {"passes": 0}}
    (parts,) = studio.generate("a harp", seed=3, **fields)
    assert whole.row == parts.row
    (preset,) = studio.generate("a harp", config="debug/generate", samples=1, scores=False, score=None, **fields)
    assert preset.row["score"] is None
    assert json.loads(preset.row["sampler"])["steps"] == 1


@pytest.mark.parametrize(
    ("prompts", "fields", "message"),
    [
        ([], {}, "prompts holds no prompts"),
        ("prompts.csv", {}, r"Path\('prompts.csv'\)"),
        (["a", "a"], {}, "the same prompt as prompt 1"),
        ({"../x": "a"}, {}, "cannot be an id"),
        ("a harp", {"stepps": 3}, "stepps: unknown field"),
        ("a harp", {"sampler": {"steps": 0}}, "sampler.steps"),
        ("a harp", {"bundle": "paper"}, "bundle is no setting"),
        ("a harp", {"config": 3}, "config is a int"),
        ("a harp", {"score": 1.0, "sampler": {"score": 2.0}}, "score=1.0 and sampler.score both say it"),
        ("a harp", {"runtime": {"runner": "ray"}}, "output=FOLDER"),
        ("a harp", {"checkpoint": "absent.safetensors"}, "absent.safetensors"),
    ],
)
def test_bad_settings_are_one_message(studio, prompts, fields, message):
    with pytest.raises(UserError, match=message):
        studio.generate(prompts, **fields)


def test_a_clip_that_fails_is_an_error_that_names_it(studio, monkeypatch):
    from ttmray.errors import ClipError
    from ttmray.generation.worker import ClipMaker

    def fail(self, work):
        raise ClipError("failed", "broken", "for a test")

    monkeypatch.setattr(ClipMaker, "_finish_one", fail)
    with pytest.raises(UserError, match=r"1 of 1 clips failed\. a: broken: for a test"):
        studio.generate({"a": "a harp"}, **STEPS)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [("papre", {}, "papre"), ("debug", {"device": "toaster"}, "toaster"), ("debug", {"threads": 0}, "threads")],
)
def test_a_bundle_that_cannot_be_is_one_message(name, options, message):
    with pytest.raises(UserError, match=message):
        ttmray.load(name, **options)


def test_clips_are_saved_by_their_ending_and_other_endings_are_refused(tmp_path):
    clip = ttmray.AudioClip(music(1.0), RATE, {"name": "x"})
    assert clip.save(tmp_path / "x.wav") == str(tmp_path / "x.wav")
    np.testing.assert_array_equal(soundfile.read(tmp_path / "x.wav", dtype="float32")[0].T, clip.audio)
    clip.save(tmp_path / "x.flac")
    np.testing.assert_allclose(soundfile.read(tmp_path / "x.flac", dtype="float32")[0].T, clip.audio, atol=5e-5)
    with pytest.raises(UserError, match=r"neither \.wav nor \.flac"):
        clip.save(tmp_path / "x.mp3")


def test_a_player_is_as_loud_as_the_clip():
    pytest.importorskip("IPython")
    player = ttmray.AudioClip(0.25 * music(0.5), RATE).play()
    samples = np.frombuffer(player.data[44:], "<i2").reshape(-1, 2).T / 32767
    np.testing.assert_allclose(samples, 0.25 * music(0.5), atol=1e-4)


def test_without_ipython_a_player_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "IPython.display", None)
    with pytest.raises(UserError, match="ttmray\\[notebook\\]"):
        ttmray.AudioClip(music(0.5), RATE).play()
