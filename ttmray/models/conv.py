"""Same-length 1-D convolution over channel-last sequences, by the fastest exact method of the device.

85 % of the backbone's arithmetic is convolution with 3 or 7 taps. Where it runs decides how:

- float32 on a CPU: minimal filtering (Winograd 1980; Lavin and Gray 2016), here F(4, 3) and F(2, 7). Four outputs of
  3 taps need 6 products instead of 12. A forward of the full-size backbone is 1.2 to 1.3 times as fast as with the
  library's, a training step 1.3 times (docs/performance.md). Rounding is 1e-6 of the output (RMS), up to six times that
  of a direct convolution; how good that one is depends on the CPU.
- float16 or bfloat16 on a CPU: one matrix product per tap. Matrix units are reached by products, not by convolutions.
- elsewhere: the library's convolution.

All give the same result up to rounding, and gradients by autograd.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

POINTS = (0.0, 1.0, -1.0, 2.0, -2.0, 0.5, -0.5)
"""Where the polynomials are evaluated, beside infinity; small powers of two keep rounding small."""
OUTPUTS_PER_TILE = {3: 4, 7: 2}
"""Kernel size -> outputs per tile. Larger tiles save more products and lose more digits."""


class SameConv1d(nn.Conv1d):
    """`nn.Conv1d` with odd kernel, stride 1 and zero padding that keeps the length; takes and gives (B, N, C)."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias)
        self._kept: tuple[Tensor, Tensor] | None = None  # copy of the weight, its transformed kernel

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, in) -> (B, N, out)."""
        return convolve(x, self)[0]

    def spectrum(self) -> Tensor:
        """The transformed kernel (points, in, out).

        Kept for a frozen weight, with a copy of it: no change of the weight, not even one through `weight.data`, which
        counts up no version, goes unseen. Comparing costs a twentieth of a forward, transforming a fifth.
        """
        weight = self.weight
        if torch.compiler.is_compiling() or weight.requires_grad or weight.is_inference():
            return _spectrum(weight)
        if self._kept is None or self._kept[0].dtype != weight.dtype or not torch.equal(self._kept[0], weight):
            with torch.inference_mode(False), torch.no_grad():  # may meet autograd later, under a trained head
                self._kept = (weight.detach().clone(), _spectrum(weight))
        return self._kept[1]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_kept": None}  # copies and pickles need it not


def convolve(x: Tensor, *convs: SameConv1d) -> list[Tensor]:
    """Convolutions of one input that share what they can.

    Args:
        x: (B, N, C_in).
        convs: of the same kernel size.

    Returns:
        (B, N, C_out) for each.
    """
    taps = convs[0].kernel_size[0]
    if x.device.type != "cpu" or taps not in OUTPUTS_PER_TILE:
        return [_by_library(x, conv) for conv in convs]
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    if dtype in (torch.bfloat16, torch.float16):
        return [_by_products(x, conv.weight, conv.bias) for conv in convs]
    tiles = _transform(x, taps)
    return [_filtered(tiles, conv, x) for conv in convs]


def _by_library(x: Tensor, conv: SameConv1d) -> Tensor:
    """The library's convolution, as one over images of height 1 in channels-last format.

    (B, N, C) already is that format, so nothing is moved; its 1-D convolutions would copy input and output.
    """
    image = x.transpose(1, 2).unsqueeze(2)
    y = F.conv2d(image, conv.weight.unsqueeze(2), conv.bias, padding=(0, conv.kernel_size[0] // 2))
    return y.squeeze(2).transpose(1, 2)


def _by_products(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """One matrix product over all taps: the unfolded input (B, N, taps * in) by the kernel."""
    taps = weight.shape[2]
    half = taps // 2
    padded = F.pad(x, (0, 0, half, half))
    unfolded = torch.cat([padded[:, tap : tap + x.shape[1]] for tap in range(taps)], dim=2)
    return F.linear(unfolded, weight.permute(0, 2, 1).reshape(weight.shape[0], -1), bias)


def matrices(outputs: int, taps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Input, kernel and output transforms of F(outputs, taps), float64.

    With n = outputs + taps - 1 points: y = out @ ((kernel @ g) * (input @ d)) is the correlation of n inputs d with
    taps g. Rows of `kernel` and columns of `out` are powers of the points, the last is infinity; `input` follows
    from the identity.

    Returns:
        input (n, n), kernel (n, taps), out (outputs, n).
    """
    points = torch.tensor(POINTS[: outputs + taps - 2], dtype=torch.float64)
    count = len(points) + 1
    gaps = points[:, None] - points[None]
    scale = torch.where(gaps == 0, torch.ones_like(gaps), gaps).prod(dim=1)
    kernel = torch.zeros(count, taps, dtype=torch.float64)
    kernel[:-1] = points[:, None] ** torch.arange(taps) / scale[:, None]
    kernel[-1, -1] = 1
    out = torch.zeros(outputs, count, dtype=torch.float64)
    out[:, :-1] = (points[:, None] ** torch.arange(outputs)).T
    out[-1, -1] = 1
    products = torch.einsum("ik,kj->ijk", out, kernel).reshape(outputs * taps, count)
    shifts = torch.arange(outputs)[:, None] + torch.arange(taps)
    target = F.one_hot(shifts.reshape(-1), count).double()
    solved = torch.linalg.lstsq(products, target).solution
    return (solved * 64).round() / 64, kernel, out  # the true numbers are multiples of 1/4


TRANSFORMS = {taps: matrices(outputs, taps) for taps, outputs in OUTPUTS_PER_TILE.items()}


def _transform(x: Tensor, taps: int) -> Tensor:
    """(B, N, C) -> (points, B * tiles, C)."""
    step = OUTPUTS_PER_TILE[taps]
    length = x.shape[1]
    tiles = -(-length // step)
    window = step + taps - 1
    half = taps // 2
    padded = F.pad(x, (0, 0, half, step * tiles - length + half))
    cut = padded.unfold(1, window, step).permute(3, 0, 1, 2).reshape(window, -1)
    to_points = TRANSFORMS[taps][0].to(x.dtype)
    return (to_points @ cut).view(window, -1, x.shape[2])


def _spectrum(weight: Tensor) -> Tensor:
    """(out, in, taps) -> (points, in, out)."""
    taps = weight.shape[2]
    to_points = TRANSFORMS[taps][1].to(weight.dtype)
    transformed = to_points @ weight.permute(2, 1, 0).reshape(taps, -1)
    return transformed.view(-1, weight.shape[1], weight.shape[0])


def _filtered(tiles: Tensor, conv: SameConv1d, x: Tensor) -> Tensor:
    batch, length = x.shape[:2]
    taps = conv.kernel_size[0]
    step = OUTPUTS_PER_TILE[taps]
    products = torch.bmm(tiles, conv.spectrum())
    out = TRANSFORMS[taps][2].to(x.dtype) @ products.view(len(products), -1)
    y = out.view(step, batch, -1, conv.out_channels).permute(1, 2, 0, 3).reshape(batch, -1, conv.out_channels)
    y = y[:, :length]
    return y if conv.bias is None else y + conv.bias
