"""Which cases train and which validate: seeded draws over patients, so that nobody is on both sides."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from vnet_core.errors import TrainingError

Split = tuple[tuple[str, ...], tuple[str, ...]]
"""Case ids for training and for validation, each in order."""


def split_patients(cases: Iterable[tuple[str, str | None]], fraction: float, seed: int) -> Split:
    """Case ids (training, validation) from (case id, patient or None), by a seeded draw over patients.

    Cases of one patient stay together; a case without patient is a patient of its own. At least one patient stays in
    training, and with a positive fraction and two patients or more at least one is kept for validation.
    """
    groups = _by_patient(cases)
    order = np.random.default_rng(seed).permutation(sorted(groups))
    count = min(max(1, round(fraction * len(groups))), len(groups) - 1) if fraction > 0 else 0
    return _sides(groups, order[:count])


def split_folds(cases: Iterable[tuple[str, str | None]], folds: int, seed: int) -> list[Split]:
    """``folds`` splits in which every patient validates exactly once; their sizes differ by one patient at the most.

    Raises TrainingError ``train.folds`` with fewer patients than folds.
    """
    groups = _by_patient(cases)
    if not 2 <= folds <= len(groups):
        raise TrainingError(
            "train.folds",
            f"{folds} folds of {len(groups)} patients cannot be made; use 2 to {len(groups)} folds"
            if len(groups) > 1
            else f"{folds} folds of {len(groups)} patient cannot be made; add patients or leave out --folds",
        )
    order = np.random.default_rng(seed).permutation(sorted(groups))
    return [_sides(groups, order[fold::folds]) for fold in range(folds)]


def _by_patient(cases: Iterable[tuple[str, str | None]]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for case, patient in sorted(cases):
        groups.setdefault(f"patient {patient}" if patient else f"case {case}", []).append(case)
    return groups


def _sides(groups: dict[str, list[str]], validating: Iterable[str]) -> Split:
    held = {case for group in validating for case in groups[group]}
    every = sorted(case for members in groups.values() for case in members)
    return tuple(c for c in every if c not in held), tuple(c for c in every if c in held)
