"""What a pool is made by: its config, and the models of one process as stages over units."""

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from ttmray.config import Config, Location, execution
from ttmray.corpus import index
from ttmray.corpus.running import Job, Makers
from ttmray.corpus.stage import Stage
from ttmray.corpus.stages import Measure, Text, Write, WriteAudio
from ttmray.corpus.unit import REJECTED, Unit
from ttmray.errors import ClipError, UserError
from ttmray.generation.config import GenerateRuntime, with_bundle_sampler
from ttmray.generation.sampler import SCORE_LIMIT, Draw, Sampler, SamplerConfig, Score
from ttmray.models import require_finite, side_by_side
from ttmray.models.backbone_weights import load_backbone
from ttmray.models.bundle import DEFAULT, BundleName, Models, bundle_of, open_bundle
from ttmray.models.devices import resolve_device
from ttmray.models.loading import LoadOptions
from ttmray.models.score_heads import Head, Null
from ttmray.models.scoring import SAMPLE_RATE, Scorer
from ttmray.storage import Folder

FULL_SCALE = 0.999
"""Samples from here on count as clipped."""


class PoolSampler(SamplerConfig):
    """The sampler, at the score of the paper's pool."""

    score: Score = Field(2.0, ge=-SCORE_LIMIT, le=SCORE_LIMIT)
    """Score to generate for (III-D: s = 2.0, within the range of the training); null: none."""

    @model_validator(mode="after")
    def _one_checkpoint(self) -> Self:
        if self.mode != "single":
            raise ValueError("mode: a pool comes from one checkpoint, so only single will do")
        return self


class CandidatesConfig(Config):
    """`ttmray pool`: the paper samples about 630 clips at s = 2.0; prompts and candidates per prompt are not named."""

    prompts: Location | None = execution(None)
    """File of prompts, as for `ttmray generate`; ids have letters, digits, `_` and `-`, at most 64."""
    corpus: Location | None = execution(None)
    """Corpus run whose training captions are the prompts, instead of a file. Captions that validation or test tracks
    have as well are left out."""
    prompt_count: int | None = Field(None, ge=1)
    """Only so many prompts: the first of a file, or a choice by `seed` of the captions of a corpus. null: all."""
    held_out: Location | None = execution(None)
    """File of prompts that must not be among them, by id or by text (with or without the prefix, whatever the case):
    those of the evaluation. Captions of a corpus that are among them are left out and counted; in a file of prompts
    they are an error, because somebody has chosen them."""
    max_held_out: float = execution(0.5, ge=0, le=1)
    """Share of the captions of a corpus that may be held out: more of them are hardly the prompts of an evaluation."""
    output: Location = execution("runs/pool")
    """Run folder: a local path or s3:// prefix. The same command goes on with what is not done."""
    bundle: BundleName = DEFAULT
    """Set of models. `micro` knows the music of the built-in composer alone; `debug` is untrained: it makes noise."""
    checkpoint: Location | None = execution(None)
    """Weights of the backbone (.safetensors or .pth; their hash is part of the run's identity); default: the bundle's.
    On a cluster every node must see the file under this path; an s3:// address is copied to each."""
    head: Head | None = None
    """Forward that uses the checkpoint's score embedding; default: the one that the file names."""
    force_head: bool = execution(False)
    """Also run v2 weights as v1 or v4, where they collapse (models/cross_load.py)."""
    null: Null | None = None
    """What a dropped score is; default: what the file names."""
    seed: int = Field(42, ge=0, lt=2**63)
    """Seed of the noise, together with the prompt's id and the candidate's number."""
    candidates: int = Field(10, ge=1, le=256)
    """Clips per prompt."""
    sampler: PoolSampler = PoolSampler()
    caption: Literal["prompt", "prefixed"] = "prompt"
    """Text that training on the pool will see: the prompt alone, since captions of the corpus have no prefix either, or
    with the sampler's prefix. CLAP scores are always those of the prompt alone."""
    pad_to: int = Field(441_000, ge=1)
    """Samples at 44.1 kHz that a clip is padded to with zeros, or cut to, before it is measured: a corpus clip's. Where
    it is not named, those of the clips that the bundle knows."""
    reward_text: Literal["empty", "caption"] = "empty"
    """Text input of the reward: choose that of the corpus."""
    silence_dbfs: float = Field(-80.0, le=0)
    """A clip whose sample peak is below this is rejected as silent."""
    max_clipping: float = Field(0.01, ge=0, le=1)
    """A clip with a larger share of samples at full scale is rejected as clipped."""
    keep_audio: bool = False
    """Also store every clip as mono 16-bit FLAC."""
    unit_clips: int = Field(32, ge=1, le=256)
    """Most clips per unit (but always whole prompts): what is committed, and repeated after a kill."""
    max_failures: int = execution(0, ge=0)
    """Exit code 3 when more clips than this failed."""
    runtime: GenerateRuntime = execution(GenerateRuntime())

    @model_validator(mode="before")
    @classmethod
    def _fill_sampler(cls, values: Any) -> Any:
        values = with_bundle_sampler(values)
        if isinstance(values, dict) and "pad_to" not in values:
            length = round(bundle_of(values).clip_s * SAMPLE_RATE)
            if length != cls.model_fields["pad_to"].default:
                return values | {"pad_to": length}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.prompts is None) == (self.corpus is None):
            raise ValueError("needs prompts (a file: prompts=FILE) or corpus (a run folder: corpus=RUN), and not both")
        if self.checkpoint is None and (self.head or self.null):
            raise ValueError("head and null say how a checkpoint is used; there is none")
        return self


def candidates(config: CandidatesConfig, unit: Unit, protocol: str) -> list[dict[str, Any]]:
    """The rows of a unit that is still to be made: all candidates of its prompts."""
    return [
        index.new_row(track, unit.name, protocol)
        | {"key": f"{track['track_id']}_{k}", "segment": k, "start_s": 0.0}
        | {"prompt_id": track["track_id"], "candidate": k, "pool_seed": config.seed}
        | {"input_score": config.sampler.score}
        for track in unit.tracks
        for k in range(config.candidates)
    ]


@dataclass(frozen=True)
class PoolJob(Job):
    """The stages of the pool of a `CandidatesConfig`. Its units come with the rows of `candidates`."""

    clip_timeout_s = 3600.0  # a full-size clip on one core takes minutes

    @property
    def pool(self) -> CandidatesConfig:
        return CandidatesConfig.model_validate_json(self.config)

    @property
    def output(self) -> str:
        return self.pool.output

    def makers(self) -> Makers:
        config, threads = self.pool, self.pool.runtime.thread_count
        write = WriteAudio if config.keep_audio else Write
        return {
            Sample: lambda models: Sample(config, make_sampler(config, models)),
            Vocode: lambda models: Vocode(config, models.latents, threads),
            Measure: lambda _: Measure(config.silence_dbfs),
            Judge: lambda models: Judge(config, make_scorer(config, models, threads)),
            Text: Text,
            write: lambda _: write(Folder.at(config.output), fingerprint=self.run),
        }

    def load(self, roles: Collection[str]) -> Models:
        """The models, and the backbone of the config's checkpoint.

        Raises:
            UserError: models that are not there, or do not fit each other or the config.
        """
        config, runtime = self.pool, self.pool.runtime
        own = config.checkpoint is not None and "backbone" in roles
        device = resolve_device(runtime.device)
        options = LoadOptions(device=device, batch=runtime.batch, threads=runtime.thread_count)
        models = open_bundle(config.bundle).load(set(roles) - ({"backbone"} if own else set()), options)
        if own:
            how: dict[str, Any] = {"head": config.head, "null": config.null, "force": config.force_head}
            models.backbone = load_backbone(str(config.checkpoint), **how, device=device)
        if "latents" not in roles:
            return models
        if "backbone" in roles and models.backbone.config.latent_dim != models.latents.channels:
            raise UserError(
                f"checkpoint: the backbone makes {models.backbone.config.latent_dim} latent channels, the VAE of the "
                f"bundle has {models.latents.channels}.",
                "Name the bundle that it was trained with.",
            )
        if (rate := models.latents.sample_rate) != SAMPLE_RATE:
            raise UserError(
                f"bundle {config.bundle} makes audio of {rate} Hz, a pool has {SAMPLE_RATE} Hz.",
                "Name the bundle of a model that makes it.",
            )
        return models


def make_scorer(config: CandidatesConfig, models: Models, threads: int) -> Scorer:
    """What scores the clips of a pool, by the protocol of its bundle."""
    return Scorer(models, open_bundle(config.bundle).protocol(config.reward_text), threads)


def make_sampler(config: CandidatesConfig, models: Models) -> Sampler:
    """What draws the clips of a pool with the backbone and the encoders of `models`."""
    runtime = config.runtime
    return Sampler(
        [models.backbone],
        models.text,
        models.clap_condition,
        config.sampler,
        batch=runtime.batch,
        threads=runtime.thread_count,
        compile=runtime.compile,
    )


class Sample(Stage):
    """Rows -> `latent_mean` (n, N, C) float16, what the VAE decodes, and `latent_std`, zeros."""

    name, resources = "sample", "models"
    model_roles = ("backbone", "text", "clap_condition")
    writes = ("latent_mean", "latent_std")

    def __init__(self, config: CandidatesConfig, sampler: Sampler) -> None:
        self.config, self.sampler = config, sampler

    def __call__(self, unit: Unit) -> Unit:
        rows = unit.ok_rows()
        draws = [draw_of(row, self.config) for row in rows]
        with np.errstate(over="ignore"):  # the next line says it better
            latents = self.sampler.sample(draws).latents.astype(np.float16)
        require_finite(latents, "latents as float16")
        for row, clip in zip(rows, latents, strict=True):
            row.update(stage=self.name, sha256=hashlib.sha256(clip.tobytes()).hexdigest())
        unit.clips = {"latent_mean": latents, "latent_std": np.zeros_like(latents)}
        return unit


class Vocode(Stage):
    """`latent_mean` -> `mix` (n, 1, samples) float32 at 44.1 kHz, without clips that are clipped."""

    name, resources = "vocode", "models"
    model_roles = ("latents", "vocoder")
    reads = ("latent_mean",)
    writes = ("mix",)

    def __init__(self, config: CandidatesConfig, latents: Any, threads: int) -> None:
        self.config, self.latents, self.threads = config, latents, threads

    def __call__(self, unit: Unit) -> Unit:
        stored = unit.clips["latent_mean"].astype(np.float32)  # scores are those of what training will see
        if self.latents.device.type == "cpu":
            waves = side_by_side(lambda one: self.latents.to_audio(one[None])[0], list(stored), self.threads)
        else:
            waves = list(self.latents.to_audio(stored, self.config.runtime.batch))
        mix = np.zeros((len(waves), 1, self.config.pad_to), np.float32)
        for i, wave in enumerate(waves):
            mix[i, 0, : len(wave)] = wave[: self.config.pad_to]
        unit.clips["mix"] = mix
        rows, seconds = unit.ok_rows(), min(len(waves[0]), self.config.pad_to) / SAMPLE_RATE

        def check(i: int) -> None:
            clipping = float(np.mean(np.abs(waves[i][: self.config.pad_to]) >= FULL_SCALE))
            rows[i].update(stage=self.name, duration_s=seconds, sample_rate=SAMPLE_RATE, channels=1, clipping=clipping)
            if clipping > self.config.max_clipping:
                raise ClipError(REJECTED, "clipped", f"{clipping:.2%} of the samples are at full scale")

        unit.one_by_one(self.name, check)
        return unit


class Judge(Stage):
    """CLAP and MERT embeddings, the reward and the cosine with the prompt, of the clips as they are.

    `instrumental` (n, samples) is the clip itself.
    """

    name, resources = "score", "models"
    model_roles = Scorer.roles
    reads = ("mix",)
    writes = ("clap_audio", "mert", "instrumental")

    def __init__(self, config: CandidatesConfig, scorer: Scorer) -> None:
        self.config, self.scorer = config, scorer

    def __call__(self, unit: Unit) -> Unit:
        rows, mix = unit.ok_rows(), unit.clips["mix"][:, 0]
        texts = self.scorer.texts([_prompt(row, self.config) for row in rows])
        embedded = self.scorer.embed(mix)
        for i, (row, reward) in enumerate(zip(rows, self.scorer.rewards(embedded, texts).tolist(), strict=True)):
            clap = float(embedded.clap[i] @ texts[i])
            row.update(stage=self.name, reward_score=reward, instrumental_reward_score=reward)
            row.update(clap_score=clap, instrumental_clap_score=clap)
        unit.clips |= {
            "clap_audio": np.repeat(embedded.clap[:, None], 2, axis=1),
            "mert": np.repeat(embedded.mert[:, None], 2, axis=1),
            "instrumental": mix,
        }
        return unit


def draw_of(row: dict[str, Any], config: CandidatesConfig) -> Draw:
    """What a row's clip is drawn from."""
    return Draw(row["prompt_id"], _prompt(row, config), config.seed, row["candidate"])


def _prompt(row: dict[str, Any], config: CandidatesConfig) -> str:
    return str(row["caption"][len(config.sampler.prefix) if config.caption == "prefixed" else 0 :])
