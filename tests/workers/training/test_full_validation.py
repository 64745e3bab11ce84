"""Validations beside a training, without engines: snapshots, what is found, the best, and the pictures of the worst."""

from __future__ import annotations

import io
from dataclasses import asdict, replace

import pytest
import safetensors.torch
import torch
from PIL import Image

from tests.workers.ball_cohort import ball_entries, ball_plan
from workers.cohort import volume_key
from workers.registry.models import Target
from workers.storage.store import Root
from workers.training.bundle import publish_fitted
from workers.training.full_validation import validate
from workers.training.run import Budget, Run
from workers.training.seats import fit_alone
from workers.training.validations import (
    Validation,
    best,
    keep_the_best,
    means,
    note_failure,
    snapshot_weights,
    validations,
    waiting,
)

PLAN = ball_plan(full_validation_every=10, learning_rate=0.02, publish="best")


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Root, Run]:
    """A training of 40 steps whose snapshots nobody has judged yet; the pixels of case d may have text."""
    root = Root(tmp_path_factory.mktemp("full"))
    keys = {entry.case.id: volume_key(entry.case, PLAN) for entry in ball_entries(root, PLAN, "abcdef")}
    run = Run(
        root.url,
        "training/balls/v1",
        PLAN.model_dump(mode="json"),
        {case: keys[case] for case in "ab"},
        {case: keys[case] for case in "cdef"},
        asdict(Budget(steps=40)),
        [1000, 50],
        unshown=["d"],
    )
    fit_alone(asdict(run))
    root.put_json("training/balls/v1/training.json", {"runs": [run.prefix], "patients": {}})
    return root, run


def test_a_training_leaves_snapshots_and_judges_only_its_last_weights(fitted):
    root, run = fitted
    facts = root.get_json(f"{run.fitted}/facts.json")
    assert len(facts["dice"]) == 1
    assert sorted(facts["case_dice"]) == list("cdef")
    assert waiting(root, run) == [10, 20, 30]
    assert validations(root, run) == []


def test_a_snapshot_is_judged_by_whole_volumes_and_the_worst_are_shown(fitted):
    root, run = fitted
    validate(asdict(run), 20, 0)
    (found,) = validations(root, run)
    assert (found.step, found.failed) == (20, "")
    assert sorted(found.case_dice) == list("cdef")
    assert waiting(root, run) == [10, 30]
    lowest = sorted(found.case_dice, key=lambda case: (found.case_dice[case][0], case))[:3]
    assert [worst["case"] for worst in found.worst] == lowest
    for worst in found.worst:
        assert worst["dice"] == found.case_dice[worst["case"]][0]
        assert ("picture" in worst) == (worst["case"] != "d"), "no picture where text may be burnt in"
        if "picture" in worst:
            with Image.open(io.BytesIO(root.get(worst["picture"]))) as picture:
                assert picture.width > 400


def test_the_best_weights_become_the_model_and_the_others_go(fitted):
    root, run = fitted
    for step in waiting(root, run):
        validate(asdict(run), step, 0)
    keep_the_best(root, run)
    done = validations(root, run)
    assert [v.step for v in done] == [10, 20, 30]
    winner = best(done)
    assert winner is not None
    assert winner.score == max(v.score for v in done)
    assert [
        n for n in root.names(f"{run.prefix}/validations") if root.exists(f"{run.prefix}/validations/{n}/snapshot")
    ] == [f"{winner.step:09d}"]
    kept = snapshot_weights(root, run, winner.step)
    # were the last weights worse than all, the snapshot is what is published
    facts = root.get_json(f"{run.fitted}/facts.json")
    root.put_json(f"{run.fitted}/facts.json", facts | {"best_dice": winner.score - 0.01})
    model = publish_fitted(root, Target("balls", "v1", PLAN), [run])
    assert root.get(f"{model.prefix}/weights.safetensors") == kept
    assert model.facts["metrics"]["case_dice"] == {case: list(row) for case, row in winner.case_dice.items()}
    assert root.get(f"{model.prefix}/dice.csv").decode().count("\n") == 1 + 3 + 1


def test_a_snapshot_that_cannot_be_judged_says_why_and_is_not_waited_for(fitted):
    root, run = fitted
    other = replace(run, prefix="training/broken/v1", validation={"gone": "volumes/gone"})
    for step in (10, 20):
        key = f"{other.prefix}/validations/{step:09d}/snapshot"
        root.put(f"{key}/weights.safetensors", safetensors.torch.save({"a": torch.zeros(1)}))
        root.seal(key, {"stage": "train", "step": step, "minutes": 0.5})
    note_failure(root, other, 20, "WorkerCrashedError")
    assert [(v.step, v.failed, v.score) for v in validations(root, other)] == [(20, "WorkerCrashedError", -1.0)]
    assert waiting(root, other) == [10]
    assert best(validations(root, other)) is None


def test_means_are_over_cases_that_have_the_structure():
    assert means({"a": [0.5, None], "b": [0.7, 0.4]}) == [pytest.approx(0.6), 0.4]
    assert means({"a": [0.5, None]}) is None
    assert means({}) is None
    assert Validation(1, 0.1, {"a": [0.5, 0.9]}, []).score == pytest.approx(0.7)
