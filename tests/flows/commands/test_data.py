"""``vnet fetch``, ``vnet label`` and ``vnet ingest``: what they print, their documents and exit codes."""

import hashlib
import io
import json
import logging
import shlex
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from flows.cli import main
from flows.plans import PlanSource, make_plan
from tests.web import Site, serving
from tests.workers.sources.test_discover import write_series
from tests.workers.test_ingest import label, scan, spoil
from vnet_core.codes import CODES
from vnet_core.errors import ConfigError
from vnet_core.geometry import Geometry
from vnet_core.sections import ReadingPlan
from vnet_core.volume import Volume
from workers.cohort import load_cohort, load_entries
from workers.engines.clusters import Engines
from workers.sources.annotations import COLUMNS
from workers.sources.datasets import CATALOGUE
from workers.sources.scans import write_volume
from workers.storage.store import Root


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


# --- ingest


def test_a_folder_with_one_bad_case_of_each_of_ten_kinds_ends_with_3_and_a_count_of_codes(vnet, tmp_path):
    source = tmp_path / "source"
    for number in range(8):
        scan(source / f"images/good-{number:02}.nii.gz", number)
        label(source / f"labels/good-{number:02}.nii.gz")
    expected = spoil(source / "images", source / "labels")
    (source / "images" / "notes.txt").write_text("nothing of note")
    arguments = ("ingest", source, "--cohort", "c", "--label", "1=organ", "--root", tmp_path / "root")
    code, out, _ = vnet(*arguments, "--json")
    document = json.loads(out)
    assert code == 3
    assert document["counts"] == {"accepted": 8, "refused": 10}
    assert {c["case"]: c["codes"][0] for c in document["cases"] if c["state"] == "refused"} == expected
    rows = {row["code"]: row for row in document["codes"]}
    assert {name: row["cases"] for name, row in rows.items()} == dict(Counter(expected.values()))
    for name, row in rows.items():
        assert (row["state"], row["meaning"], row["remedy"]) == ("refused", CODES[name].meaning, CODES[name].remedy)
    assert document["set_aside"] == {"not-a-scan": 1}
    code, out, _ = vnet(*arguments)
    assert code == 3
    assert out.startswith("cohort c: 8 accepted, 10 refused")
    assert all(f"{name} " in out and CODES[name].remedy in out for name in rows)
    assert "set aside, no cases: 1 not-a-scan" in out


def test_a_code_is_explained_without_a_storage_root(vnet):
    code, out, _ = vnet("ingest", "--explain", "dicom.missing-slices")
    assert code == 0
    assert CODES["dicom.missing-slices"].meaning in out
    assert CODES["dicom.missing-slices"].remedy in out
    code, out, _ = vnet("ingest", "--explain", "all", "--json")
    assert [row["code"] for row in json.loads(out)["codes"]] == list(CODES)
    code, _, err = vnet("ingest", "--explain", "missing-slice")
    assert code == 2
    assert "dicom.missing-slices" in err


def test_ingest_without_source_or_cohort_is_a_usage_error(vnet, tmp_path):
    for arguments in (("ingest",), ("ingest", tmp_path), ("ingest", "--cohort", "c")):
        code, _, err = vnet(*arguments, "--root", tmp_path / "root")
        assert code == 2
        assert "ingest.input" in err


def test_a_plan_says_how_files_are_read_and_which_series_is_which_channel(vnet, tmp_path):
    write_series(tmp_path / "scans/ct", series="1.2.826.0.1.1")
    write_series(tmp_path / "scans/mr", series="1.2.826.0.1.2", modality="MR")
    write_series(tmp_path / "scans/nm", series="1.2.826.0.1.3", modality="NM")
    (tmp_path / "plan.toml").write_text(
        '[[reading.select]]\nchannel = "t1"\nmodality = "MR"\n[[reading.select]]\nchannel = "ct"\nmodality = "CT"\n'
        '[[labels]]\nvalue = 3\nname = "tumour"\n[training]\nsteps_that_are_no_key = 1\n'
    )
    arguments = ("ingest", "scans", "--cohort", "c", "--root", tmp_path / "root")
    code, out, _ = vnet(*arguments, "--plan", "plan.toml", "--json")
    document = json.loads(out)
    assert code == 0, out
    assert document["counts"] == {"accepted": 1}
    assert [rule["channel"] for rule in document["reading"]["select"]] == ["t1", "ct"]
    (left,) = document["not_chosen"]
    assert (left["modality"], left["case"]) == ("NM", document["cases"][0]["case"])
    cohort = load_cohort(Root(tmp_path / "root"), "c")
    assert (cohort.channels, [one.name for one in cohort.labels]) == (("t1", "ct"), ["tumour"])
    again = json.loads(vnet(*arguments, "--json")[1])
    assert again["counts"] == {"accepted": 1}, "the cohort keeps its rules"


def test_a_derived_plan_reads_as_the_cohort_was_read_and_another_one_is_refused(vnet, tmp_path):
    for number in range(2):
        scan(tmp_path / f"scans/images/{number}.nii.gz", number)
        label(tmp_path / f"scans/labels/{number}.nii.gz")
    (tmp_path / "plan.toml").write_text('[reading]\nchannel_grids = "resample"\n')
    assert vnet("ingest", "scans", "--cohort", "c", "--root", tmp_path / "root", "--plan", "plan.toml")[0] == 0
    root = Root(tmp_path / "root")
    cohort, entries = load_cohort(root, "c"), load_entries(root, "c")
    plan = make_plan(root, cohort, entries, PlanSource(), Engines())
    assert plan.reading == cohort.reading != ReadingPlan()
    assert make_plan(root, cohort, entries, PlanSource(), Engines()) == plan, "kept"
    (tmp_path / "other.toml").write_text('[reading]\nchannel_grids = "refuse"\n')
    with pytest.raises(ConfigError) as caught:
        make_plan(root, cohort, entries, PlanSource("other.toml"), Engines())
    assert caught.value.code == "plan.reading"


def test_a_plan_whose_reading_cannot_be_is_a_usage_error(vnet, tmp_path):
    (tmp_path / "plan.toml").write_text('[reading]\ngantry_tilts = "correct"\n')
    code, _, err = vnet("ingest", tmp_path, "--cohort", "c", "--root", tmp_path / "root", "--plan", "plan.toml")
    assert code == 2
    assert "plan.unknown-key" in err
    assert "gantry_tilt" in err
    code, _, err = vnet("ingest", tmp_path, "--cohort", "c", "--root", tmp_path / "root", "--plan", "gone.toml")
    assert code == 2
    assert "plan.missing" in err
