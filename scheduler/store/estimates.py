"""What was learned about how long jobs take, as rows: each settlement adds what its attempts took.

Estimates never make money wait. All lanes of settlement meet at the few rows of the commonest shapes, so
whoever finds a row locked goes on without it: one observation fewer, of a shape that is being learned anyway.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import asyncpg

from gpu_worker.contract import RenderKind
from scheduler.estimator import Learned, Observation, Shape, learned

_COLUMNS = "kind, model, width, height, steps, device, seen, step_us, rest_us"
_KEYS = """unnest($1::text[], $2::text[], $3::integer[], $4::integer[], $5::integer[], $6::text[])
           AS wanted (kind, model, width, height, steps, device)"""
_NEW = """unnest($1::text[], $2::text[], $3::integer[], $4::integer[], $5::integer[], $6::text[],
                 $7::bigint[], $8::float8[], $9::float8[])
          AS new (kind, model, width, height, steps, device, seen, step_us, rest_us)"""
_OF_NEW = """(estimate.kind, estimate.model, estimate.width, estimate.height, estimate.steps, estimate.device)
             = (new.kind, new.model, new.width, new.height, new.steps, new.device)"""

_Key = tuple[Shape, str]


async def read_estimates(connection: asyncpg.Connection) -> list[Learned]:
    """Return every row of a kind that this release knows: a newer one may have written others."""
    rows = await connection.fetch(
        f"SELECT {_COLUMNS} FROM scheduler.estimate WHERE kind = ANY($1::text[])",  # noqa: S608 - constants
        [kind.value for kind in RenderKind],
    )
    return [_row(row) for row in rows]


async def learn(connection: asyncpg.Connection, observations: Sequence[Observation]) -> None:
    """Add what jobs took to the rows of their shapes and device types.

    Belongs into the transaction that settles them, so that each is counted once, and last in it, since it
    locks rows that others want. A row that another transaction is writing is left alone.
    """
    if not observations:
        return
    wanted = {(observation.shape, observation.device) for observation in observations}
    locked = await connection.fetch(
        f"""SELECT {_COLUMNS} FROM scheduler.estimate JOIN {_KEYS}
            USING (kind, model, width, height, steps, device)
            FOR NO KEY UPDATE OF estimate SKIP LOCKED""",  # noqa: S608 - constants
        *_key_columns(wanted),
    )
    before = {(row.shape, row.device): row for row in map(_row, locked)}
    after = dict(before)
    for observation in observations:
        key = observation.shape, observation.device
        after[key] = learned(after.get(key), observation)
    if before:
        await connection.execute(
            f"""UPDATE scheduler.estimate SET seen = new.seen, step_us = new.step_us, rest_us = new.rest_us
                FROM {_NEW} WHERE {_OF_NEW}""",  # noqa: S608 - constants
            *_columns(after[key] for key in before),
        )
    if first := [row for key, row in after.items() if key not in before]:
        # Without the look before, the insertion would wait for whoever is writing a row that is there.
        await connection.execute(
            f"""INSERT INTO scheduler.estimate ({_COLUMNS})
                SELECT * FROM {_NEW} WHERE NOT EXISTS (SELECT FROM scheduler.estimate WHERE {_OF_NEW})
                ORDER BY kind, model, width, height, steps, device
                ON CONFLICT DO NOTHING""",  # noqa: S608 - constants
            *_columns(first),
        )


def _row(row: asyncpg.Record) -> Learned:
    return Learned(
        shape=Shape(
            kind=RenderKind(row["kind"]),
            model=row["model"],
            width=row["width"],
            height=row["height"],
            steps=row["steps"],
        ),
        device=row["device"],
        seen=row["seen"],
        step_us=row["step_us"],
        rest_us=row["rest_us"],
    )


def _key_columns(keys: Iterable[_Key]) -> tuple[list[object], ...]:
    """Return the values of keys, column by column."""
    listed = list(keys)
    return (
        [shape.kind.value for shape, _ in listed],
        [shape.model for shape, _ in listed],
        [shape.width for shape, _ in listed],
        [shape.height for shape, _ in listed],
        [shape.steps for shape, _ in listed],
        [device for _, device in listed],
    )


def _columns(rows: Iterable[Learned]) -> tuple[list[object], ...]:
    """Return the values of rows, column by column."""
    listed = list(rows)
    return (
        *_key_columns((row.shape, row.device) for row in listed),
        [row.seen for row in listed],
        [row.step_us for row in listed],
        [row.rest_us for row in listed],
    )
