"""What a download sends: files, each with its header first, of a job or all of an account in one."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from gpu_worker.contract import ImageFile, VideoFile
from scheduler.frontdoor import archive, messages
from scheduler.frontdoor.artifacts import Artifacts
from scheduler.frontdoor.fields import JobName
from scheduler.refusals import NotFoundOrNotYours, PicturesExpired, SourceNotReady
from scheduler.store import accounts, jobs
from scheduler.store.jobs import JobState, StoredJob
from scheduler.store.pool import Connection, Pool
from scheduler.v1 import job_pb2

# As many rows as one query reads for an archive: their pictures are sent before the next are looked up.
_JOBS_AT_A_TIME = 100

File: TypeAlias = tuple[job_pb2.FileHeader, AsyncGenerator[bytes, None]]
"""A file's header, and its bytes. They raise PictureMissing or Overloaded."""


class Downloads:
    """Files in the artifact store, by the rows that name them. Who may have them is decided before."""

    def __init__(self, pool: Pool, artifacts: Artifacts) -> None:
        self._pool = pool
        self._artifacts = artifacts

    def of_job(self, job: StoredJob, name: JobName) -> Iterator[File]:
        """Yield the picture or video of a job that is named, or all its pictures.

        Raises PicturesExpired or SourceNotReady.
        """
        if job.expired_at is not None:
            raise PicturesExpired(job_id=job.job_id, expired_at=job.expired_at)
        if name.video is not None:
            film = _video(job, name.video)
            yield job_pb2.FileHeader(video=messages.video(job, film)), self._artifacts.chunks(film)
            return
        for image in _pictures(job, name.image):
            yield job_pb2.FileHeader(image=messages.image(job, image)), self._artifacts.chunks(image)

    async def of_account(self, account_id: str, after: JobName | None = None) -> File:
        """Return all pictures of an account, or those that come after one, as one file.

        Raises NotFoundOrNotYours, also where the one was never there, or Overloaded.
        """
        async with self._pool.reading() as connection:
            if await accounts.settings(connection, account_id) is None:
                raise NotFoundOrNotYours
            counts = await jobs.with_pictures(connection, account_id)
            place = None if after is None else await _place(connection, account_id, after)
        if place is not None:
            counts = {arrival: left for arrival, had in counts.items() if (left := place.left(arrival, had))}
        described = messages.archive(account_id, sum(counts.values()), rest=place is not None)
        entries = self._entries(account_id, list(counts), place)
        return job_pb2.FileHeader(archive=described), archive.zipped(entries)

    async def _entries(
        self, account_id: str, arrivals: Sequence[int], after: _Place | None
    ) -> AsyncGenerator[archive.Entry, None]:
        for first in range(0, len(arrivals), _JOBS_AT_A_TIME):
            page = arrivals[first : first + _JOBS_AT_A_TIME]
            async with self._pool.reading() as connection:
                pictures = await jobs.pictures(connection, account_id, page)
            for picture in pictures:
                if after is not None and after.has(picture):
                    continue
                yield archive.Entry(name=picture.file_name, chunks=self._artifacts.chunks(picture))


@dataclass(frozen=True, kw_only=True)
class _Place:
    """A picture's place in an archive."""

    arrival: int
    job_id: str
    index: int

    def left(self, arrival: int, pictures: int) -> int:
        """Return how many of a job's pictures come after it."""
        if arrival < self.arrival:
            return 0
        return max(0, pictures - self.index) if arrival == self.arrival else pictures

    def has(self, picture: ImageFile) -> bool:
        """Return whether a picture of that job comes no later; of the jobs behind it none does."""
        return picture.file_name.startswith(self.job_id) and picture.index <= self.index


async def _place(connection: Connection, account_id: str, name: JobName) -> _Place:
    arrival = await jobs.arrival(connection, account_id, name.job_id)
    assert name.image is not None, "it is the name of an image"
    if arrival is None:
        raise NotFoundOrNotYours
    return _Place(arrival=arrival, job_id=name.job_id, index=name.image)


def _pictures(job: StoredJob, index: int | None) -> Sequence[ImageFile]:
    """Return one picture of a job, or all; raises SourceNotReady if there is none such."""
    chosen = [image for image in job.images if index in (None, image.index)]
    if job.state is not JobState.SUCCEEDED or not chosen:
        what = "pictures" if index is None else f"picture {index}"
        raise SourceNotReady(job_id=job.job_id, state=job.state.value, what=what)
    return chosen


def _video(job: StoredJob, wanted: str) -> VideoFile:
    """Return the video of that name; raises SourceNotReady if there is none such."""
    for film in job.videos:
        if messages.video_id(film) == wanted:
            return film
    raise SourceNotReady(job_id=job.job_id, state=job.state.value, what=f"{wanted} video")
