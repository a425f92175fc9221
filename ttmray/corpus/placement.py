"""Which stages share a process, and how many workers each group gets. Pure arithmetic, no Ray.

No group can keep another one from starting, also after machines have gone: processes with a GPU reserve no CPU, so
decoders use CPUs, models hold GPUs, and nobody waits for a place that the other one has. Numbers of workers are then
ranges: a pool goes on with what is left and takes what joins. Where `fuse` is `none`, several groups share the GPUs,
and their shares are fixed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from ttmray.corpus.assembly import stage_classes
from ttmray.corpus.config import CorpusConfig, StageResources
from ttmray.corpus.stage import AT_HOME, Stage, alive

DECODE_SHARE = 0.15
"""Of the CPUs that are left for CPU groups where models run on CPUs too: decoding costs far less than they do."""
DECODERS_PER_GPU = 4
"""At most: decoding and measuring cost 30 ms of CPU per clip, so 0.4 CPUs keep an RTX A5000 busy, and 2 a card of five
times its speed. The rest is for long tracks and slow storage."""
GROWTH_GPUS = 16
"""Decoders are bounded as if there were so many GPUs at least: a cluster may grow."""


@dataclass(frozen=True)
class Node:
    """A machine of the cluster. `name` is for people."""

    id: str
    name: str
    cpus: float
    gpus: float


@dataclass(frozen=True)
class Group:
    """Stages that share a process.

    Attributes:
        heavy: it holds models, and its workers live as long as the run. Others are tasks.
        cpus, gpus: that each worker reserves.
        fewest, most: workers. Of tasks there are no more than `most` at a time.
        begin: workers to start with.
    """

    name: str
    stages: tuple[str, ...]
    heavy: bool
    cpus: float
    gpus: float
    fewest: int = 1
    most: int = 1
    begin: int = 1

    @property
    def of_cards(self) -> float:
        """GPUs that a worker takes of those that there are: a process lies on one card, so two of 0.6 need two."""
        return 1 / math.floor(1 / self.gpus + 1e-6) if 0 < self.gpus < 1 else self.gpus

    def fits(self, node: Node) -> int:
        """Workers that a machine has room for."""
        ratios = [have / need for have, need in ((node.cpus, self.cpus), (node.gpus, self.of_cards)) if need]
        return int(min(ratios, default=max(node.cpus, 1.0)) + 1e-6)


def layout(config: CorpusConfig, gpus: float) -> list[tuple[str, tuple[str, ...]]]:
    """(name, stages) of every process boundary.

    All stages share one process where no worker gets a GPU, unless `fuse` is `none`: nothing then travels. Stages
    between which an array is alive that must not travel share a process.

    Args:
        gpus: of the cluster.
    """
    stages, fuse = stage_classes(config), config.runtime.fuse
    if fuse in ("auto", "models"):
        own = config.runtime.models.gpus
        fuse = "models" if (gpus if own is None else own) else "all"
    names = ["all"] * len(stages) if fuse == "all" else _resource_names(stages)
    if fuse == "models":
        names = [name if name == "decode" else "models" for name in names]
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


def place(config: CorpusConfig, nodes: Sequence[Node], units: int) -> list[Group]:
    """The groups with their workers, for the machines that there are and `units` to do. See `lacking`."""
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    groups = _groups(config, gpus)
    asked = {group.name for group in groups if _resources(config, group.name).workers is not None}
    if config.runtime.fuse == "none":
        return _fixed_shares(groups, asked, cpus, gpus, units)
    heavy = next(group for group in groups if group.heavy)
    room = sum(heavy.fits(node) for node in nodes)
    for i, group in enumerate(groups):
        begin, most = (room, units) if group.heavy else (1, DECODERS_PER_GPU * max(room, GROWTH_GPUS))
        most = max(group.fewest, min(group.most if group.name in asked else most, units))
        groups[i] = replace(group, begin=max(group.fewest, min(begin, most)), most=most)
    return groups


def lacking(groups: Sequence[Group], nodes: Sequence[Node]) -> list[Group]:
    """Groups of which not even one worker has a place; all of them where each has one, but not beside the others."""
    lonely = [group for group in groups if not any(group.fits(node) for node in nodes)]
    return lonely or ([] if _side_by_side(groups, nodes) else list(groups))


def _side_by_side(groups: Sequence[Group], nodes: Sequence[Node]) -> bool:
    """Whether one worker of each group finds a place: the largest first, and those without GPUs where none are."""
    cpus = [node.cpus for node in nodes]
    cards = [[1.0] * int(node.gpus + 1e-6) for node in nodes]
    for group in sorted(groups, key=lambda group: (group.gpus, group.cpus), reverse=True):
        for i in sorted(range(len(nodes)), key=lambda i: bool(group.gpus) != bool(cards[i])):
            least = min(group.gpus, 1.0) - 1e-6
            free = [card for card, left in enumerate(cards[i]) if left >= least][: math.ceil(group.gpus)]
            if cpus[i] >= group.cpus - 1e-6 and len(free) == math.ceil(group.gpus):
                cpus[i] -= group.cpus
                for card in free:
                    cards[i][card] -= min(group.gpus, 1.0)
                break
        else:
            return False
    return True


def needs(groups: Sequence[Group]) -> str:
    """What one worker of each group needs, in words."""
    return " and ".join(f"{group.name} needs {group.cpus:g} CPUs and {group.gpus:g} GPUs" for group in groups)


def _fixed_shares(groups: list[Group], asked: set[str], cpus: float, gpus: float, units: int) -> list[Group]:
    """Shares that never add up to more than there is: a group that could grow into the place of another one's worker
    could keep it from starting, and everything would wait."""
    needed_cpus = sum(group.cpus for group in groups if group.name not in asked)
    needed_gpus = sum(group.of_cards for group in groups if group.name not in asked)
    explicit = [group for group in groups if group.name in asked]
    spare_cpus = max(0.0, cpus - needed_cpus - sum(group.cpus * group.most for group in explicit))
    spare_gpus = max(0.0, gpus - needed_gpus - sum(group.of_cards * group.most for group in explicit))
    # Groups on GPUs first: what they can use bounds everybody else.
    for i, group in enumerate(groups):
        if group.name in asked or not group.gpus:
            continue
        more = int(spare_gpus / len([g for g in groups if g.gpus and g.name not in asked]) / group.of_cards + 1e-6)
        if group.cpus:
            more = min(more, int(spare_cpus / group.cpus + 1e-6))
        groups[i] = _with_workers(group, 1 + more, units)
        spare_cpus -= group.cpus * (groups[i].most - 1)
    free = [g for g in groups if not g.gpus and g.name != "write" and g.name not in asked and g.cpus]
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
    return math.ceil(max(sum(group.cpus * group.fewest for group in _groups(config, gpus)) for gpus in (0, 1)))


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
        own_cpus = 0.0 if own_gpus and holds_models and len(arrangement) > 1 else resources.cpus
        groups.append(Group(name, stages, holds_models, own_cpus, own_gpus, *(resources.workers or (1, 1))))
    return groups


def _with_workers(group: Group, count: int, units: int) -> Group:
    count = max(1, min(count, units))
    return replace(group, fewest=count, begin=count, most=count)


def _resources(config: CorpusConfig, group: str) -> StageResources:
    """Of a group, by the field of `runtime` that it is called by; those of `models` where that says nothing."""
    own: StageResources | None = None if group == "all" else getattr(config.runtime, group)
    return own or config.runtime.models
