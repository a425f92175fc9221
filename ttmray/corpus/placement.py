"""Which stages share a process, and how many workers each group gets. Pure arithmetic, no Ray.

Every group's share is fixed and the shares never add up to more than there is. Otherwise another group could
grow into the place of a worker that died, the dead one could not restart, and the job would wait for ever
(seen on two CPUs).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from ttmray.corpus.assembly import stage_classes
from ttmray.corpus.config import CorpusConfig, StageResources
from ttmray.corpus.stage import AT_HOME, Stage, alive
from ttmray.errors import UserError

DECODE_SHARE = 0.15
"""Of the CPUs that are left for CPU groups where models run on CPUs too: decoding costs far less than they do."""


@dataclass(frozen=True)
class Group:
    """Stages that share a process. `fewest` to `most` workers with `cpus` and `gpus` each; `heavy`: it holds models."""

    name: str
    stages: tuple[str, ...]
    heavy: bool
    cpus: float
    gpus: float
    fewest: int = 1
    most: int = 1


def layout(config: CorpusConfig, gpus: float) -> list[tuple[str, tuple[str, ...]]]:
    """(name, stages) of every process boundary.

    `fuse: auto` puts all stages in one process where there is no GPU: nothing then travels. Stages between which an
    array is alive that must not travel share a process.
    """
    stages, fuse = stage_classes(config), config.runtime.fuse
    if fuse == "auto":
        fuse = "models" if gpus else "all"
    names = ["all"] * len(stages) if fuse == "all" else _resource_names(stages)
    if fuse == "models":
        names = [name if name in ("decode", "write") else "models" for name in names]
    for position in range(len(stages) - 1, 0, -1):
        if AT_HOME & alive(stages, position):
            names[position - 1] = names[position]
    pairs = groupby(zip(names, stages, strict=True), key=lambda pair: pair[0])
    return [(name, tuple(stage.name for _, stage in members)) for name, members in pairs]


def _resource_names(stages: Sequence[type[Stage]]) -> list[str]:
    """Field of `runtime` of every stage; one without joins the next stage, or the one before where that one writes."""
    names = [stage.resources for stage in stages]
    for i in range(len(names) - 1, -1, -1):
        if not names[i]:
            before = next(name for name in reversed(names[:i]) if name)
            names[i] = before if names[i + 1] == "write" else names[i + 1]
    return names


def place(config: CorpusConfig, cpus: float, gpus: float, units: int) -> list[Group]:
    """The groups with their workers, for a cluster of `cpus` and `gpus` and `units` to do.

    Raises:
        UserError: not even one worker of each group fits.
    """
    groups = _groups(config, gpus)
    explicit = {group.name for group in groups if _resources(config, group.name).workers is not None}
    # what the user has asked for is not measured: a cluster may still have to grow to it
    needed_cpus = sum(group.cpus for group in groups if group.name not in explicit)
    needed_gpus = sum(group.gpus for group in groups if group.name not in explicit)
    if needed_cpus > cpus + 1e-6 or needed_gpus > gpus + 1e-6:
        raise UserError(
            f"The stages need {needed_cpus:g} CPUs and {needed_gpus:g} GPUs at least; Ray has {cpus:g} and {gpus:g}.",
            "Lower runtime.<stage>.cpus, gpus or workers, or set runtime.fuse=all.",
        )
    asked = [group for group in groups if group.name in explicit]
    spare_cpus = max(0.0, cpus - needed_cpus - sum(group.cpus * group.most for group in asked))
    spare_gpus = max(0.0, gpus - needed_gpus - sum(group.gpus * group.most for group in asked))
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


def gpus_held(groups: Sequence[Group], gpus: float) -> float:
    """GPUs that the groups take of the `gpus` of a cluster; of a range of workers, which grows under load, the most."""
    return min(gpus, sum(group.gpus * group.most for group in groups))


def least_cpus(config: CorpusConfig) -> int:
    """Logical CPUs that one worker of each group needs, GPU or not: what a Ray of our own must at least offer."""
    needs = [sum(group.cpus * group.fewest for group in _groups(config, gpus)) for gpus in (0, 1)]
    return math.ceil(max(needs))


def _groups(config: CorpusConfig, gpus: float) -> list[Group]:
    """The groups with the fewest workers."""
    arrangement = layout(config, gpus)
    with_models = {stage.name for stage in stage_classes(config) if stage.model_roles}
    heavy = [not with_models.isdisjoint(stages) for _, stages in arrangement]
    share = math.floor(100 / max(sum(heavy), 1)) / 100 if gpus else 0.0
    groups = []
    for (name, stages), holds_models in zip(arrangement, heavy, strict=True):
        resources = _resources(config, name)
        own_gpus = resources.gpus if resources.gpus is not None else share * holds_models
        groups.append(Group(name, stages, holds_models, resources.cpus, own_gpus, *(resources.workers or (1, 1))))
    return groups


def _with_workers(group: Group, count: int, units: int) -> Group:
    count = max(1, min(count, units))
    return replace(group, fewest=count, most=count)


def _resources(config: CorpusConfig, group: str) -> StageResources:
    """Of a group, by the field of `runtime` that it is called by; those of `models` where that says nothing."""
    own: StageResources | None = None if group == "all" else getattr(config.runtime, group)
    return own or config.runtime.models
