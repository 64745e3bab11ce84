"""Plans: what is refused and how it is said, and digests that change with every value."""

import json
import re
import tomllib

import pytest
from pydantic import BaseModel

from vnet_core.errors import ConfigError
from vnet_core.plan import Plan, digest_of, digest_of_bytes
from vnet_core.sections import NetworkPlan

LABELS = [{"value": 1, "name": "liver"}, {"value": 3, "name": "tumour"}]
SMALLEST = {"labels": LABELS}


def refused(**change) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        Plan.from_mapping({**SMALLEST, **change})
    return caught.value


# --- what is accepted


def test_the_smallest_plan_is_the_published_network():
    plan = Plan.from_mapping(SMALLEST)
    assert (plan.network.kernel_size, plan.network.width, plan.network.convolutions) == (5, 16, (1, 2, 3, 3, 3))
    assert (plan.network.levels, plan.network.divisor, plan.classes) == (5, 16, 3)


def test_toml_gives_the_same_plan_as_json():
    text = """
    channels = ["CT"]
    labels = [{value = 1, name = "liver"}, {value = 3, name = "tumour"}]
    [preprocess]
    spacing_mm = [2, 1, 1]
    intensity = "window"
    window = [-160, 240]
    """
    plan = Plan.from_mapping(tomllib.loads(text))
    assert plan == Plan.from_mapping(json.loads(plan.model_dump_json()))
    assert plan == Plan.from_mapping(json.loads(json.dumps(plan.model_dump(mode="json"))))
    assert plan.preprocess.spacing_mm == (2.0, 1.0, 1.0)


def test_a_plan_cannot_be_changed():
    plan = Plan.from_mapping(SMALLEST)
    with pytest.raises(ValueError, match="frozen"):
        plan.training.seed = 1


@pytest.mark.parametrize(("levels", "divisor"), [(2, 2), (3, 4), (7, 64)])
def test_every_level_halves_the_grid(levels, divisor):
    assert NetworkPlan(convolutions=(1,) * levels).divisor == divisor


# --- what is refused


@pytest.mark.parametrize(
    ("change", "near"),
    [
        ({"chanels": ["CT"]}, "channels"),
        ({"training": {"learning_rat": 0.1}}, "training.learning_rate"),
        ({"training": {"batchsize": 4}}, "training.batch_size"),
        ({"patch_size": [64, 64, 64]}, "training.patch_size"),
        ({"preprocess": {"spacing": [1, 1, 1]}}, "preprocess.spacing_mm"),
        ({"network": {"kernel": 3}}, "network.kernel_size"),
        ({"inference": {"overlapp": 0.5}}, "inference.overlap"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(change, near):
    error = refused(**change)
    assert error.code == "plan.unknown-key"
    assert f"the nearest is {near}" in str(error)


def test_an_unknown_key_of_a_label_names_the_label_s_key():
    error = refused(labels=[{"value": 1, "name": "liver", "nam": "liver"}])
    assert error.code == "plan.unknown-key"
    assert "labels.0.nam is not a key of the plan" in str(error)
    assert re.search(r"the nearest is [a-z0-9.]*name\b", str(error)), str(error)


@pytest.mark.parametrize(
    ("patch", "axis", "sizes"),
    [([90, 96, 96], "z", "use 80 or 96"), ([96, 8, 96], "y", "use 16 "), ([16, 16, 17], "x", "use 16 or 32")],
)
def test_a_patch_that_is_no_multiple_says_which_sizes_work(patch, axis, sizes):
    error = refused(training={"patch_size": patch})
    assert error.code == "plan.value"
    assert f"not a multiple of 16 along {axis}" in str(error)
    assert sizes in str(error)
    assert "5 levels" in str(error)


def test_the_sizes_that_a_message_names_do_work():
    for size in (80, 96):
        Plan.from_mapping({**SMALLEST, "training": {"patch_size": [size, 96, 96]}})
    fewer = {"convolutions": [1, 1], "kernel_size": 3}
    Plan.from_mapping({**SMALLEST, "network": fewer, "training": {"patch_size": [90, 96, 98]}})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"preprocess": {"spacing_mm": [1, 0, 1]}}, ["preprocess.spacing_mm.1", "(got 0)"]),
        ({"preprocess": {"spacing_mm": [1, 1]}}, ["preprocess.spacing_mm"]),
        ({"preprocess": {"window": [100, -100]}}, ["(100.0, -100.0)", "swap"]),
        ({"preprocess": {"intensity": "minmax"}}, ["preprocess.intensity", "'minmax'", "zscore"]),
        ({"network": {"kernel_size": 4}}, ["network.kernel_size", "(got 4)"]),
        ({"network": {"convolutions": [1]}}, ["1 levels", "2 to 7"]),
        ({"network": {"convolutions": [1, 0]}}, ["network.convolutions.1", "(got 0)"]),
        ({"training": {"batch_size": 0}}, ["training.batch_size", "(got 0)"]),
        ({"training": {"learning_rate": "fast"}}, ["training.learning_rate", "'fast'"]),
        ({"training": {"augmentation": {"flip_axes": [3]}}}, ["training.augmentation.flip_axes.0", "(got 3)"]),
        ({"training": {"loss": {"terms": {}}}}, ["training.loss.terms"]),
        ({"training": {"loss": {"terms": {"dise": 1}}}}, ["training.loss.terms", "dice"]),
        ({"network": {"preset": "papper"}}, ["'papper'", "use one of paper, caffe"]),
        ({"network": {"decoder_convolutions": [1, 2]}}, ["names 2 stages", "has 4"]),
        ({"regions": [{"name": "a", "values": [1], "paints": 1}]}, ["1 regions", 'head = "sigmoid"']),
        ({"head": "sigmoid", "regions": [{"name": "a", "values": [1, 2], "paints": 1}]}, ["[2]", "[1, 3]"]),
        ({"ignore_label": 3}, ["ignore_label 3", "[1, 3]"]),
        ({"labels": []}, ["labels"]),
        ({"labels": [{"value": 0, "name": "air"}]}, ["labels.0.value", "(got 0)"]),
        ({"labels": [{"value": 1}]}, ["labels.0.name"]),
        ({"labels": LABELS[::-1]}, ["[3, 1]", "ascending"]),
        ({"labels": [LABELS[0], LABELS[0]]}, ["[1, 1]"]),
        ({"channels": []}, ["channels"]),
        ({"inference": {"cleaning": [{"label": 1}, {"label": 2}]}}, ["[2]", "[1, 3]"]),
        ({"inference": {"overlap": 1.0}}, ["inference.overlap", "(got 1.0)"]),
        ({"output": {"values": {"spleen": 1}}}, ["['spleen']", LABELS[0]["name"]]),
        ({"output": {"values": {label["name"]: 0 for label in LABELS}}}, ["leaves out all 2 labels"]),
        ({"reading": {"select": [{"channel": "T1"}]}}, ["['T1']", "['image']"]),
        ({"reading": {"select": [{"channel": "image"}] * 2}}, ["['image', 'image']"]),
    ],
)
def test_a_value_that_cannot_work_is_named_with_what_was_given(change, words):
    error = refused(**change)
    assert error.code == "plan.value"
    assert all(word in str(error) for word in words), str(error)


def test_all_problems_are_told_at_once():
    error = refused(training={"batch_size": 0, "learning_rat": 1}, network={"kernel_size": 4})
    assert all(word in str(error) for word in ("batch_size", "learning_rat", "kernel_size"))
    assert error.code == "plan.unknown-key"


@pytest.mark.parametrize(
    "change",
    [
        {"preprocess": {"spacing_mm": [1.0, float("inf"), 1.0]}},
        {"preprocess": {"spacing_mm": [1.0, float("nan"), 1.0]}},
        {"preprocess": {"window": [float("-inf"), 0.0]}},
        {"training": {"learning_rate": float("inf")}},
    ],
)
def test_infinity_is_no_value(change):
    """TOML can write inf and nan."""
    assert refused(**change).code == "plan.value"


# --- digests

OTHER_VALUES = [
    {"channels": ["CT"]},
    {"labels": LABELS[:1]},
    {"labels": [LABELS[0], {"value": 3, "name": "lesion"}]},
    {"labels": [LABELS[0], {"value": 4, "name": "tumour"}]},
    {"head": "sigmoid"},
    {"regions": [{"name": "both", "values": [1, 3], "paints": 1}], "head": "sigmoid"},
    {"ignore_label": 255},
    {"other_labels": "background"},
    {"preprocess": {"spacing_mm": [1, 1, 1.001]}},
    {"preprocess": {"bias_field": "n4"}},
    {"preprocess": {"intensity": "window"}},
    {"preprocess": {"window": [-1000, 999]}},
    {"preprocess": {"mean": 1}},
    {"preprocess": {"deviation": 2}},
    {"preprocess": {"interpolation": "anisotropic"}},
    {"preprocess": {"label_interpolation": "nearest"}},
    {"preprocess": {"crop_foreground": False}},
    {"network": {"kernel_size": 3}},
    {"network": {"width": 8}},
    {"network": {"convolutions": [1, 2, 3, 3, 2]}},
    {"network": {"decoder_convolutions": [1, 2, 3, 2]}},
    {"network": {"activation": "elu"}},
    {"network": {"normalisation": "instance"}},
    {"network": {"residual": "activated"}},
    {"network": {"entry": "expanded"}},
    {"network": {"decoder": "narrow"}},
    {"network": {"downsampling": "maximum"}},
    {"network": {"upsampling": "linear"}},
    {"network": {"head_kernel_size": 5}},
    {"network": {"dropout": 0.5}},
    {"network": {"dropout_at": "activations"}},
    {"network": {"noise": 0.1}},
    {"network": {"deep_supervision": "auxiliary"}},
    {"network": {"initialisation": "kaiming"}},
    {"training": {"patch_size": [64, 64, 80]}},
    {"training": {"batch_size": 2}},
    {"training": {"accumulate": 2}},
    {"training": {"loss": {"terms": {"dice": 1}}}},
    {"training": {"loss": {"dice_over": "sample"}}},
    {"training": {"loss": {"smoothing": 1}}},
    {"training": {"loss": {"class_weights": "balance"}}},
    {"training": {"loss": {"weighted_mean": "voxels"}}},
    {"training": {"loss": {"absent_classes": "maximum"}}},
    {"training": {"loss": {"focal_gamma": 1}}},
    {"training": {"loss": {"focal_alpha": 0.25}}},
    {"training": {"loss": {"warmup_fraction": 0.1}}},
    {"training": {"augmentation": {"probability": 0.8}}},
    {"training": {"augmentation": {"flip_axes": []}}},
    {"training": {"augmentation": {"shift_voxels": 0}}},
    {"training": {"augmentation": {"rotation_degrees": 0}}},
    {"training": {"augmentation": {"scaling": 0}}},
    {"training": {"augmentation": {"bspline_voxels": 15}}},
    {"training": {"augmentation": {"bspline_points": [3, 2, 2]}}},
    {"training": {"augmentation": {"bspline_axes": [1, 2]}}},
    {"training": {"augmentation": {"elastic_voxels": 2}}},
    {"training": {"augmentation": {"elastic_smoothness_voxels": 4}}},
    {"training": {"augmentation": {"histogram_matching": 0.5}}},
    {"training": {"augmentation": {"contrast": 0}}},
    {"training": {"augmentation": {"brightness": 0}}},
    {"training": {"augmentation": {"gamma": 0.2}}},
    {"training": {"augmentation": {"noise": 0}}},
    {"training": {"augmentation": {"blur_voxels": 1}}},
    {"training": {"augmentation": {"low_resolution": 0.5}}},
    {"training": {"optimiser": "sgd"}},
    {"training": {"momentum": 0.9}},
    {"training": {"learning_rate": 1e-3}},
    {"training": {"weight_decay": 0}},
    {"training": {"schedule": "constant"}},
    {"training": {"step_fractions": [0.5]}},
    {"training": {"warmup_fraction": 0}},
    {"training": {"gradient_clip": 2}},
    {"training": {"precision": "float32"}},
    {"training": {"foreground_fraction": 0.4}},
    {"training": {"average_decay": 0}},
    {"training": {"publish": "best"}},
    {"training": {"validation_fraction": 0.2}},
    {"training": {"full_validation_every": 100}},
    {"training": {"seed": 1}},
    {"inference": {"memory_limit_gib": 7}},
    {"inference": {"overlap": 0.5}},
    {"inference": {"precision": "float32"}},
    {"inference": {"mirror_axes": [2]}},
    {"inference": {"cleaning": [{"label": 1, "keep": "largest"}]}},
    {"labels": [{**LABELS[0], "code": "SCT:10200004:Liver"}, LABELS[1]]},
    {"reading": {"gantry_tilt": "correct"}},
    {"reading": {"sheared_axes": "resample"}},
    {"reading": {"channel_grids": "resample"}},
    {"reading": {"nifti_transform": "sform"}},
    {"reading": {"select": [{"channel": "image", "modality": "CT"}]}},
    {"output": {"values": {LABELS[0]["name"]: 9}}},
]


def leaves(model: type[BaseModel], prefix: str = "") -> set[str]:
    """Dotted names of all keys of a section and of those in it."""
    names = set()
    for name, field in model.model_fields.items():
        kind = field.annotation
        nested = isinstance(kind, type) and issubclass(kind, BaseModel)
        names |= leaves(kind, f"{prefix}{name}.") if nested else {prefix + name}
    return names


def changed(change: dict, model: type[BaseModel] = Plan) -> str:
    """The dotted name of the first key of a change."""
    key, value = next(iter(change.items()))
    kind = model.model_fields[key].annotation
    return f"{key}.{changed(value, kind)}" if isinstance(kind, type) and issubclass(kind, BaseModel) else key


def test_every_value_changes_the_digest_and_the_list_above_names_them_all():
    digests = [Plan.from_mapping({**SMALLEST, **change}).digest for change in ({}, *OTHER_VALUES)]
    assert len(set(digests)) == len(OTHER_VALUES) + 1
    assert {changed(change) for change in OTHER_VALUES} == leaves(Plan)


def test_the_digest_is_that_of_the_values_not_of_their_spelling():
    plan = Plan.from_mapping(SMALLEST)
    spelled = Plan.from_mapping({"training": {"batch_size": 4}, "preprocess": {"spacing_mm": [1, 1, 1]}, **SMALLEST})
    assert plan.digest == spelled.digest
    assert plan.digest == Plan.from_mapping(json.loads(plan.model_dump_json())).digest
    assert len(plan.digest) == 64


def test_a_volume_depends_on_preprocessing_and_the_number_of_channels_alone():
    base = Plan.from_mapping(SMALLEST).volume_digest
    for change in OTHER_VALUES:
        other = Plan.from_mapping({**SMALLEST, **change}).volume_digest
        assert (other != base) == ("preprocess" in change), change
    assert Plan.from_mapping({**SMALLEST, "channels": ["T1", "T2"]}).volume_digest != base


def test_digests_by_another_way():
    """The SHA-256 of two bytes and of three, as `printf '{}' | sha256sum` prints them."""
    assert digest_of({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    assert digest_of({"b": 1, "a": [2.5]}) == digest_of_bytes([b'{"a":[2.5],', b'"b":1}'])
    assert digest_of_bytes([b"a", b"bc"]) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
