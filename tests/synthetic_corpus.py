"""A corpus of random latents without songs or models, in the real format: for tests and benchmarks of what reads one.

It is written by the corpus job's own last stage and its own finalise, so it can never drift from the format.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from ttmray.config import fingerprint
from ttmray.corpus import index
from ttmray.corpus.config import CorpusConfig, SegmentConfig
from ttmray.corpus.finalise import finalise
from ttmray.corpus.plan import SCHEMA, Plan, pack_units
from ttmray.corpus.stages import Write
from ttmray.corpus.unit import Unit
from ttmray.models.protocol import Protocol
from ttmray.runs import RUN
from ttmray.storage import Folder

PROTOCOL = "synthetic"


def write_random_corpus(
    folder: str,
    *,
    tracks: int,
    clips_per_track: int = 10,
    captions: int | None = None,
    validation: int = 0,
    test: int = 0,
    latent: tuple[int, int] = (430, 40),
    text: tuple[int, int] = (77, 1024),
    unit_clips: int = 32,
    seed: int = 0,
    committed: int | None = None,
) -> Folder:
    """Write a run folder whose numbers are seeded noise.

    Args:
        captions: distinct captions (default: one per track), given to the tracks in turn; 0: none has one.
        validation, test: tracks of these splits, the last ones; the others are for training.
        latent: frames x channels of a clip.
        text: tokens x width of the T5 features.
        committed: write only so many units and leave the run unfinished.
    """
    run = Folder.at(folder)
    segments = SegmentConfig(max_clips=clips_per_track)
    config = CorpusConfig(input="none", output=run.uri, bundle=PROTOCOL, unit_clips=unit_clips, segments=segments)
    plan = _plan(tracks, clips_per_track, tracks if captions is None else captions, validation, test, unit_clips)
    what: dict[str, Any] = {"seed": seed, "plan": plan.identity(), "latent": list(latent), "text": list(text)}
    what["protocol"] = asdict(Protocol())
    described = {"kind": "corpus", "fingerprint": fingerprint(what), "identity": what, "protocol_id": PROTOCOL}
    described |= {"config": config.model_dump(mode="json"), "note": "random numbers: they mean nothing"}
    run.write(RUN, json.dumps(described).encode())
    plan.save(run)
    write = Write(run)
    for number, (name, rows) in enumerate(plan.units()):
        if committed is not None and number >= committed:
            return run
        write(_unit(name, rows, latent, text, np.random.default_rng((seed, number))))
    finalise(run, plan, described, 0.0)
    return run


def _plan(tracks: int, clips: int, captions: int, validation: int, test: int, unit_clips: int) -> Plan:
    of_track = [f"a caption of number {i % captions}" if captions else "" for i in range(tracks)]
    train = tracks - validation - test
    columns: dict[str, Sequence[Any]] = {
        "unit": pack_units([clips] * tracks, [0.0] * tracks, unit_clips),
        "track_id": [f"t{i:06d}" for i in range(tracks)],
        "path": [f"t{i:06d}.flac" for i in range(tracks)],
        "size": [1] * tracks,
        "duration_s": [10.0 * clips] * tracks,
        "clips": [clips] * tracks,
        "split": ["train"] * train + ["validation"] * validation + ["test"] * test,
        "caption": of_track,
        "caption_id": [hashlib.sha256(caption.encode()).hexdigest()[:16] for caption in of_track],
        "caption_owner": [i < max(captions, 1) for i in range(tracks)],
        "status": ["ok"] * tracks,
    }
    empty = [""] * tracks
    return Plan(pa.table({name: columns.get(name, empty) for name in SCHEMA.names}).cast(SCHEMA), "synthetic")


def _unit(
    name: str, tracks: list[dict[str, Any]], latent: tuple[int, int], text: tuple[int, int], rng: np.random.Generator
) -> Unit:
    rows = []
    for track in tracks:
        for segment in range(track["clips"]):
            scores = dict(zip(("reward_score", "instrumental_reward_score"), rng.normal(size=2).tolist(), strict=True))
            facts = {"key": f"{track['track_id']}_{segment}", "segment": segment, "start_s": 10.0 * segment}
            rows.append(index.new_row(track, name, PROTOCOL) | facts | {"duration_s": 10.0} | scores)
    owned = [track["caption_id"] for track in tracks if track["caption_owner"]]

    def noise(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    clips = {
        "latent_mean": noise(len(rows), *latent).astype(np.float16),
        "latent_std": np.exp(noise(len(rows), *latent) - 2).astype(np.float16),
        "clap_audio": noise(len(rows), 2, 512),
        "mert": noise(len(rows), 2, 1024),
    }
    texts = {
        "t5": noise(len(owned), *text).astype(np.float16),
        "clap": noise(len(owned), 512),
        "clap_score": noise(len(owned), 512),
    }
    return Unit(name, tracks, rows, clips, owned, texts)
