"""TLS and mTLS, end to end: the real front door, the real client and its command line."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError
from structlog.testing import capture_logs
from typer.testing import Result

from scheduler.client.aio import DarkroomClient, Tls
from scheduler.client.errors import ConfigUnreadable, DarkroomError, ExitCode, ServiceUnreachable, TlsFailed
from scheduler.frontdoor.tls import TlsFiles, TlsUnusable
from scheduler.settings import FrontDoor as FrontDoorSettings
from tests.client.typed_commands import darkroom
from tests.frontdoor.door import Door
from tests.security.certificates import Authority


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """The one that everybody trusts here."""
    return Authority(tmp_path)


@pytest.fixture
def stranger(tmp_path: Path) -> Authority:
    """One that nobody trusts."""
    (tmp_path / "stranger").mkdir()
    return Authority(tmp_path / "stranger", "stranger")


@pytest.fixture
def mutual() -> bool:
    """Whether clients have to show a certificate too; a test may say so."""
    return False


@pytest.fixture
def server_files(authority: Authority) -> tuple[Path, Path]:
    return authority.issue("server")


@pytest.fixture
def frontdoor_settings(
    authority: Authority, server_files: tuple[Path, Path], mutual: bool
) -> FrontDoorSettings:
    certificate, key = server_files
    return FrontDoorSettings(
        port=0,
        tls_certificate=certificate,
        tls_key=key,
        tls_client_ca=authority.certificate if mutual else None,
    )


@pytest.fixture
async def key(door: Door) -> str:
    return (await door.caller("ann")).secret


async def _at_once(_: float) -> None:
    """Pause between repeats of a call for no time."""


async def _asks(door: Door, key: str, tls: Tls | None) -> str:
    async with DarkroomClient(door.address, key, tls=tls, pause=_at_once) as client:
        return (await client.account()).name


async def _refused(door: Door, key: str, tls: Tls | None) -> DarkroomError:
    with pytest.raises(DarkroomError) as caught:
        await _asks(door, key, tls)
    return caught.value


async def _types(folder: Path, *arguments: str) -> Result:
    """Type a command, with settings of its own."""
    ours = dict.fromkeys((name for name in os.environ if name.startswith("DARKROOM_")), "")
    # The command has an event loop of its own.
    return await asyncio.to_thread(darkroom, {**ours, "XDG_CONFIG_HOME": str(folder / "config")}, *arguments)


async def test_a_client_that_trusts_the_authority_is_served(
    door: Door, key: str, authority: Authority
) -> None:
    assert await _asks(door, key, Tls(ca_file=authority.certificate)) == "accounts/ann"


async def test_a_service_of_another_authority_is_not_spoken_to(
    door: Door, key: str, stranger: Authority
) -> None:
    error = await _refused(door, key, Tls(ca_file=stranger.certificate))
    assert type(error) is TlsFailed
    assert error.happened == (f"{door.address} shows a certificate of an authority that is not trusted here.")
    assert error.exit_code is ExitCode.UNAVAILABLE
    assert not error.retried


class TestWithTheCertificateOfAnotherHost:
    """Whoever has some certificate of an authority is not yet the service."""

    @pytest.fixture
    def server_files(self, authority: Authority) -> tuple[Path, Path]:
        return authority.issue("server", host="other.example")

    async def test_it_is_not_spoken_to(self, door: Door, key: str, authority: Authority) -> None:
        error = await _refused(door, key, Tls(ca_file=authority.certificate))
        assert type(error) is TlsFailed
        assert "another host's" in error.happened


class TestWithACertificateThatHasEnded:
    """A forgotten renewal is told as what it is."""

    @pytest.fixture
    def server_files(self, authority: Authority) -> tuple[Path, Path]:
        return authority.issue("server", ended=True)

    async def test_it_is_not_spoken_to(self, door: Door, key: str, authority: Authority) -> None:
        error = await _refused(door, key, Tls(ca_file=authority.certificate))
        assert type(error) is TlsFailed
        assert "has expired" in error.happened


async def test_a_client_that_speaks_plain_text_is_told_to_look_at_tls(door: Door, key: str) -> None:
    error = await _refused(door, key, None)
    assert type(error) is ServiceUnreachable
    assert "TLS" in str(error)
    assert key not in str(error)


class TestMutual:
    """Clients have to show a certificate of an authority, beside their key."""

    @pytest.fixture
    def mutual(self) -> bool:
        return True

    async def test_a_certificate_of_the_authority_and_a_key_are_let_in(
        self, door: Door, key: str, authority: Authority
    ) -> None:
        certificate, private = authority.issue("client")
        tls = Tls(ca_file=authority.certificate, certificate_file=certificate, private_key_file=private)
        assert await _asks(door, key, tls) == "accounts/ann"
        error = await _refused(door, f"dk_{'0' * 16}_{'0' * 64}", tls)
        assert error.stable_reason == "UNAUTHENTICATED", "a certificate is no key"

    @pytest.mark.parametrize("shown", ["none", "another authority's", "one that has ended"])
    async def test_others_are_not(
        self, door: Door, key: str, authority: Authority, stranger: Authority, shown: str
    ) -> None:
        tls = Tls(ca_file=authority.certificate)
        if shown != "none":
            issuer = stranger if shown == "another authority's" else authority
            certificate, private = issuer.issue("client", ended=shown == "one that has ended")
            tls = Tls(ca_file=authority.certificate, certificate_file=certificate, private_key_file=private)
        error = await _refused(door, key, tls)
        assert type(error) is ServiceUnreachable
        assert "--certificate-file" in str(error)

    async def test_the_command_line_keeps_all_of_it_in_its_settings(
        self, door: Door, key: str, authority: Authority, tmp_path: Path
    ) -> None:
        certificate, private = authority.issue("client")
        for name, value in (
            ("address", door.address),
            ("key", key),
            ("ca_file", str(authority.certificate)),
            ("certificate_file", str(certificate)),
            ("private_key_file", str(private)),
        ):
            done = await _types(tmp_path, "config", "set", name, value)
            assert done.exit_code == 0
            assert key.rpartition("_")[2] not in done.output
        done = await _types(tmp_path, "info", "--json")
        assert (done.exit_code, done.stderr) == (0, "")
        assert '"accounts/ann"' in done.stdout

        await _types(tmp_path, "config", "set", "ca_file", "")
        done = await _types(tmp_path, "info")
        assert done.exit_code == ExitCode.UNAVAILABLE
        assert "an authority that is not trusted here" in " ".join(done.stderr.split())
        assert "--ca-file" in done.stderr
        assert key.rpartition("_")[2] not in done.output


async def test_the_service_takes_up_renewed_files_by_itself(
    door: Door, key: str, authority: Authority, stranger: Authority, server_files: tuple[Path, Path]
) -> None:
    before, after = Tls(ca_file=authority.certificate), Tls(ca_file=stranger.certificate)
    assert await _asks(door, key, before) == "accounts/ann"
    async with DarkroomClient(door.address, key, tls=before) as long_since:
        assert (await long_since.account()).name == "accounts/ann"
        certificate, private = stranger.issue("renewed")
        with capture_logs() as logs:
            certificate.replace(server_files[0])
            assert await _asks(door, key, before) == "accounts/ann", "half a renewal changes nothing"
            private.replace(server_files[1])
            assert await _asks(door, key, after) == "accounts/ann"
            assert type(await _refused(door, key, before)) is TlsFailed
        assert (await long_since.account()).name == "accounts/ann", "connections that are open stay so"
    assert [log["event"] for log in logs if "TLS" in log["event"]] == [
        "TLS files were not taken up",
        "TLS files were taken up",
    ]


async def test_a_connection_is_of_tls_1_2_at_least(door: Door, authority: Authority) -> None:
    context = ssl.create_default_context(cafile=str(authority.certificate))
    context.set_alpn_protocols(["h2"])
    host, _, port = door.address.rpartition(":")
    _, writer = await asyncio.open_connection(host, int(port), ssl=context)
    assert writer.get_extra_info("ssl_object").version() in ("TLSv1.2", "TLSv1.3")
    writer.transport.abort()  # the service has sent its settings, which nobody here reads


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.TLSv1_2])
async def test_a_client_that_speaks_nothing_newer_is_turned_away_by_the_service(
    door: Door, authority: Authority, version: ssl.TLSVersion
) -> None:
    context = ssl.create_default_context(cafile=str(authority.certificate))
    context.set_ciphers("ALL:@SECLEVEL=0")  # or the client itself would not even ask
    context.minimum_version = context.maximum_version = version
    context.set_alpn_protocols(["h2"])
    host, _, port = door.address.rpartition(":")
    asked = asyncio.open_connection(host, int(port), ssl=context)
    if version is ssl.TLSVersion.TLSv1_2:
        _, writer = await asked
        writer.transport.abort()
    else:
        with pytest.raises(ConnectionResetError):  # by the other end
            await asked


def _garbage(files: tuple[Path, Path]) -> None:
    files[0].write_text("-----BEGIN CERTIFICATE-----\nno\n-----END CERTIFICATE-----\n")


def _missing(files: tuple[Path, Path]) -> None:
    files[1].unlink()


def _not_a_pair(files: tuple[Path, Path]) -> None:
    (files[1].parent / "else").mkdir()
    _, other = Authority(files[1].parent / "else").issue("other")
    other.replace(files[1])


@pytest.mark.parametrize("spoil", [_garbage, _missing, _not_a_pair])
def test_files_that_cannot_work_are_told_at_the_start(
    authority: Authority, spoil: Callable[[tuple[Path, Path]], None]
) -> None:
    certificate, private = authority.issue("server")
    files = TlsFiles(certificate=certificate, key=private, client_ca=None)
    files.credentials()
    spoil((certificate, private))
    with pytest.raises(TlsUnusable, match=r"server\.(crt|key)"):
        files.credentials()


def test_an_authority_that_is_none_is_told_at_the_start(authority: Authority, tmp_path: Path) -> None:
    certificate, private = authority.issue("server")
    (tmp_path / "ca.pem").write_text("no\n")
    files = TlsFiles(certificate=certificate, key=private, client_ca=tmp_path / "ca.pem")
    with pytest.raises(TlsUnusable, match=r"ca\.pem"):
        files.credentials()


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"host": "0.0.0.0"}, "refusing plain text on 0.0.0.0"),
        ({"host": "::"}, "refusing plain text on ::"),
        ({"host": "10.0.0.5"}, "refusing plain text"),
        ({"host": "127.0.0.1.example.com"}, "refusing plain text"),
        ({"host": ""}, "refusing plain text"),
        ({"tls_certificate": "a.crt"}, "go together"),
        ({"tls_key": "a.key"}, "go together"),
        ({"tls_client_ca": "ca.crt"}, "takes TLS"),
        ({"tls_client_ca": "ca.crt", "host": "0.0.0.0", "insecure": True}, "takes TLS"),
    ],
)
def test_settings_that_would_leave_a_door_open_are_refused(fields: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        FrontDoorSettings(**fields)  # type: ignore[arg-type]


def test_a_client_refuses_files_that_cannot_work(authority: Authority, tmp_path: Path) -> None:
    certificate, private = authority.issue("client")
    (tmp_path / "no.pem").write_text("no\n")
    for tls in (
        Tls(certificate_file=certificate),
        Tls(private_key_file=private),
        Tls(ca_file=tmp_path / "no.pem"),
        Tls(certificate_file=certificate, private_key_file=tmp_path / "authority.key"),
    ):
        with pytest.raises(ConfigUnreadable):
            DarkroomClient("service.example:7443", "dk_a_b", tls=tls)
