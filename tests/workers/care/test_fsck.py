"""Every fault that is planted in a small storage root is found, told apart, and mended where that is safe."""

import json
import os
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.files import file_of
from tests.workers.small_root import COHORT, PLAN, add_night, age, case_of, small_root
from workers.care.fsck import fsck, repair
from workers.cohort import volume_key
from workers.registry.aliases import challenge, promote
from workers.storage.store import RECEIPT, Root

STARTED = datetime(2026, 11, 20, 1, tzinfo=UTC)
NOW = datetime.now(UTC)
LATER = NOW + timedelta(days=2)
"""When what was just written has been lying about for long."""


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Root:
    root = small_root(tmp_path_factory.mktemp("pristine") / "root", STARTED)
    promote(root, "organs", "v1", "Ada", "the first one")
    root.put("training/organs/v1/checkpoints/000000001/state.safetensors", b"weights")
    root.seal("training/organs/v1/checkpoints/000000001", {"stage": "train"})
    return root


@pytest.fixture
def root(pristine: Root, tmp_path: Path) -> Root:
    shutil.copytree(pristine.home, tmp_path / "root")
    return Root(tmp_path / "root")


def result(root: Root, case: str = "a") -> str:
    (name,) = root.names(f"results/{COHORT}/{case}")
    return f"results/{COHORT}/{case}/{name}"


def volume() -> str:
    return volume_key(case_of("a"), PLAN)


def codes(root: Root, now: datetime = LATER, cohort: str = "") -> list[tuple[str, str]]:
    return [(finding.key, finding.code) for finding in fsck(root, now, cohort, threads=2).findings]


def everything(root: Root) -> dict[str, bytes]:
    return {p.relative_to(root.home).as_posix(): p.read_bytes() for p in root.home.rglob("*") if p.is_file()}


def test_a_clean_root_has_no_finding_and_is_left_as_it_is(root: Root) -> None:
    before = everything(root)
    checkup = fsck(root, LATER, threads=2)
    assert checkup.findings == ()
    sealed = [json.loads(content) for name, content in before.items() if name.endswith(RECEIPT)]
    assert checkup.objects == len(sealed) == 2 + 2 + 1 + 1
    assert checkup.files == sum(len(receipt["files"]) for receipt in sealed)
    named = [
        Path(name).parent / file
        for name, content in before.items()
        if name.endswith(RECEIPT)
        for file in json.loads(content)["files"]
    ]
    assert checkup.bytes == sum(len(before[path.as_posix()]) for path in named)
    assert checkup.megabytes_per_s == pytest.approx(checkup.bytes / 1e6 / checkup.seconds)
    assert everything(root) == before


def test_an_empty_root_has_no_finding_and_stays_empty(tmp_path: Path) -> None:
    assert fsck(Root(tmp_path / "none"), NOW).findings == ()
    assert not (tmp_path / "none").exists()


# --- bytes


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (flip, ["fsck.changed"]),
        (cut, ["fsck.changed"]),
        (lambda path: path.write_bytes(b""), ["fsck.changed"]),
        (Path.unlink, ["fsck.missing"]),
        (lambda path: (path.unlink(), path.mkdir()), ["fsck.missing"]),
        (link, ["fsck.extra", "fsck.link", "fsck.missing"]),
        (lambda path: path.with_name("added").write_bytes(b"x"), ["fsck.extra"]),
    ],
    ids=["flipped", "cut", "emptied", "missing", "a folder", "a link", "extra"],
)
@pytest.mark.parametrize("which", ["mask", "chunk of a mask", "chunk of a volume", "weights", "checkpoint"])
def test_a_fault_in_the_bytes_is_found(root: Root, fault: Callable[[Path], object], expected: list[str], which: str):
    key, file = {
        "mask": (result(root), "mask.nii.gz"),
        "chunk of a mask": (result(root), "mask.ome.zarr/0/c/0/0/0"),
        "chunk of a volume": (volume(), "image/c/0/0/0/0"),
        "weights": ("models/organs/v1", "weights.safetensors"),
        "checkpoint": ("training/organs/v1/checkpoints/000000001", "state.safetensors"),
    }[which]
    fault(file_of(root, f"{key}/{file}"))
    assert codes(root) == [(key, code) for code in expected]


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "fsck.receipt"),
        (b"{", "fsck.receipt"),
        (b"\xff\xfe\x00", "fsck.receipt"),
        (b"[" * 200_000, "fsck.receipt"),
        (b"[]", "fsck.receipt"),
        (b"{}", "fsck.receipt"),
        (b'{"files": []}', "fsck.receipt"),
        (b'{"files": {"mask.nii.gz": 5}}', "fsck.receipt"),
        (b'{"files": {"mask.nii.gz": "abc"}}', "fsck.receipt"),
        (json.dumps({"files": {"../../../../x": "0" * 64}}).encode(), "fsck.outside"),
        (json.dumps({"files": {"/etc/passwd": "0" * 64}}).encode(), "fsck.outside"),
        (json.dumps({"files": {"a\0b": "0" * 64}}).encode(), "fsck.outside"),
    ],
)
def test_a_receipt_that_is_none_stops_nothing(root: Root, content: bytes, code: str) -> None:
    file_of(root, f"{result(root)}/{RECEIPT}").write_bytes(content)
    flip(file_of(root, f"{volume()}/zarr.json"))
    found = codes(root)
    assert (result(root), code) in found
    assert (volume(), "fsck.changed") in found
    assert {key for key, _ in found} == {result(root), volume()}


def test_a_receipt_that_is_a_folder_is_found(root: Root) -> None:
    file_of(root, f"{volume()}/{RECEIPT}").unlink()
    file_of(root, f"{volume()}/{RECEIPT}").mkdir()
    assert codes(root) == [(volume(), "fsck.receipt")]


def test_a_file_outside_is_not_read(root: Root, tmp_path: Path) -> None:
    """A hash of any file of the machine would tell whether it holds what one guesses."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"x")
    file_of(root, f"{volume()}/zarr.json").unlink()
    file_of(root, f"{volume()}/zarr.json").symlink_to(secret)
    checkup = fsck(root, NOW)
    assert [(f.key, f.code) for f in checkup.findings] == [(volume(), "fsck.link"), (volume(), "fsck.missing")]


def test_a_link_in_place_of_a_folder_is_found_and_not_repaired(root: Root, tmp_path: Path) -> None:
    file_of(root, volume()).rename(tmp_path / "moved")
    file_of(root, volume()).symlink_to(tmp_path / "moved")
    findings = fsck(root, LATER).findings
    assert [(f.key, f.code) for f in findings] == [(volume(), "fsck.link")]
    assert [f.done for f in repair(root, findings, LATER)] == [""]
    assert (tmp_path / "moved" / RECEIPT).exists()


# --- what is left over


def test_files_without_a_receipt_are_orphans_when_they_are_old(root: Root) -> None:
    key = result(root)
    file_of(root, f"{key}/{RECEIPT}").unlink()
    rows = f"reports/{COHORT}/{STARTED:%Y-%m-%d_%H%M%S}.parquet"
    assert codes(root, NOW + timedelta(hours=23)) == [(rows, "fsck.no-result")]
    assert codes(root, NOW + timedelta(hours=25)) == [(rows, "fsck.no-result"), (key, "fsck.orphan")]
    os.utime(file_of(root, f"{key}/mask.nii.gz"), ((LATER.timestamp(),) * 2))
    assert codes(root, LATER) == [(rows, "fsck.no-result")], "one young file may be a run at work"


@pytest.mark.parametrize("folder", ["", "nights/liver/", "volumes/", "results/liver/a/"])
def test_half_written_files_are_found_when_they_are_old(root: Root, folder: str) -> None:
    (root.home / f"{folder}.put-abc").write_bytes(b"half")
    assert codes(root, NOW) == []
    assert codes(root, LATER) == [(f"{folder}.put-abc", "fsck.leftover")]


# --- references


def test_an_entry_without_its_private_part_is_found(root: Root) -> None:
    key = f"cohorts/{COHORT}/cases/a.json"
    (root.home / "private" / key).unlink()
    (root.home / "private" / f"cohorts/{COHORT}/cohort.json").unlink()
    assert codes(root) == [(key, "fsck.no-private"), (f"cohorts/{COHORT}/cohort.json", "fsck.no-private")]


def test_a_private_folder_that_is_not_mounted_is_one_finding_and_not_made(root: Root) -> None:
    shutil.rmtree(root.home / "private")
    assert codes(root) == [("cohorts", "fsck.no-private")]
    assert not (root.home / "private").exists()


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b'{"case": {}, "verdict": 1, "fingerprint": null}', b"null"])
def test_an_entry_that_is_none_is_found(root: Root, content: bytes) -> None:
    key = f"cohorts/{COHORT}/cases/a.json"
    root.put(key, content)
    assert codes(root) == [(key, "fsck.entry")]


NIGHT = f"{STARTED:%Y-%m-%d_%H%M%S}"


def test_a_night_without_rows_is_found_unless_it_is_under_way(root: Root) -> None:
    root.delete(f"reports/{COHORT}/{NIGHT}.parquet")
    assert codes(root) == [(f"reports/{COHORT}/{NIGHT}.parquet", "fsck.no-rows")]
    record = f"nights/{COHORT}/{NIGHT}.json"
    root.put_json(record, root.get_json(record) | {"ended": ""})
    assert codes(root) == []


def test_rows_without_a_record_are_found(root: Root) -> None:
    root.delete(f"nights/{COHORT}/{NIGHT}.json")
    assert codes(root) == [(f"nights/{COHORT}/{NIGHT}.json", "fsck.night")]


@pytest.mark.parametrize("content", [b"", b"[]", b'{"cohort": "other"}'])
def test_a_record_that_is_none_is_found(root: Root, content: bytes) -> None:
    root.put(f"nights/{COHORT}/{NIGHT}.json", content)
    assert codes(root) == [(f"nights/{COHORT}/{NIGHT}.json", "fsck.night")]


@pytest.mark.parametrize("fault", [flip, cut, lambda path: path.write_bytes(b"")], ids=["flipped", "cut", "emptied"])
def test_rows_that_cannot_be_read_are_found(root: Root, fault: Callable[[Path], object]) -> None:
    path = file_of(root, f"reports/{COHORT}/{NIGHT}.parquet")
    content = bytearray(path.read_bytes())
    content[-20:] = bytes(20)
    path.write_bytes(content)
    fault(path)
    assert codes(root) == [(f"reports/{COHORT}/{NIGHT}.parquet", "fsck.rows")]


def test_rows_whose_results_are_missing_are_one_finding_of_the_night(root: Root) -> None:
    for case in "ab":
        root.delete(result(root, case))
    (finding,) = fsck(root, NOW).findings
    assert finding.code == "fsck.no-result"
    assert finding.found.startswith("2 of 2 results that its rows name are missing, first results/liver/")


def test_an_alias_that_points_to_nothing_is_found(root: Root) -> None:
    shutil.copytree(file_of(root, "models/organs/v1"), file_of(root, "models/organs/v2"))
    challenge(root, "organs", "v2", "Ada")
    assert codes(root) == []
    root.delete("models/organs/v2")
    assert codes(root) == [("models/organs/history", "fsck.alias")]
    root.put("models/organs/history/000002.json", b"{")
    assert codes(root) == [("models/organs/history", "fsck.alias")]


@pytest.mark.parametrize("key", ["attempts/liver/a.json", "decisions/liver/a/1.json", "questions/mine.json"])
def test_other_json_that_is_none_is_found(root: Root, key: str) -> None:
    root.put(key, b'{"half": ')
    assert codes(root) == [(key, "fsck.json")]


# --- one cohort


def test_a_cohort_is_checked_with_the_volumes_and_models_of_its_results(root: Root) -> None:
    add_night(root, STARTED, [], cohort="other")
    root.put("nights/other/x.json", b"")
    root.put("volumes/unused/zarr.json", b"{}")
    root.seal("volumes/unused", {})
    flip(file_of(root, "volumes/unused/zarr.json"))
    assert codes(root, NOW, cohort=COHORT) == []
    assert fsck(root, NOW, COHORT).objects == 2 + 2 + 1
    flip(file_of(root, f"{volume()}/zarr.json"))
    assert codes(root, NOW, cohort=COHORT) == [(volume(), "fsck.changed")]


# --- repair


def test_repair_takes_away_damaged_volumes_and_results_and_nothing_else(root: Root) -> None:
    faulty = [f"{result(root)}/mask.nii.gz", f"{volume()}/zarr.json", "models/organs/v1/weights.safetensors"]
    for file in faulty:
        flip(file_of(root, file))
    (root.home / "nights" / COHORT / f"{NIGHT}.json").write_bytes(b"")
    root.put("decisions/liver/a/1.json", b"{")
    root.put(f"{result(root, 'b')}/note.txt", b"of a person")
    before, mask = everything(root), result(root)
    findings = fsck(root, LATER).findings
    repaired = repair(root, findings, LATER)
    done = [(mask, "fsck.changed"), (volume(), "fsck.changed")]
    assert [(f.key, f.code) for f in repaired if f.done] == done
    assert {name for name in before if name.startswith((mask, volume()))} == before.keys() - everything(root).keys()
    assert {name: before[name] for name in everything(root)} == everything(root)
    left = {(f.key, f.code) for f in fsck(root, LATER).findings}
    rows = (f"reports/{COHORT}/{NIGHT}.parquet", "fsck.no-result")
    assert left == {(f.key, f.code) for f in repaired if not f.done} | {rows}
    assert len(left) == 5
    again = repair(root, findings, LATER)
    assert [f.done for f in again if f.done] == ["nothing left to do", "nothing left to do"]


@pytest.mark.parametrize("why", ["case gone", "other bytes", "model gone"])
def test_a_damaged_result_that_cannot_be_made_again_stays(root: Root, why: str) -> None:
    key = result(root)
    flip(file_of(root, f"{key}/mask.nii.gz"))
    entry = f"cohorts/{COHORT}/cases/a.json"
    if why == "case gone":
        root.delete(entry)
    elif why == "other bytes":
        mapping = root.get_json(entry)
        mapping["case"]["digest"] = "changed since"
        root.put_json(entry, mapping)
    else:
        root.delete("models/organs/v1")
    findings = [f for f in fsck(root, LATER).findings if f.key == key]
    assert [f.code for f in findings] == ["fsck.changed"]
    assert [f.done for f in repair(root, findings, LATER)] == [""]
    assert file_of(root, f"{key}/{RECEIPT}").exists()


def test_a_result_with_a_broken_receipt_is_repaired_by_what_its_report_says(root: Root) -> None:
    key = result(root)
    file_of(root, f"{key}/{RECEIPT}").write_bytes(b"{")
    assert [f.done != "" for f in repair(root, fsck(root, LATER).findings, LATER)] == [True]
    assert not file_of(root, key).exists()


def test_orphans_are_repaired_and_what_has_healed_meanwhile_is_not_touched(root: Root) -> None:
    file_of(root, f"{volume()}/{RECEIPT}").rename(root.home / "kept")
    findings = fsck(root, LATER).findings
    assert [(f.key, f.code) for f in findings] == [(volume(), "fsck.orphan")]
    (root.home / "kept").rename(file_of(root, f"{volume()}/{RECEIPT}"))
    assert [f.done for f in repair(root, findings, LATER)] == ["nothing left to do"]
    assert root.damaged(volume()) == []
    file_of(root, f"{volume()}/{RECEIPT}").unlink()
    age(root, volume(), NOW)
    assert "removed" in repair(root, fsck(root, LATER).findings, LATER)[0].done
    assert not file_of(root, volume()).exists()
