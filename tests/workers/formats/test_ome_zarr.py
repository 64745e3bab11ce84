"""OME-Zarr images and label maps, both versions, and what in their metadata or chunks is refused."""

import json
from pathlib import Path

import numcodecs
import numpy as np
import pytest
import zarr
from ome_zarr_models import v04, v05
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, ShardingCodec, ZstdCodec

from tests.workers.sources.test_scans import OBLIQUE, grid, numbered, refused
from vnet_core.geometry import Geometry, to_mapping
from vnet_core.plan import Label
from vnet_core.sections import ReadingPlan
from workers.formats.ome_zarr import is_ome_zarr
from workers.sources.scans import read_geometry, read_label, read_label_scan, read_scan, read_volume, source_files
from workers.storage.arrays import write_ome_labels
from workers.storage.store import Root

SHAPE = (3, 4, 5)
GEOMETRY = Geometry(SHAPE, (2.5, 0.75, 0.5), (-12.5, 30.25, 7.0))


def metadata(axes: str = "zyx", unit: str | None = "millimeter", factor: float = 1.0, **more: object) -> dict:
    lead = len(axes) - 3
    space = {"type": "space"} | ({"unit": unit} if unit else {})
    kinds = {"t": {"type": "time", "unit": "second"}, "c": {"type": "channel"}}
    scale = [1.0] * lead + [2.5 * factor, 0.75 * factor, 0.5 * factor]
    shift = [0.0] * lead + [7.0 * factor, 30.25 * factor, -12.5 * factor]
    transforms = [{"type": "scale", "scale": scale}, {"type": "translation", "translation": shift}]
    multiscale = {
        "name": "scan",
        "axes": [{"name": a, **kinds.get(a, space)} for a in axes],
        "datasets": [{"path": "0", "coordinateTransformations": transforms}],
        **more,
    }
    return {"multiscales": [multiscale]}


def image(folder: Path, version: int = 3, voxels: np.ndarray | None = None, ome: dict | None = None, **create) -> Path:
    voxels = numbered(SHAPE, np.int16) if voxels is None else voxels
    ome = metadata("tczyx"[5 - voxels.ndim :]) if ome is None else ome
    if version == 2:
        ome["multiscales"][0]["version"] = "0.4"
    attributes = {"ome": {"version": "0.5", **ome}} if version == 3 else ome
    group = zarr.open_group(folder, mode="w", zarr_format=version, attributes=attributes)
    if version == 2:
        create = {"chunk_key_encoding": {"name": "v2", "separator": "/"}} | create
    else:
        create = {"dimension_names": [axis["name"] for axis in ome["multiscales"][0]["axes"]]} | create
    create = {"chunks": (1,) * (voxels.ndim - 3) + (2, 3, 4)} | create
    array = group.create_array(
        "0", shape=voxels.shape, dtype=voxels.dtype, config={"write_empty_chunks": True}, **create
    )
    array[...] = voxels
    return folder


def edited(path: Path, *keys: object, value: object) -> None:
    """The JSON file with the value at ``keys`` set, or removed for ``...``."""
    content = json.loads(path.read_text("utf-8"))
    place = content
    for key in keys[:-1]:
        place = place[key]
    if value is ...:
        del place[keys[-1]]
    else:
        place[keys[-1]] = value
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("dtype", ["u1", "i2", "u2", "i4", "i8", "f4", "f8", "bool"])
def test_voxels_and_grid(tmp_path, version, dtype):
    voxels = numbered(SHAPE, dtype)
    path = image(tmp_path / "a.ome.zarr", version, voxels)
    (v05 if version == 3 else v04).Image.from_zarr(zarr.open_group(path, mode="r"))  # what is made here is valid
    scan = read_scan(path)
    assert scan.volume.voxels.dtype == (np.uint8 if dtype == "bool" else dtype)
    np.testing.assert_array_equal(scan.volume.voxels[0], voxels)
    assert scan.volume.geometry == GEOMETRY
    assert scan.warnings == ("geometry.assumed-axes",)
    assert read_geometry(path) == GEOMETRY
    if dtype[0] == "u":
        np.testing.assert_array_equal(read_label(path).labels, voxels)
    files = source_files(path)
    assert {f.name for f in files if f.name.startswith((".z", "zarr"))}
    assert len(files) == 2 * 2 * 2 + (3 if version == 2 else 2)
    assert files == sorted(p for p in path.rglob("*") if p.is_file() and p.parent / p.name != path / "0" / ".zattrs")


ENCODINGS = {
    "v2 raw, dots": (2, {"compressors": None, "chunk_key_encoding": {"name": "v2", "separator": "."}}),
    "v2 column order": (2, {"order": "F"}),
    "v3 raw": (3, {"compressors": None}),
    "v3 blosc": (3, {"compressors": BloscCodec(cname="zstd", clevel=3)}),
    "v3 checksums": (3, {"compressors": [ZstdCodec(checksum=True), Crc32cCodec()]}),
    "v3 dots": (3, {"chunk_key_encoding": {"name": "default", "separator": "."}}),
    "v3 big-endian": (3, {"serializer": BytesCodec(endian="big")}),
    "v3 shards": (3, {"chunks": (1, 2, 3), "shards": (2, 4, 6)}),
    "v3 one chunk": (3, {"chunks": (64, 64, 64)}),
}


@pytest.mark.parametrize(("version", "create"), ENCODINGS.values(), ids=ENCODINGS)
def test_encodings(tmp_path, version, create):
    path = image(tmp_path / "Doe", version, **create)
    np.testing.assert_array_equal(read_volume(path).voxels[0], numbered())


def test_big_endian_v2(tmp_path):
    path = image(tmp_path / "Doe", 2, numbered(dtype=">i2"))
    volume = read_volume(path)
    assert volume.voxels.dtype.isnative
    np.testing.assert_array_equal(volume.voxels[0], numbered())


@pytest.mark.parametrize("version", [2, 3])
def test_time_and_channels_of_one_are_squeezed_and_of_more_refused(tmp_path, version):
    for number, lead in enumerate(((1,), (1, 1))):
        path = image(tmp_path / f"Doe{number}", version, numbered(dtype="i2").reshape(*lead, *SHAPE))
        scan = read_scan(path)
        np.testing.assert_array_equal(scan.volume.voxels[0], numbered())
        assert scan.volume.geometry == GEOMETRY
    for number, lead in enumerate(((2,), (1, 2), (3, 1))):
        path = image(tmp_path / f"Roe{number}", version, np.zeros((*lead, *SHAPE), "i2"))
        assert refused(path) == refused(path, read_geometry) == "scan.not-3d"
    for axes in ("zxy", "xyz", "czy"):
        assert refused(image(tmp_path / f"Doe-{axes}", version, ome=metadata(axes))) == "scan.not-3d"


@pytest.mark.parametrize(
    ("unit", "factor"), [("micrometer", 1e3), ("nanometer", 1e6), ("centimeter", 0.1), ("meter", 1e-3)]
)
def test_units_of_length_are_scaled_to_mm(tmp_path, unit, factor):
    path = image(tmp_path / "Doe", ome=metadata(unit=unit, factor=factor))
    geometry = read_geometry(path)
    assert geometry.spacing_mm == pytest.approx(GEOMETRY.spacing_mm, rel=1e-12)
    assert geometry.origin_mm == pytest.approx(GEOMETRY.origin_mm, rel=1e-12)
    for unit in (None, "parsec", "pixel"):
        assert refused(image(tmp_path / "Roe", ome=metadata(unit=unit))) == "geometry.missing"


def test_transformations_of_the_whole_come_after_those_of_the_level(tmp_path):
    outer = [{"type": "scale", "scale": [2.0, 2.0, 2.0]}, {"type": "translation", "translation": [1.0, 0.0, 0.0]}]
    path = image(tmp_path / "Doe", ome=metadata(coordinateTransformations=outer))
    geometry = read_geometry(path)
    assert geometry.spacing_mm == (5.0, 1.5, 1.0)
    assert geometry.origin_mm == (-25.0, 60.5, 15.0)


def test_axes_may_say_that_they_grow_to_the_head_back_and_left(tmp_path):
    ome = metadata()
    ways = ["inferior-to-superior", "anterior-to-posterior", "right-to-left"]
    for axis, way in zip(ome["multiscales"][0]["axes"], ways, strict=True):
        axis["orientation"] = {"type": "anatomical", "value": way}
    assert read_scan(image(tmp_path / "Doe", ome=ome)).warnings == ()
    ome["multiscales"][0]["axes"][2]["orientation"]["value"] = "left-to-right"
    assert refused(image(tmp_path / "Roe", ome=ome)) == "geometry.ambiguous"


def test_our_own_masks_carry_their_oblique_grid(tmp_path):
    geometry = grid(OBLIQUE)
    along = np.array(geometry.origin_mm) @ np.array(geometry.direction)
    ome = metadata()
    ome["multiscales"][0]["datasets"][0]["coordinateTransformations"][1]["translation"] = along.tolist()
    path = image(tmp_path / "Doe", ome=ome, voxels=numbered())
    edited(path / "zarr.json", "attributes", "vnet", value={"geometry": to_mapping(geometry)})
    assert read_label(path).geometry == geometry
    assert read_scan(path).warnings == ()
    for key, value, code in (
        ("spacing_mm", [2.5, 0.75, 0.6], "geometry.ambiguous"),
        ("origin_mm", [0, 0, 0], "geometry.ambiguous"),
        ("shape", [3, 4, 6], "geometry.ambiguous"),
        ("shape", "abc", "scan.header"),
        ("direction", [[1, 2], [3, 4]], "scan.header"),
    ):
        whole = to_mapping(geometry) | {key: value}
        edited(path / "zarr.json", "attributes", "vnet", value={"geometry": whole})
        assert refused(path) == code


V3_EDITS = {
    # keys in zarr.json of the array, or of the group where they begin with "attributes"
    "no image": (("attributes", "ome", "multiscales"), ..., "scan.unreadable"),
    "two images": (("attributes", "ome", "multiscales"), [{}, {}], "scan.unreadable"),
    "ome no object": (("attributes", "ome"), [1], "scan.unreadable"),
    "no datasets": (("attributes", "ome", "multiscales", 0, "datasets"), [], "scan.header"),
    "no scale": (
        ("attributes", "ome", "multiscales", 0, "datasets", 0, "coordinateTransformations"), [], "scan.header",
    ),
    "scale of two": (
        ("attributes", "ome", "multiscales", 0, "datasets", 0, "coordinateTransformations", 0, "scale"), [1, 2],
        "scan.header",
    ),
    "scale zero": (
        ("attributes", "ome", "multiscales", 0, "datasets", 0, "coordinateTransformations", 0, "scale"), [0, 1, 1],
        "geometry.spacing",
    ),
    "scale negative": (
        ("attributes", "ome", "multiscales", 0, "datasets", 0, "coordinateTransformations", 0, "scale"), [1, -1, 1],
        "geometry.spacing",
    ),
    "scale nan": (
        ("attributes", "ome", "multiscales", 0, "datasets", 0, "coordinateTransformations", 0, "scale"),
        [1, float("nan"), 1], "scan.header",
    ),
    "path up": (("attributes", "ome", "multiscales", 0, "datasets", 0, "path"), "../other/0", "scan.path-escape"),
    "path absolute": (("attributes", "ome", "multiscales", 0, "datasets", 0, "path"), "/etc", "scan.path-escape"),
    "path empty": (("attributes", "ome", "multiscales", 0, "datasets", 0, "path"), "", "scan.path-escape"),
    "path absent": (("attributes", "ome", "multiscales", 0, "datasets", 0, "path"), "7", "scan.unreadable"),
    "shape": (("shape",), [3, 4], "scan.header"),
    "shape longer": (("shape",), [3, 4, 9], "scan.truncated"),
    "shape huge": (("shape",), [10**6, 10**6, 10**6], "scan.too-large"),
    "shape zero": (("shape",), [3, 0, 5], "scan.empty"),
    "shape negative": (("shape",), [3, -4, 5], "scan.header"),
    "chunks huge": (("chunk_grid", "configuration", "chunk_shape"), [10**6, 10**6, 10**6], "scan.too-large"),
    "chunks zero": (("chunk_grid", "configuration", "chunk_shape"), [0, 1, 1], "scan.header"),
    "chunks of two": (("chunk_grid", "configuration", "chunk_shape"), [2, 3], "scan.header"),
    "chunks of another size": (("chunk_grid", "configuration", "chunk_shape"), [3, 4, 5], "scan.checksum"),
    "grid": (("chunk_grid", "name"), "irregular", "scan.header"),
    "type": (("data_type",), "complex64", "scan.dtype"),
    "type half": (("data_type",), "float16", "scan.dtype"),
    "type string": (("data_type",), "string", "scan.dtype"),
    "codec": (("codecs",), [{"name": "bytes"}, {"name": "evil"}], "scan.unreadable"),
    "codec pickle": (("codecs",), [{"name": "numcodecs.pickle"}], "scan.unreadable"),
    "keys": (("chunk_key_encoding", "name"), "odd", "scan.header"),
    "transformers": (("storage_transformers",), [{"name": "x"}], "scan.header"),
}  # fmt: skip


@pytest.mark.parametrize(("keys", "value", "code"), V3_EDITS.values(), ids=V3_EDITS)
def test_metadata_refusals(tmp_path, keys, value, code):
    path = image(tmp_path / "Doe_John", compressors=[ZstdCodec(checksum=True)])
    image(tmp_path / "other")
    np.testing.assert_array_equal(read_volume(path).voxels[0], numbered())
    edited(path / "zarr.json" if keys[0] == "attributes" else path / "0" / "zarr.json", *keys, value=value)
    assert refused(path) == code
    if code != "scan.checksum":
        assert refused(path, read_geometry) == code


@pytest.mark.parametrize(
    ("key", "value", "code"),
    [
        ("dtype", "|O", "scan.dtype"),
        ("dtype", "<f2", "scan.dtype"),
        ("dtype", "<c8", "scan.dtype"),
        ("dtype", [["r", "|u1"]], "scan.header"),
        ("filters", [{"id": "pickle"}], "scan.unreadable"),
        ("filters", [{"id": "fixedscaleoffset"}], "scan.unreadable"),
        ("compressor", {"id": "pickle"}, "scan.unreadable"),
        ("dimension_separator", "#", "scan.header"),
        ("chunks", [2, 3], "scan.header"),
    ],
)
def test_metadata_refusals_of_version_2(tmp_path, key, value, code):
    path = image(tmp_path / "Doe", 2)
    edited(path / "0" / ".zarray", key, value=value)
    assert refused(path) == code


def test_metadata_that_are_no_json(tmp_path):
    path = image(tmp_path / "Doe")
    for text in ("", "{", "[" * 100_000, "[]", '"x"', " " * (5 << 20)):
        (path / "zarr.json").write_text(text)
        assert refused(path) == "scan.header"
    (path / "zarr.json").unlink()
    assert not is_ome_zarr(path)
    (path / ".zgroup").write_text('{"zarr_format": 2}')
    assert refused(path) == "scan.unreadable"


CREATIONS = {
    "v2 blosc": (2, {}),
    "v2 zlib": (2, {"compressors": numcodecs.Zlib()}),
    "v2 lz4": (2, {"compressors": numcodecs.LZ4()}),
    "v2 blosc over a checksum": (2, {"filters": [numcodecs.CRC32()]}),
    "v3 blosc": (3, {"compressors": BloscCodec(cname="lz4", clevel=3)}),
    "v3 blosc under a checksum": (3, {"compressors": [BloscCodec(cname="lz4", clevel=3), Crc32cCodec()]}),
    "v3 shards of blosc": (3, {"chunks": (1, 2, 3), "shards": (2, 4, 6), "compressors": BloscCodec(cname="zstd")}),
    "v3": (3, {}),
    "v3 raw": (3, {"compressors": None}),
    "v3 shards": (3, {"chunks": (1, 2, 3), "shards": (2, 4, 6)}),
}


def chunk_files(path: Path) -> list[Path]:
    return [f for f in source_files(path) if not f.name.startswith((".z", "zarr"))]


@pytest.mark.parametrize(("version", "create"), CREATIONS.values(), ids=CREATIONS)
def test_absent_and_cut_chunks(tmp_path, version, create):
    path = image(tmp_path / "Doe", version, **create)
    chunk = chunk_files(path)[-1]
    whole = chunk.read_bytes()
    np.testing.assert_array_equal(read_volume(path).voxels[0], numbered())
    chunk.unlink()
    assert refused(path) == refused(path, read_geometry) == "scan.truncated"
    for keep in range(0, len(whole), 5):
        chunk.write_bytes(whole[:keep])
        assert refused(path) in ("scan.checksum", "scan.truncated")
    chunk.unlink()
    (tmp_path / "chunk").write_bytes(whole)
    chunk.symlink_to(tmp_path / "chunk")
    assert refused(path) == "scan.path-escape"


def test_a_chunk_that_a_shard_does_not_hold(tmp_path):
    shards = {"chunks": (1, 2, 3), "shards": (3, 4, 6)}
    path = image(tmp_path / "Doe", **shards)
    np.testing.assert_array_equal(read_volume(path).voxels[0], numbered())
    (shard,) = chunk_files(path)
    data = bytearray(shard.read_bytes())
    data[-4 - 16 : -4] = b"\xff" * 16
    shard.write_bytes(data)
    assert refused(path) == "scan.truncated"
    group = zarr.open_group(tmp_path / "Roe", mode="w", attributes={"ome": {"version": "0.5", **metadata()}})
    array = group.create_array("0", shape=SHAPE, dtype="u1", **shards)  # leaves empty chunks out
    array[0] = 7
    assert refused(tmp_path / "Roe") == "scan.truncated"


def test_other_indices_of_shards(tmp_path):
    for location in ("start", "end"):
        for index in ([BytesCodec(), Crc32cCodec()], [BytesCodec()]):
            codec = ShardingCodec(chunk_shape=(1, 2, 3), index_codecs=index, index_location=location)
            path = image(tmp_path / "Doe", chunks=(3, 4, 6), serializer=codec, compressors=None)
            np.testing.assert_array_equal(read_volume(path).voxels[0], numbered())


def test_checksums_are_honoured(tmp_path):
    for number, create in enumerate(
        (
            {"compressors": [Crc32cCodec()]},
            {"compressors": [ZstdCodec(checksum=True)]},
            {"chunks": (1, 2, 3), "shards": (3, 4, 6)},
        )
    ):
        path = image(tmp_path / f"Doe{number}", **create)
        chunk = chunk_files(path)[0]
        data = bytearray(chunk.read_bytes())
        data[-6] ^= 1
        chunk.write_bytes(data)
        assert refused(path) in ("scan.checksum", "scan.truncated")


def test_axes_of_an_image_are_never_sheared(tmp_path):
    path = image(tmp_path / "Doe")
    assert read_scan(path, ReadingPlan(sheared_axes="resample")).volume.geometry == GEOMETRY


@pytest.mark.parametrize("shape", [(3, 4, 5), (70, 5, 130), (1, 1, 300)])
def test_masks_as_the_program_writes_them(tmp_path, shape):
    mask = (np.arange(np.prod(shape)) // 7 % 3).reshape(shape).astype(np.uint8)
    mask[:1] = 0
    labels = [Label(value=1, name="liver"), Label(value=2, name="lesion")]
    write_ome_labels(Root(tmp_path), "mask.ome.zarr", mask, grid(OBLIQUE, shape), labels)
    scan = read_label_scan(tmp_path / "mask.ome.zarr")
    np.testing.assert_array_equal(scan.volume.labels, mask)
    assert scan.volume.geometry == grid(OBLIQUE, shape)
    assert scan.warnings == ()
