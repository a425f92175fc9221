"""Which generated clips are worth learning from: gates, a blend of two z-scores, the top decile (paper III-D, Stage 2).

A pool (generation/pool.py) is a corpus run of generated clips, whose index has more columns than a corpus's.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from ttmray import inventory, pages
from ttmray.config import Config, added, differences, identity
from ttmray.console import console
from ttmray.corpus import index, shards
from ttmray.corpus.scores import COLUMN, protocol_of, with_columns
from ttmray.corpus.unit import OK
from ttmray.errors import EXIT_OK, UserError
from ttmray.generation.pool import COLUMNS
from ttmray.json_text import as_read, read_json
from ttmray.plugins import ENTRY, function_named
from ttmray.runs import RUN, note_of
from ttmray.storage import Folder

KEPT, WEIGHTED, REPORT = "kept.txt", "weights.csv", "selection.json"
SELECTED = "selection"
"""Kind of the folder."""
PERCENTILES = (5, 25, 50, 75, 90, 95)


class FilterConfig(Config):
    """What is kept of a pool. Gates are ours: the paper names none."""

    reward: str = Field("instrumental_reward_score", pattern=COLUMN)
    """Column of the reward: of the index, or `<table>/<column>` of a table of `ttmray corpus rescore`."""
    rule: str | None = added(None, pattern=ENTRY)
    """Rule of one's own in place of the blend, `module:function`: of the clips that pass the gates it is given the rows
    of the pool's index, ordered by key, and returns a number each, more for better clips. null: the blend (paper)."""
    rewards: dict[Annotated[str, Field(pattern=COLUMN)], float] = added({})
    """Columns and weights, whose sum ranks the clips in place of the blend: the very reward that other methods of
    tuning are trained on. Empty: the blend (paper)."""
    reward_weight: float = Field(0.5, ge=0)
    """Of its z-score in the blend. Only the ratio of the weights counts."""
    clap_weight: float = Field(0.5, ge=0)
    """Of the z-score of `clap_score`, the cosine of prompt and clip."""
    share: float = Field(0.1, gt=0, lt=1)
    """Share of the clips that pass the gates, rounded up."""
    count: int | None = Field(None, ge=1)
    """Number of clips instead of a share; the paper keeps 64."""
    per_prompt: int | None = Field(None, ge=1)
    """Most clips of one prompt; null: the best of all, whatever their prompts, as in the paper."""
    max_silence: float | None = Field(0.5, ge=0, le=1)
    """Largest share of silent 100 ms frames."""
    max_clipping: float | None = Field(0.01, ge=0, le=1)
    """Largest share of samples at full scale. The pool has rejected what is above its own `max_clipping`."""
    max_similarity: float | None = Field(0.99, ge=-1, le=1)
    """CLAP cosine from which a clip is a near-duplicate of a better one that is kept."""
    temperature: float | None = Field(None, gt=0)
    """null: the best `share` or `count`, all alike (paper). Else reward-weighted regression: every clip that passes the
    gates stays, and its loss has the weight exp(blend / temperature), scaled to a mean of 1."""
    max_weight: float = Field(20.0, ge=1)
    """Weights are cut off here before they are scaled."""

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if self.rule is not None and self.rewards:
            raise ValueError("rule and rewards both rank the clips; leave out one")
        return self


class Selection(NamedTuple):
    """Keys of the kept clips, best first, the report as plain JSON types, and the weights of their losses."""

    keys: list[str]
    report: dict[str, Any]
    weights: np.ndarray


def filter_pool(
    pool: str, output: str, config: FilterConfig, corpus: str | None = None, corpus_column: str | None = None
) -> int:
    """Choose clips of a finished pool; writes `selection.json`, `selection.md` and `kept.txt` into `output`, and where
    clips are weighted `weights.csv`.

    Args:
        corpus: run folder of the training corpus, whose rewards the kept ones are compared with, where the same head
            made both.
        corpus_column: its score column; default: that of the pool.

    Raises:
        UserError: no pool, too few clips, scores that are all equal, or an output folder of another selection.
    """
    table, fingerprint = read_pool(pool, (config.reward, *config.rewards))
    out = Folder.at(output)
    what = _identity(pool, fingerprint, config)
    _refuse_another(out, what)
    inventory.reopen(out, SELECTED)
    embeddings = {} if config.max_similarity is None else read_embeddings(Folder.at(pool), table)
    try:
        keys, report, weights = select(table, config, embeddings)
    except UserError as error:
        raise UserError(f"{pool}: {error.message}", error.hint) from error
    rewards = report["distributions"].get("reward")  # not there where the reward has no weight, and a clip none
    if corpus is not None and rewards is not None:
        column = corpus_column or config.reward
        ours, theirs = protocol_of(Folder.at(pool), config.reward), protocol_of(Folder.at(corpus), column)
        if ours == theirs:
            report["train"] = compare(train_rewards(corpus, column), rewards["after"]["mean"])
        else:
            console.print(f"not compared with {corpus}: {theirs} made its {column}, {ours} the pool's", markup=False)
    report = {"identity": what, "note": note_of(Folder.at(pool)), **report}
    out.write(REPORT, json.dumps(report, indent=1).encode())
    out.write("selection.md", markdown(report).encode())
    if config.temperature is not None:
        lines = [f"{key},{weight:.9g}\n" for key, weight in zip(keys, weights.tolist(), strict=True)]
        out.write(WEIGHTED, ("key,weight\n" + "".join(lines)).encode())
    out.write(KEPT, "".join(f"{key}\n" for key in keys).encode())
    files = (REPORT, "selection.md", KEPT, *((WEIGHTED,) if config.temperature is not None else ()))
    inventory.note(out, SELECTED, files)
    console.print(f"{len(keys)} of {table.num_rows} clips kept: {out.path(KEPT)}", markup=False)
    return EXIT_OK


def refuse_another_selection(pool: str, output: str, config: FilterConfig) -> None:
    """See that the selection in `output`, if there is one, is that of `filter_pool` with these arguments.

    Raises:
        UserError: it is another one, or there is no such pool.
    """
    _refuse_another(Folder.at(output), _identity(pool, read_pool(pool)[1], config))


def _identity(pool: str, fingerprint: str, config: FilterConfig) -> dict[str, Any]:
    what: dict[str, Any] = {"pool": fingerprint, "filter": identity(config)}
    if "/" in config.reward:  # a table may be made again by another head
        what["scores"] = protocol_of(Folder.at(pool), config.reward)
    if tables := {name: protocol_of(Folder.at(pool), name) for name in config.rewards if "/" in name}:
        what["rewards"] = tables
    return dict(as_read(what))


def _refuse_another(out: Folder, what: dict[str, Any]) -> None:
    if out.exists(REPORT):
        try:
            old = read_json(inventory.checked(out.path(REPORT)))["identity"]
        except (UserError, ValueError, KeyError, TypeError):
            return  # damaged: the same command writes it again
        lines = differences(old, what)
        if lines:
            raise UserError(f"{out} holds another selection:\n    " + "\n    ".join(lines), "Choose another folder.")


def read_pool(folder: str, columns: Sequence[str] = ()) -> tuple[pa.Table, str]:
    """All rows of a finished pool, and its fingerprint.

    Args:
        columns: score columns that are needed, of the index or of tables of scores.

    Raises:
        UserError: not finished, damaged, or no pool, or a score column that it does not have.
    """
    run = Folder.at(folder)
    if not run.exists(index.MERGED):
        raise UserError(f"{folder} is not a finished pool: it has no {index.MERGED}.", "Finish its generation.")
    table = index.read_merged(run)
    missing = [name for name in COLUMNS.names if name not in table.column_names]
    if missing:
        raise UserError(f"{folder} is no pool: its index has no column {missing[0]}.", "Make one with `ttmray pool`.")
    table = with_columns(run, table, columns)
    try:
        return table, str(read_json(run.read(RUN))["fingerprint"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run.path(RUN)} does not describe a run.", "Restore it, or make the pool again.") from error


def prompt_prefix(folder: str) -> str:
    """What captions of a pool have before their prompt: the sampler's prefix where `caption` is `prefixed`."""
    config = Folder.at(folder).read_json(RUN, "config")["config"]
    return str(config["sampler"]["prefix"]) if config.get("caption") == "prefixed" else ""


def read_embeddings(run: Folder, table: pa.Table) -> dict[str, np.ndarray]:
    """(512,) CLAP embedding of every ok clip by its key.

    Raises:
        UserError: a shard is missing or damaged.
    """
    rows = table.filter(pc.equal(table["status"], OK))
    embeddings = {}
    for name in sorted(set(rows["shard"].to_pylist())):
        for key, sample in shards.read_samples(run.read(name), run.path(name)):
            embeddings[key] = np.atleast_2d(sample["clap_audio.npy"])[0].astype(np.float64)
    for row in rows.select(["key", "shard"]).to_pylist():
        if row["key"] not in embeddings:
            raise UserError(f"{run.path(row['shard'])} is damaged: clip {row['key']} is not there.", shards.mend(run))
    return embeddings


def z_scores(values: np.ndarray, what: str) -> np.ndarray:
    """(n,) values with mean 0 and standard deviation 1 (ddof 0).

    Raises:
        UserError: they are all equal.
    """
    spread = values.std()
    if not spread > 1e-12 * np.abs(values).max(initial=0):  # sums of equal numbers round
        raise UserError(
            f"{what} is the same ({values[0]:g}) for all {len(values)} clips, so it ranks none.",
            "Give it weight 0, or score the pool with another model.",
        )
    return (values - values.mean()) / spread


def blend(reward: np.ndarray, clap: np.ndarray, reward_weight: float, clap_weight: float) -> np.ndarray:
    """(n,) weighted mean of the z-scores of rewards and CLAP scores; equal weights are the paper's.

    Raises:
        UserError: no weight, or a score that is the same for all.
    """
    total = reward_weight + clap_weight
    if total <= 0:
        raise UserError("reward_weight and clap_weight are both 0.", "Give one of them a weight.")
    blended = np.zeros(len(reward))
    for name, values, weight in (("the reward", reward, reward_weight), ("clap_score", clap, clap_weight)):
        if weight:
            blended += weight / total * z_scores(values, name)
    return blended


def weighted(rows: pa.Table, rewards: Mapping[str, float]) -> np.ndarray:
    """(n,) float64 weighted sum of columns; NaN where one of them is not known."""
    total = np.zeros(rows.num_rows)
    for name, weight in rewards.items():
        total += weight * numbers(rows, name) if weight else 0.0
    return total


def by_rule(rows: pa.Table, rule: str) -> np.ndarray:
    """(n,) float64 of what a rule of one's own says to the rows, see `FilterConfig.rule`.

    Raises:
        UserError: there is no such rule, it fails, or it does not give a finite number each.
    """
    function = function_named(rule, "rule")
    try:
        values = np.asarray(function(rows), dtype=np.float64)
    except Exception as error:  # code of others may raise anything
        raise UserError(
            f"rule: {rule} failed: {type(error).__name__}: {error}", "It gets a pyarrow table of the pool's rows."
        ) from error
    if values.shape != (rows.num_rows,) or not np.isfinite(values).all():
        raise UserError(
            f"rule: {rule} gave {values.shape} numbers, or some that are not finite, for {rows.num_rows} clips.",
            "It must return one finite number per row.",
        )
    return values


BY_CHANCE = f"{__name__}:by_chance"
"""A rule for those who want to know what choosing adds."""


def by_chance(rows: pa.Table) -> np.ndarray:
    """(n,) numbers that follow from a clip's key and nothing else: as a rule, clips are drawn by chance."""
    digests = (hashlib.sha256(key.encode()).digest() for key in rows["key"].to_pylist())
    return np.array([int.from_bytes(digest[:6], "big") / (1 << 48) for digest in digests])


def excluded(table: pa.Table, config: FilterConfig) -> np.ndarray:
    """(n,) why a clip does not take part, "" where it does. What was not measured does not pass."""
    ok = table["status"].to_numpy() == OK
    reason = np.where(ok, "", table["status"].to_numpy()).astype(object)

    def refuse(where: np.ndarray, why: str) -> None:
        reason[(reason == "") & where] = why

    ranking = config.rewards or {config.reward: config.reward_weight, "clap_score": config.clap_weight}
    for name, weight in ranking.items():
        if weight:
            refuse(~np.isfinite(numbers(table, name)), f"no {name}")
    for name, bound in (("silence", config.max_silence), ("clipping", config.max_clipping)):
        if bound is not None:
            values = numbers(table, name)
            refuse(np.isnan(values), f"no {name}")
            refuse(values > bound, f"{name} > {bound:g}")
    return reason


def numbers(table: pa.Table, column: str) -> np.ndarray:
    """(n,) float64 of a column; NaN for null."""
    return table[column].to_numpy().astype(np.float64)


def select(table: pa.Table, config: FilterConfig, embeddings: Mapping[str, np.ndarray]) -> Selection:
    """The best clips of a pool by the blend, whose z-scores are those of all clips that pass the gates.

    The same clips in any order give the same selection: equal blends are ordered by key.

    Args:
        embeddings: (512,) by key; needed where `config.max_similarity` is set.

    Raises:
        UserError: scores that are all equal, or fewer clips than are to be kept.
    """
    reason = excluded(table, config)
    rows = table.filter(pa.array(reason == ""))
    out = dict(sorted(Counter(why for why in reason.tolist() if why).items()))
    count = config.count or math.ceil(round(config.share * rows.num_rows, 9))
    least = count + 1 if config.count else math.ceil(round(1 / config.share, 9))
    least = least if config.temperature is None else 2
    if rows.num_rows < least:
        raise UserError(
            f"{rows.num_rows} of {table.num_rows} clips can be chosen from (left out: {counted(out)}), "
            f"at least {least} are needed to keep the best {config.count or f'{config.share:.0%}'}.",
            "Sample more candidates, keep another share, or loosen the gates.",
        )
    # sums must not depend on the order of the rows
    rows = rows.sort_by("key")
    reward, clap = numbers(rows, config.reward), numbers(rows, "clap_score")
    if config.rewards:
        blended = z_scores(weighted(rows, config.rewards), "the weighted sum")
    elif config.rule is None:
        blended = blend(reward, clap, config.reward_weight, config.clap_weight)
    else:
        blended = by_rule(rows, config.rule)
    best_first = np.argsort(-blended, kind="stable")
    count = count if config.temperature is None else rows.num_rows
    picked, passed_over = _pick(rows, best_first, count, config, embeddings)
    if config.temperature is None and len(picked) < count:
        raise UserError(
            f"only {len(picked)} of the {count} clips to be kept are left (passed over: {counted(passed_over)}).",
            "Sample more candidates, or raise per_prompt or max_similarity.",
        )
    of_prompt = rows["prompt_id"].to_pylist()
    eligible, chosen = Counter(of_prompt), Counter(of_prompt[i] for i in picked)
    parts = {"reward": reward, "clap_score": clap, "blend": blended}
    report = {
        "clips": {"pool": table.num_rows, "eligible": rows.num_rows, "kept": len(picked)},
        "excluded": out,
        "passed_over": passed_over,
        "distributions": {
            name: {"before": describe(values), "after": describe(values[picked])}
            for name, values in parts.items()
            if np.isfinite(values).all()
        },
        "prompts": {
            "pool": len(set(table["prompt_id"].to_pylist())),
            "kept": len(chosen),
            "largest_share": max(chosen.values()) / len(picked),
            "each": {name: {"eligible": eligible[name], "kept": chosen[name]} for name in sorted(eligible)},
        },
    }
    weights = np.ones(len(picked))
    if config.temperature is not None:
        weights = reward_weights(blended[picked], config.temperature, config.max_weight)
        effective = float(weights.sum() ** 2 / np.square(weights).sum())
        report["weights"] = {"largest": float(weights.max()), "smallest": float(weights.min()), "effective": effective}
    keys = rows["key"].to_pylist()
    return Selection([keys[i] for i in picked], report, weights)


def reward_weights(blended: np.ndarray, temperature: float, most: float) -> np.ndarray:
    """(n,) weights of mean 1 for reward-weighted regression (Peters & Schaal 2007): exp(blend / temperature), at most
    `most` before they are scaled."""
    weights = np.exp(np.minimum(blended / temperature, np.log(most)))
    return weights / weights.mean()


def _pick(
    rows: pa.Table, order: np.ndarray, count: int, config: FilterConfig, embeddings: Mapping[str, np.ndarray]
) -> tuple[list[int], dict[str, int]]:
    """Rows from the best on, but no near-duplicates of better ones and no more of a prompt than allowed."""
    keys, prompts = rows["key"].to_pylist(), rows["prompt_id"].to_pylist()
    chosen: list[int] = []
    directions: list[np.ndarray] = []
    of_prompt: Counter[str] = Counter()
    passed_over = {"prompt has enough": 0, "near-duplicate": 0}
    for i in order.tolist():
        if len(chosen) == count:
            break
        if config.per_prompt is not None and of_prompt[prompts[i]] >= config.per_prompt:
            passed_over["prompt has enough"] += 1
            continue
        if config.max_similarity is not None:
            vector = embeddings[keys[i]] / np.linalg.norm(embeddings[keys[i]])
            if directions and np.max(np.stack(directions) @ vector) >= config.max_similarity:
                passed_over["near-duplicate"] += 1
                continue
            directions.append(vector)
        chosen.append(i)
        of_prompt[prompts[i]] += 1
    return chosen, passed_over


def describe(values: np.ndarray) -> dict[str, float]:
    """Mean, standard deviation (ddof 1), extremes and percentiles of (n,) numbers."""
    spread = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    summary = {"mean": float(values.mean()), "std": spread, "min": float(values.min()), "max": float(values.max())}
    return summary | {f"p{p}": float(np.percentile(values, p)) for p in PERCENTILES}


def train_rewards(corpus: str, column: str) -> np.ndarray:
    """(n,) float64, the finite rewards of the train split of a corpus.

    Raises:
        UserError: there are none.
    """
    run = Folder.at(corpus)
    table = with_columns(run, index.read_index(run), (column,))
    rows = table.filter(pc.and_(pc.equal(table["status"], OK), pc.equal(table["split"], "train")))
    values = numbers(rows, column)
    values = values[np.isfinite(values)]
    if not len(values):
        raise UserError(f"{corpus} has no {column} in its train split.", "Compare with another corpus, or with none.")
    return values


def compare(train: np.ndarray, kept_mean: float) -> dict[str, Any]:
    """Where the mean reward of the kept clips lies among those of n training clips, (n,).

    In the paper it is +1.05, in the upper 20 %.
    """
    return {
        "clips": len(train),
        **describe(train),
        "kept_mean": kept_mean,
        "share_at_or_above_kept_mean": float(np.mean(train >= kept_mean)),
    }


def markdown(report: Mapping[str, Any]) -> str:
    """The report for people."""
    columns = ["mean", "std", "min", *(f"p{p}" for p in PERCENTILES), "max"]
    rows = {
        f"{name}, {when}": values for name, part in report["distributions"].items() for when, values in part.items()
    }
    rows |= {"reward, training clips": report["train"]} if "train" in report else {}
    return pages.render(
        "selection.md.j2",
        **{"weights": None, "train": None, "note": "", **report},
        counted=counted,
        columns=columns,
        rows=[(name, *(f"{row[c]:+.3f}" for c in columns)) for name, row in rows.items()],
        each=[(name, row["eligible"], row["kept"]) for name, row in report["prompts"]["each"].items() if row["kept"]],
    )


def counted(counts: Mapping[str, int]) -> str:
    """Names with their counts above 0, for people."""
    return ", ".join(f"{why} {count}" for why, count in counts.items() if count) or "none"
