"""Ids that name nobody, and the private folder that alone tells who is who."""

import json
import os
import re
import stat
import threading
import warnings
from dataclasses import replace
from pathlib import Path

import pydicom
import pytest

from vnet_core.errors import ConfigError, StorageError
from vnet_core.geometry import Geometry
from vnet_core.plan import Label
from workers.cohort import (
    Case,
    Cohort,
    Entry,
    Verdict,
    known_entry,
    load_cohort,
    load_entries,
    load_entry,
    remove_entry,
    save_cohort,
    save_entry,
)
from workers.identity import (
    Identity,
    Pseudonyms,
    _make_secret,
    hush_readers,
    identity_of,
    keep_identity,
    private_root,
    safe_id,
)
from workers.storage.store import Root

SECRET = bytes(range(32))
SOURCE = "/scans/DOE_JOHN/head.nii.gz"
LABEL = "/scans/DOE_JOHN/head_seg.nii.gz"
CASE = Case(
    "case-1", (SOURCE,), LABEL, "P-1", "d" * 64, "e" * 64, Geometry((2, 3, 4), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0))
)
ENTRY = Entry(CASE, Verdict("warned", ("label.empty",), "0 voxels"), None, "stamp")


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(tmp_path / "root")


def pseudonyms(folder: Path, ids="pseudonyms", secret: bytes = SECRET) -> Pseudonyms:
    path = folder / "secret"
    path.write_bytes(secret)
    path.chmod(0o600)
    return Pseudonyms(ids, path)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# --- pseudonyms


def test_a_pseudonym_is_the_hmac_of_kind_and_text(tmp_path):
    # by pencil: printf 'series\0001.2.3/echo-2' | openssl dgst -sha256 -mac HMAC -macopt hexkey:000102...1f
    made = pseudonyms(tmp_path)
    assert made.series("CT", "1.2.3", "echo-2") == "CT-2d469457dd"
    assert made.patient("MRN-0042") == "P-b18920f79d"
    assert made.case("DOE_JOHN") == "case-1bd79ba34f"


def test_equal_texts_have_equal_ids_and_others_do_not(tmp_path):
    made = pseudonyms(tmp_path)
    ids = {
        made.series("CT", "1.2.3"),
        made.series("CT", "1.2.3", "b-0"),
        made.series("CT", "1.2.4"),
        made.case("1.2.3"),
    }
    assert len(ids) == 4
    assert made.series("CT", "1.2.3") == Pseudonyms("names", tmp_path / "secret").series("CT", "1.2.3")
    (tmp_path / "other").mkdir()
    assert made.patient("42") != pseudonyms(tmp_path / "other", secret=bytes(32)).patient("42")
    # a patient, a study and a case of one name are three things
    digits = {text.rpartition("-")[2] for text in (made.patient("7"), made.patient("", "7"), made.case("7"))}
    assert len(digits) == 3


def test_a_patient_without_a_number_is_known_by_the_study(tmp_path):
    made = pseudonyms(tmp_path)
    assert made.patient(" 42 ", "1.2") == made.patient("42", "1.3")
    assert made.patient("", "1.2") == made.patient(" ", "1.2") != made.patient("", "1.3")
    assert made.patient("") is None


@pytest.mark.parametrize("modality", ["", "DOE^JOHN", "=cmd|x", "ct", "\x1b[31m"])
def test_only_a_defined_modality_stands_in_an_id(tmp_path, modality):
    assert re.fullmatch(r"DICOM-[0-9a-f]{10}", pseudonyms(tmp_path).series(modality, "1.2"))


def test_names_are_ids_where_the_site_says_so(tmp_path):
    named, hidden = pseudonyms(tmp_path, "names"), pseudonyms(tmp_path)
    assert named.case("liver_01") == "liver_01"
    assert named.named_patient("Jones") == "Jones"
    assert hidden.named_patient("Jones") == hidden.patient("Jones")
    assert hidden.named_patient(" ") is named.named_patient(None) is None
    assert re.fullmatch(r"case-[0-9a-f]{10}", hidden.case("liver_01"))
    assert re.fullmatch(r"P-[0-9a-f]{10}", hidden.patient("Jones") or "")
    assert re.fullmatch(r"scans-[0-9a-f]{10}", named.cohort("/scans/DOE_JOHN"))


@pytest.mark.parametrize("name", ["=cmd|' /C calc'!A0", "<script>", "a\x1b[31m", "x|y", "a\nb", "..", "ö" * 200])
def test_a_name_that_could_do_harm_becomes_a_safe_id(name):
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", safe_id(name))


def test_a_file_name_that_is_no_text_has_a_pseudonym(tmp_path):
    made = pseudonyms(tmp_path)
    assert made.case(os.fsdecode(b"\xff\xfe")) != made.case(os.fsdecode(b"\xff"))


# --- the secret


def test_a_secret_is_made_at_first_use_for_its_owner_alone(root):
    made = Pseudonyms.of(root)
    secret = root.home / "private" / "secret"
    assert made.case("liver") == "liver"
    assert not secret.exists()
    first = made.series("CT", "1.2")
    assert len(secret.read_bytes()) == 32
    assert (mode(secret), mode(secret.parent)) == (0o600, 0o700)
    assert Pseudonyms.of(root).series("CT", "1.2") == first
    assert [path.name for path in secret.parent.iterdir()] == ["secret"]


def test_processes_that_start_together_have_one_secret(root):
    start, ids = threading.Barrier(8), []

    def make():
        made = Pseudonyms.of(root)
        start.wait()
        ids.append(made.series("CT", "1.2"))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ids) == 8
    assert len(set(ids)) == 1


def test_a_secret_that_another_process_has_made_meanwhile_stays(tmp_path):
    _make_secret(tmp_path / "secret")
    first = (tmp_path / "secret").read_bytes()
    _make_secret(tmp_path / "secret")
    assert (tmp_path / "secret").read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]


@pytest.mark.parametrize(("secret", "bits", "words"), [(b"short", 0o600, "5 bytes, 16"), (SECRET, 0o604, "0604")])
def test_a_secret_that_protects_nobody_is_refused(tmp_path, secret, bits, words):
    made = pseudonyms(tmp_path, secret=secret)
    made.secret_file.chmod(bits)
    with pytest.raises(ConfigError, match=words) as caught:
        made.patient("42")
    assert caught.value.code == "identity.secret"


def test_a_secret_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=r"identity\.secret_file") as caught:
        Pseudonyms("names", tmp_path / "file" / "secret").patient("42")
    assert caught.value.code == "identity.secret"


# --- the site's section


def test_the_section_is_kept_in_the_root_with_absolute_paths(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert identity_of(root) == Identity()
    keep_identity(root, Identity(ids="pseudonyms", private="hidden", secret_file="keys/secret"))
    kept = identity_of(Root(root.url))  # which is all that a worker is told
    assert kept == Identity(
        ids="pseudonyms", private=str(tmp_path / "hidden"), secret_file=str(tmp_path / "keys" / "secret")
    )
    assert json.loads(root.get("identity.json")).keys() == {"ids", "private", "secret_file"}
    made = Pseudonyms.of(Root(root.url))
    assert made.case("DOE").startswith("case-")
    assert (tmp_path / "keys" / "secret").is_file()
    assert mode(private_root(root).home) == 0o700


def test_a_section_that_is_no_longer_whole_is_named(root):
    root.put_json("identity.json", {"ids": "none"})
    with pytest.raises(StorageError) as caught:
        identity_of(root)
    assert caught.value.code == "store.corrupt"


def test_a_private_folder_that_cannot_be_made_is_named(root, tmp_path):
    (tmp_path / "file").write_text("in the way")
    keep_identity(root, Identity(private=str(tmp_path / "file" / "private")))
    with pytest.raises(StorageError, match=r"identity\.private") as caught:
        private_root(root)
    assert caught.value.code == "identity.unwritable"


# --- what libraries say


def test_pydicom_does_not_quote_a_header(capsys, caplog):
    hush_readers()
    with warnings.catch_warnings(record=True) as told:
        hush_readers()
        assert pydicom.valuerep.DSfloat("1" * 20).real
        pydicom.dataelem.DataElement(0x00080020, "DA", "DOE JOHN")
        pydicom.charset.convert_encodings("DOE JOHN")
    assert told == []
    assert "DOE" not in caplog.text + capsys.readouterr().err


# --- what the cohort keeps where


def written_in(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text("utf-8") for path in folder.rglob("*") if path.is_file()
    }


def test_paths_are_in_the_private_folder_alone(root, tmp_path):
    keep_identity(root, Identity(private=str(tmp_path / "hidden")))
    cohort = Cohort("liver", ("/scans/DOE_JOHN",), ("image",), (Label(value=1, name="liver"),))
    save_cohort(root, cohort)
    save_entry(root, "liver", ENTRY)
    public, private = written_in(root.home), written_in(tmp_path / "hidden")
    assert set(private) == {"cohorts/liver/cohort.json", "cohorts/liver/cases/case-1.json"}
    assert set(public) == {*private, "identity.json"}
    assert not any("DOE" in text or "stamp" in text for text in public.values())
    assert all("DOE_JOHN" in text for text in private.values())
    assert load_cohort(root, "liver") == cohort
    assert load_entry(root, "liver", "case-1") == ENTRY
    assert load_entries(Root(root.url), "liver") == [ENTRY]


def test_private_files_and_folders_are_for_their_owner(root):
    before = os.umask(0)
    try:
        save_entry(root, "liver", ENTRY)
    finally:
        os.umask(before)
    folder = root.home / "private"
    assert {mode(path) for path in (folder, *folder.rglob("*")) if path.is_dir()} == {0o700}
    assert {mode(path) for path in folder.rglob("*") if path.is_file()} == {0o600}


def test_a_missing_private_part_is_named_with_what_helps(root):
    save_cohort(root, Cohort("liver", ("/scans",), ("image",), ()))
    save_entry(root, "liver", ENTRY)
    assert known_entry(root, "liver", "case-1") == ENTRY
    (root.home / "private").rename(root.home / "elsewhere")
    for load in (lambda: load_entry(root, "liver", "case-1"), lambda: load_cohort(root, "liver")):
        with pytest.raises(StorageError, match="run vnet ingest") as caught:
            load()
        assert caught.value.code == "identity.no-private"
        assert str(root.home / "private") in caught.value.message
    assert known_entry(root, "liver", "case-1") is None
    assert known_entry(root, "liver", "case-2") is None


def test_a_forgotten_case_is_forgotten_in_both(root):
    save_entry(root, "liver", ENTRY)
    save_entry(root, "liver", replace(ENTRY, case=replace(CASE, id="case-2")))
    remove_entry(root, "liver", "case-1")
    assert [path.name for path in root.home.rglob("*.json")] == ["case-2.json", "case-2.json"]
    assert known_entry(root, "liver", "case-1") is None
