"""Pictures are read back as pixels: sides, slices, proportions, colours and size."""

import io
from dataclasses import dataclass

import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image
from scipy import ndimage

from vnet_core.colours import COLOURS, rgb
from vnet_core.errors import ScanError
from vnet_core.geometry import CANONICAL_DIRECTION, Geometry, Reorientation, matrix_of
from vnet_core.phantoms import LABELS, PhantomSpec, oblique_direction, phantom
from vnet_core.pictures.qc_sheet import MAX_BYTES, ROWS, light_picture, qc_picture
from vnet_core.plan import Label

ORGAN, LESION = LABELS
ORANGE, SKY = rgb(0), rgb(1)


def pixels(png: bytes) -> np.ndarray:
    """RGB (H, W, 3)."""
    with Image.open(io.BytesIO(png)) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB"))


@dataclass
class Panel:
    """A slice found in a picture of a black and white image, by its two extreme greys."""

    height: int
    width: int
    white: tuple[float, float]
    """Centre of its white area, from 0 at the top and left to 1; NaN when there is none."""


def panels(png: bytes) -> list[Panel]:
    """The panels of a sheet, row by row from left to right."""
    rgb = pixels(png)
    black, white = (np.all(rgb == level, axis=2) for level in (0, 255))
    pieces, _ = ndimage.label(ndimage.binary_closing(black | white, np.ones((9, 9))))
    boxes = [box for box in ndimage.find_objects(pieces) if min(s.stop - s.start for s in box) > 30]
    found = []
    for box in sorted(boxes, key=lambda b: (b[0].start // 200, b[1].start)):
        height, width = (s.stop - s.start for s in box)
        y, x = (v.mean() if v.size else np.nan for v in np.nonzero(white[box]))
        found.append(Panel(height, width, (y / height, x / width)))
    return found


def count(png: bytes, colour: tuple[int, ...]) -> int:
    return int(np.all(pixels(png) == colour, axis=2).sum())


def grid(shape, spacing_mm=(1.0, 1.0, 1.0), direction=CANONICAL_DIRECTION) -> Geometry:
    return Geometry(shape, spacing_mm, (0.0, 0.0, 0.0), direction)


def stored(array: np.ndarray, spacing_mm, turn: Reorientation) -> tuple[np.ndarray, Geometry]:
    """A canonical array as a scanner with other axes would have stored it."""
    columns = np.array(CANONICAL_DIRECTION).T
    direction, spacing = np.zeros((3, 3)), np.zeros(3)
    for a in range(3):
        direction[:, turn.source_axis[a]] = columns[a] * (-1 if turn.flip[a] else 1)
        spacing[turn.source_axis[a]] = spacing_mm[a]
    source = turn.undo(array)
    z, y, x = (float(s) for s in spacing)
    return source, Geometry(source.shape, (z, y, x), (5.0, 6.0, 7.0), matrix_of(direction))


TURNS = {
    "axial": Reorientation((0, 1, 2), (False, False, False)),
    "flipped": Reorientation((0, 1, 2), (True, True, True)),
    "sagittal": Reorientation((1, 2, 0), (True, False, True)),
    "coronal": Reorientation((1, 0, 2), (False, True, False)),
}


@pytest.mark.parametrize("turn", TURNS.values(), ids=TURNS)
def test_sides_are_radiological_however_the_scan_is_stored(turn):
    # a block at the patient's left, front and feet, in voxels of 2 x 1 x 1 mm
    labels = np.zeros((30, 60, 60), np.uint8)
    labels[2:10, 4:20, 40:56] = 1
    source, geometry = stored(labels, (2.0, 1.0, 1.0), turn)

    axial, coronal, sagittal = panels(qc_picture(source * 100.0, source, geometry, [ORGAN]))

    left, top = pytest.approx(0.2, abs=0.03), pytest.approx(0.2, abs=0.03)
    right, bottom = pytest.approx(0.8, abs=0.03), pytest.approx(0.8, abs=0.03)
    assert axial.white == (top, right)
    assert coronal.white == (bottom, right)
    assert sagittal.white == (bottom, left)


def test_one_row_per_label_at_most_four():
    labels = np.zeros((40, 40, 40), np.uint8)
    for value in range(1, 7):
        labels[6 * value - 4 : 6 * value, 10:30, 10:30] = value
    structures = [Label(value=v, name=f"structure {v}") for v in range(1, 7)]
    image = np.where(labels > 0, 100.0, 0.0)
    rows = [len(panels(qc_picture(image, labels, grid(labels.shape), structures[:n]))) / 3 for n in (1, 2, 4, 6)]
    assert rows == [1, 2, 4, ROWS]


def test_rows_go_to_the_largest_labels_in_descending_order():
    labels = np.zeros((40, 40, 40), np.uint8)
    for value, side in ((1, 10), (2, 20), (3, 1), (4, 15), (5, 12)):
        labels[6 * value : 6 * value + 2, :side, :side] = value
    structures = [Label(value=v, name=f"structure {v}") for v in range(1, 6)]

    rgb = pixels(qc_picture(np.zeros(labels.shape), labels, grid(labels.shape), structures))

    # the headings begin with the label's colour, near the left edge
    column = [tuple(int(v) for v in p) for p in rgb[:, 18]]
    swatches = [c for c, before in zip(column[1:], column, strict=False) if c != before and len(set(c)) > 1]
    # below the rows the legend has the first of each line of three
    expected = [COLOURS[value - 1] for value in (2, 4, 5, 1, 2, 1)]
    assert [f"#{r:02X}{g:02X}{b:02X}" for r, g, b in swatches] == expected


def test_the_legend_names_every_label_below_the_rows():
    labels = np.zeros((40, 40, 40), np.uint8)
    labels[4:8, 10:30, 10:30] = 1
    structures = [Label(value=v, name=f"structure {v}") for v in range(1, 8)]
    one, all_of_them = (
        qc_picture(np.zeros(labels.shape), labels, grid(labels.shape), s) for s in (structures[:1], structures)
    )
    (height, width, _), (taller, same, _) = pixels(one).shape, pixels(all_of_them).shape
    assert width == same == 844
    assert taller == height + 2 * 20
    # a swatch in the heading and one in the legend, as tall as it is wide
    rows = np.flatnonzero(np.all(pixels(one)[:, 18] == ORANGE, axis=1))
    assert len(rows) == 22
    assert rows[11] > 0.8 * height


def test_a_light_picture_is_the_same_picture_within_its_limit():
    rng = np.random.default_rng(0)
    image, labels = (v.voxels[0] for v in phantom(PhantomSpec(seed=1, shape=(48, 64, 64))))
    png = qc_picture(image, labels, grid(labels.shape), LABELS)
    light = light_picture(png, 60_000)
    assert len(light) <= 60_000 < len(png)
    with Image.open(io.BytesIO(light)) as picture:
        assert picture.format == "WEBP"
        shown, whole = np.asarray(picture.convert("RGB")).astype(int), pixels(png)
    assert shown.shape == whole.shape
    assert np.abs(shown - whole).mean() < 6
    assert light_picture(png, 60_000) == light
    out = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (600, 900, 3), dtype=np.uint8)).save(out, "PNG")
    with Image.open(io.BytesIO(light_picture(out.getvalue(), 60_000))) as noise:
        assert 300 <= noise.width < 900


def test_each_plane_is_cut_where_the_label_is_largest():
    labels = np.zeros((40, 40, 40), np.uint8)
    labels[8:32, 19:21, 19:21] = 1
    labels[30, 10:30, 10:30] = 1
    image = np.zeros(labels.shape)
    image[30, 2:18, 2:18] = 100.0

    axial = panels(qc_picture(image, labels, grid(labels.shape), [ORGAN]))[0]

    assert axial.white == (pytest.approx(0.25, abs=0.03), pytest.approx(0.25, abs=0.03))


def test_proportions_are_those_in_millimetres():
    image = np.zeros((20, 60, 40))
    image[:, :, 20:] = 100.0
    axial, coronal, sagittal = panels(
        qc_picture(image, np.zeros(image.shape, np.uint8), grid(image.shape, (6.0, 1.0, 2.0)), [ORGAN])
    )
    # 120 mm from feet to head, 60 from front to back, 80 from right to left
    assert axial.height / axial.width == pytest.approx(60 / 80, rel=0.03)
    assert coronal.height / coronal.width == pytest.approx(120 / 80, rel=0.03)
    assert sagittal.height / sagittal.width == pytest.approx(120 / 60, rel=0.03)
    assert axial.width == pytest.approx(coronal.width, abs=1)


def test_tiny_scans_are_enlarged():
    image = np.zeros((35, 50, 35))
    image[:, :, 18:] = 100.0
    found = panels(qc_picture(image, np.zeros(image.shape, np.uint8), grid(image.shape), [ORGAN]))
    assert max(found[0].height, found[2].width) >= 220


def test_every_label_in_a_slice_is_outlined_in_its_colour():
    labels = np.zeros((20, 40, 40), np.uint8)
    labels[5:15, 5:35, 5:35] = 1
    labels[8:12, 15:25, 15:25] = 2
    image = np.zeros(labels.shape)
    both = qc_picture(image, labels, grid(labels.shape), LABELS)
    alone = qc_picture(image, np.minimum(labels, 1), grid(labels.shape), LABELS)
    swatches = 2 * 2 * 11 * 11
    assert count(both, ORANGE) > swatches + 1000
    assert count(both, SKY) > swatches + 200
    assert count(alone, SKY) == 0


@pytest.mark.parametrize("side", [512, 1500])
def test_a_single_voxel_of_a_large_slice_can_be_seen(side):
    labels = np.zeros((4, side, side), np.uint8)
    labels[2, 300, 100] = 1
    png = qc_picture(np.zeros(labels.shape), labels, grid(labels.shape), [ORGAN])
    axial = pixels(png)[50:290, 30:270].astype(int)
    y, x = np.nonzero(axial[..., 0] > axial[..., 2] + 50)
    assert len(y) >= 9
    assert np.ptp(y) <= 5 >= np.ptp(x)


EDGE_CASES = {
    "single voxel": ((1, 1, 1), 1),
    "single slice": ((1, 64, 48), 1),
    "single column": ((50, 1, 1), 1),
    "empty": ((10, 12, 14), 0),
    "full": ((10, 12, 14), 1),
}


@pytest.mark.parametrize(("shape", "value"), EDGE_CASES.values(), ids=EDGE_CASES)
@pytest.mark.parametrize("level", [0.0, np.nan, np.inf])
def test_degenerate_scans_have_a_picture(shape, value, level):
    png = qc_picture(np.full(shape, level), np.full(shape, value, np.uint8), grid(shape, (5.0, 1.0, 1.0)), LABELS)
    height, width, _ = pixels(png).shape
    assert height > 150
    assert width > 600
    assert (count(png, ORANGE) > 0) == (value == 1)


def test_nan_voxels_do_not_spoil_the_others():
    labels = np.zeros((30, 30, 30), np.uint8)
    image = np.zeros(labels.shape)
    image[:, :, 20:] = 100.0
    image[:, :3] = np.nan
    axial, coronal, sagittal = panels(qc_picture(image, labels, grid(labels.shape), [ORGAN]))
    assert axial.white == (pytest.approx(16.5 / 30, abs=0.03), pytest.approx(25 / 30, abs=0.03))
    assert coronal.white == (pytest.approx(0.5, abs=0.03), pytest.approx(25 / 30, abs=0.03))
    assert np.isnan(sagittal.white).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.float32])
def test_any_real_image_and_wide_labels(dtype):
    image, labels = (v.voxels[0] for v in phantom(PhantomSpec(seed=1, shape=(20, 24, 24), spacing_mm=(3.0, 2.5, 2.5))))
    far = Label(value=40000, name="far")
    wide = labels.astype(np.uint16) * 40000
    assert count(qc_picture((image / 20).astype(dtype), wide, grid(labels.shape), [far]), ORANGE) > 200


@pytest.mark.parametrize("name", ["a name that is much too long for its place " * 5, "two\nlines\tand a tab", "左 é ß"])
def test_any_name_fits(name):
    labels = np.ones((4, 4, 4), np.uint8)
    plain = qc_picture(labels, labels, grid(labels.shape), [Label(value=1, name="organ")])
    named = qc_picture(labels, labels, grid(labels.shape), [Label(value=1, name=name)])
    assert pixels(named).shape == pixels(plain).shape


def test_a_hundred_labels_fit():
    labels = (np.arange(40 * 40 * 40).reshape(40, 40, 40) // 640).astype(np.uint8)
    structures = [Label(value=v, name=f"structure {v}") for v in range(1, 101)]
    assert len(qc_picture(labels, labels, grid(labels.shape), structures)) <= MAX_BYTES


def test_the_worst_case_stays_below_the_limit():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (100, 512, 512), dtype=np.uint8)
    # four rows, one of them noise as well
    labels = (image < 10).astype(np.uint8)
    labels[20:30], labels[40:50], labels[60:70] = 2, 3, 4
    structures = [Label(value=v, name=f"structure {v}") for v in range(1, 5)]
    png = qc_picture(image, labels, grid(image.shape, (3.0, 0.7, 0.7)), structures)
    assert len(png) <= MAX_BYTES == 150_000
    assert pixels(png).shape[1] > 600


def test_the_same_input_gives_the_same_bytes():
    spec = PhantomSpec(seed=2, shape=(20, 24, 28), direction=oblique_direction((10.0, 20.0, 0.0)))
    image, label = phantom(spec)
    first, second = (qc_picture(image.voxels[0], label.labels, image.geometry, LABELS) for _ in range(2))
    assert first == second


def test_arrays_that_do_not_fit_the_grid_are_refused():
    with pytest.raises(ScanError):
        qc_picture(np.zeros((2, 3, 4)), np.zeros((2, 3, 5), np.uint8), grid((2, 3, 4)), [ORGAN])
    with pytest.raises(ScanError):
        qc_picture(np.zeros((2, 3, 5)), np.zeros((2, 3, 4), np.uint8), grid((2, 3, 4)), [ORGAN])


def test_real_scans(real_scans):
    pairs = [
        (real_scans / "hippocampus" / "images" / file.name, file)
        for file in sorted((real_scans / "hippocampus" / "labels").glob("*.nii.gz"))[:3]
    ]
    pairs += [(real_scans / "nrrd" / "images" / f.name, f) for f in (real_scans / "nrrd" / "labels").glob("*.nrrd")]
    for image_file, label_file in pairs:
        image, label = (sitk.ReadImage(str(f)) for f in (image_file, label_file))
        array = sitk.GetArrayFromImage(label).astype(np.uint8)
        direction = matrix_of(np.reshape(image.GetDirection(), (3, 3))[:, ::-1])
        geometry = Geometry(array.shape, image.GetSpacing()[::-1], image.GetOrigin(), direction)
        labels = [Label(value=int(v), name=f"structure {v}") for v in np.unique(array) if v]
        png = qc_picture(sitk.GetArrayFromImage(image), array, geometry, labels)
        assert len(png) <= MAX_BYTES
        assert count(png, ORANGE) > 200
