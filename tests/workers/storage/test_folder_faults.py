"""Disks that err, and the order of writes that a power cut needs, seen by the system's own calls."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.walkthrough import REPOSITORY
from workers.storage.store import Root

PUTS = """
import os, sys
from vnet_core.errors import StorageError
from workers.storage.store import Root
root, told = Root(sys.argv[1]), {}
for number in range(400):
    try:
        root.put(f"a/{number:04d}", b"%d" % number * 500)
        said = "done"
    except StorageError as error:
        said = error.code
    except OSError as error:
        said = f"errno {error.errno}"
    told.setdefault(said, []).append(number)
text = repr(told).encode()
while text:  # this too may be hit
    try:
        text = text[os.write(1, text):]
    except OSError:
        continue
os._exit(0)
"""


@pytest.mark.faults
@pytest.mark.fault("F12")
@pytest.mark.parametrize(("number", "name"), [(5, "errno 5"), (122, "store.full")], ids=["EIO", "EDQUOT"])
def test_a_disk_that_errs_now_and_then_keeps_what_was_acknowledged(
    tmp_path: Path, number: int, name: str, record_property
) -> None:
    if not shutil.which("fiu-run"):
        pytest.skip("fiu-run is not here (Debian: fiu-utils)")
    root = Root(tmp_path / "root")
    root.put("a/first", b"x")
    faults = [
        f"enable_random name=posix/io/{call},probability=0.05,failinfo={number}" for call in ("rw/write", "sync/fsync")
    ]
    options = [part for fault in faults for part in ("-c", fault)]
    done = subprocess.run(
        ["fiu-run", "-x", *options, sys.executable, "-c", PUTS, str(root.home)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    told = ast.literal_eval(done.stdout.splitlines()[-1])
    assert told.keys() == {"done", name}
    assert len(told[name]) > 5
    for kept in told["done"]:
        assert root.get(f"a/{kept:04d}") == b"%d" % kept * 500
    for failed in told[name]:
        # its name may stand where only the last fsync failed, but then with all of its bytes
        assert not root.exists(f"a/{failed:04d}") or root.get(f"a/{failed:04d}") == b"%d" % failed * 500
    assert list(root.place.leftovers()) == []
    record_property(
        "seen", f"{len(told[name])} of 400 writes were refused with {name}; nothing torn, nothing left over"
    )


SEAL = """
import sys
import numpy as np
from workers.storage.arrays import write_arrays
from workers.storage.store import Root
root = Root(sys.argv[1])
write_arrays(root, "volumes/a", {"image": np.ones((1, 8, 8, 8), np.float32)}, {})
print("sealing", flush=True)
root.seal("volumes/a", {})
"""


@pytest.mark.fault("F22")
def test_every_byte_of_a_result_is_on_the_disk_before_its_receipt_has_its_name(tmp_path: Path, record_property) -> None:
    if not shutil.which("strace"):
        pytest.skip("strace is not here")
    trace = tmp_path / "trace"
    calls = "fsync,fdatasync,rename,renameat,renameat2,link,linkat"
    done = subprocess.run(
        ["strace", "-f", "-y", "-e", f"trace={calls}", "-o", trace, sys.executable, "-c", SEAL, tmp_path / "root"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    if "ptrace" in done.stderr:
        pytest.skip(f"strace may not trace here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "root" / "volumes" / "a"
    lines = trace.read_text("utf-8").splitlines()
    (published,) = [i for i, line in enumerate(lines) if "rename" in line and f'"{folder}/receipt.json"' in line]
    synced = [m[1] for line in lines[:published] if (m := re.search(r"f(?:data)?sync\(\d+<([^>]+)>\) += 0", line))]
    assert set(Root(tmp_path / "root").get_json("volumes/a/receipt.json")["files"]) == {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "receipt.json"
    }
    for path in folder.rglob("*"):
        if path.name != "receipt.json":
            assert str(path) in synced, path
    assert str(folder) in synced
    # the receipt's own bytes, and after its name the folder that holds it
    assert ".put-" in synced[-1]
    after = [line for line in lines[published:] if f"<{folder}>" in line and "fsync" in line]
    assert after
    record_property("seen", f"{len(synced)} fsync of files and folders, then the name of the receipt, then its folder")
