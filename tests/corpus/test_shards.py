"""Shards: reproducible tars that plain webdataset reads, and damage that is noticed."""

import hashlib
import io
import json
import tarfile
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttmray.corpus import shards, upgrade
from ttmray.errors import UserError
from ttmray.storage import Folder

LATENT = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float16)


def sample(i: int) -> dict[str, bytes]:
    return {
        "mert.npy": shards.npy_bytes(np.full((2, 3), i, np.float32)),
        "json": json.dumps({"key": f"été_{i}"}).encode(),
        "latent_mean.npy": shards.npy_bytes(LATENT + i),
    }


SAMPLES = {f"track_{i}": sample(i) for i in (2, 0, 1)}
TAR = shards.tar_bytes(SAMPLES)


def test_the_order_in_which_samples_were_made_does_not_change_the_bytes():
    again = {key: dict(reversed(members.items())) for key, members in reversed(SAMPLES.items())}
    assert shards.tar_bytes(again) == TAR


def test_the_bytes_are_those_of_all_versions_so_far():
    # Names of shards carry hashes, and what was committed with them stays true.
    arrays = {f"t_{i}": shards.npy_bytes(np.full((3, 2), i, "<f2")) for i in (1, 0)}
    samples = {key: {"json": b"{}", "latent_mean.npy": data} for key, data in arrays.items()}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key in sorted(samples):
            for extension, data in sorted(samples[key].items()):
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size, member.mode = len(data), 0o644
                tar.addfile(member, io.BytesIO(data))
    assert shards.tar_bytes(samples) == buffer.getvalue()
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    assert digest == "229d291a54369db40c463d70a24dd022cebc46c1ce4d5ff04f79f760a21b4be1"


@given(
    st.dictionaries(
        st.from_regex(r"[A-Za-z0-9_-]{1,64}_[0-9]{1,2}", fullmatch=True),
        st.dictionaries(st.sampled_from(["json", "flac", "a.npy", "b.npy"]), st.binary(max_size=1500), min_size=1),
        max_size=4,
    )
)
def test_the_writer_knows_where_the_bytes_of_every_member_lie(samples):
    data, places = shards.pack(samples)
    assert {key: set(members) for key, members in places.items()} == {key: set(m) for key, m in samples.items()}
    for key, members in samples.items():
        for extension, content in members.items():
            at = places[key][extension]
            assert data[at : at + len(content)] == content
    assert shards.pack(dict(reversed(samples.items()))) == (data, places)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        read = {member.name: member.offset_data for member in tar}
    assert read == {f"{key}.{ext}": at for key, members in places.items() for ext, at in members.items()}


def test_places_of_text_features_are_those_of_their_numbers():
    random = np.random.default_rng(0)
    texts = {"t5": random.normal(size=(3, 4, 2)).astype("<f2"), "clap": random.normal(size=(3, 5)).astype("<f4")}
    texts["clap_score"] = texts["clap"] + 1
    data = shards.captions_bytes(["c", "a", "b"], texts)
    found = shards.text_places(io.BytesIO(data))
    assert found["shape"] == [4, 2]
    for i, caption_id in enumerate(["c", "a", "b"]):
        t5, clap = found["places"][caption_id]
        np.testing.assert_array_equal(np.frombuffer(data, "<f2", 8, t5).reshape(4, 2), texts["t5"][i])
        np.testing.assert_array_equal(np.frombuffer(data, "<f4", 5, clap), texts["clap"][i])


def test_members_are_sorted_and_tell_nothing_of_when_and_by_whom():
    with tarfile.open(fileobj=io.BytesIO(TAR)) as tar:
        members = tar.getmembers()
    names = [member.name for member in members]
    assert names == sorted(names)
    assert names[:3] == ["track_0.json", "track_0.latent_mean.npy", "track_0.mert.npy"]
    facts = {(m.mtime, m.mode, m.uid, m.gid, m.uname, m.gname, m.type) for m in members}
    assert facts == {(0, 0o644, 0, 0, "", "", tarfile.REGTYPE)}


def test_names_carry_the_hash_of_the_content():
    name, digest = shards.named_by_content(shards.SHARDS, "u000003", TAR, "tar")
    assert digest == hashlib.sha256(TAR).hexdigest()
    assert name == f"shards/u000003-{digest[:12]}.tar"


def test_samples_come_back_decoded():
    samples = dict(shards.read_samples(TAR, "s.tar"))
    assert list(samples) == ["track_0", "track_1", "track_2"]
    for i in range(3):
        members = samples[f"track_{i}"]
        assert members["json"] == {"key": f"été_{i}"}
        np.testing.assert_array_equal(members["latent_mean.npy"], LATENT + i)
        assert members["latent_mean.npy"].dtype == np.float16


def test_plain_webdataset_reads_a_shard(tmp_path):
    wds = pytest.importorskip("webdataset")
    (tmp_path / "s.tar").write_bytes(TAR)
    dataset = wds.WebDataset(str(tmp_path / "s.tar"), shardshuffle=False).decode()
    samples = list(dataset)
    assert [s["__key__"] for s in samples] == ["track_0", "track_1", "track_2"]
    assert samples[1]["json"] == {"key": "été_1"}
    np.testing.assert_array_equal(samples[2]["latent_mean.npy"], LATENT + 2)


def test_a_shard_without_samples_is_empty():
    assert list(shards.read_samples(shards.tar_bytes({}), "s.tar")) == []


def test_long_keys_of_the_catalogue_fit_into_a_tar():
    key = "k" * 64 + "_31"
    assert [found for found, _ in shards.read_samples(shards.tar_bytes({key: sample(0)}), "s.tar")] == [key]


@settings(max_examples=200)
@given(st.integers(0, len(TAR) - 1), st.integers(0, 255) | st.none())
def test_a_cut_or_changed_shard_gives_samples_or_one_message(position, byte):
    data = bytearray(TAR)
    if byte is None:
        data = data[:position]
    else:
        data[position] = byte
    message = "s.tar"
    try:
        list(shards.read_samples(bytes(data), "s.tar"))
    except UserError as error:
        message = error.message
    assert "s.tar" in message


def test_a_pickle_inside_an_array_is_not_opened():
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=r"s\.tar is damaged"):
        list(shards.read_samples(shards.tar_bytes({"a": {"x.npy": buffer.getvalue()}}), "s.tar"))


def test_a_folder_inside_a_shard_is_refused():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        member = tarfile.TarInfo("folder")
        member.type = tarfile.DIRTYPE
        tar.addfile(member)
    with pytest.raises(UserError, match="folder is not a plain file"):
        list(shards.read_samples(buffer.getvalue(), "s.tar"))


def test_caption_features_come_back_by_caption(tmp_path):
    texts = {
        "t5": np.arange(12, dtype=np.float16).reshape(2, 3, 2),
        "clap": np.arange(8, dtype=np.float32).reshape(2, 4),
    }
    data = shards.captions_bytes(["aa", "bb"], texts)
    assert shards.captions_bytes(["aa", "bb"], dict(reversed(texts.items()))) == data
    run = Folder.at(str(tmp_path))
    run.write("captions/u.safetensors", data)
    features = shards.read_captions(run, "captions/u.safetensors")
    assert set(features) == {"aa", "bb"}
    np.testing.assert_array_equal(features["bb"]["t5"], texts["t5"][1])
    assert features["aa"]["clap"].dtype == np.float32


def test_damaged_caption_features_are_one_message(tmp_path):
    run = Folder.at(str(tmp_path))
    run.write("captions/u.safetensors", b"no safetensors")
    with pytest.raises(UserError, match=r"captions/u\.safetensors"):
        shards.read_captions(run, "captions/u.safetensors")


def crafted(name: str, size: int = 0, type: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    """A tar of one member whose header says so, with two bytes behind it."""
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, type, link
    return info.tobuf() + b"{}".ljust(512, b"\0") + bytes(1024)


@pytest.mark.parametrize(
    "data",
    [
        crafted("a.latent_mean.npy", 0, tarfile.SYMTYPE, "/etc/passwd"),
        crafted("a.latent_mean.npy", 0, tarfile.LNKTYPE, "b.npy"),
        crafted("a.json", 0, tarfile.LNKTYPE, "a.json"),
        crafted("a.json", 0, tarfile.DIRTYPE),
        crafted("a.json", 0, tarfile.FIFOTYPE),
        crafted("a.json", 8**11 - 1),
        crafted("a.json", 2**80),
        crafted("a.json", 2**63),
        shards.tar_bytes({"a": {"json": b"[" * 200_000}}),
    ],
)
def test_a_crafted_tar_is_one_message(data):
    with pytest.raises(UserError, match=r"shard\.tar"):
        list(shards.read_samples(data, "shard.tar"))
    with suppress(ValueError):
        upgrade.latent_places(io.BytesIO(data))
