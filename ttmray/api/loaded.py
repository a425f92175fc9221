"""`ttmray.load`: the models of a bundle, which score, embed, separate and generate, and stay loaded."""

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ttmray import hub
from ttmray.api.inputs import Prompts, config_from, number_of, path_of, prompts_from, texts_of
from ttmray.api.sounds import AudioClip, SoundLike, named_sounds
from ttmray.audio.io import decode, resample
from ttmray.audio.limits import AudioLimits
from ttmray.config import merged
from ttmray.console import errors, meter
from ttmray.errors import ClipError, UserError
from ttmray.evaluation.score import FACTS, open_scorer, score_sounds
from ttmray.models import one_thread, threads_restored
from ttmray.models.bundle import DEFAULT, open_bundle
from ttmray.models.devices import resolve_device
from ttmray.models.kept import KeptBundle
from ttmray.models.loading import LoadOptions
from ttmray.models.published import published
from ttmray.models.scoring import Embeddings, Scorer
from ttmray.storage import Folder

if TYPE_CHECKING:
    import pandas as pd

    from ttmray.generation.config import GenerateConfig

COLUMNS = ("file", "start_s", "status", "reason", "message", *FACTS, "reward", "clap_score", "heard", "protocol")
"""Of a table of scores; numbers are those of `ttmray score`."""
COUNTS = ("sample_rate", "channels")


@dataclass(frozen=True, eq=False)
class Separation:
    """A sound in two, each with the channels of the sound, at 44.1 kHz.

    Attributes:
        vocal_ratio: energy of the vocals over that of the sound.
    """

    instrumental: AudioClip
    vocals: AudioClip
    vocal_ratio: float


def load(
    bundle: str | os.PathLike[str] = DEFAULT,
    *,
    device: str = "auto",
    batch: int = 16,
    threads: int | None = None,
    cache: str | os.PathLike[str] | None = None,
) -> "LoadedBundle":
    """A bundle to work with. Models are loaded when they are first used, and then stay.

    Args:
        bundle: `micro` (small, knows the music of the built-in composer), another name of `ttmray weights list`, the
            folder of a bundle, or one of these with another reward head: `micro+runs/my-ranker`. `hf://org/name` is
            what `ttmray push` has uploaded there: a bundle, a reward head, or weights that `generate` then uses.
        device: `cpu`, `cuda`, or `auto`: cuda where there is one.
        batch: clips per forward on a GPU.
        threads: clips side by side on a CPU; default: one per CPU.
        cache: folder that keeps embeddings, shared with the jobs; default: none.

    Raises:
        UserError: there is no such bundle or device.

    >>> import ttmray
    >>> studio = ttmray.load("debug", device="cpu")
    >>> studio
    LoadedBundle('debug', device='cpu')
    """
    name, checkpoint = path_of(bundle, "bundle"), None
    if hub.is_hub(name):
        there = published(name)
        name, checkpoint = there.bundle, there.checkpoint
    opened = KeptBundle(open_bundle(name))
    for what, value in (("threads", 1 if threads is None else threads), ("batch", batch)):
        number_of(value, what, 1, 100_000, whole=True)
    options = LoadOptions(device=resolve_device(device), batch=batch, threads=threads or os.cpu_count() or 1)
    if opened.note:
        errors.print(opened.note, style="yellow")
    return LoadedBundle(name, opened, options, None if cache is None else path_of(cache, "cache"), checkpoint)


class LoadedBundle:
    """What `ttmray.load` gives. Arrays of sound are (channels, samples), or (samples,) as input, float, full scale 1.0.

    Attributes:
        name: as it was asked for.
        note: what people must know about its numbers.
        checkpoint: address of the weights that `generate` uses where it is not told others; None: the bundle's.
    """

    def __init__(
        self, name: str, bundle: KeptBundle, options: LoadOptions, cache: str | None, checkpoint: str | None = None
    ) -> None:
        self.name, self.note, self.checkpoint = name, bundle.note, checkpoint
        self._bundle, self._options, self._cache = bundle, options, cache
        self._scorers: dict[str, Scorer] = {}

    def __repr__(self) -> str:
        return f"LoadedBundle({self.name!r}, device={self._options.device!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process it is loaded there."""
        options = self._options
        return _loaded, (self.name, options.device, options.batch, options.threads, self._cache, self.checkpoint)

    @property
    def clip_s(self) -> float:
        """Seconds of the clips that it makes."""
        return self._bundle.clip_s

    @property
    def backbone(self) -> str | None:
        """The file of the weights that it makes clips with, for `ttmray.train(model={"init": ...})`; None where there
        are none, or they are drawn from a seed.

        Raises:
            UserError: they are not here, or damaged.
        """
        if self.checkpoint is not None:
            return self.checkpoint
        path = self._bundle.backbone_file()
        return None if path is None else str(path)

    def score(
        self,
        sounds: SoundLike | Sequence[SoundLike],
        captions: str | Sequence[str] | None = None,
        *,
        rate: int | None = None,
        reward_text: Literal["empty", "caption"] = "empty",
    ) -> "pd.DataFrame":
        """Reward, CLAP score, loudness and true peak of sounds: the numbers of `ttmray score`.

        Args:
            sounds: one or several files, arrays (channels, samples) or (samples,), pairs (array, rate), or clips.
            captions: for the CLAP score: one of all, or one of each; None or empty leaves it out.
            rate: Hz of arrays without one of their own.
            reward_text: what the reward sees.

        Returns:
            A row per sound. One that cannot be scored has the status `failed` or `rejected`, a reason and a message.
            The note of the bundle is in `attrs["note"]`.

        Raises:
            UserError: captions of another number, something that is no sound, or weights that are not there.

        >>> import numpy as np, ttmray
        >>> studio = ttmray.load("debug", device="cpu")
        >>> tone = 0.1 * np.sin(np.arange(3 * 44100) * 0.05)
        >>> table = studio.score([tone, 0 * tone], captions="a low tone", rate=44100)
        >>> list(table["status"]), list(table["reason"])
        (['ok', 'rejected'], ['', 'silent'])
        >>> float(table["lufs"][0])
        -23.7...
        """
        import pandas as pd

        named = named_sounds(sounds, rate)
        texts = _captions(captions, len(named))
        scorer = self._scorer(reward_text)
        rows = []
        with threads_restored(), meter("sounds", len(named)) as progress:
            readings = ((sound.name, sound.read(self.clip_s)) for sound in named)
            for row in score_sounds(scorer, readings, texts):
                rows.append(row | {"protocol": f"{self._bundle.name}/{scorer.protocol.id()}"})
                progress.advance(1)
        table = pd.DataFrame(rows, columns=list(COLUMNS))
        numbers = {name: "Int64" if name in COUNTS else "float64" for name in (*FACTS, "reward", "clap_score")}
        table = table.astype(numbers)
        table.attrs["note"] = self.note
        return table

    def embed(self, sounds: SoundLike | Sequence[SoundLike], *, rate: int | None = None) -> Embeddings:
        """The embeddings behind the scores: `clap` (n, 512) unit vectors and `mert` (n, H) time means, float32.

        Args:
            sounds, rate: as in `score`.

        Raises:
            UserError: a sound that is no clip, and why.

        >>> import numpy as np, ttmray
        >>> studio = ttmray.load("debug", device="cpu")
        >>> tone = 0.1 * np.sin(np.arange(44100) * 0.05)
        >>> studio.embed([tone, tone / 2], rate=44100).clap.shape
        (2, 512)
        """
        scorer, named = self._scorer("empty"), named_sounds(sounds, rate)
        rows = []
        with threads_restored(), meter("sounds", len(named)) as progress:
            one_thread()
            for sound in named:
                rows.append(scorer.embed([sound.mono(self.clip_s)]))
                progress.advance(1)
            empty = scorer.embed([])
        clap = np.concatenate([empty.clap, *(row.clap for row in rows)])
        return Embeddings(clap, np.concatenate([empty.mert, *(row.mert for row in rows)]))

    def embed_texts(self, texts: str | Sequence[str]) -> np.ndarray:
        """CLAP text vectors (n, 512), float32: their products with those of `embed` are CLAP scores.

        >>> import ttmray
        >>> ttmray.load("debug", device="cpu").embed_texts(["a harp", "a choir"]).shape
        (2, 512)
        """
        with threads_restored():
            one_thread()
            return self._scorer("empty").texts(texts_of(texts, "texts"))

    def separate(self, sounds: SoundLike | Sequence[SoundLike], *, rate: int | None = None) -> list[Separation]:
        """Vocals and the rest of sounds of any length, in one pass of the separator.

        Args:
            sounds, rate: as in `score`.

        Raises:
            UserError: a sound that cannot be decoded or separated, and why.

        >>> import numpy as np, ttmray
        >>> studio = ttmray.load("debug", device="cpu")
        >>> noise = 0.1 * np.random.default_rng(0).standard_normal((2, 44100))
        >>> (parts,) = studio.separate(noise, rate=44100)
        >>> parts.instrumental
        AudioClip(instrumental of array 0, 1.00 s, 2 channels, 44100 Hz)
        """
        separator = self._bundle.load({"separator"}, LoadOptions(device=self._options.device)).separator
        named, separations = named_sounds(sounds, rate), []
        with threads_restored(), meter("sounds", len(named)) as progress:
            one_thread()
            for sound in named:
                audio, own_rate = sound.whole()
                wave = resample(audio, own_rate, separator.sample_rate)
                try:
                    if len(wave) > 2:
                        raise ClipError("rejected", "channels", f"{len(wave)} channels, more than 2")
                    (result,) = separator.separate([wave])
                except ClipError as error:
                    raise sound.unusable(error) from error
                instrumental, vocals = (
                    AudioClip(_channels(stem, len(wave)), separator.sample_rate, {"name": f"{what} of {sound.name}"})
                    for what, stem in (("instrumental", result.instrumental), ("vocals", result.vocals))
                )
                separations.append(Separation(instrumental, vocals, result.vocal_ratio))
                progress.advance(1)
        return separations

    def generate(
        self,
        prompts: Prompts,
        *,
        score: float | Literal["default"] | None = "default",
        seed: int | None = None,
        output: str | os.PathLike[str] | None = None,
        config: "str | os.PathLike[str] | GenerateConfig | None" = None,
        **fields: Any,
    ) -> list[AudioClip]:
        """Clips from prompts: those of `ttmray generate` with the same settings.

        Args:
            prompts: a text, several, a mapping of ids to texts, or as a `Path` a file of them.
            score: to generate for, in the unit of the rewards of the training; None: none.
            seed: of the noise, together with the prompt's id; default: that of the config, 42.
            output: run folder that keeps clips and manifest, local or s3://; the same call goes on with what is not
                done. Default: in memory alone.
            config: a `GenerateConfig`, a file or a preset such as `paper/generate`; default: the defaults.
            fields: of the config, such as `samples=2`, `checkpoint="model.safetensors"`, `sampler={"steps": 10}`,
                `postprocess={"passes": 0}`, `scores=True` (all: `ttmray config generate`).

        Returns:
            Clips in the order of the prompts, each with its row of the manifest.

        Raises:
            UserError: settings or prompts that cannot be, weights that are not there, or a clip that failed.

        >>> import ttmray
        >>> studio = ttmray.load("debug", device="cpu")
        >>> (clip,) = studio.generate({"calm": "a calm piano"}, score=1.0, seed=7, sampler={"steps": 1})
        >>> clip, clip.row["prompt"], clip.row["score"]
        (AudioClip(calm, 10.00 s, 1 channel, 44100 Hz), 'a calm piano', 1.0)
        """
        from ttmray.generation.config import GenerateConfig
        from ttmray.generation.generate import generate_run, generate_sounds

        if reserved := sorted({"bundle", "prompts", "texts"} & fields.keys()):
            raise UserError(f"{reserved[0]} is no setting of generate.", "Prompts come first; load another bundle.")
        sampler = fields.get("sampler")
        if score != "default" and isinstance(sampler, Mapping) and "score" in sampler:
            raise UserError(f"score={score!r} and sampler.score both say it.", "Leave one of them out.")
        checked = prompts_from(prompts)
        ours: dict[str, Any] = {"bundle": self.name, "prompts": None, "texts": [prompt.text for prompt in checked]}
        ours["runtime"] = {name: getattr(self._options, name) for name in ("device", "batch", "threads")}
        if isinstance(config, GenerateConfig) and config.postprocess is not None:
            ours["postprocess"] = {"bundle": self.name}
        ours |= {} if self.checkpoint is None else {"checkpoint": self.checkpoint}
        ours |= {} if seed is None else {"seed": seed}
        ours |= {} if output is None else {"output": output}
        ours |= {} if score == "default" else {"sampler": {"score": score}}
        settings = config_from(GenerateConfig, config, merged(ours, fields))
        with threads_restored():
            if output is not None:
                done = generate_run(settings, prompts=checked, bundle=self._bundle)
                return _clips([(row, _read(done.run, row)) for row in done.planned], f"The others are in {done.run}.")
            if settings.runtime.runner == "ray":
                raise UserError("Ray's workers write into a run folder.", "Give output=FOLDER, or runner local.")
            return _clips(generate_sounds(settings, self._bundle, checked), "With output=FOLDER the others are kept.")

    def _scorer(self, reward_text: str) -> Scorer:
        if reward_text not in self._scorers:
            self._scorers[reward_text] = open_scorer(self._bundle, reward_text, self._options, self._cache)
        return self._scorers[reward_text]


def _captions(captions: str | Sequence[str] | None, count: int) -> list[str]:
    """One of each sound; empty: none."""
    if captions is None or isinstance(captions, str):
        return [captions or ""] * count
    texts = texts_of(captions, "captions")
    if len(texts) != count:
        raise UserError(f"{len(texts)} captions for {count} sounds.", "Give one of all, or one of each.")
    return texts


def _loaded(
    name: str, device: str, batch: int, threads: int, cache: str | None, checkpoint: str | None
) -> LoadedBundle:
    studio = load(name, device=device, batch=batch, threads=threads, cache=cache)
    studio.checkpoint = checkpoint
    return studio


def _channels(stem: np.ndarray, channels: int) -> np.ndarray:
    """A stem (2, samples) with the channels of its sound."""
    return stem.mean(axis=0, keepdims=True) if channels == 1 else stem


def _read(run: Folder, row: dict[str, Any]) -> np.ndarray | None:
    """(channels, samples) of a clip's file; None where it failed."""
    if not row["file"]:
        return None
    return decode(io.BytesIO(run.read(row["file"])), AudioLimits(min_duration_s=0.0, min_sample_rate=8000))[0]


def _clips(outcomes: Sequence[tuple[dict[str, Any], np.ndarray | None]], way_out: str) -> list[AudioClip]:
    failed = [row for row, audio in outcomes if audio is None]
    if failed:
        first = f"{failed[0]['name']}: {failed[0]['reason']}: {failed[0]['message']}"
        raise UserError(f"{len(failed)} of {len(outcomes)} clips failed. {first}", way_out)
    return [AudioClip(audio, row["sample_rate"], row) for row, audio in outcomes if audio is not None]
