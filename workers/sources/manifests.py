"""Manifests: CSV or Parquet tables whose rows are cases.

Columns ``case``; ``image``, or several ``image_<channel>``; optionally ``label`` and ``patient``. Paths are relative to
the manifest. Messages quote no cell, because it may name a patient.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from vnet_core.errors import ConfigError, ScanError
from workers.sources.found import Discovery, Found, Rules, is_zarr
from workers.sources.scans import numbered_volume
from workers.sources.studies import study_of_folder

SUFFIXES = (".csv", ".parquet")


def read_manifest(path: Path, rules: Rules, result: Discovery) -> None:
    """Add the rows of a manifest. ConfigError ``manifest.unreadable`` or ``manifest.columns``.

    With rules of selection, a row whose one image is a folder of DICOM is a study, and they choose its channels.
    """
    columns, rows = _table(path)
    images = [c for c in columns if c == "image" or c.startswith("image_")]
    if "case" not in columns or not images:
        raise ConfigError(
            "manifest.columns",
            f"manifest {path.name} has the columns {columns}; it needs case and image (or image_<channel> for each)",
        )
    if images != ["image"]:
        result.channels = tuple(c.removeprefix("image_") for c in images)
    result.cases += [_case(row, number, images, path, rules, result) for number, row in enumerate(rows, 1)]


def _table(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    try:
        if path.suffix.lower() == ".parquet":
            table = pyarrow.parquet.read_table(path)
            return table.column_names, table.to_pylist()
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
            return list(reader.fieldnames or []), rows
    except (OSError, ValueError, csv.Error, pyarrow.ArrowException) as error:
        raise ConfigError("manifest.unreadable", f"manifest {path.name} cannot be read ({error})") from None


def _case(
    row: Mapping[str, Any], number: int, images: Sequence[str], path: Path, rules: Rules, result: Discovery
) -> Found:
    name = _text(row, "case")
    case_id = rules.case_id(name or f"row-{number}")
    patient = _text(row, "patient") or None
    if rules.ids:
        patient = rules.ids.named_patient(patient)
    sources = [(column, str(row[column])) for column in images if _text(row, column)]
    if _text(row, "label"):
        sources.append(("label", str(row["label"])))
    problem = None
    if not name:
        problem = ScanError("cohort.missing-id", f"row {number} of the manifest has no case; give it a name")
    elif not any(column in images for column, _ in sources):
        problem = ScanError("cohort.missing-image", f"row {number} of the manifest names no image")
    absent = [column for column, source in sources if not _exists(path, source)]
    if absent and not problem:
        problem = ScanError(
            "scan.missing", f"what row {number} of the manifest names as {' and '.join(absent)} does not exist"
        )
    if problem:
        return Found(case_id, (), patient=patient, problem=problem)
    places = {column: _beside(path, source) for column, source in sources}
    label = places.pop("label", None)
    if rules.select and len(places) == 1:
        (folder,) = (Path(place) for place in places.values())
        if folder.is_dir() and not is_zarr(folder):
            return study_of_folder(folder, Found(case_id, (), label, patient=patient), rules, result)
    return Found(case_id, tuple(places.values()), label, patient=patient)


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    return "" if value is None else str(value).strip()


def _exists(manifest: Path, source: str) -> bool:
    """Whether a file, the file of ``FILE[k]``, a folder, or the folder of ``FOLDER#SeriesUID`` is there."""
    try:
        beside = _beside(manifest, source)
        path, _ = numbered_volume(beside) or (Path(beside), 0)
        folder, mark, _ = str(path).rpartition("#")
        return path.exists() or (bool(mark) and Path(folder).is_dir())
    except (OSError, ValueError):  # a name that no file can have
        return False


def _beside(manifest: Path, source: str) -> str:
    return str((manifest.parent / source).resolve())
