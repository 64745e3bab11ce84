"""Label maps from a table of nodules, on small CT phantoms of both orientations."""

import csv
from pathlib import Path

import numpy as np
import pytest

from vnet_core.errors import ConfigError
from vnet_core.geometry import CANONICAL_DIRECTION, Geometry, same_grid, world_mm
from vnet_core.phantoms import oblique_direction
from vnet_core.volume import Volume
from workers.sources.annotations import COLUMNS, Gate, label_spheres, read_points
from workers.sources.discover import discover
from workers.sources.scans import read_label, write_label, write_volume

FLIPPED = ((0.0, 0.0, -1.0), (0.0, -1.0, 0.0), (1.0, 0.0, 0.0))
GRID = Geometry((24, 30, 32), (1.0, 1.0, 1.0), (-100.0, 40.0, -250.0))


def write_ct(path: Path, geometry: Geometry = GRID, tissue_from: int = 0) -> None:
    """Air at -1000 HU, and tissue at 40 HU from the given index along x."""
    voxels = np.full((1, *geometry.shape), -1000, np.int16)
    voxels[..., tissue_from:] = 40
    path.parent.mkdir(parents=True, exist_ok=True)
    write_volume(path, Volume(voxels, geometry))


def write_table(path: Path, *rows: tuple) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    return path


def at(geometry: Geometry, *index: float) -> tuple[float, ...]:
    return tuple(float(v) for v in world_mm(geometry, np.array(index)))


@pytest.mark.parametrize("direction", [CANONICAL_DIRECTION, FLIPPED, oblique_direction((15, -20, 30))])
def test_a_nodule_of_ten_millimetres_lies_where_the_table_says(tmp_path, direction):
    geometry = Geometry((24, 30, 32), (1.0, 1.0, 1.0), (-100.0, 40.0, -250.0), direction)
    write_ct(tmp_path / "scans/1.2.840.1.mha", geometry)
    table = write_table(tmp_path / "a.csv", ("1.2.840.1", *at(geometry, 12, 14, 16), 10))
    (one,) = label_spheres([str(tmp_path / "scans")], table, tmp_path / "out")
    assert (one.outcome.state, one.outcome.codes, one.spheres) == ("computed", (), 1)
    assert one.volume_ml == pytest.approx(0.5236, rel=0.02)
    written = read_label(tmp_path / "out/1.2.840.1.nii.gz")
    assert same_grid(written.geometry, geometry)
    assert np.argwhere(written.labels == 1).mean(axis=0) == pytest.approx([12, 14, 16], abs=0.01)


def test_the_maps_are_a_cohort_with_their_scans(tmp_path):
    write_ct(tmp_path / "scans/a.mha")
    write_ct(tmp_path / "scans/b.nii.gz")
    table = write_table(tmp_path / "a.csv", ("a", *at(GRID, 12, 14, 16), 6))
    label_spheres([str(tmp_path / "scans")], table, tmp_path / "out")
    cases = discover([str(tmp_path / "out/manifest.csv")]).cases
    assert [(c.id, Path(c.channels[0]).name, Path(c.label or "").name, c.problem) for c in cases] == [
        ("a", "a.mha", "a.nii.gz", None),
        ("b", "b.nii.gz", "b.nii.gz", None),
    ]
    assert not read_label(tmp_path / "out/b.nii.gz").labels.any()


def test_the_gate_keeps_tissue_and_drops_air(tmp_path):
    write_ct(tmp_path / "scans/a.mha", tissue_from=16)
    table = write_table(tmp_path / "a.csv", ("a", *at(GRID, 12, 14, 15.5), 10))
    (one,) = label_spheres([str(tmp_path / "scans")], table, tmp_path / "out", Gate(minimum=-600))
    labels = read_label(tmp_path / "out/a.nii.gz").labels
    assert not labels[..., :16].any()
    assert one.volume_ml == pytest.approx(0.5236 / 2, rel=0.05)


def test_a_sphere_of_air_alone_is_a_warning(tmp_path):
    write_ct(tmp_path / "scans/a.mha", tissue_from=32)
    table = write_table(tmp_path / "a.csv", ("a", *at(GRID, 12, 14, 16), 10))
    (one,) = label_spheres([str(tmp_path / "scans")], table, tmp_path / "out", Gate(minimum=-600))
    assert (one.outcome.state, one.outcome.codes, one.spheres) == ("warned", ("sphere.empty",), 0)
    assert "10 mm" in one.outcome.message


def test_what_lies_outside_the_lung_mask_is_undecided(tmp_path):
    write_ct(tmp_path / "scans/a.mha")
    lung = np.zeros(GRID.shape, np.uint8)
    lung[..., :16] = 3
    (tmp_path / "lungs").mkdir()
    write_label(tmp_path / "lungs/a.nii.gz", lung, GRID)
    table = write_table(tmp_path / "a.csv", ("a", *at(GRID, 12, 14, 15.5), 10))
    (one,) = label_spheres([str(tmp_path / "scans")], table, tmp_path / "out", Gate(inside=tmp_path / "lungs"))
    labels = read_label(tmp_path / "out/a.nii.gz").labels
    assert set(np.unique(labels[..., :16])) == {0, 1}
    assert set(np.unique(labels[..., 16:])) == {0, 255}
    assert np.count_nonzero(labels == 1) == np.count_nonzero(labels == 255)
    assert one.volume_ml == pytest.approx(0.5236 / 2, rel=0.05)


def test_a_centre_outside_is_a_warning_and_the_other_nodules_stay(tmp_path):
    write_ct(tmp_path / "scans/a.mha")
    rows = [("a", *at(GRID, 12, 14, 40), 8), ("a", *at(GRID, 12, 14, 16), 8), ("a", *at(GRID, 12, 14, 4), 0)]
    (one,) = label_spheres([str(tmp_path / "scans")], write_table(tmp_path / "a.csv", *rows), tmp_path / "out")
    assert (one.outcome.state, one.spheres) == ("warned", 1)
    assert one.outcome.codes == ("sphere.diameter", "sphere.outside")
    assert "LPS" in one.outcome.message


def test_a_scan_that_cannot_be_used_is_a_row_and_stays_in_the_manifest(tmp_path):
    write_ct(tmp_path / "scans/a.mha")
    (tmp_path / "scans/b.mha").write_bytes((tmp_path / "scans/a.mha").read_bytes()[:200])
    write_ct(tmp_path / "scans/c.mha")
    (tmp_path / "lungs").mkdir()
    write_label(tmp_path / "lungs/a.nii.gz", np.ones(GRID.shape, np.uint8), GRID)
    write_label(tmp_path / "lungs/b.nii.gz", np.ones(GRID.shape, np.uint8), GRID)
    table = write_table(tmp_path / "a.csv", *((name, *at(GRID, 12, 14, 16), 8) for name in "abc"))
    gate = Gate(minimum=-600, inside=tmp_path / "lungs")
    labelled = label_spheres([str(tmp_path / "scans")], table, tmp_path / "out", gate)
    states = {one.outcome.case: (one.outcome.state, one.outcome.codes) for one in labelled}
    assert states["a"] == ("computed", ())
    assert states["b"][0] == "refused"
    assert states["b"][1][0].startswith("scan.")
    assert states["c"] == ("refused", ("label.no-mask",))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.nii.gz", "manifest.csv"]
    assert [(c.id, c.label is None) for c in discover([str(tmp_path / "out/manifest.csv")]).cases] == [
        ("a", False),
        ("b", True),
        ("c", True),
    ]


def test_a_mask_on_another_grid_is_refused(tmp_path):
    write_ct(tmp_path / "scans/a.mha")
    (tmp_path / "lungs").mkdir()
    write_label(tmp_path / "lungs/a.nii.gz", np.ones((5, 5, 5), np.uint8), Geometry((5, 5, 5), (1, 1, 1), (0, 0, 0)))
    table = write_table(tmp_path / "a.csv", ("a", *at(GRID, 12, 14, 16), 8))
    (one,) = label_spheres([str(tmp_path / "scans")], table, tmp_path / "out", Gate(inside=tmp_path / "lungs"))
    assert one.outcome.codes == ("label.grid",)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("seriesuid,x,y,z\na,1,2,3\n", "annotations.columns"),
        ("", "annotations.columns"),
        (",".join(COLUMNS) + "\na,1,2,three,4\n", "annotations.value"),
        (",".join(COLUMNS) + "\na,1,2,3\n", "annotations.value"),
        (",".join(COLUMNS) + "\na,1,2,nan,4\n", "annotations.value"),
    ],
)
def test_a_table_that_cannot_be_used_is_named(tmp_path, text, code):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ConfigError, match=r"a\.csv") as caught:
        read_points(tmp_path / "a.csv")
    assert caught.value.code == code


def test_a_table_or_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError) as caught:
        read_points(tmp_path / "gone.csv")
    assert caught.value.code == "annotations.missing"
    write_ct(tmp_path / "scans/a.mha")
    table = write_table(tmp_path / "a.csv")
    with pytest.raises(ConfigError) as caught:
        label_spheres([str(tmp_path / "scans")], table, tmp_path / "out", Gate(inside=tmp_path / "gone"))
    assert caught.value.code == "label.folder"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError) as caught:
        label_spheres([str(tmp_path / "empty")], table, tmp_path / "out")
    assert caught.value.code == "cohort.empty"
