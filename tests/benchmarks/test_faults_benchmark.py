"""The catalogue of faults and its page agree with the tests that name them."""

from benchmarks.faults import BEGIN, END, FAULTS, Outcome, Recorder, marked, read, table, with_table, write
from tests.walkthrough import REPOSITORY

pytest_plugins = ["pytester"]

TWO = """
import pytest
mark = pytest.mark.fault  # not as tests of the program name theirs
@mark("F1", "F2")
def test_seen(record_property):
    record_property("seen", "this")
    record_property("seconds", 2.5)
@mark("F2")
def test_left_out():
    pytest.skip("no tool")
@mark("F3")
def test_wrong():
    assert 1 == 2
"""


def test_every_number_that_a_test_names_is_in_the_catalogue() -> None:
    assert [fault.number for fault in FAULTS] == [f"F{number}" for number in range(1, 36)]
    assert marked() <= {fault.number for fault in FAULTS}


def test_the_page_has_a_row_for_every_fault() -> None:
    text = (REPOSITORY / "docs" / "faults.md").read_text("utf-8")
    rows = [line for line in text.partition(BEGIN)[2].partition(END)[0].splitlines() if line.startswith("| F")]
    assert [row.split(" | ")[:3] for row in rows] == [
        [f"| {fault.number}", fault.injected, fault.expected] for fault in FAULTS
    ]
    untested = {fault.number for fault in FAULTS} - marked()
    assert {row.split(" | ")[0].strip("| ") for row in rows if "no test yet" in row} == untested


def test_what_a_run_came_to_is_a_row(pytester) -> None:
    pytester.makepyfile(TWO)
    pytester.makeini("[pytest]\nmarkers = fault(number): one")
    recorder = Recorder({}, "abc")
    pytester.inline_run(plugins=[recorder])
    rows = table(recorder.outcomes)[2:]
    assert "| passed; this | 2.5 |" in rows[0]
    assert "| 1 passed, 1 skipped; left out: no tool; this | 2.5 |" in rows[1]
    assert "| 1 failed |" in rows[2]
    assert "not in this run" in rows[3]
    file = pytester.path / "kept.json"
    assert read(file) == {}
    write(file, recorder.outcomes)
    assert read(file) == recorder.outcomes


def test_a_test_that_is_run_again_has_its_latest_outcome(pytester) -> None:
    pytester.makepyfile(TWO.replace("1 == 2", "1 == 1"))
    pytester.makeini("[pytest]\nmarkers = fault(number): one")
    test = next(pytester.path.glob("test_*.py")).name + "::test_wrong"
    recorder = Recorder({test: earlier("F3"), "test_other.py::test_it": earlier("F4")}, "abc")
    pytester.inline_run(plugins=[recorder])
    assert recorder.outcomes[test].outcome == "passed"
    assert recorder.outcomes[test].commit == "abc"
    assert recorder.outcomes["test_other.py::test_it"] == earlier("F4")
    rows = table(recorder.outcomes)[2:]
    assert "| passed |" in rows[2]
    assert "| 1 failed; a \\| b | 3.0 (whole test) | `test_other.py` |" in rows[3]


def earlier(fault: str) -> Outcome:
    return Outcome((fault,), "failed", "a | b", 3.0, measured=False, commit="old")


def test_the_table_of_a_page_is_written_anew() -> None:
    text = with_table(f"# Page\n{BEGIN}\nold\n{END}\nafter\n", ["| new |"])
    assert text == f"# Page\n{BEGIN}\n| new |\n{END}\nafter\n"
