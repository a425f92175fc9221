"""Given latents and scores as a pool of generated clips, in the real format: for tests of what reads one."""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from synthetic_corpus import PROTOCOL

from ttmray.config import fingerprint
from ttmray.corpus import index, shards
from ttmray.generation.pool import COLUMNS
from ttmray.inventory import seal
from ttmray.runs import RUN
from ttmray.storage import Folder

UNIT = "u000000"


@dataclass(frozen=True)
class Candidate:
    """A clip: latent (N, C), scores (None: not known), and a CLAP embedding (512,), by default one of its own."""

    prompt_id: str
    candidate: int
    latent: np.ndarray
    reward: float | None
    clap_score: float | None = 0.0
    clap_audio: np.ndarray | None = None
    split: str = "train"
    status: str = "ok"

    @property
    def key(self) -> str:
        return f"{self.prompt_id}_{self.candidate}"


def write_pool(folder: str, candidates: Sequence[Candidate], prompts: Mapping[str, tuple[str, np.ndarray]]) -> Folder:
    """Write a finished run of one shard.

    Args:
        prompts: id -> text and T5 features (T, D); its pooled features are random numbers by the text.
    """
    run = Folder.at(folder)
    ids = {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, (text, _) in prompts.items()}
    samples, rows = {}, []
    for clip in candidates:
        audio = _direction(clip.key) if clip.clap_audio is None else clip.clap_audio
        row = dict.fromkeys(index.SCHEMA.names) | {
            "key": clip.key,
            "status": clip.status,
            "stage": "write",
            "reason": "" if clip.status == "ok" else "silent",
            "track_id": clip.prompt_id,
            "segment": clip.candidate,
            "split": clip.split,
            "caption": prompts[clip.prompt_id][0],
            "caption_id": ids[clip.prompt_id],
            "silence": 0.0,
            "true_peak_db": -1.0,
            "reward_score": clip.reward,
            "instrumental_reward_score": clip.reward,
            "clap_score": clip.clap_score,
            "unit": UNIT,
            "protocol": PROTOCOL,
            "prompt_id": clip.prompt_id,
            "candidate": clip.candidate,
            "pool_seed": 0,
            "input_score": 2.0,
            "clipping": 0.0,
        }
        rows.append(row)
        latent = clip.latent.astype(np.float16)
        arrays: dict[str, np.ndarray] = {
            "latent_mean": latent,
            "latent_std": np.zeros_like(latent),
            "clap_audio": np.stack([audio, audio]).astype(np.float32),
            "mert": np.zeros((2, 4), np.float32),
        }
        samples[clip.key] = {f"{name}.npy": shards.npy_bytes(array) for name, array in arrays.items()}
        samples[clip.key]["json"] = json.dumps(row).encode()
    tar, members = shards.pack(samples)
    at: dict[str, dict[str, int]] = {}
    for clip in candidates:
        at |= shards.latent_places({clip.key: samples[clip.key]}, members, clip.latent.shape)
    shard, _ = shards.named_by_content(shards.SHARDS, UNIT, tar, "tar")
    owned = sorted({ids[name]: name for name in prompts}.items())
    texts: dict[str, np.ndarray] = {
        "t5": np.stack([prompts[name][1] for _, name in owned]).astype(np.float16),
        "clap": np.stack([_direction(caption) for caption, _ in owned]),
    }
    features = shards.captions_bytes([caption for caption, _ in owned], texts)
    captions, _ = shards.named_by_content(shards.CAPTIONS, UNIT, features, "safetensors")
    table = pa.Table.from_pylist(
        [row | {"shard": shard} | at[str(row["key"])] for row in rows], pa.schema([*index.SCHEMA, *COLUMNS])
    )
    table = index.with_text_places(table, [{"files": {captions: shards.text_places(io.BytesIO(features))}}])
    identity = {"shard": shard, "captions": captions, "rows": fingerprint(table.to_pylist())}
    run.write(shard, tar)
    run.write(captions, features)
    run.write(index.MERGED, index.parquet_bytes(table))
    described = {"kind": "pool", "fingerprint": fingerprint(identity), "identity": identity, "protocol_id": PROTOCOL}
    run.write(RUN, json.dumps(described | {"config": {"bundle": PROTOCOL}}).encode())
    seal(run, described, {}, {})
    return run


def _direction(text: str) -> np.ndarray:
    """(512,) float32 unit vector that depends on a text alone."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
    vector = np.random.default_rng(seed).standard_normal(512, np.float32)
    return vector / np.linalg.norm(vector)
