"""A new leader's first act: read what is live and hand it to the loop, which replays it as events.

There is no second way of building a board: what runs after a restart is what `apply` makes of the same
events a scheduler that never died would have seen.
"""

from __future__ import annotations

from scheduler.clock import LeaderClock
from scheduler.loop import Loop
from scheduler.policy.parameters import Parameters
from scheduler.policy.usage import rescaling
from scheduler.store import live
from scheduler.store.lanes import Lane


async def restore(loop: Loop, *, lane: Lane, epoch: int, clock: LeaderClock, parameters: Parameters) -> None:
    """Bring a fresh loop up to the rows. The fleet is open: its workers' reports are in the inbox.

    Raises Deposed if another scheduler took the lead meanwhile.
    """
    cells = await lane.run(live.cells)
    origin_ms = cells[0].decay_origin_ms
    newer = rescaling(decay_origin_ms=origin_ms, now_ms=clock.now_ms(), parameters=parameters)
    if newer is not None:
        await lane.run(
            lambda connection: live.rescale_usage(
                connection, epoch=epoch, before_ms=origin_ms, rescaling=newer
            )
        )
        cells = await lane.run(live.cells)
    jobs = await lane.run(live.live_jobs)
    attempts = await lane.run(live.running_attempts)
    accounts = sorted({job.account_id for job in jobs})
    standings = await lane.run(lambda connection: live.standings(connection, accounts, clock.now_ms()))
    await loop.adopt(
        cells=cells,
        jobs=jobs,
        attempts=attempts,
        standings=standings,
        set_aside=await lane.run(live.slots_set_aside),
    )
