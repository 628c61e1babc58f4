"""Every setting of the service in one frozen object.

Values come from flags, then `DARKROOM_…` in the environment (`DARKROOM_DATABASE__DSN`), then `darkroom.toml`
in the working directory or the file that `DARKROOM_CONFIG` names, then the defaults here. The defaults run
everything embedded, on this machine, on loopback.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import platformdirs
from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

RELEASE = "0.1.0"
"""Part of every actor's name, so that old and new can run side by side."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Database(_Section):
    """PostgreSQL."""

    dsn: str | None = None
    """None: an embedded server under `data_dir`."""
    pool_size: int = Field(default=8, ge=2, le=200)


class RayCluster(_Section):
    """Where the scheduler and the workers run."""

    address: str | None = None
    """None: a local Ray of this process; `auto` or host:port: join that cluster."""
    local_gpus: int = Field(default=2, ge=1, le=64)
    """Workers of a local Ray; logical GPUs where the machine has none."""
    namespace: str = "darkroom"


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
    """Per API key, with bursts of four times as many."""
    streams_per_key: int = Field(default=20, ge=1)
    max_message_bytes: int = Field(default=4 * 1024 * 1024, ge=64 * 1024)

    @model_validator(mode="after")
    def _plain_text_only_on_loopback(self) -> FrontDoor:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key go together: set both or neither")
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


class Ops(_Section):
    """/metrics, /healthz and /readyz."""

    host: str = "127.0.0.1"
    port: int = Field(default=7444, ge=0, le=65535)


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
    drain_within_ms: int = Field(default=60_000, ge=0, le=24 * 3_600_000)
    """How long a worker that drains has to finish what it has; what is left then goes on elsewhere."""


class Settings(BaseSettings):
    """All of it; `Settings()` reads the sources, keyword arguments win."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
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
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Prompts are only logged at debug."""
    database: Database = Database()
    ray: RayCluster = RayCluster()
    frontdoor: FrontDoor = FrontDoor()
    pictures: Pictures = Pictures()
    ops: Ops = Ops()
    worker: Worker = Worker()
    scheduling: Scheduling = Scheduling()

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
    def artifacts(self) -> str:
        """Address of the artifact store."""
        return self.artifacts_url or f"file://{self.data_dir.resolve()}/artifacts"
