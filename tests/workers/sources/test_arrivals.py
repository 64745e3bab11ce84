"""Files that arrive: the digest of a tree, and when a change counts as whole."""

import os
from pathlib import Path
from typing import Any

import pytest

from workers.sources.arrivals import Debounce, snapshot


def test_a_file_that_comes_grows_is_touched_or_goes_changes_the_snapshot(tmp_path: Path) -> None:
    def changed() -> bool:
        nonlocal before
        before, after = snapshot([tmp_path]), before
        return before != after

    before = snapshot([tmp_path])
    assert not changed()
    scan = tmp_path / "a" / "scan.nii"
    scan.parent.mkdir()
    scan.write_bytes(b"one")
    assert changed()
    assert not changed()
    scan.write_bytes(b"one more")
    assert changed()
    os.utime(scan, ns=(0, 1_000_000_000))
    assert changed()
    scan.rename(scan.with_name("other.nii"))
    assert changed()
    scan.with_name("other.nii").unlink()
    assert changed()


def test_a_source_may_be_a_file_or_missing(tmp_path: Path) -> None:
    table = tmp_path / "cohort.csv"
    missing = snapshot([table])
    table.write_text("id,image\n")
    there = snapshot([table])
    assert missing != there
    assert snapshot([]) != snapshot([tmp_path / "none"])
    table.write_text("id,image\na,b\n")
    assert snapshot([table]) != there


def test_links_are_not_followed_and_the_storage_root_is_left_out(tmp_path: Path) -> None:
    sources, outside, root = tmp_path / "scans", tmp_path / "outside", tmp_path / "scans" / "vnet-data"
    for folder in (sources, outside, root):
        folder.mkdir()
    (sources / "link").symlink_to(outside)
    (sources / "circle").symlink_to(sources)
    (sources / "dangling").symlink_to(tmp_path / "nothing")
    before = snapshot([sources], without=root)
    (outside / "far.nii").write_bytes(b"far")
    (root / "mask.nii").write_bytes(b"mask")
    assert snapshot([sources], without=root) == before
    assert snapshot([sources]) != before
    # a source that is itself a link is what the user has named
    linked = tmp_path / "linked"
    linked.symlink_to(outside)
    seen = snapshot([linked])
    (outside / "near.nii").write_bytes(b"near")
    assert snapshot([linked]) != seen


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_counts_as_empty(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    assert snapshot([tmp_path]) == snapshot([tmp_path])


def test_every_folder_is_listed_once_and_no_file_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a look at a large tree costs, without a clock."""
    folders = [tmp_path, *(tmp_path / str(folder) for folder in range(20))]
    for folder in folders:
        folder.mkdir(exist_ok=True)
        for name in range(10):
            (folder / f"{name}.nii").touch()
    before, listed, scandir = snapshot([tmp_path]), [], os.scandir

    def listing(path: str) -> Any:
        listed.append(path)
        return scandir(path)

    def opening(*arguments: object) -> None:
        raise AssertionError(f"opened: {arguments}")

    monkeypatch.setattr(os, "scandir", listing)
    monkeypatch.setattr(os, "open", opening)
    monkeypatch.setattr("builtins.open", opening)
    assert snapshot([tmp_path]) == before
    assert sorted(listed) == sorted(map(str, folders))


def test_a_change_is_told_once_and_only_when_it_has_rested() -> None:
    settled = Debounce(quiet_s=10)
    told = [settled(state, now) for now, state in enumerate("aaabbbbbbbbbbbbbbb")]
    # b is first seen at 3, has lasted 10 s at 13
    assert [now for now, fires in enumerate(told) if fires] == [13]


def test_a_file_that_grows_keeps_it_waiting_and_later_arrivals_are_told_again() -> None:
    settled = Debounce(quiet_s=10)
    shown = [(0, "a"), (5, "b"), (12, "c"), (21, "c"), (22, "c"), (40, "c"), (41, "d"), (50, "d"), (51, "d"), (99, "d")]
    assert [now for now, state in shown if settled(state, now)] == [22, 51]


def test_a_change_that_is_taken_back_is_not_told() -> None:
    settled = Debounce(quiet_s=10)
    assert not any(settled(state, now) for now, state in [(0, "a"), (1, "b"), (2, "a"), (50, "a"), (99, "a")])
