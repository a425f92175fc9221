"""`ttmray.train`: a training job from a config, and what it left behind."""

import os
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from ttmray.api.inputs import config_from, path_of
from ttmray.config import Config
from ttmray.errors import UserError
from ttmray.storage import Folder

if TYPE_CHECKING:
    import pandas as pd

Stage = Literal["stage1", "expert-iteration", "crpo", "grpo", "ranker"]
STAGES: dict[str, tuple[str, str, str]] = {
    "stage1": ("ttmray.training.config", "TrainConfig", "ttmray.training.sft:train_sft"),
    "expert-iteration": (
        "ttmray.training.expert_iteration",
        "ExpertIterationConfig",
        "ttmray.training.expert_iteration:expert_iteration",
    ),
    "crpo": ("ttmray.training.crpo", "CrpoConfig", "ttmray.training.crpo:train_crpo"),
    "grpo": ("ttmray.training.grpo", "GrpoConfig", "ttmray.training.grpo:train_grpo"),
    "ranker": ("ttmray.ranker.job", "RankerConfig", "ttmray.ranker.job:train_ranker"),
}
"""Module and name of the config, and the job."""


def train(
    config: str | os.PathLike[str] | Config | None = None, stage: Stage | None = None, **fields: Any
) -> "TrainingRun":
    """Train, or go on with, what a config says: the job of `ttmray train-sft` and its like.

    Args:
        config: a `TrainConfig` or the config of another stage, a file, or a preset such as `debug/stage1`.
        stage: what a file or preset is of; default: `stage1`. A config object knows it itself.
        fields: of the config, such as `output="runs/my-stage1"`, `steps=1000`, `optimizer={"lr": 1e-4}` (all: `ttmray
            config train-sft`).

    Raises:
        UserError: for everything that the user can mend.
        KeyboardInterrupt: the run is saved; the same call goes on.

    >>> import ttmray
    >>> sources = [{"corpus": "runs/my-corpus"}]
    >>> run = ttmray.train(
    ...     "debug/stage1", output="runs/my-stage1", steps=4, data={"sources": sources}, samples={"every": 0},
    ...     runtime={"log_every": 2, "device": "cpu"}
    ... )
    >>> run.metrics["step"].tolist()
    [2, 4]
    """
    from ttmray.cluster import alone

    name = stage or _stage_of(config)
    if name not in STAGES:
        raise UserError(f"there is no stage {name!r}.", f"Stages: {', '.join(STAGES)}.")
    module, kind, job = STAGES[name]
    settings = config_from(getattr(import_module(module), kind), config, fields)
    where, _, function = job.partition(":")
    with alone():
        getattr(import_module(where), function)(settings)
    return TrainingRun(settings.output)


def _stage_of(config: Any) -> str:
    """The stage of a config object; a file is of Stage 1."""
    if not isinstance(config, Config):
        return "stage1"
    for name, (module, kind, _) in STAGES.items():
        if (type(config).__module__, type(config).__name__) == (module, kind):
            return name
    raise UserError(f"{type(config).__name__} is no config of a training.", f"Stages: {', '.join(STAGES)}.")


class TrainingRun:
    """The run folder of a training.

    Attributes:
        folder: where it lies.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._out = Folder.at(path_of(folder, "folder"))
        self.folder = self._out.uri

    def __repr__(self) -> str:
        return f"TrainingRun({self.folder!r})"

    @cached_property
    def metrics(self) -> "pd.DataFrame":
        """A row per step that was logged or validated: losses, learning rate, speed, and what else the run logs.

        Raises:
            UserError: the run logs none: the ranker, and expert iteration, whose trainings are runs of their own below.
        """
        import pandas as pd

        from ttmray.training.logbook import METRICS, read_lines

        if not self._out.exists(METRICS):
            raise UserError(f"{self._out} has no {METRICS}.", "Runs of Stage 1 and 3 and of GRPO have it.")
        lines = pd.DataFrame(read_lines(self._out))
        return lines.groupby("step", as_index=False).first() if len(lines) else lines

    def export(self, path: str | os.PathLike[str], weights: str = "raw") -> str:
        """Write the weights of the newest checkpoint as one file, which `generate(checkpoint=...)` takes; returns its
        path.

        Args:
            path: new .safetensors file, local or s3://.
            weights: `raw`, or an average such as `ema:0.05`.

        Raises:
            UserError: there is no checkpoint, no such average, or the file is there already.
        """
        from ttmray.training.export import export

        target = path_of(path, "path")
        export(self.folder, target, weights)
        return target
