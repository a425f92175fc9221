"""Winner and loser under one prompt, out of a pool of generated clips: the data of CRPO (paper III-D, Stage 3).

Nobody voted on these pairs: a score ranks the candidates of a prompt. Human votes are in training/pairs.py.
"""

import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Annotated, Any, Literal, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from ttmray import inventory
from ttmray.config import Config, Location, added, differences, execution, identity
from ttmray.console import console
from ttmray.corpus.scores import COLUMN, protocol_of
from ttmray.corpus.unit import OK
from ttmray.errors import EXIT_OK, UserError
from ttmray.generation.filter import blend, counted, describe, numbers, prompt_prefix, read_pool, weighted
from ttmray.generation.prompts import plain, read_prompts
from ttmray.json_text import read_json
from ttmray.runs import note_of
from ttmray.storage import Folder, parquet_table

PAIRS, KIND = "pairs.parquet", "pairs"
METADATA_KEY = b"ttmray.pairs"
SCHEMA = pa.schema(
    [
        ("winner", pa.string()),
        ("loser", pa.string()),
        ("prompt_id", pa.string()),
        ("caption", pa.string()),
        ("winner_score", pa.float64()),  # what ranks them: see `by`
        ("loser_score", pa.float64()),
        ("margin", pa.float64()),
        ("winner_reward", pa.float64()),
        ("loser_reward", pa.float64()),
        ("winner_clap", pa.float64()),
        ("loser_clap", pa.float64()),
    ]
)


class PairsConfig(Config):
    """Which candidates become pairs."""

    by: Literal["clap", "reward", "blend", "rewards"] = "clap"
    """What ranks the candidates of a prompt: `clap_score` (the paper), the reward, their blend (z-scores over the
    whole pool, as in the filter of Stage 2), or the weighted sum `rewards`."""
    rewards: dict[Annotated[str, Field(pattern=COLUMN)], float] = added({})
    """Columns and weights of `by: rewards`."""
    dominate: dict[Annotated[str, Field(pattern=COLUMN)], Annotated[float, Field(ge=0)]] = added({})
    """Columns, in each of which a winner must be better than its loser by more than this, in the unit of the column
    (pairs by domination, MR-FlowDPO): what a pair teaches is then no trade of one reward for another. The pairs of a
    prompt are then chosen among all that hold, by the largest difference of what ranks, no clip twice. Empty: what
    ranks is enough."""
    reward: str = Field("instrumental_reward_score", pattern=COLUMN)
    """Column of the reward: of the index, or `<table>/<column>` of a table of `ttmray corpus rescore`."""
    reward_weight: float = Field(0.5, ge=0)
    """Of `blend`."""
    clap_weight: float = Field(0.5, ge=0)
    """Of `blend`."""
    margin: float = Field(0.0, ge=0)
    """The winner's score must be higher by more than this. Equal scores never make a pair. The paper names none."""
    count: int = Field(2000, ge=1)
    """At most this many pairs."""
    per_prompt: int = Field(1, ge=1)
    """Pairs of one prompt: the best with the worst, the second best with the second worst, ... The paper does not say
    how many candidates or pairs a prompt has."""
    held_out: Location | None = execution(None)
    """File of prompts that are never used (format of `ttmray generate`), by id or by text: those of the evaluation.
    What it holds is part of the identity of the pairs."""
    held_out_share: float = Field(0.0, ge=0, lt=1)
    """Share of all prompts that are never used, chosen by the hash of their text."""
    seed: int = Field(0, ge=0)
    """Of the choice among the prompts where they give more than `count` pairs."""

    @model_validator(mode="after")
    def _rewards_of_by(self) -> Self:
        if (self.by == "rewards") != bool(self.rewards):
            raise ValueError("by: rewards and rewards go together")
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        """What is read of the pool beside its own columns."""
        return (self.reward, *self.rewards, *self.dominate)


class Made(NamedTuple):
    """Rows of `SCHEMA` and the report as plain JSON types."""

    rows: list[dict[str, Any]]
    report: dict[str, Any]


def build_pairs(pool: str, output: str, config: PairsConfig) -> int:
    """Write `pairs.parquet`, `pairs.json` and `pairs.md` into the folder `output`.

    Raises:
        UserError: no finished pool, no pair, or an output folder of other pairs.
    """
    table, fingerprint = read_pool(pool, config.columns)
    held_out = () if config.held_out is None else [(p.id, p.text) for p in read_prompts(config.held_out)]
    digest = sha256(json.dumps(sorted(held_out)).encode()).hexdigest()
    what = {"pool": fingerprint, "pairs": identity(config) | {"held_out": digest if held_out else None}}
    if "/" in config.reward:  # a table may be made again by another head
        what["scores"] = protocol_of(Folder.at(pool), config.reward)
    if tables := {name: protocol_of(Folder.at(pool), name) for name in config.columns[1:] if "/" in name}:
        what["rewards"] = tables
    out = Folder.at(output)
    _refuse_others(out, what)
    inventory.reopen(out, KIND)
    rows, report = make_pairs(table, config, held_out, prompt_prefix(pool))
    if not rows:
        prompts = report["prompts"]
        way_out = "Sample more candidates per prompt, or lower the margin."
        if prompts.get("held out") == prompts["pool"]:
            way_out = "Sample a pool from other prompts, or lower held_out_share."
        raise UserError(f"{pool} gives no pair: {counted(prompts)}.", way_out)
    buffer = io.BytesIO()
    table_of_pairs = pa.Table.from_pylist(rows, SCHEMA).replace_schema_metadata(
        {METADATA_KEY: json.dumps(what, sort_keys=True)}
    )
    pq.write_table(table_of_pairs, buffer, compression="zstd")
    report["note"] = note_of(Folder.at(pool))
    out.write("pairs.json", json.dumps(report, indent=1).encode())
    out.write("pairs.md", markdown(report).encode())
    out.write(PAIRS, buffer.getvalue())
    inventory.note(out, KIND, ("pairs.json", "pairs.md", PAIRS))
    console.print(f"{len(rows)} pairs of {table.num_rows} clips: {out.path(PAIRS)}", markup=False)
    if len(rows) < config.count:
        console.print(f"fewer than {config.count}; prompts: {counted(report['prompts'])}", markup=False)
    return EXIT_OK


def _refuse_others(out: Folder, what: dict[str, Any]) -> None:
    if not out.exists(PAIRS):
        return
    try:
        old = _about(inventory.checked(out.path(PAIRS)), out.path(PAIRS))
    except UserError:
        return  # damaged: the same command writes them again
    if lines := differences(old, what):
        raise UserError(f"{out} holds other pairs:\n    " + "\n    ".join(lines), "Choose another folder.")


def read_pairs(path: str, pool: str | None = None) -> pa.Table:
    """Pairs of a file that `build_pairs` wrote.

    Args:
        pool: fingerprint that they must come from.

    Raises:
        UserError: no such file, damaged, empty, a pair of a clip with itself, or pairs of another pool.
    """
    data = inventory.checked(path)
    about = _about(data, path)
    try:
        table = parquet_table(data).select(SCHEMA.names).cast(SCHEMA)
    except (pa.ArrowException, KeyError, ValueError) as error:
        raise UserError(f"{path} does not hold preference pairs: {error}", "Make it with `ttmray pairs`.") from error
    if not table.num_rows:
        raise UserError(f"{path} holds no pairs.", "Make it with `ttmray pairs`.")
    same = table.filter(pc.equal(table["winner"], table["loser"]))
    if same.num_rows:
        raise UserError(f"{path}: {same['winner'][0]} is winner and loser of one pair.", "Remove that row.")
    if pool is not None and about.get("pool") != pool:
        raise UserError(f"{path} was made from another pool.", "Name the pool of these pairs in data.sources.")
    return table.replace_schema_metadata(None)


def pool_score(pool: str) -> float | None:
    """The score that a pool was sampled at; None where it was sampled without.

    Raises:
        UserError: no finished pool, or clips that were sampled at different scores.
    """
    scores = read_pool(pool)[0]["input_score"].unique().to_pylist()
    if len(scores) > 1:
        what = f"score is target, but {pool} was sampled at {len(scores)} scores."
        raise UserError(what, "Set score to a number, pair, own or null.")
    return None if scores[0] is None else float(scores[0])


def make_pairs(
    table: pa.Table, config: PairsConfig, held_out: Sequence[tuple[str, str]] = (), prefix: str = ""
) -> Made:
    """Pairs of a pool, the same for the same clips in any order.

    Candidates are ranked by score, equal ones by key. First comes one pair of every prompt, then second pairs, each
    time the prompts in the order of a hash, until there are `config.count`.

    Args:
        held_out: (id, text) of prompts that are never used; either may match.
        prefix: what captions of the pool have before their prompt.

    Raises:
        UserError: a blend of scores that are all equal.
    """
    ids, texts = {name for name, _ in held_out}, {plain(text, prefix) for _, text in held_out}
    rows = table.filter(pc.equal(table["status"], OK)).sort_by("key")
    score, axes = _scores(rows, config), np.empty((len(config.dominate), rows.num_rows))
    for axis, name in enumerate(config.dominate):
        axes[axis] = numbers(rows, name)
    finite = np.isfinite(score) & np.isfinite(axes).all(axis=0)
    rows, score, axes = rows.filter(pa.array(finite)), score[finite], axes[:, finite]
    columns = rows.select(["key", "prompt_id", "caption"]).to_pydict()
    reward, clap = numbers(rows, config.reward), numbers(rows, "clap_score")
    of_prompt: dict[str, list[int]] = {}
    for i, name in enumerate(columns["prompt_id"]):
        of_prompt.setdefault(name, []).append(i)
    prompts = Counter({"pool": len(set(table["prompt_id"].to_pylist()))})
    all_pairs: list[tuple[int, str, int, int]] = []
    for name, members in of_prompt.items():
        text = plain(columns["caption"][members[0]] or "", prefix)
        if name in ids or text in texts or _unit(text) < config.held_out_share:
            prompts["held out"] += 1
            continue
        if len(members) == 1:
            prompts["one candidate"] += 1
            continue
        ranked = sorted(members, key=lambda i: (-score[i], columns["key"][i]))
        pairs = _dominating(ranked, score, axes, config) if config.dominate else _extremes(ranked, score, config)
        prompts["with pairs" if pairs else "no domination" if config.dominate else "margin too small"] += 1
        all_pairs += [(place, name, best, worst) for place, (best, worst) in enumerate(pairs)]
    prompts["no usable candidate"] = prompts["pool"] - len(of_prompt)
    all_pairs.sort(key=lambda item: (item[0], _unit(f"{config.seed} {item[1]}"), item[1]))
    chosen = [(best, worst) for _, _, best, worst in all_pairs[: config.count]]
    pair_rows = [
        {
            "winner": columns["key"][best],
            "loser": columns["key"][worst],
            "prompt_id": columns["prompt_id"][best],
            "caption": columns["caption"][best],
            "winner_score": float(score[best]),
            "loser_score": float(score[worst]),
            "margin": float(score[best] - score[worst]),
            "winner_reward": _known(reward[best]),
            "loser_reward": _known(reward[worst]),
            "winner_clap": _known(clap[best]),
            "loser_clap": _known(clap[worst]),
        }
        for best, worst in chosen
    ]
    report: dict[str, Any] = {
        "by": " + ".join(f"{weight:g} {name}" for name, weight in config.rewards.items()) or config.by,
        "dominate": config.dominate,
        "clips": {"pool": table.num_rows, "ok": len(finite), "no score": int((~finite).sum())},
        "prompts": dict(prompts),
        "pairs": {"possible": len(all_pairs), "made": len(pair_rows)},
    }
    if pair_rows:
        best, worst = (np.array(side) for side in zip(*chosen, strict=True))
        report["margin"] = describe(score[best] - score[worst])
        for name, values in (("reward", reward), ("clap", clap)):
            report[f"winners_with_higher_{name}"] = float(np.mean(values[best] > values[worst]))
    return Made(pair_rows, report)


def _extremes(ranked: Sequence[int], score: np.ndarray, config: PairsConfig) -> list[tuple[int, int]]:
    """The best with the worst, the second best with the second worst, ..., of rows of one prompt in order."""
    possible = list(zip(ranked, reversed(ranked), strict=True))[: min(config.per_prompt, len(ranked) // 2)]
    return [(best, worst) for best, worst in possible if score[best] - score[worst] > config.margin]


def _dominating(
    ranked: Sequence[int], score: np.ndarray, axes: np.ndarray, config: PairsConfig
) -> list[tuple[int, int]]:
    """Pairs of rows of one prompt of which one is better in all columns, those that differ most first."""
    least = np.array(list(config.dominate.values()))
    possible = [
        (best, worst)
        for place, best in enumerate(ranked)
        for worst in ranked[place + 1 :]
        if score[best] - score[worst] > config.margin and (axes[:, best] - axes[:, worst] > least).all()
    ]
    possible.sort(key=lambda pair: score[pair[1]] - score[pair[0]])  # a stable sort: of equal ones the first in order
    pairs: list[tuple[int, int]] = []
    used: set[int] = set()
    for pair in possible:
        if len(pairs) < config.per_prompt and used.isdisjoint(pair):
            pairs.append(pair)
            used.update(pair)
    return pairs


def markdown(report: Mapping[str, Any]) -> str:
    """The report for people."""
    lines = [
        "# Preference pairs",
        "",
        *([f"> {report['note']}", ""] if report.get("note") else []),
        f"- ranked by {report['by']}",
    ]
    if margins := [f"{name} (by more than {least:g})" for name, least in report["dominate"].items()]:
        lines.append("- the winner is also better in each of: " + ", ".join(margins))
    lines += [f"- {name}: {counted(report[name])}" for name in ("pairs", "prompts", "clips")]
    lines.append("- margin: " + ", ".join(f"{name} {value:.4f}" for name, value in report["margin"].items()))
    for name in ("reward", "clap"):
        lines.append(f"- the winner has the higher {name} in {report[f'winners_with_higher_{name}']:.1%} of the pairs")
    return "\n".join(lines) + "\n"


def _scores(rows: pa.Table, config: PairsConfig) -> np.ndarray:
    """(n,) what ranks candidates; NaN where it is not known."""
    reward, clap = numbers(rows, config.reward), numbers(rows, "clap_score")
    if config.by == "rewards":
        return weighted(rows, config.rewards)
    if config.by != "blend":
        return clap if config.by == "clap" else reward
    score = np.full(len(reward), np.nan)
    known = np.isfinite(reward) & np.isfinite(clap)
    if known.any():
        score[known] = blend(reward[known], clap[known], config.reward_weight, config.clap_weight)
    return score


def _about(data: bytes, what: str) -> dict[str, Any]:
    try:
        return dict(read_json(pq.read_schema(pa.BufferReader(data)).metadata[METADATA_KEY]))
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{what} does not hold preference pairs.", "Make it with `ttmray pairs`.") from error


def _unit(text: str) -> float:
    """A number in [0, 1) that depends on a text alone."""
    return int.from_bytes(sha256(text.encode()).digest()[:8]) / 2**64


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
