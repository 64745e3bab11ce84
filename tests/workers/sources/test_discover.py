"""Which cases a source holds: every layout on a made folder, and nothing that vanishes."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import SimpleITK as sitk
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from vnet_core.errors import ConfigError, ScanError
from vnet_core.sections import ReadingPlan, Selection
from workers.identity import Pseudonyms
from workers.sources.discover import discover
from workers.sources.found import Discovery, Found
from workers.sources.scans import read_volume


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"scan")


def found(*sources: Path) -> Discovery:
    return discover([str(source) for source in sources])


def cases(*sources: Path) -> dict[str, tuple[list[str], str | None]]:
    """Case id to the file names of its channels and label."""
    return {
        case.id: ([Path(c).name for c in case.channels], Path(case.label).name if case.label else None)
        for case in found(*sources).cases
    }


def problems(discovery: Discovery) -> dict[str, str]:
    return {case.id: case.problem.code for case in discovery.cases if case.problem}


def write_series(
    folder: Path,
    slices: int = 3,
    series: str = "1.2.826.0.1.1",
    modality: str = "CT",
    study: str = "1.2.826.0.1.9",
    frame: str = "1.2.826.0.5.1",
    burnt_in: str = "NO",
) -> None:
    """A series of single-frame DICOM files."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for z in range(slices):
        image = sitk.GetImageFromArray(np.full((4, 5), z, np.int16))
        tags = {
            "0008|0016": "1.2.840.10008.5.1.4.1.1.2",
            "0008|0018": f"{series}.{z + 1}",
            "0008|0060": modality,
            "0020|000d": study,
            "0020|000e": series,
            "0020|0052": frame,
            "0028|0301": burnt_in,
            "0020|0013": str(z + 1),
            "0020|0032": f"0\\0\\{2.5 * z}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
            "0028|0030": "1\\1",
        }
        for tag, value in tags.items():
            image.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{series[-1]}-{z:03}.dcm"))
        writer.Execute(image)


# --- folders of images and labels


def test_the_decathlons_layout(tmp_path):
    touch(tmp_path, "imagesTr/liver_0.nii.gz", "imagesTr/liver_1.nii.gz", "imagesTs/liver_2.nii.gz")
    touch(tmp_path, "labelsTr/liver_0.nii.gz", "labelsTr/liver_1.nii.gz")
    touch(tmp_path, "imagesTr/._liver_0.nii.gz", "labelsTr/._liver_0.nii.gz")
    mapping = {"modality": {"0": "CT"}, "labels": {"0": "background", "2": "cancer", "1": "liver"}}
    (tmp_path / "dataset.json").write_text(json.dumps(mapping))
    assert cases(tmp_path) == {
        "liver_0": (["liver_0.nii.gz"], "liver_0.nii.gz"),
        "liver_1": (["liver_1.nii.gz"], "liver_1.nii.gz"),
        "liver_2": (["liver_2.nii.gz"], None),
    }
    discovery = found(tmp_path)
    assert discovery.channels == ("CT",)
    assert [(label.value, label.name) for label in discovery.labels] == [(1, "liver"), (2, "cancer")]
    assert not problems(discovery)


def test_nnu_nets_layout(tmp_path):
    for case in ("BRATS_001", "BRATS_002"):
        touch(tmp_path, *(f"imagesTr/{case}_000{i}.nii.gz" for i in range(4)), f"labelsTr/{case}.nii.gz")
    mapping = {
        "channel_names": {"0": "FLAIR", "1": "T1w", "2": "T1gd", "3": "T2w"},
        "labels": {"background": 0, "edema": 1, "core": 2},
    }
    (tmp_path / "dataset.json").write_text(json.dumps(mapping))
    channels = {case: [f"{case}_000{i}.nii.gz" for i in range(4)] for case in ("BRATS_001", "BRATS_002")}
    assert cases(tmp_path) == {case: (files, f"{case}.nii.gz") for case, files in channels.items()}
    discovery = found(tmp_path)
    assert discovery.channels == ("FLAIR", "T1w", "T1gd", "T2w")
    assert [(label.value, label.name) for label in discovery.labels] == [(1, "edema"), (2, "core")]


def test_channel_names_are_in_the_order_of_their_numbers(tmp_path):
    touch(tmp_path, "imagesTr/a_0000.nii.gz")
    names = {str(i): f"channel {i}" for i in reversed(range(12))}
    (tmp_path / "dataset.json").write_text(json.dumps({"channel_names": names}))
    assert found(tmp_path).channels == tuple(f"channel {i}" for i in range(12))


def test_plain_images_and_labels_of_any_format(tmp_path):
    touch(tmp_path, "images/a.nrrd", "images/b.mha", "images/c.NII", "labels/a.nii.gz", "labels/b.mha")
    assert cases(tmp_path) == {"a": (["a.nrrd"], "a.nii.gz"), "b": (["b.mha"], "b.mha"), "c": (["c.NII"], None)}


def test_images_without_a_folder_of_labels(tmp_path):
    touch(tmp_path, "images/a.nii.gz")
    assert cases(tmp_path) == {"a": (["a.nii.gz"], None)}


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ("{", "source.dataset-json"),
        (json.dumps({"labels": {"background": 0, "whole": [1, 2]}}), "source.regions"),
        (json.dumps({"labels": {"background": 0, "liver": "one"}}), "source.regions"),
    ],
)
def test_a_dataset_json_that_cannot_be_used_is_named(tmp_path, content, code):
    touch(tmp_path, "imagesTr/a_0000.nii.gz")
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(ConfigError, match=r"dataset\.json") as caught:
        found(tmp_path)
    assert caught.value.code == code


# --- channels


def test_a_missing_channel_is_the_cases_problem(tmp_path):
    touch(tmp_path, "images/a_0000.nii.gz", "images/a_0001.nii.gz", "images/b_0000.nii.gz", "images/c_0001.nii.gz")
    discovery = found(tmp_path)
    assert problems(discovery)["b"] == "cohort.missing-channel"
    assert "1 of 2 channels" in str(next(case.problem for case in discovery.cases if case.id == "b"))
    assert len(problems(discovery)) == 2
    assert not next(case for case in discovery.cases if case.id == "a").problem


@pytest.mark.parametrize("folders", [("imagesTr", "labelsTr"), ("images", "labels")])
def test_cases_with_numbers_of_four_digits_are_no_channels(tmp_path, folders):
    """amos_0001 and amos_0004 are two patients when each has a label of its own."""
    for number in ("0001", "0004", "0005"):
        touch(tmp_path, *(f"{folder}/amos_{number}.nii.gz" for folder in folders))
    assert cases(tmp_path) == {
        f"amos_{number}": ([f"amos_{number}.nii.gz"], f"amos_{number}.nii.gz") for number in ("0001", "0004", "0005")
    }


def test_scans_numbered_from_1_are_cases_since_channels_are_numbered_from_0(tmp_path):
    """Without labels too: else the scans of several patients become one case of several channels."""
    touch(tmp_path, "ct_0001.nii.gz", "ct_0002.nii.gz", "ct_0003.nii.gz", "mr_0000.nii.gz", "mr_0001.nii.gz")
    assert {case: len(channels) for case, (channels, _) in cases(tmp_path).items()} == {
        "ct_0001": 1,
        "ct_0002": 1,
        "ct_0003": 1,
        "mr": 2,
    }


def test_numbered_cases_of_several_channels(tmp_path):
    touch(tmp_path, *(f"imagesTr/amos_{n}_000{i}.nii.gz" for n in ("0001", "0004") for i in (0, 1)))
    touch(tmp_path, "labelsTr/amos_0001.nii.gz", "labelsTr/amos_0004.nii.gz")
    assert [len(channels) for channels, _ in cases(tmp_path).values()] == [2, 2]
    assert list(cases(tmp_path)) == ["amos_0001", "amos_0004"]


def test_named_channels_are_the_endings_of_file_names(tmp_path):
    """BraTS: one folder per patient, the label beside the four channels."""
    for case in ("G_001", "G_002"):
        touch(tmp_path, *(f"{case}/{case}_{end}.nii.gz" for end in ("flair", "t1", "t1ce", "t2", "seg")))
    discovery = discover([str(tmp_path)], ("flair", "t1", "t1ce", "t2"))
    assert [(c.id, [Path(p).name for p in c.channels], Path(c.label or "").name) for c in discovery.cases] == [
        (
            f"{case}-{case}",
            [f"{case}_{end}.nii.gz" for end in ("flair", "t1", "t1ce", "t2")],
            f"{case}_seg.nii.gz",
        )
        for case in ("G_001", "G_002")
    ]
    assert not problems(discovery)


def test_named_channels_come_in_the_order_of_the_names(tmp_path):
    touch(tmp_path, *(f"images/a_{end}.nii.gz" for end in ("t1", "t1c", "t2", "fla")), "labels/a.nii.gz")
    touch(tmp_path, "images/b_t1.nii.gz")
    (a, b) = discover([str(tmp_path)], ("t2", "fla", "t1", "t1c")).cases
    assert [Path(p).name.split("_")[1] for p in a.channels] == [f"{e}.nii.gz" for e in ("t2", "fla", "t1", "t1c")]
    assert Path(a.label or "").name == "a.nii.gz"
    assert b.problem is not None
    assert b.problem.code == "cohort.missing-channel"


def test_the_four_channels_of_a_real_case(real_scans):
    (case,) = discover([str(real_scans / "multichannel")], ("fla", "t1", "t1c", "t2")).cases
    assert (case.id, case.problem) == ("TCGA-DU-7294", None)
    assert [Path(p).name for p in case.channels] == [f"TCGA-DU-7294_{e}.nii.gz" for e in ("fla", "t1", "t1c", "t2")]
    assert Path(case.label or "").name == "TCGA-DU-7294.nii.gz"


def test_the_name_of_a_single_channel_changes_no_case(tmp_path):
    touch(tmp_path, "a_CT.nii.gz")
    assert [c.id for c in discover([str(tmp_path)], ("CT",)).cases] == ["a_CT"]


# --- labels beside their images


def test_promise12s_layout(tmp_path):
    for number in range(3):
        touch(tmp_path, *(f"Case0{number}{end}" for end in (".mhd", ".raw", "_segmentation.mhd", "_segmentation.raw")))
    assert cases(tmp_path) == {f"Case0{n}": ([f"Case0{n}.mhd"], f"Case0{n}_segmentation.mhd") for n in range(3)}
    assert not problems(found(tmp_path))


def test_names_with_dots_or_raw_and_compressed_files_lose_nothing(tmp_path):
    touch(tmp_path, "Case.00.nii.gz", "Case.00_segmentation.nii.gz", "raw_scan.nii.gz", "drawn.mha", "raw.nrrd")
    touch(tmp_path, "segmentation.mha", "other_segmentation.mha")
    assert cases(tmp_path) == {
        "Case.00": (["Case.00.nii.gz"], "Case.00_segmentation.nii.gz"),
        "drawn": (["drawn.mha"], None),
        "other_segmentation": (["other_segmentation.mha"], None),
        "raw": (["raw.nrrd"], None),
        "raw_scan": (["raw_scan.nii.gz"], None),
        "segmentation": (["segmentation.mha"], None),
    }


def test_a_second_label_of_a_case_stays_a_case(tmp_path):
    touch(tmp_path, "a.mha", "a_segmentation.mha", "a_seg.mha")
    assert cases(tmp_path) == {"a": (["a.mha"], "a_segmentation.mha"), "a_seg": (["a_seg.mha"], None)}


def test_luna16s_layout(tmp_path):
    """Masks of all 888 scans, of which only some were fetched."""
    uids = [f"1.3.6.1.4.1.14519.5.2.1.6279.6001.{n}" for n in range(4)]
    touch(tmp_path, *(f"subset{n}/{uids[n]}{end}" for n in (0, 1) for end in (".mhd", ".raw")), "annotations.csv")
    touch(tmp_path, *(f"seg-lungs-LUNA16/{uids[n]}{end}" for n in (0, 2, 3) for end in (".mhd", ".zraw")))
    assert cases(tmp_path) == {
        f"subset0-{uids[0]}": ([f"{uids[0]}.mhd"], f"{uids[0]}.mhd"),
        f"subset1-{uids[1]}": ([f"{uids[1]}.mhd"], None),
    }
    discovery = found(tmp_path)
    assert "seg-lungs-LUNA16" in str(discovery.cases[0].label)
    assert discovery.ignored == 2 + 3 + 1 + 2, "data files of scans and masks, the table, masks without a scan"
    assert not problems(discovery)


# --- cases that cannot be


def test_a_label_without_image_is_a_case_with_a_problem(tmp_path):
    touch(tmp_path, "images/a.nii.gz", "labels/a.nii.gz", "labels/b.nii.gz")
    discovery = found(tmp_path)
    assert problems(discovery) == {"b": "cohort.missing-image"}
    assert [case.id for case in discovery.cases] == ["a", "b"]


def test_the_second_case_of_one_id_is_refused_and_not_lost(tmp_path):
    touch(tmp_path, "one/a.nii.gz", "one/b.nii.gz", "two/a.mha")
    discovery = found(tmp_path / "one", tmp_path / "two")
    assert [case.id for case in discovery.cases] == ["a", "a.2", "b"]
    assert problems(discovery) == {"a.2": "cohort.duplicate-id"}
    assert "2 cases have the id a" in str(discovery.cases[1].problem)


def test_one_series_in_two_sources_is_told_as_such(tmp_path):
    write_series(tmp_path / "one")
    write_series(tmp_path / "two")
    sources = [str(tmp_path / name) for name in ("one", "two")]
    discovery = discover(sources, ids=Pseudonyms("names", tmp_path / "secret"))
    (second,) = problems(discovery)
    assert problems(discovery) == {second: "cohort.series-twice"}
    assert second.endswith(".2")


def test_ids_are_distinct_whatever_the_cases_are_called(tmp_path):
    touch(tmp_path, "one/a.nii.gz", "two/a.nii.gz", "one/a.2.nii.gz", "two/a.2.nii.gz")
    ids = [case.id for case in found(tmp_path / "one", tmp_path / "two").cases]
    assert len(set(ids)) == len(ids) == 4


def test_odd_names_become_ids_that_stay_apart(tmp_path):
    touch(tmp_path, "images/Müller, Anna.nii.gz", "images/Mäller, Anna.nii.gz", f"images/{'x' * 120}.nii.gz")
    ids = [case.id for case in found(tmp_path).cases]
    assert len(set(ids)) == 3
    assert all(len(case_id) <= 100 and case_id.isascii() and " " not in case_id for case_id in ids)


def test_a_source_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match="nowhere") as caught:
        found(tmp_path / "nowhere")
    assert caught.value.code == "source.missing"


def test_an_empty_folder_holds_no_case(tmp_path):
    discovery = found(tmp_path)
    assert (discovery.cases, discovery.ignored) == ([], 0)


# --- manifests


def write_csv(path: Path, *rows: dict) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path: Path, *rows: dict) -> Path:
    pyarrow.parquet.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


@pytest.mark.parametrize(("write", "name"), [(write_csv, "m.csv"), (write_parquet, "M.PARQUET")])
def test_a_manifest_of_either_kind(tmp_path, write, name):
    touch(tmp_path, "a.nii.gz", "sub/b.mha", "sub/b-label.nii.gz")
    path = write(
        tmp_path / name,
        {"case": "a", "image": "a.nii.gz", "label": "", "patient": "p1"},
        {"case": "b", "image": str(tmp_path / "sub/b.mha"), "label": "sub/b-label.nii.gz", "patient": ""},
    )
    assert found(path).cases == [
        Found("a", (str(tmp_path / "a.nii.gz"),), patient="p1"),
        Found("b", (str(tmp_path / "sub/b.mha"),), str(tmp_path / "sub/b-label.nii.gz")),
    ]


def test_a_manifest_of_several_channels_names_them(tmp_path):
    touch(tmp_path, "a1.nii.gz", "a2.nii.gz", "b1.nii.gz")
    path = write_csv(
        tmp_path / "m.csv",
        {"case": "a", "image_T1": "a1.nii.gz", "image_T2": "a2.nii.gz"},
        {"case": "b", "image_T1": "b1.nii.gz", "image_T2": ""},
    )
    discovery = found(path)
    assert discovery.channels == ("T1", "T2")
    assert cases(path)["a"] == (["a1.nii.gz", "a2.nii.gz"], None)
    assert problems(discovery) == {"b": "cohort.missing-channel"}


def test_a_manifest_of_a_spreadsheet_begins_with_a_byte_order_mark(tmp_path):
    touch(tmp_path, "a.nii.gz")
    (tmp_path / "m.csv").write_bytes(b"\xef\xbb\xbfcase,image\r\na,a.nii.gz\r\n")
    assert list(cases(tmp_path / "m.csv")) == ["a"]


@pytest.mark.parametrize("write", [write_csv, write_parquet])
@pytest.mark.parametrize("row", [{"id": "a", "image": "x"}, {"case": "a", "scan": "x"}])
def test_a_missing_column_is_named_with_those_that_are_there(tmp_path, write, row):
    path = write(tmp_path / f"m.{'csv' if write is write_csv else 'parquet'}", row)
    with pytest.raises(ConfigError) as caught:
        found(path)
    assert caught.value.code == "manifest.columns"
    assert all(column in str(caught.value) for column in row)
    assert "case and image" in str(caught.value)


def test_a_manifest_with_its_columns_and_no_row_holds_no_case(tmp_path):
    (tmp_path / "m.csv").write_text("case,image\n")
    assert found(tmp_path / "m.csv").cases == []


@pytest.mark.parametrize("name", ["m.csv", "m.parquet"])
def test_a_manifest_that_cannot_be_read_is_the_users_to_mend(tmp_path, name):
    (tmp_path / name).write_bytes(b"case,image\n\xff\xfe\x00,M\xfcller.nii.gz\n")
    with pytest.raises(ConfigError, match=name):
        found(tmp_path / name)


def test_rows_that_cannot_be_used_stay_as_cases_with_their_problem(tmp_path):
    touch(tmp_path, "a.nii.gz", "c.nii.gz")
    path = write_csv(
        tmp_path / "m.csv",
        {"case": "a", "image": "gone.nii.gz", "label": ""},
        {"case": "b", "image": "", "label": ""},
        {"case": "c", "image": "c.nii.gz", "label": "gone-label.nii.gz"},
        {"case": "a", "image": "a.nii.gz", "label": ""},
    )
    discovery = found(path)
    assert problems(discovery) == {
        "a": "scan.missing",
        "a.2": "cohort.duplicate-id",
        "b": "cohort.missing-image",
        "c": "scan.missing",
    }
    assert "row 3" in str(discovery.cases[3].problem)
    assert "label" in str(discovery.cases[3].problem)
    assert not any("gone" in str(case.problem) for case in discovery.cases), "a file's name may be a patient's"


def test_patients_of_a_table_with_numbers_are_text(tmp_path):
    touch(tmp_path, "a.nii.gz", "b.nii.gz", "c.nii.gz")
    rows = [{"case": c, "image": f"{c}.nii.gz", "patient": p} for c, p in (("a", 0), ("b", 7), ("c", None))]
    discovery = found(write_parquet(tmp_path / "m.parquet", *rows))
    assert [case.patient for case in discovery.cases] == ["0", "7", None]


def test_a_manifest_may_name_a_series_of_a_folder_and_a_file_with_a_hash_in_its_name(tmp_path):
    write_series(tmp_path / "dicom")
    touch(tmp_path, "scan#1.nii.gz")
    path = write_csv(
        tmp_path / "m.csv",
        {"case": "a", "image": "dicom#1.2.826.0.1.1"},
        {"case": "b", "image": "scan#1.nii.gz"},
    )
    discovery = found(path)
    assert read_volume(discovery.cases[0].channels[0]).voxels.shape == (1, 3, 4, 5)
    assert not problems(discovery)


# --- single files and trees


def test_one_file_is_one_case_even_when_it_is_no_scan(tmp_path):
    touch(tmp_path, "scan.nii.gz", "notes.txt")
    assert cases(tmp_path / "scan.nii.gz", tmp_path / "notes.txt") == {
        "notes.txt": (["notes.txt"], None),
        "scan": (["scan.nii.gz"], None),
    }


def test_a_tree_names_cases_after_their_folders(tmp_path):
    touch(tmp_path, "p1/ct.nii.gz", "p2/visit1/ct.nii.gz", "p2/visit2/ct_0000.mha", "p2/visit2/ct_0001.mha", "top.nrrd")
    assert set(cases(tmp_path)) == {"p1-ct", "p2-visit1-ct", "p2-visit2-ct", "top"}
    assert cases(tmp_path)["p2-visit2-ct"][0] == ["ct_0000.mha", "ct_0001.mha"]


def test_foreign_files_are_counted_and_hidden_ones_passed_over(tmp_path):
    touch(tmp_path, "a.nii.gz", "notes.txt", "sub/table.xlsx", ".DS_Store", "._a.nii.gz", "sub/.hidden.nii.gz")
    discovery = found(tmp_path)
    assert [case.id for case in discovery.cases] == ["a"]
    assert discovery.ignored == 2


def test_foreign_files_beside_images_and_labels_are_counted(tmp_path):
    touch(tmp_path, "images/a.nii.gz", "images/a.json", "labels/a.nii.gz", "labels/readme.txt", "images/._a.nii.gz")
    discovery = found(tmp_path)
    assert [case.id for case in discovery.cases] == ["a"]
    assert discovery.ignored == 2


def test_nothing_under_a_hidden_folder_is_a_case(tmp_path):
    touch(tmp_path, "a.nii.gz", ".Trash/b.nii.gz", ".Trash/old/c.nii.gz", "sub/.cache/deep/d.nii.gz")
    assert set(cases(tmp_path)) == {"a"}


def test_a_tree_of_dicom_is_one_case_per_series(tmp_path):
    write_series(tmp_path / "p1" / "ct", series="1.2.826.0.1.3")
    write_series(tmp_path / "p2", series="1.2.826.0.1.1")
    write_series(tmp_path / "p2", series="1.2.826.0.1.2")
    touch(tmp_path, "p1/ct/readme.txt", "p1/extra.nii.gz")
    discovery = found(tmp_path)
    assert [case.id for case in discovery.cases] == ["p1-ct", "p1-extra", "p2-0", "p2-1"]
    assert discovery.ignored == 1
    for case in discovery.cases:
        if case.id != "p1-extra":
            assert read_volume(case.channels[0]).voxels.shape == (1, 3, 4, 5)
    assert discovery.cases[2].channels[0].endswith("#1.2.826.0.1.1")


def test_a_folder_of_one_series_is_a_case_of_its_name(tmp_path):
    write_series(tmp_path / "thorax")
    for path in (tmp_path / "thorax").iterdir():
        path.rename(path.with_suffix(""))  # as scanners often name them
    assert [case.id for case in found(tmp_path / "thorax").cases] == ["thorax"]


def test_a_folder_with_a_damaged_slice_does_not_take_the_others_along(tmp_path):
    """183 samples per pixel in one header, at which the DICOM library gives up on the folder."""
    write_series(tmp_path / "good")
    write_series(tmp_path / "odd", series="1.2.826.0.1.2")
    path = sorted((tmp_path / "odd").iterdir())[0]
    samples_per_pixel = b"\x28\x00\x02\x00\x02\x00\x00\x00"
    assert samples_per_pixel + b"\x01" in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(samples_per_pixel + b"\x01", samples_per_pixel + b"\xb7"))
    discovery = found(tmp_path)
    assert [case.id for case in discovery.cases] == ["good", "odd"]
    good, odd = discovery.cases
    assert good.problem is None
    if odd.problem is None:
        with pytest.raises(ScanError):
            read_volume(odd.channels[0])


@pytest.mark.parametrize("keep", [200, 400])
def test_a_series_whose_slices_are_all_cut_off_is_still_a_case(tmp_path, keep):
    """It was broken on the way here; its patient must not be missing from the table without a word."""
    write_series(tmp_path / "good")
    write_series(tmp_path / "odd")
    for path in (tmp_path / "odd").iterdir():
        path.write_bytes(path.read_bytes()[:keep])
    assert [case.id for case in found(tmp_path).cases] == ["good", "odd"]


def test_links_are_followed_inside_the_source_alone(tmp_path):
    touch(tmp_path, "source/a.nii.gz", "elsewhere/secret.nii.gz", "elsewhere/notes.txt", "source/notes.txt")
    source, elsewhere = tmp_path / "source", tmp_path / "elsewhere"
    (source / "inside.nii.gz").symlink_to(source / "a.nii.gz")
    (source / "out.nii.gz").symlink_to(elsewhere / "secret.nii.gz")
    (source / "b.nii.gz").symlink_to(tmp_path / "nowhere.nii.gz")
    (source / "folder").symlink_to(elsewhere)
    (source / "loop").symlink_to(source)
    (source / "notes-2.txt").symlink_to(source / "notes.txt")
    discovery = found(source)
    assert [case.id for case in discovery.cases] == ["a", "b", "inside", "out"]
    assert problems(discovery) == {"b": "scan.path-escape", "out": "scan.path-escape"}
    assert discovery.set_aside == {"not-a-scan": 1, "link": 2, "link-outside": 1}


@pytest.mark.parametrize("folders", [("images", "labels"), ("", "")])
def test_a_label_that_is_a_link_out_of_the_source_refuses_its_case(tmp_path, folders):
    images, labels = folders
    touch(tmp_path, f"source/{images}/a.nii.gz", "secret.nii.gz")
    (tmp_path / "source" / labels).mkdir(exist_ok=True)
    name = "a.nii.gz" if labels else "a_seg.nii.gz"
    (tmp_path / "source" / labels / name).symlink_to(tmp_path / "secret.nii.gz")
    assert problems(found(tmp_path / "source")) == {"a": "scan.path-escape"}


def test_pipes_and_empty_folders_with_the_name_of_a_scan_are_cases_and_others_are_counted(tmp_path):
    os.mkfifo(tmp_path / "pipe.nii.gz")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder.nii.gz").mkdir()
    touch(tmp_path, "unpacked.nii/scan.nii")
    discovery = found(tmp_path)
    assert [case.id for case in discovery.cases] == ["folder", "pipe", "unpacked.nii-scan"]
    assert discovery.set_aside == {"not-regular": 1}
    for case in discovery.cases:
        with pytest.raises(ScanError):
            read_volume(case.channels[0])


def test_a_folder_that_cannot_be_listed_is_a_refused_case(tmp_path, monkeypatch):
    touch(tmp_path, "a.nii.gz", "closed/b.nii.gz")
    listed = Path.iterdir

    def iterdir(path):
        if path.name == "closed":
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)  # to the superuser every folder is open
    assert problems(found(tmp_path)) == {"closed": "scan.unreadable"}


def test_a_zarr_folder_is_one_scan(tmp_path):
    touch(tmp_path, "a.ome.zarr/zarr.json", "a.ome.zarr/0/c/0", "sub/b.zarr/zarr.json", "c.nii.gz")
    assert cases(tmp_path) == {
        "a": (["a.ome.zarr"], None),
        "c": (["c.nii.gz"], None),
        "sub-b": (["b.zarr"], None),
    }
    assert cases(tmp_path / "a.ome.zarr") == {"a": (["a.ome.zarr"], None)}
    touch(tmp_path, "d/images/a.ome.zarr/zarr.json", "d/labels/a.nii.gz")
    assert cases(tmp_path / "d") == {"a": (["a.ome.zarr"], "a.nii.gz")}


def test_channels_along_the_fourth_axis_of_the_decathlons_files(tmp_path):
    """Task01 and Task05 hold all channels in one file."""
    touch(tmp_path, "imagesTr/BRATS_001.nii.gz", "labelsTr/BRATS_001.nii.gz", "imagesTs/BRATS_485.nii.gz")
    mapping = {"modality": {"0": "FLAIR", "1": "T1w"}, "labels": {"0": "background", "1": "edema"}}
    (tmp_path / "dataset.json").write_text(json.dumps(mapping))
    assert cases(tmp_path) == {
        "BRATS_001": (["BRATS_001.nii.gz[0]", "BRATS_001.nii.gz[1]"], "BRATS_001.nii.gz"),
        "BRATS_485": (["BRATS_485.nii.gz[0]", "BRATS_485.nii.gz[1]"], None),
    }
    del mapping["modality"]
    (tmp_path / "dataset.json").write_text(json.dumps(mapping | {"channel_names": {"0": "FLAIR", "1": "T1w"}}))
    assert cases(tmp_path)["BRATS_001"] == (["BRATS_001.nii.gz"], "BRATS_001.nii.gz")


def test_a_stack_of_channels_that_is_a_link_out_of_the_source_is_refused(tmp_path):
    touch(tmp_path, "elsewhere/a.nii.gz", "task/imagesTr/b.nii.gz", "task/imagesTr/c.mha")
    (tmp_path / "task/imagesTr/a.nii.gz").symlink_to(tmp_path / "elsewhere/a.nii.gz")
    (tmp_path / "task/dataset.json").write_text(json.dumps({"modality": {"0": "T2", "1": "ADC"}}))
    assert problems(found(tmp_path / "task")) == {"a": "scan.path-escape", "c": "cohort.missing-channel"}
    assert cases(tmp_path / "task")["c"] == (["c.mha"], None), "volumes are numbered in NIfTI files alone"


def test_a_numbered_volume_is_a_source(tmp_path):
    touch(tmp_path, "a.nii.gz", "b.nii.gz[0]")
    assert cases(tmp_path / "a.nii.gz[3]") == {"a-3": (["a.nii.gz[3]"], None)}
    with pytest.raises(ConfigError) as caught:
        found(tmp_path / "absent.nii.gz[0]")
    assert caught.value.code == "source.missing"


def test_ids_that_differ_in_upper_and_lower_case_alone_are_told_apart(tmp_path):
    touch(tmp_path, "images/Case.nii.gz", "images/case.nii.gz", "images/CASE.nii.gz")
    discovery = found(tmp_path)
    assert not problems(discovery)
    ids = [case.id for case in discovery.cases]
    assert len({case_id.casefold() for case_id in ids}) == 3
    assert sum(case_id in ("Case", "case", "CASE") for case_id in ids) == 1
    assert found(tmp_path).cases == discovery.cases


# --- DICOM in folders of images, and what belongs to a series


def test_a_folder_of_slices_may_stand_for_an_image(tmp_path):
    write_series(tmp_path / "images/p1")
    touch(tmp_path, "images/p2.nii.gz", "labels/p1.nii.gz", "labels/p2.nii.gz", "images/empty/readme.txt")
    discovery = found(tmp_path)
    assert [(case.id, Path(case.label or "").name) for case in discovery.cases] == [
        ("p1", "p1.nii.gz"),
        ("p2", "p2.nii.gz"),
    ]
    assert discovery.set_aside == {"not-a-scan": 1}


def test_ids_of_series_are_pseudonyms_and_so_are_patients(tmp_path):
    write_series(tmp_path / "source/Meier")
    ids = Pseudonyms("names", tmp_path / "secret")
    (case,) = discover([str(tmp_path / "source")], ids=ids).cases
    assert case.id == ids.series("CT", "1.2.826.0.1.1")
    assert case.patient == ids.patient("", "1.2.826.0.1.9")
    assert "Meier" not in case.id


def segmentation(path: Path, *series: str, uid: str = "1.2.826.0.7.1", kind: str = "seg") -> Path:
    """As much of a DICOM segmentation or structure set as says what it refers to."""
    sop_class = {"seg": "1.2.840.10008.5.1.4.1.1.66.4", "rtstruct": "1.2.840.10008.5.1.4.1.1.481.3"}[kind]
    data = Dataset()
    data.SOPClassUID, data.SOPInstanceUID = sop_class, uid
    data.StudyInstanceUID, data.SeriesInstanceUID = "1.2.826.0.1.9", f"{uid}.1"
    data.Modality = {"seg": "SEG", "rtstruct": "RTSTRUCT"}[kind]
    items = [Dataset() for _ in series]
    for item, series_uid in zip(items, series, strict=True):
        item.SeriesInstanceUID = series_uid
    if kind == "seg":
        data.ReferencedSeriesSequence = items
    else:
        study, frame = Dataset(), Dataset()
        study.RTReferencedSeriesSequence = items
        frame.RTReferencedStudySequence = [study]
        data.ReferencedFrameOfReferenceSequence = [frame]
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID, data.file_meta.MediaStorageSOPInstanceUID = sop_class, uid
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)
    return path


CT, MR = "1.2.826.0.1.1", "1.2.826.0.1.2"


@pytest.fixture
def study(tmp_path) -> Path:
    write_series(tmp_path / "study/ct", series=CT)
    write_series(tmp_path / "study/mr", series=MR, modality="MR")
    return tmp_path / "study"


def labels_of(folder: Path) -> dict[str, tuple[str, tuple[str, ...]]]:
    return {case.id: (Path(case.label or "").name, case.warnings) for case in found(folder).cases}


@pytest.mark.parametrize("kind", ["seg", "rtstruct"])
def test_a_segmentation_is_the_label_of_the_one_case_it_refers_to(study, kind):
    segmentation(study / "drawn/a.dcm", CT, kind=kind)
    assert labels_of(study) == {"ct": ("a.dcm", ()), "mr": ("", ())}
    assert found(study).set_aside == {}


def test_a_segmentation_of_two_cases_or_of_none_is_set_aside(study):
    segmentation(study / "drawn/a.dcm", CT, MR)
    segmentation(study / "drawn/b.dcm", "1.2.826.0.1.77", uid="1.2.826.0.7.2")
    assert labels_of(study) == {"ct": ("", ()), "mr": ("", ())}
    assert found(study).set_aside == {"annotation-of-several-scans": 1, "annotation-without-scan": 1}


def test_of_several_segmentations_of_a_case_none_is_guessed(study):
    segmentation(study / "drawn/a.dcm", CT)
    segmentation(study / "drawn/b.dcm", CT, uid="1.2.826.0.7.2")
    segmentation(study / "drawn/copy-of-a.dcm", CT)
    segmentation(study / "drawn/c.dcm", MR, uid="1.2.826.0.7.3")
    segmentation(study / "drawn/d.dcm", MR, uid="1.2.826.0.7.4", kind="rtstruct")
    assert labels_of(study) == {"ct": ("", ("label.several",)), "mr": ("c.dcm", ())}
    assert found(study).set_aside == {"annotation-copy": 1, "annotation-not-taken": 3}


def test_a_folder_of_segmentations_alone_holds_no_case(tmp_path):
    segmentation(tmp_path / "a.dcm", CT)
    discovery = found(tmp_path)
    assert discovery.cases == []
    assert discovery.set_aside == {"annotation-without-scan": 1}


# --- rules of selection


RULES = ReadingPlan(select=(Selection(channel="mr", modality="MR"), Selection(channel="ct", modality="CT")))


def test_rules_make_a_case_of_a_study_and_say_why_a_series_is_no_channel(study):
    write_series(study / "other", series="1.2.826.0.1.5", modality="NM")
    segmentation(study / "drawn/a.dcm", MR)
    discovery = discover([str(study)], reading=RULES)
    (case,) = discovery.cases
    assert [Path(channel.partition("#")[0]).name for channel in case.channels] == ["mr", "ct"]
    assert Path(case.label or "").name == "a.dcm"
    assert [(left.case, left.modality, left.slices) for left in discovery.not_chosen] == [(case.id, "NM", 3)]
    assert discovery.not_chosen[0].reason


def test_a_study_that_fits_no_rule_is_a_refused_case(tmp_path):
    write_series(tmp_path / "p1/ct", series=CT)
    write_series(tmp_path / "p2/mr", series=MR, modality="MR", study="1.2.826.0.9.2")
    discovery = discover([str(tmp_path)], reading=RULES)
    assert problems(discovery) == {"p1-ct": "select.none", "p2-mr": "select.none"}


def test_a_row_of_a_manifest_may_be_a_study(study):
    path = write_csv(study / "m.csv", {"case": "one", "image": "."}, {"case": "two", "image": "ct"})
    discovery = discover([str(path)], reading=RULES)
    assert problems(discovery) == {"two": "select.none"}
    one = discovery.cases[0]
    assert (one.id, [c.rpartition("#")[2] for c in one.channels]) == ("one", [MR, CT])


# --- manifests with odd rows


def test_rows_without_case_or_with_impossible_names_are_refused_cases(tmp_path):
    touch(tmp_path, "a.nii.gz")
    (tmp_path / "m.csv").write_text(f"case,image\n,a.nii.gz\nb,a\0b.nii.gz\nc,{'x' * 5000}\nd\ne,a.nii.gz,more\n")
    discovery = found(tmp_path / "m.csv")
    assert problems(discovery) == {
        "row-1": "cohort.missing-id",
        "b": "scan.missing",
        "c": "scan.missing",
        "d": "cohort.missing-image",
    }


def test_a_field_longer_than_the_reader_takes_is_the_users_to_mend(tmp_path):
    (tmp_path / "m.csv").write_text(f"case,image\na,{'x' * 200_000}\n")
    with pytest.raises(ConfigError) as caught:
        found(tmp_path / "m.csv")
    assert caught.value.code == "manifest.unreadable"


@pytest.mark.parametrize(
    "content",
    ["[1, 2]", '{"labels": [1]}', '{"modality": {"a": "CT"}}', '{"labels": {"0": "b", "x": 70000}}', "[" * 100_000],
)
def test_a_dataset_json_of_another_make_is_named(tmp_path, content):
    touch(tmp_path, "imagesTr/a_0000.nii.gz")
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(ConfigError) as caught:
        found(tmp_path)
    assert caught.value.code == "source.dataset-json"


def test_the_order_of_sources_and_files_does_not_matter(tmp_path):
    touch(tmp_path, "one/b.nii.gz", "one/a.nii.gz", "two/c.nii.gz")
    assert found(tmp_path / "one", tmp_path / "two").cases == found(tmp_path / "two", tmp_path / "one").cases
