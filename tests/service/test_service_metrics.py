"""What a Prometheus gets of a running service, over a real Ray: both pages, well formed and true."""

from __future__ import annotations

import asyncio
import subprocess
import urllib.request
import uuid
from collections.abc import Iterator

import asyncpg
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families

from scheduler.client.aio import DarkroomClient
from scheduler.metrics import Kind, Process, catalogue
from scheduler.v1 import job_pb2
from tests.folders import data_folder
from tests.ops.shipped import tool
from tests.service.people import People, result_of
from tests.service.process import ServiceProcess, service

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180)]

CANARY = "canary"
PAGES = {Process.FRONT_DOOR: "/metrics", Process.SCHEDULER: "/metrics/scheduler"}
OPENMETRICS = "application/openmetrics-text;version=1.0.0"


@pytest.fixture(scope="module")
def scraped() -> Iterator[ServiceProcess]:
    """A service with a canary, whose account is still to be opened."""
    with data_folder() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("DARKROOM_CANARY__ACCOUNT", CANARY)
        patch.setenv("DARKROOM_CANARY__EVERY_S", "10")
        patch.setenv("DARKROOM_WORKER__HEARTBEAT_MS", "200")
        with service(folder, gpus=2, timed_step_ms=5) as running:
            yield running


async def scrape(running: ServiceProcess, path: str, accept: str = "") -> str:
    request = urllib.request.Request(f"http://{running.ops}{path}", headers={"Accept": accept})

    def read() -> str:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return str(answer.read().decode())

    return await asyncio.to_thread(read)


def total(text: str, name: str, **labels: str) -> float:
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


async def test_the_canary_proves_each_tier_and_pays_for_itself(scraped: ServiceProcess) -> None:
    async with DarkroomClient(scraped.address, scraped.admin_key) as admin:
        await admin.create_account(plan="plans/standard", account_id=CANARY, reason="to prove the service")
    name = "darkroom_canary_jobs_total"
    async with asyncio.timeout(60):
        while True:
            text = await scrape(scraped, "/metrics")
            if all(total(text, name, tier=tier, outcome="succeeded") >= 1 for tier in ("fast", "relax")):
                break
            await asyncio.sleep(0.5)
    for tier in ("fast", "relax"):
        assert total(text, "darkroom_canary_last_success_timestamp_seconds", tier=tier) > 1_700_000_000
        assert total(text, name, tier=tier, outcome="late") == 0
    connection = await asyncpg.connect(scraped.dsn)
    try:
        billed_ms = await connection.fetchval(
            "SELECT sum(billed_ms) FROM billing.settlement WHERE account_id = $1", CANARY
        )
    finally:
        await connection.close()
    assert billed_ms > 0


@pytest.mark.parametrize("process", Process)
async def test_a_page_has_the_families_of_its_process_in_both_formats(
    scraped: ServiceProcess, process: Process
) -> None:
    declared = {
        family.name.removesuffix("_total") if family.kind is Kind.COUNTER else family.name
        for family in catalogue()
        if process in family.processes
    }
    plain = await scrape(scraped, PAGES[process])
    assert {family.name for family in text_string_to_metric_families(plain)} == declared
    rich = await scrape(scraped, PAGES[process], OPENMETRICS)
    assert {family.name for family in openmetrics_families(rich)} == declared


@pytest.mark.parametrize("process", Process)
async def test_promtool_finds_nothing_in_a_live_scrape(scraped: ServiceProcess, process: Process) -> None:
    promtool = tool("promtool")
    text = await scrape(scraped, PAGES[process])
    checked = await asyncio.to_thread(
        subprocess.run,
        [promtool, "check", "metrics"],
        input=text,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


async def test_what_happened_is_on_the_pages(scraped: ServiceProcess) -> None:
    people = People(scraped.address, scraped.admin_key)
    before = await scrape(scraped, "/metrics")
    async with await people.account("ada") as ada:
        for tier in (job_pb2.TIER_FAST, job_pb2.TIER_RELAX):
            await result_of(await ada.imagine("a lighthouse", tier=tier))
        request = job_pb2.CreateJobRequest(
            request_id=str(uuid.uuid4()), imagine=job_pb2.Imagine(prompt="a lighthouse")
        )
        first, second = [await ada._call(ada._jobs.CreateJob, request) for _ in range(2)]
        assert first.name == second.name
        await result_of(await ada.handle(first.name))
    front_door, scheduler = await scrape(scraped, "/metrics"), await scrape(scraped, "/metrics/scheduler")

    def added(name: str, **labels: str) -> float:
        return total(front_door, name, **labels) - total(before, name, **labels)

    assert added("darkroom_billing_replays_total", operation="CreateJob") == 1
    for query in ("find_keys", "claim_request", "insert_job", "read_job"):
        assert added("darkroom_db_query_seconds_count", query=query) > 0, query
    assert added("darkroom_event_loop_lag_seconds_count") > 0
    for text in (front_door, scheduler):
        assert total(text, "darkroom_build_info") == 1
        assert total(text, "darkroom_config_info") == 1
        assert total(text, "process_resident_memory_bytes") > 1_000_000
        assert total(text, "python_gc_collections_total") > 0
        assert total(text, "darkroom_log_messages_total", level="info") > 0
    assert total(scheduler, "darkroom_gpu_workers") == 2
    assert total(scheduler, "darkroom_job_stage_seconds_count", stage="place") >= 2
    assert total(scheduler, "darkroom_job_stage_seconds_count", stage="deliver") >= 1
    assert total(scheduler, "darkroom_denoise_step_seconds_count") >= 2
    debits = total(scheduler, "darkroom_billing_gpu_seconds_total", kind="debit")
    assert debits == pytest.approx(total(scheduler, "darkroom_billing_measured_gpu_seconds_total"))
    assert debits > 0
    async with asyncio.timeout(60):
        while total(scheduler, "darkroom_billing_reconcile_runs_total", result="clean") < 1:
            scheduler = await scrape(scraped, "/metrics/scheduler")
    assert total(scheduler, "darkroom_billing_drift_gpu_seconds") == 0
