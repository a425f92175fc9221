"""Preference pairs: reading tables of votes, making pairs of rated songs, and splitting without leaks.

A pair names two clips, the prompt that both were made for, and who was preferred. One reader takes plain tables and
the records of the TuneJury release (Music Arena, MusicPrefs, AIME), which differ in column names only; SongEval
rates single songs, so its pairs are drawn here.
"""

import hashlib
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ttmray.config import Config, Location, execution
from ttmray.errors import UserError
from ttmray.json_text import read_json
from ttmray.storage import Folder, read_file, split_path
from ttmray.tables import read_rows

SPLITS = ("train", "validation", "test")
BOTH_BAD = "both_bad"
LABELS = {"1": 1.0, "a": 1.0, "model_a": 1.0, "0": 0.0, "b": 0.0, "model_b": 0.0}
LABELS |= dict.fromkeys(("0.5", "tie", "draw", BOTH_BAD), 0.5)
"""Label -> the probability that a is preferred."""
COLUMNS = {
    "id": ("pair_id", "battle_uuid", "uuid", "id"),
    "a": ("a", "a_audio"),
    "b": ("b", "b_audio"),
    "label": ("label", "winner", "vote", "preference"),
    "prompt": ("prompt",),
    "source": ("source", "dataset"),
    "prompt_id": ("prompt_id",),
    "system_a": ("system_a",),
    "system_b": ("system_b",),
    "split": ("split",),
}
"""Columns of a pair table, each with the names that it goes by; the first that is there counts."""
KNOWN = frozenset({name for names in COLUMNS.values() for name in names} | {"file_name", "path", "audio"})
"""Columns that tell the separator of a CSV file; ratings have some of their own."""
AXES = ("coherence", "musicality", "memorability", "clarity", "naturalness")
"""The five axes of SongEval."""


class PairSource(Config):
    """One set of votes, or of rated songs."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    """Source of the rows that do not name theirs."""
    path: Location = execution()
    """Table: CSV, TSV, JSON list, JSON lines or Parquet; local or s3://."""
    format: Literal["pairs", "songs"] = "pairs"
    """`pairs`: one vote per row. `songs`: one rated song per row (SongEval), from which pairs are drawn."""
    audio: Location | None = execution(None)
    """Folder or bucket that the clips' names are relative to; default: the table's own folder."""
    corpus: Location | None = execution(None)
    """Run folder of the corpus job: clips are then keys of its index, and nothing is encoded again."""
    splits: Location | dict[Literal["train", "validation", "test"], Location] | None = execution(None)
    """Released split: a JSON file with the lists train, valid and test, or one file of ids per split."""
    prompts: bool = True
    """Off: the text input is empty, for raters that did not see the prompt (MusicPrefs)."""
    both_bad: Literal["tie", "drop"] = "tie"
    """What a BOTH_BAD vote (Music Arena) is; the released splits hold them as ties, as far as one can tell."""
    min_gap: float = Field(0.5, ge=0)
    """`songs`: least difference of mean ratings in a pair (as released)."""
    count: int = Field(3760, ge=1)
    """`songs`: pairs to draw (as released)."""
    seed: int = 42
    """`songs`: seed of the draw."""

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if self.audio and self.corpus:
            raise ValueError("name either audio or corpus, not both")
        return self


class PairSplit(Config):
    """Who must not be on both sides of train and test."""

    by: Literal["released", "pair", "item", "prompt", "system"] = "item"
    """`released` takes the sources' split files or the table's split column. The others hold out whole pairs (all
    votes on the same two clips), clips,
    prompts or systems by a seeded hash of their names in the tables, so that more pairs, or another folder, move no
    other."""
    validation: float = Field(0.1, gt=0, lt=1)
    """Share that selects the best epoch."""
    test: float = Field(0.1, gt=0, lt=1)
    """Share that is only reported."""
    seed: int = 0

    @model_validator(mode="after")
    def _some_left(self) -> Self:
        if self.validation + self.test >= 1:
            raise ValueError("validation and test must leave something to train on")
        return self


@dataclass(frozen=True)
class Pair:
    """One vote. `a` and `b` are addresses: a path or URI, or `<corpus run>#<key>`. `target` is 1 where a was
    preferred, 0 for b, 0.5 for a tie; `text` is what the text encoder sees; `place` is file and row. `name_a` and
    `name_b` are the clips as the table calls them, wherever they lie."""

    id: str
    source: str
    a: str
    b: str
    target: float
    text: str = ""
    prompt: str = ""
    system_a: str = ""
    system_b: str = ""
    split: str = ""
    place: str = ""
    name_a: str = ""
    name_b: str = ""


@dataclass(frozen=True)
class Dropped:
    """A row that cannot be used, and the reason as a countable word."""

    id: str
    source: str
    reason: str
    message: str = ""


def read_votes(sources: Sequence[PairSource]) -> tuple[list[Pair], list[Dropped]]:
    """All pairs of all sources, in order, and the rows that are no use.

    Raises:
        UserError: a table that cannot be read, a row without clips or with a label that nobody knows, names that
            leave their folder, or one id twice.
    """
    pairs: list[Pair] = []
    dropped: list[Dropped] = []
    for source in sources:
        rows = read_rows(source.path, KNOWN)
        comparisons = (
            _rated(source, rows) if source.format == "songs" else [_pair(source, row, place) for place, row in rows]
        )
        released = read_splits(source.splits) if source.splits else None
        for pair in comparisons:
            if isinstance(pair, Dropped):
                dropped.append(pair)
            else:
                pairs.append(pair if released is None else replace(pair, split=released.get(pair.id, "")))
    repeated = [name for name, count in Counter(pair.id for pair in pairs).items() if count > 1]
    if repeated:
        raise UserError(f"the pair id {repeated[0]!r} is used more than once.", "Ids must differ in all sources.")
    return pairs, dropped


def read_splits(spec: str | Mapping[Any, str]) -> dict[str, str]:
    """Pair id -> train, validation or test.

    Args:
        spec: a JSON file with the lists `train`, `valid` and `test`, or a text file with one id per line per split.

    Raises:
        UserError: a file that is none of that, or an id in two splits.
    """
    lists: dict[str, list[str]] = {}
    if isinstance(spec, str):
        try:
            content = read_json(read_file(spec))
            lists = {"validation" if key == "valid" else key: content[key] for key in ("train", "valid", "test")}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{spec} is no split file: {error!r}", "It needs the lists train, valid and test."
            ) from error
        if not all(isinstance(ids, list) and all(isinstance(one, str) for one in ids) for ids in lists.values()):
            raise UserError(f"{spec}: train, valid and test must be lists of pair ids.")
    else:
        for split, path in spec.items():
            try:
                lists[split] = [line.strip() for line in read_file(path).decode().splitlines() if line.strip()]
            except UnicodeDecodeError as error:
                raise UserError(f"{path} is not UTF-8.", "One pair id per line.") from error
    where: dict[str, str] = {}
    for split, ids in lists.items():
        for one in ids:
            if where.setdefault(one, split) != split:
                raise UserError(f"{spec}: the pair {one!r} is in {where[one]} and in {split}.")
    return where


def split_pairs(pairs: Sequence[Pair], config: PairSplit) -> tuple[dict[str, list[Pair]], list[Dropped]]:
    """Pairs by split, and those that belong to none or would join two.

    Raises:
        UserError: there are no pairs, a split stays empty, all votes are ties, or a row lacks what is to be held out.
    """
    if not pairs:
        raise UserError("no vote can be used: there is none between two different clips.", "Check the tables of votes.")
    if all(pair.target == 0.5 for pair in pairs):
        raise UserError(
            f"all {len(pairs)} votes are ties: no clip was preferred to another.",
            f"Check the column of labels; {', '.join(LABELS)} are known.",
        )
    if config.by == "released":
        names, why = [pair.split for pair in pairs], "no_split"
    else:
        groups, called = [_held_out(pair, config.by) for pair in pairs], _called(pairs, config.by)
        names, why = disjoint_splits(groups, config, called), "across_splits"
    splits: dict[str, list[Pair]] = {split: [] for split in SPLITS}
    dropped = []
    for pair, name in zip(pairs, names, strict=True):
        if name:
            splits[name].append(pair)
        else:
            dropped.append(Dropped(pair.id, pair.source, why, pair.place))
    for split, members in splits.items():
        if not members:
            raise UserError(
                f"split.by={config.by}: no pair of {len(pairs)} is in {split} ({len(dropped)} are in none).",
                "Take another split.seed, larger shares, or another kind of split.",
            )
    return splits, dropped


def disjoint_splits(
    groups: Sequence[Sequence[str]], config: PairSplit, called: Mapping[str, str] | None = None
) -> list[str]:
    """A split for every pair such that no name of `groups` is in two; "" for pairs that would join two splits.

    Pairs that hang together are kept together, so that nothing is lost. Where more than half of all pairs hang together
    (every clip compared with many others) names are drawn one by one instead, and pairs across splits are left out.

    Args:
        groups: per pair what must stay together, e.g. its two clips.
        called: what a name is drawn by instead of itself, so that votes fall alike wherever their clips lie.
    """
    called = called or {}
    names = sorted({name for group in groups for name in group})
    number = {name: i for i, name in enumerate(names)}
    edges = np.array([[number[group[0]], number[name]] for group in groups for name in group]).reshape(-1, 2)
    graph = coo_array((np.ones(len(edges), bool), (edges[:, 0], edges[:, 1])), (len(names), len(names)))
    _, component = connected_components(graph, directed=False)
    sizes = Counter(int(component[number[group[0]]]) for group in groups)
    if max(sizes.values(), default=0) > len(groups) / 2:
        component = np.arange(len(names))
    labelled = sorted(zip((called.get(name, name) for name in names), component.tolist(), strict=True))
    first = {part: label for label, part in reversed(labelled)}
    drawn = [_draw(first[part], config) for part in component.tolist()]
    splits = [{drawn[number[name]] for name in group} for group in groups]
    return [split.pop() if len(split) == 1 else "" for split in splits]


def _draw(name: str, config: PairSplit) -> str:
    share = int.from_bytes(hashlib.sha256(f"{config.seed}/{name}".encode()).digest()[:8], "big") / 2**64
    if share < config.test:
        return "test"
    return "validation" if share < config.test + config.validation else "train"


def _held_out(pair: Pair, by: str) -> tuple[str, ...]:
    if by == "pair":  # all votes on the same two clips, whichever came first
        return ("\n".join(sorted((pair.a, pair.b))),)
    if by == "system":
        if not (pair.system_a and pair.system_b):
            raise UserError(f"{pair.place}: no system_a and system_b.", "split.by=system needs both in every row.")
        return (pair.system_a, pair.system_b)
    # pairs without a prompt (SongEval) are held out by their clips
    return (f"prompt {pair.prompt}",) if by == "prompt" and pair.prompt else (pair.a, pair.b)


def _called(pairs: Sequence[Pair], by: str) -> dict[str, str]:
    """For names of `_held_out` that are addresses of clips: what the tables call them, the first of several words."""
    called: dict[str, str] = {}
    for pair in pairs:
        words = {pair.a: pair.name_a or pair.a, pair.b: pair.name_b or pair.b}
        if by == "pair":
            words = {_held_out(pair, by)[0]: "\n".join(sorted(words.values()))}
        for name, word in words.items():
            called[name] = min(word, called.get(name, word))
    return called


def _pair(source: PairSource, row: dict[str, Any], place: str) -> Pair | Dropped:
    cells = {name: _cell(row, aliases, place) for name, aliases in COLUMNS.items()}
    label = cells["label"].lower().removesuffix(".0")
    if label not in LABELS:
        raise UserError(
            f"{place}: {cells['label']!r} is no label.",
            f"Columns {', '.join(COLUMNS['label'])} may hold {', '.join(LABELS)}.",
        )
    name = cells["source"] or source.name
    split = {"valid": "validation", "val": "validation"}.get(cells["split"], cells["split"])
    if split and split not in SPLITS:
        raise UserError(f"{place}: {split!r} is no split.", f"Write {', '.join(SPLITS)}, or leave it empty.")
    pair = Pair(
        id=cells["id"] or f"{source.name}:{place.rsplit(' ', 1)[1]}",
        source=name,
        a=_address(source, cells["a"], place),
        b=_address(source, cells["b"], place),
        target=LABELS[label],
        text=cells["prompt"] if source.prompts else "",
        prompt=f"{name}/{cells['prompt_id']}" if cells["prompt_id"] else cells["prompt"],
        system_a=cells["system_a"],
        system_b=cells["system_b"],
        split=split,
        place=place,
        name_a=cells["a"],
        name_b=cells["b"],
    )
    if pair.a == pair.b:
        return Dropped(pair.id, name, "same_clip", place)
    if label == BOTH_BAD and source.both_bad == "drop":
        return Dropped(pair.id, name, BOTH_BAD, place)
    return pair


def _rated(source: PairSource, rows: Sequence[tuple[str, dict[str, Any]]]) -> list[Pair | Dropped]:
    """Pairs of songs whose mean ratings differ enough, drawn as the release draws them (SongEval)."""
    scores: dict[str, float] = {}
    called: dict[str, str] = {}
    for place, row in rows:
        name = _cell(row, ("file_name", "path", "audio", "id"), place)
        address = _address(source, name, place)
        if address in scores:
            raise UserError(f"{place}: {name!r} is rated in an earlier row already.")
        scores[address], called[address] = _mean_rating(row, place), name
    songs, drawn = sorted(scores), random.Random(source.seed)
    pairs: dict[frozenset[str], Pair] = {}
    for _ in range(200 * source.count):  # few songs, or few that differ enough, may not give as many pairs
        if len(pairs) == source.count or len(songs) < 2:
            break
        a, b = drawn.sample(songs, 2)
        key = frozenset((a, b))
        if key in pairs or abs(scores[a] - scores[b]) < source.min_gap or scores[a] == scores[b]:
            continue
        name = f"{source.name.lower()}_{len(pairs):06d}"
        words = {"name_a": called[a], "name_b": called[b], "place": f"{source.path}, drawn {name}"}
        pairs[key] = Pair(name, source.name, a, b, float(scores[a] > scores[b]), **words)
    return list(pairs.values())


def _mean_rating(row: Mapping[str, Any], place: str) -> float:
    """Mean over axes of the mean over annotators; the axes are columns, or keys of `annotation` or its items."""
    ratings = row.get("annotation", row.get("annotations", row))
    judges = ratings if isinstance(ratings, list) else [ratings]
    try:
        if not judges:
            raise ValueError("no annotator")
        plain = [{str(key).strip().lower(): value for key, value in judge.items()} for judge in judges]
        means = [np.mean([np.mean(np.asarray(judge[axis], np.float64)) for judge in plain]) for axis in AXES]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{place}: no ratings on {', '.join(AXES)} ({error!r}).") from error
    if not np.isfinite(means).all():
        raise UserError(f"{place}: ratings that are not finite.")
    return float(np.mean(means))


def _cell(row: Mapping[str, Any], names: Sequence[str], place: str) -> str:
    for name in names:
        value = row.get(name)
        if value is None or value == "":
            continue
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise UserError(f"{place}: {name} is a {type(value).__name__}, not text or a number.")
        return str(value).strip()
    return ""


def _address(source: PairSource, name: str, place: str) -> str:
    if not name:
        raise UserError(f"{place}: a clip has no name.", f"Columns: {COLUMNS['a']} and {COLUMNS['b']}.")
    if source.corpus:
        return f"{Folder.at(source.corpus)}#{name}"
    folder = Folder.at(source.audio) if source.audio else split_path(source.path)[0]
    try:
        return folder.path(name)
    except UserError as error:
        raise UserError(f"{place}: {error.message}", "Names are relative to `audio`.") from error
