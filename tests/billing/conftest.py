"""The ledger alone: no scheduler wrote jobs and attempts beside what these tests hold and settle."""

from __future__ import annotations

from collections.abc import Collection

import pytest

from billing.invariants import INVARIANTS, Invariant


@pytest.fixture
def promises() -> Collection[Invariant]:
    return INVARIANTS
