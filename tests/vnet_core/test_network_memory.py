"""Predicted memory of a pass and of a training step, against arithmetic and against measured peaks."""

import json
import subprocess
import sys

import pytest
import torch

from vnet_core.inference import processor_precision
from vnet_core.networks.memory import TRAINING_OVERHEAD_BYTES, predicted_peak_bytes, predicted_training_bytes
from vnet_core.sections import NetworkPlan

NATIVE = processor_precision(torch.device("cpu")) == torch.bfloat16
"""Where a processor only imitates bfloat16 it takes many times as long, and no plan asks for it."""
SMALL = {"kernel_size": 3, "width": 8, "convolutions": [1, 2, 2]}

MEASURE = """
import ctypes, json, sys
import torch
from torch import nn
from torch.nn import functional as F
from vnet_core.fitting import placed
from vnet_core.inference import prepare
from vnet_core.networks.memory import predicted_peak_bytes, predicted_training_bytes
from vnet_core.networks.vnet import build_vnet
from vnet_core.sections import NetworkPlan

def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

def loss_of(logits, truth):
    logarithms = F.log_softmax(logits.float(), 1)
    p, one_hot = logarithms.exp(), F.one_hot(truth, logits.shape[1]).movedim(-1, 1).float()
    overlap = 2 * (p * one_hot).sum((0, 2, 3, 4)) / ((p * p).sum((0, 2, 3, 4)) + one_hot.sum((0, 2, 3, 4)))
    return F.nll_loss(logarithms, truth) + 1 - overlap.mean()

def train(plan, channels, outputs, shape, batch, bfloat16):
    precision = torch.bfloat16 if bfloat16 else torch.float32
    network = placed(build_vnet(plan, channels, outputs), torch.device("cpu"), precision)
    average = {name: value.detach().clone() for name, value in network.state_dict().items()}
    optimiser = torch.optim.AdamW(network.parameters(), fused=True)
    images, truth = torch.randn(batch, channels, *shape), torch.randint(0, outputs, (batch, *shape))
    for _ in range(2):
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            given = network(images)
        told = given if isinstance(given, tuple) else (given,)
        loss = sum(loss_of(y, truth[:, :: 2**i, :: 2**i, :: 2**i]) for i, y in enumerate(told))
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        for name, value in network.state_dict().items():
            if value.is_floating_point():
                average[name].lerp_(value, 0.1)
        del given, told, loss

def infer(plan, channels, outputs, shape, batch, bfloat16):
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    network = prepare(build_vnet(plan, channels, outputs), torch.device("cpu"), dtype)
    with torch.inference_mode():
        logits = network(torch.randn(1, channels, *shape).to(dtype))
    torch.empty(logits.shape[1:]).copy_(logits[0])

torch.set_num_threads(2)
work = {"train": train, "infer": infer}
for case in json.loads(sys.argv[1]):
    plan, size = NetworkPlan.model_validate(case["network"]), 2 if case["bfloat16"] else 4
    given = (case.get("channels", 1), case.get("outputs", 2), tuple(case["shape"]))
    run = work[case["work"]]
    run(NetworkPlan(kernel_size=3, width=2, convolutions=(1, 1)), 1, 2, (8, 8, 8), 1, case["bfloat16"])
    ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    run(plan, *given, case.get("batch", 1), case["bfloat16"])
    peak = status("VmHWM") - before
    if case["work"] == "train":
        predicted = predicted_training_bytes(plan, *given, case.get("batch", 1), size)
    else:
        predicted = predicted_peak_bytes(plan, *given, size)
    print(json.dumps({"peak": peak / 2**20, "predicted": predicted / 2**20, "ratio": predicted / peak, **case}))
"""

NOISE = 1.05
"""What the allocator keeps differs by some per cent from run to run on a machine with other work."""


def measured(cases):
    """Peak of each case beside its prediction, in MiB, from a process of its own."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the peak of one call is read from /proc, which only Linux has")
    run = subprocess.run([sys.executable, "-c", MEASURE, json.dumps(cases)], capture_output=True, text=True, check=True)
    return [json.loads(line) for line in run.stdout.splitlines()]


def here(cases):
    """The cases that this processor computes in its own arithmetic."""
    return [case for case in cases if NATIVE or not case["bfloat16"]]


TRAININGS = [
    {"network": SMALL, "bfloat16": False},
    {"network": {**SMALL, "normalisation": "instance"}, "bfloat16": True, "batch": 2},
    {
        "network": {**SMALL, "normalisation": "instance", "activation": "leaky-relu", "decoder": "narrow"},
        "bfloat16": False,
        "batch": 2,
    },
    {"network": {**SMALL, "normalisation": "batch", "activation": "relu"}, "bfloat16": True, "batch": 2},
    {"network": {**SMALL, "normalisation": "batch", "residual": "activated", "dropout": 0.2}, "bfloat16": False},
    {
        "network": {**SMALL, "preset": "vnet-tf", "dropout": 0.2, "dropout_at": "activations"},
        "bfloat16": False,
        "channels": 2,
    },
    {"network": {**SMALL, "preset": "compact"}, "bfloat16": True, "outputs": 4, "batch": 2},
    {
        "network": {**SMALL, "preset": "compact", "deep_supervision": "auxiliary", "upsampling": "linear"},
        "bfloat16": False,
        "outputs": 6,
    },
]


@pytest.mark.slow
def test_measured_peak_of_a_training_step_is_within_the_prediction():
    for result in measured([{"work": "train", "shape": [96, 96, 96], **case} for case in here(TRAININGS)]):
        assert result["peak"] / NOISE <= result["predicted"] <= 1.7 * result["peak"], result


PASSES = [
    {"network": {**SMALL, "width": 16, "residual": "projected", "normalisation": "batch"}, "bfloat16": True},
    {"network": {**SMALL, "width": 16, "upsampling": "nearest", "downsampling": "maximum"}, "bfloat16": False},
    {"network": {**SMALL, "preset": "vnet-tf", "width": 16}, "bfloat16": False, "channels": 3},
    {"network": {**SMALL, "preset": "compact", "width": 24}, "bfloat16": True, "outputs": 20},
    {"network": {**SMALL, "width": 16, "head_kernel_size": 5, "residual": "activated"}, "bfloat16": False},
]


@pytest.mark.slow
def test_measured_peak_of_a_pass_is_within_the_prediction():
    for result in measured([{"work": "infer", "shape": [128, 128, 128], **case} for case in here(PASSES)]):
        assert result["peak"] / NOISE <= result["predicted"] <= 1.7 * result["peak"], result


def test_a_training_step_by_hand():
    """Two levels, width 4, kernel 3, PReLU, nothing else, in float32."""
    plan = NetworkPlan(kernel_size=3, width=4, convolutions=(1, 1))
    weights = 27 * 4 + 8 * 4 * 8 + 27 * 8 * 8 + 8 * 8 * 4 + 27 * 8 * 8 + 8 * 2
    # Kept at full resolution: the image twice, L1 before and after its PReLU (4 + 4), what came up before its PReLU
    # (4), up and skip together (8), R1 before and after (8 + 8), the logits (2). On the coarse grid two convolutions
    # before and after their PReLU: 4 times 8. The backward pass begins with four times R1.
    per_voxel = 2 + 8 + 4 + 8 + 16 + 2 + 4 * 8 / 8 + 4 * 8
    # Eight copies of the logits in the loss; five of the weights, and room for the largest twice.
    expected = 16**3 * 3 * (per_voxel + 8 * 2) * 4 + (weights * 5 + 2 * 27 * 8 * 8) * 4
    assert predicted_training_bytes(plan, 1, 2, (16, 16, 16), 3, 4) - TRAINING_OVERHEAD_BYTES == expected


@pytest.mark.parametrize(
    "change",
    [
        {"normalisation": "batch"},
        {"residual": "projected"},
        {"residual": "activated"},
        {"dropout": 0.5},
        {"dropout": 0.5, "dropout_at": "activations"},
        {"deep_supervision": "auxiliary"},
        {"deep_supervision": "aggregate"},
        {"entry": "expanded"},
        {"upsampling": "nearest"},
    ],
)
def test_every_setting_that_keeps_more_is_counted(change):
    plan = NetworkPlan.model_validate(SMALL)
    more = NetworkPlan.model_validate({**SMALL, **change})
    of = (1, 2, (32, 32, 32), 2, 2)
    assert predicted_training_bytes(more, *of) > predicted_training_bytes(plan, *of)


def test_an_activation_in_place_keeps_less_than_prelu():
    plan = NetworkPlan.model_validate(SMALL)
    relu = plan.model_copy(update={"activation": "relu"})
    assert predicted_training_bytes(relu, 1, 2, (32, 32, 32), 2, 2) < predicted_training_bytes(
        plan, 1, 2, (32, 32, 32), 2, 2
    )


def test_a_pass_with_deep_supervision():
    plan = NetworkPlan.model_validate(SMALL)
    auxiliary = plan.model_copy(update={"deep_supervision": "auxiliary"})
    aggregate = plan.model_copy(update={"deep_supervision": "aggregate"})
    of = (1, 30, (32, 32, 32), 2)
    # auxiliary outputs are not computed in evaluation, only their weights are there: 30 of the 32 channels of R2
    assert predicted_peak_bytes(auxiliary, *of) - predicted_peak_bytes(plan, *of) == 30 * 32 * 2
    assert predicted_peak_bytes(aggregate, *of) > predicted_peak_bytes(auxiliary, *of)
