"""How well a mask agrees with the truth.

    Dice = 2 |P and T| / (|P| + |T|)        volume error = (|P| - |T|) / |T|

with |.| the number of voxels of the prediction P and of the truth T (Dice 1945). A score that has no meaning is NaN,
never a flattering 1: tables leave it out of means and show it as not applicable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vnet_core.errors import ScanError
from vnet_core.plan import Label


def dice(prediction_ZYX: np.ndarray, truth_ZYX: np.ndarray) -> float:
    """Dice overlap of two bool masks (Z, Y, X), 0 to 1. One empty: 0. Both empty: NaN, there was nothing to find."""
    _check_shapes(prediction_ZYX, truth_ZYX)
    common = int(np.count_nonzero(prediction_ZYX & truth_ZYX))
    return _dice(common, int(np.count_nonzero(prediction_ZYX)), int(np.count_nonzero(truth_ZYX)))


def volume_error_ml(prediction_ZYX: np.ndarray, truth_ZYX: np.ndarray, voxel_ml: float) -> float:
    """Predicted minus true volume of two bool masks (Z, Y, X) in millilitres; positive is too much."""
    _check_shapes(prediction_ZYX, truth_ZYX)
    return (int(np.count_nonzero(prediction_ZYX)) - int(np.count_nonzero(truth_ZYX))) * voxel_ml


def volume_error_fraction(prediction_ZYX: np.ndarray, truth_ZYX: np.ndarray) -> float:
    """(predicted - true) / true volume of two bool masks (Z, Y, X): 0 is right, 0.1 is 10 % too much, -1 is empty.

    NaN when the truth is empty.
    """
    _check_shapes(prediction_ZYX, truth_ZYX)
    return _fraction(int(np.count_nonzero(prediction_ZYX)), int(np.count_nonzero(truth_ZYX)))


@dataclass(frozen=True, slots=True)
class LabelScore:
    """Agreement of one label with the truth."""

    label: int
    """Its value in the label maps."""
    name: str
    dice: float
    """0 to 1; NaN when neither the prediction nor the truth has the label."""
    volume_ml: float
    """Predicted volume."""
    truth_volume_ml: float
    volume_error_ml: float
    """Predicted minus true volume."""
    volume_error: float
    """The same as a share of the true volume; NaN when the truth does not have the label."""


def score_labels(
    prediction_ZYX: np.ndarray, truth_ZYX: np.ndarray, labels: Sequence[Label], voxel_ml: float
) -> list[LabelScore]:
    """One score per label, in their order, of two integer label maps (Z, Y, X) on one grid.

    Values that are not among ``labels`` count as background. Each map is read once, whatever the number of labels.
    Raises ScanError ``metrics.shape`` when the maps differ in shape.
    """
    _check_shapes(prediction_ZYX, truth_ZYX)
    size = max((label.value for label in labels), default=0) + 1
    predicted, true, common = (np.zeros(size, np.int64) for _ in range(3))
    # by slice, because bincount turns what it counts into 8 bytes a voxel
    for prediction_YX, truth_YX in zip(prediction_ZYX, truth_ZYX, strict=True):
        predicted += _voxels(prediction_YX, size)
        true += _voxels(truth_YX, size)
        common += _voxels(prediction_YX[prediction_YX == truth_YX], size)
    scores = []
    for label in labels:
        p, t, both = int(predicted[label.value]), int(true[label.value]), int(common[label.value])
        scores.append(
            LabelScore(
                label=label.value,
                name=label.name,
                dice=_dice(both, p, t),
                volume_ml=p * voxel_ml,
                truth_volume_ml=t * voxel_ml,
                volume_error_ml=(p - t) * voxel_ml,
                volume_error=_fraction(p, t),
            )
        )
    return scores


def _dice(common: int, predicted: int, true: int) -> float:
    return 2 * common / (predicted + true) if predicted + true else float("nan")


def _fraction(predicted: int, true: int) -> float:
    return (predicted - true) / true if true else float("nan")


def _voxels(values: np.ndarray, size: int) -> np.ndarray:
    """How often each of 0 .. size - 1 occurs, with 0 left at 0."""
    return np.bincount(values[(values > 0) & (values < size)].astype(np.intp), minlength=size)


def _check_shapes(prediction_ZYX: np.ndarray, truth_ZYX: np.ndarray) -> None:
    if prediction_ZYX.shape != truth_ZYX.shape:
        raise ScanError(
            "metrics.shape",
            f"the prediction has shape {prediction_ZYX.shape}, the truth {truth_ZYX.shape};"
            " bring both onto one grid first",
        )
