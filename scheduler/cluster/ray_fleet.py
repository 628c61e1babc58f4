"""The fleet over Ray: one detached actor for each GPU of the cluster, and one long poll open to each.

Workers outlive the scheduler that started them: they are detached and named by release and slot, and the next
scheduler finds them by name. They are not restarted by Ray but by this fleet: a death is then a fact that is
told once (ActorDiedError), not a silence that may or may not end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import ray
import structlog
from ray.exceptions import ActorDiedError, ActorUnavailableError, ActorUnschedulableError, RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gpu_worker.actor import GpuWorker
from gpu_worker.contract import AttemptResult, Heartbeat, RenderRequest, StaleEpoch, WorkerBusy, WorkerReport
from gpu_worker.settings import WorkerSettings
from scheduler.fleet import FleetFact, RenderRefused, WorkerFound, WorkerGone, WorkerHeard
from scheduler.settings import RELEASE

_log = structlog.get_logger()

_GpuWorkerActor: Any = GpuWorker  # Ray's decorator adds what no type says

_NODES_EVERY_S = 1.0
# Silence of this many heartbeat intervals is a loss.
_SILENT_INTERVALS = 3
# A worker imports torch before it can answer for the first time.
_FIRST_ANSWER_S = 120.0
_ASK_AGAIN_S = 0.2
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0


def actor_name(kind: str, slot: str = "") -> str:
    """Return the name of an actor of this release, so that old and new run side by side."""
    return f"{kind}-{RELEASE}" + (f"-{slot}" if slot else "")


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One GPU's place in the cluster."""

    worker_id: str
    node_id: str


def gpu_slots(nodes: list[dict[str, Any]]) -> list[Slot]:
    """Return a slot for each GPU of the living nodes (`ray.nodes()`): `<node name>/gpu-<i>`.

    Nodes that share a name, as several on one machine do, are told apart by the beginning of their ids.
    """
    alive = [node for node in nodes if node["Alive"]]
    names = [node["NodeName"] for node in alive]
    slots = []
    for node in alive:
        name = (
            node["NodeName"]
            if names.count(node["NodeName"]) == 1
            else f"{node['NodeName']}-{node['NodeID'][:8]}"
        )
        slots += [
            Slot(worker_id=f"{name}/gpu-{index}", node_id=node["NodeID"])
            for index in range(int(node["Resources"].get("GPU", 0)))
        ]
    return slots


class RayFleet:
    """Implements `scheduler.fleet.Fleet`."""

    def __init__(self, *, worker: WorkerSettings, namespace: str, heartbeat_ms: int) -> None:
        self._settings = worker
        self._namespace = namespace
        self._heartbeat_ms = heartbeat_ms
        self._epoch = 0
        self._tell: Callable[[FleetFact], None] = _nobody_listens
        self._actors: dict[str, Any] = {}
        self._listening: dict[str, asyncio.Task[None]] = {}
        self._answered: dict[str, asyncio.Event] = {}
        self._incarnations: dict[str, str] = {}
        self._calls: set[asyncio.Task[None]] = set()

    async def open(self, epoch: int, tell: Callable[[FleetFact], None]) -> None:
        """See Fleet.open."""
        self._epoch, self._tell = epoch, tell
        alive = await self._look_at_nodes()
        waiting = [self._answered[worker_id].wait() for worker_id in alive]
        # Who has not answered by then is lost; if it answers later it is found again.
        with suppress(TimeoutError):
            async with asyncio.timeout(self._silence_s):
                await asyncio.gather(*waiting)

    async def run(self) -> None:
        """See Fleet.run."""
        try:
            while True:
                await asyncio.sleep(_NODES_EVERY_S)
                await self._look_at_nodes()
                for task in [*self._listening.values(), *self._calls]:
                    if task.done():
                        task.result()
        finally:
            await self._close()

    def render(self, worker_id: str, request: RenderRequest) -> None:
        """See Fleet.render."""
        self._call(self._render(worker_id, request))

    def stop(self, worker_id: str, attempt_id: str, token: str) -> None:
        """See Fleet.stop."""
        self._call(self._ask(worker_id, "stop", self._epoch, attempt_id, token))

    def acknowledge(self, worker_id: str, result: AttemptResult) -> None:
        """See Fleet.acknowledge."""
        self._call(self._ask(worker_id, "acknowledge", self._epoch, result.attempt_id))

    def forget(self, worker_id: str, attempt_id: str) -> None:
        """See Fleet.forget."""
        self._call(self._ask(worker_id, "forget", self._epoch, attempt_id))

    @property
    def _silence_s(self) -> float:
        return _SILENT_INTERVALS * self._heartbeat_ms / 1000

    async def _look_at_nodes(self) -> list[str]:
        """Listen to every slot of the living nodes; returns the workers that were alive already."""
        slots = {slot.worker_id: slot for slot in gpu_slots(await asyncio.to_thread(ray.nodes))}
        for worker_id in self._listening.keys() - slots.keys():
            _log.info("slot gone with its node", worker=worker_id)
            self._listening.pop(worker_id).cancel()
            del self._answered[worker_id]
        found = []
        for worker_id, slot in slots.items():
            if worker_id not in self._listening:
                if await asyncio.to_thread(self._find, worker_id) is not None:
                    found.append(worker_id)
                self._answered[worker_id] = asyncio.Event()
                self._listening[worker_id] = asyncio.create_task(
                    self._listen(slot), name=f"listen {worker_id}"
                )
        return found

    def _find(self, worker_id: str) -> Any | None:
        try:
            return ray.get_actor(actor_name("worker", worker_id), namespace=self._namespace)
        except ValueError:
            return None  # Ray's way of saying that there is none

    def _find_or_start(self, slot: Slot) -> Any:
        return _GpuWorkerActor.options(
            name=actor_name("worker", slot.worker_id),
            namespace=self._namespace,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            num_gpus=1,
            max_restarts=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(slot.node_id, soft=False),
        ).remote(replace(self._settings, worker_id=slot.worker_id))

    async def _listen(self, slot: Slot) -> None:
        """Keep a long poll open to one slot's worker, and start another worker when it died."""
        worker_id = slot.worker_id
        pause_s = _FIRST_PAUSE_S
        try:
            while True:
                actor = await asyncio.to_thread(self._find_or_start, slot)
                self._actors[worker_id] = actor
                try:
                    await self._hear_until_it_dies(worker_id, actor)
                except (ActorDiedError, ActorUnschedulableError) as death:
                    _log.warning("worker died", worker=worker_id, error=str(death).splitlines()[0])
                if self._gone(worker_id, f"The GPU worker {worker_id} died."):
                    pause_s = _FIRST_PAUSE_S
                else:
                    # It died before its first word, and so may the next.
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        except StaleEpoch:
            _log.warning("a newer scheduler speaks to this worker", worker=worker_id)
        finally:
            self._gone(worker_id, f"The GPU worker {worker_id} left with its node.")

    async def _hear_until_it_dies(self, worker_id: str, actor: Any) -> None:
        """Tell what one actor says. Raises ActorDiedError, ActorUnschedulableError and StaleEpoch."""
        while True:
            known = self._incarnations.get(worker_id)
            try:
                async with asyncio.timeout(self._silence_s if known else _FIRST_ANSWER_S):
                    report: WorkerReport = await actor.report.remote(self._epoch)
                if report.incarnation != known:
                    self._gone(worker_id, f"The GPU worker {worker_id} was restarted.")
                    self._incarnations[worker_id] = report.incarnation
                    self._tell(WorkerFound(report=report))
                    self._answered[worker_id].set()
                while True:
                    async with asyncio.timeout(self._silence_s):
                        beat: Heartbeat = await actor.heartbeat.remote(self._epoch, self._heartbeat_ms)
                    self._tell(WorkerHeard(report=beat.report))
            except TimeoutError:
                self._gone(worker_id, f"The GPU worker {worker_id} was silent.")
            except ActorUnavailableError:
                await asyncio.sleep(_ASK_AGAIN_S)  # Ray finds out whether it died; asking again tells

    def _gone(self, worker_id: str, sentence: str) -> bool:
        """Tell that the present life of a worker is over; returns whether there was one."""
        incarnation = self._incarnations.pop(worker_id, None)
        if incarnation is not None:
            self._tell(WorkerGone(worker_id=worker_id, incarnation=incarnation, sentence=sentence))
        return incarnation is not None

    async def _close(self) -> None:
        # Who stops listening must not take the silence for deaths.
        self._incarnations.clear()
        tasks = [*self._listening.values(), *self._calls]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _render(self, worker_id: str, request: RenderRequest) -> None:
        try:
            await self._actors[worker_id].render.remote(request)
        except WorkerBusy as busy:
            self._tell(RenderRefused(worker_id=worker_id, attempt_id=request.attempt_id, sentence=str(busy)))
        except (RayActorError, StaleEpoch) as gone:
            # A dead worker's long poll tells of its death, and a newer scheduler's epoch ends this one.
            _log.info("render not delivered", worker=worker_id, trouble=type(gone).__name__)

    async def _ask(self, worker_id: str, method: str, *arguments: Any) -> None:
        try:
            await getattr(self._actors[worker_id], method).remote(*arguments)
        except (RayActorError, StaleEpoch) as gone:
            _log.info("worker not reached", worker=worker_id, method=method, trouble=type(gone).__name__)

    def _call(self, call: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(call)
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)


def _nobody_listens(fact: FleetFact) -> None:
    raise AssertionError(f"the fleet heard {fact} before it was opened")
