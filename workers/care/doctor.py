"""Whether this machine can do the work: packages, storage, engines, memory, clock. Every check answers, none raises."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import socket
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from vnet_core.errors import VnetError
from workers.engines.clusters import processors, ray_session, token_path
from workers.engines.dask_engine import dask_executor
from workers.identity import identity_of, private_folder
from workers.ledger import nameless
from workers.settings.site import Site
from workers.storage.store import Root

DISTRIBUTION = "vnet-cohort"
GIB = 1 << 30
FREE_GIB = (1.0, 20.0)
"""Free space of the root: less than the first is bad, than the second a warning."""
FSYNC_S = 0.1
"""A put that takes longer makes a night of thousands of small files slow."""
SHM_BYTES = (128 << 20, 1 << 30)
"""Free space of /dev/shm: our own Ray takes the first for its object store."""
MEMORY_GIB = 8.0
"""A pass over a whole scan takes several."""
DRIFT_S = (2.0, 60.0)
"""Seconds between the clocks of the storage and of this machine; runs are taken for dead after 45."""
OUR_WORDS = (
    "flows.server",
    "flows.cli",
    "bin/vnet",
    "raylet",
    "gcs_server",
    "ray::",
    "/ray/",
    "distributed.",
    "prefect",
)
"""In the command line of a process that was started for this work."""
RAY = "Ray"
RAY_WORDS = ("raylet", "gcs_server", "ray::", "/ray/")

State = Literal["ok", "warning", "bad"]


@dataclass(frozen=True, slots=True)
class Check:
    """What one check found."""

    name: str
    state: State
    found: str
    remedy: str = ""
    """What to do; empty when it is ok."""


Found = Check | Iterable[Check]


def examined(name: str, check: Callable[[], Found]) -> list[Check]:
    """What a check found; an error of it is bad."""
    try:
        with nameless(f"check {name}"):
            found = check()
            return [found] if isinstance(found, Check) else list(found)
    except VnetError as error:
        return [Check(name, "bad", error.message, "mend what the message names and run vnet doctor again")]


def examine(root: Root, site: Site, now: datetime) -> list[Check]:
    """Every check that needs no Prefect, in the order of what depends on what. ``now`` is aware."""
    checks: list[tuple[str, Callable[[], Found]]] = [
        ("packages", packages),
        ("root", lambda: storage(root)),
        # early: the others take seconds, which would count as the storage's
        ("clock", lambda: clock(root, site, now)),
        ("private folder", lambda: private(root)),
        ("memory", lambda: memory(site)),
        ("shared memory", shared_memory),
        ("gpu", lambda: gpu(site)),
        ("dask", lambda: dask(site)),
        ("ray", lambda: ray(site)),
        ("listeners", listeners),
        ("ray token", ray_token),
    ]
    return [found for name, check in checks for found in examined(name, check)]


def graded(name: str, value: float, limits: tuple[float, float], found: str, remedy: str) -> Check:
    """``bad`` below the first limit, ``warning`` below the second, else ``ok``."""
    state: State = "bad" if value < limits[0] else "warning" if value < limits[1] else "ok"
    return Check(name, state, found, "" if state == "ok" else remedy)


# --- software


def packages(distribution: str = DISTRIBUTION) -> list[Check]:
    """Python and every package that the distribution requires, against what is installed."""
    try:
        ours = importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        found = f"the distribution {distribution} is not installed, so its pins are not known"
        return [Check("packages", "warning", found, "pip install it instead of running from a folder")]
    wanted = SpecifierSet(ours.metadata["Requires-Python"] or "")
    version = platform.python_version()
    remedy = "" if version in wanted else f"install Python {wanted}"
    checks = [Check("python", "bad" if remedy else "ok", f"Python {version}, wanted {wanted}", remedy)]
    wrong, number = [], 0
    for text in ours.requires or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        number += 1
        try:
            installed = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(Check(requirement.name, "bad", f"not installed, wanted {requirement}", _install(requirement)))
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            found = f"{requirement.name} {installed}, wanted {requirement.specifier}"
            wrong.append(Check(requirement.name, "bad", found, _install(requirement)))
    return [*checks, *(wrong or [Check("packages", "ok", f"{number} packages as {distribution} wants them")])]


def _install(requirement: Requirement) -> str:
    return f'pip install "{requirement.name}{requirement.specifier}", or all from requirements.lock'


# --- storage


def storage(root: Root) -> list[Check]:
    """Whether the root can be written, renames whole objects, has space, and how fast it makes bytes durable."""
    root.probe()
    if not root.is_here:
        next(iter(root.place.leftovers()), None)  # which vnet gc must be allowed to see
    seconds = []
    for content in (b"first", b"second", b"third"):
        start = time.perf_counter()
        root.put(".doctor", content)
        seconds.append(time.perf_counter() - start)
        if root.get(".doctor") != content:
            remedy = "use a file system with atomic renames, not one that caches old content"
            return [Check("root", "bad", "an object that was replaced still has its old content", remedy)]
    root.delete(".doctor")
    durable = statistics.median(seconds)
    space = root.place.space()
    slow = durable > FSYNC_S
    return [
        Check("root", "ok", f"{root.shown} can be written and replaces objects whole"),
        *([_free_space(space[0] / GIB)] if space else []),
        Check(
            "durable writes",
            "warning" if slow else "ok",
            f"{1000 * durable:.1f} ms for an object until it is on the disk",
            "put the root on a faster disk, or nearer" if slow else "",
        ),
    ]


def _free_space(free_gib: float) -> Check:
    remedy = "free some: vnet gc --dry-run, docs/care.md"
    return graded("free space", free_gib, FREE_GIB, f"{free_gib:.1f} GiB free", remedy)


def private(root: Root) -> Check:
    """Whether others than its owner can look into the private folder."""
    name = "private folder"
    folder = private_folder(root)
    if not folder.exists():
        made = not root.names("cohorts")
        remedy = "" if made else "mount it, or correct identity.private in the site file"
        return Check(name, "ok" if made else "bad", f"{folder} is not there", remedy)
    status = folder.stat()
    mode = status.st_mode & 0o777
    if mode & 0o077:
        return Check(name, "bad", f"{folder} has mode {mode:04o}, so others may look into it", f"chmod 0700 {folder}")
    if hasattr(os, "getuid") and status.st_uid != os.getuid() and os.getuid() != 0:
        return Check(
            name, "bad", f"{folder} belongs to user {status.st_uid}, this is {os.getuid()}", "run as its owner"
        )
    secret = Path(identity_of(root).secret_file or folder / "secret")
    mode = secret.stat().st_mode & 0o777 if secret.exists() else 0o600
    if mode & 0o007:
        return Check(name, "bad", f"the secret has mode {mode:04o}, so everybody may use it", f"chmod 0600 {secret}")
    return Check(name, "ok", f"{folder} is for its owner alone")


# --- machine


def memory(site: Site) -> list[Check]:
    """Cores and memory against what the site asks for."""
    total, cores = psutil.virtual_memory().total / GIB, processors()
    wanted = max(site.segment_workers, site.engines.most_train_workers, site.preprocess_workers or 1)
    few = cores < wanted
    return [
        graded(
            "memory",
            total,
            (0, MEMORY_GIB),
            f"{total:.1f} GiB of memory",
            "lower inference.memory_limit_gib in the plan",
        ),
        Check(
            "cores",
            "warning" if few else "ok",
            f"{cores} cores for up to {wanted} workers",
            "lower the numbers of workers in the site file: they share the cores" if few else "",
        ),
    ]


def shared_memory(folder: str = "/dev/shm") -> Check:  # noqa: S108  looked at, not written to
    """Space for Ray's object store."""
    if not Path(folder).is_dir():
        return Check("shared memory", "ok", f"no {folder} on this system, Ray takes a file")
    free = shutil.disk_usage(folder).free
    remedy = "give the container more, such as docker run --shm-size=2g"
    return graded("shared memory", free, SHM_BYTES, f"{free / GIB:.2f} GiB free in {folder}", remedy)


def gpu(site: Site) -> Check:
    """Whether torch sees the GPUs that the site asks for, and those that the driver sees."""
    import torch

    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    drivers = _driver_versions()
    names = sorted({torch.cuda.get_device_name(number) for number in range(seen)})
    text = f"torch {torch.__version__} sees {seen} GPUs{' (' + ', '.join(names) + ')' if names else ''}"
    if drivers:
        text += f", the driver {drivers[0]} sees {len(drivers)}"
    if site.gpus_per_worker and not seen and site.engines.ray_address is None:
        remedy = "install a torch with CUDA and its driver, or leave gpus_per_worker out of the site file"
        return Check("gpu", "bad", f"{text}; the site asks for {site.gpus_per_worker:g} per worker", remedy)
    if len(drivers) > seen:
        return Check("gpu", "warning", text, "install the torch with CUDA that fits the driver, see requirements.lock")
    if seen and not site.gpus_per_worker:
        return Check("gpu", "warning", f"{text}; the site uses none", "set gpus_per_worker = 1 in the site file")
    return Check("gpu", "ok", text)


def _driver_versions() -> list[str]:
    """The version of the driver, once for each GPU that it sees; none where there is no driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return answer.stdout.split()


# --- engines


def dask(site: Site) -> Check:
    """Whether Dask answers at the site's address, or can be imported."""
    if site.dask_address is None:
        return _importable("dask", "distributed")
    with dask_executor(site.dask_address, 1, site.dask_tls):
        return Check("dask", "ok", f"the scheduler at {site.dask_address} answers, its versions fit")


def ray(site: Site) -> Check:
    """Whether Ray answers at the site's address, or can be imported."""
    address = site.engines.ray_address
    if address is None:
        return _importable("ray", "ray")
    with ray_session(address, 1):
        return Check("ray", "ok", f"the head at {address} answers")


def _importable(name: str, module: str) -> Check:
    importlib.import_module(module)
    return Check(name, "ok", f"{module} {importlib.metadata.version(module)} starts on this machine for each command")


# --- clock


def clock(root: Root, site: Site, now: datetime) -> Check:
    """The storage's clock, as its files tell, against this machine's, and the time zone of schedules."""
    root.put(".doctor", b"")
    (stored,) = root.walk(".doctor")
    written = stored.modified
    root.delete(".doctor")
    drift = abs((written - now).total_seconds())
    here = f"{now.astimezone(site.zone):%Y-%m-%d %H:%M} {site.timezone}"
    state: State = "bad" if drift > DRIFT_S[1] else "warning" if drift > DRIFT_S[0] else "ok"
    remedy = "" if state == "ok" else "set both clocks by NTP: runs are told dead or alive by them"
    return Check("clock", state, f"{here}; the storage's clock is {drift:.1f} s away", remedy)


# --- network


def listeners(words: Sequence[str] = OUR_WORDS) -> list[Check]:
    """Ports beyond 127.0.0.1 of processes of this user that were started for this work, and of what they started."""
    open_ports: dict[str, list[int]] = {}
    for process in psutil.process_iter():
        try:
            if process.uids().real != os.getuid():
                continue
            # a worker of Dask is a Python process whose command line says nothing; what started it does
            word = next((word for one in (process, *process.parents()) if (word := _word(one, words))), None)
            if word is None:
                continue
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN and not _is_local(connection.laddr.ip):
                    name = RAY if word in RAY_WORDS or _is_in_ray(process) else word
                    open_ports.setdefault(name, []).append(connection.laddr.port)
        except psutil.Error:  # it has ended, or is not ours to ask
            continue
    if not open_ports:
        return [Check("listeners", "ok", "no process of ours listens beyond 127.0.0.1")]
    return [_listening(name, sorted(set(ports))) for name, ports in sorted(open_ports.items())]


def _word(process: psutil.Process, words: Sequence[str]) -> str | None:
    try:
        line = " ".join(process.cmdline())
    except psutil.Error:
        return None
    return next((word for word in words if word in line), None)


def _is_in_ray(process: psutil.Process) -> bool:
    """Whether a process is part of Ray, such as a night while it uses Ray."""
    return any(mapped.path.endswith("/_raylet.so") for mapped in process.memory_maps())


def ray_token(path: Path | None = None) -> Check:
    """Whether others than its owner can read the token by which Ray's processes know each other."""
    name, token = "ray token", path or token_path()
    try:
        mode = token.stat().st_mode & 0o777
    except OSError:
        return Check(name, "ok", f"there is none at {token} yet; Ray makes one at its first start")
    if mode & 0o077:
        found = f"{token} has mode {mode:04o}, so others may read it and use Ray as you do"
        return Check(
            name, "bad", found, f"chmod 0600 {token}; if others could get at it, remove it, and stop Ray before"
        )
    return Check(name, "ok", f"{token} is for its owner alone")


def _is_local(address: str) -> bool:
    return address == "::1" or address.removeprefix("::ffff:").startswith("127.")


def _listening(name: str, ports: Sequence[int]) -> Check:
    shown = ", ".join(map(str, ports[:10])) + (f" and {len(ports) - 10} more" if len(ports) > 10 else "")
    found = f"{name} listens on {socket.gethostname()} beyond 127.0.0.1, port {shown}"
    if name == RAY and os.environ.get("RAY_AUTH_MODE", "token") == "token":
        return Check(
            "listeners", "warning", f"{found}; Ray asks for a token there", "close these ports in the firewall"
        )
    return Check(
        "listeners", "bad", found, "stop it, or bind it to 127.0.0.1 and put a proxy with authentication before it"
    )
