"""A minute under fire: whatever is killed, the night ends with the bytes of one in peace, and does no work twice."""

from pathlib import Path

import pytest

from benchmarks.chaos import chaos


@pytest.mark.faults
@pytest.mark.fault("F2", "F3", "F5", "F7", "F8")
@pytest.mark.timeout(900)
def test_a_minute_of_random_kills_changes_nothing(tmp_path: Path, record_property) -> None:
    lines, wrong = chaos(tmp_path, 60.0, 1, (12, 6))
    assert wrong == []
    rows = (line.strip("| ").split(" | ") for line in lines if line.startswith("| "))
    facts = dict(row for row in rows if len(row) == 2)
    assert int(facts["kills"].split(":")[0]) >= 3
    record_property("seen", f"kills {facts['kills']}; nothing published was done again")
