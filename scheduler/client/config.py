"""Where the service is and which key to use: flags, then `DARKROOM_…`, then client.toml, then the default.

The file is `client.toml` in the user's configuration folder (`~/.config/darkroom` on Linux). It can hold a
key, so it is written readable by its owner alone.
"""

from __future__ import annotations

import json
import os
import secrets
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from scheduler.client.aio import DarkroomClient, RetryPolicy, Tls
from scheduler.client.errors import ConfigUnreadable

DEFAULT_ADDRESS = "127.0.0.1:7443"

NAMES: Mapping[str, str] = {
    "address": "host:port of the service",
    "key": "API key, dk_…",
    "ca_file": "PEM file of the authority to trust; without it, the public ones",
    "certificate_file": "PEM file of a client certificate, where the service wants one",
    "private_key_file": "PEM file of that certificate's private key",
    "plain_text": "true: no TLS although the address is not loopback",
}
"""Every setting, and what it is."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One value and where it came from."""

    value: str
    source: str


@dataclass(frozen=True, kw_only=True)
class ClientConfig:
    """The settings in force; those that nothing gives are absent."""

    settings: Mapping[str, Setting]

    def value(self, name: str) -> str:
        """Return a setting as text; empty if nothing gives it."""
        setting = self.settings.get(name)
        return setting.value if setting is not None else ""

    def connect(self, *, retries: RetryPolicy | None = None) -> DarkroomClient:
        """Return a client for these settings. Raises ConfigUnreadable if the key or a TLS file is no good."""
        files = {name: self.value(name) for name in ("ca_file", "certificate_file", "private_key_file")}
        paths = {name: Path(text).expanduser() if text else None for name, text in files.items()}
        tls = Tls(**paths) if any(paths.values()) else None
        key = self.value("key")
        if not (key.isascii() and key.isprintable()):
            raise ConfigUnreadable("The key has characters that no key has; was it copied whole?")
        plain_text = self.value("plain_text") == "true"
        try:
            return DarkroomClient(self.value("address"), key, tls=tls, plain_text=plain_text, retries=retries)
        except OSError as error:
            raise ConfigUnreadable(f"{error.filename}: {error.strerror}.") from error


def config_path() -> Path:
    """Return where client.toml is, or would be."""
    return platformdirs.user_config_path("darkroom") / "client.toml"


def read_config(
    *, flags: Mapping[str, str | None], environment: Mapping[str, str], path: Path
) -> ClientConfig:
    """Return the settings in force, each from the first source that gives it. Raises ConfigUnreadable."""
    stored = _stored(path)
    settings: dict[str, Setting] = {}
    for name in NAMES:
        variable = f"DARKROOM_{name.upper()}"
        flag = flags.get(name)
        if flag is not None:
            settings[name] = Setting(value=flag, source=f"--{name.replace('_', '-')}")
        elif environment.get(variable):
            settings[name] = Setting(value=environment[variable].strip(), source=variable)
        elif name in stored:
            settings[name] = Setting(value=stored[name], source=str(path))
    settings.setdefault("address", Setting(value=DEFAULT_ADDRESS, source="default"))
    return ClientConfig(settings=settings)


def store_setting(path: Path, name: str, value: str) -> None:
    """Set one value in client.toml, or remove it if it is empty. Raises ConfigUnreadable."""
    if not value.isprintable():
        raise ConfigUnreadable(f"{name} has characters that cannot be printed.")
    stored = _stored(path)
    stored[name] = value
    # A JSON string of printable characters is a TOML string too.
    lines = [
        f"{name} = {json.dumps(stored[name], ensure_ascii=False)}\n" for name in NAMES if stored.get(name)
    ]
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.writelines(lines)
    os.replace(part, path)


def masked(name: str, value: str) -> str:
    """Return a value as it may be shown: of a key, only the part that names it."""
    if name != "key":
        return value
    prefix, _, rest = value.partition("_")
    key_id = rest.partition("_")[0]
    return f"{prefix}_{key_id}_…" if value.count("_") >= 2 else "…"


def _stored(path: Path) -> dict[str, str]:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigUnreadable.in_file(path, f"not valid TOML: {error}") from error
    except OSError as error:
        raise ConfigUnreadable.in_file(path, str(error.strerror)) from error
    for name, value in values.items():
        if name not in NAMES:
            raise ConfigUnreadable.in_file(path, f"unknown setting {name!r}; there are {', '.join(NAMES)}")
        if not isinstance(value, str) and not (name == "plain_text" and isinstance(value, bool)):
            raise ConfigUnreadable.in_file(path, f'{name} must be text in quotes, like {name} = "…"')
    return {name: value if isinstance(value, str) else str(value).lower() for name, value in values.items()}
