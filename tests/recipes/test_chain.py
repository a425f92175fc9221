"""Steps in one run folder: what is skipped, what is run, and what it has cost."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ttmray import cost
from ttmray.config import Config
from ttmray.errors import UserError
from ttmray.recipes.chain import is_done, run_chain
from ttmray.recipes.chain_plan import Step
from ttmray.storage import Folder
from ttmray.training.config import TrainConfig

PRINTS = {"a": "1", "b": "2", "c": "3"}


class Chain:
    """Three steps that write a file each and note their names."""

    def __init__(self, folder: Path) -> None:
        self.root = Folder(str(folder))
        self.ran: list[str] = []
        self.codes: dict[str, int] = {}
        self.works: dict[str, Callable[[], None]] = {}

    def steps(self) -> list[Step]:
        def work(name: str) -> Callable[[], int]:
            def run() -> int:
                self.ran.append(name)
                self.works.get(name, lambda: self.root.write(f"{name}/made", b""))()
                return self.codes.get(name, 0)

            return run

        return [Step(name, Config(), work(name), (f"{name}/made",), page=f"{name}/made") for name in PRINTS]

    def run(self, prints: dict[str, str] = PRINTS, **options: str | bool | None) -> int:
        self.ran.clear()
        return run_chain(self.root, self.steps(), prints, **options)

    def record(self, name: str) -> dict[str, float]:
        return dict(json.loads(self.root.read(f"steps/{name}.json")))


@pytest.fixture
def three(tmp_path: Path) -> Chain:
    return Chain(tmp_path / "<run>")


def test_a_relaunch_does_nothing_and_says_so(three, capsys):
    assert three.run() == 0
    assert three.ran == ["a", "b", "c"]
    assert three.run() == 0
    assert three.ran == []
    assert "nothing to do: all 3 steps are done" in capsys.readouterr().out


def test_a_step_runs_again_with_other_settings_or_without_what_it_made(three):
    three.run()
    three.run(PRINTS | {"b": "other"})
    assert three.ran == ["b"]
    three.root.delete("c/made")
    three.run(PRINTS | {"b": "other"})
    assert three.ran == ["c"]


def test_from_and_until_bound_the_steps(three):
    assert three.run(last="b") == 0
    assert three.ran == ["a", "b"]
    assert three.run(PRINTS | {"a": "other"}, first="b", last="c") == 0
    assert three.ran == ["c"]
    assert three.run(plan_only=True, first="a") == 0
    assert three.ran == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"first": "x"}, "--from x: there is no such step"),
        ({"last": "x"}, "--until x: there is no such step"),
        ({"first": "c", "last": "b"}, "--from c comes after --until b"),
        ({"first": "b"}, "step a is not done: a/made is missing"),
    ],
)
def test_bounds_that_make_no_sense_are_refused(three, options, message):
    with pytest.raises(UserError, match=message):
        three.run(**options)
    assert three.ran == []


def test_a_step_that_fails_ends_the_chain_and_is_begun_again(three):
    three.codes["b"] = 3
    assert three.run() == 3
    assert three.ran == ["a", "b"]
    three.codes.clear()
    assert three.run() == 0
    assert three.ran == ["b", "c"]
    assert three.record("b")["launches"] == 2


def test_an_error_names_its_step_and_the_page_shows_how_far_it_came(three):
    def fail() -> None:
        raise UserError("no songs.", "Buy some.")

    three.works["b"] = fail
    with pytest.raises(UserError) as error:
        three.run()
    assert (error.value.message, error.value.hint) == ("step b: no songs.", "Buy some.")
    page, text = (three.root.read(name).decode() for name in ("index.html", "summary.md"))
    assert "<td>a</td><td>done</td>" in page
    assert "<td>b</td><td>begun</td>" in page
    assert "| c | to do | – | – |  |" in text
    assert "<a href='a/made'>" in page
    assert "&lt;run&gt;" in page


def test_a_plan_says_how_long_what_is_to_do_takes_and_a_foreign_folder_is_refused(three, tmp_path, capsys):
    data = {"sources": [{"corpus": "x"}]}
    train = {"output": str(tmp_path / "t"), "data": data, "model": {"size": "debug"}, "steps": 7, "batch": 4}
    steps = [replace(three.steps()[0], config=TrainConfig.model_validate(train)), *three.steps()[1:]]
    assert run_chain(three.root, steps, PRINTS, plan_only=True) == 0
    shown = capsys.readouterr().out
    line = next(line for line in shown.splitlines() if line.startswith("  a "))
    assert re.search(r"to do, (less than 1 s|about [1-9])", line), line
    assert "25% of" in shown.splitlines()[0]
    assert not re.search(r"\b0\.0+\b", shown)
    assert shown.count("not known") == 2
    text = three.root.read("plan.md").decode()
    assert re.search(r"^\| a \| to do \| (less than 1 s|about [1-9][^|]*) \|$", text, re.MULTILINE)
    assert "| c | to do | not known |" in text
    three.root.write("run.json", json.dumps({"kind": "sft"}).encode())
    for plan_only in (True, False):
        with pytest.raises(UserError, match="no chain"):
            three.run(plan_only=plan_only)


def test_a_file_is_no_output_of_a_chain(tmp_path):
    (tmp_path / "notes.txt").touch()
    for plan_only in (True, False):
        with pytest.raises(UserError, match=r"notes\.txt is a file, not a folder"):
            run_chain(
                Folder(str(tmp_path / "notes.txt")),
                [Step("a", Config(), lambda: 0, ("a",))],
                {"a": "1"},
                plan_only=plan_only,
            )


def test_a_plan_of_many_steps_is_ten_lines_and_a_file(tmp_path, capsys):
    root = Folder(str(tmp_path / "run"))
    steps = [Step(f"step-{i}", Config(), lambda: 0, (f"{i}/made",)) for i in range(30)]
    prints = {step.name: "x" for step in steps}
    assert run_chain(root, steps, prints, plan_only=True, about=["every method gets the same"]) == 0
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) <= 10
    assert "and 24 more" in shown
    text = root.read("plan.md").decode()
    assert text.count("| to do |") == 30
    assert "every method gets the same" in text
    assert sorted(file.name for file in root.files()) == ["plan.md"]


def test_a_step_that_claims_to_have_ended_well_without_results_is_a_bug(three):
    three.works["a"] = lambda: None
    with pytest.raises(RuntimeError, match="a/made is missing"):
        three.run()
    assert not is_done(three.root, three.steps()[0], "1")


def test_the_cost_of_a_step_is_that_of_all_its_launches(three, clock):
    def interrupted() -> None:
        with cost.holding(2.0):
            clock.pass_s(2.0)
            raise KeyboardInterrupt

    three.works["a"] = interrupted
    for launch in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            three.run()
        record = three.record("a")
        assert record["launches"] == launch
        assert record["seconds"] == 2.0 * launch
    del three.works["a"]
    three.run()
    record = three.record("a")
    assert record["done"]
    assert (record["seconds"], record["gpu_seconds"]) == (4.0, 8.0)
    assert "| a | done | 4.0 | 0.00 |" in three.root.read("summary.md").decode()


def test_a_step_costs_what_the_jobs_inside_of_it_do_and_the_time_between(three, clock):
    def work() -> None:
        clock.pass_s(1.0)
        for name in ("first", "second"):
            with cost.account(three.root.sub(name)), cost.holding(3.0):
                clock.pass_s(5.0)
        three.root.write("a/made", b"")

    three.works["a"] = work
    three.run()
    assert (three.record("a")["seconds"], three.record("a")["gpu_seconds"]) == (11.0, 30.0)
    spent = cost.read(three.root.sub("second"))
    assert (spent["seconds"], spent["gpu_seconds"]) == (5.0, 15.0)


def test_a_killed_step_loses_what_it_has_spent_since_its_last_commit(three, clock):
    def work() -> None:
        clock.pass_s(7.0)
        cost.note()
        clock.pass_s(2.0)
        before = three.record("a")  # what is there if the process ends here
        assert (before["seconds"], before["done"], before["launches"]) == (7.0, False, 1)
        three.root.write("a/made", b"")

    three.works["a"] = work
    three.run()
    assert (three.record("a")["seconds"], three.record("a")["done"]) == (9.0, True)


@pytest.mark.parametrize("record", ["[]", "{}", "x", '{"done": true}'])
def test_a_damaged_record_is_named(three, record):
    three.run()
    three.root.write("steps/b.json", record.encode())
    with pytest.raises(UserError, match=r"steps/b\.json is no record"):
        three.run()
