"""Scans read in a process apart, so that a file that crashes a decoder, fills the memory or hangs is one refused case.

Each thread that reads has one child process, started at its first file, started afresh after a fault, and ended with
the thread or its process, however that ends. The child judges the headers first. Only then it decodes, within a limit
of memory that follows from the voxels that they declare, and within a time. Requests and answers are lines of JSON over
a socket; voxels come back through a file in memory without a name. Nothing is unpickled, and what libraries print in
the child is dropped, because it may name a patient.

    <-  {"ready": true}
    ->  {"task": "scan", "source": ..., ...}
    <-  {"judged": voxels}
    <-  {"geometry": ..., "dtype": ..., "warnings": ...} and the file, or {"error": [code, message]}

``python -m workers.sources.reading FD PARENT`` is the child.
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vnet_core.errors import EngineError, ScanError
from vnet_core.geometry import Geometry, from_mapping, to_mapping
from vnet_core.plan import Label
from vnet_core.sections import ReadingPlan
from vnet_core.volume import Scan, Volume
from workers.sources.scans import (
    AS_STORED,
    bring_in_readers,
    bring_in_readers_of_drawn_labels,
    is_dicom_file,
    read_geometry,
    read_label_scan,
    read_scan,
)
from workers.storage.modes import for_the_owner_alone

_PR_SET_PDEATHSIG = 1
_PIECE_BYTES = 1 << 26
_START_SECONDS = 300.0
_OUR_PACKAGES = str(Path(__file__).parents[2])
_ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "2",  # arenas and threads take address space, which is what is limited
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": "1",
}


@dataclass(frozen=True, slots=True)
class Limits:
    """What reading one source may take."""

    judging_seconds: float = 300.0
    """For the headers, those of all files of a series."""
    seconds: float = 120.0
    """For the voxels, and ``seconds_per_voxel`` more."""
    seconds_per_voxel: float = 2e-6
    spare_bytes: int = 1 << 30
    """Address space beyond what the child has before it opens the source, and ``bytes_per_voxel`` more."""
    bytes_per_voxel: int = 48
    """Six copies of the widest voxel."""
    bytes_per_stored_byte: int = 4
    """Of a single file: a DICOM segmentation holds more frames than its image."""


def read_scan_apart(source: str | Path, reading: ReadingPlan = AS_STORED) -> Scan:
    """:func:`workers.sources.scans.read_scan`, apart.

    ``ScanError``: as there, and ``scan.crashed-reader``, ``scan.slow-reader``, ``scan.reader-memory``. ``EngineError``
    ``reader.start`` where no child can be started.
    """
    return _own_reader().scan(source, reading)


def read_label_scan_apart(
    source: str | Path,
    image: Geometry | None = None,
    labels: Sequence[Label] = (),
    reading: ReadingPlan = AS_STORED,
) -> Scan:
    """:func:`workers.sources.scans.read_label_scan`, apart: the label map with its warnings."""
    return _own_reader().label(source, image, labels, reading)


def read_geometry_apart(source: str | Path, reading: ReadingPlan = AS_STORED) -> Geometry:
    """:func:`workers.sources.scans.read_geometry`, apart; errors as :func:`read_scan_apart`."""
    return _own_reader().geometry(source, reading)


class Reader:
    """A child process that reads one source at a time. It belongs to the thread that first asks it."""

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._lock = threading.Lock()
        self._child: _Child | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the child, where it is running."""
        return self._child.process.pid if self._child and self._child.process.poll() is None else None

    def scan(self, source: str | Path, reading: ReadingPlan = AS_STORED) -> Scan:
        """As :func:`read_scan_apart`."""
        return _scan_of(*self._ask("scan", source, reading))

    def label(
        self, source: str | Path, image: Geometry | None, labels: Sequence[Label], reading: ReadingPlan = AS_STORED
    ) -> Scan:
        """As :func:`read_label_scan_apart`."""
        extra = {
            "image": to_mapping(image) if image else None,
            "labels": [label.model_dump() for label in labels],
        }
        return _scan_of(*self._ask("label", source, reading, **extra))

    def geometry(self, source: str | Path, reading: ReadingPlan = AS_STORED) -> Geometry:
        """As :func:`read_geometry_apart`."""
        return from_mapping(self._ask("geometry", source, reading)[0]["geometry"])

    def close(self) -> None:
        """End the child."""
        with self._lock:
            self._drop()

    def _ask(
        self, task: str, source: str | Path, reading: ReadingPlan, **extra: object
    ) -> tuple[dict[str, Any], list[int]]:
        request = {
            "task": task,
            "source": str(Path.cwd() / source),
            "reading": reading.model_dump(mode="json"),
            "limits": asdict(self._limits),
            **extra,
        }
        with self._lock:
            if self.pid is None:
                self._drop()
                self._child = _Child()
            child = self._child
            assert child is not None
            try:
                child.wait_until_ready()
                answer = child.ask(json.dumps(request).encode() + b"\n", self._limits)
            except BaseException:  # an interrupt too leaves an answer on its way that belongs to nobody
                self._drop()
                raise
        if "error" in answer[0]:
            raise ScanError(*answer[0]["error"])
        return answer

    def _drop(self) -> None:
        if self._child is not None:
            self._child.end()
            self._child = None


class _Child:
    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        environment = os.environ | _ENVIRONMENT
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [_OUR_PACKAGES, os.environ.get("PYTHONPATH")]))
        with theirs:
            self.process = subprocess.Popen(
                # -P: the current folder may hold scans, and modules of someone else
                [sys.executable, "-P", "-m", "workers.sources.reading", str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # an interrupt from the terminal is ours to handle
                env=environment,
            )
        self.socket = ours
        self._ready = False
        self._received = b""
        self._files: list[int] = []
        self.end = weakref.finalize(self, _end, self.process, ours, os.getpid())

    def wait_until_ready(self) -> None:
        """``EngineError`` ``reader.start`` where the child does not come up: that is no fault of a scan."""
        if self._ready:
            return
        try:
            self._line(_START_SECONDS, "modules")
        except (ConnectionError, EOFError, ScanError):
            raise EngineError(
                "reader.start",
                f"the process that reads scans does not start within {_START_SECONDS:.0f} s (status"
                f" {self.process.poll()}); see what `python -m workers.sources.reading` prints",
            ) from None
        self._ready = True

    def ask(self, line: bytes, limits: Limits) -> tuple[dict[str, Any], list[int]]:
        """The last answer to a request, and the files that came with it."""
        try:
            self.socket.settimeout(limits.judging_seconds)
            self.socket.sendall(line)
            answer = self._line(limits.judging_seconds, "headers")
            if "judged" in answer:
                seconds = limits.seconds + limits.seconds_per_voxel * answer["judged"]
                answer = self._line(seconds, "voxels")
        except (ConnectionError, EOFError):
            raise self._crashed() from None
        files, self._files = self._files, []
        return answer, files

    def _line(self, seconds: float, what: str) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while b"\n" not in self._received:
            try:
                self.socket.settimeout(max(1e-3, deadline - time.monotonic()))
                piece, passed, _, _ = socket.recv_fds(self.socket, 1 << 16, 1)
            except TimeoutError:
                raise ScanError(
                    "scan.slow-reader",
                    f"the {what} were not read within {seconds:.0f} s; check that the storage answers, then convert"
                    " the scan again from its source",
                ) from None
            self._files += passed
            if not piece:
                raise EOFError
            self._received += piece
        line, _, self._received = self._received.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _crashed(self) -> ScanError:
        status = self.process.wait(timeout=10) if self.process.poll() is None else self.process.returncode
        how = f"signal {-status}" if status < 0 else f"status {status}"
        return ScanError(
            "scan.crashed-reader",
            f"the process that read this source ended with {how}: a decoder failed on it, or the machine ran out of"
            " memory; convert the scan again from its source",
        )


def _end(process: subprocess.Popen[bytes], ours: socket.socket, owner: int) -> None:
    ours.close()
    if os.getpid() == owner:  # and not a fork of it
        process.kill()
        process.wait()


def _scan_of(answer: dict[str, Any], files: list[int]) -> Scan:
    geometry, dtype = from_mapping(answer["geometry"]), np.dtype(answer["dtype"])
    assert dtype.kind in "iuf"
    with os.fdopen(files[0], "rb") as file:
        size = math.prod(geometry.shape) * dtype.itemsize
        assert os.fstat(file.fileno()).st_size == size
        voxels = np.frombuffer(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY), dtype)
    return Scan(
        Volume(voxels.reshape(1, *geometry.shape), geometry),
        tuple(answer["warnings"]),
        answer["frame"],
        answer["burnt_in"],
    )


_threads = threading.local()


def _own_reader() -> Reader:
    """The reader of this thread; a fork has its own."""
    owner, reader = getattr(_threads, "reader", (0, None))
    if owner != os.getpid() or reader is None:
        reader = Reader()
        _threads.reader = (os.getpid(), reader)
    return reader


# --- in the child


def _serve(theirs: socket.socket) -> None:
    """Answer one request after the other, until the parent closes its end."""
    bring_in_readers()
    _send(theirs, {"ready": True}, None)
    with theirs.makefile("rb") as lines:
        for line in lines:
            try:
                answer, voxels = _answered(json.loads(line), theirs)
            except ScanError as error:
                answer, voxels = {"error": [error.code, error.message]}, None
            except MemoryError:
                answer, voxels = _out_of_memory(), None
            finally:
                _limit(None)
            _send(theirs, answer, voxels)


def _answered(request: dict[str, Any], theirs: socket.socket) -> tuple[dict[str, Any], np.ndarray | None]:
    reading, limits = ReadingPlan.model_validate(request["reading"]), Limits(**request["limits"])
    if "resample" in (reading.sheared_axes, reading.channel_grids) or reading.gantry_tilt == "correct":
        import vnet_core.straighten  # noqa: F401  brings torch, whose libraries are larger than the limit
    task: Literal["scan", "label", "geometry"] = request["task"]
    source, image = request["source"], from_mapping(request["image"]) if request.get("image") else None
    drawn = task == "label" and is_dicom_file(Path(source))
    if drawn:
        bring_in_readers_of_drawn_labels()
    _limit(limits.spare_bytes)
    judged = image if drawn and image else read_geometry(source, reading)
    if task == "geometry":
        return {"geometry": to_mapping(judged)}, None
    voxels = math.prod(judged.shape)
    _send(theirs, {"judged": voxels}, None)
    stored = os.path.getsize(source) if os.path.isfile(source) else 0
    _limit(limits.spare_bytes + limits.bytes_per_voxel * voxels + limits.bytes_per_stored_byte * stored)
    if task == "scan":
        scan = read_scan(source, reading)
    else:
        scan = read_label_scan(source, image, [Label(**label) for label in request["labels"]], reading)
    answer = {
        "geometry": to_mapping(scan.volume.geometry),
        "dtype": scan.volume.voxels.dtype.str,
        "warnings": scan.warnings,
        "frame": scan.frame,
        "burnt_in": scan.burnt_in,
    }
    return answer, scan.volume.voxels


def _send(theirs: socket.socket, answer: dict[str, Any], voxels: np.ndarray | None) -> None:
    line = json.dumps(answer).encode() + b"\n"
    if voxels is None:
        theirs.sendall(line)
        return
    with _unnamed_file() as file:
        block = np.ascontiguousarray(voxels).reshape(-1).view(np.uint8).data
        for start in range(0, len(block), _PIECE_BYTES):
            file.write(block[start : start + _PIECE_BYTES])
        sent = socket.send_fds(theirs, [line], [file.fileno()])
        theirs.sendall(line[sent:])


def _unnamed_file() -> Any:
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("voxels"), "wb", buffering=0)
    return tempfile.TemporaryFile(buffering=0)


def _limit(more_bytes: int | None) -> None:
    """Let the address space grow by so much from here; None: without limit."""
    most = resource.RLIM_INFINITY
    if more_bytes is not None:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        most = pages * resource.getpagesize() + more_bytes
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _out_of_memory() -> dict[str, Any]:
    return {
        "error": [
            "scan.reader-memory",
            "reading takes more memory than the voxels that the headers declare should need; convert the scan again"
            " from its source",
        ]
    }


def _main(descriptor: int, parent: int) -> None:
    for_the_owner_alone()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold the scan
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == parent:
        _serve(socket.socket(fileno=descriptor))


if __name__ == "__main__":
    _main(int(sys.argv[1]), int(sys.argv[2]))
