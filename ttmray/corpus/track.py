"""What a catalogue lists and a unit carries: a song file."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Track:
    """One song file.

    Attributes:
        track_id: letters, digits, `_` and `-`, at most 64; unique in the catalogue without regard to case.
        path: relative to the audio root, with forward slashes.
        size: bytes, -1 where unknown.
        duration_s: seconds as a table says, NaN where unknown.
        version: changes with the content of the file (see `storage.ListedFile`); "" where unknown.
        status: `ok`, or `rejected` with the reason `excluded`, `duplicate`, `missing`, `bad_name` or
            `unreadable_folder` (whose row stands for the folder).
        message: the details of a rejection.
    """

    track_id: str
    path: str
    size: int = -1
    duration_s: float = math.nan
    caption: str = ""
    artist_id: str = ""
    album_id: str = ""
    status: str = "ok"
    reason: str = ""
    message: str = ""
    version: str = ""
