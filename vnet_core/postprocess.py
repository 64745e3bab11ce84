"""Label maps after the network: what is cleaned away, and which cleaning helps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import cc3d
import numpy as np
from scipy import ndimage

from vnet_core.metrics import dice
from vnet_core.sections import Cleaning
from vnet_core.statistics import bootstrap_means

SMALLEST_GAIN = 0.002
"""Mean Dice that a cleaning must bring to be chosen."""
SUREST = 0.9
"""Share of the drawn cohorts in which it must bring something."""


def clean(labels_ZYX: np.ndarray, voxel_ml: float, cleanings: Sequence[Cleaning]) -> np.ndarray:
    """A copy of an integer label map (Z, Y, X), of its dtype, with the cleanings done one after the other.

    Of one cleaning, components (26 neighbours) are removed first, then holes are filled: background that cannot
    reach the box around the label, or the edge of the image, without passing through the label. What is removed
    becomes background; other labels stay as they are. Of components of one size the one whose first voxel in C order
    comes first is the largest. A label without voxels stays without.
    """
    cleaned_ZYX = labels_ZYX.copy()
    largest = max((cleaning.label for cleaning in cleanings), default=1)
    # cleaning never takes a label out of its box, so that these boxes hold for all that follow
    boxes = ndimage.find_objects(labels_ZYX, max_label=largest)
    for cleaning in cleanings:
        box = boxes[cleaning.label - 1]
        if box is None:
            continue
        if cleaning.keep == "largest" or cleaning.minimum_ml > 0:
            _remove_components(cleaned_ZYX[box], voxel_ml, cleaning)
        if cleaning.holes == "fill":
            _fill_holes(cleaned_ZYX[box], cleaning.label)
    return cleaned_ZYX


def _remove_components(labels_ZYX: np.ndarray, voxel_ml: float, cleaning: Cleaning) -> None:
    """In place."""
    components, voxels = _components(labels_ZYX == cleaning.label)
    keep = voxels * voxel_ml >= cleaning.minimum_ml
    if cleaning.keep == "largest" and voxels.size > 1:
        largest = np.flatnonzero(voxels[1:] == voxels[1:].max()) + 1
        # the numbers of components follow no documented order, the position of their voxels does
        first = components.flat[np.isin(components, largest).argmax()]
        keep &= np.arange(voxels.size) == first
    keep[0] = True
    labels_ZYX[~keep[components]] = 0


def _components(mask_ZYX: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number of each voxel's component (26 neighbours), 0 outside, and voxels of each component."""
    # not as bool: cc3d 4.1 reserves too few numbers for bool arrays, and fails on the comb 1 0 1 of shape (1, 1, 3)
    components = cc3d.connected_components(mask_ZYX.view(np.uint8), connectivity=26)
    return components, np.bincount(components.ravel())


def _fill_holes(labels_ZYX: np.ndarray, label: int) -> None:
    """In place. ``labels_ZYX`` is the box around the label."""
    # 6 neighbours: what is one over corners does not let anything through there
    spaces = cc3d.connected_components((labels_ZYX != label).view(np.uint8), connectivity=6)
    open_ = np.zeros(int(spaces.max()) + 1, bool)
    for axis in range(3):
        for side in (0, -1):
            open_[np.unique(spaces.take(side, axis))] = True
    open_[0] = True
    labels_ZYX[~open_[spaces] & (labels_ZYX == 0)] = label


# --- which cleaning helps


def components_ml(labels_ZYX: np.ndarray, voxel_ml: float, label: int) -> list[float]:
    """Volumes in mL, ascending, of the components (26 neighbours) of one label of an integer map (Z, Y, X)."""
    box = ndimage.find_objects(labels_ZYX, max_label=label)[label - 1]
    if box is None:
        return []
    _, voxels = _components(labels_ZYX[box] == label)
    return [float(number) * voxel_ml for number in sorted(voxels[1:])]


def candidates(true_components_ml: Mapping[int, Sequence[float]]) -> tuple[Cleaning, ...]:
    """Cleanings worth a trial, label by label; each label's first does nothing, later ones do more.

    ``true_components_ml``: by label value, the volumes of all its components in the true maps of the training cases.
    A smallest volume to keep is half the smallest, half the tenth-smallest of a hundred, and half the median of them:
    a component of half the size of a true one is seldom one.
    """
    found: list[Cleaning] = []
    for label, volumes_ml in sorted(true_components_ml.items()):
        halves = np.quantile(volumes_ml, [0, 0.1, 0.5]) / 2 if len(volumes_ml) else np.empty(0)
        smallest_ml = list(dict.fromkeys(float(f"{half:.3g}") for half in halves))
        found += [
            Cleaning(label=label, keep=keep, minimum_ml=ml, holes=holes)
            for keep, ml in [("all", 0.0), *(("all", ml) for ml in smallest_ml), ("largest", 0.0)]
            for holes in ("keep", "fill")
        ]
    return tuple(found)


def score_candidates(
    labels_ZYX: np.ndarray, truth_ZYX: np.ndarray, voxel_ml: float, tried: Sequence[Cleaning]
) -> dict[Cleaning, float]:
    """Dice of each cleaning's label after that cleaning alone, for one case; integer maps (Z, Y, X) on one grid.

    Where neither map has the label, this Dice is 1: a cleaning that leaves nothing where nothing is does well.
    """
    boxes = [
        ndimage.find_objects(labels, max_label=max((c.label for c in tried), default=1))
        for labels in (labels_ZYX, truth_ZYX)
    ]
    scores = {}
    for cleaning in tried:
        box = boxes[0][cleaning.label - 1]
        true_box = boxes[1][cleaning.label - 1]
        if box is None or true_box is None:
            # nothing to clean, or any voxel that is left is wrong
            left = box is not None and (clean(labels_ZYX[box], voxel_ml, [cleaning]) == cleaning.label).any()
            scores[cleaning] = 1.0 if true_box is None and not left else 0.0
            continue
        both = tuple(slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(box, true_box, strict=True))
        cleaned_ZYX = clean(labels_ZYX[both], voxel_ml, [cleaning])
        scores[cleaning] = dice(cleaned_ZYX == cleaning.label, truth_ZYX[both] == cleaning.label)
    return scores


@dataclass(frozen=True, slots=True)
class Choice:
    """What is done to one label, and why."""

    label: int
    cleaning: Cleaning | None
    """None: nothing."""
    reason: str
    """In words, with the figures."""


def choose(
    scores: Sequence[Mapping[Cleaning, float]], patients: Sequence[str] = (), seed: int = 0
) -> tuple[Choice, ...]:
    """For each label the cleaning that helps, if one does.

    ``scores``: of each cross-validation case what :func:`score_candidates` gave, all of the same cleanings.
    ``patients``: one name per case; cases of one patient are drawn together.

    A cleaning is chosen when mean Dice rises by at least SMALLEST_GAIN, when it rises in at least SUREST of the cohorts
    that a seeded paired bootstrap draws, and when it takes away all overlap in no case that had some. Of several the
    one with the largest mean is taken; of equal ones the one that does least.
    """
    labels = sorted({cleaning.label for case in scores for cleaning in case})
    return tuple(_choose(label, scores, patients, seed) for label in labels)


def _choose(label: int, scores: Sequence[Mapping[Cleaning, float]], patients: Sequence[str], seed: int) -> Choice:
    raw = np.array([case[Cleaning(label=label)] for case in scores])
    tried = [cleaning for cleaning in scores[0] if cleaning.label == label and cleaning != Cleaning(label=label)]
    helpful: list[tuple[float, float, Cleaning]] = []
    best_gain = 0.0
    for cleaning in tried:
        cleaned = np.array([case[cleaning] for case in scores])
        gain = float((cleaned - raw).mean())
        best_gain = max(best_gain, gain)
        if gain < SMALLEST_GAIN or bool(((cleaned == 0) & (raw > 0)).any()):
            continue
        means = bootstrap_means(cleaned - raw, patients, seed)
        sure = 0.0 if means is None else float((means > 0).mean())
        if sure >= SUREST:
            helpful.append((gain, sure, cleaning))
    if not helpful:
        return Choice(
            label,
            None,
            f"label {label}: no cleaning; of {len(tried)} tried on {len(scores)} cases none raises mean Dice"
            f" ({raw.mean():.4f}) by {SMALLEST_GAIN} or more in {SUREST:.0%} of drawn cohorts without losing a case"
            f" (largest change {best_gain:+.4f})",
        )
    # max takes the first of equal ones, and candidates come from the mildest on
    gain, sure, cleaning = max(helpful, key=lambda one: round(one[0], 6))
    return Choice(
        label,
        cleaning,
        f"label {label}: {in_words(cleaning)}; mean Dice over {len(scores)} cases {raw.mean():.4f} ->"
        f" {raw.mean() + gain:.4f}, better in {sure:.0%} of drawn cohorts, no case lost",
    )


def in_words(cleaning: Cleaning) -> str:
    """What a cleaning does, such as ``keep the largest component, fill holes``."""
    parts = []
    if cleaning.keep == "largest":
        parts.append("keep the largest component")
    if cleaning.minimum_ml > 0:
        parts.append(f"remove components below {cleaning.minimum_ml:g} mL")
    if cleaning.holes == "fill":
        parts.append("fill holes")
    return ", ".join(parts) or "nothing"
