"""How long things stay in a storage root."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Retention(BaseModel):
    """How long things stay; without any rule everything does, except what died runs left half done."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    nights_days: int | None = Field(default=None, ge=1)
    """Days that a night's rows, pages and log stay; the newest night of a cohort always does."""
    results_days: int | None = Field(default=None, ge=1)
    """Days that a mask stays that no kept night names and no night would use again."""
    spares_days: int | None = Field(default=None, ge=1)
    """Days that volumes, unpacked archives and checkpoints of finished trainings stay when nothing needs them."""
    artifacts_days: int | None = Field(default=None, ge=1)
    """Days that older versions of the reports and tables in the UI stay."""
    grace_hours: float = Field(default=24.0, ge=1)
    """Nothing younger goes; more than the longest run takes."""


KEEP_EVERYTHING = Retention()
