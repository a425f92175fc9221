"""What callers pass, as the jobs take it: prompts, and configs with some fields changed."""

import os
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from ttmray.config import ConfigT, load_config, merged
from ttmray.errors import UserError
from ttmray.generation.prompts import Prompt, checked_prompts, given_prompts, read_prompts
from ttmray.tables import is_table

Prompts = str | Path | Sequence[str] | Mapping[str, str]
"""A text, several, several with their ids, or, as a `Path`, a file of them."""


def prompts_from(prompts: Prompts) -> list[Prompt]:
    """Prompts with their ids.

    Raises:
        UserError: as `read_prompts`, or a text that names a file.
    """
    if isinstance(prompts, Path):
        return read_prompts(str(prompts))
    if isinstance(prompts, Mapping):
        return checked_prompts(list(prompts.items()), "prompts")
    texts = [prompts] if isinstance(prompts, str) else items_of(prompts, "prompts", "Give a text, several, or a Path.")
    for text in texts:
        if isinstance(text, str) and is_table(text):
            raise UserError(f"{text!r} is a file, not a prompt.", f"For the prompts in it: Path({text!r}).")
    return given_prompts(texts, "prompts")


def path_of(value: Any, what: str) -> str:
    """A path or address as text.

    Raises:
        UserError: it is neither.
    """
    if not isinstance(value, str | os.PathLike):
        raise UserError(f"{what} is {value!r}, not a path.", "Give a path, or an address such as s3://bucket/prefix.")
    return os.fspath(value)


def items_of(values: Any, what: str, way_out: str) -> list[Any]:
    """Several things as a list.

    Raises:
        UserError: it is something else.
    """
    if not isinstance(values, Iterable):
        raise UserError(f"{what} is {values!r}.", way_out)
    return list(values)


def texts_of(values: Any, what: str) -> list[str]:
    """One text, or several; None counts as an empty one.

    Raises:
        UserError: something else.
    """
    way_out = "Give a text, or several."
    texts = [values] if isinstance(values, str) else items_of(values, what, way_out)
    for i, text in enumerate(texts):
        if not isinstance(text, str | None):
            raise UserError(f"{what}, number {i}: {text!r} is no text.", way_out)
    return [text or "" for text in texts]


def number_of(value: Any, what: str, low: float, high: float, whole: bool = False) -> float:
    """A number in [low, high]; with `whole` one without a fraction.

    Raises:
        UserError: it is none, or outside.
    """
    kind = "a whole number" if whole else "a number"
    right = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
    if not right or not low <= value <= high:
        raise UserError(f"{what} is {value!r}.", f"Give {kind} from {low:g} to {high:g}.")
    return value


def config_from(kind: type[ConfigT], config: str | os.PathLike[str] | ConfigT | None, fields: Mapping[str, Any]) -> Any:
    """A config with some fields changed, checked as a whole.

    Args:
        kind: its class.
        config: such an object, a YAML file or the name of a preset (`debug/stage1`); None: the defaults.
        fields: field -> value; mappings change what they name.

    Raises:
        UserError: naming each wrong field and the way out.
    """
    plain = _plain(fields)
    if isinstance(config, kind):
        return load_config(kind, fields=merged(config.model_dump(mode="json"), plain)) if fields else config
    if config is not None and not isinstance(config, str | os.PathLike):
        raise UserError(
            f"config is a {type(config).__name__}, not a {kind.__name__}.", f"Give a {kind.__name__}, a file or a name."
        )
    file = None if config is None else os.fspath(config)
    return load_config(kind, file, fields=plain, missing="give {place}, or `{place}: {value}` in the config")


def _plain(value: Any) -> Any:
    """Paths as text, at any depth: files of configs have no other."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value
