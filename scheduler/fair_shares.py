"""How evenly relax is shared: each account's part of its GPU time, against the part that is due to it.

Looked at now and then. What is due to an account that has a relax job to start, or runs one, is its weight's
share of the GPUs that relax has. Both are forgotten with a half-life: the start or the end of one job is no
unfairness, and what was hours ago is none any more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

HALF_LIFE_MS = 15 * 60_000
"""Longer than jobs take, and short enough that somebody who is passed over is seen within the hour."""

_FORGOTTEN_MS = 1.0


@dataclass(slots=True)
class _Share:
    due_ms: float = 0.0
    had_ms: float = 0.0


class FairShares:
    """What accounts were due, and what they had."""

    def __init__(self, now_ms: int) -> None:
        self._seen_ms = now_ms
        self._shares: dict[str, _Share] = {}
        self._all_ms = 0.0

    def seen(self, weights: Mapping[str, int], gpus: Mapping[str, int], now_ms: int) -> None:
        """Add the time since the last look, through which it was as it is now.

        `weights` are those of the accounts that have a job to start or run one; `gpus`, how many these have.
        """
        passed_ms, self._seen_ms = now_ms - self._seen_ms, now_ms
        kept = 0.5 ** (passed_ms / HALF_LIFE_MS)
        self._all_ms *= kept
        for account_id, share in list(self._shares.items()):
            share.due_ms *= kept
            share.had_ms *= kept
            if max(share.due_ms, share.had_ms) < _FORGOTTEN_MS and account_id not in weights:
                del self._shares[account_id]
        shared_ms = passed_ms * sum(gpus.values())
        self._all_ms += shared_ms
        all_weights = sum(weights.values())
        for account_id, weight in weights.items():
            share = self._shares.setdefault(account_id, _Share())
            share.due_ms += shared_ms * weight / all_weights
            share.had_ms += passed_ms * gpus.get(account_id, 0)

    def error(self, waiting: Iterable[str]) -> float:
        """Return the largest part of relax's GPU time that one of these is due and has not had, 0 to 1.

        Of accounts that wait: who wants no more than it has is not wronged by having little.
        """
        if not self._all_ms:
            return 0.0
        gaps = (
            share.due_ms - share.had_ms
            for account_id in waiting
            if (share := self._shares.get(account_id)) is not None
        )
        return max(0.0, max(gaps, default=0.0) / self._all_ms)
