"""Whatever happens to any file of a run: the same command notices, makes it again, and the run is as if nothing was."""

import json
import re
import shlex
import shutil
import time
from pathlib import Path

import pytest
from damages import DAMAGES, content, out_of_the_way
from synthetic_corpus import write_random_corpus

from ttmray.cli import main
from ttmray.corpus import index
from ttmray.corpus.job import not_committed, score_corpus
from ttmray.corpus.plan import Plan
from ttmray.corpus.repair import forget_damaged
from ttmray.corpus.verify import problems
from ttmray.errors import EXIT_BAD_INPUT, EXIT_OK, UserError
from ttmray.storage import Folder

FILES = [
    *("run.json", "plan.parquet", "plan.json", "plan.md", "_SUCCESS.json", "index.parquet", "summary.json"),
    *("summary.md", "stats/latents.json", "stats/rewards.json"),
    *("index/u000001.parquet", "shards/u000001-*", "captions/u000001-*"),
]
PRODUCT = [(file, damage) for file in FILES for damage in DAMAGES]
QUICK = [(file, list(DAMAGES)[(i * 3 + j) % len(DAMAGES)]) for i, file in enumerate(FILES) for j in (0, 3)]


@pytest.fixture(scope="module")
def other_run(songs, make_config, tmp_path_factory) -> Path:
    """Of other songs, so that its files are sound and not those of `finished_run`."""
    folder = tmp_path_factory.mktemp("other")
    shutil.copytree(songs, folder / "songs")
    for name in ("amber/tide.flac", "kite.wav"):
        (folder / "songs" / name).rename(folder / "songs" / f"other-{Path(name).name}")
    assert score_corpus(make_config(folder / "songs", folder / "run", "splits.seed=1")) == EXIT_OK
    return folder / "run"


def damaged(run: Path, pattern: str, damage: str, other: Path) -> Path:
    (file,) = run.glob(pattern)
    before = file.read_bytes()
    DAMAGES[damage](file, other)
    assert not file.is_file() or file.read_bytes() != before
    return file


def found(run: Path) -> list[str]:
    return list(problems(Folder.at(str(run))))


@pytest.mark.parametrize(
    ("pattern", "damage"),
    [pytest.param(*one, marks=[] if one in QUICK else pytest.mark.slow) for one in PRODUCT],
)
def test_the_same_command_makes_again_what_was_damaged(
    run, finished_run, other_run, songs, make_config, tmp_path, pattern, damage
):
    file = damaged(run, pattern, damage, other_run)
    assert found(run), "verify does not see it"
    assert main(["corpus", "verify", str(run)]) == EXIT_BAD_INPUT
    config = make_config(songs, run)
    if damage == "a folder":
        with pytest.raises(UserError, match=re.escape(f"{file} is a folder")) as caught:
            score_corpus(config)
        assert "Move it away and start the same command again" in caught.value.hint
        out_of_the_way(file, tmp_path / "mine")
    assert score_corpus(config) == EXIT_OK
    assert found(run) == []
    assert content(run) == content(finished_run)


@pytest.mark.parametrize("pattern", ["index/u000001.parquet", "shards/u000001-*", "captions/u000001-*", "plan.parquet"])
@pytest.mark.parametrize(
    "damage", ["deleted", "cut", *(pytest.param(name, marks=pytest.mark.slow) for name in ("empty", "unreadable text"))]
)
def test_an_unfinished_run_goes_on_over_damage_and_ends_as_an_undisturbed_one(
    run, finished_run, other_run, songs, make_config, pattern, damage
):
    for name in ("_SUCCESS.json", "index.parquet", "index/u000002.parquet"):
        (run / name).unlink()
    damaged(run, pattern, damage, other_run)
    assert score_corpus(make_config(songs, run)) == EXIT_OK
    assert found(run) == []
    assert content(run) == content(finished_run)


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("damage", ["deleted", "unreadable text", "of another run"])
def test_a_run_whose_description_and_its_copy_are_lost_is_known_by_its_units(
    run, finished_run, other_run, songs, make_config, damage, finished
):
    before = {path.name: path.stat().st_mtime_ns for path in run.glob("shards/*")}
    damaged(run, "run.json", damage, other_run)
    damaged(run, "_SUCCESS.json", "cut" if finished else "deleted", other_run)
    if not finished:
        (run / "index/u000000.parquet").unlink()
        before = {name: time for name, time in before.items() if not name.startswith("u000000")}
    assert found(run)
    with pytest.raises(UserError, match="belongs to another run"):
        score_corpus(make_config(songs, run, "splits.seed=9"))
    assert score_corpus(make_config(songs, run)) == EXIT_OK
    after = {path.name: path.stat().st_mtime_ns for path in run.glob("shards/*")}
    assert before.items() <= after.items(), "other units were made again, too"
    assert found(run) == []
    described = ("run.json", "_SUCCESS.json")  # the output of the copied run was another folder
    assert content(run, described) == content(finished_run, described)
    one, other = (json.loads((folder / "run.json").read_text()) for folder in (run, finished_run))
    assert one["identity"] == other["identity"]


def test_a_run_of_an_older_version_whose_description_is_lost_is_started_in_a_new_folder(
    run, finished_run, songs, make_config, tmp_path, monkeypatch
):
    (run / "_SUCCESS.json").unlink()
    (run / "run.json").write_bytes(b"{")
    for file in run.glob("index/*"):  # whose units do not name their run
        rows, metadata = index.from_bytes(file.read_bytes(), file.name)
        del metadata["run"]
        file.write_bytes(index.to_bytes(rows.to_pylist(), metadata))
    with pytest.raises(UserError, match="describes no corpus run") as caught:
        score_corpus(make_config(songs, run))
    assert "choose an empty or new folder" in caught.value.hint
    assert score_corpus(make_config(songs, tmp_path / "new")) == EXIT_OK
    assert content(tmp_path / "new").keys() == content(finished_run).keys()


def test_a_unit_of_another_run_of_the_same_songs_is_found_and_made_again(
    run, finished_run, songs, make_config, tmp_path
):
    assert score_corpus(make_config(songs, tmp_path / "quiet", "silence_dbfs=-59")) == EXIT_OK
    for folder in ("index", "shards", "captions"):
        for file in (*run.glob(f"{folder}/u000001*"), *(tmp_path / "quiet").glob(f"{folder}/u000001*")):
            target = run / folder / file.name
            file.unlink() if file == target else shutil.copy(file, target)
    assert "unit u000001 is of another run" in found(run)
    (run / "_SUCCESS.json").unlink()
    assert score_corpus(make_config(songs, run)) == EXIT_OK
    assert found(run) == []
    assert content(run) == content(finished_run)


def test_repair_makes_again_what_only_a_hash_of_everything_finds(run, finished_run, other_run, monkeypatch, capsys):
    """As on a large run, of which a launch hashes the smallest files alone."""
    monkeypatch.setattr("ttmray.inventory.HASHED_FILES", 3)
    for pattern in ("shards/u000001-*", "captions/u000000-*", "index/u000002.parquet"):
        damaged(run, pattern, "flipped", other_run)
    (run / "shards/u000000-000000000000.tar").write_bytes(b"of a late writer")
    assert main(["corpus", "verify", str(run)]) == EXIT_BAD_INPUT
    (command,) = re.findall("`(ttmray [^`]*)`", " ".join(capsys.readouterr().out.split()))
    assert main(shlex.split(command)[1:]) == EXIT_OK
    assert found(run) == []
    assert content(run) == content(finished_run)
    assert main(["corpus", "repair", str(run)]) == EXIT_OK
    assert "nothing to repair" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["deleted", "unreadable text", "of another run"])
def test_repair_needs_no_config_even_where_the_description_is_lost(run, finished_run, other_run, damage):
    damaged(run, "run.json", damage, other_run)
    assert main(["corpus", "repair", str(run)]) == EXIT_OK
    assert found(run) == []
    assert content(run) == content(finished_run)


def test_the_success_marker_of_another_run_costs_nothing_but_the_end_of_the_job(
    run, other_run, songs, make_config, capsys
):
    before = {path.name: path.stat().st_mtime_ns for path in run.glob("shards/*")}
    damaged(run, "_SUCCESS.json", "of another run", other_run)
    assert score_corpus(make_config(songs, run)) == EXIT_OK
    assert {path.name: path.stat().st_mtime_ns for path in run.glob("shards/*")} == before
    assert "0 clips processed" in capsys.readouterr().out
    assert found(run) == []


def test_a_changed_byte_is_found_where_the_marker_of_a_run_that_was_at_its_end_is_gone(
    run, finished_run, other_run, songs, make_config
):
    damaged(run, "shards/u000001-*", "flipped", other_run)
    damaged(run, "_SUCCESS.json", "deleted", other_run)
    assert score_corpus(make_config(songs, run)) == EXIT_OK
    assert found(run) == []
    assert content(run, ("run.json", "_SUCCESS.json")) == content(finished_run, ("run.json", "_SUCCESS.json"))


@pytest.mark.parametrize("file", ["index.parquet", "index/u000001.parquet"])
def test_deleting_an_unreadable_index_file_as_its_message_says_makes_it_again(
    run, finished_run, songs, make_config, file
):
    (run / file).write_bytes(b"PAR1 no more")
    with pytest.raises(UserError, match="not a readable index file") as caught:
        (index.read_index if file == index.MERGED else index_of_unit)(Folder.at(str(run)))
    assert caught.value.hint.startswith("Delete it and start the same command again")
    (run / file).unlink()
    assert score_corpus(make_config(songs, run)) == EXIT_OK
    assert found(run) == []
    assert content(run) == content(finished_run)


def index_of_unit(run: Folder) -> object:
    return index.read_units(run, ["u000001"])


@pytest.mark.parametrize("name", ["run.json", "plan.json", "summary.json", "cost.json"])
def test_another_file_of_the_run_is_no_success_marker(run, finished_run, songs, make_config, name, capsys):
    shutil.copy(run / name, run / "_SUCCESS.json")
    assert main(["verify", str(run)]) == EXIT_BAD_INPUT
    assert "_SUCCESS.json is damaged" in capsys.readouterr().out
    assert score_corpus(make_config(songs, run)) == EXIT_OK
    assert main(["verify", str(run)]) == EXIT_OK
    assert content(run) == content(finished_run)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"fingerprint": 1, "files": {}}', "\x00"])
@pytest.mark.parametrize("command", [["status"], ["corpus", "stats"], ["corpus", "verify"], ["corpus", "upgrade"]])
def test_no_command_breaks_on_a_damaged_success_marker(run, text, command, capsys):
    (run / "_SUCCESS.json").write_text(text)
    code = main([*command, str(run)])
    shown = capsys.readouterr()
    assert code == (EXIT_BAD_INPUT if command[-1] in ("verify", "upgrade") else EXIT_OK)
    if command[-1] in ("status", "verify"):
        assert "_SUCCESS.json is damaged" in " ".join(shown.out.split())
    assert "Traceback" not in shown.out + shown.err


def test_a_finished_run_in_an_object_store_is_mended_too(bucket, songs, make_config):
    run = Folder.at(f"{bucket}/run")
    config = make_config(songs, run.uri)
    assert score_corpus(config) == EXIT_OK
    shard = run.files("shards")[1].name
    before = run.read(f"shards/{shard}")
    run.write(f"shards/{shard}", before[:-700])
    run.delete("index.parquet")
    run.write("run.json", b"")
    assert len(list(problems(run))) > 2
    assert score_corpus(config) == EXIT_OK
    assert list(problems(run)) == []
    assert run.read(f"shards/{shard}") == before


def test_what_a_launch_looks_at_is_small_for_a_large_run(run, monkeypatch):
    """Sizes of all files, and the hashes of the smallest: the bound counts files and bytes."""
    from ttmray import inventory

    marker = json.loads((run / "_SUCCESS.json").read_text())
    folder, hashed = Folder.at(str(run)), []
    hash_file = inventory._hashed
    monkeypatch.setattr(inventory, "_hashed", lambda run, name: (hashed.append(name), hash_file(run, name))[1])
    assert inventory.damage(folder, marker) == []
    assert sorted(hashed) == sorted(marker["files"])
    hashed.clear()
    monkeypatch.setattr(inventory, "HASHED_BYTES", 20_000)
    assert inventory.damage(folder, marker) == []
    sizes = {name: int(text.split()[0]) for name, text in marker["files"].items()}
    assert 0 < sum(sizes[name] for name in hashed) <= 20_000
    assert max(sizes[name] for name in hashed) <= min(sizes[name] for name in sizes.keys() - set(hashed))


@pytest.mark.parametrize("marker", ["of another run", "unreadable text", "cut"])
def test_a_changed_byte_is_found_although_the_marker_is_damaged_too(run, other_run, songs, make_config, marker):
    shard = damaged(run, "shards/u000001-*", "flipped", other_run)
    captions = damaged(run, "captions/u000000-*", "flipped", other_run)
    damaged(run, "_SUCCESS.json", marker, other_run)
    plan, fingerprint = Plan.load(Folder.at(str(run))), json.loads((run / "run.json").read_text())["fingerprint"]
    forget_damaged(Folder.at(str(run)), plan, fingerprint)
    assert not shard.exists()
    assert not captions.exists()
    assert [unit.name for unit in not_committed(Folder.at(str(run)), plan)] == ["u000000", "u000001"]


@pytest.mark.slow
def test_a_relaunch_of_a_large_finished_run_looks_at_all_of_it_in_little_time(tmp_path):
    """CPU seconds, of 3,000 units: the paper's corpus has six times as many, and 3 s."""
    folder = str(tmp_path / "run")
    run = write_random_corpus(folder, tracks=3000, clips_per_track=2, unit_clips=2, latent=(4, 2), text=(3, 8))
    fingerprint = json.loads(run.read("run.json"))["fingerprint"]
    started = time.process_time()
    plan = Plan.load(run)
    forget_damaged(run, plan, fingerprint)
    assert list(not_committed(run, plan)) == []
    assert time.process_time() - started < 1.0
    shard = run.files("shards", sizes=False)[1234].name
    (tmp_path / "run/shards" / shard).write_bytes(b"")
    forget_damaged(run, plan, fingerprint)
    assert [unit.name for unit in not_committed(run, plan)] == [shard.rpartition("-")[0]]
