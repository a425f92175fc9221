"""What may happen to a file of a run, and how two runs are compared: for tests that damage everything."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ttmray.cli import main
from ttmray.errors import EXIT_BAD_INPUT, EXIT_OK, UserError


def _flip(file: Path, other: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def _folder(file: Path, other: Path) -> None:
    file.unlink()
    file.mkdir()
    (file / "mine.txt").write_text("of a person")


def _text(file: Path, other: Path) -> None:
    file.write_bytes("not what it was: é".encode("latin-1") * 40)


DAMAGES: dict[str, Callable[[Path, Path], object]] = {
    "deleted": lambda file, other: file.unlink(),
    "empty": lambda file, other: file.write_bytes(b""),
    "cut": lambda file, other: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "flipped": _flip,
    "of another run": lambda file, other: file.write_bytes(_alike(file, other).read_bytes()),
    "a folder": _folder,
    "unreadable text": _text,
}
"""Name -> what does it to a file, given the folder of another run."""


def _alike(file: Path, other: Path) -> Path:
    """The file of another run with the longest common path, of the same kind."""
    parts = file.parts
    same = [path for path in sorted(other.rglob(f"*{file.suffix}")) if path.is_file()]
    return max(same, key=lambda path: (path.name == file.name, path.parent.name == file.parent.name, -len(parts)))


def out_of_the_way(file: Path, target: Path) -> None:
    """What the message asks for where a folder has the name of a file: move it away."""
    shutil.move(file, target)


CLOCK = {"launch_seconds", "stages", "created", "this_launch", "swept_files", "cost"}


def without_clock(name: str, data: bytes) -> Any:
    """The content of a file without what depends on when and how fast it was made."""
    if name.endswith("_SUCCESS.json") and b'"fingerprint"' not in data:
        return sorted(json.loads(data)["files"])
    if name.endswith("summary.md"):
        return [line for line in data.decode().splitlines() if not re.match(r"- (index:|.* ms per clip)", line)]
    if not name.endswith(".json"):
        return data
    return _stripped(json.loads(data))


def _stripped(value: Any) -> Any:
    if isinstance(value, dict):
        files = {"sha256", "files"} if "fingerprint" in value and "files" in value else set()
        return {key: _stripped(item) for key, item in value.items() if key not in CLOCK | files}
    return [_stripped(item) for item in value] if isinstance(value, list) else value


def content(run: Path, leave_out: tuple[str, ...] = ()) -> dict[str, Any]:
    """Every file of a run without clocks, by name."""
    files = {str(path.relative_to(run)): path for path in run.rglob("*") if path.is_file()}
    files = {name: path for name, path in files.items() if path.name not in ("cost.json", "units.jsonl")}
    return {n: without_clock(n, p.read_bytes()) for n, p in files.items() if not n.startswith(leave_out or ("\0",))}


def damage_every_file(folder: Path, other: Path, work: Path, again: Callable[[Path], int], ways: Sequence[str]) -> int:
    """Damage each file that the marker of `folder` lists, and the marker, in copies: `ttmray verify` must find it, and
    `again`, called with the copy, make it what it was; returns how many damages there were.

    Args:
        other: a folder of the same kind with other content.
        work: empty folder for the copies.
        ways: names of `DAMAGES`.
    """
    names = [*json.loads((folder / "_SUCCESS.json").read_text())["files"], "_SUCCESS.json"]
    before = content(folder)
    assert main(["verify", str(folder)]) == EXIT_OK
    for number, (name, way) in enumerate((name, way) for name in names for way in ways):
        what, copy = f"{name} {way}", Path(shutil.copytree(folder, work / f"{number}/copy"))
        DAMAGES[way](copy / name, other)
        assert main(["verify", str(copy)]) == EXIT_BAD_INPUT, what
        try:
            code = again(copy)
        except UserError as error:
            if way != "a folder" or "Move it away" not in error.hint:
                raise
            out_of_the_way(copy / name, work / f"{number}/mine")
            code = again(copy)
        assert code == EXIT_OK, what
        assert main(["verify", str(copy)]) == EXIT_OK, what
        assert content(copy) == before, what
    return len(names) * len(ways)
