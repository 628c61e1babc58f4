"""The artifact store: whole files, and nothing outside its root."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from gpu_worker.outputs import ArtifactMissing, Artifacts, ArtifactsUnavailable, PathOutsideStore


def test_what_was_put_is_read_and_put_again_replaces(tmp_path: Path) -> None:
    store = Artifacts(str(tmp_path / "store"))
    store.put("jobs/a/b/c.png", b"one")
    store.put("jobs/a/b/c.png", b"two")
    assert store.read("jobs/a/b/c.png") == b"two"
    assert [path.name for path in (tmp_path / "store/jobs/a/b").iterdir()] == ["c.png"]


def test_the_same_in_an_object_store() -> None:
    store = Artifacts(f"memory://{uuid.uuid4()}")
    store.put("jobs/a/b/c.png", b"one")
    assert store.read("jobs/a/b/c.png") == b"one"
    store.delete("jobs/a")
    with pytest.raises(ArtifactMissing):
        store.read("jobs/a/b/c.png")


def test_a_deleted_folder_is_gone_and_deleting_it_again_is_harmless(tmp_path: Path) -> None:
    store = Artifacts(str(tmp_path))
    store.put("jobs/a/b/c.png", b"one")
    store.put("jobs/a/other/c.png", b"two")
    store.delete("jobs/a/b")
    store.delete("jobs/a/b")
    with pytest.raises(ArtifactMissing):
        store.read("jobs/a/b/c.png")
    assert store.read("jobs/a/other/c.png") == b"two"


@pytest.mark.parametrize(
    "path", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "a/./b", ".hidden", "a\\b", "a\0b", "~/x"]
)
def test_no_path_leaves_the_root(tmp_path: Path, path: str) -> None:
    store = Artifacts(str(tmp_path / "store"))
    for act in (lambda: store.put(path, b""), lambda: store.read(path), lambda: store.delete(path)):
        with pytest.raises(PathOutsideStore):
            act()


def test_a_store_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ArtifactsUnavailable, match=r"cannot write a/b\.png"):
        Artifacts(str(tmp_path / "file")).put("a/b.png", b"")
