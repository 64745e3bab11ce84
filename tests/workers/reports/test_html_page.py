"""The night as one HTML file: whole without a network, safe against its texts, within its bytes, and alive."""

import base64
import gzip
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path

import nibabel
import numpy as np
import pytest

from flows.ui.pages import _html
from tests.files import file_of
from tests.flows.browser import EXECUTABLES, FLAGS
from tests.workers.night_of_phantoms import blank, labelled, new_root, night_of, segmented
from vnet_core.phantoms import PhantomSpec
from workers.reports import html_page
from workers.reports.document import Heading, Link, Picture, paragraph
from workers.reports.html_page import NIIVUE_SHA256, PAGE_BYTES, TABLE_ROWS, VIEWERS, CaseView, night_page
from workers.reports.previews import volumes_of
from workers.reports.story import overview, worst_first
from workers.segmentation.masks import NO_PICTURE
from workers.storage.store import Root

VIEWER = Path(html_page.__file__).parent / "viewer"
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'`&{{7*7}}\x00\u202e"
SMALL = PhantomSpec(3, (30, 34, 38), (2.0, 1.5, 1.5))


class Reader(HTMLParser):
    """Elements with their attributes, and the text of each script and style."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.raw: list[tuple[dict[str, str], str]] = []
        self.text = ""
        self._inside: tuple[str, dict[str, str]] | None = None
        self.feed(page.decode())
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._inside = (tag, dict(attributes)) if tag in ("script", "style") else None

    def handle_data(self, data):
        if self._inside:
            self.raw.append((self._inside[1] | {"tag": self._inside[0]}, data))
        else:
            self.text += data

    def handle_endtag(self, tag):
        self._inside = None

    def of(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(root: Root, rows) -> bytes:
    """The page of a night, as the flow makes it."""
    told = overview(night_of(rows), rows, None, Link("volumes-liver", "/v2/x"))
    return _html(root, night_of(rows), told, rows, worst_first(rows))


def view(name: str) -> CaseView:
    return CaseView([Heading(3, name)], b"x" * 150_000)


def volumes(**parts) -> dict:
    return {"image": None, "mask": "", "labels": [], "centre": None} | parts


def plain(cases, look_3d=lambda name: volumes(), rows=()) -> bytes:
    return night_page("title", [Heading(1, "night")], list(rows), cases, view, look_3d)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Root:
    return new_root(tmp_path_factory.mktemp("root"))


@pytest.fixture(scope="module")
def rows(root: Root):
    return segmented(root, "a", SMALL, flags="touches-border") + segmented(root, "b", PhantomSpec(4, (40, 40, 40)))


# --- the one third-party file


def test_niivue_is_the_file_of_its_release_with_its_licence():
    assert hashlib.sha256((VIEWER / "niivue.umd.js").read_bytes()).hexdigest() == NIIVUE_SHA256
    licence = (VIEWER / "niivue.LICENSE.txt").read_text("utf-8")
    assert licence.startswith("BSD 2-Clause License")
    assert "Niivue" in licence
    assert "@niivue/niivue` 0.69.0" in (VIEWER / "README.md").read_text("utf-8")
    ours = {"page.js", "page.css", "README.md"}
    assert {path.name for path in VIEWER.iterdir()} == ours | {"niivue.umd.js", "niivue.LICENSE.txt"}


def test_the_page_holds_niivue_whole(root, rows):
    (packed,) = [text for attributes, text in Reader(page_of(root, rows)).raw if attributes.get("id") == "niivue"]
    assert hashlib.sha256(gzip.decompress(base64.b64decode(packed))).hexdigest() == NIIVUE_SHA256


# --- what it may do


def test_the_policy_allows_what_is_in_the_page_and_nothing_else(root, rows):
    read = Reader(page_of(root, rows))
    (policy,) = [m["content"] for m in read.of("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules.pop("img-src") == "data: blob:"
    assert {name: rules.pop(name) for name in ("default-src", "base-uri", "form-action")} == {
        "default-src": "'none'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    runs = [text for attributes, text in read.raw if attributes["tag"] == "script" and not attributes.get("type")]
    styles = [text for attributes, text in read.raw if attributes["tag"] == "style"]
    allowed = [*map(str.encode, runs), (VIEWER / "niivue.umd.js").read_bytes()]
    hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(one).digest()).decode()}'" for one in allowed]
    assert rules.pop("script-src").split() == hashes
    assert rules.pop("style-src") == (
        f"'sha256-{base64.b64encode(hashlib.sha256(styles[0].encode()).digest()).decode()}'"
    )
    assert not rules
    assert len(runs) == len(styles) == 1
    assert {attributes.get("type") for attributes, _ in read.raw if attributes["tag"] == "script"} == {
        None,
        "text/plain",
        "application/json",
    }


def test_nothing_in_it_points_outside(root, rows):
    read = Reader(page_of(root, rows))
    for tag, attributes in read.elements:
        assert tag not in ("a", "link", "iframe", "object", "embed", "form", "base")
        assert not {"style", "href", "srcset"} & attributes.keys()
        assert not any(name.startswith("on") for name in attributes), attributes
        assert attributes.get("src", "data:").startswith("data:")


def test_hostile_texts_are_shown_as_they_are(root):
    evil = [
        labelled(EVIL, EVIL, flags=f"empty {EVIL}", review="rejected", reviewed_by=EVIL, earlier_case=EVIL),
        blank(f"b {EVIL}", state="refused", codes=EVIL, message=EVIL),
    ]
    evil_3d = volumes(labels=[{"index": 1, "name": EVIL, "rgb": [1, 2, 3]}])
    told = [*overview(night_of(evil), evil, None, Link(EVIL, EVIL)), Picture(EVIL, b"x")]
    looked, names = CaseView([Heading(3, EVIL), paragraph(EVIL)], b"x"), [f"{n}{EVIL}" for n in range(VIEWERS + 1)]
    hostile = night_page(EVIL, told, evil, names, lambda name: looked, lambda name: evil_3d)
    harmless = night_page("x", told[:1], [labelled("a")], ["a"], view, lambda name: volumes())
    read = Reader(hostile)
    known = {"strong", "code", "ul", "li", "rect", "svg"} | {tag for tag, _ in Reader(harmless).elements}
    assert {tag for tag, _ in read.elements} <= known
    assert len([a for a, _ in read.raw if a["tag"] == "script" and not a.get("type")]) == 1
    assert "</script><script>alert(1)</script><img src=x onerror=alert(1)>" in read.text
    assert "\x00" not in hostile.decode()
    assert "\u202e" not in hostile.decode()
    data = [text for attributes, text in read.raw if attributes.get("id") == "volumes-0"]
    assert json.loads(data[0])["labels"][0]["name"] == EVIL


# --- what it holds


def test_the_page_says_what_the_report_says_and_every_row(root, rows):
    refused = blank("c", state="refused", codes="scan.truncated", message="cut short; copy it again")
    read = Reader(page_of(root, [*rows, refused]))
    assert "2 of 2 usable cases have a mask." in read.text
    assert "cut short; copy it again" in read.text
    assert "qualified person's review" in read.text
    assert read.text.count("the structure reaches the edge") == 3
    assert len(read.of("tr")) == 1 + 5 + 3 + 2 * 3  # the table, the labels, the two cases
    assert len([div for div in read.of("div") if div.get("class") == "viewer"]) == 2


def volumes_in(page: bytes) -> list[dict]:
    return [json.loads(text) for attributes, text in Reader(page).raw if attributes.get("type") == "application/json"]


def array_of(packed: str) -> np.ndarray:
    image = nibabel.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(packed)))
    return np.asarray(image.dataobj)


def test_viewers_have_the_scan_and_its_mask(root, rows):
    first, _ = volumes_in(page_of(root, rows))
    image, mask = array_of(first["image"]), array_of(first["mask"])
    assert image.shape == mask.shape == (38, 34, 30)
    assert [(label["index"], label["name"], label["rgb"]) for label in first["labels"]] == [
        (1, "organ", [230, 159, 0]),
        (2, "lesion", [86, 180, 233]),
    ]
    assert [int((mask == value).sum()) for value in (1, 2)] == [row["voxels"] for row in rows[:2]]
    # the organ is brighter than what is around it
    assert image[mask == 1].mean() > image[mask == 0].mean() + 20


def test_volumes_are_made_once(root, rows):
    page = page_of(root, rows)
    kept = root.get("previews/liver/a/x.json")
    assert json.loads(kept) == volumes_in(page)[0]
    root.put_json("previews/liver/a/x.json", json.loads(kept) | {"labels": []})
    assert volumes_in(page_of(root, rows))[0]["labels"] == []
    root.delete("previews/liver/a/x.json")
    assert page_of(root, rows) == page


def test_a_scan_that_is_gone_leaves_the_mask(tmp_path):
    root = new_root(tmp_path)
    rows = segmented(root, "a", SMALL)
    scan = tmp_path / "scans" / "a.nii.gz"
    whole = scan.read_bytes()
    for content in (whole[: len(whole) // 2], None):
        scan.unlink()
        if content:
            scan.write_bytes(content)
        page = page_of(root, rows)
        (volumes,) = volumes_in(page)
        assert volumes["image"] is None
        assert int((array_of(volumes["mask"]) == 1).sum()) == rows[0]["voxels"]
        assert "the mask alone" in page.decode()
        assert not root.exists("previews/liver/a/x.json")
        scan.touch()
    scan.write_bytes(whole)
    assert volumes_in(page_of(root, rows))[0]["image"] is not None
    scan.unlink()
    assert volumes_in(page_of(root, rows))[0]["image"] is not None


def test_another_scan_in_its_place_is_not_shown(tmp_path):
    root = new_root(tmp_path)
    key = segmented(root, "a", SMALL)[0]["result"]
    segmented(root, "b", PhantomSpec(3, (20, 20, 20)))
    shutil.copy(tmp_path / "scans" / "b.nii.gz", tmp_path / "scans" / "a.nii.gz")
    assert volumes_of(root, "liver", "a", key)["image"] is None


def test_a_scan_with_burnt_in_text_has_neither_picture_nor_viewer(tmp_path):
    root = new_root(tmp_path)
    rows = segmented(root, "a", SMALL)
    key = rows[0]["result"]
    root.put_json(f"{key}/report.json", root.get_json(f"{key}/report.json") | {"picture": NO_PICTURE})
    page = page_of(root, rows)
    assert volumes_of(root, "liver", "a", key) is None
    assert not Reader(page).of("img")
    assert "viewer" not in {div.get("class") for div in Reader(page).of("div")}
    assert "may have text in its pixels" in page.decode()
    assert b'id="niivue"' not in page


def test_a_damaged_mask_has_no_viewer_and_the_page_still_comes(tmp_path):
    root = new_root(tmp_path)
    rows = segmented(root, "a", SMALL) + segmented(root, "b", SMALL)
    chunk = file_of(root, "results/liver/a/x/mask.ome.zarr/0/c/0/0/0")
    whole = chunk.read_bytes()
    for content in (whole[: len(whole) // 2], bytes(byte ^ 1 for byte in whole), b""):
        chunk.write_bytes(content)
        page = page_of(root, rows)
        assert len(Reader(page).of("section")) == 2
        assert len(volumes_in(page)) == 1
        assert not root.exists("previews/liver/a/x.json")
    root.delete("results/liver/a/x/mask.ome.zarr")
    assert len(volumes_in(page_of(root, rows))) == 1


def test_kept_volumes_that_are_damaged_are_made_again(tmp_path):
    root = new_root(tmp_path)
    rows = segmented(root, "a", SMALL)
    page = page_of(root, rows)
    root.put("previews/liver/a/x.json", b"{")
    assert page_of(root, rows) == page


# --- size


def test_the_page_stays_within_its_bytes():
    """Sections and pictures come first, then viewers, worst first, until one does not fit."""
    large, asked = "A" * 2_000_000, []

    def look_3d(name: str) -> dict:
        asked.append(name)
        return volumes(mask=large)

    names = [f"case-{n:03}" for n in range(VIEWERS + 20)]
    rows = [labelled(f"{n}", flags="x" * 400) for n in range(TABLE_ROWS + 7)]
    page = plain(names, look_3d, rows)
    assert len(page) <= PAGE_BYTES
    assert page.count(b"<img ") == VIEWERS
    shown = page.count(b'type="application/json"')
    assert 5 <= shown < VIEWERS
    assert asked == names[: shown + 1]
    assert f"{VIEWERS - shown} without a viewer, for want of room: {names[shown]}, " in page.decode()
    assert f"20 more without a section here: {names[VIEWERS]}, " in page.decode()
    assert "7 more rows are in the table of the night" in page.decode()
    assert page.count(b"<tr>") == TABLE_ROWS + 1


def test_how_many_of_the_largest_volumes_fit():
    """The worst that previews can be: noise in 64 greys of 96 voxels along each axis, and 40 large pictures."""
    noise = "A" * (96**3 * 6 // 8 * 4 // 3)
    page = plain([f"{n}" for n in range(40)], lambda name: volumes(image=noise, mask=noise[:20_000]))
    assert len(page) <= PAGE_BYTES
    assert page.count(b'type="application/json"') >= 15


def test_a_night_without_anything_to_look_at_is_small():
    page = plain([], rows=[labelled(f"{n}") for n in range(100)])
    assert len(page) < 60_000
    assert len(plain([])) < 20_000


# --- in a browser


@contextmanager
def open_page(page: Path) -> Iterator[tuple]:
    """The file in Chromium with WebGL by software, what it asked for, and what it complained about."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    executable = next(filter(None, map(shutil.which, EXECUTABLES)), None)
    if executable is None:
        pytest.skip(f"no browser: none of {', '.join(EXECUTABLES)} is on PATH")
    flags = [flag for flag in FLAGS if flag != "--disable-gpu"]
    flags += ["--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    with playwright.sync_playwright() as driver, tempfile.TemporaryDirectory() as profile:
        context = driver.chromium.launch_persistent_context(
            profile, executable_path=executable, args=flags, headless=True, viewport={"width": 520, "height": 900}
        )
        opened, asked, complaints = context.pages[0], [], []
        opened.on("request", lambda request: asked.append(request.url))
        opened.on("console", lambda message: complaints.append(message.text))
        opened.on("pageerror", lambda error: complaints.append(str(error)))
        opened.goto(page.as_uri())
        yield opened, asked, complaints
        context.close()


def colours_of(box) -> np.ndarray:
    """Pixels of what the canvas shows, (H, W, 3)."""
    import io

    from PIL import Image

    with Image.open(io.BytesIO(box.locator("canvas").screenshot())) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


@pytest.mark.browser
def test_a_page_of_two_phantoms_lives_in_a_browser(root, rows, tmp_path):
    file = tmp_path / "night.html"
    file.write_bytes(page_of(root, rows))
    with open_page(file) as (page, asked, complaints):
        boxes = page.locator(".viewer")
        assert boxes.count() == 2
        for number in (0, 1):
            box = boxes.nth(number)
            box.get_by_role("button", name="Look at it in 3-D").click()
            box.locator(".tools").wait_for(timeout=60_000)
            assert page.locator("canvas").count() == 1
            planes = colours_of(box)
            orange = (planes[..., 0] > planes[..., 2] + 60) & (planes[..., 0] > 120)
            assert planes.std() > 20
            assert orange.mean() > 0.01
            # without the scan it is darker, and the mask is still there
            box.get_by_role("button", name="mask alone").click()
            page.wait_for_timeout(300)
            alone = colours_of(box)
            assert alone.mean() < planes.mean()
            assert (alone[..., 0] > alone[..., 2] + 40).mean() > 0.005
        heading = page.locator("#cases-table th").nth(3)
        volumes = "[...document.querySelectorAll('#cases-table tbody tr')].map(row => row.cells[3].dataset.number)"
        heading.get_by_role("button").click()
        risen = [float(value) for value in page.evaluate(volumes)]
        heading.get_by_role("button").click()
        assert risen == sorted(row["volume_ml"] for row in rows)
        assert [float(value) for value in page.evaluate(volumes)] == risen[::-1]
        page.get_by_role("searchbox").fill("lesion")
        assert page.locator("#cases-table tbody tr:visible").count() == 2
        page.set_viewport_size({"width": 390, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert [url for url in asked if not url.startswith(("data:", "blob:"))] == [file.as_uri()]
        assert complaints == []


@pytest.mark.browser
def test_hostile_texts_run_nothing_in_a_browser(tmp_path):
    file = tmp_path / "night.html"
    evil = [labelled(EVIL, EVIL, flags="empty"), blank(f"b {EVIL}", state="refused", message=EVIL, codes=EVIL)]
    file.write_bytes(night_page(EVIL, overview(night_of(evil), evil, None, Link(EVIL, EVIL)), evil, [], view, volumes))
    with open_page(file) as (page, asked, complaints):
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        assert page.locator("script").count() == 1
        assert page.locator("img").count() == 0
        assert re.search(r"<img src=x onerror=alert\(1\)>", page.inner_text("#cases-table"))
        assert complaints == []
        assert len(asked) == 1
