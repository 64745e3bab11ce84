"""Label maps after the network."""

from __future__ import annotations

from collections.abc import Sequence

import cc3d
import numpy as np
from scipy import ndimage


def largest_components(labels_ZYX: np.ndarray, values: Sequence[int]) -> np.ndarray:
    """A copy in which each of ``values`` keeps only its largest connected component (26 neighbours).

    ``labels_ZYX``: integers (Z, Y, X); the result has its dtype. The other components become 0; labels that are not
    named stay as they are, and a named label without voxels stays without. Of components of one size the one whose
    first voxel in C order comes first is kept, so that the result depends on nothing but the labels.
    """
    kept_ZYX = labels_ZYX.copy()
    boxes = ndimage.find_objects(labels_ZYX, max_label=max(values, default=1))
    for value in values:
        box = boxes[value - 1]
        if box is None:
            continue
        # not as bool: cc3d 4.1 reserves too few numbers for bool arrays, and fails on the comb 1 0 1 of shape (1, 1, 3)
        components = cc3d.connected_components((labels_ZYX[box] == value).view(np.uint8), connectivity=26)
        voxels = np.bincount(components.ravel())
        voxels[0] = 0
        largest = np.flatnonzero(voxels == voxels.max())
        # the numbers of components follow no documented order, the position of their voxels does
        first = components.flat[np.isin(components, largest).argmax()]
        kept_ZYX[box][(components != first) & (components != 0)] = 0
    return kept_ZYX
