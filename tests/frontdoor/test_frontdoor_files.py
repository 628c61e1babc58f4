"""What can be looked at and taken along: the feed, pictures, videos, and all of an account as one file."""

from __future__ import annotations

import hashlib
import io
import uuid
import zipfile

from scheduler.store.accounts import Role
from scheduler.v1 import job_pb2
from tests.frontdoor.door import Caller, Door, refusal

NOT_YOURS = "NOT_FOUND_OR_NOT_YOURS"


async def an_upscale(door: Door, caller: Caller, prompt: str = "a fox") -> job_pb2.Job:
    grid = await caller.create(prompt)
    await door.succeed(grid.uid)
    job = await caller.upscale(f"{grid.name}/images/1")
    await door.succeed(job.uid, [b"large"])
    return job


async def test_the_feed_shows_finished_public_upscales_of_all_without_money(door: Door) -> None:
    ann, ben = await door.caller("ann", plan="pro"), await door.caller("ben")
    older, newer = await an_upscale(door, ann), await an_upscale(door, ben)
    rerolled = await ann.reroll(older.name)
    await door.succeed(rerolled.uid, [b"large"])
    await an_upscale(door, ann, "a fox --private")
    await ben.reroll(newer.name)  # waits
    first = await ben.jobs.ListFeed(job_pb2.ListFeedRequest(page_size=1))
    second = await ben.jobs.ListFeed(job_pb2.ListFeedRequest(page_size=2, page_token=first.next_page_token))
    shown = [*first.jobs, *second.jobs]
    assert [job.uid for job in shown] == [rerolled.uid, newer.uid, older.uid]
    assert not second.next_page_token
    for job in shown:
        assert len(job.images) == 1
        assert job.upscale_algorithm == job_pb2.UPSCALE_ALGORITHM_DETAILED
        assert not job.HasField("price")
        assert not job.HasField("receipt")
        assert job.charge_mode == job_pb2.CHARGE_MODE_UNSPECIFIED


async def test_the_feed_shows_nobody_where_pictures_of_a_prompt_were(door: Door) -> None:
    ann, ben = await door.caller("ann"), await door.caller("ben")
    job = await an_upscale(door, ann)
    prompt = "  https://host/a.png?key=SECRET <HTTPS://host/b.png>,  a  fox\nin snow --uplight"
    await door.sql("UPDATE scheduler.job SET prompt = $1 RETURNING 1", prompt)
    (shown,) = (await ben.jobs.ListFeed(job_pb2.ListFeedRequest())).jobs
    assert shown.prompt == "a  fox\nin snow --uplight"
    assert (await ann.get(job.name)).prompt == prompt


async def test_the_feed_is_read_from_its_index(door: Door) -> None:
    ann = await door.caller("ann")
    await an_upscale(door, ann)
    async with door.pool.transaction() as connection:
        await connection.execute("SET LOCAL enable_seqscan = off; SET LOCAL enable_sort = off")
        plan = await connection.fetch(
            """EXPLAIN SELECT job_id FROM scheduler.job
               WHERE job.state = 'succeeded' AND visibility = 'public' AND deleted_at IS NULL
                     AND expired_at IS NULL
                     AND spec ->> 'kind' IN ('upscale_light', 'upscale_detailed', 'upscale_max')
               ORDER BY job.ended_at DESC, job.job_id LIMIT 25"""
        )
    assert any("job_feed" in row[0] for row in plan), plan


async def test_anybody_can_look_at_the_pictures_of_the_feed_and_at_nothing_else_of_the_job(
    door: Door,
) -> None:
    ann, ben = await door.caller("ann", plan="pro"), await door.caller("ben")
    public, private = await an_upscale(door, ann), await an_upscale(door, ann, "a fox --private")
    (shown,) = (await ben.jobs.ListFeed(job_pb2.ListFeedRequest())).jobs
    assert shown.uid == public.uid
    assert [content for _, content in await ben.download(shown.name)] == [b"large"]
    for call in (ben.get(shown.name), ben.download(private.name), ben.download(shown.source_job)):
        assert (await refusal(call)).reason == NOT_YOURS


async def test_pictures_come_in_pieces_with_their_checksum_first(door: Door) -> None:
    ann = await door.caller("ann")
    job = await ann.create()
    pictures = [bytes([index]) * (150_000 + index) for index in range(4)]
    await door.succeed(job.uid, pictures)
    files = await ann.download(job.name)
    assert [content for _, content in files] == pictures
    for image, content in files:
        assert image.size_bytes == len(content)
        assert image.sha256 == hashlib.sha256(content).hexdigest()
    ((image, content),) = await ann.download(f"{job.name}/images/3")
    assert (image.name, content) == (f"{job.name}/images/3", pictures[2])
    sent = door.metrics.registry.get_sample_value("darkroom_artifact_sent_bytes_total")
    assert sent == sum(map(len, pictures)) + len(pictures[2])


async def test_a_video_is_downloaded_by_its_format(door: Door) -> None:
    ann, ben = await door.caller("ann"), await door.caller("ben")
    job = await ann.create("a fox --video")
    await door.succeed(job.uid, videos={"video/mp4": b"moving", "image/webp": b"also moving"})
    videos = (await ann.get(job.name)).videos
    assert [video.name for video in videos] == [f"{job.name}/videos/mp4", f"{job.name}/videos/webp"]
    assert (videos[0].frames, videos[0].size_bytes) == (20, 6)
    for video, content in zip(videos, (b"moving", b"also moving"), strict=True):
        assert await ann.download(video.name) == [(video, content)]
        assert (await refusal(ben.download(video.name))).reason == NOT_YOURS
    assert len(await ann.download(job.name)) == 4  # the pictures alone


async def test_a_job_without_a_video_says_so(door: Door) -> None:
    ann = await door.caller("ann")
    job = await ann.create()
    await door.succeed(job.uid)
    refused = await refusal(ann.download(f"{job.name}/videos/mp4"))
    assert (refused.reason, refused.message) == ("SOURCE_NOT_READY", f"Job {job.uid} has no mp4 video.")


async def test_all_images_of_an_account_come_as_one_archive(door: Door) -> None:
    ann, ben = await door.caller("ann"), await door.caller("ben")
    mod = await door.caller("mod", role=Role.MODERATOR)
    one, two, waiting, of_ben = [await who.create() for who in (ann, ann, ann, ben)]
    await door.succeed(one.uid, [b"1" * 200_000, b"2"])
    await door.succeed(two.uid, [b"3"])
    await door.succeed(of_ben.uid)
    for caller, name in ((ann, "accounts/-"), (ann, "accounts/ann"), (mod, "accounts/ann")):
        ((archive, content),) = await caller.download(name)
        assert (archive.file_name, archive.content_type) == ("darkroom_ann.zip", "application/zip")
        assert archive.images == 3
        with zipfile.ZipFile(io.BytesIO(content)) as files:
            assert files.testzip() is None
            assert {name: files.read(name) for name in files.namelist()} == {
                f"{one.uid}_a_fox_1.png": b"1" * 200_000,
                f"{one.uid}_a_fox_2.png": b"2",
                f"{two.uid}_a_fox_1.png": b"3",
            }
    assert waiting.uid


async def test_an_archive_goes_on_behind_an_image(door: Door) -> None:
    ann = await door.caller("ann")
    one, gone, two = [await ann.create("a fox") for _ in range(3)]
    for job, pictures in ((one, [b"1", b"2", b"3"]), (gone, [b"4"]), (two, [b"5", b"6"])):
        await door.succeed(job.uid, pictures)
    await ann.delete(gone.name)

    async def names(after: str) -> tuple[bool, int, list[str]]:
        ((archive, content),) = await ann.download("accounts/-", after=after)
        with zipfile.ZipFile(io.BytesIO(content)) as files:
            assert files.testzip() is None
            return archive.rest, archive.images, [name.replace("_a_fox", "") for name in files.namelist()]

    of_one, of_two = [f"{one.uid}_{n}.png" for n in (1, 2, 3)], [f"{two.uid}_{n}.png" for n in (1, 2)]
    assert await names("") == (False, 5, of_one + of_two)
    assert await names(f"{one.name}/images/1") == (True, 4, of_one[1:] + of_two)
    assert await names(f"accounts/-/jobs/{one.uid}/images/3") == (True, 2, of_two)
    assert await names(f"{gone.name}/images/1") == (True, 2, of_two), (
        "it was there when the archive broke off"
    )
    assert await names(f"{two.name}/images/2") == (True, 0, [])


async def test_an_archive_goes_on_behind_nothing_but_an_image_of_its_account(door: Door) -> None:
    ann, ben = await door.caller("ann"), await door.caller("ben")
    job, of_ben = await ann.create("a fox"), await ben.create("a fox")
    await door.succeed(job.uid)
    for name, after in (
        ("accounts/-", job.name),
        ("accounts/-", f"{of_ben.name}/images/1"),
        (job.name, f"{job.name}/images/1"),
    ):
        assert "after" in (await refusal(ann.download(name, after=after))).violations, (name, after)
    unknown = await refusal(ann.download("accounts/-", after=f"accounts/-/jobs/{of_ben.uid}/images/1"))
    assert unknown.reason == NOT_YOURS


async def test_an_account_without_images_has_an_empty_archive(door: Door) -> None:
    ann = await door.caller("ann")
    ((archive, content),) = await ann.download("accounts/-")
    assert archive.images == 0
    assert zipfile.ZipFile(io.BytesIO(content)).namelist() == []


async def test_the_archive_of_another_account_is_none_of_your_business(door: Door) -> None:
    ann, mod = await door.caller("ann"), await door.caller("mod", role=Role.MODERATOR)
    await door.caller("ben")
    answers = [
        await refusal(ann.download("accounts/ben")),
        await refusal(ann.download("accounts/nobody")),
        await refusal(mod.download("accounts/nobody")),
        await refusal(ann.download(f"accounts/-/jobs/{uuid.uuid4()}/videos/mp4")),
    ]
    assert {answer.reason for answer in answers} == {NOT_YOURS}
    assert len({answer.raw for answer in answers}) == 1


async def test_names_of_nothing_that_can_be_downloaded_are_refused(door: Door) -> None:
    ann = await door.caller("ann")
    for name in (
        "",
        "x",
        "accounts/A",
        "accounts/ann/jobs/x/videos/mp4",
        f"accounts/-/jobs/{uuid.uuid4()}/videos/gif",
    ):
        refused = await refusal(ann.download(name))
        assert (refused.reason, refused.violations.keys()) == ("INVALID_PARAMETER", {"name"})
