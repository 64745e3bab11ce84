"""Settings of reports: what they refuse, and that the documentation shows them as they are."""

import re
import tomllib
from pathlib import Path

import pytest

from tests.keys import with_table
from vnet_core.errors import ConfigError
from vnet_core.reporting import DEFAULT_REPORTING, FLAGS, Reporting

PAGE = Path(__file__).parents[2] / "docs" / "quality.md"


def test_without_settings_every_flag_is_raised():
    assert Reporting.from_mapping({}) == DEFAULT_REPORTING
    assert DEFAULT_REPORTING.flags == FLAGS
    assert (DEFAULT_REPORTING.names, DEFAULT_REPORTING.reference_ml) == ({}, {})


def test_settings_come_back_from_json():
    settings = Reporting(names={"liver": "Leber"}, reference_ml={"liver": (900, 2500)}, flags=("empty",))
    assert Reporting.from_mapping(settings.model_dump(mode="json")) == settings
    assert Reporting.from_mapping(settings.model_dump(mode="json", exclude_defaults=True)) == settings


@pytest.mark.parametrize(
    ("mapping", "code", "said"),
    [
        ({"many_component": 3}, "reporting.unknown-key", "nearest is many_components"),
        ({"flags": ["empty", "dull"]}, "reporting.value", "drift"),
        ({"reference_ml": {"liver": [20, 20]}}, "reporting.value", "20.0 to 20.0 mL"),
        ({"reference_ml": {"liver": [-1, 20]}}, "reporting.value", "-1"),
        ({"reference_ml": {"liver": [1, float("nan")]}}, "reporting.value", "nan"),
        ({"agreement_below": 1.2}, "reporting.value", "1.2"),
        ({"names": {"a": "x", "b": "x"}}, "reporting.value", "x"),
        ({"names": {"a": ""}}, "reporting.value", "names.a"),
    ],
)
def test_settings_that_cannot_work_are_refused(mapping, code, said):
    with pytest.raises(ConfigError, match=re.escape(said)) as error:
        Reporting.from_mapping(mapping)
    assert error.value.code == code


def test_labels_that_the_plan_does_not_have_are_refused():
    known = frozenset({"liver", "tumour"})
    Reporting(names={"liver": "Leber"}, reference_ml={"tumour": (0, 5)}).check_names(known)
    Reporting(names={"liver": "tumour", "tumour": "liver"}).check_names(known)
    for settings, said in (
        (Reporting(names={"Leber": "liver"}), "no label Leber; the plan's names are liver, tumour"),
        (Reporting(reference_ml={"spleen": (1, 2)}), "no label spleen"),
        (Reporting(names={"liver": "tumour"}), "gives away tumour"),
    ):
        with pytest.raises(ConfigError, match=said) as error:
            settings.check_names(known)
        assert error.value.code == "reporting.label"


def test_the_documentation_shows_settings_that_work_and_names_every_flag():
    page = PAGE.read_text("utf-8")
    (shown,) = re.findall(r"```\n(names\..*?)```", page, re.DOTALL)
    settings = Reporting.from_mapping(tomllib.loads(shown))
    assert settings.model_fields_set == Reporting.model_fields.keys()
    for flag in FLAGS:
        assert f"| `{flag}` |" in page
    for name, field in Reporting.model_fields.items():
        assert f"| `{name}` |" in page, field.description


def test_the_table_of_keys_is_that_of_the_settings():
    page = PAGE.read_text("utf-8")
    assert page == with_table(page, Reporting)
    assert "| `implausible_deviations` |" in page
