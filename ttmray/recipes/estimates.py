"""What the steps of a chain will take on the device that is here, as far as arithmetic tells: models that are trained,
clips that are sampled, and songs that are decoded and embedded. What else a step reads or embeds is not in it."""

from collections.abc import Mapping
from contextlib import suppress

from ttmray.config import Config
from ttmray.corpus.catalogue import build_catalogue
from ttmray.corpus.config import CorpusConfig
from ttmray.corpus.plan import DECODE_REALTIME, build_plan, derived_numbers
from ttmray.errors import UserError
from ttmray.generation.config import GenerateConfig
from ttmray.generation.pool_worker import CandidatesConfig
from ttmray.generation.prompts import read_prompts
from ttmray.models.backbone import SIZES, BackboneConfig
from ttmray.models.backbone_weights import forward_flops
from ttmray.models.bundle import open_bundle
from ttmray.models.speed import NO_GPU, REACHED, about, cores, estimate, gpu_here, present_flops
from ttmray.storage import Folder, is_remote
from ttmray.tables import is_table
from ttmray.training.config import LoopConfig, TrainConfig
from ttmray.training.crpo import CrpoConfig
from ttmray.training.expert_iteration import ExpertIterationConfig
from ttmray.training.memory import step_flops
from ttmray.training.sft import SMALL

GUIDED = 2
"""Forwards of a step of the sampler: with and without the prompt."""
PROBED_FILES = 5000
"""Headers of a folder's songs are read up to so many files: a plan is to be there at once."""
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
    if isinstance(config, GenerateConfig) and (count := _prompts(config)):
        return count * config.samples * config.best_of * _clip(size, config.sampler.steps)
    return None


def _prompts(config: GenerateConfig) -> int:
    """How many prompts there are; 0 where an earlier step writes them."""
    if config.prompts is None:
        return len(config.texts)
    with suppress(UserError):
        return len(read_prompts(config.prompts))
    return 0


def corpus_work(config: Config) -> tuple[float, float] | None:
    """Seconds of decoding here and FLOPs of the models of a corpus; None where the songs are not there, are too many
    to look at, or the cost of the bundle's models is not known."""
    if not isinstance(config, CorpusConfig):
        return None
    with suppress(UserError):
        if is_remote(config.input) or not open_bundle(config.bundle).weights():
            return None
        if not is_table(config.input) and len(Folder.at(config.input).files(sizes=False)) > PROBED_FILES:
            return None
        catalogue = build_catalogue(config.input, config.catalogue)
        value = {name: number for name, number, _ in derived_numbers(build_plan(catalogue, config), config)}
        decoding = float(value["audio, h"]) * 3600 / DECODE_REALTIME / cores()
        return decoding, float(value["models, PFLOP"]) * 1e15
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
    corpora = {name: songs for name, config in configs.items() if (songs := corpus_work(config)) is not None}
    if not flops and not corpora:
        return {}, ""
    if device.startswith("cuda") and not gpu_here():
        return {}, NO_GPU
    peak, source = present_flops(device, bf16=any(config.precision == "bf16" for config in trained))
    rate = REACHED * peak
    taken = {name: work / rate for name, work in flops.items()}
    taken |= {name: decoding + work / rate for name, (decoding, work) in corpora.items()}
    basis = estimate(1.0, peak, source)[1]
    return {name: about(seconds) for name, seconds in taken.items()}, (
        f"{about(sum(taken.values()))} in all on one device ({basis}), of training, sampling and making corpora"
    )
