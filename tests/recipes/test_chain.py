"""Steps in one run folder: what is skipped, what is run, and what it has cost."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from ttmray.config import Config, load_config
from ttmray.corpus.config import CorpusConfig
from ttmray.errors import UserError
from ttmray.generation.config import GenerateConfig
from ttmray.ranker.job import RankerConfig
from ttmray.recipes import chain
from ttmray.recipes.chain import Step, gpus, is_done, run_chain
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
    assert "| c | to do | 0.0 | 0.00 |  |" in text
    assert "<a href='a/made'>" in page
    assert "&lt;run&gt;" in page


def test_a_step_that_claims_to_have_ended_well_without_results_is_a_bug(three):
    three.works["a"] = lambda: None
    with pytest.raises(RuntimeError, match="a/made is missing"):
        three.run()
    assert not is_done(three.root, three.steps()[0], "1")


def test_the_cost_of_a_step_is_that_of_all_its_launches(three, monkeypatch):
    monkeypatch.setattr(chain, "gpus", lambda config: 2.0)

    now = 100.0
    monkeypatch.setattr(chain, "time", SimpleNamespace(monotonic=lambda: now))

    def interrupted() -> None:
        nonlocal now
        now += 2.0
        raise KeyboardInterrupt

    three.works["a"] = interrupted
    for launch in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            three.run()
        record = three.record("a")
        assert record["launches"] == launch
        assert record["seconds"] == pytest.approx(2.0 * launch)
    del three.works["a"]
    three.run()
    record = three.record("a")
    assert record["done"]
    assert (record["seconds"], record["gpu_seconds"]) == (pytest.approx(4.0), pytest.approx(8.0))


def test_time_is_noted_while_a_step_runs_for_it_may_be_killed(three, monkeypatch):
    monkeypatch.setattr(chain, "BEAT_S", 0.01)

    def slow() -> None:
        at_start = three.record("a")["seconds"]
        deadline = time.monotonic() + 60
        while three.record("a")["seconds"] <= at_start:
            assert time.monotonic() < deadline, "nothing was noted"
            time.sleep(0.01)
        three.root.write("a/made", b"")

    three.works["a"] = slow
    three.run()
    assert three.record("a")["done"]


@pytest.mark.slow
def test_gpus_of_a_cluster_are_counted_although_the_step_joins_and_leaves_it(tmp_path, monkeypatch):
    import ray

    now = 0.0
    monkeypatch.setattr(chain, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(chain, "BEAT_S", 1000.0)
    root = Folder(str(tmp_path))

    def joins() -> int:
        nonlocal now
        ray.init(address="local", num_cpus=2, num_gpus=4, include_dashboard=False, logging_level="ERROR")
        now += 5.0
        root.write("made", b"")
        return 0

    corpus = load_config(CorpusConfig, None, ["input=x", "output=x", "runtime={runner: ray, device: cuda}"])
    auto = load_config(TrainConfig, None, [*TRAIN, "runtime={runner: ray, workers: 2, device: auto}"])
    steps = [Step("corpus", corpus, joins, ("made",)), Step("training", auto, joins, ("made",))]
    assert run_chain(root, steps, {"corpus": "1", "training": "1"}) == 0
    assert not ray.is_initialized()
    spent = [json.loads(root.read(f"steps/{step.name}.json"))["gpu_seconds"] for step in steps]
    assert spent == [5 * 4, 5 * 2]


@pytest.mark.parametrize("record", ["[]", "{}", "x", '{"done": true}'])
def test_a_damaged_record_is_named(three, record):
    three.run()
    three.root.write("steps/b.json", record.encode())
    with pytest.raises(UserError, match=r"steps/b\.json is no record"):
        three.run()


TRAIN = ("output=x", "data={sources: [{corpus: x}]}")
VOTES = ("output=x", "sources=[{name: a, path: x}]")


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (load_config(CorpusConfig, None, ["input=x", "output=x", "runtime={runner: local, device: cpu}"]), 0),
        (load_config(TrainConfig, None, [*TRAIN, "runtime={runner: ray, workers: 4, device: cuda}"]), 4),
        (load_config(TrainConfig, None, [*TRAIN, "runtime.device=cpu"]), 0),
        (load_config(TrainConfig, None, [*TRAIN, "runtime.device=cuda:0"]), 1),
        (load_config(GenerateConfig, None, ["texts=[x]", "runtime={runner: ray, workers: 4, gpus: 0.5}"]), 2),
        (load_config(GenerateConfig, None, ["texts=[x]", "runtime.device=cuda"]), 1),
        (load_config(RankerConfig, None, [*VOTES, "encoding={runner: ray, workers: 3, gpus: 1}"]), 3),
        (Config(), 0),
    ],
)
def test_gpus_of_a_step_are_those_that_its_config_reserves(config, count):
    assert gpus(config) == count
