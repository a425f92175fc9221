"""Rewards by another head, from the embeddings of a finished run."""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load, save_file

from ttmray import cost
from ttmray.cli import main
from ttmray.cluster import leave
from ttmray.config import load_config
from ttmray.corpus import index, rescore, scores
from ttmray.corpus.job import score_corpus
from ttmray.corpus.verify import problems
from ttmray.errors import UserError
from ttmray.models.bundle import open_bundle
from ttmray.models.tunejury import debug_tunejury
from ttmray.storage import Folder
from ttmray.training.clips import open_clips
from ttmray.training.data import DataConfig, SourceConfig, open_mixture

OTHER_SEED = 7


def write_head(folder: Path, seed: int = OTHER_SEED, variant: str = "A7", mert: int = 64, **sidecar: object) -> Path:
    """A head of the debug encoders with other weights, as `train-ranker` leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    model = debug_tunejury(seed, mert, variant=variant)
    save_file(model.head.net.state_dict(), folder / "tunejury.safetensors")
    excluded = {"A7": [], "A4": ["text"], "A1": ["mert", "text"]}[variant]
    facts = {"input_dim": model.head.widths[0], "exclude": excluded, "block_dims": [512, mert, 512]} | sidecar
    (folder / "tunejury.json").write_text(json.dumps(facts))
    return folder


def run_rescore(run: Path | str, head: Path | str, *sets: str, name: str = "mine") -> int:
    config = load_config(rescore.RescoreConfig, None, [f"corpus={run}", f"head={head}", f"name={name}", *sets])
    return rescore.rescore(config)


def rewards(run: Path | str, prefix: str = "") -> dict[str, tuple[float, ...]]:
    """Key -> the three rewards of a clip."""
    folder = Folder.at(str(run))
    names = [f"{prefix}{name}" for name in scores.REWARDS]
    table = scores.with_columns(folder, index.read_index(folder), names)
    return {row["key"]: tuple(row[n] for n in names) for row in table.to_pylist() if row["status"] == "ok"}


@pytest.mark.parametrize(("variant", "text"), [("A7", "caption"), ("A7", "empty"), ("A1", "empty")])
def test_rescored_rewards_are_those_of_scoring_the_audio_anew_with_that_head(
    run: Path, songs: Path, make_config: Callable, tmp_path: Path, variant: str, text: str
):
    head = write_head(tmp_path / "head", variant=variant)
    assert run_rescore(run, head, f"text={text}") == 0
    anew = make_config(songs, tmp_path / "anew", f"bundle=debug+{head}", f"reward_text={text}")
    assert score_corpus(anew) == 0
    assert rewards(run, "mine/") == rewards(anew.output)
    assert rewards(run, "mine/") != rewards(run)
    protocol = scores.protocol_of(Folder.at(str(run)), "mine/reward_score")
    assert protocol == scores.protocol_of(Folder.at(anew.output), "reward_score")
    assert protocol != scores.protocol_of(Folder.at(str(run)), "reward_score")
    statistics = json.loads((run / "scores/mine/stats.json").read_text())
    assert statistics["splits"] == json.loads((Path(anew.output) / "stats/rewards.json").read_text())["splits"]
    table = run / "scores/mine"
    for file in (table / "stats.json", table / "run.json", Path(anew.output) / "stats/rewards.json"):
        assert "mean nothing" in json.loads(file.read_text())["note"], "whoever reads the file alone is told, too"


def test_a_relaunch_goes_on_with_the_parts_that_are_missing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(rescore, "UNITS_PER_PART", 1)
    head = write_head(tmp_path / "head")
    run_rescore(run, head, name="whole")
    score, calls = rescore.PartScorer.__call__, []
    of_corpus = (run / cost.COST).read_bytes()

    def dies(self: rescore.PartScorer, part: rescore.Portion) -> int:
        if calls:
            raise KeyboardInterrupt
        calls.append(part.name)
        return score(self, part)

    with monkeypatch.context() as patch:
        patch.setattr(rescore.PartScorer, "__call__", dies)
        with pytest.raises(KeyboardInterrupt):
            run_rescore(run, head)
    assert scores.table_names(Folder.at(str(run))) == ["whole"]
    with pytest.raises(UserError, match="has no score column 'mine/reward_score'"):
        rewards(run, "mine/")
    table = Folder.at(str(run / "scores/mine"))
    before = cost.read(table)["seconds"]
    run_rescore(run, head)
    assert 0 < before < cost.read(table)["seconds"]
    assert (run / cost.COST).read_bytes() == of_corpus  # a table has its own
    assert "resuming: 1 of 3 parts are there" in " ".join(capsys.readouterr().out.split())
    for name in ("scores.parquet", "stats.json"):
        assert (run / "scores/mine" / name).read_bytes() == (run / "scores/whole" / name).read_bytes()
    assert not list((run / "scores/mine/parts").iterdir())
    run_rescore(run, head)
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.slow
def test_workers_of_ray_write_the_same_table(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rescore, "UNITS_PER_PART", 1)
    head = write_head(tmp_path / "head")
    run_rescore(run, head, name="here")
    run_rescore(run, head, "runtime.runner=ray", "runtime.workers=2", name="there")
    leave()
    table = "scores.parquet"
    assert (run / "scores/there" / table).read_bytes() == (run / "scores/here" / table).read_bytes()


def test_a_corpus_and_a_head_in_a_bucket_are_rescored_there(run: Path, bucket: str, tmp_path: Path):
    head = write_head(tmp_path / "head")
    for root, where in ((run, "corpus"), (head, "head")):
        for file in root.rglob("*"):
            if file.is_file():
                Folder.at(f"{bucket}/{where}").write(file.relative_to(root).as_posix(), file.read_bytes())
    run_rescore(f"{bucket}/corpus", f"{bucket}/head")
    run_rescore(run, head)
    assert rewards(f"{bucket}/corpus", "mine/") == rewards(run, "mine/")


def test_another_head_needs_another_name(run: Path, tmp_path: Path):
    run_rescore(run, write_head(tmp_path / "one", seed=1))
    with pytest.raises(UserError, match="belongs to another run:\n    head: ") as caught:
        run_rescore(run, write_head(tmp_path / "two", seed=2))
    assert "Choose another name, or delete" in str(caught.value.hint)


def test_the_place_of_a_head_and_of_its_run_is_no_part_of_identity(run: Path, tmp_path: Path):
    run_rescore(run, write_head(tmp_path / "one"))
    moved = run.rename(tmp_path / "moved")
    assert run_rescore(moved, write_head(tmp_path / "two") / "tunejury.safetensors") == 0


@pytest.mark.parametrize(
    ("sidecar", "mert", "message"),
    [
        ({"protocol": "paper/tj-center-full-int16-empty-0123"}, 64, "trained on features of the bundle paper"),
        ({}, 48, "takes 1072 inputs"),
    ],
)
def test_a_head_of_other_encoders_is_refused(
    run: Path, tmp_path: Path, sidecar: dict[str, str], mert: int, message: str
):
    with pytest.raises(UserError, match=message):
        run_rescore(run, write_head(tmp_path / "head", mert=mert, **sidecar))
    assert scores.table_names(Folder.at(str(run))) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run, head: (run / "_SUCCESS.json").unlink(), "is not finished"),
        (lambda run, head: (head / "tunejury.safetensors").unlink(), "is no reward head"),
        (lambda run, head: (head / "tunejury.safetensors").write_bytes(b"PK"), "tunejury.safetensors"),
        (lambda run, head: (run / "run.json").unlink(), "is no corpus run"),
        (lambda run, head: _flip(next((run / "shards").iterdir())), "hash is not that of its name"),
    ],
)
def test_what_cannot_be_rescored_is_one_message_and_no_table(
    run: Path, tmp_path: Path, change: Callable[[Path, Path], object], message: str
):
    head = write_head(tmp_path / "head")
    change(run, head)
    with pytest.raises(UserError, match=message):
        run_rescore(run, head)
    assert scores.table_names(Folder.at(str(run))) == []


WRONG_HEADS: dict[str, Callable[[Path], object]] = {
    "a table": lambda head: (head / "tunejury.safetensors").write_text("a,b,label\n"),
    "nothing in it": lambda head: (head / "tunejury.safetensors").write_bytes(b""),
    "cut": lambda head: (head / "tunejury.safetensors").write_bytes((head / "tunejury.safetensors").read_bytes()[:900]),
    "not a number": lambda head: _set_weights(head, float("nan")),
    "too large": lambda head: _set_weights(head, 3e38),
    "sidecar of another kind": lambda head: (head / "tunejury.json").write_text('{"exclude": 5}'),
    "run of another kind": lambda head: (head / "run.json").write_text("[1]"),
    "damaged run": lambda head: (head / "run.json").write_text('{"kind": "ran'),
}


def _set_weights(head: Path, value: float) -> None:
    weights = head / "tunejury.safetensors"
    tensors = load(weights.read_bytes())
    save_file({name: t.fill_(value) if t.is_floating_point() else t for name, t in tensors.items()}, weights)


@pytest.mark.parametrize("wrong", WRONG_HEADS)
def test_a_wrong_head_is_one_message_and_leaves_its_name_to_a_right_one(run: Path, tmp_path: Path, capsys, wrong: str):
    head = write_head(tmp_path / "wrong")
    WRONG_HEADS[wrong](head)
    assert main(["corpus", "rescore", str(run), "--head", str(head), "--name", "mine"]) == 2
    said = capsys.readouterr().err
    assert str(head) in said.replace("\n", "")
    assert "Traceback" not in said
    assert not (run / "scores").exists()
    assert run_rescore(run, write_head(tmp_path / "right")) == 0
    assert list(problems(Folder.at(str(run)))) == []


def _other_numbers(part: Path) -> None:
    table = pq.read_table(part)
    zeros = pa.array([0.0] * table.num_rows)
    pq.write_table(table.set_column(table.column_names.index("reward_score"), "reward_score", zeros), part)


@pytest.mark.parametrize("how", ["flipped", "cut", "empty", "other numbers"])
def test_a_part_that_was_damaged_between_launches_is_made_again(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, how: str
):
    monkeypatch.setattr(rescore, "UNITS_PER_PART", 1)
    head = write_head(tmp_path / "head")
    run_rescore(run, head, name="whole")
    with monkeypatch.context() as patch:
        patch.setattr(rescore, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_rescore(run, head)
    assert list(problems(Folder.at(str(run)))) == []  # a table in the making is nobody's yet
    part = sorted((run / "scores/mine/parts").iterdir())[1]
    if how == "flipped":
        _flip(part)
    elif how == "other numbers":
        _other_numbers(part)
    else:
        part.write_bytes(part.read_bytes()[: -50 if how == "cut" else 0])
    capsys.readouterr()
    assert run_rescore(run, head) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "is damaged; it is made again" in said
    assert "resuming: 2 of 3 parts are there" in said
    names = "whole", "mine"
    whole, mine = ((run / "scores" / name / "scores.parquet").read_bytes() for name in names)
    assert mine == whole


def test_what_a_kill_after_the_end_has_left_is_swept_by_the_next_launch(run: Path, tmp_path: Path):
    head = write_head(tmp_path / "head")
    run_rescore(run, head)
    (run / "scores/mine/parts/u000000-0123456789ab.parquet").write_bytes(b"left")
    run_rescore(run, head)
    assert not list((run / "scores/mine/parts").iterdir())


def test_a_flipped_bit_in_a_table_never_becomes_another_score(run: Path, tmp_path: Path):
    run_rescore(run, write_head(tmp_path / "head"))
    table = run / "scores/mine/scores.parquet"
    whole, noticed = table.read_bytes(), 0
    sound = scores.read_table(Folder.at(str(run)), "mine")
    for place in range(40, len(whole) - 200, 97):  # pages; the footer is another thing
        data = bytearray(whole)
        data[place] ^= 4
        table.write_bytes(data)
        with suppress(UserError):
            assert scores.read_table(Folder.at(str(run)), "mine").equals(sound)
            continue  # a bit that means nothing
        noticed += 1
    assert noticed > 10


def test_a_table_under_another_folder_name_is_repaired_there(run: Path, tmp_path: Path):
    run_rescore(run, write_head(tmp_path / "head"))
    (run / "scores/mine").rename(run / "scores/yours")
    (run / "scores/yours/stats.json").unlink()
    assert main(["corpus", "repair", str(run)]) == 0
    assert (run / "scores/yours/stats.json").exists()


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a b", "x" * 65])
def test_a_name_that_is_no_folder_is_refused(run: Path, tmp_path: Path, name: str):
    command = ["corpus", "rescore", str(run), "--head", str(write_head(tmp_path / "head")), "--name", name]
    assert main(command) == 2
    assert not (run / "scores").exists()


def test_training_reads_a_column_of_a_table_and_lists_the_columns_that_there_are(run: Path, tmp_path: Path):
    run_rescore(run, write_head(tmp_path / "head"))
    clips = open_clips(str(run), "all", None, "mine/reward_score", str(tmp_path))
    expected = rewards(run, "mine/")
    assert [expected[str(key)][0] for key in clips.keys] == pytest.approx(clips.score.tolist())
    with pytest.raises(
        UserError, match=r"no score column 'yours/reward_score'. It has: .*lufs.*mine/track_reward_score"
    ):
        open_clips(str(run), "all", None, "yours/reward_score", str(tmp_path))
    assert open_clips(str(run), "all", None, "lufs", str(tmp_path)).score.max() < 0


def test_scores_of_different_heads_do_not_mix(run: Path, tmp_path: Path):
    run_rescore(run, write_head(tmp_path / "head"))
    sources = [
        SourceConfig(corpus=str(run), split="all", score_column=column)
        for column in ("mine/instrumental_reward_score", "instrumental_reward_score")
    ]
    with pytest.raises(UserError, match=r"sources: mine/instrumental_reward_score of .* was made by"):
        open_mixture(DataConfig(sources=tuple(sources), cache=str(tmp_path)))


def test_verify_finds_damaged_tables_and_clips_that_were_made_again(run: Path, tmp_path: Path):
    head = write_head(tmp_path / "head")
    run_rescore(run, head)
    run_rescore(run, head, name="other")
    assert list(problems(Folder.at(str(run)))) == []
    _flip(run / "scores/mine/scores.parquet")
    (run / "scores/other/_SUCCESS.json").write_text("{}")
    lines = list(problems(Folder.at(str(run))))
    assert len(lines) == 2
    assert "scores/mine/scores.parquet: SHA-256 differs" in lines[0]
    assert "scores/other/_SUCCESS.json is damaged" in lines[1]
    assert all(f"ttmray corpus repair {run}" in line for line in lines)
    assert main(["corpus", "repair", str(run)]) == 0  # the advice works
    assert list(problems(Folder.at(str(run)))) == []


@pytest.mark.parametrize("damaged", ["scores.parquet", "stats.json", "run.json", "_SUCCESS.json"])
@pytest.mark.parametrize("how", ["gone", "flipped"])
@pytest.mark.parametrize("by", ["repair", "rescore"])
def test_every_file_of_a_table_is_made_again_by_repair_and_by_the_same_command(
    run: Path, tmp_path: Path, damaged: str, how: str, by: str
):
    head = write_head(tmp_path / "head")
    run_rescore(run, head)
    whole = rewards(run, "mine/")
    file = run / "scores/mine" / damaged
    if how == "gone":
        file.unlink()
    else:
        _flip(file)
    assert list(problems(Folder.at(str(run)))) != []
    if by == "repair":
        assert main(["corpus", "repair", str(run)]) == 0
    else:
        assert run_rescore(run, head) == 0
    assert list(problems(Folder.at(str(run)))) == []
    assert rewards(run, "mine/") == whole


def test_a_table_whose_head_is_gone_is_said_and_the_corpus_is_repaired(run: Path, tmp_path: Path, capsys):
    head = write_head(tmp_path / "head")
    run_rescore(run, head)
    _flip(run / "scores/mine/scores.parquet")
    shutil.rmtree(head)
    capsys.readouterr()
    assert main(["corpus", "repair", str(run)]) == 2
    assert "no reward head" in capsys.readouterr().out


def test_looks_take_columns_of_tables(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run_rescore(run, write_head(tmp_path / "head"))
    capsys.readouterr()
    assert main(["corpus", "ls", str(run), "--status", "ok", "--columns", "key,mine/reward_score", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["key"]: row["mine/reward_score"] for row in rows} == {
        key: values[0] for key, values in rewards(run, "mine/").items()
    }
    assert main(["corpus", "ls", str(run), "--columns", "key,nothing"]) == 2
    said = capsys.readouterr().err
    assert "has no column 'nothing'" in said
    for column in ("key", "status", "caption", "reward_score", "mine/track_reward_score"):
        assert f" {column}," in said or f" {column}." in said, "columns of text and of the run's tables, too"
    assert main(["corpus", "stats", str(run)]) == 0
    said = capsys.readouterr().out
    assert "mine/track_reward" in said
    protocol = scores.protocol_of(Folder.at(str(run)), "mine/reward_score")
    assert f"scores mine by {protocol}, head SHA-256 " in said.replace("\n", " ")
    assert main(["corpus", "sample", str(run), "-n", "1", "--out", str(tmp_path / "page")]) == 0
    page = (tmp_path / "page/index.html").read_text()
    assert "mine/reward_score" in page
    assert protocol in page


def test_a_bundle_with_another_head_says_so_and_names_it_by_hash(tmp_path: Path):
    head = write_head(tmp_path / "head")
    bundle = open_bundle(f"debug+{head}")
    assert bundle.name == "debug"
    assert bundle.identity()["head"] == bundle.protocol("empty").hashes[-1][1]
    assert len(bundle.identity()["head"].split()[0]) == 64
    assert str(head) in bundle.note
    assert bundle.identity({"vocoder"}) == open_bundle("debug").identity({"vocoder"})
    with pytest.raises(UserError, match="is no reward head"):
        open_bundle(f"debug+{tmp_path}/nothing")
