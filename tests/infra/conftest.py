"""Fixtures of the tests of infra/."""

import subprocess
from pathlib import Path

import pytest

from tests.walkthrough import REPOSITORY


@pytest.fixture(scope="session")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What infra/make-secrets makes."""
    folder = tmp_path_factory.mktemp("installation") / "secrets"
    subprocess.run([REPOSITORY / "infra" / "make-secrets", folder], check=True, capture_output=True)
    return folder
