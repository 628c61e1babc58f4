"""A service as it is started has the page on its ops port, for whoever has a key that may see it."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest

from tests.service.people import People, result_of
from tests.service.process import ServiceProcess

pytestmark = pytest.mark.ray

_PATIENCE_S = 60


async def test_the_page_of_a_running_service_shows_its_workers_and_what_it_decided(
    running: ServiceProcess, people: People
) -> None:
    client = await people.account("nina")
    async with client:
        job = await result_of(await client.imagine("a lighthouse"))
    jar = aiohttp.CookieJar(unsafe=True)  # the host is an address
    async with aiohttp.ClientSession(f"http://{running.ops}", cookie_jar=jar) as session:
        async with session.get("/") as answer:
            assert answer.url.path == "/login"
        async with session.post("/login", data={"key": running.admin_key}) as answer:
            assert (answer.status, answer.url.path) == (200, "/")
        async with session.get(f"/why?job={job.uid}") as answer:
            why = await answer.text()
        async with asyncio.timeout(_PATIENCE_S):
            page = ""
            while job.uid[:8] not in page:
                async with session.get("/refresh") as answer:
                    page = await answer.text()
    assert "The scheduler does not answer" not in page
    assert all(f"gpu-{number}" in page for number in range(3))
    assert job.name.split("/")[1] in page
    assert "succeeded" in why
    assert "a lighthouse" not in page + why
