"""What the documents show works: examples in docstrings, and docs/python.md from start to end."""

import doctest
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import ttmray
from ttmray.console import console

REPO = Path(__file__).resolve().parents[2]
MODULES = ("sounds", "songs", "loaded", "corpus", "evaluation", "training")


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_docstrings_give_what_they_say(name, workplace, monkeypatch):
    monkeypatch.setattr(console, "quiet", True)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    outcome = doctest.testmod(import_module(f"ttmray.api.{name}"), optionflags=flags)
    assert outcome.attempted > 0
    assert outcome.failed == 0


def test_the_page_runs_from_start_to_end(workplace, monkeypatch):
    blocks = re.findall(r"^```python\n(.*?)^```", (REPO / "docs/python.md").read_text("utf-8"), re.M | re.S)
    assert len(blocks) >= 6
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), names)
    assert Path("calm.wav").exists()
    assert Path("runs/my-model.safetensors").exists()
    assert list(names["evaluation"].clips["prompt"]) == ["a calm piano piece", "driving drums"]


def test_importing_the_package_imports_nothing_else():
    code = (
        "import sys; before = set(sys.modules); import ttmray; ttmray.__version__; dir(ttmray); "
        "print(sorted({name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['ttmray']"


def test_a_bundle_is_known_without_ray_and_pandas():
    code = "import sys, ttmray; ttmray.load('debug', device='cpu'); print({'ray', 'pandas'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    assert "mean nothing" in " ".join(done.stderr.split())


def test_the_package_lists_its_names_and_has_them_all():
    assert {"load", "open_corpus", "evaluate", "train"} <= set(dir(ttmray))
    assert all(getattr(ttmray, name) is not None for name in ttmray.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'lod'"):
        ttmray.lod  # noqa: B018
