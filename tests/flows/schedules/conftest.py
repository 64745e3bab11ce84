"""Fixtures of the tests of what runs by itself."""

from collections.abc import Iterator

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.server.process import ServerProcess


@pytest.fixture
def client(server: ServerProcess) -> Iterator[SyncPrefectClient]:
    """A client of the module's server."""
    with temporary_settings({PREFECT_API_URL: server.api_url}), get_client(sync_client=True) as opened:
        yield opened
