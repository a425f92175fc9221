"""Run configs: frozen pydantic models, read from YAML, changed with `--set a.b=c`, checked before any work.

What changes results is *identity* and enters the fingerprint of a run. What only says where and how fast
(paths, workers, batch sizes, devices) is *execution*, is declared with `execution(...)`, and does not. A field that is
new is declared with `added(...)`: runs from before it keep their fingerprint.
"""

import copy
import difflib
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema

from ttmray.config_docs import field_lines
from ttmray.errors import UserError
from ttmray.presets import config_file, shipped
from ttmray.storage import absolute, read_file
from ttmray.yaml_text import read_override, read_yaml


class IdentityPart:
    """Marks a type of which only a part decides results: `Annotated[str, IdentityPart(name_without_path)]`."""

    def __init__(self, part: Callable[[Any], Any]) -> None:
        self.of = part


class Config(BaseModel):
    """Base of every config: frozen, no unknown keys, the docstring under a field is its description."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )


ConfigT = TypeVar("ConfigT", bound=Config)


def execution(default: Any = ..., **constraints: Any) -> Any:
    """A field that says where or how fast, and is therefore no part of a run's identity."""
    return Field(default, json_schema_extra={"execution": True}, **constraints)


def added(default: Any, **constraints: Any) -> Any:
    """A field that came when runs had been made without it, by what is now its default for good.

    At its default it is no part of the identity, so that those runs go on.
    """
    return Field(default, json_schema_extra={"added": True}, **constraints)


def _located(value: str) -> str:
    try:
        return absolute(shipped(value))
    except UserError as error:
        raise ValueError(f"{error.message} {error.hint}") from error


Location = Annotated[str, AfterValidator(_located), WithJsonSchema({"type": "string", "format": "path"})]
"""Where a file or folder is: a local path or a URI; absolute once it is in a config, because workers run elsewhere.

What is relative is so to the folder in which the command runs, wherever it was written; `~` is the home folder. A file
of `configs/` that is not there is the package's. Empty text, and a scheme alone, are refused.
"""


Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]
"""`cpu`, `cuda`, `cuda:1`, or `auto`: cuda where there is one."""


def identity(config: Config) -> dict[str, Any]:
    """The part of a config that changes results, as plain JSON types."""
    plain: dict[str, Any] = {}
    for name, field in type(config).model_fields.items():
        extra = field.json_schema_extra
        value = getattr(config, name)
        if isinstance(extra, dict) and (extra.get("execution") or (extra.get("added") and value == field.default)):
            continue
        for mark in (*field.metadata, *_marks(field.annotation)):
            value = mark.of(value) if isinstance(mark, IdentityPart) and value is not None else value
        plain[name] = identity(value) if isinstance(value, Config) else _plain(value)
    return plain


def fingerprint(value: Any) -> str:
    """Hex SHA-256 of a value of plain JSON types, independent of key order.

    Raises:
        TypeError, ValueError: for anything without one stable encoding (NaN, objects, bytes).
    """
    return hashlib.sha256(_encoded(value)).hexdigest()


def _encoded(value: Any) -> bytes:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)
    return text.encode()


def fingerprint_of_rows(rows: Iterable[Any]) -> str:
    """`fingerprint` of a list of rows, which need not be in memory at once."""
    digest, between = hashlib.sha256(b"["), b""
    for row in rows:
        digest.update(between + _encoded(row))
        between = b","
    digest.update(b"]")
    return digest.hexdigest()


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Human-readable lines for every leaf in which two nested plain values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in sorted(old.keys() | new.keys()):
            place = f"{where}.{key}" if where else str(key)
            if key not in old:
                lines.append(f"{place}: (absent) -> {new[key]!r}")
            elif key not in new:
                lines.append(f"{place}: {old[key]!r} -> (absent)")
            else:
                lines += differences(old[key], new[key], place)
        return lines
    return [] if old == new else [f"{where}: {old!r} -> {new!r}"]


def load_config(
    kind: type[ConfigT],
    path: str | None = None,
    sets: Sequence[str] = (),
    fields: Mapping[str, Any] | None = None,
    missing: str = "--set {place}={value}, or `{place}: {value}` in the config",
) -> ConfigT:
    """Read a YAML file, apply `a.b=value` overrides in order, then values that are there already, and validate.

    Args:
        kind: the config class.
        path: local path or URI of a YAML mapping, or the name of a preset (`debug/stage1`); None starts from the
            defaults.
        sets: overrides; each value is parsed as YAML, so `true`, `3`, `[1, 2]` and `null` work, but a `#` is part of
            it and begins no comment. Positions of a list count from 0: `sources.0.split=all`.
        fields: field -> value, such as the flags of a command; these count before all others. Mappings are merged.
        missing: how whoever reads the message gives a field that is required, with the places `place` and `value`.

    Raises:
        UserError: naming the file, each wrong field and the way out.
    """
    plain: Any = {}
    if path is not None:
        try:
            plain = read_yaml(read_file(config_file(path)))
        except yaml.YAMLError as error:
            raise UserError(f"{path} is not valid YAML: {error}", "Mend it near that line.") from error
        if plain is None:
            plain = {}
        if not isinstance(plain, dict):
            raise UserError(f"{path} holds a {type(plain).__name__}, not a mapping of fields.", "Write `field: value`.")
    for assignment in sets:
        plain = _with_override(plain, assignment)
    plain = merged(plain, fields or {})
    try:
        return kind.model_validate(plain)
    except ValidationError as error:
        problems = [_explain(kind, problem, missing) for problem in error.errors()]
        source = path if path is not None else "the config"
        raise UserError(f"{source} is not a valid {kind.__name__}:\n  " + "\n  ".join(problems)) from error


def merged(plain: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `plain` with other values of some fields; of a mapping, those that are not named stay."""
    changed = copy.deepcopy(dict(plain))
    for name, value in fields.items():
        old = changed.get(name)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            changed[name] = merged(old, value)
        else:
            changed[name] = copy.deepcopy(value)
    return changed


def _marks(annotation: Any) -> list[Any]:
    """What stands beside the types inside of a union: `Annotated[str, mark] | None`."""
    inside = list(get_args(annotation))
    return [mark for one in inside for mark in (*getattr(one, "__metadata__", ()), *_marks(one))]


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Config):
        return identity(value)
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"{type(value).__name__} has no stable encoding; keep configs to plain types")


def _with_override(plain: dict[str, Any], assignment: str) -> dict[str, Any]:
    path, separator, text = assignment.partition("=")
    keys = path.strip().split(".")
    if not separator or not all(keys):
        raise UserError(f"--set {assignment!r} is not of the form a.b=value.", "Example: --set runtime.workers=4")
    try:
        value = read_override(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {assignment!r}: the value is not valid YAML: {error}", "Quote it.") from error
    changed: dict[str, Any] = copy.deepcopy(plain)
    node: Any = changed
    for key, following in zip(keys, [*keys[1:], None], strict=True):
        place = _place(node, key, assignment)
        if following is None:
            node[place] = value
            break
        child = node[place] if isinstance(node, list) else node.get(place)
        if not isinstance(child, dict | list):
            node[place] = child = {}
        node = child
    return changed


def _place(node: Any, key: str, assignment: str) -> Any:
    """`key` as a name, or as a position where `node` is a list."""
    if not isinstance(node, list):
        return key
    if key.isdecimal() and int(key) < len(node):
        return int(key)
    raise UserError(
        f"--set {assignment!r}: {key} is not one of the {len(node)} positions of that list.",
        "Positions count from 0; to add one, set the whole list.",
    )


def _explain(kind: type[BaseModel], problem: Any, missing: str) -> str:
    place = [str(part) for part in problem["loc"]]
    if problem["type"] == "missing":
        path, value = _required(kind, place)
        return f"{'.'.join(place)}: is required: {missing.format(place=path, value=value)}"
    if problem["type"] == "extra_forbidden":
        owner = _model_at(kind, place[:-1])
        close = difflib.get_close_matches(place[-1], list(owner.model_fields), n=1) if owner else []
        advice = f"; did you mean {'.'.join([*place[:-1], close[0]])}?" if close else ""
        known = f" (known: {', '.join(owner.model_fields)})" if owner and not close else ""
        return f"{'.'.join(place)}: unknown field{advice}{known}"
    message = problem["msg"].removeprefix("Value error, ")
    entered = problem.get("input")
    if problem["type"] in ("tuple_type", "list_type"):
        example = entered if isinstance(entered, str | int | float) else "a, b"
        return f"{'.'.join(place)}: needs a list, in brackets: [{example}] (got {entered!r})"
    if problem["type"] == "too_short" and "min_length" in problem.get("ctx", {}):
        least = problem["ctx"]["min_length"]
        return f"{'.'.join(place)}: needs a list of {least} or more, in brackets (got {entered!r})"
    shown = f" (got {entered!r})" if isinstance(entered, str | int | float | bool) else ""
    return f"{'.'.join(place) or 'config'}: {message}{shown}"


_VALUES = {"path": "PATH", "string": "TEXT", "integer": "N", "number": "X", "list of": "[...]"}
"""Start of a type in words -> what stands for a value of it."""


def _required(kind: type[BaseModel], place: Sequence[str]) -> tuple[str, str]:
    """The field to set where one is missing, which of a section is the first that it needs, and what stands for its
    value."""
    start = ".".join("N" if part.isdecimal() else part for part in place)
    for line, _ in field_lines(kind.model_json_schema()):
        path, _, rest = line.partition(": ")
        if f"{path}.".startswith(f"{start}.") and rest.endswith(" (required)") and not rest.startswith("section"):
            value = next((shown for words, shown in _VALUES.items() if rest.startswith(words)), "{...}")
            value = "FOLDER" if path.rpartition(".")[2] == "output" else value
            return ".".join([*place, path.removeprefix(start).lstrip(".")]).rstrip("."), value
    return ".".join(place), "{...}"


def _model_at(kind: type[BaseModel], place: Sequence[str]) -> type[BaseModel] | None:
    node: type[BaseModel] | None = kind
    for key in place:
        field = node.model_fields.get(key) if node is not None else None
        kinds = () if field is None else (field.annotation, *get_args(field.annotation))  # `Model` or `Model | None`
        node = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
    return node
