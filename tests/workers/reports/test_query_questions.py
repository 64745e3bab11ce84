"""Questions kept by name, and answers as files."""

import csv
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vnet_core.errors import ConfigError, StorageError
from workers.reports.answers import encode
from workers.reports.query import Answer, Query
from workers.reports.questions import load_question, question_names, save_question
from workers.storage.store import Root


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(tmp_path / "root")


@pytest.mark.parametrize(
    "asked",
    [
        Query(),
        Query(cohorts=("liver", "lung"), flags=("any",), nights=3, first="2026-01-01", volume_min_ml=0.0, limit=0),
        Query(sql="SELECT 'ä' FROM rows", cohorts=("liver",)),
    ],
)
def test_a_saved_question_comes_back_as_it_was(root: Root, asked: Query) -> None:
    assert question_names(root) == []
    save_question(root, "mine-1", asked)
    assert question_names(root) == ["mine-1"]
    assert load_question(root, "mine-1") == asked


def test_a_question_of_the_same_name_is_replaced(root: Root) -> None:
    save_question(root, "mine", Query(case="a"))
    save_question(root, "mine", Query(case="b"))
    assert load_question(root, "mine") == Query(case="b")


@pytest.mark.parametrize("name", ["", "none", "Mine", "../etc", "a b", "-a", "a" * 61, "é", "a\n"])
def test_names_are_plain(root: Root, name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        save_question(root, name, Query())
    assert caught.value.code == "query.name"
    assert not root.exists("questions")


def test_an_unknown_question_is_named_with_those_there_are(root: Root) -> None:
    with pytest.raises(ConfigError, match="saved: none"):
        load_question(root, "../../etc/passwd")
    save_question(root, "mine", Query())
    with pytest.raises(ConfigError, match="saved: mine") as caught:
        load_question(root, "yours")
    assert caught.value.code == "query.unknown-question"


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"cohort": "liver"}', '{"nights": "three"}', '{"nights": -1}', '{"sql": "x", "case": "a"}'],
)
def test_a_damaged_question_is_said_to_be_one(root: Root, content: str) -> None:
    root.put("questions/mine.json", content.encode())
    with pytest.raises(StorageError, match=r"questions/mine\.json") as caught:
        load_question(root, "mine")
    assert caught.value.code == "store.corrupt"


ANSWER = Answer(
    ("case", "label", "volume_ml", "more"),
    [
        {"case": "=cmd()", "label": 1, "volume_ml": 1.5, "more": [1, 2]},
        {"case": "two\nlines", "label": None, "volume_ml": None, "more": None},
    ],
    False,
)


def test_an_answer_as_csv_has_no_formula_and_a_line_for_each_row() -> None:
    lines = list(csv.reader(io.StringIO(encode(ANSWER, "csv").decode())))
    assert lines == [
        ["case", "label", "volume_ml", "more"],
        ["'=cmd()", "1", "1.5", "[1, 2]"],
        ["two lines", "", "", ""],
    ]


def test_an_answer_as_json_is_its_rows() -> None:
    assert json.loads(encode(ANSWER, "json")) == ANSWER.rows


def test_an_answer_as_parquet_keeps_the_types_of_the_columns() -> None:
    table = pq.read_table(pa.BufferReader(encode(ANSWER, "parquet")))
    assert table.to_pylist() == ANSWER.rows
    assert [str(kind) for kind in table.schema.types[:3]] == ["string", "int32", "double"]
    renamed = pq.read_table(pa.BufferReader(encode(Answer(("label",), [{"label": "organ"}], False), "parquet")))
    assert renamed.to_pylist() == [{"label": "organ"}]
    with pytest.raises(ConfigError, match="column odd") as caught:
        encode(Answer(("odd",), [{"odd": 1}, {"odd": "a"}], False), "parquet")
    assert caught.value.code == "query.output"
