"""The log of units: what a look at a run in progress reads instead of every unit."""

import json
import shutil

import pytest

from ttmray import cost
from ttmray.corpus import index, unit_log
from ttmray.corpus.finalise import finalise
from ttmray.corpus.job import score_corpus
from ttmray.corpus.plan import Plan
from ttmray.corpus.unit import FAILED, OK, Unit
from ttmray.corpus.unit_log import LOG, UNITS, UnitLog
from ttmray.errors import UserError
from ttmray.status import status
from ttmray.storage import Folder


def unit(number: int, *statuses: str) -> Unit:
    rows = [{"key": f"t_{i}", "segment": i, "status": status} for i, status in enumerate(statuses)]
    timing = {"score": {"wall_s": 1.5, "cpu_s": 1.0, "clips": len(rows), "rows_in": len(rows), "rows_out": 1}}
    return Unit(f"u{number:06d}", [], rows, timing=timing)


@pytest.fixture
def run(tmp_path) -> Folder:
    return Folder.at(str(tmp_path))


def test_a_launch_that_dies_has_logged_all_but_its_last_second(run, clock, monkeypatch):
    monkeypatch.setattr(unit_log, "time", clock)
    clock.time_ns = lambda: 1
    log = UnitLog(run, clock.time())
    for number in range(6):
        log.add(unit(number, OK, FAILED))
        clock.pass_s(0.4)
    lines = unit_log.read(run)  # nobody has closed it
    assert list(lines) == [f"u{number:06d}" for number in range(4)]
    assert unit_log.counts(lines.values()) == {OK: 4, FAILED: 4, "rejected": 0}


def test_the_end_makes_one_file_with_the_last_line_of_every_unit_in_order(run):
    for launch in (1.0, 2.0):
        with UnitLog(run, launch) as log:
            for number in (2, 0):
                log.add(unit(number, OK))
    assert len(run.files(LOG)) == 2
    times = unit_log.gather(run, ["u000000", "u000001", "u000002"]).stages
    lines = [json.loads(line) for line in run.read(UNITS).splitlines()]
    assert [(line["unit"], line["since"]) for line in lines] == [("u000000", 2.0), ("u000002", 2.0)]
    assert run.files(LOG) == []
    assert times == {"score": {"wall_s": 3.0, "cpu_s": 2.0, "clips": 2, "rows_in": 2, "rows_out": 2}}
    unit_log.gather(run, ["u000000", "u000002"])
    assert len(run.read(UNITS).splitlines()) == 2


def test_the_end_says_how_many_units_waited_and_worked_and_what_gpus_did(finished_run, tmp_path):
    """Two launches of 10 and 20 s: their seconds are what averages are over."""
    run = Folder.at(str(shutil.copytree(finished_run, tmp_path / "copy")))
    names = index.committed_units(run)
    ends = [(1000.0, 1010.0), (2000.0, 2015.0), (2000.0, 2020.0)]
    lines = [
        {"unit": name, "at": at, "since": since, "clips": 2, "rows": {OK: 2}}
        | {"stages": {"score": {"wall_s": 9.0, "waited_s": 6.0, "gpu_s": 9.0, "clips": 2}, "decode": {"wall_s": 3.0}}}
        for name, (since, at) in zip(names, ends, strict=True)
    ]
    run.write(UNITS, "\n".join(map(json.dumps, lines)).encode())
    run.write(cost.COST, json.dumps(cost.read(run) | {"gpu_seconds": 54.0}).encode())
    summary = finalise(run, Plan.load(run), json.loads(run.read("run.json")), 0.0)
    score, decode = summary["stages"]["score"], summary["stages"]["decode"]
    assert (score["queue"], score["at_work"], decode["queue"], decode["at_work"]) == (0.6, 0.9, 0.0, 0.3)
    assert summary["gpus"] == {"held_s": 54.0, "work_s": 27.0, "use": 0.5}
    text = run.read("summary.md").decode()
    assert "score: 4500 ms per clip (0 ms CPU), 0.6 units waiting for it" in text
    assert text.count("waiting for it") == 1
    assert "GPUs: at work for 50% of the 54 s that they were held" in text


def test_a_long_launch_writes_files_of_bounded_size(run, monkeypatch):
    monkeypatch.setattr(unit_log, "LINES", 3)
    with UnitLog(run, 0.0) as log:
        for number in range(7):
            log.add(unit(number, OK))
    assert [len(run.read(f"{LOG}/{file.name}").splitlines()) for file in run.files(LOG)] == [3, 3, 1]
    assert len(unit_log.read(run)) == 7


def test_a_damaged_line_counts_as_not_logged(run):
    with UnitLog(run, 0.0) as log:
        log.add(unit(1, OK))
        log.add(unit(2, OK))
    (file,) = run.files(LOG)
    first, second = run.read(f"{LOG}/{file.name}").splitlines()
    run.write(f"{LOG}/{file.name}", first[:40] + b"\n[]\n" + second + b"\n")
    assert list(unit_log.read(run)) == ["u000002"]


def test_why_a_launch_ends_is_not_hidden_by_a_log_that_cannot_be_written(run, monkeypatch):
    def full(*_):
        raise UserError("the disk is full")

    def launch():
        with UnitLog(run, 0.0) as log:
            log.add(unit(1, OK))
            monkeypatch.setattr(Folder, "write", full)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launch()


def line(at: float, since: float, clips: int = 10) -> dict:
    return {"at": at, "since": since, "clips": clips}


def test_the_rate_is_that_of_the_last_minutes_of_the_last_launch():
    assert unit_log.rate([]) is None
    assert unit_log.rate([line(100, 0), line(5010, 5000), line(5020, 5000)]) == (1.0, 5020)
    assert unit_log.rate([line(100, 0, 10**6), line(2500, 0, 300), line(3000, 0, 300)]) == (1.0, 3000)


def test_status_of_a_run_in_progress_reads_units_only_where_a_kill_cost_their_lines(
    songs, make_config, tmp_path, monkeypatch, capsys
):
    config = make_config(songs, tmp_path / "run")
    assert score_corpus(config) == 0
    run = Folder.at(config.output)
    summary = json.loads(run.read("summary.json"))
    assert summary["stages"]["decode"] | {"wall_s": 0, "cpu_s": 0} == summary["stages"]["decode"] | {
        **{"wall_s": 0, "cpu_s": 0, "rows_in": 5, "rows_out": 5, "rejected": 0, "failed": 1}
    }
    measured = summary["stages"]["measure"]
    assert (measured["rows_in"], measured["rows_out"], measured["rejected"]) == (5, 4, 1)
    assert summary["stages"]["write"]["rows_out"] == 4
    run.delete("_SUCCESS.json")
    run.delete("index.parquet")
    lines = run.read(UNITS).splitlines(keepends=True)
    read = []
    read_units = index.read_units
    monkeypatch.setattr(index, "read_units", lambda run, names: read.extend(names) or read_units(run, names))
    for lost in (0, 1):
        run.write(UNITS, b"".join(lines[lost:]))
        read.clear()
        capsys.readouterr()
        assert status(config.output) == 0
        text = capsys.readouterr().out
        assert "    ok: 4\n    rejected: 1\n    failed: 1\n" in text
        assert "clips/s lately; at this rate 0:00:00 are left; the last unit was 0:00:" in text
        assert len(read) == lost
