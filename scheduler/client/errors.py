"""Everything that can go wrong, one class each: what happened, what it means, what to do.

A refusal of the service carries google.rpc.ErrorInfo with a stable reason; each reason has its class here,
whose docstring is what it means. `raised_for` turns a failed call into the right one. A reason this
release does not know becomes a plain `Refusal`, still with the service's own sentence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import ClassVar, Self

import grpc
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc.aio import AioRpcError
from grpc_status import rpc_status

from scheduler.v1.job_pb2 import Job


class ExitCode(IntEnum):
    """What the command line's exit status means."""

    meaning: str
    """In a few words."""

    def __new__(cls, number: int, meaning: str) -> Self:
        """Return the member of that number."""
        member = int.__new__(cls, number)
        member._value_ = number
        member.meaning = meaning
        return member

    OK = 0, "done"
    REFUSED = 1, "the service refused, or somebody said no"
    USAGE = 2, "the command or the settings were not understood"
    UNAVAILABLE = 3, "the service cannot be reached, is overloaded, or failed"
    JOB_FAILED = 4, "the job ended without pictures"
    DIFFERENT = 5, "a job that was verified came out different"
    VIOLATED = 6, "a check found something that must not be"
    WARNED = 7, "a check found something to look at"
    INTERRUPTED = 130, "interrupted"


@dataclass(frozen=True, kw_only=True)
class Violation:
    """One thing wrong with one field of a request."""

    field: str
    sentence: str


@dataclass(frozen=True, kw_only=True)
class Details:
    """What the service attached to a refusal."""

    metadata: Mapping[str, str] = field(default_factory=dict)
    violations: tuple[Violation, ...] = ()
    retry_after_ms: int | None = None


class DarkroomError(Exception):
    """Darkroom could not do what was asked."""

    exit_code: ClassVar[ExitCode] = ExitCode.REFUSED
    reason: ClassVar[str]
    advice: ClassVar[str] = ""
    """What to do, in a sentence or two."""
    retried: ClassVar[bool] = False
    """The client repeats the call by itself, under the same request id."""

    def __init__(self, happened: str, details: Details | None = None) -> None:
        super().__init__(happened)
        self.happened = happened
        self.details = details or Details()

    @property
    def stable_reason(self) -> str:
        """For programs; upper case."""
        return self.reason

    @property
    def meaning(self) -> str:
        """What it means, in a sentence."""
        return " ".join((self.__doc__ or "").split())

    def __str__(self) -> str:
        violations = self.details.violations
        said = [f"{each.field}: {each.sentence}" for each in violations]
        if not violations or any(each.sentence not in self.happened for each in violations):
            said.insert(0, self.happened)  # otherwise it only repeats them, without their fields
        return "\n".join(filter(None, [*said, self.meaning, self.advice]))


class Refusal(DarkroomError):
    """The service refused, for a reason that this release of the client does not know."""

    reason = "UNKNOWN"
    advice = "A newer client may explain it better."

    def __init__(self, happened: str, details: Details | None = None, *, reason: str | None = None) -> None:
        super().__init__(happened, details)
        self._reason = reason or self.reason

    @property
    def stable_reason(self) -> str:
        """As the service gave it."""
        return self._reason


class QueueFull(Refusal):
    """The account already has as many accepted jobs, running and waiting, as its plan allows."""

    reason = "QUEUE_FULL"
    advice = "Wait until one finishes, or cancel one: `darkroom jobs`, `darkroom cancel JOB`."


class FastTimeExhausted(Refusal):
    """The plan's fast time is used up and the account has not agreed to more, or is at its spend cap."""

    reason = "FAST_TIME_EXHAUSTED"
    advice = (
        "Relax is free: add --relax. Or agree to pay for more: `darkroom overage on`. "
        "`darkroom info` says when the plan's time renews."
    )


class PlanLacksPrivate(Refusal):
    """Private pictures are not part of the account's plan."""

    reason = "PLAN_LACKS_PRIVATE"
    advice = "Submit it with --public, or ask an admin for a plan with private mode."


class PlanLacksOverage(Refusal):
    """The account's plan has no price for fast time beyond its own."""

    reason = "PLAN_LACKS_OVERAGE"
    advice = "Relax is free: add --relax. Or change to a plan that has one: `darkroom plan`."


class FastOnly(Refusal):
    """What was asked for is offered in fast mode only."""

    reason = "FAST_ONLY"
    advice = "Add --fast, or take what relax has too: for an upscale --light or --detailed."


class SourceNotReady(Refusal):
    """That job has not finished, or does not have that picture or video."""

    reason = "SOURCE_NOT_READY"
    advice = "`darkroom show JOB` says how it stands and what it has; `darkroom watch JOB` waits for it."


class PicturesExpired(Refusal):
    """Its pictures were kept for as long as the account's plan says, and are gone."""

    reason = "PICTURES_EXPIRED"
    advice = "`darkroom reroll JOB` draws it anew."


class PictureUnreadable(Refusal):
    """A picture to draw after could not be had from its address, or what came is not a picture."""

    reason = "PICTURE_UNREADABLE"
    advice = (
        "Give a direct link to a .png, .jpg or .webp file that anybody may read, not to a page that shows "
        "it; or send the file itself: --image FILE."
    )


class RoleRequired(Refusal):
    """This key may not do that."""

    reason = "ROLE_REQUIRED"
    advice = "Use a key with the role that the service names."


class RateLimited(Refusal):
    """This key sends more requests a second than are allowed."""

    reason = "RATE_LIMITED"
    advice = "Send fewer, and wait as long as the answer says."


class NotFoundOrNotYours(Refusal):
    """There is no such thing, or it belongs to another account: the service does not say which."""

    reason = "NOT_FOUND_OR_NOT_YOURS"
    advice = "Check the id and the key: `darkroom jobs` lists your jobs, `darkroom config show` the key."


class ModerationRejected(Refusal):
    """The prompt breaks the service's rules."""

    reason = "MODERATION_REJECTED"
    advice = "Say it in other words, without what the category names."


class InvalidParameter(Refusal):
    """Something in the request is not valid; everything that is wrong with it is listed."""

    reason = "INVALID_PARAMETER"
    advice = "Correct what is listed and send it again."


class Impossible(Refusal):
    """No worker of this service could ever run that job."""

    reason = "IMPOSSIBLE"
    advice = "Ask for something else, or tell the people who run the service what is missing."


class JobFinished(Refusal):
    """The job has already ended."""

    reason = "JOB_FINISHED"
    advice = "`darkroom show JOB` says how it ended."


class JobNotFinished(Refusal):
    """Only a job that has ended can be deleted."""

    reason = "JOB_NOT_FINISHED"
    advice = "Cancel it first: `darkroom cancel JOB`; or wait: `darkroom watch JOB`."


class JobStarted(Refusal):
    """Only a job that waits can be moved to the other tier, and this one runs."""

    reason = "JOB_STARTED"
    advice = "`darkroom watch JOB` shows it; choose the tier of the next one with --fast or --relax."


class UnknownWorker(Refusal):
    """The service has no such worker, and was never asked anything about one of that name."""

    reason = "UNKNOWN_WORKER"
    advice = "`darkroom admin workers` lists them."


class EtagMismatch(Refusal):
    """Somebody else changed it after you read it."""

    reason = "ETAG_MISMATCH"
    advice = "Read it again, look at what changed, and repeat the change."


class RequestIdReused(Refusal):
    """That request id already belongs to a request with other content."""

    reason = "REQUEST_ID_REUSED"
    advice = "Use a new id (a random UUID) for a new request."


class Unauthenticated(Refusal):
    """The key is missing, wrong or revoked: the service does not say which."""

    reason = "UNAUTHENTICATED"
    advice = (
        "Set it: `darkroom config set key -` or DARKROOM_KEY. `darkroom config show` says which one is used."
    )


class AccountBlocked(Refusal):
    """A moderator has blocked the account."""

    reason = "ACCOUNT_BLOCKED"
    advice = "Ask the people who run the service."


class AccountProtected(Refusal):
    """Accounts of admins cannot be blocked, and those of moderators and operators by admins alone."""

    reason = "ACCOUNT_PROTECTED"
    advice = (
        "An admin revokes the key that the service names (`darkroom admin keys list ACCOUNT`), or blocks the "
        "account."
    )


class PictureMissing(Refusal):
    """The service knows the picture but no longer has its file."""

    reason = "PICTURE_MISSING"
    advice = (
        "Draw it again with the seed that `darkroom show JOB` gives, and tell the people who run the service."
    )


class SecretShownOnce(Refusal):
    """That request already made a key, whose secret was in its first answer and is stored nowhere."""

    reason = "SECRET_SHOWN_ONCE"
    advice = "If that answer is lost, make another key."


class UnknownPlan(Refusal):
    """The service has no such plan."""

    reason = "UNKNOWN_PLAN"
    advice = "`darkroom admin plans show` names them."


class PlanExists(Refusal):
    """A plan of that name is there already."""

    reason = "PLAN_EXISTS"
    advice = "Change it, `darkroom admin plans set PLAN`, or choose another name."


class PlanNotSelfService(Refusal):
    """Only admins change an account to that plan."""

    reason = "PLAN_NOT_SELF_SERVICE"
    advice = (
        "An admin types `darkroom plan change PLAN --account ACCOUNT --reason WHY`, or opens the plan to "
        "all: `darkroom admin plans set PLAN self_service=true --reason WHY`."
    )


class NothingCharged(Refusal):
    """The job was never charged: it was relax, failed, has not ended, or is not of that account."""

    reason = "NOTHING_CHARGED"
    advice = "`darkroom show JOB --receipt` says what a job cost."


class RefundTooLarge(Refusal):
    """No more can be given back than a job was charged, refunds before this one included."""

    reason = "REFUND_TOO_LARGE"
    advice = "Leave --minutes out to give back all that is left, or grant time: `darkroom admin grant`."


class NothingToUndo(Refusal):
    """The account has no change of plan that moved time or money and was not taken back."""

    reason = "NOTHING_TO_UNDO"
    advice = "A change that is to come is taken back with `darkroom plan change` to the present plan."


class NoRefundToUndo(Refusal):
    """The job has no refund that was not taken back."""

    reason = "NO_REFUND_TO_UNDO"
    advice = (
        "`darkroom admin audit --target accounts/ACCOUNT/jobs/JOB` says what was given back, and what taken."
    )


class RefundSpent(Refusal):
    """Only what is left of the time that a refund gave can be taken back."""

    reason = "REFUND_SPENT"
    advice = "Other time of the account is taken with `darkroom admin grant ACCOUNT -MINUTES`."


class OutsidePeriods(Refusal):
    """The account had no period at that moment: it was not open yet, or the moment is still to come."""

    reason = "OUTSIDE_PERIODS"
    advice = "Name a moment between those two with --at, or leave it out for the present period."


class UnknownKey(Refusal):
    """The account has no such key."""

    reason = "UNKNOWN_KEY"
    advice = "`darkroom admin keys list ACCOUNT` names them."


class UnknownAccount(Refusal):
    """The service has no such account."""

    reason = "UNKNOWN_ACCOUNT"
    advice = "`darkroom admin accounts list` names them; `darkroom admin accounts create` opens one."


class AccountExists(Refusal):
    """An account of that id is there already."""

    reason = "ACCOUNT_EXISTS"
    advice = "Choose another id, or leave it out for a random one."


class AccountErased(Refusal):
    """The account was erased, and has no plan any more."""

    reason = "ACCOUNT_ERASED"
    advice = "`darkroom statement --account ACCOUNT` shows its books."


class UnknownGrant(Refusal):
    """No grant to the account has that number."""

    reason = "UNKNOWN_GRANT"
    advice = "`darkroom admin audit --target accounts/ACCOUNT` names its grants."


class AdjustmentTooLarge(Refusal):
    """Only time that is neither used nor held by running jobs can be taken away."""

    reason = "ADJUSTMENT_TOO_LARGE"
    advice = "Take less, or wait until the account's running jobs have ended."


class Overloaded(Refusal):
    """The service is up but cannot take this now: too busy, starting, or without its database."""

    reason = "OVERLOADED"
    advice = "Nothing is lost. Try again in a little while."
    exit_code = ExitCode.UNAVAILABLE
    retried = True


class ServiceUnreachable(DarkroomError):
    """There is no answer from that address."""

    reason = "UNREACHABLE"
    advice = (
        "Check that the service runs (`darkroom serve`), that the address is right (`darkroom config show`), "
        "and that both sides agree on TLS: --plain-text for a service without, --certificate-file and "
        "--private-key-file for one that wants to see a certificate."
    )
    exit_code = ExitCode.UNAVAILABLE
    retried = True


class TlsFailed(DarkroomError):
    """There is something at that address, but no connection to it that can be trusted."""

    reason = "TLS_FAILED"
    advice = (
        "Name the authority that the service's certificate is of (--ca-file), and call it as its certificate "
        "does; --plain-text is for where something else protects the way. `darkroom config show` says what "
        "is in force."
    )
    exit_code = ExitCode.UNAVAILABLE


class NoAnswerInTime(DarkroomError):
    """The answer did not come before the deadline; what was asked may still be carried out."""

    reason = "DEADLINE_EXCEEDED"
    advice = "See what became of it (`darkroom jobs`) before sending it again."
    exit_code = ExitCode.UNAVAILABLE


class ServiceFailed(DarkroomError):
    """The service broke while it answered, or answered what this client does not understand."""

    reason = "SERVICE_FAILED"
    advice = "Tell the people who run it, with the sentence above."
    exit_code = ExitCode.UNAVAILABLE


class DownloadDamaged(DarkroomError):
    """The picture that arrived is not the one that was made: nothing was saved."""

    reason = "DOWNLOAD_DAMAGED"
    advice = "Download it again: `darkroom download JOB`."
    exit_code = ExitCode.UNAVAILABLE


class CannotSave(DarkroomError):
    """The pictures are made, but could not be written here; the service keeps them."""

    reason = "CANNOT_SAVE"
    advice = "Make room, or name another folder: `darkroom download JOB --out FOLDER`."


class PictureNotSendable(DarkroomError):
    """A picture to draw after cannot be sent as it is; nothing was submitted."""

    reason = "PICTURE_NOT_SENDABLE"
    advice = "Give PNG, JPEG or WebP files. A copy of 1024 pixels a side is as good: more is not looked at."
    exit_code = ExitCode.USAGE


class PlanNotUnderstood(DarkroomError):
    """What was given for a plan cannot be used; nothing was sent."""

    reason = "PLAN_NOT_UNDERSTOOD"
    advice = "`darkroom admin plans show --toml` prints the plans as they are written."
    exit_code = ExitCode.USAGE


class NotEnded(DarkroomError):
    """There is a receipt once a job has ended, and something to verify once it has succeeded."""

    reason = "NOT_ENDED"
    advice = "`darkroom watch JOB` waits for it; `darkroom show JOB` says how it ended."


class ConfigUnreadable(DarkroomError):
    """The client's settings cannot be used."""

    reason = "CONFIG_UNREADABLE"
    advice = "Correct the file, or remove it and use `darkroom config set`."
    exit_code = ExitCode.USAGE

    @classmethod
    def in_file(cls, path: Path, why: str) -> ConfigUnreadable:
        """Return the error for one file."""
        return cls(f"{path}: {why}.")


class ServerNotInstalled(DarkroomError):
    """That part of Darkroom is the server's, whose packages a client need not have."""

    reason = "SERVER_NOT_INSTALLED"
    # By the checkout, not by name: whoever has that name in an index is somebody else.
    advice = "Install them, in a checkout of this release: pip install -c constraints.txt '.[server,worker]'"
    exit_code = ExitCode.USAGE


class JobEnded(DarkroomError):
    """The job ended without pictures."""

    reason = "JOB_ENDED"
    exit_code = ExitCode.JOB_FAILED

    def __init__(self, happened: str, job: Job) -> None:
        super().__init__(happened)
        self.job = job


class JobFailed(JobEnded):
    """The job failed and was not charged."""

    reason = "JOB_FAILED"
    advice = "Send it again with `darkroom reroll JOB`; if that fails too, report its id."


class JobCancelled(JobEnded):
    """The job was cancelled."""

    reason = "JOB_CANCELLED"


REFUSALS: Mapping[str, type[Refusal]] = {each.reason: each for each in Refusal.__subclasses__()}
"""Class of each reason that the service gives."""


def raised_for(failure: AioRpcError, address: str) -> DarkroomError:
    """Return the error to raise for a call to `address` that failed."""
    status = _status(failure)
    info, details = _unpacked(status) if status is not None else (None, Details())
    happened = failure.details() or failure.code().name
    # A bug of the service has an ErrorInfo too; it is trouble of the service all the same.
    if info is not None and failure.code() is not grpc.StatusCode.INTERNAL:
        known = REFUSALS.get(info.reason)
        return known(happened, details) if known else Refusal(happened, details, reason=info.reason)
    if failure.code() is grpc.StatusCode.UNAVAILABLE:
        for mark, sentence in _TLS_TROUBLE:
            if mark in happened:
                return TlsFailed(f"{address} {sentence}.")
        return ServiceUnreachable(f"Cannot reach the service at {address} ({happened}).")
    if failure.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return NoAnswerInTime(f"No answer from {address} in time.")
    return ServiceFailed(f"{address} answered {failure.code().name}: {happened}")


# What gRPC says of a connection, the narrower before the wider, and what it means of an address. Other
# trouble with a handshake may be a service that restarts, which is asked again.
_TLS_TROUBLE = (
    ("WRONG_VERSION_NUMBER", "does not speak TLS"),
    ("Hostname Verification Check failed", "shows a certificate that is another host's"),
    ("certificate has expired", "shows a certificate that has expired"),
    ("CERTIFICATE_VERIFY_FAILED", "shows a certificate of an authority that is not trusted here"),
    ("certificate signature failure", "shows a certificate of an authority that is not trusted here"),
)


def _status(failure: AioRpcError) -> Status | None:
    try:
        return rpc_status.from_call(failure)
    except ValueError:
        # What is attached contradicts the call's own status (a proxy rewrote it): believe the call's own.
        return None


def _unpacked(status: Status) -> tuple[ErrorInfo | None, Details]:
    info: ErrorInfo | None = None
    violations: list[Violation] = []
    retry_after_ms: int | None = None
    for packed in status.details:
        if packed.Is(ErrorInfo.DESCRIPTOR):
            info = ErrorInfo()
            packed.Unpack(info)
        elif packed.Is(BadRequest.DESCRIPTOR):
            request = BadRequest()
            packed.Unpack(request)
            violations += [Violation(field=v.field, sentence=v.description) for v in request.field_violations]
        elif packed.Is(RetryInfo.DESCRIPTOR):
            retry = RetryInfo()
            packed.Unpack(retry)
            retry_after_ms = retry.retry_delay.ToMilliseconds()
    metadata = dict(info.metadata) if info is not None else {}
    return info, Details(metadata=metadata, violations=tuple(violations), retry_after_ms=retry_after_ms)
