"""Pickles planted wherever the storage root is read: none is loaded, and what reads them refuses them by name."""

from __future__ import annotations

import base64
import io
import json
import pickle
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numcodecs
import numcodecs.pickles
import numpy as np
import pytest
import torch

from flows.cli import main
from tests.pickles import Bird, bird, holds_pickle, pickles
from tests.workers.known_model import known_network, known_plan
from tests.workers.small_root import COHORT, add_case, case_of, small_root
from vnet_core.errors import VnetError
from workers.cohort import load_cohort, load_entries, result_key, volume_key
from workers.engines.clusters import Engines
from workers.registry.models import load_model, load_networks
from workers.reports.report import read_rows
from workers.segmentation.masks import load_report
from workers.segmentation.segment import Job, Segmenter
from workers.storage.arrays import read_array
from workers.storage.store import Root
from workers.training.checkpoints import load_checkpoint, save_checkpoint
from workers.training.patches import load_volume
from workers.training.train import resume

NIGHT = datetime(2026, 11, 23, 1, tzinfo=UTC)
PLAN = known_plan((1.0, 1.0, 1.0))


@pytest.fixture
def sang(tmp_path: Path) -> Path:
    return tmp_path / "sang"


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return small_root(tmp_path / "root", NIGHT)


def error_of(call: Callable[[], object]) -> str:
    with pytest.raises(VnetError) as caught:
        call()
    return caught.value.code


# --- the canary itself


def test_the_bird_sings_when_it_is_let_out(sang: Path) -> None:
    pickle.loads(bird(sang))
    assert sang.is_dir()


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_are_known_from_other_files(protocol: int, tmp_path: Path) -> None:
    content = pickle.dumps([Bird(tmp_path), {"weights": [1.0, 2.0], "name": "x" * 30}], protocol)
    assert holds_pickle(content)
    if protocol >= 2:
        assert holds_pickle(json.dumps({"result": base64.encodebytes(content).decode()}).encode())
    for plain in (b"", b".", b"night.", b'{"a": 1}\n', b"\x89PNG\r\n\x1a\n", bytes(400), b"Volumes of the liver.\n."):
        assert not holds_pickle(plain)
    sink = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, sink)
    (tmp_path / "x.pt").write_bytes(sink.getvalue())
    (tmp_path / "y.json").write_text("{}")
    assert pickles(tmp_path) == ["x.pt"]


# --- models


def resealed(root: Root, prefix: str) -> None:
    """A receipt for what lies there now, as somebody who may write to the root can make one."""
    root.seal(prefix, {key: value for key, value in (root.receipt(prefix) or {}).items() if key != "files"})


@pytest.mark.parametrize("kind", ["pickle", "torch", "numpy"])
@pytest.mark.parametrize("sealed", [False, True])
def test_weights_that_are_a_pickle(root: Root, sang: Path, kind: str, sealed: bool) -> None:
    content = io.BytesIO()
    if kind == "pickle":
        content.write(bird(sang))
    elif kind == "torch":
        torch.save({"head": Bird(sang)}, content)
    else:
        np.save(content, np.array([Bird(sang)], object), allow_pickle=True)
    root.put("models/organs/v1/weights.safetensors", content.getvalue())
    if sealed:
        resealed(root, "models/organs/v1")
        model = load_model(root, "organs")
        assert error_of(lambda: load_networks(root, model)) == "model.damaged"
        assert error_of(lambda: Segmenter(root.url, "organs@v1", 1)) == "model.damaged"
    else:
        assert error_of(lambda: load_model(root, "organs")) == "model.damaged"
    assert not sang.exists()


def test_weights_that_change_after_the_model_was_looked_up(root: Root) -> None:
    model = load_model(root, "organs")
    assert len(load_networks(root, model)) == 1
    content = bytearray(root.get("models/organs/v1/weights.safetensors"))
    content[-3] ^= 1
    root.put("models/organs/v1/weights.safetensors", bytes(content))
    assert error_of(lambda: load_networks(root, model)) == "model.damaged"
    resealed(root, "models/organs/v1")
    assert error_of(lambda: load_networks(root, model)) == "model.damaged"
    assert load_model(root, "organs").digest != model.digest


def test_weights_that_the_receipt_does_not_name(root: Root, sang: Path) -> None:
    facts = root.get_json("models/organs/v1/model.json")
    root.put_json("models/organs/v1/model.json", facts | {"weights": ["planted.safetensors"]})
    resealed(root, "models/organs/v1")
    root.put("models/organs/v1/planted.safetensors", bird(sang))
    assert error_of(lambda: load_model(root, "organs")) == "model.damaged"
    assert not sang.exists()


# --- trainings


def test_checkpoints_that_are_a_pickle(root: Root, sang: Path) -> None:
    network = known_network(PLAN)
    optimiser = torch.optim.SGD(network.parameters(), 0.1)
    prefix = "training/organs/v9"
    save_checkpoint(root, prefix, {"network": network.state_dict()}, optimiser, {"step": 1})
    newest = f"{prefix}/checkpoints/{1:09d}"
    root.put(f"{newest}/state.safetensors", bird(sang))
    # what the receipt does not vouch for is passed over
    assert load_checkpoint(root, prefix, optimiser, torch.device("cpu")) is None
    resealed(root, newest)
    assert error_of(lambda: load_checkpoint(root, prefix, optimiser, torch.device("cpu"))) == "store.corrupt"
    root.put(f"{newest}/state.json", bird(sang))
    root.put(f"{prefix}/training.json", bird(sang))
    assert error_of(lambda: resume(root, "organs", None, Engines())) == "store.corrupt"
    assert not sang.exists()


# --- volumes


def test_volumes_with_a_codec_that_unpickles(root: Root, sang: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zarr knows one in version 2: an array of ours that was replaced by one of those is refused, also where the
    codec's own lock is open."""
    monkeypatch.setattr(numcodecs.pickles, "ALLOW_UNSAFE_PICKLE_DECODE", True)
    case = case_of("a")
    key = volume_key(case, PLAN)
    root.delete(f"{key}/image")
    header = {
        "zarr_format": 2,
        "shape": [1],
        "chunks": [1],
        "dtype": "|O",
        "compressor": None,
        "fill_value": None,
        "order": "C",
        "filters": [{"id": "pickle", "protocol": 5}],
    }
    for name, chunk in ((".zarray", "0"), ("zarr.json", "c/0/0/0/0")):
        root.put_json(f"{key}/image/{name}", header)
        root.put(f"{key}/image/{chunk}", bird(sang))
        resealed(root, key)
        assert error_of(lambda: read_array(root, key, "image")) == "store.corrupt"
        assert error_of(lambda: load_volume(root, key, PLAN)) == "store.corrupt"
        assert not sang.exists()


def test_the_codec_unpickles_where_it_may(sang: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without this the test above would show nothing."""
    monkeypatch.setattr(numcodecs.pickles, "ALLOW_UNSAFE_PICKLE_DECODE", True)
    codec = numcodecs.get_codec({"id": "pickle", "protocol": 5})
    codec.decode(bird(sang))
    assert sang.is_dir()


@pytest.mark.parametrize("codec", ["numcodecs.pickle", "pickle"])
def test_volumes_of_our_version_with_a_pickle_codec(root: Root, sang: Path, codec: str) -> None:
    key = volume_key(case_of("a"), PLAN)
    header = root.get_json(f"{key}/image/zarr.json")
    root.put_json(f"{key}/image/zarr.json", header | {"codecs": [{"name": codec, "configuration": {"protocol": 5}}]})
    for stored in list(root.walk(f"{key}/image/c")):
        root.put(stored.key, bird(sang))
    resealed(root, key)
    assert error_of(lambda: read_array(root, key, "image")) == "store.corrupt"
    assert not sang.exists()


def test_chunks_that_are_a_pickle(root: Root, sang: Path) -> None:
    key = volume_key(case_of("a"), PLAN)
    for stored in list(root.walk(f"{key}/image/c")):
        root.put(stored.key, bird(sang))
    resealed(root, key)
    assert error_of(lambda: read_array(root, key, "image")) == "store.corrupt"
    outcome = Segmenter(root.url, "organs@v1", 1).segment(Job(COHORT, add_case(root, "a"), "nifti"))
    assert (outcome.state, outcome.codes) == ("failed", ("segment.damaged-volume",))
    assert not sang.exists()


# --- everything else, and the commands


def plant_everywhere(root: Root, sang: Path) -> int:
    """A pickle in place of every file, and beside them where Prefect, Ray and torch would leave theirs; how many."""
    keys = [stored.key for stored in root.walk("") if not stored.key.startswith("prefect/")]
    beside = [
        "prefect/storage/0123456789abcdef",
        "training/organs/v1/ray/tuner.pkl",
        "training/organs/v1/ray/trainer.pkl",
        "training/organs/v1/ray/result.pkl",
        "training/organs/v1/checkpoints/000000001/state.pt",
        "training/organs/v1/checkpoints/000000001/state.safetensors",
        "training/organs/v1/training.json",
        "models/organs/v1/weights.pt",
        "models/organs/v1/weights.npy",
    ]
    for key in [*keys, *beside]:
        root.put(key, bird(sang))
    return len(keys) + len(beside)


READS: dict[str, Callable[[Root, str], object]] = {
    "model": lambda root, result: load_model(root, "organs"),
    "cohort": lambda root, result: load_cohort(root, COHORT),
    "entries": lambda root, result: load_entries(root, COHORT),
    "report": lambda root, result: load_report(root, result),
    "rows": lambda root, result: read_rows(root, COHORT, "2026-11-23_010000"),
    "array": lambda root, result: read_array(root, volume_key(case_of("a"), PLAN), "image"),
}


@pytest.mark.parametrize("what", READS)
def test_what_reads_the_root_refuses_by_name(root: Root, sang: Path, what: str) -> None:
    result = result_key(COHORT, case_of("a"), PLAN, load_model(root, "organs").digest)
    assert plant_everywhere(root, sang) > 30
    assert error_of(lambda: READS[what](root, result)) in ("store.corrupt", "model.damaged", "store.missing")
    assert not sang.exists()


def test_a_planted_receipt_finishes_nothing(root: Root, sang: Path) -> None:
    result = result_key(COHORT, case_of("a"), PLAN, load_model(root, "organs").digest)
    assert root.receipt(result)
    plant_everywhere(root, sang)
    assert root.receipt(result) is None
    assert not sang.exists()


COMMANDS = (
    ["fsck"],
    ["fsck", "--repair"],
    ["gc", "--dry-run", "--results-days", "1", "--nights-days", "1", "--spares-days", "1"],
    ["models", "list"],
    ["models", "show", "organs"],
    ["query"],
    ["report", "--cohort", COHORT],
    ["review", "list", "--cohort", COHORT],
    ["metrics"],
    ["doctor"],
)


def test_commands_that_read_the_root_run_no_pickle(
    root: Root, sang: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plant_everywhere(root, sang)
    monkeypatch.setenv("VNET_ROOT", str(root.home))
    ended = {}
    for arguments in COMMANDS:
        try:
            ended[" ".join(arguments[:2])] = main([*arguments, "--root", str(root.home)])
        except SystemExit as error:
            pytest.fail(f"{arguments}: {error} {capsys.readouterr().err[-300:]}")
        assert not sang.exists(), arguments
    said = capsys.readouterr()
    assert "Traceback" not in said.out + said.err
    assert "internal." not in said.err, said.err
    assert ended["fsck"] == 3, ended
