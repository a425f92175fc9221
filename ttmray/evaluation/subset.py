"""`ttmray subset SOURCE -n N --out DIR`: a seeded choice of clips or captions, for validation and reference sets.

Tracks are taken in the order of a hash of the seed and their id, and clips of a track in the order of a hash of theirs.
So a choice depends on no order of files or rows, a larger one holds the smaller one of the same seed, and a track of
many clips is no more likely than one of few. Only clips with a caption are taken.

`prompts.csv` (`id`, `prompt`) is what `ttmray generate` and `ttmray evaluate` read. Of a corpus run, ids are clip keys,
and `keys.txt` holds them for `ttmray reference build --keys` and the `keys` of a training source. Of a table, ids are
track ids. `subset.json` says what was chosen from.
"""

import csv
import hashlib
import io
import json
from collections.abc import Mapping
from typing import Any

from ttmray import inventory, runs
from ttmray.console import console
from ttmray.corpus import index
from ttmray.corpus.captions import read_table
from ttmray.corpus.catalogue import track_ids
from ttmray.corpus.unit import OK
from ttmray.errors import EXIT_OK, UserError
from ttmray.generation.prompts import Prompt, checked_prompts
from ttmray.storage import Folder, absolute, read_file
from ttmray.tables import is_table

KEYS, PROMPTS, ABOUT = "keys.txt", "prompts.csv", "subset.json"


def write_subset(source: str, out: str, n: int, split: str = "all", per_track: int = 1, seed: int = 0) -> int:
    """Choose and write; returns the exit code.

    Args:
        source: corpus run (folder or s3:// prefix), or a table of tracks with the columns `track_id` (or `id`, or
            `path`) and `caption`; a track may have several rows.
        n: clips of a run, rows of a table.
        split: of a run: `train`, `validation`, `test` or `all`.
        per_track: most clips, or rows, of one track.

    Raises:
        UserError: fewer than n can be chosen; a table without captions, ids or splits; ids that are no safe file names;
            a folder that holds another subset.
    """
    if n < 1 or per_track < 1:
        raise UserError(f"subset: n is {n} and per_track {per_track}.", "Both must be 1 or more.")
    table = is_table(source)
    captions, origin = _of_table(source, split) if table else _of_run(source, split)
    keys = choose({track: list(clips) for track, clips in captions.items()}, n, per_track, seed)
    if len(keys) < n:
        raise UserError(
            f"{source} has {len(keys)} clips with a caption to choose from, {n} are asked for.",
            "Choose fewer, another split, or more per track.",
        )
    if table and per_track == 1:  # the track is the prompt's name
        prompts = [(track, captions[track][key]) for track, key in keys]
    else:
        prompts = [(key, captions[track][key]) for track, key in keys]
    checked = checked_prompts(prompts, source)
    choice = {"kind": "subset", **origin, "split": split, "n": n, "per_track": per_track, "seed": seed}
    about = json.dumps(choice, indent=1).encode()
    folder = Folder.at(out)
    _refuse_another(folder, about)
    inventory.reopen(folder, "subset")
    if not table:
        folder.write(KEYS, "".join(f"{prompt.id}\n" for prompt in checked).encode())
    folder.write(PROMPTS, _csv(checked))
    folder.write(ABOUT, about)
    inventory.note(folder, "subset", (PROMPTS, ABOUT, *(() if table else (KEYS,))))
    tracks = len({track for track, _ in keys})
    console.print(f"{folder}: {n} of {sum(map(len, captions.values()))} captions, of {tracks} tracks", markup=False)
    return EXIT_OK


def _refuse_another(folder: Folder, about: bytes) -> None:
    if not folder.exists(ABOUT):
        return
    try:
        old = inventory.checked(folder.path(ABOUT))
    except UserError:
        return  # damaged: the same command writes it again
    if old != about:
        raise UserError(f"{folder} holds another subset.", "Choose another --out, or delete it.")


def choose(clips: Mapping[str, list[str]], n: int, per_track: int, seed: int) -> list[tuple[str, str]]:
    """(track, clip) of at most n clips, in the order of the hashes.

    Args:
        clips: track id -> its clips, in any order.
    """

    def place(name: str) -> bytes:
        return hashlib.sha256(f"{seed}:{name}".encode()).digest()

    chosen: list[tuple[str, str]] = []
    for track in sorted(clips, key=place):
        chosen += [(track, clip) for clip in sorted(clips[track], key=place)[:per_track]]
        if len(chosen) >= n:
            break
    return chosen[:n]


def _of_run(source: str, split: str) -> tuple[dict[str, dict[str, str]], dict[str, Any]]:
    """Track id -> clip key -> caption, and where they are from."""
    run = Folder.at(source)
    fingerprint = runs.read(run, "corpus")["fingerprint"]
    captions: dict[str, dict[str, str]] = {}
    for row in index.read_index(run).select(["key", "track_id", "status", "split", "caption"]).to_pylist():
        if row["status"] == OK and split in ("all", row["split"]) and row["caption"]:
            captions.setdefault(row["track_id"], {})[row["key"]] = row["caption"]
    return captions, {"source": run.uri, "run": fingerprint}


def _of_table(source: str, split: str) -> tuple[dict[str, dict[str, str]], dict[str, Any]]:
    """Track id -> `<track id>-<digest of the caption>` -> caption, and where they are from."""
    if split != "all":
        raise UserError(f"split: the table {source} has none.", "Give a corpus run, or leave the split out.")
    table = read_table(source)
    if "caption" not in table.columns or not {"track_id", "path"} & table.columns.keys():
        raise UserError(
            f"{source} has the columns {', '.join(table.header)}.", "It needs caption, and track_id or path."
        )
    tracks = table.texts("track_id") if "track_id" in table.columns else _ids(table.texts("path"))
    captions: dict[str, dict[str, str]] = {}
    for row, (track, text) in enumerate(zip(tracks, table.texts("caption"), strict=True)):
        if not track:
            raise UserError(f"{table.place(row)} has no track.", "Name it, or remove the row.")
        if caption := " ".join(text.split()):
            digest = hashlib.sha256(caption.encode()).hexdigest()[:8]
            captions.setdefault(track, {})[f"{track}-{digest}"] = caption
    return captions, {"source": absolute(source), "sha256": hashlib.sha256(read_file(source)).hexdigest()}


def _ids(paths: list[str]) -> list[str]:
    """An id per path; rows of one path have one."""
    distinct = list(dict.fromkeys(path for path in paths if path))
    ids = dict(zip(distinct, track_ids(distinct), strict=True))
    return [ids.get(path, "") for path in paths]


def _csv(prompts: list[Prompt]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("id", "prompt"))
    writer.writerows((prompt.id, prompt.text) for prompt in prompts)
    return text.getvalue().encode()
