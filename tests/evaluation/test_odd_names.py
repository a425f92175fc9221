"""File names that no table can hold: one failed file each, of every command that takes folders of audio."""

import csv
import io
import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

from ttmray.cli import main
from ttmray.errors import EXIT_BAD_INPUT, EXIT_OK, EXIT_TOO_MANY_FAILURES

ODD = [b"line\nbreak", b"tab\tstop", b"carriage\rreturn", b"back\\slash", b"caf\xe9", b"a\x1b[31m"]
GOOD = ("a.wav", "b.wav")


def tone(seconds: float = 1.0, pitch: float = 220.0) -> np.ndarray:
    """(samples,) float32 at 44.1 kHz."""
    return (0.2 * np.sin(2 * np.pi * pitch * np.arange(round(seconds * 44_100)) / 44_100)).astype(np.float32)


@pytest.fixture
def songs(tmp_path: Path) -> Path:
    """Two good files, a file of every odd name, and one of a good name in a folder of an odd one."""
    folder = tmp_path / "songs"
    folder.mkdir()
    sink = io.BytesIO()
    soundfile.write(sink, tone(), 44_100, format="WAV")
    for i, name in enumerate(GOOD):
        soundfile.write(folder / name, tone(pitch=200.0 * (i + 1)), 44_100)
    for name in ODD:
        Path(os.fsdecode(bytes(folder) + b"/" + name + b".wav")).write_bytes(sink.getvalue())
    (folder / "new\nalbum").mkdir()
    (folder / "new\nalbum/c.wav").write_bytes(sink.getvalue())
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts.csv"
    path.write_text("id,prompt\na,calm piano\nb,loud drums\nc,a choir\n")
    return str(path)


def test_scores_of_a_folder_have_a_rejected_row_per_odd_name(songs, tmp_path, capsys):
    out = tmp_path / "scores.csv"
    assert main(["score", str(songs), "--bundle", "debug", "--csv", str(out)]) == EXIT_TOO_MANY_FAILURES
    rows = list(csv.DictReader(io.StringIO(out.read_bytes().decode())))
    good = [row for row in rows if row["status"] == "ok"]
    assert [row["file"].rpartition("/")[2] for row in good] == list(GOOD)
    bad = [row for row in rows if row["status"] != "ok"]
    assert len(bad) == len(ODD) + 1
    assert {row["reason"] for row in bad} == {"bad_name"}
    assert all(row["file"].isprintable() for row in bad)
    odd = os.fsdecode(bytes(songs) + b"/" + ODD[4] + b".wav")
    capsys.readouterr()
    assert main(["score", odd, "--bundle", "debug", "--json"]) == EXIT_TOO_MANY_FAILURES
    assert json.loads(capsys.readouterr().out)["reason"] == "bad_name"


def test_an_evaluation_has_a_failed_clip_where_the_name_of_its_file_is_odd(songs, prompts, tmp_path, capsys):
    words = ["evaluate", f"songs={songs}", "--prompts", prompts, "--output", str(tmp_path / "out"), "--bundle", "debug"]
    assert main([*words, "--set", "max_failures=1"]) == EXIT_OK
    rows = pq.read_table(tmp_path / "out/clips.parquet").to_pylist()
    assert [(row["prompt_id"], row["status"], row["reason"] or "") for row in rows] == [
        ("a", "ok", ""),
        ("b", "ok", ""),
        ("c", "failed", "bad_name"),
    ]
    assert "6 files belong to no prompt" in capsys.readouterr().out
    soundfile.write(songs / "c.wav", tone(), 44_100)
    assert main(words) == EXIT_OK, "a good file of the same prompt is the clip"


def test_a_reference_set_counts_odd_names_among_its_failures(songs, tmp_path, capsys):
    words = ["reference", "build", "r", str(songs), "--bundle", "debug", "--store", str(tmp_path / "store")]
    assert main(words) == EXIT_TOO_MANY_FAILURES
    assert "bad_name" in capsys.readouterr().out
    assert main([*words, "--max-failures", str(len(ODD) + 1)]) == EXIT_OK
    about = json.loads((tmp_path / "store/r/reference.json").read_text())
    assert (about["n"], about["failed"]) == (2, len(ODD) + 1)


def test_post_processing_has_a_rejected_row_per_odd_name_and_finishes_the_rest(songs, tmp_path, capsys):
    words = ["postprocess", str(songs), "--output", str(tmp_path / "out"), "--set", "passes=0"]
    assert main(words) == EXIT_TOO_MANY_FAILURES
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out/table.csv").read_bytes().decode(), newline="")))
    assert [row["file"] for row in rows if row["status"] == "ok"] == list(GOOD)
    assert [row["reason"] for row in rows if row["status"] == "rejected"] == ["bad_name"] * (len(ODD) + 1)
    assert all((tmp_path / "out" / name).is_file() for name in GOOD)
    capsys.readouterr()
    assert main(words) == EXIT_TOO_MANY_FAILURES
    assert "nothing to do" in capsys.readouterr().out


def test_the_challenges_metrics_are_of_the_files_whose_names_can_be_used(songs, prompts, tmp_path, capsys):
    words = ["attm", "evaluate", f"mine={songs}", "--reference", str(songs), "--prompts", prompts]
    words += ["--out", str(tmp_path / "out"), "--bundle", "debug"]
    assert main(words) == EXIT_TOO_MANY_FAILURES
    result = json.loads((tmp_path / "out/attm.json").read_text())
    (row,) = result["systems"]
    assert (row["clips"], row["failed"], row["missing"]) == (2, len(ODD), 1)  # it looks into no folder below
    assert all("bad_name" in why for why in result["unused"]["mine"].values())
    assert "is left out: bad_name" in capsys.readouterr().out


def test_a_submission_lists_odd_names_as_problems(songs, prompts, tmp_path, capsys):
    words = ["attm", "submit", str(songs), "--prompts", prompts, "--out", str(tmp_path / "out.zip"), "--seconds", "1"]
    assert main(words) == EXIT_BAD_INPUT
    printed = capsys.readouterr().out
    assert printed.count("bad_name") == len(ODD) + 1
    assert not (tmp_path / "out.zip").exists()
