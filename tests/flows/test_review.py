"""The gate: a run asks, is gone while it waits, and goes on with the answers; and the same from the command line."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.error import HTTPError

import psutil
import pytest
import safetensors.torch
from prefect import flow, get_client
from prefect.client.schemas.objects import State
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Completed

from flows.cli import main
from flows.review import LATER, MOST_CASES, answered, apply, collect, gate, mirrorable, newest_rows
from flows.server.process import ServerProcess, start_server
from flows.session import Session, open_session
from tests.flows.browser import _set_field as set_field
from tests.flows.browser import call_api, open_browser, screenshot, wait_for_run
from tests.flows.server.test_server import environment, until
from tests.pickles import pickles
from tests.workers.delivery.test_corrections import PLAN, corrected, mask_values, scan
from tests.workers.known_model import known_network
from workers.cohort import load_entries
from workers.delivery.handing import deliver
from workers.dicom.derived import Algorithm
from workers.ingest import ingest
from workers.ledger import Outcome
from workers.nights.decisions import decisions, mirrored
from workers.nights.record import Night, load_night
from workers.registry.models import Target, publish
from workers.reports.report import read_rows, write_night
from workers.segmentation.masks import Mask, publish_mask
from workers.segmentation.segment import Job, key_of, plan_of
from workers.settings.site import Site
from workers.storage.store import Root

NIGHT = Night("2026-11-23_010000", "liver", "known@v1", "2026-11-23T01:00:00+00:00", counts={"computed": 23})
FLAGGED = [f"f{number:02d}" for number in range(MOST_CASES + 1)]
PLAIN = ["p1", "p2"]
SERVE = """
import os
from prefect.flows import EntrypointType
from flows.review import review_cases
from flows.schedules.serving import serve_until_stopped
from tests.flows.test_review import gated
found = [flow.to_deployment("local", entrypoint_type=EntrypointType.MODULE_PATH) for flow in (gated, review_cases)]
serve_until_stopped(found, os.environ["PREFECT_API_URL"])
"""


@flow(name="sample-gated")
def gated(cohort: str) -> State[Any]:
    """A night whose cases were all computed before; each time it begins, it says so in the file ``begun``."""
    session = open_session()
    with (session.root.home / "begun").open("a") as told:
        told.write(f"{os.getpid()}\n")
    answer = answered(session)
    if answer is not None:
        return apply(session, answer)
    night, rows = newest_rows(session.root, cohort)
    gate(session, night, rows)
    return Completed(message="nobody was asked")


def night_of(root: Root, folder: Path, cases: list[str], **rules: str) -> dict[str, str]:
    """A cohort, a model and a night; masks of cases whose name begins with f touch the border. Keys by case."""
    for number, case in enumerate(cases):
        scan(folder / "scans", case, number)
    with ThreadPoolExecutor(1) as executor:
        ingest(root, "liver", [str(folder / "scans")], executor)
    weights = safetensors.torch.save(known_network(PLAN).state_dict())
    model = publish(root, Target("known", "v1", PLAN), [weights], {}, {})
    entries, keys = load_entries(root, "liver"), {}
    for entry in entries:
        values = mask_values()
        if entry.case.id.startswith("f"):
            values[0, 0, 0] = 2
        keys[entry.case.id] = key = key_of(Job("liver", entry.case, "nifti"), model)
        provenance = {"model": "known@v1", "plan_digest": PLAN.digest, "volume": "volumes/none"}
        publish_mask(root, key, Mask(entry.case, values, PLAN, "nifti", Algorithm("known@v1", "0"), provenance))
    night = replace(NIGHT, rules={"review": "flagged", **rules})
    root.put_json(f"nights/liver/{night.id}.json", {name: getattr(night, name) for name in Night.__slots__})
    outcomes = [Outcome(case, "segment", "computed", key=key) for case, key in keys.items()]
    rows = write_night(root, night, outcomes, entries)
    if night.rules.get("deliver"):
        deliver(root, night, rows, night.rules["deliver"])
    return keys


def reviews_of(root: Root) -> dict[str, str]:
    """The column ``review`` by case."""
    return {row["case"]: row["review"] for row in read_rows(root, "liver", NIGHT.id)}


# --- with a server


@dataclass(frozen=True)
class Place:
    """A storage root whose night waits for a review, and the server and process that run its flows."""

    root: Root
    keys: Mapping[str, str]
    delivered: Path
    server: ServerProcess
    serving: subprocess.Popen[bytes]

    def call(self, path: str, body: Any = None) -> Any:
        """What the API answers; again while its database is busy, as Prefect's own client does."""

        def answer() -> tuple[Any] | None:
            try:
                return (call_api(self.server.url, path, body),)
            except HTTPError as error:
                if error.code != 503:
                    raise
                return None

        return until(answer, 60)[0]

    def start(self, name: str, **parameters: Any) -> str:
        """Id of a new run of a deployment."""
        deployment = self.call(f"/deployments/name/{name}/local")["id"]
        return self.call(f"/deployments/{deployment}/create_flow_run", {"parameters": parameters})["id"]

    def suspended(self, run: str) -> dict[str, Any]:
        """The run once it waits and its process is gone."""

        def found() -> dict[str, Any] | None:
            told = self.call(f"/flow_runs/{run}")
            assert told["state_type"] not in ("FAILED", "CRASHED", "COMPLETED", "CANCELLED"), told["state"]
            return told if told["state_type"] == "PAUSED" else None

        told = until(found, 180)
        until(lambda: not psutil.Process(self.serving.pid).children(), 60)
        return told

    def form(self, run: Mapping[str, Any], part: str) -> Any:
        key = run["state"]["state_details"]["run_input_keyset"][part]
        return self.call(f"/flow_runs/{run['id']}/input/{key}")

    def send(self, run: str, **values: str) -> dict[str, Any]:
        return self.call(f"/flow_runs/{run}/resume", {"run_input": values})

    @property
    def begun(self) -> list[str]:
        return (self.root.home / "begun").read_text("utf-8").split()


@pytest.fixture(scope="module")
def place(prefect_home: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("review")
    root = Root(folder / "root")
    keys = night_of(root, folder, [*FLAGGED, *PLAIN], deliver=str(folder / "out"))
    with start_server(prefect_home(folder / "home"), 0) as server:
        env = environment(folder / "home", PREFECT_API_URL=server.api_url, VNET_ROOT=str(root.home))
        env.pop("VNET_SITE", None)
        with (
            (folder / "log").open("wb") as log,
            subprocess.Popen([sys.executable, "-c", SERVE], cwd=folder, env=env, stdout=log, stderr=log) as serving,
        ):
            ready = lambda: len(call_api(server.url, "/deployments/filter", {})) == 2  # noqa: E731
            until(lambda: ready() or serving.poll() is not None, 180)
            assert serving.poll() is None, (folder / "log").read_text("utf-8")
            yield Place(root, keys, folder / "out" / "liver", server, serving)
            serving.send_signal(signal.SIGTERM)
            serving.wait(40)


def test_a_run_asks_is_gone_while_it_waits_and_goes_on_with_the_answers(place: Place) -> None:
    root = place.root
    assert {path.name for path in place.delivered.glob("*.nii.gz")} == {"p1.nii.gz", "p2.nii.gz"}
    run = place.start("sample-gated", cohort="liver")
    waiting = place.suspended(run)
    assert waiting["state_name"] == "Suspended"
    schema = place.form(waiting, "schema")
    fields = schema["properties"]
    assert schema["required"] == ["reviewer"]
    assert [field.get("title") for field in fields.values()] == ["Your name", *FLAGGED[:20], "Note"]
    assert fields["case_00"]["default"] == LATER
    assert "run again with mirroring (next night)" in fields["case_00"]["enum"]
    brief = place.form(waiting, "description")
    assert brief.startswith("**Masks of cohort liver that wait for a decision: 20.** 1 more follow in the next form.")
    assert brief.count("![f0") == 10  # a picture of each
    assert "the structure reaches the edge of the scan" in brief
    assert len(brief) < 2_000_000
    assert decisions(root, "liver", "f00") == []

    # no name, an unknown choice: the run goes on waiting
    for values in ({"case_00": "accept"}, {"reviewer": " "}, {"reviewer": "Dr. Ada", "case_00": "perhaps"}):
        assert place.send(run, **values)["status"] == "REJECT"
    assert place.call(f"/flow_runs/{run}")["state_type"] == "PAUSED"

    choices = {f"case_{number:02d}": "accept" for number in range(20)}
    choices |= {"case_01": "reject", "case_02": "send to training (to be corrected)"}
    choices |= {"case_03": "run again with mirroring (next night)"}
    del choices["case_04"]  # what is not chosen is put off
    assert place.send(run, reviewer=" Dr. Ada ", note="seen on two screens", **choices)["status"] == "ACCEPT"
    until(lambda: len(place.begun) == 2, 180)
    again = place.suspended(run)
    assert [one.get("title") for one in place.form(again, "schema")["properties"].values()] == [
        "Your name",
        "f20",
        "f04",
        "Note",
    ]
    (decision,) = decisions(root, "liver", "f00")
    assert (decision.choice, decision.by, decision.night, decision.note) == (
        "accept",
        "Dr. Ada",
        NIGHT.id,
        "seen on two screens",
    )
    assert decision.key == place.keys["f00"]
    assert mirrored(root, "liver") == {place.keys["f03"]}
    found = reviews_of(root)
    states = {"f00": "accepted", "f01": "rejected", "f02": "training", "f03": "awaiting", "f04": "awaiting", "p1": ""}
    assert {case: found[case] for case in states} == states
    gone = {"f01", "f02", "f03", "f04", "f20"}
    shown = {path.name.partition(".")[0] for path in place.delivered.glob("*.nii.gz")}
    assert shown == {*FLAGGED, *PLAIN} - gone

    assert place.send(run, reviewer="Dr. Bob", case_00="accept", case_01="reject")["status"] == "ACCEPT"
    ended = wait_for_run(place.server.url, run, 180)
    assert (ended["state_name"], ended["state"]["message"]) == ("Completed", "reviewed by Dr. Bob: 1 accept, 1 reject")
    assert [(one.choice, one.by) for one in decisions(root, "liver", "f04")] == [("reject", "Dr. Bob")]
    assert (place.delivered / "f20.nii.gz").exists()
    assert root.names("reviews") == []
    pids = place.begun
    assert len(pids) == len(set(pids)) == 3  # a process for each part, and none between

    # nothing is left to ask about
    quiet = wait_for_run(place.server.url, place.start("sample-gated", cohort="liver"), 180)
    assert quiet["state"]["message"] == "nobody was asked"


def test_the_form_can_be_asked_for_and_an_answer_is_not_lost_with_its_run(place: Place) -> None:
    root = place.root
    run = place.start("review-cases", cohort="liver", cases=["f01", "p1", "f01"])
    waiting = place.suspended(run)
    fields = place.form(waiting, "schema")["properties"]
    assert [field.get("title") for field in fields.values()] == ["Your name", "f01", "p1", "Note"]
    other = place.start("review-cases", cohort="liver", cases=["p2"])
    place.suspended(other)

    place.serving.send_signal(signal.SIGSTOP)  # nobody starts the run again
    try:
        assert place.send(run, reviewer="Dr. Eve", case_00="accept", case_01="reject")["status"] == "ACCEPT"
        session = Session(root, Site())
        with temporary_settings({PREFECT_API_URL: place.server.api_url}), get_client(sync_client=True) as client:
            # it is on its way, and asks for these
            assert collect(session, "liver", client) == {place.keys[case] for case in ("f01", "p1", "p2")}
            assert reviews_of(root)["p1"] == ""
            state = {"state": {"type": "CANCELLED", "name": "Cancelled"}, "force": True}
            place.call(f"/flow_runs/{run}/set_state", state)
            assert collect(session, "liver", client) == {place.keys["p2"]}
            assert {case: reviews_of(root)[case] for case in ("f01", "p1")} == {"f01": "accepted", "p1": "rejected"}
            assert collect(session, "liver", client) == {place.keys["p2"]}
            assert len(decisions(root, "liver", "p1")) == 1
            # decided elsewhere: the run that waits has nothing left to ask
            decide(root, "p2", "accept")
            assert collect(session, "liver", client) == set()
    finally:
        place.serving.send_signal(signal.SIGCONT)
    assert not (place.delivered / "p1.nii.gz").exists()
    ended = place.call(f"/flow_runs/{other}")
    assert (ended["state_type"], ended["state"]["message"]) == ("COMPLETED", "all of its cases were decided elsewhere")
    assert root.names("reviews") == []


@pytest.mark.browser
def test_a_person_answers_in_the_browser(place: Place) -> None:
    run = place.start("review-cases", cohort="liver", cases=["f05", "f06"])
    place.suspended(run)
    with open_browser() as page:
        page.goto(f"{place.server.url}/v2/runs/flow-run/{run}")
        page.get_by_role("button", name="Open menu").first.click()
        page.get_by_role("menuitem", name="Resume").click()
        form = page.get_by_role("dialog")
        form.locator("label").first.wait_for()
        page.wait_for_function("[...document.querySelectorAll('[role=dialog] img')].every(img => img.naturalWidth)")
        assert form.locator("img").count() == 2
        screenshot(page, "review-pictures")
        form.get_by_role("button", name="Resume").click()
        page.get_by_text("'reviewer' is a required property").wait_for()
        set_field(page, "Your name", "Dr. Ada")
        set_field(page, "f05", "accept")
        set_field(page, "f06", "reject")
        screenshot(page, "review-form")
        form.get_by_role("button", name="Resume").click()
        form.wait_for(state="hidden")
    assert wait_for_run(place.server.url, run, 180)["state"]["message"] == "reviewed by Dr. Ada: 1 accept, 1 reject"
    assert not (place.delivered / "f06.nii.gz").exists()


def test_reviews_leave_no_pickle(place: Place) -> None:
    """Prefect would keep what flows and tasks return as one; it runs last of those that ask."""
    assert pickles(place.root.home) == []
    assert pickles(place.server.log_path.parent) == []


# --- without a server


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(tmp_path / "root")


def vnet(root: Root, *arguments: str) -> int:
    with patch.dict(os.environ):  # the command line sets variables
        return main(["review", *arguments, "--root", str(root.home), "--json"])


def decide(root: Root, case: str, choice: str, *more: str) -> int:
    return vnet(root, "decide", "--cohort", "liver", "--case", case, "--choice", choice, "--by", "Dr. Ada", *more)


def test_the_command_line_lists_and_decides(root, tmp_path, capsys):
    keys = night_of(root, tmp_path, ["f1", "f2", "p1"], deliver=str(tmp_path / "out"))
    assert vnet(root, "list", "--cohort", "liver") == 0
    told = json.loads(capsys.readouterr().out)
    assert [(mask["case"], mask["review"], mask["flags"]) for mask in told["masks"]] == [
        ("f1", "awaiting", "grey: touches-border"),
        ("f2", "awaiting", "grey: touches-border"),
    ]
    assert decide(root, "f1", "accept", "--note", "fine") == 0
    assert json.loads(capsys.readouterr().out)["review"] == "accepted"
    assert decide(root, "p1", "reject") == 0
    assert decide(root, "f2", "mirror") == 0
    assert reviews_of(root) == {"f1": "accepted", "f2": "awaiting", "p1": "rejected"}
    assert [path.name for path in (tmp_path / "out" / "liver").glob("*.nii.gz")] == ["f1.nii.gz"]
    assert decisions(root, "liver", "f1")[0].note == "fine"
    assert mirrored(root, "liver") == {keys["f2"]}


def test_corrections_from_the_command_line_join_the_manifest(root, tmp_path, capsys):
    night_of(root, tmp_path, ["f1", "f2", "f3"])
    assert decide(root, "f1", "train", "--correction", str(corrected(tmp_path))) == 0
    assert json.loads(capsys.readouterr().out)["review"] == "training"
    assert decide(root, "f2", "train") == 0
    assert decide(root, "f3", "train", "--as-is") == 0
    assert vnet(root, "list", "--cohort", "liver") == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["corrections_wanted"], told["training_cases"]) == (["f2"], ["f1", "f3"])
    fixed = corrected(tmp_path, name="later.nrrd")
    assert vnet(root, "correct", "--cohort", "liver", "--case", "f2", "--mask", str(fixed), "--by", "Dr. Bob") == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert Path(told["training_manifest"]).read_text("utf-8").count("\n") == 4
    assert reviews_of(root) == {"f1": "training", "f2": "training", "f3": "accepted"}
    # a mask that cannot be used decides nothing
    count = len(decisions(root, "liver", "f3"))
    assert decide(root, "f3", "train", "--correction", str(tmp_path / "nothing.mha")) != 0
    assert len(decisions(root, "liver", "f3")) == count


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--case", "x", "--choice", "accept", "--by", "Ada"), "review.case"),
        (("--case", "f1", "--choice", "accept"), "review.arguments"),
        (("--case", "f1", "--by", "Ada"), "review.arguments"),
        (("--case", "f1", "--choice", "accept", "--by", "  "), "review.name"),
        (("--case", "f1", "--choice", "accept", "--by", "Ada", "--as-is"), "review.arguments"),
        (("--case", "f1", "--choice", "reject", "--by", "Ada", "--correction", "x"), "review.arguments"),
        (("--case", "f1", "--choice", "train", "--by", "Ada", "--empty"), "review.arguments"),
        (("--case", "f1", "--choice", "train", "--by", "Ada", "--mask", "x"), "review.arguments"),
    ],
)
def test_arguments_that_decide_nothing_are_told(root, tmp_path, capsys, arguments, code):
    night_of(root, tmp_path, ["f1"])
    assert vnet(root, "decide", "--cohort", "liver", *arguments) == 2
    assert code in capsys.readouterr().err
    assert reviews_of(root) == {"f1": "awaiting"}


def test_a_cohort_without_a_night_is_told(root, capsys):
    assert vnet(root, "list", "--cohort", "liver") == 2
    assert "run vnet nightly" in capsys.readouterr().err


def test_a_mask_that_was_mirrored_is_not_mirrored_again(root, tmp_path):
    (key,) = night_of(root, tmp_path, ["f1"]).values()
    assert mirrorable(root, key)
    model_plan = PLAN
    (entry,) = load_entries(root, "liver")
    job = Job("liver", entry.case, "nifti", (0, 1, 2))
    plan = plan_of(job, type("M", (), {"plan": model_plan})())
    provenance = {"model": "known@v1", "plan_digest": plan.digest, "volume": "volumes/none"}
    publish_mask(
        root, f"{key}m", Mask(entry.case, mask_values(), plan, "nifti", Algorithm("known@v1", "0"), provenance)
    )
    assert not mirrorable(root, f"{key}m")
    root.delete("models/known/v1")
    assert not mirrorable(root, key)


def test_a_run_of_no_deployment_asks_nobody(root, tmp_path):
    night_of(root, tmp_path, ["f1"])
    night = load_night(root, "liver", NIGHT.id)
    gate(Session(root, Site()), night, read_rows(root, "liver", NIGHT.id))
    assert root.names("reviews") == []
    assert reviews_of(root) == {"f1": "awaiting"}
    assert answered(Session(root, Site())) is None
