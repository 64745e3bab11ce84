"""What a night would do and cost, told from receipts."""

from pathlib import Path

import pytest

from vnet_core.geometry import Geometry
from workers.cohort import Case
from workers.nights.attempts import Failure
from workers.nights.forecast import Forecast, forecast, kind_of, recorded_cost
from workers.storage.store import Root

GRID = Geometry((10, 10, 10), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0))
"""A thousand voxels."""
LARGE = Geometry((10, 20, 20), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0))
"""Four thousand."""
CASE = Case("a", ("a.nii",), digest="bytes-1", geometry=GRID)
KEY = "results/liver/a/wanted"


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(tmp_path)


def publish(root: Root, case: str, name: str, seconds: float, digest: str = "bytes-1", model: str = "m1") -> None:
    key = f"results/liver/{case}/{name}"
    root.put(f"{key}/mask.nii.gz", b"mask")
    volume = f"volumes/{case}{name}"
    root.put(f"{volume}/image", b"image")
    costs = {"seconds": seconds, "peak_bytes": 3 << 30}
    root.seal(volume, {"seconds": 1.0, "peak_bytes": 1 << 30})
    root.seal(key, {"case_digest": digest, "model_digest": model, "volume": volume, **costs})


def test_a_case_is_new_changed_stale_or_cached(root: Root) -> None:
    assert kind_of(root, "liver", CASE, KEY, (), 3) == "new"
    publish(root, "a", "other", 1.0, digest="bytes-0")
    assert kind_of(root, "liver", CASE, KEY, (), 3) == "changed"
    publish(root, "a", "older-model", 1.0)
    assert kind_of(root, "liver", CASE, KEY, (), 3) == "stale"
    publish(root, "a", "wanted", 1.0)
    assert kind_of(root, "liver", CASE, KEY, (), 3) == "cached"


def test_failures_come_before_what_there_was_and_end_in_quarantine(root: Root) -> None:
    found = [Failure(KEY, f"night-{n}", "", "segment", ("x.y",), "") for n in range(2)]
    assert kind_of(root, "liver", CASE, KEY, found, 3) == "failed"
    assert kind_of(root, "liver", CASE, KEY, found, 2) == "quarantined"
    assert kind_of(root, "liver", CASE, f"{KEY}-of-new-bytes", found, 2) == "failed"


def test_cost_is_the_median_of_recorded_seconds_per_voxel_of_both_stages(root: Root) -> None:
    cases = {name: Case(name, (), digest="bytes-1", geometry=GRID) for name in ("a", "b", "c")}
    assert recorded_cost(root, cases, "liver", "m1") is None
    for name, seconds in (("a", 1.0), ("b", 3.0), ("c", 99.0)):
        publish(root, name, "wanted", seconds)
    cost = recorded_cost(root, cases, "liver", "m1")
    assert cost is not None
    # three seconds and one of preprocessing for a thousand voxels
    assert cost.seconds_per_voxel == pytest.approx(0.004)
    assert (cost.peak_bytes, cost.receipts) == (3 << 30, 3)
    assert cost.seconds(LARGE) == pytest.approx(16.0)
    assert cost.seconds(None) == 0.0


def test_receipts_of_the_model_come_before_those_of_others(root: Root) -> None:
    cases = {name: Case(name, (), digest="bytes-1", geometry=GRID) for name in ("a", "b")}
    publish(root, "a", "of-m1", 1.0)
    publish(root, "b", "of-m2", 9.0, model="m2")
    of_m2, of_m3 = (recorded_cost(root, cases, "liver", model) for model in ("m2", "m3"))
    assert of_m2 is not None
    assert (of_m2.seconds_per_voxel, of_m2.receipts) == (pytest.approx(0.010), 1)
    assert of_m3 is not None, "another model's receipts say more than nothing"
    assert of_m3.receipts == 2


def test_a_forecast_adds_up_and_says_so_in_words(root: Root) -> None:
    publish(root, "a", "wanted", 3.0)
    cost = recorded_cost(root, {"a": CASE}, "liver", "m1")
    kinds = [("new", None)] * 2 + [("stale", GRID)] + [("cached", GRID)] * 5 + [("refused", None)]
    found = forecast(kinds, cost, workers=2)
    assert found.counts == {"new": 2, "stale": 1, "cached": 5, "refused": 1}
    # three cases of 4 s each, the two of unknown size like the others, over two workers
    assert found.seconds == pytest.approx(6.0)
    assert found.words == "2 new, 1 stale, 5 cached, 1 refused, about 6 seconds, peak 3.0 GiB"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "about a second"), (99, "about 99 seconds"), (2460, "about 41 minutes"), (9000, "about 2.5 hours")],
)
def test_time_is_said_as_people_say_it(seconds: float, words: str) -> None:
    assert words in Forecast({"new": 1}, seconds, 1 << 30, 1).words


def test_what_is_not_known_is_not_told() -> None:
    assert "time unknown" in forecast([("new", None)], None, 1).words
    assert forecast([("cached", GRID)], None, 1).words == "1 cached"
    assert forecast([], None, 1).words == "no cases"
