"""Latents per second for distinct prompts: `Sampler` against the released script's procedure, on a full-size model.

    python benchmarks/generation.py [--quick] [--clips N] [--steps N] [--batch N] [--repeats N] [--device D]
                                     [--precision P] [--output FILE.json]

FluxAudio-S at 44.1 kHz with the v2 head, guidance 4.0 and score 5.0, behind text encoders of full size (T5-large and
CLAP's RoBERTa; seeded weights and byte tokenizers, which cost the same, as every text is padded to 77 tokens). Both
sides run in this process with the same weights, prompts, noise, steps and precision, in alternation after a warm-up.
Their latents are compared first: a ratio between paths that do not compute the same thing is an error.

ours   `Sampler` as a job uses it: every distinct text encoded once, the negative prompt once per run, both branches of
       guidance in one forward. On a CPU clips run side by side, each in one thread; a GPU takes batches.
plain  benchmarks/plain.py: one clip at a time on all cores, both texts encoded for every clip, two forwards per step.

The cost of a clip is text + steps * cost of a step. On a CPU few steps are run, so text would weigh more than it does
for users; the time in the encoders is measured within the runs, and the ratio at 25 steps follows from both. That one
has the target: 1.5 on a CPU, 8 on a GPU. Utilisation is the arithmetic of matrix products and direct convolutions in
the backbone per second outside of the encoders, against `models.speed.peak_flops`; minimal filtering
(models/conv.py) needs less arithmetic, so on a CPU ours may exceed 100 %. Exit code 1 if the target is missed. Two
threads on busy cores wait for each other and measure nothing. --quick only shows that everything runs, and judges
nothing.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Line, machine, report, spread
from plain import PlainFluxAudio, plain_copy, plain_sample, seeded_backbone
from transformers import ClapModel, T5Config, T5EncoderModel

from ttmray.generation.sampler import NEGATIVE_PROMPT, PREFIX, Draw, Sampler, SamplerConfig, noise
from ttmray.models import one_thread, seeded
from ttmray.models.backbone import SIZES, BackboneConfig, FluxAudio
from ttmray.models.backbone_weights import forward_flops
from ttmray.models.clap import Clap, byte_roberta_tokenizer, debug_clap, htsat_base_config
from ttmray.models.devices import resolve_device
from ttmray.models.speed import peak_flops
from ttmray.models.t5 import TextEncoder, byte_t5_tokenizer, debug_text_encoder

TARGET = {"cpu": 1.5, "cuda": 8.0}
PAPER_STEPS = 25
LARGEST_DIFFERENCE = {"fp32": 1e-3, "bf16": 0.3}
"""Of the latents, whose deviation is near 1. Guidance multiplies rounding by 7 in every step."""
TINY = BackboneConfig(text_dim=64, latent_len=40, hidden=64, heads=2, depth=3, fused_depth=1, head="v2")


@dataclass(frozen=True)
class Setup:
    """Both sides and what they have in common."""

    backbone: FluxAudio
    plain: PlainFluxAudio
    text: TextEncoder
    clap: Clap
    config: SamplerConfig
    draws: list[Draw]
    batch: int
    threads: int

    @property
    def device(self) -> torch.device:
        return self.backbone.latent_mean.device

    def ours(self) -> np.ndarray:
        if self.device.type == "cpu":
            one_thread()  # as jobs do
        try:
            sampler = Sampler(
                [self.backbone], self.text, self.clap, self.config, batch=self.batch, threads=self.threads
            )
            return sampler.sample(self.draws).latents
        finally:
            torch.set_num_threads(self.threads)

    def theirs(self) -> np.ndarray:
        config, latents = self.config, []
        shape = (self.backbone.latent_len, self.backbone.config.latent_dim)
        for draw in self.draws:
            start = noise(draw.seed, draw.prompt_id, shape)[None].to(self.device)
            sampled = plain_sample(
                self.plain, self.text, self.clap, config.prefix + draw.prompt, config.negative_prompt, start,
                config.steps, config.weight, config.score, config.precision == "bf16",
            )  # fmt: skip
            latents.append(sampled.numpy())
        return np.stack(latents)


class TextClock:
    """Adds up the seconds that are spent in two encoders."""

    def __init__(self, text: TextEncoder, clap: Clap) -> None:
        self.seconds = 0.0
        for encoder, name in ((text, "encode"), (clap, "embed_text")):
            setattr(encoder, name, self._timed(getattr(encoder, name)))

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            started = time.perf_counter()
            try:
                return call(*arguments)
            finally:
                self.seconds += time.perf_counter() - started

        return timed


@dataclass(frozen=True)
class Timed:
    """Wall seconds of some clips, and of them those in the text encoders."""

    wall_s: float
    text_s: float

    def at(self, steps: int, measured: int) -> float:
        """Seconds that these clips take with another number of steps."""
        return self.text_s + (self.wall_s - self.text_s) * steps / measured


def prompts(count: int) -> list[str]:
    """Distinct prompts."""
    moods = ("calm", "dark", "playful", "driving", "dreamy", "solemn", "bright", "tense")
    styles = ("ambient", "jazz", "techno", "folk", "orchestral", "blues", "trip hop", "bossa nova")
    leads = ("piano", "strings", "an analogue synthesiser", "acoustic guitar", "brass", "a music box")
    texts = [f"a {mood} {style} piece led by {lead}" for style, lead, mood in product(styles, leads, moods)]
    if count > len(texts):
        raise SystemExit(f"--clips: at most {len(texts)}")
    return texts[:count]


def full_encoders(device: torch.device) -> tuple[TextEncoder, Clap]:
    """Seeded encoders of the released sizes: FLAN-T5-large's encoder (335 M) and LAION's CLAP (194 M)."""
    shape = T5Config(
        d_model=1024, d_kv=64, d_ff=2816, num_layers=24, num_heads=16, feed_forward_proj="gated-gelu",
        is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    with seeded(0):
        return (
            TextEncoder(T5EncoderModel(shape), byte_t5_tokenizer(), device),
            Clap(ClapModel(htsat_base_config()), byte_roberta_tokenizer(), device),
        )


def measure(setup: Setup, repeats: int) -> tuple[list[Timed], list[Timed], float]:
    """Both sides in alternation, and the largest difference of their latents."""
    difference = float(np.abs(setup.ours() - setup.theirs()).max())  # warms up, too
    limit = LARGEST_DIFFERENCE[setup.config.precision]
    if not difference < limit:
        raise RuntimeError(f"the latents of both sides differ by {difference}")
    clock = TextClock(setup.text, setup.clap)

    def timed(call: Callable[[], np.ndarray]) -> Timed:
        clock.seconds, started = 0.0, time.perf_counter()
        call()  # ends with latents on the CPU, so nothing is pending
        return Timed(time.perf_counter() - started, clock.seconds)

    pairs = [(timed(setup.ours), timed(setup.theirs)) for _ in range(repeats)]
    return [ours for ours, _ in pairs], [theirs for _, theirs in pairs], difference


def lines(setup: Setup, repeats: int) -> list[Line]:
    bf16 = setup.config.precision == "bf16"
    before = peak_flops(setup.device, bf16)
    ours, theirs, difference = measure(setup, repeats)
    peak, source = max(before, peak_flops(setup.device, bf16))  # other work may have slowed one down
    steps, clips = setup.config.steps, len(setup.draws)
    flops = forward_flops(setup.backbone.config)
    arithmetic = clips * steps * 2 * flops["velocity"]  # text projections are 0.4 % of a step
    pairs = list(zip(ours, theirs, strict=True))
    at_paper = spread([b.at(PAPER_STEPS, steps) / a.at(PAPER_STEPS, steps) for a, b in pairs])
    rows = [
        Line(
            f"ours against plain, {PAPER_STEPS} steps", at_paper, "x", TARGET[setup.device.type],
            note=f"largest difference of the latents {difference:.1g}",
        )
    ]  # fmt: skip
    if steps != PAPER_STEPS:
        ratios = spread([b.wall_s / a.wall_s for a, b in pairs])
        rows.append(Line(f"ours against plain, {steps} steps as run", ratios, "x"))
    for side, runs in (("ours", ours), ("plain", theirs)):
        note = "" if steps == PAPER_STEPS else f"from {steps} steps"
        rate = spread([clips / run.at(PAPER_STEPS, steps) for run in runs], 4)
        rows.append(Line(f"{side}: clips per second, {PAPER_STEPS} steps", rate, "clips/s", note=note))
        rows.append(Line(f"{side}: as run", spread([run.wall_s / clips for run in runs], 4), "s/clip"))
        text = spread([run.text_s / clips for run in runs], 4)
        rows.append(Line(f"{side}: text encoders", text, "s/clip"))
        used = spread([100 * arithmetic / (run.wall_s - run.text_s) / peak for run in runs], 1)
        rows.append(Line(f"{side}: model FLOP utilisation", used, "%", note=f"of {peak / 1e12:.3g} TFLOP/s, {source}"))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, no verdict")
    parser.add_argument("--clips", type=int, help="distinct prompts (default 4 on a CPU, 64 on a GPU)")
    parser.add_argument("--steps", type=int, help="Euler steps (default 4 on a CPU, 25 on a GPU)")
    parser.add_argument("--batch", type=int, default=16, help="clips per forward on a GPU")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--threads", type=int, help="on a CPU (default: every core of this process)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: fp32 on a CPU, bf16 on a GPU")
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    arguments = parser.parse_args()
    device = torch.device(resolve_device(arguments.device))
    on_cpu = device.type == "cpu"
    threads = arguments.threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    quick = arguments.quick
    shape = TINY if quick else SIZES["s_44k"].with_head("v2")
    text, clap = (
        (debug_text_encoder(0, device=device), debug_clap(0, device=device)) if quick else full_encoders(device)
    )
    backbone = seeded_backbone(shape).eval().requires_grad_(False).to(device)
    clips = arguments.clips or (3 if quick else 4 if on_cpu else 64)
    steps = arguments.steps or (2 if quick else 4 if on_cpu else PAPER_STEPS)
    precision = arguments.precision or ("fp32" if on_cpu else "bf16")
    setup = Setup(
        backbone,
        plain_copy(backbone).eval(),
        text,
        clap,
        SamplerConfig(steps=steps, prefix=PREFIX, negative_prompt=NEGATIVE_PROMPT, score=5.0, precision=precision),
        [Draw(str(i), prompt, seed=42) for i, prompt in enumerate(prompts(clips))],
        arguments.batch,
        threads,
    )
    facts = machine() | {"device": "cpu" if on_cpu else torch.cuda.get_device_name(device), "threads": threads}
    facts |= {"precision": precision, "clips": clips, "steps": steps, "batch": 1 if on_cpu else arguments.batch}
    started = time.perf_counter()
    measured = lines(setup, 1 if quick else arguments.repeats)
    facts |= {"seconds": round(time.perf_counter() - started), "load_at_end": round(os.getloadavg()[0], 2)}
    name = "generation (quick: not judged)" if quick else "generation"
    return report(name, measured, facts, arguments.output, judged=not quick)


if __name__ == "__main__":
    sys.exit(main())
