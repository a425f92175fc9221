"""`ttmray.compose`: songs of the built-in composer, to try everything else on."""

import os
from typing import Any

from ttmray.api.inputs import number_of, path_of
from ttmray.config import fingerprint
from ttmray.console import meter
from ttmray.errors import UserError
from ttmray.storage import Folder, read_parquet
from ttmray.synth import world

MOST = 1_000_000
"""Songs of one call."""
LONGEST_S = 600.0
"""A song is composed in memory."""


def compose(folder: str | os.PathLike[str], songs: int = 12, *, seconds: float = 20.0, seed: int = 0) -> str:
    """Write songs with captions that the built-in composer makes up, good and faulty; nothing where they are there.

    `world.parquet` beside them has all that is true of each: style, tempo, faults, quality (docs/small-world.md).

    Args:
        folder: where to write, local or s3://.
        songs: how many. A smaller number of the same seed gives the first of them.
        seconds: of each.
        seed: another one gives other songs.

    Returns:
        The folder of the audio and its captions, which `score_corpus` takes.

    Raises:
        UserError: there are other songs in the folder, it cannot be written, or numbers that cannot be: a song has at
            most 600 s.

    >>> import ttmray
    >>> ttmray.compose("runs/songs", 2, seconds=2.0).endswith("runs/songs/songs")
    True
    """
    number_of(songs, "songs", 1, MOST, whole=True)
    number_of(seconds, "seconds", 0.1, LONGEST_S)
    number_of(seed, "seed", 0, 2**63 - 1, whole=True)
    out = Folder.at(path_of(folder, "folder"))
    asked = fingerprint([[seed, i, float(seconds)] for i in range(songs)])
    if out.exists(world.TABLE):
        there = read_parquet(out.path(world.TABLE), ("seed", "index", "seconds")).to_pylist()
        if fingerprint([[row["seed"], row["index"], float(row["seconds"])] for row in there]) == asked:
            return out.path("songs")
        raise UserError(f"{out} holds {len(there)} other songs.", "Choose another folder, or the old numbers.")
    with meter("composing songs", songs) as progress:

        def takes() -> Any:
            for i in range(songs):
                yield world.song(seed, i, seconds=seconds)
                progress.advance(1)

        world.write_world(out.uri, takes(), format="flac")
    return out.path("songs")
