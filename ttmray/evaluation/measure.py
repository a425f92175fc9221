"""The numbers of every clip: decoded once, embedded once, in this process or on Ray actors.

What is done is kept in `parts/` of the output folder, one Parquet file per few clips, by the SHA-256 of the file, the
prompt, and everything that decides a number. So the same command goes on where it was killed, and clips that were added
or changed are the only ones that are measured again.
"""

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from ttmray.audio import io as audio_io
from ttmray.audio.clip import CLIP_S, read_clip
from ttmray.cluster import each
from ttmray.config import fingerprint, identity
from ttmray.console import meter
from ttmray.corpus.config import SeparationConfig
from ttmray.errors import ClipError
from ttmray.evaluation.clip_metrics import VOCALS, ClipFunction, clip_functions, numbers_of, versions
from ttmray.json_text import as_read
from ttmray.models import one_thread
from ttmray.models.bundle import open_bundle
from ttmray.models.cache import EmbeddingCache
from ttmray.models.devices import on_gpu
from ttmray.models.loading import LoadOptions
from ttmray.models.protocol import SEPARATION, Protocol
from ttmray.models.scoring import Scorer
from ttmray.parts import digests, read_parts, write_part
from ttmray.quarantine import together
from ttmray.ranker.features import EncodingConfig
from ttmray.storage import Folder

PARTS = "parts"
OK, FAILED = "ok", "failed"
CPU_PART = 8
"""Clips that a kill costs at most, per process."""
GPU_BATCHES = 4
"""Batches per part on a GPU: the next ones are read while one is in the models."""
FACTS = pa.schema(
    [
        ("sha256", pa.string()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("message", pa.string()),
        ("duration_s", pa.float64()),
        ("sample_rate", pa.int32()),
        ("channels", pa.int32()),
        ("clap_score", pa.float64()),
        ("reward", pa.float64()),
        ("lufs", pa.float64()),
        ("true_peak_db", pa.float64()),
        ("silence", pa.float64()),
    ]
)
_PART = FACTS.append(pa.field("prompt", pa.string())).append(pa.field("clap", pa.list_(pa.float32())))
_NUMBERS = pa.field("numbers", pa.map_(pa.string(), pa.float64()))
"""Of parts whose clips have further numbers, see `clip_metrics.numbers_of`."""

Source = tuple[str, str]
"""Address of an audio file, and the prompt that it answers; "" where there is none."""
_Work = tuple[dict[str, Any], np.ndarray]
"""Facts of a clip so far, and (channels, samples) float32 at 44.1 kHz."""


class MeasureConfig(EncodingConfig):
    """Where and how fast; on CPUs none of it changes a number, a GPU and its batch change last bits."""

    threads: int | Literal["auto"] = Field("auto")
    """Files read side by side (decoding, levels) while others are in the models, and on a CPU clips embedded side by
    side; `auto` is one per CPU, for Ray actors as many as `cpus`."""

    @property
    def thread_count(self) -> int:
        if self.threads == "auto":
            return self.process_cpus
        return max(1, self.threads)

    @property
    def on_gpu(self) -> bool:
        return on_gpu(self.device, self.runner, self.gpus)


def embedding_protocol(bundle: str, protocol: Protocol) -> str:
    """What made an embedding, as sets of them are compared by: the reward's head and text input are no part of it."""
    hashes = tuple(item for item in protocol.hashes if not item[0].startswith("tunejury"))
    return f"{bundle}/{replace(protocol, text='empty', hashes=hashes).id()}"


def separation_identity(bundle: str, separation: SeparationConfig) -> dict[str, Any]:
    """What decides an instrumental.

    Raises:
        UserError: the separator's weights are not there.
    """
    models = fingerprint(open_bundle(bundle).identity(("separator",)))
    return {"version": SEPARATION, "separator": models, **identity(separation)}


def measure(
    sources: Sequence[Source],
    bundle: str,
    reward_text: Literal["empty", "caption"],
    output: Folder,
    config: MeasureConfig,
    what: str = "clips",
    middle: bool = False,
    separation: SeparationConfig | None = None,
    clip_metrics: Sequence[str] = (),
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Facts of every source in order: the columns of `FACTS`; `clap`, a (512,) float32 unit vector or None; and with
    `clip_metrics` `numbers`, see `clip_metrics.numbers_of`.

    Clips of half the length of the bundle's (10 s), or more, are padded to that, as in the corpus job. A file that
    cannot be measured has the status `failed` or `rejected`, a reason and a message; `silent` ones are among them,
    because their reward would mean nothing.

    Args:
        output: its `parts/` keep what is done.
        what: of the progress bar.
        middle: of longer files measure only the clip in the middle. CLAP sees no more in any case, but the reward and
            the levels do.
        separation: embed what the bundle's separator leaves without vocals, clip by clip as the corpus job does; levels
            stay those of the file. None: the file as it is.
        clip_metrics: names of what else is measured of the file's audio.

    Returns:
        The rows, and seconds over all processes: `embed` (forward passes and the resampling to their rates), `read`
        (files, in threads beside it: both can add up to more than the whole), `busy` (wall time at work; loading
        models is not in it), and the count `clips` that were measured now.

    Raises:
        UserError: models or device are not there, a damaged part, or a clip metric that does not work.
    """
    made_by = _made_by(bundle, reward_text, config, middle, separation, clip_metrics)
    known = _known(output, made_by)
    files, _ = digests(list({path for path, _ in sources})) if known else ({}, {})
    rows: dict[Source, dict[str, Any]] = {}
    for path, prompt in sources:
        row = known.get((files.get(path, ""), prompt))
        if row is not None:
            rows[path, prompt] = row
    todo = [source for source in dict.fromkeys(sources) if source not in rows]
    size = GPU_BATCHES * config.batch if config.on_gpu else CPU_PART
    if config.runner == "ray":
        size = max(1, min(size, math.ceil(len(todo) / config.workers)))
    parts = [todo[start : start + size] for start in range(0, len(todo), size)]
    spent: Counter[str] = Counter()
    if todo:
        output.sweep_temporary()
        make = partial(
            _Measurer,
            bundle,
            reward_text,
            config.model_dump_json(),
            output.uri,
            made_by,
            middle,
            separation,
            clip_metrics,
        )
        failed = 0
        with meter(what, len(todo)) as progress:
            for sources_done, measured, seconds in each(make, parts, config):
                rows |= dict(zip(sources_done, measured, strict=True))
                spent.update(seconds)
                failed += sum(row["status"] != OK for row in measured)
                progress.advance(len(measured), f"{failed} failed" if failed else "")
    return [rows[source] for source in sources], spent


class _Measurer:
    """The models of one process; a call measures a few clips and writes their part."""

    def __init__(
        self,
        bundle: str,
        reward_text: Literal["empty", "caption"],
        config: str,
        output: str,
        made_by: str,
        middle: bool,
        separation: SeparationConfig | None,
        clip_metrics: Sequence[str],
    ) -> None:
        how = MeasureConfig.model_validate_json(config)
        chosen = open_bundle(bundle)
        options = LoadOptions(device=how.device, batch=how.batch, threads=how.thread_count)
        if separation is not None:
            how_separated = {name: getattr(separation, name) for name in ("instrumental", "overlap", "precision")}
            options = replace(options, **how_separated)
        self.separation, self.vocals = separation is not None, VOCALS in clip_metrics
        separator = {"separator"} if self.separation or self.vocals else set()
        models = chosen.load({*Scorer.roles, *separator}, options)
        self.separator = models.separator if separator else None
        one_thread()  # more would change last bits
        cache = (
            EmbeddingCache(how.embedding_cache, int(how.embedding_cache_gib * 2**30)) if how.embedding_cache else None
        )
        self.scorer = Scorer(models, chosen.protocol(reward_text), how.thread_count, cache)
        self.output, self.made_by = Folder(output), made_by
        functions = clip_functions(clip_metrics) if clip_metrics else None
        self.read = partial(_read, clip_s=chosen.clip_s, middle=middle, functions=functions)
        self.threads = how.thread_count
        self.batch = how.batch if models.clap.device.type != "cpu" else max(1, min(CPU_PART, how.thread_count))

    def __call__(self, sources: Sequence[Source]) -> tuple[Sequence[Source], list[dict[str, Any]], dict[str, float]]:
        started, embedding = time.perf_counter(), 0.0
        rows: list[dict[str, Any]] = []
        with ThreadPoolExecutor(self.threads) as pool:
            ahead: list[Future[tuple[dict[str, Any], np.ndarray | None]]] = [
                pool.submit(self.read, path) for path, _ in sources
            ]
            for start in range(0, len(sources), self.batch):
                batch = [future.result() for future in ahead[start : start + self.batch]]
                for (row, _), (_, prompt) in zip(batch, sources[start:], strict=False):
                    row["prompt"] = prompt
                begun = time.perf_counter()
                self._embed([(row, wave) for row, wave in batch if wave is not None])
                embedding += time.perf_counter() - begun
                rows += [row for row, _ in batch]
        reading = sum(row.pop("read_s") for row in rows)
        _write_part(self.output, self.made_by, rows)
        seconds = {"embed": embedding, "read": reading, "busy": time.perf_counter() - started, "clips": len(rows)}
        return sources, rows, seconds

    def _embed(self, works: Sequence[_Work]) -> None:
        """Note embedding and scores of clips, or why there are none."""
        for some, outcome in together(works, self._numbers, "Lower runtime.batch."):
            if isinstance(outcome, ClipError):
                _quarantine(some[0][0], outcome)
            else:
                for (row, _), numbers in zip(some, outcome, strict=True):
                    row.update(numbers)

    def _numbers(self, works: Sequence[_Work]) -> list[dict[str, Any]]:
        waves = [wave for _, wave in works]
        if self.separator is not None:
            results = self.separator.separate(waves)
            if self.separation:
                waves = [result.instrumental for result in results]
            if self.vocals:
                for (row, _), result in zip(works, results, strict=True):
                    row["numbers"][f"{VOCALS}/vocal_ratio"] = result.vocal_ratio
        embeddings = self.scorer.embed([wave.mean(axis=0) for wave in waves])
        texts = self.scorer.texts([row["prompt"] for row, _ in works])
        rewards = self.scorer.rewards(embeddings, texts)
        return [
            {
                "clap": embeddings.clap[i],
                "reward": float(rewards[i]),
                "clap_score": float(embeddings.clap[i] @ texts[i]) if row["prompt"] else None,
            }
            for i, (row, _) in enumerate(works)
        ]


def _read(
    path: str, clip_s: float, middle: bool, functions: Mapping[str, ClipFunction] | None
) -> tuple[dict[str, Any], np.ndarray | None]:
    started = time.perf_counter()
    row, wave = _decoded(path, clip_s, middle)
    if functions is not None:
        row["numbers"] = numbers_of(wave, functions, path) if wave is not None else {}
    return row | {"read_s": time.perf_counter() - started}, wave


def _decoded(path: str, clip_s: float, middle: bool) -> tuple[dict[str, Any], np.ndarray | None]:
    """Facts of a file, and (channels, samples) float32 at 44.1 kHz; None where the facts say why not."""
    row: dict[str, Any] = dict.fromkeys(_PART.names) | {"status": OK, "reason": "", "message": ""}
    reading = read_clip(path, clip_s, middle=middle)
    row |= reading.facts
    if reading.error is not None:
        _quarantine(row, reading.error)
    return row, reading.wave


def _quarantine(row: dict[str, Any], error: ClipError) -> None:
    row.update(status=error.status, reason=error.reason, message=error.message)


def _made_by(
    bundle: str,
    reward_text: Literal["empty", "caption"],
    config: MeasureConfig,
    middle: bool,
    separation: SeparationConfig | None,
    clip_metrics: Sequence[str],
) -> str:
    chosen = open_bundle(bundle)
    how = asdict(chosen.protocol(reward_text))
    how |= {"bundle": chosen.name, "gpu": config.on_gpu, "middle": middle, "reading": audio_io.READING}
    how |= {"clip_s": chosen.clip_s} if chosen.clip_s != CLIP_S else {}
    how |= {"separation": separation_identity(bundle, separation)} if separation else {}
    how |= {"clip_metrics": versions(clip_metrics)} if clip_metrics else {}
    how |= {"vocals": fingerprint(chosen.identity(("separator",)))} if VOCALS in clip_metrics else {}
    return fingerprint(as_read(how))


def _write_part(output: Folder, made_by: str, rows: Sequence[dict[str, Any]]) -> None:
    readable = [row for row in rows if row["sha256"]]  # what could not be read is tried again
    if readable:
        members = [[[row["sha256"], row["prompt"]] for row in readable]]
        schema = _PART
        if "numbers" in readable[0]:
            schema = _PART.append(_NUMBERS)
            readable = [row | {"numbers": list(row["numbers"].items())} for row in readable]
        write_part(output, f"{PARTS}/", pa.Table.from_pylist(readable, schema), made_by, members)


def _known(output: Folder, made_by: str) -> dict[tuple[str, str], dict[str, Any]]:
    """(SHA-256, prompt) -> row, of every part that was made in the same way."""

    def parse(table: pa.Table) -> list[dict[str, Any]]:
        plain = table.select([name for name in table.column_names if name not in ("clap", "numbers")])
        rows = plain.cast(pa.schema([f for f in _PART if f.name != "clap"])).to_pylist()
        for row, clap in zip(rows, table["clap"], strict=True):
            row["clap"] = clap.values.to_numpy() if clap.is_valid else None
        if "numbers" in table.column_names:
            for row, numbers in zip(rows, table["numbers"].to_pylist(), strict=True):
                row["numbers"] = dict(numbers or ())
        return rows

    parts = read_parts(output, PARTS, made_by, parse)
    return {(row["sha256"], row["prompt"]): row for rows in parts for row in rows}
