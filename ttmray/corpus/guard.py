"""The crash guard: a clip that kills its process ends in quarantine instead of being retried for ever.

Before a group of stages touches a unit it leaves a marker `attempts/<unit>.<group>.<n>`; the marker goes when
the group is done. A killed process leaves its marker, so the third marker means two deaths, and after
`MAX_ATTEMPTS` deaths the unit is run in a child process, track by track or clip by clip, where a death or a
time-out names the culprit. Markers of a killed job count too: at worst a unit then runs alone once.
"""

from collections.abc import Callable
from contextlib import suppress

from ttmray.corpus.unit import Unit
from ttmray.corpus.worker import WorkerDied
from ttmray.errors import UserError
from ttmray.storage import Folder

ATTEMPTS = "attempts"
MAX_ATTEMPTS = 3


def at_work(run: Folder) -> list[str]:
    """`<unit> (<group>)` of all that was begun and not ended, also what killed processes have left behind; with the
    number of earlier attempts that died."""
    deaths: dict[str, int] = {}
    for file in run.files(ATTEMPTS, sizes=False):
        name, _, n = file.name.rpartition(".")
        deaths[name] = max(deaths.get(name, 0), int(n) if n.isdigit() else 0)
    return [_told(*name.partition(".")[::2], deaths[name]) for name in sorted(deaths)]


def _told(unit: str, group: str, deaths: int) -> str:
    return f"{unit} ({group}, after {deaths} killed processes)" if deaths else f"{unit} ({group})"


def guarded(
    run: Folder, group: str, unit: Unit, together: Callable[[Unit], Unit], alone: Callable[[Unit], Unit]
) -> Unit:
    """Run `together(unit)`, or `alone(unit)` where this group has died on this unit `MAX_ATTEMPTS` times.

    Args:
        run: the run folder, which all processes of the job share.
        group: name of the group of stages.
    """
    markers = [f"{ATTEMPTS}/{unit.name}.{group}.{n}" for n in range(MAX_ATTEMPTS)]
    claimed = next((n for n, marker in enumerate(markers) if run.create(marker, b"")), None)
    mine = markers[: MAX_ATTEMPTS if claimed is None else claimed + 1]
    try:
        result = alone(unit) if claimed is None else together(unit)
    except WorkerDied:
        raise  # a death: its marker is what counts it
    except Exception:
        # An error is no death: the unit is innocent. The error itself matters more than a marker left behind.
        with suppress(UserError):
            for marker in mine:
                run.delete(marker)
        raise
    for marker in mine:
        run.delete(marker)
    return result
