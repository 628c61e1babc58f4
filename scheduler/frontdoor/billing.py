"""BillingService: an account in the ledger, for its owner and for admins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import grpc

from billing import ledger
from billing.refusals import UnknownAccount
from billing.v1 import billing_pb2, billing_pb2_grpc
from scheduler.frontdoor import messages
from scheduler.frontdoor.fields import Violations
from scheduler.frontdoor.gate import caller
from scheduler.refusals import NotFoundOrNotYours
from scheduler.store.pool import Pool

_Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, kw_only=True)
class BillingService(billing_pb2_grpc.BillingServiceServicer):
    """The methods of billing.v1.BillingService. `clock` returns the present time, aware."""

    pool: Pool
    clock: Callable[[], datetime]

    async def GetBalance(  # noqa: N802
        self, request: billing_pb2.GetBalanceRequest, context: _Context
    ) -> billing_pb2.Balance:
        """Return fast time left, held and used in the present period; of another account only to admins."""
        principal = caller()
        violations = Violations()
        account_id = violations.account("account", request.account, own=principal.account_id)
        violations.refuse()
        if not principal.reads_account(account_id):
            raise NotFoundOrNotYours
        async with self.pool.transaction() as connection:
            try:
                return messages.balance(await ledger.balance(connection, account_id, self.clock()))
            except UnknownAccount as unknown:
                raise NotFoundOrNotYours from unknown
