"""Blocks of a page as Markdown for the Prefect UI; pure text, nothing is sent from here."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterable, Sequence

from vnet_core.pictures.qc_sheet import light_picture
from workers import markdown
from workers.reports.document import Block, Code, Grid, Heading, Items, Link, Paragraph, Picture, Strong, Text
from workers.reports.story import Evidence, Row, case_blocks

PICTURES = 8
"""Most cases with a section of their own, and so most QC pictures."""
PICTURE_BYTES = 60_000
"""Largest QC picture of a report; the HTML page and the result hold it in full size."""
REPORT_BYTES = 800_000
"""Largest report; pictures that would exceed it are left out and counted. Prefect keeps every version of a report: a
year of nights at this size is 290 MB, and a usual one, with three or four cases to look at, is 250 to 400 kB."""
NO_PICTURE = "No picture: this scan may have text in its pixels."
DAMAGED = "No picture: its file is damaged; vnet fsck says more."


def to_markdown(blocks: Iterable[Block]) -> str:
    """Blocks as Markdown."""
    return "\n\n".join(map(_block, blocks))


def night_report(
    top: Sequence[Block], cases: Sequence[Sequence[Row]], evidence: Callable[[str], Evidence], bottom: Block
) -> str:
    """The report of a night, at most ``REPORT_BYTES``.

    ``top`` is everything before the cases, with the plots, which are small; ``cases`` are those to look at, worst
    first; ``evidence`` is asked for the key of each result that has a section.
    """
    parts = [to_markdown(top)]
    # the sentences that count what was left out are short
    left = REPORT_BYTES - len("\n\n".join(parts).encode()) - 1_000
    sections, without_picture = [], 0
    for case in cases[:PICTURES]:
        found = evidence(case[0]["result"])
        text, picture = to_markdown(case_blocks(case, found)), _picture(case[0]["case"], found)
        if picture and _size(text) + _size(picture) > left:
            without_picture += 1
            picture = ""
        if _size(text) > left:
            break
        sections.append("\n\n".join(filter(None, (text, picture))))
        left -= _size(sections[-1])
    left_out = _left_out(len(cases) - len(sections), without_picture)
    return "\n\n".join([*parts, *sections, *left_out, to_markdown([bottom])]) + "\n"


def _left_out(rest: int, without_picture: int) -> list[str]:
    """What is not here for the sake of the report's size."""
    said = []
    if rest:
        said.append(f"{rest} more {'case has' if rest == 1 else 'cases have'} no section here.")
    if without_picture:
        said.append(f"{without_picture} {'picture is' if without_picture == 1 else 'pictures are'} left out.")
    return [" ".join(said)] if said else []


def _picture(case: str, evidence: Evidence) -> str:
    if evidence.picture is None:
        return ""
    try:
        light = light_picture(evidence.picture, PICTURE_BYTES)
    except (OSError, SyntaxError, ValueError):
        # Pillow's three ways to say that a file is none of its pictures
        return DAMAGED
    return to_markdown([Picture(case, light, "webp")])


def _block(block: Block) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {markdown.text(block.text)}"
    if isinstance(block, Paragraph):
        return _words(block.text)
    if isinstance(block, Items):
        return "\n".join(f"- {_words(item)}" for item in block.items)
    if isinstance(block, Grid):
        return markdown.table(block.header, block.rows)
    content = base64.b64encode(block.content).decode()
    return f"![{markdown.text(block.words)}](data:image/{block.kind};base64,{content})"


def _words(text: Text) -> str:
    return "".join(map(_word, text))


def _word(word: str | Strong | Code | Link) -> str:
    if isinstance(word, Strong):
        # spaces inside the stars would not be bold
        kept = word.text.rstrip()
        return f"**{markdown.text(kept)}**{word.text[len(kept) :]}"
    if isinstance(word, Code):
        return markdown.code(word.text)
    if isinstance(word, Link):
        return f"[{markdown.text(word.text)}]({re.sub('[^A-Za-z0-9/:._~-]', '', word.url)})"
    kept = word.strip()
    before, after = word[: len(word) - len(word.lstrip())], word[len(word.rstrip()) :] if kept else ""
    return f"{before}{markdown.text(kept)}{after}" if kept else word


def _size(text: str) -> int:
    return len(text.encode()) + 2
