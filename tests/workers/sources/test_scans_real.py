"""Real scans: which are accepted, as SimpleITK and nibabel read them, and which are refused under which code."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from vnet_core.errors import ScanError
from vnet_core.geometry import world_mm
from workers.dicom.tree import scan_tree
from workers.sources.scans import read_geometry, read_label, read_volume, source_files, write_label

VOLUMES = {
    # source: (shape, dtype) of an accepted one, or the code of the refusal
    "odd-nifti/DS_Store": "scan.unreadable",
    "odd-nifti/image_4d_40x42x5x7.nii.gz": "scan.not-3d",
    "odd-nifti/image_only_hippocampus_118.nii.gz": ((33, 52, 37), "uint8"),
    "odd-nifti/label_4d_singleton_int64.nii.gz": ((9, 54, 49), "int64"),
    "odd-nifti/label_4d_singleton_int64_IMAGE.nii.gz": ((9, 54, 49), "float32"),
    "odd-nifti/label_only_hippocampus_010.nii.gz": ((31, 50, 36), "uint8"),
    "odd-nifti/label_only_hippocampus_281.nii.gz": ((94, 512, 512), "uint8"),
    "odd-nifti/lfs_pointer_10032_1000032_t2w.mha": "scan.unreadable",
    "odd-nifti/soft_label_up_to_1.06.nii.gz": ((5, 40, 40), "float32"),
    "odd-nifti/tiny_6x32x32.nii.gz": ((32, 32, 6), "float64"),
    "odd-nifti/two_slices_45x45x2.nii.gz": ((2, 45, 45), "int16"),
    "multichannel/images/TCGA-DU-7294_fla.nii.gz": ((155, 240, 240), "int16"),
    "multichannel/images/TCGA-DU-7294_t1.nii.gz": ((155, 240, 240), "int16"),
    "multichannel/images/TCGA-DU-7294_t1c.nii.gz": ((155, 240, 240), "int16"),
    "multichannel/images/TCGA-DU-7294_t2.nii.gz": ((155, 240, 240), "int16"),
    "nrrd/images/brain1.nrrd": ((25, 256, 256), "int16"),
    "nrrd/images/prostate_phantom.nrrd": ((13, 67, 82), "uint16"),
    "dicom/dcmqi/liver_seg.nrrd": ((3, 512, 512), "int16"),
    "dicom/dcmqi/24x38x3/nrrd/label.nrrd": ((3, 38, 24), "int16"),
}
LABELS = {
    "multichannel/labels/TCGA-DU-7294.nii.gz": [0, 1, 2],
    "nrrd/labels/brain1.nrrd": [0, 1],
    "nrrd/labels/prostate_phantom.nrrd": [0, 1, 7, 8, 9],
    "odd-nifti/label_4d_singleton_int64.nii.gz": [0, 1],
    "odd-nifti/soft_label_up_to_1.06.nii.gz": "label.not-integer",
    "odd-nifti/lfs_pointer_10032_1000032_t2w.mha": "scan.unreadable",
    "odd-nifti/image_4d_40x42x5x7.nii.gz": "scan.not-3d",
}
SERIES = {
    "dicom/hippocampus_study1/13_HCropVolume": ((32, 51, 35), (1.0, 1.0, 1.0)),
    "dicom/STS_002/CT/image": ((48, 143, 161), (3.27, 0.976562, 0.976562)),
    "dicom/STS_002/MR_T1/image": ((35, 90, 115), (3.269955, 0.976562, 0.976562)),
    "dicom/STS_002/PET/image": ((48, 27, 30), (3.27, 5.46875, 5.46875)),
    "dicom/STS_002/CT/mask": "scan.unreadable",
    "dicom/STS_002/MR_T1/mask": "scan.unreadable",
    "dicom/STS_002/PET/mask": "scan.unreadable",
    "dicom/dcmqi/ct-3slice": ((3, 512, 512), (1.0, 0.810547, 0.810547)),
    "dicom/dcmqi/24x38x3/image": ((3, 38, 24), (2.5, 0.7, 0.7)),
    "dicom/dcmqi/24x38x3/multiframe": ((3, 38, 24), (2.5, 0.7, 0.7)),
    "dicom/dcmqi/24x38x3/seg": "scan.unreadable",
    "odd-dicom/d2n_anisotropic_pixels": ((4, 28, 64), (0.500001, 4.0, 6.39995861)),
    "odd-dicom/d2n_compressed_jpegls": ((4, 256, 256), (1.0, 1.0, 1.0)),
    "odd-dicom/d2n_compressed_rle": ((4, 256, 256), (1.0, 1.0, 1.0)),
    "odd-dicom/d2n_gantrytilting_001": "dicom.gantry-tilt",
    "odd-dicom/d2n_notavolume_001": "dicom.duplicate-slices",
    "odd-dicom/d2n_rgb": "scan.dtype",
    "odd-dicom/d2n_slicecount_001": ((2, 256, 256), (1.0, 1.0, 1.0)),
    "odd-dicom/d2n_sliceincrement_001": "dicom.missing-slices",  # steps of 5, 5 and 10 mm
    "odd-dicom/d2n_sliceorientation_001": "dicom.mixed-orientation",
    "odd-dicom/missing_slice_ProstateX-0000": "dicom.missing-slices",
    "odd-dicom/nine_transfer_syntaxes": "dicom.mosaic",
}


def code_of(reader, source: Path) -> str:
    with pytest.raises(ScanError) as caught:
        reader(source)
    return caught.value.code


def assert_same_world(image: sitk.Image, geometry, atol_mm: float) -> None:
    for corner in np.ndindex(2, 2, 2):
        zyx = np.array(corner) * (np.array(geometry.shape) - 1)
        point = image.TransformContinuousIndexToPhysicalPoint([float(v) for v in zyx[::-1]])
        np.testing.assert_allclose(point, world_mm(geometry, zyx), rtol=0, atol=atol_mm)


@pytest.mark.parametrize(("source", "expected"), VOLUMES.items(), ids=VOLUMES)
def test_scan_files(real_scans, source, expected):
    path = real_scans / source
    if isinstance(expected, str):
        assert code_of(read_volume, path) == code_of(read_geometry, path) == expected
        return
    volume, image = read_volume(path), sitk.ReadImage(str(path))
    assert (volume.geometry.shape, volume.voxels.dtype) == expected
    assert read_geometry(path) == volume.geometry
    np.testing.assert_array_equal(volume.voxels[0], sitk.GetArrayFromImage(image))
    assert volume.geometry.spacing_mm[::-1] == pytest.approx(image.GetSpacing(), rel=1e-14)
    assert_same_world(image, volume.geometry, 1e-4)


@pytest.mark.parametrize(("source", "expected"), LABELS.items(), ids=LABELS)
def test_label_files(real_scans, source, expected):
    if isinstance(expected, str):
        assert code_of(read_label, real_scans / source) == expected
        return
    labels = read_label(real_scans / source).labels
    assert labels.dtype == np.uint8
    assert np.unique(labels).tolist() == expected


@pytest.mark.parametrize(("source", "expected"), SERIES.items(), ids=SERIES)
def test_series(real_scans, source, expected, capfd):
    folder = real_scans / source
    if isinstance(expected, str):
        assert code_of(read_volume, folder) == code_of(read_geometry, folder) == expected
        assert capfd.readouterr().err == ""
        return
    volume = read_volume(folder)
    assert capfd.readouterr().err == ""
    shape, spacing_mm = expected
    assert volume.geometry.shape == shape
    assert volume.geometry.spacing_mm == pytest.approx(spacing_mm, abs=1e-5)
    assert source_files(folder) == sorted(folder.iterdir())
    assert read_geometry(scan_tree(folder).volumes[0].source) == volume.geometry
    files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder))
    image = sitk.ReadImage(files if len(files) > 1 else files[0])  # one file holds all frames
    np.testing.assert_array_equal(volume.voxels[0], sitk.GetArrayFromImage(image))
    assert_same_world(image, volume.geometry, 1e-3)


@pytest.mark.parametrize("source", ["odd-dicom/d2n_compressed_rle", "odd-dicom/d2n_compressed_jpegls"])
@pytest.mark.parametrize("cut_bytes", [8, 5000])
def test_a_compressed_slice_that_was_cut_off(real_scans, tmp_path, source, cut_bytes):
    for path in (real_scans / source).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    last = sorted(tmp_path.iterdir())[-1]
    last.write_bytes(last.read_bytes()[:-cut_bytes])
    assert code_of(read_volume, tmp_path) == "dicom.corrupt-slice"


def test_hippocampus(real_scans, tmp_path):
    """Every eighth image as both readers see it, and a mask on its grid with the same header."""
    for path in sorted((real_scans / "hippocampus" / "images").iterdir())[::8]:
        volume, image, other = read_volume(path), sitk.ReadImage(str(path)), nib.load(path)
        np.testing.assert_array_equal(volume.voxels[0], sitk.GetArrayFromImage(image))
        np.testing.assert_array_equal(volume.voxels[0].T, np.asarray(other.dataobj))
        mask = (volume.voxels[0] > np.median(volume.voxels)).astype(np.uint8)
        write_label(tmp_path / "mask.nii.gz", mask, volume.geometry)
        back, twin = sitk.ReadImage(str(tmp_path / "mask.nii.gz")), nib.load(tmp_path / "mask.nii.gz")
        np.testing.assert_array_equal(sitk.GetArrayFromImage(back), mask)
        np.testing.assert_array_equal(twin.affine, other.affine)
        for name in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
            assert getattr(back, name)() == getattr(image, name)()


def test_hippocampus_labels(real_scans):
    """All of them are 0, 1, 2 on the grid of their image, though one is stored as float32."""
    stored_as_float = []
    for path in sorted((real_scans / "hippocampus" / "labels").iterdir()):
        if nib.load(path).get_data_dtype().kind == "f":
            stored_as_float.append(path.name)
        label = read_label(path)
        assert label.labels.dtype == np.uint8
        assert np.unique(label.labels).tolist() == [0, 1, 2]
        assert read_geometry(real_scans / "hippocampus" / "images" / path.name) == label.geometry
    assert stored_as_float == ["hippocampus_003.nii.gz"]


@pytest.mark.parametrize(
    "source",
    [
        "dicom/STS_002/MR_T1/image",
        "odd-dicom/d2n_anisotropic_pixels",
        "odd-dicom/d2n_compressed_rle",
        "odd-nifti/tiny_6x32x32.nii.gz",
        "odd-nifti/two_slices_45x45x2.nii.gz",
        "odd-nifti/label_4d_singleton_int64_IMAGE.nii.gz",
        "nrrd/images/brain1.nrrd",
    ],
)
@pytest.mark.parametrize("suffix", [".nii.gz", ".mha", ".nrrd"])
def test_a_mask_in_any_format_lies_on_its_oblique_scan(real_scans, tmp_path, source, suffix):
    geometry = read_geometry(real_scans / source)
    mask = np.arange(np.prod(geometry.shape)).reshape(geometry.shape).astype(np.uint16)
    write_label(tmp_path / f"m{suffix}", mask, geometry)
    image = sitk.ReadImage(str(tmp_path / f"m{suffix}"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), mask)
    assert_same_world(image, geometry, 1e-3 if suffix == ".nii.gz" else 1e-9)
    if suffix == ".nii.gz":
        affine = np.diag([-1, -1, 1, 1]) @ nib.load(tmp_path / "m.nii.gz").affine
        np.testing.assert_allclose(affine[:, [2, 1, 0, 3]], geometry.matrix, rtol=1e-6, atol=1e-5)
