"""An artifact store at s3:// does what a folder does: workers write, front doors read, list and clear up."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
import s3fs
from moto.server import ThreadedMotoServer

from gpu_worker import outputs
from gpu_worker.contract import ImageFile
from scheduler.frontdoor.artifacts import CHUNK_BYTES, Artifacts
from scheduler.frontdoor.orphans import Orphans, Swept
from scheduler.refusals import Overloaded, PictureMissing
from tests.frontdoor.door import Door

PNG = bytes(range(256)) * 1_000
WEEK = timedelta(days=7)


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadedMotoServer]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    # A client is kept for each address, and the next server may have this one's.
    s3fs.S3FileSystem.clear_instance_cache()
    yield server
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def url(s3: ThreadedMotoServer) -> str:
    # What a server keeps outlives it, in this process.
    bucket = f"pictures-{uuid.uuid4()}"
    s3fs.S3FileSystem().mkdir(bucket)
    return f"s3://{bucket}/darkroom"


def the_image(path: str) -> ImageFile:
    return ImageFile(
        index=1,
        path=path,
        file_name="fox_1.png",
        content_type="image/png",
        size_bytes=len(PNG),
        sha256="",
        width=1,
        height=1,
        seed=1,
    )


async def test_what_a_worker_wrote_a_front_door_reads_lists_and_deletes(url: str) -> None:
    worker, door = outputs.Artifacts(url), Artifacts(url)
    job_id = str(uuid.uuid4())
    picture = f"{outputs.attempt_folder(job_id, 'first')}/fox_1.png"
    checkpoint = outputs.checkpoint_path(job_id, "first")
    worker.put(picture, PNG)
    worker.put(checkpoint, b"half")
    worker.put(checkpoint, b"latents")
    assert worker.read(checkpoint) == b"latents"
    chunks = [chunk async for chunk in door.chunks(the_image(picture))]
    assert b"".join(chunks) == PNG
    assert max(len(chunk) for chunk in chunks) <= CHUNK_BYTES
    assert await door.listed("jobs", job_id[:3]) == sorted([picture, checkpoint])
    assert await door.size_bytes(f"jobs/{job_id}") == len(PNG) + len(b"latents")
    worker.delete(checkpoint)
    worker.delete(checkpoint)
    assert await door.listed("jobs", job_id[:3]) == [picture]
    await door.delete_job(job_id)
    await door.delete_job(job_id)
    assert await door.listed("jobs", "") == []
    with pytest.raises(outputs.ArtifactMissing):
        worker.read(checkpoint)
    with pytest.raises(PictureMissing):
        await anext(door.chunks(the_image(picture)))


async def test_a_picture_of_a_prompt_is_there_for_the_workers_when_the_door_has_put_it(url: str) -> None:
    worker, door = outputs.Artifacts(url), Artifacts(url)
    await door.put("pictures/abc.png", PNG)
    assert worker.read("pictures/abc.png") == PNG


async def test_a_store_that_is_away_is_trouble_and_not_a_missing_picture(
    s3: ThreadedMotoServer, url: str
) -> None:
    worker, door = outputs.Artifacts(url), Artifacts(url)
    s3.stop()
    with pytest.raises(outputs.ArtifactsUnavailable):
        worker.read("pictures/abc.png")
    with pytest.raises(Overloaded):
        await door.put("pictures/abc.png", PNG)


async def test_what_no_row_names_is_found_and_removed_there_as_well(door: Door, url: str) -> None:
    worker = outputs.Artifacts(url)
    job_id = str(uuid.uuid4())
    worker.put(f"{outputs.attempt_folder(job_id, 'lost')}/fox_1.png", PNG)
    orphans = Orphans(door.pool, Artifacts(url), door.metrics, lambda: datetime.now(UTC), WEEK)
    assert await orphans.sweep("") == Swept(noted=1, removed=())
    await door.sql("UPDATE scheduler.orphan_file SET since = since - interval '7 days' RETURNING 1")
    assert await orphans.sweep(job_id[:3]) == Swept(noted=0, removed=(f"jobs/{job_id}/",))
    assert await Artifacts(url).listed("jobs", "") == []
