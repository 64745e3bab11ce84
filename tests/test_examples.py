"""Every recipe, from files in its own layout to steps of training: only the network and the patch are made smaller."""

import csv
import json
import math
import tomllib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from flows.plans import settled
from tests.walkthrough import REPOSITORY, fences
from vnet_core.fingerprint import total
from vnet_core.fitting import StepSettings, build_optimiser, train_step
from vnet_core.geometry import Geometry
from vnet_core.losses import build_loss
from vnet_core.networks.vnet import build_vnet
from vnet_core.phantoms import PhantomSpec, phantom
from vnet_core.plan import Label, Plan
from vnet_core.planning import Machine, derive_plan
from vnet_core.volume import Volume
from workers.cohort import Entry, load_entries, volume_key
from workers.ingest import Names, ingest
from workers.preprocess import preprocess_case
from workers.sources.annotations import COLUMNS, UNDECIDED, Gate, label_spheres
from workers.sources.datasets import CATALOGUE
from workers.sources.scans import write_label, write_volume
from workers.storage.store import Root
from workers.training.patches import Share, TrainingVolume, batch_of, load_volume

EXAMPLES = REPOSITORY / "examples"
CASES = 2
STEPS = 3


def recipe(name: str) -> dict[str, Any]:
    return tomllib.loads((EXAMPLES / f"{name}.toml").read_text(encoding="utf-8"))


# --- small cohorts of the recipes' nature


def body(seed: int) -> tuple[np.ndarray, np.ndarray, Geometry]:
    """Image int16 and labels 0, 1, 2 of a phantom of 40 mm."""
    image, label = phantom(PhantomSpec(seed, (20, 40, 40), (2.0, 1.0, 1.0), body_mm=17.0, organs=1, lesions=2))
    return image.labels, label.labels, image.geometry


def chest(seed: int) -> tuple[np.ndarray, np.ndarray, Geometry]:
    """Hounsfield units of two lungs with a nodule each and a trachea, and their mask with 3, 4 and 5."""
    geometry = Geometry((24, 40, 48), (2.5, 2.5, 2.5), (-60.0, -50.0, -200.0))
    z, y, x = np.indices(geometry.shape)
    voxels = np.random.default_rng(seed).normal(40, 20, geometry.shape)
    mask = np.zeros(geometry.shape, np.int16)
    for value, centre in ((3, 13), (4, 35)):
        mask[((z - 12) / 10) ** 2 + ((y - 20) / 14) ** 2 + ((x - centre) / 9) ** 2 < 1] = value
        voxels[mask == value] -= 890
        voxels[(z - 12) ** 2 + (y - 20) ** 2 + (x - centre) ** 2 < 4] = 30
    mask[(y - 20) ** 2 + (x - 24) ** 2 < 4] = 5
    voxels[mask == 5] = -1000
    return np.rint(voxels).astype(np.int16), mask, geometry


def write_mhd(path: Path, voxels: np.ndarray, geometry: Geometry, compressed: bool = False) -> None:
    """A header with its data beside it, as the challenges have them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing(geometry.spacing_mm[::-1])
    image.SetOrigin(geometry.origin_mm)
    sitk.WriteImage(image, str(path), compressed)


def hippocampus(folder: Path) -> list[str]:
    for seed in range(CASES):
        image, label, geometry = body(seed)
        for name in ("imagesTr", "labelsTr"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        write_volume(folder / f"imagesTr/hippocampus_{seed:03}.nii.gz", Volume(image[None], geometry))
        write_label(folder / f"labelsTr/hippocampus_{seed:03}.nii.gz", label, geometry)
    names = {"modality": {"0": "MRI"}, "labels": {"0": "background", "1": "Anterior", "2": "Posterior"}}
    (folder / "dataset.json").write_text(json.dumps(names))
    return [str(folder)]


def prostate(folder: Path) -> list[str]:
    for seed in range(CASES):
        image, label, geometry = body(seed)
        write_mhd(folder / f"Case0{seed}.mhd", image, geometry)
        write_mhd(folder / f"Case0{seed}_segmentation.mhd", (label > 0).astype(np.int8), geometry)
    return [str(folder)]


def lungs(folder: Path) -> list[str]:
    for seed in range(CASES):
        voxels, mask, geometry = chest(seed)
        write_mhd(folder / f"subset{seed}/1.3.6.1.{seed}.mhd", voxels, geometry)
        write_mhd(folder / f"seg-lungs-LUNA16/1.3.6.1.{seed}.mhd", mask, geometry, compressed=True)
    return [str(folder)]


def nodules(folder: Path) -> list[str]:
    lungs(folder / "luna")
    place_mm = {x: -60 + x * 2.5 for x in (3, 13, 35)}
    with (folder / "luna/annotations.csv").open("w", newline="") as file:
        rows = [(f"1.3.6.1.{seed}", x, -50 + 20 * 2.5, -200 + 12 * 2.5, 11) for seed in range(CASES) for x in place_mm]
        csv.writer(file).writerows([COLUMNS, *((s, place_mm[x], *rest) for s, x, *rest in rows)])
    gate = Gate(-600, folder / "luna/seg-lungs-LUNA16")
    label_spheres([str(folder / "luna")], folder / "luna/annotations.csv", folder / "labels", gate)
    return [str(folder / "labels/manifest.csv")]


def glioma(folder: Path) -> list[str]:
    for seed in range(CASES):
        image, label, geometry = body(seed)
        for name in ("images", "labels"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(4):
            voxels = (image // (number + 1) - number).astype(np.int16)
            write_volume(folder / f"images/g{seed}_000{number}.nii.gz", Volume(voxels[None], geometry))
        values = np.array([0, 2, 1], np.uint8)[label]
        values[(values == 1) & (np.indices(label.shape)[0] % 2 == 0)] = 4
        write_label(folder / f"labels/g{seed}.nii.gz", values, geometry)
    return [str(folder)]


@dataclass(frozen=True)
class Recipe:
    write: Callable[[Path], list[str]]
    """Writes a cohort in the layout of the recipe's data and returns the sources for ingest."""
    names: Names
    patch: tuple[int, int, int]
    """For the test; the recipe's own may be too large for it."""
    outputs: int


def named(*labels: tuple[int, str], channels: Sequence[str] = ()) -> Names:
    return Names(tuple(channels), tuple(Label(value=value, name=name) for value, name in labels))


RECIPES = {
    "hippocampus": Recipe(hippocampus, Names(), (40, 40, 40), 3),
    "prostate": Recipe(prostate, named((1, "prostate"), channels=["T2"]), (16, 32, 32), 2),
    "lungs": Recipe(lungs, named((3, "lung-3"), (4, "lung-4"), (5, "trachea"), channels=["CT"]), (16, 32, 48), 3),
    "nodules": Recipe(nodules, named((1, "nodule"), (UNDECIDED, "undecided"), channels=["CT"]), (32, 32, 32), 2),
    "glioma": Recipe(
        glioma,
        named((1, "necrosis"), (2, "oedema"), (4, "enhancing"), channels=["fla", "t1", "t1c", "t2"]),
        (32, 32, 32),
        3,
    ),
}


@dataclass(frozen=True)
class Prepared:
    """A recipe's cohort, its plan as the program would make it, and the same with a small network and patch."""

    plan: Plan
    small: Plan
    volumes: list[TrainingVolume]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Callable[[str], Prepared]:
    made: dict[str, Prepared] = {}

    def make(name: str) -> Prepared:
        if name not in made:
            made[name] = prepare(name, tmp_path_factory.mktemp(name))
        return made[name]

    return make


def prepare(name: str, folder: Path) -> Prepared:
    wanted, root = RECIPES[name], Root(folder / "root")
    sources = wanted.write(folder / "scans")
    with ThreadPoolExecutor(1) as executor:
        cohort, outcomes = ingest(root, name, sources, executor, wanted.names)
    assert [outcome.state for outcome in outcomes] == ["accepted"] * CASES, outcomes
    entries: list[Entry] = load_entries(root, name)
    fingerprint = total(entry.fingerprint for entry in entries if entry.fingerprint)
    base = derive_plan(fingerprint, cohort.channels, cohort.labels, Machine(20.0, 64.0)).plan
    plan = settled(base, recipe(name))
    small = settled(plan, {"network": {"width": 2}, "training": {"patch_size": wanted.patch, "precision": "float32"}})
    for entry in entries:
        assert preprocess_case(root.url, entry.case, small).state == "computed"
    return Prepared(plan, small, [load_volume(root, volume_key(e.case, small), small) for e in entries])


# --- what each recipe says


def test_every_recipe_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.toml")} - {"small", "published"} == set(RECIPES)


def test_the_prostates_recipe_is_the_papers(prepared):
    plan = prepared("prostate").plan
    paper = Plan.from_mapping({"labels": [{"value": 1, "name": "prostate"}]})
    assert plan.network == paper.network
    assert plan.preprocess.spacing_mm == (1.5, 1.0, 1.0)
    assert plan.preprocess.bias_field == "n4"
    training, change = plan.training, plan.training.augmentation
    assert (training.patch_size, training.batch_size) == ((64, 128, 128), 2)
    assert (training.optimiser, training.momentum, training.learning_rate) == ("sgd", 0.99, 1e-4)
    assert training.schedule == "step"
    assert [fraction * 30_000 for fraction in training.step_fractions] == pytest.approx([25_000])
    assert training.loss.terms == {"dice": 1.0}
    assert (change.bspline_voxels, change.bspline_points, change.histogram_matching) == (15.0, (2, 2, 2), 1.0)
    assert (change.rotation_degrees, change.scaling, change.flip_axes, change.noise) == (0.0, 0.0, (), 0.0)


def test_the_recipe_of_the_published_network_has_its_network_and_loss():
    plan = Plan.from_mapping({"labels": [{"value": 1, "name": "organ"}], **recipe("published")})
    assert plan.network == Plan.from_mapping({"labels": [{"value": 1, "name": "organ"}]}).network
    assert plan.training.loss.terms == {"dice": 1.0}


def test_the_lungs_are_labels_3_and_4_and_the_trachea_is_background(prepared):
    found = prepared("lungs")
    assert [label.value for label in found.plan.labels] == [3, 4]
    assert found.plan.preprocess.window == (-1000.0, 400.0)
    for volume in found.volumes:
        assert set(np.unique(volume.classes)) == {0, 1, 2}
        assert volume.image.min() >= -1
        assert volume.image.max() <= 1


def test_nodules_outside_the_lung_mask_take_no_part(prepared):
    """Of the three nodules of each phantom one is tissue beside the lung."""
    found = prepared("nodules")
    assert found.plan.ignore_label == UNDECIDED
    assert [label.name for label in found.plan.labels] == ["nodule"]
    for volume in found.volumes:
        assert np.unique(volume.classes).tolist() == [0, 1, found.plan.ignored_class]
        assert set(volume.foreground) == {1}


def test_gliomas_regions_overlap_and_paint_in_their_order(prepared):
    plan = prepared("glioma").plan
    assert plan.channels == ("fla", "t1", "t1c", "t2")
    assert plan.head == "sigmoid"
    assert [(region.name, region.values, region.paints) for region in plan.told_regions] == [
        ("whole", (1, 2, 4), 2),
        ("core", (1, 4), 1),
        ("enhancing", (4,), 4),
    ]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_on_a_small_cohort_of_its_nature(prepared, name):
    found, wanted = prepared(name), RECIPES[name]
    plan = found.small
    assert plan.outputs == wanted.outputs
    voxels = np.bincount(np.concatenate([v.classes.ravel() for v in found.volumes]), minlength=plan.classes)
    network = build_vnet(plan.network, len(plan.channels), plan.outputs)
    loss = build_loss(plan, voxels[: plan.classes].tolist())
    settings = StepSettings(loss, torch.float32, plan.training.gradient_clip)
    optimiser = build_optimiser(network, plan.training)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    for step in range(STEPS):
        batch = batch_of(found.volumes, plan, step, Share(0, 1))
        assert batch[0].shape == (plan.training.batch_size, len(plan.channels), *wanted.patch)
        assert math.isfinite(train_step(network, optimiser, [batch], step / STEPS, settings))
    assert any(not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


# --- docs/recipes.md


def test_the_page_of_recipes_has_the_commands_that_fetch_prints():
    page = REPOSITORY / "docs" / "recipes.md"
    written = [
        " ".join(line.split())
        for fence in fences(page)
        for line in fence.text.replace("\\\n", " ").splitlines()
        if line.startswith("vnet ")
    ]
    for name in ("msd-hippocampus", "promise12", "luna16"):
        assert f"vnet fetch {name}" in written
        for line in CATALOGUE[name].following:
            assert line.format(output=CATALOGUE[name].folder, path="") in written, f"{name}: {line}"


def test_the_page_names_every_recipe_and_every_data_set():
    text = (REPOSITORY / "docs" / "recipes.md").read_text(encoding="utf-8")
    for name in RECIPES:
        assert f"examples/{name}.toml" in text
    for name in CATALOGUE:
        assert name.partition("-subset")[0] in text
