"""The ops port says what is true, also when half of the service is away."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from scheduler.metrics import FrontDoorMetrics, Page, SchedulerMetrics
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


async def scheduler_answers(accept: str) -> Page:
    return SchedulerMetrics(("basic",), ("stand-in",), now_ms=0).page(accept)


async def scheduler_away(accept: str) -> Page:
    raise RuntimeError("the actor died")


async def ask(
    path: str,
    *,
    database_answers: Callable[[], Awaitable[bool]] = yes,
    scheduler_leads: Callable[[], Awaitable[bool]] = yes,
    scheduler_page: Callable[[str], Awaitable[Page]] = scheduler_answers,
    accept: str = "",
) -> tuple[int, str, str]:
    """Return status, body and content type of one answer of a server of its own."""
    checks = Checks(database_answers=database_answers, scheduler_leads=scheduler_leads)
    metrics = FrontDoorMetrics(("basic",))
    running = ops_server(_ANY_PORT, checks=checks, metrics=metrics, scheduler_page=scheduler_page)
    async with (
        running as server,
        aiohttp.ClientSession(f"http://127.0.0.1:{server.port}") as session,
        session.get(path, headers={"Accept": accept}) as answer,
    ):
        return answer.status, await answer.text(), answer.headers["Content-Type"]


def shown(text: str) -> set[str]:
    return {family.name for family in text_string_to_metric_families(text)}


async def test_each_process_has_a_page_of_its_own() -> None:
    status, front_door, content_type = await ask("/metrics")
    assert (status, content_type) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert {"darkroom_submissions", "process_cpu_seconds"} <= shown(front_door)
    assert "darkroom_gpu_time_seconds" not in shown(front_door)
    status, scheduler, content_type = await ask("/metrics/scheduler")
    assert (status, content_type) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert {"darkroom_gpu_time_seconds", "process_cpu_seconds"} <= shown(scheduler)
    assert "darkroom_submissions" not in shown(scheduler)


async def test_without_a_scheduler_its_page_is_down_and_the_front_doors_is_up() -> None:
    status, _, _ = await ask("/metrics/scheduler", scheduler_page=scheduler_away)
    assert status == 503
    status, text, _ = await ask("/metrics", scheduler_page=scheduler_away)
    assert status == 200
    assert "grpc_server_started_total" in text


@pytest.mark.parametrize("path", ["/metrics", "/metrics/scheduler"])
async def test_a_scraper_that_asks_for_openmetrics_gets_it(path: str) -> None:
    _, text, content_type = await ask(path, accept="application/openmetrics-text;version=1.0.0")
    assert content_type.startswith("application/openmetrics-text; version=1.0.0")
    assert text.endswith("# EOF\n")


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
