"""`ttmray score`: the numbers of the corpus job for any file, and a reason for every file that has none."""

import csv
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from ttmray.cli import main
from ttmray.corpus import index
from ttmray.errors import EXIT_BAD_INPUT, EXIT_OK, EXIT_TOO_MANY_FAILURES
from ttmray.evaluation.score import FACTS, _print, sounds_of
from ttmray.storage import Folder

RATE = 44100
CAPTION = "Slow waves of a synthesizer."

Rows = Callable[..., list[dict[str, Any]]]


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """`main` takes over SIGTERM; give it back."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def music(seconds: float, rate: int = RATE, channels: int = 2) -> np.ndarray:
    """(frames, channels) float32: a tone with a beat over noise, other in each channel."""
    t = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(channels).normal(scale=0.02, size=(len(t), channels))
    tone = 0.3 * np.sin(2 * np.pi * 330 * t) * (np.sin(4 * np.pi * t) > 0)
    return (tone[:, None] * np.linspace(1.0, 0.7, channels) + noise).astype(np.float32)


def write(path: Path, audio: np.ndarray, rate: int = RATE) -> str:
    soundfile.write(path, audio, rate, subtype="FLOAT" if path.suffix == ".wav" else "PCM_16")
    return str(path)


@pytest.fixture
def scored(capsys: pytest.CaptureFixture[str]) -> Rows:
    """The rows of `ttmray score FILES... --json`, after checking the exit code against them."""

    def scored(*arguments: str) -> list[dict[str, Any]]:
        capsys.readouterr()
        code = main(["score", "--bundle", "debug", "--json", "--device", "cpu", *arguments])
        shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert code == (EXIT_OK if all(row["status"] == "ok" for row in shown) else EXIT_TOO_MANY_FAILURES)
        return shown

    return scored


@pytest.mark.parametrize("reward_text", ["empty", "caption"])
@pytest.mark.parametrize(("rate", "channels"), [(44100, 2), (48000, 2), (44100, 1)])
def test_a_clips_numbers_are_those_of_the_corpus_job(scored, tmp_path, rate, channels, reward_text):
    songs, run = tmp_path / "songs", tmp_path / "run"
    songs.mkdir()
    file = write(songs / "song.flac", music(10.0, rate, channels), rate)
    (songs / "captions.json").write_text(json.dumps([{"path": "song.flac", "caption": CAPTION}]))
    sets = (f"input={songs}", f"output={run}", "runtime.runner=local", "runtime.workers=0", "runtime.device=cpu")
    rest = ("bundle=debug", "splits.validation=0", "splits.test=0", f"reward_text={reward_text}")
    assert main(["score-corpus", *(part for s in (*sets, *rest) for part in ("--set", s))]) == EXIT_OK
    (row,) = index.read_index(Folder.at(str(run))).to_pylist()

    (shown,) = scored(file, "--caption", CAPTION, "--reward-text", reward_text)
    same = ("clap_score", "lufs", "true_peak_db", "duration_s", "sample_rate", "channels", "protocol")
    # The index holds float32, as the models give them: equal here means equal to the bit.
    assert {name: shown[name] for name in same} == {name: row[name] for name in same}
    assert shown["reward"] == row["reward_score"]
    assert shown["duration_s"] == 10.0


def test_captions_change_the_reward_only_under_their_protocol(scored, tmp_path):
    file = write(tmp_path / "a.flac", music(10.0))
    (plain,) = scored(file)
    assert plain["clap_score"] is None
    (with_caption,) = scored(file, "--caption", CAPTION)
    assert with_caption["reward"] == plain["reward"]
    assert -1 <= with_caption["clap_score"] <= 1
    (by_caption,) = scored(file, "--caption", CAPTION, "--reward-text", "caption")
    assert by_caption["reward"] != plain["reward"]
    assert by_caption["clap_score"] == with_caption["clap_score"]
    assert by_caption["protocol"] != with_caption["protocol"] == plain["protocol"]


def test_a_files_numbers_do_not_depend_on_the_others_nor_on_the_cache(scored, tmp_path):
    files = [write(tmp_path / f"{i}.wav", music(2.0 + i, channels=1 + i % 2)) for i in range(3)]
    together = scored(*files)
    assert [row["file"] for row in together] == files
    assert [row for file in files for row in scored(file)] == together
    assert scored(*reversed(files))[::-1] == together
    cache = ("--cache", str(tmp_path / "cache"))
    assert scored(*files, *cache) == together
    assert any((tmp_path / "cache").rglob("*.npy"))
    assert scored(*files, *cache) == together


@pytest.mark.parametrize(
    ("name", "audio", "rate", "expected"),
    [
        ("silence.flac", np.zeros((5 * RATE, 2), np.float32), RATE, ("rejected", "silent")),
        ("hum.wav", np.full((RATE, 1), 5e-5, np.float32), RATE, ("rejected", "silent")),
        ("opposed.flac", music(1, channels=1) * [1, -1], RATE, ("rejected", "silent")),
        ("int16.wav", music(1) * 32768, RATE, ("rejected", "too_loud")),
        ("huge.wav", music(1) * 1e37, RATE, ("rejected", "too_loud")),
        ("nan.wav", np.where(np.arange(RATE)[:, None] == 99, np.nan, music(1)), RATE, ("failed", "non_finite")),
        ("infinite.wav", np.full((RATE, 2), np.inf, np.float32), RATE, ("failed", "non_finite")),
        ("sample.wav", np.ones((1, 1), np.float32), RATE, ("rejected", "too_short")),
        ("short.flac", music(0.49), RATE, ("rejected", "too_short")),
        ("surround.wav", music(1, channels=6), RATE, ("rejected", "channels")),
        ("slow.wav", music(1, 7999), 7999, ("rejected", "sample_rate")),
        ("fast.wav", music(1, 192_001), 192_001, ("rejected", "sample_rate")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_files_without_a_meaningful_score_have_a_reason(scored, tmp_path, name, audio, rate, expected):
    (row,) = scored(write(tmp_path / name, audio, rate))
    assert (row["status"], row["reason"]) == expected
    assert row["message"]
    assert "reward" not in row


@pytest.mark.parametrize(
    ("seconds", "rate", "channels"),
    [(0.5, RATE, 1), (9.97, RATE, 2), (3, 8000, 1), (3, 11025, 2), (3, 96000, 1), (3, 192_000, 2), (25, 32000, 1)],
)
def test_other_lengths_rates_and_channels_are_scored_under_the_protocol(scored, tmp_path, seconds, rate, channels):
    (row,) = scored(write(tmp_path / "a.wav", music(seconds, rate, channels), rate), "--caption", CAPTION)
    assert (row["status"], row["reason"]) == ("ok", "")
    assert (row["duration_s"], row["sample_rate"], row["channels"]) == (seconds, rate, channels)
    assert np.isfinite([row[name] for name in ("reward", "clap_score", "lufs", "true_peak_db")]).all()
    assert -40 < row["lufs"] < 0


def test_sound_under_the_gate_of_the_loudness_standard_has_a_reward_and_no_loudness(scored, tmp_path):
    (row,) = scored(write(tmp_path / "faint.wav", music(1) * 1e-3))  # about -80 LUFS; the gate is at -70
    assert row["status"] == "ok"
    assert row["lufs"] is None
    assert np.isfinite(row["reward"])


def test_bad_files_do_not_keep_the_others_from_their_scores(scored, tmp_path):
    good = write(tmp_path / "good.flac", music(1.0))
    (tmp_path / "text.mp3").write_text("no music\n" * 99)
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "cut.flac").write_bytes(Path(good).read_bytes()[:20000])
    names = ("text.mp3", "empty.wav", "cut.flac", "absent.wav")
    rows = scored(*(str(tmp_path / name) for name in names), good)
    assert [row["reason"] for row in rows] == ["not_audio", "empty_file", "truncated", "unreadable", ""]
    assert [row["status"] for row in rows] == ["failed"] * 4 + ["ok"]
    assert "absent.wav" in rows[3]["message"]
    assert rows[-1] == scored(good)[0]


def test_the_table_shows_every_file_its_protocol_and_what_the_bundle_is(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "good.flac", music(1.0))
    capsys.readouterr()
    assert main(["score", "--bundle", "debug", "good.flac", "absent.wav", "--device", "cpu"]) == EXIT_TOO_MANY_FAILURES
    out, err = capsys.readouterr()
    (good,) = [line for line in out.splitlines() if "good.flac" in line]
    (absent,) = [line for line in out.splitlines() if "absent.wav" in line and "unreadable" in line]
    assert len([cell for cell in good.split("│") if cell.strip()]) == 6  # file, reward, three facts, status
    assert absent != good
    assert "debug/tj-center-full-int16-empty" in out
    assert "mean nothing" in " ".join(err.split())


def test_file_names_with_brackets_are_shown_as_they_are(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "[live] a[").mkdir()
    write(tmp_path / "[live] a[/b].wav", music(1.0))
    capsys.readouterr()
    assert main(["score", "--bundle", "debug", "[live] a[/b].wav", "--device", "cpu"]) == EXIT_OK
    assert "[live] a[/b].wav" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--bundle", "papre"), "papre"),
        (("--bundle", "paper"), "ttmray weights pull"),
        (("--device", "cuda:9"), "device is cuda:9"),
        (("--batch", "0"), "batch must be"),
        (("--device", "toaster"), "device is toaster"),
    ],
)
def test_bad_arguments_are_one_message_and_exit_code_2(capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.setenv("TTMRAY_WEIGHTS", str(tmp_path / "no weights"))
    file = write(tmp_path / "a.flac", music(1.0))
    capsys.readouterr()
    assert main(["score", "--bundle", "debug", file, *arguments]) == EXIT_BAD_INPUT
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert "Traceback" not in err


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_long_file_says_what_was_heard_and_in_pieces_every_piece_has_its_own_reward(scored, capsys, tmp_path):
    audio = music(26.5)
    long, short = write(tmp_path / "long.wav", audio), write(tmp_path / "short.wav", music(6.0))
    whole, brief = scored(long, short)
    assert (whole["heard"], brief["heard"]) == ("CLAP 8.2 to 18.2 s, MERT all 26.5 s", "")
    pieces = scored("--pieces", long, short, str(tmp_path / "nothing.wav"))
    assert [row["start_s"] for row in pieces] == [0.0, 10.0, 20.0, 0.0, 0.0]
    assert [row["heard"] for row in pieces] == [""] * 5
    assert pieces[4]["status"] == "failed"
    second = scored(write(tmp_path / "second.wav", audio[10 * RATE : 20 * RATE]))
    assert (pieces[1]["reward"], pieces[1]["lufs"]) == (second[0]["reward"], second[0]["lufs"])
    assert pieces[3]["reward"] == brief["reward"]
    capsys.readouterr()
    main(["score", "--bundle", "debug", "--device", "cpu", long])
    assert "--pieces gives one per 10 s" in capsys.readouterr().out


def test_the_hint_at_pieces_has_the_length_of_the_bundles_clips(capsys):
    row = {name: 1.0 for name in (*FACTS, "reward", "clap_score", "start_s")} | {"file": "a.wav", "status": "ok"}
    _print([row | {"heard": "CLAP 8.2 to 18.2 s"}], "protocol", "", 5.0)
    assert "--pieces gives one per 5 s" in capsys.readouterr().out
    _print(
        [row | {"heard": "", "start_s": 0.0, "duration_s": 7.0}], "protocol", "", 5.0
    )  # all of it was heard, as no clip was before
    assert "knows clips of 5 s" in capsys.readouterr().out
    _print([row | {"heard": "", "start_s": 0.0, "duration_s": 5.0}], "protocol", "", 5.0)
    assert "--pieces" not in capsys.readouterr().out


def test_a_folder_is_scored_file_by_file_into_a_csv(capsys, tmp_path):
    (tmp_path / "songs/deep").mkdir(parents=True)
    for name in ("a.flac", "deep/b.wav"):
        write(tmp_path / "songs" / name, music(1.0))
    (tmp_path / "songs/broken.mp3").write_text("nothing\n" * 50)
    (tmp_path / "songs/cover.jpg").write_bytes(b"x")
    out = tmp_path / "scores.csv"
    command = ["score", str(tmp_path / "songs"), "--device", "cpu", "--csv", str(out)]
    assert main(command) == EXIT_TOO_MANY_FAILURES
    rows = rows_of(out)
    assert [(Path(row["file"]).name, row["status"]) for row in rows] == [
        ("a.flac", "ok"), ("broken.mp3", "failed"), ("b.wav", "ok"),
    ]  # fmt: skip
    assert rows[1]["reason"] == "not_audio"
    assert rows[1]["reward"] == ""
    assert np.isfinite(float(rows[0]["reward"]))
    assert "2 of 3 sounds" in capsys.readouterr().out
    assert main(["score", str(tmp_path / "songs/a.flac"), "--csv", str(tmp_path / "x.txt")]) == EXIT_BAD_INPUT
    (tmp_path / "empty").mkdir()
    assert main(["score", str(tmp_path / "empty")]) == EXIT_BAD_INPUT


def test_a_table_names_sounds_beside_it_and_their_captions(tmp_path):
    write(tmp_path / "a.flac", music(1.0))
    write(tmp_path / "b.flac", music(1.0, channels=1))
    (tmp_path / "list.csv").write_text(f"path,caption\na.flac,a harp\n{tmp_path}/b.flac,\n")
    out = tmp_path / "scores.csv"
    command = ["score", str(tmp_path / "list.csv"), "--device", "cpu", "--csv", str(out)]
    assert main(command) == EXIT_OK
    first, second = rows_of(out)
    assert (first["caption"], second["caption"]) == ("a harp", "")
    assert first["clap_score"] != ""
    assert second["clap_score"] == "", "no caption, no CLAP score"
    (tmp_path / "bad.csv").write_text("caption\na harp\n")
    assert main(["score", str(tmp_path / "bad.csv")]) == EXIT_BAD_INPUT


def test_clips_of_a_generation_run_are_scored_against_their_prompts(tmp_path):
    run = str(tmp_path / "run")
    assert (
        main(["generate", "--bundle", "debug", "--prompt", "a harp", "--output", run, "--set", "sampler.steps=1"])
        == EXIT_OK
    )
    ((path, caption, problem),) = sounds_of([run], "")
    assert problem == ""
    assert caption == "a harp"
    assert Path(path).is_file()
    assert sounds_of([run], "other") == [(path, "other", "")]


@pytest.mark.slow  # MERT's attention over 300 s at a time
def test_forty_minutes_are_scored_as_a_whole(scored, tmp_path):
    rate, seconds = 8000, 40 * 60
    noise = np.random.default_rng(0).normal(scale=0.01, size=(seconds * rate, 1)).astype(np.float32)
    noise[rate * 600 : rate * 601] = 0.5
    (row,) = scored(write(tmp_path / "long.flac", noise, rate))
    assert row["status"] == "ok"
    assert row["duration_s"] == seconds
    assert np.isfinite(row["reward"])


@pytest.mark.parametrize("seconds", [5.0, 9.97])
def test_a_file_shorter_than_a_clip_has_the_scores_of_its_padded_clip(scored, tmp_path, seconds):
    wave = music(seconds)
    padded = np.concatenate([wave, np.zeros((10 * RATE - len(wave), wave.shape[1]), wave.dtype)])
    short, whole = write(tmp_path / "short.wav", wave), write(tmp_path / "padded.wav", padded)
    (a,), (b,) = scored(short), scored(whole)
    assert (a["reward"], a["lufs"], a["true_peak_db"]) == (b["reward"], b["lufs"], b["true_peak_db"])
