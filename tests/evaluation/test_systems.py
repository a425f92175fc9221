"""Which file belongs to which prompt, by name and by manifest."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ttmray.errors import UserError
from ttmray.evaluation.systems import find_systems, match_names
from ttmray.generation import manifest
from ttmray.generation.prompts import Prompt
from ttmray.storage import Folder

PROMPTS = [Prompt("a", "a calm piano"), Prompt("b", "driving drums"), Prompt("c_1", "a choir")]


def touch(folder: Path, *names: str) -> str:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return str(folder)


def generated(folder: Path, **changes: object) -> str:
    """A generation run: prompt a has two clips, b failed."""
    run = Folder.at(str(folder))
    run.write("run.json", b"{}")
    for name, one, k, status in (("a_0", "a", 0, "ok"), ("a_1", "a", 1, "ok"), ("b_0", "b", 0, "failed")):
        row = dict.fromkeys(manifest.SCHEMA.names) | {"name": name, "prompt_id": one, "candidate": k, "status": status}
        row |= {"prompt": dict(a="a calm piano", b="driving drums")[one], "file": f"clips/{name}.wav"}
        manifest.commit(run, row | {"reason": "error", "message": "no luck"} | changes)
    return run.uri


@pytest.mark.parametrize(
    ("stem", "expected"),
    [
        ("a", ("a", 0)),
        ("a_3", ("a", 3)),
        ("a_s42", ("a", 42)),
        ("c_1", ("c_1", 0)),  # an id, whatever it ends in
        ("c_1_2", ("c_1", 2)),
        ("c", None),
        ("c_2", None),
        ("a_", None),
        ("a_x1", None),
        ("A", None),
        ("7", ("07", 0)),
        ("007_1", ("07", 1)),
        ("", None),
    ],
)
def test_a_name_is_an_id_or_an_id_and_a_sample(stem, expected):
    assert match_names([stem], ["a", "b", "c_1", "07"]) == [expected]


@given(
    st.lists(st.from_regex(r"[a-z]{1,3}(_[a-z]{1,2})?", fullmatch=True), min_size=1, unique=True), st.integers(0, 999)
)
def test_every_name_that_a_generation_run_gives_is_found_again(ids, sample):
    assert match_names(ids, ids) == [(one, 0) for one in ids]
    assert match_names([f"{one}_{sample}" for one in ids], ids) == [(one, sample) for one in ids]


def test_clips_are_in_the_order_of_the_prompts_and_what_is_missing_or_extra_is_said(tmp_path):
    touch(tmp_path / "one", "sub/b_1.WAV", "a.flac", "b_0.mp3", "notes.txt", "cover.flac")
    (system,) = find_systems([str(tmp_path / "one")], PROMPTS)
    assert [(clip.prompt_id, clip.sample) for clip in system.clips] == [("a", 0), ("b", 0), ("b", 1), ("c_1", 0)]
    assert [clip.path is None for clip in system.clips] == [False, False, False, True]
    assert system.clips[3].reason == "missing"
    missing, extra = system.warnings
    assert "1 of 3 prompts have no clip: c_1" in missing
    assert "1 files belong to no prompt and are left out: cover.flac" in extra


def test_a_manifest_says_what_belongs_to_what_and_failed_clips_are_owed(tmp_path):
    (system,) = find_systems([generated(tmp_path / "run")], PROMPTS)
    assert [(c.prompt_id, c.sample, c.reason) for c in system.clips] == [
        ("a", 0, ""),
        ("a", 1, ""),
        ("b", 0, "not_generated"),
        ("c_1", 0, "missing"),
    ]
    assert system.clips[1].path == f"{tmp_path}/run/clips/a_1.wav"
    assert system.clips[2].message == "error: no luck"


def test_a_manifest_of_another_prompt_is_refused(tmp_path):
    with pytest.raises(UserError, match="was made for 'a loud piano', prompt a is 'a calm piano'"):
        find_systems([generated(tmp_path / "run", prompt="a loud piano")], PROMPTS)


def test_a_manifest_cannot_lead_out_of_its_folder(tmp_path):
    with pytest.raises(UserError, match="not a safe relative path"):
        find_systems([generated(tmp_path / "run", file="../secret.wav")], PROMPTS)


def test_systems_are_named_by_what_tells_their_paths_apart_or_by_the_user(tmp_path):
    folders = [touch(tmp_path / name / "clips", "a.wav") for name in ("x", "y")]
    assert [system.name for system in find_systems(folders, PROMPTS)] == ["x/clips", "y/clips"]
    assert [system.name for system in find_systems([f"old={folders[0]}", folders[1]], PROMPTS)] == ["old", "y/clips"]
    for wrong in ([folders[0], folders[0]], [f"n={folders[0]}", f"n={folders[1]}"]):
        with pytest.raises(UserError, match="two systems have the"):
            find_systems(wrong, PROMPTS)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((), "no audio files"),
        (("x.wav", "y.wav"), r"no file belongs to a prompt; files are named x\.wav, y\.wav, prompts a, b, c_1"),
        (("a.wav", "deep/a.mp3"), "are both sample 0 of prompt a"),
        (("a.wav", "a_0.wav"), "are both sample 0 of prompt a"),
    ],
)
def test_folders_that_answer_no_prompt_or_one_twice_are_refused(tmp_path, files, message):
    with pytest.raises(UserError, match=message):
        find_systems([touch(tmp_path, *files)], PROMPTS)


def test_ids_that_are_the_same_number_are_refused():
    with pytest.raises(UserError, match="7 and 07 are the same number"):
        match_names(["7"], ["7", "07"])
