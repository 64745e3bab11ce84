"""Whatever happens to a case, it is one outcome."""

import logging
import os
import traceback

import psutil
import pytest

from vnet_core.errors import (
    ConfigError,
    EngineError,
    MemoryLimitError,
    ScanError,
    StorageError,
    TrainingError,
    VnetError,
)
from workers.ledger import UNDONE, Outcome, counts, error_state, nameless, process_peak_bytes, settle


def raising(error: BaseException):
    def compute():
        raise error

    return compute


@pytest.mark.parametrize("state", ["accepted", "warned", "computed", "cached"])
def test_a_result_keeps_its_state_key_and_warnings(state):
    outcome = settle("segment", "case-1", lambda: (state, "results/x", ("label.empty",)))
    assert (outcome.case, outcome.stage, outcome.state) == ("case-1", "segment", state)
    assert (outcome.key, outcome.codes, outcome.message) == ("results/x", ("label.empty",), "")
    assert outcome.done
    assert outcome.seconds >= 0


def test_a_scan_that_cannot_be_used_is_refused_with_its_reason():
    outcome = settle("ingest", "c", raising(ScanError("scan.truncated", "10 of 20 bytes; copy it again")))
    assert (outcome.state, outcome.codes) == ("refused", ("scan.truncated",))
    assert outcome.message == "10 of 20 bytes; copy it again"
    assert outcome.key is None
    assert not outcome.done


@pytest.mark.parametrize("kind", [StorageError, ConfigError, EngineError, MemoryLimitError, TrainingError])
def test_what_is_not_the_scans_fault_fails_with_its_code(kind):
    outcome = settle("segment", "c", raising(kind("some.code", "why")))
    assert (outcome.state, outcome.codes, outcome.message) == ("failed", ("some.code",), "why")
    assert error_state(kind("some.code", "why")) == "failed"


def reading(path):
    def compute():
        raise FileNotFoundError(2, "DOE JOHN is not here", path)

    return compute


@pytest.mark.parametrize("error", [ValueError("DOE JOHN"), AssertionError("DOE JOHN")])
def test_our_own_mistakes_fail_the_case_and_tell_kind_and_place(error, caplog):
    outcome = settle("segment", "case-1", raising(error))
    assert (outcome.state, outcome.codes) == ("failed", (f"internal.{type(error).__name__}",))
    (record,) = caplog.records
    place = f"{type(error).__name__} at {__name__}:"
    assert place in outcome.message
    assert record.levelno == logging.ERROR
    assert record.getMessage().startswith(f"segment of case case-1 failed: {place}")
    assert record.exc_info is None
    assert "DOE" not in outcome.message + caplog.text
    assert "VNET_TRACEBACKS=1" in outcome.message


def test_an_error_of_the_system_keeps_the_systems_words_but_no_path(tmp_path, caplog):
    outcome = settle("ingest", "c", reading(tmp_path / "DOE_JOHN.nii"))
    assert outcome.codes == ("internal.FileNotFoundError",)
    assert "FileNotFoundError (No such file or directory) at" in outcome.message
    assert "DOE" not in outcome.message + caplog.text
    assert str(tmp_path) not in outcome.message + caplog.text


def test_a_person_may_ask_for_the_whole_trace(tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("VNET_TRACEBACKS", "1")
    outcome = settle("ingest", "c", reading("DOE_JOHN.nii"))
    assert "Traceback" in caplog.text
    assert "DOE_JOHN.nii" in caplog.text
    assert "DOE" not in outcome.message  # which goes into tables


def test_what_wraps_an_unexpected_error_does_not_show_it(caplog):
    with pytest.raises(VnetError) as caught, nameless("ingest"):
        os.stat("/DOE_JOHN/scan.nii")
    assert caught.value.code == "internal.FileNotFoundError"
    assert "DOE" not in "".join(traceback.format_exception(caught.value))
    with pytest.raises(ScanError, match="as it is"), nameless("ingest"):
        raise ScanError("scan.x", "as it is")
    assert len(caplog.records) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(130)])
def test_a_wish_to_end_is_no_outcome(error):
    with pytest.raises(type(error)):
        settle("segment", "c", raising(error))


def test_counts_have_a_fixed_order_and_no_zeros():
    states = ["failed", "computed", "refused", "computed", "warned", "accepted", "carried-over", "cached", "failed"]
    found = counts(Outcome(str(i), "segment", state) for i, state in enumerate(states))
    assert list(found.items()) == [
        ("accepted", 1),
        ("warned", 1),
        ("computed", 2),
        ("cached", 1),
        ("carried-over", 1),
        ("refused", 1),
        ("failed", 2),
    ]
    assert counts([]) == {}
    assert counts([Outcome("c", "s", "cached")]) == {"cached": 1}


def test_every_state_is_counted_and_either_done_or_not():
    states = ("accepted", "warned", "refused", "computed", "cached", "failed", "carried-over")
    assert sum(counts(Outcome(s, "x", s) for s in states).values()) == len(states)
    assert {s for s in states if not Outcome("c", "x", s).done} == set(UNDONE)


def test_the_peak_is_in_bytes_and_never_below_what_is_held():
    before = process_peak_bytes()
    held = bytearray(b"x") * (50 << 20)
    after = settle("s", "c", lambda: ("computed", None, ())).peak_bytes
    assert after >= before
    assert after >= len(held)
    assert after >= 0.9 * psutil.Process().memory_info().rss
    assert after < psutil.virtual_memory().total
