"""The command that makes a report anew: what it reads, and what it says."""

from pathlib import Path

import pytest

from flows.cli import needs, parser
from flows.commands.report import read_settings, told
from vnet_core.errors import ConfigError
from vnet_core.reporting import Reporting


def test_the_command_takes_a_cohort_and_needs_an_api_for_its_pages() -> None:
    options = parser().parse_args(["report", "--cohort", "liver", "--settings", "a.toml"])
    assert (options.cohort, options.night, options.settings, options.measure) == ("liver", None, Path("a.toml"), False)
    assert needs(options) == "api"


def test_settings_are_read_from_toml(tmp_path: Path) -> None:
    file = tmp_path / "reporting.toml"
    file.write_text('names.liver = "Leber"\nreference_ml.liver = [700, 3000]\nflags = ["empty"]\n', encoding="utf-8")
    expected = Reporting(names={"liver": "Leber"}, reference_ml={"liver": (700, 3000)}, flags=("empty",))
    assert read_settings(file) == expected


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (None, "reporting.file"),
        (b"flags = [", "reporting.file"),
        (b"\xff\xfe", "reporting.file"),
        (b"flag = []", "reporting.unknown-key"),
        (b"flags = ['dull']", "reporting.value"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(tmp_path: Path, text: bytes | None, code: str) -> None:
    file = tmp_path / "reporting.toml"
    if text is not None:
        file.write_bytes(text)
    with pytest.raises(ConfigError) as error:
        read_settings(file)
    assert error.value.code == code


def test_it_says_how_many_rows_changed_and_what_is_flagged() -> None:
    rows = [{"case": "a", "flags": "empty drift"}, {"case": "a", "flags": "drift"}, {"case": "b", "flags": None}]
    data = {"night": "2026-11-23_010000", "changed": 1, "rows": rows, "flags": {"drift": 2, "empty": 1}}
    found = told("liver", data, "reports/liver/x.csv")
    assert found.text.splitlines() == [
        "night 2026-11-23_010000 of cohort liver: 1 of 3 rows changed, 2 cases",
        "flag   rows",
        "drift     2",
        "empty     1",
        "table: reports/liver/x.csv",
    ]
    assert (found.cases, found.extra) == ([], data | {"report": "reports/liver/x.csv"})
    assert told("liver", data | {"flags": {}}, "x.csv").text.count("\n") == 1
