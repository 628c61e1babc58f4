"""Changes of plan taken back: their money goes the other way, and what is left of their time is revoked.

Nothing is unsaid: it is answered by compensating entries, once for each change, the newest change first. All
of the money goes back, also where some of the time was used: to charge for that is another deed. In the
period of the change the plan it had before is the account's again at once; later it is from the next period
on, as with any change to less, since the present one was granted in full.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

import asyncpg

from billing import accounts, audit, plans
from billing.accounts import Terms
from billing.books import Books, open_books, revoke, settle_plan_change
from billing.entries import OF_THE_PLAN, Code, Lot, available_ms, burn_order, taken
from billing.refusals import AccountErased, EtagMismatch, NothingToUndo


@dataclass(frozen=True, kw_only=True)
class PlanUndo:
    """What taking a change of plan back takes and gives."""

    account_id: str
    from_plan: str
    """The account's present one."""
    to_plan: str
    """The one it had before the change; the same as the present one: it changed in some other way since."""
    changed_at: datetime
    """When the change was made."""
    effective_at: datetime
    """When the account has the other plan: now, or with its next period."""
    at_once: bool
    revoked_ms: int
    kept_ms: int
    """Of the time that the change gave: what is used or held, or gone with its period."""
    amount_micros: int
    """What is to be paid now; negative: what is given back. All that the change cost, the other way round."""
    currency: str
    etag: str
    """Names the change."""


async def undo(
    connection: asyncpg.Connection,
    account_id: str,
    *,
    etag: str,
    actor: str,
    reason: str,
    request_id: str,
    at: datetime,
) -> PlanUndo:
    """Take back the newest change of an account's plan, with an audit event; return what that did.

    With an etag it is the change that this names or none; with an empty one, whichever is the newest. Changes
    that were only scheduled moved nothing, and are not taken back here: `plan_changes.change` to the present
    plan does it. Locks the account; a repeated request is for `idempotency.claim`.

    Raises UnknownAccount, AccountErased, NothingToUndo or EtagMismatch.
    """
    terms = await accounts.lock_terms(connection, account_id, at)
    if terms.ended_at is not None:
        raise AccountErased(account_id=account_id)
    at = terms.in_period(at)
    change = await _newest(connection, account_id)
    books = await open_books(connection, [account_id], since=at, until=at)
    foreseen = await _foreseen(connection, terms, change, books, at)
    planned = foreseen.undo
    if etag and etag != planned.etag:
        raise EtagMismatch(given=etag, current=planned.etag)
    audit_id = await audit.record(
        connection,
        actor=actor,
        action="UndoPlanChange",
        target=f"accounts/{account_id}",
        reason=reason,
        request_id=request_id,
        before={"plan": terms.plan, "scheduled_plan": terms.scheduled_plan},
        after={
            "plan": planned.to_plan,
            "effective_at": planned.effective_at.isoformat(),
            "revoked_ms": planned.revoked_ms,
            "amount_micros": planned.amount_micros,
            "currency": planned.currency,
            "undoes": change["change_id"],
        },
        at=at,
    )
    _move(books, foreseen, audit_id, at)
    await books.write(connection)
    await _set_plan(connection, terms, foreseen)
    await connection.execute(
        """INSERT INTO billing.plan_change (account_id, from_plan, from_version, to_plan, to_version,
                  period_start, granted_ms, credit_micros, charge_micros, currency, undoes, audit_id, at)
           VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)""",
        account_id,
        change["to_plan"],
        # From where it was: what versions of that plan moved meanwhile is taken back with the change.
        terms.plan_version if foreseen.of_period else change["to_version"],
        change["from_plan"],
        change["from_version"],
        change["period_start"],
        -planned.revoked_ms,
        -change["charge_micros"],
        -change["credit_micros"],
        change["currency"],
        change["change_id"],
        audit_id,
        at,
    )
    return planned


@dataclass(frozen=True, kw_only=True)
class _Foreseen:
    change: asyncpg.Record
    undo: PlanUndo
    of_period: bool
    """The change is of the present period, and the account is on its plan still."""


async def _newest(connection: asyncpg.Connection, account_id: str) -> asyncpg.Record:
    """Return the newest change that was not taken back."""
    change = await connection.fetchrow(
        """SELECT * FROM billing.plan_change AS change
            WHERE account_id = $1 AND undoes IS NULL
              AND NOT EXISTS (SELECT FROM billing.plan_change AS undo WHERE undo.undoes = change.change_id)
            ORDER BY change_id DESC LIMIT 1""",
        account_id,
    )
    if change is None:
        raise NothingToUndo(account_id=account_id)
    return change


async def _foreseen(
    connection: asyncpg.Connection, terms: Terms, change: asyncpg.Record, books: Books, at: datetime
) -> _Foreseen:
    of_period = change["period_start"] == terms.period_start and change["to_plan"] == terms.plan
    given_ms = change["granted_ms"]
    revoked_ms = 0
    if of_period:
        # With what a new version of the plan, that counted at once, gave or took since.
        then = await plans.get(connection, change["to_plan"], change["to_version"])
        now = await plans.get(connection, terms.plan, terms.plan_version)
        given_ms = max(given_ms + now.quota_ms - then.quota_ms, 0)
        revoked_ms = min(given_ms, available_ms(_of_plan(books, terms.account_id), at))
    goes_back = change["to_plan"] == terms.plan
    return _Foreseen(
        change=change,
        of_period=of_period,
        undo=PlanUndo(
            account_id=terms.account_id,
            from_plan=terms.plan,
            to_plan=change["from_plan"] if goes_back else terms.plan,
            changed_at=change["at"],
            effective_at=at if of_period or not goes_back else terms.renews_at,
            at_once=of_period or not goes_back,
            revoked_ms=revoked_ms,
            kept_ms=given_ms - revoked_ms,
            amount_micros=-(change["credit_micros"] + change["charge_micros"]),
            currency=change["currency"],
            etag=f"change-{change['change_id']}",
        ),
    )


def _of_plan(books: Books, account_id: str) -> list[Lot]:
    return [lot for lot in books.lots(account_id) if lot.source in OF_THE_PLAN]


def _move(books: Books, foreseen: _Foreseen, audit_id: int, at: datetime) -> None:
    account_id, change = foreseen.undo.account_id, foreseen.change
    parts = taken(burn_order(_of_plan(books, account_id), at)[::-1], foreseen.undo.revoked_ms)
    revoke(books, account_id, parts, Code.PLAN_UNDO, at, audit_id)
    settle_plan_change(
        books,
        account_id,
        credit_micros=-change["charge_micros"],
        charge_micros=-change["credit_micros"],
        currency=change["currency"],
        code=Code.PLAN_UNDO,
        at=at,
        audit_id=audit_id,
    )


async def _set_plan(connection: asyncpg.Connection, terms: Terms, foreseen: _Foreseen) -> None:
    change = foreseen.change
    if foreseen.of_period:
        # A version of that plan that came since and counts at once is taken up at the next touch.
        await connection.execute(
            """UPDATE billing.subscription
                  SET plan = $2, version = $3, scheduled_plan = NULLIF(scheduled_plan, $2)
                WHERE account_id = $1""",
            terms.account_id,
            change["from_plan"],
            change["from_version"],
        )
    elif not foreseen.undo.at_once:
        await connection.execute(
            "UPDATE billing.subscription SET scheduled_plan = $2 WHERE account_id = $1",
            terms.account_id,
            change["from_plan"],
        )
