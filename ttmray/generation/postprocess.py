"""Post-processing of a clip: vocals removed, loudness and true peak to target.

Two variants (`PostprocessConfig.variant`):

- `ours`: N passes of separation, then the target loudness under a true-peak ceiling by a look-ahead limiter
  (`ttmray.audio.limiter`). Mono stays mono and stereo stays stereo.
- `paper`: what the released scripts do (paper III-E). Every pass ends in mono with a sample peak of 0.95; then a gain
  to the target loudness, and if the sample peak is above 0.99 the whole clip is scaled to a peak of 0.95. Such a clip
  is below the target, and its true peak may be above the ceiling: 40 % of the published clips are. Not kept from the
  scripts: their unseeded random shift of Demucs (results differed between runs), a meter for 44.1 kHz used at any rate,
  filters that are 0.05 LU off, NaN for silence, and writing a clip unchanged when its measurement fails.

Separation works at 44.1 kHz and its output stays at that rate; without separation the rate stays as it is.
"""

import hashlib
import io
import math
import os
import threading
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import soundfile
from pydantic import Field

from ttmray.audio import io as audio_io
from ttmray.audio.limiter import Levels, to_loudness
from ttmray.audio.limits import AudioLimits
from ttmray.audio.loudness import integrated_loudness, true_peak
from ttmray.config import Config, Device, execution
from ttmray.errors import ClipError, UserError
from ttmray.models.bundle import Bundle, BundleName, open_bundle
from ttmray.models.loading import LoadOptions

if TYPE_CHECKING:
    from ttmray.models.separator import Separator

LIMITS = AudioLimits(min_duration_s=0.5, min_sample_rate=8000)
"""Two hours and 2 GiB decoded at most; the loudness standard can say nothing about less than 0.4 s."""
PAPER_PEAK, PAPER_PEAK_LIMIT = 0.95, 0.99
_ACCELERATOR = threading.Lock()  # its memory is for one file at a time; a CPU separates one in every thread


class PostprocessConfig(Config):
    """How clips are finished."""

    variant: Literal["ours", "paper"] = "ours"
    """`paper` is the procedure of the paper's submission, which misses its own targets; see the module."""
    passes: int = Field(3, ge=0, le=10)
    """Separation passes, each on the result of the one before (paper III-E: 3); 0 keeps the vocals."""
    bundle: BundleName = "paper"
    """Set of models that the separator is from. The debug bundles are untrained and damage the sound."""
    lufs: float = Field(-16.5, ge=-60, le=0)
    """Target of integrated loudness, LUFS (paper III-E)."""
    ceiling_dbtp: float = Field(-1.0, ge=-30, le=0)
    """Highest true peak, dBTP. The limiter aims 0.2 dB lower. `paper` ignores it."""
    max_reduction_db: float = Field(20.0, ge=0, le=60)
    """A clip that the limiter would have to take more off than this is scaled to the ceiling instead, and misses the
    target (its row says `missed`). 0: never limit."""
    format: Literal["wav", "wav16", "flac"] = "wav"
    """`wav` is float32; `wav16` and `flac` have 16 bits with triangular dither (`paper`: rounded, without)."""
    device: Device = execution("auto")
    """Device of the separator; `auto` is cuda where there is one."""
    workers: int | Literal["auto"] = execution("auto")
    """Files worked on at the same time, each in one thread; `auto` is one per CPU."""


def open_separator(config: PostprocessConfig, bundle: Bundle | None = None) -> "Separator | None":
    """The separator that `postprocess_clip` wants; None for no passes.

    Args:
        bundle: that of the config, where it is open already.

    Raises:
        UserError: the bundle, its weights or the device are not there.
    """
    if config.passes == 0:
        return None
    return (bundle or open_bundle(config.bundle)).load({"separator"}, LoadOptions(device=config.device)).separator


def postprocess_clip(
    wave: np.ndarray, sample_rate: int, config: PostprocessConfig, separator: "Separator | None" = None
) -> tuple[np.ndarray, dict[str, Any]]:
    """One clip as `config` says: separation, loudness, peak.

    Args:
        wave: (channels, frames) float32, full scale 1.0, mono or stereo, at least 0.5 s.
        sample_rate: Hz.
        separator: of one pass, as `open_separator` gives it; needed unless `config.passes` is 0.

    Returns:
        float32 samples, at 44.1 kHz if separated, else at `sample_rate`, and the facts of the table: `outcome`
        (`reached`, `missed` or `silent`, see `limiter.Levels`), `sample_rate` and `channels` of the result,
        `lufs_before`, `lufs_after` (LUFS), `true_peak_before`, `true_peak_after` (dBTP), `gain_db`, `reduction_db`,
        `vocal_ratio` (of the first pass; None without). Before is the input; gain and reduction are what was done
        after separation. What is minus infinity (silence) is None.

    Raises:
        ClipError: too short, not finite, or not separable.
        ValueError: another layout.
    """
    if wave.ndim != 2 or wave.shape[0] not in (1, 2):
        raise ValueError(f"expected (1 or 2 channels, frames), not {wave.shape}")
    if wave.shape[1] < LIMITS.min_duration_s * sample_rate:
        message = f"{wave.shape[1] / sample_rate:.2f} s, shorter than {LIMITS.min_duration_s:g} s"
        raise ClipError("rejected", "too_short", message)
    if not (np.abs(wave) < 1e30).all():  # their squares must be finite, too
        raise ClipError("failed", "non_finite", "samples that are NaN, infinite or beyond 1e30")
    facts: dict[str, Any] = {"vocal_ratio": None}
    y, rate = wave.astype(np.float32, copy=False), sample_rate
    if config.passes:
        if separator is None:
            raise ValueError("passes need a separator")
        rate = separator.sample_rate
        y, facts["vocal_ratio"] = _without_vocals(audio_io.resample(y, sample_rate, rate), config, separator)
    y, levels = _paper_levels(y, rate, config) if config.variant == "paper" else _our_levels(y, rate, config)
    facts |= vars(levels)
    if config.passes:
        facts["lufs_before"] = integrated_loudness(wave, sample_rate)
        facts["true_peak_before"] = true_peak(wave, sample_rate)
    facts |= {"sample_rate": rate, "channels": y.shape[0]}
    return y, {name: None if value == -math.inf else value for name, value in facts.items()}


def _without_vocals(
    wave: np.ndarray, config: PostprocessConfig, separator: "Separator"
) -> tuple[np.ndarray, float | None]:
    """After all passes, and the vocals' share of energy in the first."""
    mono = wave.shape[0] == 1 or config.variant == "paper"
    ratio = None
    for _ in range(config.passes):
        with nullcontext() if separator.device.type == "cpu" else _ACCELERATOR:
            (result,) = separator.separate([wave])
        wave = result.instrumental.mean(axis=0, keepdims=True) if mono else result.instrumental
        if config.variant == "paper":
            wave = wave * np.float32(PAPER_PEAK / (np.abs(wave).max() + 1e-8))
        ratio = result.vocal_ratio if ratio is None else ratio
    return wave, ratio


def _our_levels(wave: np.ndarray, rate: int, config: PostprocessConfig) -> tuple[np.ndarray, Levels]:
    return to_loudness(wave, rate, config.lufs, config.ceiling_dbtp, config.max_reduction_db)


def _paper_levels(wave: np.ndarray, rate: int, config: PostprocessConfig) -> tuple[np.ndarray, Levels]:
    mono = wave.mean(axis=0, keepdims=True)
    before, peak_before = integrated_loudness(mono, rate), true_peak(mono, rate)
    if before == -math.inf:
        return mono, Levels(before, before, peak_before, peak_before, 0.0, 0.0, "silent")
    gain = 10 ** ((config.lufs - before) / 20)
    peak = float(np.abs(mono).max()) * gain
    if peak > PAPER_PEAK_LIMIT:
        gain *= PAPER_PEAK / peak
    y = mono * np.float32(gain)
    levels = (before, integrated_loudness(y, rate), peak_before, true_peak(y, rate), 20 * math.log10(gain), 0.0)
    return y, Levels(*levels, "missed" if peak > PAPER_PEAK_LIMIT else "reached")


def format_of(path: str) -> Literal["wav", "flac"]:
    """The format of an audio file that is to be written, by its ending.

    Raises:
        UserError: another ending.
    """
    ending = os.path.splitext(path)[1].lower()
    if ending == ".wav":
        return "wav"
    if ending == ".flac":
        return "flac"
    raise UserError(f"{path} is neither .wav nor .flac.", "WAV is float32 and keeps every bit, FLAC has 16 bits.")


def encode(wave: np.ndarray, sample_rate: int, config: PostprocessConfig) -> bytes:
    """Bytes of an audio file in `config.format`; the same samples give the same bytes.

    Dither is triangular (two steps of 16 bits wide, independent for channels), drawn from a hash of the samples.

    Args:
        wave: (channels, frames) float32; 16-bit formats clip at full scale.
    """
    file = io.BytesIO()
    if config.format == "wav":
        audio_io.write_audio(file, wave, sample_rate, "wav")
        return file.getvalue()
    if config.variant == "ours":
        seed = hashlib.blake2b(np.ascontiguousarray(wave).tobytes(), digest_size=16).digest()
        rng = np.random.default_rng(int.from_bytes(seed, "big"))
        noise = rng.random(wave.shape, dtype=np.float32) - rng.random(wave.shape, dtype=np.float32)
        wave = wave + noise / 32768
    samples = np.clip(np.rint(wave.T * 32768.0), -32768, 32767).astype(np.int16)
    container = "FLAC" if config.format == "flac" else "WAV"
    soundfile.write(file, samples, sample_rate, format=container, subtype="PCM_16")
    return file.getvalue()


HARD_DB = 6.0
"""Beyond this the limiter is heard: such files are listed."""


def limiting_heard(reduction_db: float | None) -> str:
    """What to say of a clip that the limiter took so much off; empty where that is little."""
    if reduction_db is None or reduction_db <= HARD_DB:
        return ""
    return f"the limiter took {reduction_db:.1f} dB off peaks, more than {HARD_DB:g}: listen to it"
