"""Every setting of the service in one frozen object.

Values come from flags, then `DARKROOM_…` in the environment (`DARKROOM_DATABASE__DSN`), then `darkroom.toml`
in the working directory or the file that `DARKROOM_CONFIG` names, then the defaults here. The defaults run
everything embedded, on this machine, on loopback.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import platformdirs
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

RELEASE = "0.1.0"
"""Of this package."""


class _Section(BaseModel):
    # Whatever is wrong is told without what was given, which may be a password.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class Database(_Section):
    """PostgreSQL."""

    dsn: str | None = Field(default=None, repr=False)
    """None: an embedded server under `data_dir`. One with a password belongs into the environment: command
    lines are shown to everybody on the machine."""
    pool_size: int = Field(default=8, ge=2, le=200)

    @field_validator("dsn")
    @classmethod
    def _can_be_read(cls, dsn: str | None) -> str | None:
        # A password with a bare `/`, `?` or `#` ends what is before the host, and the driver would show what
        # it then takes for a port: the password.
        if dsn is not None and not _is_dsn(dsn):
            raise ValueError(
                "must be postgresql://user:password@host:port/database; in a password, @ : / ? # and % have "
                "to be written as %40 %3A %2F %3F %23 and %25"
            )
        return dsn


def _is_dsn(dsn: str) -> bool:
    try:
        url = urlsplit(dsn)
    except ValueError:
        return False
    hosts = url.netloc.rpartition("@")[2].split(",")
    ports = (host.rpartition("]")[2].partition(":")[2] for host in hosts)
    return url.scheme in ("postgresql", "postgres") and all(re.fullmatch("[0-9]*", port) for port in ports)


class RayCluster(_Section):
    """Where the scheduler and the workers run."""

    address: str | None = None
    """None: a local Ray of this process; `auto` or host:port: join that cluster."""
    local_gpus: int = Field(default=0, ge=0, le=64)
    """Workers of a local Ray. 0: one for each GPU of the machine, and two on its CPU where there is none."""
    namespace: str = "darkroom"
    scheduler_resource: str = Field(default="node:__internal_head__", min_length=1)
    """The scheduler runs only on machines that offer this Ray resource, so give it to none that an autoscaler
    may take away: it would stay for the scheduler's sake. The default is what Ray's head offers."""

    @field_validator("scheduler_resource")
    @classmethod
    def _one_of_its_own(cls, name: str) -> str:
        if name in ("CPU", "GPU", "memory", "object_store_memory"):
            raise ValueError(
                f"{name} is what jobs and other programs take: choose another name, and start the machine "
                "with --resources '{\"NAME\": 1}'"
            )
        return name


class FrontDoor(_Section):
    """The gRPC service."""

    host: str = "127.0.0.1"
    port: int = Field(default=7443, ge=0, le=65535)
    """0: any free port."""
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    """Given: clients must show a certificate of this authority (mTLS)."""
    insecure: bool = False
    """Plain text on an address other than loopback must be asked for."""
    requests_per_second: float = Field(default=50.0, gt=0)
    """Per API key, with bursts of four times as many; each front door counts for itself."""
    streams_per_key: int = Field(default=20, ge=1)
    calls_at_once: int = Field(default=256, ge=1)
    """Calls in progress, without streams; more are told to come back. Few enough that each is answered
    soon."""
    submissions_at_once: int = Field(default=64, ge=1)
    """Of these: what is submitted waits no longer than so many take one after the other."""
    late_max_ms: int = Field(default=250, ge=10)
    """While calls wait longer than this before anybody looks at them, submissions are told to come back."""
    watches_at_once: int = Field(default=5_000, ge=1)
    """Open watches. Each holds about 40 KB, most of it gRPC's."""
    streams_per_connection: int = Field(default=10_000, ge=1)
    """Calls that are open at once on one connection; others wait. A proxy brings many clients on one."""
    connection_age_ms: int = Field(default=3_600_000, ge=1_000)
    """After which a client is asked to connect anew, so that front doors that came later get their share.
    Calls that are open go on, but for health checks without a key, which end after as long."""
    max_message_bytes: int = Field(default=4 * 1024 * 1024, ge=64 * 1024)
    stop_within_ms: int = Field(default=5_000, ge=0, le=3_600_000)
    """For calls in progress when it stops, and long downloads among them; what is left breaks off, and
    clients ask another front door."""

    @model_validator(mode="after")
    def _plain_text_only_on_loopback(self) -> FrontDoor:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key go together: set both or neither")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise ValueError(
                "tls_client_ca asks clients for certificates, which takes TLS: set tls_certificate"
            )
        loopback = self.host in ("127.0.0.1", "::1", "localhost")
        if self.tls_certificate is None and not loopback and not self.insecure:
            raise ValueError(
                f"refusing plain text on {self.host}: set frontdoor.tls_certificate and tls_key, "
                "or frontdoor.insecure = true if something in front of it ends TLS"
            )
        return self


class Pictures(_Section):
    """Pictures that are given with a prompt, as files or URLs. Workers never fetch any."""

    http_allowed: bool = False
    """Also fetch http:// URLs. Whoever is on the way can put another picture in its place."""
    fetch_ms: int = Field(default=10_000, ge=100, le=60_000)
    """For one URL in all: names, redirects, and the last byte. A person waits for the answer meanwhile."""
    bytes_max: int = Field(default=10 * 1024 * 1024, ge=64 * 1024)
    """Of one file. A camera's picture of 24 megapixels fits, as JPEG."""
    pixels_max: int = Field(default=25_000_000, ge=1_000_000, le=80_000_000)
    """Of one picture; a camera's has 24 million. Decoding takes up to 17 bytes each, of two at once."""


class Moderation(_Section):
    """What judges prompts beside the rules, which are in the database: `darkroom admin moderation`."""

    classifier: str | None = Field(default=None, pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    """`module:function`, as in scheduler/frontdoor/moderation_classifier.py; None: no classifier."""
    classifier_ms: int = Field(default=1_000, ge=10, le=30_000)
    """For one prompt. A person waits for the answer meanwhile."""
    classifier_permille: int = Field(default=500, ge=0, le=1_000)
    """A prompt is refused from this score on."""
    without_classifier: Literal["refuse", "pass"] = "refuse"
    """What becomes of prompts while the classifier fails or takes longer: `refuse` asks clients to repeat."""


class Ops(_Section):
    """The page for operators, /metrics, /metrics/scheduler, /healthz and /readyz.

    All of it is plain text. The page takes keys from this machine, and from others over TLS that something in
    front of it ends (and says so by X-Forwarded-Proto) or where `frontdoor.insecure` allows plain text.
    """

    host: str = "127.0.0.1"
    port: int = Field(default=7444, ge=0, le=65535)


class Canary(_Section):
    """Small jobs that front doors give the service, to see that it works: one in each tier, now and then."""

    account: str | None = None
    """Whose they are; None: there are none. It needs a plan with relax, and with fast time for a job every
    `every_s`. Its pictures are shown to all unless it keeps them private."""
    every_s: int = Field(default=60, ge=10, le=300)
    """Often enough that CanaryFailing (deploy/prometheus/alert_rules.yml) tells a failure from a pause."""


class Worker(_Section):
    """GPU workers."""

    engine: Literal["diffusers", "timed"] = "diffusers"
    """`timed` draws plain colours after the given time: for trying out scheduling without a model."""
    timed_step_ms: int = Field(default=50, ge=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = Field(default=1, ge=1)
    """CPU threads of each worker."""
    heartbeat_ms: int = Field(default=3_000, ge=100)
    checkpoint_every_steps: int = Field(default=5, ge=1)
    """How many steps of a picture are done again, at most, when a GPU dies, beside those that pass while a
    checkpoint is being stored."""
    most_parked: int = Field(default=3, ge=1)
    """Runs that may wait on one GPU for a newer one to end; of more, the oldest wait as checkpoints."""


class Scheduling(_Section):
    """The loop. The policy's own parameters, with their reasons, are in scheduler/policy/parameters.py."""

    sweep_ms: int = Field(default=1_000, ge=50)
    """How often rows that nobody told the scheduler of are looked for."""
    waiting_max: int = Field(default=1_000_000, ge=1)
    """Jobs that may wait in this cell: the scheduler has all of them in memory, about 1 KB each. More or
    less, since front doors count once a second."""
    reconcile_every_ms: int = Field(default=300_000, ge=1_000)
    """How often the ledger is compared with its journal."""
    drain_within_ms: int = Field(default=60_000, ge=0, le=24 * 3_600_000)
    """How long a worker that drains has to finish what it has; what is left then goes on elsewhere. So has
    one of another release, before one of this takes its GPU."""
    close_down_within_ms: int = Field(default=10_000, ge=0, le=3_600_000)
    """For steps to end and checkpoints to be stored when the workers are to end: a local service that is told
    to stop, `darkroom stop`. What is not stored by then is drawn again from the checkpoint before."""
    record_to: Path | None = None
    """Folder for recordings, on the machine where the scheduler runs: all that its board is told and decides,
    a file for each time that a scheduler takes the lead, of which `darkroom replay` decides all again. The
    newest 20 stay. None: nothing is recorded."""
    record_bytes_max: int = Field(default=2**30, ge=2**20)
    """Of one recording, in which a job takes some 250; beyond it nothing more is recorded until a scheduler
    takes the lead anew."""

    @field_validator("record_to")
    @classmethod
    def _is_the_same_folder_everywhere(cls, record_to: Path | None) -> Path | None:
        if record_to is not None and not record_to.is_absolute():
            raise ValueError("must be a path from the root: the scheduler runs in another folder than this")
        return record_to


class Scaling(_Section):
    """A fleet that follows its work, on a cluster whose machines Ray's autoscaler starts and ends.

    A local Ray has the workers that `ray.local_gpus` says.
    """

    max_workers: int | None = Field(default=None, ge=1, le=10_000)
    """Workers that the scheduler may ask for: the budget. None: the fleet is what the cluster has."""
    min_workers: int = Field(default=1, ge=0, le=10_000)
    """Workers without any work. In a fleet that is not scaled, how many there should be in any case: to have
    fewer is an alarm (GpuWorkersMissing), as it is to lose one."""
    shrink_after_ms: int = Field(default=300_000, ge=0, le=24 * 3_600_000)
    """How long fewer are enough before there are fewer; Ray's idle timeout comes on top. A worker that starts
    loads its model again, which may take a minute."""

    @model_validator(mode="after")
    def _a_least_below_the_most(self) -> Scaling:
        if self.max_workers is not None and self.min_workers > self.max_workers:
            raise ValueError(f"min_workers is {self.min_workers}, above max_workers, {self.max_workers}")
        return self


class Tracing(_Section):
    """Traces: where the time of a call and its job went, in every process that had a part in it."""

    endpoint: str | None = Field(default=None, pattern=r"^https?://[^/@?#]+(/[^@?#]*)?$")
    """Collector that takes OTLP over HTTP (`http://collector:4318`), under /v1/traces there. None: nothing is
    sent. Each process sends its own spans, and needs the extra `tracing` for it. Keys and certificates that
    a collector wants are OpenTelemetry's to read, in the environment of each: OTEL_EXPORTER_OTLP_HEADERS."""
    sampled_permille: int = Field(default=1_000, ge=0, le=1_000)
    """Of the traces that begin here. Where a call names its trace (`traceparent`), that says whether."""


class Lifetimes(_Section):
    """How long what is written down stays; of all there is, scheduler/store/README.md has a table."""

    ended_jobs_ms: int = Field(default=600_000, ge=60_000, le=24 * 3_600_000)
    """How long a job that ended stays among those that live, which all that is done all day looks through.
    Longer than people go on with a job that they watched, so that its row seldom moves under their hands."""
    request_ids_days: int = Field(default=30, ge=1)
    """How long a request that is sent again under its id gets its first answer. Later it is done again, or
    refused (REQUEST_ID_REUSED) where it adjusted a balance, changed a plan or refunded: those ids are kept
    for ever. Clients try for minutes, but somebody may start a batch of last week again."""
    orphans_days: int = Field(default=7, ge=1)
    """How long a file in the artifact store that no row names is noted before it is removed. Longer than any
    attempt runs, and long enough to find out that the wrong backup of the database was restored."""


class Settings(BaseSettings):
    """All of it; `Settings()` reads the sources, keyword arguments win."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,
        env_prefix="DARKROOM_",
        env_nested_delimiter="__",
        toml_file="darkroom.toml",
    )

    data_dir: Path = Field(default_factory=lambda: Path(platformdirs.user_data_dir("darkroom")))
    """Embedded PostgreSQL, pictures and built models, where nothing else is given."""
    artifacts_url: str | None = None
    """fsspec address of the artifact store (`s3://bucket/prefix`); None: a folder under `data_dir`."""
    models_file: Path | None = None
    """models.toml; None: the one that ships with the package."""
    release: str = Field(default=RELEASE, pattern=r"^\d+\.\d+\.\d+$")
    """Part of every actor's name. It differs from the package's own only where two are tried side by side."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Prompts are only logged at debug."""
    database: Database = Database()
    ray: RayCluster = RayCluster()
    frontdoor: FrontDoor = FrontDoor()
    pictures: Pictures = Pictures()
    moderation: Moderation = Moderation()
    ops: Ops = Ops()
    canary: Canary = Canary()
    worker: Worker = Worker()
    scheduling: Scheduling = Scheduling()
    scaling: Scaling = Scaling()
    tracing: Tracing = Tracing()
    lifetimes: Lifetimes = Lifetimes()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, then environment, then the file."""
        file = Path(os.environ.get("DARKROOM_CONFIG", "darkroom.toml"))
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, toml_file=file)

    @model_validator(mode="after")
    def _a_cluster_shares_what_it_needs(self) -> Settings:
        if self.ray.address is not None:
            missing = [
                name
                for name, value in (
                    ("database.dsn", self.database.dsn),
                    ("artifacts_url", self.artifacts_url),
                )
                if value is None
            ]
            if missing:
                raise ValueError(
                    f"ray.address is given, so {' and '.join(missing)} must be too: what is embedded ends "
                    "with this process and cannot be reached from other machines"
                )
        return self

    @property
    def fingerprint(self) -> str:
        """The same for processes with the same settings; the database's address, with its password, aside."""
        said = self.model_dump_json(exclude={"database": {"dsn"}})
        return hashlib.sha256(said.encode()).hexdigest()[:12]

    @property
    def artifacts(self) -> str:
        """Address of the artifact store."""
        return self.artifacts_url or f"file://{self.data_dir.resolve()}/artifacts"
