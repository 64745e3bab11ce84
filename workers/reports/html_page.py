"""A night as one HTML file that opens from a folder, without a network: text, plots, a sortable table, 3-D viewers.

Nothing in it can load or send anything: its Content-Security-Policy allows two scripts and one style sheet, each by
its SHA-256, and pictures that stand in the page. Every text is escaped.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from workers.harmless import one_line
from workers.reports.document import Block, Code, Grid, Heading, Items, Link, Paragraph, Picture, Strong, Text
from workers.reports.previews import Volumes

NIIVUE_SHA256 = "47b896b77ec4a5be3ef1949c33ad393b6f45629921f326c279000bcf51bdb4af"
"""Of ``viewer/niivue.umd.js``, which is ``dist/niivue.umd.js`` of @niivue/niivue 0.69.0 on npm, unchanged."""

PAGE_BYTES = 25_000_000
"""Largest page."""
VIEWERS = 40
"""Most cases with a section of their own, and so most viewers."""
TABLE_ROWS = 5_000
"""Most rows of the table; the Parquet file has all."""
TEXT_CHARACTERS = 400
"""Most characters of one name or message."""
NAMES = 100
"""Most names of cases that are left out."""

Row = Mapping[str, Any]

COLUMNS = (
    ("case", "case"),
    ("state", "state"),
    ("name", "label"),
    ("volume_ml", "mL"),
    ("change_percent", "change %"),
    ("volume_low_ml", "lowest mL"),
    ("volume_high_ml", "highest mL"),
    ("agreement", "agreement"),
    ("flags", "flags"),
    ("review", "review"),
    ("slice_first", "first slice"),
    ("slice_last", "last slice"),
    ("components", "pieces"),
    ("seconds", "seconds"),
    ("codes", "codes"),
    ("message", "message"),
)
"""Columns of the rows and their headings; a column in which every row is empty is left out."""


@dataclass(frozen=True, slots=True)
class CaseView:
    """One case on the page."""

    blocks: Sequence[Block]
    picture: bytes | None


def night_page(
    title: str,
    overview: Sequence[Block],
    rows: Sequence[Row],
    cases: Sequence[str],
    look: Callable[[str], CaseView],
    volumes: Callable[[str], Volumes | None],
) -> bytes:
    """The page as UTF-8, at most ``PAGE_BYTES``.

    ``rows`` go into the table in their order. ``cases``, worst first, have sections of their own: ``look`` is asked for
    one after the other, for at most ``VIEWERS`` and as far as they fit; then ``volumes`` for their viewers, as far as
    there is still room. Cases that have the one or the other not for want of room are counted and named.
    """
    style, script, niivue = _file("page.css").decode(), _file("page.js").decode(), _niivue()
    top = [_html(block) for block in overview]
    table = _table(rows)
    # names of what was left out, and what stands around the parts
    left = PAGE_BYTES - sum(map(_size, (style, script, niivue, *top, table))) - 2 * NAMES * 6 * TEXT_CHARACTERS - 10_000
    sections, full = _sections(cases[:VIEWERS], look, volumes, left)
    rest = cases[len(sections) :]
    parts = [
        *top,
        f"<p>{len(full)} without a viewer, for want of room: {_named(full)}</p>" if full else "",
        *sections,
        f"<p>{len(rest)} more without a section here: {_named(rest)}</p>" if rest else "",
        table,
    ]
    if any('<div class="viewer"' in section for section in sections):
        parts.append(f'<script type="text/plain" id="niivue">{niivue}</script>')
    policy = "; ".join(
        [
            "default-src 'none'",
            "img-src data: blob:",
            f"style-src {_hash(style.encode())}",
            f"script-src {_hash(script.encode())} {_hash(_file('niivue.umd.js'))}",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    head = [
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="referrer" content="no-referrer">',
        f"<title>{_text(title)}</title>",
        f"<style>{style}</style>",
    ]
    body = "\n".join(part for part in parts if part)
    page = "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            *head,
            "</head>",
            "<body>",
            body,
            f"<script>{script}</script>",
        ]
    )
    return f"{page}\n</body>\n</html>\n".encode()


def _sections(
    cases: Sequence[str], look: Callable[[str], CaseView], volumes: Callable[[str], Volumes | None], left: int
) -> tuple[list[str], list[str]]:
    """Sections of at most ``left`` bytes together, and the cases that have no viewer for want of room."""
    sections: list[str] = []
    for number, case in enumerate(cases):
        section = _section(look(case), number)
        if _size(section) > left:
            break
        sections.append(section)
        left -= _size(section)
    for number in range(len(sections)):
        found = volumes(cases[number])
        viewer = "" if found is None else _viewer(found, number)
        if _size(viewer) > left:
            # those after it are not read any more: they are of about one size
            return sections, list(cases[number : len(sections)])
        sections[number] = sections[number].replace(_END, viewer + _END)
        left -= _size(viewer)
    return sections, []


_END = "</section>"


def _section(view: CaseView, number: int) -> str:
    parts = [_html(block) for block in view.blocks]
    if view.picture is not None:
        parts.append(_html(Picture("three planes of the scan with the mask's outline", view.picture)))
    return "\n".join([f'<section id="case-{number}">', *parts, _END])


def _named(cases: Sequence[str]) -> str:
    return ", ".join(map(_text, cases[:NAMES])) + (f" and {len(cases) - NAMES} more" if len(cases) > NAMES else "")


def _viewer(volumes: Volumes, number: int) -> str:
    keys = "".join(
        '<li><svg viewBox="0 0 1 1" aria-hidden="true">'
        f'<rect width="1" height="1" fill="{_colour(label["rgb"])}"/></svg>'
        f"{_text(label['name'])}</li>"
        for label in volumes["labels"]
    )
    alone = volumes["image"] is None
    views = {"planes": "planes", "mask": "3-D"} if alone else {"planes": "planes", "scan": "3-D", "mask": "mask alone"}
    buttons = "".join(
        f'<button type="button" data-view="{view}" aria-pressed="false">{words}</button>'
        for view, words in views.items()
    )
    note = "<p>The scan cannot be read any more: this is the mask alone.</p>" if alone else ""
    # a less-than sign could end the script element
    data = json.dumps(volumes).replace("<", "\\u003c")
    return (
        f'<div class="viewer" data-volumes="volumes-{number}">{note}'
        '<button type="button" class="open" hidden>Look at it in 3-D</button> <span class="said" role="status"></span>'
        f'<div class="tools" hidden>{buttons}<label>mask <input type="range" min="0" max="100" value="45"></label>'
        f'<ul class="keys">{keys}</ul></div>'
        f'<div class="stage" hidden></div><script type="application/json" id="volumes-{number}">{data}</script></div>'
    )


def _colour(rgb: Sequence[int]) -> str:
    return "#" + bytes(rgb).hex()


def _table(rows: Sequence[Row]) -> str:
    """All rows with every column that holds something; sorted and searched by the page's script."""
    shown = rows[:TABLE_ROWS]
    columns = [(name, words) for name, words in COLUMNS if any(_filled(row.get(name)) for row in shown)]
    if not columns:
        return ""
    numbers = {name for name, _ in columns if all(not isinstance(row.get(name), str) for row in shown)}
    headings = "".join(
        f'<th{_class(name in numbers, "number")} scope="col"><button type="button">{words}</button></th>'
        for name, words in columns
    )
    lines = ["<tr>" + "".join(_cell(row.get(name), name in numbers) for name, _ in columns) + "</tr>" for row in shown]
    rest = f"<p>{len(rows) - len(shown)} more rows are in the table of the night.</p>" if len(rows) > len(shown) else ""
    return (
        '<h2>All cases</h2><input id="filter" type="search" placeholder="Find a case, label, flag …"'
        f' aria-label="Find in the table">{rest}<div class="wide"><table id="cases-table"><thead><tr>{headings}</tr>'
        "</thead><tbody>\n" + "\n".join(lines) + "\n</tbody></table></div>"
    )


def _filled(value: Any) -> bool:
    return value is not None and value != ""


def _class(wanted: bool, name: str) -> str:
    return f' class="{name}"' if wanted else ""


def _cell(value: Any, number: bool) -> str:
    if not _filled(value):
        return '<td data-number=""></td>' if number else "<td></td>"
    if number:
        figure = f"{value:.4g}" if isinstance(value, float) and abs(value) < 1000 else f"{value:.0f}"
        return f'<td class="number" data-number="{value!r}">{figure}</td>'
    text = _text(value)
    return f"<td{_class(len(text) > 40, 'long')}>{text}</td>"


# --- blocks


def _html(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level}>{_text(block.text)}</h{block.level}>"
    if isinstance(block, Paragraph):
        return f"<p>{_words(block.text)}</p>"
    if isinstance(block, Items):
        return "<ul>" + "".join(f"<li>{_words(item)}</li>" for item in block.items) + "</ul>"
    if isinstance(block, Grid):
        head = "".join(f"<th>{_text(cell)}</th>" for cell in block.header)
        lines = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in block.rows)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"
    content = base64.b64encode(block.content).decode()
    return f'<img alt="{_text(block.words)}" src="data:image/{block.kind};base64,{content}">'


def _words(text: Text) -> str:
    return "".join(map(_word, text))


def _word(word: str | Strong | Code | Link) -> str:
    if isinstance(word, Strong):
        return f"<strong>{_text(word.text)}</strong>"
    if isinstance(word, Code):
        return f"<code>{_text(word.text)}</code>"
    # an address of another page's UI leads nowhere from a file
    return _text(word.text if isinstance(word, Link) else word)


def _text(value: Any) -> str:
    """One line that HTML shows as it is, in text and in attributes."""
    line = one_line(value)
    if len(line) > TEXT_CHARACTERS:
        line = f"{line[: TEXT_CHARACTERS - 2]} …"
    return html.escape(line)


# --- what stands in the page


@cache
def _file(name: str) -> bytes:
    return files("workers.reports").joinpath("viewer", name).read_bytes()


@cache
def _niivue() -> str:
    """NiiVue as base64 of a gzip, a third of its size; the page unpacks it when a viewer is first opened."""
    return base64.b64encode(gzip.compress(_file("niivue.umd.js"), 9, mtime=0)).decode()


def _hash(content: bytes) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content).digest()).decode()}'"


def _size(text: str) -> int:
    return len(text.encode())
