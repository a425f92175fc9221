"""How many samples fit on a device: estimates before the first step."""

from dataclasses import dataclass

import torch

from ttmray.models.backbone import BackboneConfig, FluxAudio
from ttmray.models.backbone_weights import forward_flops

BYTES_PER_WEIGHT = 4 + 4 + 8
"""Weight, gradient and AdamW's two moments in float32; every average of the EMA adds 4, bf16 autocast a copy of 2."""
BF16_SHARE = 0.6
"""Activations under bf16 autocast against float32: most halve, norms and rotations stay float32. Counted: 0.58."""
FREE_SHARE = 0.85
CPU_BATCH = 4


@dataclass(frozen=True)
class Split:
    """How an update is made up, and the bytes that it is estimated to need on a device."""

    device_batch: int
    accumulation: int
    state_bytes: int
    sample_bytes: int

    @property
    def bytes(self) -> int:
        return self.state_bytes + self.device_batch * self.sample_bytes


def activation_bytes(config: BackboneConfig, checkpointing: bool = False) -> tuple[int, int]:
    """Bytes in float32 that autograd keeps: for any batch (rearranged weights), and per sample besides."""
    one, two = (_kept(config, batch, checkpointing) for batch in (1, 2))
    per_sample = two - one
    if checkpointing:  # blocks are recomputed one by one
        per_sample += (_kept(config, 2, False) - _kept(config, 1, False)) // config.depth
    return 2 * one - two, per_sample


def _kept(config: BackboneConfig, batch: int, checkpointing: bool) -> int:
    """Counted in a forward pass on the meta device, which goes through the convolutions as a GPU does."""
    with torch.device("meta"):
        model = FluxAudio(config)
        x, t = torch.empty(batch, config.latent_len, config.latent_dim), torch.empty(batch)
        text, pooled = torch.empty(batch, config.text_len, config.text_dim), torch.empty(batch, config.text_c_dim)
        score = None if config.head == "none" else torch.empty(batch)
    model.to("meta")  # RoPE is made on the CPU
    model.checkpointing = checkpointing
    seen: dict[int, torch.UntypedStorage] = {}
    squares = {(n, n) for n in (config.latent_len, config.latent_len + config.text_len)}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.ndim < 3 or tuple(tensor.shape[-2:]) not in squares:  # fused attention keeps no weights
            storage = tensor.untyped_storage()
            seen[storage._cdata] = storage  # also keeps it alive, so that no other one gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(x, t, text, pooled, score)
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    return sum(storage.nbytes() for address, storage in seen.items() if address not in own)


def split_batch(
    config: BackboneConfig,
    *,
    share: int,
    device_batch: int | None,
    averages: int,
    bf16: bool,
    checkpointing: bool,
    free_bytes: int | None,
    clips: int = 1,
    frozen_models: int = 0,
) -> Split:
    """Micro-batches for `share` samples per update and device.

    Args:
        share: samples of an update on one device.
        device_batch: samples per forward; None: the largest divisor of `share` that should fit.
        averages: number of EMAs.
        free_bytes: memory of the device; None on a CPU, where larger batches are no faster.
        clips: of a sample, whose activations autograd keeps.
        frozen_models: further models of this size, without gradients.
    """
    with torch.device("meta"):
        weights = sum(p.numel() for p in FluxAudio(config).parameters() if p.requires_grad)
    fixed, per_clip = activation_bytes(config, checkpointing)
    if bf16:
        fixed, per_clip = 2 * weights, int(BF16_SHARE * per_clip)
    per_sample = clips * per_clip
    state = weights * (BYTES_PER_WEIGHT + 4 * (averages + frozen_models)) + fixed
    if device_batch is None:
        fits = CPU_BATCH if free_bytes is None else int((FREE_SHARE * free_bytes - state) / per_sample)
        device_batch = max([n for n in range(1, share + 1) if share % n == 0 and n <= fits], default=1)
    return Split(device_batch, share // device_batch, state, per_sample)


def step_flops(config: BackboneConfig) -> float:
    """FLOPs of a training sample: forward, and twice that backward."""
    return 3 * sum(forward_flops(config).values())
