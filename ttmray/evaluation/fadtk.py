"""FAD as the challenge's evaluation code computes it, which is fadtk 1.1 with LAION-CLAP-Music.

It differs from ours (`evaluation/fad.py`) in what is embedded, not in the distance:

- the audio files that lie in the folder itself, not in folders below it, each by its name without ending;
- of every file all windows of 10 s, one each second from its start, the last ones filled up with zeros: ten of a clip
  of 10 s, and not its one embedding;
- at 48 kHz, mono, in 16 bits; embeddings are rounded to float16;
- one Gaussian over the windows of all files.

Resampling is ours (soxr), not that of the sox program, whose dither is random.
"""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ttmray.audio.clip import read_whole
from ttmray.audio.io import AUDIO_EXTENSIONS, resample, to_mono
from ttmray.console import meter
from ttmray.errors import ClipError, UserError
from ttmray.evaluation.fad import Gaussian, frechet, merge
from ttmray.storage import Folder, shown_name

if TYPE_CHECKING:
    from ttmray.models.clap import Clap

RATE = 48_000
WINDOW = 10 * RATE
HOP = RATE
PROTOCOL = "fadtk 1.1, clap-laion-music"


def files_of(folder: Folder) -> list[str]:
    """Names of the audio files in a folder itself, sorted.

    Raises:
        UserError: there are none, or two that differ in their ending alone, of which fadtk would embed one.
    """
    names = [
        entry.name
        for entry in folder.files(sizes=False)
        if "/" not in entry.name and os.path.splitext(entry.name)[1].lower() in AUDIO_EXTENSIONS
    ]
    if not names:
        raise UserError(f"{folder}: no audio files in the folder itself.", "The official code looks no deeper.")
    stems: dict[str, str] = {}
    for name in names:
        other = stems.setdefault(os.path.splitext(name)[0], name)
        if other != name:
            raise UserError(f"{folder}: {other} and {name} have one name.", "Remove one of the two.")
    return names


def windows(wave: np.ndarray) -> np.ndarray:
    """All windows (N, 480000) of a mono wave (samples,) at 48 kHz, one per second, filled up with zeros."""
    starts = range(0, max(len(wave), 1), HOP)
    filled = np.pad(wave, (0, WINDOW))
    return np.stack([filled[start : start + WINDOW] for start in starts])


def sixteen_bits(wave: np.ndarray) -> np.ndarray:
    """(samples,) float32 as a 16-bit file would give it back, and quantised once more as fadtk does."""
    read = (np.clip(np.rint(wave * 32768.0), -32768, 32767) / 32768.0).astype(np.float32)
    return ((np.clip(read, -1.0, 1.0) * 32767.0).astype(np.int16) / 32767.0).astype(np.float32)


def embed_file(clap: "Clap", path: str) -> np.ndarray:
    """Embeddings (N, 512) float16 of the windows of a file.

    Raises:
        ClipError: it cannot be decoded, or its name cannot be used.
    """
    audio, rate = read_whole(path)
    wave = sixteen_bits(resample(to_mono(audio), rate, RATE))
    return clap.embed_audio(list(windows(wave)), int16=False).astype(np.float16)


def statistics(embeddings: Sequence[np.ndarray], protocol: str = PROTOCOL) -> Gaussian:
    """The Gaussian over the windows (N, d) of all files.

    Raises:
        UserError: no files, or embeddings that are not finite.
    """
    return merge(Gaussian.of(rows.astype(np.float64), protocol) for rows in embeddings)


def distance(reference: Gaussian, generated: Gaussian) -> float:
    """FAD between two sets."""
    return frechet(reference, generated)


def folder_statistics(clap: "Clap", folder: Folder, what: str) -> tuple[Gaussian, int, dict[str, str]]:
    """The Gaussian of the audio in a folder, the number of its files, and which others are left out, with the reason:
    what cannot be decoded, where the official code would stop, and names that cannot be used.

    Args:
        what: for the progress bar.

    Raises:
        UserError: no audio, or none that can be used.
    """
    names, parts = files_of(folder), []
    failed: dict[str, str] = {}
    with meter(what, len(names)) as progress:
        for name in names:
            try:
                parts.append(embed_file(clap, f"{folder.uri}/{name}"))
            except ClipError as error:
                failed[shown_name(name)] = f"{error.reason}: {error.message}"
            progress.advance(1)
    if not parts:
        name, why = next(iter(failed.items()))
        raise UserError(f"{folder}: none of {len(names)} files can be used; {name}: {why}", "Repair or replace them.")
    return statistics(parts), len(parts), failed
