"""Fields that many requests share: request ids, resource names, page sizes and tokens.

Each reader notes what is wrong and goes on, so that a request is refused once, with everything that is wrong
with it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from billing.accounts import ERASED
from scheduler.refusals import FieldViolation, InvalidRequest

Place = TypeVar("Place")

OWN = "-"
"""Stands for the caller's own account in a resource name."""

_UUID = "[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}"
_ACCOUNT_ID = "[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_IS_UUID = re.compile(_UUID, re.ASCII)
_IS_ACCOUNT_ID = re.compile(_ACCOUNT_ID, re.ASCII)
_IS_ACCOUNT = re.compile(f"accounts/({_ACCOUNT_ID}|-)", re.ASCII)
_IS_JOB = re.compile(f"accounts/({_ACCOUNT_ID}|-)/jobs/({_UUID})", re.ASCII)
_IS_VIDEO = re.compile(f"accounts/({_ACCOUNT_ID}|-)/jobs/({_UUID})/videos/(mp4|webp)", re.ASCII)
_IS_IMAGE = re.compile(f"accounts/({_ACCOUNT_ID}|-)/jobs/({_UUID})/images/([1-4])", re.ASCII)
# Slots are named as their machines are: `node-a/gpu-0`.
_IS_WORKER = re.compile(r"workers/([A-Za-z0-9._-]{1,120}(?:/[A-Za-z0-9._-]{1,120}){0,3})", re.ASCII)
_IS_PLAN = re.compile(r"plans/([a-z0-9-]{1,63})", re.ASCII)
_IS_PLAN_VERSION = re.compile(r"plans/([a-z0-9-]{1,63})(?:/versions/([1-9][0-9]{0,8}))?", re.ASCII)
_IS_KEY = re.compile(f"accounts/({_ACCOUNT_ID})/keys/([0-9a-f]{{16}})", re.ASCII)

_USUAL_PAGE = 25
_LONGEST_PAGE = 100
# Of the ledger's lists, whose rows are short and often read to their end.
_USUAL_LEDGER_PAGE = 100
_LONGEST_LEDGER_PAGE = 1_000
_LONGEST_REASON = 1_000
_LONGEST_ETAG = 100


@dataclass(frozen=True, kw_only=True)
class JobName:
    """A job, and one of its pictures or videos where one is named."""

    account_id: str
    """`-` for whoever owns it."""
    job_id: str
    image: int | None = None
    video: str | None = None
    """`mp4` or `webp`."""

    def is_of(self, account_id: str) -> bool:
        """Return whether the name says nothing against the job being of this account."""
        return self.account_id in (OWN, account_id)


@dataclass(frozen=True, kw_only=True)
class KeyName:
    """A key of an account."""

    account_id: str
    key_id: str


@dataclass(frozen=True, kw_only=True)
class AccountName:
    """An account."""

    account_id: str


class Violations:
    """Everything wrong with one request, in the order it was found."""

    def __init__(self) -> None:
        self._found: list[FieldViolation] = []

    def add(self, field: str, sentence: str) -> None:
        """Note one thing."""
        self._found.append(FieldViolation(field=field, sentence=sentence))

    def refuse(self) -> None:
        """Raise InvalidRequest if anything was noted."""
        if self._found:
            raise InvalidRequest(self._found)

    def request_id(self, text: str) -> str:
        """Return a request id in its one spelling."""
        request_id = read_request_id(text)
        if request_id is None:
            self.add(
                "request_id",
                "request_id must be a UUID of your choosing; a request repeated under it counts once.",
            )
            return ""
        return request_id

    def account(self, field: str, text: str, *, own: str) -> str:
        """Return the id in an account's name; `own` where it is empty or `accounts/-`."""
        if not text:
            return own
        match = _IS_ACCOUNT.fullmatch(text)
        if match is None:
            self.add(field, f"{field} must be `accounts/{{account}}`, or `accounts/-` for your own.")
            return own
        return own if match[1] == OWN else match[1]

    def named_account(self, field: str, text: str) -> str:
        """Return the id in the name of an account that must be given."""
        match = _IS_ACCOUNT.fullmatch(text)
        if match is None or match[1] == OWN:
            self.add(field, f"{field} must be `accounts/{{account}}`.")
            return ""
        return match[1]

    def new_account_id(self, field: str, text: str) -> str:
        """Return an id that an account may be opened with."""
        if not _IS_ACCOUNT_ID.fullmatch(text) or text.startswith(ERASED):
            self.add(
                field,
                f"{field} must be 1 to 63 lower-case letters, digits and dashes, with no dash at either end, "
                f"and not begin with `{ERASED}`.",
            )
        return text

    def plan(self, field: str, text: str) -> str:
        """Return the name in a plan's resource name."""
        match = _IS_PLAN.fullmatch(text)
        if match is None:
            self.add(field, f"{field} must be `plans/{{plan}}`.")
            return ""
        return match[1]

    def plan_version(self, field: str, text: str) -> tuple[str, int | None]:
        """Return the plan and the version in a resource name; without one, None for the newest."""
        match = _IS_PLAN_VERSION.fullmatch(text)
        if match is None:
            self.add(field, f"{field} must be `plans/{{plan}}` or `plans/{{plan}}/versions/{{n}}`.")
            return "", None
        return match[1], None if match[2] is None else int(match[2])

    def key(self, field: str, text: str) -> KeyName | None:
        """Return the key that a name means."""
        match = _IS_KEY.fullmatch(text)
        if match is None:
            self.add(field, f"{field} must be `accounts/{{account}}/keys/{{id}}`, as ListApiKeys gives it.")
            return None
        return KeyName(account_id=match[1], key_id=match[2])

    def worker(self, field: str, text: str) -> str:
        """Return the id in a worker's resource name."""
        match = _IS_WORKER.fullmatch(text)
        if match is None:
            self.add(field, f"{field} must be `workers/{{worker}}`, as ListWorkers gives it.")
            return ""
        return match[1]

    def job(self, field: str, text: str) -> JobName | None:
        """Return the job a name means."""
        match = _IS_JOB.fullmatch(text)
        if match is None:
            self.add(field, f"{field} must be `accounts/{{account}}/jobs/{{uuid}}`.")
            return None
        return JobName(account_id=match[1], job_id=match[2].lower())

    def image(self, field: str, text: str) -> JobName | None:
        """Return the picture a name means."""
        match = _IS_IMAGE.fullmatch(text)
        if match is None:
            self.add(field, f"{field} must be `accounts/{{account}}/jobs/{{uuid}}/images/{{1..4}}`.")
            return None
        return JobName(account_id=match[1], job_id=match[2].lower(), image=int(match[3]))

    def files(self, field: str, text: str, *, own: str) -> JobName | AccountName | None:
        """Return the account, job, picture or video a name means; `own` is the account of `accounts/-`."""
        if "/images/" in text:
            return self.image(field, text)
        video = _IS_VIDEO.fullmatch(text)
        if video is not None:
            return JobName(account_id=video[1], job_id=video[2].lower(), video=video[3])
        if "/videos/" in text:
            self.add(field, f"{field} must be `accounts/{{account}}/jobs/{{uuid}}/videos/{{mp4,webp}}`.")
            return None
        if "/jobs/" in text:
            return self.job(field, text)
        if not _IS_ACCOUNT.fullmatch(text):
            self.add(
                field,
                f"{field} must be `accounts/{{account}}/jobs/{{uuid}}`, an image or a video of a job, or "
                "`accounts/{account}` for all images of an account.",
            )
            return None
        return AccountName(account_id=self.account(field, text, own=own))

    def reason(self, text: str) -> str:
        """Return an admin's reason, which is mandatory."""
        if not text.strip() or len(text) > _LONGEST_REASON or "\0" in text:
            self.add(
                "reason",
                f"reason must say in 1 to {_LONGEST_REASON} characters why; it is kept in the audit record.",
            )
        return text.strip()

    def etag_of_preview(self, text: str) -> str:
        """Return the etag of what was shown before; empty: whatever it comes to."""
        if len(text) > _LONGEST_ETAG or "\0" in text:
            self.add("etag", "etag must be that of a preview, or empty.")
        return text

    def time(self, field: str, timestamp: Timestamp) -> datetime | None:
        """Return the time that a field says, aware; its numbers may be of no year there is."""
        try:
            return timestamp.ToDatetime(tzinfo=UTC)
        except (ValueError, OverflowError):
            self.add(field, f"{field} must lie in the years 1 to 9999, with nanos of 0 to 999,999,999.")
            return None

    def page_size(self, asked: int) -> int:
        """Return how many to show: 25 if nothing was asked, never more than 100."""
        return self._page_size(asked, _USUAL_PAGE, _LONGEST_PAGE)

    def ledger_page_size(self, asked: int) -> int:
        """Return how many rows of the ledger to show: 100 if nothing was asked, never more than 1,000."""
        return self._page_size(asked, _USUAL_LEDGER_PAGE, _LONGEST_LEDGER_PAGE)

    def _page_size(self, asked: int, usual: int, longest: int) -> int:
        if asked < 0:
            self.add("page_size", "page_size must not be negative.")
        return min(asked, longest) or usual

    def page_token(
        self, token: str, binding: Iterable[object], read: Callable[[Mapping[str, Any]], Place]
    ) -> Place | None:
        """Return the place that a token of the same request continues behind; None for the first page.

        `read` makes a place of what was given to `page_token`; it raises KeyError, TypeError, ValueError or
        OverflowError for anything else.
        """
        if not token:
            return None
        try:
            document = json.loads(base64.urlsafe_b64decode(token.encode()))
            if document["of"] == _bound(binding):
                return read(document["after"])
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError):
            # A token that cannot be read and one of another request get the same answer. RecursionError is
            # what json raises for thousands of brackets within each other.
            pass
        self.add(
            "page_token",
            "page_token is not one that this request's earlier page returned; leave it empty to start again.",
        )
        return None


def page_token(after: Mapping[str, Any], binding: Iterable[object]) -> str:
    """Return an opaque token that continues behind `after`, good only for a request with the same `binding`.

    It is not signed: whoever forges one skips pages of what they may see anyway.
    """
    return base64.urlsafe_b64encode(
        json.dumps({"of": _bound(binding), "after": dict(after)}).encode()
    ).decode()


def whole_number(value: object) -> int:
    """Return a number of a page token; raises TypeError for anything else, JSON's 1.5 and true included."""
    if type(value) is not int:
        raise TypeError("not a whole number")
    return value


def storable_text(value: object) -> str:
    """Return a text of a page token; raises ValueError for what no row has: NUL, or half a character."""
    if not isinstance(value, str) or "\0" in value:
        raise ValueError("not a text that could be stored")
    value.encode()
    return value


def read_request_id(text: str) -> str | None:
    """Return a request id in its one spelling, None if it is none."""
    return text.lower() if _IS_UUID.fullmatch(text) else None


def digest(request: Message) -> bytes:
    """Return SHA-256 of what a request asks for: all its fields but its id and `validate_only`."""
    content = type(request)()
    content.CopyFrom(request)
    for field in ("request_id", "validate_only"):
        if field in content.DESCRIPTOR.fields_by_name:
            content.ClearField(field)
    return hashlib.sha256(content.SerializeToString(deterministic=True)).digest()


def _bound(binding: Iterable[object]) -> str:
    return hashlib.sha256(repr(tuple(binding)).encode()).hexdigest()[:16]
