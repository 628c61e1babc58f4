"""The page shows what is so, says what it does not know, and is not taken in by names."""

from __future__ import annotations

import asyncio
import html
import re
import uuid
from datetime import timedelta

import asyncpg
import pytest

from scheduler.cluster.local_fleet import LocalFleet
from scheduler.policy.ids import Tier
from scheduler.store import operations, overview
from scheduler.workers import LeavesBecause, Leaving
from tests.ops.page.conftest import OpsPort, a_page_of_counters


def part(text: str, name: str) -> str:
    """Return the text of a part of the page, one line a row, without its tags."""
    _, _, rest = text.partition(f'<div id="{name}">')
    inside = re.split(r"</section>|</details>", rest)[0]
    rows = re.sub(r"\s+", " ", inside).replace("</tr>", "\n")
    return html.unescape(re.sub(r" +", " ", re.sub(r"<[^>]*>", " ", rows)))


async def test_nobody_waits_and_nobody_works(port: OpsPort, fleet: LocalFleet) -> None:
    await port.log_in()
    async with port.stage.leading(fleet) as leader:
        await port.stage.until(leader, lambda: leader.workers == 4)
        text = await port.look()
    assert "0 of the 4 GPUs that take jobs are at work. 0 fast jobs wait, 0 relax jobs wait." in re.sub(
        r"\s+", " ", text
    )
    assert "Nobody waits." in part(text, "waits")
    assert "Nothing was decided lately." in part(text, "decisions")
    assert part(text, "workers").count("idle") == 4


async def test_queues_are_shown_by_tier_with_their_oldest(busy: OpsPort) -> None:
    await busy.log_in()
    text = part(await busy.look(), "queues")
    fast, relax = (next(line for line in text.split("\n") if tier in line) for tier in ("fast", "relax"))
    queues = busy.link.leader.queues()  # type: ignore[union-attr]
    for line, tier in zip((fast, relax), queues.tiers, strict=True):
        assert f" {tier.tier} {tier.waiting} {tier.held} " in line
        assert line.split()[-3:] == [str(tier.running), str(tier.parked), "open"]
    assert "4 GPUs take jobs" in text


async def test_a_paused_tier_says_why(busy: OpsPort) -> None:
    async with busy.stage.pool.transaction() as connection:
        await operations.pause_tier(connection, Tier.RELAX, "a fire drill")
    await busy.log_in()
    text = await busy.look()
    assert "Relax is paused: a fire drill" in text
    assert "paused: a fire drill" in part(text, "queues")


async def test_workers_are_shown_with_what_they_do_those_in_trouble_first(
    busy: OpsPort, fleet: LocalFleet
) -> None:
    async with busy.stage.pool.transaction() as connection:
        await operations.drain_worker(connection, "here/gpu-2", "new fan", within=timedelta(minutes=5))
    await busy.log_in()
    _, first, *others, _ = part(await busy.look(), "workers").split("\n")
    assert "here/gpu-2 draining new fan" in first
    for worker_id, request in fleet.busy.items():
        line = next(line for line in (first, *others) if worker_id in line)
        assert request.job_id[:8] in line
        assert f" {request.tier} " in line


async def test_a_worker_that_is_emptied_is_shown_with_since_when_and_why_and_how_far_it_is(
    busy: OpsPort, fleet: LocalFleet
) -> None:
    leader = busy.link.leader
    assert leader is not None
    fleet.beat("here/gpu-2")
    await busy.stage.until(
        leader, lambda: any(view.active.steps for view in leader.workers_view() if view.active)
    )
    since_ms = int(busy.clock.now().timestamp() * 1000) - 60_000
    leaving = Leaving(since_ms=since_ms, because=LeavesBecause.MACHINE_ENDS)
    leader._loop.desk.workers.leaves("here/gpu-2", leaving)
    await busy.log_in()
    (line,) = (line for line in part(await busy.look(), "workers").split("\n") if "here/gpu-2" in line)
    assert "leaving Its machine is about to end. 63 s" in line
    assert "step 0 of" in line


async def test_whoever_waits_is_shown_with_the_reason_that_its_owner_is_told(busy: OpsPort) -> None:
    await busy.log_in()
    text = part(await busy.look(), "waits")
    async with busy.stage.pool.reading() as connection:
        waiting = await overview.waiting(connection, 10)
    assert waiting.accounts
    for account in waiting.accounts:
        line = next(line for line in text.split("\n") if account.oldest_job_id[:8] in line)
        leader = busy.link.leader
        assert leader is not None
        status = leader.queue_statuses([account.oldest_job_id])[account.oldest_job_id]
        assert line.split()[:3] == [account.account_id, account.tier, str(account.jobs)]
        assert status.sentence in line


async def test_of_many_who_wait_those_who_wait_longest_are_shown_and_the_rest_counted(port: OpsPort) -> None:
    for name in ("ada", "ben", "cyd"):
        await port.stage.open_account(name)
        await port.stage.submit(name)
    async with port.stage.pool.reading() as connection:
        waiting = await overview.waiting(connection, 2)
    assert [account.account_id for account in waiting.accounts] == ["ada", "ben"]
    assert waiting.left_out == 1


async def test_decisions_are_shown_with_their_reasons_newest_first(busy: OpsPort, fleet: LocalFleet) -> None:
    stage = busy.stage
    leader = busy.link.leader
    assert leader is not None
    worker_id = next(iter(fleet.busy))
    lost = fleet.busy[worker_id].job_id
    fleet.kill(worker_id)

    async def written() -> bool:
        async with stage.pool.reading() as connection:
            found = await overview.decisions(connection, 50)
        kinds = [one.what for one in found]
        return overview.Decided.LOST in kinds and kinds.count(overview.Decided.STARTED) >= 5

    await stage.until(leader, written)
    await busy.log_in()
    text = part(await busy.look(), "decisions")
    started = [line for line in text.split("\n") if " started " in line]
    (gone,) = (line for line in text.split("\n") if " lost " in line and lost[:8] in line)
    assert "Its worker was lost. It waits again at its old place, and nothing is charged." in gone
    assert text.index(started[0]) < text.index(gone) < text.index(started[-1])
    async with stage.pool.reading() as connection:
        reasons = await connection.fetch("SELECT decision ->> 'reason' AS reason FROM scheduler.attempt")
    for line in started:
        assert any(row["reason"] in line for row in reasons)


async def test_why_a_job_is_where_it_is_has_a_page(busy: OpsPort, fleet: LocalFleet) -> None:
    await busy.log_in()
    leader = busy.link.leader
    assert leader is not None
    job_id = next(iter(fleet.busy.values())).job_id
    text = html.unescape(await busy.look(f"/why?job={job_id}"))
    explained = leader.explain(job_id)
    assert explained is not None
    assert "It runs, and will probably end" in text
    (attempt,) = await busy.stage.attempts(job_id)
    assert attempt["worker_id"] in text
    assert (await busy.get(f"/why?job={uuid.uuid4()}")).status == 404
    assert (await busy.get("/why?job=%00<script>")).status == 404


async def test_prompts_are_nowhere(busy: OpsPort, fleet: LocalFleet) -> None:
    await busy.stage.connection.execute("UPDATE scheduler.job SET prompt = 'a-secret-wish'")
    await busy.log_in()
    job_id = next(iter(fleet.busy.values())).job_id
    for path in ("/", "/refresh", f"/why?job={job_id}"):
        assert "a-secret-wish" not in await busy.look(path)


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "\"onfocus='x'", "a</td></table>&lt;"])
async def test_a_hostile_account_name_is_only_text(port: OpsPort, fleet: LocalFleet, name: str) -> None:
    await port.stage.open_account(name)
    job_id = await port.stage.submit(name)
    await port.log_in()
    for path in ("/", f"/why?job={job_id}"):
        text = await port.look(path)
        assert name not in text
        assert str(html.escape(name)).replace("&#x27;", "&#39;").replace("&quot;", "&#34;") in text


async def test_without_a_scheduler_the_page_says_so_and_shows_the_rest(port: OpsPort) -> None:
    await port.stage.open_account("ada")
    await port.stage.submit("ada")
    await port.log_in()
    text = await port.look()
    assert "The scheduler does not answer." in text
    assert "Not known while the scheduler does not answer." in part(text, "workers")
    assert "ada relax 1" in part(text, "waits").replace("  ", " ")
    assert "The scheduler has not said." in part(text, "waits")


async def test_a_scheduler_that_comes_back_is_seen_within_seconds(port: OpsPort, fleet: LocalFleet) -> None:
    await port.log_in()
    assert "The scheduler does not answer." in await port.look()
    async with port.stage.leading(fleet):
        assert "The scheduler does not answer." not in await port.look()


async def test_without_a_database_nobody_is_let_in_and_the_page_says_why(
    port: OpsPort, postgresql: str
) -> None:
    await port.log_in()
    await port.look()
    name = await port.stage.connection.fetchval("SELECT current_database()")
    server = await asyncpg.connect(postgresql)
    await server.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
    await server.execute(
        """SELECT pg_terminate_backend(pid) FROM pg_stat_activity
           WHERE datname = $1 AND application_name = 'darkroom frontdoor'""",
        name,
    )
    port.clock.pass_s(3)
    shown, metrics = await port.get("/"), await port.get("/metrics")
    await server.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    await server.close()
    assert shown.status == 503
    assert "The database does not answer" in shown.text
    assert metrics.status == 200
    assert "Nobody waits." in await port.look()


async def test_however_many_look_the_scheduler_is_asked_once_in_two_seconds(busy: OpsPort) -> None:
    await busy.log_in()
    await busy.look()
    before = busy.link.asked
    for _ in range(5):
        await asyncio.gather(busy.get("/"), busy.get("/refresh"))
    assert busy.link.asked == before
    busy.clock.pass_s(2)
    await asyncio.gather(busy.get("/"), busy.get("/refresh"))
    assert busy.link.asked == before + 1


async def test_the_refresh_brings_what_the_page_was_made_of(busy: OpsPort) -> None:
    await busy.log_in()
    page, refresh = await busy.look(), await busy.look("/refresh")
    names = re.findall(r'<div id="(\w+)" hx-swap-oob="innerHTML">', refresh)
    assert names == ["summary", "queues", "gpu_hour", "gpu_minutes", "workers", "waits", "decisions"]
    for name in names:
        assert re.search(f'<div id="{name}"[ >]', page)


async def test_gpu_time_is_shown_by_use_with_the_numbers_of_the_chart(port: OpsPort) -> None:
    now_s = port.clock.now().timestamp()
    for ago in range(600, -1, -15):
        done = 600 - ago
        port.history.read(a_page_of_counters(fast=done * 1.0, relax=done * 2.0, idle=done * 1.0), now_s - ago)
    await port.log_in()
    text = await port.look()
    hour = part(text, "gpu_hour")
    assert "relax 20 min 50.0 %" in re.sub(r" +", " ", hour)
    assert "fast 10 min 25.0 %" in re.sub(r" +", " ", hour)
    assert " 1.00 2.00 0.00 0.00 1.00 " in re.sub(r" +", " ", part(text, "gpu_minutes"))
