"""Several connections at once: time is given out once, attempts end once, requests are answered once."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any
from uuid import uuid4

import asyncpg
from ledger_at_once import BY_ROOT, crowd, refund
from ledger_building import (
    BASIC_MS,
    START,
    a_pricing,
    a_request,
    adjust,
    after,
    assert_sound,
    balance,
    held,
    hold,
    open_account,
    overage,
    settle,
    the_end,
)

from billing import accounts, idempotency, plan_changes, plans
from billing.auditor import replay
from billing.ledger import Ending, HoldPlaced
from billing.plans import EffectiveFrom, PlanVersion
from billing.prices import ChargeMode, billed_ms, price_micros
from billing.refusals import EtagMismatch


@asynccontextmanager
async def connections(database: str, count: int) -> AsyncIterator[list[asyncpg.Connection]]:
    async with AsyncExitStack() as stack:
        opened = []
        for _ in range(count):
            opened.append(await asyncpg.connect(database))
            stack.push_async_callback(opened[-1].close)
        yield opened


async def at_once(
    database: str, count: int, act: Callable[[asyncpg.Connection], Awaitable[Any]]
) -> list[Any]:
    async with connections(database, count) as opened:
        return await asyncio.gather(*(act(connection) for connection in opened), return_exceptions=True)


async def test_two_holds_at_once_take_the_last_milliseconds_once(
    database: str, connection: asyncpg.Connection
) -> None:
    await open_account(connection, left_ms=100)

    outcomes = await at_once(database, 2, lambda one: hold(one, a_request(60)))

    assert sorted(type(outcome[0]).__name__ for outcome in outcomes) == ["HoldPlaced", "HoldRefused"]
    assert (await balance(connection)).available_ms == 40
    await assert_sound(connection)


async def test_two_settlements_at_once_charge_an_attempt_once(
    database: str, connection: asyncpg.Connection
) -> None:
    await open_account(connection)
    request = await held(connection, a_request(1000))

    outcomes = await at_once(database, 2, lambda one: settle(one, the_end(request, 1000)))

    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["AlreadySettled", "list"]
    assert (await balance(connection)).used_ms == 1000
    await assert_sound(connection)


async def test_twenty_callers_of_one_request_id_get_one_outcome(
    database: str, connection: asyncpg.Connection
) -> None:
    done: list[int] = []

    async def call(one: asyncpg.Connection) -> dict[str, object]:
        async with one.transaction():
            outcome = await idempotency.claim(one, "ann", "CreateJob", "r1", b"same")
            if outcome is None:
                done.append(len(done))
                outcome = {"job": f"j{len(done)}"}
                await idempotency.store(one, "ann", "CreateJob", "r1", outcome)
            return outcome

    assert await at_once(database, 20, call) == [{"job": "j1"}] * 20
    assert done == [0]


async def test_a_claim_that_rolls_back_lets_the_next_caller_through(
    database: str, connection: asyncpg.Connection
) -> None:
    async with connections(database, 2) as (first, second):
        transaction = first.transaction()
        await transaction.start()
        assert await idempotency.claim(first, "ann", "CreateJob", "r1", b"same") is None
        waiting = asyncio.create_task(idempotency.claim(second, "ann", "CreateJob", "r1", b"same"))
        await blocked_on(connection)
        await transaction.rollback()
        assert await waiting is None


async def blocked_on(connection: asyncpg.Connection) -> None:
    """Return once a connection to this database waits for a lock."""
    waiting = 0
    while not waiting:
        waiting = await connection.fetchval(
            """SELECT count(*) FROM pg_stat_activity
                WHERE datname = current_database() AND wait_event_type = 'Lock'"""
        )


async def test_a_new_period_touched_by_many_at_once_is_granted_once(
    database: str, connection: asyncpg.Connection
) -> None:
    await open_account(connection)

    outcomes = await at_once(database, 8, lambda one: balance(one, at=after(days=31)))

    assert [outcome.available_ms for outcome in outcomes] == [BASIC_MS] * 8
    await assert_sound(connection)


async def test_two_updates_of_a_plan_at_once_make_one_version(
    database: str, connection: asyncpg.Connection
) -> None:
    read = await plans.newest(connection, "basic")

    async def update(one: asyncpg.Connection) -> PlanVersion:
        async with one.transaction():
            return await plans.update(
                one,
                read,
                etag=read.etag,
                effective_from=EffectiveFrom.NOW,
                actor="accounts/root",
                reason="test",
                request_id="r1",
                at=START,
            )

    outcomes = await at_once(database, 2, update)

    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["EtagMismatch", "PlanVersion"]
    assert (await plans.newest(connection, "basic")).version == 2


async def test_a_locked_account_makes_the_next_acceptance_wait(
    database: str, connection: asyncpg.Connection
) -> None:
    await open_account(connection)
    async with connections(database, 2) as (first, second):
        transaction = first.transaction()
        await transaction.start()
        await accounts.lock_terms(first, "ann", START)
        waiting = asyncio.create_task(hold(second, a_request(10)))
        await blocked_on(connection)
        assert not waiting.done()
        await transaction.commit()
        assert isinstance((await waiting)[0], HoldPlaced)


async def test_batches_over_the_same_accounts_in_any_order_do_not_deadlock(
    database: str, connection: asyncpg.Connection
) -> None:
    names = ["ann", "bob", "cid", "dan"]
    for name in names:
        await open_account(connection, name)

    seeds = itertools.count()

    async def shuffled(one: asyncpg.Connection) -> int:
        choice = random.Random(next(seeds))
        for _ in range(15):
            requests = [a_request(10, account=name) for name in choice.sample(names, 3)]
            await hold(one, *requests)
            await settle(one, *(the_end(request, 10) for request in reversed(requests)))
        return 45

    assert await at_once(database, 4, shuffled) == [45] * 4
    await assert_sound(connection)
    used = [(await balance(connection, name)).used_ms for name in names]
    assert sum(used) == 4 * 45 * 10


async def test_the_ledger_is_sound_after_whatever_happens_at_once(
    database: str, connection: asyncpg.Connection
) -> None:
    """Case 9 in small: workers race over accounts with little time; every read adds up, every sum closes."""
    names = ["ann", "bob", "cid"]
    for name in names:
        await open_account(connection, name, left_ms=5000)
        await overage(connection, account=name, cap=price_micros(3000, 66_667))

    async def worker(one: asyncpg.Connection, seed: int) -> int:
        choice = random.Random(seed)
        measured = 0
        for turn in range(25):
            at = after(days=turn * 2)
            requests = [
                a_request(
                    choice.randint(1, 900),
                    account=choice.choice(names),
                    pricing=a_pricing(
                        overage=choice.random() < 0.5, multiplier_bp=choice.choice([10_000, 15_000])
                    ),
                    at=at,
                )
                for _ in range(choice.randint(1, 4))
            ]
            placed = [
                request
                for request, outcome in zip(requests, await hold(one, *requests), strict=True)
                if isinstance(outcome, HoldPlaced)
            ]
            relax = a_request(account=choice.choice(names), pricing=a_pricing(mode=ChargeMode.RELAX), at=at)
            ends = [the_end(relax, 50, tier="relax")]
            measured += 50
            for request in placed:
                took = choice.randint(0, 1200)
                measured += took
                lost = choice.random() < 0.3
                ends.append(
                    the_end(request, ending=Ending.VOID, absorbed_ms=took) if lost else the_end(request, took)
                )
            await settle(one, *ends)
            now = await balance(one, choice.choice(names), at=at)
            assert now.granted_ms == now.used_ms + now.held_ms + now.available_ms
        return measured

    async with connections(database, 3) as opened:
        totals = await asyncio.gather(*(worker(one, seed) for seed, one in enumerate(opened)))

    await assert_sound(connection)
    conserved = await connection.fetchval(
        "SELECT sum(measured_ms + absorbed_ms - unpaid_ms)::bigint FROM billing.settlement"
    )
    assert conserved == sum(totals)
    assert await connection.fetchval("SELECT count(*) FROM billing.hold WHERE state = 'open'") == 0
    assert await connection.fetchval("SELECT sum(held_ms)::bigint FROM billing.grant_lot") == 0


async def test_what_two_hundred_do_at_once_adds_up_as_if_one_had_followed_the_other(
    database: str, connection: asyncpg.Connection
) -> None:
    """Nobody here lacks time, so the order does not matter, and a sum in Python knows the end.

    Three accounts have lots, and one has nothing but its consent to pay.
    """
    names = ["ann", "bob", "cid"]
    for name in names:
        await open_account(connection, name)
    await open_account(connection, "dan", left_ms=0)
    await overage(connection, account="dan")
    used_ms, granted_ms, relax_ms, paid_micros = (Counter[str]() for _ in range(4))

    async def act(pool: asyncpg.Pool, seed: int) -> None:
        choice = random.Random(seed)
        name = choice.choice(names)
        async with pool.acquire() as one:
            for amount_ms in choice.sample([40_000, 900, -300], 2):
                await adjust(one, amount_ms, account=name)
                granted_ms[name] += amount_ms
            bp = choice.choice([10_000, 15_001, 20_000])
            jobs = [a_request(700, account=choice.choice(names), pricing=a_pricing(multiplier_bp=bp))]
            jobs.append(a_request(700, account="dan", pricing=a_pricing(multiplier_bp=bp, overage=True)))
            choice.shuffle(jobs)
            assert all(isinstance(placed, HoldPlaced) for placed in await hold(one, *jobs))
            relax = a_request(account=name, pricing=a_pricing(mode=ChargeMode.RELAX))
            took_ms = choice.randint(1, 1400)
            lost = choice.random() < 0.2
            ends = [
                the_end(job, took_ms, ending=Ending.VOID if lost else Ending.POST, absorbed_ms=took_ms * lost)
                for job in jobs
            ]
            await settle(one, *ends, the_end(relax, 50, tier="relax"))
            relax_ms[name] += 50
            if lost:
                return
            given_back = choice.random() < 0.3
            for job in jobs:
                cost_ms = billed_ms(took_ms, bp)
                if given_back:
                    cost_ms -= await refund(one, job)
                if job.account_id == "dan":
                    paid_micros["dan"] += price_micros(cost_ms, 66_667)
                else:
                    used_ms[job.account_id] += cost_ms

    async with crowd(database) as pool:
        await asyncio.gather(*(act(pool, seed) for seed in range(200)))

    for name in names:
        now = await balance(connection, name)
        assert (now.used_ms, now.held_ms, now.relax_used_ms) == (used_ms[name], 0, relax_ms[name])
        assert now.available_ms == BASIC_MS + granted_ms[name] - used_ms[name]
    dan = await balance(connection, "dan")
    assert (dan.overage_posted_micros, dan.overage_held_micros) == (paid_micros["dan"], 0)
    assert dan.available_ms == 0
    await assert_sound(connection)
    assert await replay(connection) == []


async def test_changes_of_one_plan_by_many_are_made_one_after_the_other(
    database: str, connection: asyncpg.Connection
) -> None:
    """Each preview is of a state, so of many who saw the same one exactly one has its way."""
    await open_account(connection)
    async with connection.transaction():
        shown = await plan_changes.preview(connection, "ann", "standard", after(days=3))

    async def change(one: asyncpg.Connection) -> Any:
        async with one.transaction():
            return await plan_changes.change(
                one,
                "ann",
                "standard",
                etag=shown.etag,
                request_id=str(uuid4()),
                at=after(days=3),
                **BY_ROOT,
            )

    outcomes = await at_once(database, 8, change)

    assert [outcome for outcome in outcomes if not isinstance(outcome, EtagMismatch)] == [shown]
    assert (await balance(connection, at=after(days=3))).available_ms == BASIC_MS + shown.granted_ms
    await assert_sound(connection)


async def test_refunds_of_one_job_by_many_give_no_more_than_it_cost(
    database: str, connection: asyncpg.Connection
) -> None:
    await open_account(connection)
    job = await held(connection, a_request(1000))
    await settle(connection, the_end(job, 1000))

    outcomes = await at_once(database, 8, lambda one: refund(one, job, 300))

    assert sorted(str(outcome) for outcome in outcomes if isinstance(outcome, int)) == ["300"] * 3
    assert (await balance(connection)).available_ms == BASIC_MS - 100
    await assert_sound(connection)
