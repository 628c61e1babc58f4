"""Whatever trouble an artifact store has, its callers meet one refusal."""

from __future__ import annotations

from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from gpu_worker.contract import ImageFile
from scheduler.frontdoor.artifacts import Artifacts, PathOutsideStore
from scheduler.refusals import Overloaded

PICTURE = ImageFile(
    index=1,
    path="jobs/a/a_fox_1.png",
    file_name="a_fox_1.png",
    content_type="image/png",
    size_bytes=1,
    sha256="",
    width=1,
    height=1,
    seed=1,
)


class ClientError(Exception):
    """What the library of an object store raises; no OSError."""


class Troubled(MemoryFileSystem):  # type: ignore[misc]
    """An object store that answers nothing but errors of its library."""

    protocol = "troubled"

    def _open(self, *_: Any, **__: Any) -> Any:
        raise ClientError

    def pipe_file(self, *_: Any, **__: Any) -> None:
        raise ClientError

    def rm(self, *_: Any, **__: Any) -> None:
        raise ClientError


@pytest.fixture
def artifacts() -> Artifacts:
    fsspec.register_implementation("troubled", Troubled, clobber=True)
    return Artifacts("troubled://prompts")


async def test_trouble_of_an_object_store_is_a_refusal_to_try_again_after(artifacts: Artifacts) -> None:
    with pytest.raises(Overloaded):
        await artifacts.put("pictures/a.png", b"x")
    with pytest.raises(Overloaded):
        await anext(artifacts.chunks(PICTURE))
    with pytest.raises(Overloaded):
        await artifacts.delete("pictures/a.png")


async def test_a_path_that_leaves_the_store_is_a_bug_and_no_trouble_of_the_store(
    artifacts: Artifacts,
) -> None:
    with pytest.raises(PathOutsideStore):
        await artifacts.put("../a.png", b"x")
