"""Configs that ship with the package: `--config debug/stage1` from any folder."""

from pathlib import Path

from ttmray.errors import UserError
from ttmray.storage import is_remote

FOLDER = Path(__file__).parent / "configs"


def presets() -> dict[str, Path]:
    """Name, such as `paper/stage1-h200`, -> file."""
    return {path.relative_to(FOLDER).with_suffix("").as_posix(): path for path in sorted(FOLDER.rglob("*.yaml"))}


def config_file(path: str) -> str:
    """The file that `--config` names: one that is there, else the preset of that name.

    Raises:
        UserError: there is neither, and it may be meant as a preset.
    """
    if is_remote(path) or Path(path).expanduser().exists():
        return path
    shipped = presets()
    if path in shipped:
        return str(shipped[path])
    if Path(path).is_absolute() or Path(path).suffix or not path:
        return path  # whoever reads it says what is wrong with it
    raise UserError(f"{path}: there is no such file, and no preset of that name.", f"Presets: {', '.join(shipped)}.")
