"""A tree of DICOM files listed by headers alone: files per second and memory beside dcm2niix and pydicom's own walk.

    python -m benchmarks.dicom_tree --output benchmarks/results/dicom-tree_<hardware>_<yyyymm>.md

20,000 slices of 16 x 16 pixels in 200 series, one folder each, are written from a seed; each has some seventy elements
and a private block of 4 KiB, as scanners write. Every run is a fresh process on files in the page cache, the
arms in turn. `--files` and `--series` make a small one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

_SOP, _POSITION, _INSTANCE = "1.2.826.0.1.3680043.8.498.77777777777", "77777.777", "77777"
"""Text of the template that every slice replaces by its own of the same length."""


@dataclass(frozen=True)
class Run:
    """One run of one arm."""

    seconds: float
    cpu_seconds: float
    grown_bytes: int
    """Largest resident size above what the process held before it began; of dcm2niix, its largest resident size."""
    found: int
    """Series, or files for pydicom's walk."""


def make_tree(folder: Path, files: int, series: int, seed: int = 0) -> None:
    """Write the tree: the first series get one slice more where ``files`` is no multiple of ``series``."""
    rng = np.random.default_rng(seed)
    for number in range(series):
        count = files // series + (number < files % series)
        target = folder / f"{number // 10:03}" / f"{number % 10}"
        target.mkdir(parents=True)
        template = _template(number, rng)
        for z in range(count):
            own = (
                template.replace(_SOP.encode(), f"{_SOP[:-11]}{number + 1:05}{z + 1:06}".encode())
                .replace(_POSITION.encode(), f"{z * 2.5:9.3f}".encode())
                .replace(_INSTANCE.encode(), f"{z + 1:05}".encode())
            )
            (target / f"{rng.integers(1 << 62):016x}.dcm").write_bytes(own)


def _template(number: int, rng: np.random.Generator) -> bytes:
    """A CT slice as a scanner writes it, with placeholders for what differs from slice to slice."""
    from io import BytesIO

    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = CTImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = _SOP
    data.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    data.Modality, data.PatientID = "CT", f"P{number // 10:05}"
    data.StudyInstanceUID, data.SeriesInstanceUID = f"1.2.3.{number // 10}", f"1.2.3.{number // 10}.{number}"
    data.FrameOfReferenceUID = f"1.2.4.{number}"
    data.SeriesDescription, data.ConvolutionKernel, data.SliceThickness = "Thorax 2.5", "B30f", "2.5"
    data.StudyDate = data.SeriesDate = data.AcquisitionDate = data.ContentDate = "20260101"
    data.StudyTime = data.SeriesTime = data.AcquisitionTime = data.ContentTime = "120000.000000"
    data.AcquisitionNumber, data.SeriesNumber, data.InstanceNumber = 1, number, _INSTANCE
    data.ImagePositionPatient = ["-200.5", "-180.25", _POSITION]
    data.ImageOrientationPatient, data.PixelSpacing = [1, 0, 0, 0, 1, 0], [0.75, 0.75]
    data.Rows = data.Columns = 16
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 1
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.RescaleSlope, data.RescaleIntercept = "1", "-1024"
    for keyword in (
        "KVP", "DataCollectionDiameter", "ReconstructionDiameter", "DistanceSourceToDetector", "GantryDetectorTilt",
        "DistanceSourceToPatient", "TableHeight", "ExposureTime", "XRayTubeCurrent", "Exposure", "GeneratorPower",
        "FocalSpots", "WindowCenter", "WindowWidth", "SliceLocation", "PatientWeight", "PatientSize",
    ):  # fmt: skip
        setattr(data, keyword, "100")
    for keyword in (
        "Manufacturer", "ManufacturerModelName", "DeviceSerialNumber", "SoftwareVersions", "ProtocolName",
        "StationName", "StudyDescription", "BodyPartExamined", "FilterType", "ImageComments", "ScanOptions",
    ):  # fmt: skip
        setattr(data, keyword, "SYNTHETIC")
    block = data.private_block(0x0029, "SYNTHETIC HEADER", create=True)
    block.add_new(0x10, "OB", rng.bytes(4096))
    items = []
    for reference in range(5):
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = CTImageStorage, f"1.2.5.{reference}"
        items.append(item)
    data.ReferencedImageSequence = items
    data.PixelData = rng.integers(0, 2000, (16, 16), dtype=np.int16).tobytes()
    buffer = BytesIO()
    data.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def ours(folder: Path) -> int:
    from workers.dicom.tree import scan_tree

    return len(scan_tree(folder).volumes)


def pydicom_walk(folder: Path) -> int:
    import pydicom

    found = 0
    for directory, _, names in os.walk(folder):
        for name in names:
            found += "SeriesInstanceUID" in pydicom.dcmread(os.path.join(directory, name), stop_before_pixels=True)
    return found


IN_PROCESS: dict[str, Callable[[Path], int]] = {"ours": ours, "pydicom": pydicom_walk}
ARMS = (*IN_PROCESS, "dcm2niix")


def measure_here(arm: str, folder: Path, empty: Path) -> Run:
    """One run of a Python arm in this process, imports made before the clock starts."""
    work = IN_PROCESS[arm]
    work(empty)
    Path("/proc/self/clear_refs").write_text("5")  # the largest size counts from now
    before = largest_bytes(os.getpid())
    began, cpu_began = time.perf_counter(), time.process_time()
    found = work(folder)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    return Run(seconds, cpu_seconds, largest_bytes(os.getpid()) - before, found)


def largest_bytes(process: int) -> int:
    """Largest resident size of a process so far; 0 when it is gone. What a process inherits does not count here."""
    try:
        lines = Path(f"/proc/{process}/status").read_text("utf-8").splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def measure(arm: str, folder: Path) -> Run:
    """One run in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        if arm in IN_PROCESS:
            command = [sys.executable, "-m", "benchmarks.dicom_tree", "--arm", arm, str(folder), scratch]
            told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            return Run(**json.loads(told))
        import dcm2niix

        log = Path(scratch, "log")
        command = [dcm2niix.bin, "-b", "o", "-d", "9", "-f", "%j", "-o", scratch, str(folder)]
        began = time.perf_counter()
        largest = 0
        with log.open("wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out)
            while True:
                ended, status, usage = os.wait4(process.pid, os.WNOHANG)
                if ended:
                    break
                largest = max(largest, largest_bytes(process.pid))
                time.sleep(0.005)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - began
        return Run(seconds, usage.ru_utime + usage.ru_stime, largest, len(list(Path(scratch).glob("*.json"))))


def report(files: int, series: int, measured: dict[str, list[Run]], tenth: Run) -> list[str]:
    """The results as Markdown, with what is needed to repeat them."""
    from benchmarks.machine import provenance  # imports torch, which no arm should hold

    lines = [
        "# A DICOM tree by headers alone",
        "",
        f"{files} slices in {series} series, one folder each. Ours groups, sorts and checks every series, and accounts"
        " for all bytes of pixel data; pydicom's walk reads each header and keeps nothing; dcm2niix (`-b o`) writes one"
        " sidecar per series and no image. Fresh process for every run, files in the page cache, arms in turn.",
        "",
        "| arm | seconds | median | files per second | CPU seconds | memory MiB | found |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for arm, runs in measured.items():
        middle = median(run.seconds for run in runs)
        lines.append(
            f"| {arm} | {' · '.join(f'{run.seconds:.2f}' for run in runs)} | {middle:.2f} | {files / middle:.0f} |"
            f" {median(run.cpu_seconds for run in runs):.2f} |"
            f" {max(run.grown_bytes for run in runs) / 2**20:.1f} | {runs[0].found} |"
        )
    grown = max(run.grown_bytes for run in measured["ours"])
    lines += [
        "",
        "Memory is the largest resident size above that of the idle interpreter with its imports; of dcm2niix, the"
        f" largest resident size. Ours grows by {tenth.grown_bytes / 2**20:.1f} MiB over a tenth of the files and by"
        f" {grown / 2**20:.1f} MiB over all of them: {grown / files:.0f} bytes per slice.",
        "",
        *provenance("pydicom", "dcm2niix", "numpy"),
    ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--series", type=int, default=200)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--output", type=Path, help="results file")
    parser.add_argument("--arm", nargs=3, metavar=("NAME", "FOLDER", "EMPTY"), help="one run here, told as JSON")
    options = parser.parse_args()
    if options.arm:
        arm, folder, empty = options.arm
        print(json.dumps(vars(measure_here(arm, Path(folder), Path(empty)))))
        return
    with tempfile.TemporaryDirectory() as made:
        whole, part = Path(made, "whole"), Path(made, "part")
        make_tree(whole, options.files, options.series)
        make_tree(part, max(2, options.files // 10), max(1, options.series // 10))
        measured: dict[str, list[Run]] = {arm: [] for arm in ARMS}
        measure("ours", whole)  # into the page cache
        for _ in range(options.runs):
            for arm, runs in measured.items():
                runs.append(measure(arm, whole))
        lines = report(options.files, options.series, measured, measure("ours", part))
    from benchmarks.machine import tell  # after the runs, as it imports torch

    tell(lines, options.output)


if __name__ == "__main__":
    main()
