"""How far a run is, whatever its kind, from its files alone."""

import json

import pytest

from ttmray import cost, runs
from ttmray.cli import main
from ttmray.config import Config
from ttmray.errors import UserError
from ttmray.recipes.chain import Step, run_chain
from ttmray.storage import Folder
from ttmray.training.logbook import Logbook


class Nothing(Config):
    """No fields."""


@pytest.fixture
def run(tmp_path):
    folder = Folder.at(str(tmp_path / "run"))
    runs.write(folder, runs.describe("sft", {"lr": 1}, Nothing(), ()))
    return folder


def test_a_training_says_its_last_step_what_was_left_and_why_it_stopped(run, capsys):
    def train() -> None:
        with cost.account(run), Logbook(run, 0, tensorboard=False) as log:
            log.write({"step": 20, "loss": 3.0, "samples_per_s": 4.0, "eta_s": 7200.0})
            log.write({"step": 40, "loss": 1.25, "samples_per_s": 4.0, "eta_s": 3600.0})
            raise UserError("the loss of update 41 is nan.", "Lower lr.")

    with pytest.raises(UserError):
        train()
    with open(run.path("metrics.jsonl"), "a") as file:
        file.write('{"step": 60, "lo')  # half a line of a killed process
    assert main(["status", run.uri]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "sft, not finished" in out
    assert "step 40, loss 1.25" in out
    assert "1:00:00 were left then" in out
    assert "stopped: the loss of update 41 is nan." in out
    assert "ago" in out


def test_a_launch_that_goes_on_forgets_why_the_last_one_stopped(run, capsys):
    with pytest.raises(KeyboardInterrupt), cost.account(run):
        raise KeyboardInterrupt
    assert cost.read(run)["stopped"] == "interrupted"
    with cost.account(run):
        cost.note()
        assert "stopped" not in json.loads(run.read(cost.COST))
    assert main(["status", run.uri]) == 0
    assert "stopped" not in capsys.readouterr().out


def test_a_chain_lists_its_steps_with_their_states(tmp_path, capsys):
    root = Folder.at(str(tmp_path))
    steps = [
        Step("first", Nothing(), lambda: root.write("a", b"") or 0, ("a",)),
        Step("second", Nothing(), lambda: 3, ("b",)),
        Step("third", Nothing(), lambda: 0, ("c",)),
    ]
    assert run_chain(root, steps, dict.fromkeys(("first", "second", "third"), "x")) == 3
    capsys.readouterr()
    assert main(["status", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "first: done" in out
    assert "second: begun" in out
    assert "third" not in out


@pytest.mark.parametrize("name", ["steps/corpus.json", "cost.json"])
def test_a_damaged_record_is_one_message(run, name, tmp_path, capsys):
    folder = Folder.at(str(tmp_path / "chain")) if "/" in name else run
    folder.write(name, b"[1")
    assert main(["status", folder.uri]) == 2
    assert name.rpartition("/")[2] in capsys.readouterr().err


def test_a_folder_without_a_run_is_one_message(tmp_path, capsys):
    assert main(["status", str(tmp_path)]) == 2
    assert "is no run" in capsys.readouterr().err
