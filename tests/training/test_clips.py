"""Reading clips: which there are, damage that is noticed, and copies of a remote corpus."""

import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from synthetic_corpus import write_random_corpus

from ttmray.cli import main
from ttmray.corpus import index, shards
from ttmray.errors import UserError
from ttmray.storage import Folder
from ttmray.training.clips import read_keys
from ttmray.training.data import DataConfig, Samples, SourceConfig, loader, open_mixture, open_with_held_out

SIZES = {"latent": (5, 4), "text": (3, 8), "clips_per_track": 3}


@pytest.fixture
def copy(corpus: Path, tmp_path: Path) -> Path:
    """A copy of the corpus to damage."""
    return Path(shutil.copytree(corpus, tmp_path / "copy"))


def configure(*sources: SourceConfig | Path | str, **fields: object) -> DataConfig:
    made = [s if isinstance(s, SourceConfig) else SourceConfig(corpus=str(s)) for s in sources]
    return DataConfig(sources=tuple(made), **({"threads": 0} | fields))


def equal(a: Samples, b: Samples) -> bool:
    pairs = [(a.numbers, b.numbers), (a.sources, b.sources), *zip(a.batch, b.batch, strict=True)]
    return a.keys == b.keys and all(x is y is None or torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("suffix", ["txt", "csv", "tsv", "parquet"])
def test_keys_of_a_file_choose_clips(corpus, tmp_path, suffix):
    keys = ["t000004_2", "t000001_0"]
    path = tmp_path / f"keys.{suffix}"
    table = pa.table({"score": [1.5, 2.5], "key": keys})
    if suffix == "parquet":
        pq.write_table(table, path)
    elif suffix == "txt":
        path.write_text("\n".join(keys) + "\n\n")
    else:
        separator = "\t" if suffix == "tsv" else ","
        path.write_text("\n".join([f"score{separator}key", *(f"1{separator}{key}" for key in keys)]))
    mixture = open_mixture(configure(SourceConfig(corpus=str(corpus), keys=str(path))))
    assert mixture.sources[0].keys.to_pylist() == sorted(keys)  # in the order of the index


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("k.txt", b"", "no clip keys"),
        ("k.txt", b"\xff\xfe\x00", "no clip keys"),
        ("k.csv", b"name\nx\n", "no clip keys"),
        ("k.parquet", b"PAR1", "no clip keys"),
        ("k.txt", b"a\nb\na\n", "names a twice"),
        ("k.csv", b"key,weight\na,1\nb,-0.5\n", "weight of b is -0.5"),
        ("k.csv", b"key,weight\na,1\nb,\n", "weight of b is None"),
        ("k.csv", b"key,weight\na,much\n", "no clip keys"),
    ],
)
def test_files_without_keys_are_one_message(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=words) as caught:
        read_keys(str(tmp_path / name))
    assert name in caught.value.message


def test_weights_of_a_file_of_keys_come_with_their_clips_and_are_part_of_what_is_drawn(corpus, tmp_path):
    alike, weighted, ones = (tmp_path / name for name in ("alike.txt", "weighted.csv", "ones.csv"))
    keys = ["t000002_0", "t000000_0", "t000001_0"]
    alike.write_text("\n".join(keys))
    weighted.write_text("key,weight\n" + "".join(f"{key},{w}\n" for key, w in zip(keys, (0.25, 2, 0.75), strict=True)))
    ones.write_text("key,weight\n" + "".join(f"{key},1\n" for key in keys))
    drawn, prints = {}, {}
    for path in (alike, weighted, ones):
        config = configure(SourceConfig(corpus=str(corpus), keys=str(path)))
        mixture = open_mixture(config)
        samples = next(loader(mixture, config, start=0, batch=6))
        drawn[path], prints[path] = (
            dict(zip(samples.keys, samples.weights.tolist(), strict=True)),
            mixture.fingerprint(),
        )
    assert drawn[alike] == drawn[ones] == dict.fromkeys(keys, 1.0)
    assert drawn[weighted] == {"t000002_0": 0.25, "t000000_0": 2.0, "t000001_0": 0.75}
    assert prints[alike] == prints[ones] != prints[weighted]


def test_a_key_that_is_not_there_is_named(corpus, tmp_path):
    (tmp_path / "k.txt").write_text("t000000_0\nt000006_0\n")  # the second is for validation
    with pytest.raises(UserError, match=r"1 of 2 keys are not among the ok clips of split train .* t000006_0"):
        open_mixture(configure(SourceConfig(corpus=str(corpus), keys=str(tmp_path / "k.txt"))))


def test_a_clip_without_score_is_named_unless_no_score_is_wanted(copy):
    table = pq.read_table(copy / "index.parquet")
    values = table["instrumental_reward_score"].to_pylist()
    values[4] = None
    position = table.column_names.index("instrumental_reward_score")
    pq.write_table(table.set_column(position, table.schema.field(position), [values]), copy / "index.parquet")
    with pytest.raises(UserError, match=r"1 clips have no instrumental_reward_score, e\.g\. t000001_1"):
        open_mixture(configure(copy))
    config = configure(SourceConfig(corpus=str(copy), score_column=None))
    assert next(loader(open_mixture(config), config, start=0, batch=4)).batch.score is None


def test_what_is_no_corpus_or_has_no_such_clips_is_one_message(corpus, tmp_path):
    with pytest.raises(UserError, match=r"is not a corpus run: it has no run\.json"):
        open_mixture(configure(tmp_path))
    with pytest.raises(UserError, match="no ok clips of split test"):
        open_mixture(configure(SourceConfig(corpus=str(corpus), split="test")))


def read_all(folder: Path, threads: int = 0) -> Samples:
    config = configure(folder, threads=threads)
    return next(loader(open_mixture(config), config, start=0, batch=18))


def first(folder: Path, part: str) -> Path:
    return sorted((folder / part).iterdir())[0]


def rewrite(path: Path, kind: str, array: np.ndarray) -> None:
    """Replace one array of the second clip of a shard."""
    samples = dict(shards.read_samples(path.read_bytes(), path.name))
    samples["t000000_1"][kind] = array
    members = {
        key: {k: json.dumps(v).encode() if k == "json" else shards.npy_bytes(v) for k, v in sample.items()}
        for key, sample in samples.items()
    }
    path.write_bytes(shards.tar_bytes(members))


@pytest.mark.parametrize(
    ("kind", "array", "words"),
    [
        ("latent_mean.npy", np.full((5, 4), np.nan, np.float16), "clip t000000_1: mean is not finite"),
        ("latent_std.npy", np.full((5, 4), -np.inf, np.float16), "clip t000000_1: std is not finite"),
        ("latent_std.npy", np.zeros((5, 4), np.float32), r"clip t000000_1: latent_std.npy of \(5, 4\) float16 is not"),
        ("latent_mean.npy", np.zeros((4, 4), np.float16), "clip t000000_1: latent_mean.npy of .* is not"),
        ("latent_mean.npy", np.zeros((4, 5), np.float16).T, "clip t000000_1: latent_mean.npy of .* is not"),
    ],
)
@pytest.mark.parametrize("threads", [0, 1])
def test_latents_that_cannot_be_used_stop_training_with_shard_and_clip(copy, kind, array, words, threads):
    shard = first(copy, "shards")
    rewrite(shard, kind, array)
    with pytest.raises(UserError, match=words) as caught:
        read_all(copy, threads)
    assert shard.name in caught.value.message
    assert "corpus repair" in caught.value.hint


def test_a_shard_without_a_clip_of_the_index_is_noticed(copy):
    shard = first(copy, "shards")
    members = dict(shards.read_samples(shard.read_bytes(), shard.name))
    kept = {key: {"latent_mean.npy": shards.npy_bytes(s["latent_mean.npy"])} for key, s in members.items()}
    shard.write_bytes(shards.tar_bytes(kept))
    with pytest.raises(UserError, match=r"clip t00000[01]_\d: latent_(mean|std).npy .* is not where the index says"):
        read_all(copy)


def change(folder: Path, column: str, value: Callable[[int], object], row: int = 4) -> str:
    """Change one value of the merged index; returns the clip's key."""
    table = pq.read_table(folder / "index.parquet")
    values = table[column].to_pylist()
    values[row] = value(values[row])
    position = table.column_names.index(column)
    array = pa.array(values, table.schema.field(position).type)
    pq.write_table(table.set_column(position, table.schema.field(position), array), folder / "index.parquet")
    return str(table["key"][row])


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["latent_mean_at", "latent_std_at"]),
    st.integers(-(2**40), 2**40).filter(bool) | st.sampled_from([1, 2, -2, 512, 1024, -1024, -3072, 3072]),
)
def test_latents_are_never_read_from_a_wrong_place(corpus, tmp_path_factory, column, by):
    folder = tmp_path_factory.getbasetemp() / "moved"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(corpus, folder, copy_function=os.link)
    (folder / "index.parquet").unlink()
    shutil.copy(corpus / "index.parquet", folder / "index.parquet")
    key = change(folder, column, lambda at: at + by)
    with pytest.raises(UserError, match=f"clip {key}: {column[:-3]}.npy of .* is not where the index says"):
        read_all(folder)


@pytest.mark.parametrize("at", [-8, 0, 10**6, None])
@pytest.mark.parametrize("column", ["caption_t5_at", "caption_clap_at"])
def test_text_features_outside_of_their_file_are_noticed_at_the_start(copy, column, at):
    key = change(copy, column, lambda _: at, row=0)
    with pytest.raises(UserError, match=f"clip {key}: it has no text features at the place"):
        open_mixture(configure(copy))


@pytest.mark.parametrize("column", ["latent_frames", "latent_channels", "caption_tokens", "caption_width"])
def test_clips_of_different_shapes_in_one_index_are_noticed(copy, column):
    key = change(copy, column, lambda size: size + 1)
    with pytest.raises(UserError, match=rf"index\.parquet is damaged: clip {key}: .*{column}.* elsewhere"):
        open_mixture(configure(copy))


def test_an_index_without_places_is_refused_with_the_command_that_adds_them(copy, capsys):
    expected, table = read_all(copy), pq.read_table(copy / "index.parquet")
    pq.write_table(table.drop_columns(index.PLACES), copy / "index.parquet", compression="zstd")
    with pytest.raises(UserError, match="an older version") as caught:
        open_mixture(configure(copy))
    assert caught.value.hint == f"ttmray corpus upgrade {copy}"
    assert main(caught.value.hint.split()[1:]) == 0
    assert "18 of them since now" not in capsys.readouterr().out  # validation has 3 more
    assert equal(read_all(copy), expected)


def test_a_growing_run_of_an_older_version_is_refused_with_the_way_out(tmp_path):
    run = write_random_corpus(str(tmp_path / "run"), tracks=3, unit_clips=3, committed=2, **SIZES)
    for name in index.committed_units(run):
        path = run.path(f"index/{name}.parquet")
        pq.write_table(pq.read_table(path).drop_columns(index.PLACES), path)
    with pytest.raises(UserError, match="an older version") as caught:
        open_mixture(configure(run.uri))
    assert "Start its job again" in caught.value.hint


def test_the_index_is_read_once_for_training_and_validation(corpus, monkeypatch):
    names: list[str] = []
    read = Folder.read
    monkeypatch.setattr(Folder, "read", lambda folder, name: names.append(name) or read(folder, name))
    mixture, held_out = open_with_held_out(configure(corpus))
    assert (len(mixture), len(held_out)) == (18, 3)
    assert [name for name in names if name.startswith("index")] == ["index.parquet"]
    assert not [name for name in names if name.startswith(("shards", "captions"))]


def test_the_index_is_read_once_for_a_score_from_outside_of_the_package_and_a_corpus_named_twice(copy, monkeypatch):
    rows = pq.read_table(copy / index.MERGED)
    brightness = pa.array(np.arange(rows.num_rows) / 4)
    pq.write_table(rows.append_column("brightness", brightness), copy / index.MERGED)
    names: list[str] = []
    read = Folder.read
    monkeypatch.setattr(Folder, "read", lambda folder, name: names.append(name) or read(folder, name))
    source = SourceConfig(corpus=str(copy), score_column="brightness")
    mixture, held_out = open_with_held_out(configure(source, source.model_copy(update={"split": "all"})))
    assert [name for name in names if name.startswith("index")] == [index.MERGED]
    score_of = dict(zip(rows["key"].to_pylist(), brightness.to_pylist(), strict=True))
    for clips in (*mixture.sources, *held_out.sources):
        assert clips.score.tolist() == [score_of[key] for key in clips.keys.to_pylist()]


@pytest.mark.parametrize("column", ["caption", "key", "latent_frames", "darkness"])
def test_a_score_column_that_is_none_is_refused_with_those_that_there_are(corpus, column):
    with pytest.raises(UserError, match=rf"no score column '{column}'\. It has: .*, reward_score, "):
        open_mixture(configure(SourceConfig(corpus=str(corpus), score_column=column)))


def test_missing_shards_and_captions_are_named(copy):
    shard = first(copy, "shards")
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name}: not found"):
        read_all(copy)
    first(copy, "captions").unlink()
    with pytest.raises(UserError, match="no text features of the caption of clip t00000"):
        open_mixture(configure(copy))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_cut_or_changed_file_gives_samples_or_one_message(corpus, tmp_path_factory, data):
    part = data.draw(st.sampled_from(["shards", "captions"]))
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(corpus, folder, copy_function=os.link)
    path = first(folder, part)
    content = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, min(len(content), 20_000) - 1))
    byte = data.draw(st.none() | st.integers(0, 255))
    if byte is None:
        content = content[:position]
    else:
        content[position] = byte
    path.unlink()  # a link to the corpus
    path.write_bytes(bytes(content))
    message = path.name
    try:
        read_all(folder)
    except UserError as error:
        message = error.message
    assert path.name in message or "no text features" in message


def test_a_growing_corpus_gives_what_is_committed(tmp_path):
    sizes = SIZES | {"tracks": 6, "captions": 3, "unit_clips": 3}
    run = write_random_corpus(str(tmp_path / "run"), **sizes, committed=5)
    mixture = open_mixture(configure(run.uri))
    assert mixture.counts(0, len(mixture)) == [15]
    run.delete("index/u000000.parquet")  # the unit that holds the text of the fourth track
    source = open_mixture(configure(run.uri)).sources[0]
    assert sorted({key[:7] for key in source.keys.to_pylist()}) == ["t000001", "t000002", "t000004"]
    assert source.waiting == 3


def test_captions_of_a_killed_writer_are_passed_over(copy):
    expected = read_all(copy)
    (copy / "captions/u000000-000000000000.safetensors").write_bytes(b"of a killed writer")
    assert equal(read_all(copy), expected)


@pytest.fixture
def remote(corpus: Path, bucket: str) -> Folder:
    """The corpus in a bucket."""
    folder, local = Folder.at(f"{bucket}/run"), Folder.at(str(corpus))
    for entry in local.files():
        folder.write(entry.name, local.read(entry.name))
    return folder


@pytest.mark.parametrize("threads", [0, 2])
def test_a_bucket_gives_the_samples_of_a_folder(remote, corpus, tmp_path, threads):
    config = configure(remote.uri, cache=str(tmp_path), threads=threads)
    mixture = open_mixture(config)
    assert mixture.fingerprint() == open_mixture(configure(corpus)).fingerprint()
    samples = list(itertools.islice(loader(mixture, config, start=5, batch=4), 5))
    local = configure(corpus)
    assert all(map(equal, samples, itertools.islice(loader(open_mixture(local), local, start=5, batch=4), 5)))
    copies = sorted(path.name for path in tmp_path.rglob("*.tar"))
    assert copies == sorted(path.name for path in (corpus / "shards").iterdir())[:3]  # the fourth has no such clip


def test_copies_are_used_again_and_fetched_again_when_evicted(remote, corpus, tmp_path):
    config = configure(remote.uri, cache=str(tmp_path))
    expected = next(loader(open_mixture(config), config, start=0, batch=18))
    names = [f"shards/{entry.name}" for entry in remote.files("shards")]
    for name in names[:3]:
        remote.delete(name)
    mixture = open_mixture(config)
    assert equal(next(loader(mixture, config, start=0, batch=18)), expected)
    next(tmp_path.rglob("*.tar")).unlink()
    with pytest.raises(UserError, match="not found"):
        next(loader(mixture, config, start=0, batch=18))
    for name in names[:3]:
        remote.write(name, (corpus / name).read_bytes())
    assert equal(next(loader(mixture, config, start=0, batch=18)), expected)


def test_a_remote_shard_with_other_bytes_is_refused_and_not_kept(remote, tmp_path):
    name = f"shards/{remote.files('shards')[0].name}"
    remote.write(name, remote.read(name)[:-1] + b"x")
    config = configure(remote.uri, cache=str(tmp_path), threads=1)
    with pytest.raises(UserError, match="SHA-256") as caught:
        next(loader(open_mixture(config), config, start=0, batch=18))
    assert name in caught.value.message
    assert not list(tmp_path.rglob(Path(name).name))


def test_the_cache_is_bounded_and_makes_room(remote, corpus, tmp_path):
    needed = sum(p.stat().st_size for part in ("shards", "captions") for p in (corpus / part).iterdir())
    small = configure(remote.uri, cache=str(tmp_path), cache_gib=needed / 2 / 2**30)
    with pytest.raises(UserError, match="cache_gib"):
        open_mixture(small)
    old = tmp_path / "ttmray-copies" / "0" / "shards" / "u000000-000000000000.tar"
    old.parent.mkdir(parents=True)
    old.write_bytes(bytes(needed))
    theirs = tmp_path / "theirs.tar"
    theirs.write_bytes(bytes(needed))
    config = configure(remote.uri, cache=str(tmp_path), cache_gib=2.5 * needed / 2**30)
    open_mixture(config)
    assert old.exists()
    next(loader(open_mixture(config), config, start=0, batch=18))
    open_mixture(config.model_copy(update={"cache_gib": 1.5 * needed / 2**30}))
    assert not old.exists()
    assert theirs.exists()
    assert len(list(tmp_path.rglob("u*.tar"))) == 3


def test_a_remote_cache_is_refused(corpus):
    with pytest.raises(UserError, match="must be a local folder"):
        open_mixture(configure(corpus, cache="s3://somewhere/else"))
