"""What pyproject.toml declares is what the package imports."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]


def imported() -> set[str]:
    """Top-level modules of other projects that files of the package import, at the top or inside of functions."""
    names: set[str] = set()
    for path in (REPO / "ttmray").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {"ttmray"}


def declared(requirements: list[str]) -> set[str]:
    """Distributions, by their normalised names."""
    return {re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", text)[0]).lower() for text in requirements}  # type: ignore[index]


def distributions(modules: set[str]) -> set[str]:
    """The installed distributions that give some modules."""
    by_module = importlib.metadata.packages_distributions()
    return {re.sub(r"[-_.]+", "-", name).lower() for module in modules for name in by_module.get(module, [])}


def test_every_core_dependency_is_imported_by_the_package():
    assert declared(PROJECT["dependencies"]) - distributions(imported()) == set()


def test_every_import_of_the_package_is_declared():
    extras = [text for name, texts in PROJECT["optional-dependencies"].items() if name != "dev" for text in texts]
    known = declared(PROJECT["dependencies"] + extras)
    by_module = importlib.metadata.packages_distributions()
    undeclared = {module for module in imported() if not distributions({module}) & known and module in by_module}
    assert undeclared == set()
    of_extras = {"av", "laion_clap", "wandb", "tensorboard", "IPython"}
    assert {module for module in imported() if module not in by_module} <= of_extras


def test_the_lock_has_a_version_of_every_dependency_within_its_bounds():
    from packaging.requirements import Requirement

    lines = [line for line in (REPO / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    locked = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in (line.split("==") for line in lines)}
    outside = {"laion-clap", "ttmray"}  # has an environment and a lock of its own; ourselves
    texts = PROJECT["dependencies"] + [
        text for name, group in PROJECT["optional-dependencies"].items() if name != "laion-clap" for text in group
    ]
    for requirement in map(Requirement, texts):
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name not in outside:
            assert name in locked, name
            assert requirement.specifier.contains(locked[name]), f"{requirement} but locked {locked[name]}"
