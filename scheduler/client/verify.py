"""Whether a job that was made again came out the same: every picture's bits, and how both were made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scheduler.client.names import last_part, worker_id
from scheduler.v1.job_pb2 import Job, Receipt


@dataclass(frozen=True, kw_only=True)
class PicturePair:
    """One picture, made twice."""

    number: int
    """1 to 4."""
    first_sha256: str
    """Hexadecimal, of the file; empty: there is no such picture."""
    second_sha256: str

    @property
    def equal(self) -> bool:
        """Whether they are the same bytes."""
        return self.first_sha256 == self.second_sha256


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What the records of two renders do not agree on."""

    what: str
    """A key of the record, with dots between levels."""
    first: str
    """As JSON; empty: not in that record."""
    second: str


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two jobs that should be the same."""

    pictures: tuple[PicturePair, ...]
    differences: tuple[Difference, ...]
    """Perhaps why, where the pictures differ; without meaning where they do not."""

    @property
    def equal(self) -> bool:
        """Whether there are pictures, and each is the same bits as the other."""
        return bool(self.pictures) and all(pair.equal for pair in self.pictures)


def compare(first: Job, second: Job) -> Comparison:
    """Return how two jobs that have succeeded compare: pictures by number, then worker and records."""
    pictures = [{last_part(image.name): image.sha256 for image in job.images} for job in (first, second)]
    numbers = sorted(pictures[0].keys() | pictures[1].keys())
    records = [{"worker": worker_id(job.receipt.worker), **facts_of(job.receipt)} for job in (first, second)]
    whats = list(dict.fromkeys([*records[0], *records[1]]))
    return Comparison(
        pictures=tuple(
            PicturePair(
                number=int(number),
                first_sha256=pictures[0].get(number, ""),
                second_sha256=pictures[1].get(number, ""),
            )
            for number in numbers
        ),
        differences=tuple(
            Difference(what=what, first=records[0].get(what, ""), second=records[1].get(what, ""))
            for what in whats
            if records[0].get(what) != records[1].get(what)
        ),
    )


def record_of(receipt: Receipt) -> dict[str, Any]:
    """Return what is known about how a job was made; empty if it was never rendered to its end."""
    record = json.loads(receipt.reproduction_json or "{}")
    assert isinstance(record, dict), "a reproduction record is a JSON object"
    return record


def facts_of(receipt: Receipt) -> dict[str, str]:
    """Return the same as lines: keys with dots between levels, values as a person reads them."""
    return dict(fact for key, value in record_of(receipt).items() for fact in _flat(key, value))


def _flat(key: str, value: object) -> list[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        return [fact for name, each in value.items() for fact in _flat(f"{key}.{name}", each)]
    if isinstance(value, list) and any(isinstance(each, Mapping) for each in value):
        return [fact for at, each in enumerate(value, start=1) for fact in _flat(f"{key}.{at}", each)]
    return [(key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))]
