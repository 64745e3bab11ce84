"""The settings with which Prefect is imported."""

from pathlib import Path

import pytest

from flows.server.settings import prefect_environment


def test_environment_leaves_what_the_user_has_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_HOME", "/elsewhere")
    monkeypatch.setenv("NO_PROXY", "example.org,127.0.0.1")
    monkeypatch.setenv("no_proxy", "*")
    result = prefect_environment(tmp_path)
    assert "PREFECT_HOME" not in result
    assert result["NO_PROXY"] == "example.org,127.0.0.1,localhost"
    assert "no_proxy" not in result
    monkeypatch.delenv("PREFECT_HOME")
    assert prefect_environment(tmp_path)["PREFECT_HOME"] == str(tmp_path)
