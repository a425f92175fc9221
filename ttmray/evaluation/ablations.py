"""The ablation job: Tables I to III and Figure 2 of the paper, and any other contrast of systems, from one config.

A *cell* is a checkpoint under one way of generating: its forward, input score, seed, post-processing and prompts, held
against one reference set. Every cell is generated and evaluated in a folder of its own, once, however many tables it
stands in; checkpoints are files, or are trained here. Steps are skipped, resumed and timed as those of
`ttmray.reproduce`; the last one writes `tables/`: Markdown, LaTeX, CSV, the figure and a page with everything.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Self, cast

from pydantic import Field, model_validator

from ttmray.chain import Step, fill, merged, run_chain
from ttmray.config import Config, execution, fingerprint, identity
from ttmray.console import console
from ttmray.errors import EXIT_OK, UserError
from ttmray.evaluation import published
from ttmray.evaluation.ablation_tables import (
    TITLES,
    Cell,
    Table,
    chain_table,
    contrast_table,
    factorial_table,
    head_table,
    page,
    read_cell,
    render_table,
    sweep_notes,
    sweep_table,
)
from ttmray.evaluation.evaluate import EvaluateConfig, evaluate
from ttmray.evaluation.measure import embedding_protocol
from ttmray.evaluation.reference import load_reference, training_digest
from ttmray.evaluation.results import read_clips, read_results
from ttmray.generation.prompts import read_prompts
from ttmray.models.bundle import BundleName, open_bundle
from ttmray.models.score_heads import Head
from ttmray.storage import Folder, absolute, local_file, read_file
from ttmray.training.config import TrainConfig, with_absolute_paths

ENDINGS = {"markdown": "md", "latex": "tex", "csv": "csv"}
PAGE = "tables/index.html"
MECHANISMS: tuple[Head, ...] = ("v1", "v2")
"""Of Table III."""
SHARED: tuple[Head, ...] = ("v1", "v2", "v4")
"""Heads with the same tensors: weights of one run in the forward of another."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class CheckpointConfig(Config):
    """Weights under a name: a file, or a training run of this job."""

    path: str | None = None
    """Weights file, such as `runs/reproduce/stage2/expert/round-1/polish.safetensors`."""
    train: dict[str, Any] | None = None
    """What differs from the section `stage1`: `{model: {head: v2}}`."""
    init: str | None = None
    """Name of the checkpoint that the training starts from."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.train is None):
            raise ValueError("needs path (a file) or train (what differs from stage1), and not both")
        if self.init is not None and self.train is None:
            raise ValueError("init is for checkpoints that are trained here")
        return self


class CellConfig(Config):
    """A checkpoint and how it generates."""

    checkpoint: str
    """Its name."""
    head: Head | None = None
    """Forward that uses its score embedding (v1, v2 and v4 share their tensors); default: its own."""
    generate: dict[str, Any] = Field(default_factory=dict)
    """What differs from the section `generate`: `{seed: 55}`, `{sampler: {score: null}}`, `{postprocess: null}`."""


class RowConfig(CellConfig):
    """A cell with a name. The paper's figures stand beside rows that have the names of the paper."""

    label: str
    baseline: bool = False
    """For the chain: stands at the top for reference, and the row after it has nothing to improve on."""


class HeadsConfig(Config):
    """Table I."""

    heads: dict[str, str]
    """Row -> checkpoint."""
    unconditional: dict[str, str] = Field(default_factory=dict)
    """Row -> checkpoint without a score."""
    scores: tuple[float, ...] = (-0.5, 0.0, 0.5, 1.0, 1.5, 2.0)
    """Input scores of Score-r. The paper's grid is not public; -0.5 and 1.5 are in it."""
    at: float = 1.5
    """Input score of the clips of FAD and CLAP score; not public either."""
    steer: tuple[float, float] = (-0.5, 1.5)
    """Input scores of delta_out (paper)."""
    prompts: str | None = None
    """File of prompts, in place of the config's: the paper has the 100 of Jamendo-100 here."""
    reference: str | None = None
    """Reference set, in place of that of `evaluate`: the paper has Jamendo-100 here."""
    generate: dict[str, Any] = Field(default_factory=dict)
    """What differs from the section `generate`: the paper has no post-processing here."""

    @model_validator(mode="after")
    def _in_grid(self) -> Self:
        missing = sorted({self.at, *self.steer} - set(self.scores))
        if missing:
            raise ValueError(f"at and steer must be among scores; {missing[0]:g} is not")
        if not self.heads:
            raise ValueError("heads: name at least one row")
        return self


class StageConfig(Config):
    """A stage of Table III: the same training with two mechanisms."""

    v1: str
    """Checkpoint."""
    v2: str
    """Checkpoint."""


class FactorialConfig(Config):
    """Table III: stages x weights x forward, and the submissions."""

    stages: dict[str, StageConfig]
    """`SFT-only` and `Chain-end`."""
    submitted: tuple[RowConfig, ...] = Field(min_length=1)
    """The first is what all others are held against (Sub.1); the paper has a second seed of it (Sub.2)."""
    hybrid: str = "Hybrid"
    """Stage of the submissions."""


class SweepConfig(Config):
    """Figure 2."""

    checkpoints: dict[str, CellConfig]
    """Name in the figure -> checkpoint."""
    scores: tuple[float, ...] = Field((0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0), min_length=2)
    """The range is the paper's, its grid is not public."""
    trained: tuple[float, float] = (0.0, 2.0)
    """Range of the training rewards (paper)."""
    deployed: float = 5.0
    """Input score of the submission: the dotted line."""


class ReferenceConfig(Config):
    """A reference set that is built here."""

    source: str
    """Folder of audio or corpus run."""
    bundle: str
    """Models."""


class AblateConfig(Config):
    """`jobs/ablate.py` and `ttmray ablate`. Sections are configs of their jobs without what is filled in here."""

    output: str = execution("runs/ablations", min_length=1)
    """Run folder: a local path or s3:// prefix."""
    bundle: BundleName = "debug"
    """Models of all steps."""
    prompts: str
    """File of the prompts of all tables but the first."""
    failed_share: float = execution(0.05, ge=0, lt=1)
    """Share of a cell's clips that may be silent or fail, and still it is finished; its tables say how many. A number
    of clips in `generate.max_failures` or `evaluate.max_failures` goes first."""
    weights: str = Field("raw", pattern=r"^(raw|ema:[0-9.]+)$")
    """Which weights of the trainings here generate."""
    references: dict[str, str] = Field(default_factory=dict)
    """Reference sets that are built here, in the run folder: name -> folder of audio or corpus run. Others are looked
    for in `evaluate.references`, the store of `ttmray reference build`."""
    stage1: dict[str, Any] | None = None
    """`train-sft`: what all trainings here have in common."""
    generate: dict[str, Any] = Field(default_factory=dict)
    """`generate`."""
    evaluate: dict[str, Any] = Field(default_factory=dict)
    """`evaluate`."""
    checkpoints: dict[str, CheckpointConfig]
    """All weights by name; an `init` must stand before what starts from it."""
    heads: HeadsConfig | None = None
    """Table I."""
    chain: tuple[RowConfig, ...] = ()
    """Table II, in order."""
    factorial: FactorialConfig | None = None
    """Table III."""
    sweep: SweepConfig | None = None
    """Figure 2."""
    contrasts: dict[str, tuple[RowConfig, ...]] = Field(default_factory=dict)
    """Other tables: each row is compared with the first one."""

    @model_validator(mode="after")
    def _names(self) -> Self:
        taken = {"heads", "chain", "factorial", "sweep", "index"} & self.contrasts.keys()
        if taken:
            raise ValueError(f"contrasts.{min(taken)}: this name is taken")
        for what, names in (("checkpoints", self.checkpoints), ("contrasts", self.contrasts)):
            odd = [name for name in names if not _NAME.fullmatch(name)]
            if odd:
                raise ValueError(f"{what}: {odd[0]!r} cannot name a folder; use letters, digits, '.', '_' and '-'")
        for what, rows in (("chain", self.chain), *self.contrasts.items()):
            labels = [row.label for row in rows]
            twice = sorted({label for label in labels if labels.count(label) > 1})
            if twice:
                raise ValueError(f"{what}: two rows are called {twice[0]}")
            if what != "chain" and len(rows) < 2:
                raise ValueError(f"contrasts.{what}: a contrast has two rows or more")
        return self


def ablate(config: AblateConfig, *, first: str | None = None, last: str | None = None, plan_only: bool = False) -> int:
    """Run, or go on with, all cells and write the tables; returns the exit code of the first step that fails, else 0.

    Args:
        first: step to start with; those before it must be done and are taken as they are.
        last: step to end with.
        plan_only: check everything, print the steps and what is done, and stop.

    Raises:
        UserError: for everything that the user can mend; all sections are checked before the first step runs.
    """
    plan = Plan(config)
    steps = plan.steps()
    return run_chain(plan.root, steps, plan.fingerprints(steps), first=first, last=last, plan_only=plan_only)


class Plan:
    """The cells of every table, and the steps that make them.

    Raises:
        UserError: unknown checkpoints, forwards that do not fit, sections that are wrong, no table at all.
    """

    def __init__(self, config: AblateConfig) -> None:
        self.config = config.model_copy(update={"prompts": absolute(config.prompts)})
        self.root = Folder.at(config.output)
        self.cells: dict[str, Step] = {}
        """Cell -> its generation, whose config says all but the reference set."""
        self.evaluations: dict[str, Step] = {}
        self.inputs: dict[str, Any] = {}
        """Step -> what its result depends on and its config does not say."""
        self.digests: dict[str, str] = {}
        """Weights file, or reference or training set -> hash."""
        self.heads: dict[str, dict[float, str]] = {}
        self.unconditional: dict[str, str] = {}
        self.chain: dict[str, str] = {}
        self.factorial: dict[tuple[str, str, str], str] = {}
        self.sweep: dict[str, dict[float, str]] = {}
        self.contrasts: dict[str, dict[str, str]] = {}
        self.trainings = [step for name in config.checkpoints for step in self._training(name)]
        self._place_cells()
        if not self.cells:
            raise UserError("no table is configured.", "Add heads, chain, factorial, sweep or contrasts.")

    def _place_cells(self) -> None:
        config = self.config
        if config.heads is not None:
            table = config.heads
            for name, checkpoint in table.unconditional.items():
                given = merged(table.generate, {"sampler": {"score": None}})
                self.unconditional[name] = self._cell("heads", checkpoint, None, given, table.prompts, table.reference)
            for name, checkpoint in table.heads.items():
                self.heads[name] = {}
                for score in table.scores:
                    given = merged(table.generate, {"sampler": {"score": score}})
                    cell = self._cell("heads", checkpoint, None, given, table.prompts, table.reference)
                    self.heads[name][score] = cell
        for row in config.chain:
            self.chain[row.label] = self._cell("chain", row.checkpoint, row.head, row.generate)
        if config.factorial is not None:
            for stage, of in config.factorial.stages.items():
                for weights, checkpoint in (("v1", of.v1), ("v2", of.v2)):
                    for head in MECHANISMS:
                        self.factorial[stage, weights, head] = self._cell("factorial", checkpoint, head, {})
            for row in config.factorial.submitted:
                key = (config.factorial.hybrid, "", row.label)
                self.factorial[key] = self._cell("factorial", row.checkpoint, row.head, row.generate)
        if config.sweep is not None:
            for name, one in config.sweep.checkpoints.items():
                self.sweep[name] = {}
                for score in sorted(set(config.sweep.scores)):
                    given = merged(one.generate, {"sampler": {"score": score}})
                    self.sweep[name][score] = self._cell("sweep", one.checkpoint, one.head, given)
        for name, rows in config.contrasts.items():
            self.contrasts[name] = {
                row.label: self._cell(f"contrasts.{name}", row.checkpoint, row.head, row.generate) for row in rows
            }

    def _training(self, name: str) -> list[Step]:
        from ttmray.training.export import export_again
        from ttmray.training.sft import train_sft

        checkpoint = self.config.checkpoints[name]
        if checkpoint.path is not None:
            try:
                local_file(absolute(checkpoint.path))
            except UserError as error:
                raise UserError(f"checkpoints.{name}: {error.message}", error.hint) from error
            return []
        after: tuple[str, ...] = ()
        links: dict[str, Any] = {"output": self.root.path(f"checkpoints/{name}")}
        if checkpoint.init is not None:
            before = list(self.config.checkpoints)
            if checkpoint.init not in before[: before.index(name)]:
                raise UserError(
                    f"checkpoints.{name}: no checkpoint {checkpoint.init} stands before it.", "Reorder them."
                )
            links["model"] = {"init": self._weights(checkpoint.init)}
            after = (f"train-{checkpoint.init}",) if self.config.checkpoints[checkpoint.init].train is not None else ()
        if self.config.stage1 is None:
            raise UserError(f"checkpoints.{name} is trained here.", "Add the section stage1.")
        given = merged(self.config.stage1, checkpoint.train or {})
        config = with_absolute_paths(fill(TrainConfig, f"checkpoints.{name}.train", given, links))
        place = f"checkpoints/{name}"
        makes = (f"{place}/_SUCCESS.json", f"{place}/weights.safetensors")
        self.inputs[f"train-{name}"] = {"weights": self.config.weights}

        def run() -> int:
            return train_sft(config) or export_again(self.root.path(place), self.config.weights)

        return [Step(f"train-{name}", config, run, makes, after)]

    def _weights(self, name: str) -> str:
        path = self.config.checkpoints[name].path
        return absolute(path) if path is not None else self.root.path(f"checkpoints/{name}/weights.safetensors")

    def _cell(
        self,
        table: str,
        checkpoint: str,
        head: Head | None,
        given: Mapping[str, Any],
        prompts: str | None = None,
        reference: str | None = None,
    ) -> str:
        """The cell's name; its two steps are planned when it is new."""
        from ttmray.generation.config import GenerateConfig
        from ttmray.generation.generate import generate

        if checkpoint not in self.config.checkpoints:
            known = ", ".join(self.config.checkpoints)
            raise UserError(f"{table}: there is no checkpoint {checkpoint!r}.", f"Checkpoints: {known}.")
        prompts = self.config.prompts if prompts is None else absolute(prompts)
        own = self._own_head(checkpoint)
        if head is not None and own is not None and head != own and not {head, own} <= set(SHARED):
            raise UserError(
                f"{table}: checkpoint {checkpoint} has the head {own}, which cannot run as {head}.",
                f"Only {', '.join(SHARED)} share their tensors.",
            )
        head = None if head == own else head
        links: dict[str, Any] = {"checkpoint": self._weights(checkpoint), "prompts": prompts, "head": head}
        links |= {"bundle": self.config.bundle}
        tolerated = {"max_failures": int(self.config.failed_share * len(read_prompts(prompts)))}
        section = merged(tolerated, merged(self.config.generate, given))
        draft = fill(GenerateConfig, f"{table}: generate", section, links)
        if own == "none" and draft.sampler.score is not None:  # nothing would read it
            draft = fill(GenerateConfig, table, merged(section, {"sampler": {"score": None}}), links)
        judged = merged(tolerated | self.config.evaluate, {} if reference is None else {"reference": reference})
        asked = judged.get("reference")
        texts = read_file(prompts).decode("utf-8", "replace")
        what = {"generate": identity(draft), "checkpoint": checkpoint, "prompts": texts, "reference": asked}
        parts = [checkpoint, head or "", "" if draft.sampler.score is None else f"s{draft.sampler.score:g}"]
        name = "-".join([*filter(None, parts), fingerprint(what)[:8]])
        if name in self.cells:
            return name
        place, trained = f"cells/{name}/clips", self.config.checkpoints[checkpoint].train is not None
        clips = draft.model_copy(update={"output": self.root.path(place)})
        after = (f"train-{checkpoint}",) if trained else ()
        made = (f"{place}/manifest.parquet",)
        run = partial(generate, clips, play_page=True)
        self.cells[name] = Step(f"generate-{name}", clips, run, made, after, page=f"{place}/index.html")
        self.inputs[f"generate-{name}"] = {"prompts": texts, "weights": self._digest(checkpoint)}
        links = {"output": self.root.path(f"cells/{name}/evaluation"), "bundle": self.config.bundle, "prompts": prompts}
        links |= {"folders": [f"{name}={self.root.path(place)}"]}
        needs = [f"generate-{name}"]
        if asked in self.config.references:
            links["references"] = self.root.path("references")
            judged = {key: value for key, value in judged.items() if key != "references"}
            needs.append(f"reference-{asked}")
        evaluation = fill(EvaluateConfig, f"{table}: evaluate", judged, links)
        made = (f"cells/{name}/evaluation/_SUCCESS.json",)
        self.evaluations[name] = Step(f"evaluate-{name}", evaluation, partial(evaluate, evaluation), made, tuple(needs))
        against = self._sets(evaluation, asked in self.config.references)
        self.inputs[f"evaluate-{name}"] = {"prompts": texts, **against}
        return name

    def _sets(self, evaluation: EvaluateConfig, built_here: bool) -> dict[str, str]:
        """Hashes of the reference and training set of an evaluation; one that is built here is a step's result.

        Raises:
            UserError: one is not there, or was made with other models.
        """
        found = {}
        for what, address in (("reference", evaluation.reference), ("training", evaluation.training)):
            if address is None or (built_here and address in self.config.references):
                continue
            key = f"{what} {address} in {evaluation.references}"
            if key not in self.digests:
                bundle = open_bundle(evaluation.bundle)
                protocol = embedding_protocol(bundle.name, bundle.protocol("empty"))
                if what == "reference":
                    stem = evaluation.reference_stem
                    self.digests[key] = load_reference(address, evaluation.references, protocol, stem).digest()
                else:
                    self.digests[key] = training_digest(address, evaluation.references, protocol)
            found[what] = self.digests[key]
        return found

    def _own_head(self, checkpoint: str) -> Head | None:
        """The head that a checkpoint was trained with; None for a file that does not say it."""
        from ttmray.models.backbone_weights import read_config

        path = self.config.checkpoints[checkpoint].path
        if path is not None:
            return cast(Head | None, read_config(local_file(absolute(path))).get("head"))
        training = next(step.config for step in self.trainings if step.name == f"train-{checkpoint}")
        assert isinstance(training, TrainConfig)
        return training.model.head

    def _digest(self, checkpoint: str) -> str | None:
        """Hash of a weights file; what is trained here has the fingerprint of its step."""
        from ttmray.models.weights import digest_file

        path = self.config.checkpoints[checkpoint].path
        if path is not None and path not in self.digests:
            self.digests[path] = digest_file(local_file(absolute(path))).sha256
        return None if path is None else self.digests[path]

    def steps(self) -> list[Step]:
        """All steps in order: reference sets, trainings, cells, tables."""
        from ttmray.evaluation.reference import build_reference

        used = dict.fromkeys(name for step in self.evaluations.values() for name in step.after)
        store = self.root.path("references")
        steps = []
        for name, source in self.config.references.items():
            if f"reference-{name}" in used:
                config = ReferenceConfig(source=absolute(source), bundle=self.config.bundle)
                run = partial(build_reference, name, config.source, store=store, bundle=config.bundle)
                steps.append(Step(f"reference-{name}", config, run, (f"references/{name}/reference.json",)))
        steps += self.trainings
        for name, step in self.cells.items():
            steps += [step, self.evaluations[name]]
        made = ["cells.json", PAGE, *(f"tables/{name}.md" for name in self._tables())]
        after = tuple(step.name for step in self.evaluations.values())
        return [*steps, Step("tables", self.config, self.write, tuple(made), after, page=PAGE)]

    def _tables(self) -> list[str]:
        fixed = {"heads": self.heads, "chain": self.chain, "factorial": self.factorial, "sweep": self.sweep}
        return [*(name for name, cells in fixed.items() if cells), *self.contrasts]

    def fingerprints(self, steps: Sequence[Step]) -> dict[str, str]:
        """What a step was finished with: its config, its files, and the same of the steps that it takes from."""
        prints: dict[str, str] = {}
        for step in steps:
            after = [prints[name] for name in step.after]
            what = {"config": identity(step.config), "inputs": self.inputs.get(step.name), "after": after}
            prints[step.name] = fingerprint(what)
        return prints

    def write(self) -> int:
        """All tables, the figure and the page, from the evaluations of the cells."""
        debug = self.config.bundle.startswith("debug")
        cells = {name: self._read(name) for name in self.cells}
        tables = []
        if self.config.heads is not None:
            heads = {name: {s: cells[one] for s, one in row.items()} for name, row in self.heads.items()}
            alone = {name: cells[one] for name, one in self.unconditional.items()}
            tables.append(head_table(heads, alone, self.config.heads.at, self.config.heads.steer))
        if self.chain:
            baselines = [row.label for row in self.config.chain if row.baseline]
            rows = {name: cells[one] for name, one in self.chain.items()}
            tables.append(chain_table(rows, baselines, published.CHAIN))
        if self.config.factorial is not None:
            submitted = (self.config.factorial.hybrid, "", self.config.factorial.submitted[0].label)
            crossed = {key: cells[one] for key, one in self.factorial.items()}
            tables.append(factorial_table(crossed, submitted, published.FACTORIAL))
        if self.config.sweep is not None:
            tables.append(self._write_sweep(cells, self.config.sweep))
        for name, row in self.contrasts.items():
            contrast = {label: cells[one] for label, one in row.items()}
            tables.append(contrast_table(name, contrast, published.CONTRASTS))
        for table in tables:
            console.print(render_table(table, "markdown"), markup=False)
            for format, ending in ENDINGS.items():
                self.root.write(f"tables/{table.name}.{ending}", render_table(table, format).encode())  # type: ignore[arg-type]
        self.root.write("cells.json", json.dumps(self._cells_of_tables(), indent=1).encode())
        note = "The debug bundle's models are tiny and untrained: these numbers mean nothing." if debug else ""
        figures = [self.root.read(f"figures/{name}.svg").decode() for name in ("sweep", "sweep-dark") if self.sweep]
        protocols = sorted({cell.protocol for cell in cells.values()})
        self.root.write(PAGE, page(tables, figures, protocols, note).encode())
        return EXIT_OK

    def _read(self, name: str) -> Cell:
        folder = self.root.sub(f"cells/{name}/evaluation")
        results = read_results(folder)
        return read_cell(results, read_clips(folder, results))

    def _write_sweep(self, cells: Mapping[str, Cell], config: SweepConfig) -> Table:
        from ttmray.evaluation.plots import require_matplotlib, score_sweep

        require_matplotlib()
        curves = {name: {s: cells[one] for s, one in row.items()} for name, row in self.sweep.items()}
        table = sweep_table(curves, published.SWEEP, sweep_notes(curves, config.trained))
        points = {
            name: [
                (float(score), {metric: (one.value, one.low, one.high) for metric, one in values.items()})
                for (curve, score), values in table.rows
                if curve == name
            ]
            for name in curves
        }
        panels = {metric: TITLES[metric] for metric in ("reward", "fad")}
        draw = partial(score_sweep, points, panels, config.deployed)
        self.root.write("figures/sweep.png", draw("light", "png"))
        self.root.write("figures/sweep.svg", draw("light"))
        self.root.write("figures/sweep-dark.svg", draw("dark"))
        return table

    def _cells_of_tables(self) -> dict[str, Any]:
        """Where the clips and results of every row lie, below `cells/`."""
        factorial = {" ".join(part for part in key if part): cell for key, cell in self.factorial.items()}
        heads = {name: {f"{s:g}": cell for s, cell in row.items()} for name, row in self.heads.items()}
        sweep = {name: {f"{s:g}": cell for s, cell in row.items()} for name, row in self.sweep.items()}
        found: dict[str, Any] = {"heads": heads | self.unconditional, "chain": self.chain, "factorial": factorial}
        found |= {"sweep": sweep, **self.contrasts}
        return {name: cells for name, cells in found.items() if cells}
