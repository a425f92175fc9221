"""`ttmray verify`: is a run of any kind what was written? And `ttmray corpus repair`, which makes it so again.

Folders that are no runs but say what they hold (`inventory.note`: selections, pairs, references, reports, ...) are
checked like runs, and so is whatever lies below the given folder: the rounds of Stage 2, the steps of a chain.
"""

from collections.abc import Iterator

from ttmray import inventory, runs
from ttmray.console import console
from ttmray.corpus.plan import Plan
from ttmray.errors import EXIT_BAD_INPUT, EXIT_OK, UserError
from ttmray.recipes.chain import step_record
from ttmray.recipes.chain_plan import STEPS_FILE, absent, read_steps
from ttmray.runs import KINDS_OF_CORPUS, RUN, SUCCESS
from ttmray.storage import Folder

CHECKPOINTS, SNAPSHOTS = "checkpoints", "ema"


def verify(folder: str) -> int:
    """Check a run, and all that lie below it; exit code 2 when anything is wrong.

    Raises:
        UserError: the folder holds none.
    """
    root = Folder.at(folder)
    runs.require_folder(root)
    places, chains = _places(root)
    lines = []
    for place in places:
        run = root.sub(place) if place else root
        for line in _all_problems(run):
            lines.append(f"{place}: {line}" if place else line)
            console.print(lines[-1], style="red")
    said = {line.replace(": ", "/", 1) for line in lines}
    for chain in chains:
        for line in _steps_lost(root.sub(chain) if chain else root):
            line = f"{chain}/{line}" if chain else line
            if line.partition(" (")[0] not in said:
                lines.append(line)
                console.print(line, style="red")
    many = f" in {len(places)} runs and folders" if len(places) > 1 else ""
    console.print(f"{root}: {len(lines) or 'no'} problems{many}", markup=False)
    if lines:
        console.print(
            "  Start the same command again: it makes again what is damaged, and says what it cannot.", markup=False
        )
    return EXIT_BAD_INPUT if lines else EXIT_OK


def _places(root: Folder) -> tuple[list[str], list[str]]:
    """Names below `root` of all that can be checked, the root itself as an empty one; nothing below a corpus, which
    checks its own tables. And names of the chains.

    Raises:
        UserError: there is none.
    """
    if (root.exists(RUN) or root.exists(SUCCESS)) and inventory.kind_of(root) in runs.KINDS_OF_CORPUS:
        return [""], []
    folders = [name.rpartition("/") for name in (file.name for file in root.files(sizes=False))]
    chains = sorted(folder for folder, _, name in folders if name == STEPS_FILE)
    places: list[str] = []
    corpora: list[str] = []
    for place in sorted({folder for folder, _, name in folders if name in (RUN, SUCCESS)}):
        if not place.startswith(tuple(corpora)):
            places.append(place)
            if inventory.kind_of(root.sub(place) if place else root) in runs.KINDS_OF_CORPUS:
                corpora.append(f"{place}/")
    if not places and not chains:
        raise UserError(f"{root} is no run: it has no {RUN}.", "Give the output folder of a command.")
    return places, chains


def _steps_lost(root: Folder) -> Iterator[str]:
    """What is gone of the steps that a chain has done: of a run that is gone as a whole, nothing else tells."""
    try:
        steps = read_steps(root) or []
        for step in steps:
            if step_record(root, step["name"])["done"]:
                yield from (f"{name}: is missing (of step {step['name']})" for name in absent(root, step))
    except UserError as error:
        yield error.message


def _all_problems(run: Folder) -> Iterator[str]:
    if inventory.kind_of(run) in runs.KINDS_OF_CORPUS:
        from ttmray.corpus.verify import problems as problems_of

        return problems_of(run)
    return problems(run)


def problems(run: Folder) -> Iterator[str]:
    """Everything that is wrong with a run of any kind but a corpus (`corpus/verify.py`), one line each: its files by
    `_SUCCESS.json`, its checkpoints and the clips of its manifest by the hashes that they carry.

    Raises:
        UserError: the folder holds no run.
    """
    kind = inventory.kind_of(run)
    noted = inventory.read_marker(run) or {}
    if run.exists(RUN) or "kind" not in noted or "run" in noted:
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
    if kind not in KINDS_OF_CORPUS:
        raise UserError(
            f"{run} is a run of kind {kind}, no corpus.",
            f"What is wrong with it: ttmray verify {run.typed}. The command that made it mends it.",
        )
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
    _repair_tables(run)
    after = list(problems_of(run))
    for line in after:
        console.print(line, style="red")
    console.print(f"{run}: {len(before)} problems before, {len(after) or 'none'} now", markup=False)
    return EXIT_BAD_INPUT if after else code


def _repair_tables(run: Folder) -> None:
    """Make damaged tables of scores again, where they say how they were made and their head is there."""
    from ttmray.corpus import scores
    from ttmray.corpus.rescore import RescoreConfig, rescore
    from ttmray.corpus.verify import table_problems

    for name in scores.begun_tables(run):
        if not list(table_problems(run, name)):
            continue
        where = run.sub(f"{scores.SCORES}/{name}")
        try:
            config = (inventory.restore_run(where, "scores") or runs.read(where, "scores"))["config"]
            rescore(RescoreConfig.model_validate(config | {"corpus": run.uri, "name": name}))
        except UserError as error:
            console.print(f"{where}: {error}", style="yellow")


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
