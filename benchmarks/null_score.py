"""What a model makes without a score, for three null scores, on data whose latents say what the score was.

    python benchmarks/null_score.py [--steps 1500] [--seeds 0 1] [--heads v1 v2] [--output FILE.json]
    python benchmarks/null_score.py --heads v1 --length 16 --channels 40 --batch 32 --samples 256 [--output FILE.json]

The data are those of `score_problem.py`: coefficient of a clip = its score, N(0.62, 0.59) as the paper's rewards.
A tenth of the scores is dropped, as in the paper. A model that has learned the whole distribution without a score gives
unconditional samples with the mean and the spread of the data; one whose "no score" lies among the scores gives those
of a score in the middle. Per null, head and seed:

- mean and standard deviation of the coefficients of samples without a score and without guidance;
- the curve: mean coefficient for input scores inside and outside of the training's range, and the mean error inside;
- guidance: the mean coefficient at weight 4 (Eq. 2), which leads away from the null, for scores inside;
- the embeddings: |e(s)| over s, the distance of the null to its nearest score, and the score nearest to e(5).

The nulls of one seed share weights, data and noise.
"""

import argparse
import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any, get_args

import common
import numpy as np
import score_problem
import torch
from score_problem import ScoreProblem
from torch import Tensor

from ttmray.generation.sampler import guided, integrate, make_branches, time_grid
from ttmray.models import one_thread
from ttmray.models.backbone import FluxAudio
from ttmray.models.score_heads import Head, Null

INSIDE = (-0.45, 0.2, 0.62, 1.0, 1.46)
"""p5 to p95 of the paper's rewards."""
OUTSIDE = (2.0, 3.0, 5.0)
GRID = np.round(np.arange(-1.0, 3.01, 0.05), 2)
NAMES: dict[Null, str] = {"zero_embedding": "zero embedding", "scalar_zero": "scalar zero", "learned": "learned"}


def measure(
    problem: ScoreProblem, head: Head, null: Null, seed: int, steps: int, batch: int, lr: float, samples: int
) -> dict[str, Any]:
    """Train one model and look at it."""
    model = score_problem.new_model(problem, head, null, seed)
    losses = score_problem.train(model, problem, steps, batch=batch, lr=lr, seed=seed)
    free = sampled(model, problem, None, samples, seed)
    curve = {score: sampled(model, problem, score, 128, seed) for score in (*INSIDE, *OUTSIDE)}
    lifted = {score: sampled(model, problem, score, 128, seed, weight=4.0) for score in INSIDE}
    inside = torch.stack([curve[score] for score in INSIDE])
    return {
        "loss": rounded(np.mean(losses[-100:])),
        "data": {"mean": score_problem.SCORE_MEAN, "std": rounded(data_std(problem))},
        "unconditional": {"mean": rounded(free.mean()), "std": rounded(free.std())},
        "curve": {f"{score:g}": rounded(drawn.mean()) for score, drawn in curve.items()},
        "error_inside": rounded((inside.mean(1) - torch.tensor(INSIDE)).abs().mean()),
        "spread_at_a_score": rounded(inside.std(1).mean()),
        "guided": {f"{score:g}": rounded(drawn.mean()) for score, drawn in lifted.items()},
        "embeddings": embeddings(model),
    }


def data_std(problem: ScoreProblem) -> float:
    """Standard deviation of the coefficients of the data: of the scores, and of the mean of the noise."""
    numbers = problem.length * len(problem.direction)
    return math.sqrt(score_problem.SCORE_SD**2 + problem.noise**2 / numbers)


@torch.inference_mode()
def sampled(
    model: FluxAudio, problem: ScoreProblem, score: float | None, count: int, seed: int, weight: float = 1.0
) -> Tensor:
    """(count,) coefficients of samples by 25 Euler steps, as the sampler takes them, but in one batch on a CPU."""
    noise = torch.randn(count, problem.length, len(problem.direction), generator=torch.Generator().manual_seed(seed))
    prompt = torch.arange(count) % len(problem.text)
    text = model.conditions(problem.text[prompt], problem.pooled[prompt])
    branches = make_branches(model, text, model.empty_conditions(1), score)
    x = integrate(lambda x, t, step: guided(model.velocity, x, t, branches, (weight,)), noise, time_grid(25))
    return problem.coefficients(model.unnormalise(x))


@torch.inference_mode()
def embeddings(model: FluxAudio) -> dict[str, Any]:
    """Where the null and e(5) lie among the embeddings of the scores of `GRID`."""
    assert model.score_embed is not None
    scores = torch.tensor([*GRID, 5.0], dtype=torch.float32)
    e = model.score_embed(scores, torch.zeros(len(scores), dtype=torch.bool))[:, 0]
    null = model.score_embed(scores[:1], torch.ones(1, dtype=torch.bool))[0, 0]
    known, five = e[:-1], e[-1]
    to_null, to_five = (known - null).norm(dim=1), (known - five).norm(dim=1)
    middle = int(np.argmin(np.abs(GRID - score_problem.SCORE_MEAN)))
    return {
        "norm": {f"{GRID[i]:g}": rounded(known[i].norm()) for i in range(0, len(GRID), 10)},
        "norm_at_5": rounded(five.norm()),
        "smallest_norm_at": float(GRID[int(known.norm(dim=1).argmin())]),
        "nearest_to_null": float(GRID[int(to_null.argmin())]),
        "null_to_nearest": rounded(to_null.min()),
        "one_sd_around_the_mean": rounded((known[middle + 6] - known[middle - 6]).norm()),
        "nearest_to_5": float(GRID[int(to_five.argmin())]),
    }


def rounded(value: Any) -> float:
    return round(float(value), 4)


def show(row: dict[str, Any]) -> None:
    """One line per model."""
    free, e = row["unconditional"], row["embeddings"]
    print(
        f"{row['length']} x {row['channels']} {row['head']} {NAMES[row['null']]:<14} seed {row['seed']}: "
        f"unconditional {free['mean']:+.2f} +- {free['std']:.2f}; error inside {row['error_inside']:.3f}; "
        f"s = 5 -> {row['curve']['5']:+.2f}; w = 4 at 1.46 -> {row['guided']['1.46']:+.2f}; "
        f"null nearest to e({e['nearest_to_null']:g}), {e['null_to_nearest']:.2f} away; "
        f"e(5) nearest to e({e['nearest_to_5']:g})",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--heads", nargs="+", default=["v1", "v2"])
    parser.add_argument("--nulls", nargs="+", default=list(get_args(Null)))
    parser.add_argument("--length", type=int, default=4, help="positions of the latents")
    parser.add_argument("--channels", type=int, default=4)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--output", type=Path, help="JSON; rows that it has are not made again")
    arguments = parser.parse_args()
    one_thread()
    problem = score_problem.score_problem(length=arguments.length, channels=arguments.channels)
    settings = {name: getattr(arguments, name) for name in ("length", "channels", "batch", "lr", "samples", "steps")}
    output: Path | None = arguments.output
    rows = json.loads(output.read_text())["rows"] if output and output.exists() else []
    for head, seed, null in itertools.product(arguments.heads, arguments.seeds, arguments.nulls):
        setup = settings | {"head": head, "seed": seed, "null": null}
        row = next((row for row in rows if {name: row[name] for name in setup} == setup), None)
        if row is None:
            row = setup | measure(
                problem, head, null, seed, arguments.steps, arguments.batch, arguments.lr, arguments.samples
            )
            rows.append(row)
            if output:
                output.write_text(json.dumps({"machine": common.machine(), "rows": rows}, indent=1) + "\n")
        show(row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
