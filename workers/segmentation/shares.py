"""A case that goes through in portions, done by several actors: how it is divided, and what is to be done."""

from __future__ import annotations

from dataclasses import dataclass

from vnet_core.geometry import Shape


@dataclass(frozen=True, slots=True)
class Division:
    """How a case is divided: the same for all who do a part of it, whatever memory each of them has."""

    tile: Shape
    edges: Shape
    """Voxels of a portion along the scan's own axes."""
    peak_bytes: int
    """Most memory that one portion takes, beside the libraries."""
    count: int
    """Portions."""


@dataclass(frozen=True, slots=True)
class Step:
    """One of the things to be done about a case that is divided."""

    division: Division
    portion: int | None
    """Which one is to be done; None: all are there, and the mask is to be published."""
