"""The plan: everything that decides numbers, frozen, validated and digested.

A plan is read from TOML or JSON, or derived from a cohort's fingerprint. Two runs with the same plan, model and bytes
give the same masks; whatever may differ between machines (addresses, worker counts, folders) is in the site file
instead.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

from pydantic import BaseModel, Field, ValidationError, model_validator

from vnet_core.errors import ConfigError
from vnet_core.sections import (
    InferencePlan,
    NetworkPlan,
    OutputPlan,
    PreprocessPlan,
    ReadingPlan,
    Section,
    TrainingPlan,
)

PREPROCESSING_VERSION = 2
"""Raised whenever the program's preprocessing gives other numbers for the same plan; part of every volume's key."""


class Label(Section):
    """One structure to segment."""

    value: int = Field(ge=1, le=65535)
    """Its value in label maps; 0 is always background."""
    name: str = Field(min_length=1)
    """Its name in tables and pictures."""
    code: str = Field(default="", pattern=r"^([^:]+:[^:]+:.+)?$")
    """Its coded type, as SCHEME:VALUE:MEANING such as SCT:10200004:Liver, for DICOM segments; empty: looked up by
    name."""


class Region(Section):
    """A structure that is made of labels and may overlap others, such as a whole tumour and its core."""

    name: str = Field(min_length=1)
    """Its name in tables."""
    values: tuple[int, ...] = Field(min_length=1)
    """The label values that it is made of."""
    paints: int = Field(ge=1, le=65535)
    """The label value that its voxels get in a mask; later regions paint over earlier ones."""


class Plan(Section):
    """Everything that decides numbers, from the scan to the mask."""

    channels: tuple[str, ...] = Field(default=("image",), min_length=1)
    """Names of the input channels, in order."""
    labels: tuple[Label, ...] = Field(min_length=1)
    """Structures to segment, in ascending order of value."""
    head: Literal["softmax", "sigmoid"] = "softmax"
    """`softmax`: every voxel is one label or background. `sigmoid`: one yes or no per region."""
    regions: tuple[Region, ...] = ()
    """What a sigmoid head tells; empty: every label is a region of its own."""
    ignore_label: int | None = Field(default=None, ge=1, le=65535)
    """Value of voxels that nobody has decided on: they take no part in the loss."""
    other_labels: Literal["refuse", "background"] = "refuse"
    """Values in label maps that the plan does not name: training refuses them, or takes them for background."""
    reading: ReadingPlan = ReadingPlan()
    preprocess: PreprocessPlan = PreprocessPlan()
    network: NetworkPlan = NetworkPlan()
    training: TrainingPlan = TrainingPlan()
    inference: InferencePlan = InferencePlan()
    output: OutputPlan = OutputPlan()

    @model_validator(mode="after")
    def _consistent(self) -> Plan:
        values = [label.value for label in self.labels]
        if values != sorted(set(values)):
            raise ValueError(f"labels have values {values}; give each a value of its own, in ascending order")
        if self.ignore_label in values:
            raise ValueError(f"ignore_label {self.ignore_label} is one of the labels {values}; choose another value")
        if self.regions and self.head != "sigmoid":
            raise ValueError(f'{len(self.regions)} regions need head = "sigmoid", it is "{self.head}"')
        for where, named in (
            ("inference.cleaning", {cleaning.label for cleaning in self.inference.cleaning}),
            ("regions", {value for region in self.regions for value in (*region.values, region.paints)}),
        ):
            if unknown := named - set(values):
                raise ValueError(f"{where} names {sorted(unknown)}, the labels are {values}")
        if unnamed := set(self.output.values) - {label.name for label in self.labels}:
            raise ValueError(f"output.values names {sorted(unnamed)}, the labels are {[la.name for la in self.labels]}")
        if all(self.output.values.get(label.name) == 0 for label in self.labels):
            raise ValueError(f"output.values leaves out all {len(self.labels)} labels; a mask needs at least 1")
        if self.reading.select and [rule.channel for rule in self.reading.select] != list(self.channels):
            raise ValueError(
                f"reading.select names the channels {[rule.channel for rule in self.reading.select]}, the plan's are"
                f" {list(self.channels)}; give each channel one rule, in this order"
            )
        for axis, n in zip("zyx", self.training.patch_size, strict=True):
            d = self.network.divisor
            if n % d:
                below, above = max(d, n // d * d), -(-n // d) * d
                raise ValueError(
                    f"training.patch_size {self.training.patch_size} is not a multiple of {d} along {axis}; "
                    f"use {' or '.join(map(str, sorted({below, above})))} (network of {self.network.levels} levels)"
                )
        return self

    @property
    def classes(self) -> int:
        """Class indices of a training target: background and the labels."""
        return len(self.labels) + 1

    @property
    def ignored_class(self) -> int | None:
        """Class index of ignored voxels in a training target, one past the last class; None without them."""
        return None if self.ignore_label is None else self.classes

    @property
    def told_regions(self) -> tuple[Region, ...]:
        """What a sigmoid head tells, in the order of its outputs."""
        alone = (Region(name=label.name, values=(label.value,), paints=label.value) for label in self.labels)
        return self.regions or tuple(alone)

    @property
    def outputs(self) -> int:
        """Channels that the network gives out."""
        return self.classes if self.head == "softmax" else len(self.told_regions)

    @property
    def digest(self) -> str:
        """SHA-256 of the whole plan."""
        return digest_of(self.model_dump(mode="json"))

    @property
    def volume_digest(self) -> str:
        """SHA-256 of what decides a preprocessed volume."""
        return digest_of([PREPROCESSING_VERSION, self.preprocess.model_dump(mode="json"), len(self.channels)])

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> Plan:
        """A validated plan from plain data (TOML or JSON).

        Raises ConfigError ``plan.unknown-key`` (naming the nearest known key) or ``plan.value``, with every problem
        in the message.
        """
        try:
            return cls.model_validate(mapping)
        except ValidationError as error:
            raise config_error(error, cls, "plan") from None


def config_error(error: ValidationError, model: type[BaseModel], what: str) -> ConfigError:
    """A validation error as one ConfigError whose message names each field, what it got, and the nearest known key."""
    lines, code = [], f"{what}.value"
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            code = f"{what}.unknown-key"
            known = _keys(model)
            near = difflib.get_close_matches(where, known, n=1, cutoff=0.0)
            lines.append(f"{where} is not a key of the {what}; the nearest is {near[0]}")
        else:
            message = item["msg"].removeprefix("Value error, ")
            got = "" if item["type"] == "missing" or not where else f" (got {item['input']!r})"
            lines.append(f"{where}: {message}{got}" if where else message)
    return ConfigError(code, f"the {what} cannot be used: " + "; ".join(lines))


def _keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted names of all fields of a model and of the sections in it."""
    names = []
    for name, field in model.model_fields.items():
        names.append(prefix + name)
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                names += _keys(kind, f"{prefix}{name}.")
    return names


def digest_of(value: Any) -> str:
    """SHA-256 (hex) of the canonical JSON of plain data: sorted keys, no spaces."""
    return digest_of_bytes([json.dumps(value, sort_keys=True, separators=(",", ":")).encode()])


def digest_of_bytes(parts: Iterable[bytes]) -> str:
    """SHA-256 (hex) of the parts one after the other."""
    h = hashlib.sha256()
    for part in parts:
        h.update(part)
    return h.hexdigest()
