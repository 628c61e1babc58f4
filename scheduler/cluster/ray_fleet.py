"""The fleet over Ray: one detached actor for each GPU of the cluster, and one long poll open to each.

Workers outlive the scheduler that started them: they are detached and named by release and slot, and the next
scheduler finds them by name, also those of another release, which it goes on with until they are replaced.
They are not restarted by Ray but by this fleet: a death is then a fact that is told once (ActorDiedError),
not a silence that may or may not end.

Where machines are rented as they are needed, a worker that holds its GPU keeps its machine: Ray's autoscaler
takes back only those on which nothing runs. So the workers of spare machines are ended, and GPUs are asked
for by their number (`request_resources`), below which Ray then does not go until it is told another. A fleet
that is not scaled asks for none, once. A Ray without an autoscaler keeps the number and does nothing.
"""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import ray
import ray.util
import structlog
from ray._private.state import state as ray_state
from ray.autoscaler.sdk import request_resources
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    ActorUnschedulableError,
    RayActorError,
    RayError,
    RayTaskError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gpu_worker.actor import GpuWorker
from gpu_worker.contract import AttemptResult, Heartbeat, RenderRequest, StaleEpoch, WorkerBusy, WorkerReport
from gpu_worker.settings import WorkerSettings
from scheduler.fleet import (
    FleetFact,
    GoneBecause,
    RenderRefused,
    RenderTaken,
    WorkerAwaited,
    WorkerFound,
    WorkerGone,
    WorkerHeard,
    WorkerLeaves,
)
from scheduler.settings import RELEASE

_log = structlog.get_logger()

_GpuWorkerActor: Any = GpuWorker  # Ray's decorator adds what no type says

_NODES_EVERY_S = 1.0
# Silence of this many heartbeat intervals is a loss.
_SILENT_INTERVALS = 3
# Those that live answer within milliseconds, and the first start after a takeover is to come within seconds.
_FIRST_WORDS_S = 1.0
# A worker imports torch before it can answer for the first time.
_FIRST_ANSWER_S = 120.0
_ASK_AGAIN_S = 0.2
# A head that is started anew has forgotten what was asked for.
_ASK_FOR_MACHINES_S = 30.0
_HEARD_AS_SET = 1_000
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0


def actor_name(kind: str, slot: str = "", *, release: str = RELEASE) -> str:
    """Return the name of an actor of a release, so that old and new run side by side."""
    return f"{kind}-{release}" + (f"-{slot}" if slot else "")


def living_workers(namespace: str) -> dict[str, list[str]]:
    """Return the names of the workers that Ray knows by their slots' ids, whoever started them."""
    living = defaultdict(list)
    for actor in ray.util.list_named_actors(all_namespaces=True):
        # A slot's name may have more of them; a release has none.
        kind, _, rest = actor["name"].partition("-")
        if actor["namespace"] == namespace and kind == "worker":
            living[rest.partition("-")[2]].append(actor["name"])
    return living


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One GPU's place in the cluster."""

    worker_id: str
    node_id: str


def node_names(
    nodes: list[dict[str, Any]], known: Mapping[str, str], workers: Collection[str]
) -> dict[str, str]:
    """Return a name of its own for each living node (`ray.nodes()`) by its id.

    A node's name is decided once and kept while it lives: `known` are the names so far, `workers` the ids of
    the workers that live, among them those that an earlier scheduler named. Of several nodes with one name,
    as on one machine, the first keeps it and the others add the beginning of their ids.
    """
    alive = {node["NodeID"]: node["NodeName"] for node in nodes if node["Alive"]}
    names = {node_id: name for node_id, name in known.items() if node_id in alive}
    fresh = sorted(alive.keys() - names.keys())
    longer = {node_id: f"{alive[node_id]}-{node_id[:8]}" for node_id in fresh}
    at_work = {worker_id.rpartition("/")[0] for worker_id in workers}
    for node_id in fresh:
        if longer[node_id] in at_work:
            names[node_id] = longer[node_id]
    for node_id in fresh:
        if node_id not in names:
            taken = alive[node_id] in names.values()
            names[node_id] = longer[node_id] if taken else alive[node_id]
    return names


def interval_ms(heartbeat_ms: int, workers: int) -> int:
    """Return within how many milliseconds each of so many workers is heard.

    The interval that is set, up to a thousand of them; beyond, longer, so that a scheduler hears no more of
    more.
    """
    return heartbeat_ms * max(_HEARD_AS_SET, workers) // _HEARD_AS_SET


def gpu_slots(nodes: list[dict[str, Any]], names: Mapping[str, str]) -> list[Slot]:
    """Return a slot for each GPU of the nodes that have a name: `<name>/gpu-<i>`."""
    return [
        Slot(worker_id=f"{names[node['NodeID']]}/gpu-{index}", node_id=node["NodeID"])
        for node in nodes
        if node["NodeID"] in names
        for index in range(int(node["Resources"].get("GPU", 0)))
    ]


class RayFleet:
    """Implements `scheduler.fleet.Fleet`."""

    def __init__(
        self, *, worker: WorkerSettings, namespace: str, heartbeat_ms: int, is_scaled: bool = False
    ) -> None:
        """Of workers with these settings. `is_scaled`: none is started before `want` has said where."""
        self._settings = worker
        self._namespace = namespace
        self._heartbeat_ms = heartbeat_ms
        self._epoch = 0
        self._tell: Callable[[FleetFact], None] = _nobody_listens
        self._actors: dict[str, Any] = {}
        self._listening: dict[str, asyncio.Task[None]] = {}
        self._answered: dict[str, asyncio.Event] = {}
        self._incarnations: dict[str, str] = {}
        self._awaited: set[str] = set()
        """Workers that lived when this was opened, and have not answered yet."""
        self._awaited_until_s = 0.0
        """By the event loop's clock; whoever has not answered by then was silent for too long."""
        self._names: dict[str, str] = {}
        self._others: dict[str, str] = {}
        """Names of the workers of other releases, by their slots' ids, that are still to be listened to."""
        self._replaced: set[str] = set()
        """Workers that were told to make room, until they are gone."""
        self._ending: set[str] = set()
        """Nodes that are about to end: `ray start --block` says so at SIGTERM."""
        self._wanted: int | None = None if is_scaled else 0
        """GPUs to keep in the cluster; None: nobody has said yet."""
        self._ask_every_s = _ASK_FOR_MACHINES_S if is_scaled else math.inf
        self._asked_for: int | None = None
        self._ask_at_s = 0.0
        """By the event loop's clock."""
        self._starts = not is_scaled
        self._spare: frozenset[str] = frozenset()
        self._wants_changed = asyncio.Event()
        self._calls: set[asyncio.Task[None]] = set()
        self._in_turn: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def open(self, epoch: int, tell: Callable[[FleetFact], None]) -> None:
        """See Fleet.open."""
        self._epoch, self._tell = epoch, tell
        alive = await self._look_at_nodes()
        self._awaited.update(alive)
        self._awaited_until_s = asyncio.get_running_loop().time() + self._silence_s
        for worker_id in alive:
            tell(WorkerAwaited(worker_id=worker_id))
        waiting = [self._answered[worker_id].wait() for worker_id in alive]
        # Ray may call one alive that died with its machine: nobody else is to wait out its silence.
        with suppress(TimeoutError):
            async with asyncio.timeout(_FIRST_WORDS_S):
                await asyncio.gather(*waiting)

    async def run(self) -> None:
        """See Fleet.run."""
        try:
            while True:
                await asyncio.wait({self._failed}, timeout=_NODES_EVERY_S)
                if self._failed.done():
                    self._failed.result()
                await self._look_at_nodes()
                self._give_up_awaited()
                await self._ask_for_machines()
        finally:
            await self._close()

    def render(self, worker_id: str, request: RenderRequest) -> None:
        """See Fleet.render."""
        self._call(self._render(worker_id, request), f"render {request.attempt_id}")

    def stop(self, worker_id: str, attempt_id: str, token: str) -> None:
        """See Fleet.stop."""
        asking = self._ask_in_turn(worker_id, "stop", self._epoch, attempt_id, token)
        self._call(asking, f"stop {attempt_id}")

    def hand_over(self, worker_id: str, attempt_id: str) -> None:
        """See Fleet.hand_over."""
        asking = self._ask_in_turn(worker_id, "hand_over", self._epoch, attempt_id)
        self._call(asking, f"hand over {attempt_id}")

    def resume(self, worker_id: str, attempt_id: str) -> None:
        """See Fleet.resume."""
        asking = self._ask_in_turn(worker_id, "resume", self._epoch, attempt_id)
        self._call(asking, f"resume {attempt_id}")

    def acknowledge(self, worker_id: str, result: AttemptResult) -> None:
        """See Fleet.acknowledge."""
        asking = self._ask(worker_id, "acknowledge", self._epoch, result.attempt_id)
        self._call(asking, f"acknowledge {result.attempt_id}")

    def forget(self, worker_id: str, attempt_id: str, *, kept: bool = False) -> None:
        """See Fleet.forget."""
        self._call(self._forget(worker_id, attempt_id, kept), f"forget {attempt_id}")

    def replace(self, worker_id: str) -> None:
        """See Fleet.replace."""
        actor = self._actors.get(worker_id)
        if actor is None:
            return  # it has left with its node, which is being told
        self._replaced.add(worker_id)
        # Its slot's long poll hears of its death, and starts the next where one is wanted.
        self._call(asyncio.to_thread(ray.kill, actor, no_restart=True), f"replace {worker_id}")

    def want(self, workers: int, spare: Collection[str]) -> None:
        """See Fleet.want."""
        self._wanted = workers
        if not self._starts or self._spare != spare:
            self._starts, self._spare = True, frozenset(spare)
            self._wants_changed.set()
            self._wants_changed = asyncio.Event()

    def slots(self) -> Collection[str]:
        """See Fleet.slots."""
        if not self._ending:
            return self._listening.keys()
        ending = {name for node_id, name in self._names.items() if node_id in self._ending}
        return {worker_id for worker_id in self._listening if worker_id.rpartition("/")[0] not in ending}

    @property
    def _interval_ms(self) -> int:
        return interval_ms(self._heartbeat_ms, len(self._listening))

    @property
    def _silence_s(self) -> float:
        return _SILENT_INTERVALS * self._interval_ms / 1000

    async def _look_at_nodes(self) -> list[str]:
        """Listen to every slot of the living nodes; returns the workers that were alive already."""
        # Before the living ones: a node that ends in between would else live and not be ending, for a second
        # in which it seems to have come back, and then be missed.
        # Where Ray's own libraries look too. There is no public way without Ray's dashboard.
        self._ending = set(await asyncio.to_thread(ray_state.get_draining_nodes))
        nodes = await asyncio.to_thread(ray.nodes)
        living: Mapping[str, list[str]] = {}
        if self._names.keys() != {node["NodeID"] for node in nodes if node["Alive"]}:
            living = await asyncio.to_thread(living_workers, self._namespace)
            self._names = node_names(nodes, self._names, living.keys())
        slots = {slot.worker_id: slot for slot in gpu_slots(nodes, self._names)}
        for worker_id in self._listening.keys() - slots.keys():
            _log.info("slot gone with its node", worker=worker_id)
            self._listening.pop(worker_id).cancel()
            del self._answered[worker_id]
            self._actors.pop(worker_id, None)
            self._in_turn.pop(worker_id, None)
        for worker_id in living.keys() - slots.keys():
            # Nobody would listen to it, and it would keep its GPU from the worker that is wanted there.
            _log.warning("worker without a slot ended", worker=worker_id)
            await asyncio.to_thread(self._end_all_but, worker_id, "")
        for worker_id, slot in slots.items():
            if slot.node_id in self._ending:
                self._tell(WorkerLeaves(worker_id=worker_id))
        await self._look_at_starting()
        found = []
        for worker_id, slot in slots.items():
            starts = slot.node_id not in self._ending
            if worker_id not in self._listening and (starts or worker_id in living):
                if worker_id in living:
                    found.append(worker_id)
                    if self._own_name(worker_id) not in living[worker_id]:
                        self._others[worker_id] = living[worker_id][0]
                self._answered[worker_id] = asyncio.Event()
                listens = self._listen(slot, lives=worker_id in living)
                listening = asyncio.create_task(listens, name=f"listen {worker_id}")
                listening.add_done_callback(self._notice_failure)
                self._listening[worker_id] = listening
        return found

    async def _look_at_starting(self) -> None:
        """End what keeps its GPU from a worker that was started and has not answered yet.

        While this scheduler took the lead, the one before may have seen a worker die, and started another.
        """
        starting = [one for one in self._actors if one in self._listening and one not in self._incarnations]
        if not starting:
            return
        living = await asyncio.to_thread(living_workers, self._namespace)
        for worker_id in starting:
            own, names = self._own_name(worker_id), living.get(worker_id, [])
            if own in names and len(names) > 1:
                _log.warning("worker of another release ended", worker=worker_id)
                await asyncio.to_thread(self._end_all_but, worker_id, own)

    def _end_all_but(self, worker_id: str, name: str) -> None:
        """End the workers of a slot that have another name."""
        for other in living_workers(self._namespace).get(worker_id, []):
            if other != name and (actor := self._find(other)) is not None:
                ray.kill(actor, no_restart=True)

    def _find(self, name: str) -> Any | None:
        try:
            return ray.get_actor(name, namespace=self._namespace)
        except ValueError:
            return None  # Ray's way of saying that there is none

    def _own_name(self, worker_id: str) -> str:
        return actor_name("worker", worker_id, release=self._settings.release)

    def _find_or_start(self, slot: Slot) -> Any:
        other = self._others.pop(slot.worker_id, "")
        if other and (actor := self._find(other)) is not None:
            return actor
        return _GpuWorkerActor.options(
            name=self._own_name(slot.worker_id),
            namespace=self._namespace,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            num_gpus=1,
            max_restarts=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(slot.node_id, soft=False),
        ).remote(replace(self._settings, worker_id=slot.worker_id))

    async def _ask_for_machines(self) -> None:
        if self._wanted is None:
            return
        now_s = asyncio.get_running_loop().time()
        # Ray may count spare machines for the number that is asked for, and keep them beside those at work,
        # which keep themselves.
        gpus = 0 if self._spare else self._wanted
        if gpus != self._asked_for or now_s >= self._ask_at_s:
            try:
                await asyncio.to_thread(request_resources, bundles=[{"GPU": 1}] * gpus)
            except RayError as trouble:
                _log.warning("machines not asked for", gpus=gpus, trouble=str(trouble))
            else:
                self._asked_for, self._ask_at_s = gpus, now_s + self._ask_every_s

    async def _until_wanted(self, worker_id: str) -> None:
        while not self._starts or worker_id in self._spare:
            await self._wants_changed.wait()

    async def _listen(self, slot: Slot, *, lives: bool) -> None:
        """Keep a long poll open to one slot's worker, and start another worker when it died.

        `lives`: as far as Ray knows, it has one. Where none is wanted, none is started.
        """
        worker_id = slot.worker_id
        pause_s = _FIRST_PAUSE_S
        try:
            while True:
                if not lives:
                    await self._until_wanted(worker_id)
                    if slot.node_id in self._ending:
                        return
                lives = False
                actor = await asyncio.to_thread(self._find_or_start, slot)
                self._actors[worker_id] = actor
                try:
                    await self._hear_until_it_dies(worker_id, actor)
                except (ActorDiedError, ActorUnschedulableError) as death:
                    _log.warning("worker died", worker=worker_id, error=str(death).splitlines()[0])
                if slot.node_id in self._ending:
                    return
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
                    self._awaited.discard(worker_id)
                    self._gone(worker_id, f"The GPU worker {worker_id} was restarted.", GoneBecause.RESTARTED)
                    self._incarnations[worker_id] = report.incarnation
                    outdated = report.release != self._settings.release
                    self._tell(WorkerFound(report=report, outdated=outdated))
                    self._answered[worker_id].set()
                while True:
                    async with asyncio.timeout(self._silence_s):
                        beat: Heartbeat = await actor.heartbeat.remote(self._epoch, self._interval_ms)
                    self._tell(WorkerHeard(report=beat.report))
            except TimeoutError:
                self._gone(worker_id, f"The GPU worker {worker_id} was silent.", GoneBecause.SILENT)
            except ActorUnavailableError:
                await asyncio.sleep(_ASK_AGAIN_S)  # Ray finds out whether it died; asking again tells

    def _give_up_awaited(self) -> None:
        # Not left to their long polls: a call to an actor whose machine has died may fail again and again
        # until Ray finds that out.
        if asyncio.get_running_loop().time() >= self._awaited_until_s:
            for worker_id in tuple(self._awaited):
                self._gone(worker_id, f"The GPU worker {worker_id} was silent.", GoneBecause.SILENT)

    def _gone(self, worker_id: str, sentence: str, because: GoneBecause = GoneBecause.DIED) -> bool:
        """Tell that the present life of a worker is over; returns whether there was one."""
        incarnation = self._incarnations.pop(worker_id, None)
        if incarnation is not None or worker_id in self._awaited:
            self._awaited.discard(worker_id)
            if worker_id in self._replaced:
                self._replaced.discard(worker_id)
                because = GoneBecause.REPLACED
            self._tell(
                WorkerGone(
                    worker_id=worker_id, incarnation=incarnation or "", sentence=sentence, because=because
                )
            )
        return incarnation is not None

    async def _close(self) -> None:
        # Who stops listening must not take the silence for deaths.
        self._incarnations.clear()
        self._awaited.clear()
        tasks = [*self._listening.values(), *self._calls]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _render(self, worker_id: str, request: RenderRequest) -> None:
        try:
            await self._ask_in_turn(worker_id, "render", request)
        except RayTaskError as refused:
            if not isinstance(refused.cause, WorkerBusy):
                raise
            # Not of `refused`, whose text is a traceback: the job's owner reads this.
            sentence = str(refused.cause)
            self._tell(RenderRefused(worker_id=worker_id, attempt_id=request.attempt_id, sentence=sentence))
        else:
            # Or its life is over, and with it the attempt's: then this says nothing any more.
            self._tell(RenderTaken(worker_id=worker_id, attempt_id=request.attempt_id))

    async def _forget(self, worker_id: str, attempt_id: str, kept: bool) -> None:
        try:
            await self._ask(worker_id, "forget", self._epoch, attempt_id, kept)
        except RayTaskError as trouble:
            # The artifact store did not delete the pictures. The result is dropped all the same, and nothing
            # depends on the files.
            _log.warning(
                "pictures not deleted", worker=worker_id, attempt=attempt_id, error=str(trouble.cause)
            )

    async def _ask_in_turn(self, worker_id: str, method: str, *arguments: Any) -> None:
        """Call a worker once it has answered the calls before; raises what `_ask` does.

        Of two calls that are under way to an actor the second may arrive first: a run, and what parks or
        stops it. A worker that is asked to stop what it does not have yet does nothing.
        """
        life = self._incarnations.get(worker_id)
        async with self._in_turn[worker_id]:
            if self._incarnations.get(worker_id) == life:  # else its runs have been told lost
                await self._ask(worker_id, method, *arguments)

    async def _ask(self, worker_id: str, method: str, *arguments: Any) -> None:
        """Call a worker until it has answered or its present life is over: every method may be repeated.

        Raises what the worker raises, but for StaleEpoch.
        """
        actor, life = self._actors.get(worker_id), self._incarnations.get(worker_id)
        if actor is None:
            return  # it is awaited: what it should do is said again when it has answered
        while True:
            try:
                await getattr(actor, method).remote(*arguments)
                return
            except ActorUnavailableError:
                # Lost on the way, in one direction or the other.
                await asyncio.sleep(_ASK_AGAIN_S)
                if self._incarnations.get(worker_id) != life:
                    return  # whatever it had in hand has been told lost
            except (RayActorError, StaleEpoch) as gone:
                # A dead worker's long poll tells of its death, and a newer scheduler's epoch ends this one.
                _log.info("worker not reached", worker=worker_id, method=method, trouble=type(gone).__name__)
                return

    def _call(self, call: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(call, name=name)
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)
        task.add_done_callback(self._notice_failure)

    def _notice_failure(self, task: asyncio.Task[None]) -> None:
        """Let `run` end with what a call or a long poll raised: it is a bug."""
        if not task.cancelled() and (failure := task.exception()) is not None and not self._failed.done():
            self._failed.set_exception(failure)


def _nobody_listens(fact: FleetFact) -> None:
    raise AssertionError(f"the fleet heard {fact} before it was opened")
