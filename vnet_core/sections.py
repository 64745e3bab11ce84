"""The sections of a plan: reading, preparation, network, loss, augmentation, training, inference, output. Frozen and
validated."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

PositiveTriple = tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]
VoxelTriple = tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]
Axes = tuple[Literal[0, 1, 2], ...]
Counts = tuple[Annotated[int, Field(ge=1, le=8)], ...]


class Section(BaseModel):
    """A frozen part of a plan; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class Selection(Section):
    """Which series of a study becomes a channel: one that fits every key given here."""

    channel: str = Field(min_length=1)
    """The channel that it becomes."""
    modality: str = ""
    """DICOM modality, such as CT, MR or PT; empty: any."""
    description: str = ""
    """Regular expression that is searched for in the series description, upper and lower case alike; empty: any."""
    kernel: str = ""
    """Regular expression that is searched for in the convolution kernel of a CT; empty: any."""
    orientation: Literal["any", "axial", "coronal", "sagittal"] = "any"
    """Plane of the slices, to the nearest axis of the body."""
    slice_spacing_mm: tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(gt=0)]] = (0.0, 1000.0)
    """Least and largest distance between slices."""
    prefer: Literal["only", "thinnest", "most-slices", "newest"] = "only"
    """Which of several that fit is taken. `only`: several are a reason to refuse the study."""


class ReadingPlan(Section):
    """How files become volumes, where a scan leaves a choice. The defaults change no voxel."""

    gantry_tilt: Literal["refuse", "correct"] = "refuse"
    """Slices displaced in their plane by a tilted gantry. `correct`: they are moved back, by linear interpolation, onto
    a grid with right angles, on which the mask lies too."""
    sheared_axes: Literal["refuse", "resample"] = "refuse"
    """Axes that do not stand at right angles. `resample`: linear interpolation onto the nearest grid that does, on
    which the mask lies too."""
    channel_grids: Literal["refuse", "resample"] = "refuse"
    """Channels of one frame of reference on different grids. `resample`: linear interpolation onto the first one's."""
    nifti_transform: Literal["agreeing", "sform", "qform"] = "agreeing"
    """Which transform of a NIfTI header counts. `agreeing`: the sform, and a header whose qform or second reader says
    otherwise is refused."""
    select: tuple[Selection, ...] = ()
    """Series chosen by rules, one rule per channel: a case is then a study. Empty: every series is a case."""

    @model_validator(mode="after")
    def _one_rule_per_channel(self) -> ReadingPlan:
        names = [rule.channel for rule in self.select]
        if len(set(names)) < len(names):
            raise ValueError(f"select names the channels {names}; give each channel one rule")
        return self


class OutputPlan(Section):
    """How label maps leave the program."""

    values: dict[str, Annotated[int, Field(ge=0, le=65535)]] = Field(default_factory=dict)
    """Value that a label is written with, by its name: two names with one value are merged, 0 leaves a label out.
    Labels that are not named keep the value of the plan. Volumes are reported per label of the plan."""


class PreprocessPlan(Section):
    """From a scan's own grid to the network's grid."""

    spacing_mm: PositiveTriple = (1.0, 1.0, 1.0)
    """Target spacing (z, y, x)."""
    bias_field: Literal["none", "n4"] = "none"
    """`n4`: divide by the slow intensity field that N4 finds (MR; Tustison et al. 2010)."""
    intensity: Literal["zscore", "window", "percentiles", "range"] = "zscore"
    """`zscore`: subtract the mean and divide by the standard deviation of the voxels above the volume's minimum.
    `window`: clip to `window` and scale it to -1 .. 1 (CT, in Hounsfield units). `percentiles`: clip to `window`,
    subtract `mean`, divide by `deviation`, three figures of the cohort's labelled voxels. `range`: the volume's
    smallest value becomes 0, its largest 1."""
    window: tuple[float, float] = (-1000.0, 1000.0)
    """Lower and upper end of the intensity window; used by `window` and `percentiles`."""
    mean: float = 0.0
    """Used by `percentiles`."""
    deviation: float = Field(default=1.0, gt=0)
    """Used by `percentiles`."""
    interpolation: Literal["linear", "anisotropic"] = "linear"
    """Of images. `anisotropic`: the nearest slice along an axis whose spacing is more than three times the finest,
    linear along the others."""
    label_interpolation: Literal["linear", "nearest"] = "linear"
    """Of label maps, never as numbers. `linear`: the label whose indicator, interpolated linearly, is largest."""
    crop_foreground: bool = True
    """Cut away the border in which every channel stays at its minimum."""

    @model_validator(mode="after")
    def _window_ascends(self) -> PreprocessPlan:
        if self.window[0] >= self.window[1]:
            raise ValueError(f"window {self.window} must ascend; swap its ends")
        return self


PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "paper": {},
        "caffe": {
            "convolutions": (1, 1, 2, 3, 3),
            "head_kernel_size": 5,
        },
        "vnet-pytorch": {
            "convolutions": (1, 1, 2, 3, 2),
            "decoder_convolutions": (1, 1, 2, 2),
            "normalisation": "batch",
            "residual": "activated",
            "head_kernel_size": 5,
            "dropout": 0.5,
            "initialisation": "kaiming",
        },
        "vnet-tf": {
            "activation": "relu",
            "entry": "expanded",
            "decoder": "narrow",
            "initialisation": "xavier-uniform",
        },
        "compact": {
            "kernel_size": 3,
            "width": 24,
            "convolutions": (1, 2, 2, 3),
            "activation": "relu",
            "normalisation": "batch",
            "residual": "projected",
            "decoder": "narrow",
            "downsampling": "maximum",
            "upsampling": "nearest",
            "deep_supervision": "aggregate",
            "initialisation": "kaiming",
        },
    }
)
"""Settings of the named networks that differ from the published V-Net's."""


class NetworkPlan(Section):
    """A network of the V-Net family; the defaults are the network of Milletari, Navab and Ahmadi (2016).

    `preset` names where the settings start from; every other key changes one of them.
    """

    kernel_size: Literal[3, 5] = 5
    """Edge of the convolutions; 5 as published, 3 for speed."""
    width: int = Field(default=16, ge=1, le=256)
    """Channels at full resolution; doubled at every level."""
    convolutions: Counts = (1, 2, 3, 3, 3)
    """Convolutions per stage from full resolution to the bottom; its length is the number of levels."""
    decoder_convolutions: Counts = ()
    """Convolutions per stage of the way up, from full resolution to the one above the bottom; empty: as on the way
    down."""
    activation: Literal["prelu", "elu", "relu", "leaky-relu"] = "prelu"
    """`prelu` has one slope per channel, as published."""
    normalisation: Literal["none", "batch", "instance", "group"] = "none"
    """Layer after every convolution; none as published."""
    residual: Literal["plain", "activated", "projected"] = "plain"
    """How what enters a stage is added. `plain`: to the last convolution, before its activation, as published.
    `activated`: after its activation, and activated again. `projected`: through a 1^3 convolution of its own, after
    the last activation."""
    entry: Literal["tiled", "expanded"] = "tiled"
    """How the image enters. `tiled`: the first convolution takes it, and it is added tiled to the stage's width.
    `expanded`: first brought to that width, one channel by tiling and several by a convolution."""
    decoder: Literal["concatenated", "narrow"] = "concatenated"
    """`concatenated`: stages of the way up are as wide as what comes up and the skip together, as published.
    `narrow`: their first convolution brings the two to the width of one, and only what came up is added."""
    downsampling: Literal["convolution", "maximum"] = "convolution"
    """Halves the grid: a 2^3 convolution with stride 2 as published, or the maximum of 2^3 voxels."""
    upsampling: Literal["transposed", "nearest", "linear"] = "transposed"
    """Doubles the grid: a 2^3 transposed convolution as published, or interpolation."""
    head_kernel_size: Literal[1, 3, 5] = 1
    """Above 1 a convolution of this edge to as many channels as outputs goes before the last 1^3 convolution."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability with which a channel is left out in training; 0 as published."""
    dropout_at: Literal["deep-and-skips", "activations"] = "deep-and-skips"
    """`deep-and-skips`: what enters the two deepest stages, what comes up from them, and every skip. `activations`:
    single values after every activation of a stage."""
    noise: float = Field(default=0.0, ge=0)
    """Standard deviation of Gaussian noise that is added to the image in training."""
    deep_supervision: Literal["none", "auxiliary", "aggregate"] = "none"
    """Outputs of the coarser stages of the way up. `auxiliary`: each has a loss of its own in training, with half the
    weight of the next finer one. `aggregate`: their features are brought to full resolution and join the head."""
    initialisation: Literal["msra-average", "msra-small-head", "kaiming", "xavier-uniform", "xavier-normal"] = (
        "msra-average"
    )
    """Distribution of the first weights. `msra-average` is that of the published code. `msra-small-head`: the same, but
    what gives logits starts with 0.3 of it, so that the first predictions favour no class by much."""

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or "preset" not in value:
            return value
        given = dict(value)
        name = given.pop("preset")
        if name not in PRESETS:
            raise ValueError(f"preset {name!r} is not known; use one of {', '.join(PRESETS)}")
        return {**PRESETS[name], **given}

    @model_validator(mode="after")
    def _levels(self) -> NetworkPlan:
        if not 2 <= len(self.convolutions) <= 7:
            raise ValueError(f"convolutions names {len(self.convolutions)} levels; use 2 to 7")
        if self.decoder_convolutions and len(self.decoder_convolutions) != self.levels - 1:
            raise ValueError(
                f"decoder_convolutions names {len(self.decoder_convolutions)} stages, a network of {self.levels}"
                f" levels has {self.levels - 1} on the way up"
            )
        return self

    @property
    def levels(self) -> int:
        """Number of resolutions, the bottom included."""
        return len(self.convolutions)

    @property
    def convolutions_up(self) -> Counts:
        """Convolutions per stage of the way up, from full resolution down."""
        return self.decoder_convolutions or self.convolutions[:-1]

    @property
    def divisor(self) -> int:
        """Every input axis is padded to a multiple of this many voxels."""
        return 2 ** (self.levels - 1)


LossTerm = Literal["dice", "linear-dice", "generalised-dice", "cross-entropy", "focal", "exponential-logarithmic"]
"""`dice` has squares in its denominator, as published; `linear-dice` has plain sums."""


class LossPlan(Section):
    """What training makes small: a weighted sum of terms."""

    terms: dict[LossTerm, Annotated[float, Field(gt=0)]] = Field(
        default={"dice": 1.0, "cross-entropy": 1.0}, min_length=1
    )
    """Weight of each term."""
    dice_over: Literal["sample", "batch"] = "batch"
    """Sums of the Dice terms run over each sample, or over the whole batch of all workers, which is steadier."""
    smoothing: float = Field(default=1e-5, gt=0)
    """Added to numerator and denominator of the Dice terms."""
    class_weights: Literal["none", "inverse-frequency", "balance", "square-root"] = "none"
    """Weights of the classes in cross-entropy and focal loss, from their voxels in the training set: in proportion to
    1 / f; to 1 - f; to the square root of 1 / f. Their mean is 1."""
    weighted_mean: Literal["weights", "voxels"] = "weights"
    """Weighted cross-entropy is divided by the sum of the weights, or by the number of voxels."""
    absent_classes: Literal["zero", "maximum"] = "zero"
    """Weight of a class that does not occur, in generalised Dice: 0, or the largest of the others."""
    focal_gamma: float = Field(default=2.0, ge=0)
    """Exponent of the focal loss; 0 is cross-entropy."""
    focal_alpha: float | None = Field(default=None, gt=0, lt=1)
    """Weight of the foreground in the focal loss, background has 1 - alpha; none: both 1."""
    warmup_fraction: float = Field(default=0.0, ge=0, le=1)
    """Share of the budget over which the loss moves linearly from cross-entropy alone to the terms."""


class AugmentationPlan(Section):
    """Random changes of training samples. A strength of 0 turns a change off; each is applied with `probability`."""

    probability: float = Field(default=1.0, gt=0, le=1)
    """With which each change is applied to a sample."""
    flip_axes: Axes = (2,)
    """Axes (0 z, 1 y, 2 x) mirrored with probability 0.5. Leave out an axis whose two sides have different labels."""
    shift_voxels: int = Field(default=4, ge=0)
    """Largest random shift of the patch along each axis."""
    rotation_degrees: float = Field(default=5.0, ge=0, le=180)
    """Largest random rotation about each axis."""
    scaling: float = Field(default=0.05, ge=0, lt=1)
    """Random zoom of the whole patch between 1 - scaling and 1 + scaling."""
    bspline_voxels: float = Field(default=0.0, ge=0)
    """Standard deviation of the displacements of the control points of a cubic B-spline; the paper's is 15."""
    bspline_points: VoxelTriple = (2, 2, 2)
    """Control points (z, y, x) of that B-spline over the patch."""
    bspline_axes: Axes = (0, 1, 2)
    """Axes along which the control points move; the published code leaves out the one through the slices."""
    elastic_voxels: float = Field(default=0.0, ge=0)
    """Standard deviation of a smooth random displacement."""
    elastic_smoothness_voxels: float = Field(default=8.0, gt=0)
    """Standard deviation of the Gaussian that makes it smooth."""
    histogram_matching: float = Field(default=0.0, ge=0, le=1)
    """Probability with which a volume gets the intensity distribution of another training volume, as in the paper."""
    contrast: float = Field(default=0.1, ge=0, lt=1)
    """Random factor between 1 - contrast and 1 + contrast on the normalised intensities."""
    brightness: float = Field(default=0.05, ge=0)
    """Random offset between -brightness and +brightness."""
    gamma: float = Field(default=0.0, ge=0, lt=1)
    """Random exponent between 1 / (1 + gamma) and 1 + gamma on the intensities of the patch scaled to 0 .. 1."""
    noise: float = Field(default=0.05, ge=0)
    """Largest standard deviation of Gaussian noise."""
    blur_voxels: float = Field(default=0.0, ge=0)
    """Largest standard deviation of a Gaussian blur."""
    low_resolution: float = Field(default=0.0, ge=0, lt=1)
    """Random loss of resolution to between 1 - low_resolution and 1 of the voxels along each axis, brought back
    linearly."""


class TrainingPlan(Section):
    """How the network is fitted."""

    patch_size: VoxelTriple = (64, 64, 64)
    """Voxels (z, y, x) of one training sample; multiples of 2^(levels - 1)."""
    batch_size: int = Field(default=4, ge=1)
    """Samples per step over all workers together."""
    accumulate: int = Field(default=1, ge=1)
    """Batches whose gradients are averaged for one step of the optimiser."""
    loss: LossPlan = LossPlan()
    augmentation: AugmentationPlan = AugmentationPlan()
    optimiser: Literal["adamw", "adam", "nadam", "rmsprop", "sgd"] = "adamw"
    """`sgd` has Nesterov momentum."""
    momentum: float = Field(default=0.99, ge=0, lt=1)
    """Of `sgd` and `rmsprop`; 0.99 as published."""
    learning_rate: float = Field(default=3e-3, gt=0)
    """Peak of the schedule."""
    weight_decay: float = Field(default=1e-4, ge=0)
    """Spares biases, normalisations and slopes; decoupled for adamw and nadam."""
    schedule: Literal["cosine", "polynomial", "step", "constant"] = "cosine"
    """Fall of the learning rate over the budget, after the warm-up; polynomial has power 0.9; step divides by 10 at
    each of `step_fractions`."""
    step_fractions: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (5 / 6,)
    """Shares of the budget at which `step` divides; 5/6 is the paper's 25,000 of 30,000 iterations."""
    warmup_fraction: float = Field(default=0.03, ge=0, le=0.5)
    """Share of the budget in which the learning rate rises linearly from 0."""
    gradient_clip: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient over all parameters."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """Arithmetic of the forward pass; `auto` is bfloat16 where the processor computes in it, else float32."""
    foreground_fraction: float = Field(default=0.5, ge=0, le=1)
    """Share of samples centred on a labelled voxel; the rest are uniform."""
    average_decay: float = Field(default=0.99, ge=0, lt=1)
    """Decay per step of the running average of the weights that becomes the model; 0 turns it off."""
    publish: Literal["last", "best"] = "last"
    """Which averaged weights become the model: those at the end, or those with the best validation Dice so far, of
    all that were judged."""
    validation_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of the cases kept out of training for the Dice curve, by a seeded draw over patients."""
    full_validation_every: int = Field(default=0, ge=0)
    """Steps after which the weights of that moment are judged by the cases that do not train, beside the training,
    which goes on; 0: the training stops ten times and judges itself. Worth it where there is a GPU or a machine to
    spare; without one the judging slows the steps, or waits for their end."""
    seed: int = Field(default=0, ge=0)
    """Seed of the initial weights, the split and every sample."""


class Cleaning(Section):
    """What is done to one label's voxels in a mask."""

    label: int = Field(ge=1, le=65535)
    """Its value."""
    keep: Literal["all", "largest"] = "all"
    """`largest`: only the largest connected component (26 neighbours)."""
    minimum_ml: float = Field(default=0.0, ge=0)
    """Smaller components are removed."""
    holes: Literal["keep", "fill"] = "keep"
    """`fill`: background that the label encloses becomes the label."""


class InferencePlan(Section):
    """How a mask is made from a preprocessed volume."""

    memory_limit_gib: float = Field(default=6.0, gt=0)
    """A volume goes through in one pass when its predicted peak is below this, else in tiles, and in portions of the
    scan where what is held beside the pass would be more. It is part of the plan so that the same plan gives the same
    mask on a machine with more memory."""
    overlap: float = Field(default=0.25, ge=0, lt=1)
    """Overlap of neighbouring tiles, as a share of the tile's edge."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """Arithmetic of the network; `auto` is bfloat16 where the processor computes in it, else float32."""
    mirror_axes: Axes = ()
    """The mean is taken over all mirror images along these axes; each axis doubles the time."""
    cleaning: tuple[Cleaning, ...] = ()
    """What is done to the labels of a mask, in order."""
