"""The fuzzing program: a few of its inputs here, and that it sees what it is there for."""

import os
import signal
import time

import fuzz
import pytest
from fuzz_kinds import KINDS, Kind

from ttmray.errors import UserError


def test_damaged_input_of_every_kind_is_taken_or_refused(capfd):
    tallies = fuzz.run(2 * len(KINDS), 20, list(KINDS), print)
    assert not [tally.faults for tally in tallies.values() if tally.faults]
    assert {tally.inputs for tally in tallies.values()} == {2}


def _raises(data, folder):
    raise KeyError("no message for people")


def _dies(data, folder):
    os.kill(os.getpid(), signal.SIGKILL)


def _sleeps(data, folder):
    time.sleep(30)


def _strays(data, folder):
    (folder.parent / "stray").write_bytes(data)
    raise UserError("refused")


@pytest.mark.parametrize(
    ("reader", "fault"), [(_raises, "KeyError"), (_dies, "ends with -9"), (_sleeps, "longer than"), (_strays, "beside")]
)
def test_what_no_reader_may_do_is_a_fault(monkeypatch, reader, fault):
    monkeypatch.setattr(fuzz, "SECONDS", 0.3)
    monkeypatch.setitem(KINDS, "bad", lambda: Kind([b"valid"], reader))
    said = []
    tally = fuzz.run(1, 0, ["bad"], said.append)["bad"]
    assert tally.inputs == 1
    assert fault in tally.faults[0]
    assert said[0].startswith("seed 0, input 0: ")


def test_seed_and_number_make_an_input_again():
    first, again, other = (fuzz.made(seed, 3, ["csv", "configs"]) for seed in (5, 5, 6))
    assert first == again
    assert first != other
    assert first[0] == "configs"


def test_a_file_that_strays_is_the_fault_of_one_input(monkeypatch):
    once = iter([_strays])
    monkeypatch.setitem(KINDS, "bad", lambda: Kind([b"valid"], lambda *both: next(once, lambda *_: None)(*both)))
    assert len(fuzz.run(5, 0, ["bad"], lambda line: None)["bad"].faults) == 1
