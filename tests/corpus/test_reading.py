"""What `docs/data-formats.md` promises to readers: its code runs on a finished run, its table is the schema."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ttmray.corpus import index, shards
from ttmray.storage import Folder

DOCUMENT = Path(__file__).resolve().parents[2] / "docs/data-formats.md"
RUN = "runs/my-corpus"


@pytest.fixture(scope="module")
def read(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Names that are defined after all Python blocks of the document ran, in order, beside a finished run."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / RUN).parent.mkdir()
    (folder / RUN).symlink_to(finished_run)
    names: dict[str, Any] = {}
    blocks = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HF_HOME", str(folder / "hf"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        for block in blocks:
            exec(compile(block, str(DOCUMENT), "exec"), names)
        names["samples"] = list(names["dataset"])  # it opens its files when they are needed, by relative name
    return names


@pytest.fixture(scope="module")
def rows(finished_run: Path) -> list[dict[str, Any]]:
    return pq.read_table(finished_run / "index.parquet").to_pylist()


def samples(run: Path) -> dict[str, dict[str, Any]]:
    folder = Folder.at(str(run))
    found: dict[str, dict[str, Any]] = {}
    for entry in folder.files(shards.SHARDS):
        found |= dict(shards.read_samples(folder.read(f"{shards.SHARDS}/{entry.name}"), entry.name))
    return found


def test_pandas_reads_every_row_and_the_reasons(read: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    assert read["index"].key.tolist() == [row["key"] for row in rows]
    assert read["reasons"].sum() == sum(row["status"] != "ok" for row in rows) > 0
    assert read["best"].reward_score.notna().all()


def test_webdataset_gives_exactly_the_training_clips(
    read: dict[str, Any], rows: list[dict[str, Any]], finished_run: Path
) -> None:
    wanted = {row["key"] for row in rows if row["status"] == "ok" and row["split"] == "train"}
    ours = samples(finished_run)
    seen = {sample["__key__"]: sample for sample in read["samples"]}
    assert seen.keys() == wanted
    assert wanted
    for key, sample in seen.items():
        for member in ("latent_mean.npy", "latent_std.npy", "clap_audio.npy", "mert.npy"):
            np.testing.assert_array_equal(sample[member], ours[key][member])
    assert read["mean"].dtype == np.float16
    assert read["reward"] in {row["instrumental_reward_score"] for row in rows}


def test_datasets_gives_the_same_latents(read: dict[str, Any], finished_run: Path) -> None:
    ours = samples(finished_run)[read["key"]]["latent_mean.npy"]
    np.testing.assert_array_equal(np.asarray(read["latent"], np.float16), ours)


def test_every_ok_clip_finds_the_text_features_of_its_caption(read: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if row["status"] == "ok":
            assert read["text"][f"{row['caption_id']}.t5"].shape == read["t5"].shape
            assert np.isfinite(read["text"][f"{row['caption_id']}.clap"]).all()
    assert read["t5"].dtype == np.float16


def test_the_table_of_columns_is_the_schema() -> None:
    section = DOCUMENT.read_text(encoding="utf-8").split("\n## Index\n")[1].split("\n## ")[0]
    written = re.findall(r"^\| (\w+) \| (\w+) \|", section, re.MULTILINE)[1:]
    types = {"string": pa.string(), "int32": pa.int32(), "int64": pa.int64(), "double": pa.float64()}
    assert pa.schema([(name, types[kind]) for name, kind in written]) == index.SCHEMA


def test_every_file_of_a_run_is_described(finished_run: Path) -> None:
    section = DOCUMENT.read_text(encoding="utf-8").split("\n## Run folder\n")[1].split("\n## ")[0]
    names = re.findall(r"`([\w./<>-]+)`", "".join(line.split("|")[1] for line in section.splitlines() if "|" in line))
    patterns = [re.escape(name).replace("<unit>", r"u\d+").replace("<hash>", "[0-9a-f]{12}") for name in names]
    for path in finished_run.rglob("*"):
        if path.is_file():
            name = path.relative_to(finished_run).as_posix()
            assert any(re.fullmatch(pattern, name) for pattern in patterns), name


def test_members_of_a_clip_are_the_described_ones_in_order(finished_run: Path) -> None:
    section = DOCUMENT.read_text(encoding="utf-8").split("\n## Shards\n")[1].split("\n## ")[0]
    described = re.findall(r"^\| `<key>\.([\w.]+)` ", section, re.MULTILINE)
    for sample in samples(finished_run).values():
        assert list(sample) == [member for member in described if member != "flac"]
