"""How late a front door is: how long a call waits before anybody looks at it.

gRPC hands calls to Python one after the other and keeps the rest where nothing can be asked of them, not
how many they are. So the door knocks at itself, by a socket that nobody else finds: as long as its knock
waits, whoever comes now waits too. (Calls in progress, counted at the door, do not tell: where Python is
what there is too little of, few are in progress and thousands wait.)
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

# Seldom enough to cost a hundredth of what the door can do, often enough to notice within one answer's time.
_EVERY_S = 0.1


class Lateness:
    """Of one front door. `now_s` is a monotonic clock."""

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s
        self._last_s = 0.0
        """What the last knock waited that was answered."""
        self._knocked_s: float | None = None
        """When the one was made that is not answered yet."""

    def ms(self) -> int:
        """Return how long the last knock waited, or this one has already, in milliseconds."""
        waiting_s = 0.0 if self._knocked_s is None else self._now_s() - self._knocked_s
        return round(1_000 * max(self._last_s, waiting_s))

    async def run(self, address: str) -> None:
        """Knock there again and again, until cancelled."""
        async with grpc.aio.insecure_channel(address) as channel:
            while True:
                await self.knock(channel)
                await asyncio.sleep(_EVERY_S)

    async def knock(self, channel: grpc.aio.Channel) -> None:
        """Knock once; what the door says does not matter, only when."""
        self._knocked_s = self._now_s()
        with suppress(grpc.aio.AioRpcError):  # as a door says that closes
            await health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), wait_for_ready=True
            )
        self._last_s = self._now_s() - self._knocked_s
        self._knocked_s = None


@contextmanager
def private_socket(server: grpc.aio.Server) -> Iterator[str]:
    """Let a server listen on a socket that only this user reaches, besides all others; yield its address."""
    with tempfile.TemporaryDirectory(prefix="dr-", ignore_cleanup_errors=True) as folder:
        address = f"unix:{Path(folder) / 'door'}"
        server.add_insecure_port(address)
        yield address
