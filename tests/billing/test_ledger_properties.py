"""What holds of the ledger's arithmetic for any input: nothing is lost between parts, or counted twice."""

from __future__ import annotations

import calendar
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from itertools import pairwise
from random import Random
from uuid import uuid4
from zoneinfo import ZoneInfo

import asyncpg
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from ledger_building import (
    START,
    a_pricing,
    a_request,
    adjust,
    after,
    balance,
    hold,
    open_account,
    overage,
    settle,
    the_end,
)

from billing.entries import PRIORITY, Lot, Source, available_ms, burn_order, taken
from billing.ledger import HoldPlaced
from billing.periods import Period, period_at
from billing.prices import (
    billed_ms,
    in_proportion,
    multiplier_of,
    paid_ms,
    price_micros,
    prorated,
)
from billing.thresholds import PERCENTS, reached, reached_by

ZONES = st.sampled_from(
    ["UTC", "Europe/Berlin", "America/St_Johns", "Pacific/Auckland", "Australia/Lord_Howe", "Asia/Kolkata"]
).map(ZoneInfo)
MOMENTS = st.builds(
    lambda seconds, zone: (datetime(2000, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)).astimezone(zone),
    st.integers(min_value=0, max_value=60 * 365 * 86_400),
    ZONES,
)
AMOUNTS = st.integers(min_value=0, max_value=10**12)
MULTIPLIERS = st.integers(min_value=1, max_value=100_000)
MONTH = Period(start=START, end=after(days=31))
IN_MONTH = st.timedeltas(min_value=timedelta(0), max_value=timedelta(days=31)).map(lambda span: START + span)


@settings(deadline=None)
@given(anchor=MOMENTS)
@example(anchor=datetime(2000, 1, 31, tzinfo=UTC))
@example(anchor=datetime(2096, 2, 29, 23, 59, 59, tzinfo=UTC))
def test_forty_years_of_periods_meet_and_keep_their_day(anchor: datetime) -> None:
    """Also over 2100, which is no leap year."""
    begun = anchor.astimezone(UTC)
    periods = [period_at(anchor, begun)]
    while len(periods) < 480:
        periods.append(period_at(anchor, periods[-1].end))

    assert periods[0].start == begun
    assert all(one.end == following.start for one, following in pairwise(periods))
    for period in periods:
        last = calendar.monthrange(period.start.year, period.start.month)[1]
        assert period.start.day == min(begun.day, last)
        assert period.start.timetz() == begun.timetz()
    assert periods[-1].end.year == begun.year + 40


@given(
    anchor=MOMENTS, later=st.timedeltas(min_value=timedelta(0), max_value=timedelta(days=36_500)), zone=ZONES
)
def test_no_clock_of_anybody_moves_a_period(anchor: datetime, later: timedelta, zone: ZoneInfo) -> None:
    at = anchor.astimezone(UTC) + later
    period = period_at(anchor, at)
    assert period_at(anchor.astimezone(zone), at.astimezone(zone)) == period
    assert period.start <= at < period.end
    assert period_at(anchor, period.end - timedelta(microseconds=1)) == period
    assert period_at(anchor, period.end) != period


@given(amount=AMOUNTS, at=IN_MONTH, later=IN_MONTH)
def test_a_prorated_amount_is_all_at_first_nothing_at_last_and_never_grows(
    amount: int, at: datetime, later: datetime
) -> None:
    assert prorated(amount, MONTH, MONTH.start) == amount
    assert prorated(amount, MONTH, MONTH.end) == 0
    early, late = sorted((at, later))
    assert amount >= prorated(amount, MONTH, early) >= prorated(amount, MONTH, late) >= 0


@given(amount=AMOUNTS, at=IN_MONTH)
def test_a_prorated_amount_is_the_exact_share_rounded_up(amount: int, at: datetime) -> None:
    exact = amount * Fraction((MONTH.end - at) // timedelta(microseconds=1), 31 * 86_400 * 10**6)
    assert 0 <= prorated(amount, MONTH, at) - exact < 1


@given(quotas=st.lists(AMOUNTS, min_size=2, max_size=6).map(sorted), at=IN_MONTH)
def test_changes_step_by_step_give_what_one_change_gives_but_for_a_rounding_each(
    quotas: list[int], at: datetime
) -> None:
    steps = sum(prorated(new - old, MONTH, at) for old, new in pairwise(quotas))
    at_once = prorated(quotas[-1] - quotas[0], MONTH, at)
    assert 0 <= steps - at_once < len(quotas)


@given(micros=AMOUNTS, parts=st.lists(st.integers(min_value=1, max_value=10**6), min_size=1, max_size=20))
def test_money_split_in_proportion_adds_up_however_it_is_split(micros: int, parts: list[int]) -> None:
    """As refunds split it: each part is what all so far come to, less what was given before."""
    whole, so_far, given_back = sum(parts), 0, []
    for part in parts:
        so_far += part
        given_back.append(in_proportion(micros, so_far, whole) - sum(given_back))
    assert sum(given_back) == micros
    assert all(share >= 0 for share in given_back)


@given(measured=AMOUNTS, private=MULTIPLIERS, gpu_class=MULTIPLIERS)
def test_an_attempt_is_rounded_once_and_by_less_than_its_multipliers_smallest_step(
    measured: int, private: int, gpu_class: int
) -> None:
    pricing = replace(a_pricing(multiplier_bp=private), gpu_class_bp={"A100": gpu_class})
    bp = multiplier_of(pricing, "A100")
    assert 0 <= bp - Fraction(private * gpu_class, 10_000) < 1
    assert multiplier_of(pricing, "another") == private
    assert 0 <= billed_ms(measured, bp) - Fraction(measured * bp, 10_000) < 1


@given(amounts=st.lists(st.integers(min_value=0, max_value=10**9), min_size=1), bp=MULTIPLIERS)
def test_attempts_rounded_one_by_one_cost_less_than_a_millisecond_each_more(
    amounts: list[int], bp: int
) -> None:
    apart = sum(billed_ms(amount, bp) for amount in amounts)
    assert 0 <= apart - billed_ms(sum(amounts), bp) < len(amounts)


def a_lot(lot_id: int, source: Source, amounts: tuple[int, int], begins: int, lasts: int | None) -> Lot:
    granted_ms, used_ms = max(amounts), min(amounts)
    return Lot(
        lot_id=lot_id,
        account_id="ann",
        source=source,
        priority=PRIORITY[source],
        effective_at=after(days=begins),
        expires_at=None if lasts is None else after(days=begins + lasts),
        granted_ms=granted_ms,
        used_ms=used_ms,
        held_ms=0,
        expired_ms=0,
        revoked_ms=0,
    )


MS = st.integers(min_value=0, max_value=1000)
LOTS = st.lists(
    st.tuples(
        st.sampled_from(Source),
        st.tuples(MS, MS),
        st.integers(min_value=-3, max_value=1),
        st.none() | st.integers(min_value=1, max_value=5),
    ),
    max_size=8,
).map(lambda rows: [a_lot(number, *row) for number, row in enumerate(rows)])


@given(lots=LOTS, choice=st.randoms(use_true_random=False))
def test_the_order_of_burning_depends_on_the_lots_alone(lots: list[Lot], choice: Random) -> None:
    shuffled = list(lots)
    choice.shuffle(shuffled)
    order = burn_order(lots, START)

    assert burn_order(shuffled, START) == order
    assert {lot.lot_id for lot in order} == {lot.lot_id for lot in lots if lot.lives(START)}
    for earlier, later in pairwise(order):
        assert earlier.priority <= later.priority
        if earlier.priority == later.priority:
            assert earlier.expires_at is not None or later.expires_at is None
            assert later.expires_at is None or earlier.expires_at <= later.expires_at


@given(lots=LOTS, first_ms=MS, second_ms=MS)
def test_taking_twice_takes_what_taking_once_would(lots: list[Lot], first_ms: int, second_ms: int) -> None:
    order = burn_order(lots, START)
    one_by_one: Counter[int] = Counter()
    left = order
    for amount_ms in (first_ms, second_ms):
        parts = {part.lot_id: part.ms for part in taken(left, amount_ms)}
        one_by_one.update(parts)
        left = [lot.plus(held_ms=parts.get(lot.lot_id, 0)) for lot in left]
    assert one_by_one == {part.lot_id: part.ms for part in taken(order, first_ms + second_ms)}
    assert available_ms(left, START) == available_ms(lots, START) - sum(one_by_one.values())


@given(lots=LOTS, amount_ms=MS)
def test_what_was_taken_last_is_given_back_first(lots: list[Lot], amount_ms: int) -> None:
    """Taking from the end of the order is its mirror: both ends meet where the time runs out."""
    order = burn_order(lots, START)
    all_ms = available_ms(lots, START)
    head = Counter({part.lot_id: part.ms for part in taken(order, min(amount_ms, all_ms))})
    tail = Counter({part.lot_id: part.ms for part in taken(order[::-1], max(all_ms - amount_ms, 0))})
    assert head + tail == Counter({lot.lot_id: lot.available_ms for lot in order if lot.available_ms})


@given(granted=AMOUNTS, used=AMOUNTS, more=AMOUNTS)
def test_thresholds_are_reached_in_their_order_and_stay_so(granted: int, used: int, more: int) -> None:
    now = reached(used, granted)
    assert now == PERCENTS[: len(now)]
    assert reached(used + more, granted)[: len(now)] == now
    assert (100 in now) == (granted > 0 and used >= granted)


@given(granted=st.integers(min_value=1, max_value=10**9), steps=st.lists(AMOUNTS, max_size=10))
def test_a_threshold_is_first_reached_once(granted: int, steps: list[int]) -> None:
    used, told = 0, []
    for step in steps:
        before = reached(used, granted)
        used += step
        told += [percent for percent in reached(used, granted) if percent not in before]
    assert tuple(told) == reached(used, granted)


@given(lots=LOTS)
def test_thresholds_count_the_living_time_of_the_period_and_no_other(lots: list[Lot]) -> None:
    period_start = after(days=-1)
    counted = [lot for lot in lots if lot.effective_at >= period_start and lot.lives(START)]
    assert reached_by(lots, period_start, START) == reached(
        sum(lot.used_ms for lot in counted), sum(lot.granted_ms for lot in counted)
    )
    revoked = [lot.plus(revoked_ms=lot.available_ms) for lot in lots]
    assert set(reached_by(revoked, period_start, START)) in (set(), set(PERCENTS))


# One database for all examples, each with an account of its own: what is checked of one is not of the others.
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lots_ms=st.lists(st.integers(min_value=1, max_value=900), max_size=3),
    predicted_ms=st.integers(min_value=1, max_value=1500),
    measured_ms=st.integers(min_value=0, max_value=2500),
    bp=st.integers(min_value=1, max_value=30_000),
    price=st.integers(min_value=1, max_value=200_000),
    cap=st.none() | st.integers(min_value=1, max_value=4000),
    consents=st.booleans(),
)
async def test_any_charge_is_split_without_a_millisecond_or_a_micro_lost(
    connection: asyncpg.Connection,
    lots_ms: list[int],
    predicted_ms: int,
    measured_ms: int,
    bp: int,
    price: int,
    cap: int | None,
    consents: bool,
) -> None:
    account = f"a-{uuid4()}"
    await open_account(connection, account, left_ms=0)
    await overage(connection, account=account, cap=cap or 0)
    for lot_ms in lots_ms:
        await adjust(connection, lot_ms, account=account)
    pricing = a_pricing(multiplier_bp=bp, overage=consents, price=price)
    request = a_request(predicted_ms, account=account, pricing=pricing)
    left_ms, cost_ms = sum(lots_ms), billed_ms(predicted_ms, bp)

    (placed,) = await hold(connection, request)
    affordable = cap is None or price_micros(cost_ms - left_ms, price) <= cap
    assert isinstance(placed, HoldPlaced) == (cost_ms <= left_ms or (consents and affordable))
    if not isinstance(placed, HoldPlaced):
        return
    assert placed.lots_ms + placed.metered_ms == cost_ms
    assert placed.lots_ms == min(cost_ms, left_ms)
    (settled,) = await settle(connection, the_end(request, measured_ms))

    now = await balance(connection, account)
    due_ms = billed_ms(measured_ms, bp)
    metered_ms = settled.billed_ms - now.used_ms
    assert now.used_ms == min(due_ms, left_ms)
    assert now.held_ms == now.overage_held_micros == 0
    assert now.overage_posted_micros == settled.amount_micros == price_micros(metered_ms, price)
    assert settled.absorbed_ms == measured_ms - min(measured_ms, paid_ms(settled.billed_ms, bp))
    if cap is not None:
        assert settled.amount_micros <= cap
    if consents and cap is None:
        assert settled.billed_ms == due_ms
    if not consents:
        assert metered_ms == 0
