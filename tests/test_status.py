"""How far a run is, whatever its kind, from its files alone."""

import json
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from ttmray import cost, inventory, runs
from ttmray.cli import main
from ttmray.config import Config
from ttmray.console import meter
from ttmray.errors import UserError
from ttmray.recipes.chain import run_chain
from ttmray.recipes.chain_plan import STEPS_FILE, Step, read_steps
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


def test_a_chain_lists_its_steps_with_their_states_and_where_and_why_it_stopped(tmp_path, capsys):
    root = Folder.at(str(tmp_path / "chain"))

    def second() -> int:
        sub = root.sub("second")
        runs.write(sub, runs.describe("sft", {"lr": 1}, Nothing(), ()))
        with cost.account(sub), Logbook(sub, 0, tensorboard=False) as log:
            log.write({"step": 40, "loss": 1.25, "samples_per_s": 4.0, "eta_s": 3600.0})
            log.write({"step": 40, "validation_loss": 2.0})
            raise UserError("the disk is full.", "Make room.")

    steps = [
        Step("first", Nothing(), lambda: root.write("a", b"") or 0, ("a",)),
        Step("second", Nothing(), second, ("second/b",)),
        Step("third", Nothing(), lambda: 0, ("c",)),
    ]
    prints = dict.fromkeys(("first", "second", "third"), "x")
    with pytest.raises(UserError, match="the disk is full"):
        run_chain(root, steps, prints)
    capsys.readouterr()
    assert main(["status", root.uri]) == 0
    out = capsys.readouterr().out
    for words in (
        "a chain of 3 steps, 1 done",
        "first: done",
        "second: begun",
        "third: to do",
        "1:00:00 were left then",
    ):
        assert words in out
    assert "step 40, loss 1.25" in out, "the last update, not the validation after it"
    assert out.count("the disk is full.") == 2, "the run says it, and the step"
    steps[1] = Step("second", Nothing(), lambda: root.write("second/b", b"") or 0, ("second/b",))
    assert run_chain(root, steps[:2], dict(list(prints.items())[:2])) == 0
    capsys.readouterr()
    assert main(["status", root.uri]) == 0
    assert "stopped" not in capsys.readouterr().out


@pytest.fixture
def done_chain(tmp_path):
    """A chain of two steps, a training that is sealed and a table, and the call that goes on with it."""
    root = Folder.at(str(tmp_path / "chain"))

    def train() -> int:
        sub = root.sub("train")
        runs.write(sub, runs.describe("sft", {"lr": 1}, Nothing(), ()))
        for name in ("weights", "metrics"):
            sub.write(name, b"1")
        inventory.seal(sub, runs.read(sub, "sft"), {}, inventory.entries(sub, ["metrics"]))
        return 0

    steps = [
        Step("train", Nothing(), train, (f"train/{runs.SUCCESS}", "train/weights")),
        Step("table", Nothing(), lambda: root.write("table.csv", b"a") or 0, ("table.csv",)),
    ]
    again = partial(run_chain, root, steps, {"train": "x", "table": "x"})
    assert again() == 0
    return root, again


@pytest.mark.parametrize(
    ("gone", "step", "line"),
    [
        ("train", "train", "train/weights"),
        ("train/weights", "train", "train/weights"),
        ("train/metrics", "train", "train/metrics"),
        ("train/_SUCCESS.json", "train", "train/_SUCCESS.json"),
        ("table.csv", "table", "table.csv"),
    ],
)
def test_what_is_gone_of_a_step_that_was_done_is_named_with_its_way_out(done_chain, gone, step, line, capsys):
    root, again = done_chain
    assert main(["verify", root.uri]) == 0
    path = Path(root.path(gone))
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    capsys.readouterr()
    assert main(["status", root.uri]) == 0
    out = capsys.readouterr().out
    assert "a chain of 2 steps, 1 done" in out
    assert f"{step}: was done, and is gone" in out
    assert f"{line} is missing" in out
    assert "the same command makes again what is gone" in out
    assert main(["verify", root.uri]) == 2
    out = capsys.readouterr().out.replace("train: ", "train/")
    assert len(re.findall(rf"^{line}: is missing", out, re.MULTILINE)) == 1, out
    assert main(["verify", str(Path(root.uri).parent)]) == 2, "of a folder of chains, too"
    assert again() == 0
    assert main(["verify", root.uri]) == 0
    capsys.readouterr()
    assert main(["status", root.uri]) == 0
    assert "2 steps, 2 done" in capsys.readouterr().out


def test_a_chain_of_an_earlier_version_misses_the_folders_of_its_steps(done_chain, capsys):
    root, _ = done_chain
    old = {"steps": [{"name": one["name"], "folder": one["folder"]} for one in read_steps(root)]}
    root.write(STEPS_FILE, json.dumps(old).encode())
    assert main(["verify", root.uri]) == 0
    shutil.rmtree(root.path("train"))
    assert main(["verify", root.uri]) == 2
    assert "train: is missing (of step train)" in capsys.readouterr().out
    assert main(["status", root.uri]) == 0
    assert "train is missing" in capsys.readouterr().out


def test_a_finished_run_says_which_of_its_files_are_gone(done_chain, capsys):
    sub = done_chain[0].sub("train")
    sub.delete("metrics")
    assert main(["status", sub.uri]) == 0
    assert "metrics: is missing: the same command makes it again" in capsys.readouterr().out


def test_what_a_stopped_launch_was_counting_is_said_and_forgotten_by_the_next(run, capsys):
    def count(fails: bool) -> None:
        with cost.account(run), meter("clips", 8) as progress:
            progress.started -= 10.0
            progress.advance(2)
            if fails:
                raise UserError("no room.")
            progress.advance(6)

    with pytest.raises(UserError):
        count(fails=True)
    assert main(["status", run.uri]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "clips: 2 of 8 of that launch, 0.2/s, 0:00:30 were left then" in out
    assert "stopped: no room." in out
    count(fails=False)
    capsys.readouterr()
    assert main(["status", run.uri]) == 0
    assert "of that launch" not in capsys.readouterr().out


def test_a_folder_of_runs_tells_of_each(run, tmp_path, capsys):
    other = Folder.at(str(tmp_path / "deep/other"))
    runs.write(other, runs.describe("ranker", {"lr": 1}, Nothing(), ()))
    assert main(["status", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "2 in it" in out
    assert f"{other}: ranker, not finished" in out


@pytest.mark.parametrize("kind", ["sft", "ranker", "generate", "evaluation", "expert-iteration", "scores", "grpo"])
def test_a_run_of_any_kind_that_was_only_claimed_is_not_finished_and_looks_for_corpora_say_what_it_is(
    kind, tmp_path, capsys
):
    folder = Folder.at(str(tmp_path / "run"))
    runs.write(folder, runs.describe(kind, {"lr": 1}, Nothing(), ()))
    assert main(["status", folder.uri]) == 0
    assert f"{kind}, not finished" in capsys.readouterr().out
    for look in ("stats", "ls", "verify", "sample", "upgrade", "repair"):
        command = ["corpus", look, folder.uri, *(["--out", str(tmp_path / "page")] if look == "sample" else [])]
        assert main(command) == 2, look
        assert kind in capsys.readouterr().err, look


def test_a_run_in_a_bucket_is_told_of_like_one_on_disk(object_store, capsys):
    bucket = object_store("status")
    place = f"{bucket}/runs/mine"
    runs.write(Folder.at(place), runs.describe("sft", {"lr": 1}, Nothing(), ()))
    Folder.at(place).write("metrics.jsonl", b'{"step": 3, "loss": 1.5}\n')
    assert main(["status", place]) == 0
    assert "step 3, loss 1.5" in capsys.readouterr().out
    assert main(["status", f"{bucket}/runs"]) == 0
    assert "1 in it" in capsys.readouterr().out
    for wrong in ("nothing", "runs/mine/metrics.jsonl"):
        assert main(["status", f"{bucket}/{wrong}"]) == 2
        assert "is no run" in capsys.readouterr().err
    assert main(["corpus", "ls", place]) == 2
    assert "kind sft" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["steps/corpus.json", "cost.json"])
def test_a_damaged_record_is_one_message(run, name, tmp_path, capsys):
    folder = Folder.at(str(tmp_path / "chain")) if "/" in name else run
    folder.write(name, b"[1")
    assert main(["status", folder.uri]) == 2
    assert name.rpartition("/")[2] in capsys.readouterr().err


def test_a_folder_without_a_run_is_one_message(tmp_path, capsys):
    (tmp_path / "file.txt").touch()
    (tmp_path / "planned").mkdir()
    (tmp_path / "planned/plan.md").touch()
    for name, words in (
        ("", "is no run"), ("gone", "is not there"), ("file.txt", "is a file"), ("planned", "only a plan"),
    ):  # fmt: skip
        assert main(["status", str(tmp_path / name)]) == 2
        assert words in capsys.readouterr().err
    for command in ("verify", "report"):
        for name, words in (("gone", "is not there"), ("file.txt", "is a file")):
            assert main([command, str(tmp_path / name)]) == 2
            assert words in capsys.readouterr().err


def test_folders_that_say_what_they_hold_are_among_those_of_a_folder(tmp_path, capsys):
    for name in ("chosen", "deep/finished"):
        folder = Folder.at(str(tmp_path / name))
        folder.write("table.csv", b"a,b\n")
        inventory.note(folder, "postprocess", ("table.csv",))
    assert main(["status", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "2 in it" in text
    assert f"{tmp_path}/deep/finished: postprocess, finished" in text


def test_status_loads_no_model_library(done_chain):
    code = (
        "import sys; from ttmray.cli import main; "
        f"code = main(['status', {done_chain[0].uri!r}]); "
        "print(sorted({'ray', 'torch', 'transformers', 'demucs'} & sys.modules.keys())); sys.exit(code)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.splitlines()[-1] == "[]"
