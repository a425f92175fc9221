"""Which stages share a process, and how many workers each group gets. Pure arithmetic, no Ray.

Every group's share is fixed and the shares never add up to more than there is. Otherwise another group could
grow into the place of a worker that died, the dead one could not restart, and the job would wait for ever
(seen on two CPUs).
"""

import math
from dataclasses import dataclass

from ttmray.corpus.config import CorpusConfig, StageResources
from ttmray.errors import UserError

MODEL_STAGES = ("separate", "score", "encode", "text")
DECODE_SHARE = 0.15
"""Of the CPUs that are left for CPU groups where models run on CPUs too: decoding costs far less than they do."""


@dataclass(frozen=True)
class Group:
    """Stages that share a process. `fewest` to `most` workers with `cpus` and `gpus` each."""

    name: str
    stages: tuple[str, ...]
    cpus: float
    gpus: float
    fewest: int = 1
    most: int = 1

    @property
    def heavy(self) -> bool:
        """It holds models."""
        return any(stage in MODEL_STAGES for stage in self.stages)


def layout(config: CorpusConfig, gpus: float) -> list[tuple[str, tuple[str, ...]]]:
    """(name, stages) of every process boundary.

    `fuse: auto` puts all stages in one process where there is no GPU: nothing then travels. Whole tracks are too
    large to travel, so with `separation.scope: track` they are decoded where they are separated.
    """
    head, fuse = ("decode", "measure"), config.runtime.fuse
    if fuse == "auto":
        fuse = "models" if gpus else "all"
    if fuse == "all":
        return [("all", (*head, *MODEL_STAGES, "write"))]
    whole_tracks = config.separation.scope == "track"
    if fuse == "models":
        if whole_tracks:
            return [("models", (*head, *MODEL_STAGES)), ("write", ("write",))]
        return [("decode", head), ("models", MODEL_STAGES), ("write", ("write",))]
    spread = [("score", ("score",)), ("encode", ("encode", "text")), ("write", ("write",))]
    if whole_tracks:
        return [("separate", (*head, "separate")), *spread]
    return [("decode", head), ("separate", ("separate",)), *spread]


def place(config: CorpusConfig, cpus: float, gpus: float, units: int) -> list[Group]:
    """The groups with their workers, for a cluster of `cpus` and `gpus` and `units` to do.

    Raises:
        UserError: not even one worker of each group fits.
    """
    wanted = layout(config, gpus)
    heavy_count = sum(any(stage in MODEL_STAGES for stage in stages) for _, stages in wanted)
    groups = [_group(config, name, stages, gpus, heavy_count) for name, stages in wanted]
    explicit = _given(config)  # a cluster may still have to grow to what the user asked for
    needed_cpus = sum(group.cpus for group in groups if group.name not in explicit)
    needed_gpus = sum(group.gpus for group in groups if group.name not in explicit)
    if needed_cpus > cpus + 1e-6 or needed_gpus > gpus + 1e-6:
        raise UserError(
            f"The stages need {needed_cpus:g} CPUs and {needed_gpus:g} GPUs at least; Ray has {cpus:g} and {gpus:g}.",
            "Lower runtime.<stage>.cpus, gpus or workers, or set runtime.fuse=all.",
        )
    given = [group for group in groups if group.name in explicit]
    spare_cpus = max(0.0, cpus - needed_cpus - sum(group.cpus * group.most for group in given))
    spare_gpus = max(0.0, gpus - needed_gpus - sum(group.gpus * group.most for group in given))
    # Groups on GPUs first: what they can use bounds everybody else.
    for i, group in enumerate(groups):
        if group.name in explicit or not group.gpus:
            continue
        more = int(spare_gpus / len([g for g in groups if g.gpus and g.name not in explicit]) / group.gpus + 1e-6)
        if group.cpus:
            more = min(more, int(spare_cpus / group.cpus + 1e-6))
        groups[i] = _with_workers(group, 1 + more, units)
        spare_cpus -= group.cpus * (groups[i].most - 1)
    free = [g for g in groups if not g.gpus and g.name != "write" and g.name not in explicit and g.cpus]
    heavy = [g for g in free if g.heavy]
    shares = {g.name: 1.0 if not heavy else (1.0 / len(heavy) if g.heavy else 0.0) for g in free}
    if heavy and any(not g.heavy for g in free):
        shares = {name: share * (1 - DECODE_SHARE) or DECODE_SHARE for name, share in shares.items()}
    for i, group in enumerate(groups):
        if group.name in shares:
            more = int(spare_cpus * shares[group.name] / group.cpus + 1e-6)
            groups[i] = _with_workers(group, 1 + more, units)
    return groups


def least_cpus(config: CorpusConfig) -> int:
    """Logical CPUs that one worker of each group needs, GPU or not: what a Ray of our own must at least offer."""
    needs = []
    for gpus in (0, 1):
        wanted = layout(config, gpus)
        needs.append(sum(g.cpus * g.fewest for g in (_group(config, n, s, gpus, 1) for n, s in wanted)))
    return math.ceil(max(needs))


def _group(config: CorpusConfig, name: str, stages: tuple[str, ...], gpus: float, heavy_count: int) -> Group:
    resources = _resources(config, name)
    holds_models = any(stage in MODEL_STAGES for stage in stages)
    own_gpus = resources.gpus
    if own_gpus is None:
        own_gpus = (math.floor(100 / heavy_count) / 100 if gpus else 0.0) if holds_models else 0.0
    fewest, most = resources.workers or (1, 1)
    return Group(name, stages, resources.cpus, own_gpus, fewest, most)


def _with_workers(group: Group, count: int, units: int) -> Group:
    count = max(1, min(count, units))
    return Group(group.name, group.stages, group.cpus, group.gpus, count, count)


def _resources(config: CorpusConfig, group: str) -> StageResources:
    runtime = config.runtime
    return {
        "decode": runtime.decode,
        "models": runtime.models,
        "all": runtime.models,
        "separate": runtime.separate or runtime.models,
        "score": runtime.score or runtime.models,
        "encode": runtime.encode or runtime.models,
        "write": runtime.write,
    }[group]


def _given(config: CorpusConfig) -> set[str]:
    """Groups whose worker counts the user has given."""
    names = ("decode", "models", "all", "separate", "score", "encode", "write")
    return {name for name in names if _resources(config, name).workers is not None}
