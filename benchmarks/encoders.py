"""CLAP and Demucs behind our adapters against the usual way of calling them, on seeded models of full size.

    python benchmarks/encoders.py [--quick] [--only clap demucs resample] [--clips N] [--device D] [--threads N]
                                   [--output FILE.json]

Both sides run in this process with the same weights, in alternation and after a warm-up; a ratio is the other
side's time divided by ours, the median over repeats. The results of both sides are compared first: a ratio between
paths that do not compute the same thing is an error. The share in the model is the wall time between entry and exit
of the networks' own forward, divided by that of the whole call.

clap      10 s clips at 48 kHz to unit vectors with LAION's HTSAT-base: `Clap.embed_audio` on all clips, against the
          usual loop over clips: quantise to int16 and back, transformers' ClapFeatureExtractor (numpy, the path
          without fusion, from 50 Hz), one forward each. Wall time, all cores of this process.
demucs    10 s stereo clips to an instrumental with HTDemucs (the width and depth of `htdemucs`): `Separator.separate`
          on all clips, against `demucs.apply.apply_model` on one clip per call, both with shifts 0, overlap 0.25 and
          normalised input. Wall time.
resample  An MP3 of 10 s to mono waves at 44.1, 48 and 24 kHz (VAE, CLAP, MERT): decoded once and resampled for each,
          against a decode and resample per model. CPU time on one core. No model runs here.

On a CPU our adapters run one clip per forward on purpose: batches change a clip's last bits (up to 1e-7 in a CLAP
vector). The targets: 1.5 times the usual loop for CLAP on a CPU, 5 times on a GPU, 90 % of the time in the model.
Exit code 1 if a target is missed. Two threads on busy cores wait for each other and measure nothing: where other work
runs, give --threads 1. --quick only shows that everything runs, and judges nothing.
"""

import argparse
import io
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from common import Line, machine, one_core, report, spread
from demucs.apply import apply_model
from demucs.htdemucs import HTDemucs
from transformers import ClapFeatureExtractor, ClapModel

from ttmray.audio.io import decode, resample, to_mono
from ttmray.audio.limits import AudioLimits
from ttmray.models import seeded
from ttmray.models.clap import CLAP_SAMPLES, Clap, byte_roberta_tokenizer, htsat_base_config
from ttmray.models.devices import resolve_device
from ttmray.models.protocol import CLAP_SAMPLE_RATE, MERT_SAMPLE_RATE
from ttmray.models.separator import SAMPLE_RATE, Separator

CLAP_TARGET = {"cpu": 1.5, "cuda": 5.0}
SHARE_TARGET = 90.0


@dataclass(frozen=True)
class Size:
    """How much is run."""

    device: torch.device
    clips: int
    demucs_clips: int
    repeats: int
    batch: int = 16


@dataclass
class Timed:
    """Wall seconds of a call and of the forwards inside it."""

    wall_s: float
    model_s: float

    @property
    def share(self) -> float:
        return 100 * self.model_s / self.wall_s


class Stopwatch:
    """Times calls, and of them what passes between entry and exit of some modules."""

    def __init__(self, device: torch.device, modules: Sequence[torch.nn.Module]) -> None:
        self._device = device
        self._modules = modules
        self._inside: dict[int, float] = {}  # by thread: clips may run side by side
        self._entered: dict[int, float] = {}

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _enter(self, *_: object) -> None:
        self._entered[threading.get_ident()] = self._now()

    def _leave(self, *_: object) -> None:
        thread = threading.get_ident()
        self._inside[thread] = self._inside.get(thread, 0.0) + self._now() - self._entered[thread]

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        hooks = [module.register_forward_pre_hook(self._enter) for module in self._modules]
        hooks += [module.register_forward_hook(self._leave) for module in self._modules]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def run(self, call: Callable[[], Any]) -> Timed:
        self._inside = {}
        with self._hooked():
            started = self._now()
            call()
            wall_s = self._now() - started
            return Timed(wall_s, sum(self._inside.values()) / max(len(self._inside), 1))


def compare(
    what: str,
    size: Size,
    modules: Sequence[torch.nn.Module],
    ours: Callable[[], Any],
    theirs: Callable[[], Any],
    clips: int,
    target: float | None,
    note: str,
) -> list[Line]:
    """Ratio, times and shares of two ways to do the same, run in alternation."""
    watch = Stopwatch(size.device, modules)
    our_runs, their_runs = [], []
    for _ in range(size.repeats):
        our_runs.append(watch.run(ours))
        their_runs.append(watch.run(theirs))
    ratios = [theirs.wall_s / ours.wall_s for ours, theirs in zip(our_runs, their_runs, strict=True)]
    lines = [Line(f"{what}: ours against one at a time", spread(ratios), "x", target, note=note)]
    for side, runs, share_target in (("ours", our_runs, SHARE_TARGET), ("one at a time", their_runs, None)):
        seconds = [run.wall_s / clips for run in runs]
        lines.append(Line(f"{what}: {side}", spread(seconds, 4), "s/clip"))
        shares = spread([run.share for run in runs], 1)
        lines.append(Line(f"{what}: {side}, share in the model", shares, "%", share_target))
    return lines


def music(count: int, rate: int, channels: int) -> np.ndarray:
    """Seeded 10 s clips (count, channels, samples) float32: a beat of decaying chords over noise."""
    rng = np.random.default_rng(0)
    t = np.arange(10 * rate) / rate
    clips = np.empty((count, channels, len(t)), np.float32)
    for clip in clips:
        pitches = 110 * 2 ** (rng.integers(0, 36, 3) / 12)
        chord = sum(np.sin(2 * np.pi * pitch * t) for pitch in pitches) * np.exp(-4 * (t % 0.5))
        clip[:] = 0.15 * chord + 0.02 * rng.standard_normal((channels, len(t)))
    return clips


def clap_lines(size: Size) -> list[Line]:
    with seeded(0):
        model = ClapModel(htsat_base_config())
    clap = Clap(model, byte_roberta_tokenizer(), size.device, size.batch, torch.get_num_threads())
    extractor = ClapFeatureExtractor(
        feature_size=64,
        sampling_rate=CLAP_SAMPLE_RATE,
        hop_length=480,
        fft_window_size=1024,
        max_length_s=CLAP_SAMPLES // CLAP_SAMPLE_RATE,
        frequency_min=50,
        frequency_max=14_000,
        truncation="rand_trunc",
        padding="repeatpad",
    )
    waves = list(music(size.clips, CLAP_SAMPLE_RATE, 1)[:, 0])

    @torch.no_grad()
    def usual(waves: list[np.ndarray]) -> np.ndarray:
        vectors = []
        for wave in waves:
            quantised = (np.clip(wave, -1, 1) * 32767).astype(np.int16).astype(np.float32) / 32767
            features = extractor(quantised, sampling_rate=CLAP_SAMPLE_RATE, return_tensors="pt")
            mel = features["input_features"].to(size.device)
            vectors.append(model.get_audio_features(input_features=mel).pooler_output.cpu().numpy())
        return np.concatenate(vectors)

    difference = float(np.abs(clap.embed_audio(waves[:2]) - usual(waves[:2])).max())
    if not difference < 1e-4:
        raise RuntimeError(f"CLAP: both ways differ by {difference}")
    modules = (model.audio_model, model.audio_projection)
    return compare(
        f"CLAP of {size.clips}", size, modules, lambda: clap.embed_audio(waves), lambda: usual(waves),
        size.clips, CLAP_TARGET[size.device.type], f"largest difference {difference:.1g}",
    )  # fmt: skip


def demucs_lines(size: Size) -> list[Line]:
    with seeded(0):
        model = HTDemucs(
            ["drums", "bass", "other", "vocals"],
            bottom_channels=512,
            t_layers=5,
            t_heads=8,
            segment=Fraction(39, 5),
        ).eval()
    separator = Separator(model, size.device, size.batch)
    pieces = list(music(size.demucs_clips, SAMPLE_RATE, 2))

    @torch.no_grad()
    def usual(pieces: list[np.ndarray]) -> list[np.ndarray]:
        instrumentals = []
        for piece in pieces:
            mix = torch.from_numpy(piece)
            mean, std = mix.mean(0).mean(), mix.mean(0).std() + 1e-8
            stems = apply_model(
                model, (mix - mean)[None] / std, device=size.device, shifts=0, split=True, overlap=0.25, progress=False
            )
            instrumentals.append((stems[0, :3] * std + mean).sum(0).numpy())
        return instrumentals

    ours, theirs = separator.separate(pieces[:1])[0].instrumental, usual(pieces[:1])[0]
    difference = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    if not difference < 1e-3:
        raise RuntimeError(f"Demucs: both ways differ by {difference} of the peak")
    return compare(
        f"HTDemucs of {len(pieces)}", size, [model], lambda: separator.separate(pieces), lambda: usual(pieces),
        len(pieces), None, f"largest difference {difference:.1g} of the peak",
    )  # fmt: skip


def resample_lines(size: Size) -> list[Line]:
    rates = (SAMPLE_RATE, CLAP_SAMPLE_RATE, MERT_SAMPLE_RATE)
    file = io.BytesIO()
    soundfile.write(file, music(1, SAMPLE_RATE, 2)[0].T, SAMPLE_RATE, format="MP3")
    limits = AudioLimits()

    def once() -> list[np.ndarray]:
        audio, rate = decode(file, limits)
        mono = to_mono(audio)
        return [resample(mono, rate, target) for target in rates]

    def per_model() -> list[np.ndarray]:
        waves = []
        for target in rates:
            audio, rate = decode(file, limits)
            waves.append(resample(to_mono(audio), rate, target))
        return waves

    if not all(np.array_equal(a, b) for a, b in zip(once(), per_model(), strict=True)):
        raise RuntimeError("decoding once gave other samples")

    def cpu_ms(call: Callable[[], Any]) -> float:
        started = time.process_time()
        call()
        return 1e3 * (time.process_time() - started)

    with one_core():
        pairs = [(cpu_ms(once), cpu_ms(per_model)) for _ in range(7 * size.repeats)]
    return [
        Line("decode and resample: once against per model", spread([b / a for a, b in pairs]), "x"),
        Line("decode and resample: once", spread([a for a, _ in pairs], 1), "CPU-ms/clip"),
        Line("decode and resample: per model", spread([b for _, b in pairs], 1), "CPU-ms/clip"),
    ]


PARTS: dict[str, Callable[[Size], list[Line]]] = {
    "clap": clap_lines,
    "demucs": demucs_lines,
    "resample": resample_lines,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smallest sizes, no verdict")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run")
    parser.add_argument("--clips", type=int, help="clips for CLAP (default 32; 2 with --quick)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--threads", type=int, help="of torch (default: every core of this process)")
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    arguments = parser.parse_args()
    device = torch.device(resolve_device(arguments.device))
    torch.set_num_threads(arguments.threads or len(os.sched_getaffinity(0)))
    if arguments.quick:
        size = Size(device, arguments.clips or 2, demucs_clips=1, repeats=1)
    else:
        size = Size(device, arguments.clips or 32, demucs_clips=4 if device.type == "cpu" else 32, repeats=3)
    facts = machine() | {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"}
    facts["threads"] = torch.get_num_threads()
    started = time.perf_counter()
    lines = [line for part in arguments.only for line in PARTS[part](size)]
    facts |= {"seconds": round(time.perf_counter() - started), "load_at_end": round(os.getloadavg()[0], 2)}
    name = "encoders (quick: not judged)" if arguments.quick else "encoders"
    return report(name, lines, facts, arguments.output, judged=not arguments.quick)


if __name__ == "__main__":
    sys.exit(main())
