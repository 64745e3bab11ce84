"""What names a patient is planted in every place of a scan, and found nowhere in what a full run leaves behind."""

import base64
import contextlib
import gzip
import io
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import nibabel
import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
import pydicom
import pytest
from PIL import Image, PngImagePlugin
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from tests.flows.command import until
from tests.pickles import pickles
from tests.walkthrough import REPOSITORY, environment
from vnet_core.geometry import Geometry
from vnet_core.phantoms import PhantomSpec, phantom
from workers.sources.scans import write_volume

pytestmark = pytest.mark.timeout(1200)

CANARIES = {
    "name (0010,0010)": "Kanarienvogel",
    "number (0010,0020)": "MRN-7730184425",
    "birth date (0010,0030)": "19310427",
    "birth date as it is written": "1931-04-27",
    "accession number (0008,0050)": "ACC90417733",
    "institution (0008,0080)": "Zsigmondy-Spital",
    "description (0008,103E)": "Schädel Tweety",
    "comment (0020,4000)": "Sylvester",
    "private tag": "Papageno-4711",
    "nested sequence": "Nachtigall",
    "what is no date (0008,0020)": "Wiedehopf",
    "what is no character set (0008,0005)": "Pirol-1",
    "series": "1.2.826.0.1.3680043.8.498.7730184425",
    "study": "1.2.826.0.1.3680043.8.498.1931042719",
    "NIfTI descrip": "Goldammer",
    "NIfTI extension": "Zaunkoenig",
    "MetaImage comment": "Rotkehlchen",
    "file": "Eichelhaeher",
    "member of an archive": "Bachstelze",
    "folder": "Gartengrasmuecke",
    "case of a manifest": "Mauersegler",
    "patient of a manifest": "Heckenbraunelle",
}
"""Where a text is planted, and the text. Pixels that spell a name cannot be searched for: such a series has no picture,
which a test of its own shows."""
AUTH = "admin:Bergfink-58213307"
SECRETS = {
    "key of the object store": "AKIAROTSCHWANZ4471",
    "secret of the object store": "Hausrotschwanz/9182736450+Gimpel",
    "auth string of Prefect": AUTH,
    "auth string as it is sent": base64.b64encode(AUTH.encode()).decode(),
    "token of Ray": "5a5a" * 16,
    "address of messages": "Distelfink-77120",
    "secret of the pseudonyms": "Steinschmaetzer-" * 2,
}
"""What opens something. It is in the environment, in the site file or in the private folder of the runs, and nowhere in
what they leave or in what every account of a machine can see of their processes."""
KEYS = {
    "AWS_ACCESS_KEY_ID": SECRETS["key of the object store"],
    "AWS_SECRET_ACCESS_KEY": SECRETS["secret of the object store"],
    "PREFECT_SERVER_API_AUTH_STRING": AUTH,
    "PREFECT_API_AUTH_STRING": AUTH,
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": SECRETS["token of Ray"],
}
PAGES = "root/prefect/ui"
"""Prefect's own pages, copied from its distribution with their modes into a folder that is for its owner alone."""
SMALL = PhantomSpec(seed=5, shape=(20, 24, 28), spacing_mm=(3.0, 2.5, 2.0), body_mm=22.0)
PLAN = f"{REPOSITORY}/examples/small.toml"


# --- the search


def needles(text: str) -> set[bytes]:
    """The text in every encoding and case that a file may hold it in; ASCII letters as lower case."""
    found = set()
    for form in (text, text.lower(), text.upper(), json.dumps(text)[1:-1]):
        for encoding in ("utf-8", "latin-1", "utf-16-le", "utf-16-be"):
            found.add(form.encode(encoding).lower())
    return found


def leaks(folder: Path, planted: dict[str, str]) -> set[tuple[str, str]]:
    """(what was planted, path below the folder) wherever a file or its name holds one of the texts."""
    wanted = {what: needles(text) for what, text in planted.items()}
    found = set()
    for path in folder.rglob("*"):
        place = path.relative_to(folder).as_posix()
        parts = [os.fsencode(place), *(contents(path) if path.is_file() and not path.is_symlink() else ())]
        if path.is_symlink():
            parts.append(os.fsencode(os.readlink(path)))
        for part in parts:
            lowered = part.lower()
            found |= {(what, place) for what, forms in wanted.items() if any(form in lowered for form in forms)}
    return found


def contents(path: Path) -> Iterator[bytes]:
    """A file's bytes, and what is packed in them."""
    raw = path.read_bytes()
    yield from unpacked(raw)
    if raw.startswith(b"SQLite format 3\0"):
        yield from cells(path)


def unpacked(raw: bytes) -> Iterator[bytes]:
    """The bytes, and those in them that gzip, a PNG's text, Parquet or base64 hides."""
    yield raw
    if raw.startswith(b"\x1f\x8b"):
        # bytes of another kind begin so by chance, one in 65,536
        with contextlib.suppress(gzip.BadGzipFile, EOFError, zlib.error):
            yield from unpacked(gzip.decompress(raw))
    elif raw.startswith(b"\x89PNG"):
        for chunk in compressed_chunks(raw):
            yield zlib.decompressobj().decompress(chunk)
    elif raw.startswith(b"PAR1"):
        table = pyarrow.parquet.read_table(io.BytesIO(raw))
        yield json.dumps(table.to_pylist(), default=str, ensure_ascii=False).encode()
        yield str(table.schema.metadata).encode()
    else:
        for match in re.finditer(rb"[A-Za-z0-9+/]{100,}={0,2}", raw):
            text = match[0][: len(match[0]) // 4 * 4]
            yield from unpacked(base64.b64decode(text))


def compressed_chunks(png: bytes) -> Iterator[bytes]:
    """The zlib streams of zTXt, iTXt and iCCP chunks."""
    place = 8
    while place + 8 <= len(png):
        size, kind = struct.unpack(">I4s", png[place : place + 8])
        body = png[place + 8 : place + 8 + size]
        if kind in (b"zTXt", b"iCCP"):
            yield body.partition(b"\0")[2][1:]
        elif kind == b"iTXt" and body.partition(b"\0")[2][:1] == b"\1":
            yield body.partition(b"\0")[2][2:].split(b"\0", 2)[2]
        place += 12 + size


def cells(path: Path) -> Iterator[bytes]:
    """Every value of a database, its write-ahead log included; a long one lies in pieces on several pages."""
    with tempfile.TemporaryDirectory() as copies:
        for suffix in ("", "-wal"):
            part = path.with_name(path.name + suffix)
            if part.exists():
                shutil.copy(part, copies)
        with sqlite3.connect(Path(copies) / path.name) as database:
            database.text_factory = bytes
            for (table,) in database.execute("select name from sqlite_master where type = 'table'").fetchall():
                for row in database.execute(f'select * from "{table.decode()}"'):
                    for cell in row:
                        value = cell if isinstance(cell, bytes) else str(cell).encode()
                        yield from unpacked(value)
        database.close()


# --- the scans


def write_series(folder: Path, uid: str, burnt_in: str = "NO", left_out: int | None = None) -> None:
    """A CT series of one file per slice with a canary in every tag that may name somebody."""
    volume, geometry = phantom(SMALL)[0], phantom(SMALL)[0].geometry
    folder.mkdir(parents=True)
    for z, slice_YX in enumerate(volume.voxels[0]):
        if z != left_out:
            dataset = slice_of(slice_YX.astype(np.int16), geometry, z, uid)
            dataset.BurnedInAnnotation = burnt_in
            name_somebody(dataset)
            if left_out is not None:
                dataset.SeriesDescription = "head"
                dataset.SpecificCharacterSet = CANARIES["what is no character set (0008,0005)"]
            dataset.save_as(folder / f"{CANARIES['file']}-{z:03d}.dcm", enforce_file_format=True)


def slice_of(slice_YX: np.ndarray, geometry: Geometry, z: int, uid: str) -> Dataset:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = CTImageStorage
    dataset.SOPInstanceUID = f"{uid}.{z + 1}"
    dataset.Modality = "CT"
    dataset.SeriesInstanceUID, dataset.StudyInstanceUID = uid, CANARIES["study"]
    dataset.FrameOfReferenceUID = f"{CANARIES['study']}.1"
    dataset.InstanceNumber = z + 1
    x, y, _ = geometry.origin_mm
    dataset.ImagePositionPatient = [round(x, 3), round(y, 3), round(geometry.origin_mm[2] + 3.0 * z, 3)]
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    dataset.PixelSpacing = [2.5, 2.0]
    dataset.SliceThickness = 3.0
    dataset.Rows, dataset.Columns = slice_YX.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit, dataset.PixelRepresentation = 15, 1
    dataset.RescaleSlope, dataset.RescaleIntercept = 1, 0
    dataset.PixelData = slice_YX.tobytes()
    return dataset


def name_somebody(dataset: Dataset) -> None:
    """Every tag that a clinic fills, and values that readers complain about."""
    pydicom.config.settings.writing_validation_mode = pydicom.config.IGNORE
    dataset.SpecificCharacterSet = ["ISO_IR 100"]
    dataset.PatientName = f"{CANARIES['name (0010,0010)']}^Otto"
    dataset.PatientID = CANARIES["number (0010,0020)"]
    dataset.PatientBirthDate = CANARIES["birth date (0010,0030)"]
    dataset.AccessionNumber = CANARIES["accession number (0008,0050)"]
    dataset.InstitutionName = CANARIES["institution (0008,0080)"]
    dataset.SeriesDescription = CANARIES["description (0008,103E)"]
    dataset.ImageComments = CANARIES["comment (0020,4000)"]
    dataset.StudyDate = CANARIES["what is no date (0008,0020)"]
    dataset.private_block(0x0011, "SOMEBODY", create=True).add_new(0x01, "LO", CANARIES["private tag"])
    request = Dataset()
    request.RequestingPhysician = CANARIES["nested sequence"]
    dataset.RequestAttributesSequence = [request]


def write_nifti(path: Path, seed: int = 5) -> None:
    """A NIfTI file with canaries in its description and in an extension."""
    write_volume(path, phantom(PhantomSpec(seed, SMALL.shape, SMALL.spacing_mm, body_mm=22.0))[0])
    image = nibabel.load(path)
    image = nibabel.Nifti1Image(np.asarray(image.dataobj).copy(), image.affine, image.header)
    image.header["descrip"] = CANARIES["NIfTI descrip"].encode()
    image.header["aux_file"] = CANARIES["NIfTI descrip"].encode()
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", CANARIES["NIfTI extension"].encode()))
    nibabel.save(image, path)


def write_meta(path: Path) -> None:
    """A MetaImage with a comment and with fields that nobody knows."""
    write_volume(path, phantom(SMALL)[0])
    header, mark, voxels = path.read_bytes().partition(b"ElementDataFile = LOCAL\n")
    assert mark
    comment = CANARIES["MetaImage comment"].encode()
    path.write_bytes(header + b"Comment = " + comment + b"\nPatientName = " + comment + b"\n" + mark + voxels)


@dataclass
class Stay:
    """A folder with the scans, and what the commands on them left behind."""

    folder: Path
    runs: dict[str, subprocess.CompletedProcess[str]] = field(default_factory=dict)
    lines: set[str] = field(default_factory=set)
    """Command lines of everything that was started."""

    @property
    def root(self) -> Path:
        return self.folder / "left" / "root"

    def vnet(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command whose temporary files, settings and caches lie in the folder too, and keep what it prints."""
        with self.started(*arguments) as process:
            out, err = process.communicate(timeout=600)
        return self.ended(arguments, subprocess.CompletedProcess(process.args, process.returncode, out, err))

    @contextmanager
    def started(self, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        """The command, under a umask that hides nothing, with the secrets; its processes' command lines are noted."""
        left, over = self.folder / "left", threading.Event()
        places = {"HOME": str(left / "home"), "TMPDIR": str(left / "t"), "PYTHONPATH": str(REPOSITORY)}
        with subprocess.Popen(
            ["vnet", *arguments, "--site", str(self.folder / "site.toml")],
            cwd=left,
            env=environment() | places | KEYS,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            umask=0,
        ) as process:
            watcher = threading.Thread(target=self._watch, args=(process.pid, over))
            watcher.start()
            try:
                yield process
            finally:
                over.set()
                watcher.join()

    def _watch(self, pid: int, over: threading.Event) -> None:
        while not over.wait(0.2):
            with contextlib.suppress(psutil.Error):
                command = psutil.Process(pid)
                for one in (command, *command.children(recursive=True)):
                    with contextlib.suppress(psutil.Error):
                        self.lines.add("\0".join(one.cmdline()))

    def ended(
        self, arguments: tuple[str, ...], done: subprocess.CompletedProcess[str]
    ) -> subprocess.CompletedProcess[str]:
        left = self.folder / "left"
        (left / f"said-{len(self.runs)}.txt").write_text(done.stdout + done.stderr)
        self.runs[" ".join(arguments[:2])] = done
        return done

    def states(self, command: str) -> dict[str, str]:
        """State by case of a command that printed a document."""
        return {case["case"]: case["state"] for case in json.loads(self.runs[command].stdout)["cases"]}


@pytest.fixture(scope="module")
def stay() -> Iterator[Stay]:
    """Ingest, training, a night, single scans and questions over scans in which everything names somebody."""
    # a short path: Ray's sockets lie in it
    folder = Path(tempfile.mkdtemp(prefix="vc-"))
    try:
        stay = Stay(folder)
        for name in ("left/t", "left/home", "scans/train/images", "scans/train/labels"):
            (folder / name).mkdir(parents=True)
        (folder / "site.toml").write_text(
            f'root = "{stay.root}"\n'
            f'notify_url = "json://localhost/{SECRETS["address of messages"]}"\n'
            f'[identity]\nids = "pseudonyms"\nprivate = "{folder / "private"}"\n'
        )
        (folder / "private").mkdir(mode=0o700)
        (folder / "private" / "secret").write_text(SECRETS["secret of the pseudonyms"])
        (folder / "private" / "secret").chmod(0o600)
        for seed in range(3):
            spec = PhantomSpec(seed, SMALL.shape, SMALL.spacing_mm, body_mm=22.0)
            name = f"{CANARIES['file']}{seed}.nii.gz"
            write_nifti(folder / "scans/train/images" / name, seed)
            write_volume(folder / "scans/train/labels" / name, phantom(spec)[1])
        night = folder / "scans/night" / CANARIES["folder"]
        write_series(night / "ct", CANARIES["series"])
        write_series(night / "ct-burnt-in", f"{CANARIES['series']}.7", burnt_in="YES")
        write_series(night / "ct-with-a-gap", f"{CANARIES['series']}.8", left_out=7)
        write_nifti(night / f"{CANARIES['file']}.nii.gz")
        write_meta(night / f"{CANARIES['file']}.meta.mha")
        whole = (night / f"{CANARIES['file']}.nii.gz").read_bytes()
        (night / f"{CANARIES['file']}.cut.nii.gz").write_bytes(whole[: len(whole) // 2])
        (night / f"{CANARIES['file']}.header.mha").write_bytes(
            b"PatientName = " + CANARIES["MetaImage comment"].encode()
        )
        listed = folder / "scans" / "listed" / CANARIES["folder"] / f"{CANARIES['file']}.nii"
        listed.parent.mkdir(parents=True)
        write_nifti(listed, 9)
        with zipfile.ZipFile(folder / "scans" / f"{CANARIES['file']}.zip", "w") as archive:
            archive.write(folder / "scans/train/images" / f"{CANARIES['file']}1.nii.gz", "Bachstelze/Bachstelze.nii.gz")
        rows = [
            f"{CANARIES['case of a manifest']},{listed},{CANARIES['patient of a manifest']}",
            f"{CANARIES['case of a manifest']} 2,{listed}.absent,{CANARIES['patient of a manifest']}",
        ]
        (folder / "scans/listed.csv").write_text("\n".join(["case,image,patient", *rows]) + "\n")
        stay.vnet("ingest", f"{folder}/scans/train", "--cohort", "train", "--label", "1=organ", "--label", "2=lesion")
        stay.vnet("train", "--cohort=train", "--model", "organs", "--steps", "2", "--plan", PLAN, "--verbose")
        sources = (f"{folder}/scans/night", f"{folder}/scans/listed.csv", f"{folder}/scans/{CANARIES['file']}.zip")
        stay.vnet("ingest", *sources, "--cohort", "night")
        stay.vnet("nightly", "--cohort=night", "--model", "organs", "--json")
        single = f"{night}/{CANARIES['file']}.meta.mha"
        stay.vnet("segment", "--model=organs", single, "--output", "masks", "--format", "mha", "--verbose")
        stay.vnet("query", "--limit=100")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        with stay.started("serve", "--port", port) as serving:
            assert serving.stderr is not None
            said = []
            while "UI:" not in "".join(said[-1:]):
                said.append(serving.stderr.readline())
                assert said[-1], "".join(said)
            until(lambda: hears_sigterm(serving.pid), 120)
            serving.send_signal(signal.SIGTERM)
            out, err = serving.communicate(timeout=120)
        # 130 where the signal came before it had begun to serve
        code = 0 if serving.returncode == 130 else serving.returncode
        stay.ended(("serve",), subprocess.CompletedProcess(["serve"], code, out, "".join(said) + err))
        yield stay
    finally:
        shutil.rmtree(folder)


def hears_sigterm(pid: int) -> bool:
    """Whether a process has a handler of its own for the signal."""
    (caught,) = re.findall(r"SigCgt:\s*([0-9a-f]+)", Path(f"/proc/{pid}/status").read_text("ascii"))
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


# --- what is found


def test_the_run_did_its_work_on_everything_that_was_planted(stay: Stay) -> None:
    codes = {command: done.returncode for command, done in stay.runs.items()}
    said = "\n".join(done.stderr for done in stay.runs.values())
    assert [codes.pop(command) for command in list(codes) if command.startswith("ingest")] == [0, 3], said
    assert codes == {
        "train --cohort=train": 0,
        "nightly --cohort=night": 3,
        "segment --model=organs": 0,
        "query --limit=100": 0,
        "serve": 0,
    }, said
    states = stay.states("nightly --cohort=night")
    assert sorted(states.values()) == ["computed"] * 6 + ["refused"] * 4
    patterns = {re.sub("[0-9a-f]{10}$", "#", case) for case in states}
    assert patterns == {"CT-#", "case-#"}


def test_nothing_that_names_somebody_is_left_outside_the_private_folder(stay: Stay) -> None:
    found = {(what, place) for what, place in leaks(stay.folder / "left", CANARIES) if not place.startswith(PAGES)}
    assert found == set()


def test_nothing_that_opens_something_is_left_anywhere(stay: Stay) -> None:
    assert leaks(stay.folder / "left", SECRETS) == set()
    assert {what for what, _ in leaks(stay.folder / "private", SECRETS)} == {"secret of the pseudonyms"}


def test_no_process_shows_a_secret_in_its_command_line(stay: Stay) -> None:
    for word in ("raylet", "gcs_server", "flows.server", "multiprocessing.spawn", "workers.sources.reading"):
        assert any(word in line for line in stay.lines), word
    shown = {what for what, text in SECRETS.items() for line in stay.lines if text in line}
    assert shown == set()


def test_the_address_of_messages_is_in_the_database_and_encrypted(stay: Stay) -> None:
    with sqlite3.connect(stay.root / "prefect" / "prefect.db") as database:
        blocks = database.execute("select name from block_document").fetchall()
    database.close()
    assert ("vnet-notify",) in blocks


def test_all_files_are_for_their_owner_alone_after_a_training_too(stay: Stay) -> None:
    paths = [path for folder in (stay.root, stay.folder / "private") for path in (folder, *folder.rglob("*"))]
    assert len(paths) > 300
    pages = stay.folder / "left" / PAGES
    written = [path for path in paths if not path.is_symlink() and path != pages and pages not in path.parents]
    assert [path for path in written if path.stat().st_mode & 0o077] == []
    (ray,) = (stay.folder / "left" / "t").glob("ray-*")
    assert ray.stat().st_mode & 0o777 == 0o700
    assert [path for path in (stay.folder / "left" / "masks").iterdir() if path.stat().st_mode & 0o077] == []


def test_no_pickle_lies_in_the_root_after_a_training_either(stay: Stay) -> None:
    assert pickles(stay.root) == []


def test_the_search_saw_every_kind_of_place(stay: Stay) -> None:
    left = stay.folder / "left"
    for pattern in (
        "root/prefect/prefect.db",
        "root/results/night/*/*/qc.png",
        "root/results/night/*/*/mask.ome.zarr/zarr.json",
        "root/results/night/*/*/mask.nii.gz",
        "root/volumes/*/zarr.json",
        "root/reports/night/*.parquet",
        "root/reports/night/*.csv",
        "root/training/organs/*/run.json",
        "t/ray-*/r/session_2*/logs/*",
        "masks/*.mha",
        "said-5.txt",
    ):
        assert list(left.glob(pattern)), pattern
    with sqlite3.connect(left / "root/prefect/prefect.db") as database:
        (lines,) = database.execute("select count(*) from log").fetchone()
        (reports,) = database.execute("select count(*) from artifact").fetchone()
    database.close()
    assert lines > 3
    assert reports > 3


def test_the_private_folder_tells_who_is_who(stay: Stay) -> None:
    private = stay.folder / "private"
    told = {what for what, _ in leaks(private, CANARIES)}
    assert {"file", "folder", "series"} <= told
    for case in stay.states("nightly --cohort=night"):
        assert (private / "cohorts/night/cases" / f"{case}.json").is_file()
    # nobody else comes past the folder itself, so that unpacked archives need no modes of their own
    for path in (private, private / "secret", private / "cohorts", *(private / "cohorts").rglob("*")):
        assert path.stat().st_mode & 0o077 == 0, path


def test_patients_are_grouped_by_their_pseudonym(stay: Stay) -> None:
    (table,) = (stay.root / "reports" / "night").glob("*.parquet")
    patients = {row["case"]: row["patient"] for row in pyarrow.parquet.read_table(table).to_pylist()}
    series = {patient for case, patient in patients.items() if case.startswith("CT-")}
    assert len(series) == 1
    assert re.fullmatch("P-[0-9a-f]{10}", series.pop())


def test_headers_of_masks_are_blank(stay: Stay) -> None:
    for path in stay.root.glob("results/night/*/*/mask.nii.gz"):
        header = nibabel.load(path).header
        texts = ("descrip", "aux_file", "intent_name", "db_name")
        assert [bytes(header[name]).strip(b"\0") for name in texts] == [b""] * 4
        assert not header.extensions
    (mask,) = (stay.folder / "left" / "masks").glob("*.mha")
    assert b"Comment" not in mask.read_bytes().partition(b"LOCAL")[0]


def test_a_series_with_burnt_in_text_gets_no_picture(stay: Stay) -> None:
    document = json.loads(stay.runs["nightly --cohort=night"].stdout)
    masks = [Path(case["mask"]).parent for case in document["cases"] if case["state"] == "computed"]
    without = [mask for mask in masks if not (mask / "qc.png").exists()]
    assert len(without) == 1
    assert without[0].parent.name.startswith("CT-")


# --- the search itself


def png(kind: str, text: str) -> bytes:
    info = PngImagePlugin.PngInfo()
    if kind == "iTXt":
        info.add_itxt("Comment", text, zip=True)
    else:
        info.add_text("Comment", text, zip=kind == "zTXt")
    sink = io.BytesIO()
    Image.new("L", (2, 2)).save(sink, "PNG", pnginfo=info)
    return sink.getvalue()


TEXT = "Nachtigall Müller"
FILLED = f"{'x' * 5000}{TEXT}{'y' * 5000}"


def sqlite_file(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("create table log (message text)")
        database.execute("insert into log values (?)", [FILLED])
    database.close()


def parquet_file(path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"case": [TEXT] * 3}), path, compression="zstd")


def data_uri(path: Path) -> None:
    path.write_bytes(b"![x](data:image/png;base64," + base64.b64encode(png("zTXt", TEXT * 30)) + b")")


@pytest.mark.parametrize(
    "plant",
    [
        lambda path: path.write_text(f"a {TEXT} b", encoding="utf-8"),
        lambda path: path.write_text(TEXT.upper(), encoding="utf-16"),
        lambda path: path.write_text(TEXT.lower(), encoding="latin-1"),
        lambda path: path.write_text(json.dumps({"message": TEXT})),
        lambda path: path.write_bytes(gzip.compress(gzip.compress(TEXT.encode()))),
        lambda path: path.write_bytes(png("tEXt", TEXT)),
        lambda path: path.write_bytes(png("zTXt", TEXT)),
        lambda path: path.write_bytes(png("iTXt", TEXT)),
        lambda path: (path.parent / f"{TEXT}.txt").write_bytes(b""),
        lambda path: path.symlink_to(f"/scans/{TEXT}"),
        sqlite_file,
        parquet_file,
        data_uri,
    ],
)
def test_a_planted_leak_is_found(tmp_path: Path, plant) -> None:
    (tmp_path / "clean.txt").write_text("Nachtigal Muller")
    assert leaks(tmp_path, {"name": TEXT}) == set()
    plant(tmp_path / "leak")
    assert {what for what, _ in leaks(tmp_path, {"name": TEXT})} == {"name"}
