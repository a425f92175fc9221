"""Stage 2 (paper III-D): fine-tune on the best of the model's own clips, mixed into the corpus; polish on them alone.

A round is a sequence of steps, each of which is skipped when it is done and goes on where it was killed: sample a pool,
filter it, fine-tune, export, polish, export. The paper has one round. The control takes the same steps without the kept
clips, in a folder of its own: what both gain is not the experts' doing.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any, Self

from pydantic import Field, model_validator

from ttmray import cost, inventory, runs
from ttmray.cluster import alone
from ttmray.config import Config, Location, execution, identity
from ttmray.console import console
from ttmray.errors import EXIT_OK, UserError
from ttmray.generation import pool
from ttmray.generation.filter import KEPT, WEIGHTED, FilterConfig, filter_pool, refuse_another_selection
from ttmray.generation.pool_worker import CandidatesConfig
from ttmray.models.weights import digest_file, weights_file
from ttmray.runs import RUN
from ttmray.storage import Folder
from ttmray.training.config import OptimizerConfig, TrainConfig
from ttmray.training.data import SourceConfig, note_of_corpora, open_mixture
from ttmray.training.export import export
from ttmray.training.launch import claim, launch, refuse_foreign
from ttmray.training.sft import SftTask

SELECTION = "selection"
"""Folder of a round: what was kept of its pool."""
KIND = "expert-iteration"
_OWN = re.compile(rf"round-\d+/(?:\w+\.safetensors|{SELECTION}/[^/]+)")
"""Files that the end lists beside `run.json`; pools and training runs have lists of their own."""
SamplePool = Callable[[str, str], None]
"""(weights file, run folder): sample a pool from the weights, or go on with one."""


class FineTuneOptimizer(OptimizerConfig):
    """AdamW with the rate of the fine-tuning."""

    lr: float = Field(1e-5, gt=0)
    """Learning rate (paper)."""
    warmup: int = Field(0, ge=0)
    """Updates of linear warm-up (public script)."""


class PolishConfig(Config):
    """The last updates, on the kept clips alone. Of all else the paper says nothing: it is as in the fine-tuning."""

    steps: int = Field(5000, ge=0)
    """Updates; 0: no polish."""
    lr: float = Field(1e-6, gt=0)
    """Constant learning rate."""


class ExpertIterationConfig(TrainConfig):
    """`jobs/expert_iteration.py` and `ttmray expert-iteration`: Stage 2. `data` is the corpus without generated clips,
    `model.init` the weights of Stage 1, `optimizer` and `steps` are those of the fine-tuning."""

    optimizer: FineTuneOptimizer = FineTuneOptimizer()
    steps: int = Field(30_000, ge=1)
    """Updates of the fine-tuning (paper)."""
    polish: PolishConfig = PolishConfig()
    rounds: int = Field(1, ge=1)
    """Rounds of sampling and training; every one trains on the clips of its own pool."""
    pool: CandidatesConfig | None = None
    """What is sampled in every round; checkpoint and output are those of the round."""
    pools: tuple[Location, ...] = execution(())
    """Finished pools of the first rounds, in place of sampling them."""
    filter: FilterConfig = FilterConfig()
    """What is kept of a pool; with a `temperature`, reward-weighted fine-tuning on all of it."""
    oversample: float = Field(5.0, gt=0)
    """Draws of a kept clip per epoch of the mixture (paper)."""
    weights: str = Field("raw", pattern=r"^(raw|ema:[0-9.]+)$")
    """Weights that go from step to step: `raw` as in the released chain, or `ema:0.05`."""
    control: bool = False
    """The same number of updates at the same rates without kept clips: both steps draw from the corpus."""

    @model_validator(mode="after")
    def _for_rounds(self) -> Self:
        if self.model.init is None:
            raise ValueError("model.init is needed: the weights of Stage 1")
        if len(self.pools) > self.rounds:
            raise ValueError(f"pools: {len(self.pools)} for {self.rounds} rounds")
        return self


def expert_iteration(
    config: ExpertIterationConfig,
    sample_pool: SamplePool | None = None,
    *,
    plan_only: bool = False,
    force: bool = False,
) -> int:
    """Stage 2 from start to end, or from where it was; returns the exit code.

    The run folder has `expert/` or `control/`, and in it `round-1/` with `pool/`, `selection/`, the training runs
    `finetune/` and `polish/`, and what they made: `finetune.safetensors`, `polish.safetensors`. `_SUCCESS.json` names
    the last of them.

    Args:
        sample_pool: makes the pools that `config.pools` does not name; default: by `config.pool`.
        plan_only: print the derived numbers of the fine-tuning and stop.
        force: go on although the config differs from the run folder's.

    Raises:
        UserError: for everything that the user can mend.
    """
    if sample_pool is None and config.pool is not None:
        sample_pool = partial(pool.sample_pool, config.pool)
    assert config.model.init is not None
    weights = config.model.init
    root = Folder.at(config.output).sub("control" if config.control else "expert")
    described = _described(config, weights)
    if plan_only:
        refuse_foreign(root, described, force)
        return launch("sft", finetuning(config, root, weights, None), SftTask, plan_only=True)
    last = "polish.safetensors" if config.polish.steps else "finetune.safetensors"
    places = [root.sub(f"round-{number}") for number in range(1, config.rounds + 1)]
    lost = {problem.name.partition("/")[0] for problem in inventory.damage(root, inventory.read_marker(root) or {})}
    done = [place.exists(last) and f"round-{number}" not in lost for number, place in enumerate(places, 1)]
    if not all(done) and not config.control:  # found now, it does not bind the folder to these settings
        to_do = done.index(False)
        parent = places[to_do - 1].path(last) if to_do else weights
        _need_pool(config, to_do + 1, places[to_do], parent, sample_pool)
    if inventory.restore_run(root, KIND, described["fingerprint"]) is not None:
        console.print(f"{root.path(RUN)} was missing or damaged and is made again", style="yellow")
    claim(root, described, force)
    if not all(done):
        inventory.reopen(root, KIND)
    with cost.account(root):
        for number, place in enumerate(places, 1):
            if done[number - 1]:
                if not config.control and not force:
                    refuse_another_selection(_pool(config, number, place).uri, place.path(SELECTION), config.filter)
                weights = place.path(last)
                continue
            console.print(f"round {number} of {config.rounds}, from {weights}", markup=False)
            experts = None if config.control else _experts(config, number, weights, place, sample_pool)
            weights = _trained(config, finetuning(config, place, weights, experts), "finetune", place, force)
            if config.polish.steps:
                weights = _trained(config, polishing(config, place, weights, experts), "polish", place, force)
        _seal(config, root, weights)
    console.print(f"Stage 2 is done: {weights}", markup=False)
    return EXIT_OK


def _seal(config: ExpertIterationConfig, root: Folder, weights: str) -> None:
    """`_SUCCESS.json`; of a run that was whole before no file is read but `run.json`, which notes the last launch."""
    files, now = inventory.promised(root, inventory.read_marker(root) or {}), inventory.entries(root, [RUN])
    if files.get(RUN) == now[RUN]:
        return
    if not files:
        files = inventory.entries(root, filter(_OWN.fullmatch, [file.name for file in root.files(sizes=False)]))
    inventory.seal(root, runs.read(root, KIND), {"steps": config.steps, "weights": weights}, files | now)


def finetuning(config: ExpertIterationConfig, place: Folder, weights: str, experts: SourceConfig | None) -> TrainConfig:
    """The run on the corpus and, `oversample` times, the kept clips."""
    sources = config.data.sources
    if experts is not None:
        sources = (*sources, experts.model_copy(update={"repeat": config.oversample}))
    return _phase(config, place.path("finetune"), weights, sources, config.optimizer, config.steps)


def polishing(config: ExpertIterationConfig, place: Folder, weights: str, experts: SourceConfig | None) -> TrainConfig:
    """The run on the kept clips alone; the control's on the corpus. Validation stays that of the corpus."""
    sources = config.data.sources
    if experts is not None:
        sources = (*(source.model_copy(update={"repeat": 0.0}) for source in sources), experts)
    optimizer = config.optimizer.model_copy(update={"lr": config.polish.lr, "warmup": 0, "schedule": "constant"})
    return _phase(config, place.path("polish"), weights, sources, optimizer, config.polish.steps)


def _phase(
    config: ExpertIterationConfig,
    output: str,
    weights: str,
    sources: tuple[SourceConfig, ...],
    optimizer: OptimizerConfig,
    steps: int,
) -> TrainConfig:
    same: dict[str, Any] = {name: getattr(config, name) for name in TrainConfig.model_fields}
    same |= {"output": output, "optimizer": optimizer, "steps": steps}
    same["model"] = config.model.model_copy(update={"init": weights})
    same["data"] = config.data.model_copy(update={"sources": sources})
    return TrainConfig(**same)


def _experts(
    config: ExpertIterationConfig, number: int, weights: str, place: Folder, sample_pool: SamplePool | None
) -> SourceConfig:
    """The kept clips of a round's pool, which is sampled and filtered now unless that is done."""
    _need_pool(config, number, place, weights, sample_pool)
    source = _pool(config, number, place)
    if number > len(config.pools) and not inventory.finished(source):
        assert sample_pool is not None
        with alone():  # threads, GPU memory and cluster of the training are those of a launch that finds its pool
            sample_pool(weights, source.uri)
    corpus = config.data.sources[0]
    selection = place.sub(SELECTION)
    filter_pool(source.uri, selection.uri, config.filter, corpus.corpus, corpus.score_column)
    keys = selection.path(KEPT if config.filter.temperature is None else WEIGHTED)
    return SourceConfig(
        corpus=source.uri, split="all", keys=keys, score_column=_pool_column(corpus, config), repeat=1.0
    )


def _pool_column(corpus: SourceConfig, config: ExpertIterationConfig) -> str | None:
    """What the model is conditioned on in the pool: the corpus's column, or where that is one of a table the column by
    which the pool is filtered. Both must have been made by one head, which opening the mixture checks."""
    column = corpus.score_column
    return config.filter.reward if column is not None and "/" in column else column


def _pool(config: ExpertIterationConfig, number: int, place: Folder) -> Folder:
    """Of a round: the one that the config names, else its own."""
    return Folder.at(config.pools[number - 1]) if number <= len(config.pools) else place.sub("pool")


def _need_pool(
    config: ExpertIterationConfig, number: int, place: Folder, weights: str, sample_pool: SamplePool | None
) -> None:
    """See that a round has a pool, or something to make it with.

    Raises:
        UserError: neither.
    """
    if number > len(config.pools) and sample_pool is None and not inventory.finished(place.sub("pool")):
        raise UserError(
            f"there is no pool for round {number}.", f"Set pool, or sample one from {weights} and name it in pools."
        )


def _trained(config: ExpertIterationConfig, phase: TrainConfig, name: str, place: Folder, force: bool) -> str:
    """Weights of a training run, which starts or goes on now unless it is done."""
    out = f"{name}.safetensors"
    if not place.exists(out):
        launch("sft", phase, SftTask, force=force)
        export(phase.output, place.path(out), config.weights)
    return place.path(out)


def _described(config: ExpertIterationConfig, weights: str) -> dict[str, Any]:
    """What `run.json` holds. Pools and the filter are described by the selections, where they may be corrected until
    there is one."""
    settings = {name: value for name, value in identity(config).items() if name != "filter"}
    init = digest_file(weights_file(weights, "model.init")).sha256
    what = {"config": settings, "data": open_mixture(config.data).fingerprint(), "init": init}
    return runs.describe(KIND, what, config, ("torch", "numpy"), note=note_of_corpora(config.data))
