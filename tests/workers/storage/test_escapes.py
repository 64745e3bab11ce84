"""Nothing leaves the storage root, the folder of an archive or a folder of delivery: by a link, a name or a receipt."""

from __future__ import annotations

import errno
import io
import re
import tarfile
import tempfile
import zipfile
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.workers.delivery.test_handing import NIGHT, result, rows
from tests.workers.small_root import COHORT, small_root
from tests.workers.tiny_cohort import publish_model, take_in, write_scan
from vnet_core.errors import VnetError
from workers.cohort import check_name, load_cohort, load_entries
from workers.delivery.handing import deliver
from workers.identity import NAME, Pseudonyms, safe_id
from workers.preprocess import preprocess_case
from workers.registry.models import load_model
from workers.segmentation.segment import Job, Segmenter
from workers.sources.archives import unpack
from workers.storage.store import Root

ODD = st.text(
    st.sampled_from("ab./\\-_~ \0\n:é%$*") | st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=30
) | st.sampled_from(["..", "../x", "/etc/passwd", "a/../../b", "~", "C:\\x", ".", "", "a//b", "...", "-rf", "x" * 300])
"""Names that somebody may give to a case, a cohort, a model, an object or a member of an archive."""
QUICK = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return small_root(tmp_path / "root", datetime(2026, 11, 23, 1, tzinfo=UTC))


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder beside the root with a file that nobody may see or touch."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.json").write_text('{"secret": 1}')
    return tmp_path / "outside"


def everything(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def code_of(call) -> str:
    with pytest.raises(VnetError) as caught:
        call()
    return caught.value.code


def attempted(call) -> str:
    """Empty, or the code or the system's name of the error: a file system has no room for some names."""
    try:
        call()
    except VnetError as error:
        return error.code
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return ""


# --- links


CALLS = {
    "get": lambda root, key: root.get(f"{key}/secret.json"),
    "open": lambda root, key: root.open(f"{key}/secret.json"),
    "get_json": lambda root, key: root.get_json(f"{key}/secret.json"),
    "digest": lambda root, key: root.digest(f"{key}/secret.json"),
    "exists": lambda root, key: root.exists(f"{key}/secret.json"),
    "is_object": lambda root, key: root.is_object(f"{key}/secret.json"),
    "names": lambda root, key: root.names(key),
    "walk": lambda root, key: list(root.walk(key)),
    "put": lambda root, key: root.put(f"{key}/new", b"x"),
    "put over": lambda root, key: root.put(f"{key}/secret.json", b"x"),
    "create": lambda root, key: root.create(f"{key}/new", b"x"),
    "delete below": lambda root, key: root.delete(f"{key}/secret.json"),
    "at_hand": lambda root, key: root.at_hand(key).__enter__(),
    "written": lambda root, key: root.written(f"{key}/new").__enter__(),
    "seal": lambda root, key: root.seal(key, {}),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("place", ["volumes/planted", "results/liver/a/planted", "training"])
def test_a_link_out_of_the_root_is_not_followed(root: Root, outside: Path, call: str, place: str) -> None:
    link = root.home / place
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(outside)
    before = everything(outside)
    assert code_of(lambda: CALLS[call](root, place)) == "store.outside"
    assert root.receipt(place) is None
    assert everything(outside) == before
    root.delete(place)
    assert (link.is_symlink(), everything(outside)) == (False, before)


def test_a_link_within_the_root_is_followed(root: Root) -> None:
    (root.home / "volumes" / "other").symlink_to(next((root.home / "volumes").iterdir()))
    assert root.receipt("volumes/other") is not None


def test_a_link_within_what_is_handed_out_is_found(root: Root, outside: Path) -> None:
    key = root.names("volumes")[0]
    (root.home / "volumes" / key / "image" / "more").symlink_to(outside / "secret.json")
    assert code_of(lambda: root.at_hand(f"volumes/{key}").__enter__()) == "store.outside"


def test_a_root_may_itself_be_a_link(root: Root, tmp_path: Path) -> None:
    (tmp_path / "by-name").symlink_to(root.home)
    assert Root(tmp_path / "by-name").names("models") == ["organs"]


def moved_out(root: Root, key: str, outside: Path) -> None:
    """The object or folder lies outside, with a link in its place."""
    target = outside / key.replace("/", "-")
    (root.home / key).rename(target)
    (root.home / key).symlink_to(target)


def test_a_model_a_plan_and_a_cohort_behind_links_are_refused_by_name(root: Root, outside: Path) -> None:
    moved_out(root, "models/organs/v1/weights.safetensors", outside)
    assert code_of(lambda: load_model(root, "organs@v1")) == "model.damaged"
    moved_out(root, "models/organs/v1", outside)
    assert code_of(lambda: load_model(root, "organs@v1")) == "model.unknown"
    moved_out(root, "models/organs", outside)
    assert code_of(lambda: load_model(root, "organs@v1")) == "store.outside"
    moved_out(root, f"cohorts/{COHORT}/cohort.json", outside)
    assert code_of(lambda: load_cohort(root, COHORT)) == "store.outside"


def test_a_result_behind_a_link_is_a_row_that_says_so(tmp_path: Path, outside: Path) -> None:
    """A link in place of a result is replaced by the result; of one on the way to it the case fails by name. Nothing is
    written to where either leads."""
    root = Root(tmp_path / "tiny")
    write_scan(tmp_path / "scans", "a", 0)
    model = publish_model(root)
    take_in(root, "many", [tmp_path / "scans"])
    (entry,) = load_entries(root, "many")
    assert preprocess_case(root.url, entry.case, model.plan).state == "computed"
    segmenter, job = Segmenter(root.url, model.reference, 1), Job("many", entry.case, "nifti")
    computed = segmenter.segment(job)
    assert (computed.state, computed.codes) == ("computed", ())
    moved_out(root, computed.key, outside)
    before = everything(outside)
    assert root.receipt(computed.key) is None
    again = segmenter.segment(job)
    assert (again.state, (root.home / computed.key).is_symlink()) == ("computed", False)
    assert everything(outside) == before
    moved_out(root, "results/many/a", outside)
    before = everything(outside)
    outcome = segmenter.segment(job)
    assert (outcome.state, outcome.codes) == ("failed", ("store.outside",))
    assert everything(outside) == before


# --- receipts, manifests, tables


@pytest.mark.parametrize("name", ["../outside/secret.json", "/etc/passwd", "a/../../b", "link"])
def test_a_receipt_that_names_something_outside_opens_nothing(root: Root, outside: Path, name: str) -> None:
    (key,) = (f"results/{COHORT}/a/{name}" for name in root.names(f"results/{COHORT}/a"))
    (root.home / key / "link").symlink_to(outside / "secret.json")
    receipt = root.receipt(key)
    root.put_json(f"{key}/receipt.json", receipt | {"files": {**receipt["files"], name: "0" * 64}})
    assert root.damaged(key) == [name]


def test_weights_outside_the_bundle_are_refused(root: Root) -> None:
    facts = root.get_json("models/organs/v1/model.json")
    root.put_json("models/organs/v1/model.json", facts | {"weights": ["../../other/v1/weights.safetensors"]})
    root.seal("models/organs/v1", {"stage": "train", "plan_digest": "x"})
    assert code_of(lambda: load_model(root, "organs@v1")) == "model.damaged"


@pytest.mark.parametrize("case", ["../../planted", "/tmp/planted", "a/b", ".hidden", ""])
def test_a_case_of_a_table_that_would_leave_the_folder_of_delivery(tmp_path: Path, case: str) -> None:
    root, folder = Root(tmp_path / "root"), tmp_path / "deep" / "out" / "liver"
    found = rows((case, result(root, "x"), ""), ("b", result(root, "b"), ""))
    done = deliver(root, NIGHT, found, str(folder.parent))
    assert (done.written, done.damaged) == (("b",), (case,))
    assert {path.name for path in (tmp_path / "deep").rglob("*.nii.gz")} == {"b.nii.gz"}
    assert not list(tmp_path.glob("planted*"))


# --- any name


@QUICK
@given(key=ODD)
def test_every_key_is_refused_or_stays_below_the_root(key: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Root(Path(folder) / "root")
        code = attempted(lambda: root.put(key, b"x"))
        stored = [path for path in Path(folder).rglob("*") if path.is_file()]
        assert code in ("", "store.key", "ENAMETOOLONG")
        assert stored == ([] if code else [Path(folder, "root", *key.split("/"))])


@QUICK
@given(name=ODD)
def test_names_of_cohorts_and_models_are_folders_or_refused(name: str) -> None:
    if not NAME.fullmatch(name):
        assert code_of(lambda: check_name(name, "cohort")) == "cohort.name"
        return
    assert check_name(name, "cohort") == name
    assert "/" not in name
    assert name not in (".", "..")
    assert not name.startswith((".", "-"))


@QUICK
@given(name=ODD, other=ODD)
def test_every_name_of_a_manifest_gives_an_id_that_is_a_folder_and_its_own(name: str, other: str) -> None:
    for text in (name, other):
        assert NAME.fullmatch(safe_id(text))
    assert (safe_id(name) == safe_id(other)) == (name == other) or NAME.fullmatch(name) or NAME.fullmatch(other)


def test_every_name_gets_a_pseudonym_that_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(32))
    (tmp_path / "secret").chmod(0o600)
    pseudonyms = Pseudonyms("pseudonyms", tmp_path / "secret")

    @QUICK
    @given(name=ODD)
    def check(name: str) -> None:
        assert re.fullmatch("case-[0-9a-f]{10}", pseudonyms.case(name))
        assert NAME.fullmatch(pseudonyms.series(name, name))
        patient = pseudonyms.patient(name, name)
        assert patient is None or NAME.fullmatch(patient)

    check()


def packed(kind: str, names: list[str]) -> bytes:
    sink = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(sink, "w") as archive:
            for name in names:
                archive.writestr(zipfile.ZipInfo(name), b"x")
    else:
        with tarfile.open(fileobj=sink, mode="w", format=tarfile.PAX_FORMAT) as archive:
            for name in names:
                info = tarfile.TarInfo(name)
                info.size = 1
                archive.addfile(info, io.BytesIO(b"x"))
    return sink.getvalue()


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_members_of_an_archive_stay_in_their_folder_or_refuse_it(tmp_path: Path, kind: str) -> None:
    @settings(QUICK, max_examples=100)
    @given(names=st.lists(ODD.filter(bool), min_size=1, max_size=3))
    def check(names: list[str]) -> None:
        with tempfile.TemporaryDirectory(dir=tmp_path) as place:
            archive, folder = Path(place, f"a.{kind}"), Path(place, "deep", "in")
            folder.mkdir(parents=True)
            archive.write_bytes(packed(kind, names))
            code = attempted(lambda: unpack(archive, folder))
            assert code in ("", "EINVAL", "ENAMETOOLONG") or code.startswith("archive.")
            outside = [path for path in Path(place).rglob("*") if path.is_file() and folder not in path.parents]
            assert outside == [archive]

    check()
