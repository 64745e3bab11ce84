"""Zarr arrays: what is written comes back, and whatever is lost or changed is an error, never background."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import zarr
from ome_zarr_models.v05 import ImageLabel

from tests.files import file_of
from vnet_core.colours import rgb
from vnet_core.errors import StorageError
from vnet_core.geometry import CANONICAL_DIRECTION, Geometry, from_mapping, matrix_of
from vnet_core.plan import Label
from workers.storage.arrays import (
    CHUNK_EDGE,
    SHARD_EDGE,
    InSlabs,
    StoredArray,
    create_array,
    read_array,
    write_arrays,
    write_in_slabs,
    write_ome_labels,
)
from workers.storage.store import Root

LABELS = (Label(value=1, name="liver"), Label(value=300, name="tumour"))
SAGITTAL = matrix_of([[1, 0, 0], [0, 0, -1], [0, -1, 0]])


@pytest.fixture
def root(tmp_path) -> Root:
    return Root(tmp_path)


def shards(root: Root, prefix: str, name: str) -> list[Path]:
    return sorted(p for p in file_of(root, f"{prefix}/{name}/c").rglob("*") if p.is_file())


def noise(*shape: int, dtype=np.float32) -> np.ndarray:
    return (np.random.default_rng(0).normal(size=shape) * 50).astype(dtype)


def refused(root: Root, prefix: str = "v", name: str = "image") -> str:
    with pytest.raises(StorageError) as caught:
        read_array(root, prefix, name)
    assert caught.value.code == "store.corrupt"
    assert f"{prefix}/{name}" in str(caught.value)
    return str(caught.value)


# --- round trips


@pytest.mark.parametrize(
    "array",
    [
        noise(1, 5, 6, 7),
        noise(3, 65, 1, 130),
        noise(2, 64, 64, 64, dtype=np.int16),
        noise(1, 257, 3, 2, dtype=np.uint8),
        noise(4, 5, 6, dtype=np.uint16),
        noise(1, 1, 1, 1),
        noise(2, 9, 8, 7)[:, ::-1, :, ::2],
        np.array([np.nan, np.inf, -0.0, 1e-45], np.float32).reshape(1, 1, 1, 4),
    ],
    ids=lambda array: f"{array.dtype}-{array.shape}",
)
def test_arrays_come_back_to_the_last_bit(root, array):
    write_arrays(root, "volumes/v", {"image": array}, {})
    found = read_array(root, "volumes/v", "image")
    assert found.dtype == array.dtype
    assert found.tobytes() == np.ascontiguousarray(array).tobytes()
    assert found.flags.writeable


def test_several_arrays_and_their_attributes(root):
    arrays = {"image": noise(2, 5, 6, 7), "label": noise(5, 6, 7, dtype=np.uint8)}
    write_arrays(root, "v", arrays, {"geometry": {"shape": [5, 6, 7]}, "é": [1.5, None]})
    for name, array in arrays.items():
        np.testing.assert_array_equal(read_array(root, "v", name), array)
    assert dict(zarr.open_group(file_of(root, "v"), mode="r").attrs) == {
        "geometry": {"shape": [5, 6, 7]},
        "é": [1.5, None],
    }
    assert root.exists("v/label/zarr.json")
    assert not root.exists("v/truth/zarr.json")
    assert not root.exists("w/label/zarr.json")


@pytest.mark.parametrize("planes", [1, 50, 64, 100, 128, 1000])
def test_slabs_leave_the_files_of_the_whole(root, planes):
    arrays = {"image": noise(2, 150, 70, 9), "label": np.zeros((150, 70, 9), np.uint8)}
    write_arrays(root, "whole", arrays, {"a": 1})
    slabs = {
        name: InSlabs(array.shape, array.dtype, lambda wanted, array=array: array[..., wanted, :, :])
        for name, array in arrays.items()
    }
    write_in_slabs(root, "slabs", slabs, {"a": 1}, planes)
    whole, found = ({s.key.removeprefix(key): root.get(s.key) for s in root.walk(key)} for key in ("whole", "slabs"))
    assert found == whole


def test_a_second_write_replaces_everything(root):
    write_arrays(root, "v", {"image": noise(1, 70, 70, 70), "label": noise(70, 70, 70, dtype=np.uint8)}, {"a": 1})
    write_arrays(root, "v", {"image": noise(1, 5, 6, 7)}, {"b": 2})
    np.testing.assert_array_equal(read_array(root, "v", "image"), noise(1, 5, 6, 7))
    assert not root.exists("v/label/zarr.json")
    group = zarr.open_group(file_of(root, "v"), mode="r")
    assert dict(group.attrs) == {"b": 2}


def test_plain_zarr_reads_what_we_write(root):
    write_arrays(root, "v", {"image": noise(2, 70, 5, 6)}, {})
    array = zarr.open_array(file_of(root, "v/image"), mode="r")
    np.testing.assert_array_equal(array[:], noise(2, 70, 5, 6))
    assert json.loads(root.get("v/image/zarr.json"))["zarr_format"] == 3


def test_one_file_per_shard_and_chunks_within(root):
    write_arrays(root, "v", {"image": np.zeros((2, 300, 70, 20), np.float32)}, {})
    array = zarr.open_array(file_of(root, "v/image"), mode="r")
    assert array.chunks == (1, CHUNK_EDGE, CHUNK_EDGE, 20)
    assert array.shards == (1, SHARD_EDGE, 2 * CHUNK_EDGE, 20)
    assert len(shards(root, "v", "image")) == 4


# --- damage


def test_a_region_of_background_is_written_too(root):
    array = create_array(root, "v/labels", (20, 20, 20), np.dtype(np.uint8), (10, 10, 10), (20, 20, 10))
    array.write(np.zeros((20, 20, 10), np.uint8), slice(0, 20), slice(0, 20), slice(0, 10))
    assert "lacks 1 shards, first (0, 0, 1)" in refused_whole(array)
    StoredArray(root, "v", "labels").write(np.zeros((20, 20, 10), np.uint8), slice(0, 20), slice(0, 20), slice(10, 20))
    np.testing.assert_array_equal(StoredArray(root, "v", "labels").whole().read(...), 0)


def refused_whole(array):
    with pytest.raises(StorageError) as caught:
        array.whole()
    return str(caught.value)


@pytest.mark.parametrize("value", [0, 7])
def test_arrays_of_one_value_are_written_too(root, value):
    """Else a lost file would read as zeros, that is background."""
    for dtype in (np.uint8, np.float32):
        write_arrays(root, "v", {"image": np.full((1, 300, 20, 20), value, dtype)}, {})
        files = shards(root, "v", "image")
        assert len(files) == 2
        assert all(path.stat().st_size > 0 for path in files)
        np.testing.assert_array_equal(read_array(root, "v", "image"), value)
        files[1].unlink()
        assert "lacks 1 shards, first (0, 1, 0, 0)" in refused(root)


def test_every_lost_shard_is_counted(root):
    write_arrays(root, "v", {"image": noise(3, 20, 20, 20)}, {})
    for path in shards(root, "v", "image")[1:]:
        path.unlink()
    assert "lacks 2 shards, first (1, 0, 0, 0)" in refused(root)


@pytest.mark.parametrize("array", [noise(1, 12, 13, 70), np.zeros((1, 12, 13, 70), np.uint8)], ids=["noise", "zeros"])
def test_a_flipped_byte_anywhere_in_a_shard_is_an_error(root, array):
    write_arrays(root, "v", {"image": array}, {})
    (path,) = shards(root, "v", "image")
    content = path.read_bytes()
    positions = set(range(0, len(content), max(1, len(content) // 40))) | set(range(len(content) - 40, len(content)))
    for position in sorted(p for p in positions if p >= 0):
        broken = bytearray(content)
        broken[position] ^= 0x10
        path.write_bytes(broken)
        refused(root)
    path.write_bytes(content)
    np.testing.assert_array_equal(read_array(root, "v", "image"), array)


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.3, 0.999])
def test_a_cut_shard_is_an_error(root, keep):
    """A file of no bytes is what a power cut leaves on some file systems."""
    write_arrays(root, "v", {"image": noise(1, 12, 13, 14)}, {})
    (path,) = shards(root, "v", "image")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    refused(root)


def test_an_array_that_is_not_there_is_an_error(root):
    write_arrays(root, "v", {"image": noise(1, 2, 2, 2)}, {})
    for prefix, name in (("v", "label"), ("w", "image")):
        with pytest.raises(StorageError):
            read_array(root, prefix, name)


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"\xff"])
def test_broken_metadata_are_an_error(root, content):
    write_arrays(root, "v", {"image": noise(1, 2, 2, 2)}, {})
    file_of(root, "v/image/zarr.json").write_bytes(content)
    refused(root)


def test_a_full_disk_is_told(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        with pytest.raises(StorageError) as caught:
            write_arrays(Root(folder), "v", {"image": noise(1, 64, 64, 64)}, {})
        assert caught.value.code == "store.full"
    finally:
        subprocess.run(["umount", str(folder)], check=True)


# --- OME-Zarr


def ome_group(root: Root, direction=CANONICAL_DIRECTION, labels=LABELS, dtype=np.uint16) -> dict:
    mask = np.zeros((4, 5, 6), dtype)
    mask[1, 2, 3:5] = labels[-1].value
    geometry = Geometry(mask.shape, (3.0, 0.7, 0.8), (10.0, 20.0, 30.0), direction)
    write_ome_labels(root, "r/labels", mask, geometry, labels)
    np.testing.assert_array_equal(read_array(root, "r/labels", "0"), mask)
    group = json.loads(root.get("r/labels/zarr.json"))
    assert (group["zarr_format"], group["node_type"]) == (3, "group")
    assert from_mapping(group["attributes"]["vnet"]["geometry"]) == geometry
    return group["attributes"]["ome"]


def test_the_multiscales_of_ome_zarr_0_5_by_hand(root):
    ome = ome_group(root)
    assert ome["version"] == "0.5"
    (image,) = ome["multiscales"]
    assert image["axes"] == [
        {"name": "z", "type": "space", "unit": "millimeter"},
        {"name": "y", "type": "space", "unit": "millimeter"},
        {"name": "x", "type": "space", "unit": "millimeter"},
    ]
    # one scale, then one translation, each as long as the axes
    assert image["datasets"] == [
        {
            "path": "0",
            "coordinateTransformations": [
                {"type": "scale", "scale": [3.0, 0.7, 0.8]},
                {"type": "translation", "translation": [30.0, 20.0, 10.0]},
            ],
        }
    ]
    array = json.loads(root.get("r/labels/0/zarr.json"))
    assert array["dimension_names"] == ["z", "y", "x"]
    assert array["data_type"] == "uint16"
    assert array["shape"] == [4, 5, 6]


def test_the_image_label_of_ome_zarr_0_5_by_hand(root):
    image_label = ome_group(root)["image-label"]
    # two voxels of 3 x 0.7 x 0.8 mm have the last label
    assert image_label["properties"] == [
        {"label-value": 1, "name": "liver", "volume_ml": 0.0},
        {"label-value": 300, "name": "tumour", "volume_ml": pytest.approx(0.00336)},
    ]
    assert [colour["label-value"] for colour in image_label["colors"]] == [1, 300]
    for colour in image_label["colors"]:
        assert len(colour["rgba"]) == 4
        assert all(isinstance(part, int) and 0 <= part <= 255 for part in colour["rgba"])
        assert colour["rgba"][3] > 0


def test_more_labels_than_colours_still_have_values_of_their_own(root):
    labels = tuple(Label(value=i, name=f"label {i}") for i in range(1, 15))
    colours = ome_group(root, labels=labels, dtype=np.uint8)["image-label"]["colors"]
    assert [colour["label-value"] for colour in colours] == list(range(1, 15))
    assert len({tuple(colour["rgba"]) for colour in colours[:7]}) == 7
    assert [tuple(colour["rgba"]) for colour in colours] == [(*rgb(i), 255) for i in range(14)]


def test_the_field_s_own_models_accept_the_label_image(root):
    ome = ome_group(root)
    image = ImageLabel.from_zarr(zarr.open_group(file_of(root, "r/labels"), mode="r"))
    told = image.attributes.ome.image_label
    assert [tuple(colour.rgba) for colour in told.colors] == [tuple(c["rgba"]) for c in ome["image-label"]["colors"]]
    assert [p["volume_ml"] for p in ome["image-label"]["properties"]] == [p.volume_ml for p in told.properties]
    ome["image-label"]["colors"][0]["rgba"] = [300, 0, 0, 255]
    attributes = json.loads(root.get("r/labels/zarr.json"))["attributes"] | {"ome": ome}
    zarr.open_group(file_of(root, "r/labels"), mode="a").attrs.put(attributes)
    with pytest.raises(ValueError, match="rgba"):
        ImageLabel.from_zarr(zarr.open_group(file_of(root, "r/labels"), mode="r"))


def test_the_translation_lies_along_the_array_axes(root):
    # z runs to the left, y to the feet, x to the front
    (image,) = ome_group(root, SAGITTAL)["multiscales"]
    translation = image["datasets"][0]["coordinateTransformations"][1]["translation"]
    assert translation == [10.0, -30.0, -20.0]


def test_writing_labels_again_leaves_nothing_of_the_old_ones(root):
    ome_group(root)
    write_ome_labels(root, "r/labels", np.zeros((1, 1, 1), np.uint8), Geometry((1, 1, 1), (1, 1, 1), (0, 0, 0)), LABELS)
    assert len(shards(root, "r/labels", "0")) == 1
    assert not read_array(root, "r/labels", "0").any()
