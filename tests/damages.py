"""What may happen to a file of a run, and how two runs are compared: for tests that damage everything."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


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
    files = {name: path for name, path in files.items() if path.name != "cost.json"}
    return {n: without_clock(n, p.read_bytes()) for n, p in files.items() if not n.startswith(leave_out or ("\0",))}
