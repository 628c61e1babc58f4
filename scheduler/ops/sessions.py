"""Who is logged in to the page, and how often somebody may try.

A session is a random number that its browser has in a cookie, and that is kept here only as a hash. It is of
one front door and ends with it, after eight hours, when its owner logs out, and when its key no longer opens
the page: that is asked anew with each request.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv6Address, IPv6Network, ip_address
from typing import Protocol

from scheduler.store.accounts import Role

LIFETIME_S = 8 * 3_600
_MOST_OF_A_KEY = 10
_MOST = 1_000

_TRIES = 10
_TRY_BACK_S = 6.0
_MOST_ADDRESSES = 10_000
# What one household or machine is given of IPv6, all of it its own.
_ONE_ADDRESS_BITS = 64


class KeyHolder(Protocol):
    """Whoever a valid key speaks for."""

    @property
    def account_id(self) -> str:
        """The key's account."""

    @property
    def key_id(self) -> str:
        """The part of a key that is no secret."""


class Keys(Protocol):
    """What the page may ask about keys; the front door's doorman answers."""

    async def admit_key(self, key: str, needed: Role) -> KeyHolder:
        """Return whose key this is.

        Raises Unauthenticated, RateLimited, AccountBlocked, RoleRequired or Overloaded.
        """

    async def still_admitted(self, key_id: str, needed: Role) -> KeyHolder | None:
        """Return whose key this is, shown before; None if it opens nothing any more. Raises Overloaded."""


@dataclass(frozen=True, kw_only=True)
class _Session:
    key_id: str
    ends_s: float


class Sessions:
    """Those of one front door. `now_s` is a monotonic clock in seconds."""

    def __init__(self, now_s: Callable[[], float]) -> None:
        self._now_s = now_s
        self._sessions: dict[bytes, _Session] = {}
        """By the hash of the cookie's value, oldest first."""

    def begin(self, key_id: str) -> str:
        """Begin a session and return what its cookie holds. The oldest end where there are too many."""
        self._sessions = {name: one for name, one in self._sessions.items() if one.ends_s > self._now_s()}
        of_this_key = [name for name, one in self._sessions.items() if one.key_id == key_id]
        for name in of_this_key[: max(0, len(of_this_key) + 1 - _MOST_OF_A_KEY)]:
            del self._sessions[name]
        for name in list(self._sessions)[: max(0, len(self._sessions) + 1 - _MOST)]:
            del self._sessions[name]
        value = secrets.token_urlsafe(32)
        self._sessions[_hashed(value)] = _Session(key_id=key_id, ends_s=self._now_s() + LIFETIME_S)
        return value

    def key_of(self, value: str) -> str | None:
        """Return the id of the key that a session was begun with, None if there is no such session."""
        session = self._sessions.get(_hashed(value))
        return None if session is None or session.ends_s <= self._now_s() else session.key_id

    def end(self, value: str) -> None:
        """End a session, if there is one."""
        self._sessions.pop(_hashed(value), None)


def _hashed(value: str) -> bytes:
    # Looked up by its hash, a value can neither be felt for by time nor read from a dump of this process.
    return hashlib.sha256(value.encode(errors="surrogatepass")).digest()


@dataclass(kw_only=True)
class _Tries:
    left: float
    at_s: float

    def refill(self, now_s: float) -> None:
        self.left = min(_TRIES, self.left + (now_s - self.at_s) / _TRY_BACK_S)
        self.at_s = now_s


class LoginTries:
    """Lets each address fail ten times at once, and then once in six seconds. `now_s` is monotonic."""

    def __init__(self, now_s: Callable[[], float]) -> None:
        self._now_s = now_s
        self._tries: dict[str, _Tries] = {}

    def take(self, address: str) -> float:
        """Take a try and return 0, or take none and return the seconds until there is one."""
        now_s, whose = self._now_s(), _household(address)
        if whose not in self._tries and len(self._tries) >= _MOST_ADDRESSES:
            self._forget_the_patient(now_s)
        tries = self._tries.setdefault(whose, _Tries(left=_TRIES, at_s=now_s))
        tries.refill(now_s)
        if tries.left < 1:
            return (1 - tries.left) * _TRY_BACK_S
        tries.left -= 1
        return 0.0

    def give_back(self, address: str) -> None:
        """Give back a try that was none: the key was right."""
        tries = self._tries.get(_household(address))
        if tries is not None:
            tries.left += 1

    def _forget_the_patient(self, now_s: float) -> None:
        for tries in self._tries.values():
            tries.refill(now_s)
        kept = {whose: tries for whose, tries in self._tries.items() if tries.left < _TRIES}
        # Where so many fail at the same time, those who failed longest ago get new tries.
        self._tries = dict(list(kept.items())[-_MOST_ADDRESSES // 2 :])


def _household(address: str) -> str:
    try:
        known = ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(known, IPv6Address):
        return str(known.ipv4_mapped or IPv6Network((known, _ONE_ADDRESS_BITS), strict=False))
    return str(known)
