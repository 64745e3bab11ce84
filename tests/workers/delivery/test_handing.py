"""What is delivered is whole, what may not be read is taken away, and what others have put there stays."""

import csv
import json
import os
import stat
from pathlib import Path

import pytest

from tests.files import file_of
from vnet_core.errors import ConfigError, StorageError
from workers.delivery import handing as delivery
from workers.delivery.handing import Delivered, deliver
from workers.nights.decisions import Decision, record
from workers.nights.record import Night
from workers.storage.store import Root, file_digest

NIGHT = Night("2026-11-23_010000", "liver", "liver@v1", "2026-11-23T01:00:00+00:00")
NEXT = Night("2026-11-24_010000", "liver", "liver@v1", "2026-11-24T01:00:00+00:00")


@pytest.fixture
def root(tmp_path) -> Root:
    return Root(tmp_path / "root")


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "out" / "liver"


def result(root: Root, case: str, key: str = "1", content: bytes = b"mask", name: str = "mask.nii.gz") -> str:
    """A finished result whose mask is ``content``, or a folder of two files when its name is that of an OME-Zarr."""
    prefix = f"results/liver/{case}/{key}"
    for part in ["/zarr.json", "/0/c"] if name.endswith(".zarr") else [""]:
        root.put(f"{prefix}/{name}{part}", content + part.encode())
    root.put_json(f"{prefix}/report.json", {"mask": name})
    root.seal(prefix, {})
    return prefix


def rows(*found: tuple[str, str, str]) -> list[dict]:
    """Two labels per ``(case, result, review)``."""
    return [
        {"case": case, "result": key, "review": review, "name": name, "volume_ml": volume, "model": "liver@v1"}
        for case, key, review in found
        for name, volume in (("liver", 1500.0), ("=tumour", 2.5))
    ]


def send(root: Root, folder: Path, *found: tuple[str, str, str], night: Night = NIGHT) -> Delivered:
    return deliver(root, night, rows(*found), str(folder.parent))


def visible(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".delivered")}


INDEX = {"delivered.json", "delivered.csv"}


def test_finished_masks_are_copied_and_those_that_wait_are_not(root, folder):
    keys = {case: result(root, case, content=case.encode()) for case in "abcde"}
    reviews = {"a": "", "b": "accepted", "c": "awaiting", "d": "rejected", "e": "training"}
    failed = {"case": "f", "result": None, "review": None, "name": None, "volume_ml": None, "model": "liver@v1"}
    found = [*rows(*((case, keys[case], reviews[case]) for case in keys)), failed]
    done = deliver(root, NIGHT, found, str(folder.parent))
    assert (done.written, done.held, done.removed, done.left) == (("a", "b"), ("c", "d", "e"), (), ())
    assert visible(folder) == {"a.nii.gz", "b.nii.gz"} | INDEX
    assert (folder / "a.nii.gz").read_bytes() == b"a"
    mask = json.loads((folder / "delivered.json").read_text("utf-8"))["masks"][1]
    assert mask["file"] == "b.nii.gz"
    assert mask["volumes_ml"] == {"liver": 1500.0, "=tumour": 2.5}
    assert (mask["model"], mask["result"], mask["night"], mask["review"]) == (
        "liver@v1",
        keys["b"],
        NIGHT.id,
        "accepted",
    )
    assert mask["sha256"] == file_digest(folder / "b.nii.gz")
    with (folder / "delivered.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [(row["case"], row["volume_ml liver"], row["volume_ml =tumour"]) for row in table] == [
        ("a", "1500.0", "2.5"),
        ("b", "1500.0", "2.5"),
    ]


def modes(folder: Path) -> dict[str, str]:
    return {path.name: f"{path.stat().st_mode & 0o777:04o}" for path in (folder, *folder.rglob("*"))}


@pytest.mark.parametrize(("first", "second"), [("owner", "everyone"), ("group", "owner")])
def test_readers_are_those_that_the_rule_names_whatever_the_umask(root, folder, first, second):
    """0600 and 0700 for the owner, 0640 and 0750 for the group, 0644 and 0755 for everyone; the lock is the owner's."""
    expected = {"owner": ("0600", "0700"), "group": ("0640", "0750"), "everyone": ("0644", "0755")}
    found = rows(("a", result(root, "a"), ""), ("b", result(root, "b", name="mask.ome.zarr"), ""))
    for umask, readers in ((0o000, first), (0o077, second)):
        before = os.umask(umask)
        try:
            done = deliver(root, NIGHT, found, str(folder.parent), readers)
        finally:
            os.umask(before)
        plain, place = expected[readers]
        folders = dict.fromkeys(("liver", "b.ome.zarr", "0"), expected[first][1]) | dict.fromkeys(
            ("b.ome.zarr", "0"), place
        )
        files = dict.fromkeys(("a.nii.gz", "zarr.json", "c", "delivered.csv", "delivered.json"), plain)
        assert modes(folder) == folders | files | {".delivered.lock": "0600"}
        assert done.left == ()
    assert (done.written, done.unchanged) == ((), 2)


def test_a_mask_that_is_gone_keeps_no_other_from_being_delivered(root, folder):
    keys = {case: result(root, case) for case in "abcd"}
    root.delete(f"{keys['a']}/receipt.json")
    root.put(f"{keys['b']}/report.json", b"half")
    root.delete(f"{keys['c']}/mask.nii.gz")
    done = send(root, folder, *((case, key, "") for case, key in keys.items()))
    assert (done.damaged, done.written) == (("a", "b", "c"), ("d",))
    assert visible(folder) == {"d.nii.gz"} | INDEX


def test_what_lies_there_is_not_written_again(root, folder):
    key = result(root, "a")
    send(root, folder, ("a", key, ""))
    before = {name: (folder / name).stat().st_ino for name in visible(folder)}
    done = send(root, folder, ("a", key, ""), night=NEXT)
    assert (done.written, done.unchanged) == ((), 1)
    assert {name: (folder / name).stat().st_ino for name in visible(folder)} == before


def test_a_new_mask_replaces_the_old_one(root, folder):
    send(root, folder, ("a", result(root, "a", content=b"old"), ""))
    done = send(root, folder, ("a", result(root, "a", "2", content=b"new"), ""), night=NEXT)
    assert done.written == ("a",)
    assert (folder / "a.nii.gz").read_bytes() == b"new"
    (mask,) = json.loads((folder / "delivered.json").read_text("utf-8"))["masks"]
    assert (mask["result"], mask["night"]) == ("results/liver/a/2", NEXT.id)


@pytest.mark.parametrize("review", ["rejected", "awaiting", "training"])
@pytest.mark.parametrize("name", ["mask.nii.gz", "mask.ome.zarr"])
def test_a_delivered_mask_that_may_no_longer_be_read_is_taken_away(root, folder, review, name):
    key, other = result(root, "a", name=name), result(root, "b")
    send(root, folder, ("a", key, ""), ("b", other, ""))
    assert f"a{name.removeprefix('mask')}" in visible(folder)
    done = send(root, folder, ("a", key, review), ("b", other, ""))
    assert (done.removed, done.held, done.unchanged) == (("a",), ("a",), 1)
    assert visible(folder) == {"b.nii.gz"} | INDEX
    assert [mask["case"] for mask in json.loads((folder / "delivered.json").read_text("utf-8"))["masks"]] == ["b"]


def test_a_rejected_mask_goes_also_when_its_case_has_a_new_one_that_waits_or_none(root, folder):
    old, gone = result(root, "a"), result(root, "b")
    send(root, folder, ("a", old, ""), ("b", gone, ""))
    # an accepted mask of earlier bytes stays until the new one is decided about
    done = send(root, folder, ("a", result(root, "a", "2"), "awaiting"))
    assert (done.removed, done.held) == ((), ("a",))
    assert visible(folder) == {"a.nii.gz", "b.nii.gz"} | INDEX
    for case, key in (("a", old), ("b", gone)):
        record(root, "liver", Decision(case, key, "reject", "Dr. Ada", "2026-11-24T07:00:00+00:00", NIGHT.id))
    done = send(root, folder, ("a", "results/liver/a/2", "awaiting"))
    assert done.removed == ("a", "b")
    assert visible(folder) == INDEX


def test_an_ome_zarr_is_copied_as_a_folder_and_replaced(root, folder):
    key = result(root, "a", name="mask.ome.zarr")
    assert send(root, folder, ("a", key, "")).written == ("a",)
    assert (folder / "a.ome.zarr" / "0" / "c").read_bytes() == b"mask/0/c"
    assert send(root, folder, ("a", key, "")).unchanged == 1
    newer = result(root, "a", "2", content=b"new", name="mask.ome.zarr")
    assert send(root, folder, ("a", newer, "")).written == ("a",)
    assert (folder / "a.ome.zarr" / "zarr.json").read_bytes() == b"new/zarr.json"
    assert visible(folder) == {"a.ome.zarr"} | INDEX


def test_a_mask_that_is_not_what_its_receipt_says_is_not_delivered(root, folder):
    key = result(root, "a")
    file_of(root, f"{key}/mask.nii.gz").write_bytes(b"flip")
    assert send(root, folder, ("a", key, "")).damaged == ("a",)
    assert visible(folder) == INDEX


# --- what others have put there


def test_files_of_others_and_changed_ones_are_left_alone(root, folder):
    folder.mkdir(parents=True)
    (folder / "a.nii.gz").write_bytes(b"not ours")
    (folder / "notes.txt").write_text("keep")
    keys = {case: result(root, case) for case in "ab"}
    done = send(root, folder, *((case, key, "") for case, key in keys.items()))
    assert (done.written, done.left) == (("b",), ("a",))
    (folder / "b.nii.gz").write_bytes(b"edited by hand")
    done = send(root, folder, ("a", keys["a"], "rejected"), ("b", keys["b"], "rejected"))
    assert (done.removed, done.left) == ((), ("b",))
    assert (folder / "a.nii.gz").read_bytes() == b"not ours"
    assert (folder / "b.nii.gz").read_bytes() == b"edited by hand"
    assert (folder / "notes.txt").read_text("utf-8") == "keep"


@pytest.mark.parametrize("kind", ["link", "dangling", "folder-link", "fifo", "folder"])
def test_nothing_is_written_through_what_lies_in_a_masks_place(root, folder, tmp_path, kind):
    folder.mkdir(parents=True)
    precious = tmp_path / "precious"
    precious.write_bytes(b"mask")  # the same bytes as the mask
    (tmp_path / "elsewhere").mkdir()
    place = folder / "a.nii.gz"
    if kind == "fifo":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    else:
        place.symlink_to({"link": precious, "dangling": tmp_path / "nothing"}.get(kind, tmp_path / "elsewhere"))
    before = stat.S_IFMT(place.lstat().st_mode)
    key = result(root, "a", content=b"new mask")
    for review in ("", "rejected"):
        done = send(root, folder, ("a", key, review))
        assert (done.written, done.removed, done.left) == ((), (), ("a",) if not review else ())
    assert stat.S_IFMT(place.lstat().st_mode) == before
    assert precious.read_bytes() == b"mask"
    assert not (tmp_path / "nothing").exists()


def test_a_link_in_place_of_a_delivered_mask_is_not_ours_to_remove(root, folder, tmp_path):
    key = result(root, "a")
    send(root, folder, ("a", key, ""))
    (tmp_path / "same").write_bytes(b"mask")
    (folder / "a.nii.gz").unlink()
    (folder / "a.nii.gz").symlink_to(tmp_path / "same")
    done = send(root, folder, ("a", key, "rejected"))
    assert (done.removed, done.left) == ((), ("a",))
    assert (folder / "a.nii.gz").is_symlink()


def test_the_cohorts_place_may_not_be_a_link(root, folder, tmp_path):
    folder.parent.mkdir()
    (tmp_path / "elsewhere").mkdir()
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError) as caught:
        send(root, folder, ("a", result(root, "a"), ""))
    assert caught.value.code == "deliver.foreign"
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"format": "vnet-delivery-1"}',
        json.dumps(
            {
                "format": "vnet-delivery-1",
                "writing": {},
                "masks": [
                    {
                        "file": "../precious",
                        "case": "a",
                        "model": "m",
                        "result": "r",
                        "sha256": "",
                        "night": "n",
                        "volumes_ml": {},
                        "review": "",
                        "stamp": "",
                    }
                ],
            }
        ),
        json.dumps({"format": "vnet-delivery-1", "writing": {"../precious": ""}, "masks": []}),
    ],
)
def test_an_index_that_is_not_ours_stops_the_delivery(root, folder, content):
    folder.mkdir(parents=True)
    (folder.parent / "precious").write_bytes(b"")
    (folder / "delivered.json").write_text(content)
    with pytest.raises(StorageError) as caught:
        send(root, folder, ("a", result(root, "a"), ""))
    assert caught.value.code == "deliver.foreign"
    assert (folder / "delivered.json").read_text("utf-8") == content
    assert (folder.parent / "precious").exists()


def test_a_sheet_of_others_is_not_replaced_and_ours_is(root, folder):
    folder.mkdir(parents=True)
    (folder / "delivered.csv").write_text("case,mL\na,1\n")
    key = result(root, "a")
    with pytest.raises(StorageError) as caught:
        send(root, folder, ("a", key, ""))
    assert caught.value.code == "deliver.foreign"
    (folder / "delivered.csv").unlink()
    send(root, folder, ("a", key, ""))
    (folder / "delivered.json").unlink()  # as the remedy for a damaged index says
    done = send(root, folder, ("a", key, ""))
    assert (done.written, done.unchanged) == ((), 1)


@pytest.mark.parametrize("where", ["relative", "root"])
def test_a_folder_that_cannot_be_meant_is_refused(root, where):
    with pytest.raises(ConfigError) as caught:
        deliver(root, NIGHT, [], "masks" if where == "relative" else str(root.home / "masks"))
    assert caught.value.code == "deliver.folder"


def test_a_folder_that_cannot_be_written_is_told(root, folder):
    folder.parent.parent.mkdir(exist_ok=True)
    folder.parent.write_text("a file")
    with pytest.raises(StorageError) as caught:
        send(root, folder)
    assert caught.value.code == "deliver.unwritable"


# --- ends of the process


@pytest.mark.parametrize(
    ("place", "call"), [("_copy_file", 2), ("_name", 2), ("sync_folder", 1), ("announce", 1), ("write_index", 1)]
)
@pytest.mark.parametrize("name", ["mask.nii.gz", "mask.ome.zarr"])
def test_whatever_ends_it_the_next_delivery_finishes_with_the_same_files(root, folder, monkeypatch, place, call, name):
    keys = [result(root, case, content=b"old " + case.encode(), name=name) for case in "ab"]
    send(root, folder, *zip("ab", keys, ["", ""], strict=True))
    newer = [result(root, case, "2", content=b"new " + case.encode(), name=name) for case in "ab"]
    real = getattr(delivery, place)
    calls = []

    def dies(*arguments):
        calls.append(arguments)
        if len(calls) == call:
            os._exit(9)
        return real(*arguments)

    child = os.fork()
    if child == 0:
        monkeypatch.setattr(delivery, place, dies)
        send(root, folder, *zip("ab", newer, ["", ""], strict=True))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    for case in "ab":  # old or new, never a part of one
        path = folder / f"{case}{name.removeprefix('mask')}"
        parts = [path] if name.endswith("gz") else [path / "zarr.json", path / "0" / "c"]
        assert len({part.read_bytes()[:3] for part in parts}) == 1
    done = send(root, folder, *zip("ab", newer, ["", ""], strict=True))
    assert done.left == ()
    suffix = name.removeprefix("mask")
    assert visible(folder) == {f"a{suffix}", f"b{suffix}"} | INDEX
    for case, key in zip("ab", newer, strict=True):
        mask = next(m for m in json.loads((folder / "delivered.json").read_text("utf-8"))["masks"] if m["case"] == case)
        assert mask["result"] == key
    assert json.loads((folder / "delivered.json").read_text("utf-8"))["writing"] == {}
