"""Reading from the hub by its own client, from a stand-in on this machine; what goes wrong is one line."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_stand_in import Hub, running_hub, use_hub
from huggingface_hub import HfFileSystem
from huggingface_hub.utils import _http

from ttmray import hub as places
from ttmray.errors import UserError
from ttmray.storage import Folder, local_file, read_file, split_path

LARGE = bytes(range(256)) * 100


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with running_hub() as running:
        running.dataset("org/songs").files = {"a.txt": b"first", "deep/b.tar": LARGE, "deep/er/c.txt": b"third"}
        running.model("org/weights").files = {"model.safetensors": LARGE}
        use_hub(monkeypatch, running, str(tmp_path / "cache"))
        yield running


def one_line(error: UserError) -> bool:
    return "\n" not in error.message and len(error.message) < 300


def test_a_data_set_of_the_hub_is_listed_and_read_like_a_bucket(hub):
    folder = Folder.at("hf://datasets/org/songs")
    assert [(file.name, file.size) for file in folder.files()] == [
        ("a.txt", 5), ("deep/b.tar", len(LARGE)), ("deep/er/c.txt", 5),
    ]  # fmt: skip
    assert all(file.version for file in folder.files()), "a version that changes with the content"
    assert [file.name for file in folder.files("deep")] == ["b.tar", "er/c.txt"]
    assert folder.read("a.txt") == b"first"
    assert folder.sub("deep").read_as("er/c.txt")[0] == b"third"
    assert folder.exists("deep/b.tar")
    assert folder.exists("deep")
    assert not folder.exists("nope")
    assert not Folder.at("hf://datasets/org/gone").exists("a.txt")
    assert Folder.at("hf://datasets/org/gone").files() == []
    assert read_file("hf://datasets/org/songs@main/a.txt") == b"first"


def test_ranges_of_a_large_file_are_fetched_and_no_more(hub):
    with Folder.at("hf://datasets/org/songs").open("deep/b.tar", block_bytes=64) as file:
        file.seek(1000)
        assert file.read(10) == LARGE[1000:1010]
    assert ("GET", "/datasets/org/songs/resolve/main/deep/b.tar") in hub.requests


def test_a_file_is_kept_on_this_machine_and_is_there_offline(hub, monkeypatch):
    copy = local_file("hf://org/weights/model.safetensors")
    assert copy.read_bytes() == LARGE
    assert local_file("hf://org/weights") == copy, "a repository stands for its weights"
    assert split_path("hf://org/weights")[1] == places.WEIGHTS
    fetched = sum(method == "GET" for method, _ in hub.requests)
    local_file("hf://org/weights")
    assert sum(method == "GET" for method, _ in hub.requests) == fetched, "it is not sent again"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert local_file("hf://org/weights") == copy
    with pytest.raises(UserError, match="cannot be reached") as caught:
        local_file("hf://org/other")
    assert one_line(caught.value)


def test_what_is_not_there_and_what_is_private_says_what_to_do_in_one_line(hub, monkeypatch):
    for path in ("hf://org/weights/nope.pth", "hf://org/gone/x.pth", "hf://org/weights@v9/model.safetensors"):
        with pytest.raises(UserError, match="not found") as caught:
            local_file(path)
        assert one_line(caught.value)
    with pytest.raises(UserError, match="not found"):
        Folder.at("hf://datasets/org/songs").read("nope")
    with pytest.raises(UserError, match="no address of the hub"):
        local_file("hf://weights")
    hub.repos["models", "org/weights"].private = True
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError) as caught:
        local_file("hf://org/weights")
    assert "HF_TOKEN" in caught.value.hint


def test_offline_is_one_line_that_names_the_variable(hub, monkeypatch):
    for variable in ("HF_HUB_OFFLINE", "TTMRAY_OFFLINE"):
        monkeypatch.setenv(variable, "1")
        with pytest.raises(UserError, match=f"{variable} is set") as caught:
            Folder.at("hf://datasets/org/songs").files()
        assert one_line(caught.value)
        with pytest.raises(UserError, match=f"{variable} is set"):
            places.client()
        monkeypatch.delenv(variable)
    assert hub.requests == []


def test_a_hub_that_cannot_be_reached_is_one_line_after_the_patience_for_it(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("TTMRAY_STORE_PATIENCE_S", "0")
    waited: list[float] = []  # its client tries six times in 23 s, whatever our patience is
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=waited.append))
    HfFileSystem.clear_instance_cache()
    for act in (lambda: Folder.at("hf://datasets/org/songs").read("a.txt"), lambda: local_file("hf://org/weights")):
        with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9") as caught:
            act()
        assert one_line(caught.value)
    assert waited, "the client has waited between its tries, for real ones"


def test_a_hub_that_is_busy_is_asked_again(hub):
    hub.refuse = [("resolve/main/a.txt", 503)]
    assert Folder.at("hf://datasets/org/songs").read("a.txt") == b"first"
    assert hub.refuse == []


def test_nothing_is_written_file_by_file(hub):
    folder = Folder.at("hf://org/weights")
    for act in (lambda: folder.write("x", b""), lambda: folder.create("x", b""), lambda: folder.delete("x")):
        with pytest.raises(UserError, match="file by file") as caught:
            act()
        assert "ttmray push" in caught.value.hint
    assert all(method in ("GET", "HEAD") for method, _ in hub.requests)
