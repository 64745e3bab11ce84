"""Questions by filters: which rows pass, in which order, over tables old and new."""

from dataclasses import fields
from typing import Any

import pytest

from tests.workers.nights_of_rows import OLD_COLUMNS, organ, put_night, refused
from vnet_core.errors import ConfigError, StorageError
from workers.reports.columns import SCHEMA
from workers.reports.query import Answer, Choices, Query, choices, describe, query
from workers.storage.store import Root

FIRST, SECOND, THIRD = "2026-01-30_010000", "2026-01-31_010000", "2026-02-01_010000"
ODD = """o'rgan" -- ;"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Root:
    """Three nights of liver, the first by version 0.3, and one of lung in a folder whose name means something to globs
    and to SQL."""
    root = Root(tmp_path_factory.mktemp("nights") / "it's [1] *")
    put_night(root, "liver", FIRST, [organ("a", 10.0, patient="P1"), refused("b")], OLD_COLUMNS)
    put_night(
        root,
        "liver",
        SECOND,
        [
            organ("a", 12.0, patient="P1", change_percent=20.0, flags="touches-border drift", review="awaiting"),
            organ("a", 3.0, patient="P1", label=None, name=ODD, change_percent=0.0),
            refused("b"),
        ],
    )
    put_night(
        root,
        "liver",
        THIRD,
        [
            organ("a", 12.0, patient="P1", change_percent=0.0, review="accepted", patient_change_percent=-40.0),
            organ("b", 30.0, patient="P2", state="computed", model="m@v2", change_percent=-25.0),
        ],
    )
    put_night(root, "lung", SECOND, [organ("z", 100.0, model="n@v1", flags="empty")])
    return root


def found(answer: Answer) -> list[tuple[str, str, str | None]]:
    """Day, case and name of every row."""
    return [(row["night"][:10], row["case"], row["name"]) for row in answer.rows]


A1, A2, A3 = (("2026-01-30", "a", "organ"), ("2026-01-31", "a", "organ"), ("2026-02-01", "a", "organ"))
B1, B2, B3 = (("2026-01-30", "b", None), ("2026-01-31", "b", None), ("2026-02-01", "b", "organ"))
ODD2, Z2 = ("2026-01-31", "a", ODD), ("2026-01-31", "z", "organ")


@pytest.mark.parametrize(
    ("wanted", "passes"),
    [
        (Query(), [A3, B3, Z2, A2, ODD2, B2, A1, B1]),
        (Query(cohorts=("lung",)), [Z2]),
        (Query(cohorts=("lung", "liver"), labels=("organ",)), [A3, B3, Z2, A2, A1]),
        (Query(labels=(ODD,)), [ODD2]),
        (Query(labels=("organ", ODD), patient="P1"), [A3, A2, ODD2, A1]),
        (Query(models=("m@v2", "n")), [B3, Z2]),
        (Query(models=("m",), labels=("organ",)), [A3, B3, A2, A1]),
        (Query(flags=("drift", "low-agreement")), [A2]),
        (Query(flags=("any",)), [Z2, A2]),
        (Query(states=("refused", "computed")), [B3, B2, B1]),
        (Query(reviews=("awaiting", "accepted")), [A3, A2]),
        (Query(case="b"), [B3, B2, B1]),
        (Query(patient="P2"), [B3]),
        (Query(nights=1), [A3, B3, Z2]),
        (Query(nights=2, cohorts=("liver",)), [A3, B3, A2, ODD2, B2]),
        (Query(first="2026-01-31", last="2026-01-31"), [Z2, A2, ODD2, B2]),
        (Query(last="2026-01-30"), [A1, B1]),
        (Query(last="2026-01-31", nights=1), [Z2, A2, ODD2, B2]),
        (Query(volume_min_ml=12.0, volume_max_ml=30.0), [A3, B3, A2]),
        (Query(volume_max_ml=0.0), []),
        (Query(change_min_percent=20.0), [B3, A2]),
        (Query(change_min_percent=20.0, change_max_percent=20.0), [A2]),
        (Query(patient_change_min_percent=40.0), [A3]),
        (Query(patient_change_max_percent=39.0), []),
        (Query(labels=("nothing",)), []),
        (Query(limit=0), [A3, B3, Z2, A2, ODD2, B2, A1, B1]),
    ],
    ids=lambda value: describe(value) if isinstance(value, Query) else "",
)
def test_a_filter_passes_its_rows_newest_night_first(root: Root, wanted: Query, passes: list[Any]) -> None:
    assert found(query(root, wanted)) == passes


def test_the_limit_keeps_the_newest_and_says_that_there_are_more(root: Root) -> None:
    assert (found(query(root, Query(limit=2))), query(root, Query(limit=2)).more) == ([A3, B3], True)
    assert not query(root, Query(limit=8)).more
    assert not query(root, Query(limit=0)).more


def test_rows_have_every_column_also_those_of_nights_of_an_older_version(root: Root, tmp_path) -> None:
    old = query(root, Query(last="2026-01-30", case="a")).rows
    assert [list(row) for row in old] == [SCHEMA.names]
    assert (old[0]["volume_ml"], old[0]["review"], old[0]["volume_low_ml"]) == (10.0, None, None)
    assert [row["review"] for row in query(root, Query(case="a", labels=("organ",))).rows] == [
        "accepted",
        "awaiting",
        None,
    ]
    assert query(root, Query(case="a", limit=1), ("night", "volume_ml")).rows == [{"night": THIRD, "volume_ml": 12.0}]
    assert query(Root(tmp_path), Query()) == Answer(tuple(SCHEMA.names), [], False)


def test_a_night_that_is_written_again_answers_anew(root: Root, tmp_path) -> None:
    other = Root(tmp_path)
    put_night(other, "liver", FIRST, [organ("a", 10.0)])
    assert query(other, Query()).rows[0]["volume_ml"] == 10.0
    put_night(other, "liver", FIRST, [organ("a", 11.0), organ("b", 1.0)])
    assert [row["volume_ml"] for row in query(other, Query()).rows] == [11.0, 1.0]


def test_an_unknown_cohort_is_named_with_those_there_are(root: Root) -> None:
    with pytest.raises(ConfigError, match=r"'nobody'.*liver, lung") as caught:
        query(root, Query(cohorts=("liver", "nobody")))
    assert caught.value.code == "query.cohort"


@pytest.mark.parametrize(
    ("wrong", "code", "says"),
    [
        ({"first": "2026-1-3"}, "query.date", "YYYY-MM-DD"),
        ({"last": "yesterday"}, "query.date", "yesterday"),
        ({"first": "2026-02-01", "last": "2026-01-31"}, "query.date", "2026-02-01 is after the last 2026-01-31"),
        ({"nights": -1}, "query.number", "-1"),
        ({"limit": -5}, "query.number", "-5"),
        ({"volume_min_ml": 2.0, "volume_max_ml": 1.0}, "query.range", "at least 2 and at most 1"),
        ({"change_min_percent": 2.0, "change_max_percent": 1.0}, "query.range", "change_percent"),
        ({"sql": "FROM rows", "labels": ("organ",), "patient": "P1"}, "query.sql-filters", "labels, patient"),
    ],
)
def test_a_question_that_contradicts_itself_is_refused(wrong: dict[str, Any], code: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        Query(**wrong)
    assert caught.value.code == code


def test_a_damaged_table_is_named_without_its_folder(tmp_path) -> None:
    root = Root(tmp_path)
    put_night(root, "liver", FIRST, [organ("a", 10.0)])
    root.put(f"reports/liver/{SECOND}.parquet", b"PAR1 and no more")
    with pytest.raises(StorageError, match=f"reports/liver/{SECOND}.parquet") as caught:
        query(root, Query())
    assert caught.value.code == "query.damaged"
    assert str(tmp_path) not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert found(query(root, Query(last="2026-01-30"))) == [A1], "the other nights still answer"
    assert choices(root) == Choices(("liver",))


def test_choices_are_what_the_rows_have(root: Root, tmp_path) -> None:
    assert choices(root) == Choices(("liver", "lung"), (ODD, "organ"), ("m", "m@v1", "m@v2", "n", "n@v1"))
    assert choices(Root(tmp_path)) == Choices(())


def test_a_question_in_words_names_what_it_restricts() -> None:
    assert describe(Query()) == "all rows"
    asked = Query(cohorts=("liver", "lung"), nights=3, volume_min_ml=0.5)
    assert describe(asked) == "cohorts liver, lung; nights 3; volume min ml 0.5"
    assert all(field.default is not None or "m" in field.name for field in fields(Query))
