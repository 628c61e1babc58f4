"""What one front door takes on at once. Whoever comes beyond it is refused at once, and told to come back.

A server that takes on whatever comes does all of it late: what was accepted waits behind what will be given
up. So the calls in progress are counted, and the number of those that may be is small enough that the last of
them is answered soon. No account has more than a share of it, or one whose calls take long would keep all
others out; and some places only moderators and those above take, so that a few accounts together do not keep
out whoever could block them. And where calls wait long before they are counted at all, nothing new is taken
on until they do not. To refuse costs little: it takes nothing of the database.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from scheduler.frontdoor.auth import Principal
from scheduler.refusals import Overloaded
from scheduler.settings import FrontDoor as FrontDoorSettings
from scheduler.store import jobs
from scheduler.store.accounts import Role
from scheduler.store.pool import Pool

_SUBMIT = "/scheduler.v1.JobService/CreateJob"

# One in so many of the calls in progress may be an account's.
_SHARE = 4
# And one in so many is left to moderators and those above.
_KEPT_SHARE = 16
# Who was refused comes back within this time, not all in the same moment.
_RETRY_MS = (500, 1_500)

# A full queue has room again when jobs end, which is not soon.
_RETRY_FULL_MS = 30_000
_COUNT_EVERY_S = 1.0
# Of the time: counting a million takes a tenth of a second.
_COUNT_SHARE = 20


class Admission:
    """Counts the calls in progress, and the submissions among them; `late_ms` is how long others wait now."""

    def __init__(self, settings: FrontDoorSettings, late_ms: Callable[[], int]) -> None:
        self._late_ms = late_ms
        self._late_max_ms = settings.late_max_ms
        self._calls = _Places(settings.calls_at_once, kept=settings.calls_at_once // _KEPT_SHARE)
        self._submissions = _Places(settings.submissions_at_once, kept=0)

    def refuse_if_late(self, path: str) -> None:
        """Raise Overloaded for what is submitted while others wait long; asked before it is known who calls.

        To find that out costs as much as to refuse, and is nothing that could change the answer.
        """
        if path == _SUBMIT and self._late_ms() > self._late_max_ms:
            raise _overloaded("This front door is behind with what was asked of it.")

    @contextmanager
    def entered(self, path: str, principal: Principal) -> Iterator[None]:
        """Count a call while the context is open. Raises Overloaded where too many are in progress."""
        with self._calls.taken(principal):
            if path == _SUBMIT:
                with self._submissions.taken(principal):
                    yield
            else:
                yield


class _Places:
    """So many of one kind of call may be in progress, `kept` of them only of moderators and those above."""

    def __init__(self, most: int, *, kept: int) -> None:
        self._most = most
        self._most_of_users = most - kept
        self._most_of_an_account = max(1, most // _SHARE)
        self._taken = 0
        self._of_accounts: Counter[str] = Counter()

    @contextmanager
    def taken(self, principal: Principal) -> Iterator[None]:
        """Take a place while the context is open; raises Overloaded."""
        account_id = principal.account_id
        most = self._most if principal.role.reaches(Role.MODERATOR) else self._most_of_users
        if self._of_accounts[account_id] >= self._most_of_an_account:
            raise _overloaded("Too many calls of your account are in progress at once.")
        if self._taken >= most:
            raise _overloaded("More is asked of this front door than it can do at once.")
        self._taken += 1
        self._of_accounts[account_id] += 1
        try:
            yield
        finally:
            self._taken -= 1
            self._of_accounts -= Counter((account_id,))  # which drops an account that has none left


def _overloaded(sentence: str) -> Overloaded:
    return Overloaded(
        sentence=f"{sentence} Send the same request again.",
        retry_after_ms=random.randint(*_RETRY_MS),  # noqa: S311 - to spread them, not to hide them
    )


class QueueRoom:
    """Whether the cell's queue may grow. What it holds is in the memory of one scheduler."""

    def __init__(self, pool: Pool, waiting_max: int) -> None:
        self._pool = pool
        self._waiting_max = waiting_max
        self._full = False

    def refuse_if_full(self) -> None:
        """Raise Overloaded if, a moment ago, as many jobs waited as may."""
        if self._full:
            raise Overloaded(
                sentence=f"{self._waiting_max:,} jobs wait already, which is as many as may. "
                "Send the same request again later.",
                retry_after_ms=_RETRY_FULL_MS,
            )

    async def run(self) -> None:
        """Count what waits again and again, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            begun_s = loop.time()
            await self.look()
            await asyncio.sleep(max(_COUNT_EVERY_S, _COUNT_SHARE * (loop.time() - begun_s)))

    async def look(self) -> None:
        """Count what waits. While the database is away, what was counted last holds."""
        try:
            async with self._pool.reading() as connection:
                waiting = await jobs.waiting(connection, self._waiting_max)
        except Overloaded:
            return
        self._full = waiting >= self._waiting_max
