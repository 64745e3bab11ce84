"""A night on two hosts, with a bucket and a Prefect server that neither has, gives the bytes of one in a folder, also
where one of the two is lost while it works."""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.flows.command import Command, until
from tests.flows.command import receipts as receipts_in_folder
from tests.flows.conftest import nightly
from tests.flows.test_bucket_night import receipts
from tests.namespaces import Host, why_not
from tests.object_store import WRITER, forget_connections, use_identity
from tests.two_hosts import TwoHosts, raylet, two_hosts
from tests.workers.tiny_cohort import TRAINED, take_in, write_labelled
from tests.workers.untrained_model import publish_untrained
from vnet_core.phantoms import LABELS, PhantomSpec, phantom
from vnet_core.plan import Plan
from workers.sources.scans import write_volume
from workers.storage.store import Root

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

CASES = 8
NIGHT_S = 900.0
SECONDS_TO_END_S = 120.0
"""A node of Ray that comes back after it was counted as dead ends by itself."""
PLAN = {
    "labels": [label.model_dump() for label in LABELS],
    "preprocess": {"spacing_mm": [1.25, 1.25, 1.25]},
    "network": {"kernel_size": 5, "width": 8, "convolutions": [1, 2, 2]},
    "training": {"patch_size": [16, 16, 16]},
}
"""A network that takes most of a second for a case, so that one host cannot do all before the other has begun."""
STEPS = 6000
LOSSES = [
    pytest.param(Host.pull_cable, id="cable"),
    pytest.param(lambda host: raylet(host).kill(), id="raylet"),
    pytest.param(Host.cut_power, id="power"),
]
"""A host is cut off, its node of Ray is killed, or all of it stops."""


@pytest.fixture(scope="module")
def taken_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as root with a cohort ``many`` of phantoms and a model ``known`` with weights from a seed."""
    folder = tmp_path_factory.mktemp("phantoms")
    (folder / "scans").mkdir()
    for number in range(CASES):
        write_volume(folder / "scans" / f"case{number}.nii.gz", phantom(PhantomSpec(number))[0])
    root = Root(folder / "root")
    publish_untrained(root, Plan.from_mapping(PLAN))
    take_in(root, "many", [folder / "scans"])
    return root.home


@pytest.fixture(scope="module")
def on_one(taken_in: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Receipts of a night on this machine, in a folder, by engines of its own."""
    root = Path(shutil.copytree(taken_in, tmp_path_factory.mktemp("one") / "root"))
    command = Command(*nightly(), root=root)
    try:
        assert command.wait(NIGHT_S) == 0, command.err
    finally:
        command.end()
    found = receipts_in_folder(root)
    assert len(found) == CASES
    return found


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TwoHosts]:
    if reason := why_not():
        pytest.skip(reason)
    with two_hosts(tmp_path) as started:
        use_identity(started.store, monkeypatch, WRITER)
        monkeypatch.setenv("VNET_HOME", str(tmp_path / "home"))
        yield started
        forget_connections()


def ingested(hosts: TwoHosts, taken_in: Path) -> tuple[Root, Path]:
    """A root in a bucket with the same model, into which the first host has taken the same scans; its site file."""
    bucket, folder = Root(hosts.store.new_root()), Root(taken_in)
    for stored in folder.walk("models"):
        bucket.put(stored.key, folder.get(stored.key))
    shutil.copytree(taken_in.parent / "scans", hosts.shared / "scans")
    site = hosts.site(bucket.url)
    hosts.document("ingest", "ingest", hosts.shared / "scans", "--cohort", "many", site=site)
    return bucket, site


def all_in_one_row(document: dict[str, Any]) -> None:
    assert [(case["case"], case["state"]) for case in document["cases"]] == [
        (f"case{number}", "computed") for number in range(CASES)
    ]


def test_a_night_on_two_hosts_gives_the_bytes_of_one(hosts: TwoHosts, taken_in: Path, on_one: dict[str, Any]) -> None:
    bucket, site = ingested(hosts, taken_in)
    all_in_one_row(hosts.document("night", *nightly(), site=site))
    assert receipts(bucket) == on_one
    for case in on_one:
        (key,) = bucket.names(f"results/many/{case}")
        assert bucket.damaged(f"results/many/{case}/{key}") == []

    for point in ("preprocess:sealed", "segment:sealed"):
        by_host = hosts.executions(point)
        assert min(len(done) for done in by_host.values()) > 0, f"{point}: {by_host}"
        assert sorted(sum(by_host.values(), Counter()).values()) == [1] * CASES, f"{point}: {by_host}"
    runs = hosts.prefect.call("/flow_runs/filter", {"flows": {"name": {"any_": ["nightly"]}}})
    assert [run["state_type"] for run in runs] == ["COMPLETED"]


@pytest.mark.parametrize("lose", LOSSES)
def test_a_host_that_is_lost_in_the_midst_of_its_work_changes_no_byte(
    hosts: TwoHosts, taken_in: Path, on_one: dict[str, Any], lose: Callable[[Host], None]
) -> None:
    bucket, site = ingested(hosts, taken_in)
    night = hosts.vnet("night", *nightly(), site=site)

    def both_work() -> bool:
        assert night.poll() is None, hosts.first.said("night")
        return all(hosts.executions("segment:read").values())

    until(both_work, NIGHT_S)
    lose(hosts.second)
    published = receipts(bucket)
    assert night.wait(NIGHT_S) == 0, hosts.first.said("night")
    assert len(published) < CASES, "the host was lost after all was done"
    all_in_one_row(json.loads(hosts.first.output("night")))
    assert receipts(bucket) == on_one
    begun = sum(hosts.executions("segment:read").values(), Counter())
    of_case = {key.split("/")[2]: times for key, times in begun.items()}
    assert {case: of_case[case] for case in published} == dict.fromkeys(published, 1)

    whole = {stored.key: bucket.get(stored.key) for stored in bucket.walk("results")}
    if lose is Host.pull_cable:
        hosts.second.plug_in()
        until(lambda: not hosts.second.named("ray::Segmenter"), SECONDS_TO_END_S)
    assert {stored.key: bucket.get(stored.key) for stored in bucket.walk("results")} == whole


@pytest.mark.parametrize("lose", LOSSES)
def test_a_training_over_two_hosts_goes_on_with_one_when_the_other_is_lost(
    hosts: TwoHosts, lose: Callable[[Host], None]
) -> None:
    bucket, plan = Root(hosts.store.new_root()), hosts.shared / "plan.toml"
    plan.write_text(f"{TRAINED}validation_fraction = 0.0\n", "utf-8")
    for number in range(4):
        write_labelled(hosts.shared / "scans", f"case{number}", number)
    site = hosts.site(bucket.url)
    hosts.document("ingest", "ingest", hosts.shared / "scans", "--cohort", "train", "--label", "2=cuboid", site=site)
    order = ("train", "--cohort", "train", "--model", "cuboids", "--plan", plan, "--steps", str(STEPS))
    training = hosts.vnet("train", *order, "--workers", "1:2", site=site)
    checkpoints = "training/cuboids/v1/checkpoints"

    def is_under_way() -> bool:
        assert training.poll() is None, hosts.first.said("train")
        return any(bucket.receipt(f"{checkpoints}/{step}") for step in bucket.names(checkpoints))

    until(is_under_way, NIGHT_S)
    lose(hosts.second)
    assert training.wait(NIGHT_S) == 0, hosts.first.said("train")
    facts = bucket.get_json("models/cuboids/v1/model.json")["training"]
    first, *_, last = facts["attempts"]
    assert (first["from_step"], first["workers"]) == (0, 2)
    assert 0 < last["from_step"] < facts["steps"] == STEPS
    assert last["workers"] == 1
