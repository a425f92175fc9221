"""Songs of the small world as a step of a chain: a corpus's input whose true quality is known, and prompts."""

import csv
import io
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

from pydantic import Field

from ttmray.config import Config, execution
from ttmray.console import meter
from ttmray.errors import EXIT_OK
from ttmray.json_text import read_json
from ttmray.signals import deaf_children
from ttmray.storage import Folder
from ttmray.synth.world import clip, encoded, write_tables

PROMPTS = "prompts.csv"
SHARD = 32
"""Pieces that a kill costs at most, per process."""


class WorldConfig(Config):
    """Clips of pieces of the small world, one of each, as songs (`ttmray.synth.world`)."""

    pieces: int = Field(3000, ge=2)
    """Songs."""
    seconds: float = Field(5.0, gt=0, le=30)
    """Length of each: that of the bundle's clips."""
    seed: int = Field(1000, ge=0)
    """Of the pieces. Those of the shipped bundle are 0 to 2 and 4242."""
    prompts: int = Field(48, ge=0)
    """Captions of further pieces, which nothing is trained on: the prompts of the evaluation."""
    prompt_seed: int = Field(900, ge=0)
    """Of their pieces: the same prompts for every `seed`, so that results can be paired over both."""
    instrumental: bool = False
    """Only prompts without a voice."""
    workers: int | None = execution(None, ge=1)
    """Processes; null: one per CPU."""


def compose_world(config: WorldConfig, folder: str) -> int:
    """Write `songs/` with captions, `prompts.csv` and last `world.parquet`; killed, it goes on where it was.

    Raises:
        UserError: the folder cannot be written.
    """
    out = Folder.at(folder)
    shards = range(-(-config.pieces // SHARD))
    todo = [shard for shard in shards if not out.exists(_rows_of(shard))]
    with meter("composing songs", len(todo) * SHARD) as progress:
        workers = min(config.workers or os.cpu_count() or 1, len(todo))
        if workers <= 1:
            for shard in todo:
                _write_shard(config, folder, shard)
                progress.advance(SHARD)
        else:
            with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
                with deaf_children():
                    writing = [pool.submit(_write_shard, config, folder, shard) for shard in todo]
                for done in as_completed(writing):
                    done.result()
                    progress.advance(SHARD)
    _write_prompts(config, out)
    write_tables(out, [row for shard in shards for row in read_json(out.read(_rows_of(shard)))])
    return EXIT_OK


def _rows_of(shard: int) -> str:
    return f"rows/{shard:05d}.json"


def _write_shard(config: WorldConfig, folder: str, shard: int) -> None:
    """The songs of a shard; their rows come last, and say that it is there."""
    out, rows = Folder.at(folder), []
    for index in range(shard * SHARD, min((shard + 1) * SHARD, config.pieces)):
        item = clip(config.seed, index, config.seconds)
        path = f"songs/{item.key}.flac"
        out.write(path, encoded(item.mix, "flac"))
        rows.append({"path": path, **item.row()})
    out.write(_rows_of(shard), json.dumps(rows).encode())


def _write_prompts(config: WorldConfig, out: Folder) -> None:
    prompts: list[dict[str, Any]] = []
    index = 0
    while len(prompts) < config.prompts:
        item = clip(config.prompt_seed, index, config.seconds)
        if not (config.instrumental and item.heard.voice):
            prompts.append({"id": f"p{index:03d}", "prompt": item.caption})
        index += 1
    text = io.StringIO()
    writer = csv.DictWriter(text, ["id", "prompt"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(prompts)
    out.write(PROMPTS, text.getvalue().encode())
