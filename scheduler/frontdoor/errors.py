"""One table from refusals to what goes over the wire.

Every status carries google.rpc.ErrorInfo with domain `darkroom` and a stable reason. Details stay under 4 KB
and 16 violations: they travel in trailers, and trailers of 9 KB were lost in 3 of 20 calls, of 20 KB in all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from billing import refusals as money
from billing.refusals import Refusal
from scheduler import refusals

DOMAIN = "darkroom"

_MOST_BYTES = 4_096
_MOST_VIOLATIONS = 16
# UTF-8 bytes of each part; together with what wraps them they stay below the whole.
_MESSAGE_BYTES = 600
_VIOLATIONS_BYTES = 2_400
_SENTENCE_BYTES = 300
_FIELD_BYTES = 60
_METADATA_BYTES = 200

# The refusal is of the row's class; the table's keys say so, the type system cannot.
_Details: TypeAlias = Callable[[Any], Iterable[Message]]


def _nothing(_: Refusal) -> Iterable[Message]:
    return ()


@dataclass(frozen=True, kw_only=True)
class _Row:
    code: grpc.StatusCode
    details: _Details = _nothing


def _retry(refusal: Any) -> Message:
    delay = Duration()
    delay.FromMilliseconds(refusal.retry_after_ms)
    info: Message = error_details_pb2.RetryInfo(retry_delay=delay)
    return info


def _bad_request(violations: Sequence[refusals.FieldViolation]) -> Message:
    shown = list(violations[:_MOST_VIOLATIONS])
    if len(violations) > _MOST_VIOLATIONS:
        more = len(violations) - _MOST_VIOLATIONS + 1
        shown[-1] = refusals.FieldViolation(field=shown[-1].field, sentence=f"And {more} more.")
    sentence_bytes = min(_SENTENCE_BYTES, _VIOLATIONS_BYTES // len(shown) - _FIELD_BYTES)
    request: Message = error_details_pb2.BadRequest(
        field_violations=[
            error_details_pb2.BadRequest.FieldViolation(
                field=_cut(violation.field, _FIELD_BYTES),
                description=_cut(violation.sentence, sentence_bytes),
            )
            for violation in shown
        ]
    )
    return request


def _one_violation(field: str, refusal: Refusal) -> Message:
    return _bad_request([refusals.FieldViolation(field=field, sentence=str(refusal))])


def _queue_full(refusal: refusals.QueueFull) -> Iterable[Message]:
    violation = error_details_pb2.QuotaFailure.Violation(
        subject=f"accounts/{refusal.account_id}",
        description=f"{refusal.depth} of {refusal.limit} accepted jobs.",
    )
    return error_details_pb2.QuotaFailure(violations=[violation]), _retry(refusal)


def _of_plan(
    refusal: money.PlanLacksPrivate | money.PlanLacksOverage | money.PlanNotSelfService,
) -> Iterable[Message]:
    violation = error_details_pb2.PreconditionFailure.Violation(
        type="PLAN", subject=f"plans/{refusal.plan}", description=str(refusal)
    )
    return (error_details_pb2.PreconditionFailure(violations=[violation]),)


def _fast_only(refusal: refusals.FastOnly) -> Iterable[Message]:
    violation = error_details_pb2.PreconditionFailure.Violation(
        type="TIER", subject="tiers/fast", description=str(refusal)
    )
    return (error_details_pb2.PreconditionFailure(violations=[violation]),)


_TABLE: Mapping[type[Refusal], _Row] = {
    refusals.QueueFull: _Row(code=grpc.StatusCode.RESOURCE_EXHAUSTED, details=_queue_full),
    money.FastTimeExhausted: _Row(code=grpc.StatusCode.RESOURCE_EXHAUSTED),
    money.SpendCapReached: _Row(code=grpc.StatusCode.RESOURCE_EXHAUSTED),
    money.HoldRefusedBefore: _Row(code=grpc.StatusCode.RESOURCE_EXHAUSTED),
    refusals.RateLimited: _Row(code=grpc.StatusCode.RESOURCE_EXHAUSTED, details=lambda r: (_retry(r),)),
    money.PlanLacksPrivate: _Row(code=grpc.StatusCode.FAILED_PRECONDITION, details=_of_plan),
    money.PlanLacksOverage: _Row(code=grpc.StatusCode.FAILED_PRECONDITION, details=_of_plan),
    refusals.SourceNotReady: _Row(code=grpc.StatusCode.FAILED_PRECONDITION),
    refusals.PicturesExpired: _Row(code=grpc.StatusCode.FAILED_PRECONDITION),
    refusals.Impossible: _Row(code=grpc.StatusCode.FAILED_PRECONDITION),
    refusals.FastOnly: _Row(code=grpc.StatusCode.FAILED_PRECONDITION, details=_fast_only),
    refusals.JobNotFinished: _Row(code=grpc.StatusCode.FAILED_PRECONDITION),
    refusals.JobStarted: _Row(code=grpc.StatusCode.FAILED_PRECONDITION),
    refusals.JobFinished: _Row(code=grpc.StatusCode.FAILED_PRECONDITION),
    refusals.SecretShownOnce: _Row(code=grpc.StatusCode.FAILED_PRECONDITION),
    money.AdjustmentTooLarge: _Row(code=grpc.StatusCode.FAILED_PRECONDITION),
    money.NothingCharged: _Row(code=grpc.StatusCode.FAILED_PRECONDITION),
    money.RefundTooLarge: _Row(code=grpc.StatusCode.FAILED_PRECONDITION),
    money.NothingToUndo: _Row(code=grpc.StatusCode.FAILED_PRECONDITION),
    money.NoRefundToUndo: _Row(code=grpc.StatusCode.FAILED_PRECONDITION),
    money.RefundSpent: _Row(code=grpc.StatusCode.FAILED_PRECONDITION),
    money.PlanNotSelfService: _Row(code=grpc.StatusCode.FAILED_PRECONDITION, details=_of_plan),
    refusals.AccountProtected: _Row(code=grpc.StatusCode.FAILED_PRECONDITION),
    money.AccountErased: _Row(code=grpc.StatusCode.FAILED_PRECONDITION),
    refusals.InvalidRequest: _Row(
        code=grpc.StatusCode.INVALID_ARGUMENT, details=lambda r: (_bad_request(r.violations),)
    ),
    refusals.PictureUnreadable: _Row(
        code=grpc.StatusCode.INVALID_ARGUMENT, details=lambda r: (_bad_request(r.violations),)
    ),
    refusals.ModerationRejected: _Row(
        code=grpc.StatusCode.INVALID_ARGUMENT, details=lambda r: (_one_violation(r.field, r),)
    ),
    money.RequestIdReused: _Row(
        code=grpc.StatusCode.INVALID_ARGUMENT, details=lambda r: (_one_violation("request_id", r),)
    ),
    money.OutsidePeriods: _Row(
        code=grpc.StatusCode.INVALID_ARGUMENT, details=lambda r: (_one_violation("at", r),)
    ),
    money.EtagMismatch: _Row(code=grpc.StatusCode.ABORTED),
    money.AccountExists: _Row(code=grpc.StatusCode.ALREADY_EXISTS),
    money.PlanExists: _Row(code=grpc.StatusCode.ALREADY_EXISTS),
    money.UnknownPlan: _Row(code=grpc.StatusCode.NOT_FOUND),
    money.UnknownAccount: _Row(code=grpc.StatusCode.NOT_FOUND),
    money.UnknownGrant: _Row(code=grpc.StatusCode.NOT_FOUND),
    refusals.UnknownKey: _Row(code=grpc.StatusCode.NOT_FOUND),
    refusals.UnknownWorker: _Row(code=grpc.StatusCode.NOT_FOUND),
    refusals.NotFoundOrNotYours: _Row(code=grpc.StatusCode.PERMISSION_DENIED),
    refusals.RoleRequired: _Row(code=grpc.StatusCode.PERMISSION_DENIED),
    refusals.AccountBlocked: _Row(code=grpc.StatusCode.PERMISSION_DENIED),
    refusals.Unauthenticated: _Row(code=grpc.StatusCode.UNAUTHENTICATED),
    refusals.Overloaded: _Row(code=grpc.StatusCode.UNAVAILABLE, details=lambda r: (_retry(r),)),
    refusals.PictureMissing: _Row(code=grpc.StatusCode.DATA_LOSS),
}


def code_of(refusal: Refusal) -> grpc.StatusCode:
    """Return the canonical code of a refusal; a refusal without a row in the table is a bug."""
    return _TABLE[type(refusal)].code


def status_of(refusal: Refusal) -> status_pb2.Status:
    """Return the whole status of a refusal, under 4 KB."""
    row = _TABLE[type(refusal)]
    info = error_details_pb2.ErrorInfo(
        reason=refusal.reason,
        domain=DOMAIN,
        metadata={name: _cut(value, _METADATA_BYTES) for name, value in refusal.metadata().items()},
    )
    return _status(row.code, str(refusal), [info, *row.details(refusal)])


def status_of_bug(error_id: str) -> status_pb2.Status:
    """Return the status of a call that met a bug of ours: an id to look for in the log, and nothing else."""
    info = error_details_pb2.ErrorInfo(reason="INTERNAL", domain=DOMAIN, metadata={"error_id": error_id})
    return _status(
        grpc.StatusCode.INTERNAL,
        f"Something went wrong on our side. Tell the people who run this service this id: {error_id}.",
        [info],
    )


def _status(code: grpc.StatusCode, message: str, details: Sequence[Message]) -> status_pb2.Status:
    number, _ = code.value
    status = status_pb2.Status(code=number, message=_cut(message, _MESSAGE_BYTES))
    for detail in details:
        status.details.add().Pack(detail)
    assert status.ByteSize() <= _MOST_BYTES, f"{status.ByteSize()} bytes of details would be lost"
    return status


def _cut(text: str, most_bytes: int) -> str:
    encoded = text.encode()
    if len(encoded) <= most_bytes:
        return text
    return encoded[: most_bytes - len("…".encode())].decode(errors="ignore") + "…"
