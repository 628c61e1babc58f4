"""What moderators decide: the rules that prompts are held against, hidden jobs, blocked accounts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from gpu_worker.contract import SourceImage
from scheduler.store.accounts import Role
from scheduler.store.pool import Connection

_CATEGORY = re.compile("[a-z][a-z0-9-]{0,39}", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Words that, standing together as whole words, make a prompt belong to a category."""

    pattern: str
    category: str
    """`gore`, `adult`, `harassment`, or a name that moderators have made up."""
    created_at: datetime | None = None
    """None: it is not in the table yet."""


@dataclass(frozen=True, kw_only=True)
class RuleSet:
    """All rules, in the order of their patterns."""

    etag: str
    """Another one after every change."""
    rules: tuple[Rule, ...]


@dataclass(frozen=True, kw_only=True)
class Hidden:
    """That a moderator keeps a job out of the feed."""

    category: str
    at: datetime


@dataclass(frozen=True, kw_only=True)
class PromptOfJob:
    """What was asked for with a job."""

    job_id: str
    account_id: str
    prompt: str
    """As typed."""
    text: str
    """What of it is for the model."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What decides whether an account may be blocked, and unblocked."""

    blocked: bool
    erased: bool
    """Or will be, once its last job has ended."""
    roles: frozenset[Role]
    """Of its keys that are not revoked."""


def is_category(text: str) -> bool:
    """Return whether a text may be the name of a category, which whoever is refused is told."""
    return _CATEGORY.fullmatch(text) is not None


async def etag(connection: Connection) -> str:
    """Return the etag of the rules as they are."""
    return str(await connection.fetchval("SELECT etag FROM scheduler.moderation_rule_set"))


async def rule_set(connection: Connection) -> RuleSet:
    """Return all rules with their etag, both of one moment."""
    rows = await connection.fetch(
        """SELECT etag, pattern, category, created_at
           FROM scheduler.moderation_rule_set LEFT JOIN scheduler.moderation_rule ON true
           -- As Python orders texts.
           ORDER BY pattern COLLATE "C"
        """
    )
    return RuleSet(
        etag=str(rows[0]["etag"]),
        rules=tuple(
            Rule(pattern=row["pattern"], category=row["category"], created_at=row["created_at"])
            for row in rows
            if row["pattern"] is not None
        ),
    )


async def lock_rules(connection: Connection) -> RuleSet:
    """Return all rules and let nobody else change any until the transaction ends."""
    await connection.execute("SELECT FROM scheduler.moderation_rule_set FOR UPDATE")
    return await rule_set(connection)


async def change_rules(
    connection: Connection, *, remove: Sequence[str], add: Sequence[Rule], at: datetime
) -> str:
    """Remove the rules of these patterns, then add others; return the new etag. The caller holds the lock."""
    await connection.execute(
        "DELETE FROM scheduler.moderation_rule WHERE pattern = ANY($1::text[])", list(remove)
    )
    await connection.execute(
        """INSERT INTO scheduler.moderation_rule (pattern, category, created_at)
           SELECT pattern, category, $3 FROM unnest($1::text[], $2::text[]) AS rule (pattern, category)""",
        [rule.pattern for rule in add],
        [rule.category for rule in add],
        at,
    )
    return await etag(connection)


async def newest_prompts(connection: Connection, limit: int) -> list[PromptOfJob]:
    """Return what was asked for with up to `limit` of the newest jobs that are not deleted, newest first."""
    rows = await connection.fetch(
        """SELECT job.job_id::text, account_id, prompt, spec ->> 'prompt' AS text
           -- By their first events, whose numbers are drawn together with theirs: these have an index.
           FROM scheduler.job_event AS event JOIN scheduler.job USING (job_id)
           WHERE deleted_at IS NULL
                 AND NOT EXISTS (SELECT FROM scheduler.job_event AS older
                                 WHERE older.job_id = event.job_id AND older.seq < event.seq)
           ORDER BY event.seq DESC LIMIT $1""",
        limit,
    )
    return [PromptOfJob(**row) for row in rows]


async def hidden_like(
    connection: Connection, account_id: str, job_id: str, enlarged: SourceImage | None
) -> tuple[str, str] | None:
    """Return id and category of a job that is hidden: this one, or one that enlarges the same picture.

    None if there is none. One that was deleted counts too.
    """
    row = await connection.fetchrow(
        """SELECT job_id::text, category FROM scheduler.hidden_job WHERE job_id = $2
           UNION ALL
           -- Only what came after the grid, as far as the account's index goes.
           SELECT job_id::text, category FROM scheduler.job JOIN scheduler.hidden_job USING (job_id)
           WHERE account_id = $1
                 AND arrival > (SELECT arrival FROM scheduler.job AS grid WHERE job_id = $3::uuid)
                 AND spec ->> 'kind' IN ('upscale_light', 'upscale_detailed', 'upscale_max')
                 AND spec -> 'source' ->> 'job_id' = $3::uuid::text
                 AND (spec -> 'source' ->> 'index')::int = $4
           LIMIT 1""",
        account_id,
        UUID(job_id),
        None if enlarged is None else UUID(enlarged.job_id),
        None if enlarged is None else enlarged.index,
    )
    return None if row is None else (row["job_id"], row["category"])


async def hidden(connection: Connection, job_id: str) -> Hidden | None:
    """Return why and since when a job is hidden, None if it is not."""
    row = await connection.fetchrow(
        "SELECT category, hidden_at AS at FROM scheduler.hidden_job WHERE job_id = $1", UUID(job_id)
    )
    return None if row is None else Hidden(**row)


async def hide(connection: Connection, job_id: str, category: str, at: datetime) -> None:
    """Keep a job out of the feed; one that is hidden already gets the new category."""
    await connection.execute(
        """INSERT INTO scheduler.hidden_job (job_id, category, hidden_at) VALUES ($1, $2, $3)
           ON CONFLICT (job_id) DO UPDATE SET category = EXCLUDED.category""",
        UUID(job_id),
        category,
        at,
    )


async def unhide(connection: Connection, job_id: str) -> None:
    """Let the feed show a job again."""
    await connection.execute("DELETE FROM scheduler.hidden_job WHERE job_id = $1", UUID(job_id))


async def lock_standing(connection: Connection, account_id: str) -> Standing | None:
    """Lock an account's row and return how it stands; None if there is no such account."""
    row = await connection.fetchrow(
        """SELECT blocked, erasing OR erased_at IS NOT NULL AS erased
           FROM scheduler.account AS mine JOIN billing.account USING (account_id)
           WHERE account_id = $1 FOR NO KEY UPDATE OF mine""",
        account_id,
    )
    if row is None:
        return None
    keys = await connection.fetch(
        "SELECT DISTINCT role FROM scheduler.api_key WHERE account_id = $1 AND revoked_at IS NULL", account_id
    )
    return Standing(
        blocked=row["blocked"], erased=row["erased"], roles=frozenset(Role(key["role"]) for key in keys)
    )


async def set_blocked(connection: Connection, account_id: str, *, blocked: bool) -> None:
    """Block an account, whose row the caller has locked, or let it in again."""
    await connection.execute(
        "UPDATE scheduler.account SET blocked = $2 WHERE account_id = $1", account_id, blocked
    )
