"""What callers pass, as the jobs take it: prompts, and configs with some fields changed."""

import os
from collections.abc import Mapping, Sequence
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
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    for text in texts:
        if isinstance(text, str) and is_table(text):
            raise UserError(f"{text!r} is a file, not a prompt.", f"For the prompts in it: Path({text!r}).")
    return given_prompts(texts, "prompts")


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
        return load_config(kind, None, (), merged(config.model_dump(mode="json"), plain)) if fields else config
    if config is not None and not isinstance(config, str | os.PathLike):
        raise UserError(
            f"config is a {type(config).__name__}, not a {kind.__name__}.", f"Give a {kind.__name__}, a file or a name."
        )
    return load_config(kind, None if config is None else os.fspath(config), (), plain)


def _plain(value: Any) -> Any:
    """Paths as text, at any depth: files of configs have no other."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value
