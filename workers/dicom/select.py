"""Which series of a study becomes which channel, by the rules of a plan, and why each other one does not."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from vnet_core.errors import ConfigError, ScanError
from vnet_core.sections import Selection
from workers.dicom.tree import Series


@dataclass(frozen=True, slots=True)
class Chosen:
    """What the rules make of the series of one study."""

    channels: dict[str, Series]
    """One series per rule, in the order of the rules."""
    reasons: list[tuple[Series, str]]
    """Each series that was not chosen, with the reason in words that quote nothing of its header."""


def choose(series: Sequence[Series], rules: Sequence[Selection]) -> Chosen:
    """One series of a study for each rule; a series that cannot be read is none to choose.

    ``ScanError``: ``select.none`` where no series fits a rule, ``select.several`` where more than one does and the rule
    does not say which, or one series fits two rules best; the series' own problem where all that fit have one.
    ``ConfigError`` ``plan.value`` for a pattern that is no regular expression.
    """
    channels: dict[str, Series] = {}
    why: dict[int, list[str]] = {id(one): [] for one in series}
    for rule in rules:
        patterns = _compiled(rule)
        fitting = []
        for one in series:
            misfit = _misfit(one, rule, patterns)
            if misfit:
                why[id(one)].append(f"{rule.channel}: {misfit}")
            else:
                fitting.append(one)
        channels[rule.channel] = taken = _best(fitting, rule, len(series))
        for one in fitting:
            if one is not taken:
                told = one.problem.code if one.problem else f"another one was preferred ({rule.prefer})"
                why[id(one)].append(f"{rule.channel}: {told}")
    twice = [name for name, one in channels.items() if sum(one is other for other in channels.values()) > 1]
    if twice:
        raise ScanError(
            "select.several", f"one series fits the rules of {len(twice)} channels; make the rules of the plan differ"
        )
    reasons = [(one, "; ".join(why[id(one)])) for one in series if not any(one is taken for taken in channels.values())]
    return Chosen(channels, reasons)


def _compiled(rule: Selection) -> tuple[re.Pattern[str], re.Pattern[str]]:
    try:
        return re.compile(rule.description, re.IGNORECASE), re.compile(rule.kernel, re.IGNORECASE)
    except re.error as error:
        raise ConfigError(
            "plan.value", f"a pattern of the rule for channel {rule.channel!r} is no regular expression: {error}"
        ) from None


def _misfit(series: Series, rule: Selection, patterns: tuple[re.Pattern[str], re.Pattern[str]]) -> str:
    """Why the series does not fit the rule; '' where it does."""
    description, kernel = patterns
    low, high = rule.slice_spacing_mm
    if rule.modality and series.modality.upper() != rule.modality.upper():
        return f"another modality than {rule.modality}"
    if not description.search(series.description):
        return "its description does not fit the pattern"
    if not kernel.search(series.kernel):
        return "its kernel does not fit the pattern"
    if rule.orientation != "any" and series.orientation != rule.orientation:
        return f"its slices are {series.orientation or 'of unknown orientation'}, not {rule.orientation}"
    if not low <= series.slice_spacing_mm <= high:
        return f"its slices are {series.slice_spacing_mm:g} mm apart, not {low:g} to {high:g} mm"
    return ""


def _best(fitting: list[Series], rule: Selection, count: int) -> Series:
    sound = [one for one in fitting if one.problem is None]
    if fitting and not sound:
        problem = fitting[0].problem
        assert problem is not None
        raise problem
    if not sound:
        raise ScanError(
            "select.none",
            f"none of the {count} series of the study fits the rule for channel {rule.channel!r}; widen the rule, or"
            " take the study out",
        )
    keys = {
        "only": lambda one: 0.0,
        "thinnest": lambda one: one.slice_spacing_mm,
        "most-slices": lambda one: -one.slices,
    }
    if rule.prefer == "newest":
        newest = max(one.acquired for one in sound)
        first = [one for one in sound if one.acquired == newest]
    else:
        best = min(map(keys[rule.prefer], sound))
        first = [one for one in sound if keys[rule.prefer](one) == best]
    if len(first) > 1:
        raise ScanError(
            "select.several",
            f"{len(first)} of the {count} series of the study fit the rule for channel {rule.channel!r}"
            f" (prefer = {rule.prefer!r}); narrow the rule",
        )
    return first[0]
