"""The Prefect UI in headless Chromium, as a person uses it: forms, artifacts, screenshots."""

import contextlib
import json
import re
import shutil
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

SCREENSHOTS = Path(__file__).resolve().parents[2] / "screenshots"
EXECUTABLES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-proxy-server",
)
SUBMISSIONS = 3
"""How often a form is sent before its test fails."""
FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


@contextmanager
def open_browser() -> Iterator["Page"]:
    """A page of a fresh browser profile; skips the test where there is no Chromium or no Playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    executable = next(filter(None, map(shutil.which, EXECUTABLES)), None)
    if executable is None:
        pytest.skip(f"no browser: none of {', '.join(EXECUTABLES)} is on PATH")
    with playwright.sync_playwright() as driver, tempfile.TemporaryDirectory() as profile:
        context = driver.chromium.launch_persistent_context(
            profile,
            executable_path=executable,
            args=list(FLAGS),
            headless=True,
            viewport={"width": 1400, "height": 1000},
        )
        page = context.pages[0]
        page.set_default_timeout(30_000)
        yield page
        context.close()


def open_artifact(page: "Page", ui_url: str, key: str) -> dict[str, Any]:
    """Show the newest artifact of a key, its pictures loaded; the artifact as the API gives it."""
    found = {"artifacts": {"key": {"any_": [key]}}, "sort": "CREATED_DESC", "limit": 1}
    artifact = call_api(ui_url, "/artifacts/filter", found)[0]
    page.goto(f"{ui_url}/v2/artifacts/artifact/{artifact['id']}")
    shown = page.get_by_role("tabpanel", name="Artifact")
    shown.locator("table, h1, h2, h3, p, pre, img").first.wait_for()
    page.wait_for_function("[...document.querySelectorAll('[role=tabpanel] img')].every(img => img.complete)")
    return artifact


def run_deployment_from_form(page: "Page", ui_url: str, deployment_name: str, fields: Mapping[str, Any]) -> str:
    """Open the run form of ``flow/deployment``, set the fields by their labels, submit; the id of the flow run."""
    from playwright.sync_api import TimeoutError

    deployment = call_api(ui_url, f"/deployments/name/{deployment_name}")
    page.goto(f"{ui_url}/v2/deployments/deployment/{deployment['id']}/run")
    for label, value in fields.items():
        _set_field(page, label, value)
    run_name = page.get_by_role("textbox", name="Run Name").input_value()
    named = {"flow_runs": {"name": {"any_": [run_name]}, "deployment_id": {"any_": [deployment["id"]]}}}
    for _ in range(SUBMISSIONS):
        page.get_by_role("button", name="Submit").click()
        with contextlib.suppress(TimeoutError):
            page.wait_for_url(re.compile(r"tab=Runs"), timeout=10_000)
        # a busy database refuses a submission now and then, and the form stays as it is
        if runs := call_api(ui_url, "/flow_runs/filter", named):
            return runs[0]["id"]
    raise AssertionError(f"the form of {deployment_name} was not taken in {SUBMISSIONS} submissions")


def wait_for_run(ui_url: str, run_id: str, timeout_s: float = 60) -> dict[str, Any]:
    """The flow run once its state is final."""
    end = time.monotonic() + timeout_s
    while (run := call_api(ui_url, f"/flow_runs/{run_id}"))["state_type"] not in FINAL:
        assert time.monotonic() < end, f"run {run_id} is still {run['state_name']} after {timeout_s:g} s"
        time.sleep(0.2)
    return run


def screenshot(page: "Page", name: str) -> Path:
    """Save what the page shows as ``screenshots/<name>.png``."""
    SCREENSHOTS.mkdir(exist_ok=True)
    path = SCREENSHOTS / f"{name}.png"
    page.screenshot(path=path, full_page=True)
    return path


def call_api(ui_url: str, path: str, body: Any = None) -> Any:
    """GET, or POST with a JSON body, on the API behind the UI."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{ui_url}/api{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)


def _set_field(page: "Page", label: str, value: Any) -> None:
    """Set one field of a run form by the kind of control that it is."""
    exact = re.compile(rf"^{re.escape(label)}( \(Optional\))?$")
    box = (
        page.locator("label[data-slot=label]")
        .filter(has_text=exact)
        .locator("xpath=ancestor::div[fieldset][1]/fieldset")
    )
    box.wait_for()
    tabs = box.locator("xpath=./div[@data-slot='tabs']/div[@role='tablist']").get_by_role("tab")
    if tabs.count():  # one tab per type of a union, such as int and None
        names = tabs.all_inner_texts()
        tabs.nth(next(i for i, name in enumerate(names) if (name == "None") == (value is None))).click()
    if value is None:
        return
    choice = box.locator("button[aria-haspopup=listbox]")
    if choice.count():
        _choose(page, box, choice, value)
    elif isinstance(value, bool):
        box.get_by_role("switch").set_checked(value)
    elif isinstance(value, list):
        for item in value:
            box.get_by_role("button", name="Add item").click()
            box.locator("textarea, input").last.fill(str(item))
    else:
        box.locator("textarea, input").fill(str(value))


def _choose(page: "Page", box: "Locator", choice: "Locator", value: Any) -> None:
    """Pick one option, or of a list with several exactly those in ``value``."""
    if isinstance(value, list):
        tags = box.get_by_role("button", name=re.compile(r"^Remove .* tag$"))
        while tags.count():
            tags.first.click()
    for option in value if isinstance(value, list) else [value]:
        if choice.get_attribute("aria-expanded") != "true":
            choice.click()
        page.get_by_role("option", name=str(option), exact=True).click()
    if choice.get_attribute("aria-expanded") == "true":
        page.keyboard.press("Escape")
    page.get_by_role("listbox").wait_for(state="hidden")
