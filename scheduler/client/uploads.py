"""Pictures that go along with a prompt: read, and looked at before anything is sent.

The service decides what a picture is; what is refused here is only what it could never take, so that nobody
waits for megabytes to travel before hearing it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from scheduler.client.errors import Details, PictureNotSendable, Violation

MAX_BYTES = 3_900_000
"""Of all pictures of one request: the service takes messages of 4 MiB, and the prompt is in there too."""

_SIGNATURES = ((0, b"\x89PNG\r\n\x1a\n"), (0, b"\xff\xd8\xff"), (8, b"WEBP"))


async def contents(pictures: Sequence[Path | bytes]) -> list[bytes]:
    """Return the bytes of files, and bytes as they are, in order.

    Raises PictureNotSendable, naming all of them that cannot be read, are neither PNG, JPEG nor WebP, or are
    too large together.
    """
    return await asyncio.to_thread(_contents, pictures) if pictures else []


def _contents(pictures: Sequence[Path | bytes]) -> list[bytes]:
    found: list[bytes] = []
    wrong: list[Violation] = []
    for number, picture in enumerate(pictures, start=1):
        name = str(picture) if isinstance(picture, Path) else f"picture {number}"
        try:
            # A file is read no further than what shows that it is too large.
            content = picture if isinstance(picture, bytes) else _beginning(picture)
        except OSError as failure:
            wrong.append(Violation(field=name, sentence=f"It cannot be read: {failure.strerror}."))
            continue
        if not any(content.startswith(mark, at) for at, mark in _SIGNATURES):
            wrong.append(Violation(field=name, sentence="It is neither a PNG nor a JPEG nor a WebP picture."))
        elif len(content) > MAX_BYTES:
            wrong.append(Violation(field=name, sentence=f"It is larger than {MAX_BYTES / 1e6:.1f} MB."))
        found.append(content)
    together = sum(map(len, found))
    if not wrong and together > MAX_BYTES:
        sentence = f"They have {together:,} bytes; at most {MAX_BYTES:,} can be sent at once."
        wrong.append(Violation(field=f"{len(found)} pictures together", sentence=sentence))
    if wrong:
        raise PictureNotSendable(" ".join(each.sentence for each in wrong), Details(violations=tuple(wrong)))
    return found


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MAX_BYTES + 1)
