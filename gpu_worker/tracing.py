"""What a worker did for an attempt, as spans under the attempt's own: one after the other, without gaps.

A piece is told of once it has ended, so that of a worker that dies all is known but the last one. Which
attempts are traced, the scheduler says. Here is OpenTelemetry's API, which does nothing by itself; what sends
spans somewhere is in `trace_export`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import StrEnum

from opentelemetry.context import Context
from opentelemetry.trace import NoOpTracer, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from gpu_worker.contract import RenderRequest, StageTimes
from gpu_worker.run import Stage, StageClock
from gpu_worker.settings import WorkerSettings

# What took less did not happen, as in the metrics: a model that was there, a GPU that was free.
_LEAST_NS = 1_000_000


class TracingNotInstalled(RuntimeError):
    """Traces are to be sent somewhere, and what sends them is not installed."""

    def __init__(self) -> None:
        super().__init__(
            "tracing.endpoint is set, but what sends traces is not installed on this worker's machine: "
            "pip install -c constraints.txt '.[tracing]' there, or leave tracing.endpoint out"
        )


def tracer(settings: WorkerSettings) -> Tracer:
    """Return what begins the spans of this process; they go nowhere if no collector is set.

    For the process's composition root, once. Raises TracingNotInstalled.
    """
    if settings.traces_endpoint is None:
        return NoOpTracer()
    try:
        from gpu_worker.trace_export import spans_to
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] != "opentelemetry":
            raise
        raise TracingNotInstalled from missing
    provider = spans_to(settings.traces_endpoint, worker_id=settings.worker_id, release=settings.release)
    return provider.get_tracer("darkroom", settings.release)


class Piece(StrEnum):
    """What a run does, beside the stages of its engine."""

    FETCH = "fetch"
    """Read what it starts from."""
    WAIT = "wait"
    """Wait for the GPU, before it begins."""
    LOAD = "load"
    PARKED = "parked"
    DELIVER = "deliver"


class RunTrace:
    """The pieces of one run, which passes from each to the next. Used by the run's thread alone."""

    def __init__(
        self, tracer: Tracer, request: RenderRequest, now_ns: Callable[[], int] = time.time_ns
    ) -> None:
        self._tracer = tracer
        self._now_ns = now_ns
        self._under: Context | None = None
        self._attributes = {"darkroom.job": request.job_id, "darkroom.attempt": request.attempt_id}
        self._piece: Piece | Stage | None = None
        self._since_ns = 0
        if request.traceparent is not None:
            carrier = {"traceparent": request.traceparent}
            self._under = TraceContextTextMapPropagator().extract(carrier, Context())

    @property
    def is_told(self) -> bool:
        """Whether its attempt is traced."""
        return self._under is not None

    def turn_to(self, piece: Piece | Stage | None) -> None:
        """End the piece before and begin this one; None: it is the end."""
        if self._under is None or piece is self._piece:
            return
        now_ns = self._now_ns()
        if self._piece is not None and now_ns - self._since_ns >= _LEAST_NS:
            self._tracer.start_span(
                self._piece.value, self._under, attributes=self._attributes, start_time=self._since_ns
            ).end(now_ns)
        self._piece, self._since_ns = piece, now_ns


class TracedClock:
    """A run's stage clock that tells its trace of the stages."""

    def __init__(self, clock: StageClock, trace: RunTrace) -> None:
        self._clock = clock
        self._trace = trace
        self._stage: Stage | None = None

    def enter(self, stage: Stage) -> None:
        self._stage = stage
        self._trace.turn_to(stage)
        self._clock.enter(stage)

    def pause(self) -> None:
        self._clock.pause()

    def resume(self) -> None:
        self._clock.resume()
        self._trace.turn_to(self._stage)

    def set_aside(self) -> None:
        self._clock.set_aside()

    def times(self) -> StageTimes:
        return self._clock.times()

    def redone_ms(self) -> int:
        return self._clock.redone_ms()
