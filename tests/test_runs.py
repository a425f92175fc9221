"""Whose folder is it: run.json of every job."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ttmray import runs
from ttmray.config import Config
from ttmray.errors import UserError
from ttmray.storage import Folder


class Settings(Config):
    lr: float = 1.0


def described(lr: float = 1.0, kind: str = "toy") -> dict:
    config = Settings(lr=lr)
    return runs.describe(kind, {"config": {"lr": lr}, "sizes": (1, 2)}, config, ("numpy",), note="a toy")


@pytest.fixture
def run(tmp_path) -> Folder:
    return Folder.at(str(tmp_path / "run"))


def test_a_new_folder_is_anyones_and_the_first_to_write_owns_it(run):
    assert runs.existing(run, "toy") is None
    assert runs.write(run, described())
    assert not runs.write(run, described(2.0))
    found = runs.existing(run, "toy")
    assert found == runs.read(run, "toy")
    assert found["identity"] == {"config": {"lr": 1.0}, "sizes": [1, 2]}
    assert found["note"] == "a toy"
    assert found["versions"].keys() == {"ttmray", "python", "numpy"}


def test_the_same_settings_go_on_and_others_are_told_apart_by_name(run):
    runs.refuse_another(run, described(), json.loads(json.dumps(described())))
    with pytest.raises(UserError, match=r"belongs to another run:\n    config\.lr: 1\.0 -> 2\.0\n  Choose"):
        runs.refuse_another(run, described(), described(2.0))
    with pytest.raises(UserError) as caught:
        runs.refuse_another(run, described(), described(2.0), ["two songs are gone"], covered=("config.lr",))
    assert caught.value.message.splitlines()[1:] == ["    two songs are gone"]


def test_another_bundle_is_one_line_and_not_all_of_its_hashes(run):
    def of(name: str, digest: str) -> dict:
        what = {"bundle": {"name": name, "weights": {f"{i}": digest * 64 for i in range(20)}}, "z": digest * 400}
        return runs.describe("toy", {**what, "config": {"bundle": name}}, Settings(), ())

    with pytest.raises(UserError) as caught:
        runs.refuse_another(run, of("micro", "a"), of("debug", "b"))
    lines = [line.strip() for line in caught.value.message.splitlines()[1:]]
    assert lines[:2] == ["config.bundle: 'micro' -> 'debug'", "bundle.name: 'micro' -> 'debug'"]
    assert lines[2].startswith("z: 'aaa")
    assert lines[2].endswith(" ...")
    assert len(lines) == 3


def test_foreign_files_and_other_kinds_are_refused(run):
    run.write("holiday.jpg", b"x")
    with pytest.raises(UserError, match=r"is no toy run: it holds holiday\.jpg but no run\.json"):
        runs.existing(run, "toy")
    assert runs.existing(run, "toy", beside=("holiday.jpg",)) is None
    with pytest.raises(UserError, match=r"has no run\.json"):
        runs.read(run, "toy")
    runs.write(run, described(kind="game"))
    for reader in (runs.existing, runs.read):
        with pytest.raises(UserError, match="holds a run of kind game, not toy"):
            reader(run, "toy")


@given(at=st.integers(0, 2000), byte=st.integers(0, 255), cut=st.booleans())
def test_a_damaged_description_is_one_message_or_still_the_same_identity(tmp_path_factory, at, byte, cut):
    run = Folder.at(str(tmp_path_factory.mktemp("run")))
    content = bytearray(json.dumps(described(), indent=1).encode())
    at %= len(content)
    content[at] = byte
    run.write(runs.RUN, bytes(content[:at] if cut else content))
    try:
        found = runs.read(run, "toy")
    except UserError:
        return
    assert found["identity"] == described()["identity"]
