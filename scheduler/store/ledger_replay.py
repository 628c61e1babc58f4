"""The ledger's journal replayed by its second auditor, in a process of its own.

It takes a minute of a core for a million rows, and memory for every lot and attempt. A front door has one
event loop for all its callers, so neither is taken there; and a process can be ended when its time is over.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from asyncio.subprocess import PIPE, Process
from dataclasses import asdict

import asyncpg

from billing.auditor import Finding, replay
from scheduler.refusals import Overloaded
from scheduler.store.lanes import AWAY, session_settings

# Behind the front door, which has the same cores.
_NICENESS = 10
_EXIT_AWAY = 75  # EX_TEMPFAIL of sysexits.h
# To start Python, before it looks at the clock itself.
_STARTS_WITHIN_S = 10.0


async def replayed(dsn: str, within_s: float) -> list[Finding]:
    """Return what a replay of the whole journal of a database finds; nothing is what is hoped for.

    Raises TimeoutError where it is not done `within_s`, and Overloaded where the database is away.
    """
    async with asyncio.timeout(within_s):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", __name__, str(within_s + _STARTS_WITHIN_S), stdin=PIPE, stdout=PIPE
        )
        try:
            # Not as an argument, which every user of the machine may read: it has a password.
            said, _ = await process.communicate(dsn.encode())
        finally:
            await _end(process)
    if process.returncode == _EXIT_AWAY:
        raise Overloaded(sentence="The database does not answer at the moment. Send the same request again.")
    assert process.returncode == 0, f"the replay ended with {process.returncode}: see its standard error"
    return [Finding(**finding) for finding in json.loads(said)]


async def _end(process: Process) -> None:
    if process.returncode is None:
        process.kill()
        await process.wait()


async def _replay(dsn: str, within_s: float) -> list[Finding]:
    # A limit of its own, too: whoever started it may be gone.
    async with asyncio.timeout(within_s):
        connection = await asyncpg.connect(dsn, server_settings=session_settings("darkroom ledger replay"))
        try:
            return await replay(connection)
        finally:
            await connection.close(timeout=1)


def main() -> None:
    """Replay the journal of the database whose DSN stands on the standard input; print findings as JSON."""
    os.nice(_NICENESS)
    try:
        findings = asyncio.run(_replay(sys.stdin.read(), float(sys.argv[1])))
    except AWAY:
        sys.exit(_EXIT_AWAY)
    json.dump([asdict(finding) for finding in findings], sys.stdout)


if __name__ == "__main__":
    main()
