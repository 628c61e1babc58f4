"""What a download sends: files, each with its header first, of a job or all of an account in one."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import TypeAlias

from gpu_worker.contract import ImageFile, VideoFile
from scheduler.frontdoor import archive, messages
from scheduler.frontdoor.artifacts import Artifacts
from scheduler.frontdoor.fields import JobName
from scheduler.refusals import NotFoundOrNotYours, PicturesExpired, SourceNotReady
from scheduler.store import accounts, jobs
from scheduler.store.jobs import JobState, StoredJob
from scheduler.store.pool import Pool
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

    async def of_account(self, account_id: str) -> File:
        """Return all pictures of an account as one file. Raises NotFoundOrNotYours or Overloaded."""
        async with self._pool.reading() as connection:
            if await accounts.settings(connection, account_id) is None:
                raise NotFoundOrNotYours
            counts = await jobs.with_pictures(connection, account_id)
        header = job_pb2.FileHeader(archive=messages.archive(account_id, sum(counts.values())))
        return header, archive.zipped(self._entries(account_id, list(counts)))

    async def _entries(self, account_id: str, arrivals: Sequence[int]) -> AsyncGenerator[archive.Entry, None]:
        for first in range(0, len(arrivals), _JOBS_AT_A_TIME):
            page = arrivals[first : first + _JOBS_AT_A_TIME]
            async with self._pool.reading() as connection:
                pictures = await jobs.pictures(connection, account_id, page)
            for picture in pictures:
                yield archive.Entry(name=picture.file_name, chunks=self._artifacts.chunks(picture))


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
