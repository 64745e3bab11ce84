"""Scans, volumes and memory that change under the work: found before anything is published, and worked off again."""

import json
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from tests.walkthrough import REPOSITORY
from tests.workers.tiny_cohort import MODEL, publish_model, take_in, write_scan
from vnet_core.geometry import Geometry
from vnet_core.plan import Plan
from vnet_core.volume import Volume
from workers.cohort import Case, load_entries, volume_key
from workers.ledger import Outcome
from workers.nights import attempts
from workers.nights import record as nights
from workers.nights.record import Night
from workers.preprocess import preprocess_case
from workers.registry.models import Model
from workers.segmentation.segment import Job, Segmenter, key_of
from workers.sources.scans import write_volume
from workers.storage.store import Root

COHORT = "many"


class Stage:
    """One case of tiny bytes between its two stages."""

    def __init__(self, folder: Path) -> None:
        self.scan = write_scan(folder / "scans", "case0", 1)
        self.root = Root(folder / "root")
        self.model: Model = publish_model(self.root)
        take_in(self.root, COHORT, [folder / "scans"])
        (entry,) = load_entries(self.root, COHORT)
        self.case: Case = entry.case
        self.job = Job(COHORT, self.case, "nifti")
        self.segmenter = Segmenter(self.root.url, MODEL, 1)

    @property
    def plan(self) -> Plan:
        return self.model.plan

    @property
    def volume(self) -> str:
        return volume_key(self.case, self.plan)

    def preprocess(self) -> Outcome:
        return preprocess_case(self.root.url, self.case, self.plan)

    def segment(self) -> Outcome:
        return self.segmenter.segment(self.job)

    @property
    def published(self) -> bool:
        return self.root.receipt(key_of(self.job, self.model)) is not None

    def chunks(self) -> list[Path]:
        with self.root.at_hand(f"{self.volume}/image/c") as folder:
            return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


# --- the scan


@pytest.mark.fault("F31")
def test_a_scan_that_goes_between_the_stages_gets_no_mask(stage: Stage, record_property) -> None:
    assert stage.preprocess().state == "computed"
    stage.scan.unlink()
    outcome = stage.segment()
    assert (outcome.state, outcome.codes) == ("refused", ("scan.unreadable",))
    assert not stage.published
    record_property("seen", "refused: scan.unreadable")


@pytest.mark.fault("F31")
def test_a_scan_that_changes_between_the_stages_gets_no_mask(stage: Stage, record_property) -> None:
    assert stage.preprocess().state == "computed"
    write_scan(stage.scan.parent, "case0", 2)
    outcome = stage.segment()
    assert (outcome.state, outcome.codes) == ("refused", ("scan.changed",))
    assert not stage.published
    record_property("seen", "refused: scan.changed")


# --- the volume


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


@pytest.mark.fault("F32")
@pytest.mark.parametrize(
    "spoil",
    [flipped, Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-7]), lambda path: path.write_bytes(b"")],
    ids=["flipped", "deleted", "cut", "empty"],
)
def test_a_damaged_volume_is_not_used_and_made_again(
    stage: Stage, spoil: Callable[[Path], object], record_property
) -> None:
    assert stage.preprocess().state == "computed"
    (chunk,) = stage.chunks()
    whole = chunk.read_bytes()
    spoil(chunk)
    outcome = stage.segment()
    assert (outcome.state, outcome.codes) == ("failed", ("segment.damaged-volume",))
    assert not stage.published
    assert stage.root.receipt(stage.volume) is None
    # as the retry of a night does, which asks for the receipt
    assert stage.preprocess().state == "computed"
    assert stage.chunks()[0].read_bytes() == whole
    assert stage.segment().state == "computed"
    record_property("seen", "segment.damaged-volume, taken away and made again")


@pytest.mark.fault("F32")
def test_what_a_killed_write_left_beside_a_volume_is_not_read(stage: Stage, record_property) -> None:
    """zarr writes a chunk as NAME.<uuid>.partial first."""
    assert stage.preprocess().state == "computed"
    (chunk,) = stage.chunks()
    chunk.with_name(f"{chunk.name}.0123.partial").write_bytes(b"half a chunk")
    assert stage.segment().state == "computed"
    assert stage.root.damaged(key_of(stage.job, stage.model)) == []
    record_property("seen", "not read")


# --- memory

OUT_OF_MEMORY = """
import json, resource, sys
from pathlib import Path
from tests.workers.nights.test_data_faults import COHORT
from vnet_core.plan import Plan
from workers.cohort import load_entries
from workers.registry.models import load_model
from workers.preprocess import preprocess_case
from workers.segmentation.segment import Job, Segmenter
from workers.storage.store import Root

root = Root(sys.argv[1])
model = load_model(root, "known")
# what is imported late needs memory too, and is there before it gets scarce
small, large = (entry.case for entry in load_entries(root, COHORT))
segmenter = Segmenter(root.url, "known", 1)
assert preprocess_case(root.url, small, model.plan).done
if sys.argv[2] == "segment":
    assert preprocess_case(root.url, large, model.plan).done
    assert segmenter.segment(Job("warm", small, "nifti")).done

def work(case):
    if sys.argv[2] == "segment":
        return segmenter.segment(Job(COHORT, case, "nifti"))
    root.delete("volumes")
    return preprocess_case(root.url, case, model.plan)

used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (220 << 20), resource.RLIM_INFINITY))
print(json.dumps([[o.case, o.state, o.codes, o.message] for o in map(work, (large, small))]))
"""


@pytest.mark.faults
@pytest.mark.fault("F14")
@pytest.mark.parametrize(
    ("stage_name", "code"),
    # segmenting tries smaller tiles first, and says so
    [("preprocess", "engine.memory"), ("segment", "segment.out-of-memory")],
)
def test_memory_that_ends_is_named_for_its_case_and_the_next_goes_on(
    tmp_path: Path, stage_name: str, code: str, record_property
) -> None:
    write_scan(tmp_path / "scans", "a-small", 1)
    grid = Geometry((320, 320, 320), (2.0, 2.0, 2.0), (0.0, 0.0, 0.0))
    noise = np.random.default_rng(1).integers(0, 200, (1, *grid.shape)).astype(np.int16)
    write_volume(tmp_path / "scans" / "b-large.nii", Volume(noise, grid))
    root = Root(tmp_path / "root")
    publish_model(root)
    take_in(root, COHORT, [tmp_path / "scans"])
    done = subprocess.run(
        [sys.executable, "-c", OUT_OF_MEMORY, root.url, stage_name], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    large, small = json.loads(done.stdout.splitlines()[-1])
    assert (large[1], large[2]) == ("failed", [code]), (large, done.stderr)
    assert "memory" in large[3]
    assert small[1] == "computed", small
    record_property("seen", f"{code}; the next case is computed")


# --- the clock


@pytest.mark.fault("F23")
def test_a_clock_that_is_set_back_makes_no_negative_night() -> None:
    started = datetime(2026, 10, 25, 1, 30, tzinfo=UTC)
    night = Night("n", COHORT, "known@v1", started.isoformat())
    for back in (timedelta(hours=1), timedelta(days=1)):
        over = nights.ended(night, [Outcome("a", "segment", "computed")], "", started - back)
        assert over.seconds == 0
        assert over.ended == (started - back).isoformat(timespec="seconds")


# --- plan and model


@pytest.mark.fault("F33")
def test_another_model_or_plan_has_results_of_its_own(stage: Stage, record_property) -> None:
    assert stage.preprocess().state == "computed"
    assert stage.segment().state == "computed"
    first, key = stage.root.receipt(key_of(stage.job, stage.model)), key_of(stage.job, stage.model)
    second = publish_model(stage.root, "v2", mirror_axes=(2,))
    assert key_of(stage.job, second) != key
    assert stage.root.receipt(key_of(stage.job, second)) is None
    assert attempts.failures(stage.root, COHORT) == {}
    assert Segmenter(stage.root.url, "known@v2", 1).segment(stage.job).state == "computed"
    assert stage.root.receipt(key) == first
    made = [stage.root.receipt(key_of(stage.job, model)) for model in (stage.model, second)]
    assert [receipt["model"] for receipt in made if receipt] == ["known@v1", "known@v2"]
    record_property("seen", "two results under two keys")
