"""The pure part: periods, rounding, and which lot is taken from."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ledger_building import START, a_pricing, after

from billing.entries import Lot, Source, available_ms, burn_order, filled, taken
from billing.periods import period_at
from billing.prices import (
    ChargeMode,
    PricingSnapshot,
    affordable_ms,
    billed_ms,
    paid_ms,
    price_micros,
)

MOMENTS = st.integers(min_value=0, max_value=60 * 365 * 86_400).map(
    lambda seconds: datetime(2000, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)
)
AMOUNTS = st.integers(min_value=0, max_value=10**12)


@given(anchor=MOMENTS, later=st.timedeltas(min_value=timedelta(0), max_value=timedelta(days=40 * 365)))
def test_every_moment_is_in_one_period_and_periods_meet(anchor: datetime, later: timedelta) -> None:
    """Case 11."""
    at = anchor + later
    period = period_at(anchor, at)

    assert period.start <= at < period.end
    assert period_at(anchor, period.start) == period
    assert period_at(anchor, period.end).start == period.end
    assert timedelta(days=28) <= period.end - period.start <= timedelta(days=31)


@given(anchor=MOMENTS)
def test_twelve_years_have_144_periods_without_gap_or_overlap(anchor: datetime) -> None:
    start = anchor
    for _ in range(144):
        period = period_at(anchor, start)
        assert period.start == start
        start = period.end
    assert (start.year, start.month) == (anchor.year + 12, anchor.month)


@pytest.mark.parametrize(
    ("anchor", "renewals"),
    [
        (
            "2026-01-31T10:00",
            ["2026-02-28T10:00", "2026-03-31T10:00", "2026-04-30T10:00", "2026-05-31T10:00"],
        ),
        ("2028-01-30T00:00", ["2028-02-29T00:00", "2028-03-30T00:00"]),
        ("2024-02-29T23:59", ["2024-03-29T23:59", "2024-04-29T23:59"]),
        ("2026-12-15T12:00", ["2027-01-15T12:00"]),
    ],
)
def test_a_period_keeps_the_day_it_was_begun_on(anchor: str, renewals: list[str]) -> None:
    begun = datetime.fromisoformat(anchor).replace(tzinfo=UTC)
    at = begun
    for renewal in renewals:
        at = period_at(begun, at).end
        assert at == datetime.fromisoformat(renewal).replace(tzinfo=UTC)


def test_a_leap_day_comes_back_every_four_years() -> None:
    begun = datetime(2024, 2, 29, tzinfo=UTC)
    assert period_at(begun, datetime(2025, 2, 28, tzinfo=UTC)).start == datetime(2025, 2, 28, tzinfo=UTC)
    assert period_at(begun, datetime(2028, 3, 1, tzinfo=UTC)).start == datetime(2028, 2, 29, tzinfo=UTC)


def test_the_callers_time_zone_moves_no_period() -> None:
    summer = timezone(timedelta(hours=2))
    begun = datetime(2026, 3, 1, 1, tzinfo=summer)  # 28 February in UTC
    assert period_at(begun, begun).end == datetime(2026, 3, 28, 23, tzinfo=UTC)


@given(measured=AMOUNTS, bp=st.integers(min_value=1, max_value=100_000))
def test_what_is_billed_is_rounded_up_and_pays_for_what_was_measured(measured: int, bp: int) -> None:
    billed = billed_ms(measured, bp)
    assert billed * 10_000 >= measured * bp > (billed - 1) * 10_000
    assert paid_ms(billed, bp) >= measured
    if billed:
        assert paid_ms(billed - 1, bp) < measured


@given(micros=AMOUNTS, price=st.integers(min_value=1, max_value=10**7))
def test_what_is_affordable_costs_no_more_and_one_more_millisecond_would(micros: int, price: int) -> None:
    ms = affordable_ms(micros, price)
    assert price_micros(ms, price) <= micros < price_micros(ms + 1, price)


@given(st.sampled_from(ChargeMode), st.integers(min_value=1, max_value=100_000), st.booleans())
def test_a_pricing_snapshot_survives_json(mode: ChargeMode, bp: int, overage: bool) -> None:
    snapshot = a_pricing(mode=mode, multiplier_bp=bp, overage=overage)
    assert PricingSnapshot.from_json(json.loads(json.dumps(snapshot.to_json()))) == snapshot


def a_lot(
    lot_id: int,
    *,
    source: Source = Source.PLAN,
    priority: int = 20,
    granted_ms: int = 100,
    used_ms: int = 0,
    effective_at: datetime = START,
    expires_at: datetime | None = None,
) -> Lot:
    return Lot(
        lot_id=lot_id,
        account_id="ann",
        source=source,
        priority=priority,
        effective_at=effective_at,
        expires_at=expires_at,
        granted_ms=granted_ms,
        used_ms=used_ms,
        held_ms=0,
        expired_ms=0,
        revoked_ms=0,
    )


def test_lots_burn_by_priority_then_expiry_then_age() -> None:
    lots = [
        a_lot(1, priority=30, expires_at=after(days=1)),
        a_lot(2),
        a_lot(3, expires_at=after(days=9)),
        a_lot(4, expires_at=after(days=2)),
        a_lot(5, expires_at=after(days=2)),
        a_lot(6, priority=10),
    ]
    assert [lot.lot_id for lot in burn_order(lots, START)] == [6, 4, 5, 3, 2, 1]


def test_a_lot_lives_from_its_first_moment_up_to_its_last() -> None:
    lot = a_lot(1, effective_at=after(days=1), expires_at=after(days=2))
    moments = [after(days=1, microseconds=-1), after(days=1), after(days=2, microseconds=-1), after(days=2)]
    assert [lot.lives(at) for at in moments] == [False, True, True, False]


LOTS = st.lists(
    st.builds(
        lambda granted, used, priority, days: (granted, min(used, granted), priority, days),
        st.integers(min_value=0, max_value=1000),
        st.integers(min_value=0, max_value=1000),
        st.integers(min_value=1, max_value=3),
        st.one_of(st.none(), st.integers(min_value=-1, max_value=3)),
    ),
    max_size=6,
).map(
    lambda rows: [
        a_lot(
            number,
            granted_ms=granted,
            used_ms=used,
            priority=priority,
            effective_at=after(days=-2),
            expires_at=None if days is None else after(days=days),
        )
        for number, (granted, used, priority, days) in enumerate(rows)
    ]
)


@given(lots=LOTS, amount=st.integers(min_value=0, max_value=5000))
def test_taking_drains_each_lot_before_the_next(lots: list[Lot], amount: int) -> None:
    order = burn_order(lots, START)
    parts = taken(order, amount)

    assert sum(part.ms for part in parts) == min(amount, available_ms(lots, START))
    of = {lot.lot_id: lot for lot in lots}
    assert all(0 < part.ms <= of[part.lot_id].available_ms for part in parts)
    ids = [lot.lot_id for lot in order if lot.available_ms]
    assert [part.lot_id for part in parts] == ids[: len(parts)]
    assert all(part.ms == of[part.lot_id].available_ms for part in parts[:-1])


@given(st.lists(AMOUNTS), AMOUNTS)
def test_filling_keeps_within_each_capacity_and_leaves_only_the_last_part_full(
    capacities: list[int], amount: int
) -> None:
    amounts = filled(capacities, amount)
    assert sum(amounts) == min(amount, sum(capacities))
    assert all(0 <= part <= capacity for part, capacity in zip(amounts, capacities, strict=True))
    partly = [part < capacity for part, capacity in zip(amounts, capacities, strict=True)]
    assert partly == sorted(partly) or not any(amounts[partly.index(True) + 1 :])
