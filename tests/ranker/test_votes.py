"""Pair tables in every format, labels, released splits, drawn pairs, and splits that do not leak."""

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttmray.errors import UserError
from ttmray.ranker.votes import (
    LABELS,
    Pair,
    PairSource,
    PairSplit,
    disjoint_splits,
    read_splits,
    read_votes,
    split_pairs,
)

ROWS = [
    {"a": "x/1.wav", "b": "x/2.wav", "label": "a", "prompt": "slow, warm", "split": "train"},
    {"a": "x/1.wav", "b": "3.wav", "label": "tie", "prompt": "", "split": "test"},
    {"a": "3.wav", "b": "x/2.wav", "label": "0", "prompt": "fast", "split": "valid"},
]


def write(path: Path, rows: list[dict]) -> str:
    if path.suffix == ".parquet":
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), buffer)
        path.write_bytes(buffer.getvalue())
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys(), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(json.dumps(rows))
    return str(path)


def source(path: str | Path, **fields) -> PairSource:
    return PairSource(name="mine", path=str(path), **fields)


# ---- tables -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_every_format_holds_the_same_pairs(tmp_path, suffix):
    pairs, dropped = read_votes([source(write(tmp_path / f"votes{suffix}", ROWS))])
    assert dropped == []
    assert [(pair.id, pair.target, pair.split) for pair in pairs] == [
        ("mine:1", 1.0, "train"),
        ("mine:2", 0.5, "test"),
        ("mine:3", 0.0, "validation"),
    ]
    assert pairs[0].a == str(tmp_path / "x/1.wav")
    assert (pairs[0].text, pairs[0].prompt, pairs[0].source) == ("slow, warm", "slow, warm", "mine")


def test_the_records_of_the_release_are_read_under_each_of_their_names(tmp_path):
    records = [
        {"pair_id": "p0", "source": "AIME", "winner": "model_a", "prompt": "x", "a_audio": "1.mp3", "b_audio": "2.mp3"},
        {"battle_uuid": "p1", "dataset": "MusicArena", "winner": "B", "prompt": None, "a_audio": "1", "b_audio": "3"},
        {"uuid": "p2", "dataset": "MusicPrefs", "winner": "draw", "prompt": "y", "a_audio": "2", "b_audio": "3"},
    ]
    pairs, _ = read_votes([source(write(tmp_path / "all.json", records), audio="/audio")])
    found = [(pair.id, pair.source, pair.target, pair.text, pair.a) for pair in pairs]
    assert found == [
        ("p0", "AIME", 1.0, "x", "/audio/1.mp3"),
        ("p1", "MusicArena", 0.0, "", "/audio/1"),
        ("p2", "MusicPrefs", 0.5, "y", "/audio/2"),
    ]


def test_prompts_can_be_hidden_from_the_text_input_and_still_hold_a_split_together(tmp_path):
    rows = [ROWS[0] | {"prompt_id": 7}]
    ((pair,), _) = read_votes([source(write(tmp_path / "v.json", rows), prompts=False)])
    assert (pair.text, pair.prompt) == ("", "mine/7")


def test_clips_of_a_corpus_are_addressed_by_their_keys(tmp_path):
    rows = [{"a": "song_0", "b": "song_1", "label": 1}]
    ((pair,), _) = read_votes([source(write(tmp_path / "v.json", rows), corpus="s3://bucket/run")])
    assert pair.a == "s3://bucket/run#song_0"


@pytest.mark.parametrize(("label", "target"), [*LABELS.items(), ("TIE", 0.5), ("Model_A", 1.0), (1, 1.0), (0.5, 0.5)])
def test_known_labels(tmp_path, label, target):
    ((pair,), _) = read_votes([source(write(tmp_path / "v.json", [ROWS[0] | {"label": label}]))])
    assert pair.target == target


@given(st.text(max_size=12) | st.integers(2) | st.none() | st.floats(0.51, 0.99) | st.booleans())
@settings(max_examples=60, deadline=None)
def test_an_unknown_label_is_an_error_that_names_its_row_and_never_a_tie(tmp_path_factory, label):
    if str(label).strip().lower().removesuffix(".0") in LABELS and not isinstance(label, bool):
        return
    path = tmp_path_factory.mktemp("labels") / "v.json"
    with pytest.raises(UserError, match=r"item 2: .*"):
        read_votes([source(write(path, [ROWS[0], ROWS[1] | {"label": label}]))])


def test_both_bad_is_a_tie_or_left_out_and_a_clip_against_itself_is_left_out(tmp_path):
    rows = [ROWS[0] | {"label": "BOTH_BAD"}, ROWS[0] | {"b": "x/1.wav"}]
    path = write(tmp_path / "v.json", rows)
    pairs, dropped = read_votes([source(path)])
    assert [pair.target for pair in pairs] == [0.5]
    assert [row.reason for row in dropped] == ["same_clip"]
    pairs, dropped = read_votes([source(path, both_bad="drop")])
    assert pairs == []
    assert [row.reason for row in dropped] == ["both_bad", "same_clip"]


@pytest.mark.parametrize("name", ["../secret.wav", "/etc/passwd", "a/../../b.wav", "a\\b.wav", "", "x\n.wav"])
def test_clip_names_cannot_leave_their_folder(tmp_path, name):
    with pytest.raises(UserError, match="item 1"):
        read_votes([source(write(tmp_path / "v.json", [ROWS[0] | {"b": name}]))])


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("v.txt", "a,b,label", "not a table"),
        ("v.json", '{"a": 1}', "list of objects"),
        ("v.json", "[1, 2]", "list of objects"),
        ("v.json", "[{", "cannot be read"),
        ("v.json", '[{"a": ["x"], "b": "y", "label": "a"}]', "not text"),
        ("v.json", '[{"a": "x", "b": "y", "label": "a", "split": "dev"}]', "no split"),
        ("v.csv", "a,b,label\nx,y\n", "number of cells"),
        ("v.csv", "a,b,label\nx,y,a,z\n", "number of cells"),
        ("v.csv", b"a,b\n\xff\xfe\n", "cannot be read"),
        ("v.parquet", b"PAR1", "cannot be read"),
        ("v.json", "[" * 5000, "cannot be read"),
    ],
)
def test_bad_tables_are_one_message_with_the_file(tmp_path, file, content, message):
    path = tmp_path / file
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as error:
        read_votes([source(path)])
    assert file in error.value.message


def test_an_id_is_used_once(tmp_path):
    rows = [ROWS[0] | {"id": "p"}, ROWS[1] | {"id": "p"}]
    with pytest.raises(UserError, match="'p'"):
        read_votes([source(write(tmp_path / "v.json", rows))])


# ---- released splits --------------------------------------------------------------------------------------


def test_released_splits_are_json_lists_or_files_of_ids(tmp_path):
    as_json = write(tmp_path / "split.json", {"metadata": {}, "train": ["p0"], "valid": ["p1"], "test": ["p2"]})
    files = {}
    for split, one in (("train", "p0"), ("validation", "p1"), ("test", "p2")):
        files[split] = str(tmp_path / f"{split}.txt")
        Path(files[split]).write_text(one)  # no newline at the end, as released
    expected = {"p0": "train", "p1": "validation", "p2": "test"}
    assert read_splits(as_json) == read_splits(files) == expected
    rows = [row | {"id": f"p{i}", "split": ""} for i, row in enumerate([*ROWS, ROWS[0]])]
    pairs, _ = read_votes([source(write(tmp_path / "v.json", rows), splits=as_json)])
    splits, dropped = split_pairs(pairs, PairSplit(by="released"))
    assert {name: [pair.id for pair in members] for name, members in splits.items()} == {
        "train": ["p0"],
        "validation": ["p1"],
        "test": ["p2"],
    }
    assert [(row.id, row.reason) for row in dropped] == [("p3", "no_split")]


@pytest.mark.parametrize(
    "content",
    ["[]", '{"train": []}', '{"train": ["p"], "valid": ["p"], "test": []}', '{"train": 1, "valid": 2, "test": 3}', "{"],
)
def test_bad_split_files_are_refused(tmp_path, content):
    (tmp_path / "s.json").write_text(content)
    with pytest.raises(UserError, match=r"s\.json"):
        read_splits(str(tmp_path / "s.json"))


# ---- rated songs ------------------------------------------------------------------------------------------


def song(name: str, *ratings: float) -> dict:
    axes = ("Coherence", "Musicality", "Memorability", "Clarity", "Naturalness")
    return {"file_name": name, "annotation": [dict.fromkeys(axes, rating) for rating in ratings]}


def test_pairs_of_rated_songs_differ_enough_and_the_higher_mean_wins(tmp_path):
    means = {f"{i}.mp3": 1 + i * 0.2 for i in range(20)}
    path = write(tmp_path / "songs.jsonl", [song(name, mean - 0.5, mean + 0.5) for name, mean in means.items()])
    rated = source(path, format="songs", count=60)
    pairs, _ = read_votes([rated])
    assert len(pairs) == 60
    assert len({frozenset((pair.a, pair.b)) for pair in pairs}) == 60
    assert {pair.target for pair in pairs} == {0.0, 1.0}
    for pair in pairs:
        gap = means[Path(pair.a).name] - means[Path(pair.b).name]
        assert abs(gap) >= 0.5 - 1e-9
        assert pair.target == (gap > 0)
    assert read_votes([rated])[0] == pairs
    assert pairs[3].id == "mine_000003"


def test_fewer_pairs_than_asked_for_end_the_draw(tmp_path):
    path = write(tmp_path / "songs.json", [song("1.mp3", 1), song("2.mp3", 1.2), song("3.mp3", 3)])
    pairs, _ = read_votes([source(path, format="songs")])
    assert len(pairs) == 2  # 1 and 2 are too close


@pytest.mark.parametrize("row", [{"file_name": "x.mp3"}, song("x.mp3"), song("x.mp3", float("nan")), song("", 1)])
def test_songs_without_ratings_are_refused(tmp_path, row):
    (tmp_path / "songs.json").write_text(json.dumps([row]))
    with pytest.raises(UserError, match="item 1"):
        read_votes([source(tmp_path / "songs.json", format="songs")])


# ---- splits -----------------------------------------------------------------------------------------------

groups = st.lists(st.tuples(*[st.integers(0, 30).map(str)] * 2), max_size=60)


@given(groups, st.integers(0, 5))
@settings(deadline=None)
def test_no_name_is_in_two_splits(groups, seed):
    splits = disjoint_splits(groups, PairSplit(validation=0.3, test=0.3, seed=seed))
    seen: dict[str, str] = {}
    for group, split in zip(groups, splits, strict=True):
        for name in group if split else ():
            assert seen.setdefault(name, split) == split


def test_nothing_is_lost_where_pairs_hang_together_in_small_groups():
    groups = [(f"{i}", f"{i + 1}") for i in range(0, 400, 2)]
    splits = disjoint_splits(groups, PairSplit(validation=0.2, test=0.2))
    assert "" not in splits
    assert 20 < splits.count("test") < 60
    longer = disjoint_splits([*groups, ("900", "901")], PairSplit(validation=0.2, test=0.2))
    assert longer[:-1] == splits  # more pairs move no other


def test_one_large_group_is_cut_and_pairs_across_are_left_out():
    names = [str(i) for i in range(60)]
    groups = [(a, b) for a in names for b in names if a < b]
    splits = disjoint_splits(groups, PairSplit(validation=0.3, test=0.3))
    assert all(splits.count(split) for split in ("train", "validation", "test", ""))


def pair(i: int, **fields) -> Pair:
    return Pair(f"p{i}", "s", f"{i}.wav", f"{i + 1000}.wav", 1.0, place=f"row {i}", **fields)


def test_prompts_are_held_out_whole_and_pairs_without_one_by_their_clips():
    pairs = [pair(i, prompt=str(i % 40) if i % 4 else "") for i in range(400)]
    splits, dropped = split_pairs(pairs, PairSplit(by="prompt", validation=0.3, test=0.3))
    prompts = [{p.prompt for p in members} - {""} for members in splits.values()]
    assert dropped == []
    assert sum(map(len, prompts)) == len(set.union(*prompts))


def test_systems_are_held_out_and_must_be_named():
    pairs = [pair(i, system_a=f"s{i % 9}", system_b=f"s{i % 7}") for i in range(200)]
    splits, dropped = split_pairs(pairs, PairSplit(by="system", validation=0.3, test=0.3, seed=3))
    systems = [{s for p in members for s in (p.system_a, p.system_b)} for members in splits.values()]
    assert sum(map(len, systems)) == len(set.union(*systems))
    assert {row.reason for row in dropped} == {"across_splits"}
    with pytest.raises(UserError, match="row 5"):
        split_pairs([pair(5, system_a="s")], PairSplit(by="system"))


def test_votes_on_the_same_two_clips_stay_in_one_split_whichever_clip_came_first():
    votes = [replace(pair(i % 100), id=f"v{i}") for i in range(400)]
    votes = [replace(vote, a=vote.b, b=vote.a, target=0.0) if i % 3 else vote for i, vote in enumerate(votes)]
    splits, dropped = split_pairs(votes, PairSplit(by="pair", validation=0.2, test=0.2))
    assert dropped == []
    clips = {split: {frozenset((vote.a, vote.b)) for vote in members} for split, members in splits.items()}
    assert not clips["train"] & clips["test"]
    assert not clips["train"] & clips["validation"]
    assert not clips["validation"] & clips["test"]
    assert {split: len(members) for split, members in splits.items()} == {k: 4 * len(v) for k, v in clips.items()}


def test_ties_alone_and_no_votes_are_named_as_what_they_are():
    with pytest.raises(UserError, match="all 50 votes are ties"):
        split_pairs([replace(pair(i), target=0.5) for i in range(50)], PairSplit(by="pair"))
    with pytest.raises(UserError, match="no vote can be used"):
        split_pairs([], PairSplit(by="pair"))


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_tables_of_votes_may_have_another_separator(tmp_path, separator):
    rows = [["a", "b", "label"], ["1.wav", "2.wav", "a"], ["2.wav", "3.wav", "b"]]
    (tmp_path / "votes.csv").write_text("".join(separator.join(row) + "\n" for row in rows))
    pairs, _ = read_votes([source(tmp_path / "votes.csv")])
    assert [(Path(vote.a).name, Path(vote.b).name, vote.target) for vote in pairs] == [
        ("1.wav", "2.wav", 1.0),
        ("2.wav", "3.wav", 0.0),
    ]


def test_an_empty_split_is_refused():
    with pytest.raises(UserError, match=r"is in validation|is in test|is in train"):
        split_pairs([pair(i) for i in range(2)], PairSplit(by="pair"))


@pytest.mark.parametrize("by", ["pair", "item", "prompt"])
def test_votes_fall_into_the_same_splits_wherever_their_clips_lie(tmp_path, by):
    rows = [f"{i % 60}.wav,{(7 * i + 1) % 60}.wav,{'ab'[i % 2]}" for i in range(300)]
    sides = []
    for place in ("here", "elsewhere/deeper"):
        folder = tmp_path / place
        folder.mkdir(parents=True)
        (folder / "votes.csv").write_text("a,b,label\n" + "\n".join(rows) + "\n")
        pairs, _ = read_votes([source(folder / "votes.csv")])
        splits, _ = split_pairs(pairs, PairSplit(by=by, validation=0.2, test=0.2))
        sides.append({split: [vote.id for vote in members] for split, members in splits.items()})
    assert sides[0] == sides[1]


def test_a_clip_of_two_sources_with_two_names_is_in_one_split(tmp_path):
    (tmp_path / "x").mkdir()
    for name, prefix in (("first", "x/"), ("second", "")):
        rows = [f"{prefix}{i}.wav,{prefix}{i + 100}.wav,a" for i in range(80)]
        (tmp_path / f"{name}.csv").write_text("a,b,label\n" + "\n".join(rows) + "\n")
    sources = [
        PairSource(name="first", path=str(tmp_path / "first.csv"), audio=str(tmp_path)),
        PairSource(name="second", path=str(tmp_path / "second.csv"), audio=str(tmp_path / "x")),
    ]
    pairs, _ = read_votes(sources)
    splits, dropped = split_pairs(pairs, PairSplit(by="pair", validation=0.2, test=0.2))
    assert dropped == []
    clips = [{vote.a for vote in members} for members in splits.values()]
    assert sum(map(len, clips)) == 80
