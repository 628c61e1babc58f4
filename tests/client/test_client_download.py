"""Downloads: a file has its name only when it is complete and right."""

from __future__ import annotations

import os
from pathlib import Path

import grpc
import pytest

from scheduler.client.aio import DarkroomClient
from scheduler.client.errors import CannotSave, DownloadDamaged, ServiceFailed, SourceNotReady
from scheduler.v1.job_pb2 import DownloadImagesResponse
from tests.client.scripted_service import BUSY, JOB, UID, Refuse, ScriptedService, a_file

CONTENT = bytes(range(256)) * 12_000  # 3 MB, more than one block


def names_in(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


async def test_pictures_arrive_whole_under_their_names(
    service: ScriptedService, client: DarkroomClient, tmp_path: Path
) -> None:
    service.says("DownloadImages", [*a_file(1, CONTENT), *a_file(2, b"small")])
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
