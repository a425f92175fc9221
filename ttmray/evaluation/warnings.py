"""What a reader of an evaluation must know of its files."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ttmray.audio.clip import CLIP_S
from ttmray.evaluation.measure import OK

WINDOW_S = 10.0
"""What CLAP hears at a time, whatever the bundle."""
FEW_PROMPTS = 20
"""With fewer, differences below a standard deviation and a half of them go unseen, and single clips decide means."""
FULL_BAND_HZ = 32_000
"""Files of a lower rate lack sound that others have; FAD and the scores see that."""


def file_warnings(rows: Sequence[Mapping[str, Any]], clip_s: float = CLIP_S) -> list[str]:
    """What a reader of the numbers must know about the files; `clip_s` is the length of the bundle's clips."""
    warnings = []
    same: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["sha256"]:
            same.setdefault(row["sha256"], []).append(row)
    copies = [[f"{row['system']}: {row['path'].rpartition('/')[2]}" for row in some] for some in same.values()]
    copies = [some for some in copies if len(some) > 1]
    if copies:
        shown = "; ".join(" = ".join(some[:4]) for some in copies[:3]) + ("; ..." if len(copies) > 3 else "")
        warnings.append(f"{len(copies)} files occur more than once, byte by byte: {shown}.")
    for system in dict.fromkeys(row["system"] for row in rows):
        mine = [row for row in rows if row["system"] == system and row["status"] == OK]
        rates = Counter(row["sample_rate"] for row in mine if row["sample_rate"] < FULL_BAND_HZ)
        for rate, count in sorted(rates.items()):
            warnings.append(
                f"{system}: {count} files have a sample rate of {rate} Hz and hold nothing above {rate / 2000:g} kHz, "
                "which lowers their scores and raises FAD."
            )
        for odd, what in (
            ([row for row in mine if row["duration_s"] > WINDOW_S + 0.05], "longer than 10 s: CLAP sees the middle"),
            (
                [row for row in mine if row["duration_s"] < clip_s / 2],
                f"shorter than {clip_s / 2:g} s: scored as they are",
            ),
        ):
            if odd:
                warnings.append(f"{system}: {len(odd)} clips are {what}.")
        reasons = Counter(row["reason"] for row in rows if row["system"] == system and row["status"] != OK)
        if reasons:
            counts = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
            warnings.append(f"{system}: {sum(reasons.values())} clips are in no metric ({counts}).")
    return warnings


def few_prompts(systems: Sequence[Mapping[str, Any]]) -> list[str]:
    """Grave: systems with so few prompts that intervals and tests say next to nothing.

    Args:
        systems: `name` and `prompts`, the number of those with a clip.
    """
    return [
        f"{system['name']}: {system['prompts']} prompts are too few to tell systems apart, whatever the tests say; "
        f"take {FEW_PROMPTS} or more."
        for system in systems
        if 0 < system["prompts"] < FEW_PROMPTS
    ]


def without_reference() -> list[str]:
    """That two metrics are left out, and how to have them."""
    return [
        "FAD and KAD are left out: there is no reference set. `ttmray reference build NAME FOLDER_OR_CORPUS` makes "
        "one, and `--reference NAME` uses it."
    ]


def merged_warnings(warnings: Sequence[str], systems: Sequence[str]) -> list[str]:
    """Each warning once, where the first of its kind stands: what is said of several systems names all of them.

    Args:
        warnings: those about one system begin with `NAME: `.
    """
    about: dict[str, list[str]] = {}
    for warning in warnings:
        named = max((name for name in systems if warning.startswith(f"{name}: ")), key=len, default="")
        subjects = about.setdefault(warning.removeprefix(f"{named}: ") if named else warning, [])
        subjects += [named] if named and named not in subjects else []
    return [f"{', '.join(subjects)}: {text}" if subjects else text for text, subjects in about.items()]


def unjudged(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Clips to which the judge gave no score."""
    return [row for row in rows if row["status"] == OK and row["ccs"] is None]


def judge_warnings(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """How many clips of each system the judge gave no score, and the most frequent reason."""
    warnings = []
    for system in dict.fromkeys(row["system"] for row in rows):
        mine = [row for row in rows if row["system"] == system and row["status"] == OK]
        if silent := unjudged(mine):
            ((reason, _),) = Counter(row["message"] for row in silent).most_common(1)
            warnings.append(f"{system}: {len(silent)} of {len(mine)} clips have no CCS ({reason}).")
    return warnings
