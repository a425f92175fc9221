"""Full-size training updates: the real loop against a plain PyTorch step, with the same weights and samples.

    python benchmarks/training.py [--quick] [--batch N ...] [--updates N] [--device D] [--threads N] [--precision P]
                                   [--compile] [--output FILE.json]

FluxAudio-S at 44.1 kHz with the v1 head, Stage 1's settings, synthetic samples (seeded, float32, in memory) whose draws
are the same on both sides. Each line of times is the median over updates after two for warming up.

ours   `ttmray.training.loop.train` itself: flow matching, clipping, fused AdamW, both averages, tally. Its samples come
       from a generator that makes the plain update between two of ours, so that noise of the machine meets both.
plain  benchmarks/plain.py: math attention, library convolutions, single-tensor AdamW, clipping and averages (the public
       trainer's AdamW is fused; the share of everything after the backward pass is printed, so that its part can be
       told).

Losses of all updates are compared; a ratio between paths that do not compute the same thing is an error. Targets: 1.15
times in float32 on a CPU; 2.5 times in bf16 on a GPU or on a CPU with matrix units (on a CPU with vector units for bf16
it is measured without a target, elsewhere only if --precision bf16 asks for it); on a GPU 45 % utilisation at batch 64.
Utilisation is three times the forward arithmetic of matrix products and direct convolutions, against
`models.speed.peak_flops`; minimal filtering (models/conv.py) needs less of it on a CPU.

Peak memory is that of each side alone, in a process of its own that makes two updates: of a batch of 64 in the
micro-batches that `split_batch` picks for 24 GB on a GPU (it must stay below 24 GB), of two micro-batches of the
largest --batch on a CPU (resident set, libraries included). Plain has no accumulation: its update is one micro-batch.
Exit code 1 if a target is missed. --quick only shows that everything runs, measures the memory of our side alone, and
judges nothing.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from common import Line, machine, report, spread
from plain import PlainTrainer, plain_copy, seeded_backbone
from torch import Tensor

from ttmray.models.backbone import SIZES, BackboneConfig, FluxAudio
from ttmray.models.devices import resolve_device
from ttmray.models.speed import peak_flops
from ttmray.storage import Folder
from ttmray.training.config import TrainConfig, TrainRuntime, ValidationConfig
from ttmray.training.data import DataConfig, Samples, SourceConfig
from ttmray.training.flow_matching import Batch, flow_losses
from ttmray.training.loop import train
from ttmray.training.memory import split_batch, step_flops
from ttmray.training.schedule import learning_rate
from ttmray.training.task import Losses, Ranks

FP32_TARGET, BF16_TARGET, MFU_TARGET = 1.15, 2.5, 45.0
MEMORY_GB = 24.0
LARGEST_DIFFERENCE = {"fp32": 1e-3, "bf16": 0.05}
"""Of the losses, relative."""
WARM_UP = 2
TINY = BackboneConfig(text_dim=64, latent_len=40, hidden=64, heads=2, depth=3, fused_depth=1, head="v1")


class Enough(Exception):
    """Ends the loop: all updates are made. It is raised where samples come from, so that no checkpoint is written."""


class Duel:
    """What the loop trains on. Its source of samples makes the plain update between two updates of the loop.

    Args:
        updates: how many; every one has new samples.
        plain: the other side, or None to run ours alone.
    """

    def __init__(self, model: FluxAudio, config: TrainConfig, updates: int, plain: PlainTrainer | None) -> None:
        self.model, self.config, self.updates, self.plain = model, config, updates, plain
        self.device = model.latent_mean.device
        self.identity: dict[str, Any] = {}
        self.facts: dict[str, Any] = {}
        self.flops_per_sample = step_flops(model.config)
        self.clips_per_sample, self.frozen_models = 1, 0
        self.ours: list[float] = []
        self.theirs: list[float] = []
        self.our_losses: list[Tensor] = []
        self.their_losses: list[Tensor] = []

    def batches(self, start: int, batch: int, rank: int, world: int, pin: bool) -> Generator[Samples, None, None]:
        for update in range(self.updates):
            for part in range(self.config.batch // batch):
                samples = synthetic_samples(self.model.config, batch, 1000 * update + part, pin)
                started = now(self.device)
                yield samples
            self.ours.append(now(self.device) - started)
            if self.plain is not None:
                started = now(self.device)
                self.their_losses.append(self.plain.update(samples.to(self.device).batch))
                self.theirs.append(now(self.device) - started)
        raise Enough

    def losses(self, samples: Samples, forward: Callable[..., Tensor]) -> Losses:
        losses, t = flow_losses(self.model, samples.batch, self.config.flow, forward)
        self.our_losses.append(losses.detach().mean())
        return Losses(losses, t)

    def validate(self, device: torch.device, rank: int, world: int) -> None:
        return None

    def sample(self, folder: Folder, step: int) -> None:
        raise AssertionError("no samples are asked for")

    def note(self, start: int, stop: int, lines: Sequence[Mapping[str, float]]) -> dict[str, Any]:
        return {}

    def run(self, device_batch: int) -> None:
        with suppress(Enough):
            train(self, self.config, Ranks(), self.device, device_batch)


def now(device: torch.device) -> float:
    """Seconds, when the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def synthetic_samples(config: BackboneConfig, batch: int, seed: int, pin: bool) -> Samples:
    """Samples and draws of a corpus's shapes; nothing that is timed depends on their values."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator)

    def uniform() -> Tensor:
        return torch.rand(batch, generator=generator)

    latents = (config.latent_len, config.latent_dim)
    inputs = Batch(
        mean=normal(*latents),
        std=0.3 * normal(*latents).abs(),
        text=0.2 * normal(config.text_len, config.text_dim),
        text_c=normal(config.text_c_dim) / config.text_c_dim**0.5,
        posterior_noise=normal(*latents),
        z=normal(),
        noise=normal(*latents),
        u_text=uniform(),
        u_score=uniform(),
        score=normal(),
    )
    if pin:
        inputs = Batch(**{name: tensor.pin_memory() for name, tensor in inputs._asdict().items()})
    numbers = torch.arange(batch)
    return Samples(numbers, numbers, [str(i) for i in range(batch)], inputs, weights=torch.ones(batch))


def train_config(folder: str, batch: int, precision: str, compile: bool) -> TrainConfig:
    """Stage 1, without checkpoints, validation and log lines; no corpus is opened."""
    return TrainConfig(
        output=folder,
        data=DataConfig(sources=(SourceConfig(corpus="synthetic"),)),
        batch=batch,
        precision=precision,
        validation=ValidationConfig(clips=0),
        runtime=TrainRuntime(compile=compile, log_every=10**9, tensorboard=False),
    )


def plain_trainer(model: FluxAudio, config: TrainConfig) -> PlainTrainer:
    def rate(step: int) -> float:
        return learning_rate(step, config.optimizer.lr, warmup=config.optimizer.warmup)

    return PlainTrainer(plain_copy(model), rate, config.ema.sigma_rels, config.precision == "bf16")


def compare(
    shape: BackboneConfig, device: torch.device, batch: int, updates: int, precision: str, compile: bool,
    target: float | None,
) -> list[Line]:  # fmt: skip
    """Lines of one batch size."""
    before = peak_flops(device, precision == "bf16")
    model = seeded_backbone(shape).to(device)
    with tempfile.TemporaryDirectory() as folder:
        config = train_config(folder, batch, precision, compile)
        plain = plain_trainer(model, config)
        duel = Duel(model, config, updates + WARM_UP, plain)
        duel.run(batch)
    ours, theirs = torch.stack(duel.our_losses).cpu(), torch.stack(duel.their_losses).cpu()
    difference = float(((ours - theirs).abs() / theirs.abs()).max())
    if not difference < LARGEST_DIFFERENCE[precision]:
        raise RuntimeError(f"the losses of both sides differ by {difference}: {ours.tolist()}, {theirs.tolist()}")
    peak, source = max(before, peak_flops(device, precision == "bf16"))  # other work may have slowed one down
    flops = batch * step_flops(shape)
    our_s, their_s = duel.ours[WARM_UP:], duel.theirs[WARM_UP:]
    name = f"{precision}, batch {batch}"
    ratios = spread([b / a for a, b in zip(our_s, their_s, strict=True)])
    lines = [Line(f"{name}: ours against plain", ratios, "x", target, note=f"losses within {difference:.1g}")]
    for side, seconds in (("ours", our_s), ("plain", their_s)):
        used = spread([100 * flops / s / peak for s in seconds], 1)
        goal = MFU_TARGET if side == "ours" and device.type == "cuda" and batch >= 64 and precision == "bf16" else None
        lines.append(Line(f"{name}: {side}", spread(seconds, 4), "s/update"))
        lines.append(Line(f"{name}: {side}, samples", spread([batch / s for s in seconds], 2), "samples/s"))
        note = f"of {peak / 1e12:.3g} TFLOP/s, {source}"
        lines.append(Line(f"{name}: {side}, model FLOP utilisation", used, "%", goal, note=note))
    after = spread([100 * a / s for a, s in zip(plain.after_backward[WARM_UP:], their_s, strict=True)], 1)
    lines.append(Line(f"{name}: plain, clipping, AdamW, averages", after, "% of update"))
    return lines


def peak_memory(
    side: str, shape: BackboneConfig, device: torch.device, batch: int, updates: int, precision: str, compile: bool
) -> dict[str, Any]:
    """Bytes that one side needs at most, in this process, which does nothing else."""
    model = seeded_backbone(shape).to(device)
    on_gpu = device.type == "cuda"
    total = 64 if on_gpu and side == "ours" else 2 * batch if side == "ours" else batch
    with tempfile.TemporaryDirectory() as folder:
        config = train_config(folder, total, precision, compile)
        if side == "ours":
            Duel(model, config, updates, None).run(batch)
        else:
            plain = plain_trainer(model, config)
            del model
            for update in range(updates):
                plain.update(synthetic_samples(shape, batch, update, on_gpu).to(device).batch)
    used = torch.cuda.max_memory_allocated(device) if on_gpu else peak_resident()
    return {"bytes": used, "batch": total, "device_batch": batch}


def peak_resident() -> int:
    """Most bytes of this process in memory so far (getrusage would go back to before its exec)."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in status if line.startswith("VmHWM:")).split()[1])


def memory_lines(
    arguments: argparse.Namespace, shape: BackboneConfig, device: torch.device, precision: str
) -> list[Line]:
    """Peaks of both sides, each measured by a process that runs this file with --alone."""
    on_gpu = device.type == "cuda"
    batch = max(arguments.batch)
    if on_gpu:
        batch = split_batch(
            shape, share=64, device_batch=None, averages=2, bf16=precision == "bf16", checkpointing=False,
            free_bytes=int(MEMORY_GB * 1e9),
        ).device_batch  # fmt: skip
    lines = []
    for side in ("ours",) if arguments.quick else ("ours", "plain"):
        command = [sys.executable, __file__, "--alone", side, "--batch", str(batch), "--precision", precision]
        command += ["--device", str(device), "--updates", "2", "--threads", str(torch.get_num_threads())]
        command += ["--quick"] * arguments.quick + ["--compile"] * arguments.compile
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        peak = json.loads(output.splitlines()[-1])
        what = f"{precision}: {side}, peak {'GPU memory' if on_gpu else 'resident memory'}"
        note = f"updates of {peak['batch']} in micro-batches of {peak['device_batch']}"
        target = MEMORY_GB if on_gpu and side == "ours" else None
        lines.append(Line(what, spread([peak["bytes"] / 1e9], 2), "GB", target, low=True, note=note))
    return lines


def plan(chosen: str | None, device: torch.device) -> tuple[dict[str, float | None], str]:
    """Precisions to measure with their targets, and what this device has for bf16."""
    if device.type == "cuda":
        return ({"fp32": None} if chosen == "fp32" else {"bf16": BF16_TARGET}), "tensor cores"
    flags = Path("/proc/cpuinfo").read_text().split()
    targets: dict[str, float | None] = {"fp32": FP32_TARGET}
    if "amx_bf16" in flags:
        units, targets["bf16"] = "matrix units (amx_bf16)", BF16_TARGET
    elif "avx512_bf16" in flags:
        units, targets["bf16"] = "vector units (avx512_bf16): measured, no target", None
    else:
        units = "not applicable: this CPU has neither amx_bf16 nor avx512_bf16"
    return ({chosen: targets.get(chosen)} if chosen else targets), units


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, no verdict")
    parser.add_argument(
        "--batch", type=int, nargs="+", help="samples per update (default 2 and 4 on a CPU, 64 on a GPU)"
    )
    parser.add_argument("--updates", type=int, help="measured per batch size (default 7 on a CPU, 20 on a GPU)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--threads", type=int, help="of torch (default: every core of this process)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: what the device has units for")
    parser.add_argument("--compile", action="store_true", help="compile our backbone, as runtime.compile does")
    parser.add_argument("--alone", choices=("ours", "plain"), help="only print the peak memory of one side, as JSON")
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    arguments = parser.parse_args()
    quick = arguments.quick
    device = torch.device(resolve_device(arguments.device))
    on_gpu = device.type == "cuda"
    torch.set_num_threads(arguments.threads or len(os.sched_getaffinity(0)))
    arguments.batch = arguments.batch or ([2] if quick else [64] if on_gpu else [2, 4])
    updates = arguments.updates or (2 if quick else 20 if on_gpu else 7)
    shape = TINY if quick else SIZES["s_44k"].with_head("v1")
    if arguments.alone:
        batch, precision = arguments.batch[0], arguments.precision or "fp32"
        print(json.dumps(peak_memory(arguments.alone, shape, device, batch, updates, precision, arguments.compile)))
        return 0
    targets, bf16 = plan(arguments.precision, device)
    facts = machine() | {"device": torch.cuda.get_device_name(device) if on_gpu else "cpu"}
    facts |= {"threads": torch.get_num_threads(), "compiled": arguments.compile, "bf16": bf16}
    facts["gflop_per_sample"] = round(step_flops(shape) / 1e9, 1)
    started = time.perf_counter()
    lines = []
    for precision, target in targets.items():
        for batch in arguments.batch:
            lines += compare(shape, device, batch, updates, precision, arguments.compile, target)
        lines += memory_lines(arguments, shape, device, precision)
    facts |= {"seconds": round(time.perf_counter() - started), "load_at_end": round(os.getloadavg()[0], 2)}
    name = "training (quick: not judged)" if quick else "training"
    return report(name, lines, facts, arguments.output, judged=not quick)


if __name__ == "__main__":
    sys.exit(main())
