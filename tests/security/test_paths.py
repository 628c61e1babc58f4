"""What is stored stays below the store's root, and what is sent unpacks where it was told to."""

from __future__ import annotations

import io
import uuid
import zipfile
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path

import fsspec
import pytest

from gpu_worker import outputs
from gpu_worker.contract import ImageFile
from scheduler.frontdoor.archive import Entry, UnsafeName, zipped
from scheduler.frontdoor.artifacts import Artifacts, PathOutsideStore
from scheduler.refusals import NotFoundOrNotYours
from scheduler.v1 import job_pb2
from tests.frontdoor.door import Door, refusal

OUTSIDE = [
    "",
    ".",
    "..",
    "/",
    "/etc/passwd",
    "//etc/passwd",
    "../secret",
    "jobs/../../secret",
    "jobs/a/..",
    "jobs//a",
    "jobs/./a",
    "jobs/a/",
    "jobs/a\0.png",
]
# Patterns to some stores; one of them deletes all that fits.
PATTERNS = ["jobs/*", "jobs/a?", "jobs/[a]", "**"]


def a_picture(path: str) -> ImageFile:
    return ImageFile(
        index=1,
        path=path,
        file_name="a.png",
        content_type="image/png",
        size_bytes=6,
        sha256="",
        width=1,
        height=1,
        seed=1,
    )


async def content(store: Artifacts, path: str) -> bytes:
    return b"".join([chunk async for chunk in store.chunks(a_picture(path))])


@pytest.mark.parametrize("path", [*OUTSIDE, *PATTERNS])
async def test_a_front_door_touches_nothing_outside_its_store(tmp_path: Path, path: str) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "store" / "jobs" / "a").mkdir(parents=True)
    store = Artifacts(f"file://{tmp_path}/store")
    with pytest.raises(PathOutsideStore):
        await content(store, path)
    with pytest.raises(PathOutsideStore):
        await store.put(path, b"mine")
    with pytest.raises(PathOutsideStore):
        await store.delete(path)
    assert (tmp_path / "secret").read_bytes() == b"secret"
    assert (tmp_path / "store" / "jobs" / "a").is_dir()


@pytest.mark.parametrize("path", [*OUTSIDE, *PATTERNS])
def test_a_worker_touches_nothing_outside_its_store(tmp_path: Path, path: str) -> None:
    store = outputs.Artifacts(str(tmp_path / "store"))
    for act in (lambda: store.put(path, b"mine"), lambda: store.read(path), lambda: store.delete(path)):
        with pytest.raises(outputs.PathOutsideStore):
            act()


@pytest.mark.parametrize("made", ["the file", "a folder above it", "a link to a link"])
async def test_a_link_out_of_the_store_brings_nothing_in(tmp_path: Path, made: str) -> None:
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    (secrets / "a.png").write_bytes(b"secret")
    folder = tmp_path / "store" / "jobs"
    folder.mkdir(parents=True)
    match made:
        case "the file":
            (folder / "b").mkdir()
            (folder / "b" / "a.png").symlink_to(secrets / "a.png")
        case "a folder above it":
            (folder / "b").symlink_to(secrets)
        case _:
            (folder / "c").symlink_to(secrets)
            (folder / "b").symlink_to(folder / "c")
    with pytest.raises(PathOutsideStore):
        await content(Artifacts(f"file://{tmp_path}/store"), "jobs/b/a.png")


async def test_a_store_that_is_a_link_itself_is_a_store(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "store").symlink_to(tmp_path / "disk")
    store = Artifacts(f"file://{tmp_path}/store")
    await store.put("jobs/b/a.png", b"a fox.")
    assert await content(store, "jobs/b/a.png") == b"a fox."


async def test_a_file_with_a_pattern_for_a_name_removes_no_other() -> None:
    files = fsspec.filesystem("memory")
    root = f"/{uuid.uuid4()}"
    for name in ("jobs/abc1/a.png", "jobs/abc2/a.png", "jobs/abc*", "pictures/abc.png"):
        files.pipe_file(f"{root}/{name}", b"x")
    store = Artifacts(f"memory:/{root}")
    assert await store.listed("jobs", "abc") == ["jobs/abc1/a.png", "jobs/abc2/a.png"]


async def _entry(name: str) -> AsyncIterator[Entry]:
    async def chunks() -> AsyncGenerator[bytes, None]:
        yield b"a fox."

    yield Entry(name=name, chunks=chunks())


@pytest.mark.parametrize(
    "name", ["../a.png", "/a.png", "a/b.png", "..", ".profile", "C:\\a.png", "..\\a.png", "a\0.png", ""]
)
async def test_an_archive_has_no_names_that_lead_elsewhere(name: str) -> None:
    with pytest.raises(UnsafeName):
        async for _ in zipped(_entry(name)):
            pass


async def test_names_of_an_archive_are_plain_whatever_the_prompt_was(door: Door) -> None:
    ann = await door.caller("ann")
    prompts = ["../../etc/passwd", "a\\b:c|d", "….//", "CON", "%2e%2e%2f", "ünïcode 🦊", "-rf ~", "fog" * 900]
    jobs = []
    for prompt in prompts:
        job = await ann.create(prompt)
        await door.start(job.uid)
        await door.succeed(job.uid)
        jobs.append(job)
    ((_, archive),) = await ann.download("accounts/-")
    with zipfile.ZipFile(io.BytesIO(archive)) as files:
        names = files.namelist()
    assert len(names) == 4 * len(prompts)
    assert {name[:36] for name in names} == {job.uid for job in jobs}
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_-.") for name in names)
    assert not any(".." in name for name in names)


NAMES_OF_OTHERS = [
    "accounts/ann/jobs/../jobs/{job}/images/1",
    "accounts/eve/../ann/jobs/{job}/images/1",
    "accounts/eve/jobs/{job}/images/1",
    "accounts/-/jobs/{job}/images/1",
    "accounts/-/jobs/{job}/videos/mp4",
    "accounts/ann/jobs/{job}",
    "accounts/ann",
    "accounts/ann/../../..",
    "accounts/-/jobs/{job}/images/../../secret",
    "accounts/-/jobs/{job}/images/1\0",
    "jobs/{job}/a.png",
    "file:///etc/passwd",
]


async def test_files_of_others_cannot_be_named(door: Door) -> None:
    ann, eve = await door.caller("ann", plan="pro"), await door.caller("eve")
    job = await ann.create("a fox --private")
    await door.start(job.uid)
    await door.succeed(job.uid)
    for name in NAMES_OF_OTHERS:
        call = eve.jobs.DownloadImages(job_pb2.DownloadImagesRequest(name=name.format(job=job.uid)))
        refused = await refusal(call.read())
        assert refused.reason in (NotFoundOrNotYours.reason, "INVALID_PARAMETER"), name
