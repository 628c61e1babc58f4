"""Pictures that a prompt names by URL, fetched so that nobody can look into our network through us.

Whatever a name, a redirect or a number leads to, the address that a socket is about to be connected to is
judged, at that moment and by its value: there is nothing in between that could change its answer. Nothing of
what comes back is ever shown but the picture, and an address that may not be reached reads as one that does
not answer.

A network that translates addresses by a prefix of its own (NAT64, RFC 6052, section 2.2) is not known here,
nor which public addresses are the operator's own: close those where packets leave.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Any, TypeAlias
from weakref import WeakValueDictionary

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from scheduler.frontdoor.picture_files import Unreadable
from scheduler.settings import RELEASE
from scheduler.settings import Pictures as PictureSettings

Address: TypeAlias = IPv4Address | IPv6Address
Reachable: TypeAlias = Callable[[Address], bool]
_Found: TypeAlias = tuple[int, int, int, str, tuple[Any, ...]]
LookUp: TypeAlias = Callable[..., Sequence[_Found]]

_REDIRECTS_MAX = 3
_REDIRECTS = (301, 302, 303, 307, 308)
_PORTS = (443, 80)
# A name server that does not answer keeps a thread for longer than anybody waits for it.
_NAMES_AT_ONCE = 32
_NAMES_OF_AN_ACCOUNT = 2
# Stores of files that know no better say octet-stream; what it is, the first bytes tell.
_CONTENT_TYPES = (
    "image/png",
    "image/jpeg",
    "image/jpg",
    "image/webp",
    "application/octet-stream",
    "binary/octet-stream",
)
_DIRECT_LINK = "give a direct link to a .png, .jpg or .webp picture."

# What the IANA special-purpose registries (as of 2025) do not call globally reachable, 6to4, and multicast.
# Written out since ipaddress.is_global changes from one Python to the next, and calls multicast global.
_NOT_PUBLIC_4 = tuple(
    map(
        IPv4Network,
        (
            "0.0.0.0/8",
            "10.0.0.0/8",
            "100.64.0.0/10",
            "127.0.0.0/8",
            "168.63.129.16/32",  # in no registry: one cloud's own services, as 169.254.169.254 is elsewhere
            "169.254.0.0/16",
            "172.16.0.0/12",
            "192.0.0.0/24",
            "192.0.2.0/24",
            "192.88.99.0/24",
            "192.168.0.0/16",
            "198.18.0.0/15",
            "198.51.100.0/24",
            "203.0.113.0/24",
            "224.0.0.0/4",
            "240.0.0.0/4",
        ),
    )
)
# ::1, fc00::/7, fe80::/10, ff00::/8, ::ffff:0:0/96, 64:ff9b::/96 and 64:ff9b:1::/48 are outside it.
_GLOBAL_UNICAST = IPv6Network("2000::/3")
_NOT_PUBLIC_6 = tuple(
    map(
        IPv6Network,
        (
            "2001::/23",  # Teredo is in it, which has an IPv4 address in it
            "2001:db8::/32",
            "2002::/16",  # 6to4, likewise
            "3fff::/20",
        ),
    )
)


def is_public(address: Address) -> bool:
    """Say whether an address is an ordinary host's on the internet, and not another one wrapped up in it."""
    if isinstance(address, IPv4Address):
        return not any(address in network for network in _NOT_PUBLIC_4)
    return address in _GLOBAL_UNICAST and not any(address in network for network in _NOT_PUBLIC_6)


class PictureUrls:
    """Fetches pictures; `reachable` says of an address whether it may be connected to."""

    def __init__(
        self,
        settings: PictureSettings,
        *,
        reachable: Reachable = is_public,
        resolver: AbstractResolver | None = None,
    ) -> None:
        self._settings = settings
        self._schemes = ("https", "http") if settings.http_allowed else ("https",)
        self._reachable = reachable
        self._resolver = resolver
        self._names = SystemNames()
        self._tls = ssl.create_default_context()

    async def content(self, url: str, account_id: str) -> bytes:
        """Return what is at a URL that an account names, if it may be a picture. Raises Unreadable."""
        try:
            async with asyncio.timeout(self._settings.fetch_ms / 1_000), self._session(account_id) as session:
                return await self._follow(session, url)
        except TimeoutError as late:
            raise Unreadable(
                f"did not arrive within {self._settings.fetch_ms / 1_000:g} seconds: try again, or upload it."
            ) from late
        except (aiohttp.ClientSSLError, ssl.SSLError) as untrusted:
            raise Unreadable(
                "is on a host without a valid certificate for its name: upload it, or link to another host."
            ) from untrusted
        except (aiohttp.ClientError, OSError, ValueError) as away:
            # A ValueError is what Python makes of a host name that cannot be one. One sentence for names that
            # are not found, hosts that do not answer, and addresses that may not be reached: whoever asks
            # must not learn which of ours exist.
            raise Unreadable(
                "cannot be reached: it must be on a public host on the internet; or upload it."
            ) from away

    def _session(self, account_id: str) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                resolver=self._resolver or self._names.asked_by(account_id),
                use_dns_cache=False,
                ssl=self._tls,
                socket_factory=self._socket,
                force_close=True,
            ),
            headers={
                "Accept": "image/png, image/jpeg, image/webp",
                "Accept-Encoding": "identity",
                "User-Agent": f"darkroom/{RELEASE}",
            },
            # Or it would be expanded on arrival, before anybody can see how much it is.
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            timeout=aiohttp.ClientTimeout(total=None),
        )

    def _socket(self, to: aiohttp.AddrInfoType) -> socket.socket:
        """Return a socket for an address that may be reached. Raises OSError for any other."""
        family, kind, protocol, _, address = to
        if not self._reachable(ip_address(address[0])):
            raise OSError("may not be reached")
        return socket.socket(family, kind, protocol)

    async def _follow(self, session: aiohttp.ClientSession, text: str) -> bytes:
        url = self._permitted(URL(text))
        for _ in range(_REDIRECTS_MAX + 1):
            async with session.get(url, allow_redirects=False) as response:
                if response.status not in _REDIRECTS:
                    return await self._picture(response)
                location = response.headers.get("Location", "")
            url = self._permitted(url.join(URL(location)))
        raise Unreadable(f"leads on more than {_REDIRECTS_MAX} times: {_DIRECT_LINK}")

    def _permitted(self, url: URL) -> URL:
        if url.scheme not in self._schemes:
            raise Unreadable(
                f"begins or leads on to another scheme than {' or '.join(self._schemes)}: {_DIRECT_LINK}"
            )
        if url.raw_user is not None or url.raw_password is not None:
            raise Unreadable("has a user name or a password in it: leave it out, or upload the picture.")
        if url.port not in _PORTS:
            raise Unreadable(
                "names a port other than 443 or 80: upload the picture, or link to another host."
            )
        return url

    async def _picture(self, response: aiohttp.ClientResponse) -> bytes:
        if response.status != 200:
            raise Unreadable(f"answers with HTTP status {response.status} and no picture: {_DIRECT_LINK}")
        if response.content_type not in _CONTENT_TYPES:
            what = "a web page" if response.content_type == "text/html" else "something else"
            raise Unreadable(f"leads to {what} and not to a picture: {_DIRECT_LINK}")
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise Unreadable("is sent compressed, though that was not asked for: upload the picture.")
        content = bytearray()
        if (response.content_length or 0) > self._settings.bytes_max:
            raise self._too_large()
        async for chunk in response.content.iter_any():
            content += chunk
            if len(content) > self._settings.bytes_max:
                raise self._too_large()
        return bytes(content)

    def _too_large(self) -> Unreadable:
        return Unreadable(f"is larger than {self._settings.bytes_max / 1024**2:g} MiB: make it smaller.")


class SystemNames:
    """The system's resolver, in threads of its own: a name server that never answers holds up nothing but
    pictures, and of those only the pictures of whoever named it.

    `look_up` is as `socket.getaddrinfo`.
    """

    def __init__(self, look_up: LookUp = socket.getaddrinfo) -> None:
        self._look_up = look_up
        self._threads = ThreadPoolExecutor(_NAMES_AT_ONCE, thread_name_prefix="picture-names")
        self._turns: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    def asked_by(self, account_id: str) -> AbstractResolver:
        """Return a resolver that looks up an account's names, two at once."""
        return _Resolver(partial(self._found, account_id))

    async def _found(self, account_id: str, host: str, port: int, family: int) -> Sequence[_Found]:
        turns = self._turns.setdefault(account_id, asyncio.Semaphore(_NAMES_OF_AN_ACCOUNT))
        await turns.acquire()
        found = asyncio.get_running_loop().run_in_executor(
            self._threads, partial(self._look_up, host, port, family=family, type=socket.SOCK_STREAM)
        )
        # Not when whoever asks gives up: the thread is free when the name server has answered.
        found.add_done_callback(lambda _: turns.release())
        return await asyncio.shield(found)


class _Resolver(AbstractResolver):
    """What the library asks for addresses."""

    def __init__(self, found: Callable[[str, int, int], Awaitable[Sequence[_Found]]]) -> None:
        self._found = found

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        return [
            ResolveResult(
                hostname=host,
                host=str(address[0]),
                port=port,
                family=of,
                proto=protocol,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for of, _, protocol, _, address in await self._found(host, port, family)
        ]

    async def close(self) -> None:
        """Do nothing: the threads are everybody's."""
