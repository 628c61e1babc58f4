"""Everything the service may refuse: a stable reason, its numbers, and a sentence a person can act on.

A refusal is an expected answer, not a failure of ours; `frontdoor/errors.py` turns each into one status.
Those about money are the ledger's own (`billing/refusals.py`). No sentence repeats the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from billing.refusals import Refusal


@dataclass(frozen=True, kw_only=True)
class FieldViolation:
    """One thing wrong with a request."""

    field: str
    """Path in the request message, as `imagine.prompt`."""
    sentence: str


class InvalidRequest(Refusal):
    """Fields of the request are wrong; all of them are named at once."""

    reason = "INVALID_PARAMETER"

    def __init__(self, violations: Sequence[FieldViolation]) -> None:
        assert violations, "a refusal without a violation tells nobody anything"
        self.violations = tuple(violations)
        super().__init__(" ".join(violation.sentence for violation in self.violations))

    def metadata(self) -> dict[str, str]:
        """The number of violations; what they are is in the details."""
        return {"violations": str(len(self.violations))}


class ModerationRejected(Refusal):
    """The prompt asks for something that is not drawn here."""

    reason = "MODERATION_REJECTED"

    def __init__(self, *, category: str, field: str, hidden_job: str | None = None) -> None:
        """`hidden_job`: one that a moderator hides, of which, or in place of which, another is asked for."""
        self.category = category
        self.field = field
        super().__init__(
            f"The prompt was rejected by moderation ({category}). Leave out what belongs to that category, "
            "or ask the people who run this service if you think it is a mistake."
            if hidden_job is None
            else f"A moderator has hidden job {hidden_job} ({category}): no other is made of it or like it. "
            "Ask the people who run this service if you think it is a mistake."
        )

    def metadata(self) -> dict[str, str]:
        """The category."""
        return {"category": self.category}


class QueueFull(Refusal):
    """The account has as many accepted jobs as its plan allows."""

    reason = "QUEUE_FULL"
    retry_after_ms = 5_000
    """About the time in which one of ten jobs ends; a client that wants to be quicker watches its jobs."""

    def __init__(self, *, account_id: str, depth: int, limit: int) -> None:
        self.account_id = account_id
        self.depth = depth
        self.limit = limit
        super().__init__(
            f"Your queue is full: {depth} jobs are running or waiting and your plan allows {limit}. "
            "Send this one again when one of them has finished, or cancel one."
        )

    def metadata(self) -> dict[str, str]:
        """How many jobs are accepted, and how many may be."""
        return {"depth": str(self.depth), "limit": str(self.limit)}


class UnknownKey(Refusal):
    """The account has no key of that id."""

    reason = "UNKNOWN_KEY"

    def __init__(self, *, account_id: str, key_id: str) -> None:
        self.account_id = account_id
        self.key_id = key_id
        super().__init__(f"The account {account_id} has no key {key_id}. List its keys to see their names.")

    def metadata(self) -> dict[str, str]:
        """The account and the key."""
        return {"account": self.account_id, "key": self.key_id}


class NotFoundOrNotYours(Refusal):
    """There is no such thing, or it belongs to somebody else; who asks must not learn which."""

    reason = "NOT_FOUND_OR_NOT_YOURS"

    def __init__(self) -> None:
        super().__init__(
            "There is nothing of that name that this key may see: check the name, and whose key this is."
        )

    def metadata(self) -> dict[str, str]:
        """Nothing: both cases must answer with the same bytes."""
        return {}


class SourceNotReady(Refusal):
    """The job asked for has not succeeded, was deleted, or has no such picture or video."""

    reason = "SOURCE_NOT_READY"

    def __init__(self, *, job_id: str, state: str, what: str = "pictures") -> None:
        self.job_id = job_id
        self.state = state
        self.what = what
        super().__init__(self._sentence())

    def _sentence(self) -> str:
        if self.state == "succeeded":
            return f"Job {self.job_id} has no {self.what}."
        if self.state == "deleted":
            return f"Job {self.job_id}, whose picture this one would start from, was deleted; start anew."
        waiting = self.state in ("queued", "running")
        what_to_do = "Wait until it has finished." if waiting else "Reroll it, or choose another."
        return f"Job {self.job_id} is {self.state}: only a job that has succeeded has pictures. {what_to_do}"

    def metadata(self) -> dict[str, str]:
        """The job and its state."""
        return {"job": self.job_id, "state": self.state}


class Impossible(Refusal):
    """No worker could ever run it."""

    reason = "IMPOSSIBLE"

    def __init__(self, *, missing: str, sentence: str) -> None:
        self.missing = missing
        super().__init__(sentence)

    def metadata(self) -> dict[str, str]:
        """What is missing."""
        return {"missing": self.missing}


class FastOnly(Refusal):
    """What is asked for is offered in fast mode alone."""

    reason = "FAST_ONLY"

    def __init__(self) -> None:
        super().__init__(
            "Max upscale is offered only in fast mode: ask for it as fast, or for a detailed upscale."
        )

    def metadata(self) -> dict[str, str]:
        """What was asked for."""
        return {"what": "max_upscale"}


class PictureUnreadable(Refusal):
    """Pictures given with a prompt cannot be had, or are no pictures; all of them are named at once."""

    reason = "PICTURE_UNREADABLE"

    def __init__(self, violations: Sequence[FieldViolation]) -> None:
        assert violations, "a refusal without a violation tells nobody anything"
        self.violations = tuple(violations)
        super().__init__(" ".join(violation.sentence for violation in self.violations))

    def metadata(self) -> dict[str, str]:
        """How many; which they are is in the details."""
        return {"violations": str(len(self.violations))}


class JobFinished(Refusal):
    """The job has ended, so there is nothing left to cancel or to change."""

    reason = "JOB_FINISHED"

    def __init__(self, *, job_id: str, state: str) -> None:
        self.job_id = job_id
        self.state = state
        super().__init__(f"Job {job_id} has already ended ({state}); nothing about it can be changed.")

    def metadata(self) -> dict[str, str]:
        """The job and how it ended."""
        return {"job": self.job_id, "state": self.state}


class JobNotFinished(Refusal):
    """The job waits or runs, so it cannot be deleted."""

    reason = "JOB_NOT_FINISHED"

    def __init__(self, *, job_id: str, state: str) -> None:
        self.job_id = job_id
        self.state = state
        super().__init__(
            f"Job {job_id} is {state}: only a job that has ended can be deleted. Cancel it first, or wait."
        )

    def metadata(self) -> dict[str, str]:
        """The job and its state."""
        return {"job": self.job_id, "state": self.state}


class JobStarted(Refusal):
    """The job runs already: what it started under is settled with it."""

    reason = "JOB_STARTED"

    def __init__(self, *, job_id: str) -> None:
        self.job_id = job_id
        super().__init__(f"Job {job_id} is running: only a job that waits can be moved to the other tier.")

    def metadata(self) -> dict[str, str]:
        """The job."""
        return {"job": self.job_id}


class UnknownWorker(Refusal):
    """There is no such worker, and nothing was ever asked of one of that name."""

    reason = "UNKNOWN_WORKER"

    def __init__(self, *, worker_id: str) -> None:
        self.worker_id = worker_id
        super().__init__(f"There is no worker {worker_id}: ListWorkers says which there are.")

    def metadata(self) -> dict[str, str]:
        """The worker."""
        return {"worker": self.worker_id}


class Unauthenticated(Refusal):
    """No valid key. Missing, malformed, wrong and revoked keys all get these same words."""

    reason = "UNAUTHENTICATED"

    def __init__(self) -> None:
        super().__init__("Send a valid API key as `authorization: Bearer dk_…`; this call had no valid one.")

    def metadata(self) -> dict[str, str]:
        """Nothing: whoever guesses keys must not learn how near a guess was."""
        return {}


class RoleRequired(Refusal):
    """The key's role does not reach."""

    reason = "ROLE_REQUIRED"

    def __init__(self, *, role: str) -> None:
        self.role = role
        super().__init__(f"This call needs a key with the role {role}; ask an admin of this service for one.")

    def metadata(self) -> dict[str, str]:
        """The role it takes."""
        return {"role": self.role}


class AccountBlocked(Refusal):
    """A moderator has blocked the account."""

    reason = "ACCOUNT_BLOCKED"

    def __init__(self) -> None:
        super().__init__("This account is blocked; ask the people who run this service why.")

    def metadata(self) -> dict[str, str]:
        """Nothing."""
        return {}


class AccountProtected(Refusal):
    """The account has a key of somebody whom the caller may not lock out."""

    reason = "ACCOUNT_PROTECTED"

    def __init__(self, *, account_id: str, role: str) -> None:
        self.account_id = account_id
        self.role = role
        super().__init__(
            f"The account {account_id} has a key with the role {role}: an admin has to revoke that first."
        )

    def metadata(self) -> dict[str, str]:
        """The account and the role of its key."""
        return {"account": self.account_id, "role": self.role}


class RateLimited(Refusal):
    """Too many requests a second, or too many open streams, with one key."""

    reason = "RATE_LIMITED"

    def __init__(self, *, sentence: str, retry_after_ms: int) -> None:
        self.retry_after_ms = retry_after_ms
        super().__init__(sentence)

    def metadata(self) -> dict[str, str]:
        """When it is worth trying again."""
        return {"retry_after_ms": str(self.retry_after_ms)}


class Overloaded(Refusal):
    """Something the answer needs is away for the moment. The same request later will do."""

    reason = "OVERLOADED"

    def __init__(self, *, sentence: str, retry_after_ms: int = 1_000) -> None:
        self.retry_after_ms = retry_after_ms
        super().__init__(sentence)

    def metadata(self) -> dict[str, str]:
        """When it is worth trying again."""
        return {"retry_after_ms": str(self.retry_after_ms)}


class PicturesExpired(Refusal):
    """The pictures of this job were kept for as long as its account's plan says, and are gone."""

    reason = "PICTURES_EXPIRED"

    def __init__(self, *, job_id: str, expired_at: datetime) -> None:
        self.job_id = job_id
        self.expired_at = expired_at
        super().__init__(
            f"The pictures of job {job_id} are gone: the account's plan kept them until "
            f"{expired_at:%Y-%m-%d %H:%M} UTC. Reroll the job, or choose another."
        )

    def metadata(self) -> dict[str, str]:
        """The job, and when its pictures went."""
        return {"job": self.job_id, "expired_at": self.expired_at.isoformat()}


class PictureMissing(Refusal):
    """The job's row names a picture that the artifact store does not have."""

    reason = "PICTURE_MISSING"

    def __init__(self, *, file_name: str) -> None:
        self.file_name = file_name
        super().__init__(
            f"{file_name} is not in the artifact store any more. The job and its seed are: draw it again."
        )

    def metadata(self) -> dict[str, str]:
        """The file."""
        return {"file": self.file_name}


class SecretShownOnce(Refusal):
    """This request id made a key before, and its secret was in that answer and nowhere else."""

    reason = "SECRET_SHOWN_ONCE"

    def __init__(self, *, key_id: str) -> None:
        self.key_id = key_id
        super().__init__(
            f"This request id has already made key {key_id}, and only a hash of its secret is stored. "
            "If the first answer was lost, make another key under a new request id."
        )

    def metadata(self) -> dict[str, str]:
        """The key."""
        return {"key": self.key_id}
