"""Which masks of a cohort a person should look at: flags of single rows, of volumes among others, and of changes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from vnet_core.report import shape_flags
from vnet_core.reporting import FLAGS, Flag, Reporting

MAD_TO_DEVIATION = 1.4826
"""Times the median absolute deviation, this is the standard deviation of normally distributed values: one over the
normal distribution's upper quartile, 0.6745 (Hampel 1974, J. Am. Stat. Assoc. 69, 383)."""
FEWEST_CASES = 20
"""Cases that a cohort needs before its own volumes say what is plausible. A choice: from 20 normal values the deviation
is known to within about a quarter, so that a limit of 5 means 3.5 to 6."""
SMALLEST_DEVIATION = 0.02
"""Least robust deviation of ln volume, about 2 % of the volume. A choice: without it, differences of single voxels
would be flagged in a cohort of near-equal volumes."""


@dataclass(frozen=True, slots=True)
class Distribution:
    """Volumes of one label over a cohort, on a logarithmic scale."""

    median: float
    """Of ln(volume / mL)."""
    deviation: float
    """Robust standard deviation of the same."""
    cases: int

    def deviations(self, volume_ml: float) -> float:
        """How many deviations a volume above 0 lies from the median, with its sign."""
        return (math.log(volume_ml) - self.median) / self.deviation

    def range_ml(self, deviations: float) -> tuple[float, float]:
        """Volumes that lie so many deviations below and above the median."""
        return (
            math.exp(self.median - deviations * self.deviation),
            math.exp(self.median + deviations * self.deviation),
        )


def distribution(volumes_ml: Iterable[float]) -> Distribution | None:
    """The distribution of the volumes above 0, one per case; None below ``FEWEST_CASES`` of them.

    Volumes of a structure vary by factors rather than by mL, and are skewed to the right, hence the logarithm; median
    and median absolute deviation are not moved by the very volumes that are to be found.
    """
    positive = np.asarray([volume for volume in volumes_ml if volume > 0], float)
    if len(positive) < FEWEST_CASES:
        return None
    logarithms = np.log(positive)
    median = float(np.median(logarithms))
    deviation = MAD_TO_DEVIATION * float(np.median(np.abs(logarithms - median)))
    return Distribution(median, max(deviation, SMALLEST_DEVIATION), len(positive))


@dataclass(frozen=True, slots=True)
class Size:
    """A volume with the range over folds and mirror images, where there were several."""

    volume_ml: float
    low_ml: float | None = None
    high_ml: float | None = None


@dataclass(frozen=True, slots=True)
class Change:
    """What lies between two volumes of one structure."""

    ml: float
    percent: float | None
    """Of the earlier volume; None when that was 0."""
    uncertainty_ml: float | None
    """How much of it may be technical: sqrt(a^2 + b^2), where a and b are half the ranges of the two volumes over folds
    and mirror images; a volume without a range adds nothing. None when neither has one."""

    def exceeds(self, percent: float) -> bool:
        """Whether it is larger than ``percent`` and than its uncertainty, up or down.

        A structure that appears, from 0 mL, has no percentage and never does.
        """
        return self.percent is not None and abs(self.percent) > percent and abs(self.ml) > (self.uncertainty_ml or 0.0)


def change(now: Size, before: Size) -> Change:
    """From the volume before to the one now."""
    ml = now.volume_ml - before.volume_ml
    halves = [(s.high_ml - s.low_ml) / 2 for s in (now, before) if s.low_ml is not None and s.high_ml is not None]
    return Change(
        ml,
        100 * ml / before.volume_ml if before.volume_ml else None,
        math.hypot(*halves) if halves else None,
    )


@dataclass(frozen=True, slots=True)
class Finding:
    """What is known of one label of one case when its flags are decided."""

    name: str
    """Its name in the plan."""
    size: Size
    voxels: int
    components: int
    touches_border: bool
    agreement: float | None
    """Lowest Dice of a fold or mirror image with the mean; None with one pass."""
    drift: bool
    """Whether the scan is unlike those that the model was trained on."""
    same_scan: Change | None
    """Since the last result of the same bytes; None where there is none, or it is the same result."""
    patient: Change | None
    """Since the same patient's scan before; None where there is none."""


def flags(finding: Finding, among: Distribution | None, settings: Reporting) -> tuple[Flag, ...]:
    """The flags of a row, in the order of FLAGS, without those that ``settings`` switches off.

    ``among``: the volumes of the same label over the cohort; None where there are too few.
    """
    found: set[str] = set(
        shape_flags(finding.voxels, finding.touches_border, finding.components, settings.many_components)
    )
    if is_implausible(finding.name, finding.size.volume_ml, among, settings):
        found.add("implausible-volume")
    if (finding.patient and finding.patient.exceeds(settings.implausible_change_percent)) or (
        finding.same_scan and finding.same_scan.exceeds(settings.same_scan_percent)
    ):
        found.add("implausible-change")
    if finding.agreement is not None and finding.agreement < settings.agreement_below:
        found.add("low-agreement")
    if finding.drift:
        found.add("drift")
    return tuple(flag for flag in FLAGS if flag in found and flag in settings.flags)


def is_implausible(name: str, volume_ml: float, among: Distribution | None, settings: Reporting) -> bool:
    """Whether a volume lies outside its reference range or, where it has none, too far from the cohort's median.

    Without a reference range, a volume of 0 is never implausible: it is `empty`.
    """
    if name in settings.reference_ml:
        low, high = settings.reference_ml[name]
        return not low <= volume_ml <= high
    if among is None or volume_ml <= 0:
        return False
    return abs(among.deviations(volume_ml)) >= settings.implausible_deviations
