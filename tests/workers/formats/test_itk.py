"""SimpleITK's readers are for one thread at a time."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import SimpleITK as sitk

from vnet_core.geometry import Geometry
from workers.formats.itk import itk_reader
from workers.sources.scans import read_label, write_label


def labels(folder):
    """Four label maps."""
    paths = [folder / f"{number}.nii.gz" for number in range(4)]
    for path in paths:
        write_label(path, np.ones((2, 3, 4), np.uint8), Geometry((2, 3, 4), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0)))
    return paths


def test_threads_that_read_label_maps_take_turns_in_itk(tmp_path, monkeypatch):
    """Of readers that wait in ITK for a second thread there, each waits in vain."""
    second = threading.Barrier(2, timeout=0.2)
    met = []
    read = sitk.ImageFileReader.ReadImageInformation

    def waiting(reader):
        try:
            second.wait()
            met.append(True)
        except threading.BrokenBarrierError:
            second.reset()
        return read(reader)

    monkeypatch.setattr(sitk.ImageFileReader, "ReadImageInformation", waiting)
    with ThreadPoolExecutor(2) as threads:
        assert [len(found.labels) for found in threads.map(read_label, labels(tmp_path))] == [2] * 4
    assert not met


def test_warnings_are_as_before_after_a_reader_that_failed(tmp_path):
    before = sitk.ProcessObject.GetGlobalWarningDisplay()
    try:
        with itk_reader("NiftiImageIO", tmp_path / "missing.nii") as reader:
            assert not sitk.ProcessObject.GetGlobalWarningDisplay()
            reader.ReadImageInformation()
    except RuntimeError:
        pass
    assert sitk.ProcessObject.GetGlobalWarningDisplay() == before
    # and the next one gets its turn
    with itk_reader("NiftiImageIO", labels(tmp_path)[0]) as reader:
        reader.ReadImageInformation()
        assert reader.GetSize() == (4, 3, 2)


def test_the_first_readers_of_a_process_may_be_threads(tmp_path):
    """What ITK's readers share is made by the first of them."""
    labels(tmp_path)
    code = (
        "import sys; from concurrent.futures import ThreadPoolExecutor; from pathlib import Path;"
        "from workers.sources.scans import read_label; files = sorted(Path(sys.argv[1]).iterdir());"
        "print(len(list(ThreadPoolExecutor(4).map(read_label, files * 25))))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "100\n", "")
