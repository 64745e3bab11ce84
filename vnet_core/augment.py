"""Random changes of training samples: image and label move together, each with the generator that it is given.

With strength 0 every function gives back what it got.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from vnet_core.geometry import Triple

# C channel, Z Y X


def rotation_zoom(
    generator: np.random.Generator, rotation_degrees: float, scaling: float, spacing_mm: Triple
) -> np.ndarray:
    """A random matrix (3, 3) from offsets of the new patch to offsets of the old one, in voxels (z, y, x).

    A rotation by up to ``rotation_degrees`` about each axis and one zoom between ``1 - scaling`` and ``1 + scaling``,
    in millimetres, so that anatomy stays rigid on anisotropic grids.
    """
    angles = np.deg2rad(generator.uniform(-rotation_degrees, rotation_degrees, 3))
    zoom = generator.uniform(1 - scaling, 1 + scaling)
    turn = np.eye(3)
    for axis, angle in enumerate(angles):
        a, b = (i for i in range(3) if i != axis)
        plane = np.eye(3)
        plane[[a, a, b, b], [a, b, a, b]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        turn = turn @ plane
    size = np.diag(spacing_mm)
    return np.linalg.inv(size) @ (turn / zoom) @ size


def warped(image: np.ndarray, classes: np.ndarray, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Image float32 (C, Z, Y, X), linearly, and classes (Z, Y, X), by nearest voxel, seen through ``matrix``.

    The voxel at offset v from the centre of the result is that at ``matrix @ v`` of the patch; zeros (background)
    where that lies outside. The identity gives both back as they are.
    """
    if np.array_equal(matrix, np.eye(3)):
        return image, classes
    # torch counts offsets as x, y, z in half extents
    half = (np.asarray(classes.shape) - 1) / 2
    scale = np.maximum(half, 0.5)
    flipped = (matrix * scale[None, :] / scale[:, None])[::-1, ::-1]
    theta = torch.from_numpy(np.concatenate([flipped, np.zeros((3, 1))], axis=1).astype(np.float32))[None]
    grid = F.affine_grid(theta, [1, 1, *classes.shape], align_corners=True)
    moved = F.grid_sample(torch.from_numpy(image)[None], grid, "bilinear", "zeros", align_corners=True)[0]
    label = torch.from_numpy(classes.astype(np.float32))[None, None]
    named = F.grid_sample(label, grid, "nearest", "zeros", align_corners=True)[0, 0]
    return moved.numpy(), named.numpy().astype(classes.dtype)


def intensities(generator: np.random.Generator, image: np.ndarray, strength: float) -> np.ndarray:
    """Image (C, Z, Y, X) with random contrast, brightness and Gaussian noise per channel; voxels at 0 stay at 0.

    Zero is the mean of a z-scored image and what surrounds a volume that is smaller than its patch; the surround must
    stay what it is at inference.
    """
    if strength == 0:
        return image
    channels = (image.shape[0], 1, 1, 1)
    contrast = generator.uniform(1 - strength, 1 + strength, channels).astype(np.float32)
    brightness = generator.uniform(-strength / 2, strength / 2, channels).astype(np.float32)
    deviation = generator.uniform(0, strength / 2, channels).astype(np.float32)
    noise = generator.standard_normal(image.shape, np.float32)
    return np.where(image == 0, image, image * contrast + brightness + noise * deviation)
