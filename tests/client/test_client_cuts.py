"""Wires that break: what was under way goes on where it was, or begins again, and comes whole."""

from __future__ import annotations

import asyncio
import os
import uuid
import zipfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest

from scheduler.client.aio import DarkroomClient, JobHandle, RetryPolicy
from scheduler.client.errors import NoAnswerInTime, ServiceUnreachable
from scheduler.v1 import job_pb2
from scheduler.v1.job_pb2 import Progress, WatchJobResponse
from tests.client.scripted_service import HANG, UID, ScriptedService, a_file, a_job, an_event
from tests.client.test_client_download import PICTURES, an_archive
from tests.faults.proxy import Proxy
from tests.frontdoor.conftest import *  # noqa: F403 - a real front door, and a fixture may ask for another
from tests.frontdoor.door import Door

QUEUED, RUNNING = job_pb2.JOB_STATE_QUEUED, job_pb2.JOB_STATE_RUNNING
SUCCEEDED = job_pb2.JOB_STATE_SUCCEEDED
CONTENT = bytes(range(256)) * 12_000  # 3 MB, more than one block
MIB = 1 << 20
SOON = RetryPolicy(silence_s=0.3)


@pytest.fixture
async def wire(service: ScriptedService) -> AsyncIterator[Proxy]:
    host, _, port = service.address.rpartition(":")
    async with Proxy(lambda: asyncio.open_connection(host, int(port))).open() as proxy:
        yield proxy


@pytest.fixture
async def far(wire: Proxy) -> AsyncIterator[DarkroomClient]:
    """A client at the other end of the wire, which waits between repeats as ever."""
    async with DarkroomClient(f"127.0.0.1:{wire.port}", "dk_ada_secret") as client:
        yield client


async def cut_when_it_hangs(service: ScriptedService, wire: Proxy) -> None:
    assert await asyncio.to_thread(service.hanging.wait, 20)
    service.hanging.clear()
    wire.cut()


async def cut_once(wire: Proxy, holds: Callable[[], object]) -> None:
    while not holds():  # noqa: ASYNC110 - what it looks at is written in other threads
        await asyncio.sleep(0.005)
    wire.cut()


def bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*"))


async def test_a_watch_goes_on_after_the_last_event_it_saw(
    service: ScriptedService, wire: Proxy, far: DarkroomClient
) -> None:
    progress = WatchJobResponse(progress=Progress(step=3, steps=20))
    service.says(
        "WatchJob",
        [an_event(4, QUEUED), an_event(7, RUNNING), progress, HANG],
        [progress, HANG],
        [an_event(9, SUCCEEDED)],
    )
    handle = JobHandle(far, a_job())
    seen: list[int] = []
    async for update in handle.watch():
        if update.HasField("event"):
            seen.append(update.event.sequence)
        else:
            await cut_when_it_hangs(service, wire)
    assert seen == [4, 7, 9]
    assert [request.after_sequence for request in service.asked("WatchJob")] == [0, 7, 7]
    assert handle.job.state == SUCCEEDED


async def test_a_download_keeps_the_files_it_has_and_gets_the_others_whole(
    service: ScriptedService, wire: Proxy, far: DarkroomClient, tmp_path: Path
) -> None:
    service.says(
        "DownloadImages",
        [*a_file(1, b"first"), *a_file(2, CONTENT)[:20], HANG],
        [*a_file(1, b"made anew"), *a_file(2, CONTENT), *a_file(3, b"third")],
    )
    service.says("GetJob", a_job())

    paths, _ = await asyncio.gather(
        far.download(UID, tmp_path), cut_once(wire, lambda: list(tmp_path.glob("*.png")))
    )
    assert [path.read_bytes() for path in paths] == [b"first", CONTENT, b"third"]
    assert len(os.listdir(tmp_path)) == 3


async def test_an_archive_is_whole_over_two_wires(
    service: ScriptedService, wire: Proxy, far: DarkroomClient, tmp_path: Path
) -> None:
    whole = an_archive(PICTURES)
    service.says("DownloadImages", [*whole[:3], HANG], whole)
    path, _ = await asyncio.gather(far.download_all(tmp_path), cut_when_it_hangs(service, wire))
    with zipfile.ZipFile(path) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == PICTURES
    assert os.listdir(tmp_path) == [path.name]


async def test_a_submission_whose_answer_was_lost_is_sent_again_under_its_id(
    service: ScriptedService, wire: Proxy, far: DarkroomClient
) -> None:
    service.says("CreateJob", a_job(), a_job())
    service.says("GetJob", a_job())
    await far.get(UID)  # so that there is a connection
    wire.swallows_answers = True

    async def listen_again() -> None:
        while not service.asked("CreateJob"):  # noqa: ASYNC110 - the service is in another thread
            await asyncio.sleep(0.01)
        wire.listen_again()

    handle, _ = await asyncio.gather(far.imagine("a lighthouse"), listen_again())
    first, second = service.asked("CreateJob")
    assert first == second
    assert uuid.UUID(first.request_id)
    assert handle.id == UID


async def test_a_wire_that_stays_broken_is_said(
    service: ScriptedService, wire: Proxy, far: DarkroomClient
) -> None:
    service.says("GetJob", a_job())
    await far.get(UID)

    async def keep_cutting() -> None:
        while True:
            wire.cut()
            await asyncio.sleep(0.005)

    wire.swallows_answers = True
    cutting = asyncio.create_task(keep_cutting())
    try:
        with pytest.raises(ServiceUnreachable, match=f"127.0.0.1:{wire.port}"):
            await far.get(UID)
    finally:
        cutting.cancel()
        await asyncio.gather(cutting, return_exceptions=True)


async def test_a_download_that_stops_without_a_word_goes_on_where_it_was(
    service: ScriptedService, tmp_path: Path
) -> None:
    service.says(
        "DownloadImages",
        [*a_file(1, b"first"), *a_file(2, CONTENT)[:20], HANG],
        [*a_file(1, b"made anew"), *a_file(2, CONTENT)],
    )
    async with DarkroomClient(service.address, "dk_ada_secret", retries=SOON) as client:
        service.says("GetJob", a_job())
        paths = await client.download(UID, tmp_path)
    assert [path.read_bytes() for path in paths] == [b"first", CONTENT]
    assert len(os.listdir(tmp_path)) == 2


async def test_a_download_that_stops_twice_without_a_word_and_brought_nothing_is_given_up(
    service: ScriptedService, tmp_path: Path
) -> None:
    service.says("DownloadImages", *[[*a_file(1, CONTENT)[:3], HANG]] * 2)
    async with DarkroomClient(service.address, "dk_ada_secret", retries=SOON) as client:
        with pytest.raises(NoAnswerInTime, match=r"sent nothing more for 0\.3 s"):
            await client.download(UID, tmp_path)
    assert os.listdir(tmp_path) == []
    assert service.hung_calls_ended.wait(timeout=20)


# A real front door, with all that somebody has made in years


async def with_pictures(door: Door, jobs: int, size_bytes: int) -> str:
    """Return the key of an account with so many jobs of four pictures each."""
    caller = await door.caller("ann")
    job = await caller.create("a fox")
    await door.start(job.uid)
    await door.succeed(job.uid, [bytes([number]) * size_bytes for number in range(4)])
    columns = await door.sql(
        """SELECT string_agg(quote_ident(column_name), ', ')
             FROM information_schema.columns WHERE table_schema = 'scheduler' AND table_name = 'job'
              AND column_name NOT IN ('job_id', 'arrival', 'images')"""
    )
    # Their rows name the same four files under other names, which is all that an archive looks at.
    await door.sql(
        f"""INSERT INTO scheduler.job (job_id, images, {columns})
            SELECT made, replace(images::text, '"file_name": "' || job_id, '"file_name": "' || made)::jsonb,
                   {columns}
              FROM scheduler.job, (SELECT gen_random_uuid() AS made FROM generate_series(2, $1)) AS more
             WHERE job_id = $2""",
        jobs,
        uuid.UUID(job.uid),
    )
    return caller.secret


async def test_thousands_of_pictures_come_as_one_archive_in_flat_memory(door: Door, tmp_path: Path) -> None:
    jobs, size_bytes = 1_000, 32 * 1024
    process = psutil.Process()
    most = before = process.memory_info().rss

    async def measure() -> None:
        nonlocal most
        while True:
            most = max(most, process.memory_info().rss)
            await asyncio.sleep(0.02)

    key = await with_pictures(door, jobs, size_bytes)
    async with DarkroomClient(door.address, key) as ann:
        before = most = process.memory_info().rss
        measuring = asyncio.create_task(measure())
        path = await ann.download_all(tmp_path)
        measuring.cancel()
        await asyncio.gather(measuring, return_exceptions=True)
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        assert len(set(names)) == 4 * jobs
        assert archive.read(names[-1]) == bytes([3]) * size_bytes
    archive_bytes = path.stat().st_size
    assert archive_bytes > 4 * jobs * size_bytes
    # Door and client are in this process: both hold a chunk of one picture, and a line for each.
    assert most - before < 24 * MIB, f"{(most - before) / MIB:.0f} MiB for {archive_bytes / MIB:.0f} MiB"


async def test_an_archive_that_is_cut_off_at_the_real_door_comes_whole(door: Door, tmp_path: Path) -> None:
    key = await with_pictures(door, 300, 32 * 1024)
    host, _, port = door.address.rpartition(":")
    folder = tmp_path / "saved"
    async with (
        Proxy(lambda: asyncio.open_connection(host, int(port))).open() as wire,
        DarkroomClient(f"127.0.0.1:{wire.port}", key) as ann,
    ):
        path, _ = await asyncio.gather(
            ann.download_all(folder), cut_once(wire, lambda: bytes_in(folder) > 8 * MIB)
        )
    with zipfile.ZipFile(path) as archive:
        assert len(set(archive.namelist())) == len(archive.namelist()) == 1_200
        assert archive.testzip() is None
    assert os.listdir(folder) == [path.name]
    again = door.metrics.registry.get_sample_value("darkroom_artifact_sent_bytes_total") - path.stat().st_size
    assert again < 4 * MIB, f"{again / MIB:.1f} MiB were sent twice"
