"""Versions that must agree, on what Dask tells of them."""

from __future__ import annotations

import pytest

from vnet_core.errors import EngineError
from workers.engines.dask_versions import ASKED, Mismatch, check_versions, mismatches

VERSIONS = {
    "python": "3.11.7.final.0",
    "dask": "2026.8.0",
    "distributed": "2026.8.0",
    "cloudpickle": "3.1.1",
    "msgpack": "1.1.0",
    "vnet-cohort": "0.4.0",
    "numpy": "2.4.6",
    "scipy": "1.16.0",
    "SimpleITK": "2.5.7",
    "torch": "2.13.0+cpu",
    "zarr": "3.1.6",
}


def found(scheduler: dict | None = None, **workers: dict) -> dict:
    """What a client is told where its own versions are those above."""
    return {
        "client": {"packages": VERSIONS},
        "scheduler": {"packages": VERSIONS | (scheduler or {})},
        "workers": {name: {"packages": VERSIONS | other} for name, other in workers.items()},
    }


@pytest.mark.parametrize(
    "other",
    [
        {},
        {"numpy": "2.4.9", "torch": "2.13.1+cu128", "zarr": "3.1.0"},
        {"python": "3.11.14.final.0", "msgpack": "1.1.2"},
        {"tornado": "1.0"},
    ],
)
def test_what_does_not_matter_may_differ(other):
    check_versions("tls://10.0.0.5:8786", found(w1=other, w2={}))


@pytest.mark.parametrize(
    ("package", "there"),
    [
        ("python", "3.12.7"),
        ("dask", "2026.8.1"),
        ("distributed", "2026.7.0"),
        ("cloudpickle", "3.1.2"),
        ("msgpack", "1.2.0"),
        ("vnet-cohort", "0.4.1"),
        ("numpy", "2.3.6"),
        ("torch", "2.12.0+cpu"),
        ("zarr", "3.2.0"),
    ],
)
def test_what_matters_is_named_with_both_versions(package, there):
    differing = found(w1={package: there}, w2={})
    assert [(m.package, m.there, m.where) for m in mismatches(differing)] == [(package, there, "w1")]
    with pytest.raises(EngineError) as caught:
        check_versions("tls://10.0.0.5:8786", differing)
    assert caught.value.code == "dask.versions"
    here = VERSIONS[package].removesuffix(".final.0")
    assert f"{package} is {here} here and {there} on 1 worker (w1)" in caught.value.message
    assert "requirements.lock" in caught.value.message


def test_a_package_that_is_missing_is_told():
    assert mismatches(found(w1={"torch": None})) == [Mismatch("torch", "2.13.0+cpu", "missing", "w1")]


def test_a_scheduler_computes_nothing_but_unpacks_everything():
    check_versions("a", found(scheduler={"numpy": None, "torch": "1.0", "zarr": None}))
    with pytest.raises(EngineError, match=r"vnet-cohort is 0\.4\.0 here and missing on the scheduler"):
        check_versions("a", found(scheduler={"vnet-cohort": None}))
    with pytest.raises(EngineError, match=r"dask is 2026\.8\.0 here and 2025\.1 on the scheduler and 1 worker \(w1\)"):
        check_versions("a", found(scheduler={"dask": "2025.1"}, w1={"dask": "2025.1"}))


def test_many_workers_are_told_as_some_and_a_number():
    with pytest.raises(EngineError, match=r"8 workers \(w0, w1, w2, w3, w4 and 3 more\)"):
        check_versions("a", found(**{f"w{number}": {"numpy": "1.26.4"} for number in range(8)}))


def test_dask_is_asked_for_all_that_it_does_not_tell_by_itself():
    assert set(ASKED) >= set(VERSIONS) - {"python", "dask", "distributed", "cloudpickle", "msgpack"}


def test_a_worker_that_has_just_ended_says_nothing():
    told = found(w1={})
    told["workers"]["w2"] = None
    check_versions("a", told)
