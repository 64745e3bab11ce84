"""Fields that several forms share. A flow's own parameters get their texts from its docstring."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from workers.registry.aliases import LONGEST_NAME, LONGEST_REASON

CohortName = Annotated[str, Field(min_length=1)]
PersonName = Annotated[
    str, Field(title="Your name", description="Kept in the model's history", min_length=1, max_length=LONGEST_NAME)
]
Reason = Annotated[str, Field(title="Why", description="Kept in the model's history", max_length=LONGEST_REASON)]
DEFAULT_MINUTES = 10.0
"""Of a training that nobody has given a budget."""
