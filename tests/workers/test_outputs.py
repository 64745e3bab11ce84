"""Files that a command writes where a person has said."""

from pathlib import Path

import pytest

from vnet_core.errors import ConfigError
from workers.outputs import output_folder, write_output


def test_a_file_is_written_whole_or_not_at_all_and_its_folder_made(tmp_path: Path) -> None:
    target = tmp_path / "new" / "rows.csv"
    write_output(target, b"old")
    write_output(target, b"new")
    assert [path.name for path in target.parent.iterdir()] == ["rows.csv"]
    assert target.read_bytes() == b"new"


def test_a_place_that_cannot_be_written_is_named_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for target in (tmp_path / "file" / "rows.csv", tmp_path, Path("/proc/rows.csv")):
        with pytest.raises(ConfigError, match=f"{target} cannot be written.*name another place") as caught:
            write_output(target, b"x")
        assert caught.value.code == "output.unwritable"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_is_made_and_tried(tmp_path: Path) -> None:
    assert output_folder(tmp_path / "a" / "b").is_dir()
    assert list((tmp_path / "a" / "b").iterdir()) == []
    for folder in (tmp_path / "file" / "masks", Path("/proc")):
        (tmp_path / "file").touch()
        with pytest.raises(ConfigError, match=f"{folder} cannot be written") as caught:
            output_folder(folder)
        assert caught.value.code == "output.unwritable"
