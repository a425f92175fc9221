"""Runs of versions that did not note where things lie: their index learns it once, and nothing else changes."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_corpus import write_random_corpus

from ttmray.cli import main
from ttmray.corpus import index, shards
from ttmray.corpus.finalise import finalise
from ttmray.corpus.plan import Plan
from ttmray.corpus.upgrade import latent_places, upgrade
from ttmray.corpus.verify import problems
from ttmray.errors import UserError
from ttmray.storage import Folder

SIZES = {"latent": (5, 4), "text": (3, 8), "clips_per_track": 3}


def as_before(folder: Path, *units: str) -> Path:
    """Make what this version wrote look like what an older one did: all, or some units."""
    for path in [folder / "index.parquet", *(folder / "index").glob("*.parquet")]:
        if path.exists() and (not units or path.stem in units):
            table = pq.read_table(path)
            metadata = json.loads((table.schema.metadata or {}).get(index.METADATA_KEY, b'{"files": {}}'))
            for facts in metadata["files"].values():
                facts.pop("places", None)
                facts.pop("shape", None)
            older = table.drop_columns(index.PLACES)
            if table.schema.metadata:
                older = older.replace_schema_metadata({index.METADATA_KEY: json.dumps(metadata, sort_keys=True)})
            path.unlink()  # a link to another run
            pq.write_table(older, path, compression="zstd")
    if (marker := folder / "_SUCCESS.json").exists():
        said = json.loads(marker.read_bytes())
        marker.unlink()
        marker.write_text(json.dumps({name: said[name] for name in ("fingerprint", "summary")}))
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("upgrade") / "new"
    write_random_corpus(str(folder), tracks=7, captions=3, validation=1, unit_clips=6, **SIZES)
    return folder


@pytest.fixture
def old(new: Path, tmp_path: Path) -> Path:
    return as_before(Path(shutil.copytree(new, tmp_path / "old")))


def test_the_upgraded_index_has_the_bytes_of_a_new_one_and_nothing_else_changes(old, new, capsys):
    before = content(old)
    assert main(["corpus", "upgrade", str(old)]) == 0
    assert "21 of them since now" in capsys.readouterr().out
    after = content(old)
    assert after["index.parquet"] == (new / "index.parquet").read_bytes()
    assert {**after, "index.parquet": b""} == {**before, "index.parquet": b""}
    assert main(["corpus", "upgrade", str(old)]) == 0
    assert content(old) == after
    assert main(["corpus", "verify", str(old)]) == 0


def test_verify_names_the_command(old, capsys):
    assert main(["corpus", "verify", str(old)]) == 2
    assert f"ttmray corpus upgrade {old}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("column", ["latent_std_at", "latent_frames", "caption_file", "caption_t5_at", "caption_width"])
def test_verify_finds_a_place_that_is_not_that_of_the_file(new, tmp_path, column):
    run = Folder.at(str(shutil.copytree(new, tmp_path / "run")))
    rows = index.read_merged(run)
    values = rows[column].to_pylist()
    values[4] = "captions/other" if column == "caption_file" else values[4] + 2
    field = rows.schema.field(column)
    rows = rows.set_column(rows.schema.get_field_index(column), field, pa.array(values, field.type))
    run.write("index.parquet", index.parquet_bytes(rows))
    changed, line = problems(run)
    assert changed.startswith("index.parquet: ")
    assert line.startswith(f"index.parquet: {rows['key'][4]}: {column} is {values[4]}, the file has ")


def test_a_bucket_is_upgraded_like_a_folder(old, new, bucket):
    run = Folder.at(f"{bucket}/run")
    for name, data in content(old).items():
        run.write(name, data)
    assert upgrade(run) == 21
    assert run.read("index.parquet") == (new / "index.parquet").read_bytes()


def test_the_end_of_a_job_that_an_older_version_began_adds_what_is_missing(new, tmp_path):
    run = Folder.at(str(as_before(Path(shutil.copytree(new, tmp_path / "run")), "u000000", "u000002")))
    described = json.loads(run.read("run.json"))
    finalise(run, Plan.load(run), described, 0.0)
    assert run.read("index.parquet") == (new / "index.parquet").read_bytes()


def test_a_damaged_file_is_named_and_the_index_stays(old):
    before = content(old)
    for part, words in (("captions", "is damaged: Expecting value"), ("shards", "is no array")):
        path = sorted((old / part).iterdir())[0]
        data = path.read_bytes()
        path.write_bytes(data[:8] + b"x" * (len(data) - 8) if part == "captions" else data.replace(b"NUMPY", b"NUMPI"))
        with pytest.raises(UserError, match=words) as caught:
            upgrade(Folder.at(str(old)))
        assert path.name in caught.value.message
        path.write_bytes(data)
    path.write_bytes(shards.tar_bytes({}))
    with pytest.raises(UserError, match=r"clip t00000\d_0 is not there"):
        upgrade(Folder.at(str(old)))
    path.write_bytes(data)
    assert content(old) == before


def test_what_is_not_finished_is_refused_with_the_way_out(old, tmp_path):
    (old / "_SUCCESS.json").unlink()
    with pytest.raises(UserError, match="is not a finished corpus") as caught:
        upgrade(Folder.at(str(old)))
    assert "Start its job again" in caught.value.hint


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_cut_or_changed_file_gives_places_or_one_kind_of_error(new, data):
    part, find = data.draw(st.sampled_from([("shards", latent_places), ("captions", shards.text_places)]))
    damaged = bytearray(sorted((new / part).iterdir())[0].read_bytes()[:20_000])
    position = data.draw(st.integers(0, len(damaged) - 1))
    byte = data.draw(st.none() | st.integers(0, 255))
    if byte is None:
        damaged = damaged[:position]
    else:
        damaged[position] = byte
    with contextlib.suppress(ValueError):
        find(io.BytesIO(damaged))
