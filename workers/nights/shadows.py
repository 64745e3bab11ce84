"""A challenger beside the champion: which cases both segment, how far their masks agree, and what all nights say.

shadows/<cohort>/<night>.parquet    one row per case and structure that was compared in this night
shadows/<cohort>/<night>.json       the models, the sample, what failed; written last

A pair of masks is compared once, in the first night that has both. So a night with nothing new adds no row, and all
nights of a pair of models together are its comparison. The challenger's masks are results of their own, under keys that
its digest decides; the night's rows never name them.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vnet_core.challenge import Agreement, bland_altman, overlaps
from vnet_core.errors import ConfigError, StorageError
from vnet_core.geometry import same_grid
from vnet_core.plan import Plan, digest_of
from vnet_core.volume import Volume
from workers.cohort import Case
from workers.registry.models import Model
from workers.segmentation.masks import written
from workers.sources.scans import read_label
from workers.storage.store import Root

MASK = "mask.ome.zarr"
"""The mask that every result has, whatever its format."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One structure of one case, by both models."""

    case: str
    label: str
    """Its name; the names of labels that are written as one are joined by '+'."""
    champion_ml: float
    challenger_ml: float
    dice: float | None
    """Between the two masks; None where both are empty."""
    champion_key: str
    """Of the result."""
    challenger_key: str


SCHEMA = pa.schema(
    [
        ("night", pa.string()),
        ("cohort", pa.string()),
        ("case", pa.string()),
        ("label", pa.string()),
        ("champion_ml", pa.float64()),
        ("challenger_ml", pa.float64()),
        ("dice", pa.float64()),
        ("champion", pa.string()),
        ("challenger", pa.string()),
        ("champion_key", pa.string()),
        ("challenger_key", pa.string()),
    ]
)
"""Columns of a night's comparison, in order."""


@dataclass(frozen=True, slots=True)
class Shadow:
    """One night of a challenger."""

    night: str
    cohort: str
    champion: str
    """``name@version`` of the model that the night ran."""
    challenger: str
    champion_digest: str
    challenger_digest: str
    share: float
    """Of the cases that is drawn."""
    sampled: int
    """Cases of the night in the sample with a mask of the champion."""
    compared: int = 0
    """Of these, those that were compared in this night."""
    failed: list[dict[str, Any]] = field(default_factory=list)
    """Those that have no comparison: case, codes and message."""
    problem: str = ""
    """Why the challenger could not be used at all."""


def in_sample(case: Case, challenger_digest: str, share: float) -> bool:
    """Whether a case is drawn: decided by its bytes and the challenger's digest, so the same every night.

    A larger share keeps the cases of a smaller one.
    """
    return int(digest_of([case.digest, challenger_digest])[:8], 16) < share * 2**32


def check_comparable(champion: Plan, challenger: Plan) -> None:
    """ConfigError ``challenger.other`` when two models cannot be compared on one cohort."""
    if len(champion.channels) != len(challenger.channels):
        raise ConfigError(
            "challenger.other",
            f"the challenger takes {len(challenger.channels)} channels, the champion {len(champion.channels)}; withdraw"
            " it, it is another model",
        )
    if not _common(champion, challenger):
        raise ConfigError(
            "challenger.other",
            f"none of the challenger's {len(challenger.labels)} labels has the name of one of the champion's"
            f" {len(champion.labels)}; withdraw it, it is another model",
        )


def _common(champion: Plan, challenger: Plan) -> dict[str, tuple[int, int]]:
    """Values in the written masks of the structures that both models write under one name."""
    ours, theirs = _values(champion), _values(challenger)
    return {name: (value, theirs[name]) for name, value in ours.items() if name in theirs}


def _values(plan: Plan) -> dict[str, int]:
    """Value of each structure in the masks that are written by the plan."""
    _, labels = written(np.zeros(0, np.uint8), plan.labels, plan.output)
    return {label.name: label.value for label in labels}


def compare(root: Root, case: str, champion: tuple[Model, str], challenger: tuple[Model, str]) -> list[Pair]:
    """One pair per structure of two finished results, given as model and key.

    StorageError ``challenger.grid`` when the masks lie on different grids.
    """
    (first, first_key), (second, second_key) = champion, challenger
    ours, theirs = read_mask(root, first_key), read_mask(root, second_key)
    if not same_grid(ours.geometry, theirs.geometry):
        raise StorageError(
            "challenger.grid",
            f"the masks of {first.reference} and {second.reference} lie on grids of {ours.geometry.shape} and"
            f" {theirs.geometry.shape} voxels, which are not at one place; train the challenger with the same reading",
        )
    common = _common(first.plan, second.plan)
    voxel_ml = ours.geometry.voxel_ml
    return [
        Pair(
            case,
            name,
            found.champion * voxel_ml,
            found.challenger * voxel_ml,
            found.dice if found.champion + found.challenger else None,
            first_key,
            second_key,
        )
        for name, found in zip(common, overlaps(ours.labels, theirs.labels, list(common.values())), strict=True)
    ]


def read_mask(root: Root, key: str) -> Volume:
    """The written mask of a finished result, one channel, on the scan's own grid."""
    with root.at_hand(f"{key}/{MASK}") as path:
        return read_label(path)


def structure_mask(root: Root, key: str, plan: Plan, label: str) -> np.ndarray:
    """Where a result has a structure: bool (Z, Y, X)."""
    found: np.ndarray = read_mask(root, key).labels == _values(plan)[label]
    return found


# --- records


def write_shadow(root: Root, shadow: Shadow, pairs: Sequence[Pair]) -> None:
    """Write a night's comparison."""
    common = {name: getattr(shadow, name) for name in ("night", "cohort", "champion", "challenger")}
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([common | asdict(pair) for pair in pairs], schema=SCHEMA), sink)
    prefix = f"shadows/{shadow.cohort}/{shadow.night}"
    root.put(f"{prefix}.parquet", sink.getvalue())
    root.put_json(f"{prefix}.json", asdict(shadow))


def shadows(root: Root, cohort: str) -> list[Shadow]:
    """All nights of a cohort that had a challenger, oldest first."""
    names = [name for name in root.names(f"shadows/{cohort}") if name.endswith(".json")]
    return [Shadow(**root.get_json(f"shadows/{cohort}/{name}")) for name in names]


def pairs_of(root: Root, nights: Iterable[Shadow]) -> list[Pair]:
    """What was compared in some nights, each pair of masks once, by case."""
    found: dict[tuple[str, str, str], Pair] = {}
    for night in nights:
        if not night.compared:
            continue
        with root.open(f"shadows/{night.cohort}/{night.night}.parquet") as file:
            table = pq.read_table(file)
        for row in table.to_pylist():
            pair = Pair(**{name: row[name] for name in Pair.__dataclass_fields__})
            found[pair.champion_key, pair.challenger_key, pair.label] = pair
    return sorted(found.values(), key=lambda pair: (pair.case, pair.champion_key))


@dataclass(frozen=True, slots=True)
class Standing:
    """One structure over all compared cases."""

    label: str
    mean_dice: float | None
    """Over the cases in which one of the models finds it; None without one."""
    lowest_dice: float | None
    volumes: Agreement


def standings(pairs: Sequence[Pair]) -> list[Standing]:
    """Figures of every structure, in the order in which they first occur."""
    labels: dict[str, list[Pair]] = {}
    for pair in pairs:
        labels.setdefault(pair.label, []).append(pair)
    found = []
    for label, held in labels.items():
        dice = [pair.dice for pair in held if pair.dice is not None]
        volumes = bland_altman([pair.champion_ml for pair in held], [pair.challenger_ml for pair in held])
        mean = sum(dice) / len(dice) if dice else None
        found.append(Standing(label, mean, min(dice, default=None), volumes))
    return found


def most_different(pairs: Sequence[Pair], number: int) -> list[Pair]:
    """Of each case its structure with the lowest Dice, then the cases with the lowest, below 1; ties by case."""
    lowest: dict[str, Pair] = {}
    for pair in pairs:
        if pair.dice is not None and pair.dice < 1 and pair.dice < _dice(lowest.get(pair.case)):
            lowest[pair.case] = pair
    return sorted(lowest.values(), key=lambda pair: (_dice(pair), pair.case))[:number]


def _dice(pair: Pair | None) -> float:
    return 1.0 if pair is None or pair.dice is None else pair.dice
