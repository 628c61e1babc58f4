"""No URL in a prompt makes the service connect to a host inside: seen from that host, with open ports."""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import grpc
import pytest

from tests.frontdoor.door import Door, refusal

HOST = "127.0.0.77"
# Each reaches the host above, if the machine's own resolver and sockets are asked to connect to it.
WAYS_IN = [
    HOST,
    "127.0.77",
    "127.77",
    "2130706509",
    "0x7f00004d",
    "0x7F.0.0.0x4D",
    "0177.0.0.0115",
    "[::ffff:127.0.0.77]",
    "[::ffff:7f00:4d]",
    "[0:0:0:0:0:ffff:127.0.0.77]",
]
# These reach it by what is made of them on the way, or by what a careless reader takes for the host.
TRICKS = [
    "①②⑦.⓪.⓪.⑦⑦",
    "127。0。0。77",
    "127．0．0．77",
    "127.0.0.77.",
    "127%2e0%2e0%2e77",
    "127.0.0.77%00.example.com",
    "127.0.0.77#@example.com",
    "127.0.0.77?@example.com",
    "127.0.0.77\\@example.com",
    "example.com\\@127.0.0.77",
    "example.com@127.0.0.77",
    "a:b@127.0.0.77",
    "127.0.0.77:80",
    "127.0.0.77:443",
    "127.0.0.77:080",
    "[::ffff:127.0.0.77%25lo]",
    "[64:ff9b::127.0.0.77]",
    "[2002:7f00:4d::]",
    "[::127.0.0.77]",
    "127.0.0.77\t",
    "127.0.0.77\r\nHost:example.com",
]


@dataclass(frozen=True)
class Inside:
    """A host that only this machine reaches."""

    ports: tuple[socket.socket, ...]

    def was_reached(self) -> bool:
        """Return whether somebody connected since it was last asked."""
        reached = False
        for port in self.ports:
            try:
                while True:
                    port.accept()[0].close()
                    reached = True
            except BlockingIOError:
                pass
        return reached


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> Iterator[Inside]:
    """The host, with the two ports open that a URL may name; a door started after it fetches by http."""
    monkeypatch.setenv("DARKROOM_PICTURES__HTTP_ALLOWED", "true")
    ports = []
    try:
        for number in (80, 443):
            try:
                port = socket.create_server((HOST, number), backlog=50)
            except PermissionError as closed:
                # Or it would be skipped for ever where tests run in a container, and nobody would know.
                if os.geteuid() == 0:
                    raise
                pytest.skip(f"ports below 1024 are not this user's to open: {closed}")
            port.setblocking(False)
            ports.append(port)
        yield Inside(tuple(ports))
    finally:
        for port in ports:
            port.close()


def test_the_ways_in_are_ways_in(inside: Inside) -> None:
    for way in WAYS_IN:
        socket.create_connection((way.strip("[]"), 80), timeout=5).close()
        assert inside.was_reached(), way
    assert not inside.was_reached()


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_a_prompt_does_not_lead_inside(inside: Inside, door: Door, scheme: str) -> None:
    ann = await door.caller("ann")
    for way in (*WAYS_IN, *TRICKS):
        refused = await refusal(ann.create(f"{scheme}://{way}/a.png a boat", model="seeing"))
        assert refused.reason in ("PICTURE_UNREADABLE", "INVALID_PARAMETER"), way
        assert not inside.was_reached(), way
    for way in WAYS_IN:
        # In the same words as of a host that is not there.
        refused = await refusal(ann.create(f"{scheme}://{way}/a.png a boat", model="seeing"))
        nowhere = await refusal(ann.create(f"{scheme}://nowhere.invalid/a.png a boat", model="seeing"))
        assert (refused.reason, refused.raw) == ("PICTURE_UNREADABLE", nowhere.raw), way


OTHER_WAYS = [
    "file:///etc/passwd",
    "file://127.0.0.77/etc/passwd",
    "FILE:/etc/passwd",
    "gopher://127.0.0.77:80/_GET",
    "ftp://127.0.0.77/a.png",
    "data:image/png;base64,iVBORw0KGgo=",
    "dict://127.0.0.77:80/x",
    "jar:http://127.0.0.77!/a.png",
    "unix:///var/run/docker.sock",
    "//127.0.0.77/a.png",
    "http:127.0.0.77/a.png",
    "http:/127.0.0.77/a.png",
    "http:///127.0.0.77/a.png",
    "hTTp://127.0.0.77/a.png",
]


async def test_other_ways_to_write_it_do_not_either(inside: Inside, door: Door) -> None:
    ann = await door.caller("ann")
    for url in OTHER_WAYS:
        with suppress(grpc.aio.AioRpcError):
            job = await ann.create(f"{url} a boat", model="seeing")
            assert (await door.spec(job.uid)).pictures == (), f"{url} is text like any other"
        assert not inside.was_reached(), url


def test_a_connection_that_is_made_is_seen_whatever_is_spoken_on_it(inside: Inside) -> None:
    with socket.create_connection((HOST, 443), timeout=5) as plain:
        plain.settimeout(0.1)
        with pytest.raises((ssl.SSLError, OSError)):
            ssl.create_default_context().wrap_socket(plain, server_hostname=HOST)
    assert inside.was_reached()
