"""The score at which a model is best: a pool at each of several scores, the highest mean reward wins.

Beyond the scores of its training a model may do as for any other one. A parent that is judged only there looks worse
than it is, and what was trained from it better. `ttmray generate --score-from` takes the choice.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import Field, field_validator

from ttmray import inventory
from ttmray.config import Location, execution
from ttmray.console import console
from ttmray.corpus.unit import OK
from ttmray.errors import EXIT_OK, UserError
from ttmray.generation.filter import numbers, read_pool
from ttmray.generation.plan_rows import OF, sampling
from ttmray.generation.pool import clips_to_make, generate_pool
from ttmray.generation.pool_worker import CandidatesConfig
from ttmray.json_text import read_json
from ttmray.models.backbone_weights import read_support
from ttmray.models.bundle import open_bundle
from ttmray.models.plans import show_plan
from ttmray.models.weights import digest_file, weights_file
from ttmray.storage import Folder

CHOICE = "choice.json"


class ScoreChoiceConfig(CandidatesConfig):
    """`ttmray choose-score`: a pool for each score, in folders below `output`; all else of them is the same, noise
    included. Prompts must not be those of the comparison that the score is for (`held_out`), else it is fitted to
    them."""

    output: Location = execution("runs/score")
    """Run folder: a local path or s3:// prefix. The same command goes on with what is not done."""
    candidates: int = Field(1, ge=1, le=256)
    """Clips per prompt and score."""
    scores: tuple[float, ...] = ()
    """Scores to try; default: `points` of them, from p5 to the largest of the checkpoint's training data."""
    points: int = Field(6, ge=2, le=100)
    """How many, where `scores` names none."""

    @field_validator("scores")
    @classmethod
    def _a_choice(cls, scores: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(scores)) < len(scores) or len(scores) == 1:
            raise ValueError("needs two or more different scores, or none for those of the checkpoint's training")
        return scores


def choose_score(config: ScoreChoiceConfig, *, plan_only: bool = False) -> int:
    """Make, or go on making, the pools; writes `choice.json` and `choice.md`; returns the exit code.

    Args:
        plan_only: say what would be done, and stop.

    Raises:
        UserError: a pool that cannot be made, or without any reward; a checkpoint that does not name its scores.
    """
    out = Folder.at(config.output)
    scores = config.scores or _trained_scores(config)
    if plan_only:
        return _show_plan(config, out, scores)
    rewards: dict[float, tuple[float, int]] = {}
    for score in scores:
        pool = _pool(config, out, score)
        folder = pool.output
        code = generate_pool(pool)
        if code != EXIT_OK:
            return code
        table, _ = read_pool(folder)
        values = numbers(table, "reward_score")[table["status"].to_numpy() == OK]
        values = values[np.isfinite(values)]
        if not len(values):
            raise UserError(f"{folder} has no clip with a reward.", "Name a bundle with a reward model.")
        rewards[score] = float(values.mean()), len(values)
    best = max(rewards, key=lambda score: rewards[score][0])  # the first of equals
    lines = [f"| {score:g} | {mean:+.4f} | {n} |" for score, (mean, n) in rewards.items()]
    note = open_bundle(config.bundle).note
    text = (
        f"# Score {best:g}\n\n{f'> {note}' * bool(note)}\n\nThe highest mean reward of the clips of other prompts.\n\n"
    )
    out.write(
        "choice.md", (text + "\n".join(["| score | mean reward | clips |", "|---|---|---|", *lines]) + "\n").encode()
    )
    choice: dict[str, Any] = {"score": best} | ({"note": note} if note else {})
    choice["mean_reward"] = {f"{score:g}": mean for score, (mean, _) in rewards.items()}
    choice["checkpoint"] = config.checkpoint and digest_file(weights_file(config.checkpoint, "checkpoint")).sha256
    out.write(CHOICE, json.dumps(choice, indent=1).encode())
    inventory.note(out, "score choice", (CHOICE, "choice.md"))
    console.print(f"best of the scores {', '.join(f'{score:g}' for score in scores)}: {best:g}")
    console.print(f"to generate with it: ttmray generate --score-from {out.typed}", markup=False)
    return EXIT_OK


def _pool(config: ScoreChoiceConfig, out: Folder, score: float) -> CandidatesConfig:
    pool = CandidatesConfig(**{name: getattr(config, name) for name in CandidatesConfig.model_fields})
    sampler = pool.sampler.model_copy(update={"score": score})
    return pool.model_copy(update={"output": out.path(f"score{score:g}"), "sampler": sampler})


def _show_plan(config: ScoreChoiceConfig, out: Folder, scores: Sequence[float]) -> int:
    bundle, clips = open_bundle(config.bundle), sum(clips_to_make(_pool(config, out, score)) for score in scores)
    backbone, flops = sampling(config, bundle, clips)
    rows = [
        ("scores", f"{len(scores)}", ", ".join(f"{score:g}" for score in scores)),
        ("clips", f"{clips:,} to make", f"{config.candidates} per prompt and score, each scored"),
        ("bundle", bundle.name, bundle.note),
        *backbone,
    ]
    return show_plan(rows, out, clips, flops, config.runtime, OF)


def _trained_scores(config: ScoreChoiceConfig) -> tuple[float, ...]:
    """Scores to try, from what the checkpoint says about its training data."""
    file = weights_file(config.checkpoint, "checkpoint") if config.checkpoint else None
    file = file or open_bundle(config.bundle).backbone_file()  # None: drawn from a seed
    support = None if file is None else read_support(file)
    what = config.checkpoint or f"the backbone of bundle {config.bundle}"
    if support is None:
        way_out = "Set the scores to try: --set scores=[0,1,2]."
        raise UserError(f"{what} does not say which scores it was trained on.", way_out)
    grid = support.grid(config.points)
    if len(grid) < 2:
        raise UserError(f"{what} was trained on one score, {grid[0]:g}.", "Set scores to try others.")
    return grid


def chosen_score(folder: str, checkpoint: str | None = None) -> float:
    """What `choose_score` has found.

    Args:
        folder: its run folder.
        checkpoint: weights that the score is to be used with; None: not checked.

    Raises:
        UserError: it has not run, its file is damaged, or it was found for other weights.
    """
    out = Folder.at(folder)
    if not out.exists(CHOICE):
        raise UserError(f"{out} has no {CHOICE}: no score was chosen there.", "Run ttmray choose-score to its end.")
    try:
        choice = read_json(inventory.checked(out.path(CHOICE)))
        score, theirs = float(choice["score"]), choice.get("checkpoint")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{out.path(CHOICE)} names no score.", "Delete it, and run the step before again.") from error
    if checkpoint is not None and digest_file(weights_file(checkpoint, "checkpoint")).sha256 != theirs:
        raise UserError(f"{out.path(CHOICE)} is not of the weights {checkpoint}.", "Choose a score for them.")
    return score
