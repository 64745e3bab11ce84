"""infra/sites: every file is a site, of the kind that its name says."""

import pytest

from tests.walkthrough import REPOSITORY
from workers.settings.site import Site, load_site
from workers.storage.store import Root

SITES = REPOSITORY / "infra" / "sites"


@pytest.mark.parametrize("name", ["laptop", "one-gpu", "server", "cluster"])
def test_it_loads_and_says_where_things_run(name: str) -> None:
    site = load_site(SITES / f"{name}.toml")
    alone = name in ("laptop", "one-gpu")
    assert (site.dask_address is None, site.ray_address is None) == (alone, alone)
    assert Root(site.root).url.startswith("file://" if alone else "s3://")
    assert (site.gpus_per_worker > 0) == (name in ("one-gpu", "cluster"))
    if not alone:
        assert site.dask_address is not None
        assert site.dask_address.startswith("tls://"), "Dask knows nobody without certificates"
        assert site.identity.private == "/private", "or every machine would keep names of its own"


def test_that_of_the_laptop_is_the_default_written_out() -> None:
    assert load_site(SITES / "laptop.toml") == Site()
