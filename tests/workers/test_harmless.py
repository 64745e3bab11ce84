"""Text that comes from a header, a file name or a table of labels does nothing where it is shown."""

import csv
import io

import pytest

from workers.harmless import one_line, printable, sheet_cell
from workers.reports.report import to_csv

HOSTILE = "=cmd|' /C calc'!A0\n\x1b[2Jliver\x9b31m\u202e<script>|\r\ud800"


def test_one_line_steers_nothing_and_can_be_stored():
    text = one_line(HOSTILE)
    assert text == "=cmd|' /C calc'!A0 [2Jliver 31m <script>| \ufffd"
    assert text.isprintable()
    assert text.encode()
    assert one_line("Milz größer als 1 mL — 12 µm³") == "Milz größer als 1 mL — 12 µm³"
    assert one_line(3.5) == "3.5"


def test_printed_text_keeps_its_lines_alone():
    assert printable("case  state\na\x1b[1A\x07\tb\r\n") == "case  state\na [1A b \n"


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("=1+1", "'=1+1"),
        ("+1", "'+1"),
        ("-1", "'-1"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("  =1", "  '=1"),
        ("\t=1", " '=1"),
        ("\n@x", " '@x"),
        ("\uff1d1", "'\uff1d1"),
        ("a;=1;+2", "a;'=1;'+2"),
        ("a-b = c; d", "a-b = c; d"),
        ("", ""),
        (-1.5, -1.5),
        (None, None),
        (True, True),
    ],
)
def test_no_cell_is_a_formula(text, cell):
    assert sheet_cell(text) == cell


def test_a_table_has_one_line_per_row_whatever_its_texts_hold():
    table = to_csv([{"case": "a", "name": HOSTILE, "volume_ml": -1.5}, {"case": "b", "name": "liver", "volume_ml": 2}])
    lines = table.decode().splitlines()
    assert len(lines) == 3
    first, second = csv.DictReader(io.StringIO(table.decode()))
    assert first["name"].startswith("'=cmd")
    assert (first["volume_ml"], second["name"]) == ("-1.5", "liver")
