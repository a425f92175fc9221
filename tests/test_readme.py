"""Every command of the README files, of docs/references.md and of docs/own-songs.md works.

Fenced `sh` blocks are read line by line. How a line is checked depends on its first words (`CHECKS`); a line that
nobody knows how to check fails. `python ...` and `ttmray ...` run for real, in order and in this process, in a
folder with the songs and tables that the README speaks of. Bucket commands run against an object store in this
process. Two things are added to a corpus job to keep this cheap: `runtime.runner=local` and `runtime.workers=0`
where the line does not choose a runner itself; that both runners agree is tested elsewhere. Training stops after 4
updates. Commands for clusters
are parsed by Ray's own parser, and the job in them is run up to its plan.
"""

import re
import runpy
import shlex
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ttmray.cli import main
from ttmray.storage import Folder

REPO = Path(__file__).resolve().parents[1]
IN_IMAGE = "/opt/ttmray/"
DOCUMENTS = (REPO / "cluster/README.md", *(REPO / "docs").glob("*.md"))


def commands(document: str) -> list[str]:
    """Lines of all sh blocks; a trailing backslash joins lines, comments and empty lines are left out."""
    blocks = re.findall(r"^```(?:sh|bash|shell|console)\n(.*?)^```", (REPO / document).read_text("utf-8"), re.M | re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the README assumes it: this repository's jobs and configs, songs, captions, a track table."""
    folder = tmp_path_factory.mktemp("workplace")
    for name in ("jobs", "configs", "cluster"):
        (folder / name).symlink_to(REPO / name)
    songs = folder / "my-songs"
    (songs / "album").mkdir(parents=True)
    for i in range(8):
        time = np.arange(int(5.2 * 44100)) / 44100
        tone = 0.3 * np.sin(2 * np.pi * (110 + 30 * i) * time) * (1 + np.sin(2 * np.pi * 3 * time)) / 2
        soundfile.write(songs / f"album/song{i}.flac", np.stack([tone, tone[::-1]], axis=1), 44100)
    (songs / "album/broken.mp3").write_text("no music\n" * 50)
    (folder / "my-captions.csv").write_text(
        "path,caption\n" + "".join(f"album/song{i}.flac,Take {i}\n" for i in (1, 2))
    )
    (folder / "my-prompts.csv").write_text("id,prompt\na,a calm piano piece\nb,loud drums\n")
    (folder / "mtg-jamendo/00").mkdir(parents=True)
    for i in range(8):
        (folder / f"mtg-jamendo/00/song{i}.flac").symlink_to(songs / f"album/song{i}.flac")
    captions = [f'00/song{i}.flac,"Take {i}, slow"' for i in range(8)]
    (folder / "jamendo.csv").write_text("\n".join(["path,caption", *captions]) + "\n")
    (folder / "song-describer/audio").mkdir(parents=True)
    for i in range(3):
        (folder / f"song-describer/audio/{i + 7}.2min.flac").symlink_to(songs / f"album/song{i}.flac")
    described = [f"{2 * i + k},{i + 7},A song of {i} and {k},0{i}/{i + 7}.mp3" for i in range(3) for k in range(2)]
    (folder / "song_describer.csv").write_text("\n".join(["caption_id,track_id,caption,path", *described]) + "\n")
    (folder / "my-texts.csv").write_text("id,prompt\nc,slow strings\n")
    header = "track_id\tartist_id\talbum_id\tpath\tduration_s\ttunejury_track_reward\ttags\n"
    rows = [f"t{i}\ta{i // 9}\tb\t{i % 100:02d}/{i}.mp3\t{30 + i % 300}.5\t0.1\tg\n" for i in range(1000)]
    (folder / "tracks.tsv").write_text(header + "".join(rows))
    subprocess.run(["gzip", "tracks.tsv"], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module")
def songs_in_bucket(workplace: Path, object_store: Callable[[str], str]) -> None:
    """`s3://my-bucket/songs` with the songs of the workplace."""
    songs = Folder.at(object_store("my-bucket") + "/songs")
    for path in sorted((workplace / "my-songs").rglob("*.*")):
        songs.write(path.relative_to(workplace / "my-songs").as_posix(), path.read_bytes())


def run_here(words: list[str]) -> int:
    """A `python SCRIPT ...` or `ttmray ...` command in this process; its exit code."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        if words[0] == "ttmray":
            return main(words[1:])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", words[1:])
            try:
                runpy.run_path(words[1], run_name="__main__")
            except SystemExit as end:
                return int(end.code or 0)
            return 0
    finally:
        signal.signal(signal.SIGTERM, before)


def check_program(words: list[str]) -> None:
    assert (Path(sys.executable).parent / words[0]).exists(), "not a program of the environment"
    if words[1] == "-m":
        assert subprocess.run([sys.executable, *words[1:]]).returncode == 0
        return
    if words[1] == "jobs/train_sft.py":
        words = [*words, "--set", "steps=4", "--set", "checkpoint.every=2", "--set", "samples.every=0"]
    is_corpus_job = words[1] in ("jobs/score_corpus.py", "score-corpus", "plan")
    if is_corpus_job and not any(word.startswith("runtime.runner=") for word in words):
        words = [*words, "--set", "runtime.runner=local", "--set", "runtime.workers=0"]
    assert run_here(words) == 0


def check_make(words: list[str]) -> None:
    done = subprocess.run(["make", "-n", *words[1:]], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip(), "the target does nothing"


def check_activate(words: list[str]) -> None:
    assert words == ["source", ".venv/bin/activate"]
    assert re.search(r"^VENV := \.venv$", (REPO / "Makefile").read_text(), re.MULTILINE)


def check_export(words: list[str]) -> None:
    (assignment,) = words[1:]
    assert re.fullmatch(r"[A-Z][A-Z0-9_]*=\S+", assignment)


def check_ray(words: list[str]) -> None:
    """Ray's own parser takes the words; files exist; a submitted job is run up to its plan."""
    from ray.scripts.scripts import cli

    group, name = cli, words[1]
    rest = words[2:]
    if name == "job":
        group, name, rest = cli.commands["job"], words[2], words[3:]
    command = group.commands[name]
    context = command.make_context(name, list(rest))  # raises for an unknown option or a missing argument
    for key in ("cluster_config_file",):
        if key in context.params:
            assert (REPO / context.params[key]).is_file()
    if name == "submit" and words[1] == "job":
        check_entrypoint(list(context.params["entrypoint"]))


def check_entrypoint(words: list[str]) -> None:
    """The job's command line, in the image's paths, makes a plan."""
    words = [word.replace(IN_IMAGE, "") for word in words]
    assert words[:2] == ["python", "jobs/score_corpus.py"]
    absolute = [word.split("=", 1)[1] for word in words if word.startswith(("input=", "output="))]
    assert len(absolute) == 2
    assert all(path.startswith(("/", "s3://")) for path in absolute), "a submitted job has another working folder"
    assert run_here([*words, "--plan-only"]) == 0


def check_aws(words: list[str]) -> None:
    """The stack is deployed, on the object store's server, which imitates more of AWS than buckets."""
    import boto3

    assert words[1:3] == ["cloudformation", "deploy"]
    options = dict(zip(words[3::2], words[4::2], strict=True))
    (parameter,) = (dict([options.pop("--parameter-overrides").split("=")])).items()
    assert options.keys() == {"--template-file", "--stack-name", "--capabilities"}
    client = boto3.client("cloudformation")
    client.create_stack(
        StackName=options["--stack-name"],
        TemplateBody=(REPO / options["--template-file"]).read_text(),
        Capabilities=[options["--capabilities"]],
        Parameters=[{"ParameterKey": parameter[0], "ParameterValue": parameter[1]}],
    )
    (stack,) = client.describe_stacks(StackName=options["--stack-name"])["Stacks"]
    assert stack["StackStatus"] == "CREATE_COMPLETE"


def check_chmod(words: list[str]) -> None:
    """The file is the one that the command before has written."""
    from ray._private.authentication import authentication_token_setup

    mode, name = words[1:]
    assert mode == "600", "nobody else may read a token"
    default = authentication_token_setup._get_default_token_path()
    assert Path(name).expanduser() == default


def check_file(option: str | None) -> Callable[[list[str]], None]:
    """The file after `option` (None: the first argument) is there."""

    def check(words: list[str]) -> None:
        name = words[words.index(option) + 1] if option else words[1]
        assert (REPO / name).is_file()

    return check


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "make": check_make,
    "python": check_program,
    "ttmray": check_program,
    "source": check_activate,
    "export": check_export,
    "ray": check_ray,
    "aws": check_aws,
    "chmod": check_chmod,
    "docker": check_file("-f"),
    "kubectl": check_file("-f"),
    "sbatch": check_file(None),
}


@pytest.mark.parametrize("document", ["README.md", "cluster/README.md", "docs/references.md", "docs/own-songs.md"])
@pytest.mark.usefixtures("songs_in_bucket")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
def test_every_command_of_the_document_works(
    document: str, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("HOME", str(workplace))  # the store of reference sets
    lines = commands(document)
    assert lines
    for line in lines:
        words = shlex.split(line)
        assert words[0] in CHECKS, f"{document}: nobody knows how to check: {line}"
        try:
            CHECKS[words[0]](words)
        except (Exception, SystemExit) as error:
            printed = capsys.readouterr()
            raise AssertionError(f"{document}: {line}\n{error}\n{printed.out[-3000:]}{printed.err[-2000:]}") from error
    if document == "README.md":
        assert_tree(workplace / "runs/my-corpus")


@pytest.mark.parametrize("document", ["README.md", *sorted(p.relative_to(REPO).as_posix() for p in DOCUMENTS)])
def test_no_word_of_a_command_is_a_pattern_for_the_shell(document: str) -> None:
    """zsh, the shell of macOS, ends a command whose [1,16] matches no file; bash passes it on, if none is there."""
    for line in commands(document):
        bare = re.sub(r"""'[^']*'|"[^"]*\"""", "", line)
        assert not re.search(r"[][*?{}<>|&;!]", bare), line


def assert_tree(run: Path) -> None:
    """Of the README's tree: every name is in the run, and every file of the run has a line."""
    tree = re.search(r"^```text\nruns/my-corpus/\n(.*?)^```", (REPO / "README.md").read_text("utf-8"), re.M | re.S)
    assert tree is not None
    # a line is names, two spaces or more apart, and perhaps words about them, which have no dot or slash inside
    names = re.findall(r"(?:^|  )\s*([\w<>-]+(?:[./][\w.<>/-]*)+)(?=\s|$)", tree[1], re.MULTILINE)
    patterns = [re.escape(name).replace("<unit>", r"u\d+").replace("<hash>", "[0-9a-f]{12}") for name in names]
    found = [path.relative_to(run).as_posix() + "/" * path.is_dir() for path in run.rglob("*")]
    for pattern in patterns:
        assert any(re.fullmatch(pattern, name) for name in found), f"a run has no {pattern}"
    for name in found:
        described = any(re.fullmatch(pattern, name) or pattern.startswith(name) for pattern in patterns)
        assert described, f"the README does not tell of {name}"


def test_the_first_screen_is_one_sentence_and_two_commands() -> None:
    assert commands("README.md")[:2] == ["make demo", "make test"]
    sentence = (REPO / "README.md").read_text("utf-8").split("\n")[2]
    description = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["description"]
    assert sentence == f"{description}."


def test_the_demo_output_has_the_lines_of_a_real_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All but times, paths and the order of songs: the demo runs here with the local runner and few steps of the
    sampler, and the README's lines must be among its, whatever is measured in a song."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "110")
    corpus = "corpus={runtime: {runner: local, workers: 0}}"
    assert main(["demo", "--set", corpus, "--set", "generate={sampler: {steps: 2}, runtime: {threads: 1}}"]) == 0
    printed = {_shape(line) for line in capsys.readouterr().out.splitlines()}
    shown = re.search(r"^```text\n(16 audio.*?)^```", (REPO / "README.md").read_text("utf-8"), re.M | re.S)
    assert shown is not None
    lines = [line for line in shown.group(1).splitlines() if line not in ("", "...")]
    assert lines
    assert [line for line in lines if _shape(line) not in printed] == []


def _shape(line: str) -> str:
    """Without numbers, which depend on machine and versions, without the place, and without what is measured."""
    line = re.sub(r"(?:dropped|wow|detune|timing|clash|noise|clipping|dull|thin) \d\.\d+|nothing of note", "", line)
    line = re.sub(r"^best: [^,]*", "best:", line)  # two songs are nearly equal
    line = re.sub(r"\S*/runs/", ".../runs/", re.sub(r"[+-]?\d+(?:\.\d+)?", "#", line))
    return " ".join(re.sub(r"measured[ ,]*$", "", re.sub(r"[, ]+", " ", line)).split())


def test_the_table_of_environment_variables_has_all_that_the_code_reads() -> None:
    table = (REPO / "README.md").read_text("utf-8").partition("## Environment variables")[2].partition("\n## ")[0]
    named = set(re.findall(r"`([A-Z][A-Z_]+)", table))
    read = set()
    for path in (REPO / "ttmray").rglob("*.py"):
        read |= set(
            re.findall(r"""environ(?:\.get\(|\.setdefault\(|\[|\.pop\()["']([A-Z_]+)["']""", path.read_text("utf-8"))
        )
    read |= {"RAY_BACKEND_LOG_LEVEL", "HF_HUB_OFFLINE", "HF_TOKEN"}
    assert read - named == set()


def link_problems(document: Path) -> list[str]:
    """Targets of links, and paths of the repository between backticks, that are not there."""
    text = re.sub(r"^```.*?^```", "", document.read_text("utf-8"), flags=re.M | re.S)
    targets = [(document.parent, target) for target in re.findall(r"\]\(<?([^)>\s]+)>?\)", text)]
    top = "ttmray|docs|cluster|configs|tests|jobs|benchmarks|notebooks"
    targets += [(REPO, name) for name in re.findall(rf"`((?:{top})/[\w./-]+\.\w+)`", text)]
    problems = []
    for base, target in targets:
        path, _, anchor = target.partition("#")
        file = (base / path) if path else document
        if "://" in target:
            continue
        if not file.exists():
            problems.append(f"{document.name}: {target}")
        elif anchor and anchor not in anchors(file.read_text("utf-8")):
            problems.append(f"{document.name}: {target} has no such heading")
    return problems


def anchors(text: str) -> set[str]:
    """Of the headings of a document, as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_relative_links_of_the_documents_lead_somewhere(tmp_path: Path) -> None:
    named = [REPO / f"{name}.md" for name in ("README", "CHANGELOG", "CONTRIBUTING", "cluster/README")]
    assert [problem for one in (*named, *sorted((REPO / "docs").glob("*.md"))) for problem in link_problems(one)] == []
    (tmp_path / "x.md").write_text("# A b\n[a](y.md) [b](x.md#a-b) [c](#none) `docs/gone.md` <https://no.where/>\n")
    assert link_problems(tmp_path / "x.md") == ["x.md: y.md", "x.md: #none has no such heading", "x.md: docs/gone.md"]


def test_the_citation_is_of_this_version_and_licence() -> None:
    import yaml

    from ttmray import __version__

    cited = yaml.safe_load((REPO / "CITATION.cff").read_text("utf-8"))
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    assert (cited["version"], cited["license"]) == (__version__, project["license"])
    assert cited["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= cited.keys(), "what the format asks for"
    assert f"({__version__})" in (REPO / "CHANGELOG.md").read_text("utf-8")
