"""A sheet for judging a mask by eye, as PNG bytes: what it shows and how it is laid out."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage

from vnet_core.colours import COLOURS
from vnet_core.geometry import Geometry, Reorientation
from vnet_core.pictures.canvas import FAINT, TEXT, Canvas, outline
from vnet_core.plan import Label
from vnet_core.volume import Volume, canonical

ROWS = 4
"""Largest number of labels that get a row of their own, by volume."""

MAX_BYTES = 150_000
"""Largest picture; grey levels and then size are given up to stay below it."""


@dataclass(frozen=True, slots=True)
class _Plane:
    """How one plane of a canonical volume is shown: rows downwards, columns to the right."""

    name: str
    axis: int
    """Canonical array axis that the plane is cut across."""
    rows: int
    columns: int
    flip_rows: bool
    letters: str
    """Sides of the patient at the left, right, top and bottom of the picture."""


# canonical axes run to head, back and left; the patient's right is shown on the left, head or front on top
_PLANES = (
    _Plane("axial", 0, 1, 2, False, "RLAP"),
    _Plane("coronal", 1, 0, 2, True, "RLSI"),
    _Plane("sagittal", 2, 0, 1, True, "APSI"),
)


_STYLES = ((236, (64, 40, 26)), (200, (24, 16)), (150, (16,)), (110, (12,)))
"""Pixels along a panel's longer side and numbers of greys to try, from the best picture to the smallest."""

_GUTTER_PX, _CAPTION_PX, _HEADER_PX, _LINE_PX, _MARGIN_PX = 18, 28, 28, 20, 14
_CELL_PX = 228
"""Least width of a panel with its gutters, so that the caption fits below."""
_LEGEND_LINES = 12
"""Most lines of the legend, which is below the rows: beside them it would make the sheet wider, and everything on it
smaller where it is shown narrow, as on a phone."""
_LEGEND_COLUMN_PX = 255
"""Least width of a column of the legend."""


@dataclass(frozen=True, slots=True, eq=False)
class _Structure:
    """A label that the volume holds."""

    label: Label
    colour: int
    """Index into COLOURS."""
    voxels: int
    cut: bool
    """Whether it reaches a face of the grid."""
    largest: tuple[int, int, int]
    """Per canonical axis, the slice in which most of its voxels lie."""


def qc_picture(image_ZYX: np.ndarray, labels_ZYX: np.ndarray, geometry: Geometry, labels: Sequence[Label]) -> bytes:
    """A sheet for judging a mask by eye: PNG, at most MAX_BYTES.

    ``image_ZYX``: any real dtype (Z, Y, X); ``labels_ZYX``: integers (Z, Y, X), both on ``geometry``. One row per label
    with voxels, the ROWS largest by volume in descending order, or one row through the middle when there is none. A row
    shows axial, coronal and sagittal slices (of the grid turned to the body's axes without interpolation) in which the
    label has most voxels: the patient's right on the left, head or front on top. All labels are outlined, the
    row's own with a thicker line. The captions give the index along the source's array axis, as reports do.
    Intensities between the 1st and 99th percentile are shown as grey; proportions are those in millimetres.
    Raises ScanError ``scan.shape`` when an array does not fit the grid.
    """
    image, turn = canonical(Volume(image_ZYX[None], geometry))
    mask, _ = canonical(Volume(labels_ZYX[None], geometry))
    sheet = _Sheet(
        image_ZYX=image.voxels[0],
        labels_ZYX=mask.labels,
        geometry=image.geometry,
        source=geometry,
        turn=turn,
        window=grey_window(image.voxels[0]),
        labels=labels,
        structures=_structures(mask.labels, labels),
    )
    png = b""
    for panel_px, numbers_of_greys in _STYLES:
        canvas = _render(sheet, panel_px)
        for greys in numbers_of_greys:
            png = canvas.png(greys)
            if len(png) <= MAX_BYTES:
                return png
    return png


def light_picture(png: bytes, limit_bytes: int) -> bytes:
    """A picture as WebP, in full size where that stays within ``limit_bytes``, else smaller, at least a third as wide.

    For pages that are kept for years: noise, which no eye misses, is most of what a PNG of a scan holds.
    """
    with Image.open(io.BytesIO(png)) as opened:
        whole = opened.convert("RGB")
    out = io.BytesIO()
    for share in (1.0, 0.85, 0.7, 0.55, 0.45, 1 / 3):
        size = (max(1, round(whole.width * share)), max(1, round(whole.height * share)))
        out = io.BytesIO()
        whole.resize(size, Image.Resampling.LANCZOS).save(out, "WEBP", quality=68, method=4)
        if len(out.getvalue()) <= limit_bytes:
            break
    return out.getvalue()


@dataclass(frozen=True, slots=True, eq=False)
class _Sheet:
    """Everything that a quality-control picture shows, before its size is decided."""

    image_ZYX: np.ndarray
    """Canonical, as are ``labels_ZYX`` and ``geometry``."""
    labels_ZYX: np.ndarray
    geometry: Geometry
    source: Geometry
    turn: Reorientation
    """From the source's axes to the canonical ones."""
    window: tuple[float, float]
    labels: Sequence[Label]
    structures: Sequence[_Structure]
    """By descending volume."""

    def rows(self) -> list[tuple[_Structure | None, tuple[int, int, int]]]:
        """The structure of each row and the canonical slices that show it."""
        if not self.structures:
            z, y, x = (n // 2 for n in self.geometry.shape)
            return [(None, (z, y, x))]
        return [(s, s.largest) for s in self.structures[:ROWS]]

    def extent_mm(self, plane: _Plane) -> tuple[float, float]:
        """Height and width of a plane."""
        shape, spacing = self.geometry.shape, self.geometry.spacing_mm
        return shape[plane.rows] * spacing[plane.rows], shape[plane.columns] * spacing[plane.columns]

    def panel_px(self, plane: _Plane, limit_px: int) -> tuple[int, int]:
        """Height and width of a plane's panel.

        The planes share one scale, except that a panel is never smaller than half of the limit.
        """
        largest_mm = max(n * s for n, s in zip(self.geometry.shape, self.geometry.spacing_mm, strict=True))
        height_mm, width_mm = self.extent_mm(plane)
        px_per_mm = max(limit_px / largest_mm, limit_px / 2 / max(height_mm, width_mm))
        return max(1, round(height_mm * px_per_mm)), max(1, round(width_mm * px_per_mm))


def grey_window(image_ZYX: np.ndarray) -> tuple[float, float]:
    """1st and 99th percentile, from at most a few million voxels on a regular lattice."""
    step = max(1, round((image_ZYX.size / 2e6) ** (1 / 3)))
    sample = image_ZYX[::step, ::step, ::step].astype(np.float64)
    finite = sample[np.isfinite(sample)]
    if not finite.size:
        return 0.0, 1.0
    low, high = (float(v) for v in np.percentile(finite, (1, 99)))
    if high > low:
        return low, high
    low, high = float(finite.min()), float(finite.max())
    return (low, high) if high > low else (low - 1.0, low + 1.0)


def _structures(labels_ZYX: np.ndarray, labels: Sequence[Label]) -> list[_Structure]:
    boxes = ndimage.find_objects(labels_ZYX, max_label=max((label.value for label in labels), default=1))
    found = []
    for i, label in enumerate(labels):
        box = boxes[label.value - 1]
        if box is None:
            continue
        inside = labels_ZYX[box] == label.value
        z, y, x = (box[a].start + int(np.count_nonzero(inside, axis=tuple({0, 1, 2} - {a})).argmax()) for a in range(3))
        cut = any(s.start == 0 or s.stop == n for s, n in zip(box, labels_ZYX.shape, strict=True))
        found.append(_Structure(label, i % len(COLOURS), int(np.count_nonzero(inside)), cut, (z, y, x)))
    return sorted(found, key=lambda s: -s.voxels)


def _render(sheet: _Sheet, limit_px: int) -> Canvas:
    rows = sheet.rows()
    panels = [sheet.panel_px(plane, limit_px) for plane in _PLANES]
    cells = [max(width + 2 * _GUTTER_PX, _CELL_PX) for _, width in panels]
    body = max(height for height, _ in panels) + 2 * _GUTTER_PX
    row_px = _HEADER_PX + body + _CAPTION_PX
    width = sum(cells) + 2 * _MARGIN_PX
    legend = _legend(sheet, max(1, width // _LEGEND_COLUMN_PX))
    below = _MARGIN_PX + len(rows) * row_px
    canvas = Canvas(below + _LINE_PX * len(legend) + 2 * _MARGIN_PX, width)
    for r, (structure, indices) in enumerate(rows):
        top = _MARGIN_PX + r * row_px
        _draw_heading(canvas, _MARGIN_PX, top + _HEADER_PX // 2, sheet, structure)
        left = _MARGIN_PX
        for plane, (height_px, width_px), cell in zip(_PLANES, panels, cells, strict=True):
            x = left + (cell - width_px) // 2
            y = top + _HEADER_PX + (body - height_px) // 2
            _draw_panel(canvas, (x, y, width_px, height_px), sheet, plane, indices, structure)
            _draw_caption(canvas, (left, top + _HEADER_PX + body, cell), sheet, plane, indices, width_px)
            left += cell
    for line, entries in enumerate(legend):
        y = below + _MARGIN_PX + _LINE_PX * line + _LINE_PX // 2
        column_px = (width - 2 * _MARGIN_PX) // len(entries)
        for column, entry in enumerate(entries):
            _draw_entry(canvas, _MARGIN_PX + column * column_px, y, column_px - _MARGIN_PX, entry)
    return canvas


def _draw_heading(canvas: Canvas, x: int, y: int, sheet: _Sheet, structure: _Structure | None) -> None:
    if structure is None:
        canvas.text(x, y, "no label has a voxel; slices through the middle", size=15)
        return
    canvas.swatch(x, y, structure.colour)
    name = canvas.shortened(structure.label.name, 320, size=15)
    canvas.text(x + 18, y, name, size=15)
    note = _volume(structure, sheet.geometry) + (", cut by the edge of the image" if structure.cut else "")
    canvas.text(x + 18 + canvas.text_px(name, 15) + 14, y, note, level=FAINT)


def _draw_panel(
    canvas: Canvas,
    place: tuple[int, int, int, int],
    sheet: _Sheet,
    plane: _Plane,
    indices: tuple[int, int, int],
    own: _Structure | None,
) -> None:
    """One slice with its outlines and letters; ``place`` is (x, y, width, height) in the picture."""
    x, y, width, height = place
    index = indices[plane.axis]
    low, high = sheet.window
    section = _section(sheet.image_ZYX, plane, index).astype(np.float32)
    section = np.nan_to_num(np.clip((section - low) / (high - low), 0, 1) * 255, nan=0.0)
    shown = Image.fromarray(section).resize((width, height), Image.Resampling.BICUBIC)
    grey = np.clip(np.asarray(shown), 0, 255)

    section_labels = _section(sheet.labels_ZYX, plane, index)
    present = set(np.unique(section_labels).tolist())
    in_section = [s for s in sheet.structures if s.label.value in present]
    # the row's own label last, so that it lies on top
    for structure in sorted(in_section, key=lambda s: s is own):
        y0, x0, line, halo = outline(section_labels == structure.label.value, (height, width), structure is own)
        grey[y0 : y0 + halo.shape[0], x0 : x0 + halo.shape[1]] *= 1 - 0.5 * halo
        canvas.outline(x + x0, y + y0, np.rint(line * 255).astype(np.uint8), structure.colour)
    canvas.grey.paste(Image.fromarray(np.rint(grey).astype(np.uint8)), (x, y))

    middle_x, middle_y, away = x + width / 2, y + height / 2, _GUTTER_PX / 2
    at = ((x - away, middle_y), (x + width + away, middle_y), (middle_x, y - away), (middle_x, y + height + away))
    for letter, (letter_x, letter_y) in zip(plane.letters, at, strict=True):
        canvas.text(letter_x, letter_y, letter, "mm")


def _draw_caption(
    canvas: Canvas,
    place: tuple[int, int, int],
    sheet: _Sheet,
    plane: _Plane,
    indices: tuple[int, int, int],
    panel_px: int,
) -> None:
    """Name and index of a slice, and its scale bar; ``place`` is (x, y, width) in the picture."""
    left, top, width = place
    y = top + _CAPTION_PX // 2 - 4
    axis = sheet.turn.source_axis[plane.axis]
    index = indices[plane.axis]
    source_index = sheet.source.shape[axis] - 1 - index if sheet.turn.flip[plane.axis] else index
    caption = f"{plane.name}  {'zyx'[axis]} = {source_index}"
    canvas.text(left + _GUTTER_PX, y, caption, level=FAINT)
    right = left + width - _GUTTER_PX
    px_per_mm = panel_px / sheet.extent_mm(plane)[1]
    room_px = width - 2 * _GUTTER_PX - canvas.text_px(caption) - canvas.text_px("0000 mm") - 16
    bar_mm = _round_length(max(12.0, min(width / 4, room_px)) / px_per_mm)
    text = f"{bar_mm:g} mm"
    canvas.text(right, y, text, "rm", level=FAINT)
    end = round(right - canvas.text_px(text) - 8)
    canvas.rule(end - round(bar_mm * px_per_mm), end, y, ticks_px=3)


@dataclass(frozen=True, slots=True)
class _Entry:
    """What stands in one place of the legend."""

    name: str
    value: str = ""
    colour: int = -1
    """Index into COLOURS; -1 without one, in a fainter grey."""


def _legend(sheet: _Sheet, columns: int) -> list[list[_Entry]]:
    """Lines of the legend: the labels, largest first, then those without a voxel, then facts about the scan."""
    present = {s.label.value for s in sheet.structures}
    entries = [_Entry(s.label.name, _volume(s, sheet.geometry), s.colour) for s in sheet.structures]
    entries += [_Entry(label.name, "empty") for label in sheet.labels if label.value not in present]
    room = columns * _LEGEND_LINES
    if len(entries) > room:
        entries = [*entries[: room - 1], _Entry(f"and {len(entries) - room + 1} more")]
    shape, spacing = sheet.source.shape, sheet.source.spacing_mm
    facts = [
        f"{' x '.join(str(n) for n in shape)} voxels of {' x '.join(f'{s:.3g}' for s in spacing)} mm (z, y, x)",
        f"grey {sheet.window[0]:.4g} to {sheet.window[1]:.4g}",
    ]
    turned = _turned_degrees(sheet.geometry)
    if turned >= 1:
        facts[1] += f", grid turned by {turned:.0f}° to the body"
    lines = [entries[i : i + columns] for i in range(0, len(entries), columns)]
    # so that the columns stand below one another
    padded = [[*line, *[_Entry("")] * (columns - len(line))] for line in lines]
    return [*padded, [_Entry(", ".join(facts))]]


def _draw_entry(canvas: Canvas, x: int, y: int, width: int, entry: _Entry) -> None:
    level = FAINT if entry.colour < 0 else TEXT
    text_x = x
    if entry.colour >= 0 or entry.value:
        text_x += 18
    if entry.colour >= 0:
        canvas.swatch(x, y, entry.colour)
    canvas.text(x + width, y, entry.value, "rm", level=level)
    canvas.text(
        text_x, y, canvas.shortened(entry.name, x + width - text_x - 8 - canvas.text_px(entry.value)), level=level
    )


def _section(array_ZYX: np.ndarray, plane: _Plane, index: int) -> np.ndarray:
    """One slice of a canonical array, as it is shown."""
    section = array_ZYX.take(index, axis=plane.axis)
    return section[::-1] if plane.flip_rows else section


def _volume(structure: _Structure, geometry: Geometry) -> str:
    """The volume; of a structure cut by the edge of the image a lower bound."""
    ml = structure.voxels * geometry.voxel_ml
    digits = 1 if ml >= 100 else 2 if ml >= 1 else 3 if ml >= 0.1 else 4
    return f"{'> ' if structure.cut else ''}{ml:.{digits}f} mL"


def _round_length(limit_mm: float) -> float:
    """The largest of 1, 2, 5, 10, 20 ... (and 0.5, 0.2 ...) that is at most ``limit_mm``."""
    power = 10.0 ** math.floor(math.log10(limit_mm))
    return max(step * power for step in (1, 2, 5) if step * power <= limit_mm * (1 + 1e-9))


def _turned_degrees(canonical_geometry: Geometry) -> float:
    """Largest angle between an axis of a canonical grid and the body's."""
    cosines = np.abs(np.asarray(canonical_geometry.direction)[[2, 1, 0], [0, 1, 2]])
    return float(np.degrees(np.arccos(min(1.0, cosines.min()))))
