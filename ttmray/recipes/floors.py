"""How well the parts of a bundle do in the small world, on songs that nobody has trained on: `ttmray synth floors`.

Every number has a floor, below which the part is of no use for what the bundle is made for. A part with random weights
stays below its floor. What generated clips obey is said by judges, and corrected for how often these are wrong about
true clips that were copied by the bundle's own VAE and vocoder (`ttmray.recipes.judges`).
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.table import Table

from ttmray.audio.io import resample
from ttmray.console import console
from ttmray.errors import EXIT_OK, EXIT_TOO_MANY_FAILURES, UserError
from ttmray.generation.sampler import Draw, Sampler, SamplerConfig
from ttmray.models import one_thread
from ttmray.models.bundle import Models, open_bundle
from ttmray.models.loading import LoadOptions
from ttmray.models.protocol import CLAP_SAMPLE_RATE
from ttmray.models.scoring import SAMPLE_RATE, Scorer
from ttmray.pretraining.clap import recall_at_1
from ttmray.pretraining.fidelity import compare_waves, mean_of, pitch_error
from ttmray.pretraining.separator import si_sdr
from ttmray.ranker.report import calibration, fit_temperature
from ttmray.recipes.judges import corrected, features, judge
from ttmray.statistics import spearman
from ttmray.storage import Folder
from ttmray.synth.captions import caption
from ttmray.synth.listeners import Heard, Listeners, best_accuracy, votes
from ttmray.synth.measures import estimate, measure
from ttmray.synth.piece import Attributes
from ttmray.synth.world import Clip, clip

RESULT = "floors.json"
PARTS = ("clap", "separator", "latents", "reward", "generation")
SCORES = (-2.0, -1.0, 0.0, 1.0, 2.0)
"""Scores that are asked for, in standard deviations of the rewards of true clips around their mean."""
NEAR = 0.02
"""Tempos that differ by less are the same."""
Question = Callable[[Attributes], bool]
QUESTIONS: tuple[tuple[str, float, Question, Question], ...] = (
    ("drums or none", 0.85, lambda heard: True, lambda heard: bool(heard.kit)),
    ("voice or none", 0.85, lambda heard: True, lambda heard: bool(heard.voice)),
    ("slow or fast", 0.8, lambda heard: heard.tempo_word != "medium", lambda heard: heard.tempo_word == "fast"),
)
"""What is asked about generated clips: name, floor, which clips it concerns, and what is true of one."""


@dataclass(frozen=True)
class Floor:
    """One number of a part.

    Attributes:
        least: the floor, or with `most` the ceiling.
        note: what the number is to be read with.
    """

    part: str
    name: str
    value: float
    least: float | None = None
    most: float | None = None
    note: str = ""

    @property
    def holds(self) -> bool:
        return (self.least is None or self.value >= self.least) and (self.most is None or self.value <= self.most)


@dataclass(frozen=True)
class Sizes:
    """How much is measured: clips of the encoders; clips that sing; copies by VAE and vocoder; votes; copies that
    judges learn from; generated clips."""

    clips: int = 300
    stems: int = 16
    copies: int = 60
    votes: int = 20_000
    judges: int = 400
    generated: int = 80


def check_floors(
    bundle: str, *, seed: int = 4242, parts: Sequence[str] = PARTS, sizes: Sizes = Sizes(), out: str | None = None
) -> int:
    """Measure, print the table, and write it to a folder if there is one; exit code 3 where a floor is not reached.

    Raises:
        UserError: an unknown part, or weights that are not there.
    """
    unknown = set(parts) - set(PARTS)
    if unknown:
        raise UserError(f"--part {min(unknown)}: there is no such part.", f"Known: {', '.join(PARTS)}.")
    floors = measure_floors(bundle, seed, parts, sizes)
    table = Table("part", "measure", "value", "floor", "", "note", title=f"{bundle}, songs of seed {seed}")
    for row in floors:
        bound = "" if row.least is None else f"≥ {row.least:g}"
        bound += "" if row.most is None else f"≤ {row.most:g}"
        verdict = "" if not bound else "holds" if row.holds else "FAILS"
        table.add_row(row.part, row.name, f"{row.value:.3f}", bound, verdict, row.note)
    console.print(table)
    if out is not None:
        result = {"bundle": bundle, "seed": seed, "sizes": asdict(sizes), "floors": [asdict(row) for row in floors]}
        Folder.at(out).write(RESULT, json.dumps(result, indent=1).encode())
    return EXIT_OK if all(row.holds for row in floors) else EXIT_TOO_MANY_FAILURES


def measure_floors(name: str, seed: int, parts: Sequence[str] = PARTS, sizes: Sizes = Sizes()) -> list[Floor]:
    """All floors of some parts of a bundle."""
    bundle = open_bundle(name)
    protocol = bundle.protocol("empty")
    roles = {
        "clap": ("clap",),
        "separator": ("separator",),
        "latents": ("latents", "vocoder"),
        "reward": Scorer.roles,
        "generation": (*Scorer.roles, "latents", "vocoder", "backbone", "text", "clap_condition"),
    }
    needed = {role for part in parts for role in roles[part]}
    options = LoadOptions(device="cpu", clip_samples=round(bundle.clip_s * SAMPLE_RATE))
    models = bundle.load(needed, options)
    one_thread()
    world = World(seed, bundle.clip_s)
    measures = {
        "clap": lambda: retrieval(models, world, sizes),
        "separator": lambda: separation(models, world, sizes),
        "latents": lambda: reconstruction(models, world, sizes),
        "reward": lambda: reward(Scorer(models, protocol), world, sizes),
        "generation": lambda: generation(models, Scorer(models, protocol), world, sizes, bundle.sampling),
    }
    return [row for part in parts for row in measures[part]()]


@dataclass(frozen=True)
class World:
    """Clips of a seed. They are composed whenever they are asked for: with its stems, one of 5 s holds 9 MB."""

    seed: int
    seconds: float

    def __getitem__(self, index: int) -> Clip:
        return clip(self.seed, index, self.seconds)

    def first(self, count: int) -> list[Clip]:
        return [self[index] for index in range(count)]


def retrieval(models: Models, world: World, sizes: Sizes) -> Iterator[Floor]:
    """Captions find their clip among 50; chance is 0.02."""
    clips = world.first(sizes.clips)
    audio = models.clap.embed_audio([resample(item.mix.mean(axis=0), SAMPLE_RATE, CLAP_SAMPLE_RATE) for item in clips])
    for name, texts, least in (
        ("R@1 of 50", [item.caption for item in clips], 0.2),
        ("R@1 of 50, unseen wordings", [item.unseen for item in clips], 0.12),
    ):
        yield Floor("clap", name, recall_at_1(audio, models.clap.embed_text(texts)), least)


def separation(models: Models, world: World, sizes: Sizes) -> Iterator[Floor]:
    """SI-SDR of the instrumental against that of the mix, on clips that sing."""
    gains: list[float] = []
    index = 0
    while len(gains) < sizes.stems:
        item = world[index]
        index += 1
        voice, rest = item.stems["vocals"], item.mix - item.stems["vocals"]
        if np.square(voice).sum() < 1e-2 * np.square(item.mix).sum():
            continue
        result = models.separator.separate([item.mix])[0]
        gains.append(si_sdr(result.instrumental, rest) - si_sdr(item.mix, rest))
    yield Floor("separator", "SI-SDR gain of the instrumental, dB", float(np.mean(gains)), 6.0)


def reconstruction(models: Models, world: World, sizes: Sizes) -> Iterator[Floor]:
    """Through VAE and vocoder and back."""
    rows: list[dict[str, float]] = []
    index = 0
    while len(rows) < sizes.copies:
        item = world[index]
        index += 1
        wave = item.mix.mean(axis=0)
        row = compare_waves(_copy(models, wave), wave) | {"pitch": math.nan, "tempo_kept": math.nan}
        if abs(row["tempo"] / item.heard.tempo - 1) < NEAR:  # elsewhere the measure is wrong about the original
            row["tempo_kept"] = float(row["tempo_off"] < NEAR)
        if item.heard.voice:
            voice = item.stems["vocals"].mean(axis=0)
            row["pitch"] = pitch_error(_copy(models, voice), voice)
        rows.append(row)
    mean = mean_of(rows)
    pitches = [row["pitch"] for row in rows if not math.isnan(row["pitch"])]
    yield Floor("latents", "mel error as a share of silence's", mean["mel_of_silence"], most=0.2)
    yield Floor("latents", "mel error, dB", mean["mel_db"])
    yield Floor("latents", "pitch of the voice, semitones off (median)", float(np.median(pitches)), most=0.5)
    tempos = [row["tempo_off"] for row in rows if not math.isnan(row["tempo_off"])]
    yield Floor("latents", "tempo, share that it is off (median)", float(np.median(tempos)), most=NEAR)
    judged = sum(not math.isnan(row["tempo_kept"]) for row in rows)
    note = f"{judged} of {len(rows)} clips, in which it is measured right"
    yield Floor("latents", "tempo within 2 %, share of the clips", mean["tempo_kept"], 0.7, note=note)


def _copy(models: Models, wave: np.ndarray) -> np.ndarray:
    means, _ = models.latents.encode(wave[None])
    return models.latents.to_audio(means)[0]


def reward(scorer: Scorer, world: World, sizes: Sizes) -> Iterator[Floor]:
    """Fresh votes, extremes, and true quality."""
    clips = world.first(sizes.clips)
    scores = rewards_of(scorer, [item.mix.mean(axis=0) for item in clips])
    by_key = {item.key: score for item, score in zip(clips, scores, strict=True)}
    heard = [Heard(item.key, item.quality, bool(item.heard.voice), item.caption) for item in clips]
    rows = votes(heard, sizes.votes, world.seed)
    decided = [row for row in rows if row["label"] != "tie"]
    margin = np.array([by_key[row["a"]] - by_key[row["b"]] for row in decided])
    target = np.array([float(row["label"] == "a") for row in decided])
    accuracy = float(((margin > 0) == (target > 0.5)).mean())
    best = best_accuracy(heard, Listeners()).knowing_all
    # half of the votes warm the margins, the other half judge them
    half = len(decided) // 2
    warm = margin[half:] / fit_temperature(margin[:half], target[:half])
    ece = calibration(warm, (warm > 0) == (target[half:] > 0.5)).ece
    yield Floor("reward", "accuracy on fresh votes", accuracy, 0.75, note=f"best possible {best:.3f}")
    yield Floor("reward", "below the best possible", best - accuracy, most=0.03)
    yield Floor("reward", "ECE, with temperature", ece, most=0.05)
    quality = np.array([item.quality for item in clips])
    yield Floor("reward", "Spearman with true quality", spearman(scores, quality).rho)
    rng = np.random.default_rng(world.seed)
    good = [item.mix.mean(axis=0) for item in clips if item.quality > 0.3][:10]
    silence, noise = np.zeros_like(good[0]), 0.1 * rng.standard_normal(len(good[0])).astype(np.float32)
    clipped = [np.clip(10 * wave, -1, 1) for wave in good]
    music = float(np.median(rewards_of(scorer, good)))
    dead, hiss = rewards_of(scorer, [silence, noise])
    yield Floor("reward", "music above silence", music - float(dead), 0.0)
    yield Floor("reward", "music above noise", music - float(hiss), 0.0)
    below = rewards_of(scorer, good) - rewards_of(scorer, clipped)
    yield Floor("reward", "clean above 20 dB of clipping, share", float((below > 0).mean()), 0.9)


def rewards_of(scorer: Scorer, waves: Sequence[np.ndarray]) -> np.ndarray:
    """(n,) rewards of mono waves (samples,) at 44.1 kHz, under a protocol that shows no text."""
    embeddings = scorer.embed(waves)
    return scorer.rewards(embeddings, np.zeros((len(waves), 512), np.float32))


def generation(
    models: Models, scorer: Scorer, world: World, sizes: Sizes, settings: Mapping[str, Any]
) -> Iterator[Floor]:
    """What generated clips obey, by judges of stated accuracy; and whether quality rises with the score asked for.
    Sampled by `settings`, those of the bundle, with other scores."""
    waves, heard = [], []
    for index in range(sizes.judges):
        item = world[index]
        waves.append(item.mix.mean(axis=0))
        heard.append(item.heard)
    rewards = rewards_of(scorer, waves)
    middle, spread = float(rewards.mean()), float(rewards.std())
    rng = np.random.default_rng(world.seed)
    asked = [world[len(heard) + i].heard for i in range(sizes.generated)]
    texts = [caption(one, rng) for one in asked]
    generated = generate(models, texts, {**settings, "score": middle + spread}, world.seed)
    recall = recall_at_1(scorer.embed(generated).clap, models.clap.embed_text(texts), of=8)
    yield Floor("generation", "captions find their clip among 8", recall, 0.5, note="chance 0.125")
    # what is generated has gone through VAE and vocoder, so judges learn from copies that have, too
    copied = features(scorer, [_copy(models, wave) for wave in waves])
    groups = ((copied, heard), (features(scorer, generated), asked))
    for name, least, concerns, holds in QUESTIONS:
        known, unknown = (_about(group, concerns, holds) for group in groups)
        verdicts = judge(*known, unknown[0])
        said = float((verdicts.yes == np.array(unknown[1])).mean())
        note = f"{said:.3f} of {len(unknown[1])} by a judge right about {verdicts.right:.3f} of {len(known[1])} copies"
        yield Floor("generation", name, corrected(said, verdicts.right), least, note=note)
    few = texts[: max(4, sizes.generated // 4)]
    rewarded, quality, steps = [], [], []
    for step in SCORES:
        clips = generate(models, few, {**settings, "score": middle + step * spread}, world.seed)
        rewarded += rewards_of(scorer, clips).tolist()
        quality += [estimate(measure(wave[None]))[1] for wave in clips]
        steps += [step] * len(few)
    per_step = np.array(quality).reshape(len(SCORES), -1).mean(axis=1)
    yield Floor("generation", "Spearman of score and reward", spearman(np.array(steps), np.array(rewarded)).rho)
    yield Floor(
        "generation",
        "Spearman of score and estimated quality, means of five scores",
        spearman(np.array(SCORES), per_step).rho,
        0.5,
        note=f"over clips {spearman(np.array(steps), np.array(quality)).rho:.2f}",
    )


def _about(
    group: tuple[np.ndarray, Sequence[Attributes]], concerns: Question, holds: Question
) -> tuple[np.ndarray, list[bool]]:
    """Features and truth of the clips that a question concerns."""
    features, heard = group
    rows = [i for i, one in enumerate(heard) if concerns(one)]
    return features[rows], [holds(heard[i]) for i in rows]


def generate(models: Models, texts: Sequence[str], settings: Mapping[str, Any], seed: int) -> list[np.ndarray]:
    """(samples,) float32 at 44.1 kHz for each text, by settings of `SamplerConfig`."""
    sampler = Sampler([models.backbone], models.text, models.clap_condition, SamplerConfig(**settings))
    draws = [Draw(prompt_id=f"floor{i}", prompt=text, seed=seed) for i, text in enumerate(texts)]
    return [models.latents.to_audio(latents[None])[0] for latents in sampler.sample(draws).latents]
