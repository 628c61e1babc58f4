"""The demonstration shows all jobs, saves their pictures, and explains the order from what it was told."""

from __future__ import annotations

import io
import os
import uuid
from pathlib import Path

import pytest
from rich.console import Console

from billing.v1.admin_pb2 import AdminAccount, ApiKey, CreateAccountRequest, ListPlansResponse, Plan
from scheduler.client.errors import JobFailed
from scheduler.demo import run_demo
from scheduler.v1 import job_pb2
from scheduler.v1.job_pb2 import (
    CreateJobRequest,
    DownloadImagesRequest,
    Job,
    Receipt,
    StateEvent,
    WatchJobRequest,
    WatchJobResponse,
)
from tests.client.scripted_service import ScriptedService, a_file, a_job, a_png

QUEUED, RUNNING = job_pb2.JOB_STATE_QUEUED, job_pb2.JOB_STATE_RUNNING
PICTURE = a_png((10, 20, 30))
STARTED_MS = (1_000, 1_100, 9_000, 5_000)
"""When the four jobs start, in the order of their submission: ada's, the last, passes ben's third."""


class DemoService:
    """Answers that depend on which job is asked for."""

    def __init__(
        self, service: ScriptedService, ends_in: job_pb2.JobState = job_pb2.JOB_STATE_SUCCEEDED
    ) -> None:
        self.jobs: dict[str, Job] = {}
        self.ends_in = ends_in
        self.parks = ""
        """The prompt of the job that is parked on its way."""
        service.says("ListPlans", ListPlansResponse(plans=[Plan(name="plans/basic", quota_ms=12_000_000)]))
        service.says("CreateAccount", *[self.account] * 2)
        service.says("CreateApiKey", ApiKey(secret="dk_ada_secret"), ApiKey(secret="dk_ben_secret"))
        service.says("CreateJob", *[self.create] * 4)
        service.says("WatchJob", *[self.watch] * 4)
        service.says("DownloadImages", *[self.download] * 4)
        service.says("GetJob", *[lambda request: self.jobs[request.name]] * 4)

    def account(self, request: CreateAccountRequest) -> AdminAccount:
        return AdminAccount(name=f"accounts/{request.account_id}", plan=request.plan)

    def create(self, request: CreateJobRequest) -> Job:
        uid = str(uuid.uuid4())
        job = a_job(name=f"accounts/x/jobs/{uid}", uid=uid, prompt=request.imagine.prompt, tier=request.tier)
        self.jobs[job.name] = job
        return job

    def watch(self, request: WatchJobRequest) -> list[WatchJobResponse]:
        job = self.jobs[request.name]
        job.start_time.FromMilliseconds(STARTED_MS[list(self.jobs).index(job.name)])
        progress = job_pb2.Progress(
            step=10, steps=20, percent=50, preview=PICTURE if request.previews else b""
        )
        running = self.event(job, 2, RUNNING, f"Reason of {job.prompt}.")
        job.receipt.CopyFrom(Receipt(gpu_ms=3_400))
        parked = job.prompt == self.parks
        return [
            WatchJobResponse(queue_status=job_pb2.QueueStatus(sentence="Next.", position=1)),
            running,
            WatchJobResponse(progress=progress),
            *(self.event(job, 2, RUNNING, sentence) for sentence in ("Parked.", "Went on.") if parked),
            self.event(job, 3, self.ends_in, "Done."),
        ]

    def event(self, job: Job, sequence: int, state: job_pb2.JobState, sentence: str) -> WatchJobResponse:
        job.state = state
        event = StateEvent(sequence=sequence, state=state, sentence=sentence, job=job)
        return WatchJobResponse(event=event)

    def download(self, request: DownloadImagesRequest) -> list[object]:
        uid = request.name.rpartition("/")[2]
        return [
            part
            for index in (1, 2, 3, 4)
            for part in a_file(
                index, PICTURE, name=f"{request.name}/images/{index}", file_name=f"{uid}_x_{index}.png"
            )
        ]


async def shown(service: ScriptedService, folder: Path, *, terminal: bool = False, keep: bool = False) -> str:
    console = Console(
        file=io.StringIO(),
        width=100,
        force_terminal=terminal,
        color_system="truecolor" if terminal else None,
    )
    await run_demo(
        address=service.address, admin_key="dk_admin_secret", images_dir=folder, console=console, keep=keep
    )
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


async def test_three_relax_jobs_and_a_fast_one_leave_four_pictures_each(
    service: ScriptedService, tmp_path: Path
) -> None:
    demo = DemoService(service)
    text = await shown(service, tmp_path)
    tiers = [request.tier for request in service.asked("CreateJob")]
    assert tiers == [job_pb2.TIER_RELAX] * 3 + [job_pb2.TIER_FAST]
    assert [request.plan for request in service.asked("CreateAccount")] == ["plans/standard", "plans/basic"]
    saved = set(os.listdir(tmp_path))
    assert saved == {f"{job.uid}_x_{index}.png" for job in demo.jobs.values() for index in (1, 2, 3, 4)}
    assert "ada: place 1: Next." in text
    assert "ada: step 10 of 20" in text
    assert "3.4 s" in text
    assert "\x1b" not in text


async def test_the_order_is_explained_by_start_times_and_the_schedulers_reasons(
    service: ScriptedService, tmp_path: Path
) -> None:
    DemoService(service)
    text = await shown(service, tmp_path)
    explained = text[text.index("Why they started") :].splitlines()[1:6]
    names = [line.split(" (")[0] for line in explained[:4]]
    assert names == ["1. ben 1", "2. ben 2", "3. ada", "4. ben 3"]
    assert explained[2].endswith("Reason of a rocket on a black background.")
    assert explained[4].startswith("Ada's fast job passed ben 3:")


async def test_a_job_that_was_parked_says_why_it_first_started_and_that_it_went_on(
    service: ScriptedService, tmp_path: Path
) -> None:
    demo = DemoService(service)
    demo.parks = "a red apple"
    text = await shown(service, tmp_path)
    explained = text[text.index("Why they started") :].splitlines()[1:4]
    assert explained[0].endswith("Reason of a red apple.")
    assert explained[1:] == ["   since then: Parked.", "   since then: Went on."]


async def test_a_terminal_shows_the_pictures(service: ScriptedService, tmp_path: Path) -> None:
    DemoService(service)
    text = await shown(service, tmp_path, terminal=True)
    assert all(request.previews for request in service.asked("WatchJob"))
    assert "38;2;10;20;30" in text


@pytest.mark.parametrize("keep", [True, False])
async def test_keys_are_shown_only_when_the_service_stays(
    service: ScriptedService, tmp_path: Path, keep: bool
) -> None:
    DemoService(service)
    text = await shown(service, tmp_path, keep=keep)
    for key in ("dk_admin_secret", "dk_ada_secret", "dk_ben_secret"):
        assert (key in text) is keep


async def test_a_failed_job_is_the_demos_failure(service: ScriptedService, tmp_path: Path) -> None:
    DemoService(service, ends_in=job_pb2.JOB_STATE_FAILED)
    with pytest.raises(JobFailed):
        await shown(service, tmp_path)
