"""Verification finds what is wrong with a corpus, names it, and finds nothing wrong with a sound one."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ttmray.corpus import index, look, shards, verify_units
from ttmray.corpus.job import score_corpus
from ttmray.corpus.verify import problems
from ttmray.errors import EXIT_BAD_INPUT, EXIT_OK, UserError
from ttmray.storage import Folder


def found(run: Path) -> list[str]:
    return list(problems(Folder.at(str(run))))


def some(run: Path, pattern: str) -> Path:
    return sorted(run.glob(pattern))[0]


def test_a_finished_run_has_no_problems(finished_run):
    assert found(finished_run) == []
    assert look.verify(str(finished_run)) == EXIT_OK


def test_verifying_changes_nothing(run):
    def snapshot() -> dict[str, tuple[bytes, int]]:
        return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in run.rglob("*") if p.is_file()}

    some(run, "shards/*").write_bytes(b"damaged")
    before = snapshot()
    assert look.verify(str(run)) == EXIT_BAD_INPUT
    assert snapshot() == before


@pytest.mark.parametrize("pattern", ["shards/*", "captions/*"])
@pytest.mark.parametrize("place", [0, 600, -1])
def test_one_flipped_bit_is_found(run, pattern, place):
    file = some(run, pattern)
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)
    assert any(file.name in line and "SHA-256 differs" in line for line in found(run))


def test_a_cut_shard_is_found(run):
    file = some(run, "shards/*")
    file.write_bytes(file.read_bytes()[:-1000])
    assert [line for line in found(run) if "size or SHA-256" in line] == [
        f"shards/{file.name}: size or SHA-256 differs from the index"
    ]


def test_a_deleted_captions_file_is_found_with_the_captions_that_are_lost(run):
    file = some(run, "captions/*")
    lost = shards.read_captions(Folder.at(str(run)), f"captions/{file.name}")
    file.unlink()
    lines = found(run)
    assert any(f"captions/{file.name}: not found" in line for line in lines)
    captions = {row["caption_id"]: row["caption"] for row in index.read_index(Folder.at(str(run))).to_pylist()}
    for caption_id in lost:
        assert (f"caption {caption_id} has no text features" in lines) == bool(captions[caption_id])


def test_an_edited_reward_is_found(run):
    file = run / "index/u000000.parquet"
    table = pq.read_table(file)
    rows = table.to_pylist()
    rows[0]["reward_score"] += 1
    edited = pa.Table.from_pylist(rows, schema=table.schema)
    pq.write_table(edited, file)
    lines = found(run)
    assert lines[0].startswith("index/u000000.parquet: has ")
    assert lines[1:] == ["index.parquet differs from the units' index files"]


def test_a_row_taken_out_of_the_index_is_found(run):
    file = run / "index/u000000.parquet"
    table = pq.read_table(file)
    pq.write_table(table.slice(1), file)
    lines = found(run)
    assert any("tide has segments [1]" in line for line in lines)
    assert any("holds 2 clips, the index has 1" in line for line in lines)


def test_an_unreadable_index_file_is_found_and_the_rest_is_still_checked(run):
    (run / "index/u000000.parquet").write_bytes(b"PAR1 no more")
    damaged = sorted(run.glob("shards/u000002*"))[0]
    damaged.write_bytes(b"")
    lines = found(run)
    assert any(line.startswith("unit u000000:") and "not a readable index file" in line for line in lines)
    assert any(damaged.name in line and "SHA-256" in line for line in lines)


@pytest.mark.parametrize("content", [None, b"PAR1 damaged"])
def test_a_damaged_or_missing_merged_index_is_found(run, content):
    (run / "index.parquet").unlink()
    if content:
        (run / "index.parquet").write_bytes(content)
    lines = found(run)
    assert len(lines) == 1
    assert "index.parquet" in lines[0]


@pytest.mark.parametrize(
    "name", ["shards/u000000-ffffffffffff.tar", "captions/x.safetensors", "attempts/u000000.all.0"]
)
def test_a_stray_file_is_found(run, name):
    Folder.at(str(run)).write(name, b"")
    assert found(run) == [f"{name} belongs to no committed unit"]


def test_a_unit_that_is_missing_or_too_many_is_found(run):
    (run / "index/u000001.parquet").rename(run / "index/u000009.parquet")
    lines = found(run)
    assert "unit u000001 is not committed" in lines
    assert "unit u000009 is committed and not planned" in lines


def test_a_run_that_is_not_finished_is_told_so(run):
    (run / "_SUCCESS.json").unlink()
    assert found(run) == ["_SUCCESS.json is missing: the run is not finished"]


def rewrite_shard(run: Path, change: dict[str, bytes | None]) -> str:
    """Replace members of the first clip of the first shard, with hashes that agree with the new bytes."""
    file = some(run, "shards/*")
    folder = Folder.at(str(run))
    members = {}
    for key, sample in shards.read_samples(file.read_bytes(), file.name):
        members[key] = {
            name: shards.npy_bytes(value) if isinstance(value, np.ndarray) else json.dumps(value).encode()
            for name, value in sample.items()
        }
    first = members[min(members)]
    for name, data in change.items():
        if data is None:
            del first[name]
        else:
            first[name] = data
    data = shards.tar_bytes(members)
    name, digest = shards.named_by_content("shards", "u000000", data, "tar")
    file.unlink()
    folder.write(name, data)
    ((table, metadata),) = index.read_units(folder, ["u000000"])
    old = f"shards/{file.name}"
    metadata["files"][name] = metadata["files"].pop(old) | {"sha256": digest, "bytes": len(data)}
    rows = [row | {"shard": name if row["shard"] == old else row["shard"]} for row in table.to_pylist()]
    folder.write("index/u000000.parquet", index.to_bytes(rows, metadata))
    return name


@pytest.mark.parametrize(
    ("member", "array", "words"),
    [
        ("latent_mean.npy", np.full((430, 40), np.nan, np.float16), "latent_mean.npy is not finite"),
        ("mert.npy", np.zeros((2, 7), np.float32), "mert.npy is"),
        ("clap_audio.npy", np.zeros((2, 512), np.float64), "clap_audio.npy is"),
        ("latent_std.npy", None, "has no latent_std.npy"),
    ],
)
def test_wrong_arrays_are_found_even_where_all_hashes_agree(run, member, array, words):
    name = rewrite_shard(run, {member: None if array is None else shards.npy_bytes(array)})
    assert any(words in line and (name in line or "elsewhere" in line) for line in found(run))


def test_songs_that_the_catalogue_rejected_do_not_miss_their_captions(songs, make_config, tmp_path):
    copies = tmp_path / "songs"
    copies.mkdir()
    for name in ("a.wav", "b.wav"):
        shutil.copy(songs / "kite.wav", copies / name)
    captions = [{"path": "a.wav", "caption": "One."}, {"path": "b.wav", "caption": "Two."}]
    (copies / "captions.json").write_text(json.dumps(captions))
    config = make_config(copies, tmp_path / "run", "splits.validation=0", "splits.test=0")
    assert score_corpus(config) == 0
    assert index.read_index(Folder.at(config.output))["reason"].to_pylist() == ["", "duplicate"]
    assert found(tmp_path / "run") == []


def test_a_folder_that_is_no_run_is_one_message(tmp_path):
    with pytest.raises(UserError, match=r"has no run\.json"):
        look.verify(str(tmp_path))


@pytest.mark.slow
def test_several_processes_find_what_one_finds(run, monkeypatch):
    """Three units of one block each, two of them with something wrong."""
    folder = Folder.at(str(run))
    flipped, cut = sorted(run.glob("shards/*"))[:2]
    flipped.write_bytes(bytes([flipped.read_bytes()[0] ^ 1]) + flipped.read_bytes()[1:])
    cut.write_bytes(cut.read_bytes()[:-1])
    monkeypatch.setattr(verify_units, "BLOCK", 1)
    alone = list(problems(folder))
    monkeypatch.setattr(verify_units, "ALONE", 1)
    blocks = list(verify_units.check_units(folder, index.committed_units(folder), processes=2))
    assert [len(block.problems) for _, block in blocks] == [1, 1, 0]
    assert [names for names, _ in blocks] == [["u000000"], ["u000001"], ["u000002"]]
    monkeypatch.setattr(verify_units.os, "cpu_count", lambda: 2)
    assert list(problems(folder)) == alone
    assert sum("SHA-256 differs from the index" in line for line in alone) == 2
