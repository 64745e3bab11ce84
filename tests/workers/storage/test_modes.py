"""Files are for their owner alone under any umask, in each kind of process that writes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.walkthrough import REPOSITORY, environment
from workers.storage.modes import let_read, mode_for, own_temporary_folder

BEGINNINGS = {
    "a command": "from flows.cli import main; main(['models', 'describe', 'compact'])",
    "a flow": "from flows.session import open_session; open_session()",
    "a Dask task": """
from workers.preprocess import preprocess_case
from tests.workers.small_root import PLAN, case_of
preprocess_case('root', case_of('a'), PLAN)""",
    "a Ray actor": """
from contextlib import suppress
from vnet_core.errors import VnetError
from workers.segmentation.segment import Segmenter
with suppress(VnetError):
    Segmenter('root', 'none', 1)""",
    "a training worker": """
from contextlib import suppress
from workers.training.seats import fit
from workers.training.run import Run
with suppress(Exception):
    fit(Run('root', 'training/a/v1', {}, {}, {}, {}, [], None, []), None)""",
}
"""What each kind of process of ours begins with; the work itself may fail."""
TOLD = "\nimport os\nopen('plain', 'w').close()\nos.mkdir('folder')\n"


@pytest.mark.parametrize("kind", BEGINNINGS)
def test_a_process_that_begins_under_any_umask_writes_for_its_owner(kind: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BEGINNINGS[kind] + TOLD],
        cwd=tmp_path,
        env=environment() | {"PYTHONPATH": str(REPOSITORY), "VNET_ROOT": str(tmp_path / "root")},
        umask=0,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "plain").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o700


def test_modes_let_read_and_nobody_else_write(tmp_path: Path) -> None:
    for readers, (plain, folder) in {
        "owner": (0o600, 0o700),
        "group": (0o640, 0o750),
        "everyone": (0o644, 0o755),
    }.items():
        assert (mode_for(readers), mode_for(readers, folder=True)) == (plain, folder)
        (tmp_path / "file").touch()
        for path, mode in ((tmp_path / "file", plain), (tmp_path, folder)):
            let_read(path, readers)
            assert path.stat().st_mode & 0o777 == mode


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "file").touch(mode=0o600)
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with pytest.raises(OSError, match="symbolic link"):
        let_read(tmp_path / "link", "everyone")
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600


def test_a_temporary_folder_is_our_own_or_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    first = own_temporary_folder("x")
    assert (first, first.stat().st_mode & 0o777) == (tmp_path / f"x-{os.getuid()}", 0o700)
    assert own_temporary_folder("x") == first
    first.chmod(0o755)
    second = own_temporary_folder("x")
    assert (second != first, second.stat().st_mode & 0o777) == (True, 0o700)
    first.rmdir()
    first.symlink_to(second)
    assert own_temporary_folder("x") not in (first, second)
