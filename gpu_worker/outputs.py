"""Where pictures go: one folder, local or in any object store that fsspec opens.

A file is there whole or not at all. Paths are relative to the store's root and cannot leave it. Every
attempt writes under its own id, so that a worker that was given up and wakes again overwrites nothing.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

_PART = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


class ArtifactsUnavailable(Exception):
    """The store cannot be read or written at the moment."""


class ArtifactMissing(Exception):
    """There is no such file in the store."""


class PathOutsideStore(ValueError):
    """A path that is not plainly below the store's root."""


def attempt_folder(job_id: str, attempt_id: str) -> str:
    """Return the folder of everything one attempt delivers."""
    return f"jobs/{job_id}/{attempt_id}"


def checkpoint_path(job_id: str, attempt_id: str) -> str:
    """Return the file of an attempt's newest checkpoint: beside what it delivers, since it may outlive it."""
    return f"jobs/{job_id}/checkpoint-{attempt_id}.safetensors"


def image_name(job_id: str, file_stem: str, index: int) -> str:
    """Return the file name of picture `index`, 1 to 4."""
    return f"{job_id}_{file_stem}_{index}.png"


class Artifacts:
    """The store at `url`: a folder, or a URL such as `s3://bucket/prefix`. Any thread may call it."""

    def __init__(self, url: str) -> None:
        self._fs, self._root = url_to_fs(url)
        self._local = isinstance(self._fs, LocalFileSystem)

    def put(self, path: str, content: bytes) -> None:
        """Write a file whole, over one that may be there; durable when this returns.

        Raises ArtifactsUnavailable, and PathOutsideStore.
        """
        full_path = self._below_root(path)
        try:
            if self._local:
                _write_atomically(Path(full_path), content)
            else:
                # One object is written whole or not at all by every object store.
                self._fs.pipe_file(full_path, content)
        except Exception as error:
            raise ArtifactsUnavailable(f"cannot write {path}: {error}") from error

    def read(self, path: str) -> bytes:
        """Return a file's content. Raises ArtifactMissing, ArtifactsUnavailable and PathOutsideStore."""
        full_path = self._below_root(path)
        try:
            content = self._fs.cat_file(full_path)
        except FileNotFoundError as error:
            raise ArtifactMissing(path) from error
        except Exception as error:
            raise ArtifactsUnavailable(f"cannot read {path}: {error}") from error
        assert isinstance(content, bytes)
        return content

    def delete(self, path: str) -> None:
        """Delete a file, or a folder and all in it; it may be gone already.

        Raises ArtifactsUnavailable and PathOutsideStore.
        """
        full_path = self._below_root(path)
        try:
            self._fs.rm(full_path, recursive=True)
        except FileNotFoundError:
            return
        except Exception as error:
            raise ArtifactsUnavailable(f"cannot delete {path}: {error}") from error

    def _below_root(self, path: str) -> str:
        parts = path.split("/")
        if not all(_PART.fullmatch(part) for part in parts):
            raise PathOutsideStore(path)
        return "/".join([self._root.rstrip("/"), *parts])


def _write_atomically(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(dir=path.parent, prefix=".unfinished-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            # A job is reported as done on the strength of this file; it must outlive a power cut.
            os.fsync(file.fileno())
        # mkstemp's files are for their owner alone; the front door may run as somebody else.
        Path(unfinished).chmod(0o644)
        Path(unfinished).replace(path)
    except BaseException:
        Path(unfinished).unlink(missing_ok=True)
        raise
