"""Files that no row names: noted, removed when noted long enough, and never one that somebody needs."""

from __future__ import annotations

import subprocess
import sys
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from gpu_worker import outputs
from scheduler.frontdoor.artifacts import Artifacts
from scheduler.frontdoor.deletions import Deletions
from scheduler.frontdoor.orphans import Orphan, Orphans, Swept
from scheduler.refusals import Overloaded
from scheduler.v1 import job_pb2
from tests.frontdoor.door import Caller, Door, a_png

WEEK = timedelta(days=7)


def orphans_of(door: Door) -> Orphans:
    artifacts = Artifacts(f"file://{door.artifacts}")
    return Orphans(door.pool, artifacts, door.metrics, lambda: datetime.now(UTC), WEEK)


async def days_pass(door: Door, days: float) -> None:
    """Let what is noted be so for longer."""
    await door.sql(
        """WITH older AS (UPDATE scheduler.orphan_file SET since = since - $1::interval RETURNING 1)
           SELECT count(*) FROM older""",
        timedelta(days=days),
    )


def swept(*removed: str, noted: int = 0) -> Swept:
    return Swept(noted=noted, removed=removed)


async def noted(door: Door) -> list[str]:
    return list(
        await door.sql("SELECT coalesce(array_agg(path ORDER BY path), '{}') FROM scheduler.orphan_file")
    )


def counted(door: Door) -> dict[str, float]:
    """Return what was counted of orphans, by what became of them."""
    (family,) = door.metrics.orphans.collect()
    return {
        sample.labels["result"]: sample.value
        for sample in family.samples
        if sample.name.endswith("_total") and sample.value
    }


def write(door: Door, path: str) -> str:
    (door.artifacts / path).parent.mkdir(parents=True, exist_ok=True)
    (door.artifacts / path).write_bytes(b"x")
    return path


def files(door: Door) -> set[str]:
    return {str(path.relative_to(door.artifacts)) for path in door.artifacts.rglob("*") if path.is_file()}


async def a_finished_job(door: Door, ann: Caller) -> job_pb2.Job:
    job = await ann.create("a fox --video")
    await door.start(job.uid)
    await door.succeed(job.uid, videos={"video/mp4": b"moving"})
    write(door, f"jobs/{job.uid}/latents.safetensors")
    return job


async def test_what_no_row_names_goes_when_it_was_noted_for_a_week(door: Door) -> None:
    ann = await door.caller("ann")
    job = await a_finished_job(door, ann)
    needed = files(door)
    left = [
        # Of an attempt that was lost after it had stored everything, with what it was about to write.
        *(
            write(door, f"{outputs.attempt_folder(job.uid, 'lost')}/{name}")
            for name in ("a.png", ".unfinished-b")
        ),
        write(door, outputs.checkpoint_path(job.uid, "lost")),
    ]
    orphans = orphans_of(door)
    assert await orphans.sweep("") == swept(noted=3)
    assert await noted(door) == sorted(left)
    await days_pass(door, 6.9)
    assert await orphans.sweep("") == swept()
    assert files(door) == needed | set(left)
    await days_pass(door, 0.1)
    assert await orphans.sweep("") == swept(*sorted(left))
    assert files(door) == needed
    assert await noted(door) == []
    assert counted(door) == {"noted": 3, "removed": 3}
    assert door.metrics.registry.get_sample_value("darkroom_orphan_removed_bytes_total") == 3


async def test_a_folder_of_a_job_that_the_database_does_not_know_goes_as_one(door: Door) -> None:
    unknown = str(uuid.uuid4())
    for name in ("picture.png", "latents.safetensors"):
        write(door, f"{outputs.attempt_folder(unknown, 'first')}/{name}")
    orphans = orphans_of(door)
    await orphans.sweep("")
    assert await noted(door) == [f"jobs/{unknown}/"]
    await days_pass(door, 7)
    # What a link leads to is not in the folder.
    (door.artifacts / "jobs" / unknown / "link").symlink_to("/usr")
    assert await orphans.sweep(unknown[:3]) == swept(f"jobs/{unknown}/")
    assert not (door.artifacts / "jobs" / unknown).exists()
    assert counted(door) == {"noted": 1, "removed": 1}
    size_bytes = door.metrics.registry.get_sample_value("darkroom_orphan_removed_bytes_total")
    assert size_bytes == len(b"x") * 2


async def test_what_a_live_job_has_in_the_store_is_never_noted(door: Door) -> None:
    ann = await door.caller("ann")
    waiting, running = await ann.create("one"), await ann.create("two")
    attempt_id = await door.start(running.uid)
    for job in (waiting, running):
        write(door, outputs.checkpoint_path(job.uid, "before"))
    write(door, f"{outputs.attempt_folder(running.uid, attempt_id)}/.unfinished-c")
    await orphans_of(door).sweep("")
    assert await noted(door) == []


async def test_what_a_deletion_left_is_the_deletions_until_that_is_done(door: Door) -> None:
    ann = await door.caller("ann")
    source = await a_finished_job(door, ann)
    varied = await ann.vary(f"{source.name}/images/1")
    await ann.delete(source.name)
    orphans = orphans_of(door)
    await orphans.sweep("")
    assert await noted(door) == [], "a live job starts from them"
    await ann.cancel(varied.name)
    await door.sql("UPDATE scheduler.job SET files_due_at = NULL RETURNING 1")
    write(door, f"{outputs.attempt_folder(source.uid, 'zombie')}/late.png")
    await orphans.sweep("")
    assert await noted(door) == [f"jobs/{source.uid}/"]


async def test_what_is_named_again_is_noted_no_more(door: Door) -> None:
    ann = await door.caller("ann")
    job = await a_finished_job(door, ann)
    before = await door.sql("SELECT row_to_json(job)::text FROM scheduler.job")
    await door.sql("UPDATE scheduler.job SET images = '[]', videos = NULL, latents_path = NULL RETURNING 1")
    orphans = orphans_of(door)
    await orphans.sweep("")
    assert len(await noted(door)) == 6
    await days_pass(door, 100)
    # Somebody restored the right backup.
    await door.sql(
        """UPDATE scheduler.job SET (images, videos, latents_path) = (
               SELECT images, videos, latents_path FROM jsonb_populate_record(NULL::scheduler.job, $1))
           RETURNING 1""",
        before,
    )
    assert await orphans.sweep("") == swept()
    assert await noted(door) == []
    assert len(await ann.download(job.name)) == 4


async def test_pictures_of_prompts_that_no_job_has_are_strays_after_a_week(door: Door) -> None:
    ann = await door.caller("ann")
    await ann.create("a fox", model="seeing", pictures=[a_png(1)])
    (used,) = files(door)
    lost = write(door, f"pictures/{'a' * 64}.png")
    broken = write(door, "pictures/.unfinished-d")
    await forget_strays(door)
    orphans = orphans_of(door)
    for prefix in ("", "000", "aaa"):
        await orphans.sweep(prefix)
        assert await noted(door) == [broken, lost]
    # Longer than strays are kept: somebody who restored the wrong backup has a week to notice.
    await days_pass(door, 6.9)
    assert await orphans.sweep("") == swept()
    await sweep_strays(door)
    assert files(door) == {used, lost, broken}
    await days_pass(door, 0.1)
    assert await orphans.sweep("000") == swept(broken)
    assert await orphans.sweep("aaa") == swept(lost)
    assert await noted(door) == []
    assert files(door) == {used, lost}, "strays have a sweep of their own"
    assert counted(door) == {"noted": 2, "removed": 1, "stray": 1}
    await sweep_strays(door)
    assert files(door) == {used}
    assert await orphans.sweep("") == swept()


async def test_a_picture_of_a_prompt_that_a_job_has_again_is_kept(door: Door) -> None:
    ann = await door.caller("ann")
    job = await ann.create("a fox", model="seeing", pictures=[a_png(1)])
    (picture,) = files(door)
    await ann.cancel(job.name)
    await ann.delete(job.name)
    await forget_strays(door)
    orphans = orphans_of(door)
    assert await orphans.sweep("") == swept(noted=1)
    await days_pass(door, 100)
    await ann.create("a cat", model="seeing", pictures=[a_png(1)])
    await sweep_strays(door)
    assert await orphans.sweep("") == swept()
    assert await noted(door) == []
    assert files(door) == {picture}


async def forget_strays(door: Door) -> None:
    await door.sql("WITH gone AS (DELETE FROM scheduler.stray_picture RETURNING 1) SELECT count(*) FROM gone")


async def sweep_strays(door: Door) -> None:
    """Let an hour pass for strays, and remove them."""
    await door.sql(
        """WITH older AS (UPDATE scheduler.stray_picture SET since = since - interval '61 min' RETURNING 1)
           SELECT count(*) FROM older"""
    )
    await Deletions(door.pool, Artifacts(f"file://{door.artifacts}"), lambda: datetime.now(UTC)).sweep()


async def test_what_is_not_ours_is_left_alone(door: Door) -> None:
    others = {
        write(door, path)
        for path in ("README", "backup/x", "jobs/README", "jobs/not-an-id/x", f"jobs/{'A' * 32}/x")
    }
    orphans = orphans_of(door)
    await orphans.sweep("")
    await days_pass(door, 100)
    assert await orphans.sweep("") == swept()
    assert files(door) == others


async def test_a_part_is_read_alone(door: Door) -> None:
    first, second = (f"{letter}{str(uuid.uuid4())[1:]}" for letter in "ab")
    for job_id in (first, second):
        write(door, f"jobs/{job_id}/x")
    orphans = orphans_of(door)
    await orphans.sweep("a")
    assert await noted(door) == [f"jobs/{first}/"]
    await orphans.sweep("b")
    assert await noted(door) == [f"jobs/{first}/", f"jobs/{second}/"]


class Away(Artifacts):
    async def delete(self, path: str) -> None:
        raise Overloaded(sentence=f"{path} is away")


async def test_what_two_front_doors_remove_at_once_is_counted_once(door: Door) -> None:
    write(door, f"jobs/{uuid.uuid4()}/x")
    write(door, "pictures/" + "a" * 64 + ".png")
    quicker = orphans_of(door)
    await quicker.sweep("")
    await days_pass(door, 7)

    class Slower(Artifacts):
        async def delete(self, path: str) -> None:
            await quicker.sweep("")
            await super().delete(path)

    artifacts = Slower(f"file://{door.artifacts}")
    await Orphans(door.pool, artifacts, door.metrics, lambda: datetime.now(UTC), WEEK).sweep("")
    assert counted(door) == {"noted": 2, "removed": 1, "stray": 1}
    assert door.metrics.registry.get_sample_value("darkroom_orphan_removed_bytes_total") == 1


async def test_what_cannot_be_removed_stays_noted(door: Door) -> None:
    unknown = write(door, f"jobs/{uuid.uuid4()}/x")
    await orphans_of(door).sweep("")
    await days_pass(door, 7)
    store = Away(f"file://{door.artifacts}")
    away = Orphans(door.pool, store, door.metrics, lambda: datetime.now(UTC), WEEK)
    with pytest.raises(Overloaded):
        await away.sweep("")
    assert await noted(door) == [unknown.removesuffix("x")]


async def test_a_dry_run_tells_and_changes_nothing(door: Door, dsn: str) -> None:
    ann = await door.caller("ann")
    job = await a_finished_job(door, ann)
    due = write(door, outputs.checkpoint_path(job.uid, "due"))
    orphans = orphans_of(door)
    await orphans.sweep("")
    await days_pass(door, 7)
    young = write(door, outputs.checkpoint_path(job.uid, "young"))
    picture = write(door, f"pictures/{'b' * 64}.png")
    before = files(door), await noted(door)
    told = [orphan async for orphan in orphans.found("")]
    assert told == [
        Orphan(path=due, is_due=True),
        Orphan(path=young, is_due=False),
        Orphan(path=picture, is_due=False),
    ]
    assert (files(door), await noted(door)) == before


def test_the_command_says_what_it_would_do_and_does_it(tmp_path: Path, database: str) -> None:
    unknown = uuid.uuid4()
    (tmp_path / "jobs" / str(unknown)).mkdir(parents=True)
    (tmp_path / "jobs" / str(unknown) / "x").touch()

    def command(*more: str) -> str:
        given = ("sweep-artifacts", "--dsn", database, "--artifacts-url", f"file://{tmp_path}", *more)
        return subprocess.run(
            [sys.executable, "-m", "scheduler", *given],
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
        ).stdout

    assert command("--dry-run") == f"would be noted: jobs/{unknown}/\n"
    assert command() == "noted, to be removed in 7 days unless a row names them: 1\n"


async def test_a_store_without_folders_is_read_too() -> None:
    store = Artifacts("memory://bucket/below")
    for path in ("jobs/ab/x.png", "jobs/ab/inner/y.png", "jobs/ac/z.png", "pictures/ab.png"):
        await store.put(path, b"x")
    try:
        assert await store.listed("jobs", "ab") == ["jobs/ab/inner/y.png", "jobs/ab/x.png"]
        assert await store.listed("jobs", "") == ["jobs/ab/inner/y.png", "jobs/ab/x.png", "jobs/ac/z.png"]
        assert await store.listed("nothing", "") == []
    finally:
        MemoryFileSystem.store.clear()
