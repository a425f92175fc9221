"""The shape of the package: sizes, names, layers. Read from its source, nothing is imported."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
PACKAGE = REPO / "ttmray"
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {file: ast.parse(file.read_text("utf-8")) for file in FILES}
LONG_FILES: set[str] = set()
LONG_FUNCTIONS: set[str] = set()
"""Known to be too long."""
EMPTY_NAMES = {"made", "found", "kept", "given", "wanted"}
"""They tell that something happened, not what the thing is."""
EMPTY_FILES = {f"ttmray/{name}.py" for name in ("config", "corpus/verify", "recipes/chain", "runs", "training/launch")}
"""Have such names still."""
LAYERS = (
    ("__main__",),
    ("cli",),
    ("recipes",),
    ("pretraining",),
    ("synth",),
    ("evaluation",),
    ("ranker", "training"),
    ("generation",),
    ("corpus",),
    ("models",),
    ("audio",),
    ("cluster",),
    ("runs", "parts"),
    ("config", "tables"),
    ("presets",),
    ("config_docs", "storage", "pages", "plugins", "quarantine", "statistics", "yaml_text"),
    ("console", "errors", ""),
)
"""Packages and modules of docs/architecture.md, from above; what stands in one row does not import each other."""
LEVEL = {name: len(LAYERS) - row for row, names in enumerate(LAYERS) for name in names}


def name_of(file: Path) -> str:
    """`ttmray.a.b` of a file."""
    return ".".join(file.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(file) for file in FILES}


def imports(tree: ast.AST, always: bool = False) -> Iterator[str]:
    """Modules of the package that a module imports, without those for type checkers alone.

    Args:
        always: only what runs when the module is imported.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if always and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else str(node.module)
        yield from imports(node, always)


def part(module: str) -> str:
    """Package or module below `ttmray` that a module belongs to."""
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("most", [500])
def test_no_file_is_longer_than_people_read(most: int) -> None:
    long = {file.relative_to(REPO).as_posix() for file in FILES if file.read_text("utf-8").count("\n") > most}
    assert long <= LONG_FILES


@pytest.mark.parametrize("most", [80])
def test_no_function_is_longer_than_a_screen(most: int) -> None:
    long = {
        f"{file.relative_to(REPO).as_posix()}:{node.name}"
        for file, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (node.end_lineno or 0) - node.lineno >= most
    }
    assert long <= LONG_FUNCTIONS


def test_a_class_name_means_one_thing() -> None:
    places = defaultdict(list)
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(file.relative_to(REPO).as_posix())
    assert {name: files for name, files in places.items() if len(files) > 1} == {}


def bound_names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(name, line) of whatever gets a name: variables, also of loops, `with`, comprehensions, `:=`, `except` and
    patterns; parameters, also of lambdas; functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ExceptHandler | ast.MatchAs | ast.MatchStar):
            yield node.name or "", node.lineno
        elif isinstance(node, ast.MatchMapping):
            yield node.rest or "", node.lineno


def test_names_say_what_they_hold() -> None:
    others = [file for folder in ("jobs", "benchmarks") for file in sorted((REPO / folder).rglob("*.py"))]
    trees = TREES | {file: ast.parse(file.read_text("utf-8")) for file in others}
    places = [
        f"{file.relative_to(REPO).as_posix()}:{line}: {name}"
        for file, tree in trees.items()
        for name, line in bound_names(tree)
        if name in EMPTY_NAMES and file.relative_to(REPO).as_posix() not in EMPTY_FILES
    ]
    assert places == []


def test_every_way_to_bind_a_name_is_seen() -> None:
    code = """
a = b: int = 1
c, (d, *e) = x
for f in x: pass
with x as g: pass
[h for h in x if (i := h)]
try: x
except E as j: pass
match x:
    case [k, *l] | {"m": m, **u}: pass
def n(o, /, p, *q, r=1, **s): lambda t: t
"""
    code = code.replace("a = b: int = 1", "a = 1\nb: int = 1")
    assert {name for name, _ in bound_names(ast.parse(code))} >= set("abcdefghijklmnopqrstu")


def test_public_functions_that_refuse_something_say_so() -> None:
    """Those at the top of a module whose own body raises `UserError`."""
    silent = []
    for file, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                raises = [one.exc for one in ast.walk(node) if isinstance(one, ast.Raise) and one.exc is not None]
                inner = [one for one in ast.walk(node) if isinstance(one, ast.FunctionDef) and one is not node]
                within = {id(exc) for one in inner for exc in ast.walk(one)}
                refuses = any(ast.unparse(exc).startswith("UserError(") and id(exc) not in within for exc in raises)
                if refuses and "UserError" not in (ast.get_docstring(node) or ""):
                    silent.append(f"{name_of(file)}.{node.name}")
    assert silent == []


def test_dependencies_point_down() -> None:
    up = []
    for file, tree in TREES.items():
        own = part(name_of(file))
        for other in imports(tree):
            if part(other) != own and LEVEL[part(other)] >= LEVEL[own]:
                up.append(f"{name_of(file)} imports {other}")
    assert up == []


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {name_of(file): sorted({*imports(tree, always=True)} - {name_of(file)}) for file, tree in TREES.items()}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"a cycle: {' -> '.join([*path[path.index(module) :], module])}"
        if module not in done:
            for other in graph[module]:
                visit(other, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_the_layers_are_those_of_the_architecture() -> None:
    text = (REPO / "docs/architecture.md").read_text("utf-8")
    block = re.search(r"## Layers\n\n```text\n(.*?)```", text, re.DOTALL)
    assert block is not None
    named = [
        name
        for line in block[1].splitlines()
        for name in re.findall(r"(?:^|(?<=[\s/]))([a-z_]+)(?:\.py|/)", line.split("   ")[0].replace("ttmray/", ""))
        if name not in ("jobs", "templates")
    ]
    levels = [LEVEL[name] for name in named]
    assert levels == sorted(levels, reverse=True)
    assert {*named, ""} == LEVEL.keys()
    assert {name_of(file).split(".")[1] for file in FILES if file.parent != PACKAGE or file.stem != "__init__"} == {
        *named
    }
