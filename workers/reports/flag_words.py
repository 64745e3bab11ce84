"""What the flags of a row mean, in words."""

from __future__ import annotations

FLAGS = {
    "empty": "the model found no voxel of this label",
    "touches-border": "the structure reaches the edge of the scan: its volume is at least what is stated",
    "many-components": "the label lies in more pieces than a structure should",
    "implausible-volume": "the volume is unlike those of the cohort, or outside of what was set",
    "implausible-change": "the volume changed by more than is plausible",
    "low-agreement": "the model is of two minds about this label",
    "drift": "the scan is unlike those that the model was trained on",
}
"""A sentence for each flag, in the order in which a row lists them; docs/quality.md says the same."""


def flags_of(row_flags: str | None) -> tuple[str, ...]:
    """The flags of a row's column."""
    return tuple((row_flags or "").split())
