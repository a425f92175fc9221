"""JSON that anybody may have written: what is wrong with it is always a `ValueError`."""

import json
from collections.abc import Callable
from typing import Any


def read_json(text: str | bytes, object_hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """The value of a JSON text (bytes: UTF-8, 16 or 32).

    Args:
        object_hook: makes something else of each object, as in `json.loads`.

    Raises:
        ValueError: it is none, or it nests deeper than Python's stack, which `json` tells by a `RecursionError`.
    """
    try:
        return json.loads(text, object_hook=object_hook)
    except RecursionError as error:
        raise ValueError("values are nested too deeply") from error


def as_read(value: Any) -> Any:
    """Plain data as it will be read from its JSON: tuples are lists, keys are strings."""
    return json.loads(json.dumps(value))
