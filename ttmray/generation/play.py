"""A page with a player for every clip of a generation run, to open from the disk: no scripts, no network."""

import html
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from ttmray.storage import Folder

STYLE = (
    ":root{color-scheme:light dark;font:16px/1.5 system-ui}body{max-width:46rem;margin:2rem auto;padding:0 1rem}"
    "article{margin:2rem 0}audio{width:100%}"
)
FACTS = {"lufs": "LUFS", "true_peak_db": "dBTP", "reward_score": "reward", "clap_score": "CLAP"}


def write_page(run: Folder, rows: Sequence[Mapping[str, Any]], described: Mapping[str, Any]) -> str:
    """Write `index.html` beside the clips, by prompt in the order of the rows; returns its path."""
    parts = []
    for _, group in groupby(rows, key=lambda row: row["prompt_id"]):
        clips = list(group)
        players = "".join(_player(row) for row in clips)
        parts.append(f"<article><h2>{html.escape(clips[0]['prompt'])}</h2>{players}</article>")
    title = html.escape(f"{len(rows)} clips of {run}")
    about = html.escape(f"Settings {described['fingerprint'][:12]}. {described['note']}")
    page = (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{title}</title><style>{STYLE}</style>"
        f"<h1>{title}</h1><p>{about}</p>{''.join(parts)}</html>"
    )
    run.write("index.html", page.encode())
    return run.path("index.html")


def _player(row: Mapping[str, Any]) -> str:
    name = html.escape(row["name"])
    if row["file"] is None:
        return f"<p>{name}: {html.escape(row['status'])}, {html.escape(row['message'])}</p>"
    facts = ", ".join(f"{unit} {row[column]:+.2f}" for column, unit in FACTS.items() if row[column] is not None)
    source = html.escape(row["file"])
    return f"<audio controls preload='none' src='{source}'></audio><small>{name}; seed {row['seed']}; {facts}</small>"
