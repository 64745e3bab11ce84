"""The pictures of docs/preparation.md: every scheme of preparation and every augmentation of one phantom.

    python examples/preparation_sheets.py FOLDER

writes FOLDER/preparation.png and FOLDER/augmentation.png, from seeds alone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from vnet_core.augment import intensity_quantiles, random_intensities
from vnet_core.deformation import random_warp, warped
from vnet_core.geometry import Shape
from vnet_core.phantoms import PhantomSpec, phantom
from vnet_core.preprocess import Prepared, prepare
from vnet_core.sections import AugmentationPlan, PreprocessPlan
from vnet_core.training import Placement, cut

SHAPE: Shape = (48, 96, 96)
SPEC = PhantomSpec(seed=4, shape=(64, 128, 128), spacing_mm=(1.5, 1.0, 1.0), body_mm=44.0, bias=0.8)
NOTHING: dict[str, Any] = {"rotation_degrees": 0, "scaling": 0, "contrast": 0, "brightness": 0, "noise": 0}
CHANGES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("as it is", {}),
    ("rotation_degrees = 25", {"rotation_degrees": 25}),
    ("scaling = 0.3", {"scaling": 0.3}),
    ("bspline_voxels = 15", {"bspline_voxels": 15}),
    ("the same, bspline_axes = [1, 2]", {"bspline_voxels": 15, "bspline_axes": (1, 2)}),
    ("elastic_voxels = 3", {"elastic_voxels": 3}),
    ("histogram_matching = 1", {"histogram_matching": 1}),
    ("contrast = 0.5", {"contrast": 0.5}),
    ("brightness = 1", {"brightness": 1}),
    ("gamma = 0.8", {"gamma": 0.8}),
    ("noise = 0.5", {"noise": 0.5}),
    ("blur_voxels = 2", {"blur_voxels": 2}),
    ("low_resolution = 0.8", {"low_resolution": 0.8}),
    ("default", AugmentationPlan().model_dump()),
    ("all at once", {"rotation_degrees": 15, "bspline_voxels": 10, "gamma": 0.4, "noise": 0.2, "blur_voxels": 1}),
)
"""Each with a seed of its own; flips and shifts are left out, they need no picture."""

Panel = tuple[str, np.ndarray, np.ndarray]
"""Title, image and classes, both (Y, X)."""


def preparation_panels() -> list[Panel]:
    """The scan, the scan without its bias field, and thick slices brought to 1 mm in both ways, seen from the side."""
    image, label = phantom(SPEC)
    even = {"intensity": "range", "crop_foreground": False, "spacing_mm": SPEC.spacing_mm}
    found = [
        ("as scanned", prepare(image, label, PreprocessPlan(**even))),
        ('bias_field = "n4"', prepare(image, label, PreprocessPlan(**even, bias_field="n4"))),
    ]
    panels = [(title, *axial(prepared.image[0], labels_of(prepared))) for title, prepared in found]
    thick, thick_label = phantom(PhantomSpec(seed=4, shape=(18, 112, 112), spacing_mm=(6.0, 1.0, 1.0), body_mm=44.0))
    for way in ("linear", "anisotropic"):
        plan = PreprocessPlan(spacing_mm=(1.0, 1.0, 1.0), intensity="range", interpolation=way)
        panels.append((f'6 mm slices, interpolation = "{way}"', *coronal(prepare(thick, thick_label, plan))))
    for way in ("linear", "nearest"):
        plan = PreprocessPlan(spacing_mm=(1.0, 1.0, 1.0), intensity="range", label_interpolation=way)
        panels.append((f'label_interpolation = "{way}"', *coronal(prepare(thick, thick_label, plan))))
    return panels


def augmentation_panels() -> list[Panel]:
    """The middle slice of one patch under each change."""
    prepared, other = (
        prepared_phantom(SPEC),
        prepared_phantom(PhantomSpec(seed=9, shape=SPEC.shape, noise=0.2, body_mm=44.0)),
    )
    quantiles = intensity_quantiles(prepared.image), intensity_quantiles(other.image)
    z, y, x = ((n - size) // 2 for n, size in zip(prepared.geometry.shape, SHAPE, strict=True))
    panels = []
    for seed, (title, change) in enumerate(CHANGES):
        plan = AugmentationPlan(**{**NOTHING, **change})
        generator = np.random.default_rng([3, seed])
        warp = random_warp(generator, SHAPE, prepared.geometry.spacing_mm, plan)
        margin = warp.margin_voxels(SHAPE) if warp else (0, 0, 0)
        wide = (SHAPE[0] + 2 * margin[0], SHAPE[1] + 2 * margin[1], SHAPE[2] + 2 * margin[2])
        placement = Placement((z, y, x), (False, False, False)).widened(margin)
        whole, classes = (cut(array, placement, wide) for array in (prepared.image, labels_of(prepared)))
        moved, named = warped(torch.from_numpy(whole), torch.from_numpy(classes), warp, SHAPE)
        changed = random_intensities(generator, moved, plan, quantiles)
        panels.append((title, *axial(changed[0].numpy(), named.numpy())))
    return panels


def prepared_phantom(spec: PhantomSpec) -> Prepared:
    """With z-scores on its own grid."""
    image, label = phantom(spec)
    return prepare(image, label, PreprocessPlan(spacing_mm=spec.spacing_mm))


def labels_of(prepared: Prepared) -> np.ndarray:
    """Its label map (Z, Y, X)."""
    assert prepared.label is not None
    return prepared.label


def axial(image: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The middle slices (Y, X) of arrays (Z, Y, X)."""
    return image[len(image) // 2], label[len(label) // 2]


def coronal(prepared: Prepared) -> tuple[np.ndarray, np.ndarray]:
    """The middle sections (Z, X), head up."""
    middle = prepared.geometry.shape[1] // 2
    return prepared.image[0][::-1, middle], labels_of(prepared)[::-1, middle]


def sheet(panels: Sequence[Panel], columns: int, limits: tuple[float, float]) -> Figure:
    """All panels on one grey scale, with the outlines of their labels."""
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(2.1 * columns, 2.25 * rows), dpi=100, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (title, image, label) in zip(axes.flat, panels, strict=False):
        axis.imshow(image, cmap="gray", vmin=limits[0], vmax=limits[1], interpolation="nearest")
        for value, colour in ((1, "tab:orange"), (2, "tab:cyan")):
            if (label == value).any():
                axis.contour(label == value, [0.5], colors=[colour], linewidths=0.8)
        axis.set_title(title, fontsize=7)
    return figure


def main() -> None:
    """Write both pictures."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, panels, columns, limits in (
        ("preparation", preparation_panels(), 3, (0.0, 0.8)),
        ("augmentation", augmentation_panels(), 5, (-1.5, 4.0)),
    ):
        sheet(panels, columns, limits).savefig(folder / f"{name}.png")


if __name__ == "__main__":
    main()
