"""Figures for Prometheus, read back by its own parser."""

import re
import urllib.request
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from prometheus_client import start_http_server
from prometheus_client.parser import text_string_to_metric_families

from tests.workers.small_root import COHORT, add_night
from workers.ledger import Outcome
from workers.reports.metrics_text import metrics_text, registry
from workers.storage.store import Root

LABELS = ("cohort", "model", "state", "code")
FIRST = datetime(2026, 11, 22, 1, tzinfo=UTC)
SECOND = FIRST + timedelta(days=1)
OUTCOMES = [
    Outcome("a", "segment", "computed", key="results/liver/a/1", seconds=2.0, peak_bytes=1000),
    Outcome("b", "segment", "computed", message="empty", key="results/liver/b/1", seconds=3.5, peak_bytes=3000),
    Outcome("c", "segment", "failed", ("segment.memory",), seconds=0.5, peak_bytes=2000),
    Outcome("d", "segment", "failed", ("night.quarantined", "segment.memory")),
    Outcome("e", "ingest", "refused", ("scan.empty",)),
]


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(tmp_path)


def samples(text: str) -> dict[tuple[str, ...], float]:
    """Value by name and label values."""
    found = {}
    for family in text_string_to_metric_families(text):
        assert re.fullmatch(r"vnet_[a-z_]+", family.name)
        assert family.documentation.endswith(".")
        assert family.type == "gauge"
        for sample in family.samples:
            key = (sample.name, *(sample.labels[name] for name in LABELS if name in sample.labels))
            assert key not in found
            found[key] = sample.value
    return found


def test_the_newest_night_by_hand(root: Root) -> None:
    add_night(root, FIRST, OUTCOMES[:1])
    add_night(root, SECOND, OUTCOMES, "organs@v2")
    found = samples(metrics_text(root))
    disk = {name: found.pop((name,)) for name in ("vnet_storage_free_bytes", "vnet_storage_size_bytes")}
    assert 0 < disk["vnet_storage_free_bytes"] <= disk["vnet_storage_size_bytes"]
    of = (COHORT, "organs@v2")
    assert {key: value for key, value in found.items() if value} == {
        ("vnet_cases", *of, "computed"): 2,
        ("vnet_cases", *of, "failed"): 2,
        ("vnet_cases", *of, "refused"): 1,
        ("vnet_failures", *of, "segment.memory"): 1,
        ("vnet_failures", *of, "night.quarantined"): 1,
        ("vnet_flagged_cases", *of): 1,
        ("vnet_quarantined_cases", *of): 1,
        ("vnet_night_duration_seconds", *of): 60,
        ("vnet_night_case_seconds", *of): 6,
        ("vnet_night_peak_bytes", *of): 3000,
        ("vnet_night_start_timestamp_seconds", *of): SECOND.timestamp(),
        ("vnet_last_success_timestamp_seconds", COHORT): SECOND.timestamp() + 60,
    }
    states = {key[3] for key in found if key[0] == "vnet_cases"}
    assert states == {"accepted", "warned", "refused", "computed", "cached", "failed", "carried-over"}


def test_an_empty_root_has_figures_of_its_disk_alone(root: Root) -> None:
    assert {key[0] for key in samples(metrics_text(root))} == {"vnet_storage_free_bytes", "vnet_storage_size_bytes"}
    assert samples(metrics_text(Root(root.home / "none"))) == {}


def test_the_last_success_is_that_of_an_earlier_night_when_the_newest_has_no_result(root: Root) -> None:
    add_night(root, FIRST, OUTCOMES[:1])
    add_night(root, SECOND, OUTCOMES[2:])
    found = samples(metrics_text(root))
    assert found["vnet_last_success_timestamp_seconds", COHORT] == FIRST.timestamp() + 60
    assert found["vnet_night_start_timestamp_seconds", COHORT, "organs@v1"] == SECOND.timestamp()


def test_a_night_under_way_does_not_count_yet(root: Root) -> None:
    add_night(root, FIRST, OUTCOMES[:1])
    night = add_night(root, SECOND, [], ended="")
    root.delete(f"reports/{COHORT}/{night}.parquet")
    found = samples(metrics_text(root))
    assert found["vnet_cases", COHORT, "organs@v1", "computed"] == 1
    assert found["vnet_night_unreadable", COHORT] == 0


@pytest.mark.parametrize("what", ["nights/liver/{}.json", "reports/liver/{}.parquet"])
def test_a_night_that_cannot_be_read_is_told_and_hides_no_other(root: Root, what: str) -> None:
    add_night(root, FIRST, OUTCOMES[:1], cohort="other")
    night = add_night(root, SECOND, OUTCOMES)
    root.put(what.format(night), b"{")
    found = samples(metrics_text(root))
    assert found["vnet_night_unreadable", COHORT] == 1
    assert found["vnet_night_unreadable", "other"] == 0
    assert found["vnet_cases", "other", "organs@v1", "computed"] == 1


def test_a_scrape_sees_what_was_written_since(root: Root) -> None:
    server, thread = start_http_server(0, addr="127.0.0.1", registry=registry(root))
    try:
        url = f"http://127.0.0.1:{server.server_port}/metrics"
        add_night(root, FIRST, OUTCOMES[:1])
        with urllib.request.urlopen(url) as response:
            assert response.headers["Content-Type"].startswith("text/plain; version=")
            first = samples(response.read().decode())
        add_night(root, SECOND, OUTCOMES)
        with urllib.request.urlopen(url) as response:
            second = samples(response.read().decode())
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert first["vnet_cases", COHORT, "organs@v1", "failed"] == 0
    assert second["vnet_cases", COHORT, "organs@v1", "failed"] == 2
