"""FAD at 512 dimensions, 10,000 clips per side: ours against `np.cov` and `scipy.linalg.sqrtm` of the product.

    python benchmarks/metrics.py [--output FILE.json]

Both sides are timed in alternation in one process, of float32 embeddings as models give them, with 1 and with 2 BLAS
threads (each count in a process of its own). Three lines each: the trace of the matrix square root, the covariances,
and the whole FAD. Times are wall milliseconds. Only the first line has a target: both sides need the covariances,
which are one matrix product. The sets are synthetic: unit vectors with a decaying spectrum, as CLAP's. Exit code 1 if
the target is missed or if the values differ.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from common import Line, machine, report, spread
from scipy import linalg

from ttmray.evaluation.fad import Gaussian, frechet

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
TARGET_RATIO = 10.0
MAX_DIFFERENCE = 1e-8
PROTOCOL = "synthetic"


def unit_vectors(n: int, d: int, shift: float, seed: int) -> np.ndarray:
    """(n, d) float32 of norm 1: a common direction and variances that fall as 1 / rank."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)) / np.sqrt(np.arange(1, d + 1))
    x[:, 0] += 3
    x[:, 1] += shift
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def their_cov(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return x.mean(axis=0, dtype=np.float64), np.cov(x, rowvar=False)


def their_distance(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> float:
    shift = a[0] - b[0]
    root = linalg.sqrtm(a[1] @ b[1])
    return float(shift @ shift + np.trace(a[1]) + np.trace(b[1]) - 2 * np.trace(root).real)


def wall_ms(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    value = function()
    return (time.perf_counter() - start) * 1e3, value


def measure(n: int, d: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of each repeat, and the largest difference between the two values."""
    x, y = unit_vectors(n, d, 0.0, 0), unit_vectors(n, d, 0.2, 1)
    names = ("root ours", "root sqrtm", "cov ours", "cov numpy", "whole ours", "whole sqrtm")
    times: dict[str, list[float]] = {name: [] for name in names}
    ours, theirs = (Gaussian.of(x, PROTOCOL), Gaussian.of(y, PROTOCOL)), (their_cov(x), their_cov(y))
    difference, value = 0.0, 0.0
    work: tuple[Callable[[], Any], ...] = (
        lambda: frechet(*ours),
        lambda: their_distance(*theirs),
        lambda: (Gaussian.of(x, PROTOCOL), Gaussian.of(y, PROTOCOL)),
        lambda: (their_cov(x), their_cov(y)),
        lambda: frechet(Gaussian.of(x, PROTOCOL), Gaussian.of(y, PROTOCOL)),
        lambda: their_distance(their_cov(x), their_cov(y)),
    )
    for repeat in range(repeats + 1):
        results = []
        for name, function in zip(names, work, strict=True):
            elapsed, result = wall_ms(function)
            results.append(result)
            if repeat > 0:  # the first round warms up
                times[name].append(elapsed)
        value = results[4]
        difference = max(difference, abs(results[0] - results[1]), abs(results[4] - results[5]))
    return {"times": times, "difference": difference, "fad": value}


def in_threads(threads: int, args: argparse.Namespace) -> dict[str, Any]:
    """`measure` in a process whose BLAS has that many threads, which is fixed when numpy is imported."""
    command = [sys.executable, __file__, "--worker", *(f"--{k}={vars(args)[k]}" for k in ("n", "dim", "repeats"))]
    environment = os.environ | dict.fromkeys(THREADS, str(threads))
    return json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def lines_of(threads: int, numbers: dict[str, Any]) -> list[Line]:
    times: dict[str, Sequence[float]] = numbers["times"]
    lines = []
    for part, other, target in (("root", "sqrtm", TARGET_RATIO), ("cov", "numpy", None), ("whole", "sqrtm", None)):
        mine, theirs = times[f"{part} ours"], times[f"{part} {other}"]
        ratios = [b / a for a, b in zip(mine, theirs, strict=True)]
        note = f"{np.median(mine):.1f} ms against {np.median(theirs):.1f} ms"
        lines.append(Line(f"{part}, {threads} thread(s)", spread(ratios, 2), "x", target, note=note))
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=10_000, help="clips per side")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(args.n, args.dim, args.repeats)))
        return 0

    facts = machine()
    lines = []
    for threads in (1, 2):
        numbers = in_threads(threads, args)
        lines += lines_of(threads, numbers)
        what, reached = f"difference of FAD, {threads} thread(s)", spread([numbers["difference"]], 12)
        lines.append(Line(what, reached, "", MAX_DIFFERENCE, low=True, note=f"FAD {numbers['fad']:.6f}"))
    facts |= {"clips_per_side": args.n, "dimension": args.dim, "source": "synthetic"}
    facts["versions"] |= {"scipy": version("scipy")}
    return report("metrics", lines, facts, args.output, judged=(args.n, args.dim) == (10_000, 512))


if __name__ == "__main__":
    sys.exit(main())
