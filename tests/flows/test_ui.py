"""What a radiology group sees of ``vnet serve`` in the browser: a night's report, forms, runs, schedules."""

import json
import re
import signal
import socket
import statistics
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from tests.conftest import Walkthrough
from tests.flows.browser import (
    call_api,
    open_artifact,
    open_browser,
    run_deployment_from_form,
    screenshot,
    wait_for_run,
)
from tests.flows.server.test_server import gone, until
from tests.walkthrough import environment
from workers.reports.query import Query, query
from workers.storage.store import Root

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser

PHONE = {"width": 390, "height": 844}
DESK = {"width": 1400, "height": 1000}


@dataclass(frozen=True)
class Served:
    """A ``vnet serve`` on a copy of the walkthrough's root."""

    root: Path
    port: int
    process: subprocess.Popen[str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@pytest.fixture(scope="module")
def page() -> Iterator["Page"]:
    with open_browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def served(page: "Page", walkthrough: Walkthrough, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Asks for the browser first: without one, nothing is trained for tests that are skipped."""
    folder = tmp_path_factory.mktemp("serve")
    root = walkthrough.copy_root(folder / "vnet-data")
    (folder / "site.toml").write_text('timezone = "Europe/Berlin"\n')
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = ["vnet", "serve", "--root", root, "--site", folder / "site.toml", "--port", str(port)]
    command += ["--cohort", "tonight", "--model", "organs", "--cron", "0 3 * * *"]
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(command, cwd=folder, env=environment(), text=True, stdout=log, stderr=log) as process,
    ):
        started = Served(root, port, process)
        until(lambda: serves(started) or process.poll() is not None, 90)
        assert process.poll() is None, (folder / "log").read_text("utf-8")
        yield started
        process.terminate()
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()


def serves(served: Served) -> bool:
    """Whether every deployment is there and waits for runs."""
    try:
        found = call_api(served.url, "/deployments/filter", {})
    except OSError:
        return False
    return len(found) == 16 and all(deployment["status"] == "READY" for deployment in found)


def test_the_report_of_the_night_shows_counts_refusals_and_pictures(page: "Page", served: Served) -> None:
    rows = query(Root(served.root), Query(cohorts=("tonight",), nights=1)).rows
    (refused,) = (row for row in rows if row["state"] == "refused")
    cases = {row["case"] for row in rows}
    open_artifact(page, served.url, "night-tonight")
    shown = page.get_by_role("tabpanel", name="Artifact")
    text = shown.inner_text()
    assert f"{len(cases) - 1} of {len(cases) - 1} usable cases have a mask" in text
    assert "1 refused" in text
    assert "qualified person's review" in text
    line = shown.get_by_role("listitem").filter(has_text=refused["case"]).inner_text()
    assert refused["codes"] in line
    assert refused["message"] in line
    pictures = [shown.get_by_alt_text(case, exact=True) for case in cases - {refused["case"]}]
    assert all(picture.evaluate("img => img.naturalWidth > 300") for picture in pictures)
    assert "<" not in text
    screenshot(page, "night")
    page.set_viewport_size(PHONE)
    page.wait_for_timeout(300)
    widths = "[document.documentElement.scrollWidth, ...[...document.querySelectorAll('img')].map(i => i.clientWidth)]"
    assert max(page.evaluate(widths)) <= PHONE["width"]
    screenshot(page, "night-phone")
    page.set_viewport_size(DESK)


def test_the_table_of_volumes_shows_a_row_per_case_and_label(page: "Page", served: Served) -> None:
    artifact = open_artifact(page, served.url, "volumes-tonight")
    rows = json.loads(artifact["data"])
    assert len(rows) == len(query(Root(served.root), Query(cohorts=("tonight",), nights=1)).rows)
    headings = page.get_by_role("columnheader").all_inner_texts()
    assert headings[:6] == ["case", "state", "name", "volume_ml", "change_percent", "flags"]
    first = page.get_by_role("row").nth(1).get_by_role("cell").all_inner_texts()
    assert first[:4] == [str(rows[0][name]) for name in headings[:4]]
    screenshot(page, "volumes")


def test_every_flow_has_a_form_and_the_schedule_its_time_zone(page: "Page", served: Served) -> None:
    page.goto(f"{served.url}/v2/deployments?limit=100")
    page.get_by_role("link", name="query-reports-form").wait_for()
    for flow in ("nightly", "segment-cohort", "preprocess-cohort", "train-model", "query-reports"):
        assert page.get_by_role("link", name=f"{flow}-form", exact=True).is_visible()
    page.get_by_text("At 03:00 AM").hover()
    page.get_by_text("At 03:00 AM (Europe/Berlin)").first.wait_for()
    screenshot(page, "deployments")
    scheduled = call_api(served.url, "/deployments/name/nightly/tonight")
    page.goto(f"{served.url}/v2/deployments/deployment/{scheduled['id']}?tab=Description")
    page.get_by_role("tab", name="Description").click()
    page.get_by_text("Cohort tonight with model organs, at 0 3 * * * in Europe/Berlin time.").wait_for()
    screenshot(page, "deployment-tonight")
    for flow in ("train-model", "segment-cohort", "preprocess-cohort"):
        form = call_api(served.url, f"/deployments/name/{flow}/{flow}-form")
        page.goto(f"{served.url}/v2/deployments/deployment/{form['id']}/run")
        page.get_by_text("name that was given at vnet ingest").wait_for()
        screenshot(page, f"form-{flow}")


def test_volumes_are_asked_for_by_form(page: "Page", served: Served) -> None:
    organs = query(Root(served.root), Query(labels=("organ",), nights=1)).rows
    threshold_ml = round(statistics.median(row["volume_ml"] for row in organs), 3)
    wanted = {(row["cohort"], row["case"]) for row in organs if row["volume_ml"] >= threshold_ml}
    assert 0 < len(wanted) < len(organs)
    run_id = run_deployment_from_form(
        page,
        served.url,
        "query-reports/query-reports-form",
        {"Labels": ["organ"], "Smallest volume (mL)": threshold_ml},
    )
    run = wait_for_run(served.url, run_id, 120)
    assert run["state_name"] == "Completed", run["state"]["message"]
    assert f"{len(wanted)} rows" in run["state"]["message"]
    artifact = open_artifact(page, served.url, "query-reports")
    assert artifact["flow_run_id"] == run_id
    headings = page.get_by_role("columnheader").all_inner_texts()
    cells = [row.get_by_role("cell").all_inner_texts() for row in page.get_by_role("row").all()[1:]]
    answer = [dict(zip(headings, row, strict=True)) for row in cells]
    assert {(row["cohort"], row["case"]) for row in answer} == wanted
    assert {row["name"] for row in answer} == {"organ"}
    assert min(float(row["volume_ml"]) for row in answer) >= threshold_ml
    screenshot(page, "query-answer")
    form = call_api(served.url, "/deployments/name/query-reports/query-reports-form")
    page.goto(f"{served.url}/v2/deployments/deployment/{form['id']}/run")
    page.get_by_text("How many of each cohort, of the days below; 0: all").wait_for()
    screenshot(page, "form-query-reports")


def test_a_night_asked_for_by_form_computes_nothing_again(page: "Page", served: Served) -> None:
    fields = {"cohort": "tonight", "model": "organs", "mask_format": "nifti"}
    run_id = run_deployment_from_form(page, served.url, "nightly/nightly-form", fields)
    run = wait_for_run(served.url, run_id, 120)
    message = run["state"]["message"]
    assert (run["state_type"], run["state_name"]) == ("COMPLETED", "CompletedWithFailures"), message
    assert re.fullmatch(r"[1-9]\d* cached, 1 refused", message)
    page.goto(f"{served.url}/v2/runs/flow-run/{run_id}")
    page.get_by_text("CompletedWithFailures", exact=True).first.wait_for()
    page.get_by_role("tab", name="Details").click()
    page.get_by_text(message, exact=True).first.wait_for()
    screenshot(page, "run")
    assert open_artifact(page, served.url, "night-tonight")["flow_run_id"] == run_id
    assert "Nothing changed." in page.get_by_role("tabpanel", name="Artifact").inner_text()
    screenshot(page, "night-cached")


def test_serving_ends_at_once_and_leaves_nothing(served: Served) -> None:
    family = psutil.Process(served.process.pid).children(recursive=True)
    assert family
    began = time.monotonic()
    served.process.send_signal(signal.SIGTERM)
    assert served.process.wait(30) == 0
    assert time.monotonic() - began < 30
    until(lambda: all(gone(process.pid) for process in family), 5)
    with socket.create_server(("127.0.0.1", served.port)):
        pass
