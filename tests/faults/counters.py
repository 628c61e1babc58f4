"""What has to happen sometimes: counted from rows, from logs, and from the wire, never from the plan.

A fault that strikes and changes nothing proves nothing. Over a set of seeds each of these has to be hit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any

import asyncpg

from tests.faults.crowd import Deed, Promise


class Sometimes(StrEnum):
    """The rare things that the design is made for."""

    ZOMBIE_FENCED = "zombie fenced"
    """A worker that was given up answered all the same, and its result was dropped."""
    COMMIT_UNKNOWN = "commit unknown but done"
    """The answer to the commit of a charge was lost after the commit: asked again, it was found done."""
    REQUEST_REPLAYED = "request replayed"
    """A client that got no answer asked again, and got the job that its first try had made."""
    HOLD_RELEASED = "hold released"
    """Fast time that was set aside for an attempt was given back, because the attempt was lost."""
    OVERRUN = "overrun"
    """An attempt took longer than was set aside for it, and the rest was charged or borne."""
    ADOPTED = "adopted after restart"
    """An attempt that ran while its scheduler died was ended well under the next one."""
    REAPER_LATE = "lost race of the reaper"
    """A worker was given up whose result was on its way to the ledger: the result counted."""
    WENT_ON = "went on from a checkpoint"
    SILENT = "silent worker given up"
    PARKED = "parked"
    MIGRATED = "migrated"
    SCHEDULERS = "took the lead again"
    DEPOSED = "deposed scheduler refused"
    """One that was given up went on after its successor had begun, and its next write failed."""


REQUIRED = (
    Sometimes.ZOMBIE_FENCED,
    Sometimes.COMMIT_UNKNOWN,
    Sometimes.REQUEST_REPLAYED,
    Sometimes.HOLD_RELEASED,
    Sometimes.OVERRUN,
    Sometimes.ADOPTED,
    Sometimes.REAPER_LATE,
    Sometimes.WENT_ON,
    Sometimes.SILENT,
    Sometimes.DEPOSED,
)
"""Those that every sound set of seeds hits."""

_ROWS: Mapping[Sometimes, str] = {
    # Of a drain too a hold is given back, and nothing was lost.
    Sometimes.HOLD_RELEASED: """
        SELECT count(*) FROM billing.hold JOIN scheduler.attempt USING (attempt_id)
         WHERE hold.state = 'voided' AND counts_as_loss""",
    # Time beyond a hold is a transfer of its own, or nobody's.
    Sometimes.OVERRUN: """
        SELECT count(DISTINCT attempt_id) FROM billing.settlement JOIN billing.hold USING (attempt_id)
         WHERE ending = 'post' AND due_ms > lots_ms + metered_ms""",
    Sometimes.ADOPTED: """
        SELECT count(DISTINCT attempt_id) FROM scheduler.attempt
          JOIN scheduler.journal ON kind = 'AttemptRestored' AND subject = attempt_id::text
         WHERE state = 'succeeded' AND journal.epoch > attempt.epoch""",
    Sometimes.WENT_ON: "SELECT count(*) FROM scheduler.attempt WHERE state = 'succeeded' AND kept_ms > 0",
    Sometimes.PARKED: "SELECT count(*) FROM scheduler.attempt WHERE parks > 0",
    Sometimes.MIGRATED: "SELECT count(*) FROM scheduler.attempt WHERE state = 'migrated'",
    Sometimes.SCHEDULERS: "SELECT count(DISTINCT epoch) - 1 FROM scheduler.journal",
}

_LOGGED: Mapping[str, Sometimes] = {
    "late result dropped": Sometimes.ZOMBIE_FENCED,
    "given up too late": Sometimes.REAPER_LATE,
    "deposed": Sometimes.DEPOSED,
}


async def count(
    connection: asyncpg.Connection,
    *,
    said: Iterable[Mapping[str, Any]],
    promises: Sequence[Promise],
) -> Counter[Sometimes]:
    """Return how often each happened in a run that is over; `said` is what schedulers logged."""
    counted: Counter[Sometimes] = Counter()
    for what, query in _ROWS.items():
        counted[what] = await connection.fetchval(query)
    for line in said:
        if line.get("event") in _LOGGED:
            counted[_LOGGED[line["event"]]] += 1
        elif line.get("event") == "worker lost" and line["sentence"].endswith("was silent."):
            counted[Sometimes.SILENT] += 1
        elif line.get("event") == "attempt ended" and line["repeated"]:
            counted[Sometimes.COMMIT_UNKNOWN] += 1
    made = {
        row["job_id"]: row["made_s"]
        for row in await connection.fetch(
            "SELECT job_id::text, extract(epoch FROM created_at)::float8 AS made_s FROM scheduler.job"
        )
    }
    counted[Sometimes.REQUEST_REPLAYED] = sum(
        promise.deed is Deed.CREATED and made.get(promise.job_id, promise.sent_s) < promise.sent_s
        for promise in promises
    )
    return counted
