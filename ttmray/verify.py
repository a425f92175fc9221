"""`ttmray verify`: is a run of any kind what was written? And `ttmray corpus repair`, which makes it so again."""

from collections.abc import Iterator

from ttmray import inventory, runs
from ttmray.console import console
from ttmray.corpus.plan import Plan
from ttmray.errors import EXIT_BAD_INPUT, EXIT_OK, UserError
from ttmray.runs import RUN
from ttmray.storage import Folder

CHECKPOINTS, SNAPSHOTS = "checkpoints", "ema"


def verify(folder: str) -> int:
    """Check a run; exit code 2 when anything is wrong.

    Raises:
        UserError: the folder holds no run.
    """
    run = Folder.at(folder)
    if inventory.kind_of(run) in runs.KINDS_OF_CORPUS:
        from ttmray.corpus import look

        return look.verify(folder)
    lines = list(problems(run))
    for line in lines:
        console.print(line, style="red")
    console.print(f"{run}: {len(lines) or 'no'} problems", markup=False)
    if lines:
        console.print(
            "  Start the same command again: it makes again what is damaged, and says what it cannot.", markup=False
        )
    return EXIT_BAD_INPUT if lines else EXIT_OK


def problems(run: Folder) -> Iterator[str]:
    """Everything that is wrong with a run of any kind but a corpus (`corpus/verify.py`), one line each: its files by
    `_SUCCESS.json`, its checkpoints and the clips of its manifest by the hashes that they carry.

    Raises:
        UserError: the folder holds no run.
    """
    kind = inventory.kind_of(run)
    try:
        runs.read(run, kind)
    except UserError as error:
        yield error.message
    if kind == "generate":
        yield from _clip_problems(run)
    if problem := inventory.marker_problem(run):
        yield problem
    elif marker := inventory.read_marker(run):
        yield from map(str, inventory.damage(run, marker, every_hash=True))
    yield from _snapshot_problems(run)
    if run.files(CHECKPOINTS, sizes=False):
        from ttmray.training import checkpoint

        for name in checkpoint.committed(run.sub(CHECKPOINTS)):
            try:
                checkpoint.verify(run.sub(CHECKPOINTS).sub(name))
            except UserError as error:
                yield error.message


def _snapshot_problems(run: Folder) -> Iterator[str]:
    """Averages that are not what was written, by the hashes that they carry."""
    from ttmray.training.tensors import unpack

    snapshots = run.sub(SNAPSHOTS)
    for name in (file.name for file in snapshots.files(sizes=False) if file.name.endswith(".safetensors")):
        try:
            unpack(snapshots.read(name), snapshots.path(name))
        except UserError as error:
            yield error.message


def _clip_problems(run: Folder) -> Iterator[str]:
    """Clips of a generation run that are not what their rows say."""
    from ttmray.generation import manifest

    try:
        rows = manifest.read_rows(run)
    except UserError as error:
        yield error.message
        return
    ok = [row for row in rows.values() if row["status"] == manifest.OK]
    whole = manifest.intact(run, ok)
    yield from (f"{row['file']} is missing or damaged" for row in ok if row["name"] not in whole)


def repair(folder: str) -> int:
    """`ttmray corpus repair`: make again what is damaged or missing, with the settings in `run.json`.

    Every byte is read. The songs (or the checkpoint) must be where the run found them.

    Raises:
        UserError: no run of this kind, or what its command raises.
    """
    from ttmray.corpus.verify import problems as problems_of

    run = Folder.at(folder)
    kind, config = _settings(run)
    before = list(problems_of(run))
    for line in before:
        console.print(line, style="yellow")
    if not before:
        console.print(f"nothing to repair: {run} has no problems", markup=False)
        return EXIT_OK
    if kind == "pool":
        from ttmray.generation.pool import generate_pool
        from ttmray.generation.pool_worker import CandidatesConfig

        code = generate_pool(CandidatesConfig.model_validate(config | {"output": run.uri}), repair=True)
    else:
        from ttmray.corpus.config import CorpusConfig
        from ttmray.corpus.job import score_corpus

        code = score_corpus(CorpusConfig.model_validate(config | {"output": run.uri}), repair=True)
    after = list(problems_of(run))
    for line in after:
        console.print(line, style="red")
    console.print(f"{run}: {len(before)} problems before, {len(after) or 'none'} now", markup=False)
    return EXIT_BAD_INPUT if after else code


def _settings(run: Folder) -> tuple[str, dict[str, object]]:
    """Kind and config of a run: by `run.json`, or by its copy in `_SUCCESS.json` where the plan speaks for that."""
    marker = inventory.read_marker(run) or {}
    candidates, problem = [], UserError(f"{run} is no corpus run: it has no {RUN}.", "Give the output folder of one.")
    for kind in ("corpus", "pool"):
        try:
            candidates.append(runs.read(run, kind))
        except UserError as error:
            if run.exists(RUN):
                problem = error
    candidates += [marker["run"]] if "run" in marker else []
    if not candidates:
        raise problem
    try:
        plan = Plan.load(run).identity()
    except UserError:
        plan = ""
    chosen = next((said for said in candidates if said["identity"].get("plan") == plan), candidates[0])
    return str(chosen["kind"]), dict(chosen["config"])
