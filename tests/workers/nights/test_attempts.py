"""Failures that are remembered, quarantine after so many nights, and release."""

from pathlib import Path

import pytest

from vnet_core.errors import ConfigError
from workers.nights.attempts import (
    Failure,
    add_failure,
    failures,
    failures_of,
    forget,
    quarantine_outcome,
    quarantined,
    release,
)
from workers.storage.store import Root


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(tmp_path)


def failure(night: str, key: str = "results/liver/a/1") -> Failure:
    return Failure(key, night, f"{night}T01:00:00+00:00", "segment", ("segment.memory",), "6.0 GiB needed, 2.0 free")


def test_failures_are_kept_by_case_oldest_first(root: Root) -> None:
    assert failures(root, "liver") == {}
    add_failure(root, "liver", "a", failure("2026-01-01"))
    add_failure(root, "liver", "a", failure("2026-01-02"))
    add_failure(root, "liver", "b", failure("2026-01-02"))
    assert {case: [one.night for one in found] for case, found in failures(root, "liver").items()} == {
        "a": ["2026-01-01", "2026-01-02"],
        "b": ["2026-01-02"],
    }


def test_a_night_counts_once_whatever_is_tried_in_it(root: Root) -> None:
    for _ in range(3):
        add_failure(root, "liver", "a", failure("2026-01-01"))
    assert len(failures_of(root, "liver", "a")) == 1


def test_a_case_is_left_alone_after_so_many_nights_with_the_same_key(root: Root) -> None:
    for day in (1, 2):
        add_failure(root, "liver", "a", failure(f"2026-01-0{day}"))
    found = failures_of(root, "liver", "a")
    assert quarantined(found, "results/liver/a/1", 3) is None
    last = quarantined(found, "results/liver/a/1", 2)
    assert last is not None
    assert last.night == "2026-01-02"
    assert quarantined(found, "results/liver/a/other-bytes", 2) is None, "a changed case starts anew"
    outcome = quarantine_outcome("liver", "a", found, last)
    assert (outcome.state, outcome.codes) == ("failed", ("night.quarantined", "segment.memory"))
    assert "2 nights" in outcome.message
    assert "6.0 GiB needed" in outcome.message
    assert "vnet quarantine release --cohort liver --case a" in outcome.message


def test_release_forgets_failures_and_names_cases_that_have_none(root: Root) -> None:
    for case in ("a", "b", "c"):
        add_failure(root, "liver", case, failure("2026-01-01"))
    assert release(root, "liver", ["a"]) == ["a"]
    assert set(failures(root, "liver")) == {"b", "c"}
    with pytest.raises(ConfigError, match=r"a of cohort liver has no failure \(those that have: b, c\)"):
        release(root, "liver", ["b", "a"])
    assert set(failures(root, "liver")) == {"b", "c"}, "all or nothing"
    assert release(root, "liver", []) == ["b", "c"]
    forget(root, "liver", "never-failed")
