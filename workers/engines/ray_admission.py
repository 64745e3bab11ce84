"""Whether a Ray cluster lets this process in, and nobody without a token: asked before it is joined.

Two processes ask the head at once: one as this one would, by Ray's own chain (RAY_AUTH_MODE, RAY_AUTH_TOKEN,
RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token), and one as a stranger without a token. They are processes of their own since
Ray's client ends its process where it is to use a token and finds none, and takes twenty seconds over a wrong one.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

from vnet_core.errors import ConfigError, EngineError

MODE_VARIABLE = "RAY_AUTH_MODE"
REMEDY = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token to the cluster's token"
ASK = """
import sys
from ray._raylet import AuthenticationMode, AuthenticationTokenLoader, GcsClient, get_authentication_mode
from ray.exceptions import AuthenticationError

loader = AuthenticationTokenLoader.instance()
if get_authentication_mode() == AuthenticationMode.TOKEN and not loader.has_token(ignore_auth_mode=True):
    sys.exit("missing")
try:
    GcsClient(address=sys.argv[1]).internal_kv_get(b"CLUSTER_METADATA", b"cluster", timeout=float(sys.argv[2]))
except AuthenticationError:
    sys.exit("wrong")
print("in")
"""


def check_address(address: str) -> None:
    """ConfigError ``ray.address`` for what is no ``host:port`` of a head."""
    if not re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^\s:/\[\]]+):\d{1,5}", address):
        raise ConfigError(
            "ray.address",
            f"Ray address {address!r} is no host:port; give that of the head's GCS, such as 10.0.0.5:6379, in the site"
            " file or RAY_ADDRESS, and run the command on a machine of the cluster",
        )


def refuse_open_mode() -> None:
    """EngineError ``ray.open`` where the environment asks for a Ray on this machine that anybody may use."""
    mode = os.environ.get(MODE_VARIABLE, "token")
    if mode.lower() != "token":
        raise EngineError(
            "ray.open",
            f"{MODE_VARIABLE} is {mode!r}, and Ray's processes listen on every address of this machine: anybody who"
            f" reaches it could run programs on it; set {MODE_VARIABLE}=token or leave it out",
        )


def check_admission(address: str, limit_s: float) -> None:
    """Return when the cluster at ``host:port`` lets this process in and a stranger not, within ``limit_s``.

    EngineError ``ray.token`` for a token that is wrong or missing, ``ray.open`` for a cluster without authentication,
    ``ray.unreachable`` when it does not answer.
    """
    own = _asked(address, dict(os.environ), limit_s)
    stranger = _asked(address, os.environ | {MODE_VARIABLE: "disabled"}, limit_s)
    answer, lets_strangers_in = _answer(own, limit_s), _answer(stranger, limit_s) == "in"
    if lets_strangers_in:
        raise EngineError(
            "ray.open",
            f"the Ray cluster at {address} asks nobody for a token, and its processes listen beyond 127.0.0.1; start"
            f" every node with RAY_AUTH_MODE=token and one token, then {REMEDY}",
        )
    if answer in ("missing", "wrong"):
        mode = os.environ.get(MODE_VARIABLE, "not set")
        raise EngineError(
            "ray.token",
            f"the token for the Ray cluster at {address} is {answer} (RAY_AUTH_MODE is {mode}); {REMEDY}",
        )
    if answer != "in":
        raise EngineError(
            "ray.unreachable", f"Ray at {address} takes connections but does not answer ({answer}); restart its head"
        )


def _asked(address: str, environment: dict[str, str], limit_s: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", ASK, address, str(limit_s)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True)


def _answer(process: subprocess.Popen[str], limit_s: float) -> str:
    """``in``, ``wrong``, ``missing``, or the last line of what went wrong."""
    with process:
        try:
            out, err = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            process.kill()
            return f"nothing within {limit_s:.0f} s"
    said = (out if process.returncode == 0 else err).split("\n")
    return next((line.strip() for line in reversed(said) if line.strip()), f"exit code {process.returncode}")
