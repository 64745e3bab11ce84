"""One worker of a training, without engines: what it leaves behind, interrupted or not."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from tests.files import file_of
from vnet_core import geometry as geo
from vnet_core.errors import TrainingError
from vnet_core.geometry import Geometry
from vnet_core.plan import Plan
from vnet_core.sections import Cleaning
from workers.storage.arrays import write_arrays
from workers.storage.store import Root
from workers.training.loop import BAD_STEPS, Seat, Turn, Worker
from workers.training.run import Budget, Run, TrainingProgress, together
from workers.training.seats import ALONE, fit_alone

GRID = Geometry((12, 12, 12), (2.0, 1.0, 1.0), (0.0, 0.0, 0.0), ((0, 0, 1), (0, 1, 0), (1, 0, 0)))
SEAT = Seat(ALONE, torch.device("cpu"), lambda network: network)


def plan(network: dict | None = None, **training) -> Plan:
    return Plan.from_mapping(
        {
            "labels": [{"value": 2, "name": "ball"}],
            "preprocess": {"spacing_mm": [2.0, 1.0, 1.0]},
            "network": {
                "kernel_size": 3,
                "width": 2,
                "convolutions": [1, 1],
                "normalisation": "batch",
                **(network or {}),
            },
            "training": {"patch_size": [8, 8, 8], "batch_size": 2, "precision": "float32", **training},
            "inference": {"precision": "float32"},
        }
    )


@pytest.fixture
def root(tmp_path: Path) -> Root:
    """Four volumes with a bright ball each, and one that holds nothing finite."""
    root = Root(str(tmp_path))
    generator = np.random.default_rng(0)
    z, y, x = np.indices(GRID.shape)
    for case in "abcd":
        centre = generator.uniform(4, 8, 3)
        ball = (z - centre[0]) ** 2 + (y - centre[1]) ** 2 + (x - centre[2]) ** 2 < 9
        image = (generator.standard_normal(GRID.shape) + 3 * ball).astype(np.float32)
        write(root, case, image, np.where(ball, 2, 0).astype(np.uint8))
    write(root, "bad", np.full(GRID.shape, np.nan, np.float32), np.zeros(GRID.shape, np.uint8))
    return root


def write(root: Root, case: str, image: np.ndarray, label: np.ndarray) -> None:
    key = f"volumes/{case}"
    write_arrays(root, key, {"image": image[None], "label": label}, {"geometry": geo.to_mapping(GRID)})
    root.seal(key, {"stage": "preprocess", "geometry": geo.to_mapping(GRID)})


def run_of(root: Root, name: str, of: Plan, training: str = "abc", validation: str = "d", **fields) -> Run:
    return Run(
        root.url,
        f"training/{name}/v1",
        of.model_dump(mode="json"),
        {case: f"volumes/{case}" for case in training.split(",") for case in (list(case) if case != "bad" else [case])},
        {case: f"volumes/{case}" for case in validation},
        fields.pop("budget", asdict(Budget(steps=10))),
        [1000, 50],
        **fields,
    )


def weights(root: Root, run: Run) -> dict[str, torch.Tensor]:
    return safetensors.torch.load(root.get(f"{run.fitted}/weights.safetensors"))


class Interrupted(Worker):
    """Dies at step 5, after the checkpoint of step 4."""

    def _decide(self, seconds: float, checkpointed: float) -> Turn:
        if self.state.step == 5:
            raise KeyboardInterrupt
        return super()._decide(seconds, checkpointed)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optimiser": "adam", "accumulate": 2},
        {"optimiser": "nadam", "schedule": "polynomial", "network": {"dropout": 0.5, "noise": 0.1}},
        {"optimiser": "rmsprop", "momentum": 0.5, "learning_rate": 1e-4, "schedule": "step"},
        {"optimiser": "sgd", "average_decay": 0.0, "publish": "best"},
    ],
    ids=lambda settings: settings.get("optimiser", "adamw"),
)
@pytest.mark.fault("F27")
def test_an_interrupted_training_ends_bit_for_bit_as_one_that_was_not(root, settings):
    whole, cut = run_of(root, "whole", plan(**settings)), run_of(root, "cut", plan(**settings))
    fit_alone(asdict(whole))
    with pytest.raises(KeyboardInterrupt):
        Interrupted(root, cut, SEAT).fit()
    assert root.receipt(cut.fitted) is None
    fit_alone(asdict(cut))
    first, second = weights(root, whole), weights(root, cut)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    facts = [root.get_json(f"{run.fitted}/facts.json") for run in (whole, cut)]
    assert [row[1:] for row in facts[0]["dice"]] == [row[1:] for row in facts[1]["dice"]]
    assert facts[0]["case_dice"] == facts[1]["case_dice"]
    assert facts[0]["steps"] == facts[1]["steps"] == 10


@pytest.mark.fault("F27")
def test_a_damaged_checkpoint_is_passed_over(root):
    run = run_of(root, "cut", plan())
    with pytest.raises(KeyboardInterrupt):
        Interrupted(root, run, SEAT).fit()
    newest = root.names(f"{run.prefix}/checkpoints")[-1]
    state = file_of(root, f"{run.prefix}/checkpoints/{newest}/state.safetensors")
    state.write_bytes(state.read_bytes()[:-1])
    assert Worker(root, run, SEAT).state.step == int(newest) - 1


def test_it_learns_and_the_best_weights_are_kept_beside_the_last(root):
    run = run_of(root, "learns", plan(learning_rate=0.02), budget=asdict(Budget(steps=80)))
    fit_alone(asdict(run))
    facts = root.get_json(f"{run.fitted}/facts.json")
    scores = [row[1] for row in facts["dice"]]
    assert len(scores) == 10
    assert scores[-1] > 0.7
    assert facts["best_dice"] == pytest.approx(max(scores))
    assert facts["case_dice"]["d"] == [pytest.approx(scores[-1])]
    best = run_of(root, "best", plan(learning_rate=0.02, publish="best"), budget=asdict(Budget(steps=80)))
    fit_alone(asdict(best))
    assert scores.index(max(scores)) == 9 or any(
        not torch.equal(value, weights(root, best)[name]) for name, value in weights(root, run).items()
    )


@pytest.mark.fault("F26")
def test_steps_that_are_not_finite_end_the_training_and_leave_good_weights(root):
    run = run_of(root, "bad", plan(foreground_fraction=0.0), training="bad", budget=asdict(Budget(steps=100)))
    with pytest.raises(TrainingError, match=f"{BAD_STEPS} steps in a row") as caught:
        fit_alone(asdict(run))
    assert caught.value.code == "train.diverged"
    assert root.get_json(f"{run.prefix}/error.json")["code"] == "train.diverged"
    again = Worker(root, run, SEAT)
    assert again.state.step == BAD_STEPS
    assert all(torch.isfinite(value).all() for value in again.network.state_dict().values())


@pytest.mark.fault("F26")
def test_one_bad_volume_among_good_ones_is_survived(root):
    run = run_of(root, "mixed", plan(), training="abc,bad", budget=asdict(Budget(steps=12)))
    fit_alone(asdict(run))
    assert all(torch.isfinite(value).all() for value in weights(root, run).values())


def test_without_validation_cases_there_is_no_curve(root):
    run = run_of(root, "blind", plan(validation_fraction=0.0), validation="")
    fit_alone(asdict(run))
    facts = root.get_json(f"{run.fitted}/facts.json")
    assert (facts["dice"], facts["best_dice"], facts["case_dice"]) == ([], None, {})


def test_candidates_for_cleaning_are_scored_on_validation_cases_alone(root):
    candidates = [Cleaning(label=2), Cleaning(label=2, keep="largest")]
    run = run_of(root, "fold", plan(), candidates=[c.model_dump(mode="json") for c in candidates])
    fit_alone(asdict(run))
    scores = root.get_json(f"{run.fitted}/facts.json")["cleaning_scores"]
    assert list(scores) == ["d"]
    assert len(scores["d"]) == 2
    assert all(0 <= score <= 1 for score in scores["d"])


def test_minutes_end_a_training_too(root):
    run = run_of(root, "minutes", plan(), budget=asdict(Budget(minutes=0.02)))
    fit_alone(asdict(run))
    facts = root.get_json(f"{run.fitted}/facts.json")
    assert 0.02 <= facts["minutes"] < 0.5
    assert facts["steps"] > 0


def test_figures_of_folds_together():
    parts = [TrainingProgress(4, 0.5, 1.0, 0.1, 3.0, 0.5), TrainingProgress(2, 0.25, 2.0, 0.3, 9.0, None)]
    assert together(parts, 2) == TrainingProgress(6, 0.375, 1.5, 0.3, 9.0, 0.5, workers=2)
    assert together(parts[:1], 4).share == 0.125
    assert json.dumps(asdict(together(parts, 2)))
