"""Latents of the public trainer become a corpus that training reads."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ttmray
from ttmray.cli import main
from ttmray.corpus import index
from ttmray.corpus.npz import import_npz
from ttmray.corpus.verify import problems
from ttmray.errors import EXIT_OK, UserError
from ttmray.storage import Folder

ROWS = {
    "train": [("1085700_0", "a harp"), ("1085700_1", "a harp"), ("1085701_0", "a  choir"), ("1085701_2", "a  choir")],
    "val": [("20", "drums")],
}


def arrays(seed: int, frames: int = 6, channels: int = 20) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"text_features": (77, 64), "text_features_c": (512,)}
    shapes |= {"mean": (frames, channels), "std": (frames, channels)}
    return {name: np.abs(draw.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    """Two splits as the trainer's extraction leaves them."""
    seed = 0
    for split, rows in ROWS.items():
        folder = tmp_path / f"{split}-npz"
        folder.mkdir()
        for i, _ in enumerate(rows):
            np.savez(folder / f"{i}.npz", **arrays(seed + i))
        lines = "".join(f"{one}\t{caption}\n" for one, caption in rows)
        (tmp_path / f"{split}-npz.tsv").write_text(f"id\tcaption\n{lines}")
        seed += 10
    return tmp_path


def test_every_file_is_a_clip_with_its_latents_text_and_split(layout):
    out = layout / "corpus"
    command = ["attm", "import", str(layout / "train-npz"), "--validation", str(layout / "val-npz")]
    command += ["--out", str(out), "--bundle", "debug-16k"]
    assert main(command) == EXIT_OK
    run = Folder.at(str(out))
    assert list(problems(run)) == []
    rows = {row["key"]: row for row in index.read_merged(run).to_pylist()}
    assert {key: (row["split"], row["caption"], row["start_s"]) for key, row in rows.items()} == {
        "1085700_0": ("train", "a harp", 0.0), "1085700_1": ("train", "a harp", 10.0),
        "1085701_0": ("train", "a choir", 0.0), "1085701_1": ("train", "a choir", 20.0),
        "20_0": ("validation", "drums", 0.0),
    }  # fmt: skip
    assert rows["20_0"]["reward_score"] is None
    before = sorted(file.name for file in run.files())
    assert main(command) == EXIT_OK
    assert sorted(file.name for file in run.files()) == before, "a relaunch makes nothing anew"


def test_what_was_stored_is_what_was_extracted(layout):
    out = layout / "corpus"
    import_npz(str(layout / "train-npz"), str(out), bundle="debug-16k")
    samples = {sample.key: sample for sample in ttmray.open_corpus(out).samples(score=None)}
    original = arrays(2)
    stored = samples["1085701_0"]
    np.testing.assert_array_equal(stored.mean, original["mean"].astype(np.float16))
    np.testing.assert_array_equal(stored.std, original["std"].astype(np.float16))
    np.testing.assert_array_equal(stored.text, original["text_features"].astype(np.float16))
    np.testing.assert_array_equal(stored.text_c, original["text_features_c"])
    assert stored.score is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("row", "Extract the rest"),
        ("file", "remove the others"),
        ("nan", "not finite"),
        ("shape", "has the shape"),
        ("cut", "cannot be read"),
        ("id", "no id"),
        ("caption", "two captions"),
        ("table", "beside it"),
    ],
)
def test_what_does_not_fit_is_named(layout, change: str, message: str):
    table, first = layout / "train-npz.tsv", layout / "train-npz/0.npz"
    content: dict[str, Any] = arrays(0)
    if change == "file":
        (first.parent / "other.npz").touch()
    elif change == "row":
        table.write_text(table.read_text() + "99_0\tmore\n")
    elif change == "id":
        table.write_text(table.read_text().replace("1085700_0", "../x_0"))
    elif change == "caption":
        table.write_text(table.read_text().replace("1085700_1\ta harp", "1085700_1\ta drum"))
    elif change == "table":
        table.unlink()
    elif change == "cut":
        first.write_bytes(first.read_bytes()[:100])
    else:
        content |= {"mean": content["mean"] * np.nan if change == "nan" else content["mean"][0]}
        np.savez(first, **content)
    with pytest.raises(UserError) as caught:
        import_npz(str(layout / "train-npz"), str(layout / "corpus"), bundle="debug-16k")
    assert message in str(caught.value)
