"""The evaluation job: folders of audio in; metrics with N, protocol and interval, and paired statistics out.

The output folder holds `results.json`, `clips.parquet` (a row per clip that a system owes), `embeddings.safetensors`
(`clap`, row i of clips.parquet, NaN where there is none), `parts/` and `judge/` (what is done, see `measure` and
`judge`), and `_SUCCESS.json`, written last. The same command goes on where it stopped.
"""

import io
import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save as save_tensors

from ttmray import __version__, cost, inventory, runs
from ttmray.config import fingerprint, identity
from ttmray.console import console
from ttmray.errors import EXIT_OK, EXIT_TOO_MANY_FAILURES, UserError
from ttmray.evaluation.clip_metrics import clip_functions, columns_of
from ttmray.evaluation.compare import (
    COMPARED,
    ClipScore,
    comparisons,
    legend,
    plain,
    show,
    show_pairs,
    system_table,
    without_marks,
)
from ttmray.evaluation.config import EvaluateConfig
from ttmray.evaluation.described import LEVELS, SETS, described_systems
from ttmray.evaluation.judge import check_judge, judge
from ttmray.evaluation.measure import FACTS, FAILED, OK, PARTS, embedding_protocol, measure
from ttmray.evaluation.metrics import Leaks, find_leaks
from ttmray.evaluation.reference import Embedded, load_reference, load_training
from ttmray.evaluation.results import CLIPS, RESULTS, Results
from ttmray.evaluation.systems import SystemFolder, find_systems
from ttmray.evaluation.warnings import (
    few_prompts,
    file_warnings,
    judge_warnings,
    merged_warnings,
    unjudged,
    without_reference,
)
from ttmray.generation.prompts import Prompt, given_prompts, read_prompts
from ttmray.models.bundle import means_nothing, open_bundle
from ttmray.models.plans import embedding_flops, show_plan, weights_rows
from ttmray.models.scoring import Scorer
from ttmray.plugins import function_named
from ttmray.runs import RUN, SUCCESS
from ttmray.storage import Folder

EMBEDDINGS = "embeddings.safetensors"
KIND = "evaluation"
SCHEMA = pa.schema(
    [
        ("system", pa.string()),
        ("prompt_id", pa.string()),
        ("sample", pa.int32()),
        ("prompt", pa.string()),
        ("path", pa.string()),
        *FACTS,
        ("ccs", pa.float64()),
    ]
)


def evaluate(config: EvaluateConfig, *, plan_only: bool = False) -> int:
    """Evaluate, or go on evaluating, the folders of `config`; returns the exit code.

    Args:
        plan_only: say what would be done, and stop.

    Raises:
        UserError: for everything that the user can mend; wrong input is found before any model runs.
    """
    if plan_only:
        return _show_plan(config)
    results, rows = evaluate_run(config)
    return _report(Folder.at(config.output), results, rows, config)


def evaluate_run(
    config: EvaluateConfig, prompts: Sequence[Prompt] | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The same up to the end of the output folder: what is written into `results.json` and `clips.parquet`.

    Args:
        prompts: those of the config, where they have ids of their own; default: as the config says.

    Raises:
        UserError: as `evaluate`.
    """
    started = time.perf_counter()
    prompts = _prompts(config) if prompts is None else prompts
    systems = find_systems(config.folders, prompts)
    _check_names(config, systems)
    bundle = open_bundle(config.bundle)
    protocol = bundle.protocol(config.reward_text)
    audio_protocol = embedding_protocol(bundle.name, protocol)
    reference = training = None
    if config.reference is not None:
        reference = load_reference(config.reference, config.references, audio_protocol, config.reference_stem)
    if config.training is not None:
        training = load_training(config.training, config.references, audio_protocol)
    if config.judge is not None:
        check_judge(config.judge, [prompt.id for prompt in prompts])
    out = Folder.at(config.output)
    _claim(out, bundle.note)
    if bundle.note:
        console.print(bundle.note, style="yellow")
    with cost.account(out):
        rows, claps, extra, seconds = _clip_rows(systems, config, out)
        warnings = [warning for system in systems for warning in system.warnings] + file_warnings(rows, bundle.clip_s)
        warnings += judge_warnings(rows) if config.judge else []
        leaks, grave, leak_warnings = _leaks(reference, training, config.near_duplicate)
        described, metric_warnings = described_systems(systems, rows, claps, config, bundle, reference, training, extra)
        cells, pair_warnings = comparisons(_compared(rows), config.baseline, config.alpha, config.seed)
        cells = without_marks(cells) if means_nothing(bundle.name) else cells
        grave += few_prompts(described)
        warnings += (without_reference() if reference is None else []) + leak_warnings + metric_warnings + pair_warnings
        names = [system.name for system in systems]
        grave = merged_warnings(grave, names)
        warnings = list(dict.fromkeys([*grave, *merged_warnings(warnings, names)]))
        results = {
            "kind": KIND,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "version": __version__,
            "protocol": f"{bundle.name}/{protocol.id()}",
            "embedding_protocol": audio_protocol,
            "bundle": bundle.name,
            "note": bundle.note,
            "config": identity(config),
            "prompts": {"file": config.prompts, "count": len(prompts)},
            "systems": described,
            "comparisons": cells,
            "alpha": config.alpha,
            "reference": reference.about if reference else {},
            "leaks": _plain_leaks(leaks, training, config.near_duplicate) if training else {},
            "grave": grave,
            "warnings": warnings,
            "license_notes": list(bundle.licence_notes),
            "timing": {"wall_s": time.perf_counter() - started, **seconds},
        }
        _write(out, results, rows, claps, extra)
    return results, rows


def _prompts(config: EvaluateConfig) -> list[Prompt]:
    return given_prompts(config.texts) if config.prompts is None else read_prompts(config.prompts)


def _show_plan(config: EvaluateConfig) -> int:
    prompts = _prompts(config)
    systems = find_systems(config.folders, prompts)
    _check_names(config, systems)
    if config.judge is not None:
        check_judge(config.judge, [prompt.id for prompt in prompts])
    out, bundle = Folder.at(config.output), open_bundle(config.bundle)
    inventory.existing_or_copy(out, KIND)
    clips = sum(clip.path is not None for system in systems for clip in system.clips)
    owed = sum(len(system.clips) for system in systems)
    flops, of = embedding_flops(bundle, clips, ("clap", "mert"))
    rows = [
        ("systems", f"{len(systems)}", ", ".join(system.name for system in systems)),
        ("prompts", f"{len(prompts):,}", str(config.prompts or "texts of the config")),
        ("clips", f"{clips:,} of {owed:,}", "what an earlier launch has measured here is taken from there"),
        ("reference", config.reference or "none", "FAD and KAD" if config.reference else "no FAD, no KAD"),
        ("half-samples", f"{config.resamples:,}", "behind the intervals of FAD, KAD and diversity"),
        ("bundle", bundle.name, bundle.note),
        *weights_rows(bundle, Scorer.roles),
    ]
    return show_plan(rows, out, clips, flops, config.runtime, of)


def _check_names(config: EvaluateConfig, systems: Sequence[SystemFolder]) -> None:
    """Systems and metrics that the config names are there.

    Raises:
        UserError: one is not there, two metrics have one name, or crossed seeds have one sample.
    """
    names = [system.name for system in systems]
    clip_functions(config.clip_metrics)
    if config.baseline is not None and config.baseline not in names:
        raise UserError(f"baseline: there is no system {config.baseline!r}.", f"Systems: {', '.join(names)}.")
    if config.parent is not None and config.parent not in names:
        raise UserError(f"parent: there is no system {config.parent!r}.", f"Systems: {', '.join(names)}.")
    if config.seeds == "crossed":
        _check_crossed(systems)
    metrics = [*SETS, *COMPARED, *LEVELS]
    for entry in config.metrics:
        name = function_named(entry, "metrics").__name__
        if name in metrics:
            raise UserError(f"metrics: {entry}: there is a metric {name} already.", "Call the function otherwise.")
        metrics.append(name)


def _leaks(
    reference: Embedded | None, training: Embedded | None, threshold: float
) -> tuple[Leaks, list[str], list[str]]:
    """What the reference shares with the training split, and grave and other warnings about it."""
    if not reference or not training:
        return Leaks((), ()), [], []
    leaks = find_leaks(reference.tracks, training.tracks, reference.rows(), iter(training.clap), threshold)
    grave, warnings = [], []
    if leaks.by_id or leaks.by_embedding:
        grave.append(
            f"the reference shares {len(leaks.by_id)} tracks with the training split by id, and "
            f"{len(leaks.by_embedding)} clips by sound: FAD is too good for a model that was trained on them."
        )
    if not leaks.ids_alike:
        warnings.append(
            f"no id of the reference, such as {reference.tracks[0]}, has the form of the training split's, such as "
            f"{training.tracks[0]}: the check by id says nothing, only the one by sound does."
        )
    return leaks, grave, warnings


def _compared(rows: Sequence[Mapping[str, Any]]) -> list[ClipScore]:
    """Scores of single clips by which systems are compared."""
    return [
        ClipScore(row["system"], row["prompt_id"], metric, row[metric])
        for row in rows
        for metric in COMPARED
        if row["status"] == OK and row.get(metric) is not None
    ]


def _check_crossed(systems: Sequence[SystemFolder]) -> None:
    for system in systems:
        if len({clip.sample for clip in system.clips if clip.path is not None}) < 2:
            raise UserError(
                f"seeds: {system.name} has one sample per prompt, which says nothing about other seeds.",
                "Give several, named `<prompt id>_<k>.wav`, or set seeds: nested.",
            )


def _claim(out: Folder, note: str) -> None:
    """Anything may be evaluated into the folder of another evaluation, so nothing decides its identity.

    Args:
        note: of the bundle, which may be another one than last time.
    """
    inventory.restore_run(out, KIND)
    described = {"kind": KIND, "fingerprint": fingerprint({}), "identity": {}, "note": note}
    if (old := runs.existing(out, KIND)) is None:
        runs.write(out, described)
    elif old.get("note", "") != note:
        out.write(RUN, json.dumps(old | {"note": note}, indent=1).encode())
    if out.exists(SUCCESS):
        inventory.clear(out, SUCCESS)


def _clip_rows(
    systems: Sequence[SystemFolder], config: EvaluateConfig, out: Folder
) -> tuple[list[dict[str, Any]], np.ndarray, dict[str, str], Counter[str]]:
    """Rows of clips.parquet, their (n, 512) embeddings with NaN where there is none, what made their columns of
    `clip_metrics`, and the seconds of `measure`."""
    clips = [clip for system in systems for clip in system.clips]
    there = [clip for clip in clips if clip.path is not None]
    sources = [(str(clip.path), clip.prompt) for clip in there]
    measured, seconds = measure(
        sources, config.bundle, config.reward_text, out, config.runtime, clip_metrics=config.clip_metrics
    )
    facts = dict(zip(there, measured, strict=True))
    numbers = {clip: row.get("numbers") or {} for clip, row in facts.items()}
    taken = {*SCHEMA.names, *SETS, *LEVELS, "clap"}
    extra = columns_of(numbers.values(), config.clip_metrics, taken)
    rows = []
    for clip in clips:
        row = dict.fromkeys((*SCHEMA.names, "clap")) | asdict(clip) | {"status": FAILED}
        row |= {name: facts[clip][name] for name in (*FACTS.names, "clap")} if clip in facts else {}
        row |= dict.fromkeys(extra) | {key.partition("/")[2]: one for key, one in numbers.get(clip, {}).items()}
        rows.append(row)
    if config.judge is not None:
        heard = [row for row in rows if row["status"] == OK]
        asked = [(row["prompt_id"], row["prompt"], row["path"]) for row in heard]
        for row, (ccs, problem) in zip(heard, judge(asked, config.judge, out), strict=True):
            row |= {"ccs": ccs, "message": problem}
    width = next((len(row["clap"]) for row in rows if row["status"] == OK), 0)
    claps = np.full((len(rows), width), np.nan, np.float32)
    for i, row in enumerate(rows):
        if row["status"] == OK:
            claps[i] = row["clap"]
    return rows, claps, extra, seconds


def _plain_leaks(leaks: Leaks, training: Embedded, threshold: float) -> dict[str, Any]:
    return {
        "training": training.about["source"],
        "clips": training.about["n"],
        "threshold": threshold,
        "by_id": list(leaks.by_id),
        "ids_alike": leaks.ids_alike,
        "by_embedding": [list(leak) for leak in leaks.by_embedding],
    }


def _write(
    out: Folder,
    results: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    claps: np.ndarray,
    extra: Iterable[str],
) -> None:
    sink = io.BytesIO()
    schema = pa.schema([*SCHEMA, *((name, pa.float64()) for name in extra)])
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows], schema), sink)
    out.write(CLIPS, sink.getvalue())
    out.write(EMBEDDINGS, save_tensors({"clap": claps}, {"protocol": results["embedding_protocol"]}))
    out.write(RESULTS, json.dumps(plain(results), indent=1, ensure_ascii=False, allow_nan=False).encode())
    parts = [f"{PARTS}/{file.name}" for file in out.files(PARTS, sizes=False)]
    files = inventory.entries(out, (RUN, CLIPS, EMBEDDINGS, RESULTS, *parts))
    inventory.seal(out, runs.read(out, KIND), {"kind": KIND, "created": results["created"]}, files)


def _report(out: Folder, results: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], config: EvaluateConfig) -> int:
    read = Results.model_validate(plain(results))
    for warning in read.grave:
        console.print(f"WARNING: {warning}", style="bold red")
    show(*system_table(results["systems"]))
    console.print(f"95 % CI: {'; '.join(read.intervals())}")
    if results["comparisons"]:
        show_pairs(results["comparisons"])
        console.print(legend(config.alpha, marked=not read.meaningless))
    console.print(f"scores by {results['protocol']}", markup=False)
    for warning in read.warnings[len(read.grave) :]:
        console.print(f"warning: {warning}", style="yellow")
    bad = [row for row in rows if row["status"] != OK] + (unjudged(rows) if config.judge else [])
    for row in bad[:5]:
        where = row["path"] or f"{row['system']}, prompt {row['prompt_id']}"
        console.print(f"  {where}: {row['reason'] or 'no CCS'}: {row['message']}", markup=False)
    timing = results["timing"]
    if timing.get("clips"):
        console.print(
            f"{timing['clips']} clips measured, {len(rows)} in the results, {timing['wall_s']:.1f} s in all: "
            f"{timing['busy']:.1f} s of measuring, {timing['embed'] / timing['busy']:.0%} of it embedding (models and "
            f"resampling), {timing['read']:.1f} s of reading beside it"
        )
    else:
        console.print(f"nothing to measure: all {len(rows)} clips are done; {timing['wall_s']:.1f} s of statistics")
    console.print(f"{out}/{RESULTS}", markup=False)
    # not by itself: it encodes every clip once more, which takes longer than the evaluation of some
    console.print(f"page with players, plots and a blind test: ttmray report {out.typed}", markup=False)
    if len(bad) > config.max_failures:
        console.print(f"{len(bad)} clips failed, {config.max_failures} are allowed (max_failures)", style="red")
        return EXIT_TOO_MANY_FAILURES
    return EXIT_OK
