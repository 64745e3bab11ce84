"""Limits of the system are told before anything starts."""

import os
import subprocess
import sys

import pytest

from tests.walkthrough import REPOSITORY
from workers.engines.machine import OPEN_FILES, PROCESSES

CHECK = """
import os, resource, sys
from vnet_core.errors import EngineError
from workers.engines.machine import check_machine
kind, limit, user = getattr(resource, sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
if user:
    os.setuid(user)
resource.setrlimit(kind, (limit, limit))
try:
    check_machine()
except EngineError as error:
    print(error.code, error.message)
"""
NOBODY = 65534


def told(kind: str, limit: int, user: int = 0) -> str:
    command = [sys.executable, "-c", CHECK, kind, str(limit), str(user)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout


@pytest.mark.fault("F35")
def test_too_few_open_files() -> None:
    message = told("RLIMIT_NOFILE", 64)
    assert message.startswith("machine.open-files this process may have 64 open files")
    assert f"ulimit -n {OPEN_FILES}" in message
    assert told("RLIMIT_NOFILE", OPEN_FILES) == ""


@pytest.mark.fault("F35")
def test_too_few_processes_unless_it_is_root_who_has_no_such_limit() -> None:
    if os.getuid():
        pytest.skip("only root can become somebody else, and is not limited himself")
    message = told("RLIMIT_NPROC", 40, NOBODY)
    assert message.startswith("machine.processes this process may have 40 processes")
    assert f"ulimit -u {PROCESSES}" in message
    assert told("RLIMIT_NPROC", PROCESSES, NOBODY) == ""
    assert told("RLIMIT_NPROC", 40) == ""
