"""The form and the answer of ``query-reports``, and ``vnet query``, without a server."""

import csv
import io
import json
import re
import shlex
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from prefect.deployments.runner import RunnerDeployment
from prefect.flows import EntrypointType
from pydantic import ValidationError

from flows.cli import main
from flows.commands.query import FILE_FORMATS, QUERY
from flows.reports import (
    EVERYTHING,
    FORM,
    TABLE_COLUMNS,
    Question,
    answer_markdown,
    answer_table,
    form_schema,
    offer_choices,
    query_reports,
    to_query,
)
from tests.walkthrough import REPOSITORY, environment, fences
from tests.workers.nights_of_rows import organ, put_night, refused
from vnet_core.errors import ConfigError
from workers.reports.answers import FORMATS
from workers.reports.query import Query, query
from workers.reports.questions import save_question
from workers.storage.store import Root

FIRST, SECOND = "2026-01-30_010000", "2026-01-31_010000"
ODD = "<img src=x> | `odd`\n$"


@pytest.fixture
def root(tmp_path: Path) -> Root:
    root = Root(tmp_path / "root")
    put_night(root, "liver", FIRST, [organ("a", 10.0, patient="P1"), refused("b")])
    put_night(root, "liver", SECOND, [organ("a", 11.23456, patient="P1", flags="drift", model="m@v2"), refused("b")])
    return root


def properties(root: Root) -> dict[str, Any]:
    """Fields of the form as the deployment sends them to the server."""
    schema = deployment(root)._parameter_openapi_schema.model_dump_for_openapi()
    found: dict[str, Any] = schema["definitions"]["Question"]["properties"]
    return found


def deployment(root: Root) -> RunnerDeployment:
    made = query_reports.to_deployment(FORM, entrypoint_type=EntrypointType.MODULE_PATH)
    offer_choices(made, root)
    return made


# --- the form


def test_the_form_offers_what_the_root_has(root: Root) -> None:
    fields = properties(root)
    assert fields["cohorts"]["items"] == {"type": "string", "enum": ["liver"]}
    assert fields["labels"]["items"]["enum"] == ["organ"]
    assert fields["models"]["items"]["enum"] == ["m", "m@v1", "m@v2"]
    assert fields["saved"]["enum"] == ["none"]
    assert "any" in fields["flags"]["items"]["enum"]
    assert [field for field in fields.values() if "anyOf" in field] == [], "the UI shows those as tabs"
    assert list(fields) == list(Question.model_fields), "in the order of the flow's own form"
    put_night(root, "lung", FIRST, [organ("z", 1.0, name="lobe", model="n@v1")])
    save_question(root, "large", Query(volume_min_ml=10.0))
    fields = properties(root)
    assert fields["cohorts"]["items"]["enum"] == ["liver", "lung"]
    assert fields["labels"]["items"]["enum"] == ["lobe", "organ"]
    assert fields["saved"]["enum"] == ["none", "large"]


def test_without_nights_the_form_takes_any_text(tmp_path: Path) -> None:
    fields = properties(Root(tmp_path))
    assert fields["cohorts"]["items"] == {"type": "string"}
    assert fields["saved"]["enum"] == ["none"]


def test_the_form_opens_with_the_newest_night_of_everything(root: Root) -> None:
    parameter = form_schema(root).properties["question"]
    assert parameter["default"] == EVERYTHING.model_dump()
    assert to_query(root, EVERYTHING) == Query(nights=1)


def test_what_is_not_in_the_form_any_more_still_answers(root: Root) -> None:
    assert not deployment(root).enforce_parameter_schema, "the server would refuse it before the flow sees it"
    put_night(root, "lung", FIRST, [organ("z", 1.0)])
    asked = to_query(root, Question.model_validate({"cohorts": ["lung"], "labels": ["gone", "organ"]}))
    assert [row["case"] for row in query(root, asked).rows] == ["z"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"first": "31.1.2026"},
        {"save_as": "My question"},
        {"save_as": "../x"},
        {"nights": -1},
        {"volume_min_ml": -1},
        {"flags": ["nonsense"]},
        {"patient": "a\nb"},
    ],
)
def test_free_fields_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Question.model_validate(wrong)


def test_every_field_of_a_form_becomes_part_of_the_question(root: Root) -> None:
    filled = Question(
        cohorts=["liver"],
        labels=["organ"],
        models=["m"],
        flags=["any"],
        states=["cached"],
        reviews=["awaiting"],
        nights=0,
        first="2026-01-01",
        last="2026-02-01",
        patient="P1",
        case="a",
        volume_min_ml=1,
        volume_max_ml=2,
        change_min_percent=3,
        change_max_percent=4,
        patient_change_min_percent=5,
        patient_change_max_percent=6,
    )
    assert to_query(root, filled) == Query(
        ("liver",), ("organ",), ("m",), ("any",), ("cached",), ("awaiting",), "P1", "a", 0, "2026-01-01", "2026-02-01",
        1.0, 2.0, 3.0, 4.0, 5.0, 6.0,
    )  # fmt: skip


def test_a_saved_question_answers_and_filled_fields_replace_its_own(root: Root) -> None:
    save_question(root, "large", Query(volume_min_ml=10.0, case="a", nights=0))
    assert to_query(root, Question(saved="large")) == Query(volume_min_ml=10.0, case="a")
    assert to_query(root, Question(saved="large", case="b", nights=2)) == Query(volume_min_ml=10.0, case="b", nights=2)
    with pytest.raises(ConfigError, match="saved: large"):
        to_query(root, Question(saved="gone"))
    save_question(root, "counts", Query(sql="SELECT count(*) AS n FROM rows"))
    assert answer_table(query(root, to_query(root, Question(saved="counts")))) == [{"n": 4}]
    with pytest.raises(ConfigError, match="WHERE"):
        to_query(root, Question(saved="counts", case="b"))


# --- the answer


def test_the_table_has_plain_cells_and_the_same_columns_always(root: Root) -> None:
    table = answer_table(query(root, Query(nights=1)))
    assert [tuple(row) for row in table] == [TABLE_COLUMNS] * 2
    assert (table[0]["volume_ml"], table[0]["patient"]) == (11.235, "P1")
    assert (table[1]["volume_ml"], table[1]["codes"]) == ("", "scan.truncated")
    assert answer_table(query(root, Query(case="nobody"))) == []
    odd = query(root, Query(sql="SELECT 'a\x1b[31m\nb' AS text, [1, 2] AS several, true AS yes"))
    assert answer_table(odd) == [{"text": "a [31m b", "several": "[1, 2]", "yes": True}]


def test_the_page_shows_the_picture_and_no_markup_of_names(root: Root) -> None:
    put_night(root, "liver", SECOND, [organ("a", 11.0, name=ODD)])
    asked = Query(nights=1, labels=(ODD,))
    page = answer_markdown(root, asked, query(root, asked), f"1 rows (labels {ODD})")
    assert len(re.findall(r"!\[[^\]]*\]\(data:image/png;base64,[A-Za-z0-9+/=]+\)", page)) == 1
    assert "<img" not in page
    assert "how many cases have which volume" in page
    assert len(page) < 150_000
    nothing = Query(labels=("none",))
    assert "No picture" in answer_markdown(root, nothing, query(root, nothing), "0 rows")
    counted = Query(sql="SELECT count(*) AS n FROM rows")
    assert "No picture" in answer_markdown(root, counted, query(root, counted), "1 rows")
    chosen = Query(sql="SELECT night, name, volume_ml FROM rows")
    assert "data:image/png" in answer_markdown(root, chosen, query(root, chosen), "4 rows")


# --- the command


@pytest.fixture
def vnet(root: Root, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Run ``vnet query`` in this process: code, standard output, standard error."""
    for name in ("VNET_ROOT", "VNET_SITE", "PREFECT_HOME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        code = main(["query", *map(str, arguments), "--root", str(root.home)])
        told = capsys.readouterr()
        return code, told.out, told.err

    return run


def test_the_command_takes_filters_sql_and_names(vnet) -> None:
    code, out, _ = vnet("--cohort", "liver", "--flag", "any", "--flag", "drift", "--from", "2026-01-31", "--json")
    assert (code, [row["volume_ml"] for row in json.loads(out)["rows"]]) == (0, [11.23456])
    table = vnet("--label", "organ", "--limit", "1")[1].splitlines()
    assert [line.split()[0] for line in table[:2]] == ["night", SECOND]
    assert table[2] == "the first 1 rows; --limit 0 gives all"
    code, out, _ = vnet("--sql", "SELECT state, count(*) AS n FROM rows GROUP BY ALL ORDER BY ALL", "--save", "states")
    assert [line.split() for line in out.splitlines()] == [["state", "n"], ["cached", "2"], ["refused", "2"]]
    assert vnet("--saved", "states", "--nights", "1", "--json")[1].count('"n": 1') == 2
    assert vnet("--questions")[1].splitlines()[1].startswith("states  sql SELECT state")
    assert vnet("--case", "nobody")[1] == "no rows\n"


def test_rows_are_written_in_every_format(vnet, tmp_path: Path) -> None:
    rows = json.loads(vnet("--json")[1])["rows"]
    assert json.loads(vnet("--format", "json")[1]) == rows
    assert len(list(csv.DictReader(io.StringIO(vnet("--format", "csv")[1])))) == len(rows) == 4
    for name in ("rows.csv", "rows.json", "rows.parquet"):
        assert vnet("--output", tmp_path / name)[1] == f"4 rows in {tmp_path / name}\n"
    assert pq.read_table(tmp_path / "rows.parquet").to_pylist() == rows
    assert json.loads((tmp_path / "rows.json").read_text("utf-8")) == rows
    vnet("--output", tmp_path / "rows", "--format", "csv")
    assert (tmp_path / "rows").read_bytes() == (tmp_path / "rows.csv").read_bytes()
    assert FILE_FORMATS == FORMATS


def test_the_commands_of_the_documentation_run(vnet, root: Root, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    put_night(root, "spleen", FIRST, [organ("z", 60.0, name="spleen", change_percent=12.0)])
    bash = [fence.text for fence in fences(REPOSITORY / "docs" / "query.md") if fence.language == "bash"]
    commands = [shlex.split(line) for text in bash for line in text.splitlines()]
    assert len(commands) > 9
    for program, name, *arguments in commands:
        assert (program, name) == ("vnet", "query")
        code, _, err = vnet(*arguments)
        assert (code, err) == (0, ""), arguments
    assert {path.name for path in tmp_path.iterdir()} == {"root", "liver.csv", "liver.parquet"}


def test_the_documentation_names_every_option_of_a_filter() -> None:
    text = (REPOSITORY / "docs" / "query.md").read_text("utf-8")
    parser = ArgumentParser()
    QUERY.arguments(parser)
    filters = next(group for group in parser._action_groups if group.title == "filters")
    assert [a.option_strings[0] for a in filters._group_actions if f"`{a.option_strings[0]}" not in text] == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--cohort", "nobody"], "query.cohort: cohort 'nobody' has no report (known: liver)"),
        (["--sql", "SELECT * FROM read_text('/etc/passwd')"], "query.sql: DuckDB: Permission Error"),
        (["--sql", "FROM rows", "--label", "organ"], "query.sql-filters"),
        (["--saved", "gone"], "query.unknown-question"),
        (["--save", "My Name"], "query.name"),
        (["--format", "parquet"], "query.output: Parquet is no text"),
        (["--output", "rows.xlsx"], "query.output: no file is written as xlsx"),
        (["--output", "rows", "--format", "table"], "query.output"),
        (["--to", "31.1."], "query.date"),
    ],
)
def test_what_cannot_be_answered_is_named_and_ends_with_2(vnet, arguments: list[str], says: str) -> None:
    code, out, err = vnet(*arguments)
    assert (code, out) == (2, "")
    assert says in err
    assert err.count("\n") == 1


def test_the_command_brings_in_no_engine(root: Root) -> None:
    program = """
import sys
from flows.cli import main
main(["query", "--nights", "1", "--save", "mine", "--root", sys.argv[1]])
main(["query", "--sql", "FROM latest", "--format", "csv", "--root", sys.argv[1]])
print([name for name in ("prefect", "torch", "ray", "dask", "matplotlib", "pandas") if name in sys.modules])
"""
    command = [sys.executable, "-c", program, str(root.home)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=REPOSITORY, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
