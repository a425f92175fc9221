"""What becomes of the score where weights of one head run in the forward of another.

    python benchmarks/score_heads.py [--output FILE.json] [--figure FILE.svg] [--seeds N] [--updates N]

Trains v1 and v2 models on latents whose coefficient is their score (`score_problem.py`), and measures the mean
coefficient of samples at input scores from -0.5 to 3: of each model in its own forward and in the other's. A model that
follows its score has the slope 1. Beside the curves stand the share of the movement that the cross-load report calls
kept (`ttmray/generation/steering.py`), the loss on held-out samples, and the v1 weights after a pass of flow matching
in v2 as short as Stage 3: 1,000 updates at 5e-6, as many times rate as the paper's 5,000 at 1e-6. Exit code 1 if a
model does not follow its score in its own forward: then the run was too short to say anything.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from common import Line, machine, report, spread
from score_problem import ScoreProblem, curve, new_model, score_problem, train

from ttmray.generation.steering import SteeringConfig, steer
from ttmray.models.backbone import FluxAudio
from ttmray.models.backbone_weights import with_head
from ttmray.training.flow_matching import FlowMatchingConfig, flow_losses

SCORES = (-0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
TRAINED = (-0.5, 1.5)
"""5th to 95th percentile of the paper's rewards, and the scores of its delta_out."""
CELLS = {"v1/v1": "#1f77b4", "v1/v4": "#17a2b8", "v1/v2": "#d62728", "v1/v2, trained on": "#ff9896"}
CELLS |= {"v2/v2": "#2ca02c", "v2/v1": "#7f7f7f"}
TARGET = 0.8


def held_out_loss(model: FluxAudio, problem: ScoreProblem) -> float:
    batch = problem.batch(512, torch.Generator().manual_seed(10_000))
    whole = FlowMatchingConfig(text_dropout=0, score_dropout_rate=0)
    with torch.no_grad():
        return float(flow_losses(model, batch, whole)[0].mean())


def cells(problem: ScoreProblem, seed: int, updates: int) -> dict[str, FluxAudio]:
    """`weights/forward` -> model."""
    models = {}
    for weights, forwards in (("v1", ("v1", "v4", "v2")), ("v2", ("v2", "v1"))):
        model = new_model(problem, weights, seed=seed)
        train(model, problem, updates, seed=seed)
        for forward in forwards:
            models[f"{weights}/{forward}"] = with_head(model, forward, force=True)[0]
    after, _ = with_head(models["v1/v2"], "v2")
    train(after, problem, 1000, lr=5e-6, seed=seed + 1)
    return models | {"v1/v2, trained on": after}


def measured(problem: ScoreProblem, seeds: int, updates: int, count: int) -> dict[str, dict[str, list[float]]]:
    """Cell -> number -> its value for each seed."""
    by_cell: dict[str, dict[str, list[float]]] = {name: {} for name in CELLS}
    for seed in range(seeds):
        models = cells(problem, seed, updates)
        settings = SteeringConfig(prompts=len(problem.text))
        moves = {name: steer(model, problem.text, problem.pooled, settings) for name, model in models.items()}
        for name in CELLS:
            means = {s: float(values.mean()) for s, values in curve(models[name], problem, SCORES, count=count).items()}
            inside = [s for s in SCORES if TRAINED[0] <= s <= TRAINED[1]]
            slope = float(np.polyfit(inside, [means[s] for s in inside], 1)[0])
            own = moves["v1/v1" if name.startswith("v1") else "v2/v2"]
            share = moves[name].kept_of(own)
            numbers = {f"s = {s:g}": mean for s, mean in means.items() if s is not None}
            numbers |= {"slope": slope, "kept": float("nan") if share is None else share, "moved": moves[name].moved}
            for what, value in (numbers | {"loss": held_out_loss(models[name], problem)}).items():
                by_cell[name].setdefault(what, []).append(value)
            print(f"seed {seed}, {name}: {numbers}", flush=True)
    return by_cell


def draw(by_cell: dict[str, dict[str, list[float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    with pyplot.rc_context({"svg.hashsalt": "score_heads", "font.size": 9}):
        figure, axes = pyplot.subplots(figsize=(5.2, 3.6), layout="constrained")
        axes.plot(SCORES, SCORES, color="#bbbbbb", lw=1, ls=":", label="follows the score")
        for name, colour in CELLS.items():
            each = np.array([by_cell[name][f"s = {s:g}"] for s in SCORES])
            axes.plot(SCORES, np.median(each, axis=1), "o-", ms=3, lw=1.4, color=colour, label=name)
            axes.fill_between(SCORES, each.min(axis=1), each.max(axis=1), color=colour, alpha=0.15, lw=0)
        axes.axvspan(*TRAINED, color="#00000008", lw=0)
        axes.set(xlabel="input score s", ylabel="mean coefficient of the samples")
        axes.legend(frameon=False, fontsize=7.5, title="weights/forward", title_fontsize=7.5)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2, help="models per head")
    parser.add_argument("--updates", type=int, default=600, help="of each training, 32 samples each")
    parser.add_argument("--samples", type=int, default=16, help="per input score")
    parser.add_argument("--figure", type=Path, help="draw the curves into this SVG")
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    facts = machine() | {"updates": args.updates, "samples": args.samples}
    by_cell = measured(score_problem(), args.seeds, args.updates, args.samples)
    lines = []
    for name, numbers in by_cell.items():
        for what, values in numbers.items():
            own = name in ("v1/v1", "v2/v2") and what == "slope"
            lines.append(Line(f"{name}, {what}", spread(values), "", TARGET if own else None))
    if args.figure:
        draw(by_cell, args.figure)
    return report("score_heads", lines, facts, args.output, judged=True)


if __name__ == "__main__":
    sys.exit(main())
