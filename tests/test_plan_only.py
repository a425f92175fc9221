"""`--plan-only` of every job: it says what would be done, writes nothing, and refuses what the job would refuse."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

from ttmray import runs
from ttmray.audio.io import write_audio
from ttmray.cli import COMMANDS, main
from ttmray.config import Config, load_config
from ttmray.corpus.config import CorpusConfig
from ttmray.corpus.job import score_corpus
from ttmray.errors import EXIT_BAD_INPUT, EXIT_OK
from ttmray.models.tunejury import debug_tunejury
from ttmray.storage import Folder

IN_SECONDS = {"serve", "pairs", "filter", "demo"}
"""Commands with a config that are no jobs of more than seconds, or, as the demo, always the same; `plan` is
`score-corpus --plan-only`."""


WITHOUT_RUN = {"postprocess"}
"""Whose folders have no run.json."""


class Nothing(Config):
    """No fields."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips, three prompts, votes, and a finished corpus."""
    root = tmp_path_factory.mktemp("planned")
    (root / "songs").mkdir()
    for name in ("a", "b"):
        noise = np.random.default_rng(ord(name)).normal(scale=0.1, size=(1, 11 * 44100)).astype(np.float32)
        write_audio(str(root / f"songs/{name}.wav"), noise, 44100)
    (root / "prompts.csv").write_text("id,prompt\na,a calm piano\nb,loud drums\nc,a flute\n")
    sides = [("a", "b", "A"), ("b", "a", "B")] * 20
    rows = [f"{a}.wav,{b}.wav,p{i},{side}" for i, (a, b, side) in enumerate(sides)]
    (root / "votes.csv").write_text("\n".join(["a,b,prompt,label", *rows]) + "\n")
    sets = ["bundle=debug", "runtime.runner=local", "runtime.workers=0", "splits.validation=0", "splits.test=0"]
    config = load_config(CorpusConfig, None, [*sets, f"input={root / 'songs'}", f"output={root / 'corpus'}"])
    assert score_corpus(config) == EXIT_OK
    (root / "head").mkdir()
    head = debug_tunejury(3)
    save_file(head.head.net.state_dict(), root / "head/tunejury.safetensors")
    facts = {"input_dim": head.head.widths[0], "exclude": [], "block_dims": [512, 64, 512]}
    (root / "head/tunejury.json").write_text(json.dumps(facts))
    return root


def jobs(place: Path) -> dict[str, tuple[list[str], str, str]]:
    """Command -> what is typed, the folder that it would write, and words of its plan."""
    prompts, songs = f"prompts={place}/prompts.csv", f"{place}/songs"
    debug = ["--set", "bundle=debug"]
    out = ["--set", f"output={place}/out"]
    votes = f"sources=[{{name: mine, path: {place}/votes.csv, audio: {place}/songs}}]"
    train = ["--set", "runtime.runner=local", "--set", f"data.sources=[{{corpus: {place}/corpus}}]"]
    return {
        "generate": ([*debug, *out, "--set", prompts, "--set", "samples=2"], "out", r"6 to make of 6 .*2 per prompt"),
        "pool": ([*debug, *out, "--set", prompts, "--set", "candidates=4"], "out", r"12 to make of 12"),
        "choose-score": ([*debug, *out, "--set", prompts, "--set", "scores=[0, 1]"], "out/score0", "6 to make"),
        "postprocess": ([songs, "--output", f"{place}/out", *debug], "out", r"2 to do of 2"),
        "evaluate": ([f"mine={songs}", *debug, *out, "--set", prompts], "out", r"2 of 3"),
        "reference build": (["mine", songs, "--store", str(place), "--bundle", "debug"], "mine", r"2 to embed"),
        "train-ranker": (
            [*debug, *out, "--set", votes, "--set", "split={by: prompt}"],
            "out",
            r"heads +1 to train of 1",
        ),
        "attm evaluate": (
            [f"mine={songs}", *debug, *out, "--set", f"reference={songs}", "--set", prompts],
            "out",
            r"clips +2 of 3",
        ),
        "corpus rescore": (
            [f"{place}/corpus", "--head", f"{place}/head", "--name", "mine"],
            "corpus/scores/mine",
            r"clips +2 to score of 2",
        ),
        "train-sft": (["--config", "debug/stage1", *out, *train, "--set", "steps=7"], "out", r"updates +7 "),
    }


NAMES = tuple(jobs(Path("x")))


def everything(place: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in place.rglob("*") if path.is_file()}


def plan(place: Path, name: str) -> int:
    return main([*name.split(), *jobs(place)[name][0], "--plan-only"])


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_says_what_would_be_done_and_writes_nothing(place, name, capsys):
    before = everything(place)
    assert plan(place, name) == EXIT_OK
    shown = capsys.readouterr().out
    assert re.search(jobs(place)[name][2], shown), shown
    assert "time here" in shown
    assert not re.search(r"\b0(\.0+)? (h|min|s|days)\b", shown), "work that is to do takes time"
    assert everything(place) == before


@pytest.mark.parametrize("name", sorted({*NAMES} - {"attm evaluate", "reference build"}))
def test_a_plan_refuses_the_folder_of_another_run_as_the_job_would(place, name, capsys):
    words, folder, _ = jobs(place)[name]
    foreign = Folder.at(str(place / folder))
    if name in WITHOUT_RUN:
        foreign.write("mine.txt", b"x")
    else:
        runs.write(foreign, runs.describe("another", {"lr": 1}, Nothing(), ()))
    before = everything(place)
    try:
        assert plan(place, name) == EXIT_BAD_INPUT
        said = capsys.readouterr().err
        assert main([*name.split(), *words]) == EXIT_BAD_INPUT
        assert capsys.readouterr().err == said
        assert everything(place) == before
    finally:
        shutil.rmtree(foreign.uri)
        shutil.rmtree(place / "out", ignore_errors=True)


def test_a_plan_counts_what_is_not_done_yet_and_refuses_other_settings(place, capsys):
    job = ["generate", *jobs(place)["generate"][0], "--set", "sampler.steps=1", "--set", "postprocess={passes: 0}"]
    try:
        assert main([*job, "--set", "texts=[]"]) == EXIT_OK
        (place / "out/clips/a_0.wav").unlink()
        before = everything(place)
        capsys.readouterr()
        assert main([*job, "--plan-only"]) == EXIT_OK
        assert "1 to make of 6" in capsys.readouterr().out
        assert main([*job, "--plan-only", "--seed", "5"]) == EXIT_BAD_INPUT
        assert "belongs to another run" in capsys.readouterr().err
        assert main([*job, "--plan-only", "--overwrite", "--seed", "5"]) == EXIT_OK
        assert "6 clips of other settings" in " ".join(capsys.readouterr().out.split())
        assert everything(place) == before
    finally:
        shutil.rmtree(place / "out")


def test_every_command_of_a_job_has_a_plan():
    without = {
        command.name
        for command in COMMANDS
        if command.config and not command.fixed and "plan_only" not in {flag.dest for flag in command.flags}
    }
    assert without == IN_SECONDS


@pytest.mark.parametrize("name", ["train-sft", "generate", "evaluate"])
def test_a_plan_for_a_gpu_is_made_where_there_is_none_and_says_so(place, name, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    words = jobs(place)[name][0]
    bundle = ["--set", "bundle=fluxaudio-s-16k"] if name == "evaluate" else []
    assert main([*name.split(), *words, *bundle, "--set", "runtime.device=cuda", "--plan-only"]) == EXIT_OK
    shown = " ".join(capsys.readouterr().out.split())
    assert "time here unknown" in shown
    assert "this machine has no" in shown or "this machine has none" in shown


def test_a_corpus_for_a_gpu_is_not_timed_by_the_cpu(place, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    sets = [f"input={place}/songs", f"output={place}/out", "bundle=paper", "runtime.device=cuda"]
    sets += ["splits.validation=0", "splits.test=0"]
    words = ["score-corpus", *(part for one in sets for part in ("--set", one)), "--plan-only"]
    try:
        assert main(words) == EXIT_OK
        assert "models unknown per device (it is for a GPU" in capsys.readouterr().out
    finally:
        shutil.rmtree(place / "out")


def test_a_chain_for_a_gpu_is_planned_where_there_is_none_and_says_so(place, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    sets = [f"corpus.input={place}/songs", f"output={place}/out", "stage1.runtime.device=cuda"]
    words = ["reproduce", "--config", "debug/reproduce", *(part for one in sets for part in ("--set", one))]
    try:
        assert main([*words, "--plan-only"]) == EXIT_OK
        shown = " ".join(capsys.readouterr().out.split())
        assert "device is cuda, but torch sees 0 GPUs. It is planned all the same." in shown
        assert "this machine has none" in shown
        assert main(words) == EXIT_BAD_INPUT, "it cannot run here"
    finally:
        shutil.rmtree(place / "out")
