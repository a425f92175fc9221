"""Convolution by minimal filtering and by products: the same numbers and gradients as the library's."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ttmray.models.conv import OUTPUTS_PER_TILE, SameConv1d, convolve, matrices


def library(conv: SameConv1d, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.Conv1d.forward(conv, x.transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize("taps", OUTPUTS_PER_TILE)
def test_the_transforms_compute_a_correlation_exactly(taps):
    outputs = OUTPUTS_PER_TILE[taps]
    to_points, kernel, out = matrices(outputs, taps)
    d, g = torch.randn(outputs + taps - 1, dtype=torch.float64), torch.randn(taps, dtype=torch.float64)
    y = out @ ((kernel @ g) * (to_points @ d))
    torch.testing.assert_close(y, d.unfold(0, taps, 1) @ g, rtol=0, atol=1e-12)
    assert ((to_points * 4).round() == to_points * 4).all(), "rounded to its true values"


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([1, 3, 5, 7]),
    st.integers(1, 3),
    st.integers(1, 23),
    st.integers(1, 5),
    st.integers(1, 5),
    st.booleans(),
)
def test_any_shape_equals_the_library_in_float64(taps, batch, length, channels, out_channels, bias):
    conv = SameConv1d(channels, out_channels, taps, bias=bias).double()
    x = torch.randn(batch, length, channels, dtype=torch.float64)
    torch.testing.assert_close(conv(x), library(conv, x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("taps", [3, 7])
def test_rounding_in_float32_is_a_few_millionths_of_the_output(taps):
    torch.manual_seed(0)
    conv = SameConv1d(448, 64, taps)
    x = torch.randn(2, 430, 448)
    with torch.no_grad():
        fast = conv(x)
        exact = library(conv.double(), x.double())
    rms = exact.square().mean().sqrt()
    assert (fast - exact).square().mean().sqrt() < 3e-6 * rms
    assert (fast - exact).abs().max() < 3e-5 * rms


def test_gradients_are_those_of_the_library():
    conv = SameConv1d(3, 4, 3).double()
    x = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)
    gradients = []
    for forward in (conv, lambda x: library(conv, x)):
        gradients.append(torch.autograd.grad(forward(x).sin().sum(), [x, *conv.parameters()]))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_convolutions_of_one_input_share_its_transform_and_change_nothing():
    a, b = SameConv1d(8, 5, 3), SameConv1d(8, 7, 3)
    x = torch.randn(2, 10, 8)
    together = convolve(x, a, b)
    assert torch.equal(together[0], a(x))
    assert torch.equal(together[1], b(x))


def test_low_precision_goes_by_products_and_agrees_within_its_rounding():
    conv, x = SameConv1d(32, 16, 3), torch.randn(2, 20, 32)
    reference = library(conv, x)
    with torch.autocast("cpu", torch.bfloat16):
        low = conv(x)
    assert low.dtype == torch.bfloat16
    assert (low - reference).abs().max() < 0.05
    torch.testing.assert_close(conv.bfloat16()(x.bfloat16()), low)


def through_data_in_place(conv):
    conv.weight.data.mul_(2)


def through_data_one_number(conv):
    conv.weight.data[1, 2, 0] += 1


def through_new_data(conv):
    conv.weight.data = conv.weight.data + 1


def through_shared_memory(conv):
    conv.weight.detach().numpy()[:] = 0


def in_place(conv):
    conv.weight.mul_(2)


def by_loading(conv):
    conv.load_state_dict({"weight": torch.zeros_like(conv.weight), "bias": conv.bias})


def by_another_parameter(conv):
    conv.weight = torch.nn.Parameter(torch.ones_like(conv.weight), requires_grad=False)


def by_another_type(conv):
    conv.double()


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        through_data_in_place,
        through_data_one_number,
        through_new_data,
        through_shared_memory,
        in_place,
        by_loading,
        by_another_parameter,
        by_another_type,
    ],
)
def test_the_kept_kernel_of_a_frozen_weight_follows_every_change(change, inference):
    conv, x = SameConv1d(4, 4, 3).requires_grad_(False), torch.randn(1, 8, 4)
    with torch.inference_mode(inference):
        before = conv(x)
        torch.testing.assert_close(conv(x), before, rtol=0, atol=0)
    change(conv)
    x = x.to(conv.weight.dtype)
    with torch.inference_mode(inference):
        after = conv(x)
        torch.testing.assert_close(after, library(conv, x))
    assert after.dtype != before.dtype or not torch.equal(after, before)


def test_a_copy_has_a_kernel_of_its_own():
    conv, x = SameConv1d(4, 4, 3).requires_grad_(False), torch.randn(1, 8, 4)
    conv(x)
    other = copy.deepcopy(conv)
    other.weight.data.zero_()
    torch.testing.assert_close(other(x), library(other, x))
    torch.testing.assert_close(conv(x), library(conv, x))


@pytest.mark.parametrize("fused", [False, True])
def test_a_weight_in_training_is_never_stale_without_gradients(fused):
    conv, x = SameConv1d(4, 4, 3), torch.randn(1, 8, 4)
    optimiser = torch.optim.AdamW(conv.parameters(), lr=0.1, fused=fused)
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(conv(x), library(conv, x))
        conv(x).sum().backward()
        optimiser.step()
    with torch.no_grad():
        torch.testing.assert_close(conv(x), library(conv, x))


def test_the_library_moves_neither_input_nor_output(monkeypatch):
    """As on GPUs: images of height 1 in channels-last format, which is what a sequence is."""
    formats = []
    conv2d = torch.nn.functional.conv2d

    def watched(x, *rest, **more):
        y = conv2d(x, *rest, **more)
        formats.append((x.is_contiguous(memory_format=torch.channels_last), y.shape[2]))
        return y

    monkeypatch.setattr(torch.nn.functional, "conv2d", watched)
    conv, x = SameConv1d(8, 4, 5), torch.randn(2, 9, 8)
    torch.testing.assert_close(conv(x), library(conv, x))
    assert formats == [(True, 1)]


def test_a_frozen_trunk_that_was_used_for_inference_can_still_be_trained_through():
    conv = SameConv1d(3, 4, 3).requires_grad_(False)
    x = torch.randn(1, 9, 3)
    with torch.inference_mode():
        conv(x)
    x.requires_grad_(True)
    conv(x).sum().backward()
    assert x.grad is not None
