"""Radiomics of published masks: shape, intensity and texture of every label, by the names that IBSI gives its features.

The features are computed by Z-Rad, which is the extra ``radiomics`` and imported when it is first needed. They follow
the reference manual of the Image Biomarker Standardisation Initiative (Zwanenburg et al., Radiology 2020, 295:328-338),
on the scan's own grid and intensities: nothing is resampled, resegmented or filtered.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
from scipy import ndimage

from vnet_core.errors import ConfigError, MemoryLimitError, ScanError, StorageError
from vnet_core.geometry import Geometry, same_grid
from vnet_core.plan import Label
from vnet_core.volume import Volume
from workers.cohort import load_entry, read_channels, source_digest
from workers.ledger import Outcome, State, settle
from workers.registry.models import Model, load_model
from workers.reports.report import read_rows, reported_night, to_csv, to_json
from workers.segmentation.masks import load_report, written
from workers.sources.scans import read_label
from workers.storage.store import Root

STAGE = "radiomics"
OUTPUTS = (".csv", ".parquet", ".json")
"""Suffixes of tables of features."""
FAMILIES = (
    "morphology",
    "intensity_statistics",
    "intensity_histogram",
    "glcm",
    "glrlm",
    "glszm",
    "gldzm",
    "ngtdm",
    "ngldm",
)
"""IBSI's feature families that are computed; those of textures in 3-D, averaged over directions where there are any."""
BYTES_PER_VOXEL = 320
"""Of a label's bounding box: most memory that its features take, measured at 280 to 300."""
FEWEST_VOXELS = 3
"""A label that spans fewer along an axis has no features."""
UNPUBLISHED = ("awaiting", "rejected")
"""Reviews of a mask with which it is not published."""


@dataclass(frozen=True, slots=True)
class GreyLevels:
    """How intensities become the grey levels of histograms and textures: one of the two is given."""

    bins: int | None = None
    """So many levels between the label's lowest and highest intensity (IBSI: fixed bin number)."""
    width: float | None = None
    """Levels of this width, in the scan's units, from the label's lowest intensity on (IBSI: fixed bin size)."""

    def __post_init__(self) -> None:
        if (self.bins is None) == (self.width is None):
            raise ConfigError("radiomics.levels", f"{self}: give the number of bins or the width of a bin, one of them")
        if (self.bins is not None and self.bins < 2) or (self.width is not None and not 0 < self.width < math.inf):
            raise ConfigError(
                "radiomics.levels",
                f"{self.bins or self.width:g} is too little: at least 2 bins, or a width above 0 in the scan's units",
            )


USUAL_LEVELS = GreyLevels(bins=32)


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which masks' features are computed, and how."""

    cohort: str
    night: str | None = None
    """Its id; None: the newest with a report."""
    label: str | None = None
    """Only this one; None: all that the masks hold."""
    channel: str | None = None
    """Whose intensities are taken; None: those of the first."""
    levels: GreyLevels = USUAL_LEVELS


@dataclass(frozen=True, slots=True)
class Computed:
    """Features of one case."""

    outcome: Outcome
    rows: tuple[dict[str, Any], ...]
    """One per label: night, cohort, case, patient, model, result, channel, grey_levels and those of
    :func:`radiomics`."""


def radiomics(
    image: Volume,
    values_ZYX: np.ndarray,
    geometry: Geometry,
    labels: Sequence[Label],
    levels: GreyLevels = USUAL_LEVELS,
) -> list[dict[str, Any]]:
    """One row per label, in their order: ``label``, ``name``, ``voxels``, ``undefined`` and the features.

    ``image``: (1, Z, Y, X); ``values_ZYX``: label values on ``geometry``, the grid of the image. Features have the
    names of IBSI's tables (``morph_volume``, ``cm_contrast_3D_avg``) and IBSI's units: mm, mm^2 and mm^3 for shapes. A
    feature that is not finite is None. ``undefined`` names the families that do not exist for a label, whose features
    its row lacks: all of them where it spans less than ``FEWEST_VOXELS`` voxels along an axis, some where a definition
    divides by zero, such as the texture of a label with one intensity.

    Raises ConfigError ``radiomics.missing`` without the extra, ScanError ``radiomics.grid`` where the grids differ,
    MemoryLimitError ``radiomics.memory`` where a label needs more than is free.
    """
    _engine()
    if not same_grid(image.geometry, geometry) or values_ZYX.shape != geometry.shape:
        raise ScanError(
            "radiomics.grid",
            f"the mask has {values_ZYX.shape} voxels on a grid of {geometry.shape}, the scan {image.geometry.shape} at"
            " its own place; features need one grid: segment the scan again",
        )
    boxes = ndimage.find_objects(values_ZYX, max_label=max((label.value for label in labels), default=1))
    rows = []
    for label in labels:
        box = boxes[label.value - 1]
        inside = values_ZYX[box] == label.value if box is not None else np.zeros((0, 0, 0), bool)
        row: dict[str, Any] = {"label": label.value, "name": label.name, "voxels": int(np.count_nonzero(inside))}
        features: dict[str, float | None] = {}
        undefined: tuple[str, ...] = FAMILIES
        if box is not None and min(inside.shape) >= FEWEST_VOXELS:
            _check_memory(label, inside.size)
            intensities = image.voxels[0][box].astype(np.float64)
            features, undefined = _features(intensities, inside, geometry.spacing_mm, levels)
        rows.append({**row, "undefined": " ".join(undefined), **features})
    return rows


def _features(
    intensities_ZYX: np.ndarray, inside_ZYX: np.ndarray, spacing_mm: Sequence[float], levels: GreyLevels
) -> tuple[dict[str, float | None], tuple[str, ...]]:
    """Features of one label in its box, and the families that it does not have."""
    from zrad.exceptions import DataStructureError
    from zrad.image import Image
    from zrad.preprocessing import IntensityMaskBuilder, RoiData, TextureDiscretizer
    from zrad.radiomics import Radiomics

    def image_of(array: np.ndarray) -> Any:
        # voxels as ours, (z, y, x); sizes and spacings in the order x, y, z
        return Image(array, (0.0, 0.0, 0.0), tuple(spacing_mm)[::-1], np.eye(3).ravel(), array.shape[::-1])

    region = RoiData(image=image_of(intensities_ZYX), morphological_mask=image_of(inside_ZYX.astype(np.int8)))
    region = IntensityMaskBuilder().apply(region)
    region.intensity_range = (float(intensities_ZYX[inside_ZYX].min()), math.inf)
    region = TextureDiscretizer(number_of_bins=levels.bins, bin_size=levels.width).apply(region)
    extractor = Radiomics(aggr_dim="3D", aggr_method="AVER")
    features: dict[str, float | None] = {}
    undefined = []
    for family in FAMILIES:
        try:
            found = extractor.extract_features(region, families=family)
        except DataStructureError:
            undefined.append(family)
        else:
            features |= {name: float(value) if np.isfinite(value) else None for name, value in found.items()}
    return features, tuple(undefined)


def _check_memory(label: Label, voxels: int) -> None:
    needed, free = voxels * BYTES_PER_VOXEL, psutil.virtual_memory().available
    if needed > free:
        raise MemoryLimitError(
            "radiomics.memory",
            f"the features of label {label.value} need {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free;"
            " name smaller labels with --label, or run the command where more is free",
        )


def _engine() -> None:
    """ConfigError ``radiomics.missing`` where the extra is not installed."""
    try:
        import zrad.radiomics  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "radiomics.missing",
            f"radiomics needs Z-Rad, which is not installed here ({error.name} is missing); run"
            " pip install 'vnet-cohort[radiomics]'",
        ) from None


# --- the published masks of a night


def radiomics_of_night(
    root: Root, wanted: Wanted, on_outcome: Callable[[Outcome], None] = lambda outcome: None
) -> Iterator[Computed]:
    """Features of every published mask of a night, case by case.

    A case whose scan cannot be read any more, or has changed since, is refused. A mask that is awaiting a decision or
    was rejected is left out.

    Raises ConfigError ``radiomics.missing``, ``report.cohort`` and ``report.night`` naming the nights there are,
    ``radiomics.label`` and ``radiomics.channel`` naming what the model has.
    """
    _engine()
    night = reported_night(root, wanted.cohort, wanted.night).id
    models: dict[str, Model] = {}
    for case, rows in _by_case(read_rows(root, wanted.cohort, night)).items():
        first = rows[0]
        reference = str(first["model"])
        if reference not in models:
            models[reference] = load_model(root, reference)
            _check_names(models[reference], wanted)
        common = {"night": night, "cohort": wanted.cohort, "case": case, "patient": first.get("patient")}
        computed = _of_case(root, wanted, models[reference], common, str(first["result"]))
        on_outcome(computed.outcome)
        yield computed


def _by_case(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Rows of published results by case."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["result"] and row.get("review") not in UNPUBLISHED:
            found.setdefault(row["case"], []).append(row)
    return found


def _check_names(model: Model, wanted: Wanted) -> None:
    names = [label.name for label in _labels(model)]
    if wanted.label is not None and wanted.label not in names:
        raise ConfigError(
            "radiomics.label", f"the masks of {model.reference} hold no label {wanted.label!r}, but {', '.join(names)}"
        )
    if wanted.channel is not None and wanted.channel not in model.plan.channels:
        known = ", ".join(model.plan.channels)
        raise ConfigError("radiomics.channel", f"{model.reference} has no channel {wanted.channel!r}; it has {known}")


def _labels(model: Model) -> tuple[Label, ...]:
    """What the mask files of a model hold, which may have other values than the plan."""
    return written(np.zeros((1, 1, 1), np.uint8), model.plan.labels, model.plan.output)[1]


def _of_case(root: Root, wanted: Wanted, model: Model, common: Mapping[str, Any], key: str) -> Computed:
    rows: list[dict[str, Any]] = []
    plan, levels = model.plan, wanted.levels

    def compute() -> tuple[State, str, tuple[str, ...]]:
        receipt = root.receipt(key)
        if receipt is None:
            raise StorageError("radiomics.no-mask", f"{key} is no finished result any more; run vnet nightly again")
        case = load_entry(root, wanted.cohort, str(common["case"])).case
        image = read_channels(case.channels, plan.reading)
        if source_digest(case.channels, plan.reading) != receipt["case_digest"]:
            raise ScanError("scan.changed", "the scan's bytes are not those that were segmented; run vnet ingest again")
        channel = wanted.channel or plan.channels[0]
        number = plan.channels.index(channel)
        labels = [label for label in _labels(model) if wanted.label in (None, label.name)]
        with root.at_hand(f"{key}/{load_report(root, key)['mask']}") as path:
            mask = read_label(path, image.geometry, _labels(model))
        chosen = Volume(image.voxels[number : number + 1], image.geometry)
        described = f"{levels.bins} bins" if levels.bins is not None else f"width {levels.width:g}"
        told = {"model": model.reference, "result": key, "channel": channel, "grey_levels": described}
        for row in radiomics(chosen, mask.labels, mask.geometry, labels, levels):
            rows.append({**common, **told, **row})
        return "computed", key, ()

    outcome = settle(STAGE, str(common["case"]), compute)
    return Computed(outcome, tuple(rows))


# --- tables

_TEXTS = ("night", "cohort", "case", "patient", "model", "result", "channel", "grey_levels", "name", "undefined")
_NUMBERS = ("label", "voxels")
COLUMNS = (*_TEXTS[:-2], "label", "name", "voxels", "undefined")
"""Columns before the features."""


def table(rows: Sequence[Mapping[str, Any]], suffix: str) -> bytes:
    """Rows as ``.csv``, ``.parquet`` or ``.json``; in CSV every text is one harmless line.

    Columns are :data:`COLUMNS` and every feature that a row has; where a row lacks one, its cell is empty.
    ConfigError ``radiomics.output`` for another suffix.
    """
    names = list(dict.fromkeys([*COLUMNS, *(name for row in rows for name in row)]))
    full = [{name: row.get(name) for name in names} for row in rows]
    if suffix == ".csv":
        return to_csv(full) if full else (",".join(names) + "\n").encode()
    if suffix == ".json":
        return to_json(full)
    if suffix == ".parquet":
        return _parquet(full, names)
    raise ConfigError("radiomics.output", f"{suffix or 'no suffix'} is none of {', '.join(OUTPUTS)}; rename the file")


def _parquet(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {**dict.fromkeys(_TEXTS, pa.string()), **dict.fromkeys(_NUMBERS, pa.int64())}
    schema = pa.schema([(name, types.get(name, pa.float64())) for name in names])
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows], schema), sink)
    return sink.getvalue()
