"""The text that a scraper gets, in the format that it asks for."""

from __future__ import annotations

from dataclasses import dataclass

import prometheus_client
from prometheus_client.exposition import choose_encoder

from scheduler.metrics.family import Registry

# `_created` doubles the series of every counter and histogram, and no dashboard reads it. The library has
# only this one switch for the whole process.
prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]


@dataclass(frozen=True, kw_only=True)
class Page:
    """An answer to a scrape."""

    text: str
    content_type: str


def page_of(registry: Registry, accept: str = "") -> Page:
    """Return all families of a process.

    `accept` is the scraper's header. Whoever asks for OpenMetrics gets it, and with it the exemplars; the
    plain text, which everybody else gets, has no place for them.
    """
    encode, content_type = choose_encoder(accept)
    return Page(text=encode(registry).decode(), content_type=content_type)


def exemplar(trace_id: str | None) -> dict[str, str] | None:
    """Return what names a trace in a bucket; None: there is none."""
    return None if trace_id is None else {"trace_id": trace_id}
