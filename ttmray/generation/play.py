"""A page with a player for every clip of a generation run, to open from the disk: no scripts, no network."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from ttmray import pages
from ttmray.storage import Folder

FACTS = {"lufs": "LUFS", "true_peak_db": "dBTP", "reward_score": "reward", "clap_score": "CLAP"}


PLAYERS = "index.html"
MOST = 1000
"""Clips on a page: a browser is slow with more players."""


def write_page(run: Folder, rows: Sequence[Mapping[str, Any]], described: Mapping[str, Any]) -> str:
    """Write `index.html` beside the clips, by prompt in the order of the rows, at most `MOST`; returns its path."""
    shown = rows[:MOST]
    text = pages.render(
        "play.html.j2",
        # its name alone: the page is the same wherever the folder is moved to
        title=f"{'the first ' * (len(shown) < len(rows))}{len(shown)} clips of {run.name}",
        fingerprint=described["fingerprint"],
        note=described["note"],
        prompts=[list(clips) for _, clips in groupby(shown, key=lambda row: row["prompt_id"])],
        facts=FACTS,
    )
    run.write(PLAYERS, text.encode())
    return run.path(PLAYERS)
