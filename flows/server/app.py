"""The process of a Prefect server of ours: API and UI, for pages of its own alone, for as long as its parent lives.

python -P -m flows.server.app LISTENER_FD ui|api
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from flows.server.settings import HOST
from workers.collector import collector_at_rest
from workers.storage.locks import alone
from workers.storage.modes import for_the_owner_alone

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

UI_POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "worker-src 'self' blob:",
        "connect-src 'self' ws://127.0.0.1:* ws://localhost:*",
        "frame-ancestors 'none'",
    )
)
"""Content security policy of every page: the UI talks to its own server only. Without it Prefect's UI asks a
statistics service for its configuration at each start, whatever the settings say."""


class _OwnPagesOnly:
    """ASGI layer: pages of other sites get no answer, HTTP or WebSocket; our own pages get ``UI_POLICY``."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        from starlette.responses import PlainTextResponse

        headers = dict(scope.get("headers", ()))
        own = b"http://" + headers.get(b"host", b"")
        if headers.get(b"origin", own) != own:
            await PlainTextResponse("request from a page of another site", 403)(scope, receive, send)
            return

        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", UI_POLICY.encode())]
            await send(message)

        await self._app(scope, receive, send_with_policy)


def _stop_with_parent() -> None:
    """Wait for the end of standard input, which the parent holds open, then end this process in good order."""
    while sys.stdin.buffer.read(1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _serve(listener_fd: int, kind: str) -> None:
    """The child process: Prefect's application on a socket that its parent has opened."""
    for_the_owner_alone()
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    with collector_at_rest():
        import uvicorn
        from prefect.server.api.server import create_app
        from starlette.middleware.trustedhost import TrustedHostMiddleware

        application = create_app(final=True, ephemeral=kind == "api")
    # around the application, not in it: the actions of automations ask it from within, as a host of another name
    own = _OwnPagesOnly(application)

    class OneStartAtATime(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            # two that make the tables of one database at once get in each other's way
            with alone(Path(os.environ["PREFECT_HOME"]) / "start.lock"):
                await super().startup(sockets)

    # a name that an attacker points at 127.0.0.1 gets no answer
    app = TrustedHostMiddleware(own, allowed_hosts=[HOST, "localhost"])
    server = OneStartAtATime(uvicorn.Config(app, log_level="warning"))
    server.run(sockets=[socket.socket(fileno=listener_fd)])


if __name__ == "__main__":
    _serve(int(sys.argv[1]), sys.argv[2])
