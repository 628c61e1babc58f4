"""How spans get to a collector, from either side of the wall; while it is away, nobody fails and waits."""

from __future__ import annotations

import logging
import queue
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import structlog
from opentelemetry.trace import Tracer, format_span_id
from structlog.typing import EventDict

from gpu_worker import trace_export as of_worker
from gpu_worker import tracing as worker_tracing
from gpu_worker.settings import WorkerSettings
from scheduler import trace_export, tracing
from scheduler.settings import Tracing
from scheduler.trace_export import Collector
from tests.service.collector import collecting
from tests.spans import RECORDED, TRACE_ID

PATIENCE_S = 20.0


@dataclass(frozen=True)
class Side:
    """One of the two modules that send."""

    spans_to: Callable[[str], tuple[Tracer, Callable[[], None]]]
    """Returns what begins spans that go to this address, and what sends the rest and ends."""
    lines: queue.SimpleQueue[str]
    """What it logged."""

    def says(self) -> str:
        """Return its next line."""
        return self.lines.get(timeout=PATIENCE_S)


@pytest.fixture
def scheduler_side() -> Iterator[Side]:
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def take(_: Any, __: str, event: EventDict) -> EventDict:
        lines.put(event["event"])
        raise structlog.DropEvent

    def spans_to(url: str) -> tuple[Tracer, Callable[[], None]]:
        collector = Collector(url, sampled_permille=0, service="darkroom-frontdoor", release="1.0.0")
        return collector.tracer, collector.close

    before = structlog.get_config()
    structlog.configure(processors=[take])
    yield Side(spans_to=spans_to, lines=lines)
    structlog.configure(**before)


@pytest.fixture
def worker_side() -> Iterator[Side]:
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    handler = logging.Handler()
    handler.emit = lambda record: lines.put(record.getMessage().partition(" at=")[0])  # type: ignore[method-assign]

    def spans_to(url: str) -> tuple[Tracer, Callable[[], None]]:
        provider = of_worker.spans_to(url, worker_id="node-a/gpu-0", release="1.0.0")
        return provider.get_tracer("test"), provider.shutdown

    logger = logging.getLogger(of_worker.__name__)
    logger.addHandler(handler)
    yield Side(spans_to=spans_to, lines=lines)
    logger.removeHandler(handler)


@pytest.fixture(params=["scheduler", "worker"])
def side(request: pytest.FixtureRequest) -> Side:
    side: Side = request.getfixturevalue(f"{request.param}_side")
    return side


def a_free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def a_span(tracer: Tracer) -> None:
    tracer.start_span("a piece", tracing.child_of(RECORDED)).end()


def test_an_outage_is_two_lines_and_nobody_waits_for_its_end(
    side: Side, capfd: pytest.CaptureFixture[str]
) -> None:
    port = a_free_port()
    tracer, close = side.spans_to(f"http://127.0.0.1:{port}")
    for _ in range(3_000):  # more than are kept
        a_span(tracer)
    assert side.says() == "traces do not arrive"
    with collecting(port) as collector:
        a_span(tracer)
        collector.until(TRACE_ID, bool)
        assert side.says() == "traces arrive again"
        close()
    assert side.lines.empty()
    assert "Failed to export" not in capfd.readouterr().err


def test_what_ends_is_sent_before_the_process_ends() -> None:
    with collecting() as collector:
        export = Collector(
            f"{collector.address}/", sampled_permille=1_000, service="darkroom-frontdoor", release="1.0.0"
        )
        attempt_id = str(uuid4())
        attempt = tracing.attempt_started(
            export.tracer, RECORDED, attempt_id=attempt_id, at_ms=1_000, attributes={}
        )
        tracing.ended(attempt, 2_500, {"darkroom.outcome": "succeeded"})
        own = export.tracer.start_span("a trace of its own")
        own.end()
        export.close()
        (told,) = collector.of(TRACE_ID)
        assert len(collector.of(tracing.trace_id_of(own) or "")) == 1
    assert (told.service, told.began_ns, told.ended_ns) == ("darkroom-frontdoor", 10**9, 2_500 * 10**6)
    assert told.span_id == attempt_id.replace("-", "")[16:], "whoever goes on with the attempt knows it"
    assert told.span_id != format_span_id(own.get_span_context().span_id)


def test_to_end_waits_for_no_collector_that_is_away(scheduler_side: Side) -> None:
    tracer, close = scheduler_side.spans_to(f"http://127.0.0.1:{a_free_port()}")
    for _ in range(2_000):
        a_span(tracer)
    assert scheduler_side.says() == "traces do not arrive"
    began_s = time.monotonic()
    close()
    assert time.monotonic() - began_s < 10, "four batches, of which each was tried for 5 s, were 20"
    assert scheduler_side.lines.empty()


def test_to_end_tries_a_collector_that_does_not_answer_no_more_than_twice(
    scheduler_side: Side, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace_export, "_TRY_S", 0.2)
    tries = 0
    with socket.create_server(("127.0.0.1", 0)) as silent:
        tracer, close = scheduler_side.spans_to(f"http://127.0.0.1:{silent.getsockname()[1]}")
        for _ in range(2_000):  # four batches
            a_span(tracer)
        close()
        silent.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                silent.accept()[0].close()
                tries += 1
    assert 1 <= tries <= 2


def test_none_of_its_own_traces_is_recorded_where_none_is_to_be() -> None:
    export = Collector("http://127.0.0.1:9", sampled_permille=0, service="a", release="1.0.0")
    span = export.tracer.start_span("a call")
    assert not span.is_recording()
    assert tracing.traceparent_of(span) is None
    export.close()


def test_without_an_address_nothing_is_sent(tmp_path: Path) -> None:
    nowhere = tracing.traces(Tracing(), service="a", release="1.0.0")
    nowhere.close()
    assert not nowhere.tracer.start_span("a call").is_recording()


def test_an_address_without_what_sends_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("scheduler.trace_export", "gpu_worker.trace_export"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(tracing.TracingNotInstalled, match=r"pip install .*\.\[tracing\]"):
        tracing.traces(Tracing(endpoint="http://collector:4318"), service="a", release="1.0.0")
    settings = WorkerSettings(
        worker_id="node-a/gpu-0",
        release="1.0.0",
        artifacts_url=str(tmp_path),
        cache_dir=tmp_path,
        traces_endpoint="http://collector:4318",
    )
    with pytest.raises(worker_tracing.TracingNotInstalled, match=r"pip install .*\.\[tracing\]"):
        worker_tracing.tracer(settings)


@pytest.mark.parametrize(
    "endpoint", ["collector:4318", "http://", "http://key:secret@collector:4318", "http://collector?key=1"]
)
def test_an_address_is_one_and_has_no_secret_in_it(endpoint: str) -> None:
    with pytest.raises(ValueError, match="endpoint"):
        Tracing(endpoint=endpoint)
