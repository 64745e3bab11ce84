"""Volumes and places that can be checked with a pencil, on upright and on oblique grids."""

import json
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import SimpleITK as sitk

from vnet_core.errors import ScanError
from vnet_core.geometry import Geometry, matrix_of, world_mm
from vnet_core.plan import Label, Region
from vnet_core.report import MANY_COMPONENTS, LabelReport, flags, measure, measure_regions, to_row

ORGAN, LESION = Label(value=1, name="organ"), Label(value=2, name="lesion")
BACK, HEAD = (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)
SAGITTAL = matrix_of(np.stack([(-1.0, 0.0, 0.0), (0.0, 0.0, -1.0), BACK], axis=1))


def turned_about_head(degrees: float, spacing_mm=(1.0, 1.0, 1.0), shape=(4, 5, 6)) -> Geometry:
    """A grid turned about the head axis; voxel (0, 0, 0) lies at the world's origin."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    direction = matrix_of(np.stack([HEAD, (-s, c, 0.0), (c, s, 0.0)], axis=1))
    return Geometry(shape, spacing_mm, (0.0, 0.0, 0.0), direction)


def upright(shape, spacing_mm=(1.0, 1.0, 1.0), origin_mm=(0.0, 0.0, 0.0)) -> Geometry:
    return Geometry(shape, spacing_mm, origin_mm)


def report_of(labels: np.ndarray, geometry: Geometry) -> LabelReport:
    return measure(labels, geometry, [ORGAN])[0]


def test_a_10_mm_cube_at_2_mm_spacing_is_1_ml():
    labels = np.zeros((9, 9, 9), np.uint8)
    labels[2:7, 1:6, 3:8] = 1

    report = report_of(labels, upright((9, 9, 9), (2.0, 2.0, 2.0), (100.0, -50.0, 7.0)))

    assert report.voxels == 125
    assert report.volume_ml == pytest.approx(1.0)
    assert (report.slice_first, report.slice_last) == (2, 6)
    # x: voxel centres from 100 + 2 * 3 to 100 + 2 * 7, edges 1 mm further
    assert report.bbox_min_mm == pytest.approx((105.0, -49.0, 10.0))
    assert report.bbox_max_mm == pytest.approx((115.0, -39.0, 20.0))
    assert report.centroid_mm == pytest.approx((110.0, -44.0, 15.0))
    assert report.components == 1
    assert not report.touches_border


def test_anisotropic_voxels():
    labels = np.zeros((4, 3, 3), np.uint8)
    labels[1:3, 1, 1] = 1

    report = report_of(labels, upright((4, 3, 3), (5.0, 2.0, 0.5)))

    assert report.volume_ml == pytest.approx(2 * 5 * 2 * 0.5 / 1000)
    assert report.bbox_min_mm == pytest.approx((0.25, 1.0, 2.5))
    assert report.bbox_max_mm == pytest.approx((0.75, 3.0, 12.5))
    assert report.centroid_mm == pytest.approx((0.5, 2.0, 7.5))


def test_the_box_of_one_voxel_turned_by_45_degrees_is_its_diagonal():
    labels = np.zeros((4, 5, 6), np.uint8)
    labels[1, 0, 0] = 1

    report = report_of(labels, turned_about_head(45))

    half = np.sqrt(2) / 2
    assert report.bbox_min_mm == pytest.approx((-half, -half, 0.5))
    assert report.bbox_max_mm == pytest.approx((half, half, 1.5))
    assert report.centroid_mm == pytest.approx((0.0, 0.0, 1.0))


def test_an_oblique_box_holds_the_voxels_and_not_the_corners_of_their_index_box():
    labels = np.zeros((1, 3, 3), np.uint8)
    labels[0, 0, 1] = labels[0, 1, 0] = labels[0, 1, 1] = labels[0, 1, 2] = labels[0, 2, 1] = 1

    report = report_of(labels, turned_about_head(45, shape=(1, 3, 3)))

    # the corners of the plus sign are missing, so it is 2 diagonals across and not 3
    assert np.subtract(report.bbox_max_mm, report.bbox_min_mm)[:2] == pytest.approx(2 * np.sqrt(2))


def test_an_oblique_anisotropic_box_agrees_with_the_corners_of_every_voxel():
    rng = np.random.default_rng(3)
    labels = (rng.random((6, 7, 8)) < 0.03).astype(np.uint8)
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    geometry = Geometry((6, 7, 8), (3.0, 0.7, 1.1), (-20.0, 30.0, 40.0), matrix_of(turn))

    report = report_of(labels, geometry)

    corners = np.array(list(product((-0.5, 0.5), repeat=3)))
    points_mm = world_mm(geometry, (np.argwhere(labels)[:, None] + corners).reshape(-1, 3))
    assert report.bbox_min_mm == pytest.approx(points_mm.min(axis=0))
    assert report.bbox_max_mm == pytest.approx(points_mm.max(axis=0))
    assert report.centroid_mm == pytest.approx(points_mm.mean(axis=0))


def test_slices_are_counted_along_the_first_axis_of_the_grid_as_it_is_stored():
    labels = np.zeros((10, 4, 4), np.uint8)
    labels[7:9, 1, 1] = 1
    geometry = Geometry((10, 4, 4), (1.0, 1.0, 1.0), (50.0, 0.0, 0.0), SAGITTAL)

    report = report_of(labels, geometry)

    assert (report.slice_first, report.slice_last) == (7, 8)
    # the first axis runs to the patient's right, from x = 50
    assert (report.bbox_min_mm[0], report.bbox_max_mm[0]) == pytest.approx((41.5, 43.5))


def test_a_single_voxel_grid():
    report = report_of(np.ones((1, 1, 1), np.uint8), upright((1, 1, 1), (4.0, 2.0, 1.0)))
    assert (report.voxels, report.components, report.touches_border) == (1, 1, True)
    assert (report.slice_first, report.slice_last) == (0, 0)
    assert report.volume_ml == pytest.approx(0.008)
    assert report.bbox_min_mm == pytest.approx((-0.5, -1.0, -2.0))
    assert report.bbox_max_mm == pytest.approx((0.5, 1.0, 2.0))


def test_an_empty_label_has_volume_0_and_no_place():
    report = measure(np.zeros((3, 3, 3), np.uint8), upright((3, 3, 3)), [ORGAN, LESION])[1]
    assert report == LabelReport(2, "lesion", 0, 0.0, None, None, None, None, None, 0, False)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("end", [0, -1])
def test_a_voxel_on_any_face_touches_the_border(axis, end):
    labels = np.zeros((5, 6, 7), np.uint8)
    labels[2, 3, 3] = 1
    assert not report_of(labels, upright((5, 6, 7))).touches_border
    index = [2, 3, 3]
    index[axis] = end
    labels[tuple(index)] = 1
    assert report_of(labels, upright((5, 6, 7))).touches_border


@pytest.mark.parametrize(("second", "pieces"), [((2, 2, 3), 1), ((2, 3, 3), 1), ((3, 3, 3), 1), ((2, 2, 4), 2)])
def test_voxels_that_share_a_face_an_edge_or_a_corner_are_one_piece(second, pieces):
    labels = np.zeros((6, 6, 6), np.uint8)
    labels[2, 2, 2] = labels[second] = 1
    assert report_of(labels, upright((6, 6, 6))).components == pieces


@pytest.mark.parametrize(("shape", "pieces"), [((1, 1, 7), 4), ((1, 7, 7), 16), ((3, 3, 3), 8), ((7, 7, 7), 64)])
def test_as_many_pieces_as_fit_into_a_box(shape, pieces):
    labels = np.zeros(shape, np.uint8)
    labels[::2, ::2, ::2] = 1
    assert report_of(labels, upright(shape)).components == pieces


def test_labels_keep_their_order_and_unknown_values_are_background():
    labels = np.zeros((3, 3, 3), np.uint16)
    labels[0, 0, 0], labels[1, 1, 1], labels[2, 2, 2] = 2, 7, 65535
    lesion, organ = measure(labels, upright((3, 3, 3)), [LESION, ORGAN])
    assert (lesion.label, lesion.voxels) == (2, 1)
    assert (organ.label, organ.voxels) == (1, 0)


def test_a_label_inside_the_box_of_another_is_measured_on_its_own():
    labels = np.full((5, 5, 5), 2, np.uint8)
    labels[2, 2, 2] = 1
    organ, lesion = measure(labels, upright((5, 5, 5)), [ORGAN, LESION])
    assert (organ.voxels, organ.bbox_min_mm, organ.touches_border) == (1, (1.5, 1.5, 1.5), False)
    assert (lesion.voxels, lesion.components, lesion.touches_border) == (124, 1, True)


def test_a_map_that_does_not_fit_its_grid_is_refused():
    with pytest.raises(ScanError, match=r"\(3, 3, 4\).*\(3, 3, 3\)"):
        measure(np.zeros((3, 3, 4), np.uint8), upright((3, 3, 3)), [ORGAN])
    with pytest.raises(ScanError, match=r"\(3, 3, 4\).*\(3, 3, 3\)"):
        measure_regions(np.zeros((3, 3, 4), np.uint8), upright((3, 3, 3)), [ORGAN], [region("all", 1, 2)])


def region(name: str, *values: int) -> Region:
    return Region(name=name, values=values, paints=values[0])


def test_a_region_is_all_its_labels_together():
    # voxels of 0.125 mL: 8 of the organ are 1.0 mL, 4 of the lesion beside it 0.5 mL
    labels = np.zeros((6, 6, 6), np.uint8)
    labels[1:3, 1:3, 1:3] = 1
    labels[3, 1:3, 1:3] = 2
    labels[5, 5, 5] = 3
    geometry = upright((6, 6, 6), (5.0, 5.0, 5.0), (10.0, 20.0, 30.0))

    organ, lesion = measure(labels, geometry, [ORGAN, LESION])
    whole, core, other = measure_regions(
        labels, geometry, [ORGAN, LESION], [region("whole", 2, 1), region("core", 1), region("other", 3, 2)]
    )

    assert (organ.volume_ml, lesion.volume_ml) == pytest.approx((1.0, 0.5))
    assert (whole.label, whole.name, whole.voxels) == (None, "whole", 12)
    assert whole.volume_ml == pytest.approx(1.5)
    assert (whole.slice_first, whole.slice_last, whole.components, whole.touches_border) == (1, 3, 1, False)
    assert whole.bbox_min_mm == pytest.approx((12.5, 22.5, 32.5))
    assert whole.bbox_max_mm == pytest.approx((22.5, 32.5, 47.5))
    # planes 1, 2 and 3 of 4 voxels each: the middle is plane 2
    assert whole.centroid_mm == pytest.approx((17.5, 27.5, 40.0))
    assert replace(core, label=1, name="organ") == organ
    assert (other.voxels, other.components, other.touches_border) == (5, 2, True)
    assert list(to_row(whole)) == list(to_row(organ))


def test_a_region_with_some_or_all_of_its_labels_missing():
    labels = np.zeros((3, 3, 3), np.uint16)
    labels[1, 1, 1] = 2
    half, none = measure_regions(
        labels, upright((3, 3, 3)), [ORGAN, LESION], [region("half", 1, 2), region("none", 1, 300)]
    )
    assert (half.voxels, half.slice_first) == (1, 1)
    assert (none.voxels, none.volume_ml, none.centroid_mm, flags(none)) == (0, 0.0, None, ("empty",))


def test_a_region_that_is_a_label_under_its_name_is_not_told_twice():
    found = measure_regions(
        np.ones((3, 3, 3), np.uint8),
        upright((3, 3, 3)),
        [ORGAN, LESION],
        [region("organ", 1), region("lesion", 1, 2), region("inner", 2)],
    )
    assert [report.name for report in found] == ["lesion", "inner"]


def test_rows_are_flat_json_with_the_same_columns_for_every_label():
    labels = np.zeros((3, 3, 3), np.uint8)
    labels[1, 1, 1] = 1
    full, empty = (to_row(r) for r in measure(labels, upright((3, 3, 3)), [ORGAN, LESION]))

    assert list(full) == list(empty)
    assert list(full)[:6] == ["label", "name", "voxels", "volume_ml", "slice_first", "slice_last"]
    assert list(full)[6:12] == [f"bbox_{end}_{axis}_mm" for end in ("min", "max") for axis in "xyz"]
    assert list(full)[12:] == ["centroid_x_mm", "centroid_y_mm", "centroid_z_mm", "components", "touches_border"]
    assert json.loads(json.dumps([full, empty], allow_nan=False)) == [full, empty]
    assert (full["bbox_min_x_mm"], full["bbox_max_z_mm"], full["centroid_y_mm"]) == (0.5, 1.5, 1.0)
    assert empty["centroid_x_mm"] is None


def test_flags():
    labels = np.zeros((3, 3, 3), np.uint8)
    labels[1, 1, 1] = 1
    fine, empty = measure(labels, upright((3, 3, 3)), [ORGAN, LESION])
    assert flags(fine) == ()
    assert flags(empty) == ("empty",)
    assert flags(replace(fine, touches_border=True)) == ("touches-border",)
    assert flags(replace(fine, components=MANY_COMPONENTS)) == ()
    assert flags(replace(fine, touches_border=True, components=MANY_COMPONENTS + 1)) == (
        "touches-border",
        "many-components",
    )


def test_real_masks_agree_with_itk(real_scans):
    files = sorted((real_scans / "hippocampus" / "labels").glob("*.nii.gz"))[:5]
    files += sorted((real_scans / "nrrd" / "labels").glob("*.nrrd"))
    assert len(files) > 5
    for file in files:
        image = sitk.Cast(sitk.ReadImage(str(file)), sitk.sitkUInt16)
        direction = matrix_of(np.reshape(image.GetDirection(), (3, 3))[:, ::-1])
        labels = sitk.GetArrayFromImage(image)
        geometry = Geometry(labels.shape, image.GetSpacing()[::-1], image.GetOrigin(), direction)
        statistics = sitk.LabelShapeStatisticsImageFilter()
        statistics.Execute(image)
        assert statistics.GetLabels()
        for value in statistics.GetLabels():
            report = measure(labels, geometry, [Label(value=value, name="structure")])[0]
            assert report.voxels == statistics.GetNumberOfPixels(value)
            assert report.volume_ml * 1000 == pytest.approx(statistics.GetPhysicalSize(value), rel=1e-5)
            assert report.centroid_mm == pytest.approx(statistics.GetCentroid(value), abs=1e-3)
