"""How fast a device is, and how long work on it takes: estimates before the first step."""

import os
import re
import shutil
import time
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

PEAK_TFLOPS = {
    r"A5000": 111.1,
    r"A6000": 154.8,
    r"A100": 312.0,
    r"H100 (PCIe|NVL)": None,
    r"H100": 989.4,
    r"H200 NVL": None,
    r"H200": 989.4,
    r"L40S": 362.0,
    r"RTX 4090": 165.2,
}
"""Dense bf16 with float32 accumulation, TFLOP/s, from the makers' data sheets, by words of the device's name; None: a
variant with other clocks, which is measured like any unknown one."""
REACHED = 0.25
"""Share of that which models of this size reach: the paper's Stage 1 had 27 of an RTX A5000's 111 TFLOP/s."""
CUDA_SIZE, CPU_SIZE = 4096, 1024
NO_GPU = "it is for a GPU, and this machine has none to measure"


def peak_flops(device: "torch.device", bf16: bool) -> tuple[float, str]:
    """FLOP/s that the device could reach, and where the number is from.

    A data sheet's where the GPU is known and precision is bf16; else a matrix product, measured now.
    """
    import torch

    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        sheet = next((peak for words, peak in PEAK_TFLOPS.items() if re.search(rf"\b{words}\b", name)), None)
        if bf16 and sheet is not None:
            return sheet * 1e12, f"{name} data sheet, bf16"
    size = CUDA_SIZE if device.type == "cuda" else CPU_SIZE
    own = torch.Generator(device).manual_seed(0)  # the global one is part of a run's state
    a = torch.randn(size, size, generator=own, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    best = 0.0
    for _ in range(4):
        start = time.perf_counter()
        (a @ a).sum().item()
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best, f"matrix product of {size} measured at the start"


def gpu_here() -> bool:
    """Whether this machine has a GPU that torch can use; torch is imported only where there may be one."""
    if not shutil.which("nvidia-smi"):
        return False
    import torch

    return bool(torch.cuda.is_available())


def time_here(flops: float, device: str, *, devices: int = 1, bf16: bool = False) -> tuple[str, str]:
    """How long work takes, for people, and on what that rests: unknown where it is for a GPU and none is here.

    Args:
        device: as configs name it.
    """
    if device.startswith("cuda") and not gpu_here():
        return "unknown", NO_GPU
    return estimate(flops, *present_flops(device, bf16), devices)


def present_flops(device: str, bf16: bool = False) -> tuple[float, str]:
    """The same for a device as configs name it; torch is imported only where there may be a GPU.

    Args:
        device: `cpu`, `cuda`, `cuda:1` or `auto`.
    """
    if device != "cpu" and gpu_here():
        import torch

        return peak_flops(torch.device("cuda" if device == "auto" else device), bf16)
    a = np.random.default_rng(0).standard_normal((CPU_SIZE, CPU_SIZE), np.float32)
    best = 0.0
    for _ in range(4):
        start = time.perf_counter()
        a @ a
        best = max(best, 2 * CPU_SIZE**3 / (time.perf_counter() - start))
    return best, f"matrix product of {CPU_SIZE} on this CPU"


def estimate(flops: float, peak: float, source: str, devices: int = 1) -> tuple[str, str]:
    """How long work takes, for people, and on what that rests.

    Args:
        peak, source: of one device, see `peak_flops`.
    """
    per_device = f"{peak / 1e12:.3g} TFLOP/s, {source}"
    return about(flops / (REACHED * peak * devices)), (
        f"estimate: {REACHED:.0%} of {f'{devices} x ' if devices > 1 else ''}{per_device}"
    )


def about(seconds: float) -> str:
    """A duration to two digits in its unit; work that is to do never takes none."""
    if seconds <= 0:
        return "nothing"
    for size, unit in ((86400 * 2, "days"), (5400, "h"), (90, "min")):
        if seconds >= size:
            return f"about {_two_digits(seconds / {'days': 86400, 'h': 3600, 'min': 60}[unit])} {unit}"
    return f"about {_two_digits(seconds)} s" if seconds >= 1 else "less than 1 s"


def _two_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def cores() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
