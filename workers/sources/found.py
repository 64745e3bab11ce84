"""What looking through sources gives: cases that are not yet read, and a count of everything that is none."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from vnet_core.errors import ScanError
from vnet_core.plan import Label
from vnet_core.sections import Selection
from workers.identity import Pseudonyms, safe_id


@dataclass(frozen=True, slots=True)
class Found:
    """A case as its source names it, not yet read."""

    id: str
    channels: tuple[str, ...]
    label: str | None = None
    refers: bool = False
    """Whether the label was not named but refers to the scan: where it cannot be used, the scan can all the same."""
    patient: str | None = None
    problem: ScanError | None = None
    """Why it cannot be used, when that is already known."""
    warnings: tuple[str, ...] = ()
    """Codes of what was noted while looking."""


@dataclass(frozen=True, slots=True)
class NotChosen:
    """A series of a study that became no channel, as far as it may be told: no text of its header."""

    case: str
    """Case that the study became."""
    modality: str
    orientation: str
    slices: int
    slice_spacing_mm: float
    reason: str
    """In words."""


@dataclass(frozen=True, slots=True)
class Rules:
    """How sources are looked through."""

    endings: tuple[str, ...] = ()
    """Endings of file names that make channels of one case, such as ``_t1`` and ``_t2``."""
    select: tuple[Selection, ...] = ()
    """One rule per channel: a study is then a case. Empty: every DICOM volume is a case."""
    ids: Pseudonyms | None = None
    """What stands for names; None: ids are the names of files and folders."""
    passed_by: Path | None = None
    """A folder that holds no sources wherever it lies: the storage root."""

    def case_id(self, name: str) -> str:
        """Id of a plain file or of a row of a manifest."""
        return self.ids.case(name) if self.ids else safe_id(name)


@dataclass(slots=True)
class Discovery:
    """What the sources hold."""

    cases: list[Found] = field(default_factory=list)
    channels: tuple[str, ...] = ()
    """Channel names where a ``dataset.json`` or manifest tells them."""
    labels: tuple[Label, ...] = ()
    """Label names where a ``dataset.json`` tells them."""
    stacked: bool = False
    """Whether a file holds all channels along a fourth axis, as the ``dataset.json`` of the Decathlon says."""
    set_aside: Counter[str] = field(default_factory=Counter)
    """What is no case, by reason: ``not-a-scan`` (files), ``archive`` (in a folder), ``link``,
    ``link-outside``, ``not-regular``, ``label-without-scan``, ``annotation-...`` and the reasons of DICOM trees."""
    not_chosen: list[NotChosen] = field(default_factory=list)

    @property
    def ignored(self) -> int:
        """How much is no case."""
        return self.set_aside.total()


def is_zarr(path: Path) -> bool:
    """Whether the path is a folder with the name of a Zarr hierarchy, which is one scan."""
    return path.name.lower().endswith(".zarr") and path.is_dir()
