"""Which storage root and site a flow run works on: the environment says, so that forms ask only what people decide."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from workers.identity import hush_readers, keep_identity
from workers.settings.site import Site, load_site
from workers.storage.modes import for_the_owner_alone
from workers.storage.store import Root

ROOT_VARIABLE = "VNET_ROOT"
SITE_VARIABLE = "VNET_SITE"


def utc_now() -> datetime:
    """The time."""
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True)
class Session:
    """The storage root, probed, and the site."""

    root: Root
    site: Site
    clock: Callable[[], datetime] = utc_now
    """Tells the time, in UTC."""


def open_session() -> Session:
    """The session of this process, from VNET_ROOT and VNET_SITE.

    A section ``identity`` of the site file is kept in the root and holds from then on, also without the file.

    Raises ConfigError for a site file that cannot be used and StorageError ``store.unwritable``.
    """
    for_the_owner_alone()
    hush_readers()
    site = load_site(os.environ.get(SITE_VARIABLE) or None)
    root = Root(os.environ.get(ROOT_VARIABLE) or site.root)
    root.probe()
    if "identity" in site.model_fields_set:
        keep_identity(root, site.identity)
    return Session(root, site)
