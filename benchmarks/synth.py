"""The small world's songs: how much faster than real time one core makes them, stems, faults and captions included.

    python benchmarks/synth.py [--songs 24] [--seed 0] [--output FILE.json]

Times are CPU seconds of this process, which runs on one thread. The ratio over all songs is the result; the slowest and
the median song are told beside it. Exit code 1 if the target of 40 is missed.
"""

import os

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before numpy is imported

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

from ttmray.synth.measures import measure
from ttmray.synth.world import clip, song

TARGET = 40.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--songs", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    song(arguments.seed, 10_000)  # wavetables and noises that are made once
    seconds, spent = [], []
    for index in range(arguments.songs):
        start = time.process_time()
        seconds.append(song(arguments.seed, index).seconds)
        spent.append(time.process_time() - start)
    ratios = sorted(s / t for s, t in zip(seconds, spent, strict=True))
    start = time.process_time()
    clips = [clip(arguments.seed, index) for index in range(arguments.songs)]
    clip_ms = 1000 * (time.process_time() - start) / arguments.songs
    start = time.process_time()
    for item in clips:
        measure(item.mix)
    measure_ms = 1000 * (time.process_time() - start) / arguments.songs
    result = {
        "ratio": sum(seconds) / sum(spent),
        "median_song": statistics.median(ratios),
        "slowest_song": ratios[0],
        "songs": arguments.songs,
        "seconds": sum(seconds),
        "cpu_ms_per_5s_clip": clip_ms,
        "cpu_ms_per_measured_clip": measure_ms,
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
    }
    print(f"songs with stems: {result['ratio']:.0f} x real time on one core (target {TARGET:.0f})")
    print(f"  median song {result['median_song']:.0f}, slowest {ratios[0]:.0f}; {arguments.songs} songs")
    print(f"  a single clip of 5 s of a piece of its own: {clip_ms:.0f} ms; measures of a clip: {measure_ms:.0f} ms")
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    return int(result["ratio"] < TARGET)


if __name__ == "__main__":
    sys.exit(main())
