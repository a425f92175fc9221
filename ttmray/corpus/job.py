"""The corpus job from start to end: plan, resume, run, finalise. Everything but the runners works without Ray."""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from typing import Any, overload

import pyarrow.compute as pc

from ttmray import cost, runs
from ttmray.config import fingerprint_of_rows, identity
from ttmray.console import console, meter
from ttmray.corpus import index
from ttmray.corpus.catalogue import build_catalogue
from ttmray.corpus.config import CorpusConfig
from ttmray.corpus.finalise import More, finalise, summary_lines
from ttmray.corpus.plan import PLAN_FILE, PLAN_FILES, Plan, build_plan, derived_numbers, plan_difference, replaced
from ttmray.corpus.plan_lines import catalogue_lines, plan_lines
from ttmray.corpus.repair import existing_run, forget_damaged, take_back
from ttmray.corpus.track import Track
from ttmray.corpus.unit import FAILED, OK, REJECTED, Unit
from ttmray.corpus.unit_log import UnitLog
from ttmray.errors import EXIT_OK, EXIT_TOO_MANY_FAILURES, UserError
from ttmray.inventory import read_marker
from ttmray.json_text import as_read
from ttmray.models.bundle import ROLES, Bundle, means_nothing, open_bundle
from ttmray.models.protocol import SEPARATION
from ttmray.runs import SUCCESS
from ttmray.storage import Folder

ABORT_AFTER = 200
"""Once this many rows are done and more than half of them failed, the job stops: nobody wants to find in the
morning that a wrong setting failed every clip of the night."""


def score_corpus(
    config: CorpusConfig, *, plan_only: bool = False, retry_failed: bool = False, repair: bool = False
) -> int:
    """Run, or go on with, the corpus job of `config`; returns the exit code.

    What is damaged or missing is made again (`corpus/repair.py`).

    Args:
        plan_only: print and save the plan and every derived number, do nothing else.
        retry_failed: make the units with failed rows once more.
        repair: look for damage in every byte, and do the end of the run once more.

    Raises:
        UserError: for everything that the user can mend.
    """
    started = time.time()
    run = Folder.at(config.output)
    bundle = open_bundle(config.bundle)
    existing = existing_run(run, "corpus", beside=PLAN_FILES)
    plan, catalogue_digest = _plan(config, run, existing)
    if plan_only and existing is None and not index.committed_units(run):  # before the weights are here, too
        _show_plan(plan, config, run, bundle)
        return EXIT_OK
    described = _describe(config, plan, bundle, catalogue_digest)
    existing = take_back(run, described, existing)
    if existing is not None:
        _check_same(run, existing, described, plan)
        described = existing  # as it was written
    if plan_only:
        _show_plan(plan, config, run, bundle)
        return EXIT_OK
    _claim(run, described, plan)
    run.sweep_temporary()
    if bundle.note:
        console.print(bundle.note, style="yellow")
    if existing is not None:
        forget_damaged(run, plan, described["fingerprint"], repair)
    if retry_failed:
        _forget_failed(run)
    todo = not_committed(run, plan)
    if todo and max(plan.table["size"].to_pylist(), default=-1) < 0:
        raise UserError(
            f"{plan.root}: no file of the {plan.table.num_rows} tracks of {config.input} is there.",
            "Name the folder that its paths are relative to: --set catalogue.audio_root=...",
        )
    if todo or not all(run.exists(name) for name in PLAN_FILES):
        # also when the songs have moved: the saved plan says where they are
        _show_plan(plan, config, run, bundle)

    def work(units: Sequence[Unit], done: Done) -> None:
        from ttmray.corpus import pipeline, ray_runner
        from ttmray.corpus.assembly import CorpusJob

        job = CorpusJob(config.model_dump_json(), plan.root, described["protocol_id"], described["fingerprint"])
        (ray_runner.run_ray if config.runtime.runner == "ray" else pipeline.run_local)(job, units, done)

    return carry_out(run, plan, described, todo, work, config.max_failures, started)


class ToDo(Sequence[Unit]):
    """Some units of a plan, made of its rows when they are asked for: as objects they would take kilobytes each."""

    def __init__(self, plan: Plan, names: Sequence[str]) -> None:
        self._plan, self.names = plan, names

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Unit]:
        for name, tracks in self._plan.units(self.names):
            yield Unit(name, tracks)

    @overload
    def __getitem__(self, at: int) -> Unit: ...
    @overload
    def __getitem__(self, at: slice) -> "ToDo": ...
    def __getitem__(self, at: int | slice) -> "Unit | ToDo":
        if isinstance(at, slice):
            return ToDo(self._plan, self.names[at])
        return next(iter(ToDo(self._plan, [self.names[at]])))


def not_committed(run: Folder, plan: Plan) -> ToDo:
    """The units of a plan that are still to be made."""
    committed = set(index.committed_units(run))
    return ToDo(plan, [name for name in plan.unit_names() if name not in committed])


Done = Callable[[Unit], None]
Work = Callable[[Sequence[Unit], Done], None]


def carry_out(
    run: Folder,
    plan: Plan,
    described: dict[str, Any],
    todo: Sequence[Unit],
    work: Work,
    max_failures: int | str,
    started: float,
    more: More | None = None,
    way_out: str = "Mend the cause and start again with --retry-failed.",
) -> int:
    """Make what is not committed, end the run and say how it went; returns the exit code.

    Args:
        described: `run.json`.
        todo: units that are not committed.
        work: makes units, and gives each one to its second argument once it is committed.
        max_failures: rows that may fail: a count, or a share such as `1%`.
        started: time at which the launch began, as of `time.time`.
        more: see `finalise`.
        way_out: where most rows fail.

    Raises:
        UserError: most rows fail, rows and plan do not add up, or what `work` raises.
    """
    counts: Counter[str] = Counter()
    units = len(plan.unit_names())
    marker = None if todo else read_marker(run)
    if marker is None:
        with cost.account(run, since=started):
            if todo:
                _make(run, plan, todo, units, work, counts, way_out)
            summary = finalise(run, plan, described, time.time() - started, more)
    else:
        summary = marker["summary"]
        console.print(f"nothing to do: all {units} units of {run} are committed, 0 clips to process")
    summary["this_launch"] = {"clips": counts[OK], "rejected": counts[REJECTED], "failed": counts[FAILED]}
    for line in summary_lines(summary, run):
        console.print(line, markup=False)
    allowed = _failures_allowed(max_failures, summary["rows"]["total"])
    if summary["rows"][FAILED] > allowed:
        console.print(f"{summary['rows'][FAILED]} rows failed, {allowed} are allowed (max_failures)", style="red")
        return EXIT_TOO_MANY_FAILURES
    return EXIT_OK


def _make(
    run: Folder, plan: Plan, todo: Sequence[Unit], units: int, work: Work, counts: Counter[str], way_out: str
) -> None:
    """Make units, log them, and count their rows by status."""
    if len(todo) < units:
        console.print(f"resuming: {units - len(todo)} of {units} units are committed, {len(todo)} to do")
    expected = plan.expected_clips(todo.names if isinstance(todo, ToDo) else [unit.name for unit in todo])
    with UnitLog(run, time.time()) as log, meter("clips", expected) as progress:

        def done(unit: Unit) -> None:
            counts.update(row["status"] for row in unit.rows)
            log.add(unit)
            note = f"{counts[REJECTED]} rejected, {counts[FAILED]} failed"
            progress.advance(sum(row["segment"] >= 0 for row in unit.rows), note)
            cost.note()
            _stop_if_hopeless(unit, counts, way_out)

        work(todo, done)


def _plan(config: CorpusConfig, run: Folder, existing: dict[str, Any] | None) -> tuple[Plan, str]:
    """The plan: the saved one where the catalogue is unchanged (headers are then not read again)."""
    catalogue = build_catalogue(config.input, config.catalogue)
    for line, warning in catalogue_lines(catalogue.report):
        console.print(line, style="yellow" if warning else None)
    # messages name folders, and songs may move, which changes the times of files
    columns = [field.name for field in fields(Track) if field.name not in ("message", "version")]
    digest = fingerprint_of_rows([repr(getattr(track, name)) for name in columns] for track in catalogue.tracks)
    if existing is not None and run.exists(PLAN_FILE):
        saved = existing["identity"]
        if saved["catalogue"] == digest and saved["config"] == identity(config):
            try:
                plan = Plan.load(run).at(catalogue.root.uri)
                if plan.identity() != saved["plan"]:
                    raise UserError(f"{run.path(PLAN_FILE)} is the plan of another run.")
            except UserError as error:
                console.print(f"{error.message} It is made again.", style="yellow")
                return build_plan(catalogue, config), digest
            for line in replaced(plan, catalogue):
                console.print(line, style="yellow")
            return plan.with_versions([track.version for track in catalogue.tracks]), digest
    return build_plan(catalogue, config), digest


def _show_plan(plan: Plan, config: CorpusConfig, run: Folder, bundle: Bundle) -> None:
    """Save the plan with every derived number, and print what matters most of it."""
    own, asked = bundle.clip_s, config.segments.clip_s
    if own != asked and not means_nothing(bundle.name):
        console.print(
            f"WARNING: clips are to be {asked:g} s long, and bundle {bundle.name} knows clips of {own:g} s: "
            f"--set segments.clip_s={own:g} --set segments.min_s={own:g}",
            style="yellow",
        )
    numbers = derived_numbers(plan, config)
    for line in plan_lines(numbers, config, bundle.name, known_costs=bool(bundle.weights())):
        console.print(line)
    plan.save(run)
    run.write("plan.json", json.dumps({n: {"value": v, "reason": r} for n, v, r in numbers}, indent=1).encode())
    table = ["| what | value | why |", "|---|---|---|", *(f"| {n} | {v} | {r} |" for n, v, r in numbers)]
    run.write("plan.md", ("# Plan\n\n" + "\n".join(table) + "\n").encode())
    console.print(f"all {len(numbers)} numbers, with their reasons: {run.path('plan.md')}")


def _describe(config: CorpusConfig, plan: Plan, bundle: Bundle, catalogue_digest: str) -> dict[str, Any]:
    """What `run.json` holds: the identity of the run, and for people how it was made."""
    protocol = bundle.protocol(config.reward_text)
    what = {
        "config": identity(config),
        "catalogue": catalogue_digest,
        "plan": plan.identity(),
        "bundle": bundle.identity(set(ROLES) - {"backbone"}),  # a corpus needs none, and may be there before it
        "separation": SEPARATION,
        "protocol": as_read(asdict(protocol)),
    }
    if config.extra_stages:
        from ttmray.corpus.assembly import stage_classes

        what["stages"] = {stage.name: stage.version for stage in stage_classes(config) if stage.version}
    packages = ("torch", "transformers", "demucs", "ray", "numpy", "soundfile", "soxr", "pyloudnorm", "pyarrow")
    return runs.describe(
        "corpus", what, config, packages, protocol_id=f"{bundle.name}/{protocol.id()}", note=bundle.note
    )


def _claim(run: Folder, described: dict[str, Any], plan: Plan) -> None:
    """Write `run.json`, or check that what another launch wrote describes the same run."""
    if not runs.write(run, described):
        _check_same(run, runs.read(run, "corpus"), described, plan)


def _check_same(run: Folder, existing: dict[str, Any], described: dict[str, Any], plan: Plan) -> None:
    songs = []
    if existing["fingerprint"] != described["fingerprint"]:
        with suppress(UserError):  # no plan, or a damaged one: then the two hashes have to do
            songs = plan_difference(Plan.load(run), plan)
    runs.refuse_another(run, existing, described, songs, covered=("catalogue:", "plan:"))  # two hashes say little


def _forget_failed(run: Folder) -> None:
    """Delete the index files of units with failed rows (their other files are swept at the end)."""
    for rows, metadata in index.blocks(run, index.committed_units(run)):
        failed = rows.filter(pc.equal(rows["status"], FAILED))
        units = set(failed["unit"].to_pylist())
        for name in (data["name"] for data in metadata if data["name"] in units):
            run.delete(SUCCESS)
            run.delete("index.parquet")
            run.delete(f"{index.INDEX}/{name}.parquet")
            console.print(f"retrying {name}")


def _failures_allowed(bound: int | str, rows: int) -> int:
    return bound if isinstance(bound, int) else int(rows * float(bound.rstrip("%")) / 100)


def _stop_if_hopeless(unit: Unit, counts: Counter[str], way_out: str) -> None:
    total = sum(counts.values())
    if total >= ABORT_AFTER and counts[FAILED] > total / 2:
        row = next((row for row in unit.rows if row["status"] == FAILED), None)
        example = f" The last: {row['key']} in {row['stage']}: {row['message']}" if row else ""
        raise UserError(
            f"{counts[FAILED]} of {total} rows failed, so the job stopped.{example}",
            f"What was committed stays. {way_out}",
        )
