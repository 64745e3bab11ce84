"""Kills, interruptions, addresses that do not answer and full disks: what was finished stays, and nothing is lost."""

import contextlib
import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from flows.commands.data import ingest_sources
from flows.server.process import ServerProcess
from tests.conftest import Walkthrough
from tests.flows.command import Command, receipts, until
from vnet_core.networks.vnet import build_vnet, initialise
from vnet_core.phantoms import PhantomSpec, phantom
from vnet_core.plan import Plan
from vnet_core.volume import Volume
from workers.ingest import Names
from workers.sources.scans import write_volume
from workers.storage.store import Root

CASES = 12
STEPS = 8
PLAN = """
[preprocess]
spacing_mm = [3.0, 3.0, 3.0]

[network]
kernel_size = 5
width = 8
convolutions = [1, 1, 1]

[training]
patch_size = [40, 40, 40]
batch_size = 4
optimiser = "sgd"
learning_rate = 1e-3
"""
"""Steps that take long enough to be killed between two checkpoints."""


def night(model: str = "organs", cohort: str = "many") -> list[str]:
    return ["nightly", "--cohort", cohort, "--model", model, "--json"]


def volumes(root: Path) -> set[str]:
    return {path.parent.name for path in (root / "volumes").glob("*/receipt.json")}


def assert_whole(root: Path) -> None:
    """Every result with a receipt is undamaged."""
    for path in (root / "results" / "many").glob("*/*/receipt.json"):
        assert Root(root).damaged(path.parent.relative_to(root).as_posix()) == []


def copy(root: Path, target: Path) -> Path:
    return Path(shutil.copytree(root, target, ignore=shutil.ignore_patterns("servers", "*.log")))


@pytest.fixture(scope="module")
def many(walkthrough: Walkthrough, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The walkthrough's root with an ingested cohort of scans that take a while; copied by the tests."""
    for done in walkthrough.runs:
        assert done.returncode == 0, done.stderr
    folder = tmp_path_factory.mktemp("faults")
    (folder / "scans").mkdir()
    image, _ = phantom(PhantomSpec(seed=3, shape=(80, 96, 96), spacing_mm=(2.0, 2.0, 2.0), body_mm=70.0))
    for number in range(CASES):
        # one body, other bytes: a scan of its own for the price of an addition
        scan = Volume(image.voxels + np.int16(number), image.geometry)
        write_volume(folder / "scans" / f"scan-{number:02d}.mha", scan)
    root = walkthrough.copy_root(folder / "vnet-data")
    ingest_sources(Root(root), "many", [str(folder / "scans")], Names())
    return root


@pytest.fixture(scope="module")
def undisturbed(many: Path, site_server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Receipts of a night that nothing disturbed."""
    root = copy(many, tmp_path_factory.mktemp("undisturbed") / "vnet-data")
    command = Command(*night(), root=root, PREFECT_API_URL=site_server.api_url)
    try:
        assert command.wait() == 0, command.err
        assert command.states == {f"scan-{number:02d}": "computed" for number in range(CASES)}
        assert "Traceback" not in command.err
    finally:
        command.end()
    assert_whole(root)
    return receipts(root)


# --- kills and interruptions


@pytest.mark.fault("F7", "F10")
@pytest.mark.faults
def test_a_night_killed_and_interrupted_goes_on_to_the_same_bytes(
    vnet, at_site, many: Path, undisturbed, tmp_path
) -> None:
    root = copy(many, tmp_path / "vnet-data")
    had = volumes(root)

    # kill -9 while Dask preprocesses
    killed = vnet(*night(), root=root)
    killed.until(lambda: len(volumes(root) - had) >= 2)
    killed.kill()
    until(killed.over, 30)
    prepared = volumes(root) - had
    assert 2 <= len(prepared) < CASES
    assert receipts(root) == {}

    # kill -9 while Ray segments
    stamps = {key: (root / "volumes" / key / "receipt.json").stat().st_mtime_ns for key in prepared}
    killed = vnet(*night(), root=root)
    killed.until(lambda: len(receipts(root)) >= 2)
    killed.kill()
    until(killed.over, 30)
    first = receipts(root)
    assert 2 <= len(first) < CASES
    for key, stamp in stamps.items():
        assert (root / "volumes" / key / "receipt.json").stat().st_mtime_ns == stamp

    # Ctrl-C while Ray segments
    interrupted = vnet(*night(), root=root)
    interrupted.until(lambda: len(receipts(root)) >= len(first) + 2)
    assert interrupted.interrupt() == 130
    assert "interrupted; run the same command again to go on" in interrupted.err
    assert "Traceback" not in interrupted.err
    until(lambda: not interrupted.left(), 30)
    second = receipts(root)
    assert len(first) + 2 <= len(second) < CASES

    last = at_site(*night(), root=root)
    assert last.wait() == 0, last.err
    assert last.states == {case: "cached" if case in second else "computed" for case in undisturbed}
    assert receipts(root) == undisturbed
    assert_whole(root)
    until(lambda: not last.left(), 30)
    until(lambda: not killed.left(), 90)


@pytest.mark.fault("F2", "F5")
@pytest.mark.faults
def test_a_dead_worker_of_dask_and_a_dead_actor_of_ray_lose_no_case(vnet, many: Path, undisturbed, tmp_path) -> None:
    root = copy(many, tmp_path / "vnet-data")
    had = volumes(root)
    command = vnet(*night(), root=root)
    command.until(lambda: volumes(root) - had)
    worker = command.process("multiprocessing.spawn")
    assert worker is not None
    worker.kill()
    command.until(lambda: receipts(root))
    actor = command.until(lambda: command.process("ray::Segmenter"))
    assert len(receipts(root)) < CASES
    actor.kill()
    assert command.wait() in (0, 3), command.err
    cases = {case["case"]: case for case in json.loads(command.out)["cases"]}
    assert cases.keys() == undisturbed.keys()
    for name, case in cases.items():
        if case["state"] == "failed":
            assert case["codes"] == ["engine.worker-died"]
            assert name not in receipts(root)
        else:
            assert case["state"] == "computed"
            assert receipts(root)[name] == undisturbed[name]
    assert len(receipts(root)) >= CASES - 2
    assert_whole(root)
    until(lambda: not command.left(), 30)


# --- training


@pytest.fixture(scope="module")
def training(many: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A root with a plan whose steps take a while, and the start of a command that trains with it."""
    folder = tmp_path_factory.mktemp("training")
    (folder / "plan.toml").write_text(PLAN)
    plan = str(folder / "plan.toml")
    return copy(many, folder / "vnet-data"), ["train", "--cohort", "training", "--plan", plan, "--steps", str(STEPS)]


@pytest.fixture(scope="module")
def whole_training(training: tuple[Path, list[str]], site_server: ServerProcess) -> Path:
    """The bundle of a training by one worker that nothing disturbed."""
    root, arguments = training
    command = Command(*arguments, "--model", "whole", root=root, PREFECT_API_URL=site_server.api_url)
    try:
        assert command.wait() == 0, command.err
        assert "Traceback" not in command.err
    finally:
        command.end()
    return root / "models" / "whole" / "v1"


def facts_of(bundle: Path) -> dict[str, Any]:
    return json.loads((bundle / "model.json").read_bytes())


def weights_of(bundle: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(bundle / "weights.safetensors")


def initial_weights(facts: dict[str, Any]) -> dict[str, np.ndarray]:
    """What the training of a model began with."""
    plan = Plan.from_mapping(facts["plan"])
    network = build_vnet(plan.network, len(plan.channels), plan.outputs)
    initialise(network, plan.training.seed)
    return {name: value.numpy() for name, value in network.state_dict().items()}


def largest_difference(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> float:
    assert first.keys() == second.keys()
    return max(float(np.abs(first[name] - second[name]).max()) for name in first)


@pytest.mark.fault("F27")
@pytest.mark.faults
def test_a_killed_training_goes_on_from_its_checkpoint(vnet, training, whole_training: Path) -> None:
    root, arguments = training
    killed = vnet(*arguments, "--model", "killed", root=root)
    checkpoints = root / "training" / "killed" / "v1" / "checkpoints"
    killed.until(lambda: len(list(checkpoints.glob("*/receipt.json"))) >= 2)
    killed.cut_power()
    until(lambda: not killed.left(), 30)
    kept = sorted(int(path.parent.name) for path in checkpoints.glob("*/receipt.json"))
    assert 0 < kept[-1] < STEPS
    assert not (root / "models" / "killed").exists()

    resumed = vnet(*arguments, "--model", "killed", "--resume", root=root)
    assert resumed.wait() == 0, resumed.err
    bundle = root / "models" / "killed" / "v1"
    assert facts_of(bundle)["training"]["steps"] == STEPS
    assert Root(root).damaged("models/killed/v1") == []
    assert largest_difference(weights_of(bundle), weights_of(whole_training)) <= 1e-6
    assert facts_of(bundle)["metrics"] == facts_of(whole_training)["metrics"]
    until(lambda: not resumed.left(), 30)


@pytest.mark.slow
def test_two_workers_learn_what_one_does(at_site, training, whole_training: Path) -> None:
    root, arguments = training
    command = at_site(*arguments, "--model", "pair", "--workers", "2", root=root)
    assert command.wait() == 0, command.err
    bundle = root / "models" / "pair" / "v1"
    facts, alone = facts_of(bundle), facts_of(whole_training)
    assert (facts["training"]["workers"], facts["training"]["steps"]) == (2, STEPS)
    # both have come a long way, and lie together: only the order of sums differs
    initial = initial_weights(alone)
    way = largest_difference(weights_of(whole_training), initial)
    assert way > 1e-3
    assert largest_difference(weights_of(bundle), weights_of(whole_training)) < way / 100
    for name, dice in alone["metrics"]["validation_dice"].items():
        assert facts["metrics"]["validation_dice"][name] == pytest.approx(dice, abs=0.02)
    until(lambda: not command.left(), 30)


# --- addresses


@contextlib.contextmanager
def silent_address() -> Iterator[str]:
    """host:port of something that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture(params=["closed", "silent"])
def nobody(request: pytest.FixtureRequest) -> Iterator[str]:
    """An address at which nothing answers."""
    with silent_address() as address:
        if request.param == "silent":
            yield address
    if request.param == "closed":
        yield address


def test_an_engine_that_does_not_answer_is_named_before_any_work(
    vnet, many: Path, walkthrough: Walkthrough, nobody: str, tmp_path: Path
) -> None:
    root = copy(many, tmp_path / "vnet-data")
    for engine in ("ray", "dask"):
        (tmp_path / f"{engine}.toml").write_text(f'{engine}_address = "{nobody}"\n')
    api = f"http://{nobody}/api"
    preprocessed = walkthrough.folder / "scans" / "train" / "images"
    before = [sorted(path.rglob("*")) for path in (root / "results", root / "models")]
    commands = {
        "ray.unreachable": vnet(
            "segment", preprocessed, "--model", "organs", "--json", "--site", tmp_path / "ray.toml", root=root
        ),
        "dask.unreachable": vnet(*night(), "--site", tmp_path / "dask.toml", root=root),
        "prefect.unreachable": vnet(*night(), root=root, PREFECT_API_URL=api),
    }
    for code, command in commands.items():
        assert command.wait(60) == 2, command.err
        assert json.loads(command.out)["error"]["code"] == code
        assert nobody in command.err
        assert "Traceback" not in command.err
        until(lambda command=command: not command.left(), 30)
    assert [sorted(path.rglob("*")) for path in (root / "results", root / "models")] == before


# --- disks


@contextlib.contextmanager
def tmpfs(folder: Path, options: str) -> Iterator[Path]:
    """A file system of its own; skips where this process may not mount one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, text=True) if shutil.which("mount") else None
    if mounted is None or mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip() if mounted else 'no mount command'}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.fault("F13")
def test_a_root_on_a_read_only_disk_is_told_before_anything_starts(vnet, tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk", "size=1m,ro") as disk:
        command = vnet(*night(), root=disk / "vnet-data")
        assert command.wait(60) == 2
        assert json.loads(command.out)["error"]["code"] == "store.unwritable"
        assert str(disk) in command.err
        assert "Traceback" not in command.err


@pytest.mark.fault("F11")
@pytest.mark.faults
def test_a_full_disk_is_told_and_the_same_command_finishes_after_it_was_enlarged(
    vnet, many: Path, undisturbed, tmp_path: Path
) -> None:
    used = sum(path.stat().st_size for path in many.rglob("*") if path.is_file())
    with tmpfs(tmp_path / "disk", f"size={used + (8 << 20)}") as disk:
        root = copy(many, disk / "vnet-data")
        full = vnet(*night(), root=root)
        # about half of what the night writes
        assert full.wait() in (3, 4), full.out + full.err
        # where the database of Prefect finds the disk full first, it is told all the same
        assert "store.full: no space is left" in full.err
        assert "free some and run again" in full.err
        assert_whole(root)
        assert len(receipts(root)) < CASES
        subprocess.run(["mount", "-o", f"remount,size={used + (256 << 20)}", str(disk)], check=True)
        again = vnet(*night(), root=root)
        assert again.wait() == 0, again.err
        assert receipts(root) == undisturbed
        until(lambda: not again.left(), 30)
