"""What is larger than memory is segmented and published in portions, with the files that the whole would have."""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import numpy as np
import pytest
import torch
import zarr

from tests.workers.large_case import GRID, ROOMY_GIB, TIGHT_GIB, plan_of, ready, segmenter
from vnet_core.errors import MemoryLimitError, StorageError
from vnet_core.plan import Plan
from vnet_core.portions import Portions, divided
from workers.cohort import Case, volume_geometry, volume_key
from workers.segmentation import large, large_masks
from workers.segmentation.large_masks import NO_LARGE_PICTURE
from workers.segmentation.masks import label_values
from workers.segmentation.segment import Job, Segmenter
from workers.segmentation.shares import Division
from workers.storage.arrays import StoredArray, create_array
from workers.storage.store import Root


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The same case whole and in portions: two networks and mirrors, cleaning, merged values."""
    folder = tmp_path_factory.mktemp("large")
    root = Root(folder / "root")
    sections = {
        "inference": {
            "mirror_axes": [2],
            "cleaning": [{"label": 4, "keep": "largest"}, {"label": 1, "minimum_ml": 0.01, "holes": "fill"}],
        },
        "output": {"values": {"large": 4}},
    }
    found = {}
    for version, limit_gib in (("whole", ROOMY_GIB), ("portions", TIGHT_GIB)):
        inference = {**sections["inference"]}
        plan = plan_of(limit_gib, **{**sections, "inference": inference})
        case = ready(root, plan, folder / "scans")
        worker = segmenter(root, plan, version, 2)
        outcomes = {f: worker.segment(Job("c", case, f)) for f in ("nifti", "mha", "nrrd")}
        assert {o.state for o in outcomes.values()} == {"computed"}, outcomes
        found[version] = {f: o.key for f, o in outcomes.items()}
    return root, found


def test_mask_files_have_the_bytes_of_the_whole(both):
    root, found = both
    for mask_format, name in (("nifti", "mask.nii.gz"), ("mha", "mask.mha"), ("nrrd", "mask.nrrd")):
        whole, portions = (root.get(f"{found[way][mask_format]}/{name}") for way in ("whole", "portions"))
        assert whole == portions
        assert len(whole) > 400
    files = [
        {s.key.removeprefix(key): root.get(s.key) for s in root.walk(f"{key}/mask.ome.zarr")}
        for key in (found[way]["nifti"] for way in ("whole", "portions"))
    ]
    assert files[0] == files[1]
    assert len(files[0]) == 3


def test_reports_say_the_same_with_the_spread_of_the_passes(both):
    root, found = both
    whole, portions = (root.get_json(f"{found[way]['nifti']}/report.json") for way in ("whole", "portions"))
    assert whole["labels"] == portions["labels"]
    assert whole["regions"] == portions["regions"]
    assert {row["name"] for row in whole["labels"]} == {"one", "four", "large"}
    assert any(row["voxels"] > 0 and row["agreement"] < 1 for row in whole["labels"])
    assert root.get(f"{found['whole']['nifti']}/qc.png") == root.get(f"{found['portions']['nifti']}/qc.png")


def test_the_receipt_says_tile_and_portions_and_nothing_of_the_work_is_left(both):
    root, found = both
    receipt = root.receipt(found["portions"]["nifti"])
    assert receipt["tile"] == [8, 8, 8]
    assert receipt["portions"] >= 1
    assert receipt["predicted_bytes"] < TIGHT_GIB * 2**30
    assert "warnings" not in receipt
    assert root.names(found["portions"]["nifti"]) == root.names(found["whole"]["nifti"])
    assert "tile" not in root.receipt(found["whole"]["nifti"])
    assert root.damaged(found["portions"]["nifti"]) == []


def test_a_scan_that_is_too_large_for_a_picture_has_none(tmp_path, monkeypatch):
    root = Root(tmp_path / "root")
    plan = plan_of(TIGHT_GIB)
    case = ready(root, plan, tmp_path / "scans")
    monkeypatch.setattr("workers.segmentation.large_masks.PICTURE_BYTES", 10**6)
    outcome = segmenter(root, plan, "v").segment(Job("c", case, "nifti"))
    assert root.get_json(f"{outcome.key}/report.json")["picture"] == NO_LARGE_PICTURE
    assert not root.exists(f"{outcome.key}/qc.png")


# --- who does it, and in which order


def work_of(root: Root, plan: Plan, case: Case, scratch: str) -> tuple[large.Work, Portions]:
    worker = Segmenter(root.url, "organs@v", 1)
    key = volume_key(case, plan)
    image, grid = StoredArray(root, key, "image").whole(), volume_geometry(root, key)
    assert case.geometry is not None
    grids = (grid, case.geometry)
    work = large.Work(root, scratch, worker.networks, worker.device, plan, image, grids)
    portions = divided(plan, grids, (8, 8, 8), 1, 4, 2**30)
    # one chunk each, since so small a scan would be one portion
    return work, replace(portions, edges=(32, 32, 32))


def do_share(url: str, plan: Plan, case: Case, scratch: str, first: int, of: int) -> int:
    """What one worker of several does, the last portion first where there are several; how many it did."""
    work, portions = work_of(Root(url), plan, case, scratch)
    values = StoredArray(work.root, scratch, "labels")
    chosen = portions.regions()[first::of]
    for portion, found in large.segmented(work, portions, chosen if of == 1 else chosen[::-1]):
        values.write(label_values(found.classes, plan.labels), *portion.slices)
    return len(chosen)


def test_portions_in_any_order_leave_the_case_that_one_process_makes(tmp_path):
    root = Root(tmp_path / "root")
    cleaning = [{"label": 4, "keep": "largest"}, {"label": 1, "minimum_ml": 0.01, "holes": "fill"}]
    plan = plan_of(TIGHT_GIB, inference={"mirror_axes": [2], "cleaning": cleaning})
    case = ready(root, plan, tmp_path / "scans", replace(GRID, shape=(18, 40, 70)))
    segmenter(root, plan, "v", 2)
    found = []
    for scratch, step in (("one", 1), ("other", -1)):
        work, portions = work_of(root, plan, case, scratch)
        portions = replace(portions, passes=4)
        large.label_map(work, portions)
        division = Division((8, 8, 8), portions.edges, 2**20, len(portions.regions()))
        assert division.count == 2 * 3
        with pytest.raises(StorageError, match=r"done/0\.json"):
            large.finished(work, division)
        for number in range(division.count)[::step]:
            large.do_portion(work, division, number)
        before = {stored.key: stored.modified for stored in root.walk(scratch)}
        large.do_portion(work, division, 0)
        assert {stored.key: stored.modified for stored in root.walk(scratch)} == before, "what is there is left"
        made, seconds = large.finished(work, division)
        assert seconds > 0
        assert made.facts() == {"portions": 6, "tile": [8, 8, 8], "predicted_bytes": 2**20}
        found.append((made.values.read(slice(None)), made.spread))
    (values, spread), (others, other_spread) = found
    np.testing.assert_array_equal(values, others)
    np.testing.assert_array_equal(spread.counts, other_spread.counts)
    # and as one process does it by itself
    alone = large.segment_in_portions(replace(work, scratch="alone"), (8, 8, 8))
    np.testing.assert_array_equal(alone.values.read(slice(None)), values)
    np.testing.assert_array_equal(alone.spread.counts, spread.counts)
    assert len(np.unique(values)) > 1


def test_a_portion_that_is_lost_before_the_end_is_told(tmp_path):
    root = Root(tmp_path / "root")
    plan = plan_of(TIGHT_GIB)
    case = ready(root, plan, tmp_path / "scans", replace(GRID, shape=(18, 27, 40)))
    segmenter(root, plan, "v")
    work, portions = work_of(root, plan, case, "work")
    large.label_map(work, portions)
    division = Division((8, 8, 8), portions.edges, 2**20, 2)
    for number in range(2):
        large.do_portion(work, division, number)
    root.delete("work/labels/c/0/0/1")
    with pytest.raises(StorageError, match="lacks 1 shards"):
        large.finished(work, division)


def test_a_portion_that_needs_more_than_is_free_is_not_begun(tmp_path):
    root = Root(tmp_path / "root")
    plan = plan_of(TIGHT_GIB)
    case = ready(root, plan, tmp_path / "scans")
    segmenter(root, plan, "v")
    work, portions = work_of(root, plan, case, "work")
    with pytest.raises(MemoryLimitError, match=r"needs 1048576.00 GiB, \d+.\d\d GiB are free") as told:
        large.do_portion(work, Division((8, 8, 8), portions.edges, 2**50, 1), 0)
    assert told.value.code == "memory.portion"


@pytest.mark.slow
def test_one_worker_or_several_in_another_order_leave_the_same_bytes(tmp_path):
    root = Root(tmp_path / "root")
    plan = plan_of(TIGHT_GIB)
    case = ready(root, plan, tmp_path / "scans", replace(GRID, shape=(40, 50, 70)))
    segmenter(root, plan, "v")
    stored = []
    with ProcessPoolExecutor(3, mp_context=get_context("spawn")) as processes:
        for of in (1, 3):
            scratch = f"shares/{of}"
            large.label_map(*work_of(root, plan, case, scratch))
            shares = [processes.submit(do_share, root.url, plan, case, scratch, first, of) for first in range(of)]
            assert sum(share.result() for share in shares) == 2 * 2 * 3
            stored.append({one.key.removeprefix(scratch): root.get(one.key) for one in root.walk(scratch)})
    assert stored[0] == stored[1]
    values = StoredArray(root, "shares/3", "labels").whole().read(slice(None))
    assert len(np.unique(values)) > 1


# --- when memory runs out


class Hungry(torch.nn.Module):
    """A network that has no memory for inputs of more than so many voxels."""

    def __init__(self, network: torch.nn.Module, most: int, error: Exception) -> None:
        super().__init__()
        self.network, self.most, self.error = network, most, error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x[0, 0].numel() > self.most:
            raise self.error
        return self.network(x)


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_out_of_memory_leads_to_smaller_tiles_and_the_receipt_says_so(tmp_path, error):
    root = Root(tmp_path / "root")
    plan = plan_of(ROOMY_GIB)
    case = ready(root, plan, tmp_path / "scans")
    worker = segmenter(root, plan, "v")
    worker.networks = [Hungry(worker.networks[0], 4**3, error)]
    outcome = worker.segment(Job("c", case, "nifti"))
    assert (outcome.state, outcome.codes) == ("computed", (large.IN_PORTIONS, large.SMALLER_TILE))
    receipt = root.receipt(outcome.key)
    assert receipt["tile"] == [4, 4, 4]
    assert receipt["warnings"] == [large.IN_PORTIONS, large.SMALLER_TILE]


def test_memory_that_never_suffices_is_a_failed_case_with_a_code(tmp_path):
    root = Root(tmp_path / "root")
    plan = plan_of(ROOMY_GIB)
    case = ready(root, plan, tmp_path / "scans")
    worker = segmenter(root, plan, "v")
    working = worker.networks
    worker.networks = [Hungry(working[0], 1, ERRORS[0])]
    outcome = worker.segment(Job("c", case, "nifti"))
    assert (outcome.state, outcome.codes) == ("failed", ("segment.out-of-memory",))
    assert "(4, 4, 4)" in outcome.message
    worker.networks = working
    assert worker.segment(Job("c", case, "nifti")).codes == ()


def test_other_errors_stay_what_they_are(tmp_path):
    root = Root(tmp_path / "root")
    plan = plan_of(ROOMY_GIB)
    case = ready(root, plan, tmp_path / "scans")
    worker = segmenter(root, plan, "v")
    worker.networks = [Hungry(worker.networks[0], 1, RuntimeError("shapes do not match"))]
    assert worker.segment(Job("c", case, "nifti")).codes == ("internal.RuntimeError",)


# --- proof, and stored arrays


def test_a_mask_file_that_changed_is_not_published(tmp_path, monkeypatch):
    root = Root(tmp_path / "root")
    plan = plan_of(TIGHT_GIB)
    case = ready(root, plan, tmp_path / "scans")
    written = large_masks.write_label

    def damaged(path, values, geometry):
        written(path, np.roll(np.stack(list(values)), 1, 2), geometry)

    monkeypatch.setattr(large_masks, "write_label", damaged)
    outcome = segmenter(root, plan, "v").segment(Job("c", case, "nifti"))
    assert (outcome.state, outcome.codes) == ("failed", ("mask.unproven",))


def test_regions_of_a_stored_array_and_a_lost_shard(tmp_path):
    root = Root(tmp_path)
    values = np.random.default_rng(0).integers(0, 9, (70, 40, 33)).astype(np.uint16)
    stored = create_array(root, "a/labels", values.shape, values.dtype, (32, 32, 32), (64, 32, 64))
    for z in range(0, 70, 64):
        for y in range(0, 40, 32):
            region = (slice(z, z + 64), slice(y, y + 32), slice(None))
            stored.write(values[region], *region)
    again = StoredArray(root, "a", "labels").whole()
    np.testing.assert_array_equal(again.read(slice(3, 66), slice(31, 40)), values[3:66, 31:40])
    assert (again.shape, again.dtype, again.shards) == (values.shape, values.dtype, (64, 32, 64))
    next(p for p in (tmp_path / "a/labels/c").rglob("*") if p.is_file()).unlink()
    with pytest.raises(StorageError, match="lacks 1 shards") as caught:
        again.whole()
    assert caught.value.code == "store.corrupt"
    assert zarr.open_array(tmp_path / "a/labels", mode="r").shape == values.shape
    with pytest.raises(StorageError):
        StoredArray(root, "a", "absent")
