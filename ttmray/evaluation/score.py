"""`ttmray score FILE...`: reward, CLAP score, loudness and true peak of any audio files, as a table or JSON.

A file of half a clip to a whole one (5 to 10 s, but for small bundles) has the numbers that the corpus job gives its
one clip, which is padded with zeros. Shorter files are scored as they are. Longer ones are scored under the protocol of
the released TuneJury tables: the 10 s in the middle for CLAP, all of it for MERT.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from ttmray.audio.clip import CLIP_S, Reading, read_clip
from ttmray.console import console, errors
from ttmray.errors import EXIT_OK, EXIT_TOO_MANY_FAILURES, ClipError, UserError
from ttmray.models import one_thread
from ttmray.models.bundle import DEFAULT, Bundle, LoadOptions, open_bundle
from ttmray.models.cache import EmbeddingCache
from ttmray.models.scoring import Scorer

CACHE_BYTES = 8 * 2**30
ScoreRow = dict[str, Any]
FACTS = ("duration_s", "sample_rate", "channels", "lufs", "true_peak_db")


def read_mono(path: str, clip_s: float = CLIP_S) -> tuple[np.ndarray, dict[str, Any]]:
    """A file as (samples,) mono float32 at 44.1 kHz, as the corpus job makes it, and its level facts.

    Args:
        clip_s: length of the bundle's clips, in seconds.

    Raises:
        ClipError: why the file cannot be scored.
    """
    return _mono(read_clip(path, clip_s))


def _mono(reading: Reading) -> tuple[np.ndarray, dict[str, Any]]:
    return reading.mono(), {name: reading.facts[name] for name in FACTS}


def open_scorer(bundle: Bundle, reward_text: str, options: LoadOptions, cache: str | None = None) -> Scorer:
    """What scores files and samples: for `ttmray score` and for the Python API.

    Args:
        reward_text: `empty` or `caption`: what the reward sees.
        cache: folder of the embedding cache; None computes all.

    Raises:
        UserError: an unknown `reward_text`, or weights that are not there.
    """
    if reward_text not in ("empty", "caption"):
        raise UserError(f"reward_text must be empty or caption, not {reward_text!r}.")
    protocol = bundle.protocol("caption" if reward_text == "caption" else "empty")
    models = bundle.load(Scorer.roles, options)
    return Scorer(models, protocol, cache=EmbeddingCache(cache, CACHE_BYTES) if cache else None)


def score_sounds(scorer: Scorer, sounds: Iterable[tuple[str, Reading]], captions: Iterable[str]) -> Iterator[ScoreRow]:
    """The numbers of every sound, one by one, in one torch thread.

    Args:
        sounds: name and what was read, in their order.
        captions: of each, for its CLAP score; empty leaves that out.

    Yields:
        `file`, `status`, `reason`, `message`; where the status is ok also `FACTS`, `reward` and `clap_score`.
    """
    one_thread()  # as in the corpus job, so that scores are the same to the bit
    for (name, reading), caption in zip(sounds, captions, strict=True):
        row: ScoreRow = {"file": name, "status": "ok", "reason": "", "message": ""}
        try:
            wave, facts = _mono(reading)
            embeddings, text = scorer.embed([wave]), scorer.texts([caption])
            row |= facts | {"reward": float(scorer.rewards(embeddings, text)[0])}
            row["clap_score"] = float(embeddings.clap[0] @ text[0]) if caption else None
        except ClipError as error:
            row |= {"status": error.status, "reason": error.reason, "message": error.message}
        yield row


def score(
    files: Sequence[str],
    *,
    bundle: str = DEFAULT,
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
    scorer = open_scorer(chosen, reward_text, LoadOptions(device=device, batch=batch), cache)
    protocol = f"{chosen.name}/{scorer.protocol.id()}"
    sounds = ((path, read_clip(path, chosen.clip_s)) for path in files)
    rows: list[ScoreRow] = []
    for row in score_sounds(scorer, sounds, itertools.repeat(caption, len(files))):
        rows.append(row)
        if as_json:
            shown = row | {"protocol": protocol, "note": chosen.note}
            console.print(json.dumps(shown, ensure_ascii=False), markup=False)
    if not as_json:
        _print(rows, protocol, chosen.note)
    return EXIT_OK if all(row["status"] == "ok" for row in rows) else EXIT_TOO_MANY_FAILURES


def _print(rows: list[ScoreRow], protocol: str, note: str) -> None:
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
