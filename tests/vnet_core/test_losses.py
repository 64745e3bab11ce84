"""Losses: golden values, gradients, the extremes, weights, regions, ignored voxels, coarser grids and the warm-up."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vnet_core.agreement import class_agreement, region_agreement
from vnet_core.errors import ConfigError
from vnet_core.losses import (
    build_loss,
    class_weights,
    cross_entropy_loss,
    exponential_cross_entropy_loss,
    focal_loss,
    focal_weights,
    generalised_dice_loss,
    linear_dice_loss,
    logarithmic_dice_loss,
    soft_dice_loss,
    wong_weights,
)
from vnet_core.plan import Plan
from vnet_core.sections import LossPlan

TERMS = ["dice", "linear-dice", "generalised-dice", "cross-entropy", "focal", "exponential-logarithmic"]
BOUNDED = TERMS[:3]
NO_SMOOTHING = 1e-12

P = torch.tensor([0.9, 0.8, 0.2, 0.1], dtype=torch.float64)
G = torch.tensor([1, 1, 0, 0])
RARE_P = torch.tensor([0.7, 0.4, 0.1, 0.05, 0.05, 0.02, 0.02, 0.01], dtype=torch.float64)
RARE_G = torch.tensor([1, 0, 0, 0, 0, 0, 0, 0])


def two_classes(probability):
    """Logits (1, 2, N) whose softmax gives class 1 these probabilities."""
    return torch.stack([torch.zeros_like(probability), torch.logit(probability)])[None]


def agree(probability, truth):
    return class_agreement(two_classes(probability), truth[None])


def pooled(probability, truth):
    return agree(probability, truth).sums.over_batch()


def planned(terms, labels=2, head="softmax", regions=(), ignore_label=None, voxels=None, **loss):
    """The loss of a plan with labels 1 .. ``labels``."""
    plan = Plan.from_mapping(
        {
            "labels": [{"value": value, "name": f"label {value}"} for value in range(1, labels + 1)],
            "head": head,
            "regions": regions,
            "ignore_label": ignore_label,
            "training": {"loss": {"terms": dict.fromkeys([terms], 1.0) if isinstance(terms, str) else terms, **loss}},
        }
    )
    return build_loss(plan, voxels or [90, *[5] * labels])


def batch(classes=3, samples=2, shape=(3, 4, 5), seed=0, dtype=torch.float64, highest=None):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(samples, classes, *shape, generator=generator, dtype=dtype)
    return logits, torch.randint(0, highest or classes, (samples, *shape), generator=generator)


def sure(labels, classes, confidence=1e4):
    """Logits (1, K, 1, 1, N) that name these labels beyond doubt."""
    one_hot = torch.nn.functional.one_hot(torch.tensor(labels), classes).T.float()
    return ((2 * one_hot - 1) * confidence)[None, :, None, None]


def flat(labels):
    return torch.as_tensor(labels)[None, None, None]


# --- golden values


def test_golden_dice():
    assert float(soft_dice_loss(pooled(P, G), NO_SMOOTHING)) == pytest.approx(1 - 0.9714285714, abs=1e-10)
    assert float(linear_dice_loss(pooled(P, G), NO_SMOOTHING)) == pytest.approx(1 - 0.85, abs=1e-10)


def test_golden_dice_with_smoothing():
    assert float(soft_dice_loss(pooled(P, G), 1.0)) == pytest.approx(1 - (3.4 + 1) / (3.5 + 1), abs=1e-12)
    assert float(linear_dice_loss(pooled(P, G), 1.0)) == pytest.approx(1 - (3.4 + 1) / (4 + 1), abs=1e-12)


def test_golden_gradient_of_dice():
    logits = two_classes(P).requires_grad_()
    soft_dice_loss(class_agreement(logits, G[None]).sums.over_batch(), NO_SMOOTHING).backward()
    # dD/dp of the squared Dice; by the chain rule through the softmax dD/dz = dD/dp * p (1 - p), and the loss is 1 - D.
    by_probability = torch.tensor([0.071837, 0.127347, -0.11102, -0.05551], dtype=torch.float64)
    assert torch.allclose(logits.grad[0, 1], -by_probability * P * (1 - P), atol=1e-6)
    assert torch.allclose(logits.grad[0, 0], by_probability * P * (1 - P), atol=1e-6)


def test_golden_cross_entropy():
    agreement, weights = agree(P, G), torch.tensor([[1.0, 3.0]])
    assert float(cross_entropy_loss(agreement)) == pytest.approx(0.164252033, abs=1e-9)
    assert float(cross_entropy_loss(agreement, weights)) == pytest.approx(0.164252033, abs=1e-9)
    assert float(cross_entropy_loss(agreement, weights, "voxels")) == pytest.approx(0.328504067, abs=1e-9)


def test_golden_focal():
    agreement = agree(P, G)
    assert float(focal_loss(agreement, 2.0)) == pytest.approx(0.00498967, abs=1e-8)
    assert float(focal_loss(agreement, 2.0, torch.tensor([[0.75, 0.25]]))) == pytest.approx(0.00249484, abs=1e-8)


def test_golden_generalised_dice():
    assert float(generalised_dice_loss(pooled(P, G), NO_SMOOTHING)) == pytest.approx(0.15, abs=1e-10)
    assert float(generalised_dice_loss(pooled(RARE_P, RARE_G), NO_SMOOTHING)) == pytest.approx(0.36878882, abs=1e-8)


@pytest.mark.parametrize(
    ("probability", "truth", "dice", "cross", "whole"),
    [
        (P, G, 0.539502266, 0.810867593, 0.593775331),
        (RARE_P, RARE_G, 0.581931795, 0.662926747, 0.598130785),
    ],
)
def test_golden_exponential_logarithmic(probability, truth, dice, cross, whole):
    voxels = [int((truth == 0).sum()), int(truth.sum())]
    agreement = agree(probability, truth)
    assert float(logarithmic_dice_loss(agreement.sums.over_batch())) == pytest.approx(dice, abs=1e-9)
    weights = wong_weights(voxels)[None]
    assert float(exponential_cross_entropy_loss(agreement, weights)) == pytest.approx(cross, abs=1e-9)
    loss = planned("exponential-logarithmic", labels=1, voxels=voxels)
    logits = two_classes(probability)[..., None, None]
    assert float(loss(logits, truth[None, :, None, None], 1.0)) == pytest.approx(whole, abs=1e-9)


def test_golden_wong_weights():
    assert wong_weights([7, 1]).tolist() == pytest.approx([1.06904497, 2.82842712], abs=1e-8)
    assert wong_weights([9, 0]).tolist() == pytest.approx([math.sqrt(10 / 9), math.sqrt(10)])


# --- gradients


@pytest.mark.parametrize("dice_over", ["batch", "sample"])
@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
@pytest.mark.parametrize("highest", [3, 2, 1], ids=["all classes", "class 2 absent", "background only"])
@pytest.mark.parametrize("term", TERMS)
def test_gradient_is_that_of_the_value(term, highest, head, dice_over):
    logits, classes = batch(3 if head == "softmax" else 2, shape=(1, 2, 3), highest=highest)
    classes[0, 0, 0, 0] = 3
    loss = planned(term, head=head, ignore_label=9, dice_over=dice_over, class_weights="square-root", focal_gamma=1.5)
    assert torch.autograd.gradcheck(lambda x: loss(x, classes, 1.0), logits.requires_grad_())


def by_probability(loss, p):
    p = p.clone().requires_grad_()
    loss(agree(p, G)).backward()
    return p.grad


def test_analytic_gradients_of_dice():
    s, i = 0.5, float((P * G).sum())
    u = float((P**2).sum() + G.sum())
    got = by_probability(lambda a: soft_dice_loss(a.sums.over_batch(), s), P)
    assert torch.allclose(got, -(2 * G * (u + s) - 2 * P * (2 * i + s)) / (u + s) ** 2, atol=1e-12)
    u = float(P.sum() + G.sum())
    got = by_probability(lambda a: linear_dice_loss(a.sums.over_batch(), s), P)
    assert torch.allclose(got, -(2 * G.double() * (u + s) - (2 * i + s)) / (u + s) ** 2, atol=1e-12)


def test_analytic_gradient_of_generalised_dice():
    g, n = RARE_G, len(RARE_G)
    p = RARE_P.clone().requires_grad_()
    generalised_dice_loss(agree(p, g).sums.over_batch(), NO_SMOOTHING).backward()
    w1, w2 = 1.0, 1 / 49
    size, overlap = (RARE_P + g).sum(), (RARE_P * g).sum()
    expected = (w1**2 - w2**2) * (overlap - g * size) + n * w2 * (w1 + w2) * (1 - 2 * g)
    assert torch.allclose(p.grad, 2 * expected / ((w1 - w2) * size + 2 * n * w2) ** 2, atol=1e-10)


def test_analytic_gradients_of_cross_entropy_and_focal():
    logits = two_classes(P).requires_grad_()
    cross_entropy_loss(class_agreement(logits, G[None])).backward()
    assert torch.allclose(logits.grad[0, 1], (P - G) / 4, atol=1e-12)
    logits = two_classes(P).requires_grad_()
    focal_loss(class_agreement(logits, G[None]), 2.0).backward()
    assert torch.allclose(logits.grad[0, 1, :2], ((1 - P) ** 2 * (2 * P * P.log() + P - 1) / 4)[:2], atol=1e-12)


def test_analytic_gradient_of_the_exponential_cross_entropy():
    got = by_probability(lambda a: exponential_cross_entropy_loss(a, torch.ones(1, 2)), P)
    true, sign = torch.where(G == 1, P, 1 - P), torch.where(G == 1, 1, -1)
    assert torch.allclose(got, sign * -0.3 * (-true.log()) ** -0.7 / true / 4, atol=1e-12)


@pytest.mark.parametrize("probability", [1e-8, 1e-4, 1.8e-3, 1e-2, 0.5, 0.999])
@pytest.mark.parametrize("voxels", [1, 1000])
def test_gradient_of_an_absent_class_is_bounded(probability, voxels):
    logits = two_classes(torch.full((voxels,), probability, dtype=torch.float64)).requires_grad_()
    absent = torch.zeros(1, voxels, dtype=torch.int64)
    soft_dice_loss(class_agreement(logits, absent).sums.over_batch(), 1e-5).backward()
    assert float(logits.grad[0, 1].abs().sum()) <= 0.5
    assert (logits.grad[0, 1] >= 0).all()


def test_one_step_down_the_gradient_raises_dice():
    """The loss falls while the overlap rises, and it is soft: far from the threshold it has a gradient all the same."""
    logits, classes = batch(highest=3)
    for term in TERMS:
        loss, x = planned(term), (logits * 0.01).requires_grad_()
        before = loss(x, classes, 1.0)
        before.backward()
        assert x.grad.abs().min() > 0
        assert loss((x - 0.1 * x.grad / x.grad.abs().max()).detach(), classes, 1.0) < before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_default_is_what_it_says_written_plainly(dtype):
    logits, classes = batch(dtype=dtype)
    x, y = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    planned({"dice": 1.0, "cross-entropy": 1.0})(x, classes, 1.0).backward()
    p = y.float().softmax(1)[:, 1:]
    g = torch.nn.functional.one_hot(classes, 3).movedim(-1, 1)[:, 1:].float()
    over = (0, 2, 3, 4)
    dice = (2 * (p * g).sum(over) + 1e-5) / ((p**2).sum(over) + (g**2).sum(over) + 1e-5)
    (1 - dice.mean() + torch.nn.functional.cross_entropy(y.float(), classes)).backward()
    # the last digit of bfloat16 is 2^-8 of the value
    assert torch.allclose(x.grad, y.grad, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-8)


def test_focal_without_gamma_is_cross_entropy():
    logits, classes = batch()
    focal = planned("focal", focal_gamma=0.0)(logits, classes, 1.0)
    assert float(focal) == pytest.approx(float(planned("cross-entropy")(logits, classes, 1.0)), rel=1e-12)


# --- extremes


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
        ([0], [0], 0.0),
        ([1], [0], 1.0),
    ],
)
@pytest.mark.parametrize("term", ["dice", "linear-dice"])
def test_sure_answers_by_hand(term, predicted, truth, expected):
    loss = planned(term, labels=1)
    assert float(loss(sure(predicted, 2), flat(truth), 1.0)) == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("dice_over", ["sample", "batch"])
@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
@pytest.mark.parametrize("term", TERMS)
def test_always_finite_and_bounded(term, head, dice_over):
    voxels = [1000, 1, 0]
    loss = planned(term, head=head, dice_over=dice_over, voxels=voxels, class_weights="square-root", focal_gamma=0.5)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for confidence in (0.0, 1e-3, 1.0, 1e4):
            for predicted in ([0] * 4, [1] * 4, [0, 1, 2, 0]):
                for truth in ([0] * 4, [2] * 4, [1, 0, 2, 0]):
                    outputs = sure(predicted, 3, confidence)
                    x = (outputs if head == "softmax" else outputs[:, 1:]).to(dtype).requires_grad_()
                    value = loss(x, flat(truth), 1.0)
                    value.backward()
                    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
                    assert x.grad.dtype == dtype
                    assert value >= 0
                    assert value.isfinite()
                    assert x.grad.isfinite().all()
                    if term in BOUNDED:
                        assert value <= 1


def test_rounding_takes_no_dice_above_one():
    for seed in range(60):
        classes = batch(2, samples=1, seed=seed, shape=(1, 1, 300))[1]
        noise = batch(2, samples=1, seed=seed, shape=(1, 1, 300), dtype=torch.float32)[0]
        assert planned("dice", labels=1)(sure(classes.flatten().tolist(), 2, 8.0) + noise, classes, 1.0) >= 0


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("truth", [0, 1])
def test_one_voxel(term, truth):
    for logit in (-1e4, 0.0, 1e4):
        x = torch.tensor([0.0, logit]).view(1, 2, 1, 1, 1).requires_grad_()
        value = planned(term, labels=1)(x, torch.full((1, 1, 1, 1), truth), 1.0)
        value.backward()
        assert value.isfinite()
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("term", TERMS[3:])
def test_surely_wrong_voxels_keep_their_gradient(term):
    """Not of the Dice terms, whose softmax is flat where the network is sure."""
    x = sure([1, 0], 2, 50.0).requires_grad_()
    planned(term, labels=1)(x, flat([0, 1]), 1.0).backward()
    assert (x.grad.abs() > 1e-3).all()


def test_half_precision_sums_do_not_overflow():
    logits = torch.zeros(1, 2, 64, 64, 64, dtype=torch.float16)
    logits[:, 1] = 8.0
    classes = torch.ones(1, 64, 64, 64, dtype=torch.int64)
    for term in BOUNDED:
        assert float(planned(term, labels=1)(logits, classes, 1.0)) == pytest.approx(0.0, abs=1e-3)


def test_memory_layout_does_not_matter():
    logits, classes = batch(shape=(4, 5, 6), dtype=torch.float32)
    last = logits.to(memory_format=torch.channels_last_3d)
    for term in TERMS:
        loss = planned(term)
        assert float(loss(last, classes, 1.0)) == pytest.approx(float(loss(logits, classes, 1.0)), rel=1e-6)


# --- properties


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.sampled_from([0.1, 3.0, 100.0]), classes=st.integers(2, 5))
def test_permutations_and_copies_change_nothing(seed, scale, classes):
    logits, truth = batch(classes, samples=1, seed=seed)
    logits *= scale
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(60, generator=generator)
    foreground = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(classes - 1, generator=generator)])
    renamed = torch.empty_like(foreground).scatter_(0, foreground, torch.arange(classes))
    for term in TERMS:
        loss = planned(term, labels=classes - 1)
        value = float(loss(logits, truth, 1.0))
        shuffled = loss(logits.flatten(2)[..., order].view_as(logits), truth.flatten()[order].view_as(truth), 1.0)
        assert float(shuffled) == pytest.approx(value, rel=1e-9)
        assert float(loss(logits[:, foreground], renamed[truth], 1.0)) == pytest.approx(value, rel=1e-9)
        for dice_over in ("sample", "batch"):
            # smoothing and pseudocounts are per sum, so batch Dice of copies has them three times less
            loss = planned(term, labels=classes - 1, dice_over=dice_over)
            near = 0.05 if dice_over == "batch" and term == "exponential-logarithmic" else 1e-4
            copies = loss(logits.repeat(3, 1, 1, 1, 1), truth.repeat(3, 1, 1, 1), 1.0)
            assert float(copies) == pytest.approx(value, rel=near, abs=1e-5)


def test_samples_are_averaged_and_batches_pooled():
    logits = torch.cat([sure([0, 1, 1, 0], 2), sure([0, 0, 0, 0], 2)])
    truth = torch.cat([flat([0, 1, 1, 1]), flat([0, 0, 0, 1])])
    # D is 2 * 2 / 5 and 0; over both samples 2 * 2 / (2 + 4)
    for term in ("dice", "linear-dice"):
        single = planned(term, labels=1, dice_over="sample")(logits, truth, 1.0)
        assert float(single) == pytest.approx((0.2 + 1) / 2, abs=1e-5)
        assert float(planned(term, labels=1)(logits, truth, 1.0)) == pytest.approx(1 / 3, abs=1e-5)


def test_background_does_not_count_in_dice_and_classes_do_equally():
    # Class 1 is right, class 2 missed, class 3 absent from both sides: (0 + 1 + 0) / 3.
    value = planned("dice", labels=3)(sure([0, 1, 0], 4), flat([0, 1, 2]), 1.0)
    assert float(value) == pytest.approx(1 / 3, abs=1e-5)


def test_terms_are_summed_with_their_weights():
    logits, classes = batch()
    each = {term: float(planned(term)(logits, classes, 1.0)) for term in TERMS}
    both = planned({"dice": 2.0, "focal": 0.5, "cross-entropy": 1.0})(logits, classes, 1.0)
    assert float(both) == pytest.approx(2 * each["dice"] + 0.5 * each["focal"] + each["cross-entropy"], rel=1e-12)


def test_linear_dice_treats_sure_and_unsure_voxels_alike():
    """Why it loses small structures: outside them its slope by p is as steep at p = 0.01 as at p = 0.9."""
    g = torch.tensor([1, 0, 0])
    for loss, alike in ((linear_dice_loss, True), (soft_dice_loss, False)):
        p = torch.tensor([0.5, 0.9, 0.01], dtype=torch.float64, requires_grad=True)
        loss(agree(p, g).sums.over_batch(), 1e-5).backward()
        assert (abs(float(p.grad[1] - p.grad[2])) < 1e-12) == alike


def test_a_found_small_structure_by_pencil():
    """The table of docs/losses.md: 50 voxels at 0.5 among 99,950 at 0.01."""
    p = torch.full((100_000,), 0.01, dtype=torch.float64)
    p[:50] = 0.5
    g = (torch.arange(100_000) < 50).long()
    expected = {linear_dice_loss: (50 / 1074.5, -0.023, 0.043), soft_dice_loss: (50 / 72.495, -0.226, 0.188)}
    for loss, (dice, inside, outside) in expected.items():
        x = torch.logit(p).requires_grad_()
        value = loss(class_agreement(torch.stack([torch.zeros_like(x), x])[None], g[None]).sums.over_batch(), 1e-5)
        value.backward()
        assert value.item() == pytest.approx(1 - dice, abs=1e-6)
        assert float(x.grad[:50].sum()) == pytest.approx(inside, abs=5e-4)
        assert float(x.grad[50:].sum()) == pytest.approx(outside, abs=5e-4)


# --- weights


def test_class_weights_by_hand():
    def weights(scheme, voxels=(90, 9, 1)):
        return class_weights(LossPlan(class_weights=scheme), voxels).tolist()

    assert weights("none") == [1, 1, 1]
    raw = [100 / 90, 100 / 9, 100.0]
    assert weights("inverse-frequency") == pytest.approx([3 * w / sum(raw) for w in raw])
    assert weights("balance") == pytest.approx([3 * w / 2 for w in (0.1, 0.91, 0.99)])
    raw = [math.sqrt(w) for w in raw]
    assert weights("square-root") == pytest.approx([3 * w / sum(raw) for w in raw])
    for scheme in ("inverse-frequency", "balance", "square-root"):
        absent = weights(scheme, (90, 9, 0))
        assert absent == weights(scheme)
        assert sum(absent) == pytest.approx(3)
        assert all(math.isfinite(w) for w in weights(scheme, (0, 0, 0)))


def test_alpha_is_the_weight_of_the_foreground():
    assert focal_weights(LossPlan(focal_alpha=0.25), [90, 9, 1]).tolist() == pytest.approx([0.75, 0.25, 0.25])
    plan = LossPlan(focal_alpha=0.25, class_weights="balance")
    assert focal_weights(plan, [90, 10]).tolist() == pytest.approx([0.75 * 0.2, 0.25 * 1.8])


def test_weighted_cross_entropy_is_torchs():
    logits, classes = batch()
    weights = class_weights(LossPlan(class_weights="square-root"), [90, 5, 5])
    for mean, divided in (("weights", float(weights[classes].sum())), ("voxels", classes.numel())):
        loss = planned("cross-entropy", class_weights="square-root", weighted_mean=mean)
        total = torch.nn.functional.cross_entropy(logits, classes, weights, reduction="sum")
        assert float(loss(logits, classes, 1.0)) == pytest.approx(float(total) / divided, rel=1e-12)


def test_an_absent_class_weighs_nothing_or_most_in_generalised_dice():
    # Truth 0 0 1, prediction 0 2 1 sure, class 2 absent. Weights 1/4 and 1, class 2 either 0 or 1.
    logits, truth = sure([0, 2, 1], 3), flat([0, 0, 1])
    value = float(planned("generalised-dice")(logits, truth, 1.0))
    assert value == pytest.approx(1 - 2 * (0.25 * 1 + 1) / (0.25 * 3 + 2), abs=1e-5)
    value = float(planned("generalised-dice", absent_classes="maximum")(logits, truth, 1.0))
    assert value == pytest.approx(1 - 2 * (0.25 * 1 + 1) / (0.25 * 3 + 2 + 1), abs=1e-5)


def test_smoothing_of_generalised_dice_does_not_depend_on_the_size():
    """With weights of 1 / r^2 as they stand, 1e-5 would outweigh everything but tiny structures."""
    logits = torch.zeros(1, 2, 64, 64, 64)
    truth = torch.zeros(1, 64, 64, 64, dtype=torch.int64)
    truth[:, :32] = 1
    assert float(planned("generalised-dice", labels=1)(logits, truth, 1.0)) == pytest.approx(0.5, abs=1e-6)


# --- ignored voxels


@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dice_over", ["sample", "batch"])
@pytest.mark.parametrize("weights", ["none", "balance"])
@pytest.mark.parametrize("term", TERMS)
def test_ignored_voxels_are_as_if_cut_away(term, weights, dice_over, head):
    logits, classes = batch(3 if head == "softmax" else 2, shape=(2, 3, 4))
    classes[..., 2:] = 3
    loss = planned(term, head=head, ignore_label=9, dice_over=dice_over, class_weights=weights)
    x, y = logits.clone().requires_grad_(), logits[..., :2].clone().requires_grad_()
    whole, cut = loss(x, classes, 1.0), loss(y, classes[..., :2], 1.0)
    assert whole.item() == pytest.approx(cut.item(), rel=1e-12)
    whole.backward()
    cut.backward()
    assert (x.grad[..., 2:] == 0).all()
    assert torch.allclose(x.grad[..., :2], y.grad, atol=1e-15)


@pytest.mark.parametrize("term", TERMS)
def test_a_batch_without_a_single_decided_voxel(term):
    logits, classes = batch()
    x = logits.requires_grad_()
    value = planned(term, ignore_label=9, class_weights="balance")(x, torch.full_like(classes, 3), 1.0)
    value.backward()
    assert value.isfinite()
    assert (x.grad == 0).all()


# --- regions


@pytest.mark.parametrize("dice_over", ["sample", "batch"])
@pytest.mark.parametrize("term", TERMS)
def test_one_region_is_two_classes(term, dice_over):
    logits, classes = batch(1, highest=2)
    options = {"labels": 1, "dice_over": dice_over, "class_weights": "balance", "focal_alpha": 0.25}
    one = planned(term, head="sigmoid", **options)(logits, classes, 1.0)
    two = planned(term, **options)(torch.cat([torch.zeros_like(logits), logits], 1), classes, 1.0)
    assert float(one) == pytest.approx(float(two), rel=1e-12)


def test_regions_may_overlap():
    regions = [
        {"name": "whole", "values": [1, 2], "paints": 1},
        {"name": "core", "values": [2], "paints": 2},
    ]
    classes = flat([0, 1, 2, 2, 3])
    on = torch.tensor([[0.0, 1, 1, 1], [0, 0, 1, 1]], dtype=torch.float64)
    logits = torch.tensor([[2.0, -1, 0.5, 3, 7], [0.1, 1, -2, 1, 7]], dtype=torch.float64)
    shaped = logits[None, :, None, None]
    p, logits = logits[:, :4].sigmoid(), logits[:, :4]
    options = {"head": "sigmoid", "regions": regions, "ignore_label": 9}
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, on)
    assert float(planned("cross-entropy", **options)(shaped, classes, 1.0)) == pytest.approx(float(entropy), rel=1e-12)
    dice = (2 * (p * on).sum(1) + 1e-5) / ((p**2).sum(1) + on.sum(1) + 1e-5)
    assert float(planned("dice", **options)(shaped, classes, 1.0)) == pytest.approx(float(1 - dice.mean()), rel=1e-9)
    true = torch.where(on == 1, p, 1 - p)
    focal = (torch.where(on == 1, 0.25, 0.75) * (1 - true) ** 2 * -true.log()).mean()
    value = planned("focal", focal_alpha=0.25, **options)(shaped, classes, 1.0)
    assert float(value) == pytest.approx(float(focal), rel=1e-12)


def test_weights_of_regions_come_from_the_voxels_of_their_labels():
    regions = [{"name": "both", "values": [1, 2], "paints": 1}]
    options = {"head": "sigmoid", "regions": regions, "voxels": [70, 20, 10], "weighted_mean": "voxels"}
    logits, classes = torch.zeros(1, 1, 1, 1, 2), flat([0, 2])
    value = planned("cross-entropy", class_weights="balance", **options)(logits, classes, 1.0)
    assert float(value) == pytest.approx(math.log(2) * (0.6 + 1.4) / 2)
    logits = torch.tensor([9.0, 0.0]).view(1, 1, 1, 1, 2)
    value = planned("cross-entropy", class_weights="balance", **options)(logits, classes, 1.0)
    assert float(value) == pytest.approx((0.6 * -math.log(1 / (1 + math.exp(9))) + 1.4 * math.log(2)) / 2, rel=1e-5)


# --- coarser grids and the warm-up


@pytest.mark.parametrize("term", TERMS)
def test_deep_supervision_weights_by_pencil(term):
    loss = planned(term)
    fine, classes = batch(shape=(4, 4, 8))
    middle, coarse = batch(shape=(2, 2, 4), seed=1)[0], batch(shape=(1, 1, 2), seed=2)[0]
    each = [
        float(loss(fine, classes, 1.0)),
        float(loss(middle, classes[:, 1::2, 1::2, 1::2], 1.0)),
        float(loss(coarse, classes[:, 2::4, 2::4, 2::4], 1.0)),
    ]
    assert float(loss((fine, middle), classes, 1.0)) == pytest.approx((2 * each[0] + each[1]) / 3, rel=1e-12)
    value = loss((fine, middle, coarse), classes, 1.0)
    assert float(value) == pytest.approx((4 * each[0] + 2 * each[1] + each[2]) / 7, rel=1e-12)


def test_odd_grids_take_the_voxel_nearest_to_the_middle():
    classes = torch.tensor([0, 1, 0, 2, 0]).view(1, 1, 1, 5)
    # three voxels over five: middles at 5/6, 15/6 and 25/6, in voxels 0, 2 and 4
    value = planned("dice")((torch.zeros(1, 3, 1, 1, 5), sure([0, 0, 0], 3)), classes, 1.0)
    alone = planned("dice")(torch.zeros(1, 3, 1, 1, 5), classes, 1.0)
    assert float(value) == pytest.approx(2 / 3 * float(alone), rel=1e-6)


def test_warm_up_moves_from_cross_entropy_to_the_terms():
    logits, classes = batch()
    entropy = float(planned("cross-entropy")(logits, classes, 1.0))
    for terms in ({"dice": 2.0}, {"dice": 1.0, "cross-entropy": 0.5}):
        whole = float(planned(terms)(logits, classes, 1.0))
        loss = planned(terms, warmup_fraction=0.2)
        assert float(loss(logits, classes, 0.0)) == pytest.approx(entropy, rel=1e-12)
        assert float(loss(logits, classes, 0.1)) == pytest.approx((entropy + whole) / 2, rel=1e-12)
        assert float(loss(logits, classes, 0.2)) == pytest.approx(whole, rel=1e-12)
        assert float(loss(logits, classes, 1.0)) == pytest.approx(whole, rel=1e-12)


def test_voxel_counts_of_other_classes_are_refused():
    with pytest.raises(ConfigError, match="2 voxel counts for 3 classes") as refused:
        planned("dice", voxels=[1, 1])
    assert refused.value.code == "loss.class-count"


# --- MONAI, where the definitions are the same


@pytest.fixture
def monai():
    return pytest.importorskip("monai.losses", reason="MONAI is compared with, not needed")


@pytest.mark.parametrize(("term", "squared"), [("dice", True), ("linear-dice", False)])
@pytest.mark.parametrize("dice_over", ["sample", "batch"])
def test_dice_is_monais(monai, term, squared, dice_over):
    logits, classes = batch()
    theirs = monai.DiceLoss(
        include_background=False,
        to_onehot_y=True,
        softmax=True,
        squared_pred=squared,
        batch=dice_over == "batch",
    )(logits, classes[:, None])
    # their truth is float32
    assert float(planned(term, dice_over=dice_over)(logits, classes, 1.0)) == pytest.approx(float(theirs), rel=1e-6)


def test_generalised_dice_is_monais(monai):
    """Where every class occurs. Absent ones weigh as much as the heaviest there, and the smoothing is added to
    weights of 1 / r^2 as they stand, so it is turned off."""
    logits, classes = batch()
    theirs = monai.GeneralizedDiceLoss(to_onehot_y=True, softmax=True, smooth_nr=0.0, smooth_dr=0.0, batch=True)(
        logits, classes[:, None]
    )
    ours = planned("generalised-dice", smoothing=NO_SMOOTHING)(logits, classes, 1.0)
    assert float(ours) == pytest.approx(float(theirs), rel=1e-9)


@pytest.mark.parametrize("alpha", [None, 0.25])
def test_focal_is_monais(monai, alpha):
    """Theirs is the mean over voxels and channels of a one-hot truth, so ours, the mean over voxels, is K times it."""
    logits, classes = batch()
    theirs = monai.FocalLoss(to_onehot_y=True, use_softmax=True, gamma=2.0, alpha=alpha)(logits, classes[:, None])
    ours = planned("focal", focal_alpha=alpha)(logits, classes, 1.0)
    assert float(ours) == pytest.approx(3 * float(theirs), rel=1e-6)
    logits, classes = batch(1, highest=2)
    theirs = monai.FocalLoss(gamma=2.0, alpha=alpha)(logits, classes[:, None])
    ours = planned("focal", labels=1, head="sigmoid", focal_alpha=alpha)(logits, classes, 1.0)
    assert float(ours) == pytest.approx(float(theirs), rel=1e-6)


def test_agreement_of_regions_by_hand():
    agreement = region_agreement(torch.zeros(1, 2, 2), torch.tensor([[[0, 1], [1, 2]]]), ignored_class=2)
    assert agreement.sums.truth.tolist() == [[[1, 1], [0, 1]]]
    assert agreement.sums.overlap.tolist() == [[[0.5, 0.5], [0, 0.5]]]
    assert agreement.sums.predicted.tolist() == [[[1, 1], [0.5, 0.5]]]
    assert agreement.sums.squared.tolist() == [[[0.5, 0.5], [0.25, 0.25]]]
    assert agreement.log_true.exp().tolist() == [[[0.5, 0.5], [0.5, 1.0]]]
