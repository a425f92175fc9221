"""The job that trains the parts of a micro bundle on synthetic songs: clips, training, measures, files.

    <output>/<part>/run.json            what decides the part's weights
                    metrics.jsonl       the log
                    checkpoint.safetensors
                    model.safetensors   and what its loader needs beside it
                    facts.json          seed, updates, seconds, measured quality; written last

Resume is relaunch. A part that is finished is left alone.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from ttmray import cost, inventory, runs
from ttmray.config import Config, Device, Location, execution, identity
from ttmray.console import console
from ttmray.errors import EXIT_INTERRUPTED, EXIT_OK, UserError
from ttmray.json_text import read_json
from ttmray.models import one_thread
from ttmray.models.bundle import BundleName, FolderBundle, open_bundle
from ttmray.models.devices import resolve_device
from ttmray.models.weights import digest_file
from ttmray.pretraining.clap import CLAPConfig, CLAPPart
from ttmray.pretraining.clips import ClipSet
from ttmray.pretraining.loop import CHECKPOINT, Part, PartConfig, parameters, train
from ttmray.pretraining.mert import MERTConfig, MERTPart
from ttmray.pretraining.separator import SeparatorConfig, SeparatorPart
from ttmray.pretraining.text import TextConfig, TextPart
from ttmray.pretraining.vae import VAEConfig, VAEPart
from ttmray.pretraining.vocoder import VocoderConfig, VocoderPart
from ttmray.runs import RUN, SUCCESS
from ttmray.storage import Folder

FACTS = "facts.json"
UNTRAINED = "untrained.json"
PartName = Literal["vae", "vocoder", "clap", "clap_condition", "separator", "mert", "text"]
PARTS: tuple[PartName, ...] = ("clap", "mert", "clap_condition", "vae", "text", "separator")
"""Of a bundle. There is a trainer of vocoders, too, but Griffin-Lim is nearer to the truth than what a CPU trains."""
ROLES: dict[str, str] = {"vae": "latents"}
"""Part -> role of the bundle, where the names differ."""


class ClipsConfig(Config):
    """The synthetic clips."""

    cache: Location = execution("runs/micro-clips")
    """Local folder of composed clips; about 0.9 MB for 5 s, 4.4 MB where the stems are kept too."""
    seed: int = Field(0, ge=0)
    clips: int = Field(4096, ge=1)
    stems: int = Field(1024, ge=1)
    """Clips whose stems are kept, for the separator."""
    seconds: float = Field(5.0, gt=0, le=30)
    fresh_seed: int = Field(1_000_003, ge=0)
    """Of the clips that measures are taken on; another one than `seed`."""
    fresh_clips: int = Field(200, ge=1)
    fresh_stems: int = Field(64, ge=1)
    workers: int = execution(2, ge=1)
    """Processes that compose."""


class PartsConfig(Config):
    """What all parts share, and a section for each."""

    output: Location = execution()
    """Folder of the parts."""
    parts: tuple[PartName, ...] = execution(PARTS, min_length=1)
    """What is trained, in this order."""
    data: ClipsConfig = Field(default_factory=ClipsConfig)
    vae: VAEConfig = VAEConfig()
    vocoder: VocoderConfig = VocoderConfig()
    clap: CLAPConfig = CLAPConfig()
    clap_condition: CLAPConfig = CLAPConfig(seed=1)
    """The second CLAP, whose text vectors condition the backbone, as the paper's are two."""
    separator: SeparatorConfig = SeparatorConfig()
    mert: MERTConfig = MERTConfig()
    text: TextConfig = TextConfig()
    reuse: BundleName | None = execution(None)
    """Bundle in a folder: its parts are copied where the same settings made them; the others are trained."""
    device: Device = execution("cpu")
    """On a CPU one thread is used, so that a part's weights can be made again to the bit."""
    checkpoint_every_s: float = execution(60.0, gt=0)
    log_every: int = execution(20, ge=1)
    """Updates between lines of the log."""


def _part(name: PartName, config: PartsConfig, clips: ClipSet, device: torch.device) -> Part:
    makers: dict[str, Callable[[], Part]] = {
        "vae": lambda: VAEPart(config.vae, clips, device),
        "vocoder": lambda: VocoderPart(config.vocoder, clips, device),
        "clap": lambda: CLAPPart(config.clap, clips, device),
        "clap_condition": lambda: CLAPPart(config.clap_condition, clips, device, _start(config)),
        "separator": lambda: SeparatorPart(config.separator, clips, device),
        "mert": lambda: MERTPart(config.mert, clips, device),
        "text": lambda: TextPart(config.text, clips, device),
    }
    part = makers[name]()
    part.name = name
    return part


def _start(config: PartsConfig) -> Path | None:
    """File of the weights that the second CLAP goes on from.

    Raises:
        UserError: it is not there yet.
    """
    if config.clap_condition.start is None:
        return None
    first = Folder.at(config.output).sub(config.clap_condition.start)
    if not first.exists(FACTS):
        raise UserError(
            f"clap_condition.start is {config.clap_condition.start}, which is not trained yet in {first}.",
            f"Train it before: --set parts=[{config.clap_condition.start},clap_condition].",
        )
    return Path(first.path("model.safetensors"))


def train_parts(config: PartsConfig) -> int:
    """Train, or go on with, the parts; returns the exit code.

    Raises:
        UserError: for everything that the user can mend.
    """
    device = torch.device(resolve_device(config.device))
    if device.type == "cpu":
        one_thread()
    data = config.data
    cache = Folder.at(data.cache)
    clips = ClipSet(cache, data.seed, data.clips, data.seconds, min(data.stems, data.clips))
    fresh = ClipSet(cache, data.fresh_seed, data.fresh_clips, data.seconds, min(data.fresh_stems, data.fresh_clips))
    for one in (fresh, clips):
        one.compose(data.workers)
    if config.clap.start is not None:
        raise UserError("clap.start is clap itself.", "Leave it out; it is for clap_condition.")
    for name in config.parts:
        settings: PartConfig = getattr(config, name)
        out = Folder.at(config.output).sub(name)
        begun = _claim(out, name, config, settings)
        if begun and _whole(out) and not _unfinished(out, settings):
            console.print(f"{name} is complete: {out}")
            continue
        if config.reuse is not None and _copied(name, config.reuse, out):
            console.print(f"{name} is that of {config.reuse}: {out}", markup=False)
            continue
        with cost.account(out), cost.holding(float(device.type == "cuda")):
            ended = _one(name, config, settings, clips, fresh, out, device)
        if not ended:
            return EXIT_INTERRUPTED
    return EXIT_OK


def _copied(name: PartName, reuse: str, out: Folder) -> bool:
    """Copy the files of a part from a bundle, if the same settings and clips made it; whether they did."""
    bundle, role = open_bundle(reuse), ROLES.get(name, name)
    if not isinstance(bundle, FolderBundle):
        raise UserError(f"reuse: bundle {reuse} has no files of parts.", "Name a bundle that train-micro made.")
    if f"{role}/{FACTS}" not in bundle.files.of_role(role):
        return False
    folder = bundle.files.folder(role)
    facts = (folder / FACTS).read_bytes()
    if read_json(facts)["fingerprint"] != runs.read(out, _kind(name))["fingerprint"]:
        return False
    for file in folder.iterdir():
        if file.name != FACTS:
            out.write(file.name, file.read_bytes())
    out.write(FACTS, facts)
    _seal(out, name)
    return True


def _one(
    name: PartName,
    config: PartsConfig,
    settings: PartConfig,
    clips: ClipSet,
    fresh: ClipSet,
    out: Folder,
    device: torch.device,
) -> bool:
    """Train, measure and write a part; False if somebody interrupted it."""
    part = _part(name, config, clips, device)
    untrained = out.read_json(UNTRAINED) if out.exists(UNTRAINED) else part.measure(fresh)
    out.write(UNTRAINED, json.dumps(untrained).encode())
    progress, interrupted = train(
        part, settings, out, checkpoint_every_s=config.checkpoint_every_s, log_every=config.log_every
    )
    if interrupted:
        return False
    part.export(out, settings.half)
    measured = part.measure(fresh)
    facts: dict[str, Any] = {
        "part": name,
        "fingerprint": runs.read(out, _kind(name))["fingerprint"],
        "seed": settings.seed,
        "data_seed": clips.seed,
        "fresh_seed": fresh.seed,
        "updates": progress.step,
        "planned": settings.steps,
        "items": progress.step * settings.batch,
        "cpu_seconds": round(progress.cpu_s, 1),
        "last_loss": progress.loss,
        "parameters": parameters(part.model),
        "bytes": sum(e.size for e in out.files() if e.name.endswith(".safetensors") and e.name != CHECKPOINT),
        "measured": measured,
        "untrained": untrained,
    }
    out.write(FACTS, json.dumps(facts, indent=1).encode())
    _seal(out, name)
    shown = ", ".join(f"{key} {value:.3f} (untrained {untrained[key]:.3f})" for key, value in measured.items())
    console.print(f"{name}: {progress.step} of {settings.steps} updates in {progress.cpu_s:.0f} CPU seconds: {shown}")
    return True


def _seal(out: Folder, name: str) -> None:
    files = (file.name for file in out.files(sizes=False) if file.name not in (RUN, cost.COST))
    inventory.seal(out, runs.read(out, _kind(name)), {"part": name}, inventory.entries(out, files))


def _claim(out: Folder, name: str, config: PartsConfig, settings: PartConfig) -> bool:
    """Write the part's `run.json`, or check that it describes the same run; whether there was one."""
    start = _start(config) if name == "clap_condition" else None
    began = {} if start is None else {"start": digest_file(start).sha256}
    described = runs.describe(
        _kind(name),
        {"part": identity(settings), "data": identity(config.data)} | began,
        config,
        ("torch", "transformers", "tokenizers", "demucs"),
    )
    inventory.restore_run(out, _kind(name), described["fingerprint"])
    old = runs.existing(out, _kind(name))
    if old is None and runs.write(out, described):
        return False
    runs.refuse_another(out, old or runs.read(out, _kind(name)), described)
    return True


def _kind(name: str) -> str:
    return f"micro-{name}"


def _whole(out: Folder) -> bool:
    """Whether the files of a finished part are what was written. What is not is deleted, and with it the facts that say
    that the part is complete: it is then made again, from the last checkpoint where that is sound."""
    marker = inventory.read_marker(out)
    if marker is None:
        return True  # of an earlier version, or not at its end yet
    damaged = inventory.damage(out, marker)
    for problem in damaged:
        console.print(f"{out.path(problem.name)} {problem.how}; it is made again", style="yellow")
        inventory.clear(out, problem.name)
    if damaged:
        inventory.clear(out, FACTS)
        inventory.clear(out, SUCCESS)
    return not damaged


def _unfinished(out: Folder, settings: PartConfig) -> bool:
    """Whether updates are left that the budget allows."""
    if not out.exists(FACTS):
        return True
    facts = out.read_json(FACTS)
    more = settings.budget_s is None or facts["cpu_seconds"] < settings.budget_s
    return bool(facts["updates"] < settings.steps and more)
