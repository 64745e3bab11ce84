"""The layer table of a network, its totals, its picture, and the command that prints them."""

import io
import json

import pytest
import torch
from PIL import Image
from torch import nn

from flows.cli import main
from vnet_core.networks.describe import describe
from vnet_core.networks.drawing import network_picture
from vnet_core.networks.layout import count_macs
from vnet_core.networks.vnet import build_vnet, count_parameters
from vnet_core.sections import PRESETS, NetworkPlan

TINY = {"kernel_size": 3, "width": 2, "convolutions": (1, 2, 1), "decoder_convolutions": (1, 2)}
CHANGES = [
    *({"preset": name} for name in PRESETS),
    {"deep_supervision": "auxiliary", "head_kernel_size": 3},
    {"upsampling": "linear", "downsampling": "maximum", "normalisation": "group"},
    {"dropout": 0.5, "noise": 0.1},
    {"dropout": 0.5, "dropout_at": "activations", "entry": "expanded"},
]


def tiny(**changes):
    return NetworkPlan.model_validate({**changes, **TINY})


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_the_layers_add_up(changes):
    plan = tiny(**changes)
    description = describe(plan, 3, 4, (9, 12, 16))
    assert description.grid == (12, 12, 16)
    assert description.parameters == count_parameters(build_vnet(plan, 3, 4))
    assert sum(layer.parameters for layer in description.layers) == description.parameters
    assert sum(layer.macs for layer in description.layers) == description.macs
    assert description.macs == count_macs(plan, 3, 4, (9, 12, 16))


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_shapes_are_those_of_a_real_pass(changes):
    plan = tiny(**changes)
    network = build_vnet(plan, 1, 2).eval()
    shapes = []
    for module in network.modules():
        if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
            module.register_forward_hook(lambda module, given, output: shapes.append(tuple(output.shape[1:])))
    network(torch.zeros(1, 1, 8, 8, 16))
    layers = describe(plan, 1, 2, (8, 8, 16)).layers
    described = [layer.shape for layer in layers if "convolution" in layer.kind]
    assert described[: len(shapes)] == shapes
    assert len(described) - len(shapes) == (1 if plan.deep_supervision == "auxiliary" else 0)


def test_the_published_network():
    description = describe(NetworkPlan(), 1, 2, (64, 128, 128))
    assert description.parameters == 65_175_314
    assert description.receptive_field == (5, 22, 72, 172, 372, 476, 528, 546, 551, 551)
    assert round(description.macs / 1e9) == 502
    first, last = description.layers[0], description.layers[-1]
    assert (first.name, first.kind) == ("L1 convolution 1", "convolution 5^3")
    assert first.shape == (16, 64, 128, 128)
    assert first.parameters == 16 * 125 + 16
    assert first.macs == 2**20 * 16 * 125
    assert first.activation_bytes == 2**20 * 16 * 4
    assert (last.name, last.shape) == ("head convolution", (2, 64, 128, 128))
    names = [layer.name for layer in description.layers]
    assert names.index("L2 convolution 2") < names.index("bottom convolution 1") < names.index("up 4 convolution")
    assert len(set(names)) == len(names)


def test_json_is_plain():
    document = json.loads(json.dumps(describe(tiny(), 1, 2, (8, 8, 8)).as_json()))
    assert document["parameters"] == sum(layer["parameters"] for layer in document["layers"])
    assert document["gmacs"] == pytest.approx(sum(layer["macs"] for layer in document["layers"]) / 1e9)
    assert document["receptive_field"][0] == 3
    assert set(document["training_bytes"]) == {"bfloat16", "float32"}


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_the_picture_is_drawn_and_repeats(changes):
    description = describe(tiny(**changes), 1, 2, (16, 16, 16))
    png = network_picture(description, "a network", "png")
    assert png == network_picture(description, "a network", "png")
    with Image.open(io.BytesIO(png)) as picture:
        assert picture.size[0] == 1500
        assert len(set(picture.convert("RGB").resize((150, 60)).get_flattened_data())) > 20


def test_the_vector_picture_names_every_stage():
    svg = network_picture(describe(NetworkPlan(), 1, 2, (64, 128, 128)), "paper", "svg").decode()
    for word in ("L1", "L4", "bottom", "R4", "R1", "skip 128 ch", "8 x 16 x 16"):
        assert f"<!-- {word} -->" in svg


@pytest.fixture
def vnet(capsys, monkeypatch, tmp_path):
    """Runs ``vnet models describe`` in a folder of its own; gives exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        code = main(["models", "describe", *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_the_command_needs_neither_root_nor_server(vnet, tmp_path):
    picture = tmp_path / "compact.png"
    code, out, _ = vnet("compact", "--classes", 20, "--input", 32, 32, 32, "--json", "--graph", picture)
    assert code == 0
    document = json.loads(out)
    assert document["parameters"] == 4_314_356
    assert document["receptive_field"][-1] == 115
    assert document["graph"] == str(picture)
    with Image.open(picture) as image:
        assert image.format == "PNG"
    assert [path.name for path in tmp_path.iterdir()] == ["compact.png"]


def test_the_command_prints_a_table_of_a_plan_file(vnet, tmp_path):
    (tmp_path / "plan.toml").write_text('[network]\npreset = "caffe"\nwidth = 4\n', encoding="utf-8")
    code, out, _ = vnet("plan.toml", "--input", 16, 16, 16)
    assert code == 0
    assert "L1 convolution 1" in out
    assert "507 voxels, stage by stage" in out


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("nonsense",), "network.unknown"),
        (("paper", "--channels", 0), "network.input"),
        (("paper", "--input", 16, 0, 16), "network.input"),
        (("paper", "--input", 16, 16, 16, "--graph", "net.bmp"), "network.graph"),
        (("paper", "--input", 16, 16, 16, "--graph", "/proc/net.png"), "output.unwritable"),
        (("wrong.toml",), "network.unknown-key"),
    ],
)
def test_what_cannot_be_described_is_named(vnet, arguments, code, tmp_path):
    (tmp_path / "wrong.toml").write_text("[network]\nwidht = 4\n", encoding="utf-8")
    exit_code, _, err = vnet(*arguments)
    assert exit_code == 2
    assert f"vnet models: {code}: " in err
