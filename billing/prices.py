"""What GPU time costs: integers only, rounded up once, on terms fixed when the job is accepted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

ONE_BP = 10_000
"""A multiplier of 1, in basis points."""

_MS_A_MINUTE = 60_000


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
    overage_allowed: bool
    overage_micros_per_minute: int
    currency: str

    def to_json(self) -> dict[str, Any]:
        """Return JSON values that from_json takes back."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> PricingSnapshot:
        """Return the snapshot that to_json wrote."""
        return cls(**{**value, "charge_mode": ChargeMode(value["charge_mode"])})


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
