"""The client without an event loop: the same answers, from a thread."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from scheduler.client import aio, sync
from scheduler.client.errors import NotFoundOrNotYours
from scheduler.v1 import job_pb2
from scheduler.v1.account_pb2 import Account
from scheduler.v1.job_pb2 import ListJobsResponse
from tests.client.scripted_service import HANG, UID, Refuse, ScriptedService, a_file, a_job, an_event, grpc


def public(kind: type) -> set[str]:
    return {name for name in dir(kind) if not name.startswith("_")}


def test_it_offers_what_the_asyncio_client_offers() -> None:
    assert public(sync.DarkroomClient) == public(aio.DarkroomClient)
    assert public(sync.JobHandle) - {"job"} == public(aio.JobHandle)


def test_a_job_is_submitted_watched_and_saved(service: ScriptedService, tmp_path: Path) -> None:
    service.says("CreateJob", a_job())
    service.says(
        "WatchJob", [an_event(1, job_pb2.JOB_STATE_QUEUED), an_event(2, job_pb2.JOB_STATE_SUCCEEDED)]
    )
    service.says("DownloadImages", a_file(1, b"picture"))
    service.says("GetJob", a_job())
    service.says("GetAccount", Account(name="accounts/ada"))
    service.says("ListJobs", ListJobsResponse(jobs=[a_job()]))
    with sync.DarkroomClient(service.address, "dk_ada_secret") as client:
        handle = client.imagine("a lighthouse")
        assert handle.id == UID
        assert handle.result().state == job_pb2.JOB_STATE_SUCCEEDED
        assert [path.read_bytes() for path in handle.save(tmp_path)] == [b"picture"]
        assert client.account().name == "accounts/ada"
        assert [job.uid for job in client.jobs()] == [UID]


def test_errors_are_the_same(service: ScriptedService) -> None:
    service.says("GetJob", Refuse(code=grpc.StatusCode.PERMISSION_DENIED, reason="NOT_FOUND_OR_NOT_YOURS"))
    with sync.DarkroomClient(service.address, "dk_ada_secret") as client, pytest.raises(NotFoundOrNotYours):
        client.get(UID)


def test_leaving_a_watch_ends_the_call_behind_it(service: ScriptedService) -> None:
    service.says("WatchJob", [an_event(1, job_pb2.JOB_STATE_QUEUED), HANG])
    with sync.DarkroomClient(service.address, "dk_ada_secret") as client:
        stream = client.watch(UID)
        next(stream)
        stream.close()
        assert service.hung_calls_ended.wait(timeout=20)


def test_closing_ends_its_thread(service: ScriptedService) -> None:
    before = threading.active_count()
    sync.DarkroomClient(service.address, "dk_ada_secret").close()
    assert threading.active_count() == before
