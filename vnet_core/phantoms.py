"""Scans with a known truth, drawn from a seed.

A body of ellipsoids in world millimetres: a bright rim around darker tissue, two bright vessels, and bright organs with
dark lesions inside. A smooth bias field makes tissue on one side as bright as the organ on the other, so that no
threshold finds the organ; the noise is Rician, as in magnitude MR. The anatomy depends on the seed alone and the grid
only samples it, so volumes in millilitres are known exactly and one body can be seen on many grids.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.spatial.transform import Rotation

from vnet_core.geometry import CANONICAL_DIRECTION, Geometry, Matrix, Shape, Triple, matrix_of
from vnet_core.plan import Label
from vnet_core.volume import Volume

LABELS = (Label(value=1, name="organ"), Label(value=2, name="lesion"))
"""What the label maps hold. The organ does not include its lesions."""

SAGITTAL_DIRECTION: Matrix = ((-1.0, 0.0, 0.0), (0.0, 0.0, 1.0), (0.0, -1.0, 0.0))
"""Slices from left to right, rows from head to feet, columns from front to back."""

AIR, TISSUE, LESION, BRIGHT = 0.02, 0.5, 0.35, 1.0
"""Signal before bias, noise and the scanner's scale; BRIGHT is rim, vessels and organ alike."""


@dataclass(frozen=True, slots=True)
class PhantomSpec:
    """One phantom: what is in the body, and the grid that samples it."""

    seed: int
    """Decides the body, its place in the world, the bias field and the noise."""
    shape: Shape = (48, 48, 48)
    """Voxels (z, y, x)."""
    spacing_mm: Triple = (1.25, 1.25, 1.25)
    """(z, y, x)."""
    direction: Matrix = CANONICAL_DIRECTION
    """Of the grid, as in Geometry. The grid's centre is within 1.5 mm of the body's along each world axis."""
    body_mm: float = 24.0
    """Mean half-width of the body; it lies within 1.1 times as much around its centre."""
    organs: int = 1
    """Organs in the body, 0 or more; they do not overlap."""
    lesions: int = 2
    """Lesions in each organ, 0 or more; they lie wholly inside it and do not overlap."""
    noise: float = 0.08
    """Standard deviation of the noise in each quadrature channel, as a share of the organ's signal."""
    bias: float = 0.3
    """Largest natural logarithm of the bias field, either way."""


def phantom(spec: PhantomSpec) -> tuple[Volume, Volume]:
    """The image, int16 (1, Z, Y, X), and its label map, uint8 (1, Z, Y, X), on one grid.

    A voxel has the label at its centre and the mean signal of eight points inside it (partial volume). The scanner's
    scale is drawn too: the organ's signal is 200 to 3000.
    """
    scene = _scene(spec)
    rng = np.random.default_rng([spec.seed, 1])
    centre_mm = scene.body.centre_mm + rng.uniform(-1.5, 1.5, 3)
    geometry = _centred_grid(spec, centre_mm)
    scale = float(np.exp(rng.uniform(np.log(200), np.log(3000))))
    bias = _waves(rng, wavelength_mm=(2 * spec.body_mm, 4 * spec.body_mm), count=2)
    texture = _waves(rng, wavelength_mm=(spec.body_mm / 4, spec.body_mm / 2), count=8)

    labels_ZYX = np.zeros(spec.shape, np.uint8)
    for layer in scene.layers:
        for z, y, x, inside in _sections(layer.ellipsoid, geometry, np.zeros(3)):
            labels_ZYX[z, y, x][inside] = layer.label

    image_ZYX = np.zeros(spec.shape, np.int16)
    signal_ZYX = np.zeros(spec.shape, np.float32)
    for offset in _SUBVOXELS:
        point_ZYX = np.full(spec.shape, AIR, np.float32)
        for layer in scene.layers:
            for z, y, x, inside in _sections(layer.ellipsoid, geometry, offset):
                point_ZYX[z, y, x][inside] = layer.signal
        signal_ZYX += point_ZYX / len(_SUBVOXELS)

    bias_planes = _wave_planes(bias, geometry)
    texture_planes = _wave_planes(texture, geometry)
    for z, (bias_YX, texture_YX) in enumerate(zip(bias_planes, texture_planes, strict=True)):
        clean_YX = signal_ZYX[z] * (1 + 0.06 * texture_YX) * np.exp(spec.bias * bias_YX)
        real_YX, imaginary_YX = rng.normal(0.0, spec.noise, (2, *clean_YX.shape))
        image_ZYX[z] = np.rint(scale * np.hypot(clean_YX + real_YX, imaginary_YX)).clip(max=32767)
    return Volume(image_ZYX[None], geometry), Volume(labels_ZYX[None], geometry)


def organ_volume_ml(spec: PhantomSpec) -> float:
    """Exact volume of label 1, the organs without their lesions; what a fine grid around the body converges to."""
    return sum((e.volume_ml for e in _scene(spec).organs), 0.0) - lesion_volume_ml(spec)


def lesion_volume_ml(spec: PhantomSpec) -> float:
    """Exact volume of label 2, all lesions together."""
    return sum((e.volume_ml for e in _scene(spec).lesions), 0.0)


def oblique_direction(degrees: Triple) -> Matrix:
    """The canonical direction turned about the fixed world axes x, y and z, in that order."""
    turn = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix()
    return matrix_of(turn @ np.asarray(CANONICAL_DIRECTION))


def demo_cohort(seed: int, cases: int) -> list[tuple[str, PhantomSpec]]:
    """Names and phantoms of a cohort with the variety of a hospital's archive.

    Isotropic, thick-sliced, oblique, sagittal and coarse grids in turn; the sixth case has no organ. A longer cohort of
    the same seed begins with the shorter one.
    """
    cohort = []
    for i in range(cases):
        kind = "without-foreground" if i == 5 else _KINDS[i % len(_KINDS)]
        cohort.append((f"phantom-{i:03d}-{kind}", _demo_spec(kind, np.random.default_rng([seed, 2, i]))))
    return cohort


_KINDS = ("isotropic", "thick-slices", "oblique", "sagittal", "coarse")

_SUBVOXELS = tuple(np.array([i, j, k]) / 4 for i in (-1, 1) for j in (-1, 1) for k in (-1, 1))
"""Offsets (z, y, x) in voxels of the points that a voxel's signal is the mean of."""


def _demo_spec(kind: str, rng: np.random.Generator) -> PhantomSpec:
    side = int(rng.integers(40, 57))
    spacing = (float(np.round(rng.uniform(58, 72) / side, 2)),) * 3
    shape, direction = (side, side, side), CANONICAL_DIRECTION
    if kind == "thick-slices":
        shape, spacing = (22, 60, 60), (3.0, 1.0, 1.0)
    elif kind == "oblique":
        x, y, z = (float(a) for a in rng.uniform(8, 25, 3) * rng.choice([-1, 1], 3))
        direction = oblique_direction((x, y, z))
    elif kind == "sagittal":
        direction = SAGITTAL_DIRECTION
    elif kind == "coarse":
        shape, spacing = (32, 34, 36), (2.2, 2.2, 2.2)
    field_of_view_mm = min(n * s for n, s in zip(shape, spacing, strict=True))
    return PhantomSpec(
        seed=int(rng.integers(2**31)),
        shape=shape,
        spacing_mm=spacing,
        direction=direction,
        # at most 0.41 * 1.1 + 1.5 / 58 = 0.48 of it from the grid's centre: the body is never cut, however it is turned
        body_mm=float(rng.uniform(0.37, 0.41)) * field_of_view_mm,
        organs=0 if kind == "without-foreground" else 1,
        lesions=int(rng.integers(1, 4)),
        noise=float(rng.uniform(0.06, 0.1)),
        bias=float(rng.uniform(0.15, 0.3)),
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Ellipsoid:
    """The points ``centre_mm + axes_mm @ u`` with |u| <= 1, in world (x, y, z)."""

    centre_mm: np.ndarray
    axes_mm: np.ndarray
    """(3, 3), one semi-axis per column."""

    @property
    def volume_ml(self) -> float:
        return float(4 / 3 * np.pi * abs(np.linalg.det(self.axes_mm)) / 1000)

    def part(self, centre: np.ndarray, axes: np.ndarray) -> _Ellipsoid:
        """The ellipsoid with that centre and those axes in this one's own coordinates, where this one is |u| <= 1."""
        return _Ellipsoid(self.centre_mm + self.axes_mm @ centre, self.axes_mm @ axes)


@dataclass(frozen=True, slots=True, eq=False)
class _Layer:
    """An ellipsoid painted over what lies beneath."""

    ellipsoid: _Ellipsoid
    signal: float
    label: int


@dataclass(frozen=True, slots=True, eq=False)
class _Scene:
    """The anatomy of one seed."""

    body: _Ellipsoid
    vessels: Sequence[_Ellipsoid]
    organs: Sequence[_Ellipsoid]
    lesions: Sequence[_Ellipsoid]

    @property
    def layers(self) -> list[_Layer]:
        """From the bottom to the top."""
        inner = self.body.part(np.zeros(3), 0.9 * np.eye(3))
        return [
            _Layer(self.body, BRIGHT, 0),
            _Layer(inner, TISSUE, 0),
            *(_Layer(e, BRIGHT, 0) for e in self.vessels),
            *(_Layer(e, BRIGHT, 1) for e in self.organs),
            *(_Layer(e, LESION, 2) for e in self.lesions),
        ]


def _scene(spec: PhantomSpec) -> _Scene:
    rng = np.random.default_rng([spec.seed, 0])
    half_widths_mm = spec.body_mm * rng.uniform(0.9, 1.1, 3)
    tilt = Rotation.from_rotvec(rng.uniform(-0.25, 0.25, 3)).as_matrix()
    body = _Ellipsoid(rng.uniform(-60, 60, 3), tilt @ np.diag(half_widths_mm))
    vessels = [_part(body, place, rng, (0.25, 0.3, 1.0)) for place in _places(rng, 2, radii=(0.25, 0.4), reach=0.85)]
    organs = [_part(body, place, rng, (0.7, 0.85, 1.0)) for place in _places(rng, spec.organs, (0.45, 0.58), 0.87)]
    lesions = [
        _part(organ, place, rng, (0.8, 0.9, 1.0))
        for organ in organs
        for place in _places(rng, spec.lesions, (0.3, 0.45), 0.92)
    ]
    return _Scene(body, vessels, organs, lesions)


def _places(
    rng: np.random.Generator, count: int, radii: tuple[float, float], reach: float
) -> list[tuple[np.ndarray, float]]:
    """Centres and radii of disjoint balls inside the ball of radius ``reach``; crowded ones shrink until they fit."""
    balls: list[tuple[np.ndarray, float]] = []
    while len(balls) < count:
        radius = float(rng.uniform(*radii))
        while True:
            toward = rng.normal(size=3)
            distance = (reach - radius) * rng.uniform() ** (1 / 3)
            centre = toward / np.linalg.norm(toward) * distance
            if all(np.linalg.norm(centre - other) > radius + r for other, r in balls):
                break
            radius *= 0.97
        balls.append((centre, radius))
    return balls


def _part(
    whole: _Ellipsoid, place: tuple[np.ndarray, float], rng: np.random.Generator, flattening: Triple
) -> _Ellipsoid:
    """An ellipsoid of random orientation inside a ball of ``whole``'s own coordinates."""
    centre, radius = place
    turn = Rotation.from_quat(rng.normal(size=4)).as_matrix()
    return whole.part(centre, turn @ np.diag(radius * np.asarray(flattening)))


def _centred_grid(spec: PhantomSpec, centre_mm: np.ndarray) -> Geometry:
    half = np.asarray(spec.direction) @ ((np.asarray(spec.shape) - 1) / 2 * np.asarray(spec.spacing_mm))
    x, y, z = (float(v) for v in np.round(centre_mm - half, 3))
    return Geometry(spec.shape, spec.spacing_mm, (x, y, z), spec.direction)


def _sections(
    ellipsoid: _Ellipsoid, geometry: Geometry, offset: np.ndarray
) -> Iterator[tuple[int, slice, slice, np.ndarray]]:
    """Slice by slice, the window of the grid that an ellipsoid lies in and which points of it are inside.

    ``offset`` (z, y, x), in voxels, moves the points away from the voxel centres.
    """
    m = geometry.matrix
    to_index = np.linalg.inv(m[:3, :3])
    centre = to_index @ (ellipsoid.centre_mm - m[:3, 3]) - offset
    reach = np.linalg.norm(to_index @ ellipsoid.axes_mm, axis=1)
    start = np.maximum(np.ceil(centre - reach), 0).astype(int)
    stop = np.minimum(np.floor(centre + reach) + 1, geometry.shape).astype(int)
    if (stop <= start).any():
        return
    # inside is |to_unit @ (index - centre)| <= 1: along x a quadratic inequality, which holds within an interval
    to_unit = np.linalg.inv(ellipsoid.axes_mm) @ m[:3, :3]
    y, x = (np.arange(start[a], stop[a]) for a in (1, 2))
    along_x = to_unit[:, 2]
    a = along_x @ along_x
    for z in range(start[0], stop[0]):
        rest = np.outer(z - centre[0], to_unit[:, 0]) + np.outer(y - centre[1], to_unit[:, 1])
        b, c = rest @ along_x, (rest**2).sum(axis=1) - 1
        root = b**2 - a * c
        half = np.where(root >= 0, np.sqrt(np.maximum(root, 0)) / a, -1)
        inside = np.abs(x - (centre[2] - b / a)[:, None]) <= half[:, None]
        yield z, slice(start[1], stop[1]), slice(start[2], stop[2]), inside


@dataclass(frozen=True, slots=True, eq=False)
class _Waves:
    """A smooth field in the world: the mean of ``cos(k . p + phase)`` over its waves, -1 to 1."""

    k_per_mm: np.ndarray
    """(W, 3) wave vectors in radians per millimetre, world (x, y, z)."""
    phase: np.ndarray
    """(W,) radians."""


def _waves(rng: np.random.Generator, wavelength_mm: tuple[float, float], count: int) -> _Waves:
    towards = rng.normal(size=(count, 3))
    towards /= np.linalg.norm(towards, axis=1, keepdims=True)
    lengths_mm = rng.uniform(*wavelength_mm, size=(count, 1))
    return _Waves(2 * np.pi * towards / lengths_mm, rng.uniform(0, 2 * np.pi, count))


def _wave_planes(waves: _Waves, geometry: Geometry) -> Iterator[np.ndarray]:
    """The field on a grid, one float64 (Y, X) plane after the other along z."""
    m = geometry.matrix
    per_index = waves.k_per_mm @ m[:3, :3]
    phase = waves.phase + waves.k_per_mm @ m[:3, 3]
    # exp(i (a + b + c)) is a product, so a plane is one matrix product over the waves
    along_z, along_y, along_x = (np.exp(1j * per_index[:, a, None] * np.arange(geometry.shape[a])) for a in range(3))
    for z in range(geometry.shape[0]):
        amplitude = np.exp(1j * phase) * along_z[:, z]
        yield ((amplitude[:, None] * along_y).T @ along_x).real / len(waves.phase)
