"""Training the preference ranker on packed arrays, of the size of the TuneJury release.

    python benchmarks/ranker.py [--output FILE.json] [--seconds S] [--threads N]

17,554 pairs over 12,000 clips of random features (2,000 prompts). Short epochs in the code of the job alternate with
the plain way (unfused AdamW), `--seconds` in all per head; 100 epochs follow from the time per
pair, plus the validation pass of every epoch. Beside it stand the FLOP/s of the matrix products, as a share of what one
large fp32 matrix product reaches here.

The matrix products of a head of the released widths are 22 (A1) to 44 (A7) TFLOP in 100 epochs, so a minute needs 0.4
to 0.7 TFLOP/s of them: more than two CPU cores without matrix units have. The target of a minute is for the A1 head
with widths 256, 128, 64 in batches of 256 (2.7 TFLOP); the released ones are reported without one. Exit code 1 if it is
missed.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Line, machine, report, spread

from ttmray.models.tunejury import RELEASED_WIDTHS
from ttmray.ranker import heads as ranker
from ttmray.ranker.heads import HeadConfig, PackedPairs, flops_per_pair, new_head, pack, validation_loss

TRAIN, VALIDATION, CLIPS, PROMPTS = 17_554, 2_111, 12_000, 2_000
TARGET_S = 60.0
SMALL = (256, 128, 64)
HEADS = {
    "A1, 256-128-64, batch 256": ("A1", HeadConfig(widths=SMALL, batch=256, lr=8e-4), TARGET_S),
    "A1, 256-128-64, batch 32": ("A1", HeadConfig(widths=SMALL), None),
    "A1, released widths, batch 32": ("A1", HeadConfig(widths=RELEASED_WIDTHS), None),
    "A1, released widths, batch 256": ("A1", HeadConfig(widths=RELEASED_WIDTHS, batch=256), None),
    "A7, released widths, batch 32": ("A7", HeadConfig(widths=RELEASED_WIDTHS), None),
    "A7, released widths, batch 256": ("A7", HeadConfig(widths=RELEASED_WIDTHS, batch=256), None),
}


def made_up(variant: str, count: int, seed: int, device: str) -> PackedPairs:
    draw = np.random.default_rng(seed)
    blocks = {name: draw.normal(size=(CLIPS, dim)) for name, dim in (("clap_audio", 512), ("mert", 1024))}
    blocks["text"] = draw.normal(size=(PROMPTS, 512))
    rows: dict[str, Any] = {side: draw.integers(0, CLIPS, count) for side in ("a", "b")}
    rows |= {"prompt": draw.integers(0, PROMPTS, count), "target": draw.integers(0, 2, count)}
    return pack({name: x.astype(np.float32) for name, x in blocks.items()}, rows, variant, device)


def gemm_rate(device: str) -> float:
    """FLOP/s of a 2048 x 2048 x 2048 matrix product in fp32, the best of ten."""
    a, b = torch.randn(2, 2048, 2048, device=device)
    best = float("inf")
    for _ in range(12):
        started = clock(device)
        a @ b
        best = min(best, clock(device) - started)
    return 2 * 2048**3 / best


def clock(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def pair_times(pairs: PackedPairs, config: HeadConfig, device: str, seconds: float) -> tuple[list[float], list[float]]:
    """Seconds per training pair of short epochs, our way and the plain way in alternation."""
    some = pairs.rows(np.arange(max(10 * config.batch, 640)))
    ways = []
    for plain in (False, True):
        head = new_head(pairs.clips.shape[1] + pairs.texts.shape[1], config, 0)
        head.to(device)
        decay = config.weight_decay
        optimizer = torch.optim.AdamW(head.parameters(), config.lr, weight_decay=decay, fused=not plain, foreach=False)
        ranker._epoch(head, optimizer, some, config, 0, 0)  # warms up
        ways.append((head, optimizer, list[float]()))
    began = clock(device)
    while len(ways[1][2]) < 5 or clock(device) - began < seconds:
        for head, optimizer, times in ways:
            started = clock(device)
            ranker._epoch(head, optimizer, some, config, 0, 1 + len(times))
            times.append((clock(device) - started) / len(some))
    return ways[0][2], ways[1][2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="per head")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    facts = machine() | {"threads": args.threads, "device": args.device}
    gemm = [gemm_rate(args.device) for _ in range(3)]
    lines = [Line("fp32 matrix product, 2048 cubed", spread([rate / 1e9 for rate in gemm], 1), "GFLOP/s")]
    for name, (variant, config, target) in HEADS.items():
        train = made_up(variant, TRAIN, 0, args.device)
        validation = made_up(variant, VALIDATION, 1, args.device)
        inputs = train.clips.shape[1] + train.texts.shape[1]
        head = new_head(inputs, config, 0).to(args.device)
        started = clock(args.device)
        validation_loss(head, validation)
        checking = clock(args.device) - started
        ways = pair_times(train, config, args.device, args.seconds)
        ours, plain_way = ([100 * (TRAIN * one + checking) for one in way] for way in ways)
        flops = flops_per_pair(inputs, config.widths)
        rate = flops / float(np.median(ways[0]))
        note = f"{rate / 1e9:.0f} GFLOP/s, {rate / np.median(gemm):.0%} of the product above; "
        note += f"{flops * TRAIN / 1e10:.1f} TFLOP in all, {flops * TRAIN * 100 / np.median(gemm):.0f} s at its rate"
        lines.append(Line(f"100 epochs, {name}", spread(ours, 1), "s", target, low=True, note=note))
        lines.append(Line(f"100 epochs the plain way, {name}", spread(plain_way, 1), "s"))
    return report("ranker", lines, facts, args.output, judged=True)


if __name__ == "__main__":
    sys.exit(main())
