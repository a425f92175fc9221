"""Power-function EMA of weights, and averages of any length computed after training.

Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", section 3 and appendix C. The
step-size correction is that of the PostHocEMA which the public trainer uses. `sigma_rel` is the relative width of the
averaging window; `gamma` is the exponent that gives it. Only trainable floating-point parameters are averaged: frozen
ones and buffers are taken from the model as they are, because synthesis weights do not sum to exactly 1.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ttmray.errors import UserError
from ttmray.storage import Folder
from ttmray.training.tensors import pack, unpack

SNAPSHOT = "ema snapshot"
_SNAPSHOT_NAME = re.compile(r"sigma-([0-9.]+)-step-([0-9]{8,})\.safetensors")


def gamma_of(sigma_rel: float) -> float:
    """Exponent of the power function whose relative width is `sigma_rel` (Karras et al. 2024, eq. 126).

    Raises:
        ValueError: outside (0, 0.28], the range with a positive exponent.
    """
    if not 0 < sigma_rel <= 0.28:
        raise ValueError(f"sigma_rel must lie in (0, 0.28], not {sigma_rel}")
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def beta_of(step: int, gamma: float, *, correction: bool = True, update_every: int = 1) -> float:
    """Decay of update call `step` (from 1): average <- average + (1 - beta) (weights - average).

    With correction: the geometric mean of the decays at `step` and at the next update, over `update_every` steps.
    """
    beta = (1 - 1 / (step + 1)) ** (1 + gamma)
    if not correction:
        return float(beta)
    following = (1 - 1 / (step + 1 + update_every)) ** (1 + gamma)
    return float((beta * following) ** (update_every / 2))


class PowerEMA:
    """Running averages of a model's trainable weights, one per `sigma_rel`, in float32 on the model's device and in the
    shapes of its weights.

    Args:
        model: the bare module (no DDP wrapper), already on its device.
        sigma_rels: relative widths.
        step_size_correction: see `beta_of`.
        update_every: average at every n-th call of `update` only.

    Attributes:
        step: calls of `update` so far.
    """

    def __init__(
        self,
        model: nn.Module,
        sigma_rels: Sequence[float] = (0.05, 0.1),
        step_size_correction: bool = True,
        update_every: int = 1,
    ) -> None:
        self.gammas = {sigma: gamma_of(sigma) for sigma in sigma_rels}
        self.correction, self.update_every = step_size_correction, update_every
        self.names = [name for name, p in model.named_parameters() if p.requires_grad and p.is_floating_point()]
        self.averages = {sigma: [p.to(torch.float32, copy=True) for p in self._weights(model)] for sigma in self.gammas}
        self.step = 0

    def _weights(self, model: nn.Module) -> list[Tensor]:
        parameters = dict(model.named_parameters())
        return [parameters[name].detach() for name in self.names]

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Count one optimiser step and average. The first call starts from the weights as they are."""
        self.step += 1
        if (self.step - 1) % self.update_every:
            return
        weights = [weight.float() for weight in self._weights(model)]  # no copy where they are float32
        for sigma, average in self.averages.items():
            if self.step == 1:
                torch._foreach_copy_(average, weights)
            else:
                beta = beta_of(
                    self.step, self.gammas[sigma], correction=self.correction, update_every=self.update_every
                )
                torch._foreach_lerp_(average, weights, 1 - beta)

    @contextmanager
    @torch.no_grad()
    def applied(self, model: nn.Module, sigma_rel: float) -> Iterator[None]:
        """`model` has averaged weights inside the block and its own bits again after it, whatever happens in it.

        Raises:
            UserError: a `sigma_rel` that is not averaged.
        """
        weights, average = self._weights(model), self._of(sigma_rel)
        originals = [weight.clone() for weight in weights]
        torch._foreach_copy_(weights, average)
        try:
            yield
        finally:
            torch._foreach_copy_(weights, originals)

    def _of(self, sigma_rel: float) -> list[Tensor]:
        if sigma_rel not in self.averages:
            known = ", ".join(f"{sigma:g}" for sigma in self.averages)
            raise UserError(f"There is no running average with sigma_rel {sigma_rel:g}.", f"Averaged: {known}.")
        return self.averages[sigma_rel]

    def tensors(self) -> dict[str, Tensor]:
        """The averages themselves (no copies), named `<sigma_rel>/<parameter>`, for checkpoints."""
        return {
            f"{sigma:g}/{name}": tensor
            for sigma, average in self.averages.items()
            for name, tensor in zip(self.names, average, strict=True)
        }

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Continue from what `tensors` and `step` were.

        Raises:
            UserError: other parameters or other sigma_rels.
        """
        own = self.tensors()
        if own.keys() != tensors.keys():
            other = sorted(own.keys() ^ tensors.keys())
            raise UserError(
                f"The EMA of the checkpoint has other weights: {', '.join(other[:4])} ({len(other)} in all).",
                "It belongs to another model, or ema.sigma_rels changed.",
            )
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
        self.step = step

    def weights(self, model: nn.Module, sigma_rel: float) -> dict[str, Tensor]:
        """State dict of `model` with its trainable weights averaged and everything else as it is."""
        return model.state_dict() | dict(zip(self.names, self._of(sigma_rel), strict=True))

    def write_snapshots(self, folder: Folder, model: nn.Module) -> None:
        """Write one file per sigma_rel, from which `synthesise` makes other averages after training."""
        for sigma in self.averages:
            about = {"kind": SNAPSHOT, "sigma_rel": sigma, "step": self.step, "averaged": self.names}
            folder.write(f"sigma-{sigma:g}-step-{self.step:08d}.safetensors", pack(self.weights(model, sigma), about))


def _overlap(step_a: np.ndarray, gamma_a: np.ndarray, step_b: np.ndarray, gamma_b: np.ndarray) -> np.ndarray:
    """Inner product of two power functions (Karras et al. 2024, appendix C.2), elementwise."""
    exponent = np.where(step_a < step_b, gamma_b, -gamma_a)
    scale = (gamma_a + 1) * (gamma_b + 1) / ((gamma_a + gamma_b + 1) * np.maximum(step_a, step_b))
    return np.asarray(scale * (step_a / step_b) ** exponent)


def synthesis_weights(steps: Sequence[int], sigma_rels: Sequence[float], step: int, sigma_rel: float) -> np.ndarray:
    """Weights (n,) float64 with which n snapshots add up to the average of `sigma_rel` at `step`.

    Least squares between power functions. Gammas are rounded to float32 first, as in the public implementation.

    Args:
        steps: step of each snapshot.
        sigma_rels: sigma_rel of each snapshot.
        step: of the wanted average; snapshots of later steps are used, too.
        sigma_rel: of the wanted average.
    """
    gammas = np.array([gamma_of(sigma) for sigma in sigma_rels], np.float32).astype(np.float64)
    times = np.array(steps, np.float64)
    matrix = _overlap(times[:, None], gammas[:, None], times[None, :], gammas[None, :])
    gamma = np.array([gamma_of(sigma_rel)], np.float32).astype(np.float64)
    return np.linalg.solve(matrix, _overlap(times, gammas, np.array([float(step)]), gamma))


def synthesise(folder: Folder, sigma_rel: float, step: int | None = None) -> tuple[dict[str, Tensor], int]:
    """State dict with the average of any `sigma_rel` at any `step`, from the snapshots in `folder`.

    Averaged tensors are summed in float64; all others are those of the newest snapshot, bit for bit.

    Args:
        folder: of `PowerEMA.write_snapshots`.
        sigma_rel: relative width, at most 0.28; best between those that were averaged.
        step: default: that of the newest snapshot.

    Returns:
        The state dict in the shapes of the model, averaged tensors in float32, and the step.

    Raises:
        UserError: no snapshots, a step that lies after the newest one, a sigma_rel out of range, a damaged file or
            files of different models.
    """
    snapshots = sorted(
        (int(match[2]), float(match[1]), entry.name)
        for entry in folder.files(sizes=False)
        if (match := _SNAPSHOT_NAME.fullmatch(entry.name))
    )
    if not snapshots:
        raise UserError(
            f"{folder}: there are no EMA snapshots.", "Training writes them every ema.snapshot_every steps."
        )
    newest = snapshots[-1][0]
    step = newest if step is None else step
    if not 0 < step <= newest:
        raise UserError(f"{folder}: no average of step {step} can be made; the newest snapshot is of step {newest}.")
    try:
        weights = synthesis_weights([s for s, _, _ in snapshots], [sigma for _, sigma, _ in snapshots], step, sigma_rel)
    except ValueError as error:
        raise UserError(f"{folder}: {error}.") from error
    sums: dict[str, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    about: dict[str, Any] = {}
    for weight, (_, _, name) in zip(weights.tolist(), snapshots, strict=True):
        try:
            tensors, about = unpack(folder.read(name), folder.path(name))
        except UserError as error:
            way_out = "Delete it: averages are then made of the others; or train again in a new folder."
            raise UserError(error.message, way_out) from error
        if sums and set(about.get("averaged", ())) != sums.keys():
            raise UserError(f"{folder.path(name)} holds other averages than the snapshots before it.")
        for key in about.get("averaged", ()):
            part = tensors[key].double() * weight
            sums[key] = sums[key].add_(part) if key in sums else part
    return tensors | {key: total.float() for key, total in sums.items()}, step
