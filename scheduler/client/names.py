"""Resource names, from what people type or paste.

A job is accepted as its UUID, as a resource name, as the name of a file that was saved of it, or as anything
a call returned for it; `{uuid}/2` is one of its pictures, `{uuid}/mp4` a video. A UUID alone becomes
`accounts/-/jobs/{uuid}`: the service knows whose it is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from uuid import UUID

OWN_ACCOUNT = "accounts/-"

_UID = r"(?P<uid>[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12})"
_RESOURCE = re.compile(
    rf"(?P<account>accounts/[a-z0-9-]+)/jobs/{_UID}"
    r"(?:/images/(?P<image>[1-4])|/videos/(?P<video>mp4|webp))?",
    re.ASCII,
)
_SHORT = re.compile(rf"{_UID}/(?:(?P<image>[1-4])|(?P<video>mp4|webp))", re.ASCII)
# Pictures are PNG files; a WebP file is a video.
_FILE = re.compile(rf"(?:.*[/\\])?{_UID}_[^/\\]*?(?:_(?P<image>[1-4])\.png|\.(?P<video>mp4|webp))", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Named:
    """What somebody named: a job, or one of its pictures or videos."""

    job: str
    """Resource name of the job."""
    image: int | None = None
    """1 to 4."""
    video: str | None = None
    """`mp4` or `webp`."""

    @property
    def name(self) -> str:
        """Its resource name."""
        if self.video is not None:
            return f"{self.job}/videos/{self.video}"
        return self.job if self.image is None else f"{self.job}/images/{self.image}"


def named(text: str) -> Named:
    """Return what `text` means: a UUID, a resource name, the name or path of a saved file.

    Raises ValueError, with a sentence for a person, if it means nothing.
    """
    text = text.strip()
    for form in (_RESOURCE, _SHORT, _FILE):
        match = form.fullmatch(text)
        if match is not None:
            parts = match.groupdict()
            account = parts.get("account") or OWN_ACCOUNT
            image = parts.get("image")
            return Named(
                job=f"{account}/jobs/{parts['uid']}",
                image=None if image is None else int(image),
                video=parts.get("video"),
            )
    try:
        return Named(job=f"{OWN_ACCOUNT}/jobs/{UUID(text)}")
    except ValueError:
        raise ValueError(
            f"{text!r} is not a job: give its id, like 1b4e28ba-2fa1-4d3b-9f0c-51d2a6e8c7f4, its full name, "
            "or the name of a picture file that was saved of it"
        ) from None


def job_name(text: str) -> str:
    """Return the resource name of the job that `text` means, or that the picture it means belongs to.

    Raises ValueError, with a sentence for a person, if it means none.
    """
    return named(text).job


def is_job(text: str) -> bool:
    """Return whether `text` means a job, and not something to be drawn."""
    try:
        named(text)
    except ValueError:
        return False
    return True


def image_name(job: str, image: int) -> str:
    """Return the resource name of picture `image`, 1 to 4, of a job.

    Raises ValueError if `job` is not a job or the number is out of range.
    """
    if not 1 <= image <= 4:
        raise ValueError(f"a job has pictures 1 to 4; there is no picture {image}")
    return f"{job_name(job)}/images/{image}"


def account_name(text: str) -> str:
    """Return `accounts/{a}` for an account given by id or by name."""
    return text if text.startswith("accounts/") else f"accounts/{text}"


def plan_name(text: str) -> str:
    """Return `plans/{p}` for a plan given by id or by name."""
    return text if text.startswith("plans/") else f"plans/{text.lower()}"


def key_name(account: str, text: str) -> str:
    """Return `accounts/{a}/keys/{id}` for a key given by name, by id, or by how it begins: `dk_{id}`."""
    if text.startswith("accounts/"):
        return text
    key_id = text.removeprefix("dk_").partition("_")[0]
    return f"{account_name(account)}/keys/{key_id}"


def worker_name(text: str) -> str:
    """Return `workers/{w}` for a worker given by id or by name."""
    return text if text.startswith("workers/") else f"workers/{text}"


def worker_id(name: str) -> str:
    """Return the id in a worker's resource name; it may have slashes."""
    return name.removeprefix("workers/")


def last_part(name: str) -> str:
    """Return the id at the end of a resource name."""
    return name.rpartition("/")[2]
