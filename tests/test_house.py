"""The shape of the package: sizes, names, layers. Read from its source, nothing is imported."""

import ast
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
PACKAGE = REPO / "ttmray"
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {file: ast.parse(file.read_text("utf-8")) for file in FILES}
LONG_FILES: set[str] = set()
LONG_FUNCTIONS: set[str] = set()
"""Known to be too long."""
ARRAYS = ("ndarray", "NDArray", "Tensor")
AXES = (
    "n m d k samples frames channels batch blocks prompts pieces notes tokens width hidden dim bands stems partials "
    "resamples seeds clips count kinds labels features sources size length steps bins hop C_in C_out T_i n_mels n_fft "
    "num_mels data_dim embed_dim text_dim text_c_dim max_length crop_frames segment_frames candidates"
)
"""Words for sizes in shapes."""
_SIZE = rf"(?:\.\.\.|[A-Z][a-z]?\d?|\d+|{AXES.replace(' ', '|')})"
_SIZES = rf"{_SIZE}(?: (?:[-+*/]|//) {_SIZE})*"
SHAPE = re.compile(rf"(?<!\w)\((?:{_SIZES},|{_SIZES}(?:, {_SIZES})+)?\)|\bany shapes?\b|\bshapes of (?:the|its)\b")
"""`(B, T)`, `(samples,)`, `(2 * N, 512)`, `()`: sizes are capitals, numbers, `...` or words of `AXES`. Where nothing
depends on it, "any shape"; of the weights of a model, "the shapes of ..."."""
EMPTY_NAMES = {"made", "found", "kept", "given", "wanted"}
"""They tell that something happened, not what the thing is."""
LAYERS = (
    ("__main__",),
    ("cli",),
    ("serve",),
    ("api",),
    ("status", "verify"),
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
    ("inventory",),
    ("cost", "runs", "parts"),
    ("config", "tables"),
    ("presets",),
    ("config_docs", "storage", "pages", "plugins", "quarantine", "signals", "statistics", "yaml_text"),
    ("object_store",),
    ("hub", "local_files"),
    ("console", "errors", "json_text", "listing", ""),
)
"""Packages and modules of docs/architecture.md, from above; what stands in one row does not import each other."""
LEVEL = {name: len(LAYERS) - row for row, names in enumerate(LAYERS) for name in names}


def name_of(file: Path) -> str:
    """`ttmray.a.b` of a file."""
    return ".".join(file.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(file) for file in FILES}


def imports(tree: ast.AST, types: bool = False) -> Iterator[str]:
    """Modules of the package that a module imports, at once or late.

    Args:
        types: also those for type checkers alone.
    """
    for node in ast.iter_child_nodes(tree):
        if not types and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else str(node.module)
        yield from imports(node, types)


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
        elif isinstance(node, ast.alias):
            yield node.asname or "", node.lineno
        elif isinstance(node, ast.MatchMapping):
            yield node.rest or "", node.lineno


def test_names_say_what_they_hold() -> None:
    others = [file for folder in ("jobs", "benchmarks") for file in sorted((REPO / folder).rglob("*.py"))]
    trees = TREES | {file: ast.parse(file.read_text("utf-8")) for file in others}
    places = [
        f"{file.relative_to(REPO).as_posix()}:{line}: {name}"
        for file, tree in trees.items()
        for name, line in bound_names(tree)
        if name in EMPTY_NAMES
    ]
    assert places == []


def test_every_way_to_bind_a_name_is_seen() -> None:
    code = """
a = 1
b: int = 1
c, (d, *e) = x
for f in x: pass
with x as g: pass
[h for h in x if (i := h)]
try: x
except E as j: pass
match x:
    case [k, *l] | {"m": m, **u}: pass
def n(o, /, p, *q, r=1, **s): lambda t: t
import os as v
"""
    assert {name for name, _ in bound_names(ast.parse(code))} >= set("abcdefghijklmnopqrstuv")


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


def holds_arrays(annotation: ast.expr | None, arrays: Collection[str]) -> bool:
    """Whether it names arrays, alone or in a container. A function of arrays is none."""
    if annotation is None:
        return False
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        annotation = ast.parse(annotation.value, mode="eval").body
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value).endswith(("Callable", "Literal")):
        return False
    if isinstance(annotation, ast.Name | ast.Attribute):
        return ast.unparse(annotation).rpartition(".")[2] in arrays
    return any(holds_arrays(child, arrays) for child in ast.iter_child_nodes(annotation) if isinstance(child, ast.expr))


def array_names(trees: Iterable[ast.Module]) -> set[str]:
    """The types of arrays, and what modules call them: `Floats = NDArray[np.float64]`."""
    arrays = set(ARRAYS)
    for tree in trees:
        for node in tree.body:
            alias = isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript | ast.Attribute)
            if alias and holds_arrays(node.value, arrays):
                arrays |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return arrays


def shapeless(trees: Mapping[str, ast.Module]) -> list[str]:
    """Public functions and methods of arrays whose docstrings, and those of their classes, name no shape.

    An override needs none where the method of a base class has one.
    """
    arrays = array_names(trees.values())
    classes = {node.name: node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}

    def told(node: ast.FunctionDef | ast.ClassDef) -> bool:
        return SHAPE.search(ast.get_docstring(node) or "") is not None

    def told_by_a_base(owner: ast.ClassDef, method: str) -> bool:
        for base in owner.bases:
            above = classes.get(ast.unparse(base).partition("[")[0].rpartition(".")[2])
            if above is not None:
                own = [node for node in above.body if isinstance(node, ast.FunctionDef) and node.name == method]
                if (own and (told(own[0]) or told(above))) or told_by_a_base(above, method):
                    return True
        return False

    def of_arrays(node: ast.FunctionDef) -> bool:
        args = node.args
        all_args = [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg]
        annotations = [node.returns, *(arg.annotation for arg in all_args if arg is not None)]
        return any(holds_arrays(annotation, arrays) for annotation in annotations)

    places = []
    for module, tree in trees.items():
        owners: list[ast.Module | ast.ClassDef] = [
            tree,
            *(node for node in tree.body if isinstance(node, ast.ClassDef)),
        ]
        for owner in owners:
            if isinstance(owner, ast.ClassDef) and (owner.name.startswith("_") or told(owner)):
                continue
            for node in owner.body:
                if not isinstance(node, ast.FunctionDef) or node.name.startswith("_") or not of_arrays(node):
                    continue
                if any(ast.unparse(decorator).endswith("overload") for decorator in node.decorator_list):
                    continue
                inherited = isinstance(owner, ast.ClassDef) and told_by_a_base(owner, node.name)
                if not told(node) and not inherited:
                    name = f"{owner.name}.{node.name}" if isinstance(owner, ast.ClassDef) else node.name
                    places.append(f"{module}.{name}")
    return places


def test_public_functions_of_arrays_give_shapes() -> None:
    assert shapeless({name_of(file): tree for file, tree in TREES.items()}) == []


@pytest.mark.parametrize(
    "text", ["(B, T)", "(n,)", "()", "(..., samples)", "(2, 3)", "(2 * N, 512)", "(samples // 2,)"]
)
def test_a_shape_is_seen(text: str) -> None:
    assert SHAPE.search(f"A {text} array.")


@pytest.mark.parametrize(
    "text",
    ["(see above)", "(N)", "(key, address)", "(T x 2)", "(a note)", "(1)", "zeros(2, 3)", "call()", "shape of a net"],
)
def test_what_is_no_shape_is_not_taken_for_one(text: str) -> None:
    assert not SHAPE.search(f"A {text} array.")


def test_dependencies_point_down() -> None:
    up = []
    for file, tree in TREES.items():
        own = part(name_of(file))
        for other in imports(tree):
            if part(other) != own and LEVEL[part(other)] >= LEVEL[own]:
                up.append(f"{name_of(file)} imports {other}")
    assert up == []


def test_no_module_imports_itself_by_way_of_others() -> None:
    # also late or by type alone: that hides a circle and does not open it. The package's face gives its version to all
    face = {"ttmray"}
    graph = {name_of(file): sorted({*imports(tree, types=True)} - face) for file, tree in TREES.items()}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"a cycle: {' -> '.join([*path[path.index(module) :], module])}"
        if module not in done:
            for other in graph[module]:
                visit(other, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_json_is_read_in_one_place() -> None:
    # `json` tells too deep a nesting by an error that nobody thinks of
    own = PACKAGE / "json_text.py"
    calls = re.compile(r"json\.loads?\(|JSONDecodeError|from json import")
    assert [name_of(file) for file in FILES if file != own and calls.search(file.read_text("utf-8"))] == []


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


def test_every_environment_variable_that_is_read_is_in_the_readme():
    text = (REPO / "README.md").read_text("utf-8")
    reads = re.compile(r"environ(?:\.get\(|\[)\"(\w+)\"")
    names = {name for file in FILES for name in reads.findall(file.read_text("utf-8"))}
    names |= {name for file in FILES for name in re.findall(r"\"(TTMRAY_[A-Z_]*[A-Z])\"", file.read_text("utf-8"))}
    assert {"TTMRAY_WEIGHTS", "RAY_ADDRESS", "TTMRAY_JUDGE_KEY"} <= names
    assert not [name for name in sorted(names) if f"`{name}`" not in text]
