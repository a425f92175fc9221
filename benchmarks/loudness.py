"""Integrated loudness: `ttmray.audio.loudness` against pyloudnorm with its ITU-exact filters, on one core.

    python benchmarks/loudness.py [--output FILE.json]

Both measure the same 10 s stereo clips at 44.1 kHz in alternation, in this process, each from the memory
layout that it takes (pyloudnorm (frames, channels), ours (channels, frames)). Times are CPU milliseconds per
clip, the median over all clips and repeats with the 10th and 90th percentile. The clips are cut from the
stereo tracks in $TTMRAY_DATA/tracks (default ../shared/data); without that folder they are synthetic, which
the result states. Exit code 1 if the target is missed.
"""

import os

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before numpy is imported

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyloudnorm

from ttmray.audio import io, loudness, segment

RATE = 44100
TARGET_RATIO = 1.8
MAX_DIFFERENCE_LU = 0.001


def real_clips(data: Path, count: int) -> list[np.ndarray]:
    clips: list[np.ndarray] = []
    for path in sorted(data.glob("tracks/**/*.mp3")):
        info = io.probe(path)
        if (info.channels, info.sample_rate) != (2, RATE):
            continue
        audio, _ = io.decode(path, io.AudioLimits())
        segments = segment.partition(audio.shape[1], RATE)
        clips += [segment.cut(audio, RATE, start, end) for start, end in segments]
        if len(clips) >= count:
            break
    return clips[:count]


def synthetic_clips(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    envelope = np.abs(np.sin(np.arange(10 * RATE) * 2 * np.pi * 1.5 / RATE))
    return [(0.1 * envelope * rng.standard_normal((2, 10 * RATE))).astype(np.float32) for _ in range(count)]


def cpu_ms(function: Callable[[np.ndarray], float], clip: np.ndarray) -> tuple[float, float]:
    start = time.process_time_ns()
    value = function(clip)
    return (time.process_time_ns() - start) / 1e6, float(value)


def summary(times: list[float]) -> dict[str, float]:
    low, median, high = np.percentile(times, [10, 50, 90])
    return {"median_ms": round(median, 3), "p10_ms": round(low, 3), "p90_ms": round(high, 3)}


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--clips", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    args = parser.parse_args()

    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    data = Path(os.environ.get("TTMRAY_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    clips = real_clips(data, args.clips)
    source = "real" if clips else "synthetic"
    clips = clips or synthetic_clips(args.clips)
    meter = pyloudnorm.Meter(RATE, filter_class="DeMan")

    ours_ms: list[float] = []
    theirs_ms: list[float] = []
    difference = 0.0
    for repeat in range(args.repeats + 1):
        for clip in clips:
            ours, ours_lufs = cpu_ms(lambda x: loudness.integrated_loudness(x, RATE), clip)
            theirs, theirs_lufs = cpu_ms(meter.integrated_loudness, np.ascontiguousarray(clip.T))
            difference = max(difference, abs(ours_lufs - theirs_lufs))
            if repeat > 0:  # the first round warms up
                ours_ms.append(ours)
                theirs_ms.append(theirs)

    ratio = float(np.median(theirs_ms) / np.median(ours_ms))
    result = {
        "benchmark": "loudness",
        "clips": len(clips),
        "source": source,
        "repeats": args.repeats,
        "max_difference_lu": difference,
        "ours": summary(ours_ms),
        "pyloudnorm_deman": summary(theirs_ms),
        "ratio": round(ratio, 3),
        "target_ratio": TARGET_RATIO,
        "passed": ratio >= TARGET_RATIO and difference <= MAX_DIFFERENCE_LU,
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("numpy", "scipy", "pyloudnorm")},
    }
    print(json.dumps(result, indent=1))
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
