"""Decisions hold for one result, none is lost, and the last one about a result counts."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from tests.files import file_of
from vnet_core.errors import ConfigError, StorageError
from workers.nights.decisions import (
    Decision,
    all_decisions,
    decisions,
    latest,
    mirrored,
    published,
    record,
    review_of,
)
from workers.storage.store import Root

FIRST = Decision("a", "results/liver/a/1", "accept", "Dr. Ada", "2026-11-23T07:00:00+00:00", "2026-11-23_010000", "ok")


@pytest.fixture
def root(tmp_path) -> Root:
    return Root(tmp_path)


def test_a_decision_is_kept_as_it_was_made(root):
    assert decisions(root, "liver", "a") == []
    record(root, "liver", FIRST)
    assert decisions(root, "liver", "a") == [FIRST]
    assert root.names("decisions/liver/a") == ["000001.json"]
    facts = root.get_json("decisions/liver/a/000001.json")
    assert facts == {
        "case": "a",
        "key": "results/liver/a/1",
        "choice": "accept",
        "by": "Dr. Ada",
        "at": "2026-11-23T07:00:00+00:00",
        "night": "2026-11-23_010000",
        "note": "ok",
        "as_is": False,
    }


def test_it_holds_for_its_result_alone_and_the_last_one_counts(root):
    record(root, "liver", FIRST)
    record(root, "liver", replace(FIRST, choice="reject", by="Dr. Bob"))
    record(root, "liver", replace(FIRST, key="results/liver/a/2", choice="train"))
    assert [one.choice for one in decisions(root, "liver", "a")] == ["accept", "reject", "train"]
    assert latest(root, "liver", "a", "results/liver/a/1").by == "Dr. Bob"
    assert latest(root, "liver", "a", "results/liver/a/3") is None
    assert latest(root, "spleen", "a", "results/liver/a/1") is None
    assert set(all_decisions(root, "liver")) == {"a"}


@pytest.mark.parametrize(
    ("choice", "as_is", "review", "leaves"),
    [
        ("accept", False, "accepted", True),
        ("reject", False, "rejected", False),
        ("mirror", False, "awaiting", False),
        ("train", False, "training", False),
        ("train", True, "accepted", True),
    ],
)
def test_what_a_decision_makes_of_a_result(root, choice, as_is, review, leaves):
    record(root, "liver", replace(FIRST, choice=choice, as_is=as_is))
    expected = (review, "Dr. Ada", FIRST.at)
    for asked in (True, False):
        assert review_of(root, "liver", "a", FIRST.key, asked) == expected
    assert published(review) is leaves


def test_without_a_decision_results_that_somebody_is_asked_about_wait(root):
    assert [review_of(root, "liver", "a", "k", asked)[0] for asked in (True, False)] == ["awaiting", ""]
    assert [published(one) for one in ("", None, "awaiting")] == [True, True, False]


def test_mirrored_are_the_results_whose_last_decision_says_so(root):
    assert mirrored(root, "liver") == set()
    for case, choices in {"a": ["mirror"], "b": ["mirror", "accept"], "c": ["reject", "mirror"]}.items():
        for choice in choices:
            record(root, "liver", replace(FIRST, case=case, key=f"results/liver/{case}/1", choice=choice))
    # a new decision about other bytes of the case does not take the wish back
    record(root, "liver", replace(FIRST, key="results/liver/a/2"))
    assert mirrored(root, "liver") == {"results/liver/a/1", "results/liver/c/1"}


def test_two_writers_at_once_lose_nothing(root):
    notes = [f"{writer} {number}" for writer in range(4) for number in range(5)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda note: record(root, "liver", replace(FIRST, note=note)), notes))
    assert sorted(one.note for one in decisions(root, "liver", "a")) == sorted(notes)
    assert root.names("decisions/liver/a") == [f"{n:06d}.json" for n in range(1, 21)]
    assert [path.name for path in file_of(root, "decisions/liver/a").iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"by": " \u200b\n "}, "review.name"),
        ({"choice": "perhaps"}, "review.choice"),
        ({"by": "x" * 101}, "review.long"),
        ({"note": "x" * 2001}, "review.long"),
    ],
)
def test_what_is_no_decision_is_not_recorded(root, change, code):
    with pytest.raises(ConfigError) as caught:
        record(root, "liver", replace(FIRST, **change))
    assert caught.value.code == code
    assert decisions(root, "liver", "a") == []


def test_a_name_is_one_line(root):
    record(root, "liver", replace(FIRST, by=" Dr.\u202e Ada\x1b[2J\n"))
    assert decisions(root, "liver", "a")[0].by == "Dr.  Ada [2J"


@pytest.mark.parametrize("content", [b"{", json.dumps({"case": "a"}).encode()])
def test_a_damaged_decision_is_told(root, content):
    root.put("decisions/liver/a/000001.json", content)
    with pytest.raises(StorageError) as caught:
        decisions(root, "liver", "a")
    assert caught.value.code == "store.corrupt"
