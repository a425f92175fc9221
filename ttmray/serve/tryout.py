"""What the page can do: make a clip, make two and hear them blind, vote."""

import json
import secrets
import threading
import uuid
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import model_validator

from ttmray.api import AudioClip, LoadedBundle, load
from ttmray.config import Config, Device, Location, execution, fingerprint
from ttmray.errors import UserError
from ttmray.models.backbone_weights import file_config, read_support
from ttmray.models.bundle import DEFAULT, BundleName, open_bundle
from ttmray.models.scoring import Scorer
from ttmray.models.weights import digest_file, weights_file
from ttmray.serve.votes import VotesTable
from ttmray.storage import Folder

CLIPS = "clips"
USUAL = (-3.0, 5.0)
"""Scores to choose from where the weights do not say theirs: rewards of the paper, up to its sampling score."""
LONGEST = 1000
"""Characters of a prompt."""
SEEDS = 2**53
"""Seeds are below this: whole numbers that browsers do not round."""
Choice = Literal["first", "second", "tie"]


class ServeConfig(Config):
    """`ttmray serve`."""

    bundle: BundleName = execution(DEFAULT)
    """Set of models. `micro` knows the music of the built-in composer alone."""
    checkpoint: Location | None = execution(None)
    """Weights of the backbone; default: the bundle's."""
    second_checkpoint: Location | None = execution(None)
    """Other weights, to compare with the first: pairs are then one clip of each. Without it, the page compares two
    scores."""
    output: Location = execution("runs/serve")
    """Folder of clips and votes, local or s3://; the next start goes on with it. `votes.csv` is a source of
    `train-ranker`."""
    host: str = execution("127.0.0.1", min_length=1)
    """Address to listen on. One that other machines reach needs the token that is printed."""
    port: int = execution(7860, ge=0, le=65535)
    """0: any free one."""
    steps: int = execution(25, ge=1, le=1000)
    """Of the sampler."""
    device: Device = execution("auto")
    """Of the models; `auto` is cuda where there is one."""

    @model_validator(mode="after")
    def _two_or_one(self) -> Self:
        if self.second_checkpoint is not None and self.second_checkpoint == self.checkpoint:
            raise ValueError("second_checkpoint is the first one; leave it out to compare two scores")
        return self


@dataclass(frozen=True)
class Scores:
    """Scores that can be asked for.

    Attributes:
        low, high: ends of the slider.
        usual: where it starts.
        trained: 5th and 95th percentile of the scores of the training; None where the weights do not say them.
    """

    low: float
    high: float
    usual: float
    trained: tuple[float, float] | None = None


@dataclass(frozen=True)
class Weights:
    """Weights that make clips: what they are called, their file (None: the bundle's) and what decides their sound."""

    name: str
    checkpoint: str | None
    identity: str


@dataclass(frozen=True)
class HeardClip:
    """A clip that lies in the output folder, and what is known of it."""

    file: str
    system: str
    score: float | None
    reward: float | None
    clap_score: float | None
    lufs: float | None


@dataclass(frozen=True)
class HeardPair:
    """Two clips in the order in which they are heard, and what they were made from."""

    id: str
    clips: tuple[HeardClip, HeardClip]
    prompt: str
    guidance: float
    seed: int


class TryOut:
    """A loaded bundle, its clips and the votes about them. Clips are made one after the other, whoever asks.

    Raises:
        UserError: there is no such bundle or checkpoint, it makes no sound, or the votes cannot be read.
    """

    def __init__(self, config: ServeConfig) -> None:
        self.config, self.out = config, Folder.at(config.output)
        self.studio: LoadedBundle = load(config.bundle, device=config.device)
        bundle = open_bundle(config.bundle)
        needed = {"text", "clap_condition", "latents", "vocoder"} | (
            {"backbone"} if config.checkpoint is None else set()
        )
        bundle.require(needed)
        self.note, self.clip_s = self.studio.note, self.studio.clip_s
        models = fingerprint(bundle.identity(needed))
        chosen = [config.checkpoint, *([config.second_checkpoint] if config.second_checkpoint else [])]
        self.weights = [Weights(_name(one, config.bundle), one, models + _digest(one)) for one in chosen]
        if len({one.name for one in self.weights}) < len(self.weights):
            self.weights = [
                Weights(f"{one.name}-{i}", one.checkpoint, one.identity) for i, one in enumerate(self.weights, 1)
            ]
        self.scores = _scores(self.studio.backbone if config.checkpoint is None else config.checkpoint, bundle.sampling)
        self.guidance = float(bundle.sampling.get("weight", 4.0))
        self.votes = VotesTable(self.out)
        self._judges = bundle.roles() >= set(Scorer.roles)
        self._pairs: dict[str, HeardPair] = {}
        self._lock = threading.Lock()

    def clip(self, prompt: str, score: float | None, guidance: float, seed: int, which: int = 0) -> HeardClip:
        """Make a clip, unless it is there.

        Args:
            which: of the weights.

        Raises:
            UserError: what cannot be asked for, or the clip failed.
        """
        prompt = self._checked(prompt, score, guidance, seed)
        weights = self.weights[which]
        key = fingerprint([weights.identity, prompt, score, guidance, seed, self.config.steps])[:32]
        name, facts = f"{CLIPS}/{key}.flac", f"{CLIPS}/{key}.json"
        with self._lock:
            if not self.out.exists(facts):
                sampler: dict[str, Any] = {"score": score, "steps": self.config.steps}
                sampler |= {"weight": guidance, "guidance": "joint"}
                fields: dict[str, Any] = {} if weights.checkpoint is None else {"checkpoint": weights.checkpoint}
                (sound,) = self.studio.generate({"clip": prompt}, seed=seed, sampler=sampler, **fields)
                sound.save(self.out.path(name))
                heard = HeardClip(name, weights.name, score, *self._judged(sound, prompt), sound.row["lufs"])
                self.out.write(facts, json.dumps(asdict(heard), ensure_ascii=False).encode())  # last: it is complete
            return HeardClip(**self.out.read_json(facts))

    def pair(self, prompt: str, scores: tuple[float | None, float | None], guidance: float, seed: int) -> HeardPair:
        """Make two clips from the same noise, in an order that nobody knows: of the two weights where there are two, at
        a score each.

        Raises:
            UserError: as `clip`, or both would be the same.
        """
        other = len(self.weights) - 1
        if not other and scores[0] == scores[1]:
            raise UserError("Both clips would be the same.", "Choose two different scores.")
        clips = [
            self.clip(prompt, score, guidance, seed, which) for score, which in zip(scores, (0, other), strict=True)
        ]
        if secrets.randbelow(2):
            clips.reverse()
        heard = HeardPair(uuid.uuid4().hex, (clips[0], clips[1]), " ".join(prompt.split()), guidance, seed)
        self._pairs[heard.id] = heard
        return heard

    def vote(self, pair_id: str, choice: Choice) -> tuple[HeardPair, int]:
        """Keep what somebody prefers; returns the pair, which need not be blind any more, and the number of votes.

        Raises:
            UserError: there is no such pair, it has a vote, or it is no choice.
        """
        if (heard := self._pairs.get(pair_id)) is None:
            raise UserError("There is no such pair.", "Make one; those of an earlier start are gone.")
        label = {"first": "a", "second": "b", "tie": "tie"}.get(choice)
        if label is None:
            raise UserError(f"{choice!r} is no choice.", "first, second or tie.")
        a, b = heard.clips
        names = (self._system(a), self._system(b))
        row: dict[str, Any] = {"id": heard.id, "a": a.file, "b": b.file, "label": label, "prompt": heard.prompt}
        row |= {"system_a": names[0], "system_b": names[1], "score_a": a.score, "score_b": b.score}
        row |= {"guidance": heard.guidance, "seed": heard.seed, "cast": datetime.now(UTC).isoformat(timespec="seconds")}
        return heard, self.votes.add(row)

    def audio(self, key: str) -> bytes | None:
        """The FLAC file of a clip; None where there is none."""
        name = f"{CLIPS}/{key}.flac"
        return self.out.read(name) if self.out.exists(name) else None

    def _checked(self, prompt: str, score: float | None, guidance: float, seed: int) -> str:
        prompt = " ".join(prompt.split())
        if not prompt or len(prompt) > LONGEST:
            raise UserError(f"A prompt has 1 to {LONGEST} characters.", "Say what is to be heard.")
        if not 0 <= seed < SEEDS:
            raise UserError(f"A seed is a whole number from 0 to {SEEDS - 1}.")
        if not 0 <= guidance <= 100:
            raise UserError("Guidance is a number from 0 to 100.")
        if self.scores is None and score is not None:
            raise UserError("These weights take no score.", "Leave it out.")
        if self.scores is not None and (score is None or not self.scores.low <= score <= self.scores.high):
            raise UserError(f"A score is a number from {self.scores.low:g} to {self.scores.high:g}.")
        return prompt

    def _judged(self, sound: AudioClip, prompt: str) -> tuple[float | None, float | None]:
        """Reward and CLAP score, where the bundle has the models and the clip is no silence."""
        if not self._judges:
            return None, None
        row = self.studio.score([sound], captions=prompt).iloc[0]
        return (float(row["reward"]), float(row["clap_score"])) if row["status"] == "ok" else (None, None)

    def _system(self, clip: HeardClip) -> str:
        """Of a table of votes: the weights, and where there are only one, their score."""
        return clip.system if len(self.weights) > 1 else f"{clip.system} {clip.score:+g}"


def _name(checkpoint: str | None, bundle: str) -> str:
    return Path(checkpoint or bundle).stem if checkpoint or "/" in bundle else bundle


def _digest(checkpoint: str | None) -> str:
    return "" if checkpoint is None else digest_file(weights_file(checkpoint, "checkpoint")).sha256


def _scores(path: str | None, sampling: Any) -> Scores | None:
    """Those of weights; None where they take none.

    Args:
        path: of their file; None: drawn from a seed, with a head.
        sampling: settings of the bundle.
    """
    support = None
    if path is not None:
        file = weights_file(path, "checkpoint")
        if file_config(file)[0].head == "none":
            return None
        support = read_support(file)
    if support is None:
        return Scores(*USUAL, float(sampling.get("score") or 1.0))
    usual = sampling.get("score")
    usual = support.p95 if usual is None or not support.min <= usual <= support.max else usual
    low, high, usual = (round(float(value), 2) for value in (support.min, support.max, usual))
    return Scores(low, high, min(max(usual, low), high), (support.p5, support.p95))
