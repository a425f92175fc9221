"""What held-out prompts become by some weights: clips from the same noise, measured, a row each.

Beside the rewards stands what no reward was trained to say: the quality that `ttmray.synth.measures` hears, which in
the small world is close to the true one. Everything a row says is of one clip; sets are for whoever compares.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ttmray.config import Config
from ttmray.errors import EXIT_OK
from ttmray.evaluation.measure import OK, MeasureConfig, measure
from ttmray.evaluation.systems import SystemClip, find_systems
from ttmray.generation.config import GenerateConfig
from ttmray.generation.generate import generate
from ttmray.generation.prompts import read_prompts
from ttmray.models.bundle import BundleName
from ttmray.storage import Folder, parquet_table
from ttmray.synth.faults import KINDS

HEARD = "heard.parquet"
QUALITY_BY = "small_world"
"""Clip metric of the evaluation that estimates quality and faults."""


class OtherRewardConfig(Config):
    """A reward that nothing is trained on, to see what becomes of it."""

    bundle: BundleName
    """Whose reward; `micro+HEAD` for another head."""
    reward_text: Literal["empty", "caption"] = "empty"
    """What it sees as text: nothing, so that it judges the audio alone, or the prompt."""


class Hearing(NamedTuple):
    """How clips are measured.

    Attributes:
        bundle, reward_text: of the reward.
        others: name -> another reward.
        measure: where and how fast.
    """

    bundle: str
    reward_text: Literal["empty", "caption"]
    others: Mapping[str, OtherRewardConfig]
    measure: MeasureConfig


def hear(clips: Mapping[float, GenerateConfig], out: Folder, hearing: Hearing) -> int:
    """Make, or go on making, clips and their rows, `heard.parquet` of `out`; returns an exit code.

    Args:
        clips: share of a training -> how its clips are made.

    Raises:
        UserError: models or weights that are not there or do not fit.
    """
    rows: list[dict[str, Any]] = []
    for share, config in clips.items():
        code = generate(config)
        if code != EXIT_OK:
            return code
        assert config.prompts is not None
        (system,) = find_systems([config.output], read_prompts(config.prompts))
        rows += [{"share": share, **row} for row in measured(system.clips, out, hearing)]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema(hearing.others)), sink, compression="zstd")
    out.write(HEARD, sink.getvalue())
    return EXIT_OK


def schema(others: Mapping[str, Any]) -> pa.Schema:
    """Columns of `heard.parquet`."""
    numbers = ("reward_score", "clap_score", "quality", *others, *(f"fault_{kind}" for kind in KINDS))
    return pa.schema(
        [
            ("share", pa.float64()),
            ("prompt_id", pa.string()),
            ("sample", pa.int32()),
            ("prompt", pa.string()),
            ("status", pa.string()),
            ("reason", pa.string()),
            *((name, pa.float64()) for name in numbers),
            ("clap", pa.list_(pa.float32())),
        ]
    )


def measured(clips: Sequence[SystemClip], out: Folder, hearing: Hearing) -> list[dict[str, Any]]:
    """A row per clip in order; one that is missing, silent or damaged has its reason and no numbers."""
    there = [clip for clip in clips if clip.path is not None]
    sources = [(str(clip.path), clip.prompt) for clip in there]
    own = (hearing.bundle, hearing.reward_text, out, hearing.measure)
    facts, _ = measure(sources, *own, clip_metrics=(QUALITY_BY,))
    rewards = {}
    for name, other in hearing.others.items():
        some, _ = measure(sources, other.bundle, other.reward_text, out, hearing.measure, what=name)
        rewards[name] = [row["reward"] for row in some]
    of_clip = {}
    for i, (clip, fact) in enumerate(zip(there, facts, strict=True)):
        row = {name: fact[name] for name in ("status", "reason", "clap_score", "clap")}
        row |= {"reward_score": fact["reward"], **{name: values[i] for name, values in rewards.items()}}
        if fact["status"] == OK:
            heard = {name.partition("/")[2]: value for name, value in fact["numbers"].items()}
            row |= {"quality": heard.pop("estimated_quality"), **heard}
        of_clip[clip.prompt_id, clip.sample] = row
    return [
        {"prompt_id": clip.prompt_id, "sample": clip.sample, "prompt": clip.prompt}
        | of_clip.get((clip.prompt_id, clip.sample), {"status": "missing", "reason": clip.reason})
        for clip in clips
    ]


class HeardClips(NamedTuple):
    """Clips of a table of rows that are ok: rows, and their CLAP vectors (n, 512)."""

    rows: list[dict[str, Any]]
    clap: np.ndarray


def read_heard(folder: Folder) -> HeardClips:
    """What `hear` has written, clips that failed among the rows; vectors (n, 512) of the others in order."""
    table = parquet_table(folder.read(HEARD))
    claps = [row for row in table["clap"].to_pylist() if row is not None]
    return HeardClips(table.drop_columns(["clap"]).to_pylist(), np.array(claps, np.float32))
