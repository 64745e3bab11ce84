"""Seeded splits over patients."""

from __future__ import annotations

import pytest

from vnet_core.errors import TrainingError
from vnet_core.splits import split_folds, split_patients


def test_patients_stay_together():
    cases = [(f"{patient}{visit}", patient) for patient in "abcdefgh" for visit in range(3)]
    training, validation = split_patients(cases, 0.25, seed=0)
    assert len(validation) == 6
    assert sorted([*training, *validation]) == sorted(case for case, _ in cases)
    assert {c[0] for c in training}.isdisjoint(c[0] for c in validation)


def test_the_split_is_decided_by_the_seed_not_by_the_order():
    cases = [(f"case{i}", None) for i in range(20)]
    assert split_patients(cases, 0.2, seed=3) == split_patients(cases[::-1], 0.2, seed=3)
    assert len({split_patients(cases, 0.2, seed)[1] for seed in range(10)}) > 5


@pytest.mark.parametrize(
    ("patients", "fraction", "held"),
    [(1, 0.5, 0), (2, 0.01, 1), (2, 0.99, 1), (3, 0.99, 2), (10, 0.1, 1), (10, 0.25, 2), (10, 0.0, 0), (0, 0.5, 0)],
)
def test_how_many_are_held_back(patients, fraction, held):
    cases = [(f"case{i}", None) for i in range(patients)]
    training, validation = split_patients(cases, fraction, seed=0)
    assert (len(training), len(validation)) == (patients - held, held)


def test_a_case_without_patient_is_nobodys_relative():
    """Not even of a patient that is called as the case is."""
    cases = [("a", None), ("b", "a"), ("c", ""), ("d", None)]
    parts = {split_patients(cases, 0.25, seed)[1] for seed in range(40)}
    assert parts == {("a",), ("b",), ("c",), ("d",)}


def test_every_patient_validates_once_and_never_trains_beside_himself():
    cases = [(f"c{i}", f"p{i // 2}" if i < 14 else None) for i in range(20)]
    found = split_folds(cases, 4, seed=3)
    patients = dict(cases)
    validated = [case for _, validation in found for case in validation]
    assert sorted(validated) == sorted(case for case, _ in cases)
    sizes = []
    for training, validation in found:
        assert sorted([*training, *validation]) == sorted(case for case, _ in cases)
        assert not {patients[c] or c for c in training} & {patients[c] or c for c in validation}
        sizes.append(len({patients[c] or c for c in validation}))
    assert max(sizes) - min(sizes) <= 1
    assert found == split_folds(reversed(cases), 4, seed=3) != split_folds(cases, 4, seed=4)


@pytest.mark.parametrize(
    ("patients", "folds", "told"), [(3, 4, "use 2 to 3"), (1, 2, "add patients"), (3, 1, "2 to 3")]
)
def test_more_folds_than_patients(patients, folds, told):
    with pytest.raises(TrainingError, match=told) as caught:
        split_folds([(f"c{i}", None) for i in range(patients)], folds, seed=0)
    assert caught.value.code == "train.folds"
