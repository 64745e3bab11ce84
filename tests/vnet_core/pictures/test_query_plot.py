"""The picture of an answer: which one fits the rows, and that names do nothing in it."""

import io
from typing import Any

import pytest
from PIL import Image

from vnet_core.pictures.query_plot import answer_picture

NIGHT, LATER = "2026-01-30_010000", "2026-01-31_010000"


def row(case: str, volume_ml: float | None, night: str = NIGHT, name: str | None = "organ") -> dict[str, Any]:
    return {"night": night, "cohort": "liver", "case": case, "name": name, "volume_ml": volume_ml}


def drawn(rows: list[dict[str, Any]]) -> str:
    """What a picture shows, in words; that it is one is checked."""
    found = answer_picture(rows)
    assert found is not None
    png, words = found
    assert Image.open(io.BytesIO(png)).size == (792, 440)
    assert len(png) < 60_000
    assert answer_picture(rows) == found, "the same rows give the same bytes"
    return words


@pytest.mark.parametrize("rows", [[], [row("a", None)], [row("a", 1.0, name=None)], [{"month": "2026-01", "n": 3}]])
def test_rows_without_a_volume_have_no_picture(rows: list[dict[str, Any]]) -> None:
    assert answer_picture(rows) is None


def test_one_night_is_a_distribution() -> None:
    assert drawn([row("a", 1.0)]) == "how many cases have which volume"
    assert drawn([row("a", 0.0), row("b", 0.0), row("c", 1e6)]) == "how many cases have which volume"


def test_few_cases_over_nights_are_lines() -> None:
    rows = [row("a", 1.0), row("a", 2.0, LATER), row("b", None, LATER)]
    assert drawn(rows) == "the volume of each case over the nights"


def test_many_cases_over_nights_are_a_median_and_a_range() -> None:
    rows = [row(f"case {i}", float(i), night) for i in range(8) for night in (NIGHT, LATER)]
    assert drawn(rows) == "the median volume over the nights, and the range that holds nine cases of ten"
    assert drawn(rows[:14]) == "the volume of each case over the nights"


def test_labels_that_do_not_fit_are_counted() -> None:
    rows = [row("a", float(i), name=f"label {i}") for i in range(9)]
    assert drawn(rows) == "how many cases have which volume; 7 of 9 labels"
    over = [row(f"case {i}", 1.0, night, f"label {i}") for i in range(9) for night in (NIGHT, LATER)]
    assert drawn(over).endswith("; 7 of 9 labels")


def test_names_are_drawn_as_they_are() -> None:
    names = ["$\\frac{", "_hidden", "a" * 200]
    drawn([row("a", 1.0, name=name) for name in names])
    plain, other = answer_picture([row("a", 1.0, name="hidden")]), answer_picture([row("a", 1.0, name="_hidden")])
    assert plain != other
