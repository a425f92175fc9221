"""`ttmray score FILE...`: reward, CLAP score, loudness and true peak of any audio files, as a table or JSON.

A file of half a clip to a whole one (5 to 10 s, but for small bundles) has the numbers that the corpus job gives its
one clip, which is padded with zeros. Shorter files are scored as they are. Longer ones are scored under the protocol of
the released TuneJury tables: the 10 s in the middle for CLAP, all of it for MERT.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.table import Table

from ttmray.audio.clip import CLIP_S, read_clip
from ttmray.console import console, errors
from ttmray.errors import EXIT_OK, EXIT_TOO_MANY_FAILURES, ClipError, UserError
from ttmray.models import one_thread
from ttmray.models.bundle import LoadOptions, open_bundle
from ttmray.models.cache import EmbeddingCache
from ttmray.models.scoring import Scorer

CACHE_BYTES = 8 * 2**30


def read_mono(path: str, clip_s: float = CLIP_S) -> tuple[np.ndarray, dict[str, Any]]:
    """A file as (samples,) mono float32 at 44.1 kHz, as the corpus job makes it, and its level facts.

    Args:
        clip_s: length of the bundle's clips, in seconds.

    Raises:
        ClipError: why the file cannot be scored.
    """
    reading = read_clip(path, clip_s)
    names = ("duration_s", "sample_rate", "channels", "lufs", "true_peak_db")
    return reading.mono(), {name: reading.facts[name] for name in names}


def score(
    files: Sequence[str],
    *,
    bundle: str = "debug",
    caption: str = "",
    reward_text: str = "empty",
    device: str = "auto",
    batch: int = 8,
    cache: str | None = None,
    as_json: bool = False,
) -> int:
    """Print one row per file; exit code 3 when a file could not be scored.

    Args:
        caption: for the CLAP score; empty leaves it out.
        reward_text: `empty` or `caption`: what the reward sees.
        cache: folder of the embedding cache; None computes all.

    Raises:
        UserError: an unknown bundle or `reward_text`, or weights that are not there.
    """
    chosen = open_bundle(bundle)
    if reward_text not in ("empty", "caption"):
        raise UserError(f"--reward-text must be empty or caption, not {reward_text!r}.")
    protocol = chosen.protocol("caption" if reward_text == "caption" else "empty")
    models = chosen.load(Scorer.roles, LoadOptions(device=device, batch=batch))
    one_thread()  # as in the corpus job, so that scores are the same to the bit
    scorer = Scorer(models, protocol, cache=EmbeddingCache(cache, CACHE_BYTES) if cache else None)
    text = scorer.texts([caption])
    rows: list[dict[str, Any]] = []
    for path in files:
        row: dict[str, Any] = {"file": path, "status": "ok", "reason": "", "message": ""}
        try:
            wave, facts = read_mono(path, chosen.clip_s)
            embeddings = scorer.embed([wave])
            row |= facts | {"reward": float(scorer.rewards(embeddings, text)[0])}
            row["clap_score"] = float(embeddings.clap[0] @ text[0]) if caption else None
        except ClipError as error:
            row |= {"status": error.status, "reason": error.reason, "message": error.message}
        rows.append(row)
        if as_json:
            shown = row | {"protocol": f"{chosen.name}/{protocol.id()}", "note": chosen.note}
            console.print(json.dumps(shown, ensure_ascii=False), markup=False)
    if not as_json:
        _print(rows, f"{chosen.name}/{protocol.id()}", chosen.note)
    return EXIT_OK if all(row["status"] == "ok" for row in rows) else EXIT_TOO_MANY_FAILURES


def _print(rows: list[dict[str, Any]], protocol: str, note: str) -> None:
    columns = ("reward", "clap_score", "lufs", "true_peak_db", "duration_s")
    table = Table("file", *columns, "status")
    for row in rows:
        numbers = ["" if row.get(name) is None else f"{row[name]:.3f}" for name in columns]
        status = "ok" if row["status"] == "ok" else f"{row['status']}: {row['reason']}: {row['message']}"
        table.add_row(row["file"], *numbers, status)
    console.print(table)
    console.print(f"scores by {protocol}")
    if note:
        errors.print(note, style="yellow")
