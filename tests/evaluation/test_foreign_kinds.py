"""AAC, ALAC in MP4, WMA and Opus: whatever takes folders of audio takes what the corpus job takes, to the same limits,
and where PyAV is not installed each file has the same reason of its own."""

import csv
import importlib.util
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ttmray.audio.clip import read_clip, read_whole
from ttmray.audio.io import AUDIO_EXTENSIONS
from ttmray.cli import main
from ttmray.corpus.catalogue import build_catalogue
from ttmray.corpus.config import CatalogueConfig
from ttmray.errors import EXIT_OK, EXIT_TOO_MANY_FAILURES, ClipError
from ttmray.evaluation import fadtk
from ttmray.evaluation.score import sounds_of
from ttmray.evaluation.systems import audio_files, find_systems
from ttmray.generation.prompts import read_prompts
from ttmray.models.clap import debug_clap
from ttmray.ranker.features import read_clip as ranker_clip
from ttmray.recipes.attm import Rules, _sound_problems
from ttmray.storage import Folder

RATE = 48_000
PYAV = {"a.m4a": ("ipod", "aac"), "b.aac": ("adts", "aac"), "c.wma": ("asf", "wmav2")}
NAMES = [*PYAV, "d.opus"]


def encoded(container: str, codec: str, wave: np.ndarray) -> bytes:
    """A mono file of samples (n,) by PyAV."""
    av = pytest.importorskip("av", reason="PyAV is an extra: pip install 'ttmray[av]'")
    sink = io.BytesIO()
    with av.open(sink, "w", format=container) as out:
        stream = out.add_stream(codec, rate=RATE, layout="mono")
        stream.bit_rate = 64_000
        for start in range(0, len(wave), 1024):
            frame = av.AudioFrame.from_ndarray(wave[None, start : start + 1024], format="fltp", layout="mono")
            frame.rate, frame.pts = RATE, start
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return sink.getvalue()


@pytest.fixture(scope="module")
def songs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One second of a tone in every kind; do not change it."""
    folder = tmp_path_factory.mktemp("songs")
    wave = (0.3 * np.sin(2 * np.pi * 330 * np.arange(RATE) / RATE)).astype(np.float32)
    for name, how in PYAV.items():
        (folder / name).write_bytes(encoded(*how, wave))
    soundfile.write(folder / "d.opus", wave, RATE, format="OGG", subtype="OPUS")
    return folder


def without_pyav(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "av" else spec(name, *a))


def test_every_list_of_audio_has_what_the_catalogue_has(songs, tmp_path):
    catalogue = [track.path for track in build_catalogue(str(songs), CatalogueConfig()).tracks]
    assert catalogue == NAMES == audio_files(Folder(str(songs))) == fadtk.files_of(Folder(str(songs)))
    assert [Path(sound.path).name for sound in sounds_of([str(songs)], "")] == NAMES
    (tmp_path / "prompts.csv").write_text("id,prompt\n" + "".join(f"{name[0]},x\n" for name in NAMES))
    (system,) = find_systems([str(songs)], read_prompts(str(tmp_path / "prompts.csv")))
    assert [Path(str(clip.path)).name for clip in system.clips] == NAMES
    assert {".m4a", ".aac", ".wma", ".opus"} <= AUDIO_EXTENSIONS


@pytest.mark.parametrize("name", NAMES)
def test_every_reader_of_clips_takes_it_and_gives_the_same_reason_without_pyav(songs, name, monkeypatch):
    path = str(songs / name)
    read: dict[str, Callable[[], object]] = {
        "score, evaluate, reference": lambda: read_clip(path).mono(),
        "ranker": lambda: ranker_clip(path),
        "attm evaluate": lambda: read_whole(path),
    }
    for reader in read.values():
        assert reader() is not None
    assert read_clip(path).facts["duration_s"] == pytest.approx(1.0, abs=0.15)
    rules = Rules(seconds=0.0)
    assert "not 0 s" in " ".join(_sound_problems(Folder(str(songs)), name, rules, {})), "it was decoded"
    without_pyav(monkeypatch)
    for what, reader in read.items():
        if name in PYAV:
            with pytest.raises(ClipError) as caught:
                reader()
            assert (caught.value.status, caught.value.reason) == ("failed", "no_decoder"), what
        else:
            assert reader() is not None, what
    assert ("no_decoder" in " ".join(_sound_problems(Folder(str(songs)), name, rules, {}))) == (name in PYAV)


def test_post_processing_and_the_challenges_metrics_do_what_they_can_without_pyav(songs, tmp_path, monkeypatch):
    words = ["postprocess", str(songs), "--no-separation", "--output"]
    assert main([*words, str(tmp_path / "all")]) == EXIT_OK
    clap = debug_clap(1)
    assert fadtk.folder_statistics(clap, Folder(str(songs)), "songs")[1:] == (len(NAMES), {})
    without_pyav(monkeypatch)
    assert main([*words, str(tmp_path / "some")]) == EXIT_TOO_MANY_FAILURES
    rows = list(csv.DictReader((tmp_path / "some/table.csv").open(newline="")))
    assert [row["reason"] for row in rows] == ["no_decoder"] * len(PYAV) + [""]
    _, count, failed = fadtk.folder_statistics(clap, Folder(str(songs)), "songs")
    assert count == 1
    assert all(why.startswith("no_decoder: ") for why in failed.values())
    assert list(failed) == list(PYAV)
