"""Accounts that nobody touches: their periods begin and their lots end all the same, within a minute.

What an account may use does not depend on it: whoever touches an account renews it first. It is for the
books, in which what has expired is to be seen as expired. Sweeps of several front doors do each other no
harm.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime

import structlog

from billing.expiry import expire
from scheduler.refusals import Overloaded
from scheduler.store.pool import Pool

_log = structlog.get_logger()

_SWEEP_EVERY_S = 60.0
# Accounts of one transaction, which are locked meanwhile: so few that nobody waits for it.
_MOST_AT_ONCE = 50


class Renewals:
    """Renews accounts and closes lots. `clock` returns the present time, aware."""

    def __init__(self, pool: Pool, clock: Callable[[], datetime]) -> None:
        self._pool = pool
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
        except Overloaded as away:
            _log.warning("accounts not renewed", trouble=repr(away.__cause__))

    async def _some(self) -> int:
        async with self._pool.transaction() as connection:
            return await expire(connection, self._clock(), _MOST_AT_ONCE)
