"""Sounds as callers have them: files, arrays and clips; and the clip that the API gives."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Union

import numpy as np

from ttmray.api.inputs import items_of, path_of
from ttmray.audio.clip import Reading, clip_of, read_clip, read_whole
from ttmray.errors import ClipError, UserError
from ttmray.evaluation.systems import audio_files
from ttmray.storage import Folder, split_path

if TYPE_CHECKING:
    from IPython.display import Audio

SoundLike = Union[str, os.PathLike[str], np.ndarray, tuple[np.ndarray, int], "AudioClip"]
"""An audio file, a local folder of them, samples (channels, samples) or (samples,), the same with their rate in Hz, or
a clip."""


WAYS = "Give a path, an array, (array, rate) or a clip."


@dataclass(frozen=True, eq=False)
class AudioClip:
    """A sound in memory.

    Attributes:
        audio: (channels, samples) float32, full scale 1.0; other floats and (samples,) are taken, too.
        rate: Hz.
        row: what is known of it; of a generated clip the row of the manifest: prompt, seed, score, loudness, and so on.

    >>> import numpy as np, ttmray
    >>> clip = ttmray.AudioClip(np.zeros((1, 22050), np.float32), 44100, {"name": "nothing"})
    >>> clip
    AudioClip(nothing, 0.50 s, 1 channel, 44100 Hz)
    >>> clip.save("nothing.wav")
    'nothing.wav'
    """

    audio: np.ndarray
    rate: int
    row: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "audio", _checked("audio", self.audio))
        object.__setattr__(self, "rate", _rate("rate", self.rate))

    @property
    def name(self) -> str:
        """Of a generated clip the id of its prompt, with several samples `<id>_<k>`."""
        return str(self.row.get("name", ""))

    @property
    def duration_s(self) -> float:
        """Seconds."""
        return self.audio.shape[-1] / self.rate

    def play(self) -> "Audio":
        """A player, as the last line of a notebook's cell. Loudness is as it is: nothing is normalised.

        Raises:
            UserError: there is no IPython.
        """
        try:
            from IPython.display import Audio
        except ImportError as error:
            raise UserError(
                "play needs IPython, which notebooks have.",
                "pip install 'ttmray[notebook]', or write a file: clip.save('clip.wav').",
            ) from error
        return Audio(np.clip(self.audio, -1.0, 1.0), rate=self.rate, normalize=False)

    def save(self, path: str | os.PathLike[str]) -> str:
        """Write a file, local or s3://: `.wav` is float32, `.flac` has 16 bits with dither. One that is there is
        replaced. Returns the path.

        Of a generated clip the bytes are those of `ttmray generate`.

        Raises:
            UserError: another ending, or nothing can be written there.
        """
        from ttmray.generation.postprocess import PostprocessConfig, encode, format_of

        path = path_of(path, "path")
        data = encode(self.audio, self.rate, PostprocessConfig(format=format_of(path)))
        folder, name = split_path(path)
        folder.write(name, data)
        return path

    def __repr__(self) -> str:
        channels = f"{len(self.audio)} channel{'s' if len(self.audio) > 1 else ''}"
        return f"AudioClip({self.name or 'unnamed'}, {self.duration_s:.2f} s, {channels}, {self.rate} Hz)"


@dataclass(frozen=True)
class NamedSound:
    """A sound that can be read, and what it is called."""

    name: str
    content: str | AudioClip

    def read(self, clip_s: float) -> Reading:
        """As the clip that is scored, by a bundle whose clips have `clip_s` seconds."""
        if isinstance(self.content, str):
            return read_clip(self.content, clip_s)
        return clip_of(self.content.audio, self.content.rate, clip_s)

    def mono(self, clip_s: float) -> np.ndarray:
        """(samples,) float32 at 44.1 kHz, as encoders hear it, by a bundle whose clips have `clip_s` seconds.

        Raises:
            UserError: it is no clip, and why.
        """
        try:
            return self.read(clip_s).mono()
        except ClipError as error:
            raise self.unusable(error) from error

    def whole(self) -> tuple[np.ndarray, int]:
        """(channels, samples) float32 as they are, and their rate in Hz.

        Raises:
            UserError: it cannot be decoded, and why.
        """
        if not isinstance(self.content, str):
            return self.content.audio, self.content.rate
        try:
            return read_whole(self.content)
        except ClipError as error:
            raise self.unusable(error) from error

    def unusable(self, error: ClipError) -> UserError:
        """The error about it."""
        return UserError(f"{self.name}: {error}", "Leave it out: `score` gives the reason of each that has none.")


def named_sounds(sounds: SoundLike | Sequence[SoundLike], rate: int | None) -> list[NamedSound]:
    """One or several sounds.

    Args:
        sounds: see `SoundLike`; arrays are (channels, samples) or (samples,), full scale 1.0.
        rate: Hz of arrays without one of their own.

    Raises:
        UserError: something that is no sound, a folder without audio, an array without a rate or of another layout.
    """
    alone = isinstance(sounds, str | os.PathLike | AudioClip) or hasattr(sounds, "__array__")
    pair = isinstance(sounds, tuple) and len(sounds) == 2 and hasattr(sounds[0], "__array__") and not _sound(sounds[1])
    several = [sounds] if alone or pair else items_of(sounds, "sounds", WAYS)
    files = [path for sound in several for path in _files(sound)]
    return [_named(i, sound, rate) for i, sound in enumerate(files)]


def _files(sound: Any) -> list[Any]:
    """The audio files of a local folder, as the command takes it; all else is itself."""
    if not isinstance(sound, str | os.PathLike) or not os.path.isdir(os.path.expanduser(sound)):
        return [sound]
    folder = Folder.at(os.fspath(sound))
    return [f"{folder.uri}/{name}" for name in audio_files(folder)]


def _named(i: int, sound: Any, rate: int | None) -> NamedSound:
    if isinstance(sound, str | os.PathLike):
        return NamedSound(os.fspath(sound), os.fspath(sound))
    if isinstance(sound, AudioClip):
        return NamedSound(sound.name or f"clip {i}", sound)
    if isinstance(sound, tuple) and len(sound) == 2:
        sound, rate = sound
    if not hasattr(sound, "__array__"):
        raise UserError(f"sound {i} is a {type(sound).__name__}.", WAYS)
    if rate is None:
        raise UserError(f"sound {i} is an array without a rate.", "Say it: rate=44100, or (array, 44100).")
    what = f"sound {i}"
    return NamedSound(f"array {i}", AudioClip(_checked(what, sound), _rate(f"the rate of {what}", rate)))


def _sound(value: Any) -> bool:
    """Whether it can be the second of two sounds, and no rate."""
    return isinstance(value, str | os.PathLike | AudioClip | tuple) or getattr(value, "ndim", 0) > 0


def _rate(what: str, rate: Any) -> int:
    """Hz; floats without a fraction, as some libraries have them, too."""
    right = isinstance(rate, int | float | np.number) and not isinstance(rate, bool)
    if right and 0 < rate < 2**31 and rate == int(rate):
        return int(rate)
    raise UserError(f"{what} is {rate!r}.", "Give Hz as a whole number, such as 44100.")


def _checked(what: str, sound: Any) -> np.ndarray:
    """(channels, samples) float32."""
    if not hasattr(sound, "__array__"):
        raise UserError(f"{what} is a {type(sound).__name__}, not an array.", "Give floats (channels, samples).")
    audio = np.asarray(sound)
    if not np.issubdtype(audio.dtype, np.floating):
        whole = np.issubdtype(audio.dtype, np.integer)
        way_out = "Scale it to full scale 1.0: int16 / 32768." if whole else "Give floats (channels, samples)."
        raise UserError(f"{what} is of {audio.dtype}, not of floats.", way_out)
    if audio.ndim == 2 and audio.shape[1] <= 2 < audio.shape[0]:
        raise UserError(f"{what} has the shape {audio.shape}, samples first.", "Give (channels, samples): array.T.")
    if audio.ndim not in (1, 2):
        raise UserError(f"{what} has the shape {audio.shape}.", "Give (channels, samples) or (samples,) each.")
    return np.ascontiguousarray(np.atleast_2d(audio), np.float32)
