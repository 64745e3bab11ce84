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
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vnet_core.errors import ConfigError

PositiveTriple = tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]
VoxelTriple = tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]


PREPROCESSING_VERSION = 1
"""Raised whenever the program's preprocessing gives other numbers for the same plan; part of every volume's key."""


class Section(BaseModel):
    """A frozen part of a plan; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class Label(Section):
    """One structure to segment."""

    value: int = Field(ge=1, le=65535)
    """Its value in label maps; 0 is always background."""
    name: str = Field(min_length=1)
    """Its name in tables and pictures."""


class PreprocessPlan(Section):
    """From a scan's own grid to the network's grid."""

    spacing_mm: PositiveTriple = (1.0, 1.0, 1.0)
    """Target spacing (z, y, x)."""
    intensity: Literal["zscore", "window"] = "zscore"
    """`zscore`: subtract the mean and divide by the standard deviation of the voxels above the volume's minimum.
    `window`: clip to `window` and scale it to -1 .. 1 (CT, in Hounsfield units)."""
    window: tuple[float, float] = (-1000.0, 1000.0)
    """Lower and upper end of the intensity window; used by `window` only."""
    crop_foreground: bool = True
    """Cut away the border in which every channel stays at its minimum."""

    @model_validator(mode="after")
    def _window_ascends(self) -> PreprocessPlan:
        if self.window[0] >= self.window[1]:
            raise ValueError(f"window {self.window} must ascend; swap its ends")
        return self


class NetworkPlan(Section):
    """A V-Net (Milletari, Navab and Ahmadi 2016); the defaults are the published network."""

    kernel_size: Literal[3, 5] = 5
    """Edge of the convolutions; 5 as published, 3 for speed."""
    width: int = Field(default=16, ge=1, le=256)
    """Channels at full resolution; doubled at every level."""
    convolutions: tuple[Annotated[int, Field(ge=1, le=8)], ...] = (1, 2, 3, 3, 3)
    """Convolutions per stage from full resolution to the bottom; its length is the number of levels."""
    normalisation: Literal["none", "batch", "instance", "group"] = "none"
    """Layer after every convolution; none as published."""

    @model_validator(mode="after")
    def _levels(self) -> NetworkPlan:
        if not 2 <= len(self.convolutions) <= 7:
            raise ValueError(f"convolutions names {len(self.convolutions)} levels; use 2 to 7")
        return self

    @property
    def levels(self) -> int:
        """Number of resolutions, the bottom included."""
        return len(self.convolutions)

    @property
    def divisor(self) -> int:
        """Every input axis is padded to a multiple of this many voxels."""
        return 2 ** (self.levels - 1)


class TrainingPlan(Section):
    """How the network is fitted."""

    patch_size: VoxelTriple = (64, 64, 64)
    """Voxels (z, y, x) of one training sample; multiples of 2^(levels - 1)."""
    batch_size: int = Field(default=4, ge=1)
    """Samples per step over all workers together."""
    loss: Literal["dice", "dice+cross-entropy"] = "dice+cross-entropy"
    """`dice`: 1 - soft Dice, squared denominator, as published. `dice+cross-entropy`: its sum with cross-entropy."""
    optimiser: Literal["adamw", "sgd"] = "adamw"
    """`sgd` has Nesterov momentum 0.99."""
    learning_rate: float = Field(default=3e-3, gt=0)
    """Peak of the schedule."""
    weight_decay: float = Field(default=1e-4, ge=0)
    """Decoupled for adamw."""
    schedule: Literal["cosine", "polynomial", "constant"] = "cosine"
    """Fall of the learning rate over the budget, after the warm-up; polynomial has power 0.9."""
    warmup_fraction: float = Field(default=0.03, ge=0, le=0.5)
    """Share of the budget in which the learning rate rises linearly from 0."""
    gradient_clip: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient over all parameters."""
    foreground_fraction: float = Field(default=0.5, ge=0, le=1)
    """Share of samples centred on a labelled voxel; the rest are uniform."""
    flip_axes: tuple[Literal[0, 1, 2], ...] = (2,)
    """Axes (0 z, 1 y, 2 x) mirrored with probability 0.5. Leave out an axis whose two sides have different labels."""
    shift_voxels: int = Field(default=4, ge=0)
    """Largest random shift of the patch along each axis."""
    rotation_degrees: float = Field(default=5.0, ge=0, le=180)
    """Largest random rotation about each axis; 0 turns it off."""
    scaling: float = Field(default=0.05, ge=0, lt=1)
    """Random zoom of the whole patch between 1 - scaling and 1 + scaling; 0 turns it off."""
    intensity: float = Field(default=0.1, ge=0, lt=1)
    """Random contrast between 1 - intensity and 1 + intensity, random brightness and noise of up to half that, on the
    normalised intensities; 0 turns it off."""
    average_decay: float = Field(default=0.99, ge=0, lt=1)
    """Decay per step of the running average of the weights that becomes the model; 0 turns it off."""
    validation_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of the cases kept out of training for the Dice curve, by a seeded draw over patients."""
    seed: int = Field(default=0, ge=0)
    """Seed of the initial weights, the split and every sample."""


class InferencePlan(Section):
    """How a mask is made from a preprocessed volume."""

    memory_limit_gib: float = Field(default=6.0, gt=0)
    """A volume goes through in one pass when its predicted peak is below this, else in tiles. It is part of the plan
    so that the same plan gives the same mask on a machine with more memory."""
    overlap: float = Field(default=0.25, ge=0, lt=1)
    """Overlap of neighbouring tiles, as a share of the tile's edge."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """Arithmetic of the network; `auto` is bfloat16 where the processor computes in it, else float32."""
    largest_component: tuple[int, ...] = ()
    """Label values of which only the largest connected component (26 neighbours) is kept."""


class Plan(Section):
    """Everything that decides numbers, from the scan to the mask."""

    channels: tuple[str, ...] = Field(default=("image",), min_length=1)
    """Names of the input channels, in order."""
    labels: tuple[Label, ...] = Field(min_length=1)
    """Structures to segment, in ascending order of value."""
    preprocess: PreprocessPlan = PreprocessPlan()
    network: NetworkPlan = NetworkPlan()
    training: TrainingPlan = TrainingPlan()
    inference: InferencePlan = InferencePlan()

    @model_validator(mode="after")
    def _consistent(self) -> Plan:
        values = [label.value for label in self.labels]
        if values != sorted(set(values)):
            raise ValueError(f"labels have values {values}; give each a value of its own, in ascending order")
        unknown = set(self.inference.largest_component) - set(values)
        if unknown:
            raise ValueError(f"inference.largest_component names {sorted(unknown)}, the labels are {values}")
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
        """Outputs of the network: the labels and background."""
        return len(self.labels) + 1

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
