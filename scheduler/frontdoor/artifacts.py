"""The artifact store, off the event loop: finished files go out in pieces, pictures of prompts come in."""

from __future__ import annotations

import asyncio
import os
import re
import uuid
from collections.abc import AsyncGenerator
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from gpu_worker.contract import ImageFile, VideoFile
from scheduler.refusals import Overloaded, PictureMissing

# A gRPC message may have 4 MB by default, and flow control counts in 64 KB.
CHUNK_BYTES = 64 * 1024

_PATTERN = re.compile(r"[\x00*?\[\]]")


class PathOutsideStore(ValueError):
    """A path that is not plainly below the store's root. Ours are made of ids: it is a bug, or an attack."""


class Artifacts:
    """The artifact store at an fsspec address. Overloaded is any trouble that it has.

    Paths are relative to its root and cannot leave it: PathOutsideStore is raised for those that would.
    """

    def __init__(self, url: str) -> None:
        self._files, self._root = fsspec.core.url_to_fs(url)

    async def chunks(self, wanted: ImageFile | VideoFile) -> AsyncGenerator[bytes, None]:
        """Yield a file's bytes, up to 64 KiB at a time. Raises PictureMissing or Overloaded."""
        path = self._below_root(wanted.path)
        try:
            file = await asyncio.to_thread(self._open, path)
            try:
                while chunk := await asyncio.to_thread(file.read, CHUNK_BYTES):
                    yield chunk
            finally:
                await asyncio.to_thread(file.close)
        except FileNotFoundError as missing:
            raise PictureMissing(file_name=wanted.file_name) from missing
        except PathOutsideStore:
            raise
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

    async def listed(self, folder: str, prefix: str) -> list[str]:
        """Return the paths of all files in a folder whose path in there begins with `prefix`. Raises
        Overloaded.

        The prefix is of a name in the folder itself, and keeps short what is read of a large one: of an
        object store that can search by it, and of a local folder.
        """
        try:
            return await asyncio.to_thread(self._listed, folder, prefix)
        except Exception as away:
            raise _away() from away

    def _listed(self, folder: str, prefix: str) -> list[str]:
        root = self._below_root(folder)
        if isinstance(self._files, LocalFileSystem):
            found = _files_in(Path(root), prefix)
        else:
            # What somebody else wrote or removed meanwhile is not in what was listed before.
            self._files.invalidate_cache()
            try:
                found = self._files.find(root, prefix=prefix)
            except FileNotFoundError:
                found = []
        # Stores that cannot search by it return all there is. Names that nothing here would write are
        # somebody else's, who must not have other files removed by calling one `*`.
        paths = [f"{folder}/{path.removeprefix(f'{root}/')}" for path in found]
        return sorted(path for path in paths if path.startswith(f"{folder}/{prefix}") and _is_plain(path))

    async def size_bytes(self, path: str) -> int:
        """Return the size of a file, or of all in a folder; 0: there is no such thing. Raises Overloaded."""
        full_path = self._below_root(path)
        try:
            return await asyncio.to_thread(self._size_bytes, full_path)
        except Exception as away:
            raise _away() from away

    def _size_bytes(self, path: str) -> int:
        if isinstance(self._files, LocalFileSystem):
            return _size_bytes(path)
        self._files.invalidate_cache()
        try:
            return sum(found["size"] or 0 for found in self._files.find(path, detail=True).values())
        except FileNotFoundError:
            return 0

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

    def _below_root(self, path: str) -> str:
        if not _is_plain(path):
            raise PathOutsideStore(path)
        return f"{self._root}/{path}"

    def _open(self, path: str) -> Any:
        # Workers write to the store as well. A link that one of them, taken over by whatever it draws, put
        # there must not bring files of this machine to whoever asks for the picture.
        if isinstance(self._files, LocalFileSystem) and not _is_below(Path(path), Path(self._root)):
            raise PathOutsideStore(path)
        return self._files.open(path, "rb")


def _is_plain(path: str) -> bool:
    # With brackets, stars and question marks a path is a pattern to some stores, which delete all it fits.
    return not _PATTERN.search(path) and all(part not in ("", ".", "..") for part in path.split("/"))


def _is_below(path: Path, root: Path) -> bool:
    return path.resolve().is_relative_to(root.resolve())


def _away() -> Overloaded:
    return Overloaded(sentence="The artifact store does not answer at the moment; try again.")


def _files_in(folder: Path, prefix: str) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            chosen = [entry for entry in entries if entry.name.startswith(prefix)]
    except FileNotFoundError:
        return []
    found = [entry.path for entry in chosen if not entry.is_dir(follow_symlinks=False)]
    for entry in chosen:
        # A folder that somebody removes meanwhile has nothing in it.
        for inner, _, names in os.walk(entry.path) if entry.is_dir(follow_symlinks=False) else ():
            found += [f"{inner}/{name}" for name in names]
    return found


def _size_bytes(path: str) -> int:
    # A link has a size of its own: what it leads to is not ours.
    paths = [path]
    if Path(path).is_dir() and not Path(path).is_symlink():
        paths = [f"{folder}/{name}" for folder, _, names in os.walk(path) for name in names]
    size_bytes = 0
    for each in paths:
        with suppress(FileNotFoundError):  # somebody deletes there at the same time
            size_bytes += os.lstat(each).st_size
    return size_bytes


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
