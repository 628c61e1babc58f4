"""The Ray actor around a worker: one per GPU.

Whoever starts workers creates it with options of its own (name, `lifetime="detached"`, `num_gpus=1`) and
starts the next when one has died. Ray is not to (`max_restarts=0`): a death is then a fact that is told once.
It takes no CPU slot, since its work is the GPU's, and answers while it draws. Nothing is decided here: every
method is the worker's of the same name, and what those raise reaches the caller as the same class.

The engine and the worker are imported inside the actor's process, so that those who only call it need neither
torch nor an encoder of videos.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator

import ray

from gpu_worker.contract import Heartbeat, Progress, RenderRequest, WorkerReport
from gpu_worker.models import read_models
from gpu_worker.outputs import Artifacts
from gpu_worker.run import Engine
from gpu_worker.settings import WorkerSettings
from gpu_worker.timed_engine import TimedEngine
from gpu_worker.tracing import tracer


def engine_of(settings: WorkerSettings) -> Engine:
    """Return the engine that the settings name.

    Raises ModelsFileWrong, and RuntimeError where a GPU is wanted and there is none.
    """
    models = read_models(settings.models_path)
    if settings.engine == "timed":
        return TimedEngine(models, settings)
    from gpu_worker.engine.diffusers_engine import DiffusersEngine

    return DiffusersEngine(models, settings)


@ray.remote(num_cpus=0)
class GpuWorker:
    """A worker, reachable. See `gpu_worker.worker.Worker` for what each method promises."""

    def __init__(self, settings: WorkerSettings) -> None:
        from gpu_worker.worker import Worker

        self._worker = Worker(
            settings, engine_of(settings), Artifacts(settings.artifacts_url), tracer(settings)
        )

    async def render(self, request: RenderRequest) -> None:
        self._worker.render(request)

    async def stop(self, epoch: int, attempt_id: str, token: str) -> None:
        self._worker.stop(epoch, attempt_id, token)

    async def hand_over(self, epoch: int, attempt_id: str) -> None:
        self._worker.hand_over(epoch, attempt_id)

    async def resume(self, epoch: int, attempt_id: str) -> None:
        self._worker.resume(epoch, attempt_id)

    async def heartbeat(self, epoch: int, wait_ms: int) -> Heartbeat:
        return await self._worker.heartbeat(epoch, wait_ms)

    async def report(self, epoch: int) -> WorkerReport:
        return self._worker.report(epoch)

    async def acknowledge(self, epoch: int, attempt_id: str) -> None:
        self._worker.acknowledge(epoch, attempt_id)

    async def forget(self, epoch: int, attempt_id: str, kept: bool = False) -> None:
        await self._worker.forget(epoch, attempt_id, kept)

    async def watch(self, attempt_id: str, previews: bool) -> AsyncIterator[Progress]:
        async for progress in self._worker.watch(attempt_id, previews):
            yield progress

    async def pid(self) -> int:
        """Return the process id, for tests that kill it."""
        return os.getpid()
