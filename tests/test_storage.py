"""Local storage: a file is complete or absent, the first creator wins, names stay inside their folder.

The same rules on an object store are in `corpus/test_s3.py`.
"""

import errno
import os
import pickle
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ttmray import local_files, runs
from ttmray.errors import UserError
from ttmray.local_files import TEMPORARY_PREFIX
from ttmray.storage import (
    Folder,
    absolute,
    explained,
    local_file,
    read_file,
    safe_relative,
    split_path,
)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder.at(str(tmp_path / "run"))


def left_behind(folder: Folder) -> list[str]:
    return [name for _, _, names in os.walk(folder.uri) for name in names if name.startswith(TEMPORARY_PREFIX)]


def test_what_is_written_is_read_and_replaced_as_a_whole(folder):
    folder.write("a/b/c.bin", b"old" * 1000)
    folder.write("a/b/c.bin", b"new")
    assert folder.read("a/b/c.bin") == b"new"
    assert read_file(folder.path("a/b/c.bin")) == b"new"
    with folder.open("a/b/c.bin") as file:
        assert file.seek(1) == 1
        assert file.read() == b"ew"
    assert left_behind(folder) == []


@pytest.mark.parametrize("edge", ["fsync", "replace"])
def test_a_write_that_fails_midway_leaves_the_old_content_and_no_temporary_file(folder, edge, monkeypatch):
    folder.write("a.bin", b"old")

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, edge, fail)
    with pytest.raises(OSError, match="Input/output"):
        folder.write("a.bin", b"new")
    monkeypatch.undo()
    assert folder.read("a.bin") == b"old"
    assert left_behind(folder) == []


@pytest.mark.parametrize("edge", ["fsync", "link"])
def test_a_create_that_fails_midway_creates_nothing(folder, edge, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, edge, fail)
    with pytest.raises(OSError, match="Input/output"):
        folder.create("a.bin", b"new")
    monkeypatch.undo()
    assert not folder.exists("a.bin")
    assert left_behind(folder) == []
    assert folder.create("a.bin", b"second try") is True


def test_create_never_replaces(folder):
    assert folder.create("a", b"first") is True
    assert folder.create("a", b"second") is False
    assert folder.read("a") == b"first"


def without_links(monkeypatch: pytest.MonkeyPatch, number: int, renames: bool) -> None:
    """The file system as FUSE, SMB or exFAT show it."""

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(local_files, "_said", set())
    if not renames:
        monkeypatch.setattr(local_files, "_rename_new", refuse)


@pytest.mark.parametrize("renames", [True, False])
@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EXDEV, errno.EACCES])
def test_a_file_system_without_hard_links_is_written_to_and_never_replaces(
    tmp_path, monkeypatch, capsys, number, renames
):
    without_links(monkeypatch, number, renames)
    folder = Folder.at(str(tmp_path))
    assert folder.create("a", b"first")
    assert folder.create("b", b"other")
    assert not folder.create("a", b"second")
    assert folder.read("a") == b"first"
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("Do not start two launches with one output folder at once") == int(not renames)


def test_a_link_to_nothing_is_no_file_that_somebody_has_created(folder):
    folder.create("a", b"first")
    os.symlink("nothing", Path(folder.uri) / "b")
    with pytest.raises(UserError, match="is a link to nothing"):
        folder.create("b", b"second")


def test_of_eight_threads_one_wins_without_hard_links_too(tmp_path, monkeypatch):
    without_links(monkeypatch, errno.EPERM, renames=True)
    folder = Folder.at(str(tmp_path))
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda i: folder.create("x", bytes([i])), range(8)))
    assert sum(won) == 1
    assert folder.read("x") == bytes([won.index(True)])


@pytest.mark.parametrize("act", ["write", "create"])
def test_a_folder_that_cannot_be_synced_is_no_error_after_the_write(tmp_path, monkeypatch, act):
    sync = os.fsync

    def refuse_folders(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    folder = Folder.at(str(tmp_path))
    getattr(folder, act)("a", b"data")
    assert folder.read("a") == b"data"


def test_of_eight_threads_that_create_one_file_exactly_one_wins(folder):
    for attempt in range(20):
        barrier = Barrier(8)

        def create(writer: int, barrier: Barrier = barrier, name: str = f"index/{attempt}") -> bool:
            barrier.wait()
            return folder.create(name, bytes([writer]) * 100_000)

        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(create, range(8)))
        assert won.count(True) == 1
        assert folder.read(f"index/{attempt}") == bytes([won.index(True)]) * 100_000
    assert left_behind(folder) == []


def test_a_reader_never_sees_half_a_write(folder):
    contents = [bytes([i]) * 300_000 for i in range(30)]
    folder.write("a", contents[0])
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(lambda: [folder.write("a", data) for data in contents])
        seen = {folder.read("a")}
        while not writing.done():
            seen.add(folder.read("a"))
        writing.result()
    assert seen <= set(contents)


def test_files_are_listed_sorted_with_sizes_and_without_temporary_ones(folder):
    for name in ("b/2", "b/10", "a", "b.c", "c/" + TEMPORARY_PREFIX + "123"):
        folder.write(name, b"x" * len(name))
    assert [(entry.name, entry.size) for entry in folder.files()] == [("a", 1), ("b.c", 3), ("b/10", 4), ("b/2", 3)]
    assert [entry.name for entry in folder.files("b")] == ["10", "2"]
    assert [entry.name for entry in folder.sub("b").files(sizes=False)] == ["10", "2"]


def test_a_folder_that_does_not_exist_is_empty(folder):
    assert folder.files() == []
    assert folder.files("deeper") == []
    assert not folder.exists("a")
    assert folder.sweep_temporary() == 0


def test_listing_follows_links_to_folders_names_broken_ones_and_skips_what_is_no_file(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/song").write_bytes(b"12")
    folder.write("a", b"1")
    os.symlink(tmp_path / "elsewhere", f"{folder.uri}/linked")
    os.symlink(tmp_path / "nowhere", f"{folder.uri}/dangling")
    os.mkfifo(f"{folder.uri}/fifo")
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(f"{folder.uri}/socket")
        assert [(entry.name, entry.size) for entry in folder.files()] == [
            ("a", 1),
            ("dangling", -1),
            ("linked/song", 2),
        ]


def test_a_link_that_leads_back_is_not_walked_again(folder):
    folder.write("a/song", b"1")
    os.symlink(folder.uri, f"{folder.uri}/a/back")
    assert [entry.name for entry in folder.files()] == ["a/song"]


def test_only_old_temporary_files_are_swept(folder):
    folder.write("kept", b"1")
    for name, age in (("old", 7200), ("new", 0)):
        path = Path(folder.uri) / "deep" / f"{TEMPORARY_PREFIX}{name}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
        then = path.stat().st_mtime - age
        os.utime(path, (then, then))
    assert folder.sweep_temporary(older_than_s=3600) == 1
    assert left_behind(folder) == [f"{TEMPORARY_PREFIX}new"]
    assert folder.sweep_temporary(older_than_s=0) == 1
    assert folder.exists("kept")


def test_deleting_is_done_once_and_asked_for_as_often_as_one_likes(folder):
    folder.write("a", b"1")
    folder.delete("a")
    folder.delete("a")
    assert not folder.exists("a")


names = st.text(st.characters(codec="utf-8") | st.sampled_from("./\\\n\x00"), max_size=20)


@given(names)
def test_a_safe_name_stays_inside_whatever_it_is_joined_to(name):
    try:
        safe = safe_relative(name)
    except UserError:
        return
    assert safe == name
    assert os.path.normpath(f"/base/{safe}") == f"/base/{safe}"
    assert not any(ord(character) < 32 for character in safe)


@given(st.lists(st.text("ab é-_.", min_size=1).filter(lambda part: part not in (".", "..")), min_size=1))
def test_ordinary_names_are_safe(parts):
    assert safe_relative("/".join(parts)) == "/".join(parts)


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "a/", "./a", "a\\b", "a\nb", "a\0b"])
def test_names_that_leave_the_folder_or_confuse_tools_are_refused_everywhere(folder, name):
    for act in (folder.read, folder.open, folder.delete, folder.exists, folder.sub, lambda n: folder.write(n, b"")):
        with pytest.raises(UserError, match="safe relative path"):
            act(name)


def test_what_is_missing_or_no_file_or_no_folder_is_one_message_with_the_path(folder):
    folder.write("a/b", b"1")
    for name in ("absent", "a", "a/b/c"):
        for act in (folder.read, folder.open):
            with pytest.raises(UserError) as caught:
                act(name)
            assert folder.path(name) in caught.value.message
            assert caught.value.hint


@pytest.mark.parametrize("act", ["write", "create"])
def test_a_folder_that_is_a_file_is_no_place_to_write(folder, act):
    folder.write("a", b"1")
    with pytest.raises(UserError, match="a/b"):
        getattr(folder, act)("a/b", b"2")
    assert folder.read("a") == b"1"


def test_a_full_disk_is_one_message_and_what_was_there_stays(tmp_path):
    mounted = tmp_path / "small"
    mounted.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mounted)]
    tried = subprocess.run(command, capture_output=True, text=True, check=False) if os.geteuid() == 0 else None
    if tried is None or tried.returncode:
        pytest.skip(f"cannot mount a small tmpfs: {tried.stderr.strip() if tried else 'not root'}")
    try:
        folder = Folder.at(str(mounted))
        folder.write("a", b"old")
        for act in (folder.write, folder.create):
            with pytest.raises(UserError, match="disk is full") as caught:
                act("a" if act == folder.write else "b", b"x" * 200_000)
            assert "start the same command again" in caught.value.hint
        assert folder.read("a") == b"old"
        assert [entry.name for entry in folder.files()] == ["a"]
        assert left_behind(folder) == []
        folder.write("a", b"small enough")
        assert folder.read("a") == b"small enough"
    finally:
        subprocess.run(["umount", str(mounted)], check=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_rights_is_one_message(folder):
    folder.write("a", b"1")
    os.chmod(folder.uri, 0o500)
    try:
        with pytest.raises(UserError, match="permission denied"):
            folder.write("b", b"2")
    finally:
        os.chmod(folder.uri, 0o700)


@pytest.mark.parametrize(
    ("number", "words"), [("ENOSPC", "disk is full"), ("EDQUOT", "disk is full"), ("EROFS", "read-only")]
)
def test_errors_of_the_disk_that_a_user_can_mend_are_explained(number, words):
    import errno

    with pytest.raises(UserError, match=words) as caught, explained("/somewhere/a"):
        raise OSError(getattr(errno, number), "whatever the system says")
    assert "/somewhere/a" in caught.value.message


def test_other_errors_keep_their_type():
    with pytest.raises(OSError, match="Input/output"), explained("a"):
        raise OSError(5, "Input/output error")
    with pytest.raises(ValueError, match="bug"), explained("a"):
        raise ValueError("bug")


def test_an_address_of_an_unknown_kind_is_explained():
    with pytest.raises(UserError, match="carrier"):
        Folder.at("carrier://pigeon/songs").files()


def test_paths_are_made_absolute_and_addresses_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert absolute("songs") == f"{tmp_path}/songs"
    assert absolute("~/songs") == "/home/someone/songs"
    assert absolute("s3://bucket/songs/") == "s3://bucket/songs"
    assert absolute(f"file://{tmp_path}/songs") == f"{tmp_path}/songs"
    assert split_path("s3://bucket/a/b.csv") == (Folder("s3://bucket/a"), "b.csv")
    assert split_path("b.csv") == (Folder(str(tmp_path)), "b.csv")


def test_a_file_address_is_written_as_atomically_as_a_path(tmp_path):
    folder = Folder.at(f"file://{tmp_path}/run")
    assert folder.create("a/b", b"1") is True
    assert folder.create("a/b", b"2") is False
    assert (tmp_path / "run/a/b").read_bytes() == b"1"


def test_a_folder_travels_between_processes(folder):
    folder.write("a", b"1")
    assert pickle.loads(pickle.dumps(folder)).read("a") == b"1"  # noqa: S301 - our own bytes


def test_a_remote_file_is_copied_once_per_version(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("TTMRAY_COPIES", str(tmp_path / "copies"))
    folder = Folder.at(bucket)
    folder.write("w.pt", b"one")
    first = local_file(folder.path("w.pt"))
    assert (first.name, first.read_bytes()) == ("w.pt", b"one")
    made = first.stat().st_mtime_ns
    assert local_file(folder.path("w.pt")) == first
    assert first.stat().st_mtime_ns == made
    folder.write("w.pt", b"two")
    second = local_file(folder.path("w.pt"))
    assert second.read_bytes() == b"two"
    assert first.read_bytes() == b"one"
    with pytest.raises(UserError, match=r"absent\.pt: not found"):
        local_file(folder.path("absent.pt"))


def test_a_local_file_is_itself(tmp_path):
    (tmp_path / "w.pt").write_bytes(b"one")
    assert local_file(str(tmp_path / "w.pt")) == tmp_path / "w.pt"
    for absent in (tmp_path / "absent.pt", tmp_path):
        with pytest.raises(UserError, match="is not a file"):
            local_file(str(absent))


def test_a_place_that_ray_deletes_after_the_job_is_refused(tmp_path: Path) -> None:
    """`ray job submit --working-dir . -- ... --set output=runs/x` would otherwise end with 0 and without a corpus."""
    copy = tmp_path / "session_1/runtime_resources/working_dir_files/_ray_pkg_0123"
    copy.mkdir(parents=True)
    (copy / "captions.csv").write_text("path,caption\n")
    place = Folder.at(str(copy))
    assert place.read("captions.csv"), "inputs may come with the folder"
    for write in (place.write, place.create, place.sub("runs/x").write):
        with pytest.raises(UserError, match="would vanish with this job") as refused:
            write("run.json", b"{}")
        assert "absolute path" in refused.value.hint
    with pytest.raises(UserError, match="would vanish"):
        runs.existing(place.sub("runs/x"), "corpus")
    assert [path.name for path in copy.iterdir()] == ["captions.csv"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"", "Expecting value"),
        (b"\xff\xfe\x00", "decode"),
        (b"[1]", "it holds a list, no object"),
        (b'{"kind": "corpus"}', "it has no field config"),
        (b'{"config":' * 100_000, "nested too deeply"),
    ],
)
def test_a_json_file_that_is_damaged_is_named_with_the_problem(tmp_path: Path, text: bytes, problem: str) -> None:
    place = Folder.at(str(tmp_path))
    place.write("run.json", text)
    with pytest.raises(UserError, match=rf"^{tmp_path}/run\.json is damaged: .*{problem}"):
        place.read_json("run.json", "kind", "config")
