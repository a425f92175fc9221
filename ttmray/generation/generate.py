"""The generation job: plan, resume by manifest, make, merge.

A run folder holds `run.json` (settings and weights), `clips/` and `manifest/` (one row per clip, written after its
audio). A clip is done when its row is there and its file has the hash that the row says; so killing the job at any time
costs the clips in work and nothing else. Rows of failed clips stay until `--retry-failed`.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ttmray import cost, inventory, runs
from ttmray.cluster import each
from ttmray.config import fingerprint, identity
from ttmray.console import console, meter
from ttmray.errors import EXIT_OK, EXIT_TOO_MANY_FAILURES, UserError
from ttmray.generation import manifest
from ttmray.generation.config import GenerateConfig
from ttmray.generation.manifest import FAILED, OK
from ttmray.generation.plan_rows import OF, sampling
from ttmray.generation.play import PLAYERS, write_page
from ttmray.generation.prompts import Prompt, given_prompts, read_prompts
from ttmray.generation.sampler import Draw
from ttmray.generation.worker import ClipJob, ClipMaker, PlannedClip, SoundMaker, roles_of
from ttmray.json_text import read_json
from ttmray.models.backbone_weights import file_config, score_warning
from ttmray.models.bundle import Bundle, means_nothing, open_bundle
from ttmray.models.devices import on_gpu
from ttmray.models.plans import Row, show_plan, weights_rows
from ttmray.models.protocol import SEPARATION
from ttmray.models.weights import digest_file, weights_file
from ttmray.runs import RUN, SUCCESS
from ttmray.storage import Folder

OVERWRITE = "--overwrite deletes its clips and starts anew."
MERGED = ("manifest.parquet", "manifest.csv", "summary.json")
ABORT_AFTER = 50
"""Once this many clips are done and more than half of them failed, the job stops."""


@dataclass(frozen=True)
class Generated:
    """A run folder after a launch.

    Attributes:
        planned: rows of the clips of this config, in the order of the prompts.
        finished: those of them that this launch made.
        seconds: per stage, of this launch.
        wall_s: of this launch.
        described: `run.json`.
    """

    run: Folder
    planned: list[dict[str, Any]]
    finished: list[dict[str, Any]]
    seconds: Counter[str]
    wall_s: float
    described: dict[str, Any]


def generate(
    config: GenerateConfig,
    *,
    retry_failed: bool = False,
    zip_to: str | None = None,
    overwrite: bool = False,
    plan_only: bool = False,
) -> int:
    """Make, or go on making, the clips of `config`, and a page with players; returns the exit code.

    Args:
        plan_only: say what would be done, and stop.
        retry_failed: make failed clips once more.
        zip_to: local file for an archive of the clips (`<name>.wav`, flat): the challenge's submission.
        overwrite: delete the clips of other settings that the run folder holds, and start anew.

    Raises:
        UserError: for everything that the user can mend; wrong input is found before any model runs.
    """
    if zip_to is not None:
        manifest.check_zip(zip_to)
    if plan_only:
        return _show_plan(config, retry_failed, overwrite)
    done = generate_run(config, retry_failed=retry_failed, overwrite=overwrite)
    failed = _report(done, config.best_by)
    page = write_page(done.run, done.planned, done.described)
    console.print(f"players: open {page}", markup=False)
    if zip_to is not None and failed:
        console.print(f"no {zip_to}: {failed} clips are missing; --retry-failed makes them once more", style="red")
    elif zip_to is not None:
        console.print(f"{manifest.write_zip(done.run, done.planned, zip_to)} clips in {zip_to}", markup=False)
    return EXIT_TOO_MANY_FAILURES if failed > (0 if zip_to is not None else config.max_failures) else EXIT_OK


def generate_run(
    config: GenerateConfig,
    *,
    prompts: Sequence[Prompt] | None = None,
    retry_failed: bool = False,
    bundle: Bundle | None = None,
    overwrite: bool = False,
) -> Generated:
    """Make, or go on making, the clips of `config`, up to the end of the run folder.

    Args:
        prompts: those of the config, where they have ids of their own; default: as the config says.
        retry_failed: make failed clips once more.
        bundle: that of the config, where it is open already; Ray actors open it themselves.
        overwrite: as in `generate`.

    Raises:
        UserError: as `generate`.
    """
    started = time.perf_counter()
    clips = plan_clips(prompts or prompts_of(config), config)
    run = Folder.at(config.output)
    described = _describe(config, bundle or open_bundle(config.bundle))
    rows: dict[str, dict[str, Any]] = {}
    if overwrite:
        _clear_another(run, described)
    if inventory.restore_run(run, "generate", described["fingerprint"]) is not None:
        console.print(f"{run.path(RUN)} was missing or damaged and is made again", style="yellow")
    if (existing := runs.existing(run, "generate")) is not None:
        runs.refuse_another(run, existing, described, way_out=OVERWRITE)
        damaged: list[str] = []
        rows = manifest.read_rows(run, damaged)
        for name in damaged:
            console.print(f"{run.path(name)} is damaged; its clip is made again", style="yellow", markup=False)
            inventory.clear(run, name)
    _check_prompts(run, clips, rows)
    if described["note"]:
        console.print(described["note"], style="yellow")
    todo = _todo(run, clips, rows, retry_failed)
    seconds: Counter[str] = Counter()
    finished: list[dict[str, Any]] = []
    if todo:
        if len(todo) < len(clips):
            console.print(f"{len(clips) - len(todo)} of {len(clips)} clips are done, {len(todo)} to do")
        run.sweep_temporary()
        fresh = runs.write(run, described)
        job = _job(config, described)
        ours = bundle is not None and config.runtime.runner == "local"
        make = partial(ClipMaker, job, bundle) if ours else partial(ClipMaker, job)
        try:
            with cost.account(run):
                finished = _make(config, make, todo, seconds)
        except UserError:
            if fresh and not run.files(manifest.ROWS, sizes=False):
                run.delete(RUN)  # settings that made nothing shall not bind the folder
                run.delete(cost.COST)
            raise
    else:
        console.print(f"nothing to do: all {len(clips)} clips of {run} are done")
    rows |= {row["name"]: row for row in finished}
    planned = [rows.pop(clip.name) for clip in clips]
    note = described["note"] if means_nothing(config.bundle) else ""
    manifest.merge(run, planned + [rows[name] for name in sorted(rows)], note)  # clips of other prompts stay in it
    done = Generated(run, planned, finished, seconds, time.perf_counter() - started, described)
    _summarise(done)
    names = [RUN, *(name for name in MERGED if run.exists(name))]
    names += [file for row in planned for file in (f"{manifest.ROWS}/{row['name']}.json", row["file"]) if file]
    inventory.seal(run, runs.read(run, "generate"), {"clips": len(planned)}, inventory.entries(run, sorted(set(names))))
    return done


def _show_plan(config: GenerateConfig, retry_failed: bool, overwrite: bool) -> int:
    clips, run, bundle = plan_clips(prompts_of(config), config), Folder.at(config.output), open_bundle(config.bundle)
    existing = inventory.existing_or_copy(run, "generate")
    rows: dict[str, dict[str, Any]] = {}
    deleted: list[Row] = []
    if existing is not None:
        described = _describe(config, bundle)
        rows = manifest.read_rows(run, [])  # a launch makes damaged ones again
        if overwrite and existing["fingerprint"] != described["fingerprint"]:
            deleted = [("deleted", f"{len(rows)} clips of other settings", "--overwrite")]
            rows = {}
        else:
            runs.refuse_another(run, existing, described, way_out=OVERWRITE)
    _check_prompts(run, clips, rows)
    todo = len(_todo(run, clips, rows, retry_failed))
    tried = todo * config.best_of
    backbone, flops = sampling(config, bundle, tried)
    each = f"{config.samples} per prompt{f', the best of {config.best_of} each' if config.best_of > 1 else ''}"
    show = [
        ("prompts", f"{len(clips) // config.samples:,}", str(config.prompts or "texts of the config")),
        ("clips", f"{todo:,} to make of {len(clips):,}", each),
        *deleted,
        ("bundle", bundle.name, bundle.note),
        *weights_rows(bundle, roles_with_separator(config)),
        *backbone,
    ]
    return show_plan(show, run, todo, flops, config.runtime, OF)


def _clear_another(run: Folder, described: dict[str, Any]) -> None:
    """Delete what a generation run with other settings has written, and nothing else.

    Raises:
        UserError: the folder belongs to another kind of run, or to something else.
    """
    old = runs.existing(run, "generate")
    if old is None or old["fingerprint"] == described["fingerprint"]:
        return
    ours = [
        f"{folder}/{file.name}" for folder in (manifest.ROWS, manifest.CLIPS) for file in run.files(folder, sizes=False)
    ]
    # run.json last: until then it is the other run's, and the same command goes on deleting
    for name in (SUCCESS, *ours, *MERGED, PLAYERS, cost.COST):
        if run.exists(name):
            run.delete(name)
    run.write(RUN, json.dumps(described, indent=1).encode())
    console.print(f"{run}: {sum(name.startswith(manifest.ROWS) for name in ours)} clips of other settings are deleted")


def generate_sounds(
    config: GenerateConfig, bundle: Bundle, prompts: Sequence[Prompt] | None = None
) -> list[tuple[dict[str, Any], np.ndarray | None]]:
    """The clips of `config` in memory, in the order of the prompts: the same sounds and rows as in a run folder.

    Args:
        bundle: that of the config, open.
        prompts: as in `generate_run`.

    Returns:
        Row, which names no file, and (channels, samples) float32 at the rate of the row; None where the clip failed.

    Raises:
        UserError: as `generate`.
    """
    clips = plan_clips(prompts or prompts_of(config), config)
    maker = SoundMaker(_job(config, _describe(config, bundle)), bundle)
    rows = {row["name"]: row for row in _make(config, lambda: maker, clips, Counter())}
    return [(rows[clip.name], maker.sounds.get(clip.name)) for clip in clips]


def prompts_of(config: GenerateConfig) -> list[Prompt]:
    """The prompts that a config names."""
    return given_prompts(config.texts) if config.prompts is None else read_prompts(config.prompts)


def plan_clips(prompts: Sequence[Prompt], config: GenerateConfig) -> list[PlannedClip]:
    """All clips in the order of the prompts.

    A single sample is named as its prompt, several have the candidate's number after an underscore.
    """
    many = config.samples > 1
    return [
        PlannedClip(f"{prompt.id}_{k}" if many else prompt.id, Draw(prompt.id, prompt.text, config.seed, k))
        for prompt in prompts
        for k in range(config.samples)
    ]


def roles_with_separator(config: GenerateConfig) -> set[str]:
    """All models that a run needs."""
    return roles_of(config) | ({"separator"} if config.postprocess is not None and config.postprocess.passes else set())


def _describe(config: GenerateConfig, bundle: Bundle) -> dict[str, Any]:
    """What `run.json` holds. Prompts are not part of the identity: more can be added later."""
    roles = roles_with_separator(config)
    models = bundle.identity(roles)
    weights = {"bundle": fingerprint(models)}
    for field in ("checkpoint", "second_checkpoint"):
        path = getattr(config, field)
        if path is not None:
            weights[field] = digest_file(weights_file(path, field)).sha256
            backbone, crossed = file_config(path, head=config.head, null=config.null, force=config.force_head)
            weights[f"{field}_head"] = backbone.head if backbone.head == "none" else f"{backbone.head}, {backbone.null}"
            if crossed is not None:
                weights[f"{field}_cross_load"] = str(crossed)
    what: dict[str, Any] = {"config": identity(config), "bundle": models, "weights": weights}
    what |= {"separation": SEPARATION} if "separator" in roles else {}
    more = {"note": bundle.note, "warnings": _score_warnings(config, bundle)}
    return runs.describe("generate", what, config, ("torch", "transformers", "numpy", "demucs"), **more)


def _score_warnings(config: GenerateConfig, bundle: Bundle) -> list[str]:
    """Lines about scores beyond those that the weights were trained on, which are also printed."""
    first = config.checkpoint or bundle.backbone_file()  # None: drawn from a seed
    names = ("sampler.score", "sampler.second_score")
    asked = zip((first, config.second_checkpoint), config.sampler.scores, names, strict=False)
    lines = [score_warning(str(path), score, name) for path, score, name in asked if path is not None]
    return [line for line in lines if line is not None]


def _check_prompts(run: Folder, clips: Sequence[PlannedClip], rows: dict[str, dict[str, Any]]) -> None:
    for clip in clips:
        row = rows.get(clip.name)
        if row is not None and row["prompt"] != clip.draw.prompt:
            raise UserError(
                f"{run} has a clip {clip.name} of another prompt: {row['prompt']!r}, not {clip.draw.prompt!r}.",
                "Choose a new output folder, or give the prompt another id.",
            )


def _todo(
    run: Folder, clips: Sequence[PlannedClip], rows: dict[str, dict[str, Any]], retry_failed: bool
) -> list[PlannedClip]:
    mine = [rows[clip.name] for clip in clips if clip.name in rows]
    finished = [row for row in mine if row["status"] == OK]
    done = manifest.intact(run, finished)
    if len(done) < len(finished):
        damaged = [row["name"] for row in finished if row["name"] not in done]
        console.print(f"{len(damaged)} files are gone or changed and are made again: {damaged[0]}...", style="yellow")
    if not retry_failed:
        done |= {row["name"] for row in mine if row["status"] == FAILED}
    return [clip for clip in clips if clip.name not in done]


def _job(config: GenerateConfig, described: dict[str, Any]) -> ClipJob:
    weights = json.dumps(described["identity"]["weights"])
    return ClipJob(config.model_dump_json(), described["fingerprint"], weights)


def _make(
    config: GenerateConfig, make: Callable[[], ClipMaker], todo: Sequence[PlannedClip], seconds: Counter[str]
) -> list[dict[str, Any]]:
    runtime = config.runtime
    local = runtime.runner == "local"
    batched = on_gpu(runtime.device, runtime.runner, runtime.gpus)
    # what one forward or all threads take: a kill costs no more, and with Ray every worker has some
    size = max(runtime.batch if batched else 1, runtime.thread_count)
    size = size if local else min(size, -(-len(todo) // runtime.workers))
    batches = [todo[i : i + size] for i in range(0, len(todo), size)]
    finished: list[dict[str, Any]] = []
    failed = 0
    with meter("clips", len(todo)) as progress:
        for rows, spent in each(make, batches, runtime):
            finished += rows
            seconds.update(spent)
            failed += sum(row["status"] == FAILED for row in rows)
            progress.advance(len(rows), f"{failed} failed")
            if len(finished) >= ABORT_AFTER and failed > len(finished) / 2:
                last = next(row for row in reversed(finished) if row["status"] == FAILED)
                raise UserError(
                    f"{failed} of {len(finished)} clips failed, so the job stopped. The last: {last['name']}: "
                    f"{last['message']}",
                    "What was made stays. Mend the cause and start again with --retry-failed.",
                )
    return finished


def _summarise(done: Generated) -> None:
    """Save counts and times."""
    counts = Counter(row["status"] for row in done.planned)
    summary: dict[str, Any] = {
        "clips": {OK: counts[OK], FAILED: counts[FAILED]},
        "reasons": dict(Counter(row["reason"] for row in done.planned if row["status"] == FAILED)),
        "this_launch": {
            "clips": len(done.finished),
            "wall_s": round(done.wall_s, 3),
            "stage_s": {name: round(value, 3) for name, value in done.seconds.items()},
        },
    }
    summary |= {"note": done.described["note"]} if done.described["note"] else {}
    if gains := best_of_curve(done.planned):
        summary["best_of"] = gains
    if done.finished or "summary.json" in _changed(done.run):
        done.run.write("summary.json", json.dumps(summary, indent=1).encode())


def _report(done: Generated, by: str) -> int:
    """Print counts and times; returns the number of planned clips that failed."""
    failed = [row for row in done.planned if row["status"] == FAILED]
    console.print(f"{done.run}: {len(done.planned) - len(failed)} clips ok, {len(failed)} failed", markup=False)
    for row in failed[:5]:
        console.print(f"  {row['name']}: {row['reason']}: {row['message']}", markup=False)
    limited = [row for row in done.planned if row["status"] == OK and row["message"]]
    for row in limited[:5]:
        console.print(f"  {row['name']}: {row['message']}", style="yellow")
    if len(limited) > 5:
        console.print(f"  and {len(limited) - 5} more such clips: column message of {done.run.path('manifest.csv')}")
    if gains := best_of_curve(done.planned):
        curve = ", ".join(f"{mean:+.4f} of {n}" for n, mean in gains.items())
        console.print(f"mean {by} of the best candidate before post-processing: {curve}", markup=False)
    if count := len(done.finished):
        spent = ", ".join(f"{name} {value / count:.2f}" for name, value in done.seconds.items())
        console.print(
            f"{count} made in {done.wall_s:.1f} s, {done.wall_s / count:.2f} s per clip (s per clip: {spent})"
        )
    return len(failed)


def _changed(run: Folder) -> set[str]:
    """Merged files that are not there, or not what an earlier end has noted."""
    marker = inventory.read_marker(run)
    absent = {name for name in MERGED if not run.exists(name)}
    return absent if marker is None else absent | {problem.name for problem in inventory.damage(run, marker)}


def best_of_curve(rows: Sequence[dict[str, Any]]) -> dict[int, float]:
    """Mean score of the best of the first 1, 2, 4, ... candidates, over clips whose first candidate has a score.

    What more candidates would bring is seen without making a clip again. Empty where every clip had one candidate.
    """
    tried = [read_json(row["tried"]) for row in rows if row["tried"]]
    tried = [scores for scores in tried if scores[0] is not None]
    if not tried:
        return {}
    most = len(tried[0])
    counts = [2**i for i in range(most.bit_length()) if 2**i < most] + [most]
    return {
        n: sum(max(score for score in scores[:n] if score is not None) for scores in tried) / len(tried) for n in counts
    }
