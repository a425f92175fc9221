"""One line per logged step, whatever was interrupted, in folders and buckets."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ttmray.storage import Folder
from ttmray.training.logbook import METRICS, Logbook, show


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


def test_a_line_for_people(capsys):
    values = {"step": 50, "loss": 1.23456, "lr": 1e-4, "grad_norm": 0.5, "samples_per_s": 71.23, "mfu": 0.451}
    show(values | {"data_wait": 0.0123, "eta_s": 3661.4, "margin": 0.25}, 200, ["margin"])
    expected = "step 50/200 | loss 1.2346 | lr 0.0001 | grad_norm 0.5 | 71.2 samples/s | MFU 45.1% | data wait 1.2% | "
    assert capsys.readouterr().out == expected + "ETA 1:01:01 | margin 0.25\n"
