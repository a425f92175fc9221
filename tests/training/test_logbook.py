"""One line per logged step, whatever was interrupted, in folders and buckets."""

import json
import os
import subprocess
import sys
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ttmray.errors import UserError
from ttmray.storage import Folder
from ttmray.training.logbook import METRICS, Logbook, read_lines, show


def steps(out: Folder) -> list[int]:
    return [json.loads(line)["step"] for line in out.read(METRICS).decode().splitlines()]


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 400), st.integers(0, 9)), max_size=4))
def test_no_step_is_logged_twice_or_lost_whatever_is_cut_off(tmp_path_factory, launches):
    """Each launch logs some steps, loses the end of its file, and has its newest checkpoint at some step before."""
    out = Folder.at(str(tmp_path_factory.mktemp("run")))
    done = 0
    for more, cut, back in launches:
        with Logbook(out, done, tensorboard=False) as book:
            for step in range(done + 1, done + more + 1):
                book.write({"step": step, "loss": 1 / step})
        data = out.read(METRICS)
        assert steps(out) == list(range(1, done + more + 1))
        lost = min(cut, len(data))
        out.write(METRICS, data[: len(data) - lost] + b"\xff{" * (lost > 0))
        intact = data[: len(data) - lost].count(b"\n")
        done = max(min(done + more - back, intact), 0)
    with Logbook(out, done, tensorboard=False):
        pass
    assert steps(out) == list(range(1, done + 1))


def test_lines_are_there_while_the_run_goes_on(tmp_path):
    out = Folder.at(str(tmp_path))
    with Logbook(out, 0, tensorboard=False) as book:
        book.write({"step": 1})
        assert steps(out) == [1]
        book.flush()
        book.write({"step": 2})
        assert steps(out) == [1, 2]


def test_a_line_that_a_kill_has_cut_is_not_read(tmp_path):
    out = Folder.at(str(tmp_path))
    out.write(METRICS, b'{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_lines(out) == [{"step": 1, "loss": 2.0}]


def test_what_is_taken_out_is_cut_off_and_the_file_never_replaced(tmp_path):
    """On a drive whose renames are not atomic, whoever is killed while a file is replaced has lost it."""
    out = Folder.at(str(tmp_path))
    with Logbook(out, 0, tensorboard=False) as book:
        for step in (1, 2, 3):
            book.write({"step": step})
    with open(out.path(METRICS), "ab") as file:
        file.write(b'{"step": 4, "lo')
    before = os.stat(out.path(METRICS)).st_ino
    with Logbook(out, 2, tensorboard=False) as book:
        assert steps(out) == [1, 2]
        book.write({"step": 3})
    assert steps(out) == [1, 2, 3]
    assert os.stat(out.path(METRICS)).st_ino == before


def test_a_bucket_has_all_lines_from_a_flush_on(bucket):
    out = Folder.at(f"{bucket}/logbook")
    with Logbook(out, 0, tensorboard=True) as book:  # events need a local folder and are left out
        book.write({"step": 1})
        book.flush()
        book.write({"step": 2})
        assert steps(out) == [1]
    assert steps(out) == [1, 2]
    with Logbook(out, 1, tensorboard=False) as book:
        book.write({"step": 2, "again": True})
    assert steps(out) == [1, 2]
    assert [entry.name for entry in out.files()] == [METRICS]


def test_tensorboard_has_the_numbers_and_forgets_what_is_made_again(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out = Folder.at(str(tmp_path))
    with Logbook(out, 0, tensorboard=True) as book:
        for step in (1, 2, 3):
            book.write({"step": step, "loss": 1.0, "levels": [1], "keys": "abc"})
    time.sleep(1.1)  # files of events are named by the second, and are read in the order of their names
    with Logbook(out, 1, tensorboard=True) as book:
        book.write({"step": 2, "loss": 2.0})
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 2.0)]


def test_without_tensorboard_a_run_only_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with Logbook(Folder.at(str(tmp_path)), 0, tensorboard=True) as book:
        book.write({"step": 1})
    assert "ttmray[track]" in capsys.readouterr().out
    assert not (tmp_path / "tensorboard").exists()


def launch_with_wandb(folder, step: int, **environment: str) -> subprocess.CompletedProcess:
    """A process of its own: W&B remembers its mode for the life of one."""
    code = f"""
from ttmray.storage import Folder
from ttmray.training.logbook import Logbook
with Logbook(Folder.at({str(folder)!r}), {step - 1}, tensorboard=False, wandb="songs") as book:
    book.write({{"step": {step}, "loss": 1.0, "winner_loss": 2.0, "keys": "abc"}})
"""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    whole = plain | {"NETRC": str(folder / "none"), "HOME": str(folder)} | environment
    return subprocess.run(
        [sys.executable, "-c", code], env=whole, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
    )


def test_weights_and_biases_gets_the_numbers_under_one_run_for_all_launches(tmp_path):
    """Offline, which is what happens up to the upload."""
    pytest.importorskip("wandb")
    out = Folder.at(str(tmp_path))
    out.write("run.json", b'{"created": "now", "config": {"batch": 64}}')
    for step in (1, 2):
        done = launch_with_wandb(tmp_path, step, WANDB_MODE="offline")
        assert done.returncode == 0, done.stderr
    logs = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert len({log.name for log in logs}) == 1  # its id is in the name
    assert all(b"winner_loss" in log.read_bytes() for log in logs)
    assert steps(out) == [1, 2]


def test_weights_and_biases_that_cannot_start_is_one_message(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    done = launch_with_wandb(tmp_path, 1)
    assert "UserError: Weights & Biases did not start: No API key" in done.stderr
    assert "wandb login" in done.stderr
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"ttmray\[wandb\]"):
        Logbook(Folder.at(str(tmp_path)), 0, tensorboard=False, wandb="songs")


def test_a_line_for_people(capsys):
    values = {"step": 50, "loss": 1.23456, "lr": 1e-4, "grad_norm": 0.5, "samples_per_s": 71.23, "mfu": 0.451}
    show(values | {"data_wait": 0.0123, "eta_s": 3661.4, "margin": 0.25}, 200, ["margin"])
    expected = "step 50/200 | loss 1.2346 | lr 0.0001 | grad_norm 0.5 | 71.2 samples/s | MFU 45.1% | data wait 1.2% | "
    assert capsys.readouterr().out == expected + "ETA 1:01:01 | margin 0.25\n"


def test_a_share_of_more_than_there_is_is_no_number(capsys):
    show({"step": 1, "loss": 1.0, "samples_per_s": 1.0, "mfu": 1.563, "data_wait": 0.0, "eta_s": 0.0}, 2)
    assert "156" not in (out := capsys.readouterr().out)
    assert "MFU not known" in out
