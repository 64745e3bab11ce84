"""Versions that must be the same on this machine and on those of a Dask cluster before work goes there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vnet_core.errors import EngineError

SAME = ("dask", "distributed", "cloudpickle")
"""Speak with each other in formats of their own: the whole version counts."""
SAME_MINOR = ("python", "msgpack")
"""The first two numbers count: other ones may write what this side cannot read."""
OURS = ("vnet-cohort",)
"""The whole version counts; the scheduler unpacks what is sent to workers."""
NUMBERS = ("numpy", "scipy", "SimpleITK", "torch", "zarr")
"""Decide numbers; the first two count, of workers alone."""
ASKED = (*OURS, *NUMBERS)
"""What Dask does not tell without being asked."""
SHOWN = 5


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A package that differs."""

    package: str
    here: str
    there: str
    """As it was found, or ``missing``."""
    where: str
    """``scheduler``, or a worker's address."""


def check_versions(address: str, found: Mapping[str, Any]) -> None:
    """EngineError ``dask.versions`` naming what differs; ``found``: what ``Client.get_versions(ASKED)`` gives."""
    differing = mismatches(found)
    if not differing:
        return
    by_package: dict[tuple[str, str, str], list[str]] = {}
    for m in differing:
        by_package.setdefault((m.package, m.here, m.there), []).append(m.where)
    told = [
        f"{package} is {here} here and {there} on {_places(places)}"
        for (package, here, there), places in sorted(by_package.items())
    ]
    raise EngineError(
        "dask.versions",
        f"Dask at {address} has other versions: {'; '.join(told)}; install the same requirements.lock everywhere and"
        " start its scheduler and workers again",
    )


def mismatches(found: Mapping[str, Any]) -> list[Mismatch]:
    """What differs between ``client``, ``scheduler`` and ``workers``."""
    here = found["client"]["packages"]
    places = {"scheduler": (found["scheduler"], (*SAME, *SAME_MINOR, *OURS))}
    # a worker that could not be asked has just ended
    everything = (*SAME, *SAME_MINOR, *OURS, *NUMBERS)
    places |= {worker: (facts, everything) for worker, facts in found["workers"].items() if facts}
    return [
        Mismatch(package, _shown(package, here), _shown(package, facts["packages"]), place)
        for place, (facts, packages) in sorted(places.items())
        for package in packages
        if _compared(package, here) != _compared(package, facts["packages"])
    ]


def _compared(package: str, versions: Mapping[str, str | None]) -> tuple[str, ...] | None:
    version = versions.get(package)
    if version is None:
        return None
    return (version,) if package in (*SAME, *OURS) else tuple(version.split(".")[:2])


def _shown(package: str, versions: Mapping[str, str | None]) -> str:
    version = versions.get(package)
    if version is None:
        return "missing"
    # 3.11.7.final.0
    return ".".join(version.split(".")[:3]) if package == "python" else version


def _places(places: list[str]) -> str:
    workers = [place for place in places if place != "scheduler"]
    told = ["the scheduler"] if "scheduler" in places else []
    if workers:
        more = f" and {len(workers) - SHOWN} more" if len(workers) > SHOWN else ""
        told.append(f"{len(workers)} worker{'s'[: len(workers) != 1]} ({', '.join(workers[:SHOWN])}{more})")
    return " and ".join(told)
