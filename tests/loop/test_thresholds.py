"""Whoever uses up a good part of a period's fast time hears of it with the job that does."""

from __future__ import annotations

from scheduler.cluster.local_fleet import LocalFleet
from scheduler.policy.ids import Tier
from tests.loop.conftest import Stage


async def test_a_job_says_what_was_used_up_with_it_once(stage: Stage) -> None:
    await stage.open_account("ada", plan="basic")
    await stage.adjust_balance("ada", 120_000 - 12_000_000)
    said = []
    async with stage.leading(LocalFleet(workers=1, take_ms=0, gpu_ms=50_000)) as leader:
        for _ in range(3):
            job_id = await stage.submit("ada", Tier.FAST, predicted_ms=10_000)
            await stage.until_state(leader, job_id, "succeeded")
            said.append(
                await stage.connection.fetchval(
                    "SELECT sentence FROM scheduler.job_event WHERE job_id = $1 AND state = 'succeeded'",
                    job_id,
                )
            )
        counted = [
            leader.metrics.registry.get_sample_value(
                "darkroom_billing_thresholds_total", {"plan": "basic", "percent": percent}
            )
            for percent in ("50", "80", "100")
        ]
    assert said == [
        "Done.",
        "Done. With it, 80 % of the fast time of this period are used.",
        "Done. With it, 100 % of the fast time of this period are used.",
    ]
    assert counted == [1, 1, 1]
