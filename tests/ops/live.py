"""A service that is scraped by a real Prometheus while people use it and things go wrong."""

from __future__ import annotations

import asyncio
import json
import math
import re
import signal
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import asyncpg

from deploy.prometheus import slo
from scheduler.client.aio import DarkroomClient, JobHandle
from scheduler.client.errors import FastTimeExhausted, InvalidParameter, QueueFull
from scheduler.v1 import job_pb2
from tests.ops.shipped import ROOT
from tests.service.people import People, result_of, until_step
from tests.service.process import ServiceProcess

FAST, RELAX = job_pb2.TIER_FAST, job_pb2.TIER_RELAX
WHY = "a test"

_OF_TARGETS = 'alertname=~"TargetMissing|SchedulerLeaderCountWrong"'

_SCRAPE_S = 1
_EVALUATE_S = 2
_START_S = 30.0
_ANSWER_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Prometheus:
    """A running one, and since when it has looked at everything."""

    url: str
    began_s: float

    def series(self, expr: str) -> list[tuple[dict[str, str], list[float]]]:
        """Return what a query answers for every second since the start: labels, and the finite values."""
        query = {"query": expr, "start": self.began_s, "end": time.time(), "step": 1}
        answer = self._ask("query_range", query)
        return [
            (one["metric"], [float(value) for _, value in one["values"] if math.isfinite(float(value))])
            for one in answer["result"]
        ]

    def now(self, expr: str) -> list[dict[str, str]]:
        """Return the labels of what a query answers now."""
        return [one["metric"] for one in self._ask("query", {"query": expr})["result"]]

    def until(self, expr: str) -> None:
        """Return once a query answers something."""
        until_s = time.time() + _ANSWER_S
        while not self.now(expr):
            assert time.time() < until_s, f"{expr}: never, with {self.now('up')}"
            time.sleep(0.2)

    def at_first(self, expr: str) -> list[dict[str, str]]:
        """Return the labels of what a query answered when all was heard of and nothing had happened."""
        query = {"query": expr, "time": self.began_s}
        return [one["metric"] for one in self._ask("query", query)["result"]]

    def _ask(self, how: str, query: dict[str, Any]) -> Any:
        data = urllib.parse.urlencode(query).encode()
        with urllib.request.urlopen(f"{self.url}/api/v1/{how}", data, timeout=_ANSWER_S) as answer:
            return json.load(answer)["data"]


@contextmanager
def prometheus(program: str, running: ServiceProcess, folder: Path) -> Iterator[Prometheus]:
    """Scrape a service, by the rules that are shipped, as often as a test has to."""
    (folder / "alert_rules.yml").write_text((ROOT / "deploy/prometheus/alert_rules.yml").read_text())
    (folder / "slo_rules.yml").write_text(slo.as_yaml(every_s=_EVALUATE_S))
    scraped = [
        {"targets": [running.ops], "labels": {"cluster": "test"}},
        {
            "targets": [running.ops],
            "labels": {
                "cluster": "test",
                "instance": "scheduler",
                "__metrics_path__": "/metrics/scheduler",
            },
        },
    ]
    ray = [{"targets": [_rays_metrics(running)], "labels": {"cluster": "test"}}]
    settings = {
        "global": {"scrape_interval": f"{_SCRAPE_S}s", "evaluation_interval": f"{_EVALUATE_S}s"},
        "rule_files": ["*rules.yml"],
        "scrape_configs": [
            {"job_name": "darkroom", "static_configs": scraped},
            # Ray's agent takes longer, and gathers anew every ten seconds.
            {"job_name": "ray", "static_configs": ray, "scrape_interval": "5s"},
        ],
    }
    (folder / "prometheus.yml").write_text(json.dumps(settings))
    process = subprocess.Popen(
        [
            *(program, f"--config.file={folder / 'prometheus.yml'}"),
            *(f"--storage.tsdb.path={folder / 'data'}", "--web.listen-address=127.0.0.1:0"),
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    said: list[str] = []
    heard = threading.Condition()

    def read() -> None:
        assert process.stderr is not None
        with process.stderr as lines:
            for line in lines:
                with heard:
                    said.append(line)
                    heard.notify_all()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    listens = re.compile(r'msg="Listening on" address=(\S+)')
    try:
        with heard:
            assert heard.wait_for(lambda: any("ready to receive" in line for line in said), _START_S), said
            (address,) = [found[1] for line in said if (found := listens.search(line))]
        looking = Prometheus(url=f"http://{address}", began_s=time.time())
        # It looks for targets for some seconds first, and alerts pend until it has heard of all of them.
        heard_of_all = f"count(up == 1) == {len(scraped) + len(ray)}"
        looking.until(f"{heard_of_all} unless on () ALERTS{{{_OF_TARGETS}}}")
        yield replace(looking, began_s=time.time())
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(_START_S)
        reader.join(_START_S)


def _rays_metrics(running: ServiceProcess) -> str:
    """Return the address of the metrics of the one node of a local Ray: any port, which it writes down."""
    for process in running.processes():
        for argument in process.cmdline():
            if argument.startswith("--session-dir="):
                (file,) = Path(argument.partition("=")[2]).glob("metrics_export_port_*")
                return f"127.0.0.1:{int(file.read_text())}"
    raise AssertionError("there is no Ray")


async def things_happen(running: ServiceProcess, looking: Prometheus) -> None:
    """Use the service in all ways that something is counted of, and break what can be broken."""
    people = People(running.address, running.admin_key)
    async with (
        DarkroomClient(running.address, running.admin_key) as admin,
        await people.account("ann") as ann,
        await people.account("bob") as bob,
        await people.account("cleo") as cleo,
        await people.account("dan") as dan,
    ):
        await result_of(await ann.imagine("a lighthouse", tier=FAST))
        await _a_balance_is_off(running, looking)
        await _refused(admin, people, dan)
        await _crowded(running, looking, admin, ann, bob, cleo)
        worker = (await admin.workers())[0].name
        await admin.drain_worker(worker, reason=WHY, within=timedelta(0))
        async with _cancelled(await bob.imagine("a lighthouse", tier=FAST)) as drawn:
            await until_step(drawn, 2)
        await admin.resume_worker(worker, reason=WHY)


async def _refused(admin: DarkroomClient, people: People, dan: DarkroomClient) -> None:
    """Ask for what there is not: other words, an eleventh job, and fast time that is used up."""
    await _refusal(InvalidParameter, dan.imagine("a lighthouse --nonsense", tier=FAST))
    await admin.pause_tier(RELAX, reason=WHY)
    handles = [await dan.imagine("a lighthouse", tier=RELAX) for _ in range(10)]
    await _refusal(QueueFull, dan.imagine("a lighthouse", tier=RELAX))
    for handle in handles[1:]:
        await handle.cancel()
    await admin.resume_tier(RELAX, reason=WHY)
    await result_of(handles[0])
    async with await people.account("eve", plan="basic") as eve:
        balance = await eve.balance()
        await admin.adjust_balance(balance.account, amount_ms=-balance.available_ms, reason=WHY)
        for _ in range(25):
            await _refusal(FastTimeExhausted, eve.imagine("a lighthouse", tier=FAST))


async def _crowded(
    running: ServiceProcess,
    looking: Prometheus,
    admin: DarkroomClient,
    ann: DarkroomClient,
    bob: DarkroomClient,
    cleo: DarkroomClient,
) -> None:
    """Fill the GPUs with relax runs, park some for fast jobs, and lose a worker."""
    relax = [await one.imagine("a lighthouse", tier=RELAX) for _ in range(4) for one in (ann, bob, cleo)]
    # Forecasts are made by a process that starts with the first queue: who comes after that is told when to
    # expect a start.
    while not await _told(relax[-1]):
        relax += [await one.imagine("a lighthouse", tier=RELAX) for one in (ann, bob, cleo)]
    relax += [await one.imagine("a lighthouse", tier=RELAX) for one in (ann, bob, cleo)]
    fast = [await one.imagine("a lighthouse", tier=FAST) for one in (ann, bob, cleo)]
    await asyncio.gather(*(until_step(handle, 2) for handle in fast))
    await asyncio.to_thread(_a_worker_is_away, running, looking)
    for handle in [*fast, *relax]:
        await result_of(handle)


def _a_worker_is_away(running: ServiceProcess, looking: Prometheus) -> None:
    """Stop a worker until somebody is told that it is missing, then kill it: another takes its place."""
    worker = next(one for one in running.processes() if "".join(one.cmdline()).startswith("ray::GpuWorker"))
    worker.suspend()
    try:
        looking.until('ALERTS{alertname="GpuWorkersMissing"}')
    finally:
        worker.kill()


async def _told(handle: JobHandle) -> bool:
    """Return whether a job is told when it will start, before it does."""
    async for update in handle.watch():
        if update.queue_status.HasField("start_p50_ms"):
            return True
        if update.event.state == job_pb2.JOB_STATE_RUNNING:
            return False
    return False


async def _a_balance_is_off(running: ServiceProcess, looking: Prometheus) -> None:
    """Take a millisecond from a balance by hand, until somebody is told, and give it back."""
    off = """UPDATE billing.grant_lot SET used_ms = used_ms + $1
              WHERE lot_id = (SELECT min(lot_id) FROM billing.grant_lot WHERE account_id LIKE 'cleo-%')"""
    connection = await asyncpg.connect(running.dsn)
    try:
        await connection.execute(off, 1)
        try:
            await asyncio.to_thread(looking.until, 'ALERTS{alertname="LedgerDrift"}')
        finally:
            await connection.execute(off, -1)
    finally:
        await connection.close()


@asynccontextmanager
async def _cancelled(handle: JobHandle) -> AsyncIterator[JobHandle]:
    yield handle
    await handle.cancel()


async def _refusal(kind: type[Exception], call: Any) -> None:
    try:
        await call
    except kind:
        return
    raise AssertionError(f"it was not refused: {kind.__name__}")
