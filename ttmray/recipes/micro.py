"""A bundle from nothing: encoders, VAE and separator on synthetic songs, a reward head on simulated votes, a backbone.

Steps, in order: parts (`ttmray.pretraining`), listening (clips that no part has seen) and votes about them, ranker,
songs (the parts' clips as files), corpus, stage1, bundle. `<output>/bundle` is the result: a folder that every job
takes as `bundle`.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from ttmray import pages
from ttmray.config import Config, execution, fingerprint, identity
from ttmray.console import meter
from ttmray.corpus.config import CorpusConfig
from ttmray.corpus.job import score_corpus
from ttmray.cost import COST
from ttmray.errors import EXIT_OK, UserError
from ttmray.models.backbone_weights import read_support
from ttmray.models.folder_bundle import FOLDERS, WEIGHTS, describe_folder
from ttmray.models.reward_head import HEAD
from ttmray.pretraining.clips import ClipSet
from ttmray.pretraining.job import FACTS, PARTS, ROLES, UNTRAINED, PartsConfig, train_parts
from ttmray.pretraining.loop import CHECKPOINT, to_half
from ttmray.ranker.job import METRICS, RankerConfig, train_ranker
from ttmray.recipes.chain import fill, run_chain
from ttmray.recipes.chain_plan import Step
from ttmray.runs import RUN, SUCCESS
from ttmray.storage import Folder
from ttmray.synth import listeners
from ttmray.synth.world import CAPTIONS, TABLE, clip, encoded, write_world
from ttmray.training.config import TrainConfig
from ttmray.training.export import EXPORTED, export_again
from ttmray.training.logbook import METRICS as LOG
from ttmray.training.sft import train_sft
from ttmray.training.tensors import pack, unpack

NOTE = (
    "micro bundle: small models, trained on synthetic songs alone. Rewards and CLAP scores are on a scale of their own "
    "and say nothing of TuneJury's or LAION's"
)


HALF = "half.safetensors"
"""The backbone as the bundle has it, beside the exported one."""


class ListeningConfig(Config):
    """Clips of pieces that no other part has seen, and votes about them."""

    seed: int = Field(2, ge=0)
    """Of the pieces; another one than those of `data`."""
    clips: int = Field(2000, ge=2)
    votes: int = Field(12_000, ge=10)
    vote_seed: int = Field(0, ge=0)


class MicroConfig(PartsConfig):
    """`jobs/train_micro.py` and `ttmray train-micro`."""

    name: str = Field("micro", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Of the bundle."""
    note: str = execution(NOTE)
    """What people must know about its numbers; printed by every job that uses it."""
    sampler: dict[str, Any] = Field(default_factory=lambda: {"prefix": "", "negative_prompt": ""})
    """What its backbone needs in sampling (`generation.sampler.SamplerConfig`). Without `score`: the 95th percentile of
    the scores that it was trained on."""
    weights: str = Field("ema:0.05", pattern=r"^(raw|ema:[0-9.]+)$")
    """Of the backbone: `raw`, or an average of the training's last weights."""
    listening: ListeningConfig = ListeningConfig()
    ranker: dict[str, Any] = Field(default_factory=dict)
    """`train-ranker`, without what is filled in: sources, bundle and output."""
    corpus: dict[str, Any] = Field(default_factory=dict)
    """`score-corpus`, without input, bundle and output."""
    stage1: dict[str, Any] = Field(default_factory=dict)
    """`train-sft`, without data and output."""


def train_micro(
    config: MicroConfig, *, first: str | None = None, last: str | None = None, plan_only: bool = False
) -> int:
    """Run, or go on with, all steps; where `parts` names some parts only, train these and stop. Returns the exit code.

    Args:
        first, last: steps to start and end with.
        plan_only: check all, print the steps and what is done, and stop.

    Raises:
        UserError: for everything that the user can mend.
    """
    if config.listening.seed in (config.data.seed, config.data.fresh_seed):
        raise UserError(
            f"listening.seed is {config.listening.seed}, a seed of data.",
            "Name another one: votes are to be about clips that no part has seen.",
        )
    if set(config.parts) != set(PARTS):
        return train_parts(config)
    root = Folder.at(config.output)
    if root.remote:
        raise UserError(f"output {config.output}: parts are trained in a local folder.", "Name a local path.")
    steps = build_steps(config, root)
    prints: dict[str, str] = {}
    for step in steps:  # what a step depends on is all before it
        prints[step.name] = fingerprint([identity(step.config), [prints[name] for name in step.after]])
    return run_chain(root, steps, prints, first=first, last=last, plan_only=plan_only)


def build_steps(config: MicroConfig, root: Folder) -> list[Step]:
    """All steps in order, with their sections filled in and checked.

    Raises:
        UserError: a section that is wrong.
    """
    path = root.path
    clips = ClipSet(Folder.at(config.data.cache), config.data.seed, config.data.clips, config.data.seconds)
    seconds = config.data.seconds
    source = {"name": "listening", "path": path("votes.csv"), "audio": path("listening"), "prompts": False}
    ranker = fill(
        RankerConfig,
        "ranker",
        config.ranker,
        {"sources": [source], "bundle": path("encoders"), "output": path("ranker")},
    )
    corpus = fill(
        CorpusConfig,
        "corpus",
        {"segments": {"clip_s": seconds, "min_s": seconds}, **config.corpus},
        {"input": path("songs"), "bundle": path("bundle"), "output": path("corpus")},
    )
    data = {"sources": [{"corpus": path("corpus")}]}
    stage1 = fill(TrainConfig, "stage1", config.stage1, {"data": data, "output": path("stage1")})

    def parts() -> int:
        code = train_parts(config)
        if code == EXIT_OK:
            _collect(config, Path(path("encoders")), _sources(config, root))
        return code

    def listening() -> int:
        chosen = config.listening
        with meter("composing clips to listen to", chosen.clips) as progress:

            def composed() -> Any:
                for index in range(chosen.clips):
                    yield clip(chosen.seed, index, seconds)
                    progress.advance(1)

            write_world(path("listening"), composed(), format="flac")
        return EXIT_OK

    def votes() -> int:
        chosen = config.listening
        return listeners.main(
            [path(f"listening/{TABLE}"), path("votes.csv"), f"--count={chosen.votes}", f"--seed={chosen.vote_seed}"]
        )

    def head() -> int:
        code = train_ranker(ranker)
        if code == EXIT_OK:
            _collect(config, Path(path("bundle")), _sources(config, root) | _head(root))
        return code

    def backbone() -> int:
        code = train_sft(stage1)
        return export_again(path("stage1"), config.weights) if code == EXIT_OK else code

    def bundle() -> int:
        weights = Path(path(f"stage1/{EXPORTED}"))
        _halve(weights, Path(path(f"stage1/{HALF}")))
        sources = _sources(config, root) | _head(root) | {"backbone": {WEIGHTS: path(f"stage1/{HALF}")}}
        _collect(config, Path(path("bundle")), sources, _sampler(config, weights))
        (Path(path("bundle")) / "README.md").write_text(card(config, root))
        return EXIT_OK

    facts = tuple(f"{part}/{FACTS}" for part in PARTS)
    return [
        Step("parts", config, parts, (*facts, "encoders/bundle.json")),
        Step("listening", config.listening, listening, (f"listening/{TABLE}",)),
        Step("votes", config.listening, votes, ("votes.csv",), ("listening",)),
        Step("ranker", ranker, head, (f"ranker/{METRICS}", "bundle/bundle.json"), ("parts", "votes")),
        Step("songs", config.data, lambda: _write_songs(clips, root.sub("songs")), (CAPTIONS,)),
        Step("corpus", corpus, lambda: score_corpus(corpus), ("corpus/_SUCCESS.json",), ("ranker", "songs")),
        Step("stage1", stage1, backbone, (f"stage1/{EXPORTED}",), ("corpus",)),
        Step("bundle", config, bundle, (f"bundle/backbone/{WEIGHTS}",), ("stage1",)),
    ]


def _write_songs(clips: ClipSet, out: Folder) -> int:
    """The clips as FLAC files, with the first of their captions."""
    captions = []
    with meter("writing clips", clips.count) as progress:
        for index in range(clips.count):
            name = f"{index:06d}.flac"
            out.write(name, encoded(clips.mix(index), "flac"))
            captions.append({"path": name, "caption": clips.truth(index).captions[0]})
            progress.advance(1)
    out.write(CAPTIONS.rpartition("/")[2], json.dumps(captions, indent=1).encode())
    return EXIT_OK


def _sources(config: MicroConfig, root: Folder) -> dict[str, dict[str, str]]:
    """Role -> file of the bundle -> file of the parts' training."""
    beside = {CHECKPOINT, UNTRAINED, RUN, SUCCESS, LOG, COST}
    roles: dict[str, dict[str, str]] = {}
    for part in PARTS:
        folder = root.sub(part)
        names = [entry.name for entry in folder.files() if entry.name not in beside and "/" not in entry.name]
        roles[ROLES.get(part, part)] = {name: folder.path(name) for name in names}
    return roles


def _head(root: Folder) -> dict[str, dict[str, str]]:
    return {"tunejury": {f"{HEAD}.{end}": root.path(f"ranker/{HEAD}.{end}") for end in ("safetensors", "json")}}


def _halve(weights: Path, target: Path) -> None:
    """An exported file in half precision, with what it says of itself; models are in float32 once they are loaded."""
    tensors, about = unpack(weights.read_bytes(), str(weights))
    target.write_bytes(pack(to_half(tensors), about))


def _sampler(config: MicroConfig, weights: Path) -> dict[str, Any]:
    """What a backbone needs in sampling: the highest score but for its outermost, unless the config has one."""
    support = read_support(weights)
    return ({"score": round(support.p95, 2)} if support else {}) | config.sampler


def _collect(
    config: MicroConfig,
    target: Path,
    sources: Mapping[str, Mapping[str, str]],
    sampler: Mapping[str, Any] | None = None,
) -> None:
    """A bundle's folder of copies."""
    shutil.rmtree(target, ignore_errors=True)
    for role, files in sources.items():
        (target / role).mkdir(parents=True)
        for name, source in files.items():
            shutil.copyfile(source, target / role / name)
    describe_folder(target, config.name, config.note, config.data.seconds, sampler)


def card(config: MicroConfig, root: Folder) -> str:
    """The model card of a bundle: what was trained on what, how long, and how well it does on fresh clips."""
    facts: list[dict[str, Any]] = [root.read_json(f"{part}/{FACTS}") for part in PARTS]
    heads: dict[str, Any] = root.read_json(f"ranker/{METRICS}")["heads"]
    roles = [role for role in FOLDERS if root.files(f"bundle/{role}", sizes=False)]
    measures = []
    for fact in facts:
        for name, value in fact["measured"].items():
            measures.append((fact["part"], name, f"{value:.3f}", f"{fact['untrained'][name]:.3f}"))
    return pages.render(
        "card_micro.md.j2",
        front={"license": "apache-2.0", "library_name": "ttmray", "tags": ["music", "text-to-audio", "synthetic"]},
        name=config.name,
        notes=[config.note],
        roles=roles,
        missing=[role for role in FOLDERS if role not in (*roles, "vocoder")],
        parts=[
            (
                fact["part"],
                f"{fact['parameters']:,}",
                f"{fact['updates']:,}",
                f"{fact['items']:,}",
                f"{fact['cpu_seconds']:,.0f}",
                f"{fact['bytes'] / 1e6:.2f}",
            )
            for fact in facts
        ],
        measures=measures,
        heads=[
            (name, head["inputs"], str(head["test"]["decided"]), f"{head['test']['accuracy']:.3f}")
            for name, head in heads.items()
        ],
        seeds=config.data.model_dump(exclude={"cache", "workers"}) | {"listening": config.listening.model_dump()},
    )
