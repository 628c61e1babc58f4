"""What has had its time: jobs that ended move out of the way, pictures expire, old answers are forgotten.

All of it a few hundred rows at a time, so that nobody waits for it, and as far as it is due. What a
database that is away leaves undone is done a minute later. Sweeps of several front doors do each other no
harm.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime, timedelta

import structlog

from billing import accounts as ledger_accounts
from billing import idempotency
from billing.refusals import UnknownAccount
from scheduler.refusals import Overloaded
from scheduler.settings import Lifetimes as LifetimesSettings
from scheduler.store import expiry, past_jobs
from scheduler.store.pool import Pool

_log = structlog.get_logger()

_SWEEP_EVERY_S = 60.0
# Rows of one transaction.
_AT_ONCE = 500
# A month is made this long before its first job can come; made too late, jobs would only move later.
_MONTHS_AHEAD = timedelta(days=7)
# Each pass begins where the one before ended: behind a transaction that stays open, an index keeps an entry
# for each row that moved, and to begin at the beginning would take longer each time. Now and then it does,
# for rows that were locked when their turn came.
_LOOK_BACK_EVERY = timedelta(hours=1)
# Accounts of one pass: of a hundred thousand, each is looked at once in a quarter of an hour. They are kept
# for days.
_ACCOUNTS_AT_ONCE = 1_000
_ACCOUNTS_A_PASS = 10_000


class Lifetimes:
    """Ends what is due. `clock` returns the present time, aware."""

    def __init__(self, pool: Pool, clock: Callable[[], datetime], settings: LifetimesSettings) -> None:
        self._pool = pool
        self._clock = clock
        self._settings = settings
        self._moved_until: datetime | None = None
        self._looked_back_at: datetime | None = None
        self._behind_account = ""

    async def run(self) -> None:
        """Sweep every minute until cancelled."""
        while True:
            await self.sweep()
            await asyncio.sleep(_SWEEP_EVERY_S)

    async def sweep(self) -> None:
        """Do all that is due; the log says what could not be done yet."""
        for part in (self._move_ended_jobs, self._expire_pictures, self._forget_answers):
            try:
                await part()
            except Overloaded as away:
                _log.warning("sweep put off", of=part.__name__.strip("_"), trouble=repr(away.__cause__))

    async def _move_ended_jobs(self) -> None:
        now = self._clock()
        if self._looked_back_at is None or now >= self._looked_back_at + _LOOK_BACK_EVERY:
            self._moved_until, self._looked_back_at = None, now
        try:
            async with self._pool.transaction() as connection:
                for name in await past_jobs.make_months(
                    connection, ended_from=self._moved_until, until=now + _MONTHS_AHEAD
                ):
                    _log.info("month of past jobs made", partition=name)
        except past_jobs.Busy:
            _log.info("months not made yet: accounts are being written, or another front door is at it")
            return
        while True:
            async with self._pool.transaction() as connection:
                moved = await past_jobs.move(
                    connection,
                    ended_before=now - timedelta(milliseconds=self._settings.ended_jobs_ms),
                    ended_from=self._moved_until,
                    limit=_AT_ONCE,
                )
            if moved:
                self._moved_until = max(moved)
            if len(moved) < _AT_ONCE:
                return

    async def _expire_pictures(self) -> None:
        for _ in range(_ACCOUNTS_A_PASS // _ACCOUNTS_AT_ONCE):
            at = self._clock()
            async with self._pool.reading() as connection:
                accounts = await expiry.accounts_behind(
                    connection, self._behind_account, limit=_ACCOUNTS_AT_ONCE
                )
                due = await expiry.with_expired(connection, accounts, at)
            for account_id in due:
                await self._expire_pictures_of(account_id, at)
            if len(accounts) < _ACCOUNTS_AT_ONCE:
                self._behind_account = ""
                return
            self._behind_account = accounts[-1][0]

    async def _expire_pictures_of(self, account_id: str, at: datetime) -> None:
        expired = _AT_ONCE
        while expired == _AT_ONCE:
            async with self._pool.transaction() as connection:
                try:
                    terms = await ledger_accounts.lock_terms(connection, account_id, at)
                except UnknownAccount:
                    return  # erased since: its jobs were deleted, with their pictures
                if terms.picture_retention_days == 0:
                    return
                job_ids = await expiry.expire(
                    connection,
                    account_id,
                    ended_by=at - timedelta(days=terms.picture_retention_days),
                    at=at,
                    limit=_AT_ONCE,
                )
            expired = len(job_ids)
            _log.info("pictures expired", account=account_id, jobs=expired)

    async def _forget_answers(self) -> None:
        forgotten = _AT_ONCE
        while forgotten == _AT_ONCE:
            async with self._pool.transaction() as connection:
                forgotten = await idempotency.forget(
                    connection,
                    before=self._clock() - timedelta(days=self._settings.request_ids_days),
                    limit=_AT_ONCE,
                )
