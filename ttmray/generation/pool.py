"""A pool: many candidates per prompt from one checkpoint, scored, in the format of a corpus (paper III-D, Stage 2).

A prompt takes the place of a track and its candidates that of the track's clips, so that everything that reads a corpus
reads a pool: training, `ttmray corpus verify`, `stats` and `ls`, `ttmray status`. Commit and resume are the corpus's,
too: a unit is all candidates of a few prompts, and its index file, written last and only once, is the commit. A
candidate depends on the checkpoint, the settings, the prompt's id and its number alone, never on who makes it.

What differs from a corpus: latents are points (their deviation is 0); clips are not separated, so `reward_score` and
`instrumental_reward_score` are the same number, as are the two CLAP scores, and both rows of the embeddings; `sha256`
is that of the latents. The merged `index.parquet` has more columns than the units' files (see `COLUMNS`).
"""

import hashlib
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ttmray import cost, inventory, runs
from ttmray.cluster import each
from ttmray.config import identity
from ttmray.console import console
from ttmray.corpus import index, shards
from ttmray.corpus.finalise import Totals
from ttmray.corpus.job import Done, carry_out, not_committed
from ttmray.corpus.pipeline import whole_worker
from ttmray.corpus.plan import PLAN_FILE, SCHEMA, Plan, pack_units, plan_difference
from ttmray.corpus.repair import existing_run, forget_damaged, take_back
from ttmray.corpus.unit import OK, Unit
from ttmray.errors import EXIT_OK, UserError
from ttmray.generation.plan_rows import OF, sampling
from ttmray.generation.pool_worker import CandidatesConfig, PoolJob, candidates
from ttmray.generation.prompts import MAX_CHARACTERS, Prompt, given_prompts, held_out, read_prompts
from ttmray.generation.similar import most_similar
from ttmray.models.backbone_weights import file_config, score_warning
from ttmray.models.bundle import Bundle, open_bundle
from ttmray.models.plans import show_plan, weights_rows
from ttmray.models.scoring import Scorer
from ttmray.models.weights import digest_file, weights_file
from ttmray.runs import RUN
from ttmray.storage import Folder

COLUMNS = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("candidate", pa.int32()),
        ("pool_seed", pa.int64()),
        ("input_score", pa.float64()),  # null: sampled without a score
        ("clipping", pa.float64()),  # share of samples at full scale, 0..1; null unless ok
        ("similarity", pa.float64()),  # highest CLAP cosine with another ok clip of the pool; null unless ok
        ("similar_to", pa.string()),  # the key of that clip
    ]
)
"""What the merged index has beside the columns of a corpus; `clipping` is also in every clip's JSON."""
ROLES_OF_POOL = frozenset({"backbone", "text", "clap_condition", "latents", "vocoder", *Scorer.roles})


def generate_pool(config: CandidatesConfig, *, repair: bool = False, plan_only: bool = False) -> int:
    """Make, or go on making, a pool; returns the exit code.

    Args:
        plan_only: say what would be done, and stop.
        repair: look for damage in every byte, and do the end of the run once more.

    Raises:
        UserError: for everything that the user can mend; wrong input is found before any model runs.
    """
    started = time.time()
    run, bundle = Folder.at(config.output), open_bundle(config.bundle)
    prompts = choose_prompts(config)
    plan = plan_pool(prompts.chosen, config)
    if plan_only:
        return _show_plan(config, run, bundle, prompts, plan)
    described = _describe(config, plan, bundle, prompts.held_out)
    existing = existing_run(run, "pool", beside=(PLAN_FILE,))
    existing = take_back(run, described, existing)
    if existing is not None:
        _refuse_another(run, existing, described, plan)
        described = existing  # as it was written
    if prompts.held_out:
        console.print(f"{_left_out(prompts.held_out)}: {config.held_out}", markup=False)
    if bundle.note:
        console.print(bundle.note, style="yellow")
    run.sweep_temporary()
    if existing is None:
        plan.save(run)
        runs.write(run, described)
    else:
        forget_damaged(run, plan, described["fingerprint"], repair)
        if not run.exists(PLAN_FILE):
            plan.save(run)
    job = PoolJob(config.model_dump_json(), "", described["protocol_id"], described["fingerprint"])
    todo = list(not_committed(run, plan))
    for unit in todo:
        unit.rows = candidates(config, unit, job.protocol)

    def work(units: Sequence[Unit], done: Done) -> None:
        for unit in each(partial(whole_worker, job.to_json()), units, config.runtime):
            done(unit)

    way_out = "Mend the cause and start with a new output folder."
    more = PoolColumns(run, config, prompts.held_out)
    try:
        return carry_out(run, plan, described, todo, work, config.max_failures, started, more, way_out)
    except UserError:
        if existing is None and not index.committed_units(run):
            run.delete(RUN)  # settings that made nothing shall not bind the folder
            run.delete("plan.parquet")
            run.delete(cost.COST)
        raise


def _refuse_another(run: Folder, existing: dict[str, Any], described: dict[str, Any], plan: Plan) -> None:
    changes = []
    with suppress(UserError):  # no plan, or a damaged one
        changes = [line.replace("track", "prompt") for line in plan_difference(Plan.load(run), plan)]
    runs.refuse_another(run, existing, described, changes)


def clips_to_make(config: CandidatesConfig) -> int:
    """Clips of a pool that are not made yet.

    Raises:
        UserError: the folder belongs to another run, or what `choose_prompts` raises.
    """
    prompts, run, bundle = choose_prompts(config), Folder.at(config.output), open_bundle(config.bundle)
    return _clips_to_make(config, run, bundle, prompts, plan_pool(prompts.chosen, config))


def _clips_to_make(config: CandidatesConfig, run: Folder, bundle: Bundle, prompts: "Prompts", plan: Plan) -> int:
    if (existing := inventory.existing_or_copy(run, "pool", beside=(PLAN_FILE,))) is not None:
        _refuse_another(run, existing, _describe(config, plan, bundle, prompts.held_out), plan)
    return plan.expected_clips(not_committed(run, plan).names)


def _show_plan(config: CandidatesConfig, run: Folder, bundle: Bundle, prompts: "Prompts", plan: Plan) -> int:
    todo = _clips_to_make(config, run, bundle, prompts, plan)
    backbone, flops = sampling(config, bundle, todo)
    left_out = _left_out(prompts.held_out) if prompts.held_out else ""
    source = str(config.prompts or config.corpus)
    rows = [
        ("prompts", f"{len(prompts.chosen):,}", f"{source}; {left_out}" if left_out else source),
        ("clips", f"{todo:,} to make of {plan.expected_clips():,}", f"{config.candidates} per prompt, each scored"),
        ("bundle", bundle.name, bundle.note),
        *weights_rows(bundle, ROLES_OF_POOL - ({"backbone"} if config.checkpoint else set())),
        *backbone,
    ]
    return show_plan(rows, run, todo, flops, config.runtime, OF)


def sample_pool(config: CandidatesConfig, weights: str, output: str) -> None:
    """The pool of `config` from other weights in another folder, as every round of Stage 2 needs one.

    Raises:
        UserError: as `generate_pool`, and where more clips failed than `config.max_failures`.
    """
    if generate_pool(config.model_copy(update={"checkpoint": weights, "output": output})) != EXIT_OK:
        raise UserError(f"{output}: too many clips failed.", "See its summary.md, or raise max_failures of the pool.")


class Prompts(NamedTuple):
    """Prompts of a pool in order, and how many captions were left out because they are held out."""

    chosen: list[Prompt]
    held_out: int


def choose_prompts(config: CandidatesConfig) -> Prompts:
    """The prompts of a pool. Held-out ones are left out of captions, which nobody chose; in a file they are an error.

    Raises:
        UserError: they cannot be read, are too few, or have ids that cannot be keys of clips; a file has held-out
            ones, or of the captions more than `max_held_out` are.
    """
    if config.prompts is not None:
        source, prompts, dropped = config.prompts, read_prompts(config.prompts), 0
    else:
        assert config.corpus is not None
        source = config.corpus
        prompts, dropped = _free_captions(config, _captions(config.corpus, config.seed))
    count = config.prompt_count or len(prompts)
    if len(prompts) < count:
        less = f" ({dropped} more are held out)" if dropped else ""
        raise UserError(f"{source} has {len(prompts)} prompts{less}, prompt_count is {count}.", "Lower prompt_count.")
    prompts = prompts[:count]
    for prompt in prompts:
        if "." in prompt.id or len(prompt.id) > 64:
            raise UserError(
                f"{source}: the id {prompt.id} cannot be part of a key in a pool.",
                "Use at most 64 letters, digits, '_' and '-'.",
            )
    if config.prompts is not None and config.held_out is not None:
        bad = held_out(prompts, read_prompts(config.held_out), config.sampler.prefix)
        if bad:
            raise UserError(
                f"{source}: {len(bad)} prompts are held out by {config.held_out}, e.g. {bad[0].id}: {bad[0].text!r}.",
                "Remove them: who learns from the prompts of the evaluation measures nothing.",
            )
    return Prompts(prompts, dropped)


def _free_captions(config: CandidatesConfig, captions: list[Prompt]) -> tuple[list[Prompt], int]:
    """Captions that are not held out, and the number of the others."""
    if config.held_out is None:
        return captions, 0
    bad = {prompt.id for prompt in held_out(captions, read_prompts(config.held_out), config.sampler.prefix)}
    if len(bad) > config.max_held_out * len(captions):
        raise UserError(
            f"{config.corpus}: {len(bad)} of {len(captions)} captions are held out by {config.held_out}, "
            f"{config.max_held_out:.0%} may be.",
            "Is it the right file? If so, raise max_held_out: they are left out.",
        )
    return [prompt for prompt in captions if prompt.id not in bad], len(bad)


def _captions(corpus: str, seed: int) -> list[Prompt]:
    """Captions that only training clips of a corpus have, in an order by `seed`."""
    rows = index.read_index(Folder.at(corpus))
    rows = rows.filter(pc.equal(rows["status"], OK)).select(["split", "caption"]).to_pylist()
    texts: dict[bool, set[str]] = {True: set(), False: set()}
    for row in rows:
        texts[row["split"] == "train"].add(" ".join((row["caption"] or "").split()))
    usable = [text for text in texts[True] - texts[False] if 0 < len(text) <= MAX_CHARACTERS]
    if not usable:
        raise UserError(f"{corpus} has no captions of training clips to use as prompts.", "Give a file of prompts.")
    return given_prompts(sorted(usable, key=lambda text: hashlib.sha256(f"{seed} {text}".encode()).digest()))


def plan_pool(prompts: Sequence[Prompt], config: CandidatesConfig) -> Plan:
    """One row per prompt, in order; units of whole prompts."""
    prefix = config.sampler.prefix if config.caption == "prefixed" else ""
    captions = [prefix + prompt.text for prompt in prompts]
    first = {caption: i for i, caption in reversed(list(enumerate(captions)))}
    count = len(prompts)
    columns: dict[str, Sequence[Any]] = {
        "unit": pack_units([config.candidates] * count, [0.0] * count, config.unit_clips),
        "track_id": [prompt.id for prompt in prompts],
        "size": [-1] * count,
        "duration_s": [float("nan")] * count,
        "clips": [config.candidates] * count,
        "split": ["train"] * count,
        "caption": captions,
        "caption_id": [hashlib.sha256(caption.encode()).hexdigest()[:16] for caption in captions],
        "caption_owner": [first[caption] == i for i, caption in enumerate(captions)],
        "status": [OK] * count,
    }
    empty = [""] * count
    return Plan(pa.table({name: columns.get(name, empty) for name in SCHEMA.names}).cast(SCHEMA), "")


def _left_out(count: int) -> str:
    return f"{count} captions are held out and left out"


def _describe(config: CandidatesConfig, plan: Plan, bundle: Bundle, left_out: int) -> dict[str, Any]:
    """What `run.json` holds. Prompts are part of the identity, and so what is held out of them."""
    protocol = bundle.protocol(config.reward_text)
    weights, warning = {}, None
    if config.checkpoint is not None:
        weights["checkpoint"] = digest_file(weights_file(config.checkpoint, "checkpoint")).sha256
        how: dict[str, Any] = {"head": config.head, "null": config.null, "force": config.force_head}
        _, crossed = file_config(config.checkpoint, **how)
        if crossed is not None:
            weights["cross_load"] = str(crossed)
    file = config.checkpoint or bundle.backbone_file()  # None: drawn from a seed
    if file is not None:
        warning = score_warning(str(file), config.sampler.score, "sampler.score")
    what = {
        "config": identity(config),
        "plan": plan.identity(),
        "bundle": bundle.identity(),
        "protocol": protocol.id(),
        "weights": weights,
    }
    return runs.describe(
        "pool",
        what,
        config,
        ("torch", "numpy", "pyarrow"),
        protocol_id=f"{bundle.name}/{protocol.id()}",
        note=bundle.note,
        held_out=left_out,
        warnings=[warning] if warning else [],
    )


class PoolColumns:
    """`COLUMNS` of a pool's rows, and what its summary says beside that of a corpus (`finalise.More`).

    What was measured is read from the shards, all of them before the first row: the most similar clip may be any.
    """

    def __init__(self, run: Folder, config: CandidatesConfig, left_out: int) -> None:
        self._run, self._config, self._left_out = run, config, left_out

    @cached_property
    def _measured(self) -> tuple[dict[str, float], dict[str, tuple[float, str]]]:
        """Key -> share of clipped samples, and key -> the most similar clip."""
        clipping: dict[str, float] = {}
        vectors: dict[str, np.ndarray] = {}
        names = index.committed_units(self._run)
        units = (data for _, metadata in index.blocks(self._run, names) for data in metadata)
        for name in (name for data in units for name in data["files"] if name.startswith(shards.SHARDS)):
            for key, sample in shards.read_samples(self._run.read(name), self._run.path(name)):
                clipping[key], vectors[key] = sample["json"]["clipping"], sample["clap_audio.npy"][0].copy()
        return clipping, most_similar(vectors)

    def columns(self, rows: pa.Table) -> pa.Table:
        """Rows of some units with `COLUMNS`.

        Raises:
            UserError: a shard is damaged.
        """
        keys = rows["key"].to_pylist()
        clipping, nearest = self._measured
        columns: dict[str, list[Any]] = {
            "prompt_id": rows["track_id"].to_pylist(),
            "candidate": rows["segment"].to_pylist(),
            "pool_seed": [self._config.seed] * len(keys),
            "input_score": [self._config.sampler.score] * len(keys),
            "clipping": [clipping.get(key) for key in keys],
            "similarity": [nearest[key][0] if key in nearest else None for key in keys],
            "similar_to": [nearest[key][1] if key in nearest else None for key in keys],
        }
        for field in COLUMNS:
            rows = rows.append_column(field, pa.array(columns[field.name], field.type))
        return rows

    def facts(self, totals: Totals) -> dict[str, Any]:
        """What the summary says.

        Raises:
            UserError: there is no usable clip.
        """
        if not totals.rows[OK]:
            why = ", ".join(f"{reason['reason']} {reason['count']}" for reason in totals.reasons())
            raise UserError(
                f"{self._run}: none of the {totals.rows.total()} clips is usable ({why}).", "Choose another checkpoint."
            )
        lines, similarity = [f"  {_left_out(self._left_out)}"] if self._left_out else [], None
        if nearest := self._measured[1]:
            percentiles = np.percentile([cosine for cosine, _ in nearest.values()], (50, 95, 100)).tolist()
            similarity = dict(zip(("p50", "p95", "max"), percentiles, strict=True))
            shown = ", ".join(f"{name} {value:.3f}" for name, value in similarity.items())
            lines.append(f"CLAP cosine with the most similar other clip: {shown}")
        reward = totals.rewards()["train"]["reward_score"]
        lines.append(f"reward: mean {reward['mean']:+.3f}, std {reward['std']:.3f}, max {reward['max']:+.3f}")
        return {"of": "prompts", "held_out": self._left_out, "similarity": similarity, "lines": lines}
