"""What SimpleITK and nibabel make of an input, each in a process of its own with limits of memory and time.

Run as a module it is a server: it has both libraries loaded, forks for every request on standard input, and answers
with one line.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType

import nibabel as nib
import numpy as np
import SimpleITK as sitk

from tests.bad_inputs.circumstances import rights_of_a_user
from tests.bad_inputs.inputs import BadInput, Finding, Truth

READERS = ("SimpleITK", "nibabel")
MEMORY_BYTES = 3 << 30
"""More than the process has when it starts to read."""
CPU_LIMIT_S = 5
"""On a busy machine as on a quiet one."""
WAIT_LIMIT_S = 15
"""For what waits instead of computing."""
LIMITS = f"over {CPU_LIMIT_S} s of the processor or {WAIT_LIMIT_S} s of waiting"
PLACE_TOLERANCE_MM = 1e-2
_ROOT = Path(__file__).resolve().parents[2]

Image = tuple[np.ndarray, np.ndarray]
"""Voxels by file axes reversed, as (Z, Y, X), and the matrix (4, 4) from index z, y, x to LPS mm."""


def speaks(reader: str, item: BadInput) -> bool:
    """Whether the reader is made for such an input; nibabel reads no MetaImage and no series."""
    if not item.opens:
        return False
    return reader == "SimpleITK" or item.opens.endswith((".nii", ".nii.gz"))


class Peers:
    """The server, as a context manager."""

    def __enter__(self) -> Peers:
        command = [sys.executable, "-m", "tests.bad_inputs.peers"]
        self._server = subprocess.Popen(
            command, cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server.stdin
        assert self._server.stdout
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()

    def judged(self, item: BadInput, reader: str) -> Finding | None:
        """Make the input and let one reader open it; None where the reader is not made for it."""
        if not speaks(reader, item):
            return None
        with tempfile.TemporaryDirectory() as work:
            source = Path(work) / "input"
            source.mkdir()
            truth = Path(work) / "truth.npz"
            _save(truth, item.make(source))
            return self._asked(reader, source / item.opens, truth, forbidden=bool(item.during))

    def _asked(self, reader: str, path: Path, truth: Path, forbidden: bool) -> Finding:
        assert self._server.stdin
        assert self._server.stdout
        request = {"reader": reader, "path": str(path), "truth": str(truth), "forbidden": forbidden}
        print(json.dumps(request), file=self._server.stdin, flush=True)
        answer = json.loads(self._server.stdout.readline())
        return Finding((answer["state"],), answer["right"], answer["note"])


def _save(path: Path, truths: Sequence[Truth]) -> None:
    arrays = {}
    for number, truth in enumerate(truths):
        arrays[f"voxels-{number}"] = truth.voxels
        arrays[f"matrix-{number}"] = truth.geometry.matrix
        arrays[f"tolerance-{number}"] = np.array(truth.tolerance)
    np.savez(path, **arrays)


# --- in the server


def serve() -> None:
    """Answer requests until standard input ends."""
    for line in sys.stdin:
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read_end)
            signal.alarm(WAIT_LIMIT_S)
            _, most_s = resource.getrlimit(resource.RLIMIT_CPU)
            resource.setrlimit(resource.RLIMIT_CPU, (CPU_LIMIT_S, most_s))
            resource.setrlimit(resource.RLIMIT_AS, (_own_bytes() + MEMORY_BYTES,) * 2)
            os.write(write_end, json.dumps(_answer(**json.loads(line))).encode())
            os._exit(0)
        os.close(write_end)
        with os.fdopen(read_end, "rb") as pipe:
            answer = pipe.read()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status in (-signal.SIGALRM, -signal.SIGXCPU):
            answer = json.dumps({"state": "hangs", "right": None, "note": LIMITS}).encode()
        elif status or not answer:
            answer = json.dumps({"state": "crashes", "right": None, "note": f"ended with {status}"}).encode()
        print(answer.decode(), flush=True)


def _own_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text("utf-8").split()[0])
    return pages * resource.getpagesize()


def _answer(reader: str, path: str, truth: str, forbidden: bool) -> dict[str, object]:
    with rights_of_a_user() if forbidden else nullcontext():
        try:
            images = list(_simpleitk(Path(path)) if reader == "SimpleITK" else [_nibabel(Path(path))])
        except Exception as error:  # noqa: BLE001 - whatever a reader raises is a refusal
            return {"state": "refuses", "right": None, "note": type(error).__name__}
    if not images:
        return {"state": "refuses", "right": None, "note": "no series"}
    stored = np.load(truth)
    wanted = [name.removeprefix("voxels-") for name in stored.files if name.startswith("voxels-")]
    right = all(
        any(
            _same(image, stored[f"voxels-{n}"], stored[f"matrix-{n}"], float(stored[f"tolerance-{n}"]))
            for image in images
        )
        for n in wanted
    )
    return {"state": "opens", "right": right if wanted else None, "note": ""}


def _simpleitk(path: Path) -> Iterable[Image]:
    if not path.is_dir() or path.name.endswith(".nii.gz"):
        yield _image(sitk.ReadImage(str(path)))
        return
    for uid in sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(path)):
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(path), uid))
        yield _image(reader.Execute())


def _image(image: sitk.Image) -> Image:
    while image.GetDimension() > 3 and image.GetSize()[-1] == 1:
        image = image[..., 0]
    matrix = np.eye(4)
    if image.GetDimension() == 3:
        direction = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
        matrix[:3, :3], matrix[:3, 3] = direction[:, ::-1], image.GetOrigin()
    return sitk.GetArrayFromImage(image), matrix


def _nibabel(path: Path) -> Image:
    image = nib.load(path)
    voxels = np.asanyarray(image.dataobj)
    while voxels.ndim > 3 and voxels.shape[-1] == 1:
        voxels = voxels[..., 0]
    matrix = np.diag([-1.0, -1.0, 1.0, 1.0]) @ image.affine
    matrix[:, :3] = matrix[:, 2::-1]
    return voxels.T, matrix


def _same(image: Image, voxels: np.ndarray, matrix: np.ndarray, tolerance: float) -> bool:
    """Whether each voxel has its value at its place, whichever end of the slices comes first."""
    found, place = image
    if place[:3, 0] @ matrix[:3, 0] < 0:
        found, place = found[::-1], place @ _turned_round(len(found))
    if found.shape != voxels.shape or found.dtype.kind not in "iuf":
        return False
    ends = np.array([[*np.array(corner) * (np.array(voxels.shape) - 1), 1] for corner in np.ndindex(2, 2, 2)])
    if not np.abs(ends @ (place - matrix).T).max() <= PLACE_TOLERANCE_MM:
        return False
    return bool(np.abs(found.astype(float) - voxels).max() <= tolerance)


def _turned_round(slices: int) -> np.ndarray:
    """(4, 4) from the index of a slice counted from the last to that from the first."""
    matrix = np.diag([-1.0, 1.0, 1.0, 1.0])
    matrix[0, 3] = slices - 1
    return matrix


if __name__ == "__main__":
    serve()
