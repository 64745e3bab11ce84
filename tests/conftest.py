"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_scans() -> Path:
    """Folder of real scans: the environment variable VNET_SCANS, or shared/data beside the checkout."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("VNET_SCANS", default))
    if not folder.is_dir():
        pytest.skip(f"no folder of real scans at {folder} (set VNET_SCANS)")
    return folder
