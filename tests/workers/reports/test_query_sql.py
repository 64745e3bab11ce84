"""Questions in SQL: what can be asked, and that nothing else can be reached or changed by a text."""

import os
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest

from tests.files import file_of
from tests.workers.nights_of_rows import organ, put_night, refused
from vnet_core.errors import ConfigError
from workers.reports import tables
from workers.reports.query import Answer, Query, query
from workers.reports.tables import open_tables
from workers.storage.store import Root

FIRST, SECOND = "2026-01-30_010000", "2026-01-31_010000"
SECRET = "hush, nobody reads this"


@pytest.fixture
def root(tmp_path: Path) -> Root:
    root = Root(tmp_path / "root")
    put_night(root, "liver", FIRST, [organ("a", 10.0), organ("b", 20.0), organ("b", 1.0, label=2, name="cyst")])
    put_night(root, "liver", SECOND, [organ("a", 11.0), refused("b")])
    put_night(root, "lung", FIRST, [organ("a", 500.0)])
    record = {"cohort": "liver", "model": "m@v1", "started": "2026-01-30T01:00:00+00:00", "seconds": 12.5}
    root.put_json(f"nights/liver/{FIRST}.json", record | {"id": FIRST, "counts": {"cached": 2}})
    later = {"id": SECOND, "ended": "2026-01-31T06:00:00+00:00", "stopped": "deadline"}
    root.put_json(f"nights/liver/{SECOND}.json", record | later | {"counts": {"computed": 1, "carried-over": 1}})
    return root


def ask(root: Root, sql: str, **more: object) -> list[tuple[object, ...]]:
    return [tuple(row.values()) for row in query(root, Query(sql=sql, **more)).rows]


def test_a_select_over_rows_sees_every_night(root: Root) -> None:
    sums = 'SELECT cohort, "case", sum(volume_ml) FROM rows GROUP BY ALL ORDER BY ALL;'
    assert (
        ask(root, sums + " ")
        == ask(root, f"-- by case\n{sums.strip(' ;')} -- all")
        == [("liver", "a", 21.0), ("liver", "b", 21.0), ("lung", "a", 500.0)]
    )


def test_the_chosen_cohorts_and_nights_are_all_there_is(root: Root) -> None:
    count = "SELECT count(*) FROM rows"
    assert ask(root, count) == [(6,)]
    assert ask(root, count, cohorts=("liver",)) == [(5,)]
    assert ask(root, count, cohorts=("liver",), nights=1) == [(2,)]
    assert ask(root, "SELECT count(*) FROM nights", last="2026-01-30") == [(1,)]
    other = file_of(root, f"reports/lung/{FIRST}.parquet")
    with pytest.raises(ConfigError, match="Cannot access file"):
        query(root, Query(cohorts=("liver",), sql=f"FROM read_parquet('{other}')"))


def test_latest_has_the_newest_row_of_each_case_and_label(root: Root) -> None:
    newest = 'SELECT cohort, "case", name, night, volume_ml FROM latest ORDER BY cohort, "case", name'
    assert ask(root, newest) == [
        ("liver", "a", "organ", SECOND, 11.0),
        ("liver", "b", "cyst", FIRST, 1.0),
        ("liver", "b", "organ", FIRST, 20.0),
        ("liver", "b", None, SECOND, None),
        ("lung", "a", "organ", FIRST, 500.0),
    ]


def test_nights_has_the_records(root: Root) -> None:
    assert ask(root, "SELECT night, seconds, ended, stopped, cached, computed, carried_over, failed FROM Nights") == [
        (SECOND, 12.5, "2026-01-31T06:00:00+00:00", "deadline", 0, 1, 1, 0),
        (FIRST, 12.5, "", "", 2, 0, 0, 0),
    ]
    joined = "SELECT count(*) FROM rows JOIN nights USING (cohort, night) WHERE nights.computed > 0"
    assert ask(root, joined) == [(2,)]


def test_nights_and_rows_are_there_when_there_are_none(tmp_path: Path) -> None:
    empty = Root(tmp_path)
    assert ask(empty, "SELECT count(volume_ml) FROM rows") == [(0,)]
    assert ask(empty, "FROM latest") == []
    assert ask(empty, "FROM nights") == []


def test_values_come_back_as_json_holds_them(root: Root) -> None:
    sql = """SELECT 'nan'::DOUBLE AS x, 1.50::DECIMAL(9, 2) AS x, DATE '2026-01-30' AS day, [1, NULL] AS several,
        {'a': 1} AS parts, 'ab'::BLOB AS bytes, 1::HUGEINT AS large, true AS yes"""
    row = query(root, Query(sql=sql)).rows[0]
    assert row == {
        "x": None,
        "x_1": 1.5,
        "day": "2026-01-30",
        "several": [1, None],
        "parts": {"a": 1},
        "bytes": "6162",
        "large": 1,
        "yes": True,
    }


def test_the_limit_holds_for_sql_too(root: Root) -> None:
    answer = query(root, Query(sql="SELECT volume_ml FROM rows ORDER BY volume_ml DESC NULLS LAST", limit=2))
    assert answer == Answer(("volume_ml",), [{"volume_ml": 500.0}, {"volume_ml": 20.0}], True)


@pytest.mark.parametrize(
    ("sql", "says"),
    [
        ("SELECT * FROM read_text('{secret}')", "Cannot access file"),
        ("SELECT * FROM read_csv('{secret}')", "Cannot access file"),
        ("SELECT * FROM '{secret}'", "Cannot access file"),
        ("SELECT * FROM read_blob('/etc/passwd')", "Cannot access file"),
        ("SELECT * FROM glob('/etc/*')", "Cannot access file"),
        ("SELECT * FROM read_parquet('http://127.0.0.1:9/x.parquet')", "Cannot access file"),
        ("SELECT * FROM read_text('{report}') UNION FROM read_text('{secret}')", "Cannot access file"),
        ("SELECT * FROM precious", "does not exist"),
        ("SELECT getenv('HOME')", "does not exist"),
        ("COPY (SELECT 1) TO '{out}'", "one SELECT"),
        ("COPY (SELECT 1 AS x) TO '{report}' (FORMAT parquet, USE_TMP_FILE false)", "one SELECT"),
        ("EXPORT DATABASE '{out}'", "one SELECT"),
        ("SELECT 1; COPY (SELECT 1) TO '{out}'", "one SELECT"),
        ("SELECT * FROM query('COPY (SELECT 1) TO ''{out}''')", "single SELECT"),
        ("INSTALL httpfs", "one SELECT"),
        ("LOAD httpfs", "one SELECT"),
        ("ATTACH '{out}'", "one SELECT"),
        ("ATTACH ':memory:' AS m", "one SELECT"),
        ("SET enable_external_access = true", "one SELECT"),
        ("RESET lock_configuration", "one SELECT"),
        ("PRAGMA enable_profiling", "one SELECT"),
        ("CALL enable_logging()", "one SELECT"),
        ("CREATE TABLE t AS SELECT 1", "one SELECT"),
        ("DROP VIEW rows", "one SELECT"),
        ("DELETE FROM shape", "one SELECT"),
        ("INSERT INTO shape (night) VALUES ('x')", "one SELECT"),
        ("CREATE SECRET (TYPE s3)", "one SELECT"),
        ("", "0 statements"),
        ("-- nothing", "0 statements"),
        ("SELECT ?", "not provided"),
        ("SELEC 1", "syntax error"),
        ("SELECT nope FROM rows", "nope"),
        ("SELECT name::INTEGER FROM rows", "Conversion Error"),
        ("SELECT error('two\nlines \x1b[31m')", "two lines"),
    ],
)
def test_a_text_reaches_nothing_else_and_changes_nothing(root: Root, tmp_path: Path, sql: str, says: str) -> None:
    secret, out, report = tmp_path / "secret.csv", tmp_path / "out", file_of(root, f"reports/liver/{FIRST}.parquet")
    secret.write_text(SECRET)
    precious = pa.table({"x": [SECRET]})
    before = report.read_bytes()
    here = sorted(os.listdir())
    with pytest.raises(ConfigError, match=says) as caught:
        query(root, Query(sql=sql.format(secret=secret, out=out, report=report) or " "))
    assert caught.value.code == "query.sql"
    assert SECRET not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert report.read_bytes() == before
    assert not out.exists()
    assert sorted(os.listdir()) == here
    assert precious.num_rows == 1


@pytest.mark.parametrize(
    "statement",
    [
        "COPY (SELECT 1) TO '{out}'",
        "COPY (SELECT 1 AS x) TO '{report}' (FORMAT parquet)",
        "EXPORT DATABASE '{out}'",
        "ATTACH '{out}'",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SET enable_external_access = true",
        "SET allowed_paths = ['{secret}']",
        "RESET lock_configuration",
        "CREATE PERSISTENT SECRET s (TYPE s3)",
    ],
)
def test_the_connection_itself_is_locked_too(root: Root, tmp_path: Path, statement: str) -> None:
    key = f"reports/liver/{FIRST}.parquet"
    before = root.get(key)
    text = statement.format(out=tmp_path / "out", secret=tmp_path / "secret", report=file_of(root, key))
    with open_tables(root, [key]) as connection, pytest.raises(duckdb.Error):
        connection.execute(text)
    assert root.get(key) == before
    assert [path.name for path in tmp_path.iterdir()] == ["root"]


def test_what_needs_more_memory_than_allowed_ends_with_a_message(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tables._SETTINGS, "memory_limit", "50MiB")
    with pytest.raises(ConfigError, match="Out of Memory"):
        query(root, Query(sql="SELECT count(*) FROM (SELECT DISTINCT range FROM range(50_000_000))"))
