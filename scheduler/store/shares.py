"""The fair queue's memory of each account, kept in step with the board.

Two writers touch it. The loop writes what the board computed: absolute tags. A settlement adds the correction
of one attempt. A settlement may be committed before the board has heard of it, and an absolute tag computed
without it would undo it; so the loop's writes add the corrections of those attempts again. Then memory and
database agree to the last unit once the board has heard.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import asyncpg

from scheduler.policy.decisions import Charge
from scheduler.policy.ids import AccountId, Tier
from scheduler.policy.parameters import Parameters
from scheduler.policy.usage import ShareChange, correction

TagChange = tuple[AccountId, Tier, int | None]
"""The tag an account has in a tier now; None while it is not eligible."""

Unheard = Mapping[tuple[str, str], int]
"""Corrections of (account, tier) tags that are in the database and not yet on the board."""


def correction_of(attempt: asyncpg.Record, used_ms: int, parameters: Parameters) -> ShareChange:
    """Return what the end of an attempt changes; `attempt` has the columns of its row and its job's."""
    return correction(
        tier=Tier(attempt["tier"]),
        predicted_ms=attempt["predicted_ms"],
        weight_milli=attempt["weight_milli"],
        charged_at_ms=attempt["charged_at_ms"],
        decay_origin_ms=attempt["decay_origin_ms"],
        actual_ms=used_ms,
        parameters=parameters,
    )


async def lock_shares(connection: asyncpg.Connection, account_ids: Iterable[str]) -> None:
    """Lock these accounts' rows, in one order for all, until the transaction ends."""
    await connection.execute(
        """SELECT FROM scheduler.fair_share WHERE account_id = ANY($1::text[])
           ORDER BY account_id, tier FOR NO KEY UPDATE""",
        list(account_ids),
    )


async def ends_unheard_of(
    connection: asyncpg.Connection,
    running: Sequence[str],
    account_ids: Iterable[str],
    parameters: Parameters,
) -> Unheard:
    """Lock these accounts' rows and return the corrections that the board has not heard of.

    `running` are the attempts of these accounts that the board takes for running.
    """
    await lock_shares(connection, account_ids)
    if not running:
        return {}
    unheard: defaultdict[tuple[str, str], int] = defaultdict(int)
    for row in await connection.fetch(
        """SELECT job.account_id, job.tier, attempt.predicted_ms, weight_milli, charged_at_ms, gpu_ms,
                  (SELECT decay_origin_ms FROM scheduler.cell WHERE tier = 'relax') AS decay_origin_ms
           FROM scheduler.attempt JOIN scheduler.job USING (job_id)
           WHERE attempt_id = ANY($1::uuid[]) AND attempt.state NOT IN ('running', 'migrated')""",
        running,
    ):
        unheard[row["account_id"], row["tier"]] += correction_of(row, row["gpu_ms"], parameters).tag_delta
    return unheard


async def store_tags(connection: asyncpg.Connection, tags: Sequence[TagChange], unheard: Unheard) -> None:
    """Write the tags of accounts that became eligible, or no longer are."""
    if not tags:
        return
    await connection.execute(
        """INSERT INTO scheduler.fair_share (account_id, tier, tag)
           SELECT * FROM unnest($1::text[], $2::text[], $3::bigint[])
           ON CONFLICT (account_id, tier) DO UPDATE SET tag = EXCLUDED.tag""",
        [account_id for account_id, _, _ in tags],
        [tier.value for _, tier, _ in tags],
        [None if tag is None else tag + unheard.get((account_id, tier), 0) for account_id, tier, tag in tags],
    )


async def store_charges(
    connection: asyncpg.Connection, charges: Sequence[tuple[AccountId, Tier, Charge]], unheard: Unheard
) -> None:
    """Write what a batch of starts changes: tags, usage and virtual times. In the order of the decisions."""
    if not charges:
        return
    # The last charge of an account in a tier already includes the earlier ones of the batch; usage adds up.
    last = {(account_id, tier): charge for account_id, tier, charge in charges}
    usage: defaultdict[str, float] = defaultdict(float)
    virtual_time: defaultdict[Tier, int] = defaultdict(int)
    for account_id, tier, charge in charges:
        usage[account_id] += charge.usage_added
        virtual_time[tier] = max(virtual_time[tier], charge.virtual_time)
    await connection.execute(
        """INSERT INTO scheduler.fair_share (account_id, tier, finish_tag, tag, usage)
           SELECT * FROM unnest($1::text[], $2::text[], $3::bigint[], $4::bigint[], $5::float8[])
           ON CONFLICT (account_id, tier) DO UPDATE
           SET finish_tag = EXCLUDED.finish_tag, tag = EXCLUDED.tag,
               usage = fair_share.usage + EXCLUDED.usage""",
        [account_id for account_id, _ in last],
        [tier.value for _, tier in last],
        [charge.finish_tag + unheard.get(key, 0) for key, charge in last.items()],
        [
            None if charge.next_tag is None else charge.next_tag + unheard.get(key, 0)
            for key, charge in last.items()
        ],
        # Kept in the row of relax: with the tags where that is written anyway, since a row's every version is
        # in the way of the next as long as an old transaction is open.
        [usage.pop(account_id, 0.0) if tier is Tier.RELAX else 0.0 for account_id, tier in last],
    )
    if usage:
        await connection.execute(
            """INSERT INTO scheduler.fair_share (account_id, tier, usage)
               SELECT account_id, 'relax', usage
               FROM unnest($1::text[], $2::float8[]) AS new (account_id, usage)
               ON CONFLICT (account_id, tier) DO UPDATE SET usage = fair_share.usage + EXCLUDED.usage""",
            list(usage),
            list(usage.values()),
        )
    await connection.execute(
        """UPDATE scheduler.cell SET virtual_time = greatest(cell.virtual_time, new.virtual_time)
           FROM unnest($1::text[], $2::bigint[]) AS new (tier, virtual_time) WHERE cell.tier = new.tier""",
        [tier.value for tier in virtual_time],
        list(virtual_time.values()),
    )
