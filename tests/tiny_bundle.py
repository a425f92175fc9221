"""A bundle's folder for tests of what is around weights."""

from pathlib import Path

from ttmray.models.folder_bundle import describe_folder


def without_weights(root: Path) -> Path:
    """A bundle of two roles, called as its folder, whose files are no weights."""
    for name in ("clap/model.safetensors", "clap/config.json", "backbone/model.safetensors"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode() * 100)
    describe_folder(root, root.name, "only a test", 5.0)
    return root
