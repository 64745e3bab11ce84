"""Losses over several workers: the mean of what they compute is the loss and the gradient of the whole batch."""

import os

import pytest
import torch

from vnet_core.losses import build_loss
from vnet_core.plan import Plan

SAMPLES, CLASSES = 4, 3
SHARES = {"equal": (2, 2), "unequal": (1, 3)}


def all_cases():
    terms = ["dice", "linear-dice", "generalised-dice", "cross-entropy", "focal", "exponential-logarithmic"]
    for head in ("softmax", "sigmoid"):
        for over in ("batch", "sample"):
            for term in terms:
                yield head, over, {term: 1.0}
    yield "softmax", "batch", {"dice": 1.0, "cross-entropy": 1.0}


CASES = list(all_cases())


def loss_of(head, over, terms):
    loss = {"terms": terms, "dice_over": over, "class_weights": "square-root", "focal_alpha": 0.25}
    plan = {"labels": [{"value": v, "name": str(v)} for v in (1, 2)], "head": head, "ignore_label": 9}
    return build_loss(Plan.from_mapping({**plan, "training": {"loss": loss}}), [90, 8, 2])


def data(head):
    """Features of the whole batch, its classes (one in twenty ignored), and the weights of a linear network."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(SAMPLES, 2, 3, 4, 5, generator=generator, dtype=torch.float64)
    classes = torch.randint(0, CLASSES, (SAMPLES, 3, 4, 5), generator=generator)
    classes[0] = 0
    classes[1, :2] = CLASSES
    outputs = CLASSES if head == "softmax" else CLASSES - 1
    return features, classes, torch.randn(outputs, 2, generator=generator, dtype=torch.float64)


def one_step(network, features, classes, loss):
    """Loss and gradient of a batch whose coarse logits are half the resolution."""
    logits = network(features)
    value = loss((logits, network(features[..., ::2])), classes, 1.0)
    value.backward()
    return value.detach()


def linear(weights):
    network = torch.nn.Conv3d(2, len(weights), 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        network.weight.copy_(weights.view_as(network.weight))
    return network


def work(rank, store, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", store=torch.distributed.FileStore(store, 2), rank=rank, world_size=2)
    found = []
    for shares in SHARES.values():
        first = sum(shares[:rank])
        own = slice(first, first + shares[rank])
        for head, over, terms in CASES:
            features, classes, weights = data(head)
            network = torch.nn.parallel.DistributedDataParallel(linear(weights))
            value = one_step(network, features[own], classes[own], loss_of(head, over, terms))
            torch.distributed.all_reduce(value)
            found.append((value / 2, network.module.weight.grad.clone()))
    if rank == 0:
        torch.save(found, results)
    torch.distributed.barrier()
    # a thread of gloo that has not ended yet aborts the process when Python's own end tears it down
    os._exit(0)


@pytest.fixture(scope="module")
def of_two_workers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers")
    torch.multiprocessing.spawn(work, (str(folder / "store"), str(folder / "results.pt")), nprocs=2)
    found = iter(torch.load(folder / "results.pt"))
    return {(shares, str(case)): next(found) for shares in SHARES for case in CASES}


@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}-{'+'.join(case[2])}")
def test_two_workers_are_one(of_two_workers, case, shares):
    features, classes, weights = data(case[0])
    network = linear(weights)
    expected = one_step(network, features, classes, loss_of(*case))
    value, gradient = of_two_workers[shares, str(case)]
    assert float(value) == pytest.approx(float(expected), rel=1e-9)
    assert network.weight.grad.abs().max() > 1e-4
    assert torch.allclose(gradient, network.weight.grad, rtol=1e-9, atol=1e-12)
