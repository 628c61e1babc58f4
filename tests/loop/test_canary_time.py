"""Whether the canary's fast time lasts is known before it does not."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from scheduler.cluster.local_fleet import LocalFleet
from scheduler.doctor import service_diagnoses
from scheduler.frontdoor.artifacts import Artifacts
from scheduler.frontdoor.canary import Canary
from scheduler.frontdoor.deletions import Deletions
from scheduler.frontdoor.estimates import Estimates
from scheduler.policy.ids import Tier
from scheduler.settings import Canary as CanarySettings
from scheduler.store import canary_time
from scheduler.store.canary_time import CanaryTime
from tests.loop.conftest import Stage
from tests.stand_in import stand_in_models

STANDARD = CanaryTime(plan="standard", quota_ms=900 * 60_000, has_overage=False)


@pytest.mark.parametrize(("take_ms", "lasts"), [(0, True), (1_209, True), (1_210, False), (20_000, False)])
def test_time_lasts_for_a_job_a_minute_while_each_is_short_enough(take_ms: int, lasts: bool) -> None:
    assert (STANDARD.shortage(every_s=60, take_ms=take_ms) is None) is lasts


def test_the_figures_say_when_it_ends_and_what_it_would_need() -> None:
    shortage = STANDARD.shortage(every_s=60, take_ms=2_100)
    assert str(shortage) == (
        "A fast job every 60 s at 2.1 s each is 44,640 jobs and 1,563 min in 31 days. The plan standard "
        "grants 900 min, which are used up after 17 days, and then nobody knows whether fast works."
    )


def test_fewer_jobs_last_longer_and_who_pays_beyond_the_plan_is_never_refused() -> None:
    assert STANDARD.shortage(every_s=105, take_ms=2_100) is None
    paying = CanaryTime(plan="standard", quota_ms=0, has_overage=True)
    assert paying.shortage(every_s=60, take_ms=60_000) is None


def test_the_plan_that_is_made_for_it_lasts_while_one_job_ends_before_the_next() -> None:
    own = CanaryTime(plan="canary", quota_ms=44_640 * 60_000, has_overage=False)
    assert own.shortage(every_s=60, take_ms=60_000) is None


async def test_a_canary_whose_plan_is_too_small_is_told_by_the_doctor_and_by_its_front_door(
    stage: Stage, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("machine")
    monkeypatch.chdir(folder)
    for name, value in (("CANARY__ACCOUNT", "ada"), ("FRONTDOOR__PORT", "0"), ("OPS__PORT", "0")):
        monkeypatch.setenv(f"DARKROOM_{name}", value)

    async def told() -> str:
        found = [one async for one in service_diagnoses(data_dir=folder, dsn=stage.dsn)]
        return next(one.sentence for one in found if one.what == "canary")

    assert await told() == "There is no account ada for it."
    await stage.open_account("ada")
    assert await told() == "no fast job of it was billed yet; its plan standard grants 900 min"
    fleet = LocalFleet(workers=1, take_ms=0, gpu_ms=3_000)
    async with stage.leading(fleet) as leader:
        for _ in range(2):
            await stage.until_state(leader, await stage.submit("ada", Tier.FAST), "succeeded")
    assert (await told()).startswith("A fast job every 60 s at 3.0 s each is 44,640 jobs and 2,232 min")
    async with stage.pool.reading() as connection:
        assert await canary_time.read(connection, "ada") == STANDARD
        assert await canary_time.read(connection, "nobody") is None

    models = stand_in_models()
    artifacts = Artifacts(f"file://{folder}")
    estimates = Estimates(stage.pool, models)
    canary = Canary(
        CanarySettings(account="ada", every_s=10),
        account_id="ada",
        pool=stage.pool,
        link=stage.link,  # type: ignore[arg-type]
        metrics=stage.metrics,
        models=models,
        estimates=estimates,
        deletions=Deletions(stage.pool, artifacts, lambda: datetime.now(UTC)),
        clock=lambda: datetime.now(UTC),
    )
    shortage = await canary.shortage()
    assert shortage is not None, "by what one is predicted to take"
    assert 200 < shortage.take_ms < 1_210
