"""Numbers of single clips from their audio, beyond levels, reward and CLAP score: chosen by name, or of one's own.

Each is a function of (channels, samples) float32 at 44.1 kHz that returns name -> number. The names become columns of
`clips.parquet` and metrics of the systems, with their mean and interval over prompts.
"""

import math
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import numpy as np

from ttmray.errors import UserError
from ttmray.plugins import function_named

BUILT_IN = {
    "small_world": "ttmray.synth.measures:clip_quality",
    "rhythm": "ttmray.synth.regularity:rhythm",
    "tuning": "ttmray.synth.regularity:tuning",
}
"""Name -> function that ships with the package."""
VOCALS = "vocals"
"""The one that needs a model, the separator of the bundle: `vocal_ratio`, energy of the vocals over that of the mix."""
ClipFunction = Callable[[np.ndarray], Mapping[str, float]]


def clip_functions(names: Sequence[str]) -> dict[str, ClipFunction]:
    """What makes the numbers, by what the config says: a name of `BUILT_IN`, or `module:function`; without `VOCALS`.

    Raises:
        UserError: there is no such function.
    """
    functions = {}
    for name in names:
        if name == VOCALS:
            continue
        if name not in BUILT_IN and ":" not in name:
            known = ", ".join([*BUILT_IN, VOCALS])
            raise UserError(f"clip_metrics: there is no {name!r}.", f"Known: {known}, module:function.")
        functions[name] = function_named(BUILT_IN.get(name, name), "clip_metrics")
    return functions


def versions(names: Sequence[str]) -> list[str]:
    """The names with the `VERSION` of the module of their function, where it has one: other versions measure anew."""
    functions = clip_functions(names)
    known = {name: getattr(sys.modules[one.__module__], "VERSION", "") for name, one in functions.items()}
    return [f"{name}@{version}" if (version := known.get(name, "")) else name for name in names]


def numbers_of(wave: np.ndarray, functions: Mapping[str, ClipFunction], path: str) -> dict[str, float]:
    """All numbers of a clip (channels, samples), named `<function>/<number>` by the names of the config.

    Args:
        path: of the clip, for messages.

    Raises:
        UserError: one is no finite number.
    """
    numbers: dict[str, float] = {}
    for name, function in functions.items():
        for key, value in function(wave).items():
            if not math.isfinite(value):
                raise UserError(f"clip_metrics: {name} gave {value} as {key} of {path}.", "Return finite numbers.")
            numbers[f"{name}/{key}"] = float(value)
    return numbers


def columns_of(numbers: Iterable[Mapping[str, float]], names: Sequence[str], taken: Collection[str]) -> dict[str, str]:
    """Column -> the function, with its version, whose number it has.

    Args:
        numbers: of all clips, as `numbers_of` names them.
        names: of the config.
        taken: columns and metrics that are something else.

    Raises:
        UserError: two functions call their numbers alike, or as something else is called.
    """
    made_by = dict(zip(names, versions(names), strict=True))
    columns: dict[str, str] = {}
    for name, _, column in (key.partition("/") for key in dict.fromkeys(key for one in numbers for key in one)):
        if columns.get(column, made_by[name]) != made_by[name] or column in taken:
            raise UserError(f"clip_metrics: {name} calls a number {column}, as something else is.", "Rename it.")
        columns[column] = made_by[name]
    return columns
