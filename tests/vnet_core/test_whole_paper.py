"""The published network on the published image at its full width, in float64, against plain sums over taps.

Takes minutes: `pytest -m slow tests/vnet_core/test_whole_paper.py`. torch writes the input of a float64
convolution out once per tap, 34 GB on this image, so both sides go through the image a few slices at a time.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F

from tests.vnet_core.test_presets import Reference, away_from_the_start, image
from vnet_core.networks.vnet import build_vnet
from vnet_core.sections import PRESETS, NetworkPlan

SLICES = 4
"""Slices of the result that torch's convolution makes at once."""


def convolution_in_slabs(whole):
    """torch's own convolution on a few slices at a time; strides and small kernels pass."""

    def convolve(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        reach = weight.shape[-1] // 2
        if weight.shape[-1] < 5:
            return whole(x, weight, bias, stride, padding, dilation, groups)
        padded = F.pad(x, (reach,) * 6)
        slabs = [padded[:, :, z : z + SLICES + 2 * reach] for z in range(0, x.shape[2], SLICES)]
        return torch.cat([whole(slab, weight, bias) for slab in slabs], 2)

    return convolve


class SumOverTaps(torch.autograd.Function):
    """One matrix product per tap of the kernel and slice of the image, forward and backward, for a batch of one."""

    @staticmethod
    def taps(x, weight):
        edge = weight.shape[-1]
        z, y, x = (n - edge + 1 for n in x.shape[1:])
        for i, j, k in itertools.product(range(edge), repeat=3):
            for plane in range(z):
                yield (i, j, k), plane, (slice(None), plane + i, slice(j, j + y), slice(k, k + x))

    @staticmethod
    def forward(context, x, weight):
        padded = F.pad(x, (weight.shape[-1] // 2,) * 6)[0]
        context.save_for_backward(padded, weight)
        result = x.new_zeros(weight.shape[0], *x.shape[2:])
        for (i, j, k), plane, window in SumOverTaps.taps(padded, weight):
            result[:, plane] += torch.tensordot(weight[:, :, i, j, k], padded[window], 1)
        return result[None]

    @staticmethod
    def backward(context, gradient):
        padded, weight = context.saved_tensors
        gradient, for_padded, for_weight = gradient[0], torch.zeros_like(padded), torch.zeros_like(weight)
        for (i, j, k), plane, window in SumOverTaps.taps(padded, weight):
            here = gradient[:, plane].flatten(1)
            for_padded[window] += torch.tensordot(weight[:, :, i, j, k].T, gradient[:, plane], 1)
            for_weight[:, :, i, j, k] += here @ padded[window].flatten(1).T
        inner = slice(weight.shape[-1] // 2, -(weight.shape[-1] // 2) or None)
        return for_padded[None, :, inner, inner, inner], for_weight


class Plain(Reference):
    """Convolutions as sums over the taps of the kernel."""

    def convolve(self, name, x):
        bias = self.weights[f"{name}.bias"].view(1, -1, 1, 1, 1)
        return SumOverTaps.apply(x, self.weights[f"{name}.weight"]) + bias


def agreement(network, x, monkeypatch):
    """Largest relative difference of the outputs and of the gradients of their mean square."""
    weights = dict(network.named_parameters())

    def output_and_gradients(function):
        output = function(x)
        return output.detach(), torch.autograd.grad(output.square().mean(), list(weights.values()))

    plain = Plain(network)
    plain.weights = weights
    expected, expected_gradients = output_and_gradients(plain)
    monkeypatch.setattr(F, "conv3d", convolution_in_slabs(F.conv3d))
    found, found_gradients = output_and_gradients(network)
    pairs = [(found, expected), *zip(found_gradients, expected_gradients, strict=True)]
    return [float((a - b).abs().max() / max(1.0, float(b.abs().max()))) for a, b in pairs]


def test_slabs_and_taps_are_the_convolution(monkeypatch):
    network = away_from_the_start(build_vnet(NetworkPlan(width=2, convolutions=(1, 2)), 1, 2)).double()
    x = image(1, 1, 8, 8, 8).double()
    direct = network(x).detach()
    assert max(agreement(network, x, monkeypatch)) < 1e-10
    assert torch.allclose(network(x), direct, rtol=0, atol=1e-10)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_published_network_on_the_published_image(monkeypatch):
    network = away_from_the_start(build_vnet(NetworkPlan(**PRESETS["paper"]), 1, 2)).double()
    differences = agreement(network, image(1, 1, 64, 128, 128).double(), monkeypatch)
    assert max(differences) < 1e-10, differences
