"""A case that goes through in portions is shared among the actors of a pool, whatever happens to them."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from uuid import uuid4

import pytest

from tests.workers.large_case import GRID, TIGHT_GIB, plan_of, ready, segmenter
from vnet_core.portions import divided
from workers.engines.clusters import Engines, ray_session
from workers.registry.models import load_model
from workers.segmentation import large
from workers.segmentation.actors import Actors, SegmenterActor
from workers.segmentation.pool import SegmentPool
from workers.segmentation.segment import Job
from workers.segmentation.shares import Division
from workers.storage.store import Root

PORTIONS = 6


def in_single_chunks(*arguments):
    """Portions of one chunk each, since so small a scan would be one portion."""
    return replace(divided(*arguments), edges=(32, 32, 32))


class Unlucky(SegmenterActor):
    """Does what it is asked, and to some cases, by their names, what happens to actors: the first time each."""

    def __init__(self, root_url: str, model: str, cpus: int) -> None:
        super().__init__(root_url, model, cpus)
        self._root = Root(root_url)
        large.divided = in_single_chunks

    def segment(self, job: Job):
        portion = job.step.portion if job.step else None
        what = "begin" if job.step is None else "end" if portion is None else f"{portion}"
        first = self._root.create(f"ran/{job.case.id}/{what}", b"")
        self._root.put(f"who/{job.case.id}/{what}-{os.getpid()}-{uuid4().hex}", b"")
        if first and (job.case.id, what) in (("dies", "2"), ("ends", "end")):
            os._exit(1)
        if (job.case.id, what) == ("broken", "3"):
            job = replace(job, case=replace(job.case, digest="0" * 64))
        if (job.case.id, what) == ("hungry", "1"):
            job = replace(job, step=replace(job.step, division=replace(job.step.division, peak_bytes=2**50)))
        return super().segment(job)


class Unluckies(Actors):
    kind = Unlucky


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    with ray_session(None, 2):
        yield


@pytest.mark.parametrize(
    "names", [("plain", "dies", "broken"), pytest.param(("plain", "ends", "hungry"), marks=pytest.mark.slow)]
)
def test_a_case_is_shared_and_its_files_are_those_of_one_process(session, tmp_path, monkeypatch, names):
    root = Root(tmp_path / "root")
    cleaning = [{"label": 4, "keep": "largest"}, {"label": 1, "minimum_ml": 0.01, "holes": "fill"}]
    plan = plan_of(TIGHT_GIB, inference={"mirror_axes": [2], "cleaning": cleaning})
    case = ready(root, plan, tmp_path / "scans", replace(GRID, shape=(18, 40, 70)))
    one_process = segmenter(root, plan, "v", 2)
    monkeypatch.setattr(large, "divided", in_single_chunks)
    alone = one_process.segment(Job("c", case, "nifti"))
    expected = root.receipt(alone.key)
    assert expected["portions"] == PORTIONS
    assert isinstance(one_process.take(Job("c", replace(case, id="b"), "nifti", divide=True)), Division)

    engines = Engines(segment_workers=2, segment_cpus=1, cpus=2, ray_wait_s=600.0)
    pool = SegmentPool(root, load_model(root, "organs@v"), engines, Unluckies(root.url, "organs@v", engines))
    try:
        outcomes = {o.case: o for o in pool.run([Job("c", replace(case, id=name), "nifti") for name in names])}
    finally:
        pool.close()
    assert outcomes.keys() == set(names)
    if broken := outcomes.pop("broken", None):
        assert (broken.state, broken.codes) == ("failed", ("segment.no-volume",))
    for name, outcome in outcomes.items():
        assert (outcome.state, outcome.codes) == ("computed", ()), name
        receipt = root.receipt(outcome.key)
        # the report names its case
        assert receipt["files"].items() - expected["files"].items() <= {
            ("report.json", receipt["files"]["report.json"])
        }, name
        assert {key: receipt[key] for key in ("portions", "tile", "predicted_bytes", "volume", "model")} == {
            key: expected[key] for key in ("portions", "tile", "predicted_bytes", "volume", "model")
        }
        report, usual = (root.get_json(f"{key}/report.json") for key in (outcome.key, alone.key))
        assert report["labels"] == usual["labels"]
        assert report["regions"] == usual["regions"]
    assert pool.replaced == 1
    who = [(name, *one.split("-")[:2]) for name in names for one in root.names(f"who/{name}")]
    done = Counter((name, what) for name, what, _ in who)
    assert {what for name, what in done if name == "plain"} == {"begin", "end", *map(str, range(PORTIONS))}
    # what else the lost actor held is done again too
    twice = [("dies", "2")] if "dies" in names else [("ends", "begin"), ("ends", "end"), ("hungry", "begin")]
    assert all(done[what] >= 2 for what in twice), done
    assert len({pid for _, _, pid in who}) == 3, "both had a part in it, and who came for the lost one"
