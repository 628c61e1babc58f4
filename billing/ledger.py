"""What a job costs its account: the price at acceptance, the hold at dispatch, the charge at its end.

Nothing is debited before dispatch: a hold at acceptance would lock quota for hours. Every function locks the
accounts it names, in the order of their ids, or says that it does not (see `accounts.lock`).
"""

from billing.balances import Balance, Tier, balance, price
from billing.holds import (
    HoldIdReused,
    HoldPlaced,
    HoldRefused,
    HoldRequest,
    OpenHolds,
    open_holds,
    place_holds,
)
from billing.settlements import AlreadySettled, Ending, Settled, Settlement, settle

__all__ = [
    "AlreadySettled",
    "Balance",
    "Ending",
    "HoldIdReused",
    "HoldPlaced",
    "HoldRefused",
    "HoldRequest",
    "OpenHolds",
    "Settled",
    "Settlement",
    "Tier",
    "balance",
    "open_holds",
    "place_holds",
    "price",
    "settle",
]
