"""Asking a Prefect API over HTTP without importing Prefect: whether it answers, and answers us; short questions."""

from __future__ import annotations

import base64
import http.client
import json
import os
import threading
import urllib.error
import urllib.request
from concurrent.futures import Future
from typing import Any

from vnet_core.errors import EngineError

API_TIMEOUT_S = 10.0
"""How long an API that is named may take to answer."""
HEALTH_TIMEOUT_S = 2.0
REQUEST_TIMEOUT_S = 30.0
UNAUTHORIZED = 401


def is_healthy(url: str) -> bool:
    """Whether an API answers; asked past any proxy."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=HEALTH_TIMEOUT_S)
    try:
        connection.request("GET", "/api/health")
        return connection.getresponse().read(64) == b"true"
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def check_api(url: str, timeout_s: float = API_TIMEOUT_S) -> None:
    """Return when a Prefect API answers at ``url`` (it ends in ``/api``) within ``timeout_s``, and answers us.

    Raises EngineError ``prefect.unreachable`` naming the address, and ``prefect.refused`` when it wants another
    PREFECT_API_AUTH_STRING.
    """
    answer: Future[bytes] = Future()

    def ask() -> None:
        try:
            health = _read(f"{url.rstrip('/')}/health", timeout_s)
            if health == b"true":
                # the one question that it answers everybody is how it does
                _read(f"{url.rstrip('/')}/admin/version", timeout_s)
            answer.set_result(health)
        except (OSError, ValueError, http.client.HTTPException) as error:
            answer.set_exception(error)

    # looking up a name has no time limit of its own, so the whole question gets a thread
    threading.Thread(target=ask, daemon=True).start()
    try:
        if answer.result(timeout_s) == b"true":
            return
        reason = "what answers there is no Prefect API"
    except TimeoutError:
        reason = f"no answer within {timeout_s:g} s"
    except urllib.error.HTTPError as error:
        if error.code == UNAUTHORIZED:
            raise _refused(url) from None
        reason = str(error)
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = str(getattr(error, "reason", error))
    raise EngineError(
        "prefect.unreachable",
        f"the Prefect API at {url} does not answer ({reason}); start it, correct PREFECT_API_URL or the site file"
        " (the address ends in /api), or leave it out to use this machine",
    )


def _read(url: str, timeout_s: float) -> bytes:
    """The first bytes that a GET is answered with."""
    # whoever runs the program names the address
    request = urllib.request.Request(url, headers=_authorization())  # noqa: S310
    with urllib.request.urlopen(request, timeout=timeout_s) as response:  # noqa: S310
        return bytes(response.read(64))


def _authorization() -> dict[str, str]:
    """The header that names this process to an API with authentication; none without PREFECT_API_AUTH_STRING."""
    secret = os.environ.get("PREFECT_API_AUTH_STRING")
    return {"Authorization": f"Basic {base64.b64encode(secret.encode()).decode()}"} if secret else {}


def _refused(url: str) -> EngineError:
    given = "the PREFECT_API_AUTH_STRING of this process" if _authorization() else "requests without a login"
    return EngineError(
        "prefect.refused",
        f"the Prefect API at {url} refuses {given}; set PREFECT_API_AUTH_STRING to what the server has in"
        " PREFECT_SERVER_API_AUTH_STRING",
    )


def post(url: str, body: dict[str, Any], timeout_s: float = REQUEST_TIMEOUT_S) -> Any:
    """What a Prefect API answers to a request with JSON.

    Raises EngineError ``prefect.unreachable``, and ``prefect.refused`` as :func:`check_api`.
    """
    headers = {"Content-Type": "application/json", **_authorization()}
    # the address is that of check_api
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:  # noqa: S310
            return json.load(response)
    except OSError as error:
        if isinstance(error, urllib.error.HTTPError) and error.code == UNAUTHORIZED:
            raise _refused(url) from None
        raise EngineError("prefect.unreachable", f"the Prefect API at {url} does not answer ({error})") from error
