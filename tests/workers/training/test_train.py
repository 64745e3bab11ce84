"""What a training refuses before an engine starts, and what its workers are told."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from vnet_core import geometry as geo
from vnet_core.errors import TrainingError, VnetError
from vnet_core.fingerprint import Fingerprint
from vnet_core.geometry import Geometry
from vnet_core.plan import Plan
from workers.cohort import Case, Entry, Verdict, volume_key
from workers.engines.clusters import Engines
from workers.storage.store import Root
from workers.training import train as stage
from workers.training.run import Budget
from workers.training.train import Training, train

GRID = Geometry((8, 8, 8), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), ((0, 0, 1), (0, 1, 0), (1, 0, 0)))


def plan(**change) -> Plan:
    labels = [{"value": 1, "name": "liver"}, {"value": 2, "name": "tumour"}]
    network = {"kernel_size": 3, "width": 2, "convolutions": [1, 1]}
    return Plan.from_mapping(
        {"labels": labels, "network": network, "training": {"patch_size": [8, 8, 8], "batch_size": 3}, **change}
    )


def entry(root: Root, name: str, of: Plan, values: dict[int, int], patient: str | None = None) -> Entry:
    """A preprocessed case whose label map has so many voxels of each value."""
    case = Case(name, (f"{name}.nii.gz",), f"{name}-label.nii.gz", patient, f"bytes of {name}", "label bytes", GRID)
    root.put(f"{volume_key(case, of)}/zarr.json", b"{}")
    root.seal(volume_key(case, of), {"geometry": geo.to_mapping(GRID)})
    found = Fingerprint(
        label_voxels=Counter(values),
        label_cases=Counter(dict.fromkeys(values, 1)),
        components=Counter({(value, -8): 1 for value in values if value}),
    )
    return Entry(case, Verdict("accepted"), found)


def refused(root: Root, entries: list[Entry], of: Plan, engines: Engines | None = None, folds: int = 1) -> VnetError:
    with pytest.raises(VnetError) as caught:
        train(root, Training("liver", entries, of, Budget(steps=1), folds), engines or Engines())
    return caught.value


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(tmp_path)


def test_nothing_preprocessed(root):
    entries = [Entry(Case("a", ("a.nii",), "b.nii", label_digest="x"), Verdict("accepted"))]
    error = refused(root, entries, plan())
    assert (error.code, type(error)) == ("train.no-labels", TrainingError)
    assert "1 cases, 1 with a usable label, 0 of them preprocessed" in error.message


def test_no_label_of_the_plan_occurs(root):
    error = refused(root, [entry(root, "a", plan(), {0: 500, 7: 12})], plan())
    assert error.code == "train.no-foreground"
    assert "[1, 2]" in error.message


def test_a_label_that_no_case_has_cannot_be_learnt(root):
    error = refused(root, [entry(root, name, plan(), {0: 500, 1: 12}) for name in "ab"], plan())
    assert error.code == "train.absent-label"
    assert "2 (tumour) occurs in 0 of 2 cases" in error.message


def test_a_value_outside_the_plan_is_named_with_its_cases(root):
    entries = [entry(root, "a", plan(), {0: 500, 1: 12, 2: 3}), entry(root, "b", plan(), {0: 500, 1: 12, 9: 1})]
    error = refused(root, entries, plan())
    assert error.code == "train.label-value"
    assert "9 in 1 of 2 cases" in error.message
    assert 'other_labels = "background"' in error.message


@pytest.mark.parametrize("change", [{"other_labels": "background"}, {"ignore_label": 9}])
def test_or_it_is_background_or_ignored_when_the_plan_says_so(root, change, monkeypatch):
    of = plan(**change)
    runs = []
    monkeypatch.setattr(stage, "_fit", lambda root, target, found, *rest: runs.extend(found))
    train(root, Training("liver", [entry(root, "a", of, {0: 500, 1: 12, 2: 3, 9: 40})], of, Budget(steps=1)), Engines())
    (run,) = runs
    assert run.class_voxels == [540 if "other_labels" in change else 500, 12, 3]


def test_one_single_case_trains_and_validates_on_none(root, monkeypatch):
    runs = []
    monkeypatch.setattr(stage, "_fit", lambda root, target, found, *rest: runs.extend(found))
    entries = [entry(root, "a", plan(), {0: 500, 1: 12, 2: 3})]
    train(root, Training("liver", entries, plan(), Budget(steps=1)), Engines())
    assert (list(runs[0].training), list(runs[0].validation)) == (["a"], [])
    assert refused(root, entries, plan(), folds=2).code == "train.folds"


def test_folds_share_out_the_patients_and_are_given_the_same_candidates(root, monkeypatch):
    runs = []
    monkeypatch.setattr(stage, "_fit", lambda root, target, found, *rest: runs.extend(found))
    entries = [entry(root, f"c{i}", plan(), {0: 500, 1: 10 + i, 2: 3}, f"p{i // 2}") for i in range(6)]
    train(root, Training("liver", entries, plan(), Budget(steps=1), folds=3), Engines())
    assert [run.prefix for run in runs] == [f"training/liver/v1/fold-{fold}" for fold in range(3)]
    assert sorted(case for run in runs for case in run.validation) == [f"c{i}" for i in range(6)]
    assert all(len(run.validation) == 2 and len(run.training) == 4 for run in runs)
    assert len({str(run.candidates) for run in runs}) == 1
    assert len(runs[0].candidates) > 2
    # what a fold is weighted by is counted on its own training cases
    assert runs[0].class_voxels[1] == sum(10 + int(case[1:]) for case in runs[0].training)


def test_more_workers_than_samples_are_refused_with_the_numbers_that_work(root):
    entries = [entry(root, name, plan(), {0: 500, 1: 12, 2: 3}) for name in "ab"]
    for engines in (Engines(train_workers=4), Engines(train_workers=2, train_workers_max=4)):
        error = refused(root, entries, plan(), engines)
        assert error.code == "train.batch"
        assert "at most 3 workers, or a batch_size of 4" in error.message
