"""What the steps of a chain will take on the device that is here, as far as arithmetic tells: models that are trained,
and clips that are sampled. What a step has to read, decode or embed is not in it."""

from collections.abc import Mapping

from ttmray.config import Config
from ttmray.generation.config import GenerateConfig
from ttmray.generation.pool_worker import CandidatesConfig
from ttmray.models.backbone import SIZES, BackboneConfig
from ttmray.models.backbone_weights import forward_flops
from ttmray.models.speed import estimate, present_flops
from ttmray.training.config import LoopConfig, TrainConfig
from ttmray.training.crpo import CrpoConfig
from ttmray.training.expert_iteration import ExpertIterationConfig
from ttmray.training.memory import step_flops
from ttmray.training.sft import SMALL

GUIDED = 2
"""Forwards of a step of the sampler: with and without the prompt."""
PAIR = 2 + 2 / 3
"""A pair's cost over that of a clip: two clips, and both once more forward through the frozen reference."""


def backbone_of(size: str) -> BackboneConfig:
    """The shape that a size names."""
    return SMALL[size] if size in SMALL else SIZES[size]  # type: ignore[index]


def flops_of(config: Config, size: str) -> float | None:
    """FLOPs of a step; None where arithmetic does not tell.

    Args:
        config: of its job.
        size: of the chain's backbone, for steps that only name a file of weights.
    """
    if isinstance(config, TrainConfig):
        updates = config.steps
        if isinstance(config, ExpertIterationConfig):
            updates = config.rounds * (config.steps + config.polish.steps)
        each = step_flops(backbone_of(config.model.size)) * (PAIR if isinstance(config, CrpoConfig) else 1)
        return updates * config.batch * each
    if isinstance(config, CandidatesConfig) and config.prompt_count is not None:
        return config.prompt_count * config.candidates * _clip(size, config.sampler.steps)
    if isinstance(config, GenerateConfig) and config.texts:
        return len(config.texts) * config.samples * config.best_of * _clip(size, config.sampler.steps)
    return None


def _clip(size: str, steps: int) -> float:
    return GUIDED * steps * forward_flops(backbone_of(size))["velocity"]


def estimates(configs: Mapping[str, Config]) -> tuple[dict[str, str], str]:
    """Step -> how long its models work on the device that is here; and on what that rests.

    Args:
        configs: of the steps to do.
    """
    trained = [config for config in configs.values() if isinstance(config, TrainConfig)]
    size = trained[0].model.size if trained else "s_44k"
    device = next((one.runtime.device for one in configs.values() if isinstance(one, LoopConfig)), "auto")
    flops = {name: work for name, config in configs.items() if (work := flops_of(config, size)) is not None}
    if not flops:
        return {}, ""
    peak, source = present_flops(device, bf16=any(config.precision == "bf16" for config in trained))
    taken = {name: estimate(work, peak, source)[0] for name, work in flops.items()}
    return taken, f"{estimate(sum(flops.values()), peak, source)[1]}, of training and sampling alone, on one device"
