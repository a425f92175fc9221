"""The notebook: its text is in order, its cells are public API, and it runs from start to end, once and again."""

import ast
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest

import ttmray
from ttmray.config import load_config
from ttmray.corpus.config import CorpusConfig
from ttmray.generation.config import GenerateConfig
from ttmray.training.config import TrainConfig

REPO = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((REPO / "notebooks").glob("*.ipynb"))
NOTEBOOK = REPO / "notebooks/songs_to_music.ipynb"
TRANSCRIPT = REPO / "docs/notebook-run.md"
OTHERS = {"torch", "pathlib", "subprocess", "sys", "importlib", "IPython", "google"}
QUICK = {"UPDATES": 2, "COMPOSED": 5, "SECONDS": 5.0, "SAMPLER_STEPS": 1, "PROMPTS": {"calm": "a calm piano"}}


def _program() -> Any:
    spec = importlib.util.spec_from_file_location("execute_notebook", REPO / "notebooks/execute.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


program = _program()


def code_of(path: Path) -> list[str]:
    return [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_lie_here_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.cell_type == "markdown" or (cell.outputs == [] and cell.execution_count is None), cell.source
    assert path.read_text("utf-8") == nbformat.writes(notebook) + "\n"


def test_its_cells_are_public_api() -> None:
    trees = [ast.parse(source) for source in code_of(NOTEBOOK)]
    names, imported = set(), set()
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(str(node.module))
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ttmray":
                names.add(node.attr)
    assert {"ttmray"} <= {name.split(".")[0] for name in imported} <= OTHERS | {"ttmray"}
    assert not [name for name in imported if name.startswith("ttmray.")]
    assert names <= set(ttmray.__all__)
    assert {"compose", "score_corpus", "train", "evaluate", "load"} <= names


def settings_of(**parameters: Any) -> dict[str, Any]:
    """Names after the cells up to the one that loads a bundle, which is left out."""
    cells = code_of(NOTEBOOK)
    place = next(i for i, source in enumerate(cells) if "if CHALLENGE:" in source)
    names: dict[str, Any] = {}
    for i, source in enumerate(cells[: place + 1]):
        exec(compile(source.replace("studio = ttmray.load(BUNDLE)", ""), NOTEBOOK.name, "exec"), names)
        names |= parameters if i == 0 else {}
    return names


def test_one_line_of_one_cell_makes_it_the_challenge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = settings_of(CHALLENGE=True)
    corpus, training, clips = settings["CORPUS"], settings["TRAINING"], settings["CLIPS"]
    plain = program_values(corpus | {"input": settings["SONGS"], "output": f"{settings['RUN']}/corpus"})
    made = load_config(CorpusConfig, plain.pop("config"), fields=plain)
    assert (made.input, made.bundle) == (str(tmp_path / "data/mtg_jamendo_separated"), settings["BUNDLE"])
    assert (made.catalogue.stem, made.splits.table) == ("_instrumental", str(tmp_path / "data/splits/splits.csv"))
    data = {"data": {"sources": [{"corpus": "runs/corpus", **settings["SOURCE"]}]}, "output": "runs/training"}
    plain = program_values(training | data)
    trained = load_config(TrainConfig, plain.pop("config"), fields=plain)
    assert (trained.model.size, trained.model.head, trained.steps) == ("s_44k", "none", 200_000)
    assert settings["PROMPTS"] == Path("data/prompts.csv")
    plain = {"texts": ["a harp"], "prompts": None}
    assert load_config(GenerateConfig, clips["config"], fields=plain).sampler.weight == 4.5


def program_values(value: Any) -> Any:
    """Paths as text, as the API takes them."""
    return json.loads(json.dumps(value, default=str))


def test_parameters_are_those_of_the_tagged_cell() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    changed = program.with_parameters(notebook, {"UPDATES": 3})
    place = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))
    assert changed.cells[place + 1].source == "UPDATES = 3"
    assert len(changed.cells) == len(notebook.cells) + 1
    with pytest.raises(ValueError, match="UPDATE is no parameter"):
        program.with_parameters(notebook, {"UPDATE": 3})


def test_the_transcript_is_of_this_notebook() -> None:
    """Written by `notebooks/execute.py`; run it again where this fails."""
    text = TRANSCRIPT.read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)\n```$", text, re.MULTILINE | re.DOTALL)
    assert [block for block in blocks if block in code_of(NOTEBOOK)] == code_of(NOTEBOOK)
    assert "Traceback" not in text
    assert "(a player)" in text
    assert "\x1b" not in text
    assert str(REPO) not in text


def outputs_of(notebook: Any) -> list[str]:
    return [program.printed(cell.outputs) for cell in notebook.cells if cell.cell_type == "code"]


def test_it_runs_from_start_to_end(tmp_path: Path) -> None:
    done = program.execute(NOTEBOOK, tmp_path, QUICK)
    run = tmp_path / "runs/first-model"
    results = json.loads((run / "evaluation/2/results.json").read_text())
    assert [system["name"] for system in results["systems"]] == ["before", "trained"]
    assert (run / "evaluation/2/report/index.html").is_file()
    assert outputs_of(done)[-1].count("(a player)") == 2
    assert not [text for text in outputs_of(done) if "Traceback" in text or "WARNING" in text]


@pytest.mark.slow
def test_all_cells_once_more_make_nothing_twice(tmp_path: Path) -> None:
    program.execute(NOTEBOOK, tmp_path, QUICK)
    files = [
        path for path in sorted((tmp_path / "runs").rglob("*")) if path.suffix in (".tar", ".flac", ".safetensors")
    ]
    before = {path: path.stat().st_mtime_ns for path in files}
    again = program.execute(NOTEBOOK, tmp_path, QUICK)
    assert {path: path.stat().st_mtime_ns for path in files} == before
    assert "nothing to do" in "\n".join(outputs_of(again))
    more = program.execute(NOTEBOOK, tmp_path, QUICK | {"UPDATES": 4})
    assert (tmp_path / "runs/first-model/models/4.safetensors").is_file()
    assert "Traceback" not in "\n".join(outputs_of(more))
