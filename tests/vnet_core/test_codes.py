"""Every code that a case can carry is explained, here and in the documentation."""

import ast
import re

import pytest

from tests.verdicts import PAGE, codes_in, codes_in_sources, with_table
from vnet_core.codes import CODES, code_of, nearest, tally


def test_the_walk_over_the_sources_sees_errors_and_warnings_of_scans_alone():
    source = '''
"""A docstring that speaks of ``scan.header``."""
raise ScanError("scan.empty", "no scan.dtype in a message")
raise ScanError(
    "dicom.mosaic" if tiled else "dicom.multiframe", "text"
)
raise ConfigError("label.option", "text")
warnings = ("label.empty", "notes.txt", "label.EMPTY")
path = f"cohorts/{name}/cohort.json"
'''
    assert set(codes_in(ast.parse(source))) == {"label.empty", "scan.empty", "dicom.mosaic", "dicom.multiframe"}


def test_every_code_of_the_sources_is_explained():
    found = codes_in_sources()
    assert not {code: places for code, places in found.items() if code not in CODES}


def test_every_code_that_is_explained_occurs_in_the_sources():
    assert set(CODES) - set(codes_in_sources()) == {"internal.*"}


@pytest.mark.parametrize("name", CODES)
def test_a_code_has_a_meaning_and_a_remedy_of_one_or_two_sentences(name):
    code = CODES[name]
    assert name == "internal.*" or re.fullmatch(r"[a-z]+\.[a-z0-9-]+", name)
    for text in (code.meaning, code.remedy):
        assert text[0].isupper()
        assert text.endswith(".")
        assert 5 < len(text) < 160
        assert "|" not in text, "it would break a table"
    assert list(CODES) == sorted(CODES)


def test_codes_of_faults_in_the_program_share_an_entry():
    assert code_of("internal.KeyError") is CODES["internal.*"]
    assert code_of("scan.empty") is CODES["scan.empty"]
    assert code_of("scan.nothing") is None


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("dicom.missing-slice", "dicom.missing-slices"),
        ("gantry-tilt", "dicom.gantry-tilt"),
        ("duplicate-case", "cohort.duplicate-case"),
    ],
)
def test_the_nearest_code_of_a_mistyped_one(typed, meant):
    assert nearest(typed) == meant


def test_a_tally_counts_cases_and_begins_with_what_was_refused_most():
    verdicts = [
        (),
        ("label.empty",),
        ("label.empty", "dicom.copies", "label.empty"),
        ("scan.header",),
        ("scan.empty",),
        ("scan.empty", "label.empty"),
        ("internal.KeyError",),
        ("engine.worker-died",),
    ]
    rows = tally(verdicts)
    assert [(row["code"], row["state"], row["cases"]) for row in rows] == [
        ("scan.empty", "refused", 2),
        ("scan.header", "refused", 1),
        ("engine.worker-died", "failed", 1),
        ("internal.KeyError", "failed", 1),
        ("label.empty", "warned", 3),
        ("dicom.copies", "warned", 1),
    ]
    assert rows[0]["meaning"] == CODES["scan.empty"].meaning
    assert rows[0]["remedy"] == CODES["scan.empty"].remedy
    assert tally([]) == []


def test_the_table_in_the_documentation_is_that_of_the_program():
    page = PAGE.read_text("utf-8")
    assert page == with_table(page), "run: python -m tests.verdicts"
    assert "| `scan.empty` |" in page
