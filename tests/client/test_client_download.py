"""Downloads: a file has its name only when it is complete and right."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path
from typing import Any

import grpc
import pytest

from scheduler.client.aio import DarkroomClient, RetryPolicy
from scheduler.client.errors import CannotSave, DownloadDamaged, Overloaded, ServiceFailed, SourceNotReady
from scheduler.v1.job_pb2 import Archive, DownloadImagesResponse, FileHeader
from tests.client.scripted_service import (
    BUSY,
    JOB,
    UID,
    Refuse,
    ScriptedService,
    a_file,
    a_job,
    a_video,
)

CONTENT = bytes(range(256)) * 12_000  # 3 MB, more than one block


def names_in(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


async def test_pictures_arrive_whole_under_their_names(
    service: ScriptedService, client: DarkroomClient, tmp_path: Path
) -> None:
    service.says("DownloadImages", [*a_file(1, CONTENT), *a_file(2, b"small")])
    service.says("GetJob", a_job())
    paths = await client.download(UID, tmp_path / "new" / "folder")
    assert [path.name for path in paths] == [f"{UID}_a-lighthouse_1.png", f"{UID}_a-lighthouse_2.png"]
    assert [path.read_bytes() for path in paths] == [CONTENT, b"small"]
    assert names_in(paths[0].parent) == sorted(path.name for path in paths)


async def test_one_picture_is_asked_for_by_its_number(
    service: ScriptedService, client: DarkroomClient, tmp_path: Path
) -> None:
    service.says("DownloadImages", a_file(3, b"picture"))
    await client.download(JOB, tmp_path, image=3)
    assert service.asked("DownloadImages")[0].name == f"{JOB}/images/3"


async def test_a_broken_download_starts_its_unfinished_file_again(
    service: ScriptedService, client: DarkroomClient, tmp_path: Path
) -> None:
    half = a_file(2, CONTENT)[:20]
    service.says(
        "DownloadImages",
        [*a_file(1, b"first"), *half, BUSY],
        [*a_file(1, b"first"), *a_file(2, CONTENT), *a_file(3, b"third")],
    )
    service.says("GetJob", a_job())
    paths = await client.download(UID, tmp_path)
    assert [path.read_bytes() for path in paths] == [b"first", CONTENT, b"third"]
    assert len(names_in(tmp_path)) == 3


@pytest.mark.parametrize("wrong", [{"sha256": "0" * 64}, {"size_bytes": 8}], ids=["checksum", "size"])
async def test_a_damaged_picture_is_not_saved_and_the_old_one_stays(
    service: ScriptedService, client: DarkroomClient, tmp_path: Path, wrong: dict[str, object]
) -> None:
    old = tmp_path / f"{UID}_a-lighthouse_1.png"
    old.write_bytes(b"as it was")
    service.says("DownloadImages", a_file(1, b"picture", **wrong))
    with pytest.raises(DownloadDamaged):
        await client.download(UID, tmp_path)
    assert old.read_bytes() == b"as it was"
    assert names_in(tmp_path) == [old.name]


@pytest.mark.parametrize("name", ["../escaped.png", "/tmp/escaped.png", ".profile", "", "a\x1b[2J.png"])
async def test_a_service_cannot_write_outside_the_folder(
    service: ScriptedService, client: DarkroomClient, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "inside"
    service.says("DownloadImages", a_file(1, b"picture", file_name=name))
    with pytest.raises(ServiceFailed, match="not a file name"):
        await client.download(UID, folder)
    assert names_in(folder) == []
    assert names_in(tmp_path) == [folder.name]


async def test_bytes_without_a_header_are_the_services_mistake(
    service: ScriptedService, client: DarkroomClient, tmp_path: Path
) -> None:
    service.says("DownloadImages", [DownloadImagesResponse(chunk=b"what is this")])
    with pytest.raises(ServiceFailed):
        await client.download(UID, tmp_path)


async def test_a_job_without_pictures_is_refused_as_the_service_says(
    service: ScriptedService, client: DarkroomClient, tmp_path: Path
) -> None:
    service.says(
        "DownloadImages", [Refuse(code=grpc.StatusCode.FAILED_PRECONDITION, reason="SOURCE_NOT_READY")]
    )
    with pytest.raises(SourceNotReady):
        await client.download(UID, tmp_path)


async def test_a_folder_that_cannot_be_written_is_said(
    service: ScriptedService, client: DarkroomClient, tmp_path: Path
) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_bytes(b"")
    with pytest.raises(CannotSave, match="file"):
        await client.download(UID, in_the_way)


# Videos


def a_video_file(kind: str, content: bytes) -> list[DownloadImagesResponse]:
    header = DownloadImagesResponse(header=FileHeader(video=a_video(kind, content)))
    return [header, DownloadImagesResponse(chunk=content)]


async def test_videos_of_a_job_are_saved_beside_its_pictures(
    service: ScriptedService, client: DarkroomClient, tmp_path: Path
) -> None:
    service.says("GetJob", a_job(videos=[a_video("mp4", b"moving"), a_video("webp", b"moving too")]))
    service.says(
        "DownloadImages",
        a_file(1, b"picture"),
        a_video_file("mp4", b"moving"),
        a_video_file("webp", b"moving too"),
    )
    paths = await client.download(UID, tmp_path)
    assert [path.name for path in paths] == [
        f"{UID}_a-lighthouse{end}" for end in ("_1.png", ".mp4", ".webp")
    ]
    assert [path.read_bytes() for path in paths] == [b"picture", b"moving", b"moving too"]
    names = [request.name for request in service.asked("DownloadImages")]
    assert names == [f"accounts/-/jobs/{UID}", f"{JOB}/videos/mp4", f"{JOB}/videos/webp"]


async def test_a_damaged_video_is_not_saved(
    service: ScriptedService, client: DarkroomClient, tmp_path: Path
) -> None:
    header, _ = a_video_file("mp4", b"moving")
    service.says("DownloadImages", [header, DownloadImagesResponse(chunk=b"mowing")])
    with pytest.raises(DownloadDamaged):
        await client.download(f"{JOB}/videos/mp4", tmp_path)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        (f"{JOB}/images/2", f"{JOB}/images/2"),
        (f"{UID}/2", f"accounts/-/jobs/{UID}/images/2"),
        (f"pictures/{UID}_a-lighthouse_2.png", f"accounts/-/jobs/{UID}/images/2"),
    ],
)
async def test_a_name_of_one_picture_gets_that_picture(
    service: ScriptedService, client: DarkroomClient, tmp_path: Path, name: str, asked: str
) -> None:
    service.says("DownloadImages", a_file(2, b"picture"))
    assert len(await client.download(name, tmp_path)) == 1
    assert service.asked("DownloadImages")[0].name == asked


async def test_a_picture_of_the_feed_can_be_had_although_its_job_is_not_ours_to_see(
    service: ScriptedService, client: DarkroomClient, tmp_path: Path
) -> None:
    service.says("DownloadImages", a_file(1, b"picture"))
    refuse = Refuse(code=grpc.StatusCode.PERMISSION_DENIED, reason="NOT_FOUND_OR_NOT_YOURS")
    service.says("GetJob", refuse)
    (path,) = await client.download("accounts/ben/jobs/" + UID, tmp_path)
    assert path.read_bytes() == b"picture"


# Everything at once


class Sent(io.RawIOBase):
    """What a service sends of a ZIP while it makes it: nothing can be put right afterwards."""

    def __init__(self) -> None:
        self.content = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        self.content += content
        return len(content)


def an_archive(
    pictures: dict[str, bytes], file_name: str = "ada.zip", *, rest: bool = False
) -> list[DownloadImagesResponse]:
    sent = Sent()
    with zipfile.ZipFile(sent, "w") as archive:
        for name, picture in pictures.items():
            archive.writestr(name, picture)
    content = bytes(sent.content)
    announced = Archive(file_name=file_name, content_type="application/zip", images=len(pictures), rest=rest)
    return [
        DownloadImagesResponse(header=FileHeader(archive=announced)),
        *(DownloadImagesResponse(chunk=content[at : at + 50]) for at in range(0, len(content), 50)),
    ]


PICTURES = {f"{UID}_a-lighthouse_{n}.png": bytes([n]) * 100 for n in (1, 2)}


async def test_an_account_comes_as_one_archive_under_the_services_name_or_ones_own(
    service: ScriptedService, client: DarkroomClient, tmp_path: Path
) -> None:
    service.says("DownloadImages", an_archive(PICTURES), an_archive(PICTURES))
    theirs = await client.download_all(tmp_path)
    ours = await client.download_all(tmp_path / "new", file_name="mine.zip")
    assert (theirs, ours) == (tmp_path / "ada.zip", tmp_path / "new" / "mine.zip")
    with zipfile.ZipFile(ours) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == PICTURES
    assert {request.name for request in service.asked("DownloadImages")} == {"accounts/-"}


def files_of(path: Path) -> dict[str, bytes]:
    """Return the files of an archive in their order, each checked against its checksum."""
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        return {name: archive.read(name) for name in archive.namelist()}


# Some look at parts like the end of another: the signature that stands behind a file.
MANY = {f"{UID}_a-lighthouse_{n}.png": b"PK\x07\x08" * 20 + bytes([n]) * 100 for n in (1, 2, 3, 4)}


async def test_an_archive_that_breaks_off_goes_on_behind_the_last_picture_that_is_whole(
    service: ScriptedService, client: DarkroomClient, tmp_path: Path
) -> None:
    names = list(MANY)
    last = an_archive({name: MANY[name] for name in names[3:]}, rest=True)
    service.says(
        "DownloadImages",
        [*an_archive(MANY)[:8], BUSY],
        [*an_archive({name: MANY[name] for name in names[1:]}, rest=True)[:13], BUSY],
        [*last[:-1], BUSY],
        an_archive({}, rest=True),
    )
    path = await client.download_all(tmp_path)
    assert list(files_of(path).items()) == list(MANY.items())
    asked = [request.after.rpartition("/images/")[2] for request in service.asked("DownloadImages")]
    assert asked == ["", "1", "3", "4"]
    assert names_in(tmp_path) == ["ada.zip"]


async def test_a_note_in_place_of_a_lost_picture_counts_as_that_picture(
    service: ScriptedService, client: DarkroomClient, tmp_path: Path
) -> None:
    first, second = PICTURES
    note = {f"{first}.missing.txt": b"It is lost."}
    service.says(
        "DownloadImages",
        [*an_archive(note | {second: PICTURES[second]})[:6], BUSY],
        an_archive({second: PICTURES[second]}, rest=True),
    )
    assert list(files_of(await client.download_all(tmp_path))) == [*note, second]
    assert service.asked("DownloadImages")[1].after == f"accounts/-/jobs/{UID}/images/1"


@pytest.mark.parametrize("names", [list(PICTURES), ["a.png", "b.png"]], ids=["older", "other names"])
async def test_an_archive_of_a_service_that_cannot_go_on_begins_again(
    service: ScriptedService, client: DarkroomClient, tmp_path: Path, names: list[str]
) -> None:
    pictures = dict(zip(names, PICTURES.values(), strict=True))
    service.says("DownloadImages", [*an_archive(pictures)[:7], BUSY], an_archive(pictures))
    assert files_of(await client.download_all(tmp_path)) == pictures
    assert names_in(tmp_path) == ["ada.zip"]


async def test_an_archive_waits_for_a_service_that_restarts_as_a_watch_does(
    service: ScriptedService, client: DarkroomClient, pauses: list[float], tmp_path: Path
) -> None:
    away = [[BUSY]] * (RetryPolicy().stream_times - 1)
    service.says("DownloadImages", [*an_archive(PICTURES)[:7], BUSY], *away, an_archive(PICTURES))
    assert files_of(await client.download_all(tmp_path)) == PICTURES
    # Systemd takes up to ten seconds to stop a front door and start the next.
    assert sum(pauses) > 10


async def test_an_archive_that_is_given_up_leaves_nothing(service: ScriptedService, tmp_path: Path) -> None:
    service.says("DownloadImages", [*an_archive(PICTURES)[:7], BUSY], [BUSY])
    async with DarkroomClient(
        service.address, "dk_ada", retries=RetryPolicy(times=1, stream_times=1, first_ms=1)
    ) as client:
        with pytest.raises(Overloaded):
            await client.download_all(tmp_path)
    assert names_in(tmp_path) == []


async def test_an_archive_that_lacks_its_end_is_not_saved_and_the_old_one_stays(
    service: ScriptedService, client: DarkroomClient, tmp_path: Path
) -> None:
    (tmp_path / "ada.zip").write_bytes(b"as it was")
    service.says("DownloadImages", an_archive(PICTURES)[:-1])
    with pytest.raises(DownloadDamaged, match="ZIP"):
        await client.download_all(tmp_path)
    assert (tmp_path / "ada.zip").read_bytes() == b"as it was"
    assert names_in(tmp_path) == ["ada.zip"]


async def test_the_name_of_an_archive_cannot_lead_out_of_the_folder(
    service: ScriptedService, client: DarkroomClient, tmp_path: Path
) -> None:
    service.says("DownloadImages", an_archive(PICTURES, "../escaped.zip"))
    with pytest.raises(ServiceFailed, match="not a file name"):
        await client.download_all(tmp_path / "inside")
    assert names_in(tmp_path / "inside") == []


async def test_a_file_of_an_unknown_kind_is_the_services_mistake(
    service: ScriptedService, client: DarkroomClient, tmp_path: Path
) -> None:
    service.says("DownloadImages", [DownloadImagesResponse(header=FileHeader())])
    with pytest.raises(ServiceFailed, match="without saying what it is"):
        await client.download(UID, tmp_path)
