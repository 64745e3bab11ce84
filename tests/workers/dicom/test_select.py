"""Rules that choose one series per channel, and a reason for each series that is not chosen."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.workers.dicom.series_maker import attributes, voxels_of, write_series
from vnet_core.errors import ConfigError, ScanError
from vnet_core.sections import Selection
from workers.dicom.select import choose
from workers.dicom.tree import Series, scan_tree

CT = Series(
    folder=Path("x"), uid="1", part="", files=(), study="s", patient="p", frame_of_reference="f", modality="CT",
    description="Thorax 2.0 B30f", kernel="B30f", orientation="axial", slice_spacing_mm=2.0, slices=200,
    acquired="2026-01-01T10:00:00", burnt_in=False,
)  # fmt: skip
THICK = replace(CT, uid="2", description="Thorax 5.0", kernel="B70s", slice_spacing_mm=5.0, slices=80)
SAGITTAL = replace(CT, uid="3", description="T2 sag", modality="MR", orientation="sagittal", slice_spacing_mm=4.0)
LATER = replace(CT, uid="4", acquired="2026-02-01", slices=100)
BROKEN = replace(CT, uid="5", problem=ScanError("dicom.missing-slices", "2 slices are missing"))


def code(series: list[Series], *rules: Selection) -> str:
    with pytest.raises(ScanError) as caught:
        choose(series, rules)
    for text in ("Thorax", "B30f", "sag"):
        assert text not in str(caught.value)
    return caught.value.code


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({"modality": "mr"}, SAGITTAL),
        ({"modality": "CT", "slice_spacing_mm": (4, 6)}, THICK),
        ({"slice_spacing_mm": (2, 2)}, CT),
        ({"description": "t2"}, SAGITTAL),
        ({"description": r"2\.0"}, CT),
        ({"kernel": "^b7"}, THICK),
        ({"orientation": "sagittal"}, SAGITTAL),
        ({"orientation": "axial", "prefer": "thinnest"}, CT),
        ({"modality": "CT", "prefer": "most-slices"}, CT),
    ],
)
def test_a_rule_takes_the_series_that_fits_every_key(rule, expected):
    chosen = choose([CT, THICK, SAGITTAL], [Selection(channel="a", **rule)])
    assert chosen.channels == {"a": expected}
    assert [series for series, _ in chosen.reasons] == [s for s in (CT, THICK, SAGITTAL) if s is not expected]


def test_reasons_in_words():
    rule = Selection(channel="ct", modality="CT", kernel="b30", orientation="axial", slice_spacing_mm=(1, 3))
    others = [THICK, SAGITTAL, replace(CT, orientation="coronal"), replace(CT, slice_spacing_mm=4.0), BROKEN]
    chosen = choose([CT, *others], [rule])
    assert [reason for _, reason in chosen.reasons] == [
        "ct: its kernel does not fit the pattern",
        "ct: another modality than CT",
        "ct: its slices are coronal, not axial",
        "ct: its slices are 4 mm apart, not 1 to 3 mm",
        "ct: dicom.missing-slices",
    ]


def test_two_channels_and_what_neither_takes():
    rules = [Selection(channel="ct", modality="CT", prefer="newest"), Selection(channel="mr", modality="MR")]
    chosen = choose([CT, LATER, SAGITTAL], rules)
    assert chosen.channels == {"ct": LATER, "mr": SAGITTAL}
    assert list(chosen.channels) == ["ct", "mr"]
    assert chosen.reasons == [(CT, "ct: another one was preferred (newest); mr: another modality than MR")]


def test_studies_that_cannot_be_used():
    assert code([CT, LATER], Selection(channel="a", modality="CT")) == "select.several"
    assert code([CT, replace(CT, uid="9")], Selection(channel="a", prefer="thinnest")) == "select.several"
    assert code([CT, THICK], Selection(channel="a", modality="PT")) == "select.none"
    assert code([], Selection(channel="a")) == "select.none"
    assert code([BROKEN, SAGITTAL], Selection(channel="a", modality="CT")) == "dicom.missing-slices"
    assert code([CT], Selection(channel="a"), Selection(channel="b")) == "select.several"


def test_a_broken_series_does_not_hide_a_sound_one():
    assert choose([BROKEN, CT], [Selection(channel="a")]).channels == {"a": CT}


def test_no_rules_choose_nothing():
    chosen = choose([CT], [])
    assert chosen.channels == {}
    assert chosen.reasons == [(CT, "")]


def test_a_pattern_that_is_none():
    with pytest.raises(ConfigError, match="channel 'a'"):
        choose([CT], [Selection(channel="a", description="(")])


def test_series_of_files(tmp_path):
    write_series(tmp_path / "a", change=attributes(SeriesDescription="T1 AX"))
    write_series(tmp_path / "b", voxels_of(seed=1), attributes(SeriesDescription="FLAIR"), series="1.2.4")
    rules = [Selection(channel="flair", description="flair"), Selection(channel="t1", description="^t1 ")]
    chosen = choose(scan_tree(tmp_path).volumes, rules)
    assert {name: series.uid for name, series in chosen.channels.items()} == {"flair": "1.2.4", "t1": "1.2.3"}
