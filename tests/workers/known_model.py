"""A network whose answer is known without training, and scans for which it gives a mask that is known beforehand.

Grey values of 500 are the first label, of 1000 the second, what is between 0 and 200 is background. The network is a
V-Net of the family: its convolutions are zero, so that every stage passes on what enters, and its head weighs the
image that came through the skip.
"""

from functools import cache

import numpy as np
import torch
from torch import nn

from vnet_core.decide import decision
from vnet_core.geometry import Geometry, to_canonical
from vnet_core.inference import predict_logits, prepare
from vnet_core.networks.vnet import VNet, build_vnet
from vnet_core.plan import Label, Plan
from vnet_core.preprocess import prepare as preprocessed
from vnet_core.preprocess import restore
from vnet_core.sections import InferencePlan, NetworkPlan, PreprocessPlan, TrainingPlan
from vnet_core.volume import Volume

LABELS = (Label(value=2, name="grey"), Label(value=7, name="white"))
GREY = {2: 500, 7: 1000}
SHARPNESS = 40.0


def known_plan(spacing_mm: tuple[float, float, float], crop: bool = True, **inference: object) -> Plan:
    """Grey values from 0 to 1000 become -1 to 1; two levels, one channel."""
    return Plan(
        labels=LABELS,
        preprocess=PreprocessPlan(
            spacing_mm=spacing_mm, intensity="window", window=(0.0, 1000.0), crop_foreground=crop
        ),
        network=NetworkPlan(kernel_size=3, width=1, convolutions=(1, 1)),
        training=TrainingPlan(patch_size=(8, 8, 8)),
        inference=InferencePlan(precision="float32", **inference),
    )


def known_network(plan: Plan) -> VNet:
    """Logits of an image x: sharpness * (0, x + 1/2, 2 x), so the labels begin at grey values of 250 and 750."""
    return _known(plan.network)


def _known(plan: NetworkPlan) -> VNet:
    network = build_vnet(plan, 1, 1 + len(LABELS))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        for module in network.modules():
            if isinstance(module, nn.PReLU):
                module.weight.fill_(1.0)  # the identity
        network.head.convolution.weight[:, -1, 0, 0, 0] = SHARPNESS * torch.tensor([0.0, 1.0, 2.0])
        network.head.convolution.bias[:] = SHARPNESS * torch.tensor([0.0, 0.5, 0.0])
    return network


@cache
def _prepared(plan: NetworkPlan) -> VNet:
    """Made once, since hundreds of scans are segmented by the same one."""
    return prepare(_known(plan), torch.device("cpu"), torch.float32)


def scan_of(mask: np.ndarray, seed: int = 0, noise: int = 200) -> np.ndarray:
    """Grey values, int16, of a scan in which the network finds ``mask``, an array of 0, 2 and 7 of any shape."""
    values = np.random.default_rng(seed).integers(0, noise + 1, mask.shape).astype(np.int16)
    for label, grey in GREY.items():
        values[mask == label] = grey
    return values


def segmented(scan: Volume, plan: Plan) -> np.ndarray:
    """Label values (Z, Y, X), uint8, on the scan's own grid, by the program's own way there and back."""
    prepared = preprocessed(scan, None, plan.preprocess)
    logits = predict_logits(_prepared(plan.network), torch.from_numpy(prepared.image), plan)
    classes = restore(logits, prepared.geometry, scan.geometry, decision(plan))
    return np.array([0, 2, 7], np.uint8)[classes]


def own_spacing(geometry: Geometry) -> tuple[float, float, float]:
    """The scan's spacing along the network's axes, for which preprocessing moves no voxel."""
    return to_canonical(geometry)[1].spacing_mm
