"""A change by an admin or an operator: one transaction, which claims its request id first and stores its
answer last, so that a repeated request returns the first answer and does nothing.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

from google.protobuf import json_format
from google.protobuf.message import Message

from billing import audit, idempotency
from billing.refusals import Refusal
from scheduler.frontdoor.fields import digest
from scheduler.frontdoor.gate import OnRefusal, caller
from scheduler.metrics import AdminAction, AdminResult, FrontDoorMetrics
from scheduler.store.pool import Connection, Pool

_Answer = TypeVar("_Answer", bound=Message)


@dataclass(kw_only=True)
class Deed:
    """One change, inside its transaction."""

    connection: Connection
    method: str
    request_id: str
    actor: str
    at: datetime
    first_answer: dict[str, Any] | None = None
    """Of this request id, if it came before: then nothing is to be done."""
    answer: dict[str, Any] | None = None
    """To be set by whoever does the deed; stored for repetitions."""

    async def record(
        self, *, target: str, reason: str, before: dict[str, Any] | None, after: dict[str, Any] | None
    ) -> None:
        """Write the audit event of the deed."""
        await audit.record(
            self.connection,
            actor=self.actor,
            action=self.method,
            target=target,
            reason=reason,
            request_id=self.request_id,
            before=before,
            after=after,
            at=self.at,
        )


@dataclass(frozen=True, kw_only=True)
class Deeds:
    """Opens the transactions of changes. `clock` returns the present time, aware."""

    pool: Pool
    metrics: FrontDoorMetrics
    clock: Callable[[], datetime]

    async def do(
        self,
        action: AdminAction,
        request: Message,
        request_id: str,
        kind: type[_Answer],
        work: Callable[[Deed], Awaitable[_Answer]],
        *,
        rehearse: bool = False,
    ) -> _Answer:
        """Return what `work` answers, or the first answer of this request id; see `open`.

        With `rehearse` the work is done, answered and taken back, and nothing is claimed or counted.
        """
        if rehearse:
            async with self.pool.rehearsal() as connection:
                return await work(
                    Deed(
                        connection=connection,
                        method=_method(request),
                        request_id=request_id,
                        actor=caller().actor,
                        at=self.clock(),
                    )
                )
        async with self.open(action, request, request_id) as deed:
            if deed.first_answer is not None:
                return json_format.ParseDict(deed.first_answer, kind())
            answer = await work(deed)
            deed.answer = json_format.MessageToDict(answer)
        return answer

    @asynccontextmanager
    async def open(self, action: AdminAction, request: Message, request_id: str) -> AsyncIterator[Deed]:
        """Open the transaction of a change, which is named as its request message without `Request`.

        Raises RequestIdReused or Overloaded.
        """
        method = _method(request)
        principal = caller()
        async with self.pool.transaction() as connection:
            outcome = await idempotency.claim(
                connection, principal.account_id, method, request_id, digest(request)
            )
            deed = Deed(
                connection=connection,
                method=method,
                request_id=request_id,
                actor=principal.actor,
                at=self.clock(),
                first_answer=outcome,
            )
            yield deed
            if outcome is None:
                assert deed.answer is not None, f"{method} ended without an answer"
                await idempotency.store(connection, principal.account_id, method, request_id, deed.answer)
        result = AdminResult.DONE if outcome is None else AdminResult.REPLAYED
        self.metrics.admin_acted(action=action, result=result)
        if outcome is not None:
            self.metrics.replayed(method)


def _method(request: Message) -> str:
    return request.DESCRIPTOR.name.removesuffix("Request")


def deed_refused(metrics: FrontDoorMetrics, action: AdminAction) -> OnRefusal:
    """Return what counts a refused change."""

    def count(_: Message, __: Refusal) -> None:
        metrics.admin_acted(action=action, result=AdminResult.REFUSED)

    return count
