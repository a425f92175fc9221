"""Whatever happens to any file of a generation run: the same command notices and makes it again."""

import json
import shutil
from pathlib import Path

import pytest
from damages import DAMAGES, content, out_of_the_way

from ttmray.cli import main
from ttmray.config import load_config
from ttmray.errors import EXIT_BAD_INPUT, EXIT_OK, UserError
from ttmray.generation.config import GenerateConfig
from ttmray.generation.generate import generate

FILES = ("run.json", "_SUCCESS.json", "manifest.parquet", "manifest.csv", "manifest/b.json", "clips/b.wav")
PRODUCT = [(name, damage) for name in FILES for damage in DAMAGES]
QUICK = [(name, list(DAMAGES)[(2 * i + j) % len(DAMAGES)]) for i, name in enumerate(FILES) for j in (0, 3)]


def make(folder: Path, output: Path, *sets: str) -> GenerateConfig:
    usual = ("bundle=debug", "sampler.steps=1", "runtime.device=cpu", "runtime.threads=1")
    return load_config(GenerateConfig, None, [f"prompts={folder}/prompts.json", f"output={output}", *usual, *sets])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Prompts, a finished run and one of another seed."""
    folder = tmp_path_factory.mktemp("damage")
    prompts = [{"id": name, "prompt": f"song {name}"} for name in "abc"]
    (folder / "prompts.json").write_text(json.dumps(prompts))
    assert generate(make(folder, folder / "run")) == EXIT_OK
    assert generate(make(folder, folder / "other", "seed=7")) == EXIT_OK
    return folder


@pytest.mark.parametrize(
    ("name", "damage"), [pytest.param(*one, marks=[] if one in QUICK else pytest.mark.slow) for one in PRODUCT]
)
def test_the_same_command_makes_again_what_was_damaged(folder, tmp_path, name, damage):
    run = Path(shutil.copytree(folder / "run", tmp_path / "run"))
    config, file = make(folder, run), run / name
    assert main(["verify", str(run)]) == EXIT_OK
    DAMAGES[damage](file, folder / "other")
    assert main(["verify", str(run)]) == EXIT_BAD_INPUT
    try:
        code = generate(config)
    except UserError as error:
        if damage == "a folder" and "move" in error.hint.lower():
            out_of_the_way(file, tmp_path / "mine")
        code = generate(config)  # raises again where there was no other way out
    assert code == EXIT_OK
    assert main(["verify", str(run)]) == EXIT_OK
    unlike = ("summary.json",)  # times
    before = content(folder / "run", unlike)
    assert content(run, unlike) == before


def test_a_plan_counts_a_clip_whose_row_is_damaged_among_those_to_make(folder, tmp_path, capsys):
    run = Path(shutil.copytree(folder / "run", tmp_path / "run"))
    DAMAGES["flipped"](run / "manifest/b.json", folder / "other")
    assert generate(make(folder, run), plan_only=True) == EXIT_OK
    assert "1 to make of 3" in capsys.readouterr().out
