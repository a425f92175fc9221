"""What each stage does with good, odd and bad clips. The models are the real classes of the debug bundle."""

import hashlib
import io
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from ttmray.audio import io as audio_io
from ttmray.audio.limits import AudioLimits
from ttmray.config import load_config
from ttmray.corpus import index, shards
from ttmray.corpus.assembly import CorpusJob, stage_classes
from ttmray.corpus.config import CorpusConfig
from ttmray.corpus.running import Chain, run_stages
from ttmray.corpus.stages import Unseparated
from ttmray.corpus.unit import FAILED, OK, REJECTED, Unit
from ttmray.errors import UserError
from ttmray.models.bundle import ROLES, Models, open_bundle
from ttmray.models.loading import LoadOptions
from ttmray.storage import Folder

SAMPLES = 441_000


@dataclass(frozen=True)
class Context:
    """What stages are made of, with models that are loaded once."""

    config: CorpusConfig
    root: str
    models: Models


@pytest.fixture(scope="module")
def models() -> Models:
    loaded = open_bundle("debug").load(ROLES, LoadOptions())
    torch.set_num_threads(1)  # as in a job; more threads change last bits
    return loaded


@pytest.fixture
def context(models: Models, tmp_path: Path) -> Context:
    """The config's defaults, songs and output below the test's own folder."""
    config = load_config(CorpusConfig, None, ["bundle=debug", f"input={tmp_path}/songs", f"output={tmp_path}/run"])
    (tmp_path / "songs").mkdir()
    return Context(config, f"{tmp_path}/songs", models)


def with_config(context: Context, *sets: str) -> Context:
    usual = ("bundle=debug", f"input={context.root}", f"output={context.config.output}")
    config = load_config(CorpusConfig, None, [*usual, *sets])
    return replace(context, config=config)


def track(path: str, size: int = -1, caption: str = "", **more: Any) -> dict[str, Any]:
    plan = {"track_id": Path(path).stem, "path": path, "size": size, "split": "train", "caption": caption}
    outcome = {"caption_id": f"id of {caption}", "caption_owner": True, "status": OK, "reason": "", "message": ""}
    return plan | outcome | more


def tone(seconds: float, rate: int, channels: int = 2, gain: float = 0.3) -> np.ndarray:
    t = np.arange(round(seconds * rate)) / rate
    return np.stack([gain * np.sin(2 * np.pi * (220 + 110 * c) * t) for c in range(channels)], axis=1)


def stages(context: Context, *names: str) -> Chain:
    """Stages of these names, in the order of the run; all where none is named."""
    job = CorpusJob(context.config.model_dump_json(), context.root, "debug/test")
    return job.build(names or [stage.name for stage in job.stages()], context.models)


def decoded(context: Context, *tracks: dict[str, Any]) -> Unit:
    return run_stages(stages(context, "decode"), Unit("u000000", list(tracks)))


def test_a_mono_file_of_another_rate_becomes_stereo_clips_at_44100(context, tmp_path):
    soundfile.write(tmp_path / "songs/mono.wav", tone(20.5, 48000, channels=1), 48000)
    unit = decoded(context, track("mono.wav"))
    assert [row["key"] for row in unit.rows] == ["mono_0", "mono_1"]
    assert [(row["start_s"], row["duration_s"]) for row in unit.rows] == [(0.0, 10.0), (10.5, 10.0)]
    assert (unit.rows[0]["sample_rate"], unit.rows[0]["channels"]) == (48000, 1)
    assert unit.clips["mix"].shape == (2, 2, SAMPLES)
    np.testing.assert_array_equal(unit.clips["mix"][:, 0], unit.clips["mix"][:, 1])
    spectrum = np.abs(np.fft.rfft(unit.clips["mix"][0, 0]))
    assert np.argmax(spectrum) == 220 * 10, "the pitch stays"


def test_a_short_track_is_one_clip_padded_with_zeros_and_its_length_is_recorded(context, tmp_path):
    soundfile.write(tmp_path / "songs/short.flac", tone(6.25, 44100), 44100)
    unit = decoded(context, track("short.flac"))
    (row,) = unit.rows
    assert (row["duration_s"], row["start_s"], row["segment"]) == (6.25, 0.0, 0)
    end = round(6.25 * 44100)
    assert not unit.clips["mix"][0, :, end:].any()
    assert unit.clips["mix"][0, :, end - 100 : end].any()


def test_a_clip_holds_the_samples_of_the_file_bit_for_bit_at_44100(context, tmp_path):
    samples = tone(23, 44100).astype(np.float32)
    soundfile.write(tmp_path / "songs/a.wav", samples, 44100, subtype="FLOAT")
    unit = decoded(context, track("a.wav"))
    np.testing.assert_array_equal(unit.clips["mix"][1], samples[-SAMPLES:].T)
    assert unit.rows[0]["sha256"] == hashlib.sha256((tmp_path / "songs/a.wav").read_bytes()).hexdigest()


def test_separating_whole_tracks_gives_the_same_keys_and_at_44100_the_same_mix(context, tmp_path):
    soundfile.write(tmp_path / "songs/a.flac", tone(23, 44100), 44100)
    soundfile.write(tmp_path / "songs/b.flac", tone(24, 48000), 48000)
    soundfile.write(tmp_path / "songs/c.flac", tone(3, 44100), 44100)
    tracks = [track("a.flac"), track("b.flac"), track("c.flac")]
    by_clip = decoded(context, *tracks)
    by_track = decoded(with_config(context, "separation.scope=track"), *tracks)
    assert by_track.rows == by_clip.rows
    np.testing.assert_array_equal(by_track.clips["mix"][:2], by_clip.clips["mix"][:2])
    # resampling a cut or cutting what was resampled differs at the edges only
    inside = slice(2000, -2000)
    np.testing.assert_allclose(
        by_track.clips["mix"][2:, :, inside], by_clip.clips["mix"][2:, :, inside], atol=0.01, rtol=0
    )


def test_a_file_that_was_replaced_after_planning_fails_and_is_not_taken_for_the_planned_one(context, tmp_path):
    path = tmp_path / "songs/a.wav"
    soundfile.write(path, tone(6, 44100), 44100)
    planned = track("a.wav", path.stat().st_size, version=str(path.stat().st_mtime_ns))
    assert decoded(context, planned).rows[0]["status"] == OK
    soundfile.write(path, tone(6, 44100, gain=0.1), 44100)
    os.utime(path, ns=(1, 1))  # of equal size
    (row,) = decoded(context, planned).rows
    assert (row["status"], row["reason"]) == (FAILED, "changed")
    soundfile.write(path, tone(7, 44100), 44100)
    (row,) = decoded(context, planned | {"version": ""}).rows
    assert (row["status"], row["reason"]) == (FAILED, "changed")
    assert str(path.stat().st_size) in row["message"]


@pytest.mark.parametrize(
    ("content", "size", "sets", "status", "reason"),
    [
        (b"", 0, (), FAILED, "empty_file"),
        (b"hello " * 99, 594, (), FAILED, "not_audio"),
        (None, -1, (), FAILED, "unreadable"),
        (tone(3, 44100), -1, (), REJECTED, "too_short"),
        (tone(6, 8000), -1, (), REJECTED, "sample_rate"),
        (tone(6, 44100, channels=6), -1, (), REJECTED, "channels"),
        (tone(6, 44100), -1, ("limits.max_duration_s=5.5",), REJECTED, "too_long"),
        (tone(6, 44100), -1, ("limits.max_decoded_bytes=100000",), REJECTED, "decoded_size"),
        (tone(6, 44100), 9999, ("limits.max_file_bytes=9998",), REJECTED, "file_size"),
    ],
)
def test_a_bad_file_is_one_row_with_stage_reason_and_message(context, tmp_path, content, size, sets, status, reason):
    path = tmp_path / "songs/bad.wav"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        soundfile.write(path, content, 8000 if len(content) == 48000 else 44100)
    unit = decoded(with_config(context, *sets), track("bad.wav", size=size))
    (row,) = unit.rows
    assert (row["key"], row["segment"], row["status"], row["stage"]) == ("bad", -1, status, "decode")
    assert row["reason"] == reason
    assert row["message"]
    assert unit.clips["mix"].shape == (0, 2, SAMPLES)


def test_what_the_catalogue_rejected_is_a_row_and_is_not_opened(context):
    rejected = track("copy.wav", status=REJECTED, reason="duplicate", message="same bytes as a")
    (row,) = decoded(context, rejected).rows
    assert (row["status"], row["stage"], row["reason"]) == (REJECTED, "plan", "duplicate")


def unit_of(**clips: np.ndarray) -> Unit:
    """One track per clip, called `t0`, `t1`, ..., as they look after decoding."""
    count = len(next(iter(clips.values())))
    tracks = [track(f"t{i}.wav", caption=f"song {i}") for i in range(count)]
    rows = [index.new_row(t, "u000000", "debug/test") | {"key": f"{t['track_id']}_0", "segment": 0} for t in tracks]
    for row in rows:
        row.update(start_s=0.0, duration_s=10.0)
    return Unit("u000000", tracks, rows, {name: array.astype(np.float32) for name, array in clips.items()})


LOUD = 0.9


def waves(*gains: float) -> np.ndarray:
    """(n, samples): tones of these peaks. The clip of peak `LOUD` is the one that tests make fail."""
    t = np.arange(SAMPLES) / 44100
    return np.stack([gain * np.sin(2 * np.pi * (200 + 50 * i) * t) for i, gain in enumerate(gains)])


def test_measures_are_right_and_silence_is_rejected(context):
    mono = waves(0.5, 0.0, 1e-5)
    half = np.concatenate([mono[0, : SAMPLES // 2], np.zeros(SAMPLES // 2)])
    unit = run_stages(stages(context, "measure"), unit_of(mix=np.stack([*mono, half])[:, None].repeat(2, axis=1)))
    assert [row["status"] for row in unit.rows] == [OK, REJECTED, REJECTED, OK]
    assert [row["reason"] for row in unit.rows] == ["", "silent", "silent", ""]
    assert len(unit.clips["mix"]) == 2
    full, half_silent = unit.ok_rows()
    # a sine of peak 0.5 has an RMS of -9.03 dBFS in each of two channels; BS.1770 adds the channels and
    # subtracts 0.691, and its filter takes about 0.7 dB at 200 Hz
    assert full["lufs"] == pytest.approx(-9.03 + 3.01 - 0.691 - 0.1, abs=0.7)
    assert full["true_peak_db"] == pytest.approx(-6.02, abs=0.05)
    assert full["silence"] == 0.0
    assert half_silent["silence"] == pytest.approx(0.5, abs=0.02)


def test_a_clip_whose_channels_cancel_is_silent_as_the_models_hear_their_mean(context):
    sine = waves(0.5)[0]
    mix = np.stack([np.stack([sine, -sine]), np.stack([sine, 0 * sine]), np.stack([sine, -0.5 * sine])])
    unit = run_stages(stages(context, "measure"), unit_of(mix=mix))
    assert [row["reason"] for row in unit.rows] == ["silent", "", ""]
    assert "the channels cancel" in unit.rows[0]["message"]


def test_the_loudest_sample_that_is_music_is_a_setting(context):
    soundfile.write(f"{context.root}/loud.wav", 40 * tone(6, 44100), 44100, subtype="FLOAT")
    for peak, reason in ((10, "too_loud"), (20, "")):
        (decode,) = stages(with_config(context, f"limits.max_peak={peak}"), "decode").stages
        rows = decode(Unit("u000000", [track("loud.wav")])).rows
        assert {row["reason"] for row in rows} == {reason}


def test_a_clip_too_quiet_for_the_loudness_gate_has_no_loudness_but_is_ok(context):
    quiet = waves(3e-4)[:, None].repeat(2, axis=1)  # -70.5 dBFS: over silence_dbfs, under the gate of -70 LUFS
    unit = run_stages(stages(context, "measure"), unit_of(mix=quiet))
    (row,) = unit.rows
    assert row["status"] == OK
    assert row["lufs"] is None


def spoil(monkeypatch: pytest.MonkeyPatch, models: Models, role: str, method: str, how: str) -> None:
    """Make one method of one real model raise, or give NaN, for the loud clip only."""
    adapter = getattr(models, role)
    real: Callable[..., Any] = getattr(adapter, method)

    def spoiled(pieces: Any, *more: Any, **options: Any) -> Any:
        loud = [i for i, piece in enumerate(pieces) if np.abs(piece).max() > 0.8]
        if loud and how == "raises":
            raise RuntimeError("kernel size can't be greater than actual input size")
        results = real(pieces, *more, **options)
        for i in loud:
            if role == "separator":
                results[i].instrumental[:] = np.nan
            else:
                results[i] = np.nan
        return results

    monkeypatch.setattr(adapter, method, spoiled)


@pytest.mark.parametrize(
    ("stage", "role", "method", "how"),
    [
        ("separate", "separator", "separate", "raises"),
        ("score", "clap", "embed_audio", "raises"),
        ("score", "clap", "embed_audio", "nan"),
        ("score", "mert", "embed", "nan"),
        ("encode", "latents", "encode", "raises"),
    ],
)
def test_a_clip_that_breaks_a_model_is_quarantined_alone(context, models, monkeypatch, stage, role, method, how):
    def unit() -> Unit:
        loud = waves(0.1, LOUD, 0.2)
        if stage == "separate":
            return unit_of(mix=loud[:, None].repeat(2, axis=1))
        return unit_of(mix_mono=loud, instrumental=loud) if stage == "score" else unit_of(instrumental=loud)

    whole = run_stages(stages(context, stage), unit())
    spoil(monkeypatch, models, role, method, how)
    spoiled = run_stages(stages(context, stage), unit())
    assert [row["status"] for row in spoiled.rows] == [OK, FAILED, OK], spoiled.rows[0]["message"]
    bad = spoiled.rows[1]
    assert (bad["key"], bad["stage"], bad["reason"]) == ("t1_0", stage, "error")
    assert ("kernel size" if how == "raises" else "not finite") in bad["message"]
    assert [spoiled.rows[0], spoiled.rows[2]] == [whole.rows[0], whole.rows[2]]
    assert spoiled.clips.keys() == whole.clips.keys()
    for name, array in whole.clips.items():
        np.testing.assert_array_equal(spoiled.clips[name], array[[0, 2]])


def test_nan_from_the_separator_never_gets_past_the_score_stage(context, models, monkeypatch):
    spoil(monkeypatch, models, "separator", "separate", "nan")
    unit = unit_of(mix=waves(0.1, LOUD)[:, None].repeat(2, axis=1))
    unit = run_stages(stages(context, "separate", "score"), unit)
    assert [row["status"] for row in unit.rows] == [OK, FAILED]
    assert unit.rows[1]["stage"] == "score"


def test_a_unit_whose_every_clip_breaks_a_model_is_committed_without_clips(context, models, monkeypatch):
    spoil(monkeypatch, models, "separator", "separate", "raises")
    unit = unit_of(mix=waves(LOUD, LOUD)[:, None].repeat(2, axis=1))
    unit = run_stages(stages(context, "separate", "score", "encode", "text", "write"), unit)
    assert [(row["status"], row["stage"]) for row in unit.rows] == [(FAILED, "separate")] * 2
    run = Folder.at(context.config.output)
    assert index.read_index(run)["key"].to_pylist() == ["t0_0", "t1_0"]
    assert run.files("shards") == []


@pytest.mark.parametrize("peak", [1e10, 1e20, 1e38])
def test_a_float_file_far_beyond_full_scale_costs_its_own_clip_at_most(context, tmp_path, peak):
    soundfile.write(tmp_path / "songs/a.wav", tone(5, 44100), 44100)
    soundfile.write(tmp_path / "songs/b.wav", tone(5, 44100, gain=peak), 44100, subtype="FLOAT")
    unit = Unit("u000000", [track("a.wav"), track("b.wav")])
    unit = run_stages(stages(context), unit)
    assert unit.rows[0]["status"] == OK
    (table, _), *_ = index.read_units(Folder.at(context.config.output), ["u000000"])
    numbers = [value for row in table.to_pylist() for value in row.values() if isinstance(value, float)]
    assert np.isfinite(numbers).all()
    latents = index.read_units(Folder.at(context.config.output), ["u000000"])[0][1]["latents"]
    assert np.isfinite(latents["train"]["sum_of_squares"]).all()


@pytest.mark.parametrize("error", [UserError("no weights"), OSError(28, "disk full"), MemoryError()])
def test_what_no_other_clip_would_survive_stops_the_job(context, models, monkeypatch, error):
    def broken(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(models.latents, "encode", broken)
    with pytest.raises(type(error)):
        run_stages(stages(context, "encode"), unit_of(instrumental=waves(0.1, 0.2)))


def test_scores_against_the_caption_are_cosines_and_clips_without_caption_have_none(context, models):
    unit = unit_of(mix_mono=waves(0.1, 0.2), instrumental=waves(0.2, 0.1))
    unit.rows[1]["caption"] = ""
    unit = run_stages(stages(context, "score"), unit)
    text = models.clap.embed_text(["song 0"])[0]
    clap = unit.clips["clap_audio"]
    assert clap.shape == (2, 2, 512)
    assert unit.rows[0]["clap_score"] == pytest.approx(float(clap[0, 0] @ text))
    assert unit.rows[0]["instrumental_clap_score"] == pytest.approx(float(clap[0, 1] @ text))
    assert unit.rows[1]["clap_score"] is None
    np.testing.assert_allclose(np.linalg.norm(clap, axis=-1), 1, atol=1e-5)


def test_the_reward_uses_the_caption_only_where_the_config_says_so(context):
    def rewards(context: Context) -> list[float]:
        unit = unit_of(mix_mono=waves(0.1), instrumental=waves(0.2))
        (row,) = run_stages(stages(context, "score"), unit).rows
        return [row["reward_score"], row["instrumental_reward_score"]]

    plain, with_text = rewards(context), rewards(with_config(context, "reward_text=caption"))
    assert plain[0] != plain[1]
    assert plain != with_text


def test_a_caption_cache_does_not_change_scores(context):
    (score,) = stages(context, "score").stages
    first = score(unit_of(mix_mono=waves(0.1, 0.2), instrumental=waves(0.1, 0.2))).rows
    again = score(unit_of(mix_mono=waves(0.1, 0.2), instrumental=waves(0.1, 0.2))).rows
    assert first == again


def encoded_audio(monkeypatch: pytest.MonkeyPatch, models: Models) -> list[np.ndarray]:
    """Batches that the VAE has encoded."""
    seen: list[np.ndarray] = []
    real = models.latents.encode
    monkeypatch.setattr(
        models.latents, "encode", lambda waves, *more: (seen.append(np.array(waves)), real(waves, *more))[1]
    )
    return seen


def unit_of_tracks(*tracks: tuple[float, ...]) -> Unit:
    """Instrumentals of these peaks, by track."""
    unit = unit_of(instrumental=waves(*(gain for gains in tracks for gain in gains)))
    places = [(t, segment) for t, gains in enumerate(tracks) for segment in range(len(gains))]
    for row, (t, segment) in zip(unit.rows, places, strict=True):
        row.update(track_id=f"t{t}", segment=segment, key=f"t{t}_{segment}")
    unit.tracks = unit.tracks[: len(tracks)]
    return unit


def test_the_level_of_the_latents_is_that_of_the_source_unless_a_peak_is_set(context, models, monkeypatch):
    seen = encoded_audio(monkeypatch, models)
    unit = unit_of_tracks((0.4, 0.1), (0.05,), (5e-5,))
    source = unit.clips["instrumental"].copy()
    plain = run_stages(stages(context, "level", "encode"), unit)
    np.testing.assert_array_equal(seen.pop(), source)
    context = with_config(context, "latent_peak=0.95", "keep_audio=true")
    scaled = run_stages(stages(context, "level", "encode"), unit_of_tracks((0.4, 0.1), (0.05,), (5e-5,)))
    factors = np.array([0.95 / 0.4, 0.95 / 0.4, 0.95 / 0.05, 1.0])  # the last one counts as silent
    (batch,) = seen
    np.testing.assert_allclose(batch, source * factors[:, None], rtol=1e-4, atol=1e-7)
    np.testing.assert_array_equal(scaled.clips["instrumental"], source)
    assert scaled.clips.keys() == plain.clips.keys() | {"instrumental"}
    same = [np.array_equal(a, b) for a, b in zip(plain.clips["latent_mean"], scaled.clips["latent_mean"], strict=True)]
    assert same == [False, False, False, True]


def test_clips_that_are_encoded_alone_have_the_peak_of_their_track(context, models, monkeypatch):
    context = with_config(context, "latent_peak=0.95")
    gains = ((0.4, 0.1), (0.2,))
    whole = run_stages(stages(context, "level", "encode"), unit_of_tracks(*gains))
    real = models.latents.encode

    def one_at_most(waves: np.ndarray, *more: Any) -> Any:
        if len(waves) > 1:
            raise RuntimeError("some clip of these is bad")
        return real(waves, *more)

    monkeypatch.setattr(models.latents, "encode", one_at_most)
    alone = run_stages(stages(context, "level", "encode"), unit_of_tracks(*gains))
    assert [row["status"] for row in alone.rows] == [OK] * 3
    for name in ("latent_mean", "latent_std"):
        np.testing.assert_array_equal(alone.clips[name], whole.clips[name])


def test_the_kept_audio_is_the_instrumental(context):
    unit = unit_of(instrumental=waves(0.5))
    wave = unit.clips["instrumental"][0].copy()
    context = with_config(context, "keep_audio=true")
    unit.clips |= {"clap_audio": np.zeros((1, 2, 512), np.float32), "mert": np.zeros((1, 2, 1024), np.float32)}
    unit.rows[0]["reward_score"] = 0.0
    run_stages(stages(context, "encode", "write"), unit)
    run = Folder.at(context.config.output)
    (entry,) = run.files("shards")
    ((_, members),) = shards.read_samples(run.read(f"shards/{entry.name}"), entry.name)
    audio, rate = audio_io.decode(io.BytesIO(members["flac"]), AudioLimits())
    assert rate == 44100
    np.testing.assert_allclose(audio[0], wave, atol=0.5 / 32768 + 1e-7)


def test_the_first_commit_of_a_unit_stands(context):
    def write(reward: float) -> None:
        features = {"clap_audio": np.zeros((1, 2, 512)), "mert": np.zeros((1, 2, 1024))}
        latents = {"latent_mean": np.zeros((1, 3, 4)), "latent_std": np.ones((1, 3, 4))}
        unit = unit_of(**features, **latents)
        unit.rows[0]["reward_score"] = reward
        run_stages(stages(context, "write"), unit)

    write(1.0)
    write(2.0)
    run = Folder.at(context.config.output)
    assert index.read_index(run)["reward_score"].to_pylist() == [1.0]
    ((_, metadata),) = index.read_units(run, ["u000000"])
    (shard,) = metadata["files"]
    assert hashlib.sha256(run.read(shard)).hexdigest() == metadata["files"][shard]["sha256"]


def test_text_features_are_stored_once_per_distinct_caption(finished_run, models):
    run = Folder.at(str(finished_run))
    stored = [shards.read_captions(run, f"captions/{entry.name}") for entry in run.files("captions")]
    rows = index.read_index(run).to_pylist()
    captions = {row["caption_id"]: row["caption"] for row in rows}
    assert sorted(captions.values()) == ["", "A kite.", "Slow waves."]
    assert sorted(caption_id for part in stored for caption_id in part) == sorted(captions)
    for part in stored:
        for caption_id, features in part.items():
            text = [captions[caption_id]]
            np.testing.assert_array_equal(features["t5"], models.text.encode(text)[0].astype(np.float16))
            np.testing.assert_array_equal(features["clap_score"], models.clap.embed_text(text)[0])
            np.testing.assert_array_equal(features["clap"], models.clap_condition.embed_text(text)[0])


def test_every_column_of_an_ok_clip_is_filled_and_agrees_with_its_shard(finished_run):
    run = Folder.at(str(finished_run))
    rows = [row for row in index.read_index(run).to_pylist() if row["status"] == OK]
    assert len(rows) == 4
    for row in rows:
        empty = {name for name, value in row.items() if value is None or value == ""}
        assert empty <= {"reason", "message", "lufs"}
        assert row["vocal_ratio"] >= 0
        assert 0 <= row["silence"] <= 1
        members = dict(shards.read_samples(run.read(row["shard"]), row["shard"]))[row["key"]]
        assert members["json"] == {name: row[name] for name in members["json"]}
        assert members["latent_mean.npy"].dtype == members["latent_std.npy"].dtype == np.float16
        assert members["latent_mean.npy"].shape == members["latent_std.npy"].shape
        assert (members["latent_std.npy"] > 0).all()


def test_the_reward_of_a_track_is_the_mean_over_its_ok_clips(finished_run):
    rows = [row for row in index.read_index(Folder.at(str(finished_run))).to_pylist() if row["status"] == OK]
    tracks = {row["track_id"] for row in rows}
    for name in tracks:
        of_track = [row for row in rows if row["track_id"] == name]
        mean = np.mean([row["reward_score"] for row in of_track])
        assert all(row["track_reward_score"] == pytest.approx(mean) for row in of_track)
    assert len(rows) > len(tracks)


def test_without_separation_the_instrumental_is_the_mix_and_nothing_is_known_of_vocals():
    config = CorpusConfig.model_validate({"input": "songs", "output": "run", "separation": {"scope": "none"}})
    names = [stage.__name__ for stage in stage_classes(config)]
    assert "Unseparated" in names
    assert "Separate" not in names
    assert not any("separator" in stage.model_roles for stage in stage_classes(config))
    clips = {"mix": np.stack([np.ones((2, 8), np.float32), np.zeros((2, 8), np.float32)])}
    unit = Unit("u000000", [], [{"status": OK}, {"status": OK}], clips)
    out = Unseparated()(unit)
    assert np.array_equal(out.clips["instrumental"], out.clips["mix_mono"])
    assert all("vocal_ratio" not in row for row in out.rows)
