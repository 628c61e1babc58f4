"""Resource names, from what people type or paste.

A job is accepted as its UUID, as a resource name, or as anything a call returned for it. A UUID alone
becomes `accounts/-/jobs/{uuid}`: the service knows whose it is.
"""

from __future__ import annotations

import re
from uuid import UUID

_JOB = re.compile(r"accounts/[a-z0-9-]+/jobs/(?P<uid>[0-9a-fA-F-]{36})(/images/(?P<image>[1-4]))?")


def job_name(text: str) -> str:
    """Return the resource name of the job that `text` (a UUID or a resource name) means.

    Raises ValueError, with a sentence for a person, if it means none.
    """
    text = text.strip()
    match = _JOB.fullmatch(text)
    if match is not None:
        return text.partition("/images/")[0]
    try:
        return f"accounts/-/jobs/{UUID(text)}"
    except ValueError:
        raise ValueError(
            f"{text!r} is not a job: give its id, like 1b4e28ba-2fa1-4d3b-9f0c-51d2a6e8c7f4, or its full name"
        ) from None


def is_job(text: str) -> bool:
    """Return whether `text` means a job, and not something to be drawn."""
    try:
        job_name(text)
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


def worker_name(text: str) -> str:
    """Return `workers/{w}` for a worker given by id or by name."""
    return text if text.startswith("workers/") else f"workers/{text}"


def worker_id(name: str) -> str:
    """Return the id in a worker's resource name; it may have slashes."""
    return name.removeprefix("workers/")


def last_part(name: str) -> str:
    """Return the id at the end of a resource name."""
    return name.rpartition("/")[2]
