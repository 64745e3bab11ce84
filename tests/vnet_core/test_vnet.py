"""The V-Net: its published numbers, its wiring by hand, any size, and that inference changes no value."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from vnet_core.networks.layers import GroupNormalisation, PReLU, Stage, tiled
from vnet_core.networks.layout import count_macs, padding, receptive_field
from vnet_core.networks.vnet import VNet, build_vnet, count_parameters, initialise
from vnet_core.sections import NetworkPlan

SMALL = NetworkPlan(kernel_size=3, width=4, convolutions=(1, 2, 2))
NORMALISATIONS = ("none", "batch", "instance", "group")


def image(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def small(normalisation="none", channels=1, classes=2):
    plan = SMALL.model_copy(update={"normalisation": normalisation})
    network = build_vnet(plan, channels, classes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return network.eval()


@pytest.fixture(scope="module")
def published():
    return build_vnet(NetworkPlan(), 1, 2)


def test_published_parameters(published):
    assert count_parameters(published) == 65_175_314
    slopes = sum(m.weight.numel() for m in published.modules() if isinstance(m, nn.PReLU))
    assert slopes == 3_456


def test_a_further_class_costs_33_parameters():
    plan = NetworkPlan(convolutions=(1, 1))
    assert count_parameters(build_vnet(plan, 1, 5)) - count_parameters(build_vnet(plan, 1, 2)) == 3 * 33


def test_published_receptive_fields():
    assert receptive_field(NetworkPlan()) == [5, 22, 72, 172, 372, 476, 528, 546, 551, 551]


def test_published_macs():
    assert round(count_macs(NetworkPlan(), 1, 2, (64, 128, 128)) / 1e9) == 502


def test_macs_count_the_padded_grid():
    assert count_macs(SMALL, 1, 2, (5, 8, 8)) == count_macs(SMALL, 1, 2, (8, 8, 8))


@pytest.mark.parametrize(
    "plan", [SMALL, NetworkPlan(kernel_size=5, width=3, convolutions=(2, 1)), NetworkPlan(width=1)]
)
def test_macs_are_those_of_the_modules(plan):
    network = build_vnet(plan, 3, 4)
    macs = 0

    def add(module, inputs, output):
        nonlocal macs
        grid = inputs[0] if isinstance(module, nn.ConvTranspose3d) else output
        macs += module.weight.numel() * grid[0, 0].numel()

    for module in network.modules():
        if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
            module.register_forward_hook(add)
    network(image(1, 3, 16, 32, 16))
    assert macs == count_macs(plan, 3, 4, (16, 32, 16))


def test_nothing_farther_than_the_receptive_field_reaches_a_voxel():
    plan = NetworkPlan(kernel_size=3, width=2, convolutions=(1, 1))
    network = build_vnet(plan, 1, 2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.abs_()
    x = image(1, 1, 4, 4, 32).abs().requires_grad_()
    reached = []
    for voxel in (15, 16):
        (gradient,) = torch.autograd.grad(network(x)[0, 0, 2, 2, voxel], x)
        along_x = gradient.abs().amax(dim=(0, 1, 2, 3)).nonzero()
        reached.append(int(along_x.max() - along_x.min()) + 1)
    # The rule counts a transposed convolution of two as if two voxels of the coarse grid reached a fine one.
    assert reached == [10, 10]
    assert receptive_field(plan)[-1] == 11


def by_hand(network):
    """Stages pass on what enters; down is the mean of eight voxels; up the sum over channels; the head a copy."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        for module in network.modules():
            if isinstance(module, nn.PReLU):
                module.weight.fill_(0.25)
        for module in network.down:
            module.convolution.weight.fill_(1 / 8)
        for module in network.up:
            module.convolution.weight.fill_(1.0)
        network.head.convolution.weight.copy_(torch.eye(2)[:, :, None, None, None])
    return network


def test_wiring_by_hand():
    network = by_hand(build_vnet(NetworkPlan(kernel_size=3, width=1, convolutions=(1, 1)), 1, 2))
    x = torch.zeros(1, 1, 2, 2, 4)
    x[..., :2] = 3.0
    x[..., 2:] = -16.0
    # L1 is PReLU of the input: 3 or -4. Down: the mean, and PReLU again: 3 or -1, in two channels. The bottom adds
    # what enters to nothing: 3 or -1/4. Up: twice that, 6 or -1/2, PReLU: 6 or -1/8; R1 ends with PReLU: -1/32, and
    # makes -1 of the skip -4.
    up, skip = network(x)[0]
    assert torch.equal(up, torch.tensor([6.0, 6.0, -1 / 32, -1 / 32]).expand(2, 2, 4))
    assert torch.equal(skip, torch.tensor([3.0, 3.0, -1.0, -1.0]).expand(2, 2, 4))


def test_channels_are_tiled_in_order():
    x = torch.arange(3.0).reshape(1, 3, 1, 1, 1)
    assert tiled(x, 5).flatten().tolist() == [0, 1, 2, 0, 1]
    assert tiled(x, 3).flatten().tolist() == [0, 1, 2]
    assert tiled(x, 2).flatten().tolist() == [0, 1]
    assert tiled(x[:, 2:], 4).flatten().tolist() == [2, 2, 2, 2]


def test_residual_is_added_before_the_last_activation():
    stage = Stage(NetworkPlan(kernel_size=3, width=2), entering=2, width=2, count=2)
    for convolution in stage.convolutions:
        nn.init.zeros_(convolution.weight)
        nn.init.constant_(convolution.bias, -1.0)
    x = torch.tensor([3.0, -3.0]).reshape(1, 2, 1, 1, 1)
    assert stage(x).flatten().tolist() == [2.0, -1.0]


def test_the_first_of_two_parts_is_what_is_added():
    """A stage of the way up, as wide as what comes up: [up, skip] together go through the convolutions."""
    stage = Stage(NetworkPlan(kernel_size=3, width=2, decoder="narrow"), entering=4, width=2, count=1)
    up, skip = image(1, 2, 4, 4, 4, seed=1), image(1, 2, 4, 4, 4, seed=2)
    both = torch.cat([up, skip], dim=1)
    assert torch.equal(stage(up, skip), stage.last(stage.convolutions[0](both) + up))
    assert torch.equal(stage(up, skip), stage(both))


@pytest.mark.parametrize("shape", [(2, 3, 4, 5, 6), (1, 16, 2, 2, 3), (3, 2, 7, 1, 1)])
def test_channels_last_has_the_gradients_of_instance_normalisation(shape):
    x, by = 3.0 + 2.0 * image(*shape), image(*shape, seed=1)
    layer = GroupNormalisation(shape[1], shape[1])
    with torch.no_grad():
        layer.weight.copy_(image(shape[1], seed=2))
        layer.bias.copy_(image(shape[1], seed=3))

    def gradients(x, layer, by):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(layer(x), (x, layer.weight, layer.bias), by)

    found = gradients(x.contiguous(memory_format=torch.channels_last_3d), layer, by)
    exact = gradients(x.double(), deepcopy(layer).double(), by.double())
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 4, 4), (5, 8, 3), (1, 13, 30)])
@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_any_size(shape, normalisation):
    network = small(normalisation, channels=2, classes=3)
    for x in (image(1, 2, *shape), image(2, 2, *shape)):
        logits = network(x)
        assert logits.shape == (len(x), 3, *shape)
        assert logits.isfinite().all()


def test_padding_is_zeros_and_is_cropped():
    assert padding((5, 8, 3), 4) == ((1, 0, 0), (2, 0, 1))
    network = small()
    x = image(1, 1, 5, 8, 3)
    extended = torch.nn.functional.pad(x, (0, 1, 0, 0, 1, 2))
    assert torch.equal(network(x), network(extended)[:, :, 1:6, :, :3])


def test_a_flip_of_the_channels_is_not_the_same():
    network = small(channels=2)
    x = image(1, 2, 8, 8, 8)
    assert not torch.allclose(network(x), network(x.flip(1)), atol=1e-3)


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_eval_is_deterministic_and_keeps_its_state(normalisation):
    network = small(normalisation)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    x = image(2, 1, 8, 8, 8)
    assert torch.equal(network(x), network(x))
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in state.items())


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_samples_of_a_batch_do_not_see_each_other(normalisation):
    network = small(normalisation)
    x = image(3, 1, 8, 8, 8)
    alone = torch.cat([network(sample[None]) for sample in x])
    assert torch.allclose(network(x), alone, atol=1e-5)


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("channels", [1, 3, 6])
def test_without_gradients_the_values_are_the_same(normalisation, channels):
    network = small(normalisation, channels)
    x = image(2, channels, 9, 10, 11)
    before = x.clone()
    with_gradients = network(x).detach()
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        with torch.inference_mode():
            assert torch.allclose(network.to(memory_format=layout)(x), with_gradients, atol=1e-4)
            assert torch.equal(x, before)


def test_activation_in_pieces(monkeypatch):
    monkeypatch.setattr("vnet_core.networks.layers.IN_PLACE_VALUES", 12)
    activation = PReLU(3)
    with torch.no_grad():
        activation.weight.copy_(torch.tensor([0.5, 2.0, -1.0]))
        x = image(2, 3, 3, 2, 2).to(memory_format=torch.channels_last_3d)
        expected = nn.functional.prelu(x, activation.weight)
        result = activation(x)
    assert torch.equal(result, expected)
    assert result.data_ptr() == x.data_ptr()


def test_every_weight_gets_a_gradient():
    network = small("group").train()
    network(image(2, 1, 8, 8, 8)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


@pytest.mark.parametrize("edge", [2, 4, 8, 16])
def test_gradients_in_bfloat16_are_right_on_small_grids(edge):
    network = build_vnet(NetworkPlan(kernel_size=5, width=16, convolutions=(1, 2)), 1, 2)
    x = image(2, 1, edge, edge, edge)
    gradients = []
    for bfloat16 in (False, True):
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            logits = network(x)
        logits.float().square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    exact, rounded = gradients
    assert float((exact - rounded).norm() / exact.norm()) < 0.03


def test_initial_weights(published):
    # Convolution 256 -> 256 of 5^3: variance 2 / (256 * 125); up 256 -> 128 of 2^3: 2 / ((256 + 128) / 2 * 8).
    for weight, variance in (
        (published.encoder[4].convolutions[1].weight, 2 / (256 * 125)),
        (published.up[3].convolution.weight, 2 / (192 * 8)),
        (published.encoder[0].convolutions[0].weight, 2 / (8.5 * 125)),
    ):
        assert float(weight.detach().square().mean()) == pytest.approx(variance, rel=0.1)
    assert all(not p.any() for name, p in published.named_parameters() if name.endswith("bias"))
    assert all((m.weight == 0.25).all() for m in published.modules() if isinstance(m, nn.PReLU))


def test_a_seed_decides_the_weights_and_the_global_state_is_left_alone():
    before = torch.random.get_rng_state()
    a, b = build_vnet(SMALL, 1, 2), build_vnet(SMALL, 1, 2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    initialise(b, seed=7)
    assert not torch.equal(a.head.convolution.weight, b.head.convolution.weight)
    initialise(b, seed=0)
    assert torch.equal(a.head.convolution.weight, b.head.convolution.weight)


def test_initialise_resets_normalisation():
    network = build_vnet(SMALL.model_copy(update={"normalisation": "batch"}), 1, 2).train()
    network(image(2, 1, 8, 8, 8) + 3.0)
    initialise(network, seed=0)
    normalisation = network.encoder[0].normalisations[0]
    assert not normalisation.running_mean.any()
    assert (normalisation.running_var == 1).all()


def test_normalisations():
    def kind(name):
        return build_vnet(NetworkPlan(width=12, convolutions=(1, 1), normalisation=name), 1, 2).up[0].normalisation

    assert isinstance(kind("none"), nn.Identity)
    assert isinstance(kind("batch"), nn.BatchNorm3d)
    assert isinstance(kind("instance"), GroupNormalisation)
    assert kind("instance").num_groups == 12
    assert kind("group").num_groups == 4


def test_build_is_eval_free_and_float32():
    network = build_vnet(SMALL, 1, 2)
    assert isinstance(network, VNet)
    assert network.training
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert {p.device.type for p in network.parameters()} == {"cpu"}
