"""What admins look up: who did what, and whether everything holds that must."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from billing import audit
from billing.v1 import admin_pb2
from scheduler.frontdoor import ledger_messages as messages
from scheduler.frontdoor.fields import Violations, page_token, whole_number
from scheduler.frontdoor.gate import caller
from scheduler.frontdoor.moderation_service import ACTION_OF as ACTION_OF_MODERATOR
from scheduler.store import invariants
from scheduler.store.invariants import NOT_ASKED, InvariantResult
from scheduler.store.ledger_replay import replayed
from scheduler.store.pool import Pool

_USUAL_WITHIN_MS = 60_000
_LONGEST_WITHIN_MS = 3_600_000
_LONGEST_FILTER = 300
_FIRST_FINDINGS = 3
_DEEDS_OF_MODERATORS = [path.rpartition("/")[2] for path in ACTION_OF_MODERATOR]


@dataclass(frozen=True, kw_only=True)
class Records:
    """The methods of AdminService that only look."""

    pool: Pool

    async def audit_events(
        self, request: admin_pb2.ListAuditEventsRequest
    ) -> admin_pb2.ListAuditEventsResponse:
        """Return a page of audit events, newest first: to admins all, to others those about moderation."""
        violations = Violations()
        limit = violations.ledger_page_size(request.page_size)
        since = violations.time("from", getattr(request, "from")) if request.HasField("from") else None
        until = violations.time("until", request.until) if request.HasField("until") else None
        for field, text in (("target", request.target), ("actor", request.actor)):
            if len(text) > _LONGEST_FILTER or "\0" in text:
                violations.add(field, f"{field} must be a resource name.")
        target, actor = request.target.rstrip("/"), request.actor.rstrip("/")
        binding = ("audit", target, actor, since, until)
        before_id = violations.page_token(request.page_token, binding, _number)
        violations.refuse()
        async with self.pool.reading() as connection:
            listed = await audit.events(
                connection,
                target=target,
                actor=actor,
                since=since,
                until=until,
                actions=None if caller().is_admin else _DEEDS_OF_MODERATORS,
                before_id=before_id,
                limit=limit + 1,
            )
        page = listed[:limit]
        return admin_pb2.ListAuditEventsResponse(
            events=[messages.audit_event(event) for event in page],
            next_page_token=page_token({"number": page[-1].audit_id}, binding) if len(listed) > limit else "",
        )

    async def check(self, request: admin_pb2.CheckInvariantsRequest) -> admin_pb2.CheckInvariantsResponse:
        """Ask every invariant, and a second program if that is wanted; what was not asked does not hold."""
        violations = Violations()
        if not 0 <= request.within_ms <= _LONGEST_WITHIN_MS:
            violations.add("within_ms", f"within_ms must be 0 to {_LONGEST_WITHIN_MS}.")
        violations.refuse()
        until_s = time.monotonic() + (request.within_ms or _USUAL_WITHIN_MS) / 1000
        async with self.pool.reading() as connection:
            results = await invariants.results(connection, request.within_ms or _USUAL_WITHIN_MS)
        if request.replay:
            results.append(await self._replayed(until_s - time.monotonic()))
        return admin_pb2.CheckInvariantsResponse(
            results=[messages.invariant_result(result) for result in results],
            holds=all(result.violations == 0 for result in results),
        )

    async def _replayed(self, within_s: float) -> InvariantResult:
        began_s = time.monotonic()
        violations, first = NOT_ASKED, []
        try:
            findings = await replayed(self.pool.dsn, within_s)
            violations = len(findings)
            first = [
                {"number": one.number, "what": one.what, "sentence": one.sentence}
                for one in findings[:_FIRST_FINDINGS]
            ]
        except TimeoutError:
            pass  # as an invariant that there was no time for
        return InvariantResult(
            number=0,
            sentence="A second program that replays the whole journal agrees.",
            violations=violations,
            first=tuple(first),
            took_ms=round((time.monotonic() - began_s) * 1000),
        )


def _number(token: Mapping[str, Any]) -> int:
    number = whole_number(token["number"])
    if not 0 < number < 2**63:
        raise ValueError("no row has this number")
    return number
