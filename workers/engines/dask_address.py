"""Where a Dask scheduler may be, and the files by which it and this machine know each other.

A Dask scheduler runs what anyone who reaches its port sends it: messages are pickles. So an address is used that only
this machine can reach, or one that asks for a certificate:

    tls://host:port    with the three files of the site file's section ``dask_tls``
    host:port          the same where ``dask_tls`` is there, else as tcp
    tcp://host:port    on 127.0.0.1, ::1 or localhost alone, and without ``dask_tls``
"""

from __future__ import annotations

import ipaddress
import ssl
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict

from vnet_core.errors import ConfigError

DEFAULT_PORT = 8786


class DaskTls(BaseModel):
    """Section ``dask_tls`` of the site file: all three files, or none."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    ca_file: str = ""
    """Certificate of the authority that signed for the scheduler, its workers and this machine, PEM; of its own, since
    whoever it signed for may run anything."""
    cert_file: str = ""
    """Certificate of this machine, PEM."""
    key_file: str = ""
    """Key of that certificate, PEM, without a passphrase."""

    @property
    def is_given(self) -> bool:
        """Whether any of the files is named."""
        return bool(self.ca_file or self.cert_file or self.key_file)


NO_TLS = DaskTls()


@dataclass(frozen=True, slots=True)
class Tls:
    """Files that were found to fit each other."""

    ca_file: str
    cert_file: str
    key_file: str


def checked_address(address: str, files: DaskTls) -> tuple[str, Tls | None]:
    """The scheduler's URL, with the files that it is joined with; None over plain tcp on this machine.

    Raises ConfigError ``dask.address`` for what is no address, ``dask.plain-tcp`` for one that others can reach and
    nobody has to show a certificate at, ``dask.tls-address`` for tcp:// beside ``dask_tls``, and ``dask.tls-files``
    where a file is not named, not there, or does not fit.
    """
    scheme, host, port = _parts(address)
    if scheme == "tls" or (not scheme and files.is_given):
        return f"tls://{_joined(host, port)}", _checked_files(address, files)
    if files.is_given:
        raise ConfigError(
            "dask.tls-address",
            f"dask_address {address} is not encrypted although the site file has dask_tls; write"
            f" tls://{_joined(host, port)}, or take the section out",
        )
    if not _is_this_machine(host):
        raise ConfigError(
            "dask.plain-tcp",
            f"dask_address {address} is neither on this machine nor encrypted, and a Dask scheduler runs what anyone"
            f" sends it; start it with TLS, write tls://{_joined(host, port)}, and name ca_file, cert_file and key_file"
            " under dask_tls",
        )
    return f"tcp://{_joined(host, port)}", None


def _parts(address: str) -> tuple[str, str, int]:
    """Scheme or '', host and port."""
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        scheme, host, port = parts.scheme, parts.hostname or "", parts.port or DEFAULT_PORT
    except ValueError as error:
        raise ConfigError("dask.address", f"dask_address {address!r} is no host:port ({error})") from None
    if scheme not in ("", "tcp", "tls") or not host or parts.path.strip("/") or parts.query or parts.username:
        raise ConfigError("dask.address", f"dask_address {address!r} is not tls://host:port or tcp://127.0.0.1:port")
    return scheme, host, port


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _checked_files(address: str, files: DaskTls) -> Tls:
    named = {name: getattr(files, name) for name in DaskTls.model_fields}
    missing = [name for name, path in named.items() if not path]
    if missing:
        raise ConfigError(
            "dask.tls-files",
            f"dask_address {address} needs {', '.join(missing)} in section dask_tls of the site file: PEM files of the"
            " authority and of this machine",
        )
    paths = {name: str(Path(path).expanduser().resolve()) for name, path in named.items()}
    for name, path in paths.items():
        try:
            Path(path).open("rb").close()
        except OSError as error:
            raise ConfigError(
                "dask.tls-files",
                f"dask_tls.{name} {path} cannot be read ({error.strerror}); correct the path or its permissions",
            ) from None
    found = Tls(**paths)
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(found.ca_file)
        # a passphrase is given, or OpenSSL would ask for one on the terminal
        context.load_cert_chain(found.cert_file, found.key_file, password="")
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(
            "dask.tls-files",
            f"ca_file {found.ca_file}, cert_file {found.cert_file} and key_file {found.key_file} of dask_tls do not"
            f" work together ({error}); each must be PEM, the key that of the certificate and without a passphrase",
        ) from None
    return found
