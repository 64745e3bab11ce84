"""What a network is made of and what it costs: its layers with shapes, parameters, work and memory."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from vnet_core.geometry import Shape
from vnet_core.networks.layers import Doubled, Maximum, PReLU
from vnet_core.networks.layout import count_macs, padded, receptive_field
from vnet_core.networks.memory import predicted_peak_bytes, predicted_training_bytes
from vnet_core.networks.vnet import VNet, count_parameters
from vnet_core.sections import NetworkPlan

_KINDS: dict[type[nn.Module], str] = {
    nn.BatchNorm3d: "batch normalisation",
    PReLU: "PReLU",
    nn.ELU: "ELU",
    nn.ReLU: "ReLU",
    nn.LeakyReLU: "leaky ReLU",
    Maximum: "maximum 2^3",
}


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of a network, for a batch of one."""

    name: str
    """The stage, numbered from full resolution, and its part: `L2 convolution 1`."""
    kind: str
    shape: tuple[int, int, int, int]
    """Channels and grid (c, z, y, x) of what it gives out."""
    parameters: int
    macs: int
    """Multiply-accumulates; of convolutions only."""
    activation_bytes: int
    """Of what it gives out, in float32; 0 where it writes over what it is given."""


@dataclass(frozen=True, slots=True)
class Description:
    """A network for images of one size."""

    plan: NetworkPlan
    channels: int
    outputs: int
    shape: Shape
    """Voxels (z, y, x) of the image."""
    grid: Shape
    """Voxels that are computed: each axis of ``shape`` up to a multiple of ``plan.divisor``."""
    layers: tuple[Layer, ...]
    parameters: int
    receptive_field: tuple[int, ...]
    """Of the stages in order and of the logits; see :func:`vnet_core.networks.layout.receptive_field`."""
    macs: int
    inference_bytes: dict[str, int]
    """Predicted peak of one pass by the dtype of weights and values."""
    training_bytes: dict[str, int]
    """Predicted peak of a training step with one sample by the dtype of values."""

    def as_json(self) -> dict[str, Any]:
        """Plain data, with work in units of 10^9."""
        return {
            "network": self.plan.model_dump(mode="json"),
            "channels": self.channels,
            "classes": self.outputs,
            "input": list(self.shape),
            "grid": list(self.grid),
            "parameters": self.parameters,
            "receptive_field": list(self.receptive_field),
            "gmacs": self.macs / 1e9,
            "inference_bytes": self.inference_bytes,
            "training_bytes": self.training_bytes,
            "layers": [
                {
                    "name": layer.name,
                    "kind": layer.kind,
                    "shape": list(layer.shape),
                    "parameters": layer.parameters,
                    "macs": layer.macs,
                    "activation_bytes": layer.activation_bytes,
                }
                for layer in self.layers
            ],
        }


def describe(plan: NetworkPlan, channels: int, outputs: int, shape: Shape) -> Description:
    """The network of a plan for images of ``shape`` (z, y, x), without computing a value of it.

    ``channels`` of the image in, ``outputs`` out, background included where there is one.
    """
    with torch.device("meta"):
        network = VNet(plan, channels, outputs).eval()
        image = torch.empty(1, channels, *shape)
    return Description(
        plan=plan,
        channels=channels,
        outputs=outputs,
        shape=shape,
        grid=padded(shape, plan.divisor),
        layers=tuple(_layers(network, image)),
        parameters=count_parameters(network),
        receptive_field=tuple(receptive_field(plan, channels)),
        macs=count_macs(plan, channels, outputs, shape),
        inference_bytes={
            name: predicted_peak_bytes(plan, channels, outputs, shape, size) for name, size in _DTYPES.items()
        },
        training_bytes={
            name: predicted_training_bytes(plan, channels, outputs, shape, 1, size) for name, size in _DTYPES.items()
        },
    )


_DTYPES = {"bfloat16": 2, "float32": 4}
"""Bytes of a value."""


def _layers(network: VNet, image: Tensor) -> list[Layer]:
    """The layers in the order in which an image passes them; auxiliary outputs, which only training has, at the end."""
    rows: list[Layer] = []
    hooks = []
    for qualified, module in network.named_modules():
        if kind := _kind(module):
            name = _name(qualified, network.plan.levels)

            def note(
                module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, name: str = name, kind: str = kind
            ) -> None:
                rows.append(_layer(name, kind, module, tuple(inputs[0].shape), tuple(output.shape)))

            hooks.append(module.register_forward_hook(note))
    # the shapes are those of a pass on a device without values
    with torch.no_grad():
        network(image)
        if network.plan.deep_supervision == "auxiliary":
            z, y, x = image.shape[2:]
            grid = padded((z, y, x), network.plan.divisor)
            for level, coarse in enumerate(network.coarse, 1):
                assert isinstance(coarse, nn.Conv3d)
                coarse(image.new_empty(1, coarse.in_channels, *(n >> level for n in grid)))
    for hook in hooks:
        hook.remove()
    return rows


def _layer(name: str, kind: str, module: nn.Module, entering: tuple[int, ...], leaving: tuple[int, ...]) -> Layer:
    macs = 0
    if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
        steps = entering if isinstance(module, nn.ConvTranspose3d) else leaving
        macs = module.weight.numel() * prod(steps[2:])
    in_place = isinstance(module, PReLU | nn.ELU | nn.ReLU | nn.LeakyReLU)
    return Layer(
        name=name,
        kind=kind,
        shape=(leaving[1], leaving[2], leaving[3], leaving[4]),
        parameters=count_parameters(module),
        macs=macs,
        activation_bytes=0 if in_place else 4 * prod(leaving),
    )


def _kind(module: nn.Module) -> str:
    """In words; empty for what is no layer of its own."""
    match module:
        case nn.ConvTranspose3d():
            return f"transposed convolution {module.kernel_size[0]}^3"
        case nn.Conv3d():
            half = ", stride 2" if module.stride[0] == 2 else ""
            return f"convolution {module.kernel_size[0]}^3{half}"
        case nn.GroupNorm():
            each = module.num_groups == module.num_channels
            return "instance normalisation" if each else f"normalisation in {module.num_groups} groups"
        case Doubled():
            return f"{module.mode} interpolation"
        case _:
            return _KINDS.get(type(module), "")


def _name(qualified: str, levels: int) -> str:
    """From the name of a module to that of a layer: `encoder.1.convolutions.0` is `L2 convolution 1`."""
    part, _, rest = qualified.partition(".")
    if part in ("encoder", "decoder", "down", "up", "coarse"):
        number, _, rest = rest.partition(".")
        level = int(number)
        part = {
            "encoder": "bottom" if level == levels - 1 else f"L{level + 1}",
            "decoder": f"R{level + 1}",
            "down": f"down {level + 1}",
            "up": f"up {level + 1}",
            "coarse": f"output {level + 2}",
        }[part]
    words: list[str] = []
    for word in rest.split("."):
        if word.isdigit():
            if words:
                words.append(str(int(word) + 1))
        elif word:
            words.append({"last": "last activation"}.get(word, word.removesuffix("s")))
    return " ".join([part, *words])
