"""Configs that ship with the package: `--config debug/stage1` from any folder."""

from functools import cache
from pathlib import Path

from ttmray.errors import UserError

FOLDER = Path(__file__).parent / "configs"


def presets() -> dict[str, Path]:
    """Name, such as `paper/stage1-h200`, -> file."""
    return {path.relative_to(FOLDER).with_suffix("").as_posix(): path for path in sorted(FOLDER.rglob("*.yaml"))}


def shipped(path: str) -> str:
    """A file below `configs/` that presets name, such as `configs/debug/prompts.csv`: the package's, unless the working
    folder has one. Any other path as it is."""
    top, _, name = path.partition("/")
    if top != FOLDER.name or not name or ".." in name.split("/") or Path(path).exists():
        return path
    file = FOLDER / name
    return str(file) if file.is_file() else path


_COMMANDS = {
    "corpus": "score-corpus",
    "stage1": "train-sft",
    "stage2": "expert-iteration",
    "stage3": "train-crpo",
    "grpo": "train-grpo",
    "methods": "compare-methods",
    "ranker": "train-ranker",
    "train": "train-micro",
    "attm/evaluate": "attm evaluate",
}
"""Where the name of a preset, whole or its last part, is not that of its command; what follows a dash says for what
machine or variant it is."""


def command_of(preset: str) -> str:
    """The command whose config a preset is: `train-sft` of `paper/stage1-h200`."""
    name = preset.rpartition("/")[2].partition("-")[0]
    return _COMMANDS.get(preset, _COMMANDS.get(name, name))


@cache
def presets_of(command: str) -> list[str]:
    """Presets of a command; `plan` takes those of the job that it plans."""
    return [name for name in presets() if command_of(name) == ("score-corpus" if command == "plan" else command)]


def config_file(path: str) -> str:
    """The file that `--config` names: one that is there, else the preset of that name.

    Raises:
        UserError: there is neither, and it may be meant as a preset.
    """
    from ttmray.storage import is_remote  # here, because --help knows presets and is to be there at once

    if is_remote(path) or Path(path).expanduser().exists():
        return path
    known = presets()
    if path in known:
        return str(known[path])
    if Path(path).is_absolute() or Path(path).suffix or not path:
        return path  # whoever reads it says what is wrong with it
    raise UserError(f"{path}: there is no such file, and no preset of that name.", f"Presets: {', '.join(known)}.")
