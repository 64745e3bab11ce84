"""Losses: golden values, gradients, and absent classes."""

import pytest
import torch

from vnet_core.losses import SMOOTHING, dice_cross_entropy_loss, loss_function, soft_dice_loss

LOSSES = [soft_dice_loss, dice_cross_entropy_loss]

P = torch.tensor([0.9, 0.8, 0.2, 0.1], dtype=torch.float64)
G = torch.tensor([1, 1, 0, 0])


def two_classes(probability):
    """Logits (1, 2, 1, 1, N) whose softmax gives class 1 these probabilities."""
    return torch.stack([torch.zeros_like(probability), torch.logit(probability)])[None, :, None, None]


def flat(labels):
    return torch.as_tensor(labels)[None, None, None]


def test_golden_dice():
    loss = soft_dice_loss(two_classes(P), flat(G))
    assert float(loss) == pytest.approx(1 - (3.4 + SMOOTHING) / (3.5 + SMOOTHING), abs=1e-12)
    assert float(loss) == pytest.approx(1 - 0.9714285714, abs=1e-6)


def test_golden_gradient():
    logits = two_classes(P).requires_grad_()
    soft_dice_loss(logits, flat(G)).backward()
    # dD/dp of the squared Dice; by the chain rule through the softmax dD/dz = dD/dp * p (1 - p), and the loss is 1 - D.
    by_probability = torch.tensor([0.071837, 0.127347, -0.11102, -0.05551], dtype=torch.float64)
    assert torch.allclose(logits.grad[0, 1, 0, 0], -by_probability * P * (1 - P), atol=1e-6)
    assert torch.allclose(logits.grad[0, 0, 0, 0], by_probability * P * (1 - P), atol=1e-6)


def test_golden_cross_entropy():
    both = dice_cross_entropy_loss(two_classes(P), flat(G))
    assert float(both - soft_dice_loss(two_classes(P), flat(G))) == pytest.approx(0.164252033, abs=1e-9)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("labels", ["all classes", "class 2 absent", "background only"])
def test_gradient_is_right(loss, labels):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 1, 2, 3, generator=generator, dtype=torch.float64).requires_grad_()
    highest = {"all classes": 3, "class 2 absent": 2, "background only": 1}[labels]
    target = torch.randint(0, highest, (2, 1, 2, 3), generator=generator)
    assert torch.autograd.gradcheck(lambda x: loss(x, target), logits)


def sure(labels, classes, confidence=1e4):
    """Logits (1, K, 1, 1, N) that name these labels beyond doubt."""
    one_hot = torch.nn.functional.one_hot(torch.tensor(labels), classes).T.float()
    return ((2 * one_hot - 1) * confidence)[None, :, None, None]


@pytest.mark.parametrize(
    ("predicted", "truth", "expected"),
    [
        ([0, 0, 1, 1], [0, 0, 1, 1], 0.0),
        ([1, 1, 0, 0], [0, 0, 1, 1], 1.0),
        ([0, 1, 1, 0], [0, 0, 1, 1], 0.5),
        ([0, 0, 0, 0], [0, 0, 0, 0], 0.0),
        ([0, 0, 0, 0], [0, 0, 0, 1], 1.0),
        ([0, 0, 0, 1], [0, 0, 0, 0], 1.0),
        ([1, 1, 1, 1], [1, 1, 1, 1], 0.0),
    ],
)
def test_sure_answers_by_hand(predicted, truth, expected):
    assert float(soft_dice_loss(sure(predicted, 2), flat(truth))) == pytest.approx(expected, abs=2e-5)


def test_background_does_not_count_and_classes_do_equally():
    # Class 1 is right, class 2 missed, class 3 absent from both sides: (0 + 1 + 0) / 3.
    loss = soft_dice_loss(sure([0, 1, 0], 4), flat([0, 1, 2]))
    assert float(loss) == pytest.approx(1 / 3, abs=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_ranks_average_to_the_batch(loss):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, 3, 3, 3, generator=generator)
    target = torch.randint(0, 3, (4, 3, 3, 3), generator=generator)
    target[0] = 0
    halves = (loss(logits[:2], target[:2]) + loss(logits[2:], target[2:])) / 2
    assert float(loss(logits, target)) == pytest.approx(float(halves), rel=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("confidence", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_always_finite_and_bounded(loss, confidence, dtype):
    for predicted in ([0] * 8, [1] * 8, [0, 1, 2] * 2 + [0, 0]):
        for truth in ([0] * 8, [2] * 8, [1, 0, 2, 0, 0, 0, 0, 0]):
            logits = sure(predicted, 3, confidence).to(dtype).requires_grad_()
            value = loss(logits, flat(truth))
            value.backward()
            assert value.dtype == torch.float32
            assert value >= 0
            assert value.isfinite()
            assert logits.grad.isfinite().all()
            if loss is soft_dice_loss:
                assert value <= 1


@pytest.mark.parametrize("probability", [1e-8, 1e-4, 1.8e-3, 1e-2, 0.5, 0.999])
@pytest.mark.parametrize("voxels", [1, 1000])
def test_gradient_of_an_absent_class_is_bounded(probability, voxels):
    logits = two_classes(torch.full((voxels,), probability, dtype=torch.float64)).requires_grad_()
    soft_dice_loss(logits, torch.zeros(1, 1, 1, voxels, dtype=torch.int64)).backward()
    assert float(logits.grad[0, 1].abs().sum()) <= 0.5
    assert (logits.grad[0, 1] >= 0).all()


def test_half_precision_sums_do_not_overflow():
    logits = torch.zeros(1, 2, 64, 64, 64, dtype=torch.float16)
    logits[:, 1] = 8.0
    target = torch.ones(1, 64, 64, 64, dtype=torch.int64)
    assert float(soft_dice_loss(logits, target)) == pytest.approx(0.0, abs=1e-3)


def test_memory_layout_does_not_matter():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, 6, generator=generator)
    target = torch.randint(0, 3, (2, 4, 5, 6), generator=generator)
    last = logits.to(memory_format=torch.channels_last_3d)
    assert float(soft_dice_loss(last, target)) == pytest.approx(float(soft_dice_loss(logits, target)), rel=1e-6)


def test_names():
    assert loss_function("dice") is soft_dice_loss
    assert loss_function("dice+cross-entropy") is dice_cross_entropy_loss
