"""The Markdown and the tables that the Prefect UI shows."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from flows.ui.artifacts import ANSWER_COLUMNS, TABLE_ROWS, VOLUME_COLUMNS, artifact_key, training_markdown, volume_table
from flows.ui.markdown import DAMAGED, NO_PICTURE, PICTURE_BYTES, PICTURES, REPORT_BYTES, night_report, to_markdown
from flows.ui.pages import MISSING, evidence, first_to_be_read, night_plots
from tests.workers.night_of_phantoms import FIRST, SECOND, blank, labelled, new_root, night_of, segmented
from vnet_core.phantoms import PhantomSpec
from workers.reports.columns import SCHEMA
from workers.reports.document import Code, Link, Picture, Strong, paragraph
from workers.reports.earlier import Before, Sums
from workers.reports.flag_words import FLAGS
from workers.reports.story import NAMES, Evidence, by_case, cases_title, needs_a_look, overview, worst_first
from workers.segmentation.masks import NO_PICTURE as BURNT_IN

TABLE = Link("volumes-liver", "/v2/artifacts/key/volumes-liver")


def png(seed: int = 0, size: tuple[int, int] = (60, 40)) -> bytes:
    """A picture of noise."""
    out = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(out, "PNG")
    return out.getvalue()


SMALL = Evidence(png(), "")


def report(rows, before=None, found=lambda key: SMALL, plots=(), **facts) -> str:
    told = [*overview(night_of(rows, **facts), rows, before, TABLE), *plots]
    cases = [case for case in worst_first(rows) if needs_a_look(case)]
    told += cases_title(len(cases), len(worst_first(rows)) - len(cases))
    return night_report(told, cases, found, paragraph("More in ", TABLE, "."))


def cases_in(text: str) -> list[str]:
    return re.findall(r"^### (.*)$", text, re.MULTILINE)


def without_pictures(text: str) -> str:
    return re.sub(r"base64,[A-Za-z0-9+/=]+", "base64,", text)


def test_a_night_is_told_from_one_line_to_the_pictures() -> None:
    rows = [
        labelled("a", "liver", 1234.5, touches_border=True, flags="touches-border", change_ml=2.0, change_percent=0.16),
        labelled("b", "liver", 20.0),
        blank("c", state="refused", codes="scan.truncated", message="the file ends early; copy it again"),
    ]
    text = report(rows, Before(FIRST, [labelled("a", flags="touches-border"), rows[2]]), plots=[Picture("plot", b"x")])
    assert without_pictures(text) == "\n".join(
        [
            "# liver, 23 November 2026, 01:00 UTC",
            "",
            "**2 of 2 usable cases have a mask.** 1 of them is flagged.",
            "",
            f"Model `organs@v2`: 2 computed, 1 refused, in 13 min. Night `{SECOND}`.",
            "",
            "Research software, not a medical device: volumes and masks need a qualified person's review.",
            "",
            "## Since 22 November 2026, 01:00 UTC",
            "",
            "- **New cases (1):** b",
            "- **New masks (2):** a, b",
            "- **Volumes that changed most (of 1):** a liver 1232.5 → 1234.5 mL (+0.2\u00a0%)",
            "",
            "## Without a mask (1)",
            "",
            "- **c** refused, `scan.truncated`: the file ends early; copy it again",
            "",
            "## Volumes",
            "",
            "| label | masks | median mL | range mL |",
            "| --- | --- | --- | --- |",
            "| liver | 2 | 627.2 | 20 to 1234 |",
            "",
            f"- `touches-border` 1 case: {FLAGS['touches-border']}",
            "",
            "![plot](data:image/png;base64,)",
            "",
            "## Cases",
            "",
            "Worst first: flagged cases, then by the largest change.",
            "",
            "### a",
            "",
            "| label | mL | before | change |",
            "| --- | --- | --- | --- |",
            "| liver | ≥\u00a01234.5 | 1232.5 | +0.2\u00a0% |",
            "",
            f"- liver `touches-border`: {FLAGS['touches-border']}",
            "",
            "![a](data:image/webp;base64,)",
            "",
            "### b",
            "",
            "| label | mL |",
            "| --- | --- |",
            "| liver | 20.00 |",
            "",
            "![b](data:image/webp;base64,)",
            "",
            "More in [volumes-liver](/v2/artifacts/key/volumes-liver).",
            "",
        ]
    )


def test_a_quiet_night_is_short() -> None:
    rows = [labelled(f"c{n}", state="cached", change_ml=0.0, change_percent=0.0) for n in range(500)]
    text = report(rows, Before(FIRST, rows))
    assert "Nothing changed." in text
    assert "No case needs a look tonight: none is new, changed or flagged. 500 others are as they were" in text
    assert cases_in(text) == []
    assert len(text) < 1_500


def widest_columns(text: str) -> int:
    return max(line.count("|") - 1 for line in re.sub(r"\\\|", "", text).splitlines() if line.startswith("|"))


def test_no_table_is_too_wide_for_a_phone() -> None:
    everything = {
        "volume_low_ml": 1200.0,
        "volume_high_ml": 1300.0,
        "agreement": 0.5,
        "patient_change_ml": 3.0,
        "review": "awaiting",
        "change_ml": -1234.5,
        "change_percent": -1234.5,
        "touches_border": True,
        "flags": "touches-border many-components drift",
    }
    text = report([labelled("a", volume_ml=12345.6, **everything), labelled("b", volume_ml=0.0001)], Before(FIRST, []))
    assert widest_columns(text) == 4
    cells = [line for line in text.splitlines() if line.startswith("| organ")]
    # of a column of 340 pixels with 16 pixel letters
    assert max(map(len, cells)) <= 50
    assert widest_columns(training_markdown(FACTS, {})) == 2


def test_nothing_of_it_is_mermaid_or_html() -> None:
    text = report([labelled("a"), blank("b", state="failed")])
    assert "```" not in text
    assert "<" not in text


# --- what comes from outside


EVIL = "<script>x</script>|`*_[a](http://b)\n# c\x00\u202e"


def test_names_and_messages_cannot_become_markup() -> None:
    rows = [
        labelled(
            EVIL, EVIL, flags="empty", review="rejected", reviewed_by=EVIL, earlier_case=EVIL, patient_change_ml=1.0
        ),
        blank(f"{EVIL} again", state="refused", codes=EVIL, message=EVIL),
        labelled("waits", EVIL, flags=f"{EVIL} empty", review="awaiting"),
    ]
    text = report(rows, Before(FIRST, [labelled(EVIL * 2)]), found=lambda key: Evidence(None, EVIL, (EVIL,)))
    assert "<" not in text
    text = re.sub(r"\\[`|\[\]#*_]", "", text)  # what is escaped
    text = re.sub(r"`[^`\n]*`", "", text)  # code spans
    assert "`" not in text
    assert "x&lt;/script&gt;" in text
    assert not re.search(r"\[a", text)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e]", text)
    assert [line for line in text.splitlines() if line.startswith("# ")] == ["# liver, 23 November 2026, 01:00 UTC"]
    assert widest_columns(text) == 4


def test_a_link_leads_where_it_says_and_nowhere_else() -> None:
    evil = Link("a](http://b) [c", "/v2/x) [c](javascript:alert(1)")
    assert to_markdown([paragraph(evil)]) == r"[a\](http://b) \[c](/v2/xcjavascript:alert1)"
    assert to_markdown([paragraph(Strong("b: "), " c ", Code("d`e"))]) == "**b:**  c `de`"


def test_a_name_that_no_encoding_takes_is_shown_with_a_mark() -> None:
    assert cases_in(report([labelled("caf\udce9")])) == ["caf\ufffd"]
    assert json.dumps(volume_table([labelled("caf\udce9")]), ensure_ascii=False).encode()


# --- size


def test_pictures_stop_at_their_number_and_the_rest_is_counted() -> None:
    rows = [labelled(f"case-{number:02}") for number in range(PICTURES + 3)]
    text = report(rows)
    assert cases_in(text) == [f"case-{number:02}" for number in range(PICTURES)]
    assert text.count("![") == PICTURES
    assert "\n3 more cases have no section here." in text
    assert "\n1 more case has no section here." in report(rows[: PICTURES + 1])
    assert " more case" not in report(rows[:PICTURES])


def test_pictures_that_do_not_fit_are_left_out_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.ui.markdown.REPORT_BYTES", 9_000)
    large = Evidence(png(size=(80, 60)), "")
    sizes = {"a": SMALL, "b": large, "c": SMALL, "d": large}
    text = report([labelled(case) for case in sizes], found=lambda key: sizes[key.split("/")[2]])
    assert cases_in(text) == list(sizes)
    assert len(text.encode()) <= 9_000
    pictures = text.count("![")
    assert 1 <= pictures < 4
    assert f"{4 - pictures} picture" in text


def test_the_worst_night_stays_within_its_bytes() -> None:
    evil, names = "<" * 10_000, [f"label {n} " + "x" * 500 for n in range(104)]
    rows = [labelled(f"{n:03}" + evil, name, flags="empty drift") for n in range(60) for name in names]
    rows += [
        blank(f"bad-{n:04}" + evil, state="failed", codes=f"{n}" + evil, message=f"{n}{evil}") for n in range(3_000)
    ]
    noise = Evidence(png(size=(450, 500)), "", (evil,) * 3)
    plots = [Picture("plot", png(n, (60, 80))) for n in range(4)]
    text = report(rows, Before(FIRST, []), found=lambda key: noise, plots=plots)
    assert len(text.encode()) <= REPORT_BYTES < 2_000_000
    assert "3000 failed" in text
    assert "No case has" not in text


def test_a_picture_of_a_report_is_small_and_shows_the_same() -> None:
    rows = [labelled("a")]
    text = report(rows, found=lambda key: Evidence(png(size=(684, 844)), ""))
    (content,) = re.findall(r"data:image/webp;base64,([^)]+)", text)
    picture = base64.b64decode(content)
    assert len(picture) <= PICTURE_BYTES
    with Image.open(io.BytesIO(picture)) as shown:
        assert shown.width / shown.height == pytest.approx(844 / 684, rel=0.01)


@pytest.mark.parametrize("content", [b"", b"no picture", png()[:40], png()[:400]])
def test_a_damaged_picture_does_not_cost_the_report(content) -> None:
    text = report([labelled("a")], found=lambda key: Evidence(content, ""))
    assert DAMAGED in text
    assert "![" not in text


def test_an_empty_night_has_a_report() -> None:
    text = report([])
    assert "**No case has a mask: the cohort is empty.**" in text
    assert volume_table([]) == []
    assert night_plots([], []) == []


# --- what is read from the root


def test_evidence_is_the_picture_or_why_there_is_none(tmp_path) -> None:
    root = new_root(tmp_path)
    key = segmented(root, "a", PhantomSpec(1, (12, 14, 16)))[0]["result"]
    assert evidence(root, key) == Evidence(root.get(f"{key}/qc.png"), "")
    root.put_json(f"{key}/report.json", root.get_json(f"{key}/report.json") | {"drift": ["far away"]})
    assert evidence(root, key).drift == ("far away",)
    root.put_json(f"{key}/report.json", {"picture": BURNT_IN})
    assert evidence(root, key) == Evidence(None, NO_PICTURE)
    root.put_json(f"{key}/report.json", {"picture": "qc.png"})
    root.delete(f"{key}/qc.png")
    assert evidence(root, key) == Evidence(None, MISSING)
    assert evidence(root, "results/liver/b/x") == Evidence(None, MISSING)


def test_plots_are_those_that_there_is_something_for() -> None:
    night = Sums(SECOND, {"computed": 1}, {"organ": 2.0})
    rows = [labelled("a", seconds=3.0, flags="implausible-volume")]
    assert [plot.words for plot in night_plots(rows, [night])] == ["volumes by label", "seconds per case"]
    assert [plot.words for plot in night_plots(rows, [night, night])][1:3] == [
        "cases by night",
        "median volume by night",
    ]
    assert [plot.words for plot in night_plots([blank("a", state="failed")], [night])] == []


# --- tables


def test_tables_have_every_column_in_the_first_row_and_nothing_is_none() -> None:
    rows = [
        blank("c", state="refused", message="the file ends early"),
        labelled("a", volume_ml=1.23456, change_percent=-3.14159),
        {"case": "old"},
    ]
    for columns in (VOLUME_COLUMNS, ANSWER_COLUMNS):
        table = volume_table(rows, columns)
        assert [tuple(line) for line in table] == [columns] * 3  # the UI takes its columns from the first row
        assert all(value is not None for line in table for value in line.values())
        assert (table[1]["volume_ml"], table[1]["change_percent"]) == (1.235, -3.142)
        assert table[0]["message"] == "the file ends early"
        assert json.loads(json.dumps(table, allow_nan=False)) == table
    assert set(ANSWER_COLUMNS) == set(VOLUME_COLUMNS) <= set(SCHEMA.names)
    assert len(volume_table(blank(f"{number}") for number in range(TABLE_ROWS + 5))) == TABLE_ROWS


def test_a_table_begins_with_what_has_to_be_read() -> None:
    rows = [
        labelled("calm", state="cached"),
        labelled("calm", "cyst", state="cached"),
        labelled("flagged", state="cached", flags="empty"),
        labelled("new"),
        blank("failed", state="failed"),
    ]
    assert list(by_case(first_to_be_read(rows))) == ["failed", "flagged", "new", "calm"]
    assert len(first_to_be_read(rows)) == len(rows)


def test_keys_are_those_that_prefect_takes() -> None:
    assert artifact_key("night", "Liver_2026.MR") == "night-liver-2026-mr"
    assert artifact_key("night", "-a-") == "night-a"
    assert re.fullmatch("[a-z0-9-]+", artifact_key("volumes", "Ä b/c"))


FACTS = {
    "name": "liver",
    "version": "v2",
    "training": {
        "steps": 1200,
        "minutes": 29.96,
        "workers": 2,
        "precision": "bfloat16",
        "parameters": 1234567,
        "training_cases": ["a", "b"],
        "validation_cases": ["c"],
        "folds": 1,
        "started_from": "liver@v2",
    },
    "cleaning": ["spleen: nothing, because <b>no</b> candidate helps"],
    "metrics": {"validation_dice": {"liver": 0.95678}},
}


def test_a_model_has_its_figures_and_curves() -> None:
    text = training_markdown(FACTS, {"loss.png": b"PNG"})
    assert text.startswith("# Model liver@v2\n")
    for name, figure in (("steps", 1200), ("minutes", "30.0"), ("parameters", "1,234,567"), ("training cases", 2)):
        assert f"| {name} | {figure} |" in text
    assert "| liver | 0.957 |" in text
    assert "- spleen: nothing, because" in text
    assert "<b>" not in text
    assert text.endswith(f"![loss.png](data:image/png;base64,{base64.b64encode(b'PNG').decode()})\n")
    assert "validation Dice" not in training_markdown(FACTS | {"metrics": {"validation_dice": {}}}, {})


def test_the_names_in_a_line_are_few() -> None:
    rows = [labelled(f"case-{n:04}") for n in range(3_000)]
    text = without_pictures(report(rows, Before(FIRST, [])))
    assert f"and {3_000 - NAMES} more" in text
    assert max(map(len, text.splitlines())) < 400
