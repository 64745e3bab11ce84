"""A web server in this process that hands out ranges and breaks off on demand."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from workers.sources.datasets import Remote


@dataclass
class Site:
    """Files by path, how the server treats them, and the ranges that it was asked for."""

    files: dict[str, bytes] = field(default_factory=dict)
    url: str = ""
    etag: str = '"one"'
    knows_ranges: bool = True
    cut_after: list[int] = field(default_factory=list)
    """Bytes after which each of the next answers breaks off."""
    asked: list[str] = field(default_factory=list)

    def remote(self, name: str, checksum: str | None = None) -> Remote:
        return Remote(f"{self.url}/{name}", checksum)


@contextmanager
def serving() -> Iterator[Site]:
    """A running site without files."""
    served = Site()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_GET(self):
            served.asked.append(self.headers.get("Range", "whole"))
            body = served.files.get(self.path.lstrip("/"))
            if body is None:
                self.send_error(404)
                return
            start = 0
            match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            if served.knows_ranges and match and self.headers.get("If-Range") == served.etag:
                start = int(match[1])
            if start >= len(body) and body:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(body)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            if served.etag:
                self.send_header("ETag", served.etag)
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            part = body[start:]
            if served.cut_after:
                self.wfile.write(part[: served.cut_after.pop(0)])
                self.wfile.flush()
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
            else:
                self.wfile.write(part)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
