"""The ablation job: Tables I to III and Figure 2 of the paper, and any other contrast of systems, from one config.

A *cell* is a checkpoint under one way of generating: its forward, input score, seed, post-processing and prompts, held
against one reference set; or clips of another program. Every cell is generated and evaluated in a folder of its own,
once, however many tables it stands in; checkpoints are files, or are trained here. Steps are skipped, resumed and timed
as those of `ttmray.recipes.reproduce`; the last one writes `tables/`: Markdown, LaTeX, CSV, the figure and a page with
everything.
"""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from hashlib import sha256
from typing import Any, cast

from ttmray.config import Config, added, fingerprint, identity
from ttmray.console import console
from ttmray.errors import EXIT_OK, UserError
from ttmray.evaluation.config import EvaluateConfig
from ttmray.evaluation.evaluate import evaluate
from ttmray.evaluation.reference import known_protocol, load_reference, reference_there, training_digest, training_there
from ttmray.evaluation.results import read_clips, read_results
from ttmray.evaluation.systems import audio_files
from ttmray.generation.prompts import read_prompts
from ttmray.models.bundle import means_nothing
from ttmray.models.cross_load import SHARED, cross_load
from ttmray.models.score_heads import Head
from ttmray.presets import shipped
from ttmray.recipes import published
from ttmray.recipes.ablation_config import AblateConfig, CellConfig, SweepConfig
from ttmray.recipes.ablation_pages import STORED, page, render_table, stored
from ttmray.recipes.ablation_tables import (
    TITLES,
    Cell,
    CellTable,
    chain_table,
    contrast_table,
    factorial_table,
    head_table,
    read_cell,
    sweep_table,
)
from ttmray.recipes.chain import fill, merged, run_chain
from ttmray.recipes.chain_plan import Step
from ttmray.recipes.needs import (
    Need,
    clips_there,
    needs_of,
    plots,
    problem,
    sources_of_reference,
    text_if_there,
    weights_file_there,
)
from ttmray.recipes.sweep import readings, sweep_notes
from ttmray.storage import Folder, absolute, local_file, name_problem
from ttmray.training.config import TrainConfig

ENDINGS = {"markdown": "md", "latex": "tex", "csv": "csv"}
PAGE = "tables/index.html"
MEANINGLESS_CELLS = "The debug bundle's models are tiny and untrained: these numbers mean nothing."
MECHANISMS: tuple[Head, ...] = ("v1", "v2")
"""Of Table III."""


class TableReferenceConfig(Config):
    """A reference set that is built here."""

    source: str
    """Folder of audio or corpus run."""
    bundle: str
    """Models."""
    stem: str | None = added(None)
    """What it is of: that which the evaluations ask for; null: what `ttmray reference build` takes by itself."""


def ablate(config: AblateConfig, *, first: str | None = None, last: str | None = None, plan_only: bool = False) -> int:
    """Run, or go on with, all cells and write the tables; returns the exit code of the first step that fails, else 0.

    Args:
        first: step to start with; those before it must be done and are taken as they are.
        last: step to end with.
        plan_only: check everything, print the steps and what is done, and stop.

    Raises:
        UserError: for everything that the user can mend; all sections, and everything that a step to do needs from
            outside of the run folder, are checked before the first step runs.
    """
    plan = AblationPlan(config)
    steps = plan.steps()
    return run_chain(plan.root, steps, plan.fingerprints(steps), first=first, last=last, plan_only=plan_only)


class AblationPlan:
    """The cells of every table, and the steps that make them.

    Raises:
        UserError: unknown checkpoints, forwards that do not fit, sections that are wrong, no table at all.
    """

    def __init__(self, config: AblateConfig) -> None:
        self.config = config.model_copy(update={"prompts": absolute(shipped(config.prompts))})
        self.root = Folder.at(config.output)
        self.cells: dict[str, Step] = {}
        """Cell -> its generation, whose config says all but the reference set; cells of finished clips have none."""
        self.evaluations: dict[str, Step] = {}
        """Every cell -> its evaluation."""
        self.inputs: dict[str, Any] = {}
        """Step -> what its result depends on and its config does not say."""
        self.digests: dict[str, str | None] = {}
        """Weights file, or reference or training set -> hash."""
        self.files: dict[str, bool] = {}
        """Weights file -> whether it is there."""
        self.prompts: dict[str, str] = {}
        """File of prompts -> what it holds."""
        self.heads: dict[str, dict[float, str]] = {}
        self.unconditional: dict[str, str] = {}
        self.chain: dict[str, str] = {}
        self.factorial: dict[tuple[str, str, str], str] = {}
        self.sweep: dict[str, dict[float, str]] = {}
        self.contrasts: dict[str, dict[str, str]] = {}
        self.trainings: list[Step] = []
        for name in config.checkpoints:
            self.trainings += self._training(name)
        self._place_cells()
        if not self.evaluations:
            raise UserError("no table is configured.", "Add heads, chain, factorial, sweep or contrasts.")

    def _place_cells(self) -> None:
        config = self.config
        if config.heads is not None:
            table = config.heads
            for name, checkpoint in table.unconditional.items():
                settings = merged(table.generate, {"sampler": {"score": None}})
                self.unconditional[name] = self._cell(
                    "heads", checkpoint, None, settings, table.prompts, table.reference
                )
            for name, checkpoint in table.heads.items():
                self.heads[name] = {}
                for score in table.scores:
                    settings = merged(table.generate, {"sampler": {"score": score}})
                    cell = self._cell("heads", checkpoint, None, settings, table.prompts, table.reference)
                    self.heads[name][score] = cell
        for row in config.chain:
            self.chain[row.label] = self._row("chain", row)
        if config.factorial is not None:
            for stage, of in config.factorial.stages.items():
                for weights, source in (("v1", of.v1), ("v2", of.v2)):
                    if source is None:
                        continue
                    for head in MECHANISMS:
                        collapses = {"force_head": True}  # v2 weights under v1 are two of its cells
                        self.factorial[stage, weights, head] = self._cell("factorial", source, head, collapses)
            for row in config.factorial.submitted:
                key = (config.factorial.hybrid, "", row.label)
                self.factorial[key] = self._row("factorial", row)
        if config.sweep is not None:
            for name, one in config.sweep.checkpoints.items():
                self.sweep[name] = {}
                for score in sorted(set(config.sweep.scores)):
                    settings = merged(one.generate, {"sampler": {"score": score}})
                    self.sweep[name][score] = self._cell("sweep", one.checkpoint or "", one.head, settings)
        for name, rows in config.contrasts.items():
            self.contrasts[name] = {row.label: self._row(f"contrasts.{name}", row) for row in rows}

    def _row(self, table: str, row: CellConfig) -> str:
        if row.clips is not None:
            return self._finished_cell(table, absolute(row.clips))
        return self._cell(table, row.checkpoint or "", row.head, row.generate)

    def _training(self, name: str) -> list[Step]:
        from ttmray.training.export import export_again
        from ttmray.training.sft import train_sft

        checkpoint = self.config.checkpoints[name]
        if checkpoint.path is not None:
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
        section = merged(self.config.stage1, checkpoint.train or {})
        config = fill(TrainConfig, f"checkpoints.{name}.train", section, links)
        if checkpoint.init is not None and (own := self._own_head(checkpoint.init)) is not None:
            cross_load(own, config.model.head, f"checkpoints.{name}: {checkpoint.init}", force=config.model.force_head)
        place = f"checkpoints/{name}"
        makes = (f"{place}/_SUCCESS.json", f"{place}/weights.safetensors")
        self.inputs[f"train-{name}"] = {"weights": self.config.weights}

        def run() -> int:
            return train_sft(config) or export_again(self.root.path(place), self.config.weights)

        sources = ((checkpoint.train or {}).get("data") or {}).get("sources") or []
        own_corpus = any("corpus" in source for source in sources)  # else it stands in the section that all have
        needs = needs_of(f"checkpoints.{name}.train" if own_corpus else "stage1", config, self.root)
        return [Step(f"train-{name}", config, run, makes, after, needs=needs)]

    def _weights(self, name: str) -> str:
        path = self.config.checkpoints[name].path
        return absolute(path) if path is not None else self.root.path(f"checkpoints/{name}/weights.safetensors")

    def _cell(
        self,
        table: str,
        checkpoint: str,
        head: Head | None,
        settings: Mapping[str, Any],
        prompts: str | None = None,
        reference: str | None = None,
    ) -> str:
        """The cell's name; its two steps are planned when it is new."""
        from ttmray.generation.config import GenerateConfig
        from ttmray.generation.generate import generate

        if checkpoint not in self.config.checkpoints:
            known = ", ".join(self.config.checkpoints)
            raise UserError(f"{table}: there is no checkpoint {checkpoint!r}.", f"Checkpoints: {known}.")
        prompts = self.config.prompts if prompts is None else absolute(shipped(prompts))
        own = self._own_head(checkpoint)
        if head is not None and own is not None and head != own and not {head, own} <= set(SHARED):
            raise UserError(
                f"{table}: checkpoint {checkpoint} has the head {own}, which cannot run as {head}.",
                f"Only {', '.join(SHARED)} share their tensors.",
            )
        if head is not None and own is not None:
            force = bool(merged(self.config.generate, settings).get("force_head"))
            cross_load(own, head, f"{table}: checkpoint {checkpoint}", force=force)
        head = None if head == own else head
        links: dict[str, Any] = {"checkpoint": self._weights(checkpoint), "prompts": prompts, "head": head}
        links |= {"bundle": self.config.bundle}
        section = merged(self._tolerated(prompts), merged(self.config.generate, settings))
        draft = fill(GenerateConfig, f"{table}: generate", section, links)
        if own == "none" and draft.sampler.score is not None:  # nothing would read it
            draft = fill(GenerateConfig, table, merged(section, {"sampler": {"score": None}}), links)
        asked = reference or self.config.evaluate.get("reference")
        texts = self._texts(prompts)
        what = {"generate": identity(draft), "checkpoint": checkpoint, "prompts": texts, "reference": asked}
        parts = [checkpoint, head or "", "" if draft.sampler.score is None else f"s{draft.sampler.score:g}"]
        name = "-".join([*filter(None, parts), fingerprint(what)[:8]])
        if name in self.evaluations:
            return name
        place, trained = f"cells/{name}/clips", self.config.checkpoints[checkpoint].train is not None
        clips = draft.model_copy(update={"output": self.root.path(place)})
        after = (f"train-{checkpoint}",) if trained else ()
        files = (f"{place}/manifest.parquet",)
        run = partial(generate, clips)
        needs = needs_of("generate", clips, self.root, weights_field=f"checkpoints.{checkpoint}.path")
        page = f"{place}/index.html"
        self.cells[name] = Step(f"generate-{name}", clips, run, files, after, page=page, needs=needs)
        self.inputs[f"generate-{name}"] = {"prompts": texts, "weights": self._digest(checkpoint)}
        self._evaluation(table, name, self.root.path(place), prompts, reference, (f"generate-{name}",))
        return name

    def _finished_cell(self, table: str, folder: str) -> str:
        """The name of a cell whose clips are there already; it has no generation."""
        prompts = self.config.prompts
        what = {"folder": folder, "prompts": self._texts(prompts), "reference": self.config.evaluate.get("reference")}
        name = f"clips-{fingerprint(what)[:8]}"
        if name not in self.evaluations:
            self._evaluation(table, name, folder, prompts, None, ())
            self.inputs[f"evaluate-{name}"]["clips"] = _digests_of_clips(folder, prompts)
        return name

    def _evaluation(
        self, table: str, name: str, clips: str, prompts: str, reference: str | None, after: tuple[str, ...]
    ) -> None:
        """Plan the evaluation of a cell against a reference set, default that of the config."""
        judged = self._tolerated(prompts) | self.config.evaluate
        judged |= {} if reference is None else {"reference": reference}
        asked = judged.get("reference")
        links: dict[str, Any] = {"output": self.root.path(f"cells/{name}/evaluation"), "folders": [f"{name}={clips}"]}
        links |= {"bundle": self.config.bundle, "prompts": prompts}
        if asked in self.config.references:
            links["references"] = self.root.path("references")
            judged = {key: value for key, value in judged.items() if key != "references"}
            after = (*after, f"reference-{asked}")
        evaluation = fill(EvaluateConfig, f"{table}: evaluate", judged, links)
        files = (f"cells/{name}/evaluation/_SUCCESS.json",)
        needs = needs_of("evaluate", evaluation, self.root)
        run = partial(evaluate, evaluation)
        self.evaluations[name] = Step(f"evaluate-{name}", evaluation, run, files, after, needs=needs)
        against = self._sets(evaluation, asked in self.config.references)
        self.inputs[f"evaluate-{name}"] = {"prompts": self._texts(prompts), **against}

    def _texts(self, prompts: str) -> str:
        """What a file of prompts holds; nothing where it is missing, which its steps need and say."""
        if prompts not in self.prompts:
            self.prompts[prompts] = text_if_there(prompts) or ""
        return self.prompts[prompts]

    def _tolerated(self, prompts: str) -> dict[str, int]:
        usable = problem(Need(read_prompts, (prompts,))) is None
        return {"max_failures": int(self.config.failed_share * len(read_prompts(prompts))) if usable else 0}

    def _sets(self, evaluation: EvaluateConfig, built_here: bool) -> dict[str, str]:
        """Hashes of the reference and training set of an evaluation, of those that are there: a reference that is
        built here is a step's result, others are needs of the evaluation."""
        digests = {}
        for what, address in (("reference", evaluation.reference), ("training", evaluation.training)):
            if address is None or (built_here and address in self.config.references):
                continue
            key = f"{what} {address} in {evaluation.references}"
            if key not in self.digests:
                self.digests[key] = _digest_of_set(what, address, evaluation)
            if (digest := self.digests[key]) is not None:
                digests[what] = digest
        return digests

    def _own_head(self, checkpoint: str) -> Head | None:
        """The head that a checkpoint was trained with; None for a file that does not say it, or is not there."""
        from ttmray.models.backbone_weights import read_config

        path = self.config.checkpoints[checkpoint].path
        if path is not None:
            there = self._is_there(path)
            return cast(Head | None, read_config(local_file(absolute(path))).get("head")) if there else None
        training = next(step.config for step in self.trainings if step.name == f"train-{checkpoint}")
        assert isinstance(training, TrainConfig)
        return training.model.head

    def _is_there(self, path: str) -> bool:
        if path not in self.files:
            self.files[path] = problem(Need(weights_file_there, (path,))) is None
        return self.files[path]

    def _digest(self, checkpoint: str) -> str | None:
        """Hash of a weights file that is there; what is trained here has the fingerprint of its step."""
        from ttmray.models.weights import digest_file

        path = self.config.checkpoints[checkpoint].path
        if path is None or not self._is_there(path):
            return None
        if path not in self.digests:
            self.digests[path] = digest_file(local_file(absolute(path))).sha256
        return self.digests[path]

    def steps(self) -> list[Step]:
        """All steps in order: reference sets, trainings, cells, tables."""
        from ttmray.evaluation.reference import build_reference

        used = dict.fromkeys(name for step in self.evaluations.values() for name in step.after)
        store = self.root.path("references")
        steps = []
        for name, source in self.config.references.items():
            if f"reference-{name}" in used:
                stem = self.config.evaluate.get("reference_stem")
                config = TableReferenceConfig(source=absolute(source), bundle=self.config.bundle, stem=stem)
                run = partial(build_reference, name, config.source, store=store, bundle=config.bundle, stem=stem)
                files = (f"references/{name}/reference.json",)
                needs = sources_of_reference(f"references.{name}", config.source, config.bundle, stem)
                steps.append(Step(f"reference-{name}", config, run, files, needs=needs))
        steps += self.trainings
        for name, step in self.evaluations.items():
            steps += [self.cells[name], step] if name in self.cells else [step]
        tables = ["cells.json", STORED, PAGE, *(f"tables/{name}.md" for name in self._tables())]
        after = tuple(step.name for step in self.evaluations.values())
        needs = (plots(),) if self.sweep else ()
        return [*steps, Step("tables", self.config, self.write, tuple(tables), after, page=PAGE, needs=needs)]

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
        cells = {name: self._read(name) for name in self.evaluations}
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
        note = MEANINGLESS_CELLS if means_nothing(self.config.bundle) else ""
        tables = [table.unmarked(note) if note else table for table in tables]
        for table in tables:
            console.print(render_table(table, "markdown"), markup=False)
            for format, ending in ENDINGS.items():
                self.root.write(f"tables/{table.name}.{ending}", render_table(table, format).encode())  # type: ignore[arg-type]
        self.root.write("cells.json", json.dumps(self._cells_of_tables(), indent=1).encode())
        self.root.write(STORED, stored(tables))
        figures = [self.root.read(f"figures/{name}.svg").decode() for name in ("sweep", "sweep-dark") if self.sweep]
        protocols = sorted({cell.protocol for cell in cells.values()})
        self.root.write(PAGE, page(tables, figures, protocols, note).encode())
        return EXIT_OK

    def _read(self, name: str) -> Cell:
        folder = self.root.sub(f"cells/{name}/evaluation")
        results = read_results(folder)
        return read_cell(results, read_clips(folder, results))

    def _write_sweep(self, cells: Mapping[str, Cell], config: SweepConfig) -> CellTable:
        from ttmray.evaluation.plots import require_matplotlib, score_sweep

        require_matplotlib()
        curves = {name: {s: cells[one] for s, one in row.items()} for name, row in self.sweep.items()}
        notes = (*sweep_notes(curves, config.trained), *readings(curves, self._crossed(config), config.trained))
        table = sweep_table(curves, published.SWEEP, notes)
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

    def _crossed(self, config: SweepConfig) -> dict[str, str]:
        """Curves in another forward -> curves of the same weights in their own."""
        own: dict[str, str] = {}
        others: dict[str, str] = {}
        for name, one in config.checkpoints.items():
            checkpoint = one.checkpoint or ""
            if one.head in (None, self._own_head(checkpoint)):
                own.setdefault(checkpoint, name)
            else:
                others[name] = checkpoint
        return {name: own[checkpoint] for name, checkpoint in others.items() if checkpoint in own}

    def _cells_of_tables(self) -> dict[str, Any]:
        """Where the clips and results of every row lie, below `cells/`."""
        factorial = {" ".join(part for part in key if part): cell for key, cell in self.factorial.items()}
        heads = {name: {f"{s:g}": cell for s, cell in row.items()} for name, row in self.heads.items()}
        sweep = {name: {f"{s:g}": cell for s, cell in row.items()} for name, row in self.sweep.items()}
        tables: dict[str, Any] = {"heads": heads | self.unconditional, "chain": self.chain, "factorial": factorial}
        tables |= {"sweep": sweep, **self.contrasts}
        return {name: cells for name, cells in tables.items() if cells}


def _digest_of_set(what: str, address: str, evaluation: EvaluateConfig) -> str | None:
    """Hash of a reference or training set; None where it, or the weights that its protocol is of, are not there."""
    protocol = known_protocol(evaluation.bundle, evaluation.reward_text)
    if protocol is None:
        return None
    check = reference_there if what == "reference" else training_there
    asked: tuple[Any, ...] = (address, evaluation.references, evaluation.bundle, evaluation.reward_text)
    asked += (evaluation.reference_stem,) if what == "reference" else ()
    if problem(Need(check, asked)) is not None:
        return None
    if what == "reference":
        return load_reference(address, evaluation.references, protocol, evaluation.reference_stem).digest()
    return training_digest(address, evaluation.references, protocol)


def _digests_of_clips(folder: str, prompts: str) -> dict[str, str]:
    """Name -> hash of the clips of a folder; empty where they are no use, which their evaluation says."""
    if problem(Need(clips_there, (folder, prompts))) is not None:
        return {}
    names = [name for name in audio_files(Folder(folder)) if not name_problem(name)]
    return {name: sha256(Folder(folder).read(name)).hexdigest() for name in names}
