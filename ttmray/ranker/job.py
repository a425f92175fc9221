"""The ranker job from votes to a head that `load_tunejury` reads: pairs, features, training, report.

Resume is relaunch: encoded clips, trained heads and the last checkpoint of an unfinished one are kept.
"""

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from ttmray import cost, inventory, runs
from ttmray.cluster import ActorsConfig, each
from ttmray.config import Config, Location, execution, fingerprint, identity
from ttmray.console import console, meter
from ttmray.errors import EXIT_OK, UserError
from ttmray.models.bundle import DEFAULT, BundleName, open_bundle
from ttmray.models.devices import resolve_device
from ttmray.models.plans import embedding_flops, show_plan, weights_rows
from ttmray.models.tunejury import BLOCKS, VARIANTS, TuneJury, load_tunejury
from ttmray.ranker import report as report
from ttmray.ranker.features import EncodingConfig, Features, extract
from ttmray.ranker.heads import HeadConfig, margins, pack, scores, train_head
from ttmray.ranker.votes import SPLITS, Dropped, Pair, PairSource, PairSplit, read_votes, split_pairs
from ttmray.runs import RUN, SUCCESS
from ttmray.storage import Folder

PACKED, HEAD, METRICS = "packed.safetensors", "tunejury", "metrics.json"


class TrainingConfig(ActorsConfig):
    """Where heads are trained: one actor trains one head at a time."""

    threads: int | None = Field(None, ge=1)
    """Threads of torch; default: all cores of this process, or `cpus` of a Ray actor."""
    checkpoint_every: int = Field(10, ge=1)
    """Epochs between checkpoints."""


class RankerConfig(Config):
    """`jobs/train_ranker.py` and `ttmray train-ranker`."""

    sources: tuple[PairSource, ...] = Field(min_length=1)
    """Tables of votes."""
    output: Location = execution()
    """Run folder: a local path or s3:// prefix."""
    bundle: BundleName = DEFAULT
    """Encoders. Those of `micro` know the music of the built-in composer alone; those of `debug` are untrained."""
    split: PairSplit = PairSplit()
    variants: tuple[Literal["A1", "A2", "A3", "A4", "A5", "A6", "A7"], ...] = Field(("A7",), min_length=1)
    """Inputs of the heads: A1 CLAP audio, A2 MERT, A3 text, A4 CLAP and MERT, A5 CLAP and text, A6 MERT and text, A7
    all. The first one becomes `tunejury.safetensors`."""
    head: HeadConfig = HeadConfig()
    seed: int = 42
    """Of the first head of every variant."""
    seeds: int = Field(1, ge=1)
    """Heads per variant, with seeds from `seed` on; their mean margin is reported as the ensemble."""
    leave_out: tuple[str, ...] = ()
    """Sources that are left out, each for one more head of the first variant: of training and of the choice of the
    best epoch."""
    max_missing: float = Field(0.01, ge=0, le=1)
    """The job stops when a greater share of the pairs has a clip that is missing or cannot be encoded."""
    resample: Literal["pair", "prompt", "systems"] = "prompt"
    """What the bootstrap of the intervals draws: pairs are not independent where they share a prompt."""
    encoding: EncodingConfig = execution(EncodingConfig())
    training: TrainingConfig = execution(TrainingConfig())

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names) or len(set(self.variants)) < len(self.variants):
            raise ValueError("every source and every variant may be named once")
        return self


@dataclass(frozen=True)
class HeadRun:
    """One head to train."""

    variant: str
    seed: int
    left_out: str = ""

    @property
    def name(self) -> str:
        return f"{self.variant}-seed{self.seed}" + (f"-without-{self.left_out}" if self.left_out else "")


def train_ranker(config: RankerConfig, *, plan_only: bool = False) -> int:
    """Run, or go on with, the ranker job; returns the exit code.

    Args:
        plan_only: say what would be done, and stop.

    Raises:
        UserError: for everything that the user can mend.
    """
    run = Folder.at(config.output)
    bundle = open_bundle(config.bundle)
    if bundle.note and not plan_only:
        console.print(bundle.note, style="yellow")
    pairs, dropped = read_votes(config.sources)
    if not pairs and dropped:
        why = ", ".join(f"{count} {reason}" for reason, count in Counter(row.reason for row in dropped).most_common())
        raise UserError(f"none of {len(dropped)} votes can be used: {why}.", f"The first is {dropped[0].message}.")
    splits, across = split_pairs(pairs, config.split)
    used = [pair for split in SPLITS for pair in splits[split]]
    unknown = set(config.leave_out) - {pair.source for pair in used}
    if unknown:
        raise UserError(f"leave_out: no pair of {', '.join(sorted(unknown))}.", "Name sources of the tables.")
    digest = fingerprint([[p.id, p.source, p.target, p.text, p.split] for p in used])
    if plan_only:
        return _show_plan(run, config, splits, len(dropped + across), digest)
    _claim(run, config, digest)
    _forget_damaged(run)
    with cost.account(run):
        return _train(config, run, splits, used, dropped + across)


def _train(
    config: RankerConfig, run: Folder, splits: dict[str, list[Pair]], used: Sequence[Pair], dropped: list[Dropped]
) -> int:
    """Features, heads and report; `used` are the pairs of all splits."""
    features = extract(
        (c for p in used for c in (p.a, p.b)), (p.text for p in used), config.bundle, run, config.encoding
    )
    missing = _missing(used, features, config)
    dropped = dropped + missing
    _write_dropped(run, dropped)
    lost = {(row.id, row.source) for row in missing}
    splits = {name: [p for p in members if (p.id, p.source) not in lost] for name, members in splits.items()}
    _pack(run, splits, features)
    runs = heads_of(config)
    todo = [one for one in runs if not run.exists(f"heads/{one.name}.json")]
    console.print(f"{len(runs)} heads, {len(runs) - len(todo)} of them trained before")
    with meter("heads", len(todo)) as progress:
        for line in each(partial(_Trainer, run.uri, config.model_dump_json()), todo, config.training):
            progress.advance(1)
            console.print(line)
    result = _evaluate(run, config, runs, splits, features, dropped)
    _publish(run, runs[: config.seeds])
    run.write(METRICS, json.dumps(result, indent=1).encode())
    text = report.summary(result)
    run.write("summary.md", text.encode())
    _seal(run)
    console.print(text, markup=False)
    return EXIT_OK


def heads_of(config: RankerConfig) -> list[HeadRun]:
    """The heads that a config asks for, those of the first variant before all others."""
    runs = [HeadRun(v, config.seed + i) for v in config.variants for i in range(config.seeds)]
    return runs + [HeadRun(config.variants[0], config.seed, source) for source in config.leave_out]


def _show_plan(run: Folder, config: RankerConfig, splits: dict[str, list[Pair]], lost: int, digest: str) -> int:
    bundle, used = open_bundle(config.bundle), [pair for members in splits.values() for pair in members]
    if (old := inventory.existing_or_copy(run, "ranker")) is not None:
        runs.refuse_another(run, old, _describe(config, digest))
    heads = heads_of(config)
    todo = [one for one in heads if not run.exists(f"heads/{one.name}.json")]
    clips = len({clip for pair in used for clip in (pair.a, pair.b)})
    flops, of = embedding_flops(bundle, clips, ("clap", "mert"))
    rows = [
        ("votes", f"{len(used):,}", ", ".join(f"{len(splits[name]):,} {name}" for name in SPLITS)),
        ("left out", f"{lost:,}", "votes that cannot be used"),
        ("clips", f"{clips:,} to embed", "what is embedded already is taken; clips of a corpus from its shards"),
        ("heads", f"{len(todo)} to train of {len(heads)}", f"at most {config.head.max_epochs:,} epochs each"),
        ("bundle", bundle.name, bundle.note),
        *weights_rows(bundle, ("clap", "mert")),
    ]
    return show_plan(rows, run, len(todo) or (not inventory.finished(run)), flops, config.encoding, of)


class _Trainer:
    """The packed arrays in one process; a call trains one head and writes its files, the sidecar last."""

    def __init__(self, run: str, config: str) -> None:
        self.run, self.config = Folder.at(run), RankerConfig.model_validate_json(config)
        how = self.config.training
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(how.threads or (cores if how.runner == "local" else max(1, int(how.cpus))))
        self.arrays = load_tensors(self.run.read(PACKED))

    def __call__(self, one: HeadRun) -> str:
        run, name, config = self.run, f"heads/{one.name}", self.config
        arrays = self.arrays
        pairs = pack(arrays, arrays, one.variant, resolve_device(config.training.device))
        sources = bytes(arrays["source_names"]).decode().split("\n")
        keep = arrays["source"] != (sources.index(one.left_out) if one.left_out else -1)
        train, validation = (
            pairs.rows(np.flatnonzero(keep & (arrays["split"] == SPLITS.index(s)))) for s in ("train", "validation")
        )
        checkpoint = f"{name}.checkpoint"
        trained = train_head(
            train,
            validation,
            config.head,
            one.seed,
            resume=run.read(checkpoint) if run.exists(checkpoint) else None,
            save=partial(run.write, checkpoint),
            save_every=config.training.checkpoint_every,
        )
        head = trained.head
        both = np.concatenate([scores(head, train, side).cpu().numpy() for side in ("a", "b")])
        margin, target = margins(head, validation).cpu().numpy(), validation.target.cpu().numpy()
        used = VARIANTS[one.variant]
        bundle = open_bundle(config.bundle)
        protocol = bundle.protocol("caption" if "text" in used else "empty")
        sidecar = {
            "input_dim": head.widths[0],
            "exclude": [block for block in BLOCKS if block not in used],
            "block_dims": [arrays[block].shape[1] for block in BLOCKS],
            "score_mean": float(both.mean()),
            "score_sd": float(both.std()),
            "temperature": report.fit_temperature(margin.astype(np.float64), target),
            "protocol": f"{bundle.name}/{protocol.id()}",  # a folder's path would leave this machine with the weights
            **({"note": bundle.note} if bundle.note else {}),
            **asdict(one),
            "best_epoch": trained.best_epoch,
            "history": trained.history,
        }
        state = {key: value.cpu().numpy() for key, value in head.net.state_dict().items()}
        run.write(f"{name}.safetensors", save_tensors(state))
        run.write(f"{name}.json", json.dumps(sidecar, indent=1).encode())
        run.delete(checkpoint)
        best = trained.history[trained.best_epoch]["validation_loss"]
        return f"{one.name}: best of {len(trained.history)} epochs is {trained.best_epoch}, validation loss {best:.4f}"


def _describe(config: RankerConfig, pairs: str) -> dict[str, Any]:
    bundle = open_bundle(config.bundle)
    what = {"config": identity(config), "pairs": pairs, "bundle": bundle.identity()}
    return runs.describe("ranker", what, config, ("torch", "numpy"), note=bundle.note)


def _claim(run: Folder, config: RankerConfig, pairs: str) -> None:
    """Write `run.json`, or check that it describes the same run."""
    described = _describe(config, pairs)
    old = inventory.restore_run(run, "ranker", described["fingerprint"]) or runs.existing(run, "ranker")
    if old is None and runs.write(run, described):
        return
    runs.refuse_another(run, old or runs.read(run, "ranker"), described)


def _forget_damaged(run: Folder) -> None:
    """Delete what is not as the end of an earlier launch has noted it, with what was made of it: it is made again."""
    marker = inventory.read_marker(run)
    for problem in inventory.damage(run, marker) if marker is not None else ():
        console.print(f"{problem}; it is made again", style="yellow")
        if problem.name != RUN:
            inventory.clear(run, problem.name)
        head, _, ending = problem.name.rpartition(".")
        if head.startswith("heads/") and ending == "safetensors":
            inventory.clear(run, f"{head}.json")  # its commit
    if run.exists(SUCCESS):
        inventory.clear(run, SUCCESS)


def _seal(run: Folder) -> None:
    names = [file.name for file in run.files(sizes=False) if file.name not in (SUCCESS, "cost.json")]
    inventory.seal(run, runs.read(run, "ranker"), {}, inventory.entries(run, names))


def _missing(pairs: Sequence[Pair], features: Features, config: RankerConfig) -> list[Dropped]:
    """Pairs with a clip that has no features.

    Raises:
        UserError: more than `max_missing`.
    """
    missing = []
    for pair in pairs:
        bad = next((clip for clip in (pair.a, pair.b) if clip in features.failed), None)
        if bad:
            missing.append(Dropped(pair.id, pair.source, "clip", f"{bad}: {features.failed[bad]}"))
    if len(missing) > config.max_missing * len(pairs):
        raise UserError(
            f"{len(missing)} of {len(pairs)} pairs have a clip that cannot be used, e.g. {missing[0].message}",
            f"Mend the files, or raise max_missing ({config.max_missing:g}).",
        )
    return missing


def _write_dropped(run: Folder, dropped: Sequence[Dropped]) -> None:
    counts = Counter((row.source, row.reason) for row in dropped)
    for (source, reason), count in sorted(counts.items()):
        console.print(f"{source}: {count} pairs left out: {reason} (dropped.jsonl)")
    run.write("dropped.jsonl", "".join(json.dumps(asdict(row)) + "\n" for row in dropped).encode())


def _pack(run: Folder, splits: dict[str, list[Pair]], features: Features) -> None:
    """Features and pairs as the arrays that training reads: no strings but the names of the sources."""
    pairs = [(SPLITS.index(split), pair) for split, members in splits.items() for pair in members]
    names = sorted({pair.source for _, pair in pairs})
    arrays = {block: getattr(features, block) for block in BLOCKS} | {
        "a": np.array([features.clips[pair.a] for _, pair in pairs], np.int32),
        "b": np.array([features.clips[pair.b] for _, pair in pairs], np.int32),
        "prompt": np.array([features.prompts[pair.text] for _, pair in pairs], np.int32),
        "target": np.array([pair.target for _, pair in pairs], np.float32),
        "split": np.array([split for split, _ in pairs], np.int8),
        "source": np.array([names.index(pair.source) for _, pair in pairs], np.int16),
        "source_names": np.frombuffer("\n".join(names).encode(), np.uint8),
    }
    data = save_tensors(arrays)
    if run.exists(PACKED) and run.read(PACKED) != data:
        raise UserError(
            f"{run}: the clips have changed since this run began.",
            f"Choose a new output folder, or delete {PACKED} and heads/ to train again with the clips of now.",
        )
    run.write(PACKED, data)


def _evaluate(
    run: Folder,
    config: RankerConfig,
    runs: Sequence[HeadRun],
    splits: dict[str, list[Pair]],
    features: Features,
    dropped: Sequence[Dropped],
) -> dict[str, Any]:
    """Every head on the test split, as `metrics.json` holds it; writes the reliability plot of the first variant."""
    test = splits["test"]
    target, sources = np.array([pair.target for pair in test]), [pair.source for pair in test]
    groups = {
        "pair": None,
        "prompt": [pair.prompt or pair.id for pair in test],
        "systems": [" ".join(sorted((pair.system_a, pair.system_b))).strip() or pair.id for pair in test],
    }[config.resample]
    models = {one.name: _load(run, one.name, features) for one in runs}
    margin = {name: _margins(model, features, test) for name, model in models.items()}
    about = {one.name: run.read_json(f"heads/{one.name}.json") for one in runs}
    heads: dict[str, Any] = {}

    def add(name: str, variant: str, values: np.ndarray, temperature: float, best_epoch: Any) -> None:
        note = "" if set(VARIANTS[variant]) - {"text"} else "both sides share the text: chance, whatever the share of b"
        measured = report.metrics(values, target, sources, temperature, groups)
        inputs = " + ".join(VARIANTS[variant])
        row = {"inputs": inputs, "temperature": temperature, "best_epoch": best_epoch, "note": note, "test": measured}
        heads[name] = row

    for variant in config.variants:
        members = [one.name for one in runs if one.variant == variant and not one.left_out]
        for name in members:
            add(name, variant, margin[name], about[name]["temperature"], about[name]["best_epoch"])
        if len(members) > 1:
            mean = np.mean([margin[name] for name in members], axis=0)
            margin[f"{variant}-ensemble"] = mean
            # a mean of heads is less sure than each of them, so it has a temperature of its own
            validated = np.mean([_margins(models[name], features, splits["validation"]) for name in members], axis=0)
            chosen = report.fit_temperature(validated, np.array([pair.target for pair in splits["validation"]]))
            add(f"{variant}-ensemble", variant, mean, chosen, "")
    keep = report.decided(target)
    right = {name: report.correct(values[keep], target[keep]) for name, values in margin.items()}
    firsts = [f"{variant}-seed{config.seed}" for variant in config.variants]
    tests = {f"{firsts[0]} and {other}": report.mcnemar(right[firsts[0]], right[other]) for other in firsts[1:]}
    if keep.sum() >= report.BINS:
        values, right_first = margin[firsts[0]][keep], right[firsts[0]]
        warm = values / about[firsts[0]]["temperature"]
        plot = report.reliability_png(
            {"raw": report.calibration(values, right_first), "with temperature": report.calibration(warm, right_first)}
        )
        if plot:
            run.write("reliability.png", plot)
        else:
            console.print("no reliability plot: pip install 'ttmray[report]'")
    left = {one.left_out: one.name for one in runs if one.left_out}
    return {
        "note": open_bundle(config.bundle).note,
        "run": {
            "bundle": config.bundle,
            "protocol": about[firsts[0]]["protocol"],
            "split": f"{config.split.by}: " + ", ".join(f"{len(splits[name])} {name}" for name in SPLITS),
            "pairs_left_out": len(dropped),
            "intervals_resample": config.resample,
        },
        "heads": heads,
        "leave_one_out": {
            source: _left_out(right, np.asarray(sources, object)[keep] == source, firsts[0], name)
            for source, name in left.items()
        },
        "mcnemar": {name: {"chi2": chi2, "p": p} for name, (chi2, p) in tests.items()},
    }


def _left_out(right: dict[str, np.ndarray], where: np.ndarray, full: str, without: str) -> dict[str, Any]:
    if not where.any():
        return {"decided": 0, "left_out": None, "in_mix": None, "gain": None, "left_out_on_all": None}
    left, mix = float(right[without][where].mean()), float(right[full][where].mean())
    everywhere = float(right[without].mean())
    return {
        "decided": int(where.sum()), "left_out": left, "in_mix": mix, "gain": mix - left, "left_out_on_all": everywhere
    }  # fmt: skip


def _load(run: Folder, name: str, features: Features) -> TuneJury:
    state = {key: torch.from_numpy(value) for key, value in load_tensors(run.read(f"heads/{name}.safetensors")).items()}
    exclude = run.read_json(f"heads/{name}.json", "exclude")["exclude"]
    return load_tunejury(state, exclude=exclude, block_dims=features.block_dims())


def _margins(model: TuneJury, features: Features, pairs: Sequence[Pair]) -> np.ndarray:
    """Margins by the scorer that everybody else uses."""
    text = features.text[[features.prompts[pair.text] for pair in pairs]]
    sides = []
    for clips in ([pair.a for pair in pairs], [pair.b for pair in pairs]):
        rows = [features.clips[clip] for clip in clips]
        sides.append(model.score(features.clap_audio[rows], features.mert[rows], text).astype(np.float64))
    return sides[0] - sides[1]


def _publish(run: Folder, members: Sequence[HeadRun]) -> None:
    """`tunejury.safetensors` and its sidecar: of the first variant's heads the one with the least validation loss."""

    def loss(one: HeadRun) -> float:
        sidecar = run.read_json(f"heads/{one.name}.json")
        return float(sidecar["history"][sidecar["best_epoch"]]["validation_loss"])

    best = min(members, key=loss)
    for ending in ("safetensors", "json"):
        run.write(f"{HEAD}.{ending}", run.read(f"heads/{best.name}.{ending}"))
