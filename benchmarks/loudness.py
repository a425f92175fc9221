"""Levels of a clip on one core: integrated loudness (pyloudnorm), true peak and share of silence.

    python benchmarks/loudness.py [--output FILE.json]

Times are CPU milliseconds per 10 s stereo clip at 44.1 kHz, in this process, the median over all clips and repeats with
the 10th and 90th percentile. The clips are cut from the stereo tracks in $TTMRAY_DATA/tracks (default
../shared/data); without that folder they are synthetic, which the result states. There is no target.
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

from ttmray.audio import io, loudness, segment

RATE = 44100
MEASURES = {
    "integrated loudness": loudness.integrated_loudness,
    "true peak": loudness.true_peak,
    "share of silence": loudness.silence_ratio,
}


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


def cpu_ms(function: Callable[[np.ndarray, int], float], clip: np.ndarray) -> float:
    start = time.process_time_ns()
    function(clip, RATE)
    return (time.process_time_ns() - start) / 1e6


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

    times: dict[str, list[float]] = {what: [] for what in MEASURES}
    for repeat in range(args.repeats + 1):
        for clip in clips:
            for what, measure in MEASURES.items():
                spent = cpu_ms(measure, clip)
                if repeat > 0:  # the first round warms up
                    times[what].append(spent)

    result = {
        "benchmark": "loudness",
        "clips": len(clips),
        "source": source,
        "repeats": args.repeats,
        **{what: summary(spent) for what, spent in times.items()},
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("numpy", "scipy", "pyloudnorm", "soxr")},
    }
    print(json.dumps(result, indent=1))
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
