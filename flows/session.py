"""Which storage root and site a flow run works on: the environment says, so that forms ask only what people decide."""

from __future__ import annotations

import os
from dataclasses import dataclass

from workers.site import Site, load_site
from workers.store import Root

ROOT_VARIABLE = "VNET_ROOT"
SITE_VARIABLE = "VNET_SITE"


@dataclass(frozen=True, slots=True)
class Session:
    """The storage root, probed, and the site."""

    root: Root
    site: Site


def open_session() -> Session:
    """The session of this process, from VNET_ROOT and VNET_SITE.

    Raises ConfigError for a site file that cannot be used and StorageError ``store.unwritable``.
    """
    site = load_site(os.environ.get(SITE_VARIABLE) or None)
    root = Root(os.environ.get(ROOT_VARIABLE) or site.root)
    root.probe()
    return Session(root, site)
