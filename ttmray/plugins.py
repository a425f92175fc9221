"""What a config names in modules of others: `module:Name`."""

from importlib import import_module
from typing import Any

from ttmray.errors import UserError

ENTRY = r"^\w+(\.\w+)*:\w+$"
"""Form of such a name, for fields of configs."""


def named(path: str) -> Any:
    """What `module:Name` names.

    Raises:
        ImportError: there is no such module, or it fails when it is imported.
        AttributeError: it has nothing of that name.
    """
    place, _, name = path.partition(":")
    if not place or place.startswith("."):
        raise ImportError(f"{place!r} is no full name of a module")
    try:
        module = import_module(place)
    except (ImportError, UserError):
        raise
    except Exception as error:  # whatever a module of others does: who names it wants to know
        raise ImportError(f"{place} fails when it is imported: {type(error).__name__}: {error}") from error
    return getattr(module, name)


def function_named(path: str, field: str) -> Any:
    """The function that a field of a config names.

    Raises:
        UserError: there is none.
    """
    try:
        function = named(path)
    except (ImportError, AttributeError, ValueError) as error:
        way_out = "Its module must be on the PYTHONPATH of every process."
        raise UserError(f"{field}: {path} cannot be imported: {error}", way_out) from error
    if not callable(function):
        raise UserError(f"{field}: {path} is no function.", "Name one as module:function.")
    return function
