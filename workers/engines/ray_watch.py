"""Whether the Ray that this process has joined still lives: its head, and the raylet of this machine.

A driver that has lost one of them waits for long, and Ray ends its process without a word after a minute. So both are
asked by their ports every few seconds, from a thread.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vnet_core.errors import EngineError
from workers.beside import repeating
from workers.engines.clusters import HTTP2_GREETING

EVERY_S = 2.0
ANSWER_S = 5.0
"""How long a port may take to react to a greeting."""
FAILURES = 3
"""So many in a row are no hiccup: dead is known after about 6 s, frozen after about 20 s."""


@contextmanager
def watching(on_lost: Callable[[str], None]) -> Iterator[Callable[[], str]]:
    """Watch for the time of the block; ``on_lost`` is called once, from another thread, with what has died.

    The block gets a function that looks at once, and returns what does not react or an empty text.
    """
    places = {f"{name} at {place[0]}:{place[1]}": place for name, place in _places().items() if place}
    failures = dict.fromkeys(places, 0)

    def look() -> bool:
        for name, place in places.items():
            failures[name] = 0 if _reacts(*place) else failures[name] + 1
            if failures[name] >= FAILURES:
                on_lost(name)
                return True
        return False

    with repeating("ray-watch", EVERY_S, look):
        yield lambda: next((name for name, place in places.items() if not _reacts(*place)), "")


def lost(what: str, remedy: str) -> EngineError:
    """``ray.lost``, with what has died."""
    return EngineError("ray.lost", f"{what} died during the work; what was finished stays, {remedy}")


def _places() -> dict[str, tuple[str, int] | None]:
    """host and port of the head's GCS and of this machine's raylet."""
    import ray

    context = ray.get_runtime_context()
    host, _, port = context.gcs_address.rpartition(":")
    own = next((node for node in ray.nodes() if node["NodeID"] == context.get_node_id()), None)
    return {
        "the head of Ray": (host.strip("[]"), int(port)),
        "this machine's raylet": (own["NodeManagerAddress"], own["NodeManagerPort"]) if own else None,
    }


def _reacts(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=ANSWER_S) as peer:
            peer.sendall(HTTP2_GREETING)
            peer.recv(1)
    except ConnectionResetError:
        return True
    except OSError:
        return False
    return True
