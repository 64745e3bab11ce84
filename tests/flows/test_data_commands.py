"""``vnet fetch`` and ``vnet label``: what they print, their documents and exit codes."""

import hashlib
import io
import json
import logging
import shlex
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from flows.cli import main
from tests.web import Site, serving
from vnet_core.geometry import Geometry
from vnet_core.volume import Volume
from workers.annotations import COLUMNS
from workers.datasets import CATALOGUE
from workers.scans import write_volume


@pytest.fixture
def site() -> Iterator[Site]:
    with serving() as served:
        yield served


@pytest.fixture
def vnet(tmp_path, monkeypatch, capsys) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """Run a command in an empty folder; it must not make a storage root there."""
    log = logging.getLogger("vnet")
    handlers, propagate = list(log.handlers), log.propagate
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    yield call
    assert not (tmp_path / "vnet-data").exists()
    log.handlers, log.propagate = handlers, propagate


def archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("scans/imagesTr/a.nii.gz", b"scan")
    return buffer.getvalue()


def test_fetch_without_a_name_lists_what_there_is(vnet):
    code, out, _ = vnet("fetch")
    assert code == 0
    assert all(name in out for name in CATALOGUE)


def test_fetch_prints_the_command_to_type_next(vnet, site):
    site.files["a.zip"] = archive()
    digest = hashlib.sha256(archive()).hexdigest()
    code, out, _ = vnet("fetch", f"{site.url}/a.zip", "--output", "my data", "--sha256", digest)
    assert code == 0
    assert digest in out
    line = out.splitlines()[-1].strip()
    assert shlex.split(line) == ["vnet", "ingest", "my data/scans", "--cohort", "NAME"]
    assert Path("my data/scans/imagesTr/a.nii.gz").read_bytes() == b"scan"


def test_fetch_says_that_nothing_proves_a_file_without_checksum(vnet, site):
    site.files["a.csv"] = b"seriesuid\n"
    code, out, _ = vnet("fetch", f"{site.url}/a.csv", "--json")
    document = json.loads(out)
    assert code == 0
    assert document["cases"][0]["codes"] == ["fetch.unchecked"]
    assert document["cases"][0]["sha256"] == hashlib.sha256(b"seriesuid\n").hexdigest()
    assert document["next"] == ["vnet ingest data/a.csv --cohort NAME"]
    assert "nothing proves it" in vnet("fetch", f"{site.url}/a.csv")[1]


def test_a_failed_fetch_shows_no_next_command_and_ends_with_4(vnet, site):
    site.files["a.zip"] = archive()
    code, out, _ = vnet("fetch", f"{site.url}/a.zip", "--sha256", "0" * 64)
    assert code == 4
    assert "fetch.checksum" in out
    assert hashlib.sha256(archive()).hexdigest() in out
    assert "next:" not in out


def test_a_name_that_is_not_known_is_a_usage_error(vnet):
    code, _, err = vnet("fetch", "hippocampus")
    assert code == 2
    assert "fetch.unknown" in err
    assert "msd-hippocampus" in err


def test_label_spheres_writes_maps_and_a_manifest(vnet, tmp_path):
    (tmp_path / "scans").mkdir()
    geometry = Geometry((20, 20, 20), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0))
    for name in ("a", "b"):
        write_volume(tmp_path / f"scans/{name}.mha", Volume(np.zeros((1, 20, 20, 20), np.int16), geometry))
    rows = [",".join(COLUMNS), "a,10,10,10,10", "b,50,10,10,10"]
    (tmp_path / "table.csv").write_text("\n".join(rows) + "\n")
    arguments = ("label", "spheres", "scans", "--annotations", "table.csv", "--output", "labels", "--hu-min", "-600")
    code, out, _ = vnet(*arguments)
    assert code == 0
    assert out.startswith("1 spheres in 1 scans: 1 warned, 1 computed")
    assert "sphere.outside" in out
    code, out, _ = vnet(*arguments, "--json")
    cases = json.loads(out)["cases"]
    assert [(case["case"], case["state"], case["spheres"]) for case in cases] == [
        ("a", "computed", 1),
        ("b", "warned", 0),
    ]
    assert cases[0]["volume_ml"] == pytest.approx(0.515)
    assert Path("labels/manifest.csv").is_file()


def test_a_table_that_is_not_there_is_a_usage_error(vnet, tmp_path):
    code, _, err = vnet("label", "spheres", tmp_path, "--annotations", "gone.csv", "--output", "labels")
    assert code == 2
    assert "annotations.missing" in err
