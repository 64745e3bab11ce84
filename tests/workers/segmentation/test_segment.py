"""A segmenter tells errors that end the use of its GPU from those that pass."""

import pytest

from tests.workers.small_root import add_model, case_of
from workers.segmentation.actors import SegmenterActor
from workers.segmentation.segment import GPU_LOST, Job, Segmenter
from workers.storage.store import Root


@pytest.fixture
def root(tmp_path) -> Root:
    root = Root(tmp_path)
    add_model(root)
    return root


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ("CUDA error: an illegal memory access was encountered", GPU_LOST),
        ("CUDA out of memory. Tried to allocate 2.00 GiB", "internal.RuntimeError"),
        ("shapes cannot be multiplied", "internal.RuntimeError"),
    ],
)
def test_the_kind_of_an_error_is_in_the_outcome(root, monkeypatch, said, code):
    def fails(self, job):
        raise RuntimeError(said)

    monkeypatch.setattr(Segmenter, "_segment", fails)
    outcome = Segmenter(root.url, "organs@v1", 1).segment(Job("liver", case_of("a"), "nifti"))
    assert (outcome.state, outcome.codes) == ("failed", (code,))
    assert ("illegal memory access" in outcome.message) == (code == GPU_LOST)


def test_an_actor_loads_its_model_with_its_first_case_and_tells_where_it_cannot(root):
    outcome = SegmenterActor(root.url, "nowhere@v1", 1).segment(Job("liver", case_of("a"), "nifti"))
    assert (outcome.state, outcome.codes) == ("failed", ("model.unknown",))
    actor = SegmenterActor(root.url, "organs@v1", 1)
    for name in "ab":
        assert actor.segment(Job("liver", case_of(name), "nifti")).codes == ("segment.no-volume",)
