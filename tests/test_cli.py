"""The command line: exit codes, one clear message for everything a user can mend, and what each look shows."""

import argparse
import inspect
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ttmray import __version__
from ttmray.cli import COMMANDS, _parser, main
from ttmray.cli.command import Command
from ttmray.cli.examples import EXAMPLES
from ttmray.config import load_config
from ttmray.config_docs import field_lines
from ttmray.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_OK, EXIT_TOO_MANY_FAILURES
from ttmray.generation.config import GenerateConfig
from ttmray.plugins import named
from ttmray.presets import command_of, presets

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """`main` takes over SIGTERM; give it back."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def songs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One song of 6 s and a text file with an audio name."""
    folder = tmp_path_factory.mktemp("songs")
    t = np.arange(6 * 44100) / 44100
    soundfile.write(folder / "tone.flac", np.stack([np.sin(1400 * t), np.sin(2100 * t)], axis=1) * 0.3, 44100)
    (folder / "broken.mp3").write_text("no music\n" * 99)
    return folder


def arguments(input: Path | str, output: Path | str, *sets: str) -> list[str]:
    usual = ("bundle=debug", "runtime.runner=local", "runtime.workers=0", "splits.validation=0", "splits.test=0")
    return [part for s in (f"input={input}", f"output={output}", *usual, *sets) for part in ("--set", s)]


@pytest.fixture(scope="module")
def finished(songs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of a finished job. Looks do not change it."""
    output = tmp_path_factory.mktemp("finished") / "run"
    assert main(["score-corpus", *arguments(songs, output), "--max-failures", "1"]) == EXIT_OK
    return output


def refused(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    """The message of a command that ends with exit code 2."""
    capsys.readouterr()
    assert main(command) == EXIT_BAD_INPUT
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert "Traceback" not in text
    return text


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def shown_commands(capsys: pytest.CaptureFixture[str], *command: str) -> set[str]:
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    return set(re.findall(r"^    ([a-z-]+)(?: |$)", capsys.readouterr().out, re.MULTILINE))


def test_the_commands_are_these(capsys):
    corpus = {"score-corpus", "plan", "corpus", "status", "score", "weights"}
    models = {"train-sft", "train-ranker", "train-micro", "generate", "postprocess", "params", "checkpoint"}
    chain = {"pool", "choose-score", "reproduce", "ablate", "expert-iteration", "train-crpo", "pairs", "filter"}
    chain |= {"train-grpo", "push", "attm", "compare-methods"}
    evaluation = {"evaluate", "compare", "findings", "reference", "subset", "report", "card", "synth", "demo"}
    assert shown_commands(capsys) == corpus | models | chain | evaluation | {"config", "completion", "verify", "serve"}
    assert shown_commands(capsys, "checkpoint") == {"inspect", "export", "steer"}
    assert shown_commands(capsys, "corpus") == {"stats", "verify", "ls", "sample", "rescore", "repair", "upgrade"}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_the_help_of_a_command_has_a_sentence_an_example_that_parses_and_where_its_fields_are(command, capsys):
    with pytest.raises(SystemExit):
        main([*command.name.split(), "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert f"{command.help[1:]}.".replace("%%", "%") in text
    example = f"ttmray {command.name} {EXAMPLES[command.name]}".rstrip()
    assert f"example: {example}" in text
    assert _parser().parse_args(shlex.split(example)[1:]).table_row is command
    if command.config:
        assert f"fields of --config and --set: ttmray config {shlex.quote(command.name)} " in text
        assert "relative to the folder in which the command runs" in text
    assert EXAMPLES.keys() == {one.name for one in COMMANDS}


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from parsers(below)


def test_every_help_has_a_sentence_an_example_and_a_word_on_every_argument():
    for parser in parsers(_parser()):
        text = parser.format_help()
        assert parser.description, parser.prog
        assert parser.description.endswith("."), parser.prog
        assert "\n  ttmray " in text, f"{parser.prog}: no example"
        for action in parser._actions:
            named_below = isinstance(action, argparse._SubParsersAction)
            assert action.help or named_below, f"{parser.prog}: {action.option_strings or action.dest}"


def test_the_help_of_a_group_names_an_example_that_parses(capsys):
    for group in {command.name.split()[0] for command in COMMANDS if " " in command.name}:
        with pytest.raises(SystemExit):
            main([group, "--help"])
        (example,) = re.findall(r"^  (ttmray .*)$", capsys.readouterr().out, re.MULTILINE)
        assert _parser().parse_args(shlex.split(example)[1:]).table_row.name.startswith(f"{group} ")


def test_out_and_output_are_one_flag_wherever_there_is_either():
    words = {"--out": "pairs runs/pool", "--output": "generate --prompt x"}
    for line in words.values():
        typed = [vars(_parser().parse_args([*line.split(), flag, "there"])) for flag in words]
        assert typed[0]["output"] == typed[1]["output"] == "there"
    assert _parser().parse_args(["findings", "run", "--output", "there"]).out == "there"


def test_a_preset_that_a_help_names_is_one_of_the_command():
    for command in COMMANDS:
        if command.config:
            text = " ".join(_parser_of(command).format_help().split())
            for name in re.findall(r"a preset such as ([\w/-]+)", text):
                assert command_of(name) == command.name or command.name == "plan"


def _parser_of(command: Command) -> argparse.ArgumentParser:
    return next(one for one in parsers(_parser()) if one.prog == f"ttmray {command.name}")


def test_every_preset_is_of_the_command_whose_config_it_is():
    kinds = {command.name: command.config for command in COMMANDS if command.config}
    for name, path in presets().items():
        kind = named(kinds[command_of(name)])
        sets = ["checkpoint=mine.safetensors"] if command_of(name) == "generate" else []  # some are about one
        assert load_config(kind, str(path), sets), name


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("ttmray sc", {"score", "score-corpus"}),
        ("ttmray corpus ", {"ls", "stats", "verify"}),
        ("ttmray corpus ls --st", {"--status"}),
        ("ttmray corpus ls --status ", {"ok", "rejected", "failed"}),
        ("ttmray train-sft --config debug/st", {"debug/stage1"}),
        ("ttmray train-sft --config my-", {"my-own.yaml", "my-folder/"}),
        ("ttmray train-sft --set data.sources.0.co", {"data.sources.0.corpus="}),
        ("ttmray corpus rescore runs/x --set runtime.", {"runtime.workers="}),
        ("ttmray train-sft --set steps=", set()),
    ],
)
def test_bash_completes_commands_flags_values_presets_and_fields(line, expected, capsys, tmp_path):
    assert main(["completion", "bash"]) == EXIT_OK
    (tmp_path / "lines").write_text(capsys.readouterr().out)
    (tmp_path / "my-own.yaml").touch()
    (tmp_path / "my-folder").mkdir()
    (tmp_path / "ttmray").write_text(f'#!/bin/sh\nexec {sys.executable} -m ttmray "$@"\n')
    (tmp_path / "ttmray").chmod(0o755)
    words = [*line.split(" ")]
    script = (
        f"source lines; COMP_LINE={shlex.quote(line)}; COMP_POINT={len(line)}; COMP_TYPE=63; "
        f"COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}; _python_argcomplete ./ttmray; "
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    offered = {one.strip() for one in done.stdout.splitlines()} - {""}
    assert expected <= offered, done.stderr
    assert bool(offered) == bool(expected)
    start = words[-1].rpartition("=")[2]
    assert all(one.startswith(start) for one in offered)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("ttmray sc", {"score", "score-corpus"}),
        ("ttmray corpus ", {"ls", "stats", "verify"}),
        ("ttmray corpus ls --status ", {"ok", "rejected", "failed"}),
        ("ttmray train-sft --config debug/st", {"debug/stage1"}),
        ("ttmray train-sft --set data.sources.0.co", {"data.sources.0.corpus="}),
    ],
)
@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_complete_the_same(shell, line, expected, capsys, tmp_path):
    assert main(["completion", shell]) == EXIT_OK
    text = capsys.readouterr().out
    assert {"zsh": "#compdef ttmray", "fish": "complete --command ttmray"}[shell] in text
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not here")
    (tmp_path / "lines").write_text(text)
    (tmp_path / "ttmray").write_text(f'#!/bin/sh\nexec {sys.executable} -m ttmray "$@"\n')
    (tmp_path / "ttmray").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    script = f"source lines; complete --do-complete {shlex.quote(line)}"
    if shell == "zsh":  # which completes at its prompt alone: what it would show there
        script = (
            "compdef() { :; }; _describe() { print -rl -- $completions; }; "
            f"source lines; words=({shlex.join(line.split(' '))}); CURRENT=$#words; BUFFER={shlex.quote(line)}; "
            f"CURSOR={len(line)}; _python_argcomplete ttmray"
        )
    run = [shell, *(["-f"] if shell == "zsh" else ["--no-config"]), "-c", script]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, env=environment)
    offered = {one.split("\t")[0].split(":")[0].replace("\\", "").strip() for one in done.stdout.splitlines()}
    assert expected <= offered, (done.stdout, done.stderr)


@pytest.mark.parametrize("command", [[], ["sing"], ["corpus"], ["corpus", "ls"], ["plan", "--limit", "3"]])
def test_a_wrong_command_line_is_bad_input(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main(command)
    assert caught.value.code == EXIT_BAD_INPUT
    assert "usage: ttmray" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "meant"),
    [(["scor", "x"], "score"), (["corpus", "stat", "x"], "stats"), (["weights", "pul"], "pull")],
)
def test_a_mistyped_command_is_answered_with_the_one_that_was_meant(command, meant, capsys):
    with pytest.raises(SystemExit) as caught:
        main(command)
    assert caught.value.code == EXIT_BAD_INPUT
    assert re.search(rf"did you mean .*{meant}", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("score 'gone [1].wav'", "gone [1].wav: not found."),
        ("score 'my songs'", "no audio files"),
        ("score notes.txt --bundle hf://org/name/file.pt", "is a file of a repository"),
        ("score notes.txt --bundle hf://name", "no address of the hub"),
        ("generate --prompts gone.csv", "gone.csv: not found"),
        ("generate --prompt x --bundle debug --checkpoint notes.txt", "it is no checkpoint"),
        ("generate --prompt x --bundle debug --output notes.txt", "notes.txt: is a file, not a folder"),
        ("attm submit 'my songs' --prompts prompts.csv --out x.zip", "no audio files"),
        ("train-sft --config debug/stage1 --set output=o", "is not a corpus run"),
        ("verify notes.txt", "notes.txt is a file"),
        ("report gone", "gone is not there"),
        ("compare gone", "gone: not found"),
    ],
)
def test_mistakes_of_the_first_ten_minutes_are_one_message_each(command, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TTMRAY_OFFLINE", "1")
    (tmp_path / "my songs").mkdir()
    (tmp_path / "notes.txt").write_text("hello\n")
    (tmp_path / "prompts.csv").write_text("id,prompt\na,a harp\n")
    assert words in refused(capsys, *shlex.split(command))


def test_help_and_version_import_nothing_heavy():
    code = (
        "import sys; from ttmray.cli import main\n"
        "try: main(['--version'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'ray', 'transformers', 'demucs', 'pyarrow', 'pydantic'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[1:] == ["[]"]


def test_done_is_0_and_too_many_failures_are_3_and_both_are_finished_runs(songs, finished, capsys):
    command = ["score-corpus", *arguments(songs, finished)]
    assert main([*command, "--max-failures", "1"]) == EXIT_OK
    assert main([*command, "--max-failures", "0"]) == EXIT_TOO_MANY_FAILURES
    assert main([*command, "--max-failures", "50%"]) == EXIT_OK
    assert main(command) == EXIT_TOO_MANY_FAILURES, "1 % by default"
    assert "1 rows failed, 0 are allowed" in capsys.readouterr().out
    assert main(["corpus", "verify", str(finished)]) == EXIT_OK


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_is_130_with_one_line(songs, tmp_path, number):
    pipe = tmp_path / "exclude.txt"  # the command waits here until somebody writes
    os.mkfifo(pipe)
    command = arguments(songs, tmp_path / "run", f"catalogue.exclude={pipe}")
    child = subprocess.Popen(
        [sys.executable, REPO / "jobs/score_corpus.py", *command],
        stderr=subprocess.PIPE,
        text=True,
        # a shell that runs the tests in the background has its children ignore SIGINT
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )

    def give_up_with_the_child() -> None:
        child.wait()
        os.close(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK))

    threading.Thread(target=give_up_with_the_child).start()
    with open(pipe, "wb"):  # opens when the command does
        child.send_signal(number)
        _, text = child.communicate(timeout=60)
    assert child.returncode == EXIT_INTERRUPTED
    assert text.strip() == "interrupted; what was committed is kept, the same command goes on from there"


@pytest.mark.parametrize("name", ["absent.yaml", "[bold]x.yaml", ""])
def test_a_config_file_that_is_not_there_is_named_as_it_is_written(tmp_path, capsys, name):
    assert str(tmp_path / name).rstrip("/") in refused(capsys, "plan", "--config", str(tmp_path / name))


def test_a_wrong_setting_is_named_before_any_work(songs, tmp_path, capsys):
    text = refused(capsys, "score-corpus", *arguments(songs, tmp_path / "run", "runtime.wokers=2"))
    assert "did you mean runtime.workers?" in text
    text = refused(capsys, "score-corpus", *arguments(songs, tmp_path / "run"), "--max-failures", "few")
    assert "max_failures" in text
    assert not (tmp_path / "run").exists()


def test_a_bundle_that_does_not_exist_is_refused_with_those_that_do(songs, tmp_path, capsys):
    text = refused(capsys, "plan", *arguments(songs, tmp_path / "run", "bundle=payper"))
    assert "'payper'" in text
    assert "debug" in text


def test_an_input_without_songs_is_one_message(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("hello")
    for name, words in (("empty", "it is empty"), ("texts", ".txt 1"), ("absent", "no such folder")):
        text = refused(capsys, "score-corpus", *arguments(tmp_path / name, tmp_path / "run"))
        assert words in text
        assert str(tmp_path / name) in text
    assert not (tmp_path / "run").exists()


def test_a_folder_of_something_else_is_no_output_folder(songs, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    for command in ("score-corpus", "plan"):
        assert "holds mine.txt" in refused(capsys, command, *arguments(songs, tmp_path))
        assert "holds" in refused(capsys, command, *arguments(songs, songs)), "not among the songs"
        assert "mine.txt" in refused(capsys, command, *arguments(songs, tmp_path / "mine.txt"))
    assert files(tmp_path) == {"mine.txt"}


def test_the_run_of_another_config_is_refused_with_the_field_that_differs(songs, finished, capsys):
    before = {name: (finished / name).stat().st_mtime_ns for name in files(finished)}
    text = refused(capsys, "score-corpus", *arguments(songs, finished, "separation.overlap=0.1"))
    assert "config.separation.overlap: 0.25 -> 0.1" in text
    assert {name: (finished / name).stat().st_mtime_ns for name in files(finished)} == before


def test_planning_writes_the_plan_and_nothing_else(songs, tmp_path, capsys):
    assert main(["plan", *arguments(songs, tmp_path / "run")]) == EXIT_OK
    assert files(tmp_path / "run") == {"plan.parquet", "plan.json", "plan.md"}
    plan = json.loads((tmp_path / "run/plan.json").read_text())
    assert plan["expected clips"]["value"] == 2
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) <= 10
    assert f"all {len(plan)} numbers, with their reasons: {tmp_path / 'run/plan.md'}" in shown
    assert any(line.startswith("2 clips expected (0.00") for line in shown), shown
    reasons = (tmp_path / "run/plan.md").read_text()
    assert all(f"| {name} | " in reasons for name in plan)
    job = [sys.executable, REPO / "jobs/score_corpus.py", "--plan-only", *arguments(songs, tmp_path / "job")]
    subprocess.run(job, check=True, capture_output=True)
    assert (tmp_path / "job/plan.parquet").read_bytes() == (tmp_path / "run/plan.parquet").read_bytes()


def test_a_plan_is_followed_by_its_run(songs, tmp_path):
    plan = arguments(songs, tmp_path / "run")
    assert main(["plan", *plan]) == EXIT_OK
    saved = (tmp_path / "run/plan.parquet").read_bytes()
    assert main(["score-corpus", *plan, "--max-failures", "1"]) == EXIT_OK
    assert (tmp_path / "run/plan.parquet").read_bytes() == saved


def test_rows_are_listed_by_status_and_as_json(finished, capsys):
    assert main(["corpus", "ls", str(finished), "--status", "failed", "--json"]) == EXIT_OK
    (row,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert (row["key"], row["reason"], row["source"]) == ("broken", "not_audio", "broken.mp3")
    assert main(["corpus", "ls", str(finished), "--limit", "1"]) == EXIT_OK
    assert "1 of 2 rows" in capsys.readouterr().out
    assert main(["corpus", "ls", str(finished), "--limit", "0"]) == EXIT_OK
    assert "2 of 2 rows" in capsys.readouterr().out


@pytest.mark.parametrize("option", [["ls", "--limit", "-1"], ["sample", "--out", "x", "-n", "-1"]])
def test_a_negative_count_is_a_wrong_command_line(finished, option, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["corpus", *option, str(finished)])
    assert caught.value.code == EXIT_BAD_INPUT


def test_a_reader_that_stops_reading_is_no_error(finished):
    command = [sys.executable, "-m", "ttmray", "corpus", "ls", str(finished), "--json"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    child.stdout.close()
    assert child.stderr is not None
    text = child.stderr.read()
    child.stderr.close()
    assert (child.wait(60), text) == (EXIT_OK, "")


def test_stats_and_status_tell_the_numbers(finished, capsys):
    assert main(["status", str(finished)]) == EXIT_OK
    assert "1 of 1 units" in (text := capsys.readouterr().out)
    assert "finished" in text
    assert main(["corpus", "stats", str(finished)]) == EXIT_OK
    text = capsys.readouterr().out
    assert "1 clips ok, 0 rejected, 1 failed of 2 tracks" in text
    assert "reward_score" in text
    assert "40 channels" in text


def test_a_sample_is_a_page_with_its_audio(songs, finished, tmp_path):
    assert main(["corpus", "sample", str(finished), "--out", str(tmp_path / "page"), "-n", "3"]) == EXIT_OK
    assert files(tmp_path / "page") == {"index.html", "tone_0.flac"}
    assert "src='tone_0.flac'" in (tmp_path / "page/index.html").read_text()
    audio, rate = soundfile.read(tmp_path / "page/tone_0.flac")
    source, _ = soundfile.read(songs / "tone.flac")
    assert rate == 44100
    np.testing.assert_allclose(audio[: len(source)], source, atol=1e-4)


@pytest.mark.parametrize("look", [["status"], ["corpus", "ls"], ["corpus", "stats"], ["corpus", "verify"]])
def test_a_folder_that_is_no_run_is_one_message(look, tmp_path, capsys):
    assert "run.json" in refused(capsys, *look, str(tmp_path))


def test_damage_that_verification_finds_is_exit_code_2(songs, tmp_path, capsys):
    command = arguments(songs, tmp_path / "run")
    assert main(["score-corpus", *command, "--max-failures", "1"]) == EXIT_OK
    (shard,) = (tmp_path / "run/shards").iterdir()
    shard.write_bytes(shard.read_bytes()[:-1])
    assert main(["corpus", "verify", str(tmp_path / "run")]) == EXIT_BAD_INPUT
    assert shard.name in capsys.readouterr().out


def _names(command: Command) -> set[str]:
    """Arguments that the function of a command always gets."""
    always = {
        flag.dest
        for flag in command.flags
        if not flag.in_config
        and (
            "default" in flag.options
            or flag.options.get("required")
            or (flag.names[0][0] != "-" and flag.options.get("nargs") != "*")
        )
    }
    return always | ({command.config_as} if command.config else set()) | set(command.fixed)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_a_command_of_the_table_fits_its_function_and_its_config(command):
    """Tables name functions, parameters and fields by text, which no type checker follows."""
    parameters = inspect.signature(named(command.run)).parameters
    passed = {flag.dest for flag in command.flags if not flag.in_config} | _names(command)
    assert passed <= parameters.keys()
    required = {name for name, one in parameters.items() if one.default is one.empty}
    assert required <= _names(command), "a flag that may be left out needs a default, here or there"
    fields = {flag.dest for flag in command.flags if flag.in_config}
    if command.config:
        assert fields | set(command.exclusive) <= named(command.config).model_fields.keys()
    else:
        assert not fields


def test_file_set_and_flag_go_one_way_and_the_flag_counts(tmp_path, monkeypatch):
    configs = []

    def generate(config: GenerateConfig, **options: object) -> int:
        configs.append((config, options))
        return EXIT_OK

    monkeypatch.setattr("ttmray.generation.generate.generate", generate)
    file = tmp_path / "g.yaml"
    file.write_text("prompts: prompts.csv\nseed: 1\nsamples: 2\nformat: flac")
    command = ["generate", "--bundle", "debug", "--config", str(file), "--set", "samples=2", "--set", "samples=3"]
    texts = ["a # b", "1", "\N{MUSICAL KEYBOARD}", "[x"]
    typed = [part for text in texts for part in ("--prompt", text)]
    assert main([*command, *typed, "--seed", "4"]) == EXIT_OK
    (config, options) = configs.pop()
    assert (config.seed, config.samples, config.format) == (4, 3, "flac")
    assert (list(config.texts), config.prompts) == (texts, None), "prompts that are typed are all there are"
    assert options == {"retry_failed": False, "zip_to": None, "overwrite": False, "plan_only": False}
    assert main(command) == EXIT_OK
    assert configs.pop()[0].prompts == os.path.abspath("prompts.csv")


@pytest.mark.parametrize(
    "typed",
    [
        ("generate", "--prompts", "a.csv", "--set", "texts=[x]"),
        ("generate", "--prompt", "x", "--set", "prompts=a.csv"),
        ("generate", "--prompt", "x", "--set", "texts=[y]"),
        ("generate", "--prompt", "x", "--seed", "4", "--set", "seed=2"),
        ("generate", "--prompt", "x", "--score-from", "choice", "--set", "sampler.score=1"),
        ("evaluate", "runs/a", "--prompts", "a.csv", "--set", "texts=[x]"),
        ("evaluate", "runs/a", "--set", "folders=[runs/b]"),
        ("score-corpus", "--max-failures", "1", "--set", "max_failures=2"),
        ("attm", "evaluate", "--out", "a", "--set", "output=b"),
    ],
    ids=" ".join,
)
def test_what_is_given_by_a_flag_and_by_set_is_refused(typed, capsys):
    assert f"and --set {typed[-1]} give the same thing twice" in refused(capsys, *typed)


def test_a_flag_and_the_same_by_set_or_nothing_by_set_go_together(monkeypatch):
    configs = []
    monkeypatch.setattr("ttmray.generation.generate.generate", lambda config, **_: configs.append(config) or EXIT_OK)
    command = ["generate", "--bundle", "debug", "--prompts", "a.csv", "--seed", "2"]
    assert main([*command, "--set", "seed=2", "--set", "texts=[]"]) == EXIT_OK
    assert (configs[0].seed, configs[0].texts) == (2, ())


def test_a_wrong_flag_is_named_as_its_field(capsys):
    assert "samples: Input should be greater than or equal to 1" in refused(
        capsys, "generate", "--bundle", "debug", "--prompt", "x", "--samples", "0"
    )
    assert "checkpoint: '' names no place" in refused(
        capsys, "generate", "--bundle", "debug", "--prompt", "x", "--checkpoint", ""
    )
    text = refused(capsys, "postprocess", "x", "--output", "y", "--device", "tpu")
    assert "device" in text


def test_a_preset_is_found_from_any_folder_and_a_file_of_that_name_counts(songs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["plan", "--config", "debug/corpus", *arguments(songs, tmp_path / "run")]
    assert main(command) == EXIT_OK
    assert (tmp_path / "run/plan.json").exists()
    (tmp_path / "debug").mkdir()
    (tmp_path / "debug/corpus").write_text("bundel: debug")
    assert "bundel" in refused(capsys, *command)
    text = refused(capsys, "plan", "--config", "debug/corpse")
    assert "debug/corpse: there is no such file" in text
    assert "debug/stage1" in text
    assert "../secret" in refused(capsys, "plan", "--config", "../secret")


def test_presets_are_the_configs_of_the_repository():
    configs = REPO / "configs"
    there = {
        path.relative_to(configs).with_suffix("").as_posix(): path.read_bytes() for path in configs.rglob("*.yaml")
    }
    assert {name: path.read_bytes() for name, path in presets().items()} == there


def test_what_can_be_set_is_told_with_type_limit_default_and_description(capsys):
    assert main(["config", "train-sft"]) == EXIT_OK
    text = capsys.readouterr().out
    assert "output: path (required)" in text
    assert "data.sources.N.repeat: number, >= 0 = 1.0" in text
    assert 'model.size: "s_44k" | "l_44k"' in text
    assert "Samples per update, over all workers" in text
    assert "debug/stage1" in text
    assert main(["config", "corpus rescore", "--schema"]) == EXIT_OK
    schema = json.loads(capsys.readouterr().out)
    assert schema["properties"]["head"]["format"] == "path"
    assert schema["additionalProperties"] is False
    text = refused(capsys, "config", "train")
    assert "train-sft" in text
    assert "micro/train" in text


def test_descriptions_are_shown_whole_however_narrow_the_terminal_is(capsys, monkeypatch):
    kind = named("ttmray.training.config:TrainConfig")
    longest = max((description for _, description in field_lines(kind.model_json_schema())), key=len)
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["config", "train-sft"]) == EXIT_OK
    assert " ".join(longest.split()) in " ".join(capsys.readouterr().out.split())


def test_a_bundle_that_ships_with_the_package_says_where_its_files_are(capsys):
    assert main(["weights", "where", "micro"]) == EXIT_OK
    files = capsys.readouterr().out.split()
    assert any(file.endswith("micro/backbone/model.safetensors") for file in files)
    assert all(Path(file).is_file() for file in files)


def test_a_preset_is_shown_as_it_is_and_its_fields_where_they_are_asked_for(capsys):
    assert main(["config", "debug/stage1"]) == EXIT_OK
    assert capsys.readouterr().out == (REPO / "configs/debug/stage1.yaml").read_text()
    assert main(["config", "debug/stage1", "--docs"]) == EXIT_OK
    text = capsys.readouterr().out
    assert text.startswith("ttmray train-sft: TrainConfig of ttmray/training/config.py. Relative paths")
    assert "batch: integer" in text
    assert main(["config"]) == EXIT_OK
    text = capsys.readouterr().out
    assert re.search(r"^train-sft +attm/stage1-16gb, .*debug/stage1", text, re.MULTILINE)
    assert re.search(r"^corpus rescore$", text, re.MULTILINE)


@pytest.mark.parametrize("command", [one for one in COMMANDS if one.config], ids=lambda command: command.name)
def test_every_field_of_every_config_is_listed_once(command):
    kind = named(command.config)
    places = [line.partition(":")[0] for line, _ in field_lines(kind.model_json_schema())]
    assert {place.partition(".")[0] for place in places} == kind.model_fields.keys()
    assert len(places) == len(set(places))


def test_the_package_is_the_command():
    done = subprocess.run([sys.executable, "-m", "ttmray", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(__version__)
