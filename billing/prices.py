"""What GPU time costs: integers only, rounded up once, on terms fixed when the job is accepted."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from billing.periods import Period

ONE_BP = 10_000
"""A multiplier of 1, in basis points."""

_MS_A_MINUTE = 60_000
_US = timedelta(microseconds=1)


class ChargeMode(StrEnum):
    """Who pays for a job's GPU time."""

    FAST = "fast"
    METERED_FAST = "metered_fast"
    RELAX = "relax"


@dataclass(frozen=True, kw_only=True, slots=True)
class PricingSnapshot:
    """The terms of one job, kept with it. A later change of plan or consent does not touch them."""

    plan: str
    plan_version: int
    charge_mode: ChargeMode
    """As foreseen at acceptance. Either fast mode may end as the other, or as both."""
    multiplier_bp: int
    """For private mode; see `multiplier_of`."""
    overage_allowed: bool
    overage_micros_per_minute: int
    currency: str
    gpu_class_bp: Mapping[str, int] = field(default_factory=dict)
    """Multipliers by device type, in basis points; a type that is not named counts 10,000. Snapshots from
    before plans had them name none."""
    cheapest_bp: int | None = None
    """Of `foreseen_bp`, as `dearest_bp`: found when the job was accepted. None in snapshots from before."""
    dearest_bp: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return JSON values that from_json takes back."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> PricingSnapshot:
        """Return the snapshot that to_json wrote."""
        return cls(**{**value, "charge_mode": ChargeMode(value["charge_mode"])})


def multiplier_of(pricing: PricingSnapshot, device: str) -> int:
    """Return the multiplier of a job on a device type, in basis points: ceil(private * class / 10000)."""
    return -(-pricing.multiplier_bp * pricing.gpu_class_bp.get(device, ONE_BP) // ONE_BP)


def priced_for(pricing: PricingSnapshot, devices: Collection[str]) -> PricingSnapshot:
    """Return the terms of a job that may run on any of these device types; none: on whatever there is."""
    # The empty name stands for any type that the plan does not name.
    found = [multiplier_of(pricing, device) for device in devices or (*pricing.gpu_class_bp, "")]
    return replace(pricing, cheapest_bp=min(found), dearest_bp=max(found))


def foreseen_bp(pricing: PricingSnapshot) -> tuple[int, int]:
    """Return the least and the greatest multiplier that a job was expected to meet, in basis points."""
    return pricing.cheapest_bp or pricing.multiplier_bp, pricing.dearest_bp or pricing.multiplier_bp


def billed_ms(measured_ms: int, multiplier_bp: int) -> int:
    """Return what `measured_ms` of GPU time costs in fast time: ceil(measured * bp / 10000)."""
    return -(-measured_ms * multiplier_bp // ONE_BP)


def paid_ms(billed_ms: int, multiplier_bp: int) -> int:
    """Return the measured time that `billed_ms` pays for in full; the inverse of billed_ms, rounded down."""
    return billed_ms * ONE_BP // multiplier_bp


def price_micros(ms: int, micros_per_minute: int) -> int:
    """Return the price of `ms` billed milliseconds, in millionths of the currency unit, rounded up."""
    return -(-ms * micros_per_minute // _MS_A_MINUTE)


def affordable_ms(micros: int, micros_per_minute: int) -> int:
    """Return the most billed milliseconds whose price is at most `micros`, at a positive price."""
    return micros * _MS_A_MINUTE // micros_per_minute


def prorated(amount: int, period: Period, at: datetime) -> int:
    """Return the part of a period's amount that falls to the rest of it from `at`, rounded up."""
    assert period.start <= at <= period.end, "only a moment of the period divides it"
    return -(-amount * ((period.end - at) // _US) // ((period.end - period.start) // _US))


def in_proportion(amount: int, part: int, whole: int) -> int:
    """Return what of `amount` falls to `part` of `whole`, rounded down; the whole has all of it."""
    return amount * part // whole
