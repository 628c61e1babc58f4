"""The artifact store, off the event loop: finished files go out in pieces, pictures of prompts come in."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import AsyncGenerator
from pathlib import Path, PurePosixPath

import fsspec
from fsspec.implementations.local import LocalFileSystem

from gpu_worker.contract import ImageFile, VideoFile
from scheduler.refusals import Overloaded, PictureMissing

# A gRPC message may have 4 MB by default, and flow control counts in 64 KB.
CHUNK_BYTES = 64 * 1024


class Artifacts:
    """The artifact store at an fsspec address. Overloaded is any trouble that it has."""

    def __init__(self, url: str) -> None:
        self._files, self._root = fsspec.core.url_to_fs(url)

    async def chunks(self, wanted: ImageFile | VideoFile) -> AsyncGenerator[bytes, None]:
        """Yield a file's bytes, up to 64 KiB at a time. Raises PictureMissing or Overloaded."""
        path = self._below_root(wanted.path)
        try:
            file = await asyncio.to_thread(self._files.open, path, "rb")
            try:
                while chunk := await asyncio.to_thread(file.read, CHUNK_BYTES):
                    yield chunk
            finally:
                await asyncio.to_thread(file.close)
        except FileNotFoundError as missing:
            raise PictureMissing(file_name=wanted.file_name) from missing
        except Exception as away:
            # Object stores have errors of their own libraries.
            raise _away() from away

    async def put(self, path: str, content: bytes) -> None:
        """Write a file whole, over one that may be there; durable when this returns. Raises Overloaded."""
        full_path = self._below_root(path)
        try:
            await asyncio.to_thread(self._put, full_path, content)
        except Exception as away:
            raise _away() from away

    def _put(self, full_path: str, content: bytes) -> None:
        if isinstance(self._files, LocalFileSystem):
            _write_atomically(Path(full_path), content)
        else:
            # One object is written whole or not at all by every object store.
            self._files.pipe_file(full_path, content)

    async def delete_job(self, job_id: str) -> None:
        """Delete everything that any attempt at a job has stored. Raises Overloaded."""
        # What gpu_worker/outputs.py calls an attempt's folder, and its checkpoints, are all in here.
        await self.delete(f"jobs/{job_id}")

    async def delete(self, path: str) -> None:
        """Delete a file, or a folder and all in it; it may be gone already. Raises Overloaded."""
        full_path = self._below_root(path)
        try:
            await asyncio.to_thread(self._delete, full_path)
        except Exception as away:
            raise _away() from away

    def _delete(self, path: str) -> None:
        try:
            self._files.rm(path, recursive=True)
        except FileNotFoundError:
            # It is gone, or somebody deletes there at the same time.
            if self._files.exists(path):
                raise

    def _below_root(self, text: str) -> str:
        path = PurePosixPath(text)
        assert not path.is_absolute(), path
        assert ".." not in path.parts, path
        return f"{self._root}/{path}"


def _away() -> Overloaded:
    return Overloaded(sentence="The artifact store does not answer at the moment; try again.")


def _write_atomically(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".unfinished-{uuid.uuid4()}")
    try:
        with unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            # A job is accepted on the strength of this file; it must outlive a power cut.
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
