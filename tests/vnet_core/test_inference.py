"""Inference: one pass or tiles, what it promises about memory, and that it gives the same each time."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from vnet_core import inference
from vnet_core.blocks import tiles
from vnet_core.errors import MemoryLimitError
from vnet_core.inference import (
    GIB,
    choose_tile,
    logit_bands,
    precision,
    predict_logits,
    predicted_peak_bytes,
    prepare,
    processor_precision,
)
from vnet_core.networks.layout import receptive_field
from vnet_core.networks.memory import OVERHEAD_BYTES
from vnet_core.networks.vnet import build_vnet
from vnet_core.plan import Plan
from vnet_core.sections import InferencePlan, NetworkPlan

CPU = torch.device("cpu")


def make_plan(memory_limit_gib=6.0, **sections):
    return Plan.from_mapping(
        {
            "labels": [{"value": 1, "name": "one"}, {"value": 4, "name": "four"}],
            "network": {"kernel_size": 3, "width": 4, "convolutions": [1, 1, 1]},
            "training": {"patch_size": [4, 4, 4]},
            "inference": {"memory_limit_gib": memory_limit_gib, "overlap": 0.5},
            **sections,
        }
    )


def network_of(plan, dtype=torch.float32):
    network = build_vnet(plan.network, len(plan.channels), plan.outputs)
    return prepare(network, CPU, dtype)


def image(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


class Constant(nn.Module):
    """Logits 1.5, -2 and 0.25 everywhere."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.5, -2.0, 0.25]))

    def forward(self, x):
        return self.weight[None, :, None, None, None].expand(-1, -1, *x.shape[2:])


class Identity(nn.Module):
    """The image as logits of every class, and a count of calls and of the largest input."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.shapes = []

    def forward(self, x):
        self.shapes.append(tuple(x.shape[2:]))
        return x.expand(-1, 3, -1, -1, -1)


@pytest.mark.parametrize("shape", [(8, 8, 8), (9, 5, 14), (1, 1, 1), (3, 20, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_pass_is_the_network(shape, dtype):
    plan = make_plan()
    network = network_of(plan, dtype)
    x = image(1, *shape)
    logits = predict_logits(network, x, plan)
    assert logits.shape == (3, *shape)
    assert logits.dtype == torch.float32
    with torch.inference_mode():
        assert torch.equal(logits, network(x[None].to(dtype))[0].float())


def test_bfloat16_agrees_with_float32():
    plan = make_plan()
    x = image(1, 16, 16, 16)
    exact = predict_logits(network_of(plan), x, plan)
    rounded = predict_logits(network_of(plan, torch.bfloat16), x, plan)
    assert float((rounded - exact).abs().max()) < 0.05 * float(exact.abs().max())


def tiled_plan(monkeypatch, tile, **inference_section):
    """A plan whose volumes go through in tiles of this shape."""
    monkeypatch.setattr(inference, "choose_tile", lambda *_: tile)
    return make_plan(inference={"overlap": 0.5, **inference_section})


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(8, 8, 8), (9, 13, 17), (21, 8, 3), (1, 30, 30)])
def test_blending_keeps_a_constant_and_an_image(monkeypatch, overlap, shape):
    plan = tiled_plan(monkeypatch, (8, 8, 8), overlap=overlap)
    x = image(1, *shape)
    constant = predict_logits(Constant(), x, plan)
    assert torch.allclose(constant, torch.tensor([1.5, -2.0, 0.25])[:, None, None, None].expand(-1, *shape))
    assert torch.allclose(predict_logits(Identity(), x, plan), x.expand(3, -1, -1, -1), atol=1e-6)


def test_blending_by_hand(monkeypatch):
    class Calls(Constant):
        """1 in the first call, 2 in the second."""

        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x) * 0 + self.calls

    plan = tiled_plan(monkeypatch, (1, 1, 4), overlap=0.5)
    (band,) = logit_bands(Calls(), image(1, 1, 1, 6), plan)
    logits = band[0, 0, 0]
    # Tiles at 0 and 2 with weights a b b a, a = e^-4.5 and b = e^-0.5: voxel 2 is (b + 2 a) / (a + b), voxel 3
    # (a + 2 b) / (a + b), with a / (a + b) = 1 / (1 + e^4) = 0.0179862.
    assert logits.tolist() == pytest.approx([1, 1, 1.0179862, 1.9820138, 2, 2])


def test_a_tile_that_covers_everything_is_the_whole_pass(monkeypatch):
    plan = make_plan()
    x = image(1, 9, 13, 17)
    network = network_of(plan)
    whole = predict_logits(network, x, plan)
    monkeypatch.setattr(inference, "choose_tile", lambda *_: (16, 16, 32))
    assert torch.equal(predict_logits(network, x, plan), whole)


def test_tiles_agree_with_the_whole_pass():
    """With a receptive field of 27 voxels, tiles of 64 that share 48 differ little; tiles of 32 that share none do."""
    plan = make_plan()
    x = image(1, 16, 16, 160)
    network = network_of(plan)
    whole = predict_logits(network, x, plan)

    def difference(tile, overlap):
        regions = tiles((16, 16, 160), tile, overlap)
        (blended,) = inference._blended(network, x, regions, plan.outputs)
        return float((whole - blended).abs().mean() / whole.std())

    assert receptive_field(plan.network)[-1] == 27
    assert difference((16, 16, 64), 0.75) < 0.02
    assert difference((16, 16, 64), 0.75) < difference((16, 16, 32), 0.0) / 3


def test_bands_come_in_order_and_only_once_finished(monkeypatch):
    plan = tiled_plan(monkeypatch, (8, 8, 8), overlap=0.5)
    x = image(1, 21, 9, 9)
    bands = list(logit_bands(Identity(), x, plan))
    # Tiles start at 0, 4, 8, 12 and 13.
    assert [band.shape[1] for band in bands] == [4, 4, 4, 1, 8]
    assert torch.allclose(torch.cat(bands, dim=1), x.expand(3, -1, -1, -1), atol=1e-6)


def test_one_pass_is_one_band():
    plan = make_plan()
    (band,) = logit_bands(Identity(), image(1, 5, 6, 7), plan)
    assert band.shape == (3, 5, 6, 7)


def test_results_belong_to_the_caller():
    plan = make_plan()
    logits = predict_logits(network_of(plan), image(1, 8, 8, 8), plan)
    logits += 1.0
    assert not logits.is_inference()
    assert not logits.requires_grad


@pytest.mark.parametrize("tile", [None, (8, 8, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_and_any_number_of_threads_give_the_same(monkeypatch, tile, dtype):
    plan = tiled_plan(monkeypatch, tile)
    network = network_of(plan, dtype)
    x = image(1, 13, 16, 18)
    first = predict_logits(network, x, plan)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert torch.equal(predict_logits(network, x, plan), first)
    finally:
        torch.set_num_threads(threads)


def test_the_image_is_left_alone():
    plan = make_plan()
    x = image(1, 8, 8, 8)
    before = x.clone()
    predict_logits(network_of(plan), x, plan)
    assert torch.equal(x, before)


def test_prepare_copies():
    plan = make_plan()
    network = build_vnet(plan.network, 1, plan.outputs)
    prepared = prepare(network, CPU, torch.bfloat16)
    assert {p.dtype for p in prepared.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert not prepared.training
    assert network.training
    assert not any(p.requires_grad for p in prepared.parameters())
    assert prepared.encoder[1].convolutions[0].weight.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_f": True, "avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"avx512_f": True, "avx512_bf16": False}, torch.float32),
        ({"avx2": True}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_precision_of_processors(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert processor_precision(CPU) == expected
    assert precision(InferencePlan(), CPU) == expected


def test_precision_of_unknown_devices_and_of_the_plan():
    assert processor_precision(torch.device("meta")) == torch.float32
    assert precision(InferencePlan(precision="bfloat16"), CPU) == torch.bfloat16
    assert precision(InferencePlan(precision="float32"), CPU) == torch.float32


PUBLISHED = Plan.from_mapping({"labels": [{"value": 1, "name": "one"}]})


def test_predicted_peak_of_the_published_network():
    """The widest moment is the last decoder stage: 32 channels in, 32 out, and the image."""
    voxels = 128 * 160 * 160
    # Weights without biases and slopes, and the largest kernel once more.
    kernels = 65_175_314 - 3_456 - 3_458 + 256 * 256 * 125
    expected = (kernels + 65 * voxels) * 2 + OVERHEAD_BYTES
    assert predicted_peak_bytes(PUBLISHED.network, 1, 2, (128, 160, 160), 2) == expected


def test_predicted_peak_grows_with_what_it_depends_on():
    def peak(channels=1, classes=2, shape=(32, 32, 32), width=8, normalisation="none"):
        network = PUBLISHED.network.model_copy(update={"width": width, "normalisation": normalisation})
        return predicted_peak_bytes(network, channels, classes, shape, 4)

    assert peak() == peak(shape=(31, 17, 32))
    for larger in (
        {"channels": 4},
        {"classes": 90},
        {"shape": (32, 32, 48)},
        {"width": 16},
        {"normalisation": "group"},
    ):
        assert peak(**larger) > peak()


@pytest.mark.parametrize(
    ("channels", "changes", "bytes_per_value", "values"),
    [
        # The image, eight channels into the last stage, eight out of its convolution.
        (1, {}, 2, 1 + 8 + 8),
        # With a second convolution what entered waits beside its input and output.
        (1, {"convolutions": (2, 1)}, 2, 1 + 8 + 8 + 8),
        (1, {"normalisation": "group"}, 2, 1 + 8 + 8 + 8),
        (3, {}, 2, 3 + 8 + 8),
        # In float32 a small convolution of 27 taps is unfolded, and its output made twice.
        (1, {}, 4, 1 + 8 + 8 + 8 * 27 + 8),
        # One of 125 taps is not; the head, eight channels in and two out, is.
        (1, {"kernel_size": 5}, 4, 1 + 8 + 2 + 8 + 2),
    ],
)
def test_predicted_values_per_voxel_by_hand(channels, changes, bytes_per_value, values):
    network = NetworkPlan(**{"kernel_size": 3, "width": 4, "convolutions": (1, 1), **changes})

    def peak(shape):
        return predicted_peak_bytes(network, channels, 2, shape, bytes_per_value)

    assert (peak((32, 32, 64)) - peak((32, 32, 32))) / (32**3 * bytes_per_value) == values


def test_no_tile_where_the_volume_fits():
    assert choose_tile(PUBLISHED, (128, 160, 160), 2) is None


@pytest.mark.parametrize("shape", [(600, 512, 512), (40, 800, 800), (2000, 64, 64)])
@pytest.mark.parametrize("limit_gib", [0.7, 2.0, 6.0])
def test_tiles_fit_and_are_as_large_as_they_can_be(shape, limit_gib):
    plan = PUBLISHED.model_copy(update={"inference": InferencePlan(memory_limit_gib=limit_gib)})
    tile = choose_tile(plan, shape, 2)
    if tile is None:
        assert predicted_peak_bytes(plan.network, 1, 2, shape, 2) <= limit_gib * GIB
        return
    edge = max(tile)
    assert edge % 16 == 0
    assert edge >= 32
    assert tile == tuple(min(edge, n) for n in shape)

    def needed(edge):
        cube = tuple(min(edge, n) for n in shape)
        return predicted_peak_bytes(plan.network, 1, 2, cube, 2) + 5 * cube[0] * shape[1] * shape[2] * 4

    assert needed(edge) <= limit_gib * GIB < needed(edge + 16)


def test_not_even_the_smallest_tile():
    plan = PUBLISHED.model_copy(update={"inference": InferencePlan(memory_limit_gib=0.1)})
    with pytest.raises(
        MemoryLimitError, match=r"\(32, 32, 32\).* needs 0\.\d\d GiB.*memory_limit_gib is 0\.1"
    ) as caught:
        choose_tile(plan, (600, 512, 512), 2)
    assert caught.value.code == "memory.tile"
    with pytest.raises(MemoryLimitError):
        choose_tile(plan, (20, 20, 20), 2)


MEASURE = """
import ctypes, json, sys
import torch
from vnet_core.inference import choose_tile, predict_logits, predicted_peak_bytes, prepare
from vnet_core.networks.vnet import build_vnet
from vnet_core.plan import Plan

def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

torch.set_num_threads(2)
for case in json.loads(sys.argv[1]):
    plan, dtype, shape = Plan.from_mapping(case["plan"]), getattr(torch, case["dtype"]), tuple(case["shape"])
    network = prepare(build_vnet(plan.network, len(plan.channels), plan.outputs), torch.device("cpu"), dtype)
    weights_bytes = sum(p.numel() * p.element_size() for p in network.parameters())
    image = torch.randn(len(plan.channels), *shape)
    predict_logits(network, image[:, :8, :8, :8], plan)
    ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    predict_logits(network, image, plan)
    peak = status("VmHWM") - before + weights_bytes
    size = torch.empty((), dtype=dtype).element_size()
    predicted = predicted_peak_bytes(plan.network, len(plan.channels), plan.outputs, shape, size)
    print(json.dumps({"peak": peak, "predicted": predicted, "tile": choose_tile(plan, shape, size)}))
"""


def measured(cases):
    """Peak of predicting each case in a process of its own, in bytes, beside the prediction."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the peak of one call is read from /proc, which only Linux has")
    run = subprocess.run([sys.executable, "-c", MEASURE, json.dumps(cases)], capture_output=True, text=True, check=True)
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_measured_peak_is_within_the_prediction():
    one = {"labels": [{"value": 1, "name": "one"}]}
    network = {"kernel_size": 3, "width": 16, "convolutions": [1, 1, 1]}
    # where a processor only imitates bfloat16 this takes many minutes, and no plan asks for it
    native = str(processor_precision(CPU)).removeprefix("torch.")
    cases = [
        {"plan": {**one, "network": network}, "dtype": native, "shape": [96, 128, 128]},
        {"plan": {**one, "network": network}, "dtype": "float32", "shape": [93, 96, 90]},
        {
            "plan": {**one, "network": {**network, "normalisation": "instance"}, "channels": ["a", "b"]},
            "dtype": "float32",
            "shape": [80, 80, 80],
        },
        {
            "plan": {"labels": [{"value": i, "name": str(i)} for i in range(1, 100)], "network": network},
            "dtype": "float32",
            "shape": [64, 64, 64],
        },
    ]
    for result in measured(cases):
        assert result["tile"] is None
        assert result["peak"] <= result["predicted"] <= 2 * result["peak"], result


def test_measured_peak_of_tiles_is_within_the_limit():
    case = {
        "plan": {
            "labels": [{"value": 1, "name": "one"}],
            "network": {"kernel_size": 3, "width": 16, "convolutions": [1, 1, 1]},
            "inference": {"memory_limit_gib": 0.25},
        },
        "dtype": "float32",
        "shape": [88, 88, 88],
    }
    (result,) = measured([case])
    logits_bytes = 2 * 88**3 * 4
    assert result["predicted"] > 0.25 * GIB
    assert result["tile"] is not None
    assert result["peak"] <= 0.25 * GIB + logits_bytes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_the_labels_of_the_processor():
    plan = make_plan(memory_limit_gib=6.0)
    network = build_vnet(plan.network, 1, plan.outputs)
    x = image(1, 24, 20, 28)
    here = predict_logits(prepare(network, CPU, torch.float32), x, plan).argmax(0)
    cuda = torch.device("cuda")
    there = predict_logits(prepare(network, cuda, torch.float32), x.to(cuda), plan).argmax(0)
    assert (here == there).float().mean() > 0.999


# --- networks whose statistics are the grid's


@pytest.mark.parametrize(
    ("normalisation", "shape", "tile"),
    [
        ("instance", (64, 64, 64), None),
        ("instance", (64, 80, 96), None),  # 1.9 times the patch
        ("instance", (64, 80, 160), (64, 64, 64)),
        ("group", (20, 200, 200), (20, 64, 64)),
        ("batch", (64, 80, 160), None),
        ("none", (64, 80, 160), None),
    ],
)
def test_a_network_with_the_grids_statistics_sees_grids_of_the_training_patch(normalisation, shape, tile):
    network = {"kernel_size": 3, "width": 2, "convolutions": [1, 1], "normalisation": normalisation}
    plan = make_plan(network=network, training={"patch_size": [64, 64, 64]})
    assert choose_tile(plan, shape, 4) == tile
