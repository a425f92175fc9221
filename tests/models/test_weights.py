"""Weights without a network: the registry, finding files, commands, conversion."""

import hashlib
import json
import os
import pickle
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from ttmray.console import console
from ttmray.errors import UserError
from ttmray.models import weights_cli
from ttmray.models.bigvgan import debug_bigvgan, load_bigvgan
from ttmray.models.bundle import open_bundle
from ttmray.models.loading import LoadOptions
from ttmray.models.weights import Registry, Store, licences, load_registry, locked, open_store, released


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("TTMRAY_"):
            monkeypatch.delenv(name)


def registry(*files: dict[str, Any], **entry: Any) -> Registry:
    files = files or ({"name": "w.bin"},)
    hub = {"repo": "someone/model", "revision": "abc"}
    plain = {"name": "model", "role": "mert", "bundles": ["paper"], "hub": hub, "licence": "MIT", "credit": "someone"}
    return Registry.model_validate({"entries": [plain | {"files": files} | entry]})


def store_of(folder: Path, *files: dict[str, Any], **options: Any) -> Store:
    return Store(registry(*files), folder, **options)


# finding


def test_missing_weights_name_the_one_command(tmp_path):
    with pytest.raises(UserError) as caught:
        store_of(tmp_path).find("model")
    assert "w.bin" in caught.value.message
    assert caught.value.hint.endswith("ttmray weights pull model")


def test_all_missing_weights_are_named_at_once_with_their_sizes_and_one_command(tmp_path, monkeypatch):
    monkeypatch.setenv("TTMRAY_WEIGHTS", str(tmp_path))
    with pytest.raises(UserError) as caught:
        open_bundle("paper").load({"clap", "mert", "tunejury"}, LoadOptions(device="cpu"))
    names = ["clap-music", "roberta-tokenizer", "mert", "tunejury"]
    assert caught.value.hint == f"Get them with: ttmray weights pull {' '.join(names)}"
    assert all(name in caught.value.message for name in names)
    assert "4 of 4" in caught.value.message
    assert "3.6 GB" in caught.value.message
    with pytest.raises(UserError) as again:
        open_bundle("paper").identity({"clap", "mert", "tunejury"})
    assert again.value.hint == caught.value.hint


def test_a_converted_file_stands_in_for_a_checkpoint_in_a_local_folder(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    (tmp_path / "config.json").write_bytes(b"{}")
    files = ({"name": "config.json"}, {"name": "pytorch_model.bin"})
    found = store_of(tmp_path / "cache", *files, overrides={"model": str(tmp_path)}).find("model")
    assert found == {"config.json": tmp_path / "config.json", "pytorch_model.bin": tmp_path / "model.safetensors"}


def test_an_incomplete_local_copy_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere has no w\.bin") as caught:
        store_of(tmp_path, overrides={"model": str(tmp_path / "nowhere")}).find("model")
    assert "TTMRAY_WEIGHTS_MODEL" in caught.value.hint


def test_the_environment_says_where_the_cache_is_and_whether_to_stay_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("TTMRAY_WEIGHTS", str(tmp_path / "here"))
    monkeypatch.setenv("TTMRAY_OFFLINE", "1")
    store = open_store()
    assert store.folder == tmp_path / "here"
    assert store.offline
    monkeypatch.setenv("TTMRAY_OFFLINE", "0")
    assert not open_store().offline


def test_unknown_names_list_the_known_ones(tmp_path):
    for action in (
        lambda: store_of(tmp_path).find("nope"),
        lambda: weights_cli.pull(["nope"], store=store_of(tmp_path)),
        lambda: open_store(tmp_path, {"nope": "/x"}, registry=registry()),
    ):
        with pytest.raises(UserError, match="nope") as caught:
            action()
        assert "model" in caught.value.hint


def test_verify_fails_where_nothing_is_here_and_names_the_command(tmp_path, capsys):
    assert weights_cli.verify(store_of(tmp_path)) == 2
    out = " ".join(capsys.readouterr().out.split())
    assert "nothing was verified" in out
    assert "not here: model." in out
    assert "ttmray weights pull --bundle NAME" in out


def test_verify_fails_for_what_is_gone_but_not_for_what_was_never_fetched(tmp_path, capsys):
    entry = registry({"name": "a.bin"}, {"name": "b.bin"}).entries[0]
    both = Registry(entries=(entry, entry.model_copy(update={"name": "other"})))
    store = Store(both, tmp_path)
    for name in ("a.bin", "b.bin"):
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / name).write_bytes(b"x")
    assert weights_cli.verify(store) == 0
    assert "not here: other." in " ".join(capsys.readouterr().out.split())
    (tmp_path / "model/b.bin").unlink()
    assert weights_cli.verify(store) == 2
    assert "get what is missing with: ttmray weights pull model" in " ".join(capsys.readouterr().out.split())
    for name in ("a.bin", "b.bin"):
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other" / name).write_bytes(b"x")
    (tmp_path / "model/a.bin").unlink()
    with locked(tmp_path):
        store.record("files", "model/a.bin", {"sha256": "0" * 64, "size": 1})
    assert weights_cli.verify(store) == 2, "the record says that it was here"


def test_damaged_records_are_an_error_that_names_the_file(tmp_path):
    for text in ("{", "[]", '{"files": {"model/w.bin": {}}}', '{"files": [1]}'):
        (tmp_path / "hashes.json").write_text(text)
        with pytest.raises(UserError, match=r"hashes\.json is damaged"):
            store_of(tmp_path).records()


# the registry


def test_the_released_registry_is_complete_and_comes_with_the_package():
    entries = {entry.name: entry for entry in released().entries}
    roles = {entry.role for entry in entries.values() if "paper" in entry.bundles}
    assert roles == {
        "clap", "clap_condition", "mert", "text", "separator", "tunejury", "latents", "vocoder", "tokenizer",
    }  # fmt: skip
    assert len(released().entries) > len(roles)
    assert {name for name in entries if entries[name].non_commercial} >= {"mert", "tunejury"}
    assert entries["tunejury-a1"].licence == "Apache-2.0"
    assert entries["mmaudio-vae"].files[0].md5 == "fab020275fa44c6589820ce025191600"
    assert entries["tunejury"].files[0].md5 == "0524e60900e5ee3c4046e599f613b466"
    assert resources.files("ttmray.models").joinpath("weights.yaml").is_file()


def test_every_source_is_encrypted_and_every_hub_entry_has_an_address():
    for entry in released().entries:
        for file in entry.files:
            assert file.url is None or file.url.startswith("https://")
            assert file.url is not None or entry.hub is not None


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "a/b", "..", ".hidden", "a\\b", "", "w.bin.part", "x\n"])
def test_file_names_that_could_leave_the_cache_are_refused(tmp_path, name):
    path = tmp_path / "weights.yaml"
    plain = registry().model_dump(mode="json")
    plain["entries"][0]["files"][0]["name"] = name
    path.write_text(yaml.safe_dump(plain))
    with pytest.raises(UserError, match="name"):
        load_registry(path)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../model"},
        {"name": "Model"},
        {"hub": {"repo": "someone/../x", "revision": "abc"}},
        {"hub": {"repo": "someone/model", "revision": "../../x"}},
        {"hub": None},
        {"files": []},
        {"files": [{"name": "a"}, {"name": "a"}]},
        {"files": [{"name": "a", "url": "file:///etc/passwd"}]},
        {"files": [{"name": "a", "sha256": "ABC"}]},
        {"role": "singer"},
        {"surprise": 1},
    ],
)
def test_registries_with_mistakes_are_refused(tmp_path, change):
    path = tmp_path / "weights.yaml"
    plain = registry().model_dump(mode="json")
    plain["entries"][0] |= change
    path.write_text(yaml.safe_dump(plain))
    with pytest.raises(UserError, match=r"weights\.yaml"):
        load_registry(path)


def test_two_entries_of_one_variable_are_refused():
    one = registry().entries[0]
    with pytest.raises(ValueError, match="TTMRAY_WEIGHTS_A_B"):
        Registry(entries=(one.model_copy(update={"name": "a-b"}), one.model_copy(update={"name": "a.b"})))


def test_licences_say_what_is_not_for_commercial_use():
    lines = licences("paper")
    assert any(line.startswith("mert: ") and "NON-COMMERCIAL" in line for line in lines)
    assert any("mert" in line and "tunejury" in line and "not for commercial use" in line for line in lines)
    assert any("tunejury-a1" in line and "Apache-2.0" in line for line in lines)
    with pytest.raises(UserError, match="debug"):
        licences("debug")


# commands


def test_the_list_shows_every_entry_and_what_is_here(tmp_path):
    with console.capture() as capture:
        assert weights_cli.list_weights(open_store(tmp_path)) == 0
    for entry in released().entries:
        assert entry.name in capture.get()


# conversion


@dataclass
class Attack:
    command: str

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return store_of(tmp_path / "cache")


def test_a_checkpoint_becomes_safetensors_with_the_same_tensors(store, tmp_path):
    tensors = {
        "weight": torch.randn(3, 4),
        "half": torch.randn(5).bfloat16(),
        "count": torch.tensor(7),
        "transposed": torch.randn(4, 3).t(),
    }
    tensors["tied"] = tensors["weight"]
    tensors["slice"] = tensors["weight"][1:]
    checkpoint = {"state_dict": tensors | {"version": 3}, "epoch": 5, "optimizer": {"state": {0: torch.zeros(2)}}}
    torch.save(checkpoint, tmp_path / "w.pt")
    with console.capture() as capture:
        assert weights_cli.convert(tmp_path / "w.pt", store=store) == 0
    assert all(name in capture.get() for name in ("epoch", "optimizer", "version"))
    loaded = load_file(tmp_path / "w.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    source = hashlib.sha256((tmp_path / "w.pt").read_bytes()).hexdigest()
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        assert file.metadata()["source_sha256"] == source
    assert store.records("converted")[str(tmp_path / "w.safetensors")]["source_sha256"] == source
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "w.pt", "w.safetensors"}


def test_a_converted_vocoder_loads_like_the_original(store, tmp_path):
    model = debug_bigvgan(0)
    (tmp_path / "config.json").write_text(
        json.dumps(
            {"upsample_initial_channel": 64, "resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1]]},
        )
    )
    torch.save({"generator": model.state_dict()}, tmp_path / "g.pt")
    weights_cli.convert(tmp_path / "g.pt", store=store)
    loaded = load_bigvgan(tmp_path / "g.safetensors").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())


def test_verify_finds_a_changed_conversion(store, tmp_path):
    torch.save({"w": torch.zeros(2)}, tmp_path / "w.pt")
    weights_cli.convert(tmp_path / "w.pt", store=store)
    assert weights_cli.verify(store) == 0
    with open(tmp_path / "w.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\1")
    assert weights_cli.verify(store) == 2


def test_code_in_a_checkpoint_is_refused_and_not_run(store, tmp_path):
    marker = tmp_path / "ran"
    torch.save({"w": torch.zeros(2), "x": Attack(f"touch {marker}")}, tmp_path / "w.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Attack(f"touch {marker}")))
    for name in ("w.pt", "raw.pt"):
        with pytest.raises(UserError, match="was not read"):
            weights_cli.convert(tmp_path / name, store=store)
    assert not marker.exists()
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("checkpoint", "word"),
    [({"w": torch.zeros(2), "list": [1, 2]}, "list"), ({"epoch": 3}, "no tensors"), ({"a": {"b": {}}}, "dict")],
)
def test_values_that_are_no_weights_are_refused_by_name(store, tmp_path, checkpoint, word):
    torch.save(checkpoint, tmp_path / "w.pt")
    with pytest.raises(UserError, match=word):
        weights_cli.convert(tmp_path / "w.pt", store=store)


def test_a_conversion_never_overwrites(store, tmp_path):
    torch.save({"w": torch.zeros(2)}, tmp_path / "w.pt")
    (tmp_path / "w.safetensors").write_bytes(b"precious")
    with pytest.raises(UserError, match="exists"):
        weights_cli.convert(tmp_path / "w.pt", store=store)
    with pytest.raises(UserError, match="already"):
        weights_cli.convert(tmp_path / "w.safetensors", store=store)
    with pytest.raises(UserError, match="end in"):
        weights_cli.convert(tmp_path / "w.pt", tmp_path / "w.bin", store=store)
    assert (tmp_path / "w.safetensors").read_bytes() == b"precious"
