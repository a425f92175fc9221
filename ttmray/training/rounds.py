"""The rounds of online GRPO: whose weights draw, what was drawn as transitions to learn from, what is watched.

A round is `transitions/round-<n>-<digest>/`: the weights that draw, and a file per prompt. It goes when no checkpoint
that is kept goes back to it. `rounds/round-<n>.json` stays: rewards, what became of held-out prompts by the same
weights, diversity, distance from the parent. `watch/round-<n>-<digest>/` has scores and embeddings of held-out clips,
`watch/parent/` those of the parent from the same noise.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ttmray.console import console
from ttmray.errors import UserError
from ttmray.generation.prompts import Prompt
from ttmray.json_text import read_json
from ttmray.models.backbone import FluxAudio
from ttmray.statistics import vendi_score
from ttmray.storage import Folder
from ttmray.training.checkpoint import committed
from ttmray.training.launch import TRANSITIONS
from ttmray.training.policy_gradient import group_advantages
from ttmray.training.rollouts import POLL_S, ClipGroup
from ttmray.training.tensors import pack

ROUNDS, WATCH, POLICY = "rounds", "watch", "policy.safetensors"
DIGITS = 12
"""Of the digest of a policy in the name of its round's folder."""
Column = Literal["reward_score", "clap_score"]
COLUMNS: tuple[Column, ...] = ("reward_score", "clap_score")
"""What a clip is scored by."""
Rewards = Mapping[Column, float]
"""Weights of columns, whose sum is the reward."""


def policy_bytes(
    tensors: Mapping[str, Tensor], backbone: Mapping[str, Any], facts: Mapping[str, Any]
) -> tuple[bytes, str]:
    """The file of a policy's weights, tensors of any shape, that `load_backbone` reads; and the start of its digest."""
    about = {"kind": "ttmray policy", "backbone": dict(backbone), **facts}
    data = pack({name: tensor.cpu() for name, tensor in tensors.items()}, about)
    return data, _digest(data)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:DIGITS]


def round_name(number: int) -> str:
    return f"round-{number:05d}"


def open_round(out: Folder, number: int, model: FluxAudio, facts: Mapping[str, Any], first: bool) -> Folder:
    """The folder of a round that begins now, with the model's weights in it.

    Args:
        first: this process writes; the others wait until the weights are there.
    """
    data, digest = policy_bytes(model.state_dict(), model.config.to_dict(), facts)
    folder = out.sub(TRANSITIONS).sub(f"{round_name(number)}-{digest}")
    if first and not (folder.exists(POLICY) and _digest(folder.read(POLICY)) == digest):
        folder.write(POLICY, data)
    while not folder.exists(POLICY):
        time.sleep(POLL_S)
    return folder


def reopen_round(out: Folder, number: int) -> Folder:
    """The folder of a round that a checkpoint lies within.

    Raises:
        UserError: the weights that drew it are gone.
    """
    report = read_report(out, number)
    if report is not None:
        folder = out.sub(TRANSITIONS).sub(f"{round_name(number)}-{report['policy']}")
        if folder.exists(POLICY):
            return folder
    raise UserError(
        f"{out}: the checkpoint lies within round {number}, whose {TRANSITIONS} are gone.",
        "Delete this checkpoint: the same command goes on from the one before it.",
    )


def sweep_rounds(out: Folder, updates: int, keep: int, current: int) -> None:
    """Delete transitions of rounds that none of the newest checkpoints goes back to.

    Args:
        updates: per round.
        keep: so many of the newest checkpoints count.
        current: round that begins.
    """
    steps = [int(name.removeprefix("step-")) for name in committed(out.sub("checkpoints"))[:keep]]
    if len(steps) < keep:
        return
    oldest, folder = min(min(steps) // updates, current), out.sub(TRANSITIONS)
    for file in folder.files(sizes=False):
        if int(file.name.split("-")[1]) < oldest:
            folder.delete(file.name)


class Transitions(NamedTuple):
    """A micro-batch of B drawn steps."""

    numbers: Tensor
    """(B,) int64: sample numbers."""
    keys: list[str]
    """Of their clips."""
    step: Tensor
    """(B,) int64."""
    x: Tensor
    """(B, N, C) float16 state before the step."""
    after: Tensor
    """(B, N, C) float16 state that was drawn."""
    reference: Tensor
    """(B, N, C) float16 mean of the step by the parent."""
    log_prob: Tensor
    """(B,) of what was drawn, by the policy that drew it."""
    advantage: Tensor
    """(B,)."""
    tokens: Tensor
    """(2, B, T, D) features of the text and of the negative text."""
    pooled: Tensor
    """(2, B, E)."""

    def to(self, device: torch.device | str) -> "Transitions":
        """The same on a device."""
        moved = {name: value.to(device) for name, value in self._asdict().items() if isinstance(value, Tensor)}
        return Transitions(**{**self._asdict(), **moved})


class Round:
    """What was drawn in a round, as numbered transitions: clips in an order by the seed, all trained steps of one after
    another, again from the start when all were seen.

    Args:
        groups: of the round's prompts.
        rewards: weights of the columns of rows.
        steps: trained steps of a clip.
        seed: of the order.

    Raises:
        UserError: no clip was scored.
    """

    def __init__(
        self,
        groups: Sequence[ClipGroup],
        rewards: Rewards,
        steps: Sequence[int],
        *,
        global_std: bool,
        limit: float,
        seed: int,
    ) -> None:
        self.groups, self.steps = groups, list(steps)
        places = [(g, i) for g, group in enumerate(groups) for i in range(len(group.ok))]
        if not places:
            reasons = dict(Counter(row["reason"] for group in groups for row in group.rows))
            raise UserError(f"no clip of the round was scored: {reasons}.", "Look at silence_dbfs and max_clipping.")
        rows = [groups[g].ok[i] for g, i in places]
        self.rewards = np.array([reward_of(row, rewards) for row in rows])
        names = [row["prompt_id"] for row in rows]
        self.advantages = group_advantages(self.rewards, names, global_std=global_std, limit=limit)
        useful = np.flatnonzero(self.advantages)
        self.left_out = len(places) - len(useful)
        order = useful if len(useful) else np.arange(len(places))  # nothing to learn: the KL alone
        np.random.default_rng(seed).shuffle(order)
        self.places, self.order = places, order

    def __len__(self) -> int:
        """Transitions until all were seen."""
        return len(self.order) * len(self.steps)

    def read(self, numbers: Sequence[int], first: int) -> Transitions:
        """Transitions of sample numbers, of which `first` is the round's first."""
        chosen = []
        for number in numbers:
            clip, step = divmod((number - first) % len(self), len(self.steps))
            chosen.append((int(self.order[clip]), self.steps[step]))
        at = [(self.groups[g].tensors, i, clip, s) for clip, s in chosen for g, i in (self.places[clip],)]
        return Transitions(
            numbers=torch.tensor(list(numbers)),
            keys=[self.groups[g].ok[i]["key"] for clip, _ in chosen for g, i in (self.places[clip],)],
            step=torch.tensor([s for _, _, _, s in at]),
            x=torch.stack([tensors["states"][i, s] for tensors, i, _, s in at]),
            after=torch.stack([tensors["states"][i, s + 1] for tensors, i, _, s in at]),
            reference=torch.stack([tensors["means"][i, s] for tensors, i, _, s in at]),
            log_prob=torch.stack([tensors["log_probs"][i, s] for tensors, i, _, s in at]),
            advantage=torch.tensor([self.advantages[clip] for _, _, clip, _ in at], dtype=torch.float32),
            tokens=torch.stack([tensors["tokens"] for tensors, *_ in at], 1),
            pooled=torch.stack([tensors["pooled"] for tensors, *_ in at], 1),
        )


def reward_of(row: Mapping[str, Any], rewards: Rewards) -> float:
    """The weighted sum of a row's columns."""
    return float(sum(weight * row[name] for name, weight in rewards.items()))


def describe_round(drawn: Round, groups: Sequence[ClipGroup]) -> dict[str, Any]:
    """Numbers of what was drawn: rewards, losses of clips, how unlike each other the clips of a prompt are."""
    rows = [row for group in groups for row in group.rows]
    ok = [row for group in groups for row in group.ok]
    clap = [group.tensors["clap_audio"].double().numpy() for group in groups if len(group.ok) > 1]
    spread = [float((1 - c @ c.T)[~np.eye(len(c), dtype=bool)].mean()) for c in clap]
    return {
        "reward": float(drawn.rewards.mean()),
        "reward_error": _error(_of_groups(drawn.rewards, [len(group.ok) for group in groups])),
        **{f"mean_{name}": float(np.mean([row[name] for row in ok])) for name in COLUMNS},
        "clips": len(rows),
        "failed": len(rows) - len(ok),
        "reasons": dict(Counter(row["reason"] for row in rows if row["reason"])),
        "left_out": drawn.left_out,
        "group_spread": float(np.mean(spread)) if spread else None,
        "passes": len(drawn),
        "rows": [
            {name: row[name] for name in ("key", *COLUMNS)} | {"reward": reward, "advantage": advantage}
            for row, reward, advantage in zip(ok, drawn.rewards.tolist(), drawn.advantages.tolist(), strict=True)
        ],
    }


def describe_watched(groups: Sequence[ClipGroup], parents: Sequence[ClipGroup], rewards: Rewards) -> dict[str, Any]:
    """Numbers of held-out clips, and of the same draws by the parent: scores, their mean change with its standard
    error, diversity (Vendi score of CLAP embeddings) and distance (mean of 1 - cosine between a clip and the parent's
    of the same noise)."""
    pairs, counts = [], []
    for group, parent in zip(groups, parents, strict=True):
        theirs = {row["key"]: i for i, row in enumerate(parent.ok)}
        of_prompt = [
            (row, group.tensors["clap_audio"][i], parent.ok[j], parent.tensors["clap_audio"][j])
            for i, row in enumerate(group.ok)
            if (j := theirs.get(row["key"])) is not None
        ]
        pairs += of_prompt
        counts.append(len(of_prompt))
    own = [group.tensors["clap_audio"] for group in groups if group.ok]
    numbers: dict[str, Any] = {
        "clips": sum(len(group.rows) for group in groups),
        "failed": sum(len(group.rows) - len(group.ok) for group in groups),
        "diversity": vendi_score(torch.cat(own).double().numpy()) if own else None,
        "distance": float(np.mean([1 - float(a.double() @ b.double()) for _, a, _, b in pairs])) if pairs else None,
        "scores": {},
    }
    watched: dict[str, Rewards] = {"reward": rewards, **{name: {name: 1.0} for name in COLUMNS}}
    for name, weights in watched.items():
        values = np.array([(reward_of(row, weights), reward_of(old, weights)) for row, _, old, _ in pairs])
        if len(values):
            change = values[:, 0] - values[:, 1]
            numbers["scores"][name] = {
                "mean": float(values[:, 0].mean()),
                "change": float(change.mean()),
                "error": _error(_of_groups(change, counts)),
            }
    return numbers


def hacked(report: Mapping[str, Any], start: Mapping[str, Any]) -> str | None:
    """A warning where the reward that is trained has risen since the first round while a score of held-out clips, the
    reward itself among them, has fallen from the parent's, both by more than two standard errors over prompts; else
    None. One prompt has no error and warns of nothing."""
    if "reward" not in report or not report.get("held_out"):
        return None
    rise = report["reward"] - start["reward"]
    if rise <= 2 * float(np.hypot(report["reward_error"], start["reward_error"])):
        return None
    scores = report["held_out"]["scores"]
    fallen = [name for name, score in scores.items() if score["error"] and score["change"] < -2 * score["error"]]
    if not fallen:
        return None
    said = ", ".join(f"{name} {scores[name]['change']:+.4g} +- {scores[name]['error']:.2g}" for name in fallen)
    return (
        f"round {report['round']}: the trained reward has risen by {rise:.4g}, and on held-out prompts fell: {said}. "
        "The policy may be exploiting the reward: take an earlier checkpoint, raise beta, or add a reward."
    )


def _of_groups(values: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """(n,) values of clips -> the mean of each group that has any: clips of one prompt are not independent."""
    parts = np.split(np.asarray(values), np.cumsum(counts)[:-1])
    return np.array([part.mean() for part in parts if len(part)])


def _error(values: np.ndarray) -> float:
    """Standard error of the mean of values (n,)."""
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0


def read_report(out: Folder, number: int) -> dict[str, Any] | None:
    """`rounds/round-<n>.json`; None where there is none."""
    name = f"{ROUNDS}/{round_name(number)}.json"
    if not out.exists(name):
        return None
    try:
        report: dict[str, Any] = read_json(out.read(name))
    except ValueError:
        console.print(f"{out.path(name)} is damaged", style="yellow", markup=False)
        return None
    return report


def write_report(out: Folder, report: Mapping[str, Any]) -> None:
    """Write a round's report, and say what it says."""
    out.write(f"{ROUNDS}/{round_name(report['round'])}.json", json.dumps(report, indent=1).encode())
    parts = [f"round {report['round']}"]
    if "reward" in report:
        lost = f", {report['failed']} of {report['clips']} clips failed" if report["failed"] else ""
        parts.append(f"reward {report['reward']:.4g} +- {report['reward_error']:.2g}{lost}")
    if held_out := report.get("held_out"):
        changes = [f"{name} {score['mean']:.4g} ({score['change']:+.3g})" for name, score in held_out["scores"].items()]
        parts.append(f"held out: {', '.join(changes)}")
        parts += [f"{name} {held_out[name]:.3g}" for name in ("diversity", "distance") if held_out[name] is not None]
    console.print(" | ".join(parts), markup=False)
    if report.get("warning"):
        console.print(report["warning"], style="yellow", markup=False)


def prompts_of_round(prompts: Sequence[Prompt], number: int, count: int, seed: int) -> list[Prompt]:
    """The prompts of a round: all in turn, in another order each time, none twice in a round."""
    per_epoch = len(prompts) // count
    epoch, place = divmod(number, per_epoch)
    order = np.random.default_rng([seed, epoch]).permutation(len(prompts))
    return [prompts[i] for i in order[place * count : (place + 1) * count]]
