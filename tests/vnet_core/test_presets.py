"""The named networks: published parameters, receptive fields and work; and each setting against plain formulas."""

from itertools import product

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vnet_core.networks.layers import ChannelDropout, ValueDropout
from vnet_core.networks.layout import count_macs, receptive_field
from vnet_core.networks.vnet import VNet, build_vnet, count_parameters, initialise
from vnet_core.sections import PRESETS, NetworkPlan

TINY = {"kernel_size": 3, "width": 2, "convolutions": (1, 2, 1)}
SETTINGS = [
    {},
    {"activation": "elu", "normalisation": "batch"},
    {"residual": "activated", "activation": "leaky-relu", "decoder_convolutions": (2, 1)},
    {"residual": "projected", "activation": "relu", "normalisation": "instance"},
    {"entry": "expanded", "decoder": "narrow"},
    {"downsampling": "maximum", "upsampling": "nearest"},
    {"downsampling": "maximum", "upsampling": "linear", "decoder": "narrow", "residual": "projected"},
    {"upsampling": "nearest", "decoder": "narrow", "normalisation": "group"},
    {"head_kernel_size": 3, "normalisation": "batch"},
    {"deep_supervision": "auxiliary", "residual": "activated"},
    {"deep_supervision": "aggregate", "head_kernel_size": 3, "upsampling": "linear"},
    {"deep_supervision": "aggregate", "convolutions": (1, 1, 1, 1), "decoder": "narrow"},
    {"dropout": 0.3, "residual": "projected"},
    {"dropout": 0.3, "dropout_at": "activations", "noise": 0.2},
]


def image(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tiny(channels=1, outputs=2, **settings):
    return build_vnet(NetworkPlan(**{**TINY, **settings}), channels, outputs)


def on_paper(preset, channels, outputs):
    with torch.device("meta"):
        return VNet(NetworkPlan.model_validate({"preset": preset}), channels, outputs)


@pytest.mark.parametrize(
    ("preset", "channels", "outputs", "parameters"),
    [
        ("paper", 1, 2, 65_175_314),
        ("caffe", 1, 2, 61_982_682),
        ("vnet-pytorch", 1, 2, 45_603_934),
        ("vnet-tf", 1, 1, 43_931_137),
        ("vnet-tf", 1, 2, 43_931_154),
        ("vnet-tf", 6, 1, 43_943_153),
        ("compact", 1, 20, 4_314_356),
    ],
)
def test_published_parameters(preset, channels, outputs, parameters):
    assert count_parameters(on_paper(preset, channels, outputs)) == parameters


@pytest.mark.parametrize(
    ("preset", "fields"),
    [
        ("paper", [5, 22, 72, 172, 372, 476, 528, 546, 551, 551]),
        ("caffe", [5, 14, 48, 148, 348, 452, 488, 498, 503, 507]),
        ("vnet-pytorch", [5, 14, 48, 148, 284, 356, 392, 402, 407, 411]),
        ("vnet-tf", [5, 22, 72, 172, 372, 476, 528, 546, 551, 551]),
        # 3, then 3 + 1 + 2 * 2 * 2, + 2 + 2 * 2 * 4, + 4 + 3 * 2 * 8; up 4 + 16, 2 + 8, 1 + 2.
        ("compact", [3, 12, 30, 82, 102, 112, 115, 115]),
    ],
)
def test_published_receptive_fields(preset, fields):
    assert receptive_field(NetworkPlan.model_validate({"preset": preset})) == fields


def test_several_channels_are_expanded_by_a_convolution_of_their_own():
    plan = NetworkPlan.model_validate({"preset": "vnet-tf"})
    assert receptive_field(plan, channels=6)[0] - receptive_field(plan)[0] == 4


@pytest.mark.parametrize(("preset", "gmacs"), [("paper", 502), ("caffe", 385), ("vnet-pytorch", 366)])
def test_published_work(preset, gmacs):
    assert round(count_macs(NetworkPlan.model_validate({"preset": preset}), 1, 2, (64, 128, 128)) / 1e9) == gmacs


def test_presets_are_named_and_keys_change_them():
    assert set(PRESETS) == {"paper", "caffe", "vnet-pytorch", "vnet-tf", "compact"}
    plan = NetworkPlan.model_validate({"preset": "compact", "width": 8})
    assert (plan.width, plan.kernel_size, plan.downsampling) == (8, 3, "maximum")


def reached(plan, voxel, length=64):
    """Voxels along x that reach one output voxel, by the gradient in float64 with weights that cancel nothing."""
    network = build_vnet(plan, 1, 1).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.abs_().add_(0.01)
    x = torch.ones(1, 1, plan.divisor, plan.divisor, length, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(network.eval()(x)[0, 0, 0, 0, voxel], x)
    along_x = gradient.abs().amax(dim=(0, 1, 2, 3)).nonzero()
    return int(along_x.min()), int(along_x.max())


def reached_by_rule(plan, voxel, length=64):
    """The same by following the voxels back by hand."""
    half = plan.kernel_size // 2
    first = last = voxel
    first, last = first - plan.head_kernel_size // 2, last + plan.head_kernel_size // 2
    for count in plan.convolutions_up:
        first, last = first - half * count, last + half * count
        if plan.upsampling == "linear":
            # the centre of fine voxel 2 i lies between those of coarse voxels i - 1 and i
            first, last = (first - 1) // 2, (last + 1) // 2
        else:
            first, last = first // 2, last // 2
    for level in reversed(range(plan.levels)):
        first, last = first - half * plan.convolutions[level], last + half * plan.convolutions[level]
        if level:
            first, last = 2 * first, 2 * last + 1
    return max(first, 0), min(last, length - 1)


@pytest.mark.parametrize(
    "settings",
    [
        {"convolutions": (1, 1)},
        {"convolutions": (2, 1, 1)},
        {"convolutions": (1, 2, 1), "kernel_size": 5, "width": 1},
        {"convolutions": (1, 1, 1), "upsampling": "linear"},
        {"convolutions": (1, 1), "upsampling": "nearest", "decoder": "narrow", "head_kernel_size": 5},
        {"convolutions": (1, 1, 1), "deep_supervision": "aggregate", "residual": "projected"},
    ],
)
def test_receptive_field_is_what_the_gradient_sees(settings):
    plan = NetworkPlan(**{"kernel_size": 3, "width": 2, **settings})
    spans = []
    for voxel in (31, 32, 33, 34):
        first, last = reached(plan, voxel)
        assert (first, last) == reached_by_rule(plan, voxel)
        spans.append(last - first + 1)
    # the published rule counts a step for every doubling, though doubled voxels share the one they come from
    steps = sum(2**level for level in range(plan.levels - 1))
    assert receptive_field(plan)[-1] - steps <= max(spans) <= receptive_field(plan)[-1]


class Reference:
    """The networks as formulas over the weights of a VNet, written apart from it; evaluation only."""

    def __init__(self, network):
        self.plan, self.weights = network.plan, network.state_dict()
        self.groups = {n: m.num_groups for n, m in network.named_modules() if isinstance(m, nn.GroupNorm)}

    def convolve(self, name, x):
        weight = self.weights[f"{name}.weight"]
        return F.conv3d(x, weight, self.weights.get(f"{name}.bias"), padding=weight.shape[-1] // 2)

    def normalise(self, name, x):
        w = self.weights
        match self.plan.normalisation:
            case "none":
                return x
            case "batch":
                mean, variance = w[f"{name}.running_mean"], w[f"{name}.running_var"]
                shape = (1, -1, 1, 1, 1)
            case _:
                grouped = x.reshape(len(x), self.groups[name], -1)
                mean, variance = grouped.mean(2, keepdim=True), grouped.var(2, keepdim=True, unbiased=False)
                x, mean, variance = ((grouped - mean) / (variance + 1e-5).sqrt()).reshape(x.shape), 0.0, 1.0 - 1e-5
                return x * w[f"{name}.weight"].view(1, -1, 1, 1, 1) + w[f"{name}.bias"].view(1, -1, 1, 1, 1)
        scaled = (x - mean.view(shape)) / (variance.view(shape) + 1e-5).sqrt()
        return scaled * w[f"{name}.weight"].view(shape) + w[f"{name}.bias"].view(shape)

    def activate(self, name, x):
        match self.plan.activation:
            case "prelu":
                names = [n for n in (f"{name}.weight", f"{name}.0.weight") if n in self.weights]
                slope = self.weights[names[0]].view(1, -1, 1, 1, 1)
                return x.clamp(min=0) + slope * x.clamp(max=0)
            case "elu":
                return torch.where(x > 0, x, torch.expm1(x.clamp(max=0)))
            case "relu":
                return x.clamp(min=0)
            case "leaky-relu":
                return torch.where(x > 0, x, 0.01 * x)

    def stage(self, name, x, width, count, kind):
        entering = x
        for i in range(count):
            x = self.normalise(f"{name}.normalisations.{i}", self.convolve(f"{name}.convolutions.{i}", x))
            if i < count - 1 or kind != "plain":
                x = self.activate(f"{name}.activations.{i}", x)
        if kind == "projected":
            return x + self.convolve(f"{name}.projection", entering)
        repeated = torch.cat([entering] * -(-width // entering.shape[1]), 1)[:, :width]
        return self.activate(f"{name}.last", x + repeated)

    def __call__(self, x):
        plan, w = self.plan, self.weights
        if plan.entry == "expanded":
            if x.shape[1] == 1:
                x = torch.cat([x] * plan.width, 1)
            else:
                x = self.normalise("expansion.normalisation", self.convolve("expansion.convolution", x))
                x = self.activate("expansion.activation", x)
        skips = []
        for level, count in enumerate(plan.convolutions):
            if level and plan.downsampling == "maximum":
                b, c, d, h, v = x.shape
                x = x.reshape(b, c, d // 2, 2, h // 2, 2, v // 2, 2).amax((3, 5, 7))
            elif level:
                name = f"down.{level - 1}"
                x = F.conv3d(x, w[f"{name}.convolution.weight"], w[f"{name}.convolution.bias"], stride=2)
                x = self.activate(f"{name}.activation", self.normalise(f"{name}.normalisation", x))
            image_is_added = level == 0 and plan.entry == "tiled" and plan.residual == "activated"
            kind = "plain" if image_is_added else plan.residual
            x = self.stage(f"encoder.{level}", x, plan.width * 2**level, count, kind)
            skips.append(x)
        features = []
        for level in reversed(range(plan.levels - 1)):
            if plan.upsampling == "transposed":
                name = f"up.{level}"
                x = F.conv_transpose3d(x, w[f"{name}.convolution.weight"], w[f"{name}.convolution.bias"], stride=2)
                x = self.activate(f"{name}.activation", self.normalise(f"{name}.normalisation", x))
            else:
                x = F.interpolate(x, scale_factor=2, mode=plan.upsampling.replace("linear", "trilinear"))
            x = torch.cat([x, skips[level]], 1)
            width = w[f"decoder.{level}.convolutions.0.weight"].shape[0]
            x = self.stage(f"decoder.{level}", x, width, plan.convolutions_up[level], plan.residual)
            features.insert(0, x)
        logits = self.convolve("head.convolution", x)
        if plan.deep_supervision == "aggregate":
            mode = "nearest" if plan.upsampling == "nearest" else "trilinear"
            for level, coarse in enumerate(features[1:], 1):
                for _ in range(level):
                    coarse = F.interpolate(coarse, scale_factor=2, mode=mode)
                logits = logits + self.convolve(f"coarse.{level - 1}", coarse)
        if plan.head_kernel_size > 1:
            logits = self.activate("head.after.1", self.normalise("head.after.0", logits))
            logits = self.convolve("head.after.2", logits)
        return logits


def away_from_the_start(network):
    """Biases, slopes, normalisations and their statistics that are not those of a new network."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in network.state_dict().values():
            if value.is_floating_point() and value.dim() == 1:
                value += 0.2 * torch.rand(value.shape, generator=generator, dtype=value.dtype)
    return network


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_every_setting_is_its_formula(settings, channels):
    network = away_from_the_start(tiny(channels, 3, **settings)).double().eval()
    x = image(2, channels, 8, 8, 16).double()
    expected = Reference(network)(x)
    assert torch.allclose(network(x), expected, rtol=0, atol=1e-10)
    with torch.inference_mode():
        assert torch.allclose(network(x), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("width", "shape"),
    # The whole width on a small image, and the published image at width 1: in float64 torch writes out the input of a
    # convolution once per tap, 34 GB for the whole width on the whole image. test_whole_paper does that in slabs.
    [(16, (16, 32, 32)), pytest.param(1, (64, 128, 128), marks=pytest.mark.slow)],
)
def test_the_published_network_and_its_gradients_are_those_of_the_formulas(width, shape):
    network = away_from_the_start(build_vnet(NetworkPlan(width=width), 1, 2)).double()
    x = image(1, 1, *shape).double()
    weights = dict(network.named_parameters())
    ours = network(x)
    ours_gradients = torch.autograd.grad(ours.square().mean(), list(weights.values()))
    reference = Reference(network)
    reference.weights = weights
    plain = reference(x)
    plain_gradients = torch.autograd.grad(plain.square().mean(), list(weights.values()))
    assert (ours - plain).detach().abs().max() < 1e-10 * max(1.0, float(plain.detach().abs().max()))
    for a, b in zip(ours_gradients, plain_gradients, strict=True):
        assert (a - b).abs().max() < 1e-10 * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_evaluation_is_deterministic_keeps_its_state_and_does_not_see_the_batch(settings):
    network = tiny(2, 3, **settings).double()
    network(image(2, 2, 8, 8, 8).double() + 1.0)
    network.eval()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    x = image(3, 2, 8, 8, 8).double()
    together = network(x)
    assert isinstance(together, torch.Tensor)
    assert together.shape == (3, 3, 8, 8, 8)
    assert torch.equal(together, network(x))
    assert torch.allclose(together, torch.cat([network(one[None]) for one in x]), atol=1e-10)
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in state.items())


@pytest.mark.parametrize("channels", [1, 3, 5, 20])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_any_number_of_channels_and_any_size(settings, channels):
    network = tiny(channels, 2, **settings).eval()
    for shape in ((1, 1, 1), (5, 8, 3)):
        assert network(image(1, channels, *shape)).shape == (1, 2, *shape)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_every_weight_takes_part_in_training(settings):
    network = tiny(2, 3, **settings)
    given = network(image(2, 2, 8, 8, 8))
    outputs = given if isinstance(given, tuple) else (given,)
    sum(logits.square().mean() for logits in outputs).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("convolutions", [(1, 1), (1, 1, 1, 1)])
def test_auxiliary_outputs_in_training_only(convolutions):
    network = tiny(1, 3, deep_supervision="auxiliary", convolutions=convolutions)
    x = image(2, 1, 16, 8, 24)
    grids = [tuple(n >> level for n in (16, 8, 24)) for level in range(len(convolutions) - 1)]
    assert [tuple(logits.shape) for logits in network(x)] == [(2, 3, *grid) for grid in grids]
    first = network(x)[0]
    assert torch.equal(network.eval()(x), first)


def test_auxiliary_outputs_of_a_padded_image_cover_the_padded_grid():
    full, coarse = tiny(deep_supervision="auxiliary")(image(1, 1, 5, 8, 9))
    assert full.shape[2:] == (5, 8, 9)
    assert coarse.shape[2:] == (4, 4, 6)


def test_aggregation_is_one_convolution_of_all_features():
    """20 outputs of 24 + 48 + 96 channels are the 3,380 parameters that the count of `compact` needs."""
    network = on_paper("compact", 1, 20)
    joined = [network.head.convolution, *network.coarse]
    assert [module.in_channels for module in joined] == [24, 48, 96]
    assert sum(p.numel() for module in joined for p in module.parameters()) == 20 * (24 + 48 + 96) + 20


def test_dropout_leaves_out_whole_channels_and_keeps_the_mean():
    layer = ChannelDropout(0.25)
    y = layer(torch.ones(100, 50, 2, 2, 2))
    assert y.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert (y.amax((2, 3, 4)) == y.amin((2, 3, 4))).all()
    assert float(y.mean()) == pytest.approx(1.0, abs=0.03)
    single = ValueDropout(0.25)(torch.ones(100, 50, 2, 2, 2))
    assert not (single.amax((2, 3, 4)) == single.amin((2, 3, 4))).all()
    assert float((single == 0).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert torch.equal(layer.eval()(y), y)


def test_dropout_sits_at_the_two_deepest_levels_and_the_skips():
    network = build_vnet(NetworkPlan(kernel_size=3, width=2, convolutions=(1, 1, 1, 1), dropout=0.5), 1, 2)
    entering = [isinstance(stage.dropout, ChannelDropout) for stage in network.encoder]
    rising = [isinstance(layer, ChannelDropout) for layer in network.rising_dropout]
    assert entering == [False, False, True, True]
    # from the bottom to R3, and from R3 to R2
    assert rising == [False, True, True]
    assert isinstance(network.skip_dropout, ChannelDropout)


@pytest.mark.parametrize("settings", [{"dropout": 0.5}, {"dropout": 0.5, "dropout_at": "activations"}, {"noise": 1.0}])
def test_random_layers_depend_on_their_seed_alone(settings):
    network = tiny(**settings)
    x = image(1, 1, 8, 8, 8)
    before = torch.random.get_rng_state()
    network.reseed(3)
    first, second = network(x), network(x)
    assert not torch.equal(first, second)
    network.reseed(3)
    assert torch.equal(network(x), first)
    network.reseed(4)
    assert not torch.equal(network(x), first)
    assert torch.equal(torch.random.get_rng_state(), before)
    network.eval()
    assert torch.equal(network(x), network(x))


def test_batch_normalisation_uses_running_statistics_in_evaluation():
    """An implementation that always takes the batch's statistics gives the same for an image and twice that image."""
    network = tiny(normalisation="batch")
    for seed in range(20):
        network(image(4, 1, 8, 8, 8, seed=seed))
    network.eval()
    x = image(1, 1, 8, 8, 8)
    assert not torch.allclose(network(x), network(2 * x + 1), atol=1e-2)


def test_the_image_is_repeated_over_channels_not_over_the_batch():
    for batch, entry in product((1, 2), ("tiled", "expanded")):
        assert len(tiny(entry=entry)(image(batch, 1, 4, 4, 4))) == batch


@pytest.mark.parametrize(
    ("initialisation", "variance", "up_variance"),
    # A convolution of 32 -> 32 channels of 5^3, and a transposed one 64 -> 32 of 2^3.
    [
        ("msra-average", 2 / (32 * 125), 2 / (48 * 8)),
        ("msra-small-head", 2 / (32 * 125), 2 / (48 * 8)),
        ("kaiming", 2 / (32 * 125), 2 / 64),
        ("xavier-uniform", 2 / (64 * 125), 2 / (96 * 8)),
        ("xavier-normal", 2 / (64 * 125), 2 / (96 * 8)),
    ],
)
def test_initial_weights(initialisation, variance, up_variance):
    network = build_vnet(NetworkPlan(width=32, convolutions=(2, 1), initialisation=initialisation), 1, 2)
    for weight, expected in (
        (network.encoder[0].convolutions[1].weight, variance),
        (network.up[0].convolution.weight, up_variance),
    ):
        assert float(weight.detach().square().mean()) == pytest.approx(expected, rel=0.05)
        assert float(weight.detach().mean()) == pytest.approx(0.0, abs=0.05 * expected**0.5)
        # the fourth moment tells a uniform distribution (1.8) from a normal one (3)
        kurtosis = float(weight.detach().pow(4).mean() / weight.detach().square().mean() ** 2)
        assert kurtosis == pytest.approx(1.8 if initialisation == "xavier-uniform" else 3.0, abs=0.15)
    initialise(network, seed=1)
    assert all(not p.any() for name, p in network.named_parameters() if name.endswith("bias"))


@pytest.mark.parametrize(
    ("settings", "small"),
    [
        ({}, {"head.convolution"}),
        ({"head_kernel_size": 3}, {"head.after.2"}),
        ({"deep_supervision": "auxiliary"}, {"head.convolution", "coarse.0"}),
        # what is added up to logits gives logits; what goes through an activation first does not
        ({"deep_supervision": "aggregate"}, {"head.convolution", "coarse.0"}),
        ({"deep_supervision": "aggregate", "head_kernel_size": 3}, {"head.after.2"}),
    ],
)
def test_a_small_head_is_the_same_head_times_0_3(settings, small):
    usual, other = (
        tiny(convolutions=(1, 1, 1), initialisation=initialisation, **settings).state_dict()
        for initialisation in ("msra-average", "msra-small-head")
    )
    for name, weight in usual.items():
        share = 0.3 if name.removesuffix(".weight") in small else 1.0
        torch.testing.assert_close(other[name], share * weight)


def test_a_small_head_starts_more_even_between_classes():
    """How far probabilities of three classes are from 1/3, in the mean over voxels and classes."""
    x = image(1, 1, 16, 16, 16)
    spread = {}
    for initialisation in ("msra-average", "msra-small-head"):
        plan = NetworkPlan(
            width=16, convolutions=(2, 2, 2), kernel_size=3, normalisation="instance", initialisation=initialisation
        )
        with torch.no_grad():
            probabilities = build_vnet(plan, 1, 3).eval()(x).softmax(dim=1)
        spread[initialisation] = float((probabilities - 1 / 3).abs().mean())
    assert spread["msra-small-head"] < 0.15 < 0.2 < spread["msra-average"]
