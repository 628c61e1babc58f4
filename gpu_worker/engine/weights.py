"""What files a model's weights are in, by content: two that are equal draw equal pictures."""

from __future__ import annotations

import hashlib
from pathlib import Path


def files_sha256(folder: Path, *names: str) -> str:
    """Return one hash over the names and contents of a folder's files, or of those it has under `names`."""
    places = [folder / name for name in names] or [folder]
    files = {file for place in places for file in (place, *place.rglob("*")) if file.is_file()}
    whole = hashlib.sha256()
    for path in sorted(files):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        whole.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return whole.hexdigest()
