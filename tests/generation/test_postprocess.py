"""`ttmray postprocess`: every file at its target and under the ceiling as written, or a row that says why not."""

import csv
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyloudnorm
import pytest
import soundfile
from pydantic import ValidationError
from scipy.signal import resample_poly

from ttmray import inventory
from ttmray.audio.io import decode, resample
from ttmray.audio.limiter import to_loudness
from ttmray.audio.limits import AudioLimits
from ttmray.audio.loudness import integrated_loudness, true_peak
from ttmray.errors import EXIT_OK, EXIT_TOO_MANY_FAILURES, ClipError, UserError
from ttmray.generation.postprocess import PostprocessConfig, encode, open_separator, postprocess_clip
from ttmray.generation.postprocess_folders import COLUMNS, TABLE, postprocess
from ttmray.models.separator import Separator, debug_separator
from ttmray.runs import SUCCESS
from ttmray.storage import Folder

RATE = 44100
PLAIN = PostprocessConfig(passes=0)
TABLE_NUMBERS = [name for name in COLUMNS if name.endswith(("before", "after", "_db", "_s", "_rate", "channels"))]


def music(seconds: float = 1.0, rate: int = RATE, channels: int = 1, seed: int = 0) -> np.ndarray:
    """(channels, frames) float32: a tone, and a beat of noise whose peaks need limiting at -16.5 LUFS."""
    t = np.arange(round(seconds * rate)) / rate
    noise = np.convolve(np.random.default_rng(seed).standard_normal(channels * len(t)), [0.25, 0.5, 0.25], "same")
    beat = 0.3 * np.exp(-((t + 0.1) % 0.5) * 30)
    return (beat * noise.reshape(channels, -1) + 0.04 * np.sin(2 * np.pi * 330 * t)).astype(np.float32)


def write(path: Path, audio: np.ndarray, rate: int = RATE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, audio.T, rate, subtype="FLOAT" if path.suffix == ".wav" else None)
    return path


def run(out: Path, *sources: Path, config: PostprocessConfig = PLAIN) -> int:
    return postprocess([str(source) for source in sources], str(out), config)


def rows(out: Path) -> dict[str, dict[str, Any]]:
    with open(out / TABLE, newline="") as file:
        return {row["file"]: row for row in csv.DictReader(file)}


def times(out: Path) -> dict[str, int]:
    beside = (TABLE, SUCCESS)
    return {str(path.relative_to(out)): path.stat().st_mtime_ns for path in out.rglob("*") if path.name not in beside}


def test_every_published_clip_reaches_its_target_as_written_by_independent_meters(data_dir, tmp_path):
    sources = sorted((data_dir / "clips").rglob("*.flac"))
    assert len(sources) == 48
    assert run(tmp_path, data_dir / "clips", config=PostprocessConfig(passes=0, format="flac")) == EXIT_OK
    table = rows(tmp_path)
    assert list(table) == [str(path.relative_to(data_dir / "clips")) for path in sources]
    for name, row in table.items():
        assert (row["status"], row["reason"]) == ("ok", ""), name
        y, rate = decode(tmp_path / name, AudioLimits())
        assert y.shape == (1, 441_000)
        assert true_peak(y, rate) <= -1.0
        assert integrated_loudness(y, rate) == pytest.approx(-16.5, abs=0.05)
        y = y.astype(np.float64)
        meter = pyloudnorm.Meter(rate, filter_class="DeMan")
        assert meter.integrated_loudness(y.T) == pytest.approx(-16.5, abs=0.1)
        assert 20 * math.log10(np.abs(resample_poly(y, 8, 1, axis=1)).max()) <= -1.0 + 0.1
        assert float(row["lufs_after"]) == pytest.approx(meter.integrated_loudness(y.T), abs=0.001)
        assert float(row["true_peak_after"]) == pytest.approx(true_peak(y.astype(np.float32), rate), abs=0.005)
    limited = [name for name, row in table.items() if float(row["reduction_db"]) > 0]
    assert 0 < len(limited) < 48


@pytest.mark.parametrize(("format", "ending"), [("wav", ".wav"), ("wav16", ".wav"), ("flac", ".flac")])
def test_files_hold_what_was_made_and_are_the_same_every_time(tmp_path, format, ending):
    config = PostprocessConfig(passes=0, format=format)
    source = write(tmp_path / "in" / "a.wav", music(channels=2))
    assert run(tmp_path / "out", source, config=config) == EXIT_OK
    written, rate = decode(tmp_path / "out" / f"a{ending}", AudioLimits(min_duration_s=0.1))
    wave, _ = postprocess_clip(music(channels=2), RATE, config)
    assert rate == RATE
    if format == "wav":
        np.testing.assert_array_equal(written, wave)
    else:
        error = (written - wave) * 32768
        assert 1 < np.abs(error).max() <= 1.5  # dither of up to 1 step, then rounding
        assert error.var() == pytest.approx(1 / 6 + 1 / 12, rel=0.02)  # triangular plus uniform
        assert abs(np.corrcoef(error)[0, 1]) < 0.02  # channels have their own
    assert encode(wave, RATE, config) == (tmp_path / "out" / f"a{ending}").read_bytes()
    assert true_peak(written, RATE) <= -1.0


def test_dither_keeps_a_tone_below_one_step(tmp_path):
    tone = (0.4 / 32768 * np.sin(2 * np.pi * 1000 * np.arange(10 * RATE) / RATE))[None].astype(np.float32)
    for variant, heard in (("ours", True), ("paper", False)):
        (tmp_path / variant).write_bytes(encode(tone, RATE, PostprocessConfig(format="wav16", variant=variant)))
        written, _ = decode(tmp_path / variant, AudioLimits())
        assert (float((written * tone).sum()) > 0.9 * float((tone * tone).sum())) == heard


@pytest.mark.parametrize(("rate", "channels"), [(RATE, 1), (48000, 1), (RATE, 2), (22050, 2)])
def test_separation_is_the_separators_own_passes_at_its_rate(rate, channels):
    config = PostprocessConfig(bundle="debug", passes=2, device="cpu")
    separator = open_separator(config)
    wave = music(1.0, rate, channels)
    y, facts = postprocess_clip(wave, rate, config, separator)
    assert (y.shape, facts["sample_rate"], facts["channels"]) == ((channels, RATE), RATE, channels)
    one = resample(wave, rate, RATE)
    separate = Separator(debug_separator(0, width=4)).separate
    (first,) = separate([one])
    rest = first.instrumental if channels == 2 else first.instrumental.mean(axis=0, keepdims=True)
    (second,) = separate([rest])
    rest = second.instrumental if channels == 2 else second.instrumental.mean(axis=0, keepdims=True)
    finished, levels = to_loudness(rest, RATE)
    np.testing.assert_allclose(y, finished, atol=1e-5)
    assert (facts["outcome"], facts["reduction_db"]) == (levels.outcome, pytest.approx(levels.reduction_db, abs=1e-3))
    assert facts["vocal_ratio"] == first.vocal_ratio
    assert facts["lufs_before"] == integrated_loudness(wave, rate)
    assert facts["lufs_after"] == integrated_loudness(y, RATE)
    assert true_peak(y, RATE) <= -1.0


def test_the_papers_variant_does_what_its_scripts_do():
    config = PostprocessConfig(variant="paper", bundle="debug", passes=2, device="cpu")
    wave = music(2.0, channels=2)
    y, facts = postprocess_clip(wave, RATE, config, open_separator(config))
    # Per pass: mono, sample peak 0.95.
    separate, mono = Separator(debug_separator(0, width=4)).separate, wave
    for _ in range(2):
        mono = separate([mono])[0].instrumental.mean(axis=0, keepdims=True)
        mono = mono / np.abs(mono).max() * 0.95
    np.testing.assert_allclose(y / np.abs(y).max(), mono / np.abs(mono).max(), atol=1e-5)
    # Then loudness by gain; a sample peak over 0.99 scales the clip to 0.95 and misses the target.
    gained = mono * 10 ** ((-16.5 - integrated_loudness(mono, RATE)) / 20)
    assert np.abs(gained).max() > 0.99
    np.testing.assert_allclose(y, gained * 0.95 / np.abs(gained).max(), atol=1e-5)
    assert facts["outcome"] == "missed"
    assert facts["lufs_after"] < -17
    assert facts["true_peak_after"] > -1.0


def test_the_papers_variant_leaves_a_peak_under_its_limit_alone():
    tone = (0.03 * np.sin(2 * np.pi * 997 * np.arange(RATE) / RATE)).astype(np.float32)
    y, facts = postprocess_clip(np.stack([tone, 0 * tone]), RATE, PostprocessConfig(variant="paper", passes=0))
    assert y.shape == (1, RATE)
    assert (facts["outcome"], facts["channels"]) == ("reached", 1)
    assert facts["lufs_after"] == pytest.approx(-16.5, abs=0.001)


@pytest.mark.parametrize("variant", ["ours", "paper"])
def test_silence_is_marked_and_left_alone(tmp_path, variant):
    write(tmp_path / "in" / "zero.wav", np.zeros((1, RATE), np.float32))
    write(tmp_path / "in" / "faint.wav", music() * np.float32(1e-4))
    assert run(tmp_path / "out", tmp_path / "in", config=PostprocessConfig(variant=variant, passes=0)) == EXIT_OK
    for name, row in rows(tmp_path / "out").items():
        assert (row["status"], row["reason"], row["lufs_after"], row["gain_db"]) == ("ok", "silent", "", "0.0")
        before, after = (soundfile.read(tmp_path / folder / name, dtype="float32")[0] for folder in ("in", "out"))
        assert np.array_equal(before, after)


def test_a_missed_target_is_recorded(tmp_path, capsys):
    spike = music()
    spike[0, 999] = 9.0
    write(tmp_path / "in" / "spike.wav", spike)
    assert run(tmp_path / "out", tmp_path / "in") == EXIT_OK
    row = rows(tmp_path / "out")["spike.wav"]
    assert (row["status"], row["reason"], row["reduction_db"]) == ("ok", "missed", "0.0")
    assert float(row["lufs_after"]) < -17
    assert float(row["true_peak_after"]) <= -1.0
    assert "missed" in capsys.readouterr().out


def test_limiting_that_is_heard_is_listed_and_less_is_not(tmp_path, capsys):
    soft = 0.1 * np.sin(2 * np.pi * 330 * np.arange(3 * RATE) / RATE, dtype=np.float32)[None]
    hard = np.where(np.arange(3 * RATE) == RATE, np.float32(2), soft)  # one click far above the tone
    write(tmp_path / "in/soft.wav", soft)
    write(tmp_path / "in/hard.wav", hard)
    assert run(tmp_path / "out", tmp_path / "in", config=PLAIN.model_copy(update={"max_reduction_db": 60.0})) == EXIT_OK
    table = rows(tmp_path / "out")
    assert float(table["hard.wav"]["reduction_db"]) > 6 > float(table["soft.wav"]["reduction_db"])
    shown = capsys.readouterr().out
    assert "dB off peaks, more than 6: listen to it" in shown
    assert "soft.wav" not in shown
    assert table["hard.wav"]["reason"] == ""


@pytest.mark.parametrize(
    ("wave", "reason"),
    [
        (np.full((1, RATE), np.nan, np.float32), "non_finite"),
        (np.full((2, RATE), -np.inf, np.float32), "non_finite"),
        (music() * np.float32(1e38), "non_finite"),
        (np.zeros((1, 100), np.float32), "too_short"),
        (np.zeros((1, 0), np.float32), "too_short"),
    ],
)
def test_clips_that_cannot_be_finished_say_why(wave, reason):
    with pytest.raises(ClipError) as raised:
        postprocess_clip(wave, RATE, PLAIN)
    assert raised.value.reason == reason


def test_names_stay_relative_and_several_folders_stay_apart(tmp_path):
    for name in ("one/a.wav", "one/deep/er/b.FLAC", "two/a.wav", "single.ogg"):
        write(tmp_path / name, music(seed=len(name)))
    (tmp_path / "one" / "notes.txt").write_text("no audio")
    assert run(tmp_path / "out", tmp_path / "one") == EXIT_OK
    assert set(times(tmp_path / "out")) - {"deep", "deep/er"} == {"a.wav", "deep/er/b.wav"}
    assert run(tmp_path / "all", tmp_path / "one", tmp_path / "two", tmp_path / "single.ogg") == EXIT_OK
    assert set(rows(tmp_path / "all")) == {"one/a.wav", "one/deep/er/b.wav", "two/a.wav", "single.wav"}
    assert (tmp_path / "all" / "one" / "a.wav").read_bytes() == (tmp_path / "out" / "a.wav").read_bytes()
    row = rows(tmp_path / "all")["two/a.wav"]
    assert row["source"] == str(tmp_path / "two" / "a.wav")
    assert all(row[name] for name in TABLE_NUMBERS)


def test_bad_input_is_refused_before_anything_is_written(tmp_path):
    folder = tmp_path / "in"
    a = write(folder / "a.wav", music())
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"absent.*not found"):
        run(out, folder, tmp_path / "absent")
    with pytest.raises(UserError, match="lies in the input"):
        run(folder / "out", folder)
    with pytest.raises(UserError, match="lies in the input"):
        run(folder, folder)
    with pytest.raises(UserError, match="overwritten by its own result"):
        run(folder, a)
    with pytest.raises(UserError, match="would both become"):
        run(out, a, write(tmp_path / "other" / "a.flac", music()))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no audio files"):
        run(out, tmp_path / "empty")
    with pytest.raises(UserError, match="no bundle"):
        run(out, folder, config=PostprocessConfig(bundle="papre"))
    assert not out.exists()
    assert times(folder) == {"a.wav": a.stat().st_mtime_ns}
    out.mkdir()
    (out / TABLE).write_text("my,own,table\n")
    with pytest.raises(UserError, match="no table of this command"):
        run(out, folder)


@pytest.mark.parametrize(
    "wrong", [{"lufs": math.nan}, {"lufs": 3}, {"ceiling_dbtp": 1}, {"passes": -1}, {"format": "mp3"}, {"device": "x"}]
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValidationError):
        PostprocessConfig(**wrong)


def test_bad_files_are_rows_and_do_not_stop_the_others(tmp_path, capsys):
    folder, out = tmp_path / "in", tmp_path / "out"
    write(folder / "good.flac", music(2.0))
    write(folder / "nan.wav", np.where(np.arange(RATE) == 99, np.nan, music()))
    write(folder / "short.wav", music(0.4))
    write(folder / "surround.wav", music(channels=6))
    (folder / "[text].mp3").write_text("no music\n" * 99)
    (folder / "empty.wav").write_bytes(b"")
    (folder / "cut.flac").write_bytes((folder / "good.flac").read_bytes()[:20000])
    assert run(out, folder) == EXIT_TOO_MANY_FAILURES
    table = rows(out)
    assert {name: row["reason"] for name, row in table.items()} == {
        "[text].wav": "not_audio",
        "cut.wav": "truncated",
        "empty.wav": "empty_file",
        "good.wav": "",
        "nan.wav": "non_finite",
        "short.wav": "too_short",
        "surround.wav": "channels",
    }
    assert set(times(out)) == {"good.wav"}
    shown = capsys.readouterr().out
    assert "1 of 7 files ok" in shown
    assert all(row["reason"] in shown for row in table.values())
    assert "[text].wav" in shown


def test_only_what_changed_is_made_again(tmp_path, capsys):
    folder, out = tmp_path / "in", tmp_path / "out"
    for name in "abcd":
        write(folder / f"{name}.wav", music(seed=ord(name)))
    assert run(out, folder) == EXIT_OK
    before, table = times(out), rows(out)
    capsys.readouterr()
    assert run(out, folder) == EXIT_OK
    assert "nothing to do: all 4 files" in capsys.readouterr().out
    assert times(out) == before

    (out / SUCCESS).unlink()  # as a launch that was killed leaves it
    (out / "a.wav").unlink()
    write(folder / "b.wav", music(seed=99))
    text = (out / TABLE).read_text().splitlines(keepends=True)
    (out / TABLE).write_text("".join(line for line in text if not line.startswith("c.wav")))  # killed before its row
    assert run(out, folder) == EXIT_OK
    assert "4 of 4 files ok (1 were done before)" in capsys.readouterr().out
    after = times(out)
    assert {name for name in after if after[name] != before[name]} == {"a.wav", "b.wav"}, "c is the same"
    assert {name for name, row in rows(out).items() if row != table[name]} == {"b.wav"}

    with open(out / "d.wav", "r+b") as file:  # not what the table says: a run with other settings was killed
        file.seek(1000)
        file.write(b"other")
    assert run(out, folder) == EXIT_OK
    assert rows(out)["d.wav"] == table["d.wav"]
    assert {name for name, time in times(out).items() if time != after[name]} == {"d.wav"}
    after = times(out)

    assert run(out, folder, config=PostprocessConfig(passes=0, workers=3, device="cpu")) == EXIT_OK
    assert times(out) == after  # neither changes a result
    assert run(out, folder, config=PostprocessConfig(passes=0, lufs=-20)) == EXIT_OK
    assert all(times(out)[name] != after[name] for name in after)


def test_a_file_that_fails_now_leaves_no_stale_result(tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    path = write(folder / "a.wav", music())
    assert run(out, folder) == EXIT_OK
    path.write_bytes(b"broken")
    assert run(out, folder) == EXIT_TOO_MANY_FAILURES
    assert times(out) == {}
    write(path, music())
    assert run(out, folder) == EXIT_OK
    assert set(times(out)) == {"a.wav"}


def test_results_of_another_folder_are_not_overwritten(tmp_path):
    write(tmp_path / "one" / "a.wav", music(seed=1))
    write(tmp_path / "two" / "a.wav", music(seed=2))
    write(tmp_path / "two" / "b.wav", music(seed=3))
    assert run(tmp_path / "out", tmp_path / "one") == EXIT_OK
    with pytest.raises(UserError, match="was made from"):
        run(tmp_path / "out", tmp_path / "two")
    assert run(tmp_path / "out", tmp_path / "two" / "b.wav") == EXIT_OK
    assert set(rows(tmp_path / "out")) == {"a.wav", "b.wav"}


def test_rows_are_kept_when_the_output_cannot_be_written(tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    for name in "ab":
        write(folder / f"{name}.wav", music())
    (out / "b.wav").mkdir(parents=True)
    with pytest.raises(UserError, match="is a folder"):
        run(out, folder, config=PostprocessConfig(passes=0, workers=1))
    assert set(rows(out)) == {"a.wav"}


def test_the_number_of_workers_changes_no_byte(tmp_path):
    folder = tmp_path / "in"
    for i in range(4):
        write(folder / f"{i}.wav", music(1.0 + i / 10, channels=1 + i % 2, seed=i))
    made = []
    for workers in (1, 4):
        out = tmp_path / str(workers)
        config = PostprocessConfig(bundle="debug", passes=1, device="cpu", format="flac", workers=workers)
        assert run(out, folder, config=config) == EXIT_OK
        made.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert made[0] == made[1]
    assert os.path.exists(tmp_path / "1" / "0.flac")


def test_files_that_it_did_not_make_are_never_replaced(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    soundfile.write(tmp_path / "in/a.wav", np.zeros((44100, 1)), 44100)
    (tmp_path / "out/a.wav").write_bytes(b"of somebody")
    with pytest.raises(UserError, match=r"holds a\.wav but no table\.csv"):
        postprocess([str(tmp_path / "in")], str(tmp_path / "out"), PostprocessConfig(passes=0))
    assert (tmp_path / "out/a.wav").read_bytes() == b"of somebody"


@pytest.mark.parametrize("kind", ["corpus", "pool", "sft", "evaluate", "postprocess"])
def test_runs_whose_audio_is_no_input_are_refused(tmp_path, kind):
    (tmp_path / "run/samples").mkdir(parents=True)
    soundfile.write(tmp_path / "run/samples/step-1-0.flac", np.zeros((44100, 1)), 44100)
    if kind == "postprocess":
        inventory.note(Folder.at(str(tmp_path / "run")), kind, [])
    else:
        (tmp_path / "run/run.json").write_text(f'{{"kind": "{kind}"}}')
    with pytest.raises(UserError) as caught:
        postprocess([str(tmp_path / "run")], str(tmp_path / "out"), PostprocessConfig(passes=0))
    assert caught.value.hint
    assert not (tmp_path / "out").exists()
