"""The service's settings as people meet them: what is wrong with them, and where each value came from."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_settings import EnvSettingsSource, SettingsError, TomlConfigSettingsSource

from scheduler.client.errors import ConfigUnreadable
from scheduler.settings import Settings

# A password in an address, or behind it as an option of the driver.
_PASSWORD = re.compile(r"(://[^/@:]*):.*@")
_OPTION = re.compile(r"([?&](?:password|sslpassword)=)[^&]*")


class SettingsWrong(ConfigUnreadable):
    """The service's settings cannot be used."""

    reason = "SETTINGS_WRONG"
    advice = "Correct darkroom.toml, the file that DARKROOM_CONFIG names, or the environment."

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One setting as it may be shown."""

    name: str
    """As in darkroom.toml, sections before a dot: `frontdoor.port`."""
    value: str
    """Empty where it is not set."""
    source: str
    """An environment variable, a file, or `default`."""


def read_settings(**given: Any) -> Settings:
    """Return the settings, with what is given over the environment and the file.

    Raises SettingsWrong, with all that is.
    """
    try:
        return Settings(**given)
    except ValidationError as wrong:
        problems = [
            f"{'.'.join(map(str, error['loc'])) or 'settings'}: {error['msg']}" for error in wrong.errors()
        ]
        raise SettingsWrong(problems) from None  # its own text may show what was given
    except tomllib.TOMLDecodeError as wrong:
        raise SettingsWrong([f"{_file()}: not valid TOML: {wrong}"]) from wrong
    except (SettingsError, UnicodeDecodeError) as wrong:
        raise SettingsWrong([str(wrong)]) from wrong


def settings_shown() -> list[Shown]:
    """Return every setting that `darkroom serve` would have here. Raises SettingsWrong."""
    settings = read_settings()
    file = _file()
    in_environment = EnvSettingsSource(Settings)()
    in_file = TomlConfigSettingsSource(Settings, toml_file=file)()
    shown = []
    for path, value in _values(settings, ()):
        if _given(in_environment, path):
            source = _variable(path)
        elif _given(in_file, path):
            source = str(file)
        else:
            source = "default"
        shown.append(Shown(name=".".join(path), value=masked(value), source=source))
    return shown


def masked(value: object) -> str:
    """Return a value as it may be shown: without the password of an address."""
    if value is None:
        return ""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return _OPTION.sub(r"\1…", _PASSWORD.sub(r"\1:…@", text))


def _file() -> Path:
    return Path(os.environ.get("DARKROOM_CONFIG", "darkroom.toml"))


def _values(section: BaseModel, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], object]]:
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _values(value, (*path, name))
        else:
            yield (*path, name), value


def _given(values: Mapping[str, Any], path: tuple[str, ...]) -> bool:
    """Return whether nested values have one at a path."""
    found: Any = values
    for name in path:
        if not isinstance(found, Mapping) or name not in found:
            return False
        found = found[name]
    return True


def _variable(path: tuple[str, ...]) -> str:
    """Return the environment variable that gives a setting: its own, or one with its whole section."""
    own = f"DARKROOM_{'__'.join(path)}".upper()
    there = {name.upper() for name in os.environ}
    return own if own in there else f"DARKROOM_{path[0]}".upper()
