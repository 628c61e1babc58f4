"""Making pictures from the command line: uploads, upscales, redo; then deleting, receipts, verifying."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import grpc
import pytest
from typer.testing import Result

from scheduler.client import uploads
from scheduler.client.aio import DarkroomClient
from scheduler.client.errors import PictureNotSendable
from scheduler.client.terminal import kind_word
from scheduler.v1 import job_pb2
from scheduler.v1.job_pb2 import DeleteJobResponse, Estimate, Job, ListJobsResponse, Receipt
from tests.client.scripted_service import (
    JOB,
    UID,
    Refuse,
    ScriptedService,
    a_file,
    a_job,
    a_png,
    a_video,
    an_event,
    an_image,
)
from tests.client.typed_commands import darkroom

AGAIN = "9f0c51d2-2fa1-4d3b-9f0c-1b4e28baa6e8"
SOURCE = f"accounts/-/jobs/{UID}"
PICTURE = a_png((10, 20, 30))
SUCCEEDED = job_pb2.JOB_STATE_SUCCEEDED
LIGHT, DETAILED, LARGEST = (
    job_pb2.UPSCALE_ALGORITHM_LIGHT,
    job_pb2.UPSCALE_ALGORITHM_DETAILED,
    job_pb2.UPSCALE_ALGORITHM_MAX,
)


@pytest.fixture
def environment(environment: dict[str, str]) -> dict[str, str]:
    return {**environment, "COLUMNS": "80"}


def submitted(service: ScriptedService, environment: dict[str, str], *arguments: str) -> Any:
    """What a command asks for, that does not wait."""
    service.says("CreateJob", a_job())
    result = darkroom(environment, *arguments, "--no-wait")
    assert result.exit_code == 0, result.output
    return service.asked("CreateJob")[-1]


# Uploads


def test_pictures_travel_with_the_prompt_in_their_order(
    service: ScriptedService, environment: dict[str, str], in_folder: Path
) -> None:
    contents = [PICTURE, b"\xff\xd8\xffjpeg", b"RIFF\0\0\0\0WEBPVP8 "]
    for number, content in enumerate(contents):
        Path(f"{number}.bin").write_bytes(content)
    files = [word for number in range(3) for word in ("--image", f"{number}.bin")]
    request = submitted(service, environment, "imagine", *files, "a", "cat", "--iw", "-0.5", "--seed", "7")
    assert list(request.imagine.pictures) == contents
    assert request.imagine.prompt == "a cat --iw -0.5 --seed 7"


def test_pictures_are_part_of_what_is_estimated_and_tried(
    service: ScriptedService, environment: dict[str, str], in_folder: Path
) -> None:
    Path("cat.png").write_bytes(PICTURE)
    service.says("CreateJob", a_job())
    service.says("EstimateJob", Estimate())
    assert darkroom(environment, "imagine", "--image", "cat.png", "a cat", "--dry-run").exit_code == 0
    assert darkroom(environment, "estimate", "--image", "cat.png", "a cat").exit_code == 0
    tried, estimated = service.asked("CreateJob")[0], service.asked("EstimateJob")[0].create
    assert list(tried.imagine.pictures) == list(estimated.imagine.pictures) == [PICTURE]
    assert tried.validate_only


def test_what_cannot_be_sent_is_named_all_at_once_and_nothing_is_sent(
    service: ScriptedService, environment: dict[str, str], in_folder: Path
) -> None:
    Path("notes.txt").write_text("a cat, drawn", encoding="utf-8")
    Path("large.png").write_bytes(PICTURE + bytes(uploads.MAX_BYTES))
    files = [word for name in ("notes.txt", "large.png", "gone.png") for word in ("--image", name)]
    result = darkroom(environment, "imagine", *files, "a cat")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[:3] == [
        "notes.txt: It is neither a PNG nor a JPEG nor a WebP picture.",
        "large.png: It is larger than 3.9 MB.",
        "gone.png: It cannot be read: No such file or directory.",
    ]
    assert "1024 pixels" in result.stderr
    assert service.requests == {}


async def test_pictures_that_are_too_large_together_are_not_sent(
    service: ScriptedService, client: DarkroomClient
) -> None:
    half = PICTURE + bytes(uploads.MAX_BYTES // 2)
    with pytest.raises(PictureNotSendable, match="2 pictures together: They have 3,900"):
        await client.imagine("a cat", pictures=[half, half])
    assert service.requests == {}


async def test_as_much_as_may_be_sent_fits_into_a_message(
    service: ScriptedService, client: DarkroomClient
) -> None:
    """The scripted service takes messages of 4 MiB, as the real one does."""
    service.says("CreateJob", a_job())
    largest = PICTURE + bytes(uploads.MAX_BYTES - len(PICTURE))
    await client.imagine("\N{ELEPHANT}" * 6_000, pictures=[largest])
    assert service.asked("CreateJob")[0].imagine.pictures[0] == largest


def test_the_help_of_imagine_shows_the_prompt_language(environment: dict[str, str]) -> None:
    text = darkroom(environment, "imagine", "--help").stdout
    for syntax in (
        "food::-1",
        "https://",
        "--image",
        "--iw",
        "--no ",
        "--w 256",
        "--ar 3:2",
        "--seed",
        "--stop 80",
    ):
        assert syntax in text
    assert "--video              also a short video of how the grid came to be" in text


def test_parameters_of_the_prompt_need_no_options_of_their_own(
    service: ScriptedService, environment: dict[str, str]
) -> None:
    words = "hot dog::2 food::-1 --stop 80 --video --uplight --ar 3:2 --no trees"
    assert submitted(service, environment, "imagine", *words.split()).imagine.prompt == words


# From pictures that were made before


@pytest.mark.parametrize(
    "words",
    [
        (UID, "2"),
        (f"{UID}/2",),
        (f"{UID}_a_lighthouse_2.png",),
        (f"{UID}_a_lighthouse_4.png", "2"),
    ],
)
def test_a_variation_starts_from_the_picture_that_is_named(
    service: ScriptedService, environment: dict[str, str], words: tuple[str, ...]
) -> None:
    request = submitted(service, environment, "vary", *words)
    assert (request.variation.source_image, request.variation.strong) == (f"{SOURCE}/images/2", False)


def test_a_strong_variation_is_asked_for(service: ScriptedService, environment: dict[str, str]) -> None:
    assert submitted(service, environment, "vary", UID, "2", "--strong").variation.strong


@pytest.mark.parametrize(
    ("options", "algorithm"),
    [
        ((), job_pb2.UPSCALE_ALGORITHM_UNSPECIFIED),
        (("--light",), LIGHT),
        (("--detailed",), DETAILED),
        (("--max", "--fast"), LARGEST),
    ],
)
def test_an_upscale_names_its_algorithm_or_leaves_it_to_the_source(
    service: ScriptedService,
    environment: dict[str, str],
    options: tuple[str, ...],
    algorithm: job_pb2.UpscaleAlgorithm,
) -> None:
    request = submitted(service, environment, "upscale", UID, "3", *options)
    assert (request.upscale.source_image, request.upscale.algorithm) == (f"{SOURCE}/images/3", algorithm)
    assert request.tier == (job_pb2.TIER_FAST if "--fast" in options else job_pb2.TIER_UNSPECIFIED)


@pytest.mark.parametrize(
    "words",
    [
        ("vary", UID),
        ("upscale", UID),
        ("upscale", UID, "5"),
        ("upscale", UID, "1", "--light", "--max"),
        ("download",),
        ("download", UID, "--all"),
        ("download", UID, "--to", "a.zip"),
    ],
)
def test_what_is_not_understood_exits_2(
    service: ScriptedService, environment: dict[str, str], words: tuple[str, ...]
) -> None:
    assert darkroom(environment, *words).exit_code == 2
    assert service.requests == {}


@pytest.mark.parametrize(("was", "becomes"), [(LIGHT, DETAILED), (DETAILED, LIGHT), (LARGEST, LIGHT)])
def test_redo_of_an_upscale_takes_the_other_algorithm_on_the_same_picture(
    service: ScriptedService,
    environment: dict[str, str],
    was: job_pb2.UpscaleAlgorithm,
    becomes: job_pb2.UpscaleAlgorithm,
) -> None:
    upscaled = a_job(
        kind=job_pb2.JOB_KIND_UPSCALE, upscale_algorithm=was, source_job=JOB, source_image=3, uid=AGAIN
    )
    service.says("GetJob", upscaled)
    request = submitted(service, environment, "redo", AGAIN, "--relax")
    assert (request.upscale.source_image, request.upscale.algorithm) == (f"{JOB}/images/3", becomes)
    assert request.tier == job_pb2.TIER_RELAX


def test_redo_of_a_rerolled_upscale_takes_the_other_algorithm_too(
    service: ScriptedService, environment: dict[str, str]
) -> None:
    upscaled = a_job(
        kind=job_pb2.JOB_KIND_UPSCALE, upscale_algorithm=DETAILED, source_job=JOB, source_image=3, uid=AGAIN
    )
    again = a_job(kind=job_pb2.JOB_KIND_REROLL, upscale_algorithm=DETAILED, source_job=upscaled.name)
    service.says("GetJob", again, upscaled)
    request = submitted(service, environment, "redo", UID)
    assert (request.upscale.source_image, request.upscale.algorithm) == (f"{JOB}/images/3", LIGHT)


def test_redo_of_a_private_upscale_of_a_public_grid_stays_private(
    service: ScriptedService, environment: dict[str, str]
) -> None:
    private = a_job(
        kind=job_pb2.JOB_KIND_UPSCALE,
        upscale_algorithm=LIGHT,
        source_job=JOB,
        source_image=3,
        visibility=job_pb2.VISIBILITY_PRIVATE,
    )
    service.says("GetJob", private, private)
    assert submitted(service, environment, "redo", UID).visibility == job_pb2.VISIBILITY_PRIVATE
    assert submitted(service, environment, "redo", UID, "--public").visibility == job_pb2.VISIBILITY_PUBLIC


@pytest.mark.parametrize(
    "kind", [job_pb2.JOB_KIND_IMAGINE, job_pb2.JOB_KIND_VARIATION, job_pb2.JOB_KIND_REROLL]
)
def test_redo_of_anything_else_is_a_reroll(
    service: ScriptedService, environment: dict[str, str], kind: job_pb2.JobKind
) -> None:
    service.says("GetJob", a_job(kind=kind))
    request = submitted(service, environment, "redo", UID)
    assert (request.reroll.source_job, request.reroll.exact) == (SOURCE, False)


def test_videos_are_saved_and_only_pictures_are_shown(
    service: ScriptedService, environment: dict[str, str], in_folder: Path
) -> None:
    video = a_video("mp4", b"moving")
    done = an_event(3, SUCCEEDED, videos=[video])
    moving = [
        job_pb2.DownloadImagesResponse(header=job_pb2.FileHeader(video=video)),
        job_pb2.DownloadImagesResponse(chunk=b"moving"),
    ]
    service.says("CreateJob", a_job())
    service.says("WatchJob", [done])
    service.says("DownloadImages", a_file(1, PICTURE), moving)
    service.says("GetJob", done.event.job)
    result = darkroom(environment, "imagine", "a lighthouse --video", "--pictures")
    assert result.exit_code == 0, result.output
    assert "38;2;10;20;30" in result.stdout
    assert f"darkroom-images/{video.file_name}" in result.stdout.splitlines()
    assert (in_folder / "darkroom-images" / video.file_name).read_bytes() == b"moving"


def test_a_kind_is_said_with_its_algorithm(service: ScriptedService, environment: dict[str, str]) -> None:
    job = a_job(kind=job_pb2.JOB_KIND_UPSCALE, upscale_algorithm=LIGHT)
    assert kind_word(a_job(kind=job_pb2.JOB_KIND_VARIATION)) == "variation"
    service.says("ListJobs", ListJobsResponse(jobs=[job]))
    service.says("GetJob", job, job)
    service.says("WatchJob", [an_event(3, SUCCEEDED)])
    assert darkroom(environment, "jobs").stdout.split("\t")[2] == "upscale (light)"
    assert "kind\tupscale (light)" in darkroom(environment, "show", UID).stdout.splitlines()
    assert "upscale (light): a lighthouse\n" in darkroom(environment, "watch", UID).stderr


@pytest.mark.parametrize(
    ("refuse", "said"),
    [
        (
            Refuse(
                code=grpc.StatusCode.FAILED_PRECONDITION, reason="FAST_ONLY", sentence="Max is fast only."
            ),
            ["Max is fast only.", "--fast", "--detailed"],
        ),
        (
            Refuse(
                code=grpc.StatusCode.INVALID_ARGUMENT,
                reason="PICTURE_UNREADABLE",
                sentence="It is a page.",
                violations={"https://host/a": "It is a page."},
            ),
            ["https://host/a: It is a page.", "direct link", "--image FILE"],
        ),
    ],
)
def test_refusals_of_pictures_and_upscales_say_what_to_do(
    service: ScriptedService, environment: dict[str, str], refuse: Refuse, said: list[str]
) -> None:
    service.says("CreateJob", refuse)
    result = darkroom(environment, "upscale", UID, "1", "--max")
    assert result.exit_code == 1
    for words in said:
        assert words in result.stderr


# Deleting


def test_delete_asks_first_and_says_what_it_will_delete(
    service: ScriptedService, environment: dict[str, str]
) -> None:
    job = a_job(images=[an_image(1, b"1"), an_image(2, b"2")])
    service.says("GetJob", job, job, job)
    service.says("DeleteJob", DeleteJobResponse())
    for answer in ("n\n", ""):
        result = darkroom(environment, "delete", UID, stdin=answer)
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.endswith("Nothing was deleted.\n")
    assert service.asked("DeleteJob") == []
    result = darkroom(environment, "delete", UID, stdin="y\n")
    assert f"Delete imagine {UID} (a lighthouse) and its 2 pictures for good?" in result.stderr
    assert (result.exit_code, result.stdout) == (0, f"{UID} deleted\n")
    (request,) = service.asked("DeleteJob")
    assert request.name == SOURCE
    assert request.request_id


def test_delete_can_be_told_not_to_ask(service: ScriptedService, environment: dict[str, str]) -> None:
    service.says("DeleteJob", DeleteJobResponse(), DeleteJobResponse())
    assert darkroom(environment, "delete", SOURCE, "--yes").exit_code == 0
    assert json.loads(darkroom(environment, "delete", UID, "-y", "--json").stdout) == {"deleted": UID}
    assert {request.name for request in service.asked("DeleteJob")} == {SOURCE}


@pytest.mark.parametrize("part", [f"{UID}/2", f"{UID}_a_lighthouse_2.png", f"{UID}/mp4"])
def test_a_name_of_one_picture_does_not_delete_its_whole_job(
    service: ScriptedService, environment: dict[str, str], part: str
) -> None:
    result = darkroom(environment, "delete", part, "--yes")
    assert result.exit_code == 2
    assert "give its id alone" in result.stderr
    assert not service.asked("DeleteJob")


def test_a_job_that_runs_is_not_deleted(service: ScriptedService, environment: dict[str, str]) -> None:
    refuse = Refuse(code=grpc.StatusCode.FAILED_PRECONDITION, reason="JOB_NOT_FINISHED", sentence="It runs.")
    service.says("DeleteJob", refuse)
    result = darkroom(environment, "delete", UID, "--yes")
    assert result.exit_code == 1
    assert "darkroom cancel JOB" in result.stderr


# Receipts and verifying

RECORD = {
    "device": "NVIDIA H200",
    "dtype": "bfloat16",
    "image_seeds": [7, 8],
    "steps": 20,
    "text": [{"share_ppm": 1_000_000, "text": "größer"}],
    "versions": {"torch": "2.13.0", "diffusers": "0.42.1"},
}


def made(uid: str = UID, *, content: bytes = PICTURE, worker: str = "node-a/gpu-0", **record: object) -> Job:
    receipt = Receipt(
        gpu_ms=3_400,
        denoise_ms=3_000,
        upscale_ms=400,
        attempts=2,
        worker=worker,
        reproduction_json=json.dumps(RECORD | record, sort_keys=True),
    )
    return a_job(
        name=f"accounts/ada/jobs/{uid}",
        uid=uid,
        state=SUCCEEDED,
        event_sequence=3,
        receipt=receipt,
        visibility=job_pb2.VISIBILITY_PRIVATE,
        images=[an_image(1, PICTURE, seed=7), an_image(2, content)],
    )


def test_a_receipt_has_every_line_of_the_record(
    service: ScriptedService, environment: dict[str, str]
) -> None:
    service.says("GetJob", made())
    result = darkroom(environment, "show", UID, "--receipt")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[-8:] == [
        "record device\tNVIDIA H200",
        "record dtype\tbfloat16",
        "record image_seeds\t[7, 8]",
        "record steps\t20",
        "record text.1.share_ppm\t1000000",
        "record text.1.text\tgrößer",
        "record versions.diffusers\t0.42.1",
        "record versions.torch\t2.13.0",
    ]
    assert "GPU time\t3.4 s: denoise 3.0 s, upscale 0.4 s" in lines
    assert f"picture 1\t0×0, seed 7, SHA-256 {an_image(1, PICTURE).sha256}" in lines
    assert "worker\tnode-a/gpu-0" in lines


def test_a_receipt_as_json_has_the_record_as_an_object(
    service: ScriptedService, environment: dict[str, str]
) -> None:
    service.says("GetJob", made())
    document = json.loads(darkroom(environment, "show", UID, "--receipt", "--json").stdout)
    assert document["record"] == RECORD
    assert document["receipt"]["gpuMs"] == "3400"
    assert [image["sha256"] for image in document["images"]] == [an_image(1, PICTURE).sha256] * 2


@pytest.mark.parametrize("words", [("show", UID, "--receipt"), ("verify", UID)])
def test_a_job_that_has_not_ended_has_neither_receipt_nor_pictures_to_compare(
    service: ScriptedService, environment: dict[str, str], words: tuple[str, ...]
) -> None:
    service.says("GetJob", a_job())
    result = darkroom(environment, *words)
    assert result.exit_code == 1
    assert "is queued" in result.stderr
    assert service.asked("CreateJob") == []


def verified(
    service: ScriptedService, environment: dict[str, str], again: Job, *options: str
) -> tuple[Result, Any]:
    service.says("GetJob", made())
    service.says("CreateJob", a_job(name=again.name, uid=again.uid))
    event = job_pb2.StateEvent(sequence=3, state=SUCCEEDED, job=again)
    service.says("WatchJob", [job_pb2.WatchJobResponse(event=event)])
    return darkroom(environment, "verify", UID, *options), service.asked("CreateJob")[0]


def test_the_same_bits_again_exit_0(service: ScriptedService, environment: dict[str, str]) -> None:
    result, request = verified(service, environment, made(AGAIN))
    assert result.exit_code == 0, result.output
    assert (request.reroll.source_job, request.reroll.exact) == (SOURCE, True)
    assert request.visibility == job_pb2.VISIBILITY_PRIVATE  # what is private is not made again in public
    sha256 = an_image(1, PICTURE).sha256
    assert result.stdout.splitlines() == [f"picture {n}\tequal\t{sha256}\t" for n in (1, 2)]
    assert AGAIN in result.stderr


def test_other_bits_exit_5_with_what_was_different_in_how_they_were_made(
    service: ScriptedService, environment: dict[str, str]
) -> None:
    again = made(
        AGAIN,
        content=b"other",
        worker="node-b/gpu-0",
        device="cpu",
        versions={"torch": "2.14.0", "diffusers": "0.42.1"},
    )
    result, _ = verified(service, environment, again)
    assert result.exit_code == 5
    first, second = an_image(2, PICTURE).sha256, an_image(2, b"other").sha256
    assert [line.split("\t") for line in result.stdout.splitlines()] == [
        ["picture 1", "equal", first, ""],
        ["picture 2", "different", first, second],
        ["worker", "different", "node-a/gpu-0", "node-b/gpu-0"],
        ["device", "different", "NVIDIA H200", "cpu"],
        ["versions.torch", "different", "2.13.0", "2.14.0"],
    ]


def test_a_missing_picture_is_different_and_equal_records_ask_for_a_report(
    service: ScriptedService, environment: dict[str, str]
) -> None:
    again = made(AGAIN)
    del again.images[1]
    result, _ = verified(service, environment, again)
    assert result.exit_code == 5
    assert result.stdout.splitlines()[1].endswith("\tmissing")
    assert "Report it" in result.stderr


def test_verifying_as_json_is_one_document(service: ScriptedService, environment: dict[str, str]) -> None:
    result, _ = verified(service, environment, made(AGAIN, content=b"other", dtype="float16"), "--json")
    assert result.exit_code == 5
    document = json.loads(result.stdout)
    assert (document["job"], document["again"], document["equal"]) == (UID, AGAIN, False)
    assert [picture["equal"] for picture in document["pictures"]] == [True, False]
    assert document["differences"] == [{"what": "dtype", "first": "bfloat16", "again": "float16"}]


def test_a_job_that_fails_the_second_time_exits_4(
    service: ScriptedService, environment: dict[str, str]
) -> None:
    service.says("GetJob", made())
    service.says("CreateJob", a_job(name=f"accounts/ada/jobs/{AGAIN}", uid=AGAIN))
    service.says("WatchJob", [an_event(2, job_pb2.JOB_STATE_FAILED)])
    assert darkroom(environment, "verify", UID).exit_code == 4


# Everything at once


def test_the_archive_of_an_account_goes_where_it_is_told(
    service: ScriptedService, environment: dict[str, str], in_folder: Path
) -> None:
    empty_zip = b"PK\x05\x06" + bytes(18)
    archive = [
        job_pb2.DownloadImagesResponse(header=job_pb2.FileHeader(archive=job_pb2.Archive(file_name="a.zip"))),
        job_pb2.DownloadImagesResponse(chunk=empty_zip),
    ]
    service.says("DownloadImages", archive, archive)
    assert darkroom(environment, "download", "--all").stdout == "darkroom-images/a.zip\n"
    told = darkroom(environment, "download", "--all", "--to", "backup/mine.zip", "--json")
    assert json.loads(told.stdout) == {"files": ["backup/mine.zip"]}
    assert (in_folder / "backup" / "mine.zip").read_bytes() == empty_zip


def test_download_takes_one_picture_or_video_by_name(
    service: ScriptedService, environment: dict[str, str], in_folder: Path
) -> None:
    service.says("DownloadImages", *[a_file(2, PICTURE)] * 3)
    for words in ((UID, "2"), (f"{UID}/2",), (f"{UID}/mp4",)):
        assert darkroom(environment, "download", *words).exit_code == 0
    names = [request.name.removeprefix(SOURCE) for request in service.asked("DownloadImages")]
    assert names == ["/images/2", "/images/2", "/videos/mp4"]
