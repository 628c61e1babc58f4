"""The ops port says what is true, also when half of the service is away."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from scheduler.metrics import FrontDoorMetrics, SchedulerMetrics
from scheduler.ops import Checks, ops_server
from scheduler.settings import Ops

_ANY_PORT = Ops(port=0)


async def yes() -> bool:
    return True


async def no() -> bool:
    return False


async def never() -> bool:
    await asyncio.Event().wait()
    raise AssertionError


async def refused() -> bool:
    raise ConnectionRefusedError("postgresql://darkroom:secret@db")


async def scheduler_text() -> str:
    return SchedulerMetrics.create(("basic",), ("stand-in",), now_ms=0).exposition()


async def scheduler_away() -> str:
    raise RuntimeError("the actor died")


async def ask(
    path: str,
    *,
    database_answers: Callable[[], Awaitable[bool]] = yes,
    scheduler_leads: Callable[[], Awaitable[bool]] = yes,
    scheduler_exposition: Callable[[], Awaitable[str]] = scheduler_text,
) -> tuple[int, str, str]:
    """Return status, body and content type of one answer of a server of its own."""
    checks = Checks(database_answers=database_answers, scheduler_leads=scheduler_leads)
    metrics = FrontDoorMetrics.create(("basic",))
    running = ops_server(_ANY_PORT, checks=checks, metrics=metrics, scheduler_exposition=scheduler_exposition)
    async with (
        running as server,
        aiohttp.ClientSession(f"http://127.0.0.1:{server.port}") as session,
        session.get(path) as answer,
    ):
        return answer.status, await answer.text(), answer.headers["Content-Type"]


async def test_one_page_has_the_families_of_both_processes() -> None:
    status, text, content_type = await ask("/metrics")
    assert (status, content_type) == (200, "text/plain; version=0.0.4; charset=utf-8")
    names = [family.name for family in text_string_to_metric_families(text)]
    assert len(names) == len(set(names))
    assert {"darkroom_submissions", "darkroom_gpu_time_seconds", "process_cpu_seconds"} <= set(names)
    assert "darkroom_scheduler_metrics_up 1.0" in text


async def test_without_a_scheduler_the_front_door_still_shows_its_own() -> None:
    status, text, _ = await ask("/metrics", scheduler_exposition=scheduler_away)
    assert status == 200
    assert "darkroom_scheduler_metrics_up 0.0" in text
    assert "grpc_server_started_total" in text
    assert "darkroom_gpu_time_seconds" not in text


async def test_a_process_that_lives_is_healthy_even_when_nothing_else_is() -> None:
    status, _, _ = await ask("/healthz", database_answers=refused, scheduler_leads=no)
    assert status == 200


async def test_ready_means_that_the_database_answers_and_a_scheduler_leads() -> None:
    status, body, _ = await ask("/readyz")
    assert (status, body) == (200, '{"ready": true, "missing": []}')


async def test_not_ready_says_everything_that_is_missing() -> None:
    status, body, _ = await ask("/readyz", database_answers=refused, scheduler_leads=no)
    assert status == 503
    assert "the database does not answer (ConnectionRefusedError)" in body
    assert "no scheduler leads" in body


async def test_an_error_of_the_database_does_not_show_its_password() -> None:
    _, body, _ = await ask("/readyz", database_answers=refused)
    assert "secret" not in body


async def test_a_check_that_hangs_is_answered_before_the_probe_gives_up() -> None:
    status, body, _ = await asyncio.wait_for(ask("/readyz", scheduler_leads=never), timeout=5)
    assert status == 503
    assert "no scheduler leads in time" in body
