"""The score at which a model is best: a pool at each of several scores, the highest mean reward wins.

The score of a submission may lie far outside of the training's range. A parent that is judged only there looks worse
than it is, and what was trained from it better.
"""

import json

import numpy as np
from pydantic import Field

from ttmray.console import console
from ttmray.corpus.unit import OK
from ttmray.errors import EXIT_OK, UserError
from ttmray.generation.filter import numbers, read_pool
from ttmray.generation.pool import generate_pool
from ttmray.generation.pool_worker import CandidatesConfig
from ttmray.storage import Folder

CHOICE = "choice.json"


class ScoreChoiceConfig(CandidatesConfig):
    """A pool for each score, in folders below `output`; all else of them is the same, noise included. Prompts must not
    be those of the comparison that the score is for (`held_out`), else it is fitted to them."""

    scores: tuple[float, ...] = Field(min_length=2)
    """Scores to try."""


def choose_score(config: ScoreChoiceConfig) -> int:
    """Make, or go on making, the pools; writes `choice.json` and `choice.md`; returns the exit code.

    Raises:
        UserError: a pool that cannot be made, or without any reward.
    """
    out = Folder.at(config.output)
    rewards: dict[float, tuple[float, int]] = {}
    for score in config.scores:
        pool = CandidatesConfig(**{name: getattr(config, name) for name in CandidatesConfig.model_fields})
        sampler = pool.sampler.model_copy(update={"score": score})
        folder = out.path(f"score{score:g}")
        code = generate_pool(pool.model_copy(update={"output": folder, "sampler": sampler}))
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
    text = f"# Score {best:g}\n\nThe highest mean reward of the clips of other prompts.\n\n"
    out.write(
        "choice.md", (text + "\n".join(["| score | mean reward | clips |", "|---|---|---|", *lines]) + "\n").encode()
    )
    found = {"score": best, "mean_reward": {f"{score:g}": mean for score, (mean, _) in rewards.items()}}
    out.write(CHOICE, json.dumps(found, indent=1).encode())
    console.print(f"best of the scores {', '.join(f'{score:g}' for score in config.scores)}: {best:g}")
    return EXIT_OK


def chosen_score(folder: str) -> float:
    """What `choose_score` has found.

    Raises:
        UserError: it has not run, or its file is damaged.
    """
    out = Folder.at(folder)
    try:
        return float(json.loads(out.read(CHOICE))["score"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{out.path(CHOICE)} names no score.", "Delete it, and run the step before again.") from error
