"""Who is behind a case: ids that name nobody, and the one folder that tells whose scan a case is.

The storage root, its reports, masks and logs hold case ids alone. Where the scans of a case lie, which may name a
patient, is written to the private folder under the same keys as the case's entry has in the root.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
import tempfile
import warnings
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from vnet_core.errors import ConfigError, StorageError
from workers.storage.store import Root

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""Names of cohorts, cases and models: they become folders and artifact keys."""
DIGITS = 10
"""Hex digits of a pseudonym: two of a million cases share one with a probability of about 0.4, then one is refused."""
SECRET_BYTES = 32
"""Length of a secret that is made here; a given one must have at least half."""
KEY = "identity.json"
"""Where the root keeps the site's section, so that workers and commands without the site file follow it."""
MODALITIES = frozenset(("CR", "CT", "DX", "IVUS", "MG", "MR", "NM", "OCT", "OPT", "PT", "RTDOSE", "US", "XA", "XRF"))
"""Defined terms of Modality (0008,0060) that may stand in an id; the tag may hold any text, so others may not."""


class Identity(BaseModel):
    """Section ``identity`` of the site file."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    ids: Literal["names", "pseudonyms"] = "names"
    """Ids of plain files and of rows of a manifest: their names, or pseudonyms; DICOM always gets pseudonyms."""
    private: str | None = None
    """Folder that alone tells where the scans of a case lie; left out, `private` in the storage root, or of a root in
    a bucket in this machine's own folder."""
    secret_file: str | None = None
    """Secret of the pseudonyms, 16 bytes or more; left out, `secret` in the private folder, made at first use."""


def keep_identity(root: Root, wanted: Identity) -> None:
    """Write the site's section into the root, its paths absolute; nothing is written when it stands there already."""
    paths = {name: _absolute(getattr(wanted, name)) for name in ("private", "secret_file")}
    kept = wanted.model_copy(update=paths)
    if kept != identity_of(root):
        root.put_json(KEY, kept.model_dump())


def _absolute(path: str | None) -> str | None:
    return str(Path(path).expanduser().resolve()) if path else None


def identity_of(root: Root) -> Identity:
    """The section that the root keeps, or the default. StorageError ``store.corrupt`` when it cannot be read."""
    if not root.exists(KEY):
        return Identity()
    try:
        return Identity.model_validate(root.get_json(KEY))
    except ValidationError:
        raise StorageError("store.corrupt", f"{KEY} is not as it was written; run again with the site file") from None


def private_folder(root: Root) -> Path:
    """Where the private parts lie, whether it is there or not. StorageError ``store.corrupt``."""
    return Path(identity_of(root).private or root.home / "private")


def private_root(root: Root) -> Root:
    """The private folder; it is made, for its owner alone, when it is not there.

    StorageError ``identity.unwritable`` when it cannot be made.
    """
    folder = private_folder(root)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            "identity.unwritable",
            f"the private folder {folder} cannot be made ({error.strerror}); mount it, or correct identity.private in"
            " the site file",
        ) from None
    return Root(folder)


def put_private(private: Root, key: str, facts: dict[str, Any]) -> None:
    """Write what may name a patient; files are for their owner alone, and so are the folders made for them."""
    folder = private.home
    for part in key.split("/")[:-1]:
        folder /= part
        folder.mkdir(mode=0o700, exist_ok=True)
    private.put_json(key, facts)


def get_private(private: Root, key: str) -> dict[str, Any]:
    """What :func:`put_private` wrote. StorageError ``identity.no-private`` names the folder when it is not there."""
    try:
        facts: dict[str, Any] = private.get_json(key)
    except StorageError as error:
        if error.code != "store.missing":
            raise
        raise StorageError(
            "identity.no-private",
            f"the private folder {private.shown} has no {key}, which tells where scans lie; mount the folder, correct"
            " identity.private in the site file, or run vnet ingest SOURCE --cohort again",
        ) from None
    return facts


def safe_id(text: str) -> str:
    """A case id from any text: unusual characters become '-', and a short digest keeps the ids distinct."""
    if NAME.fullmatch(text):
        return text
    cleaned = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._") or "case"
    return f"{cleaned[:80]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


SILENT = logging.CRITICAL + 1


def hush_readers() -> None:
    """Keep what pydicom says about values off logs and terminals, in this process from now on: it quotes them."""
    logger = logging.getLogger("pydicom")
    if logger.level != SILENT:  # setting it empties the caches of all loggers
        logger.setLevel(SILENT)
    warnings.filterwarnings("ignore", module="pydicom")


class Pseudonyms:
    """Ids as the site wants them. Equal texts get equal ids on every machine that has the secret.

    A pseudonym is HMAC-SHA256 with the secret, so that who knows a patient's number cannot find the id by trying.
    """

    def __init__(self, ids: Literal["names", "pseudonyms"], secret_file: Path) -> None:
        self.ids, self.secret_file = ids, secret_file

    @classmethod
    def of(cls, root: Root) -> Pseudonyms:
        """Those of a storage root; its secret is read, or made, when the first pseudonym is."""
        identity = identity_of(root)
        return cls(identity.ids, Path(identity.secret_file or private_root(root).home / "secret"))

    def case(self, name: str) -> str:
        """Id of a plain file or of a row of a manifest."""
        return safe_id(name) if self.ids == "names" else f"case-{self._digits('case', name)}"

    def series(self, modality: str, uid: str, part: str = "") -> str:
        """Id of a DICOM volume, such as ``CT-0a1b2c3d4e``: of its SeriesInstanceUID and its part of that series."""
        kind = modality if modality in MODALITIES else "DICOM"
        return f"{kind}-{self._digits('series', f'{uid}/{part}')}"

    def patient(self, patient: str, study: str = "") -> str | None:
        """Pseudonym ``P-...`` of a DICOM patient: of PatientID, or where that is empty of StudyInstanceUID."""
        if patient.strip():
            return f"P-{self._digits('patient', patient.strip())}"
        return f"P-{self._digits('study', study)}" if study else None

    def named_patient(self, patient: str | None) -> str | None:
        """Patient of a row of a manifest, as it stands there or its pseudonym."""
        if patient is None or not patient.strip():
            return None
        return patient if self.ids == "names" else self.patient(patient)

    def cohort(self, sources: str) -> str:
        """Name ``scans-...`` of a cohort that is known by its sources alone."""
        return f"scans-{self._digits('cohort', sources)}"

    def _digits(self, kind: str, text: str) -> str:
        message = f"{kind}\0{text}".encode("utf-8", "surrogateescape")
        return hmac.digest(self._secret, message, "sha256").hex()[:DIGITS]

    @cached_property
    def _secret(self) -> bytes:
        if not self.secret_file.exists():
            _make_secret(self.secret_file)
        try:
            secret, mode = self.secret_file.read_bytes(), self.secret_file.stat().st_mode
        except OSError as error:
            raise ConfigError(
                "identity.secret", f"the secret {self.secret_file} cannot be read ({error.strerror}); mend its mode"
            ) from None
        if len(secret) < SECRET_BYTES // 2:
            raise ConfigError(
                "identity.secret",
                f"the secret {self.secret_file} has {len(secret)} bytes, {SECRET_BYTES // 2} are the fewest; restore"
                " it, or remove it and every id changes",
            )
        if mode & 0o007:
            raise ConfigError(
                "identity.secret",
                f"the secret {self.secret_file} has mode {mode & 0o777:04o}, so everybody on this machine may use it;"
                " chmod 0600",
            )
        return secret


def _make_secret(path: Path) -> None:
    """A new secret, mode 0600, whole or not at all; one that another process has made meanwhile stays."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # mkstemp's files have mode 0600
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".secret-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(secrets.token_bytes(SECRET_BYTES))
                file.flush()
                os.fsync(file.fileno())
            os.link(temporary, path)
        except FileExistsError:
            pass
        finally:
            Path(temporary).unlink()
    except OSError as error:
        raise ConfigError(
            "identity.secret",
            f"the secret {path} cannot be made ({error.strerror}); correct identity.secret_file in the site file",
        ) from None
