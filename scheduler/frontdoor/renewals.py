"""Accounts that nobody touches: their periods begin and their lots end all the same, within a minute.

What an account may use does not depend on that: whoever touches an account renews it first. It is for the
books, in which what has expired is to be seen as expired. And what a hold set aside that nobody ended is
free again, which an account that waits for it is told of. Sweeps of several front doors do each other no
harm.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime

import structlog

from billing.expiry import expire
from billing.holds import forget_refusals
from scheduler.link import SchedulerLink
from scheduler.refusals import Overloaded
from scheduler.store.left_holds import expire_left_holds
from scheduler.store.pool import Pool

_log = structlog.get_logger()

_SWEEP_EVERY_S = 60.0
# Accounts of one transaction, which are locked meanwhile: so few that nobody waits for it.
_MOST_AT_ONCE = 50
# Rows of one transaction: nobody waits for them.
_MOST_REFUSALS_AT_ONCE = 5_000


class Renewals:
    """Renews accounts, closes lots, expires holds, forgets old refusals. `clock` returns the present time,
    aware.
    """

    def __init__(self, pool: Pool, link: SchedulerLink, clock: Callable[[], datetime]) -> None:
        self._pool = pool
        self._link = link
        self._clock = clock

    async def run(self) -> None:
        """Sweep every minute until cancelled."""
        while True:
            await self.sweep()
            await asyncio.sleep(_SWEEP_EVERY_S)

    async def sweep(self) -> None:
        """Bring every account to the present; the log says if the database was away."""
        try:
            while await self._some() == _MOST_AT_ONCE:
                pass
            while await self._some_holds() == _MOST_AT_ONCE:
                pass
            while await self._some_refusals() == _MOST_REFUSALS_AT_ONCE:
                pass
        except Overloaded as away:
            _log.warning("accounts not renewed", trouble=repr(away.__cause__))

    async def _some(self) -> int:
        async with self._pool.transaction() as connection:
            return await expire(connection, self._clock(), _MOST_AT_ONCE)

    async def _some_holds(self) -> int:
        async with self._pool.transaction() as connection:
            holds = await expire_left_holds(connection, self._clock(), _MOST_AT_ONCE)
        for hold in holds.expired:
            _log.warning(
                "hold expired that no attempt was left of",
                attempt=str(hold.attempt_id),
                account=hold.account_id,
            )
        if holds.expired:
            self._link.accounts_changed(sorted({hold.account_id for hold in holds.expired}))
        return holds.looked_at

    async def _some_refusals(self) -> int:
        async with self._pool.transaction() as connection:
            return await forget_refusals(connection, self._clock(), _MOST_REFUSALS_AT_ONCE)
