"""Masks: every format holds what was computed, reads back where it lay, or is not published."""

import json
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pydicom
import pytest
import safetensors.torch

from tests.files import file_of
from tests.workers.dicom.series_maker import attributes, voxels_of, write_series
from tests.workers.known_model import SHARPNESS, known_network, known_plan
from vnet_core.errors import ConfigError, ScanError, StorageError
from vnet_core.geometry import Geometry, matrix_of
from vnet_core.plan import Label, Plan
from vnet_core.sections import OutputPlan
from vnet_core.spread import Spread
from vnet_core.volume import Volume
from workers.cohort import Case, source_digest
from workers.dicom import segmentation, structures
from workers.dicom.derived import Algorithm
from workers.preprocess import preprocess_case
from workers.registry.models import Target, publish
from workers.segmentation import masks
from workers.segmentation.masks import (
    NO_PICTURE,
    Mask,
    MaskFormat,
    check_format,
    load_report,
    mask_file,
    publish_mask,
    written,
)
from workers.segmentation.segment import Job, Segmenter
from workers.sources.scans import read_geometry, read_label, write_label, write_volume
from workers.storage.arrays import write_ome_labels
from workers.storage.store import Root

LABELS = [{"value": 1, "name": "liver"}, {"value": 2, "name": "tumour"}, {"value": 4, "name": "left kidney"}]
FORMATS = get_args(MaskFormat)
SHAPE = (6, 8, 7)


@pytest.fixture
def root(tmp_path) -> Root:
    return Root(tmp_path / "root")


def series(folder: Path, **changes: object) -> Case:
    """A case of an oblique DICOM series."""
    axes = [0.8, 0.6, 0, -0.48, 0.64, 0.6]
    normal = np.cross(axes[:3], axes[3:])
    place = attributes(
        ImageOrientationPatient=axes,
        ImagePositionPatient=lambda z: [round(float(v), 9) for v in np.array([-10, 20, 30]) + 2.5 * z * normal],
        **changes,
    )
    write_series(folder, voxels_of(SHAPE), place)
    return Case("a", (str(folder),), digest="d", geometry=read_geometry(folder))


def scan(folder: Path) -> Case:
    """A case of a sagittal NIfTI file."""
    folder.mkdir()
    direction = matrix_of([[1, 0, 0], [0, 0, -1], [0, -1, 0]])
    geometry = Geometry(SHAPE, (2.5, 0.7, 0.9), (5.0, -3.0, 8.0), direction)
    write_volume(folder / "a.nii.gz", Volume(voxels_of(SHAPE, "<i2")[None], geometry))
    return Case("a", (str(folder / "a.nii.gz"),), digest="d", geometry=geometry)


def values_of() -> np.ndarray:
    values = np.zeros(SHAPE, np.uint8)
    values[1:3, 2:5, 1:3] = 1
    values[2:5, 1:3, 4:6] = 2
    values[5, 7, 6] = 4
    return values


def mask_of(case: Case, mask_format: str = "nifti", values: np.ndarray | None = None, **plan: object) -> Mask:
    whole = Plan.from_mapping({"labels": LABELS, **plan})
    values = values_of() if values is None else values
    return Mask(case, values, whole, mask_format, Algorithm("organs@3", "abc"), {"model": "organs@3"})


def read(root: Root, key: str, case: Case, labels=()) -> np.ndarray:
    path = file_of(root, f"{key}/{load_report(root, key)['mask']}")
    return read_label(path, case.geometry, labels or [Label(**label) for label in LABELS]).labels


# --- formats


@pytest.mark.parametrize("mask_format", FORMATS)
@pytest.mark.parametrize("values", [values_of(), np.zeros(SHAPE, np.uint8)], ids=["labels", "empty"])
def test_every_format_of_a_series_holds_the_mask(root, tmp_path, mask_format, values):
    case = series(tmp_path / "series")
    publish_mask(root, "r/k", mask_of(case, mask_format, values))
    np.testing.assert_array_equal(read(root, "r/k", case), values)
    np.testing.assert_array_equal(read_label(file_of(root, "r/k/mask.ome.zarr")).labels, values)
    expected = {mask_file(mask_format), "mask.ome.zarr", "report.json", "qc.png", "receipt.json"}
    assert set(root.names("r/k")) == expected
    report = load_report(root, "r/k")
    assert (report["mask"], report["picture"]) == (mask_file(mask_format), "qc.png")
    assert [row["voxels"] for row in report["labels"]] == [int((values == v).sum()) for v in (1, 2, 4)]


@pytest.mark.parametrize("mask_format", ["nifti", "mha", "nrrd", "ome-zarr"])
def test_every_format_of_a_file_holds_the_mask(root, tmp_path, mask_format):
    case = scan(tmp_path / "scan")
    check_format(case, mask_format)
    publish_mask(root, "r/k", mask_of(case, mask_format))
    np.testing.assert_array_equal(read(root, "r/k", case), values_of())


@pytest.mark.parametrize("mask_format", ["dicom-seg", "rtstruct"])
def test_a_dicom_mask_needs_a_dicom_case(root, tmp_path, mask_format):
    case = scan(tmp_path / "scan")
    for attempt in (
        lambda: check_format(case, mask_format),
        lambda: publish_mask(root, "k", mask_of(case, mask_format)),
    ):
        with pytest.raises(ScanError) as caught:
            attempt()
        assert caught.value.code == "mask.needs-dicom"
    assert root.receipt("k") is None


def test_an_unknown_format_is_refused():
    with pytest.raises(ConfigError, match="rtstruct") as caught:
        mask_file("dicom")
    assert caught.value.code == "mask.format"


@pytest.mark.parametrize("mask_format", FORMATS)
def test_publishing_again_gives_the_same_bytes(root, tmp_path, mask_format):
    case = series(tmp_path / "series")
    for key in ("one", "two"):
        publish_mask(root, key, mask_of(case, mask_format))
    for path in sorted(file_of(root, "one").rglob("*")):
        if path.is_file() and path.name != "receipt.json":
            twin = file_of(root, "two") / path.relative_to(file_of(root, "one"))
            assert path.read_bytes() == twin.read_bytes(), path.name


def test_only_dicom_formats_name_the_patient(root, tmp_path):
    case = series(tmp_path / "series", PatientName="Canary^Name", PatientID="canary-id", PatientBirthDate="19991231")
    naming = set()
    for mask_format in FORMATS:
        publish_mask(root, mask_format, mask_of(case, mask_format))
        for path in file_of(root, mask_format).rglob("*"):
            if path.is_file() and b"canary" in path.read_bytes().lower():
                naming.add(path.name)
    assert naming == {"mask.seg.dcm", "mask.rtstruct.dcm"}
    data = pydicom.dcmread(file_of(root, "dicom-seg/mask.seg.dcm"))
    assert data.SegmentSequence[0].SegmentAlgorithmName == "organs@3"


# --- output section


def test_values_are_remapped_merged_and_left_out():
    labels = [Label(value=1, name="liver", code="SCT:1:Liver"), Label(value=2, name="tumour"), Label(value=4, name="x")]
    values, names = written(values_of(), labels, OutputPlan(values={"tumour": 1, "x": 0}))
    np.testing.assert_array_equal(values, np.array([0, 1, 1, 0, 0])[values_of()])
    assert names == (Label(value=1, name="liver+tumour"),)
    values, names = written(values_of(), labels, OutputPlan(values={"liver": 300}))
    assert values.dtype == np.uint16
    assert [(label.value, label.code) for label in names] == [(2, ""), (4, ""), (300, "SCT:1:Liver")]
    values, names = written(values_of(), labels, OutputPlan())
    assert values.dtype == np.uint8
    assert list(names) == labels
    values, names = written(values_of(), labels, OutputPlan(values={"liver": 0, "tumour": 0, "x": 0}))
    assert not values.any()
    assert names == ()


@pytest.mark.parametrize("mask_format", FORMATS)
def test_masks_are_written_with_the_values_of_the_output_and_reported_with_those_of_the_plan(
    root, tmp_path, mask_format
):
    case = series(tmp_path / "series")
    output = {"values": {"tumour": 7, "liver": 7, "left kidney": 3}}
    publish_mask(root, "k", mask_of(case, mask_format, output=output))
    expected = np.array([0, 7, 7, 0, 3])[values_of()]
    labels = [Label(value=3, name="left kidney"), Label(value=7, name="liver+tumour")]
    np.testing.assert_array_equal(read(root, "k", case, labels), expected)
    np.testing.assert_array_equal(read_label(file_of(root, "k/mask.ome.zarr")).labels, expected)
    rows = load_report(root, "k")["labels"]
    assert [(row["label"], row["voxels"]) for row in rows] == [(1, 12), (2, 12), (4, 1)]
    ome = json.loads(root.get("k/mask.ome.zarr/zarr.json"))["attributes"]["ome"]["image-label"]["properties"]
    assert [(p["label-value"], p["name"]) for p in ome] == [(3, "left kidney"), (7, "liver+tumour")]
    assert ome[1]["volume_ml"] == pytest.approx(24 * case.geometry.voxel_ml)


def test_two_labels_of_one_name_keep_their_voxels(root, tmp_path):
    case = series(tmp_path / "series")
    labels = [{"value": 1, "name": "node"}, {"value": 2, "name": "node"}]
    for mask_format in ("dicom-seg", "rtstruct"):
        values = np.where(values_of() == 4, 0, values_of())
        publish_mask(root, mask_format, mask_of(case, mask_format, values, labels=labels))


def test_regions_are_told_beside_the_labels(root, tmp_path):
    regions = [{"name": "whole", "values": [1, 2], "paints": 1}, {"name": "core", "values": [2], "paints": 2}]
    publish_mask(root, "k", mask_of(scan(tmp_path / "scan"), head="sigmoid", regions=regions))
    assert [(row["name"], row["voxels"]) for row in load_report(root, "k")["regions"]] == [("whole", 24), ("core", 12)]


# --- how far passes lie apart


def test_rows_tell_how_far_the_passes_lie_apart(root, tmp_path):
    """Published are 12, 12 and 1 voxels; on the network's grid the mean has 6, 3 and 0, the other pass is given."""
    regions = [{"name": "whole", "values": [1, 2], "paints": 1}]
    mask = mask_of(scan(tmp_path / "scan"), head="sigmoid", regions=regions)
    agreeing = np.diag([90, 6, 3, 0])
    other = np.array([[89, 1, 0, 0], [0, 5, 1, 0], [0, 0, 1, 2], [0, 0, 0, 0]])
    spread = Spread(np.stack([agreeing, other]), (0, 1, 2, 4), voxel_ml=0.5)
    publish_mask(root, "one", mask)
    publish_mask(root, "many", replace(mask, spread=spread))
    one, many = load_report(root, "one"), load_report(root, "many")
    voxel_ml = mask.case.geometry.voxel_ml
    liver, tumour, kidney = many["labels"]
    # liver: 6 against 1 + 5 voxels, 5 in common; one published voxel pair per voxel of the mean
    assert (liver["volume_low_ml"], liver["volume_high_ml"]) == (liver["volume_ml"], liver["volume_ml"])
    assert liver["agreement"] == pytest.approx(10 / 12)
    # tumour: 3 against 2 voxels, 1 in common; 12 published for 3
    assert tumour["volume_low_ml"] == pytest.approx(8 * voxel_ml)
    assert tumour["volume_high_ml"] == pytest.approx(12 * voxel_ml)
    assert tumour["agreement"] == pytest.approx(2 / 5)
    # kidney: none against 2 voxels of the network's own size
    assert (kidney["volume_low_ml"], kidney["volume_high_ml"], kidney["agreement"]) == (0.0, 1.0, 0.0)
    # whole: 9 against 8 voxels, 7 in common; 24 published for 9
    (whole,) = many["regions"]
    assert whole["volume_low_ml"] == pytest.approx(24 * voxel_ml * 8 / 9)
    assert whole["volume_high_ml"] == pytest.approx(24 * voxel_ml)
    assert whole["agreement"] == pytest.approx(14 / 17)
    columns = {"volume_low_ml", "volume_high_ml", "agreement"}
    for alone, of_many in zip(one["labels"] + one["regions"], many["labels"] + many["regions"], strict=True):
        assert {k: v for k, v in of_many.items() if k not in columns} == alone
    assert root.get("one/mask.nii.gz") == root.get("many/mask.nii.gz")


def test_a_model_of_two_networks_tells_how_far_they_lie_apart(root, tmp_path):
    """The first network finds grey values from 250 on, the second from 400 on, their mean from 325 on."""
    plan = known_plan((2.0, 2.0, 2.0), crop=False)
    first, second = known_network(plan), known_network(plan)
    second.head.convolution.bias.data[1] = SHARPNESS * 0.2
    weights = [safetensors.torch.save(network.state_dict()) for network in (first, second)]
    publish(root, Target("two", "v1", plan), weights, {}, {})
    publish(root, Target("one", "v1", plan), weights[:1], {}, {})
    grey = np.zeros((1, 9, 10, 11), np.int16)
    grey[0, 1, 1, 1:11], grey[0, 3, 3, 1:6], grey[0, 5, 5, 1:4] = 500, 300, 1000
    geometry = Geometry(grey.shape[1:], (2.0, 2.0, 2.0), (0.0, 0.0, 0.0))
    path = tmp_path / "scan.nii.gz"
    write_volume(path, Volume(grey, geometry))
    case = Case("one", (str(path),), digest=source_digest([str(path)]), geometry=geometry)
    assert preprocess_case(root.url, case, plan).done
    told = {}
    for model in ("one", "two"):
        outcome = Segmenter(root.url, model, 1).segment(Job("c", case, "nifti"))
        assert outcome.state == "computed", outcome
        told[model] = load_report(root, outcome.key)["labels"]
    figures = ("voxels", "volume_low_ml", "volume_high_ml", "agreement")
    found, white = ([row[figure] for figure in figures] for row in told["two"])
    assert found == pytest.approx([10, 10 * 0.008, 15 * 0.008, 2 * 10 / 25])
    assert white == pytest.approx([3, 3 * 0.008, 3 * 0.008, 1.0])
    assert [row["voxels"] for row in told["one"]] == [15, 3]
    assert not set(figures[1:]) & set(told["one"][0])


# --- pictures


def test_a_series_with_burnt_in_text_gets_no_picture(root, tmp_path):
    publish_mask(root, "k", mask_of(series(tmp_path / "series", BurnedInAnnotation="YES")))
    assert not root.exists("k/qc.png")
    assert load_report(root, "k")["picture"] == NO_PICTURE
    assert root.receipt("k") is not None


# --- proof


def mirrored(path: Path, values: np.ndarray, geometry: Geometry) -> None:
    write_label(path, np.ascontiguousarray(values[:, ::-1]), geometry)


def moved(geometry: Geometry) -> Geometry:
    x, y, z = geometry.origin_mm
    return Geometry(geometry.shape, geometry.spacing_mm, (x + 0.5, y, z), geometry.direction)


@pytest.mark.parametrize(
    ("mask_format", "function", "broken"),
    [
        ("nifti", "write_label", mirrored),
        ("mha", "write_label", lambda path, values, geometry: write_label(path, values, moved(geometry))),
        ("nrrd", "write_label", lambda path, values, geometry: write_label(path, values * 0, geometry)),
        (
            "ome-zarr",
            "write_ome_labels",
            lambda root, key, values, geometry, labels: write_ome_labels(root, key, values, moved(geometry), labels),
        ),
        (
            "dicom-seg",
            "write_segmentation",
            lambda p, values, *rest: WRITE_SEGMENTATION(p, np.ascontiguousarray(values[:, ::-1]), *rest),
        ),
        (
            "rtstruct",
            "write_structures",
            lambda p, values, *rest: WRITE_STRUCTURES(p, np.ascontiguousarray(values[::-1]), *rest),
        ),
    ],
)
def test_a_mask_that_reads_back_otherwise_is_not_published(root, tmp_path, monkeypatch, mask_format, function, broken):
    case = series(tmp_path / "series")
    home = {"write_segmentation": segmentation, "write_structures": structures}.get(function, masks)
    monkeypatch.setattr(home, function, broken)
    with pytest.raises(StorageError) as caught:
        publish_mask(root, "k", mask_of(case, mask_format))
    assert caught.value.code == "mask.unproven"
    assert root.receipt("k") is None


WRITE_SEGMENTATION, WRITE_STRUCTURES = segmentation.write_segmentation, structures.write_structures
