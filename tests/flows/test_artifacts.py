"""The Markdown and the tables that the Prefect UI shows."""

import base64
import json
import re

import numpy as np
import pytest

from flows import artifacts
from flows.artifacts import (
    ANSWER_COLUMNS,
    PICTURES,
    REPORT_BYTES,
    TABLE_ROWS,
    UNDONE_LINES,
    VOLUME_COLUMNS,
    artifact_key,
    night_markdown,
    training_markdown,
    volume_table,
)
from vnet_core.geometry import Geometry
from vnet_core.plan import Label
from vnet_core.report import MANY_COMPONENTS, flags, measure
from workers.report import SCHEMA, Night

PNG = b"\x89PNG picture"


def night(**counts: int) -> Night:
    return Night("2026-03-01_003000", "liver", "liver@v2", "2026-03-01T00:30:00+00:00", 754.0, counts)


def row(case: str, name: str = "liver", volume_ml: float | None = 10.0, **more: object) -> dict[str, object]:
    found = {"night": "2026-03-01_003000", "cohort": "liver", "model": "liver@v2", "state": "computed", "codes": ""}
    size = {"label": 1, "components": 1, "touches_border": False, "slice_first": 3, "slice_last": 9, "flags": ""}
    place = {"case": case, "name": name, "volume_ml": volume_ml, "message": "", "result": f"results/liver/{case}/x"}
    return dict.fromkeys(SCHEMA.names) | found | size | place | more


def refused(case: str, message: str = "the file ends early", code: str = "scan.truncated") -> dict[str, object]:
    empty = dict.fromkeys(SCHEMA.names)
    return empty | {"case": case, "state": "refused", "codes": code, "message": message, "cohort": "liver"}


def report(rows: list[dict[str, object]], **counts: int) -> str:
    return night_markdown(night(**counts), rows, lambda key: PNG)


def cases_in(text: str) -> list[str]:
    return re.findall(r"^### (.*)$", text, re.MULTILINE)


def test_a_night_is_told_from_the_counts_to_the_pictures() -> None:
    rows = [
        row("a", volume_ml=1234.5, touches_border=True, flags="touches-border", change_ml=2.0, change_percent=0.16),
        row("a", "cyst", 0.0123, label=2, slice_first=4, slice_last=4, components=2, change_ml=0.0123),
        row("b", volume_ml=20.0),
        refused("c"),
    ]
    assert report(rows, computed=2, refused=1) == "\n".join(
        [
            "# liver, 01 March 2026, 00:30 UTC",
            "",
            "**2 of 3 cases have a mask.** 1 of them is flagged.",
            "",
            "Model `liver@v2`: 2 computed, 1 refused, in 13 min. Night `2026-03-01_003000`.",
            "",
            f"*{artifacts.NOTICE}*",
            "",
            "## Without a mask (1)",
            "",
            "- **c** refused, `scan.truncated`: the file ends early",
            "",
            "## Volumes",
            "",
            "| label | cases | median mL | smallest | largest | flagged |",
            "| --- | --- | --- | --- | --- | --- |",
            "| liver | 2 | 627.2 | 20.00 | 1234.5 | 1 |",
            "| cyst | 1 | 0.0123 | 0.0123 | 0.0123 | 0 |",
            "",
            "## Cases",
            "",
            "Flagged cases first, then by the largest change since the night before.",
            "",
            "- `touches-border`: the structure reaches the edge of the scan: its volume is at least what is stated",
            "",
            "### a",
            "",
            "| label | mL | change | slices | pieces | flags |",
            "| --- | --- | --- | --- | --- | --- |",
            "| liver | ≥\u00a01234.5 | +0.2 % | 3\u20119 | 1 | touches-border |",
            "| cyst | 0.0123 | was 0 | 4 | 2 |  |",
            "",
            f"![a](data:image/png;base64,{base64.b64encode(PNG).decode()})",
            "",
            "### b",
            "",
            "| label | mL | slices | pieces |",
            "| --- | --- | --- | --- |",
            "| liver | 20.00 | 3\u20119 | 1 |",
            "",
            f"![b](data:image/png;base64,{base64.b64encode(PNG).decode()})",
            "",
        ]
    )


def test_a_case_without_a_picture_says_why() -> None:
    rows = [row("a", flags="empty"), row("b")]
    text = night_markdown(night(computed=2), rows, lambda key: PNG if "/a/" in key else None)
    assert text.count("![") == 1
    assert text.endswith(f"*{artifacts.NO_PICTURE}*\n")


def test_the_worst_cases_come_first() -> None:
    rows = [
        row("calm", change_ml=0.0, change_percent=0.0),
        row("grown", change_ml=1.0, change_percent=11.0),
        row("shrunk", change_ml=-1.5, change_percent=-15.0),
        row("appeared", change_ml=0.1),  # nothing the night before: no percentage, yet the largest change
        row("one flag", flags="empty", volume_ml=0.0),
        row("two flags"),
        row("two flags", "cyst", label=2, flags="touches-border many-components"),
        row("calm again", change_ml=0.0, change_percent=0.0),
    ]
    expected = ["two flags", "one flag", "appeared", "shrunk", "grown", "calm", "calm again"]
    assert cases_in(report(rows, computed=7)) == expected
    assert cases_in(report(rows[::-1], computed=7)) == expected


def test_names_and_messages_cannot_become_markup() -> None:
    evil = "<script>x</script>|`*_[a](http://b)\n# c\x00\u202e"
    text = report([row(evil, evil), refused(f"{evil} again", evil, evil)], computed=1, refused=1)
    assert "<" not in text
    text = re.sub(r"\\[`|\[\]#]", "", text)  # what is escaped
    (line,) = (line for line in text.splitlines() if line.startswith("- **"))
    assert line.count("`") == 2
    text = re.sub(r"`[^`]*`", "", text)  # code spans
    assert "x&lt;/script&gt;" in text
    assert "[a]" not in text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e]", text)
    assert [line for line in text.splitlines() if line.startswith("# ")] == ["# liver, 01 March 2026, 00:30 UTC"]
    (cells,) = (
        line for line in text.splitlines() if line.startswith("| ") and "script" in line and "10.00 | 3" in line
    )
    assert cells.count("|") == 5  # four columns


def test_a_name_that_no_encoding_takes_is_shown_with_a_mark() -> None:
    text = report([row("caf\udce9")], computed=1)
    assert cases_in(text) == ["caf\ufffd"]
    assert json.dumps(volume_table([row("caf\udce9")]), ensure_ascii=False).encode()


def test_pictures_stop_at_their_number_and_say_how_many_cases_are_left() -> None:
    rows = [row(f"case-{number:02}") for number in range(PICTURES + 3)]
    text = report(rows, computed=len(rows))
    assert cases_in(text) == [f"case-{number:02}" for number in range(PICTURES)]
    assert "3 more cases are in `volumes-liver`." in text
    assert "1 more case is in `volumes-liver`." in report(rows[: PICTURES + 1], computed=PICTURES + 1)
    assert "more case" not in report(rows[:PICTURES], computed=PICTURES)


def test_a_picture_that_is_too_large_is_left_out_and_smaller_ones_still_come() -> None:
    sizes = {"a": REPORT_BYTES // 3, "b": REPORT_BYTES, "c": REPORT_BYTES // 3, "d": 100}
    rows = [row(case) for case in sizes]
    text = night_markdown(night(computed=4), rows, lambda key: b"x" * sizes[key.split("/")[2]])
    assert cases_in(text) == ["a", "c", "d"]
    assert "1 more case is in `volumes-liver`." in text
    assert len(text.encode()) <= REPORT_BYTES


def test_a_night_of_ten_thousand_failures_stays_within_its_bytes() -> None:
    rows = [refused(f"case-{number:05}", "<" * 10_000) for number in range(10_000)]
    text = report(rows, refused=10_000)
    assert "**No case has a mask** (10000 in the cohort)." in text
    assert text.count("\n- **case-") == UNDONE_LINES
    assert f"- and {10_000 - UNDONE_LINES} more, all in `volumes-liver`" in text
    assert len(text.encode()) <= REPORT_BYTES
    assert "## Volumes" not in text


def test_equal_reasons_stand_together() -> None:
    rows = [refused("a", code="scan.x"), refused("b", code="scan.w"), refused("c", code="scan.x")]
    rows[1]["state"], rows[2]["state"] = "failed", "refused"
    assert [line[4] for line in report(rows).splitlines() if line.startswith("- **")] == ["b", "a", "c"]


def test_an_empty_night_has_a_report() -> None:
    text = report([])
    assert "**No case has a mask** (0 in the cohort)." in text
    assert "Model `liver@v2`: the cohort is empty, in 13 min." in text
    assert text.count("\n## ") == 0
    assert volume_table([]) == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "under 1 s"),
        (12.3, "12 s"),
        (89.0, "89 s"),
        (90.0, "2 min"),
        (7199.0, "2 h 0 min"),
        (9000.0, "2 h 30 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    long = Night("n", "liver", "liver@v2", "2026-03-01T00:30:00+00:00", seconds, {"cached": 1})
    assert f"1 cached, in {text}." in night_markdown(long, [row("a")], lambda key: PNG)


def test_the_start_is_told_in_utc() -> None:
    berlin = Night("n", "liver", "liver@v2", "2026-03-02T00:30:00+01:00", 1.0, {"cached": 1})
    assert "01 March 2026, 23:30 UTC" in night_markdown(berlin, [row("a")], lambda key: PNG)


def test_every_flag_of_a_report_is_explained() -> None:
    pieces = np.zeros((1, 1, 2 * MANY_COMPONENTS + 3), np.uint8)
    pieces[..., ::2] = 1
    geometry = Geometry(pieces.shape, (1.0, 1.0, 1.0), (0.0, 0.0, 0.0))
    found = measure(pieces, geometry, (Label(value=1, name="a"), Label(value=2, name="b")))
    assert {flag for one in found for flag in flags(one)} == set(artifacts.FLAGS)


def test_tables_have_every_column_in_the_first_row_and_nothing_is_none() -> None:
    rows = [refused("c"), row("a", volume_ml=1.23456, change_percent=-3.14159), row("b", flags=None)]
    for columns, table in (
        (VOLUME_COLUMNS, volume_table(rows)),
        (ANSWER_COLUMNS, volume_table(rows, ANSWER_COLUMNS)),
    ):
        assert [tuple(line) for line in table] == [columns] * 3  # the UI takes its columns from the first row
        assert all(value is not None for line in table for value in line.values())
        assert (table[1]["volume_ml"], table[1]["change_percent"]) == (1.235, -3.142)
        assert table[0]["message"] == "the file ends early"
        assert json.loads(json.dumps(table, allow_nan=False)) == table
    assert set(ANSWER_COLUMNS) == set(VOLUME_COLUMNS) <= set(SCHEMA.names)
    assert len(volume_table(row(f"{number}") for number in range(TABLE_ROWS + 5))) == TABLE_ROWS


def test_keys_are_those_that_prefect_takes() -> None:
    assert artifact_key("night", "Liver_2026.MR") == "night-liver-2026-mr"
    assert artifact_key("night", "-a-") == "night-a"
    assert re.fullmatch("[a-z0-9-]+", artifact_key("volumes", "Ä b/c"))


def test_a_model_has_its_figures_and_curves() -> None:
    training = {"steps": 1200, "minutes": 29.96, "workers": 2, "precision": "bfloat16", "parameters": 1234567}
    cases = {"training_cases": ["a", "b"], "validation_cases": ["c"], "folds": 1, "started_from": "liver@v2"}
    facts = {
        "name": "liver",
        "version": "v2",
        "training": training | cases,
        "cleaning": ["spleen: nothing, because <b>no</b> candidate helps"],
        "metrics": {"validation_dice": {"liver": 0.95678}},
    }
    text = training_markdown(facts, {"loss.png": PNG})
    assert text.startswith("# Model liver@v2\n")
    assert "| 1200 | 30.0 | 2 | bfloat16 | 1,234,567 | 2 | 1 |" in text
    assert "| liver | 0.957 |" in text
    assert "- spleen: nothing, because" in text
    assert "<b>" not in text
    assert text.endswith(f"![loss.png](data:image/png;base64,{base64.b64encode(PNG).decode()})\n")
    facts["metrics"] = {"validation_dice": {}}
    assert "validation Dice" not in training_markdown(facts, {})
