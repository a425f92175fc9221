"""The training reader against plain webdataset and Ray Data ingest, and against what training needs.

    python benchmarks/loader.py [--quick] [--output FILE.json]

All read the same synthetic corpus of real member sizes (latents 430 x 40 float16, text 77 x 1024 float16) in batches of
64 from a warm page cache, each in a process of its own, in alternation; the table gives median and extremes.

ours        `ttmray.training.data.loader` with 0, 1 and 2 threads: a full permutation of every epoch, checked to be
            finite; with the random draws of every training step (two noise arrays of the latents' size), and without.
processes   The same samples, with draws, made by 1 and 2 worker processes of a torch DataLoader.
webdataset  WebDataset (shuffled shards, a shuffle buffer of 1,000) in a torch DataLoader with 0, 1 and 2 processes.
            Text features of all captions lie in memory, which the size of a real corpus forbids. No draws.
ray         `ray.data.read_webdataset`, `iter_torch_batches` with a shuffle buffer of 1,000; text and draws as above.
            It has all CPUs of the machine.

CPU is that of the whole process tree (sampled from /proc; see benchmarks/common.py) from the end of the first epoch on;
the first batch is timed from opening the corpus, with libraries imported and Ray running. What training needs: Stage 1
at batch 64 on an A5000 makes about 1.7 updates/s; an H200 at 45 % of 990 TFLOP/s and 247 GFLOP per sample takes
1,804 samples/s. Exit code 1 if a target is missed. A full run takes about 8 minutes on 2 cores; --quick only shows that
everything runs, and judges nothing.
"""

import os

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before numpy and torch are imported

import argparse
import itertools
import json
import logging
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Line, machine, report, run_measured, spread
from synthetic_corpus import write_random_corpus

from ttmray.corpus.index import read_index
from ttmray.storage import Folder
from ttmray.training import data

BATCH = 64
A5000 = 1.7 * BATCH
H200 = 0.45 * 990e12 / 247e9
MEMBERS = ("latent_mean.npy", "latent_std.npy", "json")
SETTLE_S = 0.5  # in which the parent notices the last progress

Variant = tuple[str, int]
VARIANTS: tuple[Variant, ...] = (
    *(("ours", workers) for workers in (0, 1, 2)),
    *(("ours, no draws", workers) for workers in (0, 1, 2)),
    *(("webdataset", workers) for workers in (0, 1, 2)),
    *(("processes", workers) for workers in (1, 2)),
    ("ray", 0),
)


def ours(corpus: str, workers: int) -> Iterator[int]:
    config = data.DataConfig(sources=(data.SourceConfig(corpus=corpus),), threads=workers)
    for samples in data.loader(data.open_mixture(config), config, start=0, batch=BATCH):
        yield len(samples.keys)


def ours_without_draws(corpus: str, workers: int) -> Iterator[int]:
    data._draw = lambda seed, stream, into: None
    return ours(corpus, workers)


@dataclass
class Numbered(torch.utils.data.Dataset[data.Samples]):
    """A mixture by sample numbers, for a DataLoader."""

    mixture: data.Mixture

    def __getitems__(self, numbers: list[int]) -> data.Samples:
        return self.mixture.read(self.mixture.clips(numbers), numbers, [(1, number) for number in numbers])


def processes(corpus: str, workers: int) -> Iterator[int]:
    mixture = data.open_mixture(data.DataConfig(sources=(data.SourceConfig(corpus=corpus),)))
    numbers = (list(range(first, first + BATCH)) for first in itertools.count(0, BATCH))
    whole: dict[str, Any] = {"collate_fn": lambda samples: samples, "num_workers": workers, "prefetch_factor": 4}
    for samples in torch.utils.data.DataLoader(Numbered(mixture), batch_sampler=numbers, **whole):
        yield len(samples.keys)


def webdataset(corpus: str, workers: int) -> Iterator[int]:
    import webdataset as wds

    texts = _texts(corpus)

    def sample(members: dict[str, Any]) -> tuple[Any, ...]:
        facts = members["json"]
        text, text_c = texts[facts["caption_id"]]
        return (
            members["__key__"],
            members["latent_mean.npy"],
            members["latent_std.npy"],
            text,
            text_c,
            np.float32(facts["instrumental_reward_score"]),
        )

    shards = wds.WebDataset(_shards(corpus), shardshuffle=1000, select_files=_wanted, seed=0)
    dataset = shards.repeat().shuffle(1000).decode().map(sample)
    prefetch = 4 if workers else None
    for batch in torch.utils.data.DataLoader(dataset, BATCH, num_workers=workers, prefetch_factor=prefetch):
        yield len(batch[0])


def ray(corpus: str, workers: int) -> Iterator[int]:
    import ray.data

    texts = _texts(corpus)

    def collate(members: dict[str, Any]) -> tuple[Any, ...]:
        captions = [texts[facts["caption_id"]] for facts in members["json"]]
        return (
            torch.from_numpy(np.stack(list(members["latent_mean.npy"]))),
            torch.from_numpy(np.stack(list(members["latent_std.npy"]))),
            torch.from_numpy(np.stack([text for text, _ in captions])),
            torch.from_numpy(np.stack([text_c for _, text_c in captions])),
            torch.tensor([facts["instrumental_reward_score"] for facts in members["json"]]),
        )

    dataset = ray.data.read_webdataset(_shards(corpus), fileselect=_wanted, shuffle="files")
    while True:
        batches = dataset.iter_torch_batches(
            batch_size=BATCH, collate_fn=collate, local_shuffle_buffer_size=1000, prefetch_batches=4, drop_last=True
        )
        yield from (len(next(iter(batch))) for batch in batches)


def _wanted(name: str) -> bool:
    return name.endswith(MEMBERS)


def _shards(corpus: str) -> list[str]:
    return [f"{corpus}/{name}" for name in read_index(Folder.at(corpus))["shard"].unique().to_pylist()]


def _texts(corpus: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Text features of all captions: T5 and CLAP."""
    from safetensors.numpy import load_file

    texts: dict[str, np.ndarray] = {}
    for file in Path(corpus, "captions").iterdir():
        texts |= load_file(file)
    ids = {name.partition(".")[0] for name in texts}
    return {caption: (texts[f"{caption}.t5"], texts[f"{caption}.clap"]) for caption in ids}


READERS = {
    "ours": ours,
    "ours, no draws": ours_without_draws,
    "processes": processes,
    "webdataset": webdataset,
    "ray": ray,
}


def child(name: str, workers: int, corpus: str, clips: int, seconds: float, work: Path) -> None:
    """One variant in this process: an epoch to warm up, then as many batches as fit into some seconds."""
    torch.set_num_threads(1)
    if name == "ray":
        import ray as framework
        import ray.data

        framework.init(include_dashboard=False, logging_level=logging.ERROR)
        framework.data.DataContext.get_current().enable_progress_bars = False
    elif name == "webdataset":
        import webdataset  # noqa: F401

    started = time.perf_counter()
    reader = READERS[name](corpus, workers)
    next(reader)
    first = time.perf_counter() - started
    for _ in itertools.islice(reader, clips // BATCH - 1):
        pass
    (work / "progress").write_text("1")
    started, taken = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        taken += next(reader)
    rate = taken / (time.perf_counter() - started)
    (work / "progress").write_text(str(1 + taken))
    time.sleep(SETTLE_S)
    (work / "result.json").write_text(json.dumps({"first_batch_s": first, "samples_per_s": rate}))


def measure(variant: Variant, corpus: str, clips: int, seconds: float) -> dict[str, float]:
    """Samples/s, CPU-ms per sample and seconds to the first batch of one variant."""
    name, workers = variant
    with tempfile.TemporaryDirectory() as folder:
        progress = Path(folder, "progress")

        def read() -> int:
            return int(progress.read_text() or 0) if progress.exists() else 0

        arguments = [name, str(workers), corpus, str(clips), str(seconds), folder]
        measured = run_measured([sys.executable, __file__, "--child", *arguments], Path(__file__).parent, read)
        result: dict[str, float] = json.loads(Path(folder, "result.json").read_text())
    (before, cpu_before), (after, cpu_after) = measured.marks[-2:]
    return result | {"cpu_ms": 1000 * (cpu_after - cpu_before) / (after - before)}


def lines(runs: dict[Variant, list[dict[str, float]]]) -> list[Line]:
    def label(variant: Variant) -> str:
        name, workers = variant
        kind = "thread" if "ours" in name else "process"
        many = {"thread": "threads", "process": "processes"}
        return name if name == "ray" else f"{name}, {workers} {kind if workers == 1 else many[kind]}"

    def ratio(a: Variant, b: Variant) -> dict[str, Any]:
        pairs = zip(runs[a], runs[b], strict=True)
        return spread([x["samples_per_s"] / y["samples_per_s"] for x, y in pairs], 2)

    rows = [Line(label(v), spread([x["samples_per_s"] for x in runs[v]], 0), "samples/s") for v in VARIANTS]
    rows += [Line(f"{label(v)}: CPU", spread([x["cpu_ms"] for x in runs[v]], 2), "ms/sample") for v in VARIANTS]
    rows += [Line(f"{label(v)}: first batch", spread([x["first_batch_s"] for x in runs[v]], 2), "s") for v in VARIANTS]
    for workers in (0, 1, 2):
        bare, theirs = ("ours, no draws", workers), ("webdataset", workers)
        rows.append(Line(f"{label(bare)}, against webdataset", ratio(bare, theirs), "x", 1.5))
    rows.append(Line("ours, 2 threads, against 2 processes", ratio(("ours", 2), ("processes", 2)), "x", 1.2))
    rows.append(Line("ours with draws, 2 threads, against ray without", ratio(("ours", 2), ("ray", 0)), "x", 2.0))
    rates = [x["samples_per_s"] for x in runs["ours", 1]]
    cpu = [x["cpu_ms"] for x in runs["ours", 1]]
    rows += [
        Line("ours, 1 thread, against what an A5000 needs", spread([r / A5000 for r in rates], 1), "x", 4.0),
        Line("cores that an A5000 needs", spread([A5000 * ms / 1000 for ms in cpu], 2), "", note=f"{A5000:.0f}/s"),
        Line("cores that an H200 needs", spread([H200 * ms / 1000 for ms in cpu], 2), "", note=f"{H200:.0f}/s"),
    ]
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smallest sizes, no verdict")
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    parser.add_argument("--child", nargs=6, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        name, workers, corpus, clips, seconds, work = arguments.child
        child(name, int(workers), corpus, int(clips), float(seconds), Path(work))
        return 0
    tracks, seconds, repeats = (13, 1.0, 1) if arguments.quick else (410, 6.0, 3)
    facts = machine()
    runs: dict[Variant, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    with tempfile.TemporaryDirectory(prefix="ttmray-benchmark-") as work:
        corpus = write_random_corpus(f"{work}/corpus", tracks=tracks).uri
        for _, variant in itertools.product(range(repeats), VARIANTS):
            runs[variant].append(measure(variant, corpus, 10 * tracks, seconds))
    facts["load_at_end"] = round(os.getloadavg()[0], 2)
    name = "loader (quick: not judged)" if arguments.quick else "loader"
    return report(name, lines(runs), facts, arguments.output, judged=not arguments.quick)


if __name__ == "__main__":
    sys.exit(main())
