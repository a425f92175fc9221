"""What becomes of damaged and odd sound files, format by format, beside what ffmpeg reads of them.

    python benchmarks/odd_audio.py [--output docs/odd-audio.md]

Needs the program ffmpeg, and PyAV (an extra). Every format is made from the same 12 s, every damage is done to each. A
file must be read whole, with the sound that ffmpeg gives, or refused with a reason; the program fails where a file is
taken that is shorter than by ffmpeg, or sounds otherwise, or where nothing was wrong with it and it is refused.
"""

import argparse
import io
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import common  # noqa: F401  # tests become importable
import numpy as np
import soundfile
from audio.test_damage import ID3V1, ape, id3v2, lyrics, mp3

from ttmray.audio.io import decode
from ttmray.audio.limits import AudioLimits
from ttmray.errors import ClipError

RATE, SECONDS = 44_100, 12.0
NEAR_S = 0.15
"""Decoders differ by what encoders put in front and behind."""
ALIKE = 0.85
"""Correlation of loudness in a block of 2 s; a seam or a damaged place in it costs some."""
NOISE = np.random.default_rng(7).bytes(4096)
Encode = Callable[[np.ndarray, int], bytes]


def by_soundfile(format: str, subtype: str | None = None) -> Encode:
    def encode(wave: np.ndarray, rate: int) -> bytes:
        file = io.BytesIO()
        soundfile.write(file, wave.T, rate, format=format, subtype=subtype)
        return file.getvalue()

    return encode


def encoded(end: str, codec: str) -> Encode:
    def encode(wave: np.ndarray, rate: int) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder, "song.wav"), Path(folder, f"song.{end}")
            soundfile.write(source, wave.T, rate)
            words = ["ffmpeg", "-v", "error", "-i", str(source), "-c:a", codec, "-b:a", "96k", str(target)]
            subprocess.run(words, check=True)
            return target.read_bytes()

    return encode


FORMATS: dict[str, tuple[str, Encode]] = {
    "WAV": ("wav", by_soundfile("WAV")),
    "WAV, float": ("wav", by_soundfile("WAV", "FLOAT")),
    "RF64": ("wav", by_soundfile("RF64")),
    "W64": ("w64", by_soundfile("W64")),
    "AIFF": ("aiff", by_soundfile("AIFF")),
    "AU": ("au", by_soundfile("AU")),
    "CAF": ("caf", by_soundfile("CAF")),
    "FLAC": ("flac", by_soundfile("FLAC")),
    "MP3": ("mp3", lambda wave, rate: mp3(wave, rate)),
    "MP3, variable": ("mp3", lambda wave, rate: mp3(wave, rate, variable=True)),
    "MP3, no count": ("mp3", lambda wave, rate: mp3(wave, rate, header=False)),
    "Ogg Vorbis": ("ogg", by_soundfile("OGG", "VORBIS")),
    "Ogg Opus": ("opus", lambda wave, rate: by_soundfile("OGG", "OPUS")(wave, 48_000)),
    "Ogg FLAC": ("oga", encoded("oga", "flac")),
    "AAC": ("aac", encoded("aac", "aac")),
    "M4A, AAC": ("m4a", encoded("m4a", "aac")),
    "M4A, ALAC": ("m4a", encoded("m4a", "alac")),
    "WMA": ("wma", encoded("wma", "wmav2")),
}
MPEG = ("MP3", "AAC")
"""Formats that begin anywhere, and may have tags of others."""


@dataclass(frozen=True)
class Damage:
    """What is done to a file.

    Attributes:
        do: takes the bytes, and those of another file of the format.
        unhurt: nothing is wrong with the sound, so it must be read; formats by the start of their name, or all ("").
    """

    do: Callable[[bytes, bytes], bytes]
    unhurt: tuple[str, ...] = ()


DAMAGES: dict[str, Damage] = {
    "none": Damage(lambda d, _: d, ("",)),
    "cut at 70 %": Damage(lambda d, _: d[: len(d) * 7 // 10]),
    "last 2,000 bytes gone": Damage(lambda d, _: d[:-2000]),
    "4 KB of zeros inside": Damage(lambda d, _: d[: len(d) // 2] + bytes(4096) + d[len(d) // 2 + 4096 :]),
    "4 KB of noise inside": Damage(lambda d, _: d[: len(d) // 2] + NOISE + d[len(d) // 2 + 4096 :]),
    "4 KB taken out": Damage(lambda d, _: d[: len(d) // 2] + d[len(d) // 2 + 4096 :]),
    "4 KB put in": Damage(lambda d, _: d[: len(d) // 2] + NOISE + d[len(d) // 2 :]),
    "the same behind it": Damage(lambda d, _: d + d),
    "22 kHz mono behind it": Damage(lambda d, other: d + other),
    "4 KB of zeros behind": Damage(lambda d, _: d + bytes(4096), MPEG),
    "ID3v1 behind": Damage(lambda d, _: d + ID3V1, MPEG),
    "APE, Lyrics3 behind": Damage(lambda d, _: d + ape(True) + lyrics() + ID3V1, ("MP3",)),
    "ID3v2 in front": Damage(lambda d, _: id3v2(3000) + d, (*MPEG, "FLAC")),
    "1 KB of zeros in front": Damage(lambda d, _: bytes(1000) + d),
    "a web page": Damage(lambda d, _: b"<!DOCTYPE html><html><body>Too many requests</body></html>\n" * 99),
}


def music(seconds: float, rate: int, channels: int) -> np.ndarray:
    """Noise whose loudness never repeats (channels, samples), so that any shift or gap shows."""
    rng = np.random.default_rng(3)
    steps = np.repeat(rng.uniform(0.02, 0.25, round(seconds * 20)), rate // 20)
    tone = np.sin(2 * np.pi * 330 * np.arange(steps.size) / rate)
    wave = steps * (0.5 * tone + 0.5 * rng.normal(0, 0.4, (channels, steps.size)))
    return np.clip(wave, -0.99, 0.99).astype(np.float32)


def ours(path: Path) -> tuple[np.ndarray, int] | str:
    """Sound (channels, samples) and rate, or the reason why there is none."""
    try:
        return decode(path, AudioLimits(min_duration_s=0.5))
    except ClipError as error:
        return error.reason


def by_ffmpeg(path: Path, rate: int) -> np.ndarray:
    """Mono sound of the file, as much of it as ffmpeg decodes."""
    command = [
        "ffmpeg",
        "-v",
        "quiet",
        "-i",
        str(path),
        "-map",
        "0:a:0",
        "-f",
        "f32le",
        "-ac",
        "1",
        "-ar",
        str(rate),
        "-",
    ]
    output = subprocess.run(command, capture_output=True, check=False).stdout
    return np.frombuffer(output[: len(output) // 4 * 4], np.float32)


def loudness(mono: np.ndarray, rate: int) -> np.ndarray:
    """Level of every 5 ms."""
    step = rate // 200
    return np.sqrt(np.square(mono[: mono.size // step * step].reshape(-1, step), dtype=np.float64).mean(1))


def alike(one: np.ndarray, other: np.ndarray, rate: int) -> bool:
    """Whether two sounds go the same way in every 2 s, at most 0.1 s apart."""
    a, b = loudness(one, rate), loudness(other, rate)

    def best(at: int) -> float:
        block = b[at : at + 400]
        near = [a[at + lag : at + lag + 400] for lag in range(-20, 21) if 0 <= at + lag <= a.size - 400]
        return max(float(np.corrcoef(block, part)[0, 1]) for part in near)

    return all(best(at) > ALIKE for at in range(20, min(a.size, b.size) - 420, 400) if b[at : at + 400].std() > 0)


def cell(content: bytes, path: Path, must: bool) -> tuple[str, str]:
    """What stands in the table, and what is wrong with it; empty where nothing is.

    Args:
        must: be read, as nothing is wrong with the sound.
    """
    path.write_bytes(content)
    result = ours(path)
    if isinstance(result, str):
        return result, "refused" if must else ""
    audio, rate = result
    seconds, other = audio.shape[1] / rate, by_ffmpeg(path, rate)
    reference = other.size / rate
    said = f"{seconds:.1f} s"
    if abs(seconds - reference) <= NEAR_S:
        return said, "" if alike(audio.mean(0), other, rate) else "sounds otherwise"
    said += f" (ffmpeg {reference:.1f})"
    return said, "half-read" if seconds < reference else ""


def table(folder: Path) -> tuple[list[str], list[str]]:
    """Lines of a Markdown table, formats that behave alike in one, and what is wrong in it."""
    stereo, mono = music(SECONDS, RATE, 2), music(SECONDS / 2, RATE // 2, 1)
    rows: dict[tuple[str, ...], list[str]] = {}
    faults = []
    for name, (end, encode) in FORMATS.items():
        content, other, cells = encode(stereo, RATE), encode(mono, RATE // 2), []
        for what, damage in DAMAGES.items():
            must = bool(damage.unhurt) and name.startswith(damage.unhurt)
            said, wrong = cell(damage.do(content, other), folder / f"song.{end}", must)
            cells.append(said)
            if wrong:
                faults.append(f"{name}, {what}: {said}: {wrong}")
        print(name, *cells, sep=" | ", flush=True)
        rows.setdefault(tuple(cells), []).append(name)
    lines = [f"| | {' | '.join(DAMAGES)} |", "|---" * (len(DAMAGES) + 1) + "|"]
    return lines + [f"| {'; '.join(names)} | {' | '.join(cells)} |" for cells, names in rows.items()], faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="Markdown file whose table is replaced")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lines, faults = table(Path(folder))
    for fault in faults:
        print(f"WRONG {fault}")
    if chosen.output is not None:
        before, _, rest = chosen.output.read_text().partition("| | none |")
        behind = rest.partition("\n\n")[2]
        chosen.output.write_text(before + "\n".join(lines) + "\n\n" + behind)
    print(f"{len(FORMATS)} formats x {len(DAMAGES)} states, {len(faults)} wrong")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
