"""The folder of a small world, its table of truth, and the page of examples."""

import io
import json
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from PIL import Image

from ttmray.audio.io import decode
from ttmray.audio.limits import AudioLimits
from ttmray.errors import UserError
from ttmray.generation.manifest import SCHEMA, commit
from ttmray.storage import Folder
from ttmray.synth import page
from ttmray.synth.faults import KINDS
from ttmray.synth.instruments import RATE
from ttmray.synth.piece import STEMS
from ttmray.synth.world import clip, cut, encoded, main, song, write_world

SEED = 61


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    target = tmp_path_factory.mktemp("world")
    assert main([str(target), "--pieces", "2", "--seed", str(SEED), "--seconds", "11", "--clips", "5", "--stems"]) == 0
    return target


def test_files_table_and_captions_agree(folder):
    rows = pq.read_table(folder / "world.parquet").to_pylist()
    captions = json.loads((folder / "songs/captions.json").read_text())
    assert [row["path"] for row in rows] == [f"songs/{row['path']}" for row in captions]
    assert [row["key"] for row in rows] == ["000000_0", "000000_1", "000001_0", "000001_1"]
    for row in rows:
        audio, rate = decode(folder / row["path"], AudioLimits(min_duration_s=1))
        assert (rate, audio.shape) == (RATE, (2, 5 * RATE))
        assert {f"fault_{kind}" for kind in KINDS} <= row.keys()
        assert row["tempo_word"] in ("slow", "medium", "fast")
        assert row["caption"] != row["caption_unseen"]
        stems = [decode(folder / f"stems/{row['key']}/{stem}.wav", AudioLimits(min_duration_s=1))[0] for stem in STEMS]
        np.testing.assert_allclose(sum(stems), audio, atol=5 * 2**-16)


def test_what_is_written_is_what_is_made_in_memory(folder):
    item = list(cut(SEED, 1, 5.0, seconds=11.0))[1]
    audio, _ = decode(folder / "songs/000001_1.wav", AudioLimits(min_duration_s=1))
    np.testing.assert_allclose(audio, item.mix, atol=2**-15)
    row = pq.read_table(folder / "world.parquet").to_pylist()[3]
    assert (row["quality"], row["caption"]) == (item.quality, item.caption)


@pytest.mark.parametrize("format", ["flac", "ogg", "mp3"])
def test_other_formats_hold_the_same_music(format, tmp_path):
    item = song(SEED, 3, seconds=6.0)
    audio, rate = soundfile.read(io.BytesIO(encoded(item.mix, format)), always_2d=True)
    assert rate == RATE
    assert abs(len(audio) - 6 * RATE) < 3000
    assert np.sqrt(np.mean(audio**2)) == pytest.approx(np.sqrt(np.mean(item.mix**2)), rel=0.1)


def test_no_two_pieces_sound_alike():
    """By fingerprints of the audio: energies in 32 bands over time, compared at every shift up to a second."""
    prints = []
    for index in range(24):
        mono = clip(SEED, index, 5.0, faults={}).mix.mean(axis=0)
        frames = mono[: 5 * RATE // 2048 * 2048].reshape(-1, 2048) * np.hanning(2048)
        power = np.abs(np.fft.rfft(frames, axis=1)) ** 2
        edges = np.unique(np.geomspace(3, 1024, 33).astype(int))
        bands = np.log(np.add.reduceat(power, edges[:-1], axis=1) + 1e-6)
        prints.append((bands - bands.mean(axis=0)) / (bands.std(axis=0) + 1e-6))
    for i, first in enumerate(prints):
        assert alike(first, first[10:]) > 0.95
        for second in prints[:i]:
            assert alike(first, second) < 0.75


def alike(first, second) -> float:
    """Highest correlation over shifts."""
    size = min(len(first), len(second)) - 22
    return max(float(np.corrcoef(first[i : i + size].ravel(), second[:size].ravel())[0, 1]) for i in range(22))


def test_clips_of_one_song_differ_and_a_clip_has_the_attributes_of_its_place():
    clips = list(cut(SEED, 5, 5.0))
    assert len(clips) == int(clips[0].piece.seconds / 5)
    assert len({item.caption for item in clips}) > 1
    for item in clips:
        assert item.mix.any()
        assert bool(item.heard.voice) <= bool(item.stems["vocals"].any())


def test_the_place_of_a_clip_must_be_in_the_piece():
    with pytest.raises(ValueError, match="no clip starts at 90"):
        clip(SEED, 0, start=90.0)
    with pytest.raises(TypeError):
        clip(SEED, 0, colour="red")


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--pieces", "0"], "--pieces is 0"), (["--seconds", "-1"], "--seconds is -1"), (["--clips", "inf"], "--clips")],
)
def test_the_command_refuses_what_cannot_be(flags, message, tmp_path):
    with pytest.raises(UserError, match=message):
        main([str(tmp_path / "out"), *flags])
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="no audio format"):
        write_world(str(tmp_path / "out"), iter([]), format="aiff")


def test_songs_shorter_than_a_clip_are_written_whole(tmp_path):
    assert main([str(tmp_path), "--pieces", "2", "--seconds", "0.4", "--clips", "5"]) == 0
    assert [row["seconds"] for row in pq.read_table(tmp_path / "world.parquet").to_pylist()] == [0.4, 0.4]


@pytest.mark.slow
def test_the_corpus_job_reads_a_world(folder, tmp_path):
    settings = f"input={folder}/songs", f"output={tmp_path}/run", "splits.validation=0", "splits.test=0"
    command = [sys.executable, "jobs/score_corpus.py", "--config", "configs/debug/corpus.yaml", "--plan-only"]
    done = subprocess.run([*command, *(f"--set={name}" for name in settings)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usable tracks            4" in done.stdout
    assert "captions matched: 4" in done.stdout + done.stderr


@pytest.mark.slow
def test_the_page_has_players_pictures_and_the_truth_and_generated_clips(tmp_path):
    run = Folder.at(str(tmp_path / "run"))
    for name, score in (("a", -1.0), ("b", None)):
        run.write(f"clips/{name}.flac", encoded(clip(SEED, 3, 2.0).mix, "flac"))
        row = {"name": name, "prompt": "slow <organ>", "score": score, "reward_score": 0.5}
        commit(run, dict.fromkeys(SCHEMA.names) | row | {"file": f"clips/{name}.flac"})
    out = tmp_path / "page"
    assert page.main([str(out), "--pieces", "2", "--seed", str(SEED), "--generated", run.uri]) == 0
    text = (out / "index.html").read_text()
    assert text.count("<audio") == 2 + 3 * len(KINDS) + 2
    for name in ("piece000", "clipping100", "detune020"):
        assert (out / f"audio/{name}.ogg").stat().st_size > 10_000
        assert f"audio/{name}.ogg" in text
    assert all(kind in text for kind in KINDS)
    assert "asked for -1.00: slow &lt;organ&gt;" in text
    tile = Image.open(out / "spectra/run-a.png").size[0]
    assert 2 * tile < Image.open(out / "generated.png").size[0] < 4 * tile


def test_a_run_without_clips_is_no_part_of_a_page(tmp_path):
    with pytest.raises(UserError, match="no generated clips"):
        page.write_page(str(tmp_path / "page"), SEED, 1, [str(tmp_path)])


def test_a_page_of_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match="--pieces is 0"):
        page.main([str(tmp_path), "--pieces", "0"])
