"""Rescoring a corpus by another head: clips per second, memory of the driver, and the bound of the head alone.

    python benchmarks/rescore.py [--clips 100000] [--workers 0] [--folder DIR] [--output FILE.json]

The corpus has small latents and embeddings of real size (CLAP 512, MERT 1024, mix and instrumental), in units of 30
clips; the head has the released widths (A4: audio alone). The bound is the same head on the same number of vectors that
lie in memory already, one by one as on a CPU everywhere: what the job adds is reading, hashing, parsing
and writing. CPU seconds are those of this process and its children that have ended. `--workers 0` runs in this process.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import machine
from safetensors.torch import save_file
from synthetic_corpus import write_random_corpus

from ttmray.cluster import ActorsConfig, leave
from ttmray.corpus.rescore import RescoreConfig, rescore
from ttmray.models import one_thread, seeded
from ttmray.models.tunejury import RELEASED_WIDTHS, TuneJury, TuneJuryHead

CLIPS_PER_TRACK = 10
SAMPLE = 2000
"""Vectors that the bound is measured on."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=0, help="Ray actors; 0: this process")
    parser.add_argument("--folder", help="keep the corpus here, and take the one that is there")
    parser.add_argument("--output")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(arguments.folder or scratch)
        facts = measure(folder, arguments.clips, arguments.workers)
    print(json.dumps(facts, indent=1))
    if arguments.output:
        Path(arguments.output).write_text(json.dumps({"machine": machine(), **facts}, indent=1) + "\n")
    return 0


def measure(folder: Path, clips: int, workers: int) -> dict[str, float]:
    corpus, head = folder / f"corpus-{clips}", folder / "head"
    started = time.perf_counter()
    if not (corpus / "_SUCCESS.json").exists():
        tracks = clips // CLIPS_PER_TRACK
        write_random_corpus(
            str(corpus), tracks=tracks, clips_per_track=CLIPS_PER_TRACK, captions=10, latent=(4, 2), text=(2, 8)
        )
    written_s = time.perf_counter() - started
    head.mkdir(parents=True, exist_ok=True)
    one_thread()
    with seeded(0):
        network = TuneJuryHead((512 + 1024, *RELEASED_WIDTHS))
    save_file(network.net.state_dict(), head / "tunejury.safetensors")
    (head / "tunejury.json").write_text(json.dumps({"exclude": ["text"]}))
    bound_s = bound(TuneJury(network, "A4")) * 2 * clips
    runtime = ActorsConfig(runner="ray", workers=workers) if workers else ActorsConfig()
    name = f"bench-{time.time_ns()}"
    before, cpu, started = peak(), cpu_s(), time.perf_counter()
    rescore(RescoreConfig(corpus=str(corpus), head=str(head), name=name, runtime=runtime))
    leave()
    wall_s = time.perf_counter() - started
    return {
        "clips": clips,
        "workers": workers,
        "corpus_written_s": round(written_s, 1),
        "wall_s": round(wall_s, 1),
        "cpu_s": round(cpu_s() - cpu, 1),
        "clips_per_s": round(clips / wall_s, 1),
        "bound_s": round(bound_s, 1),
        "share_of_bound": round(bound_s / max(cpu_s() - cpu, 1e-9), 3),
        "peak_mib_before": round(before / 2**20),
        "peak_mib": round(peak() / 2**20),
    }


def bound(head: TuneJury) -> float:
    """Seconds per vector."""
    rng = np.random.default_rng(0)
    clap, mert = (rng.standard_normal((SAMPLE, width), dtype=np.float32) for width in (512, 1024))
    head.score(clap[:10], mert[:10])
    started = time.process_time()
    head.score(clap, mert)
    return (time.process_time() - started) / SAMPLE


def cpu_s() -> float:
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def peak() -> int:
    """Bytes of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(main())
