"""Older versions of the reports and tables in the UI: Prefect keeps every version of an artifact, whole, for ever."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from flows.server.api import post

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.client.orchestration import SyncPrefectClient

PREFIXES = ("night-", "volumes-", "query-")
"""Keys of the artifacts that get a version with every night or question; models keep theirs."""
PAGE = 10
"""Versions that are read at once: a report has up to 800 kB, and they come with all they hold."""


def old_versions(api_url: str, days: int, now: datetime) -> int:
    """How many versions were made by runs that began more than ``days`` ago; the newest of each key is not counted.

    ``now`` is aware. EngineError ``prefect.unreachable``.
    """
    before = now - timedelta(days=days)
    with client_of(api_url) as client:
        newest = _newest(client)
    counted: int = post(
        f"{api_url}/artifacts/count",
        {
            "artifacts": {"key": {"any_": sorted(one.key for one in newest)}},
            "flow_runs": {"start_time": {"before_": before.isoformat()}},
        },
    )
    return counted - sum(one.created < before for one in newest)


def prune(api_url: str, days: int, now: datetime) -> int:
    """Delete the versions that :func:`old_versions` counts; how many went."""
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey, FlowRunFilter, FlowRunFilterStartTime
    from prefect.exceptions import ObjectNotFound

    before = now - timedelta(days=days)
    gone = stays = 0
    with client_of(api_url) as client:
        newest = _newest(client)
        kept = {one.id for one in newest}
        while found := client.read_artifacts(
            artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=sorted(one.key for one in newest))),
            flow_run_filter=FlowRunFilter(start_time=FlowRunFilterStartTime(before_=before)),
            limit=PAGE,
            offset=stays,
        ):
            for artifact in found:
                # a run that waited long for a person may have made it yesterday
                if artifact.id in kept or artifact.created is None or artifact.created >= before:
                    stays += 1
                    continue
                try:
                    client.delete_artifact(artifact.id)
                    gone += 1
                except ObjectNotFound:  # somebody else has just deleted it
                    continue
    return gone


@contextmanager
def client_of(api_url: str) -> Iterator[SyncPrefectClient]:
    """A client of the API at an address that ends in ``/api``."""
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: api_url}), get_client(sync_client=True) as client:
        yield client


@dataclass(frozen=True, slots=True)
class _Newest:
    """The newest version of a key."""

    key: str
    id: UUID
    created: datetime


def _newest(client: SyncPrefectClient) -> list[_Newest]:
    """Of every key with one of our prefixes. The server's own filter finds them anywhere in a key."""
    newest, seen = [], 0
    while found := client.read_latest_artifacts(limit=PAGE, offset=seen):
        seen += len(found)
        newest += [
            _Newest(one.key, one.latest_id, one.created)
            for one in found
            if one.key.startswith(PREFIXES) and one.created
        ]
    return newest
