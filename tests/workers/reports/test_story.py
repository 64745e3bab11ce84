"""What is told of a night: by pencil, in the order of the page, from rows alone."""

from pathlib import Path

import pytest

from tests.workers.night_of_phantoms import FIRST, SECOND, blank, labelled, new_root, night_of, save_night
from vnet_core.reporting import FLAGS as RAISED
from workers.reports.document import Code, Grid, Heading, Items
from workers.reports.earlier import TREND_NIGHTS, Before, night_before, trend
from workers.reports.flag_words import FLAGS
from workers.reports.story import (
    LABEL_ROWS,
    NAMES,
    UNDONE_LINES,
    Evidence,
    case_blocks,
    millilitres,
    needs_a_look,
    overview,
    worst_first,
)

NO_PICTURE = Evidence(None, "No picture.")


def words(block) -> str:
    """The text of a block without its marks, its items in lines."""
    if isinstance(block, Heading):
        return f"{'#' * block.level} {block.text}"
    if isinstance(block, Grid):
        return "\n".join(" | ".join(cells) for cells in (block.header, *block.rows))
    texts = block.items if isinstance(block, Items) else [block.text]
    return "\n".join("".join(w if isinstance(w, str) else w.text for w in text) for text in texts)


def told(rows, before=None, **facts) -> str:
    earlier = None if before is None else Before(FIRST, before)
    return "\n".join(words(block) for block in overview(night_of(rows, **facts), rows, earlier, Code("volumes-liver")))


def of_case(*rows, evidence=NO_PICTURE) -> str:
    return "\n".join(words(block) for block in case_blocks(rows, evidence))


def line(text: str, start: str) -> str:
    (found,) = [line for line in text.splitlines() if line.startswith(start)]
    return found


def test_the_parts_of_a_night_are_in_their_order():
    rows = [
        labelled("a", review="awaiting", flags="low-agreement"),
        blank("b", state="refused", codes="scan.truncated", message="cut short; copy it again"),
    ]
    titles = [text for text in told(rows, before=[]).splitlines() if text.startswith("#")]
    assert titles == [
        "# liver, 23 November 2026, 01:00 UTC",
        "## Since 22 November 2026, 01:00 UTC",
        "## Awaiting review (1)",
        "## Without a mask (1)",
        "## Volumes",
    ]


# --- one line


def states(computed=0, cached=0, failed=0, refused=0, carried_over=0):
    done = [labelled(f"d{n}", state="computed" if n < computed else "cached") for n in range(computed + cached)]
    left = {"failed": failed, "refused": refused, "carried-over": carried_over}
    return done + [blank(f"{state}{n}", state=state) for state, number in left.items() for n in range(number)]


@pytest.mark.parametrize(
    ("rows", "facts", "text"),
    [
        (
            states(computed=12, cached=300, carried_over=88, refused=7),
            {"stopped": "deadline", "rules": {"deadline": "06:00"}},
            "312 of 400 usable cases have a mask (78 %), 88 carried over: the deadline 06:00 came.",
        ),
        (
            states(computed=1, carried_over=2),
            {"stopped": "hours", "rules": {"hours": 1.0}},
            "1 of 3 usable cases has a mask (33 %), 2 carried over: its 1 hour of machine time were used up.",
        ),
        (states(cached=999, failed=1), {}, "999 of 1000 usable cases have a mask (99 %)."),
        (states(cached=1), {}, "1 of 1 usable case has a mask."),
        (
            states(computed=1, carried_over=1),
            {"stopped": "cancelled"},
            "1 of 2 usable cases has a mask (50 %), 1 carried over: it was cancelled.",
        ),
        (states(refused=3), {}, "No case has a mask: none of 3 is usable."),
        ([], {}, "No case has a mask: the cohort is empty."),
    ],
)
def test_coverage_is_told_in_one_line(rows, facts, text):
    assert told(rows, **facts).splitlines()[1].startswith(text)


@pytest.mark.parametrize("stopped", ["cancelled", "died"])
def test_every_reason_to_stop_has_words(stopped):
    assert f"{stopped}." in told(states(computed=1, carried_over=1), stopped=stopped)


# --- what changed


def test_what_changed_is_told_kind_by_kind():
    before = [
        labelled("calm", state="cached"),
        labelled("grown", volume_ml=10.0),
        labelled("flagged", flags="empty"),
        labelled("worse", flags="empty"),
        labelled("broke"),
        labelled("gone"),
        blank("bad", state="failed"),
        blank("sick", state="failed"),
    ]
    rows = [
        labelled("calm", state="cached", change_ml=0.0, change_percent=0.0),
        labelled("grown", volume_ml=12.0, change_ml=2.0, change_percent=20.0),
        labelled("flagged", state="cached", flags="empty"),
        labelled("worse", state="cached", flags="empty drift"),
        blank("broke", state="failed"),
        blank("bad", state="failed"),
        blank("sick", state="refused"),
        labelled("new"),
    ]
    text = told(rows, before)
    assert line(text, "New cases") == "New cases (1): new"
    assert line(text, "Gone cases") == "Gone cases (1): gone"
    assert line(text, "New masks") == "New masks (2): grown, new"
    assert line(text, "Newly failing") == "Newly failing (1): broke"
    assert line(text, "Newly refused") == "Newly refused (1): sick"
    assert line(text, "Newly flagged") == "Newly flagged (1): worse organ drift"
    assert line(text, "Volumes that") == "Volumes that changed most (of 1): grown organ 10.00 → 12.00 mL (+20.0\u00a0%)"


def test_a_night_like_the_one_before_says_so():
    rows = [labelled("a", state="cached", change_ml=0.0, change_percent=0.0)]
    assert "Nothing changed." in told(rows, rows)
    assert "There is no earlier night to compare with." in told(rows)


def test_long_lists_are_cut_and_counted():
    rows = [labelled(f"c{n:02}") for n in range(NAMES + 3)]
    assert line(told(rows, []), "New cases").endswith("c09 and 3 more")


def test_a_label_that_was_renamed_is_not_newly_flagged():
    before = [labelled("a", "liver", flags="empty")]
    assert "Newly flagged" not in told([labelled("a", "Leber", flags="empty")], before)


# --- without a mask


def test_cases_without_a_mask_have_reasons_and_remedies():
    rows = [
        blank("c", state="refused", codes="scan.truncated", message="cut short; copy it again"),
        blank("a", state="refused", codes="scan.truncated", message="cut short; copy it again"),
        blank("q", state="failed", codes="night.quarantined x.y", message="release it with vnet release", attempts=3),
        blank("f", state="failed", codes="segment.memory", message="use fewer workers", attempts=2),
        blank("o", state="carried-over", codes="", message="said by the night"),
    ]
    text = told(rows).split("## Without a mask (5)\n")[1]
    assert text.splitlines() == [
        "q quarantined, night.quarantined x.y: release it with vnet release",
        "f failed (2 tries so far), segment.memory: use fewer workers",
        "a, c refused, scan.truncated: cut short; copy it again",
        "o carried over: the next night begins with them",
    ]


def test_ten_thousand_reasons_are_cut_and_counted():
    rows = [blank(f"{n:05}", state="failed", message=f"{n:05}") for n in range(10_000)]
    text = told(rows)
    assert text.count("failed: ") == UNDONE_LINES
    assert text.splitlines()[-1] == f"and {10_000 - UNDONE_LINES} more, all in volumes-liver"


# --- volumes and cases


def test_volumes_of_labels_then_regions():
    rows = [
        labelled("a", "liver", 1234.6),
        labelled("a", "cyst", 0.0123, label=2, flags="empty touches-border"),
        labelled("a", "all", 1234.6, label=None),
        labelled("b", "liver", 20.0, flags="empty"),
    ]
    text = told(rows).split("## Volumes\n")[1]
    assert text.splitlines() == [
        "label | masks | median mL | range mL",
        "liver | 2 | 627.3 | 20 to 1235",
        "cyst | 1 | 0.0123 | 0.0123 to 0.0123",
        "all | 1 | 1234.6 | 1235 to 1235",
        f"empty 2 cases: {FLAGS['empty']}",
        f"touches-border 1 case: {FLAGS['touches-border']}",
    ]


@pytest.mark.parametrize(
    ("volume_ml", "text"), [(0, "0"), (0.0123, "0.0123"), (0.5, "0.500"), (5.25, "5.25"), (1234.56, "1234.6")]
)
def test_millilitres(volume_ml, text):
    assert millilitres(volume_ml) == text


def test_every_flag_that_is_raised_has_a_sentence():
    assert tuple(FLAGS) == RAISED
    for flag in RAISED:
        assert FLAGS[flag] in of_case(labelled("a", flags=flag))


def test_the_documentation_says_the_same_of_every_flag():
    page = (Path(__file__).parents[3] / "docs" / "quality.md").read_text(encoding="utf-8")
    cells = [line.split(" | ") for line in page.splitlines() if line.startswith("| `")]
    said = {flag.strip("| `"): meaning for flag, meaning, *_ in cells if flag.strip("| `") in FLAGS}
    assert said == FLAGS


def test_a_case_is_told_with_yesterday_range_patient_and_decision():
    text = of_case(
        labelled(
            "a",
            volume_ml=12.0,
            change_ml=2.0,
            change_percent=20.0,
            touches_border=True,
            volume_low_ml=11.0,
            volume_high_ml=13.5,
            agreement=0.876,
            flags="drift",
            earlier_case="a0",
            patient_change_ml=-3.0,
            patient_change_percent=-20.0,
            change_uncertainty_ml=1.25,
            review="rejected",
            reviewed_by="Dr X",
            reviewed_at="2026-11-23T08:00:00+00:00",
        ),
        labelled("a", "cyst", 0.1, label=2, change_ml=0.1, components=14, flags="many-components drift"),
        evidence=Evidence(b"png", "", ("spacing 5 mm, trained up to 2 mm",)),
    )
    assert text.splitlines() == [
        "### a",
        "label | mL | before | change",
        "organ | ≥\u00a012.00 | 10.00 | +20.0\u00a0%",
        "cyst | 0.100 | 0 | new",
        "organ: 11.00 to 13.50 mL over folds and mirror images, agreement 0.88",
        "organ: -3.00 mL (-20.0 %) since the patient's scan a0, of which 1.25 mL may be technical",
        f"cyst many-components (14): {FLAGS['many-components']}",
        f"drift: {FLAGS['drift']}: spacing 5 mm, trained up to 2 mm",
        "rejected: its mask is not delivered, by Dr X at 2026-11-23T08:00:00+00:00",
    ]


def test_a_case_of_a_hundred_labels_shows_its_flagged_ones():
    rows = [labelled("a", f"l{n:03}", label=n + 1, flags="empty" if n == 90 else "") for n in range(100)]
    text = of_case(*rows)
    assert text.count("10.00") == LABEL_ROWS
    assert "l090 | 10.00" in text
    assert f"{100 - LABEL_ROWS} more labels" in text


def test_rows_of_older_versions_are_told():
    old = {
        name: value for name, value in labelled("a", flags="empty").items() if not name.startswith(("review", "vol"))
    }
    old |= {"volume_ml": 1.0}
    for name in ("attempts", "agreement", "earlier_case", "patient_change_ml"):
        old.pop(name)
    assert "empty" in of_case(old)
    assert "1 of 1 usable case has a mask" in told([old])


def test_the_worst_cases_come_first_and_accepted_ones_last():
    rows = [
        labelled("calm", change_ml=0.0, change_percent=0.0),
        labelled("grown", change_ml=1.0, change_percent=11.0),
        labelled("shrunk", change_ml=-1.5, change_percent=-15.0),
        labelled("appeared", change_ml=0.1),  # nothing the night before: no percentage, yet the largest change
        labelled("one flag", flags="empty"),
        labelled("two flags"),
        labelled("two flags", "cyst", label=2, flags="touches-border many-components"),
        labelled("accepted", flags="empty drift", review="accepted"),
        labelled("waits", flags="empty", review="awaiting"),
        blank("failed", state="failed"),
    ]
    expected = ["waits", "two flags", "one flag", "appeared", "shrunk", "grown", "accepted", "calm"]
    assert [case[0]["case"] for case in worst_first(rows)] == expected
    assert [case[0]["case"] for case in worst_first(rows[::-1])] == expected


@pytest.mark.parametrize(
    ("columns", "wanted"),
    [
        ({"state": "computed"}, True),
        ({"change_ml": 0.0}, False),
        ({"change_ml": 0.1}, True),
        ({"flags": "empty"}, True),
        ({"flags": "empty", "review": "accepted"}, False),
        ({"review": "awaiting"}, True),
        ({"review": "rejected"}, True),
    ],
)
def test_what_needs_a_look(columns, wanted):
    assert needs_a_look([labelled("a", **({"state": "cached"} | columns))]) is wanted


# --- earlier nights


def test_the_night_before_and_the_trend_are_read_by_column(tmp_path):
    root = new_root(tmp_path)
    assert night_before(root, "liver", SECOND) is None
    for day in range(1, 41):
        month, number = divmod(day - 1, 30)
        night = f"2026-{10 + month}-{number + 1:02}_010000"
        rows = [labelled("a", volume_ml=float(day)), labelled("b", volume_ml=day + 2.0), blank("c", state="failed")]
        save_night(root, rows, night)
    before = night_before(root, "liver", "2026-11-10_010000")
    assert before.night == "2026-11-09_010000"
    assert [row["case"] for row in before.rows] == ["a", "b", "c"]
    nights = trend(root, "liver", "2026-11-09_010000")
    assert len(nights) == TREND_NIGHTS
    assert (nights[0].night, nights[-1].night) == ("2026-10-10_010000", "2026-11-09_010000")
    root.put("reports/liver/2026-11-05_010000.parquet", b"damaged")
    assert len(trend(root, "liver", "2026-11-09_010000")) == TREND_NIGHTS - 1
    assert (nights[-1].cases, nights[-1].median_ml) == ({"computed": 2, "failed": 1}, {"organ": 40.0})
