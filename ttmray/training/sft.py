"""Stage 1: score-conditioned training of the backbone by flow matching (paper III-D)."""

import hashlib
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ttmray.audio.io import encode_flac
from ttmray.console import console
from ttmray.corpus import index
from ttmray.corpus.finalise import LATENTS, latent_statistics
from ttmray.corpus.scores import protocol_of
from ttmray.errors import UserError
from ttmray.generation.sampler import Draw, Sampler, SamplerConfig
from ttmray.models import seeded
from ttmray.models.backbone import SIZES, BackboneConfig, FluxAudio
from ttmray.models.backbone_weights import (
    Transfer,
    config_of,
    read_config,
    read_support,
    tidy,
    transfer,
    usable,
)
from ttmray.models.bundle import open_bundle
from ttmray.models.loading import LoadOptions
from ttmray.models.score_support import ScoreSupport
from ttmray.models.state_dicts import read_state_dict
from ttmray.models.weights import digest_file, weights_file
from ttmray.storage import Folder
from ttmray.training.config import LoopConfig, TrainConfig
from ttmray.training.cross_load import init_cross_load
from ttmray.training.data import (
    Mixture,
    Samples,
    corpus_bundle,
    evaluation_batches,
    loader,
    open_mixture,
    open_with_held_out,
)
from ttmray.training.flow_matching import FlowMatchingConfig, flow_losses
from ttmray.training.launch import launch
from ttmray.training.memory import step_flops
from ttmray.training.task import Losses, Task
from ttmray.training.tensors import pack, unpack

EMPTY_TEXT = "empty_text.safetensors"
SAMPLE_RATE = 44_100
SMALL = {
    "debug": BackboneConfig(hidden=64, heads=2, depth=3, fused_depth=1),
    "micro": BackboneConfig(hidden=128, heads=4, depth=4, fused_depth=2),
}


class SftTask:
    """Stage 1 as the loop sees it.

    Args:
        config: of the run.
        device: of this rank.
    """

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.config = config
        if config.validation.clips:
            self.mixture, self.held_out = open_with_held_out(config.data)
        else:
            self.mixture, self.held_out = open_mixture(config.data), None
        if config.validation.clips and self.held_out is None:
            console.print(f"no validation: {config.data.sources[0].corpus} has no clips of that split", markup=False)
        if line := caption_warning(self.mixture.uncaptioned()):
            console.print(line, style="bold red")
        self.bundle = corpus_bundle(config.data)
        self.model, self.init = initial_model(config, self.mixture)
        self.model.to(device)
        self.flops_per_sample = step_flops(self.model.config)
        self.clips_per_sample, self.frozen_models = 1, 0
        self.identity: dict[str, Any] = {
            "data": self.mixture.fingerprint(),
            "backbone": self.model.config.to_dict(),
            "init": self.init,
            "frozen": frozen_digest(self.model),
        }
        self.facts = score_facts(config, self.mixture.scores())
        self.batch = 1  # of validation; set by the first call of `batches`

    def batches(self, start: int, batch: int, rank: int, world: int, pin: bool) -> Generator[Samples, None, None]:
        self.batch = batch
        yield from loader(self.mixture, self.config.data, start=start, batch=batch, rank=rank, world=world, pin=pin)

    def losses(self, samples: Samples, forward: Callable[..., Tensor]) -> Losses:
        losses, t = flow_losses(self.model, samples.batch, self.config.flow, forward)
        return Losses(losses * samples.weights, t)  # by 1 exactly, but in reward-weighted fine-tuning

    def validate(self, device: torch.device, rank: int, world: int) -> tuple[Tensor, Tensor] | None:
        """(n,) losses and (n,) times without dropout; None where no clips are held out."""
        if self.held_out is None:
            return None
        undropped = FlowMatchingConfig(
            t_mean=self.config.flow.t_mean, t_scale=self.config.flow.t_scale, text_dropout=0, score_dropout_rate=0
        )
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=self.config.precision == "bf16")
        parts = [(torch.empty(0, device=device), torch.empty(0, device=device))]
        for samples in evaluation_batches(self.held_out, self.batch, self.config.validation.clips, rank, world):
            with autocast:
                parts.append(flow_losses(self.model, samples.to(device).batch, undropped))
        losses, times = zip(*parts, strict=True)
        return torch.cat(losses), torch.cat(times)

    def sample(self, folder: Folder, step: int) -> None:
        write_samples(self.model, self.config, self.bundle, folder, step)

    def note(self, start: int, stop: int, lines: Sequence[Mapping[str, float]]) -> dict[str, Any]:
        return {"drawn": self.mixture.counts(start, stop)} if len(self.mixture.sources) > 1 else {}


MANY_UNCAPTIONED = 0.2
"""Share of samples without a caption from which people are told."""


def caption_warning(share: float) -> str | None:
    """What a training without captions comes to; None where nearly all samples have one.

    Args:
        share: of the samples without a caption.
    """
    if share < MANY_UNCAPTIONED:
        return None
    what = "NO SAMPLE HAS A CAPTION" if share == 1 else f"{share:.0%} OF THE SAMPLES HAVE NO CAPTION"
    return (
        f"WARNING: {what}. Text is learned from captions alone: clips of this model will not follow prompts. Give the "
        "corpus captions (captions.json beside the songs, or catalogue.captions) and make it anew."
    )


def initial_model(config: TrainConfig, mixture: Mixture) -> tuple[FluxAudio, str]:
    """The model before the first update, on the CPU, and what its weights are.

    From scratch: seeded weights, latent statistics of the first corpus, features of the empty text by its bundle. From
    a file: its weights and its frozen tensors; a missing score head, or one of other tensors, is new and starts at
    zero.

    Raises:
        UserError: model and corpus, or model and file, do not fit, or the weights would collapse in the model's
            forward (`models/cross_load.py`).
    """
    shape = backbone_config(config, mixture)
    with seeded(config.model.seed):
        model = FluxAudio(shape)
    if config.model.init is None:
        mean, std = corpus_latents(config.data.sources[0].corpus, config.latent_std)
        text, pooled = empty_text(config)
        with torch.no_grad():
            model.latent_mean.copy_(mean)
            model.latent_std.copy_(std)
            model.empty_string_feat.copy_(text)
            model.empty_string_feat_c.copy_(pooled)
            first = model.text_cond_proj[0]
            assert isinstance(first, nn.Linear)
            first.weight.mul_(config.model.pooled_gain)
        return model, f"scratch, seed {config.model.seed}"
    path = weights_file(config.model.init, "model.init")
    state = tidy(read_state_dict(path), str(path))
    of_file = config_of(state, read_config(path), str(path))
    free = {"head", "null", "latent_len"}  # a new head is fine, and weights are for any length
    ours = shape.to_dict()
    theirs = {name: value for name, value in of_file.to_dict().items() if name not in free and value != ours[name]}
    if theirs:
        lines = "; ".join(f"{name}: file {value}, run {ours[name]}" for name, value in theirs.items())
        raise UserError(f"{path} does not fit model.size {config.model.size}: {lines}.", "Choose its model.size.")
    crossed = init_cross_load(config.model, state, path)
    refuse_another_null(model, path, of_file)
    report = transfer(model, usable(state, crossed))
    check_transfer(model, report, path)
    if crossed is not None:
        console.print(crossed.line(f"init: {path}"), style="yellow", markup=False)
    for line in report.lines():
        console.print(f"init: {line}", markup=False)
    return model, digest_file(path).sha256


def refuse_another_null(model: FluxAudio, path: Path, saved: BackboneConfig) -> None:
    """What a dropped score is has been learned with the head of a file, whatever the shapes of the tensors say.

    Args:
        saved: the file's config. A file that names no null may be of either of the two that are no tensor.

    Raises:
        UserError: the file has a head, and another null than the model's.
    """
    theirs, ours = saved.null, model.config
    unsure = "null" not in read_config(path) and "learned" not in (theirs, ours.null)
    if "none" not in (saved.head, ours.head) and not unsure and theirs != ours.null:
        raise UserError(
            f"model.init: {path} was trained with null {theirs}, model.null is {ours.null}.",
            f"Set model.null: {theirs}.",
        )


def check_transfer(model: FluxAudio, report: Transfer, path: Path) -> None:
    """Only a score head may be new, and what the file brings must be usable.

    Raises:
        UserError: any other tensor would not be loaded, or the latent statistics are NaN.
    """
    lost = [name for name in report.missing + report.unexpected + report.reshaped if not name.startswith("score_embed")]
    if lost:
        raise UserError(f"{path}: {len(lost)} tensors do not fit: {', '.join(lost[:4])}.", "Choose its model.size.")
    for name in ("latent_mean", "latent_std"):
        if not torch.isfinite(getattr(model, name)).all():
            raise UserError(f"{path}: {name} is not finite: these weights were never trained.", "Take trained ones.")


def score_facts(config: TrainConfig, scores: np.ndarray) -> dict[str, Any]:
    """What exported weights will say about scores: `score_support`, widened by that of the weights it starts from.

    Says so where the run's own samples are for a score beyond it.

    Args:
        scores: (n,) that the model is conditioned on, each as often as it is drawn; those that are NaN do not count.

    Returns:
        Empty where nothing is known: no head, or neither scores nor weights that name theirs.
    """
    if config.model.head == "none":
        return {}
    support = read_support(weights_file(config.model.init, "model.init")) if config.model.init else None
    known = scores[np.isfinite(scores)]
    if len(known):
        first = config.data.sources[0]  # all have one protocol (`open_mixture`)
        assert first.score_column is not None
        protocol = protocol_of(Folder.at(first.corpus), first.score_column)
        support = ScoreSupport.of(known, first.score_column, protocol).after(support)
    if support is None:
        return {}
    warning = support.warning(config.samples.score, "samples.score") if config.samples.every else None
    if warning is not None:
        console.print(warning, style="yellow")
    return {"score_support": support.to_dict()}


def backbone_config(config: TrainConfig, mixture: Mixture) -> BackboneConfig:
    """The shape of the backbone: the size's, with the corpus's latents and text features.

    Raises:
        UserError: a released size on a corpus of other models.
    """
    (length, channels), (text_len, text_dim) = mixture.shape, mixture.text_shape
    data: dict[str, Any] = {"latent_dim": channels, "latent_len": length, "text_len": text_len, "text_dim": text_dim}
    if config.model.size == "debug" or config.model.size == "micro":
        return replace(SMALL[config.model.size], **data, head=config.model.head, null=config.model.null)
    size = SIZES[config.model.size]
    other = {name: value for name, value in data.items() if getattr(size, name) != value}
    if other:
        expected = {name: getattr(size, name) for name in other}
        raise UserError(
            f"model.size {config.model.size} needs {expected}, the corpus {config.data.sources[0].corpus} has {other}.",
            "Use a corpus of the paper bundle, or model.size: micro.",
        )
    return replace(size, head=config.model.head, null=config.model.null)


def corpus_latents(corpus: str, std: str) -> tuple[Tensor, Tensor]:
    """Mean and deviation per channel over the train split, (C,) float32.

    Finished corpora have them in stats/latents.json; of a growing one the units' sums are added up.

    Raises:
        UserError: there is no training clip, or a channel never changes.
    """
    run, of = Folder.at(corpus), f"std_of_{std}"
    if run.exists(LATENTS):
        splits = run.read_json(LATENTS)
    else:
        splits = latent_statistics([data for _, data in index.read_units(run, index.committed_units(run))])
    if "train" not in splits:
        raise UserError(f"{corpus} has no training clips, so no latent statistics.", "Lower its splits.")
    if min(splits["train"][of]) <= 0:
        raise UserError(f"{corpus}: a channel of the training latents is constant, so it has no deviation.")
    return torch.tensor(splits["train"]["mean"]), torch.tensor(splits["train"][of])


def empty_text(config: TrainConfig) -> tuple[Tensor, Tensor]:
    """Features (T, D) and (512,) of a dropped text by the corpus's bundle: those kept in the run folder, else new."""
    out, bundle = Folder.at(config.output), corpus_bundle(config.data)
    try:
        tensors, about = unpack(out.read(EMPTY_TEXT), out.path(EMPTY_TEXT)) if out.exists(EMPTY_TEXT) else ({}, {})
    except UserError as error:
        console.print(f"{error.message} It is made again.", markup=False)
        tensors = {}
    if tensors and {"null_text": "zeros"} | about == {"bundle": bundle, "null_text": config.model.null_text}:
        return tensors["text"], tensors["pooled"]
    models = open_bundle(bundle).load(["text", "clap_condition"], LoadOptions())
    zeros = config.model.null_text == "zeros"
    text, pooled = models.text.encode([""])[0], models.clap_condition.embed_text([""], empty_is_zero=zeros)[0]
    return torch.from_numpy(text).float(), torch.from_numpy(pooled).float()


def keep_empty_text(config: TrainConfig, task: Task, device_batch: int, device: torch.device) -> None:
    """So that neither Ray's workers nor later launches load the text encoders."""
    tensors = {"text": task.model.empty_string_feat, "pooled": task.model.empty_string_feat_c}
    about = {"bundle": corpus_bundle(config.data), "null_text": config.model.null_text}
    if config.model.init is None:
        Folder.at(config.output).write(EMPTY_TEXT, pack({k: t.cpu() for k, t in tensors.items()}, about))


def frozen_digest(model: FluxAudio) -> str:
    """Hash of the tensors that training does not change."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if not parameter.requires_grad:
            digest.update(name.encode() + parameter.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def write_samples(model: FluxAudio, config: LoopConfig, bundle: str, folder: Folder, step: int) -> None:
    """Audio of the config's prompts as `step-<n>-<i>.flac`; the decoders are loaded and freed again."""
    device = str(model.latent_mean.device)
    models = open_bundle(bundle).load(
        ["text", "clap_condition", "latents", "vocoder"], LoadOptions(device=device, batch=1)
    )
    score = config.samples.score if model.score_embed is not None else None
    settings = SamplerConfig(steps=config.samples.steps, score=score, precision=config.precision)
    sampler = Sampler([model], models.text, models.clap_condition, settings)
    prompts = config.samples.prompts
    latents = sampler.sample([Draw(str(i), prompt, seed=0) for i, prompt in enumerate(prompts)]).latents
    for i, wave in enumerate(models.latents.to_audio(latents, batch=1)):
        folder.write(f"step-{step:08d}-{i}.flac", encode_flac(wave[None], SAMPLE_RATE))
    console.print(f"step {step}: {len(prompts)} samples in {folder}", markup=False)


def train_sft(config: TrainConfig, *, plan_only: bool = False, force: bool = False) -> int:
    """Stage 1 from start to end, or from where it was; returns the exit code."""
    return launch("sft", config, SftTask, plan_only=plan_only, force=force, keep=keep_empty_text)
