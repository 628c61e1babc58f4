"""Statements add up to the millisecond, whatever happened; and what is used up is told once."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from random import Random
from uuid import UUID, uuid4

import asyncpg
import pytest
from ledger_building import (
    BASIC_MS,
    START,
    a_pricing,
    a_request,
    adjust,
    after,
    balance,
    change_plan,
    held,
    hold,
    open_account,
    overage,
    refund,
    settle,
    the_end,
)
from ledger_plans import a_plan, a_version

from billing import accounts, admin, expiry, statements
from billing.entries import Source
from billing.ledger import Ending, HoldPlaced, HoldRequest
from billing.plans import EffectiveFrom
from billing.prices import ChargeMode
from billing.refusals import (
    AdjustmentTooLarge,
    NothingCharged,
    OutsidePeriods,
    RefundTooLarge,
    UnknownAccount,
)
from billing.statements import Line, Statement, TransferPlace
from billing.thresholds import reached


async def statement(
    connection: asyncpg.Connection,
    account: str = "ann",
    *,
    moment: datetime | None = None,
    at: datetime = START,
    most_attempts: int = 10_000,
) -> Statement:
    async with connection.transaction():
        terms = await accounts.lock_terms(connection, account, at)
        return await statements.statement(connection, terms, moment, at, most_attempts=most_attempts)


def line(of: Statement, words: str) -> Line:
    """Return the one line that has these words."""
    (found,) = [line for line in of.lines if words in line.sentence]
    return found


async def charged(connection: asyncpg.Connection, ms: int, *, at: datetime = START) -> HoldRequest:
    request = await held(connection, a_request(ms, at=at))
    await settle(connection, the_end(request, ms))
    return request


async def test_a_new_account_has_its_plans_time_and_nothing_else(connection: asyncpg.Connection) -> None:
    await open_account(connection)
    first = await statement(connection)
    assert (first.plan, first.period.start, first.period.end) == (
        "basic",
        START,
        datetime(2026, 4, 1, tzinfo=START.tzinfo),
    )
    assert (first.opening_ms, first.granted_ms, first.closing_ms, first.held_ms) == (0, BASIC_MS, BASIC_MS, 0)
    (granted,) = first.lines
    assert granted.sentence == "Granted 200.0 GPU-minutes: the plan's fast time for this period."
    assert granted.fast_ms == BASIC_MS


async def test_each_charge_is_a_line_with_its_job_and_attempt(connection: asyncpg.Connection) -> None:
    await open_account(connection)
    job = await held(connection, a_request(60_000, pricing=a_pricing(multiplier_bp=20_000)))
    holding = await statement(connection)
    assert (holding.held_ms, holding.used_ms, holding.closing_ms) == (120_000, 0, BASIC_MS)
    await settle(connection, the_end(job, 45_678))
    made = await statement(connection)
    charge = line(made, "Charged")
    assert charge.sentence == "Charged 91.356 s of fast time: 45.678 s of GPU time × 2."
    assert (charge.job_id, charge.attempt_id) == (UUID(job.job_id), UUID(job.attempt_id))
    assert (charge.measured_ms, charge.multiplier_bp, charge.fast_ms) == (45_678, 20_000, -91_356)
    assert (made.used_ms, made.closing_ms, made.held_ms) == (91_356, BASIC_MS - 91_356, 0)


async def test_time_beyond_the_lots_is_told_with_its_price(connection: asyncpg.Connection) -> None:
    await open_account(connection, left_ms=1_000)
    await overage(connection)
    await settle(
        connection,
        the_end(await held(connection, a_request(61_000, pricing=a_pricing(overage=True))), 61_000),
    )
    made = await statement(connection)
    charge = line(made, "Charged")
    assert charge.sentence.startswith("Charged 1.000 s of fast time and 60.000 s beyond it for 0.0667 USD")
    assert (made.used_ms, made.metered_ms, made.amounts, made.closing_ms) == (
        1_000,
        60_000,
        {"USD": 66_667},
        0,
    )
    assert line(made, "Taken back").fast_ms == 1_000 - BASIC_MS


@pytest.mark.parametrize("most_attempts", [10, 0])
async def test_money_of_two_currencies_is_not_added_up(
    connection: asyncpg.Connection, most_attempts: int
) -> None:
    await open_account(connection, left_ms=0)
    await overage(connection)
    for currency, measured_ms in (("USD", 60_000), ("EUR", 120_000), ("USD", 60_000)):
        pricing = replace(a_pricing(overage=True), currency=currency)
        job = await held(connection, a_request(measured_ms, pricing=pricing))
        await settle(connection, the_end(job, measured_ms))

    made = await statement(connection, most_attempts=most_attempts)

    assert made.amounts == {"EUR": 133_334, "USD": 2 * 66_667}
    assert {one.currency for one in made.lines if one.amount_micros} == {"EUR", "USD"}
    assert (made.metered_ms, made.currency) == (240_000, "USD")


async def test_what_nobody_pays_is_told_too(connection: asyncpg.Connection) -> None:
    await open_account(connection)
    await settle(
        connection, the_end(await held(connection, a_request(1_000)), ending=Ending.VOID, absorbed_ms=700)
    )
    relax = a_request(pricing=a_pricing(mode=ChargeMode.RELAX))
    await settle(connection, the_end(relax, 5_000, tier="relax"))
    made = await statement(connection)
    assert line(made, "Not charged").sentence == ("Not charged: failed or lost. 0.700 s were our loss.")
    assert line(made, "relax").relax_ms == made.relax_ms == 5_000
    assert (made.used_ms, made.closing_ms) == (0, BASIC_MS)


async def test_of_too_many_tries_those_of_a_day_are_one_line(connection: asyncpg.Connection) -> None:
    await open_account(connection)
    for hours in (1, 2, 25):
        await charged(connection, 1_000, at=after(hours=hours))
    lost = await held(connection, a_request(1_000, at=after(hours=3)))
    await settle(connection, the_end(lost, ending=Ending.VOID))
    assert len((await statement(connection, at=after(days=2), most_attempts=4)).lines) == 5
    made = await statement(connection, at=after(days=2), most_attempts=3)
    assert [line.sentence for line in made.lines[1:]] == [
        "2 tries of 2026-03-01. Charged 2.000 s of fast time: 2.000 s of GPU time.",
        "1 try of 2026-03-01. Not charged: failed or lost.",
        "1 try of 2026-03-02. Charged 1.000 s of fast time: 1.000 s of GPU time.",
    ]
    assert [line.fast_ms for line in made.lines[1:]] == [-2_000, 0, -1_000]


async def test_what_a_period_leaves_unused_is_gone_with_its_end(connection: asyncpg.Connection) -> None:
    await open_account(connection)
    await charged(connection, 60_000)
    first = await statement(connection, moment=START, at=after(days=40))
    assert (first.used_ms, first.expired_ms, first.closing_ms) == (60_000, BASIC_MS - 60_000, 0)
    ended = line(first, "Ended unused")
    assert (ended.at, ended.fast_ms) == (first.period.end, 60_000 - BASIC_MS)
    second = await statement(connection, at=after(days=40))
    assert (second.opening_ms, second.granted_ms, second.expired_ms, second.closing_ms) == (
        0,
        BASIC_MS,
        0,
        BASIC_MS,
    )


async def test_what_rolls_over_leaves_one_period_and_opens_the_next(connection: asyncpg.Connection) -> None:
    await a_plan(connection, "saver", rollover_ms=50_000)
    await open_account(connection, plan="saver")
    await charged(connection, 60_000)
    first = await statement(connection, moment=START, at=after(days=40))
    assert (first.closing_ms, first.expired_ms) == (0, BASIC_MS - 60_000)
    second = await statement(connection, at=after(days=40))
    assert second.granted_ms == BASIC_MS + 50_000
    assert line(second, "unused time of the period before").fast_ms == 50_000


async def test_a_job_that_runs_into_the_next_period_is_charged_to_the_time_it_held(
    connection: asyncpg.Connection,
) -> None:
    await open_account(connection)
    job = await held(connection, a_request(60_000, at=after(days=30)))
    await balance(connection, at=after(days=31))
    between = await statement(connection, moment=START, at=after(days=31))
    assert (between.closing_ms, between.held_ms, between.expired_ms) == (60_000, 60_000, BASIC_MS - 60_000)
    await settle(connection, the_end(job, 40_000, at=after(days=31, seconds=1)))
    assert await statement(connection, moment=START, at=after(days=32)) == between
    second = await statement(connection, at=after(days=32))
    assert (second.opening_ms, second.used_ms, second.expired_ms, second.closing_ms) == (
        60_000,
        40_000,
        20_000,
        BASIC_MS,
    )


async def test_a_refund_is_taken_off_what_was_used(connection: asyncpg.Connection) -> None:
    await open_account(connection)
    job = await charged(connection, 60_000)
    await refund(connection, job.job_id, 20_000, at=START)
    made = await statement(connection)
    assert (made.used_ms, made.closing_ms) == (40_000, BASIC_MS - 40_000)
    assert line(made, "Given back").sentence == "Given back: 20.000 s of fast time."


async def test_a_refund_to_a_lot_that_has_ended_is_time_of_its_own(connection: asyncpg.Connection) -> None:
    await open_account(connection)
    job = await charged(connection, 60_000)
    await balance(connection, at=after(days=40))
    await refund(connection, job.job_id, at=after(days=40))
    made = await statement(connection, at=after(days=40))
    assert (made.used_ms, made.granted_ms, made.expired_ms) == (-60_000, BASIC_MS + 60_000, 60_000)
    assert made.closing_ms == BASIC_MS + 60_000
    assert "as time of its own" in line(made, "Given back").sentence


async def test_a_change_of_plan_is_told_with_its_prices(connection: asyncpg.Connection) -> None:
    await a_plan(connection, "small", quota_ms=200, price_micros=10_000_000)
    await a_plan(connection, "large", quota_ms=900, price_micros=20_000_000)
    await open_account(connection, plan="small")
    await change_plan(connection, "large", at=after(days=15, hours=12))
    made = await statement(connection, at=after(days=16))
    assert (made.granted_ms, made.amounts, made.plan) == (550, {"USD": 5_000_000}, "large")
    assert line(made, "new plan").amount_micros == 10_000_000
    assert (
        line(made, "old plan").sentence == "Credited 5.0000 USD for the rest of the period on the old plan."
    )


async def test_a_statement_names_the_plan_of_its_period(connection: asyncpg.Connection) -> None:
    await open_account(connection, plan="standard")
    await change_plan(connection, "basic", at=after(days=2))
    await balance(connection, at=after(days=40))
    await change_plan(connection, "pro", at=after(days=70))
    named = [
        (await statement(connection, moment=after(days=day), at=after(days=100))).plan
        for day in (1, 40, 70, 95)
    ]
    assert named == ["standard", "basic", "pro", "pro"]


@pytest.mark.parametrize("day", [-1, 31])
async def test_a_moment_outside_all_periods_is_refused(connection: asyncpg.Connection, day: int) -> None:
    await open_account(connection)
    with pytest.raises(OutsidePeriods) as refused:
        await statement(connection, moment=after(days=day))
    assert refused.value.metadata() == {
        "opened_at": "2026-03-01T00:00:00+00:00",
        "renews_at": "2026-04-01T00:00:00+00:00",
    }


async def test_transfers_are_listed_newest_first_each_once(connection: asyncpg.Connection) -> None:
    await open_account(connection)
    await open_account(connection, "ben")
    for hour in range(4):
        await charged(connection, 1_000, at=after(hours=hour))
    whole = await statements.transfers(connection, "ann", after=None, limit=100)
    assert [one.code for one in whole] == ["settle", "hold"] * 4 + ["period"]
    assert whole[0].pending_id == whole[1].transfer_id
    paged, place = [], None
    while page := await statements.transfers(connection, "ann", after=place, limit=2):
        paged += page
        place = TransferPlace(at=page[-1].at, transfer_id=page[-1].transfer_id)
    assert paged == whole
    with pytest.raises(UnknownAccount):
        await statements.transfers(connection, "zoe", after=None, limit=1)


@pytest.mark.parametrize("seed", range(12))
async def test_statements_of_any_history_close_and_follow_on_each_other(
    connection: asyncpg.Connection, seed: int
) -> None:
    history = _History(connection, Random(seed))
    await history.live_through(steps=120)
    ends = history.now
    moment, opening_ms, closed = START, 0, []
    while moment <= ends:
        of_period = await statement(connection, moment=moment, at=ends)
        assert of_period.opening_ms == opening_ms, f"{moment}: it opens with what the one before closed with"
        by_day = await statement(connection, moment=moment, at=ends, most_attempts=0)
        assert replace(by_day, lines=()) == replace(of_period, lines=())
        opening_ms, moment = of_period.closing_ms, of_period.period.end
        closed.append(of_period)
    now = await balance(connection, at=ends)
    assert of_period.held_ms == now.held_ms + history.held_of_the_dead
    assert of_period.closing_ms == now.available_ms + of_period.held_ms
    for shown in history.shown:
        (same,) = [one for one in closed if one.period == shown.period]
        assert same == shown, "a period that is over is told for ever as it was told first"
    lots = await connection.fetchrow(
        """SELECT sum(used_ms) AS used_ms, sum(revoked_ms) AS revoked_ms, sum(granted_ms) AS granted_ms
             FROM billing.grant_lot"""
    )
    assert lots is not None
    assert sum(one.used_ms for one in closed) == lots["used_ms"]
    assert sum(one.revoked_ms for one in closed) == lots["revoked_ms"]
    assert sum(one.granted_ms for one in closed) == lots["granted_ms"]


class _History:
    """An account to which anything happens, over a few months."""

    def __init__(self, connection: asyncpg.Connection, random: Random) -> None:
        self.connection = connection
        self.random = random
        self.now = START
        self.shown: list[Statement] = []
        """What was told of periods that were over by then."""
        self.running: list[HoldRequest] = []
        self.ended: list[HoldRequest] = []
        self.held_of_the_dead = 0
        """By jobs that run still, of lots that have ended."""

    async def live_through(self, *, steps: int) -> None:
        await a_plan(self.connection, "small", quota_ms=200_000, price_micros=10_000_001, rollover_ms=30_001)
        await a_plan(self.connection, "large", quota_ms=900_000, price_micros=20_000_000)
        await open_account(self.connection, plan="small")
        await overage(self.connection)
        deeds = (self.start, self.start, self.end, self.end, self.relax, self.adjust, self.promote)
        rare = (self.refund, self.change_plan, self.change_quota, self.sweep, self.show)
        for _ in range(steps):
            self.now += timedelta(seconds=self.random.choice([0, 1, 60, 3_600, 86_400, 300_000]))
            await self.random.choice(deeds if self.random.random() < 0.7 else rare)()
        self.held_of_the_dead = await self.connection.fetchval(
            "SELECT COALESCE(sum(held_ms), 0)::bigint FROM billing.grant_lot WHERE expires_at <= $1", self.now
        )

    async def start(self) -> None:
        pricing = a_pricing(
            multiplier_bp=self.random.choice([10_000, 20_000, 13_333]), overage=self.random.random() < 0.3
        )
        request = a_request(self.random.randint(1, 90_000), pricing=pricing, at=self.now)
        (outcome,) = await hold(self.connection, request)
        if isinstance(outcome, HoldPlaced):
            self.running.append(request)

    async def end(self) -> None:
        if not self.running:
            return
        request = self.running.pop(self.random.randrange(len(self.running)))
        if self.random.random() < 0.2:
            await settle(
                self.connection,
                the_end(request, ending=Ending.VOID, absorbed_ms=self.random.randint(0, 9_000), at=self.now),
            )
            return
        await settle(self.connection, the_end(request, self.random.randint(0, 120_000), at=self.now))
        self.ended.append(request)

    async def relax(self) -> None:
        request = a_request(pricing=a_pricing(mode=ChargeMode.RELAX))
        await settle(
            self.connection, the_end(request, self.random.randint(1, 60_000), tier="relax", at=self.now)
        )

    async def adjust(self) -> None:
        try:
            amount_ms = self.random.choice([-1, 1]) * self.random.randint(1, 50_000)
            await adjust(self.connection, amount_ms, at=self.now)
        except AdjustmentTooLarge:
            pass  # nothing happened, as in life

    async def promote(self) -> None:
        async with self.connection.transaction():
            await admin.adjust_balance(
                self.connection,
                "ann",
                self.random.randint(1, 40_000),
                actor="accounts/root",
                reason="test",
                request_id=str(uuid4()),
                expires_at=self.now + timedelta(seconds=self.random.randint(1, 3_000_000)),
                at=self.now,
                source=self.random.choice([Source.PROMO, Source.PURCHASE]),
            )

    async def refund(self) -> None:
        if self.ended:
            try:
                amount_ms = self.random.choice([None, self.random.randint(1, 60_000)])
                await refund(self.connection, self.random.choice(self.ended).job_id, amount_ms, at=self.now)
            except (RefundTooLarge, NothingCharged):
                pass  # nothing happened, as in life

    async def change_plan(self) -> None:
        await change_plan(self.connection, self.random.choice(["small", "large"]), at=self.now)

    async def change_quota(self) -> None:
        plan = self.random.choice(["small", "large"])
        await a_version(
            self.connection,
            plan,
            at=self.now,
            effective_from=self.random.choice(list(EffectiveFrom)),
            quota_ms=self.random.randint(0, 1_000_000),
        )

    async def sweep(self) -> None:
        async with self.connection.transaction():
            await expiry.expire(self.connection, self.now, 10)

    async def show(self) -> None:
        present = await statement(self.connection, at=self.now)
        if present.period.start > START:
            before = present.period.start - timedelta(seconds=1)
            self.shown.append(await statement(self.connection, moment=before, at=self.now))


@pytest.mark.parametrize(
    ("used_ms", "granted_ms", "percents"),
    [
        (0, 0, ()),
        (0, 100, ()),
        (499, 1_000, ()),
        (500, 1_000, (50,)),
        (799, 1_000, (50,)),
        (800, 1_000, (50, 80)),
        (1_000, 1_000, (50, 80, 100)),
    ],
)
def test_which_shares_are_used_up(used_ms: int, granted_ms: int, percents: tuple[int, ...]) -> None:
    assert reached(used_ms, granted_ms) == percents


async def test_each_threshold_is_told_once_with_the_charge_that_reaches_it(
    connection: asyncpg.Connection,
) -> None:
    await open_account(connection, left_ms=100_000)
    told = [await _charge(connection, ms) for ms in (49_999, 1, 10_000, 25_000, 5_000, 10_000)]
    assert told == [(), (50,), (), (80,), (), (100,)]
    made = await statement(connection)
    assert [line.sentence for line in made.lines if "%" in line.sentence] == [
        f"{percent} % of this period's fast time were used by then." for percent in (50, 80, 100)
    ]


async def test_one_charge_can_reach_them_all(connection: asyncpg.Connection) -> None:
    await open_account(connection, left_ms=100_000)
    assert await _charge(connection, 100_000) == (50, 80, 100)


async def test_a_refund_and_a_second_use_tell_nothing_twice(connection: asyncpg.Connection) -> None:
    await open_account(connection, left_ms=100_000)
    job = await charged(connection, 60_000)
    await refund(connection, job.job_id, at=START)
    assert await _charge(connection, 60_000) == ()


async def test_a_new_period_begins_anew(connection: asyncpg.Connection) -> None:
    await open_account(connection)
    assert await _charge(connection, BASIC_MS) == (50, 80, 100)
    assert await _charge(connection, BASIC_MS // 2, at=after(days=31)) == (50,)


async def test_time_from_before_the_period_counts_for_none_of_it(connection: asyncpg.Connection) -> None:
    await open_account(connection)
    await adjust(connection, 10 * BASIC_MS)
    assert await _charge(connection, BASIC_MS, at=after(days=31)) == (50, 80, 100)


async def test_a_quota_that_was_cut_is_told_with_the_next_charge(connection: asyncpg.Connection) -> None:
    await open_account(connection, left_ms=100_000)
    await charged(connection, 40_000)
    await adjust(connection, -50_000)
    assert await _charge(connection, 1) == (50, 80)


async def test_a_charge_that_is_rolled_back_told_nothing(connection: asyncpg.Connection) -> None:
    await open_account(connection, left_ms=100_000)
    job = await held(connection, a_request(60_000))
    transaction = connection.transaction()
    await transaction.start()
    (settled,) = await settle(connection, the_end(job, 60_000))
    assert settled.thresholds == (50,)
    await transaction.rollback()
    (settled,) = await settle(connection, the_end(job, 60_000))
    assert settled.thresholds == (50,)


async def _charge(connection: asyncpg.Connection, ms: int, *, at: datetime = START) -> tuple[int, ...]:
    """Charge a job and return which thresholds that told."""
    job = await held(connection, a_request(ms, at=at))
    (settled,) = await settle(connection, the_end(job, ms))
    return settled.thresholds
