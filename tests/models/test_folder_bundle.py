"""Bundles that lie in a folder: every damage is named, and identity covers every byte that decides a number."""

import json
import shutil

import pytest
from tiny_bundle import without_weights

from ttmray.errors import UserError
from ttmray.models.bundle import ROLES, BundleName, open_bundle
from ttmray.models.folder_bundle import DESCRIPTION, FolderFiles, describe_folder
from ttmray.models.loading import LoadOptions
from ttmray.models.reward_head import encoders_of


@pytest.fixture
def folder(tmp_path):
    """A bundle of two roles whose files are no weights."""
    return without_weights(tmp_path / "mine")


def files(folder) -> FolderFiles:
    return FolderFiles(folder, "Copy it again.")


def test_a_whole_folder_gives_its_roles_and_their_hashes(folder):
    assert files(folder).folder("clap") == folder / "clap"
    assert files(folder).hashes(["clap"]).keys() == {"clap/config.json", "clap/model.safetensors"}
    bundle = open_bundle(str(folder))
    assert (bundle.name, bundle.note, bundle.clip_s) == ("mine", "only a test", 5.0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "clap/config.json").unlink(), r"config\.json is missing"),
        (lambda folder: (folder / "clap/config.json").write_bytes(b"short"), "has 5 bytes, and should have 1,600"),
        (
            lambda folder: (folder / "clap/config.json").write_bytes(b"clap/config.jsoN" * 100),
            "its SHA-256 is not that of",
        ),
        (lambda folder: (folder / DESCRIPTION).unlink(), r"bundle\.json"),
        (lambda folder: (folder / DESCRIPTION).write_text('{"format": 1, "na'), "is damaged"),
        (lambda folder: (folder / DESCRIPTION).write_text("[1]"), "is damaged"),
        (lambda folder: (folder / DESCRIPTION).write_text('{"format": 2}'), "is of format 2; this ttmray reads"),
    ],
)
def test_a_missing_cut_changed_or_foreign_file_is_named_with_the_way_out(folder, damage, message):
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        files(folder).folder("clap")
    assert caught.value.hint == "Copy it again."


def test_a_role_that_the_bundle_lacks_is_named(folder):
    with pytest.raises(UserError, match=r"bundle mine in .* has no mert"):
        open_bundle(str(folder)).load(["mert"], LoadOptions(device="cpu"))


def test_the_identity_changes_with_every_file_and_not_with_the_place(folder, tmp_path):
    before = open_bundle(str(folder)).identity()
    copy = tmp_path / "elsewhere/mine"
    shutil.copytree(folder, copy)
    assert open_bundle(str(copy)).identity() == before
    (copy / "clap/config.json").write_bytes(b"other")
    describe_folder(copy, "mine", "only a test", 5.0)
    assert open_bundle(str(copy)).identity() != before


def test_a_backbone_is_no_encoder(folder):
    before = encoders_of(open_bundle(str(folder)).identity())
    (folder / "backbone/model.safetensors").write_bytes(b"trained longer")
    describe_folder(folder, "mine", "only a test", 5.0)
    assert encoders_of(open_bundle(str(folder)).identity()) == before


def test_a_corpus_does_not_ask_for_the_backbone(folder):
    roles = set(ROLES) - {"backbone"}
    before = open_bundle(str(folder)).identity(roles)
    shutil.rmtree(folder / "backbone")
    describe_folder(folder, "mine", "only a test", 5.0)
    assert open_bundle(str(folder)).identity(roles) == before


def test_a_folder_that_is_no_bundle_and_a_name_that_is_none_are_told_apart(tmp_path):
    with pytest.raises(UserError, match="is no bundle"):
        open_bundle(f"{tmp_path}/nothing")
    with pytest.raises(UserError, match="there is no bundle 'nothing'"):
        open_bundle("nothing")
    with pytest.raises(UserError, match="must be local"):
        open_bundle("s3://bucket/bundle")


def test_a_folder_in_a_config_becomes_absolute_and_counts_by_its_name(folder, monkeypatch):
    from pydantic import TypeAdapter

    monkeypatch.chdir(folder.parent)
    assert TypeAdapter(BundleName).validate_python("mine") == str(folder)
    assert json.loads((folder / DESCRIPTION).read_text())["format"] == 1
