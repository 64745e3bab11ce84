"""A challenger in the shadow of the champion: which cases it sees, what is recorded, and what the page says.

The models are networks whose answers are known; what the engines would do is done in this process.
"""

import base64
import copy
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

from flows.nights.challenge import challenge_page, compared_night
from tests.files import file_of
from tests.workers.known_model import SHARPNESS, known_network, known_plan, scan_of
from vnet_core.geometry import Geometry
from vnet_core.plan import Label, Plan
from workers.cohort import Case, source_digest
from workers.ledger import Outcome
from workers.nights.record import Night
from workers.nights.shadows import SCHEMA, in_sample, pairs_of, shadows, standings
from workers.preprocess import preprocess_case
from workers.registry.aliases import challenge, promote, withdraw
from workers.registry.models import Model, Target, load_model, publish
from workers.segmentation.segment import Job, Segmenter, key_of
from workers.sources.scans import write_label
from workers.storage.store import Root

GRID = Geometry((10, 12, 14), (2.0, 1.0, 1.0), (0.0, 0.0, 0.0))
PLAN = known_plan((2.0, 1.0, 1.0), crop=False)
NIGHT = Night("2026-11-22_010000", "brains", "brain@v1", "2026-11-22T01:00:00+00:00")


def known(moved: float = 0.0) -> bytes:
    """A model in which the labels begin at grey values of 250 - 500 * moved and 750."""
    network = known_network(PLAN)
    with torch.no_grad():
        network.head.convolution.bias[1] += SHARPNESS * moved
        network.head.convolution.bias[2] += SHARPNESS * moved
    return safetensors.torch.save(network.state_dict())


def mask(number: int) -> np.ndarray:
    values = np.zeros(GRID.shape, np.uint16)
    values[2:8, 3:9, 3 : 9 + number % 4] = 2
    values[3:5, 4:6, 4:6] = 7
    return values


class Site:
    """A root with a champion and its masks, and a challenger that takes greys from 200 on for the label."""

    def __init__(self, folder: Path, cases: int) -> None:
        self.root, self.folder, self.asked = Root(folder / "root"), folder, []
        publish(self.root, Target("brain", "v1", PLAN), [known()], {}, {})
        self.publish_challenger(known(0.1))
        promote(self.root, "brain", "v1", "Ada", "")
        challenge(self.root, "brain", "v2", "Ada")
        self.jobs = [self.job(number) for number in range(cases)]
        assert all(one.state == "computed" for one in self.segment(load_model(self.root, "brain@v1"), self.jobs))

    def publish_challenger(self, weights: bytes, plan: Plan = PLAN, version: str = "v2") -> None:
        publish(self.root, Target("brain", version, plan), [weights], {}, {})

    def job(self, number: int) -> Job:
        path = self.folder / f"scan-{number}.nii.gz"
        values = scan_of(mask(number), number, noise=180)
        # between the two models' thresholds: the challenger takes it for grey
        values[8, 3 : 4 + number, 3:9] = 220
        write_label(path, values.astype(np.uint16), GRID)
        case = Case(f"case-{number}", (str(path),), digest=source_digest([str(path)]), geometry=GRID)
        return Job("brains", case, "nifti")

    def segment(self, model: Model, jobs: Sequence[Job]) -> list[Outcome]:
        self.asked.append((model.reference, [job.case.id for job in jobs]))
        for job in jobs:
            assert preprocess_case(self.root.url, job.case, model.plan).done
        segmenter = Segmenter(self.root.url, model.reference, 1)
        return [segmenter.segment(job) for job in jobs]

    def night(self, share: float = 1.0, night: Night = NIGHT, **changes):
        return compared_night(
            self.root, night, changes.get("jobs", self.jobs), share, changes.get("segment", self.segment)
        )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("site"), 2)


@pytest.fixture
def site(made: Site, tmp_path: Path) -> Site:
    """A site of its own, on the same scans."""
    site = copy.copy(made)
    site.folder = Path(shutil.copytree(made.folder, tmp_path / "site"))
    site.root = Root(site.folder / "root")
    moved = [str(site.folder / Path(job.case.channels[0]).name) for job in made.jobs]
    site.jobs = [
        replace(job, case=replace(job.case, channels=(path,))) for job, path in zip(made.jobs, moved, strict=True)
    ]
    site.asked = []
    return site


# --- figures


def test_volumes_and_dice_by_pencil(site):
    found = site.night()
    assert (found.champion, found.challenger) == ("brain@v1", "brain@v2")
    assert (found.sampled, found.compared, found.failed, found.problem) == (2, 2, [], "")
    pairs = {(pair.case, pair.label): pair for pair in pairs_of(site.root, [found])}
    assert sorted(pairs) == [("case-0", "grey"), ("case-0", "white"), ("case-1", "grey"), ("case-1", "white")]
    for number in range(2):
        grey = int((mask(number) == 2).sum())
        more = 6 * (number + 1)
        pair = pairs[f"case-{number}", "grey"]
        assert pair.champion_ml == pytest.approx(grey * 0.002)
        assert pair.challenger_ml == pytest.approx((grey + more) * 0.002)
        assert pair.dice == pytest.approx(2 * grey / (2 * grey + more))
        assert pairs[f"case-{number}", "white"].dice == 1
    grey, white = standings(list(pairs.values()))
    assert (grey.label, grey.volumes.bias_ml) == ("grey", pytest.approx((6 + 12) / 2 * 0.002))
    assert (white.volumes.bias_ml, white.volumes.low_ml) == (pytest.approx(0), pytest.approx(0))


def test_the_record_has_the_columns_and_the_masks_lie_side_by_side(site):
    found = site.night()
    table = pq.read_table(file_of(site.root, f"shadows/brains/{NIGHT.id}.parquet"))
    assert table.schema.names == SCHEMA.names
    (row, *_) = table.to_pylist()
    models = [load_model(site.root, f"brain@{version}") for version in ("v1", "v2")]
    assert [row["champion_key"], row["challenger_key"]] == [key_of(site.jobs[0], model) for model in models]
    assert row["champion_key"] != row["challenger_key"]
    assert all(site.root.receipt(row[key]) for key in ("champion_key", "challenger_key"))
    assert shadows(site.root, "brains") == [found]


def test_labels_that_are_written_with_other_values_are_compared_by_name(tmp_path):
    site = Site(tmp_path, 1)
    labels = (Label(value=1, name="grey"), Label(value=3, name="white"))
    plan = PLAN.model_copy(update={"labels": labels, "output": PLAN.output.model_copy(update={"values": {"grey": 9}})})
    site.publish_challenger(known(), plan, "v3")
    challenge(site.root, "brain", "v3", "Ada")
    found = site.night()
    assert [(pair.label, pair.dice) for pair in pairs_of(site.root, [found])] == [("grey", 1), ("white", 1)]


def test_a_structure_that_neither_finds_has_no_dice(tmp_path):
    site = Site(tmp_path, 0)
    path = tmp_path / "empty.nii.gz"
    write_label(path, np.full(GRID.shape, 5, np.uint16), GRID)
    job = Job("brains", Case("empty", (str(path),), digest=source_digest([str(path)]), geometry=GRID), "nifti")
    site.segment(load_model(site.root, "brain@v1"), [job])
    found = site.night(jobs=[job])
    assert [(pair.champion_ml, pair.dice) for pair in pairs_of(site.root, [found])] == [(0, None), (0, None)]
    page = challenge_page(site.root, found, [job])
    assert "1 case compared" in page
    assert "Where they differ" not in page


# --- which cases, and when


def test_the_sample_is_a_matter_of_bytes_and_grows_with_the_share():
    cases = [Case(f"c{n}", (), digest=f"{n:064x}") for n in range(2000)]
    drawn = {share: {c.id for c in cases if in_sample(c, "m" * 64, share)} for share in (0, 0.1, 0.5, 1)}
    assert (len(drawn[0]), len(drawn[1])) == (0, 2000)
    assert drawn[0.1] < drawn[0.5]
    assert 150 < len(drawn[0.1]) < 250
    renamed = {c.id for c in cases if in_sample(replace(c, id="other"), "m" * 64, 0.1)}
    assert renamed == drawn[0.1]
    assert {c.id for c in cases if in_sample(c, "n" * 64, 0.1)} != drawn[0.1]


def test_a_night_with_nothing_new_segments_and_reads_nothing(site):
    site.night()
    site.asked.clear()
    later = replace(NIGHT, id="2026-11-23_010000")
    found = site.night(night=later)
    assert (site.asked, found.sampled, found.compared) == ([], 2, 0)
    site.jobs.append(site.job(2))
    site.segment(load_model(site.root, "brain@v1"), site.jobs[2:])
    site.asked.clear()
    third = site.night(night=replace(NIGHT, id="2026-11-24_010000"))
    assert site.asked == [("brain@v2", ["case-2"])]
    assert third.compared == 1
    assert len({pair.case for pair in pairs_of(site.root, shadows(site.root, "brains"))}) == 3
    assert "**3 cases compared** over 2 nights, 1 of them in night" in challenge_page(site.root, third, site.jobs)


def test_the_same_night_again_writes_the_same(site):
    site.night()
    keys = [f"shadows/brains/{NIGHT.id}.{kind}" for kind in ("json", "parquet")]
    before = [site.root.get(key) for key in keys]
    site.night()
    assert [site.root.get(key) for key in keys] == before


def test_only_cases_with_a_mask_of_the_champion_are_drawn(site):
    site.root.delete(key_of(site.jobs[0], load_model(site.root, "brain@v1")))
    found = site.night()
    assert (found.sampled, found.compared) == (1, 1)
    assert site.asked[-1] == ("brain@v2", ["case-1"])


def test_without_a_challenger_or_a_share_nothing_happens(site):
    assert site.night(share=0.0) is None
    assert site.night(night=replace(NIGHT, model="brain@v2")) is None
    withdraw(site.root, "brain", "Ada")
    assert site.night() is None
    assert shadows(site.root, "brains") == []
    assert not site.root.exists("shadows")


def test_another_challenger_begins_anew(site):
    site.night()
    site.publish_challenger(known(-0.1), version="v3")
    challenge(site.root, "brain", "v3", "Ada")
    found = site.night(night=replace(NIGHT, id="2026-11-23_010000"))
    assert (found.challenger, found.compared) == ("brain@v3", 2)
    page = challenge_page(site.root, found, site.jobs)
    assert "**2 cases compared** over 1 night, 2 of them" in page


# --- what goes wrong


def test_a_case_that_fails_is_told_and_the_others_are_compared(site):
    def failing(model, jobs):
        done = site.segment(model, jobs[1:])
        return [Outcome(jobs[0].case.id, "segment", "failed", ("segment.memory",), "9 GiB <needed>"), *done]

    found = site.night(segment=failing)
    assert (found.sampled, found.compared) == (2, 1)
    assert found.failed == [{"case": "case-0", "codes": ["segment.memory"], "message": "9 GiB <needed>"}]
    page = challenge_page(site.root, found, site.jobs)
    assert "## Without a comparison (1)" in page
    assert "9 GiB &lt;needed&gt;" in page
    # it comes up again
    assert site.night(night=replace(NIGHT, id="2026-11-23_010000")).compared == 1


def test_a_mask_that_cannot_be_read_is_one_failed_case(site):
    key = key_of(site.jobs[1], load_model(site.root, "brain@v1"))
    file_of(site.root, f"{key}/mask.ome.zarr/zarr.json").write_text("{")
    found = site.night()
    assert (found.compared, [one["case"] for one in found.failed]) == (1, ["case-1"])


def test_cases_that_the_night_had_no_time_for_are_neither(site):
    found = site.night(segment=lambda model, jobs: site.segment(model, jobs[:1]))
    assert (found.sampled, found.compared, found.failed) == (2, 1, [])


def test_a_damaged_challenger_fails_no_night(site):
    file_of(site.root, "models/brain/v2/weights.safetensors").write_bytes(b"")
    found = site.night()
    assert found.problem.startswith("model.damaged: ")
    assert (found.compared, found.failed) == (0, [])
    assert "could not be used in this night" in challenge_page(site.root, found, site.jobs)


def test_a_challenger_for_other_structures_is_told(site):
    plan = PLAN.model_copy(update={"labels": (Label(value=1, name="bone"), Label(value=2, name="fat"))})
    site.publish_challenger(known(), plan, "v3")
    challenge(site.root, "brain", "v3", "Ada")
    assert site.night().problem.startswith("challenger.other: none of the challenger's 2 labels")


# --- the page


def test_the_page_has_figures_a_plot_the_worst_case_and_what_to_do(site):
    page = challenge_page(site.root, site.night(), site.jobs)
    assert page.startswith("# brain@v2 beside brain@v1 on brains\n")
    assert "**2 cases compared** over 1 night, 2 of them in night `2026-11-22_010000`; the sample is 100 %" in page
    assert "not a medical device" in page
    (grey,) = [line for line in page.splitlines() if line.startswith("| grey |")]
    assert grey.split(" | ")[1:3] == ["2", f"{np.mean([pair_dice(0), pair_dice(1)]):.3f}"]
    titles = re.findall(r"^### (.+)$", page, re.M)
    assert titles == ["case-1: grey", "case-0: grey"]
    pictures = re.findall(r"!\[([^]]*)\]\(data:image/png;base64,([^)]*)\)", page)
    assert [name for name, _ in pictures] == ["Bland-Altman plot of the volumes", "case-1", "case-0"]
    assert all(base64.b64decode(data).startswith(b"\x89PNG") for _, data in pictures)
    assert "`vnet models promote brain@v2 --why REASON`" in page
    assert "promote-model-form" in page
    assert len(page.encode()) < 1_200_000


def pair_dice(number: int) -> float:
    grey = int((mask(number) == 2).sum())
    return 2 * grey / (2 * grey + 6 * (number + 1))


def test_a_scan_that_is_gone_leaves_its_figures_without_a_picture(site):
    found = site.night()
    (site.folder / "scan-1.nii.gz").unlink()
    page = challenge_page(site.root, found, [])
    assert page.count("No picture") == 2
    page = challenge_page(site.root, found, site.jobs)
    assert page.count("No picture") == 1
    assert "scan-1" not in page
