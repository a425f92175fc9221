"""The models of one process, and the way of a clip through them: sample, decode, finish, score, write."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ttmray.audio.clip import levels
from ttmray.audio.level import silence
from ttmray.errors import ClipError, UserError
from ttmray.generation import manifest
from ttmray.generation.config import GenerateConfig
from ttmray.generation.postprocess import (
    PostprocessConfig,
    encode,
    limiting_heard,
    open_separator,
    postprocess_clip,
)
from ttmray.generation.sampler import Draw, Sampler
from ttmray.models import one_thread, side_by_side
from ttmray.models.backbone_weights import load_backbone
from ttmray.models.bundle import Bundle, open_bundle
from ttmray.models.devices import resolve_device
from ttmray.models.loading import LoadOptions
from ttmray.models.scoring import SAMPLE_RATE, Scorer
from ttmray.quarantine import together
from ttmray.storage import Folder


@dataclass(frozen=True)
class ClipJob:
    """What a process needs to make clips: the config as JSON, and what rows say about the run."""

    config: str
    settings: str
    weights: str


@dataclass(frozen=True)
class PlannedClip:
    """A planned clip; `name` is that of its file without ending."""

    name: str
    draw: Draw


@dataclass
class _Work:
    """A clip on its way."""

    clip: PlannedClip
    latents: np.ndarray | None = None
    wave: np.ndarray | None = None
    audio: np.ndarray | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    error: ClipError | None = None


class ClipMaker:
    """Makes clips: writes their audio files and rows, and returns the rows and the seconds per stage.

    Args:
        job: what is to be made.
        bundle: that of the config, where it is open already.

    Raises:
        UserError: models that are not there, or do not fit each other or the config.
    """

    def __init__(self, job: ClipJob, bundle: Bundle | None = None) -> None:
        self.job = job
        self.config = config = GenerateConfig.model_validate_json(job.config)
        self.run = Folder.at(config.output)
        runtime = config.runtime
        device = resolve_device(runtime.device)
        self.threads = runtime.thread_count
        bundle = bundle or open_bundle(config.bundle)
        options = LoadOptions(device=device, batch=runtime.batch, threads=self.threads)
        self.models = models = bundle.load(roles_of(config), options)
        backbones = [models.backbone]
        if config.checkpoint is not None:
            paths = [path for path in (config.checkpoint, config.second_checkpoint) if path is not None]
            how: dict[str, Any] = {"head": config.head, "null": config.null, "force": config.force_head}
            backbones = [load_backbone(path, **how, device=device) for path in paths]
        if backbones[0].config.latent_dim != models.latents.channels:
            raise UserError(
                f"checkpoint: the backbone makes {backbones[0].config.latent_dim} latent channels, the VAE of the "
                f"bundle has {models.latents.channels}.",
                "Name the bundle that it was trained with.",
            )
        rate = models.latents.sample_rate
        length = round(bundle.clip_s * SAMPLE_RATE) if config.pad_to == "auto" else config.pad_to
        self.pad_to = None if length is None else round(length * rate / SAMPLE_RATE)
        if rate != SAMPLE_RATE and (config.scores or config.best_of > 1):
            raise UserError(
                f"bundle {config.bundle} makes audio of {rate} Hz, scores are for {SAMPLE_RATE} Hz.",
                "Leave out scores and best_of, and score the files: ttmray evaluate.",
            )
        self.sampler = Sampler(
            backbones,
            models.text,
            models.clap_condition,
            config.sampler,
            batch=runtime.batch,
            threads=self.threads,
            compile=runtime.compile,
        )
        self.on_cpu = self.sampler.device.type == "cpu"
        finish = config.postprocess
        self.separator = open_separator(finish.model_copy(update={"device": device}), bundle) if finish else None
        self.scorer = self.protocol = None
        if config.scores or config.best_of > 1:
            protocol = bundle.protocol("empty")
            self.scorer, self.protocol = Scorer(models, protocol, self.threads), f"{bundle.name}/{protocol.id()}"
        one_thread()

    def __call__(self, clips: Sequence[PlannedClip]) -> tuple[list[dict[str, Any]], dict[str, float]]:
        works = [_Work(clip) for clip in clips]
        seconds: dict[str, float] = {}
        make = [self._sample, self._decode] if self.config.best_of == 1 else [self._choose]
        stages = (*make, self._finish, *([self._score] if self.config.scores else []), self._write)
        for stage in stages:
            started = time.perf_counter()
            alive = [work for work in works if work.error is None]
            if alive:
                _attempt(stage, alive)
            seconds[stage.__name__.strip("_")] = time.perf_counter() - started
        rows = []
        for work in works:
            row = self._row(work)
            self._commit(row)
            rows.append(row)
        return rows, seconds

    def _sample(self, works: Sequence[_Work]) -> None:
        samples = self.sampler.sample([work.clip.draw for work in works])
        for work, latents in zip(works, samples.latents, strict=True):
            work.latents = latents

    def _decode(self, works: Sequence[_Work]) -> None:
        arrays = [work.latents for work in works if work.latents is not None]
        decoder = self.models.latents
        if self.on_cpu:
            waves = side_by_side(lambda latents: decoder.to_audio(latents[None])[0], arrays, self.threads)
        else:
            waves = list(decoder.to_audio(np.stack(arrays), self.config.runtime.decode_batch))
        for work, wave in zip(works, waves, strict=True):
            work.wave = _padded(wave, self.pad_to)[None]

    def _choose(self, works: Sequence[_Work]) -> None:
        """The best of N candidates. One of all clips at a time, so memory does not grow with N."""
        n = self.config.best_of
        tried: list[list[float | None]] = [[] for _ in works]
        for c in range(n):
            draws = [replace(work.clip.draw, candidate=work.clip.draw.candidate * n + c) for work in works]
            trials = [_Work(PlannedClip(work.clip.name, draw)) for work, draw in zip(works, draws, strict=True)]
            for stage in (self._sample, self._decode, self._judge):
                alive = [trial for trial in trials if trial.error is None]
                if alive:
                    _attempt(stage, alive)
            for work, trial, scores in zip(works, trials, tried, strict=True):
                score = trial.facts.get(self.config.best_by)
                known = [one for one in scores if one is not None]
                scores.append(score)
                if trial.error is not None:
                    work.error = work.error or trial.error
                elif work.wave is None or (score is not None and score > max(known, default=-math.inf)):
                    work.wave = trial.wave
                    work.facts["chosen"] = trial.clip.draw.candidate
        for work, scores in zip(works, tried, strict=True):
            work.facts["tried"] = json.dumps(scores)
            if work.wave is not None:  # a clip fails only when all of its candidates do
                work.error = None

    def _judge(self, works: Sequence[_Work]) -> None:
        self._score_audio(works, [work.wave for work in works])

    def _finish(self, works: Sequence[_Work]) -> None:
        # passes of several clips at once would only take more of a GPU's memory
        threads = 1 if self.separator and not self.on_cpu else self.threads
        side_by_side(self._finish_one, works, threads)

    def _finish_one(self, work: _Work) -> None:
        assert work.wave is not None
        rate = self.models.latents.sample_rate
        facts: dict[str, Any]
        if self.config.postprocess is None:
            work.audio = work.wave
            facts = {"sample_rate": rate, "channels": 1} | levels(work.audio, rate)
        else:
            work.audio, processed = postprocess_clip(work.wave, rate, self.config.postprocess, self.separator)
            facts = {name: processed[name] for name in ("sample_rate", "channels", "outcome")}
            facts |= {"lufs": processed["lufs_after"], "true_peak_db": processed["true_peak_after"]}
            facts |= {"message": limiting_heard(processed["reduction_db"]) or None}
        work.facts |= facts | {"duration_s": work.audio.shape[1] / facts["sample_rate"]}

    def _score(self, works: Sequence[_Work]) -> None:
        """Before 16-bit files are rounded: a score of the file differs in its last digits."""
        self._score_audio(works, [work.audio for work in works])

    def _score_audio(self, works: Sequence[_Work], sounds: Sequence[np.ndarray | None]) -> None:
        """Rewards and CLAP scores of (channels, samples) waves; silent ones get none."""
        assert self.scorer is not None
        audible = [(w, s) for w, s in zip(works, sounds, strict=True) if s is not None and not silence(s)]
        embeddings = self.scorer.embed([sound.mean(axis=0) for _, sound in audible])
        texts = self.scorer.texts([work.clip.draw.prompt for work, _ in audible])
        rewards = self.scorer.rewards(embeddings, texts)
        for i, (work, _) in enumerate(audible):
            work.facts["reward_score"] = float(rewards[i])
            work.facts["clap_score"] = float(embeddings.clap[i] @ texts[i])

    def _write(self, works: Sequence[_Work]) -> None:
        side_by_side(self._write_one, works, self.threads)

    def _write_one(self, work: _Work) -> None:
        assert work.audio is not None
        data = _encoded(work.audio, work.facts["sample_rate"], self.config)
        name = f"{manifest.CLIPS}/{work.clip.name}.{'flac' if self.config.format == 'flac' else 'wav'}"
        self.run.write(name, data)
        work.facts |= {"file": name, "sha256": hashlib.sha256(data).hexdigest()}

    def _commit(self, row: dict[str, Any]) -> None:
        manifest.commit(self.run, row)

    def _row(self, work: _Work) -> dict[str, Any]:
        draw, sampler = work.clip.draw, self.config.sampler
        row: dict[str, Any] = dict.fromkeys(manifest.SCHEMA.names)
        row |= {"name": work.clip.name, "prompt_id": draw.prompt_id, "candidate": draw.candidate, "seed": draw.seed}
        row |= {"prompt": draw.prompt, "text": sampler.prefix + draw.prompt, "score": sampler.score}
        row |= {"weights": self.job.weights, "settings": self.job.settings, "sampler": sampler.model_dump_json()}
        if work.error is not None:
            return row | {"status": manifest.FAILED, "reason": work.error.reason, "message": work.error.message}
        return row | {"status": manifest.OK, "protocol": self.protocol} | work.facts


class SoundMaker(ClipMaker):
    """Makes clips and writes nothing: rows name no file, but have the hash of the one that a run would write.

    Attributes:
        sounds: name of a clip -> (channels, samples) float32, at the rate of its row.
    """

    def __init__(self, job: ClipJob, bundle: Bundle | None = None) -> None:
        super().__init__(job, bundle)
        self.sounds: dict[str, np.ndarray] = {}

    def _write_one(self, work: _Work) -> None:
        assert work.audio is not None
        data = _encoded(work.audio, work.facts["sample_rate"], self.config)
        work.facts["sha256"] = hashlib.sha256(data).hexdigest()
        self.sounds[work.clip.name] = work.audio

    def _commit(self, row: dict[str, Any]) -> None:
        pass


def roles_of(config: GenerateConfig) -> set[str]:
    """Models that a run loads, without the separator, which post-processing opens itself."""
    roles = {"text", "clap_condition", "latents", "vocoder"}
    roles |= {"backbone"} if config.checkpoint is None else set()
    return roles | (set(Scorer.roles) if config.scores or config.best_of > 1 else set())


def _encoded(audio: np.ndarray, rate: int, config: GenerateConfig) -> bytes:
    return encode(audio, rate, config.postprocess or PostprocessConfig(format=config.format))


def _padded(wave: np.ndarray, samples: int | None) -> np.ndarray:
    if samples is None:
        return wave
    return np.pad(wave[:samples], (0, max(0, samples - len(wave))))


def _attempt(stage: Callable[[Sequence[_Work]], None], works: Sequence[_Work]) -> None:
    """A stage over clips; where it fails, they are tried one by one to find the bad ones."""
    for some, outcome in together(works, stage, "Lower runtime.batch."):
        if isinstance(outcome, ClipError):
            some[0].error = outcome
