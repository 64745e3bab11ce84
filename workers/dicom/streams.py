"""What compressed pixels are by their first bytes, and what a transfer syntax promises that they are."""

from __future__ import annotations

_FRAME_STARTS = {0xC0: "lossy JPEG", 0xC1: "lossy JPEG", 0xC2: "lossy JPEG", 0xC3: "lossless JPEG", 0xF7: "JPEG-LS"}
_STREAMS = {
    "4.50": "lossy JPEG", "4.51": "lossy JPEG", "4.57": "lossless JPEG", "4.70": "lossless JPEG", "4.80": "JPEG-LS",
    "4.81": "JPEG-LS", "4.90": "JPEG 2000", "4.91": "JPEG 2000", "4.201": "JPEG 2000", "4.202": "JPEG 2000",
    "4.203": "JPEG 2000", "5": "run lengths",
}  # fmt: skip
"""What the pixels of each encapsulated syntax are, by the end of its UID (PS3.5 A.4)."""


def promised_stream(syntax: str) -> str:
    """What the pixels of a transfer syntax are; '' for one that is not known."""
    return _STREAMS.get(syntax.removeprefix("1.2.840.10008.1.2."), "")


def stream_of(data: bytes) -> str:
    """What the first bytes of compressed pixels say that they are; '' where they say nothing known."""
    if data.startswith((b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  ")):
        return "JPEG 2000"
    if not data.startswith(b"\xff\xd8\xff"):
        return ""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:  # segments up to the start of the frame (ITU-T T.81 table B.1)
        marker = data[at + 1]
        if marker in _FRAME_STARTS:
            return _FRAME_STARTS[marker]
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return ""
