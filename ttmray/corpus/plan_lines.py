"""A plan on the console: what decides whether to start, in at most ten lines. `plan.md` has all, with reasons."""

from collections.abc import Iterator, Mapping, Sequence

from ttmray.corpus.config import CorpusConfig
from ttmray.corpus.plan import DECODE_REALTIME, Number
from ttmray.models.speed import about, cores, time_here

_COUNTED = ("ok", "tracks")


def catalogue_lines(report: Mapping[str, int | str]) -> Iterator[tuple[str, bool]]:
    """(line, whether it is a warning): each warning, and one line about all else that there is to tell."""
    told = []
    for name, value in report.items():
        if name.startswith("warning") or name == "audio":
            yield f"{name}: {value}", True
        elif value and name not in _COUNTED:
            told.append(f"{name.replace('_', ' ')} {value}")
    if told:
        yield f"catalogue: {', '.join(told)}", False


def plan_lines(numbers: Sequence[Number], config: CorpusConfig, bundle: str, known_costs: bool) -> list[str]:
    """Lines about a plan.

    Args:
        numbers: see `derived_numbers`.
        bundle: its name.
        known_costs: the FLOPs of `numbers` are those of the bundle's models.
    """
    value = {name: number for name, number, _ in numbers}
    rejected = [f"{name.removeprefix('rejected: ')} {n}" for name, n in value.items() if name.startswith("rejected: ")]
    splits = ", ".join(f"{split} {value[f'{split} tracks']}" for split in ("train", "validation", "test"))
    lost = f", rejected already: {', '.join(rejected)}" if rejected else ""
    written = int(value["bytes written, clips"]) + int(value["bytes written, captions"])
    memory = _bytes(value["decoder memory, bytes"])
    return [
        f"{value['tracks']} tracks, {value['usable tracks']} usable{lost}; {splits}",
        f"{value['expected clips']} clips expected ({_hours(value)}) in {value['units']} units; "
        f"{value['distinct captions']} captions",
        f"{_bytes(value['bytes read'])} to read, {_bytes(written)} to write; a decoder holds {memory}",
        _time(value, config, bundle, known_costs),
    ]


def _time(value: Mapping[str, int | float | str], config: CorpusConfig, bundle: str, known_costs: bool) -> str:
    """How long it takes on the machine that this runs on."""
    decoding = "unknown"
    if not _of_unknown_length(value):
        decoding = about(float(value["audio, h"]) * 3600 / DECODE_REALTIME / cores())
    if not known_costs:
        return f"time here: decoding {decoding} on {cores()} cores; models unknown, as FLOPs of bundle {bundle} are"
    models, reason = time_here(float(value["models, PFLOP"]) * 1e15, config.runtime.device)
    return f"time here: decoding {decoding} on {cores()} cores, models {models} per device ({reason})"


def _hours(value: Mapping[str, int | float | str]) -> str:
    if _of_unknown_length(value):
        return "of songs whose lengths are not known yet"
    return f"{_amount(value['clips, h'])} h of {_amount(value['audio, h'])} h"


def _of_unknown_length(value: Mapping[str, int | float | str]) -> bool:
    """Whether there are songs, and no length of any of them is known, as of a table without lengths and files."""
    return bool(value["usable tracks"]) and not value["audio, h"]


def _amount(value: int | float | str) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _bytes(value: int | float | str) -> str:
    if isinstance(value, str):
        return f"{value} bytes"
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value} bytes"
