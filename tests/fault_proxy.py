"""What lies between a program and its object store, made to fail on purpose: an HTTP proxy of our own on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

Fault = Literal["500", "503", "hang", "reset", "short", "wrong-length", "lost", "flipped"]
"""``500``, ``503``: answered so, the store is not asked. ``hang``: no answer, the store is not asked. ``reset``: the
connection is reset in the middle of the answer's body; ``short``: it ends there. ``wrong-length``: half the body, and a
length that says so. ``lost``: the store does what it was asked, its answer never comes. ``flipped``: one bit of the
request's body is turned over."""
_STATUS = {"500": "500 Internal Server Error", "503": "503 Slow Down"}
_CODES = {"500": "InternalError", "503": "SlowDown"}
_HALF = ("reset", "short", "wrong-length")


@dataclass(frozen=True, slots=True)
class Request:
    """One request as it came."""

    number: int
    """From 0, over all connections."""
    method: str
    target: str
    """Path and query."""
    body_bytes: int


Choose = Callable[[Request], Fault | None]


class FaultProxy:
    """Hands every request on to the store, but for those for which ``choose`` names a fault."""

    def __init__(self, store: str, choose: Choose) -> None:
        self.choose = choose
        self.requests: list[Request] = []
        self.faults: list[tuple[Request, Fault]] = []
        parts = urlsplit(store)
        self._store = (parts.hostname or "", parts.port or 80)
        self._numbers = itertools.count()
        self._over = asyncio.Event()

    async def serve(self, started: Callable[[int], None]) -> None:
        """Until :attr:`stop`; ``started`` is told the port."""
        server = await asyncio.start_server(self._talk, "127.0.0.1", 0, limit=1 << 20)
        started(server.sockets[0].getsockname()[1])
        await self._over.wait()
        server.close()

    def stop(self) -> None:
        """In the loop's own thread."""
        self._over.set()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while await self._one(reader, writer):
                pass
        with contextlib.suppress(OSError):
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request; whether the connection goes on."""
        head = await reader.readuntil(b"\r\n\r\n")
        body = await reader.readexactly(_length(head))
        method, target, _ = head.split(b"\r\n", 1)[0].decode().split(" ")
        request = Request(next(self._numbers), method, target, len(body))
        self.requests.append(request)
        fault = self.choose(request)
        if fault is not None:
            self.faults.append((request, fault))
        if fault == "hang":
            await self._over.wait()
            return False
        if fault in _STATUS:
            text = f"<?xml version='1.0'?><Error><Code>{_CODES[fault]}</Code><Message>made to fail</Message></Error>"
            writer.write(f"HTTP/1.1 {_STATUS[fault]}\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode())
            await writer.drain()
            return True
        if fault == "flipped" and body:
            body = bytes([body[0] ^ 1]) + body[1:]
        answer = await self._asked(head, body)
        if fault == "lost":
            writer.transport.abort()
            return False
        if fault in _HALF:
            answer = _halved(answer, tells=fault == "wrong-length")
        writer.write(answer)
        await writer.drain()
        if fault == "reset":
            await asyncio.sleep(0.05)  # the half gets out before the reset overtakes it
            writer.transport.abort()
        return fault not in ("reset", "short")

    async def _asked(self, head: bytes, body: bytes) -> bytes:
        """The store's whole answer, over a connection of its own."""
        reader, writer = await asyncio.open_connection(*self._store, limit=1 << 20)
        try:
            lines = [line for line in head.rstrip().split(b"\r\n") if not line.lower().startswith(b"connection:")]
            writer.write(b"\r\n".join([*lines, b"Connection: close", b"", b""]) + body)
            await writer.drain()
            whole = await reader.read()
        finally:
            writer.close()
        answer_head, _, rest = whole.partition(b"\r\n\r\n")
        kept = [line for line in answer_head.split(b"\r\n") if not line.lower().startswith(b"connection:")]
        return b"\r\n".join(kept) + b"\r\n\r\n" + rest


def _length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    return 0


def _halved(answer: bytes, tells: bool) -> bytes:
    """Half of the body; the head ``tells`` it or not."""
    head, _, body = answer.partition(b"\r\n\r\n")
    half = body[: len(body) // 2]
    if tells:
        length = b"Content-Length: %d" % len(half)
        lines = [length if line.lower().startswith(b"content-length:") else line for line in head.split(b"\r\n")]
        head = b"\r\n".join(lines)
    return head + b"\r\n\r\n" + half


@contextlib.contextmanager
def fault_proxy(store: str, choose: Choose = lambda request: None) -> Iterator[tuple[FaultProxy, str]]:
    """A running proxy in front of a store, and its address; ``choose`` may be set anew at any time."""
    loop = asyncio.new_event_loop()
    proxy = FaultProxy(store, choose)
    ports: list[int] = []
    ready = threading.Event()

    def started(port: int) -> None:
        ports.append(port)
        ready.set()

    async def whole() -> None:
        await proxy.serve(started)
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    thread = threading.Thread(target=loop.run_until_complete, args=(whole(),), daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield proxy, f"http://127.0.0.1:{ports[0]}"
    finally:
        loop.call_soon_threadsafe(proxy.stop)
        thread.join(10)
        loop.close()
