"""Of the plan of jobs that make clips: the backbone, and how much arithmetic sampling with it is."""

from typing import Any, Protocol

from ttmray.errors import UserError
from ttmray.generation.sampler import SamplerConfig
from ttmray.models.backbone import BackboneConfig
from ttmray.models.backbone_weights import count_parameters, file_config, forward_flops
from ttmray.models.bundle import Bundle
from ttmray.models.loading import LoadOptions
from ttmray.models.plans import Row

OF = "of sampling alone"


class MakesClips(Protocol):
    """What configs of generation and of pools have in common here."""

    @property
    def checkpoint(self) -> str | None: ...
    @property
    def head(self) -> Any: ...
    @property
    def null(self) -> Any: ...
    @property
    def force_head(self) -> bool: ...
    @property
    def sampler(self) -> SamplerConfig: ...


def sampling(config: MakesClips, bundle: Bundle, clips: int) -> tuple[list[Row], float | None]:
    """Rows about the backbone and its steps, and the FLOPs of sampling; None where the bundle's weights are not here.

    Raises:
        UserError: a checkpoint that is not there, or that does not fit.
    """
    shape = _shape(config, bundle)
    sampler = config.sampler
    forwards = sampler.steps * (3 if sampler.guidance == "two_axis" else 2) * (2 if sampler.solver == "heun" else 1)
    weights = "weights not here"
    if shape is not None:
        count = sum(trainable for _, trainable, _ in count_parameters(shape))
        weights = f"{count:,} trainable weights, head {shape.head}"
    rows = [
        ("backbone", config.checkpoint or f"that of bundle {bundle.name}", weights),
        ("sampler", f"{sampler.steps} steps", f"{sampler.solver}, {forwards} forwards per clip, score {sampler.score}"),
    ]
    if shape is None:
        return rows, None
    return rows, clips * forwards * forward_flops(shape)["velocity"]


def _shape(config: MakesClips, bundle: Bundle) -> BackboneConfig | None:
    if config.checkpoint is not None:
        return file_config(config.checkpoint, head=config.head, null=config.null, force=config.force_head)[0]
    try:
        return bundle.load({"backbone"}, LoadOptions(device="cpu")).backbone.config
    except UserError:  # `weights_rows` says so
        return None
