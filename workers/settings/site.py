"""The site file: where things run, as opposed to the plan, which decides numbers."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from vnet_core.errors import ConfigError
from vnet_core.plan import config_error
from workers.engines.clusters import TRAIN_HANG_S, Engines, processors
from workers.engines.dask_address import NO_TLS, DaskTls
from workers.identity import Identity
from workers.settings.retention_rules import KEEP_EVERYTHING, Retention
from workers.settings.rules import CLOCK, DEFAULT_RULES, NightRules


class Nightly(BaseModel):
    """A cohort that is run on a schedule."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    cohort: str = Field(min_length=1)
    """Name of the cohort."""
    model: str = Field(min_length=1)
    """`name` for its champion or else its newest version, or `name@version`."""
    cron: str = "0 1 * * *"
    """When, in the site's time zone; the default is one o'clock every night."""
    rules: NightRules = DEFAULT_RULES
    """When its nights stop, how often they try, and whom they ask."""
    catch_up: Literal["run", "skip"] = "run"
    """What `vnet serve` does at its start about nights that were missed: `run` one at once, or wait for the next."""
    watch: bool = False
    """Start a night too when files arrive in the cohort's sources."""
    watch_quiet_s: float = Field(default=60.0, gt=0)
    """Seconds without a change before files count as arrived."""
    success_by: str = Field(default="", pattern=CLOCK)
    """Time of day by which a night must have ended well; left out, nobody is told."""
    most_failures: int | None = Field(default=None, ge=0)
    """More failed cases in a night than this are told; left out, nobody is told."""


class Site(BaseModel):
    """Addresses and sizes of one installation; every key may be left out."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    root: str = "vnet-data"
    """Storage root: a folder, a file:// URL or s3://bucket/prefix."""
    dask_address: str | None = None
    """Scheduler, such as tls://10.0.0.5:8786; tcp:// on this machine alone; left out, Dask starts on this machine."""
    dask_tls: DaskTls = NO_TLS
    """How the scheduler and this machine know each other."""
    ray_address: str | None = None
    """Head of a Ray cluster, such as 10.0.0.5:6379; left out, RAY_ADDRESS, or else Ray starts on this machine."""
    preprocess_workers: int | None = Field(default=None, ge=1)
    """Local Dask processes; left out, one per processor core."""
    segment_workers: int = Field(default=1, ge=1)
    """Ray actors that segment, each with the model loaded once."""
    train_workers: int = Field(default=1, ge=1)
    """Ray workers that train one model together; with `train_workers_max` the fewest."""
    train_workers_max: int | None = Field(default=None, ge=1)
    """The most, as far as the Ray cluster has room: a training goes on with fewer after a loss, and with more when
    machines come. Left out, it is always `train_workers`."""
    train_hang_s: float = Field(default=TRAIN_HANG_S, gt=0)
    """Seconds after which a training worker that the others wait for counts as hung, and the group starts again from
    its checkpoint; more than a worker's share of a validation takes."""
    gpus_per_worker: float = Field(default=0.0, ge=0)
    """GPUs of each training or segmenting worker; fractions share one."""
    segment_cpus: int | None = Field(default=None, ge=1)
    """Processor cores of each segmenting actor; left out, an equal share of this machine's."""
    ray_wait_s: float = Field(default=120.0, gt=0)
    """Seconds that segmenting waits for a first actor to find a place; none by then, and the command ends."""
    case_limit_s: float = Field(default=3600.0, gt=0)
    """Seconds after which a case is taken from an actor and tried on another, unless its size explains them."""
    batch_cases: int = Field(default=32, ge=1, le=1000)
    """Cases per Prefect task."""
    timezone: str = "UTC"
    """IANA time zone of the schedule, such as Europe/Berlin."""
    nightly: tuple[Nightly, ...] = ()
    """What `vnet serve` runs on a schedule; never two runs of one cohort at once."""
    ui_port: int = Field(default=4200, ge=1, le=65535)
    """Port of the Prefect server that `vnet serve` starts on 127.0.0.1."""
    notify_url: str = Field(default="", repr=False)
    """Where messages go, as an Apprise URL, such as mailtos:// or msteams://; left out, they stand in the UI alone."""
    retention: Retention = KEEP_EVERYTHING
    """What `vnet gc` may take away."""
    identity: Identity = Identity()
    """What stands for patients, and where it is written who they are."""

    @field_validator("timezone")
    @classmethod
    def _known_zone(cls, name: str) -> str:
        try:
            ZoneInfo(name)
        except (ZoneInfoNotFoundError, ValueError):
            raise ValueError(f"{name!r} is no IANA time zone; use one such as Europe/Berlin") from None
        return name

    @model_validator(mode="after")
    def _range_of_workers(self) -> Site:
        if self.train_workers_max is not None and self.train_workers_max < self.train_workers:
            raise ValueError(
                f"train_workers_max {self.train_workers_max} is below train_workers {self.train_workers}; use at least"
                f" {self.train_workers}, or leave it out"
            )
        return self

    @property
    def zone(self) -> ZoneInfo:
        """The site's time zone."""
        return ZoneInfo(self.timezone)

    @property
    def engines(self) -> Engines:
        """Where work runs."""
        cpus = processors()
        return Engines(
            dask_address=self.dask_address,
            dask_tls=self.dask_tls,
            # a submitted Ray job finds its cluster there
            ray_address=self.ray_address or os.environ.get("RAY_ADDRESS") or None,
            preprocess_workers=self.preprocess_workers or cpus,
            segment_workers=self.segment_workers,
            train_workers=self.train_workers,
            train_workers_max=self.train_workers_max,
            train_hang_s=self.train_hang_s,
            cpus=cpus,
            gpus_per_worker=self.gpus_per_worker,
            segment_cpus=self.segment_cpus,
            ray_wait_s=self.ray_wait_s,
            case_limit_s=self.case_limit_s,
        )


def load_site(path: str | Path | None) -> Site:
    """The site file, or the default for one machine without it.

    Raises ConfigError ``site.missing``, ``site.toml``, ``site.unknown-key`` or ``site.value``.
    """
    if path is None:
        return Site()
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError("site.toml", f"site file {path} is not UTF-8: {error}") from None
    except OSError as error:
        raise ConfigError("site.missing", f"site file {path} cannot be read ({error.strerror})") from None
    try:
        return Site.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError("site.toml", f"site file {path} is not TOML: {error}") from None
    except ValidationError as error:
        raise config_error(error, Site, "site") from None
