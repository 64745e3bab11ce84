"""Reading apart: the same volumes and refusals, and what a crash, a hang, hunger for memory or a lost parent leave."""

import fcntl
import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.uid import RLELossless

from tests.walkthrough import REPOSITORY
from tests.workers.formats.test_nifti import affine, placed
from tests.workers.formats.test_ome_zarr import image
from tests.workers.sources.test_scans import META, NRRD, OBLIQUE, grid, nifti_bytes, numbered, series
from vnet_core.errors import EngineError, ScanError
from vnet_core.plan import Label
from vnet_core.sections import ReadingPlan
from workers.sources.reading import (
    Limits,
    Reader,
    read_geometry_apart,
    read_label_scan_apart,
    read_scan_apart,
)
from workers.sources.scans import read_geometry, read_label, read_scan, write_label

DEADLINE_S = 60


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    reader = Reader()
    yield reader
    reader.close()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def code_of(call: Callable[[], object]) -> str:
    with pytest.raises(ScanError) as caught:
        call()
    return caught.value.code


@pytest.fixture
def scan_file(tmp_path) -> Path:
    write_label(tmp_path / "a.nii.gz", numbered(), grid(OBLIQUE))
    return tmp_path / "a.nii.gz"


# --- the same as in this process


def sources(folder: Path) -> list[Path | str]:
    (folder / "a.nii").write_bytes(nifti_bytes() + b"JUNK")
    (folder / "a.mha").write_bytes(META + numbered(dtype="<i2").tobytes())
    (folder / "a.nrrd").write_bytes(NRRD + numbered(dtype="<i2").tobytes())
    (folder / "series").mkdir()
    series(folder / "series")
    image(folder / "a.zarr")
    return [folder / "a.nii", folder / "a.mha", folder / "a.nrrd", f"{folder / 'series'}#1.2.3", folder / "a.zarr"]


def test_scans_labels_and_grids_are_what_they_are_in_this_process(tmp_path):
    for source in sources(tmp_path):
        here, apart = read_scan(source), read_scan_apart(source)
        assert apart.volume.geometry == here.volume.geometry == read_geometry_apart(source)
        assert (apart.warnings, apart.frame, apart.burnt_in) == (here.warnings, here.frame, here.burnt_in)
        assert apart.volume.voxels.dtype == here.volume.voxels.dtype
        np.testing.assert_array_equal(apart.volume.voxels, here.volume.voxels)
        apart.volume.voxels[...] = 0  # ours to change
        np.testing.assert_array_equal(read_label_scan_apart(source).volume.voxels, read_label(source).voxels)
        assert read_label_scan_apart(source).warnings == here.warnings


def test_the_plan_of_reading_goes_with_the_question(tmp_path):
    placed(tmp_path / "a.nii", affine(OBLIQUE), affine(OBLIQUE[:, ::-1]))
    assert code_of(lambda: read_scan_apart(tmp_path / "a.nii")) == "geometry.ambiguous"
    for transform in ("sform", "qform"):
        reading = ReadingPlan(nifti_transform=transform)
        assert read_geometry_apart(tmp_path / "a.nii", reading) == read_geometry(tmp_path / "a.nii", reading)
        assert read_scan_apart(tmp_path / "a.nii", reading).warnings == ("geometry.transforms-differ",)


def test_refusals_keep_their_code_and_words(tmp_path):
    for name, raw in (("a.nii", nifti_bytes()[:-1]), ("b.nii", b"<html>"), ("c.mha", META.replace(b"5 4 3", b"9 9 9"))):
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(ScanError) as here:
            read_scan(tmp_path / name)
        with pytest.raises(ScanError) as apart:
            read_scan_apart(tmp_path / name)
        assert (apart.value.code, apart.value.message) == (here.value.code, here.value.message)
    (tmp_path / "seg.dcm").write_bytes(bytes(128) + b"DICM")
    label = Label(value=1, name="organ")
    assert code_of(lambda: read_label_scan_apart(tmp_path / "seg.dcm", grid(OBLIQUE), [label])).startswith(
        ("scan.", "label.")
    )


def test_relative_and_odd_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a b.nii", "ä.nii", os.fsdecode(b"\xff\xfe.nii"), "new\nline.nii"):
        Path(name).write_bytes(nifti_bytes())
        np.testing.assert_array_equal(read_scan_apart(name).volume.voxels[0], numbered())
    (tmp_path / "numpy.py").write_text("raise SystemExit(3)")  # a module of someone else in the current folder
    reader = Reader()
    np.testing.assert_array_equal(reader.scan("a b.nii").volume.voxels[0], numbered())
    reader.close()


# --- the child


def test_one_child_per_thread_which_ends_with_it(scan_file):
    found: list[set[int]] = []
    before = children()

    def read() -> None:
        for _ in range(2):
            read_scan_apart(scan_file)
            found.append(children() - before)

    thread = threading.Thread(target=read)
    thread.start()
    thread.join()
    assert found[0] == found[1]
    assert len(found[0]) == 1
    until(lambda: children() <= before)
    assert is_gone(found[0].pop())


def children() -> set[int]:
    """Processes of ours that are no zombies."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text("utf-8").rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(parent) == os.getpid() and state != "Z":
            found.add(int(path.parent.name))
    return found


def test_a_fork_reads_with_a_child_of_its_own(scan_file):
    read_scan_apart(scan_file)
    before = children()
    process = multiprocessing.get_context("fork").Process(target=read_scan_apart, args=(scan_file,))
    process.start()
    process.join(DEADLINE_S)
    assert process.exitcode == 0
    assert children() == before
    np.testing.assert_array_equal(read_scan_apart(scan_file).volume.voxels[0], numbered())


def test_a_child_that_was_killed_between_two_scans_is_replaced(reader, scan_file):
    reader.scan(scan_file)
    first = reader.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    until(lambda: is_gone(first))
    np.testing.assert_array_equal(reader.scan(scan_file).volume.voxels[0], numbered())
    assert reader.pid not in (None, first)


def unread_bytes(reader: Reader) -> int:
    """Bytes of a request that the child has not taken yet."""
    assert reader._child is not None
    return struct.unpack("i", fcntl.ioctl(reader._child.socket, termios.TIOCOUTQ, bytes(4)))[0]


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
def test_a_crash_refuses_one_scan(reader, scan_file, number):
    """The child is held while it is asked, so that the signal meets it with a question open."""
    reader.scan(scan_file)
    first = reader.pid
    assert first is not None
    os.kill(first, signal.SIGSTOP)
    outcome: list[ScanError] = []

    def ask() -> None:
        with pytest.raises(ScanError) as caught:
            reader.scan(scan_file)
        outcome.append(caught.value)

    thread = threading.Thread(target=ask)
    thread.start()
    until(lambda: unread_bytes(reader) > 0)
    os.kill(first, number)
    os.kill(first, signal.SIGCONT)
    thread.join(DEADLINE_S)
    assert outcome[0].code == "scan.crashed-reader"
    assert f"signal {int(number)}" in outcome[0].message
    np.testing.assert_array_equal(reader.scan(scan_file).volume.voxels[0], numbered())
    assert reader.pid != first


def test_a_hang_ends_at_its_time(reader, scan_file):
    reader.scan(scan_file)
    slow = Reader(Limits(judging_seconds=0.3))
    slow._child, reader._child = reader._child, None  # started, so that only the hang counts
    first = slow.pid
    assert first is not None
    os.kill(first, signal.SIGSTOP)
    started = time.monotonic()
    assert code_of(lambda: slow.scan(scan_file)) == "scan.slow-reader"
    assert 0.3 <= time.monotonic() - started < 20
    assert is_gone(first)
    np.testing.assert_array_equal(reader.scan(scan_file).volume.voxels[0], numbered())


def test_memory_beyond_the_limit_refuses_one_scan(tmp_path, scan_file):
    shape = (128, 1024, 1024)
    write_label(tmp_path / "large.nii.gz", np.zeros(shape, np.uint8), grid(OBLIQUE, shape))
    reader = Reader(Limits(spare_bytes=1 << 26, bytes_per_voxel=0))
    np.testing.assert_array_equal(reader.scan(scan_file).volume.voxels[0], numbered())
    first = reader.pid
    assert code_of(lambda: reader.scan(tmp_path / "large.nii.gz")) == "scan.reader-memory"
    np.testing.assert_array_equal(reader.scan(scan_file).volume.voxels[0], numbered())
    assert reader.pid == first, "the child lives on"
    reader.close()
    large = read_scan_apart(tmp_path / "large.nii.gz")
    assert large.volume.geometry.shape == shape
    assert not large.volume.voxels.any()


BRINGS_IN = """
import sys
from workers.sources.scans import bring_in_readers, read_scan
bring_in_readers()
before = set(sys.modules)
read_scan(sys.argv[1])
print(sorted(set(sys.modules) - before), "highdicom" in sys.modules)
"""


def test_a_scan_is_read_without_a_further_import(tmp_path):
    """Libraries that come in under the limit of memory would count as the scan's."""
    series(tmp_path)
    for path in tmp_path.iterdir():
        dataset = pydicom.dcmread(path)
        dataset.compress(RLELossless)
        dataset.save_as(path)
    command = [sys.executable, "-c", BRINGS_IN, str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout == "[] False\n", done.stderr


def test_an_interrupt_leaves_no_answer_behind(reader, scan_file, tmp_path):
    (tmp_path / "b.nii").write_bytes(nifti_bytes())
    reader.scan(scan_file)
    assert reader.pid is not None
    os.kill(reader.pid, signal.SIGSTOP)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            reader.scan(scan_file)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert reader.scan(tmp_path / "b.nii").volume.geometry == read_geometry(tmp_path / "b.nii")


PARENT = """
import sys
from workers.sources.reading import Reader
reader = Reader()
reader.scan(sys.argv[1])
print(reader.pid, [m for m in ('torch', 'ray', 'dask', 'prefect', 'matplotlib') if m in sys.modules], flush=True)
sys.stdin.read()
"""


def test_the_child_ends_with_a_parent_that_exits_prints_nothing_and_brings_in_little(scan_file):
    program = [sys.executable, "-c", PARENT, str(scan_file)]
    with subprocess.Popen(
        program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pid, _, modules = parent.stdout.readline().partition(" ")
        assert modules == "[]\n"
        assert not is_gone(int(pid))
        assert parent.communicate(timeout=DEADLINE_S) == ("", "")
        assert parent.returncode == 0
    until(lambda: is_gone(int(pid)))


def read_and_wait(source: Path, told: Connection) -> None:
    reader = Reader()
    reader.scan(source)
    told.send(reader.pid)
    signal.pause()


@pytest.mark.parametrize("hangs", [False, True])
def test_the_child_ends_with_a_parent_that_is_killed(scan_file, hangs):
    """The parent is a fork of this process, which need not be started."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    parent = multiprocessing.get_context("fork").Process(target=read_and_wait, args=(scan_file, theirs))
    parent.start()
    assert ours.poll(DEADLINE_S)
    pid = ours.recv()
    assert not is_gone(pid)
    if hangs:
        os.kill(pid, signal.SIGSTOP)
    parent.kill()
    parent.join(DEADLINE_S)
    assert parent.exitcode == -signal.SIGKILL
    until(lambda: is_gone(pid))


def test_a_child_that_cannot_start_is_no_fault_of_the_scan(scan_file, monkeypatch):
    reader = Reader()
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONHOME", "/nonexistent")
        with pytest.raises(EngineError, match="does not start"):
            reader.scan(scan_file)
    np.testing.assert_array_equal(reader.scan(scan_file).volume.voxels[0], numbered())
    reader.close()
