"""The client's settings: where each value comes from, and that the key stays private."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from scheduler.client.config import DEFAULT_ADDRESS, ClientConfig, masked, read_config, store_setting
from scheduler.client.errors import ConfigUnreadable


def config(path: Path, *, flags: dict[str, str | None] | None = None, **environment: str) -> ClientConfig:
    return read_config(flags=flags or {}, environment=environment, path=path)


def test_flags_win_over_environment_over_file_over_default(tmp_path: Path) -> None:
    path = tmp_path / "client.toml"
    assert config(path).value("address") == DEFAULT_ADDRESS
    assert config(path).value("key") == ""
    store_setting(path, "address", "file:1")
    assert config(path).value("address") == "file:1"
    assert config(path, DARKROOM_ADDRESS="environment:1").value("address") == "environment:1"
    both = config(path, flags={"address": "flag:1", "key": None}, DARKROOM_ADDRESS="environment:1")
    assert both.value("address") == "flag:1"


def test_each_value_names_its_source(tmp_path: Path) -> None:
    path = tmp_path / "client.toml"
    store_setting(path, "ca_file", "/etc/ca.pem")
    settings = config(path, flags={"address": "flag:1"}, DARKROOM_KEY="dk_a_b").settings
    assert {name: setting.source for name, setting in settings.items()} == {
        "address": "--address",
        "key": "DARKROOM_KEY",
        "ca_file": str(path),
    }


def test_the_file_is_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "client.toml"
    store_setting(path, "key", "dk_ada_secret")
    store_setting(path, "address", "host:1")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [each.name for each in path.parent.iterdir()] == ["client.toml"]


def test_what_is_stored_is_read_back_and_an_empty_value_removes(tmp_path: Path) -> None:
    path = tmp_path / "client.toml"
    strange = 'C:\\keys\\"Zoë"\\ca.pem'
    store_setting(path, "ca_file", strange)
    store_setting(path, "key", "dk_a_b")
    store_setting(path, "key", "")
    assert config(path).value("ca_file") == strange
    assert "key" not in config(path).settings


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("address = ", "not valid TOML"),
        ('adress = "host:1"', "unknown setting 'adress'"),
        ("address = 7443", "must be text in quotes"),
    ],
)
def test_a_file_that_is_wrong_is_refused_with_its_name(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "client.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigUnreadable, match=said) as caught:
        config(path)
    assert str(path) in str(caught.value)


def test_plain_text_may_be_a_boolean_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "client.toml"
    path.write_text("plain_text = true\n", encoding="utf-8")
    assert config(path).value("plain_text") == "true"


def test_of_a_key_only_its_id_is_shown() -> None:
    assert masked("key", "dk_7f3a_verysecret") == "dk_7f3a_…"
    assert masked("key", "verysecret") == "…"
    assert masked("address", "host:1") == "host:1"


@pytest.mark.parametrize("environment", [{"DARKROOM_CA_FILE": "/no/such.pem"}, {"DARKROOM_KEY": "dk_é_x"}])
def test_settings_that_cannot_work_are_refused_before_any_call(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    with pytest.raises(ConfigUnreadable):
        config(tmp_path / "client.toml", **environment).connect()
