"""Which split a track is in: a seeded hash of its id, or a table of theirs."""

import hashlib
from collections.abc import Sequence

from ttmray.corpus.config import SplitConfig
from ttmray.corpus.track import Track
from ttmray.errors import UserError
from ttmray.tables import read_rows


def assign_splits(tracks: Sequence[Track], config: SplitConfig) -> list[str]:
    """`train`, `validation` or `test` for every track (paper III-D: 200 and 200 tracks, seeded).

    Tracks, or artists, are ordered by SHA-256 of seed and id; validation takes from the front of that order
    and test from its end. An added track therefore moves at most one other, from validation or test into
    train, and none between validation and test. Rejected tracks get a split, but do not count.

    Raises:
        UserError: when validation and test take more than half of the usable tracks, or for a table of splits that
            cannot be used.
    """
    if config.table is not None:
        return _splits_of(tracks, config.table)
    usable = sum(track.status == "ok" for track in tracks)
    _check_splits(config.validation + config.test, usable, config, "ask for")
    groups: dict[str, list[int]] = {}
    for i, track in enumerate(tracks):
        grouped = config.group_by_artist and track.artist_id
        # the line feed keeps an artist apart from a track of the same name; ids cannot hold one
        groups.setdefault(f"artist\n{track.artist_id}" if grouped else track.track_id, []).append(i)
    order = sorted(groups, key=lambda key: hashlib.sha256(f"{config.seed}:{key}".encode()).digest())
    splits = ["train"] * len(tracks)
    taken = 0
    for split, quota, keys in (
        ("validation", config.validation, order),
        ("test", config.test, list(reversed(order))),
    ):
        count = 0
        for key in keys:
            if count >= quota or splits[groups[key][0]] != "train":
                break
            for i in groups[key]:
                splits[i] = split
                count += tracks[i].status == "ok"
        taken += count
    _check_splits(taken, usable, config, "take, with whole artists,")
    return splits


def split_rule(config: SplitConfig) -> str:
    """What decides the splits, for people."""
    return f"table {config.table}" if config.table is not None else f"SHA-256 order with splits.seed={config.seed}"


def _splits_of(tracks: Sequence[Track], source: str) -> list[str]:
    """The split of every track by a table.

    Raises:
        UserError: another word than the three, two splits of one track, or a table of other tracks.
    """
    splits: dict[str, str] = {}
    for place, row in read_rows(source, {"id", "track_id", "split"}):
        name, split = str(row.get("id", row.get("track_id", ""))).strip(), str(row.get("split", "")).strip()
        split = {"val": "validation", "valid": "validation"}.get(split, split)
        if not name or split not in ("train", "validation", "test"):
            raise UserError(f"{place}: id {name!r}, split {split!r}.", "Columns id and split: train, validation, test.")
        if splits.setdefault(name, split) != split:
            raise UserError(f"{place}: {name} is in two splits.", "Keep one of the two.")
    if not any(track.track_id in splits for track in tracks):
        raise UserError(
            f"splits.table: {source} names none of the {len(tracks)} tracks, such as {tracks[0].track_id}.",
            "Its ids are file names without ending, and without catalogue.stem.",
        )
    return [splits.get(track.track_id, "train") for track in tracks]


def _check_splits(taken: int, usable: int, config: SplitConfig, verb: str) -> None:
    if taken and taken > usable / 2:
        few = usable // 10
        raise UserError(
            f"splits.validation={config.validation} and splits.test={config.test} {verb} {taken} of {usable} "
            "usable tracks: less than half would be left for training.",
            f"Use smaller ones, e.g. --set splits.validation={few} --set splits.test={few}"
            + (", or --set splits.group_by_artist=false." if config.group_by_artist else "."),
        )
