"""Model bundles: what is published is loaded, and nothing else."""

import json

import pytest
import safetensors.torch
import torch

from tests.files import file_of
from vnet_core.errors import ConfigError, StorageError
from vnet_core.networks.vnet import build_vnet, initialise
from vnet_core.plan import Label, Plan
from vnet_core.sections import NetworkPlan, TrainingPlan
from workers.registry.models import Target, load_model, load_networks, next_version, publish, versions
from workers.storage.store import RECEIPT, Root

PLAN = Plan(
    channels=("T1", "T2"),
    labels=(Label(value=1, name="liver"), Label(value=5, name="tumour")),
    network=NetworkPlan(kernel_size=3, width=2, convolutions=(1, 1), normalisation="batch"),
    training=TrainingPlan(patch_size=(8, 8, 8)),
)


@pytest.fixture
def root(tmp_path) -> Root:
    return Root(tmp_path)


def state(seed: int = 0, plan: Plan = PLAN) -> dict[str, torch.Tensor]:
    network = build_vnet(plan.network, len(plan.channels), plan.outputs)
    initialise(network, seed)
    return network.state_dict()


def published(root: Root, version: str = "v1", seed: int = 0, plan: Plan = PLAN, **facts):
    files = {"loss.png": b"png", "dice.csv": b"minutes\n"}
    return publish(root, Target("liver", version, plan), [safetensors.torch.save(state(seed, plan))], facts, files)


def error_of(kind, root: Root, reference: str):
    with pytest.raises(kind) as caught:
        load_model(root, reference)
    return caught.value.code, str(caught.value)


# --- publish and load


def test_a_bundle_by_hand(root):
    model = published(root, metrics={"dice": 0.9})
    assert (model.name, model.version, model.reference, model.prefix) == ("liver", "v1", "liver@v1", "models/liver/v1")
    assert root.names("models/liver/v1") == [
        "card.md",
        "dice.csv",
        "loss.png",
        "model.json",
        RECEIPT,
        "weights.safetensors",
    ]
    facts = root.get_json("models/liver/v1/model.json")
    assert facts == model.facts
    assert facts["channels"] == ["T1", "T2"]
    assert [(label["value"], label["name"]) for label in facts["labels"]] == [(1, "liver"), (5, "tumour")]
    assert facts["metrics"] == {"dice": 0.9}
    assert facts["plan_digest"] == PLAN.digest
    assert root.receipt("models/liver/v1")["plan_digest"] == PLAN.digest
    assert model.plan == PLAN


def test_weights_come_back_to_the_last_bit(root):
    model = published(root, seed=3)
    (network,) = load_networks(root, model)
    assert not network.training
    assert network.channels == 2
    assert network.outputs == 3
    for name, value in state(seed=3).items():
        assert torch.equal(network.state_dict()[name], value)
        assert network.state_dict()[name].dtype == value.dtype


def test_several_networks_make_one_model(root):
    both = [safetensors.torch.save(state(seed)) for seed in (1, 2)]
    model = publish(root, Target("liver", "v1", PLAN), both, {}, {})
    assert model.facts["weights"] == ["weights-0.safetensors", "weights-1.safetensors"]
    for seed, network in enumerate(load_networks(root, model), start=1):
        for name, value in state(seed).items():
            assert torch.equal(network.state_dict()[name], value)
    other = publish(root, Target("liver", "v2", PLAN), both[::-1], {}, {})
    assert other.digest != model.digest


def test_weights_are_no_pickle(root):
    published(root)
    raw = root.get("models/liver/v1/weights.safetensors")
    assert json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert set(safetensors.torch.load(raw)) == set(state())


def test_the_digest_is_that_of_weights_and_plan(root):
    base = published(root).digest
    assert published(root, "v2", metrics={"dice": 0.5}).digest == base
    assert published(root, "v3", seed=1).digest != base
    other = Plan.model_validate({**PLAN.model_dump(), "inference": {"overlap": 0.5}})
    assert published(root, "v4", plan=other).digest != base


# --- which model


def test_references(root):
    for version in ("v2", "v10", "v9"):
        published(root, version)
    assert versions(root, "liver") == ["v2", "v9", "v10"]
    for reference in ("liver", "liver@", "liver@latest", "liver@v10"):
        assert load_model(root, reference).version == "v10"
    assert load_model(root, "liver@v2").version == "v2"


def test_an_unknown_model_names_those_that_exist(root):
    code, message = error_of(ConfigError, root, "spleen")
    assert code == "model.unknown"
    assert "known: none" in message
    published(root)
    root.put("models/begun/v1/weights.safetensors", b"")
    code, message = error_of(ConfigError, root, "spleen")
    assert "'spleen'" in message
    assert "known: liver" in message
    assert "begun" not in message


def test_an_unknown_version_names_those_that_exist(root):
    published(root, "v1")
    published(root, "v2")
    code, message = error_of(ConfigError, root, "liver@v3")
    assert code == "model.version"
    assert "'v3'" in message
    assert "v1, v2" in message


@pytest.mark.parametrize("name", ["", "../liver", "a/b", ".hidden", "with space"])
def test_a_name_that_is_no_folder_is_refused(root, name):
    assert error_of(ConfigError, root, name)[0] == "model.name"


def test_a_version_without_receipt_does_not_exist(root):
    published(root, "v1")
    published(root, "v2")
    file_of(root, f"models/liver/v2/{RECEIPT}").unlink()
    assert versions(root, "liver") == ["v1"]
    assert load_model(root, "liver").version == "v1"
    assert error_of(ConfigError, root, "liver@v2")[0] == "model.version"


def test_the_next_version_is_after_every_one_that_was_begun(root):
    assert next_version(root, "liver") == "v1"
    published(root, "v9")
    assert next_version(root, "liver") == "v10"
    root.put("training/liver/v12/progress.json", b"{}")
    assert next_version(root, "liver") == "v13"
    root.put("models/liver/draft/x", b"")
    assert next_version(root, "liver") == "v13"
    assert next_version(root, "spleen") == "v1"


# --- damage


@pytest.mark.parametrize("file", ["weights.safetensors", "model.json", "loss.png"])
def test_a_changed_file_is_named_and_nothing_is_loaded(root, file):
    published(root)
    path = file_of(root, f"models/liver/v1/{file}")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    code, message = error_of(StorageError, root, "liver")
    assert code == "model.damaged"
    assert file in message
    assert "liver@v1" in message


def test_a_damaged_receipt_is_named_and_no_older_version_taken_instead(root):
    published(root)
    published(root, "v2")
    file_of(root, f"models/liver/v2/{RECEIPT}").write_bytes(b"")
    assert versions(root, "liver") == ["v1", "v2"]
    code, message = error_of(StorageError, root, "liver")
    assert code == "model.damaged"
    assert "receipt.json of model liver@v2" in message


def test_lost_weights_are_named(root):
    published(root)
    file_of(root, "models/liver/v1/weights.safetensors").unlink()
    code, message = error_of(StorageError, root, "liver@v1")
    assert code == "model.damaged"
    assert "weights.safetensors" in message
