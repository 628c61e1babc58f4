"""What a job costs its account: held at dispatch, charged for what ran, once."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import replace
from uuid import uuid4

import asyncpg
import pytest
from ledger_building import (
    BASIC_MS,
    PRICE,
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
from ledger_plans import a_plan, a_version

from billing import accounts, ledger
from billing.ledger import AlreadySettled, Ending, HoldIdReused, HoldPlaced, HoldRefused
from billing.plans import EffectiveFrom
from billing.prices import ChargeMode, billed_ms, multiplier_of, price_micros
from billing.refusals import (
    FastTimeExhausted,
    PlanLacksOverage,
    PlanLacksPrivate,
    Refusal,
    SpendCapReached,
    UnknownAccount,
)


def refusal_of(outcome: HoldPlaced | HoldRefused) -> Refusal:
    assert isinstance(outcome, HoldRefused), outcome
    return outcome.refusal


@pytest.mark.parametrize(
    ("ending", "measured", "used", "left"),
    [(Ending.POST, 123, 123, 877), (Ending.POST, 100, 100, 900), (Ending.VOID, 0, 0, 1000)],
)
async def test_a_hold_of_123_posts_123_or_100_or_nothing(
    connection: asyncpg.Connection, ending: Ending, measured: int, used: int, left: int
) -> None:
    """Case 1 (TigerBeetle, two-phase transfers)."""
    await open_account(connection, left_ms=1000)
    request = await held(connection, a_request(123))
    during = await balance(connection)
    assert (during.used_ms, during.held_ms, during.available_ms) == (0, 123, 877)

    (settled,) = await settle(connection, the_end(request, measured, ending=ending))

    assert (settled.billed_ms, settled.balance_before_ms, settled.balance_after_ms) == (used, 1000, left)
    now = await balance(connection)
    assert (now.used_ms, now.held_ms, now.available_ms) == (used, 0, left)
    await assert_sound(connection)


async def test_with_70_of_100_posted_a_hold_of_50_is_refused(connection: asyncpg.Connection) -> None:
    """Case 2."""
    await open_account(connection, left_ms=100)
    await settle(connection, the_end(await held(connection, a_request(70)), 70))

    (outcome,) = await hold(connection, a_request(50))

    refusal = refusal_of(outcome)
    assert isinstance(refusal, FastTimeExhausted)
    assert refusal.metadata() == {"remaining_ms": "30", "renews_at": "2026-04-01T00:00:00+00:00"}
    assert (await balance(connection)).available_ms == 30
    await assert_sound(connection)


async def test_time_beyond_the_hold_is_a_second_transfer(connection: asyncpg.Connection) -> None:
    """Case 3: posting more than held is refused, so nothing ever posts more than was held."""
    await open_account(connection)
    request = await held(connection, a_request(100))

    (settled,) = await settle(connection, the_end(request, 130))

    assert settled.billed_ms == 130
    rows = await connection.fetch(
        "SELECT kind, code, amount FROM billing.transfer WHERE job_id IS NOT NULL ORDER BY transfer_id"
    )
    assert [tuple(row) for row in rows] == [
        ("pending", "hold", 100),
        ("post_pending", "settle", 100),
        ("post", "overrun", 30),
    ]
    await assert_sound(connection)


async def test_the_same_hold_again_is_the_first_one_and_other_content_an_error(
    connection: asyncpg.Connection,
) -> None:
    """Case 4."""
    await open_account(connection)
    request = a_request(100)
    first = await hold(connection, request)

    assert await hold(connection, request) == first
    assert (await balance(connection)).held_ms == 100
    with pytest.raises(HoldIdReused):
        await hold(connection, a_request(101, job=request.job_id, attempt=request.attempt_id))
    await assert_sound(connection)


async def test_room_for_ten_holds_refuses_the_eleventh_until_one_ends(connection: asyncpg.Connection) -> None:
    """Case 6, with a void in place of an expiry."""
    await open_account(connection, left_ms=10)
    outcomes = await hold(connection, *(a_request(1) for _ in range(11)))
    assert [type(outcome) for outcome in outcomes] == [HoldPlaced] * 10 + [HoldRefused]

    one = await connection.fetchrow("SELECT job_id, attempt_id FROM billing.hold LIMIT 1")
    await settle(
        connection,
        the_end(a_request(1, job=str(one["job_id"]), attempt=str(one["attempt_id"])), ending=Ending.VOID),
    )

    assert isinstance((await hold(connection, a_request(1)))[0], HoldPlaced)
    await assert_sound(connection)


async def test_a_poor_account_does_not_fail_its_neighbours(connection: asyncpg.Connection) -> None:
    await open_account(connection, "poor", left_ms=10)
    await open_account(connection, "rich")

    outcomes = await hold(
        connection, a_request(5, account="rich"), a_request(11, account="poor"), a_request(5, account="rich")
    )

    assert [type(outcome) for outcome in outcomes] == [HoldPlaced, HoldRefused, HoldPlaced]


async def test_a_failure_or_loss_charges_nothing_and_the_platform_bears_its_time(
    connection: asyncpg.Connection,
) -> None:
    await open_account(connection)
    request = await held(connection, a_request(60_000))

    (settled,) = await settle(
        connection, the_end(request, 41_000, ending=Ending.VOID, absorbed_ms=41_000, at=after(minutes=1))
    )

    assert (settled.billed_ms, settled.absorbed_ms) == (0, 41_000)
    assert (await balance(connection, at=after(minutes=1))).available_ms == BASIC_MS
    absorbed = await connection.fetchval(
        "SELECT sum(amount) FROM billing.transfer WHERE credit_account = 'absorbed'"
    )
    assert absorbed == 41_000
    await assert_sound(connection)


async def test_a_cancelled_job_that_ran_nothing_costs_nothing(connection: asyncpg.Connection) -> None:
    await open_account(connection)
    request = await held(connection, a_request(60_000))

    (settled,) = await settle(connection, the_end(request, 0))

    assert settled.billed_ms == 0
    assert (await balance(connection)).available_ms == BASIC_MS
    await assert_sound(connection)


async def test_a_lost_attempt_is_free_and_the_next_one_of_the_job_is_charged(
    connection: asyncpg.Connection,
) -> None:
    await open_account(connection)
    lost = await held(connection, a_request(60_000))
    await settle(connection, the_end(lost, ending=Ending.VOID, absorbed_ms=30_000))
    again = await held(connection, a_request(60_000, job=lost.job_id))

    await settle(connection, the_end(again, 58_000))

    assert (await balance(connection)).used_ms == 58_000
    await assert_sound(connection)


async def test_a_job_cannot_be_charged_for_two_attempts(connection: asyncpg.Connection) -> None:
    await open_account(connection)
    first = await held(connection, a_request())
    await settle(connection, the_end(first, 1000))
    second = await held(connection, a_request(job=first.job_id))

    with pytest.raises(asyncpg.UniqueViolationError, match="settlement_one_charge_a_job"):
        await settle(connection, the_end(second, 1000))


async def test_relax_debits_no_fast_time_and_leaves_one_row(connection: asyncpg.Connection) -> None:
    await open_account(connection)
    request = a_request(pricing=a_pricing(mode=ChargeMode.RELAX))

    (settled,) = await settle(connection, the_end(request, 44_000, tier="relax"))

    assert (settled.billed_ms, settled.balance_before_ms, settled.balance_after_ms) == (0, BASIC_MS, BASIC_MS)
    now = await balance(connection)
    assert (now.relax_used_ms, now.used_ms, now.available_ms) == (44_000, 0, BASIC_MS)
    rows = await connection.fetch("SELECT code, amount FROM billing.transfer WHERE job_id IS NOT NULL")
    assert [tuple(row) for row in rows] == [("relax", 44_000)]
    await assert_sound(connection)


async def test_a_lost_relax_attempt_leaves_only_absorbed_time(connection: asyncpg.Connection) -> None:
    await open_account(connection)
    request = a_request(pricing=a_pricing(mode=ChargeMode.RELAX))

    await settle(connection, the_end(request, ending=Ending.VOID, tier="relax", absorbed_ms=7_000))

    rows = await connection.fetch("SELECT code, amount FROM billing.transfer WHERE job_id IS NOT NULL")
    assert [tuple(row) for row in rows] == [("absorbed", 7_000)]
    assert (await balance(connection)).relax_used_ms == 0
    await assert_sound(connection)


async def test_an_attempt_is_settled_once(connection: asyncpg.Connection, subtests: pytest.Subtests) -> None:
    await open_account(connection)
    tiers: tuple[ledger.Tier, ...] = ("fast", "relax")
    for tier, first, second in itertools.product(tiers, Ending, Ending):
        with subtests.test(tier=tier, first=first, second=second):
            request = a_request(pricing=a_pricing(mode=ChargeMode(tier)))
            if tier == "fast":
                await held(connection, request)
            await settle(connection, the_end(request, 1000, ending=first, tier=tier))
            before = await balance(connection)

            with pytest.raises(AlreadySettled, match=request.attempt_id):
                await settle(connection, the_end(request, 1000, ending=second, tier=tier))

            assert await balance(connection) == before
    await assert_sound(connection)


async def test_one_batch_cannot_settle_an_attempt_twice(connection: asyncpg.Connection) -> None:
    await open_account(connection)
    request = await held(connection, a_request())

    with pytest.raises(AlreadySettled):
        await settle(connection, the_end(request, 1000), the_end(request, 1000))


async def test_the_multiplier_is_rounded_up_once_an_attempt(connection: asyncpg.Connection) -> None:
    await open_account(connection)
    pricing = a_pricing(multiplier_bp=15_001)
    request = await held(connection, a_request(1000, pricing=pricing))

    (settled,) = await settle(connection, the_end(request, 1001))

    assert settled.billed_ms == 1502  # ceil(1501.6)
    await assert_sound(connection)


async def test_lots_burn_by_expiry_and_an_admins_grant_after_the_plans(
    connection: asyncpg.Connection,
) -> None:
    await open_account(connection, left_ms=100)
    await adjust(connection, 50, expires_at=after(days=2))
    await adjust(connection, 50, expires_at=after(days=1))
    request = await held(connection, a_request(170))

    (settled,) = await settle(connection, the_end(request, 160))

    lots = await connection.fetch("SELECT used_ms, held_ms FROM billing.grant_lot ORDER BY lot_id")
    assert [tuple(lot) for lot in lots] == [(100, 0), (10, 0), (50, 0)]
    assert settled.balance_after_ms == 40
    await assert_sound(connection)


async def test_without_fast_time_a_consenting_job_runs_metered(connection: asyncpg.Connection) -> None:
    await open_account(connection, left_ms=30_000)
    await overage(connection)
    request = a_request(60_000, pricing=a_pricing(overage=True))

    (placed,) = await hold(connection, request)
    assert isinstance(placed, HoldPlaced)
    assert (placed.lots_ms, placed.metered_ms) == (30_000, 30_000)
    assert (await balance(connection)).overage_held_micros == placed.metered_micros == 33_334

    (settled,) = await settle(connection, the_end(request, 50_000))

    assert (settled.billed_ms, settled.amount_micros) == (50_000, price_micros(20_000, PRICE))
    assert (settled.balance_before_ms, settled.balance_after_ms) == (30_000, 0)
    now = await balance(connection)
    assert (now.overage_posted_micros, now.overage_held_micros) == (price_micros(20_000, PRICE), 0)
    await assert_sound(connection)


async def test_a_metered_hold_that_was_not_needed_costs_no_money(connection: asyncpg.Connection) -> None:
    await open_account(connection, left_ms=30_000)
    request = await held(connection, a_request(60_000, pricing=a_pricing(overage=True)))

    (settled,) = await settle(connection, the_end(request, 29_000))

    assert (settled.billed_ms, settled.amount_micros) == (29_000, 0)
    assert (await balance(connection)).overage_held_micros == 0
    await assert_sound(connection)


async def test_an_overrun_of_a_metered_job_is_priced_with_the_rest_of_it(
    connection: asyncpg.Connection,
) -> None:
    await open_account(connection, left_ms=0)
    cheap = 1_000  # micros a minute: a thousand milliseconds cost 16.7
    request = await held(connection, a_request(1000, pricing=a_pricing(overage=True, price=cheap)))

    (settled,) = await settle(connection, the_end(request, 1010))

    assert settled.amount_micros == price_micros(1010, cheap) == 17
    assert settled.billed_ms == 1010
    await assert_sound(connection)


async def test_an_overrun_without_consent_is_borne_by_the_platform(connection: asyncpg.Connection) -> None:
    await open_account(connection, left_ms=1000)
    request = await held(connection, a_request(400, pricing=a_pricing(multiplier_bp=20_000)))

    (settled,) = await settle(connection, the_end(request, 600))

    assert (settled.billed_ms, settled.absorbed_ms, settled.balance_after_ms) == (1000, 100, 0)
    await assert_sound(connection)


async def test_an_overrun_is_metered_no_further_than_the_spend_cap(connection: asyncpg.Connection) -> None:
    await open_account(connection, left_ms=0)
    cap = price_micros(70_000, PRICE)
    await overage(connection, cap=cap)
    request = await held(connection, a_request(60_000, pricing=a_pricing(overage=True)))

    (settled,) = await settle(connection, the_end(request, 90_000))

    assert (settled.billed_ms, settled.amount_micros, settled.absorbed_ms) == (70_000, cap, 20_000)
    await assert_sound(connection)


async def test_a_cap_lowered_while_a_job_runs_counts_from_the_next_dispatch(
    connection: asyncpg.Connection,
) -> None:
    await open_account(connection, left_ms=0)
    await overage(connection, cap=price_micros(90_000, PRICE))
    request = await held(connection, a_request(60_000, pricing=a_pricing(overage=True)))
    await overage(connection, cap=price_micros(60_000, PRICE))
    (refused,) = await hold(connection, a_request(1, pricing=a_pricing(overage=True)))
    assert isinstance(refusal_of(refused), SpendCapReached)

    (settled,) = await settle(connection, the_end(request, 80_000))

    assert settled.billed_ms == 80_000
    await assert_sound(connection)


async def test_the_spend_cap_refuses_what_could_exceed_it(connection: asyncpg.Connection) -> None:
    await open_account(connection, left_ms=0)
    await overage(connection, cap=price_micros(90_000, PRICE))
    await held(connection, a_request(60_000, pricing=a_pricing(overage=True)))

    (outcome,) = await hold(connection, a_request(60_000, pricing=a_pricing(overage=True)))

    refusal = refusal_of(outcome)
    assert isinstance(refusal, SpendCapReached)
    assert refusal.reason == FastTimeExhausted.reason
    assert refusal.metadata()["committed_micros"] == str(price_micros(60_000, PRICE))
    assert "0.066667 USD of 0.100001 USD are charged or held" in str(refusal)
    await assert_sound(connection)


async def test_a_job_that_ends_in_the_next_period_is_charged_to_the_one_it_began_in(
    connection: asyncpg.Connection,
) -> None:
    await open_account(connection, left_ms=100)
    request = await held(connection, a_request(100, at=after(days=30, hours=23)))

    (settled,) = await settle(connection, the_end(request, 150, at=after(days=31, hours=1)))

    assert (settled.billed_ms, settled.absorbed_ms) == (100, 50)
    now = await balance(connection, at=after(days=31, hours=1))
    assert (now.used_ms, now.available_ms) == (0, BASIC_MS)
    await assert_sound(connection)


async def test_a_caller_whose_clock_is_behind_finds_the_time_that_was_just_granted(
    connection: asyncpg.Connection,
) -> None:
    await open_account(connection, left_ms=0)
    await adjust(connection, 100, at=after(days=1))
    (granted,) = await hold(connection, a_request(100, at=after(days=1, seconds=-1)))
    assert isinstance(granted, HoldPlaced)

    await balance(connection, at=after(days=31))
    late = await held(connection, a_request(100, at=after(days=31, seconds=-1)))
    (settled,) = await settle(connection, the_end(late, 100))
    assert settled.balance_after_ms == BASIC_MS - 100
    await assert_sound(connection)


async def test_settling_needs_an_account(connection: asyncpg.Connection) -> None:
    with pytest.raises(UnknownAccount, match="nobody"):
        await settle(connection, the_end(a_request(account="nobody"), tier="relax"))


async def price(
    connection: asyncpg.Connection,
    tier: ledger.Tier = "fast",
    *,
    account: str = "ann",
    private: bool = False,
    predicted_ms: int = 60_000,
    waiting_ms: int = 0,
    version: int = 1,
) -> ChargeMode:
    async with connection.transaction():
        terms = await accounts.lock_terms(connection, account, START)
        snapshot = await ledger.price(connection, terms, tier, private, predicted_ms, waiting_ms, START)
    assert snapshot.multiplier_bp == (20_000 if private else 10_000)
    assert (snapshot.plan, snapshot.plan_version, snapshot.currency) == (terms.plan, version, "USD")
    return snapshot.charge_mode


async def test_acceptance_counts_what_already_waits(connection: asyncpg.Connection) -> None:
    await open_account(connection, left_ms=100_000)
    assert await price(connection, waiting_ms=40_000) is ChargeMode.FAST

    with pytest.raises(FastTimeExhausted) as refused:
        await price(connection, waiting_ms=40_001)
    assert refused.value.remaining_ms == 59_999

    await overage(connection)
    assert await price(connection, waiting_ms=40_001) is ChargeMode.METERED_FAST
    await overage(connection, cap=price_micros(1, PRICE))
    assert await price(connection, waiting_ms=40_001) is ChargeMode.METERED_FAST
    with pytest.raises(SpendCapReached):
        await price(connection, waiting_ms=40_002)


async def test_relax_is_accepted_without_fast_time(connection: asyncpg.Connection) -> None:
    await open_account(connection, left_ms=0)
    assert await price(connection, "relax") is ChargeMode.RELAX


async def test_private_needs_a_plan_that_has_it_and_costs_its_multiplier(
    connection: asyncpg.Connection,
) -> None:
    await open_account(connection)
    with pytest.raises(PlanLacksPrivate) as refused:
        await price(connection, private=True)
    assert refused.value.metadata() == {"plan": "basic"}

    await open_account(connection, "pat", plan="pro", left_ms=100_000)
    assert await price(connection, account="pat", private=True, predicted_ms=50_000) is ChargeMode.FAST
    with pytest.raises(FastTimeExhausted):
        await price(connection, account="pat", private=True, predicted_ms=50_001)


async def test_nobody_agrees_to_overage_without_a_price(connection: asyncpg.Connection) -> None:
    await a_plan(connection, "free", quota_ms=0, overage_micros_per_minute=0)
    await open_account(connection, plan="free")
    with pytest.raises(PlanLacksOverage) as refused:
        await overage(connection)
    assert refused.value.metadata() == {"plan": "free"}
    async with connection.transaction():
        await accounts.set_overage(connection, "ann", None, 5, START)
    await a_version(
        connection,
        "free",
        at=after(days=1),
        effective_from=EffectiveFrom.NOW,
        overage_micros_per_minute=5_000_000,
    )
    assert not (await balance(connection, at=after(days=1))).overage_allowed


async def test_a_consent_is_asleep_while_the_plan_has_no_price(connection: asyncpg.Connection) -> None:
    await open_account(connection, left_ms=0)
    await overage(connection)
    await a_version(
        connection, "basic", at=START, effective_from=EffectiveFrom.NOW, overage_micros_per_minute=0
    )
    with pytest.raises(FastTimeExhausted):
        await price(connection, version=2)


CLASSES = {"H200": 30_000, "L4": 5_000}


@pytest.mark.parametrize(
    ("devices", "dearest_bp"),
    [({"H200", "L4"}, 30_000), ({"L4"}, 5_000), ({"L4", "another"}, 10_000), ((), 30_000)],
)
async def test_what_is_accepted_is_covered_on_the_dearest_gpu_there_is(
    connection: asyncpg.Connection, devices: Collection[str], dearest_bp: int
) -> None:
    cost_ms = billed_ms(60_000, dearest_bp)
    await a_plan(connection, "gpu", quota_ms=cost_ms, gpu_class_bp=CLASSES)
    await open_account(connection, plan="gpu")
    async with connection.transaction():
        terms = await accounts.lock_terms(connection, "ann", START)
        pricing = await ledger.price(connection, terms, "fast", False, 60_000, 0, START, devices)
        with pytest.raises(FastTimeExhausted):
            await ledger.price(connection, terms, "fast", False, 60_000, 1, START, devices)
    assert pricing.dearest_bp == dearest_bp
    for device in devices:
        assert multiplier_of(pricing, device) <= dearest_bp
    request = replace(a_request(60_000, pricing=pricing), device=next(iter(devices), "H200"))
    assert isinstance((await hold(connection, request))[0], HoldPlaced)


async def test_overage_is_foreseen_at_the_price_of_the_dearest_gpu(connection: asyncpg.Connection) -> None:
    await a_plan(connection, "gpu", quota_ms=0, gpu_class_bp=CLASSES)
    await open_account(connection, plan="gpu")
    await overage(connection, cap=price_micros(billed_ms(60_000, 30_000), PRICE))
    async with connection.transaction():
        terms = await accounts.lock_terms(connection, "ann", START)
        with pytest.raises(SpendCapReached):
            await ledger.price(connection, terms, "fast", False, 60_001, 0, START, {"H200"})
        pricing = await ledger.price(connection, terms, "fast", False, 60_000, 0, START, {"H200"})
    assert pricing.charge_mode is ChargeMode.METERED_FAST
    request = replace(a_request(60_000, pricing=pricing), device="H200")
    assert isinstance((await hold(connection, request))[0], HoldPlaced)


@pytest.mark.parametrize(
    ("ending", "measured_ms", "released_ms"),
    [(Ending.POST, 20_000, 60_000), (Ending.POST, 70_000, 0), (Ending.VOID, 0, 120_000)],
)
async def test_what_a_settlement_releases_is_what_was_held_less_what_was_posted(
    connection: asyncpg.Connection, ending: Ending, measured_ms: int, released_ms: int
) -> None:
    await open_account(connection, left_ms=50_000)
    await overage(connection)
    pricing = replace(a_pricing(overage=True), gpu_class_bp={"H200": 30_000})
    request = await held(connection, replace(a_request(40_000, pricing=pricing), device="H200"))
    (settled,) = await settle(connection, the_end(request, measured_ms, ending=ending))
    assert settled.released_ms == released_ms


async def test_relax_releases_nothing(connection: asyncpg.Connection) -> None:
    await open_account(connection)
    (settled,) = await settle(connection, the_end(a_request(), 10, tier="relax"))
    assert settled.released_ms == 0


async def test_a_batch_names_jobs_by_any_spelling_of_their_ids(connection: asyncpg.Connection) -> None:
    await open_account(connection)
    attempt = str(uuid4())
    request = await held(connection, a_request(attempt=attempt.upper()))
    await settle(connection, the_end(a_request(job=request.job_id, attempt=attempt), 10))
    assert (await balance(connection)).used_ms == 10
