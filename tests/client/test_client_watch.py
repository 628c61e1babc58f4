"""Watching: every state event once and in order, also over broken connections."""

from __future__ import annotations

import grpc
import pytest

from scheduler.client.aio import DarkroomClient
from scheduler.client.errors import NotFoundOrNotYours, Overloaded
from scheduler.v1 import job_pb2
from scheduler.v1.job_pb2 import Progress, QueueStatus, WatchJobResponse
from tests.client.scripted_service import BUSY, HANG, UID, Refuse, ScriptedService, a_job, an_event

QUEUED, RUNNING = job_pb2.JOB_STATE_QUEUED, job_pb2.JOB_STATE_RUNNING
SUCCEEDED = job_pb2.JOB_STATE_SUCCEEDED
PROGRESS = WatchJobResponse(progress=Progress(step=3, steps=20))


async def sequences(client: DarkroomClient, after: int = 0) -> list[int]:
    """Sequence numbers of the events that a watch yields."""
    updates = [update async for update in client.watch(UID, after_sequence=after)]
    return [update.event.sequence for update in updates if update.HasField("event")]


async def test_a_broken_watch_goes_on_after_the_last_event_it_saw(
    service: ScriptedService, client: DarkroomClient
) -> None:
    service.says(
        "WatchJob",
        [an_event(4, QUEUED), an_event(7, RUNNING), PROGRESS, BUSY],
        [PROGRESS, BUSY],
        [an_event(9, SUCCEEDED)],
    )
    assert await sequences(client) == [4, 7, 9]
    assert [request.after_sequence for request in service.asked("WatchJob")] == [0, 7, 7]


async def test_a_stream_that_closes_before_the_end_of_the_job_is_resumed(
    service: ScriptedService, client: DarkroomClient
) -> None:
    service.says("WatchJob", [an_event(4, QUEUED)], [an_event(9, SUCCEEDED)])
    service.says("GetJob", a_job(state=RUNNING, event_sequence=7))
    assert await sequences(client) == [4, 9]


async def test_a_watch_after_the_last_event_ends(service: ScriptedService, client: DarkroomClient) -> None:
    service.says("WatchJob", [])
    service.says("GetJob", a_job(state=SUCCEEDED, event_sequence=9))
    assert await sequences(client, after=9) == []


async def test_patience_ends_only_when_nothing_new_comes(
    service: ScriptedService, client: DarkroomClient, pauses: list[float]
) -> None:
    service.says("WatchJob", *[[BUSY]] * 20, [PROGRESS, BUSY], *[[BUSY]] * 20)
    with pytest.raises(Overloaded):
        await sequences(client)
    assert len(pauses) == 40


async def test_a_refused_watch_is_not_resumed(service: ScriptedService, client: DarkroomClient) -> None:
    service.says(
        "WatchJob", [Refuse(code=grpc.StatusCode.PERMISSION_DENIED, reason="NOT_FOUND_OR_NOT_YOURS")]
    )
    with pytest.raises(NotFoundOrNotYours):
        await sequences(client)


async def test_a_handle_follows_its_job_and_asks_for_previews_only_when_told(
    service: ScriptedService, client: DarkroomClient
) -> None:
    waits = WatchJobResponse(queue_status=QueueStatus(sentence="2 jobs are ahead.", position=3))
    service.says("GetJob", a_job())
    service.says("WatchJob", [an_event(1, QUEUED), waits, an_event(2, RUNNING), an_event(3, SUCCEEDED)])
    handle = await client.handle(UID)
    states = [handle.job.state async for _ in handle.watch(previews=True)]
    assert states == [QUEUED, QUEUED, RUNNING, SUCCEEDED]
    assert service.asked("WatchJob")[0].previews


async def test_leaving_a_watch_ends_the_call(service: ScriptedService, client: DarkroomClient) -> None:
    service.says("WatchJob", [an_event(1, QUEUED), HANG])
    stream = client.watch(UID)
    await anext(stream)
    await stream.aclose()
    assert service.hung_calls_ended.wait(timeout=20)
