"""Who works on what: two runs of one cohort at once never do the same case, and what a dead run held is taken over.

A run is alive as long as its object ``runs/<run>.json`` is young and its process exists, where that can be seen.
A claim on a piece of work is the object ``leases/<digest of the work's key>-<number>.json`` with the highest number;
numbers are created exclusively, so of two runs one gets it. The number fences: a run that was taken for dead and wakes
finds a higher one and must not publish. A claim that is given back is removed with those before it.

The clocks of machines that share a root must agree to within seconds.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import psutil

from vnet_core.errors import StorageError
from vnet_core.plan import digest_of
from workers.beside import repeating
from workers.storage.store import Root, raise_if_silent

BEAT_S = 10.0
"""A live run writes its object this often."""
GRACE_S = 45.0
"""A run on another machine that has been silent for so long is dead; four beats and a little."""


@dataclass(frozen=True, slots=True)
class Claim:
    """Leave to do a piece of work, until somebody with a higher number takes it over."""

    work: str
    """Digest of the key of what is to be made."""
    number: int
    run: str

    @property
    def key(self) -> str:
        """Its object."""
        return f"leases/{self.work}-{self.number:08d}.json"


class Run:
    """This process's right to claim work; made by :func:`run`."""

    def __init__(self, root: Root, run_id: str) -> None:
        self.root, self.id = root, run_id

    def claim(self, key: str) -> Claim | None:
        """Leave to make what will lie under ``key``; None while another live run has it."""
        work = digest_of(key)[:40]
        held = _highest(self.root, work)
        if held is not None:
            if held.run == self.id:
                return held
            if is_alive(self.root, held.run):
                return None
        claim = Claim(work, held.number + 1 if held else 1, self.id)
        return claim if self.root.create(claim.key, json.dumps({"run": self.id}).encode()) else None

    def give_back(self, claim: Claim) -> None:
        """The work is done, or will not be done by this run; what it renewed its claim to meanwhile goes with it."""
        found = _claims(self.root, claim.work)
        highest = _highest(self.root, claim.work) if found and found[-1] > claim.key else None
        own = highest if highest and highest.run == self.id else claim
        for key in found:
            if key <= own.key:
                self.root.delete(key)


def renewed(root: Root, claim: Claim) -> Claim:
    """The same run's next number for its work, for a second try: the first must not publish any more, should it wake.

    StorageError ``night.taken-over`` where another run has the work.
    """
    check(root, claim)
    second = Claim(claim.work, claim.number + 1, claim.run)
    if not root.create(second.key, json.dumps({"run": second.run}).encode()):
        raise _taken_over()
    return second


def check(root: Root, claim: Claim) -> None:
    """StorageError ``night.taken-over`` when a claim is not the highest any more; called right before publishing."""
    if _highest(root, claim.work) != claim:
        raise _taken_over()


def _taken_over() -> StorageError:
    return StorageError(
        "night.taken-over",
        "this run was silent for too long and another has taken the case over; its result is not published twice",
    )


def sweep(root: Root) -> None:
    """Remove what dead runs have left: their claims, and their own objects. One that wakes finds its claim gone."""
    dead = {run_id for name in root.names("runs") if not is_alive(root, run_id := name.removesuffix(".json"))}
    for name in root.names("leases"):
        claim = _read(root, f"leases/{name}")
        if claim and (claim.run in dead or not root.exists(f"runs/{claim.run}.json")):
            root.delete(claim.key)
    for run_id in dead:
        root.delete(f"runs/{run_id}.json")


@contextmanager
def run(root: Root) -> Iterator[Run]:
    """A live run for the time of the block."""
    key = f"runs/{uuid4().hex}"
    process = psutil.Process()
    facts = {"host": process_table(), "pid": process.pid, "born": process.create_time()}

    def beat() -> None:
        root.put_json(f"{key}.json", {**facts, "beat": datetime.now(UTC).isoformat()})

    beat()
    try:
        with repeating("beat", BEAT_S, beat):
            yield Run(root, key.removeprefix("runs/"))
    finally:
        root.delete(f"{key}.json")


def is_alive(root: Root, run_id: str) -> bool:
    """Whether a run still works: it was heard of lately, and its process is there where that can be seen.

    StorageError where the root does not answer: that says nothing of the run.
    """
    try:
        facts = root.get_json(f"runs/{run_id}.json")
    except StorageError as error:
        raise_if_silent(error)
        return False
    if facts["host"] == process_table() and not _is_process(facts["pid"], facts["born"]):
        return False
    return (datetime.now(UTC) - datetime.fromisoformat(facts["beat"])).total_seconds() < GRACE_S


def process_table() -> str:
    """Names the processes that this one can see. The host's name alone does not: two containers may have the same."""
    name = socket.gethostname()
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{name} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return name


def _is_process(pid: int, born: float) -> bool:
    try:
        process = psutil.Process(pid)
        # creation times shift a little when the clock is set
        return abs(process.create_time() - born) < 5 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _claims(root: Root, work: str) -> list[str]:
    """Keys of all claims on a piece of work, lowest first."""
    return [f"leases/{name}" for name in root.names("leases") if name.startswith(f"{work}-")]


def _highest(root: Root, work: str) -> Claim | None:
    return next((claim for key in reversed(_claims(root, work)) if (claim := _read(root, key))), None)


def _read(root: Root, key: str) -> Claim | None:
    """The claim of a key; None where it was given back meanwhile."""
    try:
        found = root.get_json(key)
    except StorageError as error:
        if error.code != "store.missing":
            raise
        return None
    work, _, number = key.removeprefix("leases/").removesuffix(".json").rpartition("-")
    return Claim(work, int(number), found["run"])
