"""Refunds: in the reverse of burn order, never more than was charged, money in proportion."""

from __future__ import annotations

import asyncio
from uuid import uuid4

import asyncpg
import pytest
from ledger_building import (
    BASIC_MS,
    PRICE,
    a_pricing,
    a_request,
    adjust,
    after,
    assert_sound,
    balance,
    held,
    open_account,
    overage,
    refund,
    settle,
    the_end,
)

from billing.ledger import Ending, HoldRequest
from billing.prices import price_micros
from billing.refusals import NothingCharged, RefundTooLarge, RequestIdReused


async def charged(connection: asyncpg.Connection, request: HoldRequest, measured_ms: int) -> str:
    """Run a job and return its id."""
    await settle(connection, the_end(await held(connection, request), measured_ms))
    return request.job_id


async def lots(connection: asyncpg.Connection) -> list[tuple[str, int]]:
    rows = await connection.fetch("SELECT source, used_ms FROM billing.grant_lot ORDER BY lot_id")
    return [tuple(row) for row in rows]


async def metered(connection: asyncpg.Connection, *, over_ms: int) -> str:
    """Charge a job 1000 ms of the account's last time, and `over_ms` of money."""
    await open_account(connection, left_ms=1000)
    await overage(connection)
    request = a_request(1000 + over_ms, pricing=a_pricing(overage=True))
    return await charged(connection, request, 1000 + over_ms)


async def test_a_refund_gives_all_of_it_back(connection: asyncpg.Connection) -> None:
    await open_account(connection)
    job = await charged(connection, a_request(5000), 4000)

    given = await refund(connection, job)

    assert (given.refunded_ms, given.refunded_micros) == (4000, 0)
    assert (given.refunded_in_all_ms, given.billed_ms) == (4000, 4000)
    now = await balance(connection)
    assert (now.granted_ms, now.used_ms, now.available_ms) == (BASIC_MS, 0, BASIC_MS)
    await assert_sound(connection)


async def test_a_refund_goes_back_in_the_reverse_of_burn_order(connection: asyncpg.Connection) -> None:
    await open_account(connection, left_ms=1000)
    await adjust(connection, 500)
    job = await charged(connection, a_request(1400), 1400)
    assert (await lots(connection))[0][1] + (await lots(connection))[1][1] == 1400

    await refund(connection, job, 300)
    assert await lots(connection) == [("plan", 1000), ("admin", 100)]
    given = await refund(connection, job, 300)
    assert given.refunded_in_all_ms == 600
    assert await lots(connection) == [("plan", 800), ("admin", 0)]
    await assert_sound(connection)


async def test_time_taken_beyond_the_hold_goes_back_too(connection: asyncpg.Connection) -> None:
    await open_account(connection, left_ms=1000)
    await adjust(connection, 500)
    job = await charged(connection, a_request(900), 1300)
    assert (await refund(connection, job)).refunded_ms == 1300
    assert await lots(connection) == [("plan", 0), ("admin", 0)]
    await assert_sound(connection)


async def test_money_goes_back_first_and_in_proportion(connection: asyncpg.Connection) -> None:
    job = await metered(connection, over_ms=60_001)
    paid = price_micros(60_001, PRICE)

    half = await refund(connection, job, 30_000)

    assert (half.refunded_ms, half.refunded_micros) == (30_000, paid * 30_000 // 60_001)
    assert (await balance(connection)).overage_posted_micros == paid - half.refunded_micros
    assert (await balance(connection)).available_ms == 0
    rest = await refund(connection, job)
    assert (rest.refunded_ms, rest.refunded_micros) == (31_001, paid - half.refunded_micros)
    now = await balance(connection)
    assert (now.overage_posted_micros, now.available_ms) == (0, 1000)
    await assert_sound(connection)


async def test_many_small_refunds_give_as_much_money_as_one(connection: asyncpg.Connection) -> None:
    job = await metered(connection, over_ms=7)
    given = [(await refund(connection, job, 1)).refunded_micros for _ in range(7)]
    assert sum(given) == price_micros(7, PRICE)
    await assert_sound(connection)


async def test_money_given_back_makes_room_under_the_cap(connection: asyncpg.Connection) -> None:
    await open_account(connection, left_ms=0)
    await overage(connection, cap=price_micros(60_000, PRICE))
    terms = a_pricing(overage=True)
    job = await charged(connection, a_request(60_000, pricing=terms), 60_000)
    await refund(connection, job)
    await charged(connection, a_request(60_000, pricing=terms), 60_000)
    await assert_sound(connection)


async def test_no_refund_gives_more_than_was_charged(connection: asyncpg.Connection) -> None:
    await open_account(connection)
    job = await charged(connection, a_request(5000), 4000)

    with pytest.raises(RefundTooLarge) as refused:
        await refund(connection, job, 4001)
    assert refused.value.metadata() == {"billed_ms": "4000", "refunded_ms": "0"}
    await refund(connection, job, 3000)
    with pytest.raises(RefundTooLarge):
        await refund(connection, job, 1001)
    await refund(connection, job)
    with pytest.raises(RefundTooLarge, match="anything more"):
        await refund(connection, job)
    assert (await balance(connection)).available_ms == BASIC_MS
    await assert_sound(connection)


async def test_a_refund_that_is_asked_for_again_is_made_once(connection: asyncpg.Connection) -> None:
    await open_account(connection)
    job = await charged(connection, a_request(5000), 4000)
    first = await refund(connection, job, 1000, request_id="r1")
    await refund(connection, job, 500, request_id="r2")

    assert await refund(connection, job, 1000, request_id="r1") == first
    with pytest.raises(RequestIdReused):
        await refund(connection, job, 2000, request_id="r1")
    assert (await balance(connection)).available_ms == BASIC_MS - 2500
    await assert_sound(connection)


async def test_a_lot_that_has_ended_is_replaced(connection: asyncpg.Connection) -> None:
    await open_account(connection)
    job = await charged(connection, a_request(5000), 4000)

    given = await refund(connection, job, 3000, at=after(days=40))

    assert given.refunded_ms == 3000
    now = await balance(connection, at=after(days=40))
    assert now.available_ms == BASIC_MS + 3000
    lot = await connection.fetchrow(
        "SELECT source, granted_ms, expires_at FROM billing.grant_lot ORDER BY lot_id DESC LIMIT 1"
    )
    # A month of its own: from 10 April to 10 May.
    assert tuple(lot) == ("refund", 3000, after(days=70))
    # What was left of the old one was given up when it ended, and the rest of its charge stands.
    assert (await lots(connection))[0] == ("plan", 1000)
    used = await held(connection, a_request(3000, at=after(days=62)))
    await settle(connection, the_end(used, 3000))
    await assert_sound(connection)


async def test_part_of_a_refund_may_go_to_a_living_lot_and_part_to_a_new_one(
    connection: asyncpg.Connection,
) -> None:
    await open_account(connection, left_ms=1000)
    await adjust(connection, 500)
    job = await charged(connection, a_request(1400), 1400)
    await refund(connection, job, at=after(days=31))
    assert await lots(connection) == [("plan", 0), ("admin", 0), ("plan", 0), ("refund", 0)]
    assert (await balance(connection, at=after(days=31))).available_ms == BASIC_MS + 500 + 1000
    await assert_sound(connection)


async def test_a_refund_of_an_earlier_periods_use_counts_as_time_that_was_never_used(
    connection: asyncpg.Connection,
) -> None:
    await open_account(connection, left_ms=0)
    await adjust(connection, 500)
    job = await charged(connection, a_request(400), 400)
    await refund(connection, job, at=after(days=31))
    now = await balance(connection, at=after(days=31))
    assert (now.granted_ms, now.used_ms, now.available_ms) == (BASIC_MS + 500, 0, BASIC_MS + 500)
    await assert_sound(connection)


async def test_only_a_charged_job_of_the_account_can_be_refunded(
    connection: asyncpg.Connection, subtests: pytest.Subtests
) -> None:
    await open_account(connection)
    await open_account(connection, "bob")
    of_ann = await charged(connection, a_request(5000), 4000)
    voided = await held(connection, a_request(5000))
    await settle(connection, the_end(voided, ending=Ending.VOID, absorbed_ms=100))
    relax = a_request(5000)
    await settle(connection, the_end(relax, 3000, tier="relax"))
    free = await charged(connection, a_request(5000), 0)

    for what, job, account in (
        ("a job that failed", voided.job_id, "ann"),
        ("a relax job", relax.job_id, "ann"),
        ("a job that took no time", free, "ann"),
        ("no job", str(uuid4()), "ann"),
        ("somebody else's job", of_ann, "bob"),
    ):
        with subtests.test(what), pytest.raises(NothingCharged):
            await refund(connection, job, account=account)
    await assert_sound(connection)


async def test_a_refund_leaves_its_audit_event(connection: asyncpg.Connection) -> None:
    await open_account(connection)
    job = await charged(connection, a_request(5000), 4000)
    await refund(connection, job, 1000)
    event = await connection.fetchrow(
        """SELECT actor, target, after->>'refunded_ms' AS after FROM billing.audit_event
            WHERE action = 'RefundJob'"""
    )
    assert tuple(event) == ("accounts/root", f"accounts/ann/jobs/{job}", "1000")


async def test_refunds_at_once_give_back_no_more_than_was_charged(
    database: str, connection: asyncpg.Connection
) -> None:
    await open_account(connection)
    job = await charged(connection, a_request(5000), 4000)
    clients = [await asyncpg.connect(database) for _ in range(6)]
    try:
        answers = await asyncio.gather(
            *(refund(client, job, 1000) for client in clients), return_exceptions=True
        )
    finally:
        for client in clients:
            await client.close()
    assert sorted(isinstance(answer, RefundTooLarge) for answer in answers) == [False] * 4 + [True] * 2
    assert (await balance(connection)).available_ms == BASIC_MS
    await assert_sound(connection)


async def test_one_refund_asked_for_many_times_at_once_is_made_once(
    database: str, connection: asyncpg.Connection
) -> None:
    await open_account(connection)
    job = await charged(connection, a_request(5000), 4000)
    clients = [await asyncpg.connect(database) for _ in range(4)]
    try:
        answers = await asyncio.gather(*(refund(client, job, 1000, request_id="r") for client in clients))
    finally:
        for client in clients:
            await client.close()
    assert len(set(answers)) == 1
    assert (await balance(connection)).available_ms == BASIC_MS - 3000
    await assert_sound(connection)
