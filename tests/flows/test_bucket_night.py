"""The same commands on a root in a bucket of a real S3 server give the bytes that they give in a folder."""

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tests.flows.command import COSTS
from tests.object_store import ObjectStore
from tests.workers.tiny_cohort import publish_model, take_in
from workers.care.fsck import fsck
from workers.care.retention import spares
from workers.reports.query import Query, query
from workers.settings.retention_rules import KEEP_EVERYTHING
from workers.storage.store import Root

pytestmark = pytest.mark.slow


def receipts(root: Root, cohort: str = "many") -> dict[str, Any]:
    """Receipts of finished results by case, without what the work took."""
    found = {}
    for stored in root.walk(f"results/{cohort}"):
        if stored.key.endswith("/receipt.json"):
            receipt = root.get_json(stored.key)
            found[stored.key.split("/")[2]] = {name: value for name, value in receipt.items() if name not in COSTS}
    return found


@pytest.fixture
def variables(writable_store: ObjectStore, tmp_path: Path) -> dict[str, str]:
    return {**writable_store.variables(), "VNET_HOME": str(tmp_path / "home")}


def test_a_night_in_a_bucket(vnet, taken_in: Path, writable_store: ObjectStore, variables, tmp_path: Path) -> None:
    scans = taken_in.parent / "scans"
    bucket = Root(writable_store.new_root())
    publish_model(bucket)
    take_in(bucket, "many", [scans])
    folder = Root(shutil.copytree(taken_in, tmp_path / "root"))

    here = vnet("nightly", "--cohort", "many", "--model", "known", "--json", root=folder.home)
    assert here.wait() == 0, here.err
    there = vnet("nightly", "--cohort", "many", "--model", "known", "--json", root=bucket.url, **variables)
    assert there.wait() == 0, there.err
    assert there.states == dict.fromkeys((f"case{n}" for n in range(8)), "computed")
    found = receipts(bucket)
    assert found == receipts(folder)
    assert len(found) == 8
    told = json.loads(there.out)
    assert told["root"] == bucket.url
    assert told["cases"][0]["mask"].startswith(f"{bucket.url}/results/many/case0/")
    for receipt in (s.key for s in bucket.walk("results") if s.key.endswith("/receipt.json")):
        assert bucket.damaged(receipt.removesuffix("/receipt.json")) == []
    tops = {stored.key.split("/")[0] for stored in bucket.walk("")}
    assert {"cohorts", "models", "volumes", "results", "nights", "reports", "logs"} <= tops
    assert not tops & {"private", "prefect"}, "what names patients and what is a database stays on this machine"
    assert writable_store.variables()["AWS_SECRET_ACCESS_KEY"] not in there.err + there.out

    again = vnet("segment", "--cohort", "many", "--model", "known", "--json", "--output", tmp_path / "masks",
                 root=bucket.url, **variables)  # fmt: skip
    assert again.wait() == 0, again.err
    assert set(again.states.values()) == {"cached"}
    assert len(list((tmp_path / "masks").glob("case*.nii.gz"))) == 8

    assert fsck(bucket, datetime.now(UTC)).findings == ()
    assert spares(bucket, KEEP_EVERYTHING, datetime.now(UTC)) == []
    assert len(query(bucket, Query(cohorts=("many",))).rows) >= 8


PLAN = """
[preprocess]
spacing_mm = [4.0, 4.0, 4.0]
[network]
kernel_size = 3
width = 4
convolutions = [1, 1]
[training]
patch_size = [16, 16, 16]
batch_size = 2
optimiser = "sgd"
learning_rate = 1e-3
"""


def test_a_training_in_a_bucket_goes_on_where_it_was_killed(
    vnet, writable_store: ObjectStore, variables, walkthrough, tmp_path: Path
) -> None:
    """Its checkpoints are objects, and its model has the weights of an undisturbed training in a folder."""
    scans, plan = walkthrough.folder / "scans" / "train", tmp_path / "plan.toml"
    plan.write_text(PLAN)
    take = ("ingest", scans, "--cohort", "train", "--label", "1=organ", "--label", "2=lesion")
    train = ("train", "--cohort", "train", "--model", "organs", "--steps", "60")
    folder, bucket = Root(tmp_path / "root"), Root(writable_store.new_root())
    for root in (folder, bucket):
        taken = vnet(*take, root=root.shown, **variables)
        assert taken.wait() == 0, taken.err
    undisturbed = vnet(*train, "--plan", plan, root=folder.home)
    assert undisturbed.wait() == 0, undisturbed.err

    killed = vnet(*train, "--plan", plan, root=bucket.url, **variables)
    killed.until(lambda: any("/checkpoints/" in stored.key for stored in bucket.walk("training")))
    killed.cut_power()
    resumed = vnet(*train, "--resume", root=bucket.url, **variables)
    assert resumed.wait() == 0, resumed.err
    sealed = [root.receipt("models/organs/v1") for root in (folder, bucket)]
    assert sealed[0]
    assert sealed[1]
    assert sealed[0]["files"]["weights.safetensors"] == sealed[1]["files"]["weights.safetensors"]
