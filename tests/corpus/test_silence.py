"""Nobody waits without a word: a run that finishes nothing says what it waits for, and what hangs ends its process."""

import multiprocessing
import time

import pytest

from ttmray.corpus import silence
from ttmray.corpus.pipeline import dies_after
from ttmray.corpus.silence import Silence
from ttmray.errors import UserError
from ttmray.storage import Folder


def said(capsys: pytest.CaptureFixture[str], lines: int) -> str:
    """What is printed until there are so many messages."""
    text, deadline = "", time.monotonic() + 30
    while text.count("no unit was finished") < lines and time.monotonic() < deadline:
        time.sleep(0.01)
        text += capsys.readouterr().out
    return " ".join(text.split())


def places() -> str:
    return "a worker of models needs 1 GPUs, and Ray has none"


def test_a_run_that_finishes_nothing_says_what_is_at_work_and_what_is_free(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(silence, "SILENT_S", 0.05)
    others = (f"u00001{i}.models.0" for i in range(9))
    for name in ("u000001.decode.0", "u000001.decode.1", "u000002.models.0", *others):
        Folder(str(tmp_path)).create(f"attempts/{name}", b"")
    with Silence(Folder(str(tmp_path)), places, ends_s=1800):
        text = said(capsys, 2)
    assert (
        "no unit was finished for 0.05 s; at work: u000001 (decode, after 1 killed processes), u000002 "
        "(models), u000010 (models), u000011 (models), u000012 (models) and 6 more; "
        "a worker of models needs 1 GPUs, and Ray has none."
    ) in text
    assert "no unit was finished for 0.1 s" in text
    assert "Where nothing moves for 1800 s (runtime.no_progress_timeout_s), the stages are started again" in text


def test_a_run_that_goes_on_says_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(silence, "SILENT_S", 30)
    with Silence(Folder(str(tmp_path)), places, ends_s=1800) as quiet:
        for _ in range(5):
            quiet.broken()
    assert capsys.readouterr().out == ""


def test_a_store_that_cannot_be_asked_is_what_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(silence, "SILENT_S", 0.05)

    def down(_: Folder) -> list[str]:
        raise UserError("the store does not answer.", "Wait.")

    monkeypatch.setattr(silence, "at_work", down)
    with Silence(Folder(str(tmp_path)), places, ends_s=1800):
        assert "for 0.05 s; the store does not answer.; a worker of models" in said(capsys, 1)


def test_what_takes_too_long_ends_its_process_and_leaves_where_it_stood(capfd):
    def hang() -> None:
        with dies_after(float("inf")):
            pass
        with dies_after(0.1):
            time.sleep(600)

    child = multiprocessing.get_context("fork").Process(target=hang)
    child.start()
    child.join(timeout=60)
    assert child.exitcode == 1
    assert "in hang" in capfd.readouterr().err
