"""What a watch shows: every state in order, the newest of everything else, and nothing twice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from scheduler.updates import QueueReason, QueueStatus
from scheduler.v1 import job_pb2, job_pb2_grpc
from tests.frontdoor.door import Door, refusal


async def test_a_watch_shows_the_whole_life_of_a_job_and_ends_with_it(door: Door) -> None:
    ann = await door.caller("ann")
    job = await ann.create()
    watch = aiter(ann.watch(job.name))
    accepted = (await anext(watch)).event
    assert (accepted.state, accepted.sentence) == (job_pb2.JOB_STATE_QUEUED, "Accepted.")
    assert (accepted.sequence, accepted.job.uid) == (job.event_sequence, job.uid)
    assert (await anext(watch)).queue_status == job.queue_status

    attempt_id = await door.start(job.uid)
    door.scheduler.update(job.uid)
    started = (await anext(watch)).event
    assert (started.state, started.sentence) == (job_pb2.JOB_STATE_RUNNING, "It was next.")
    assert started.job.HasField("start_time")

    door.scheduler.step(attempt_id, 5)
    progress = (await anext(watch)).progress
    assert (progress.step, progress.steps, progress.percent, progress.preview) == (5, 20, 25, b"")

    await door.succeed(job.uid)
    door.scheduler.update(job.uid)
    ended = (await anext(watch)).event
    assert ended.state == job_pb2.JOB_STATE_SUCCEEDED
    assert len(ended.job.images) == 4
    assert [response async for response in watch] == []
    assert accepted.sequence < started.sequence < ended.sequence
    assert door.scheduler.previews_asked == [False]


async def test_a_watch_resumes_behind_the_sequence_number_it_is_given(door: Door) -> None:
    ann = await door.caller("ann")
    job = await ann.create()
    await door.start(job.uid)
    await door.succeed(job.uid)
    whole = [response.event async for response in ann.watch(job.name)]
    assert [event.state for event in whole] == [
        job_pb2.JOB_STATE_QUEUED,
        job_pb2.JOB_STATE_RUNNING,
        job_pb2.JOB_STATE_SUCCEEDED,
    ]
    rest = [r.event async for r in ann.watch(job.name, after_sequence=whole[0].sequence)]
    assert rest == whole[1:]
    assert [r async for r in ann.watch(job.name, after_sequence=whole[2].sequence)] == []


async def test_a_waiting_job_shows_its_place_as_it_changes_and_not_otherwise(door: Door) -> None:
    ann = await door.caller("ann")
    job = await ann.create()
    watch = aiter(ann.watch(job.name))
    await anext(watch)
    await anext(watch)
    for position in (3, 2):
        door.scheduler.statuses[job.uid] = QueueStatus(
            reason=QueueReason.WAITING_FOR_GPU, sentence=f"{position - 1} ahead.", position=position
        )
        assert (await anext(watch)).queue_status.position == position
    await ann.cancel(job.name)
    door.scheduler.update(job.uid)
    assert (await anext(watch)).event.state == job_pb2.JOB_STATE_CANCELLED


async def test_previews_come_only_when_asked_for(door: Door) -> None:
    ann = await door.caller("ann")
    job = await ann.create()
    attempt_id = await door.start(job.uid)
    watch = aiter(ann.watch(job.name, previews=True))
    await _until_running(watch)
    door.scheduler.step(attempt_id, 4, b"a picture")
    progress = (await anext(watch)).progress
    assert (progress.preview, progress.preview_content_type) == (b"a picture", "image/jpeg")
    assert door.scheduler.previews_asked == [True]


async def test_a_slow_reader_gets_the_newest_step_and_the_newest_picture(door: Door) -> None:
    ann = await door.caller("ann")
    job = await ann.create()
    attempt_id = await door.start(job.uid)
    watch = aiter(ann.watch(job.name, previews=True))
    await _until_running(watch)
    # All of these wait for the watch at once, as they do when a client does not read.
    for step in range(1, 19):
        door.scheduler.step(attempt_id, step, b"picture 10" if step == 10 else b"")
    steps = []
    previews = set()
    while not steps or steps[-1] < 18:
        progress = (await anext(watch)).progress
        steps.append(progress.step)
        previews.add(progress.preview)
    assert len(steps) < 18
    assert b"picture 10" in previews


async def test_after_a_lost_attempt_the_next_one_is_followed(door: Door) -> None:
    ann = await door.caller("ann")
    job = await ann.create()
    lost = await door.start(job.uid)
    watch = aiter(ann.watch(job.name))
    await _until_running(watch)
    await door.lose(job.uid)
    door.scheduler.update(job.uid)
    assert (await anext(watch)).event.state == job_pb2.JOB_STATE_QUEUED
    assert (await anext(watch)).HasField("queue_status")
    second = await door.start(job.uid)
    door.scheduler.update(job.uid)
    assert (await anext(watch)).event.state == job_pb2.JOB_STATE_RUNNING
    door.scheduler.step(lost, 19)
    door.scheduler.step(second, 2)
    assert (await anext(watch)).progress.step == 2


async def test_a_watch_that_came_to_the_worker_before_the_job_did_shows_its_progress(door: Door) -> None:
    ann = await door.caller("ann")
    job = await ann.create()
    attempt_id = await door.start(job.uid)
    door.scheduler.not_in_hand(attempt_id)
    watch = aiter(ann.watch(job.name, previews=True))
    await _until_running(watch)
    door.scheduler.step(attempt_id, 3)
    assert (await anext(watch)).progress.step == 3
    assert door.scheduler.previews_asked == [True, True]
    await door.succeed(job.uid)
    door.scheduler.update(job.uid)
    assert [response.event.state async for response in watch] == [job_pb2.JOB_STATE_SUCCEEDED]


async def test_two_watches_of_one_job_see_the_same(door: Door) -> None:
    ann = await door.caller("ann")
    job = await ann.create()

    async def states() -> list[int]:
        return [r.event.state async for r in ann.watch(job.name) if r.HasField("event")]

    watches = [asyncio.create_task(states()) for _ in range(2)]
    await ann.cancel(job.name)
    door.scheduler.update(job.uid)
    one, two = await asyncio.gather(*watches)
    assert one == two == [job_pb2.JOB_STATE_QUEUED, job_pb2.JOB_STATE_CANCELLED]


async def test_a_watch_that_its_client_drops_ends_at_the_server_too(door: Door) -> None:
    ann = await door.caller("ann")
    job = await ann.create()
    # Without the interceptors of the other tests, whose calls do not pass a cancellation on.
    watch = job_pb2_grpc.JobServiceStub(door.channel(None)).WatchJob(
        job_pb2.WatchJobRequest(name=job.name), metadata=(("authorization", f"Bearer {ann.secret}"),)
    )
    await watch.read()
    assert _open(door) == 1
    watch.cancel()
    async with asyncio.timeout(10):
        while _open(door):
            await ann.get(job.name)  # the cancellation travels at its own pace
    handled = {
        "grpc_type": "server_stream",
        "grpc_service": "scheduler.v1.JobService",
        "grpc_method": "WatchJob",
        "grpc_code": "Canceled",
    }
    assert door.metrics.registry.get_sample_value("grpc_server_handled_total", handled) == 1


async def test_a_front_door_that_closes_sends_its_watches_elsewhere(door: Door) -> None:
    ann = await door.caller("ann")
    job = await ann.create()
    watch = aiter(ann.watch(job.name))
    await anext(watch)
    await anext(watch)
    closing = asyncio.create_task(door.close())
    refused = await refusal(anext(watch))
    assert refused.reason == "OVERLOADED"
    assert "watch again from the last sequence number" in refused.message
    await closing


def _open(door: Door) -> float | None:
    return door.metrics.registry.get_sample_value("darkroom_watch_streams")


async def _until_running(watch: AsyncIterator[job_pb2.WatchJobResponse]) -> None:
    while (await anext(watch)).event.state != job_pb2.JOB_STATE_RUNNING:
        pass
