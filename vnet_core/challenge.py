"""Two models on the same scans, champion and challenger: how far masks and volumes agree, in figures.

Volumes are compared as Bland and Altman do (Lancet 1986;327:307): the mean of the differences, and the limits between
which 95 % of them are expected, mean -+ 1.96 standard deviations. That neither is the truth does not matter to them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from vnet_core.statistics import CONFIDENCE
from vnet_core.volume import check_shapes

LIMIT_DEVIATIONS = 1.96
"""Standard deviations from the mean to a limit of agreement."""


@dataclass(frozen=True, slots=True)
class Overlap:
    """Voxels of one structure in the two masks of a scan."""

    champion: int
    challenger: int
    common: int

    @property
    def dice(self) -> float:
        """2 common / (champion + challenger); NaN where both are empty and there is nothing to agree on."""
        total = self.champion + self.challenger
        return 2 * self.common / total if total else math.nan


def overlaps(champion_ZYX: np.ndarray, challenger_ZYX: np.ndarray, values: Sequence[tuple[int, int]]) -> list[Overlap]:
    """One overlap per structure of two label maps (Z, Y, X) of unsigned integers on one grid.

    ``values``: what the structure has in the champion's map and in the challenger's. One pass over the maps, slice by
    slice. Raises ScanError ``metrics.shape`` when the maps differ in shape.
    """
    check_shapes(champion_ZYX, challenger_ZYX)
    firsts, seconds = (sorted({pair[i] for pair in values}) for i in range(2))
    columns = len(seconds) + 1
    joint = np.zeros((len(firsts) + 1) * columns, np.int64)
    for first_YX, second_YX in zip(champion_ZYX, challenger_ZYX, strict=True):
        place = _places(first_YX, firsts) * columns + _places(second_YX, seconds)
        joint += np.bincount(place.ravel(), minlength=len(joint))
    table = joint.reshape(-1, columns)
    found = []
    for first, second in values:
        row, column = firsts.index(first) + 1, seconds.index(second) + 1
        found.append(Overlap(int(table[row].sum()), int(table[:, column].sum()), int(table[row, column])))
    return found


def _places(section_YX: np.ndarray, values: Sequence[int]) -> np.ndarray:
    """1 + the place of each voxel's value among ``values``, 0 for others; int64."""
    table = np.zeros(int(max([*values, section_YX.max(initial=0)])) + 1, np.int64)
    table[list(values)] = np.arange(1, len(values) + 1)
    return table[section_YX]


@dataclass(frozen=True, slots=True)
class Agreement:
    """Differences of volumes over cases, challenger minus champion, in mL."""

    cases: int
    bias_ml: float | None
    """Their mean; None without a case."""
    bias_low_ml: float | None
    """Lower end of the mean's 95 % interval (Student's t); None below two cases, as is all that follows."""
    bias_high_ml: float | None
    low_ml: float | None
    """Lower limit of agreement."""
    high_ml: float | None


def bland_altman(champion_ml: Sequence[float] | np.ndarray, challenger_ml: Sequence[float] | np.ndarray) -> Agreement:
    """Agreement of two series of volumes in mL, one pair per case."""
    differences = np.asarray(challenger_ml, float) - np.asarray(champion_ml, float)
    cases = len(differences)
    bias = float(differences.mean()) if cases else None
    if bias is None or cases < 2:
        return Agreement(cases, bias, None, None, None, None)
    deviation = float(differences.std(ddof=1))
    half = float(stdtrit(cases - 1, (1 + CONFIDENCE) / 2)) * deviation / math.sqrt(cases)
    reach = LIMIT_DEVIATIONS * deviation
    return Agreement(cases, bias, bias - half, bias + half, bias - reach, bias + reach)
