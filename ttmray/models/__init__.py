"""Model adapters: plain classes that hold one eval-mode network on one device.

All encoder adapters keep the same promise: float32 numpy arrays on the CPU, one row per input, finite, and
independent of the other items of the call. The helpers here are that promise; importing the package
imports neither torch nor transformers.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def micro_batch(device: "torch.device", batch: int) -> int:
    """Items per forward pass: 1 on a CPU, else `batch`.

    Matrix products of another height may take another summation order, so a clip's last bits would depend on
    its neighbours. Measured with one thread, batch 5 against 1: CLAP differs by up to 5e-7 relative at every
    width; MERT and T5 kept their bits there, but nothing promises it. A larger batch was not faster on a CPU
    (CLAP and MERT 0.9 to 1.5 times the time; T5, which is cheap, 0.55 to 0.8).
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1, not {batch}")
    return 1 if device.type == "cpu" else batch


def to_float32(output: "torch.Tensor", shape: tuple[int, ...], what: str) -> np.ndarray:
    """Output of one forward pass, of any shape, as a float32 array on the CPU.

    Raises:
        RuntimeError: another shape than `shape`.
    """
    array = output.detach().float().cpu().numpy()
    if array.shape != shape:
        raise RuntimeError(f"{what}: expected shape {shape}, got {array.shape}")
    return array


class NotFiniteOutput(RuntimeError):
    """A model gave NaN or infinity."""


def require_finite(array: np.ndarray, what: str) -> np.ndarray:
    """`array` (n, ...), whose first axis counts the items of a call.

    Raises:
        NotFiniteOutput: NaN or infinity; names the items.
    """
    finite = np.isfinite(array).reshape(len(array), -1).all(axis=1) if len(array) else np.ones(0, bool)
    if not finite.all():
        raise NotFiniteOutput(f"{what}: not finite for items {np.flatnonzero(~finite).tolist()}")
    return array


def as_waves(waves: "np.ndarray | list[np.ndarray]") -> list[np.ndarray]:
    """Mono waves as a list of contiguous (T,) float32 arrays.

    Args:
        waves: (B, T) array, or a list of (T_i,) arrays of different lengths.

    Raises:
        ValueError: not mono, empty, not float, or with NaN or infinity.
    """
    if isinstance(waves, np.ndarray) and waves.ndim != 2:
        raise ValueError(f"waves must be (batch, samples) or a list of (samples,), not {waves.shape}")
    checked = []
    for i, wave in enumerate(waves):
        if wave.ndim != 1 or len(wave) == 0:
            raise ValueError(f"wave {i} must be mono and not empty, its shape is {wave.shape}")
        if not np.issubdtype(wave.dtype, np.floating):
            raise ValueError(f"wave {i} must be float in [-1, 1], not {wave.dtype}")
        if not np.isfinite(wave).all():
            raise ValueError(f"wave {i} has samples that are not finite")
        checked.append(np.ascontiguousarray(wave, dtype=np.float32))
    return checked


def one_thread() -> None:
    """Limit torch to one CPU thread in this process, if torch is loaded.

    With two threads instead of one, MERT differed by up to 5e-7 and Demucs by 8e-8, so that a score would depend on
    the machine. Jobs use the other cores by running more processes.
    """
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(1)


@contextmanager
def threads_restored() -> Iterator[None]:
    """Afterwards torch has as many threads as before: what is computed inside may set them, see `one_thread`."""
    import torch

    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def side_by_side(work: Callable[[Item], Result], items: Sequence[Item], threads: int) -> list[Result]:
    """`work` of every item, in order, `threads` of them at a time, each computed in one torch thread.

    Splitting clips over cores instead of matrices keeps each clip's bits, and is faster: nothing is synchronised.
    """
    if threads <= 1 or len(items) <= 1:
        return [work(item) for item in items]
    import torch

    def alone(item: Item) -> Result:
        torch.set_num_threads(1)  # OpenMP counts per calling thread
        with torch.inference_mode():  # which is per thread, too
            return work(item)

    before = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        results = list(pool.map(alone, items))
    torch.set_num_threads(before)
    return results


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draws inside come from `seed`; torch's global CPU generator is restored afterwards."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed accelerators as well
        yield


def init_for_debug(model: "torch.nn.Module") -> None:
    """Normal weights of twice the variance-keeping size, so that an untrained network tells inputs apart.

    The usual 0.02 makes tiny networks nearly constant: unrelated captions had cosines up to 0.99 even at one
    times that size, 0.58 to 0.93 at twice. Parametrised weights keep their own initialisation.
    """
    import torch
    from torch.nn.utils.parametrize import is_parametrized

    layers = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d)
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(module.weight)
        elif isinstance(module, layers) and not is_parametrized(module):
            torch.nn.init.normal_(module.weight, std=2.0 * module.weight[0].numel() ** -0.5)
