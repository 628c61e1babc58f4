"""What jobs will cost, as this front door knows it: a copy of what was learned, a few seconds old at most.

While the database is away the last copy stands. It can do no harm: no job is accepted then, and a prediction
that was wrong is corrected when the job ends.
"""

from __future__ import annotations

import asyncio

import structlog

from gpu_worker.models import Models
from scheduler.estimator import Estimator
from scheduler.refusals import Overloaded
from scheduler.store.estimates import read_estimates
from scheduler.store.pool import Pool

_log = structlog.get_logger()

_READ_EVERY_S = 5.0


class Estimates:
    """Keeps the newest `estimator`. Until it was read once, that knows the models file alone."""

    def __init__(self, pool: Pool, models: Models) -> None:
        self._pool = pool
        self._models = models
        self._away = False
        self.estimator = Estimator(models)

    async def run(self) -> None:
        """Read again every few seconds until cancelled."""
        while True:
            await self.refresh()
            await asyncio.sleep(_READ_EVERY_S)

    async def refresh(self) -> None:
        """Read what was learned. If the database is away, say so once and keep what there is."""
        try:
            async with self._pool.reading() as connection:
                rows = await read_estimates(connection)
        except Overloaded as away:
            if not self._away:
                _log.warning("estimates not read, the last ones stand", trouble=repr(away.__cause__))
            self._away = True
            return
        self._away = False
        self.estimator = Estimator(self._models, rows)
