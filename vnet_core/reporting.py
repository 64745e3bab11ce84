"""How a cohort is reported on: what its labels are called there, which volumes are plausible, and what is flagged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ValidationError, model_validator

from vnet_core.errors import ConfigError
from vnet_core.plan import config_error
from vnet_core.sections import Section

Flag = Literal[
    "empty",
    "touches-border",
    "many-components",
    "implausible-volume",
    "implausible-change",
    "low-agreement",
    "drift",
]
FLAGS: tuple[Flag, ...] = get_args(Flag)
"""Every flag, in the order in which a row lists them."""

MANY_COMPONENTS = 10
"""A structure in more pieces than this is flagged: most structures are one piece, and noise comes in dozens."""

Millilitres = Annotated[float, Field(ge=0)]
Name = Annotated[str, Field(min_length=1)]


class Reporting(Section):
    """Settings of a cohort's reports. None of them changes a mask, so that a report is made anew without segmenting."""

    names: dict[Name, Name] = Field(default={})
    """What a label or region of the plan is called in reports, by its name in the plan."""
    reference_ml: dict[Name, tuple[Millilitres, Millilitres]] = Field(default={})
    """Smallest and largest plausible volume in mL, by the name in the plan; it takes the place of the cohort's own
    distribution."""
    many_components: int = Field(default=MANY_COMPONENTS, ge=1)
    """A structure in more pieces than this is flagged."""
    implausible_deviations: float = Field(default=5.0, gt=0)
    """A volume that is this many robust deviations or more away from the cohort's median, on a logarithmic scale, is
    flagged."""
    agreement_below: float = Field(default=0.8, ge=0, le=1)
    """Masks are flagged whose folds or mirror images agree less with their mean than this, in Dice."""
    implausible_change_percent: float = Field(default=50.0, gt=0)
    """A change between two scans of a patient above this is flagged, where it is also above its uncertainty."""
    same_scan_percent: float = Field(default=10.0, gt=0)
    """The same for a scan whose bytes have not changed, so that all of the change comes from the model."""
    flags: tuple[Flag, ...] = FLAGS
    """Flags that are raised; others never appear."""

    @model_validator(mode="after")
    def _consistent(self) -> Reporting:
        for name, (low, high) in self.reference_ml.items():
            if low >= high:
                raise ValueError(f"reference_ml of {name} is {low} to {high} mL; the first must be the smaller")
        twice = sorted({name for name in self.names.values() if list(self.names.values()).count(name) > 1})
        if twice:
            raise ValueError(f"names calls several labels {', '.join(twice)}; give each a name of its own")
        return self

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> Reporting:
        """Validated settings from plain data (TOML or JSON).

        Raises ConfigError ``reporting.unknown-key`` or ``reporting.value``, with every problem in the message.
        """
        try:
            return cls.model_validate(mapping)
        except ValidationError as error:
            raise config_error(error, cls, "reporting") from None

    def check_names(self, known: frozenset[str]) -> None:
        """ConfigError ``reporting.label`` when a label is set that is not among the ``known`` names of the plan, or
        when a label is given the name of another that keeps its own."""
        unknown = sorted((self.names.keys() | self.reference_ml.keys()) - known)
        if unknown:
            raise ConfigError(
                "reporting.label",
                f"the report has no label {', '.join(unknown)}; the plan's names are {', '.join(sorted(known))}",
            )
        taken = sorted(set(self.names.values()) & (known - self.names.keys()))
        if taken:
            raise ConfigError(
                "reporting.label",
                f"names gives away {', '.join(taken)}, which is the name of another label; choose another",
            )


DEFAULT_REPORTING = Reporting()
