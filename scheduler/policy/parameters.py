"""Every number of the policy, with its reason beside it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameters:
    """Costs and spans of service are GPU-milliseconds, waits are milliseconds."""

    memory_span_ms: int = 1_800_000
    """P, what past use can cost: a job of the heaviest account comes as if this much service later, so it
    waits about half an hour's worth of others' service. Less, and heavy use is hardly felt: on a recorded day
    at 130 % load, ten minutes cost light accounts two thirds more waiting, and an hour gained them nothing.
    More, and the bound on the wait of a heavy account (P times the weights of the others over the GPUs) is no
    promise."""

    memory_full_ms: int = 18_000_000
    """U_ref, use per unit of weight that is remembered in full: five GPU-hours, three hundred pictures."""

    half_life_ms: int = 7 * 24 * 3_600_000
    """H, after which use counts half: long enough that one weekend is remembered on Monday, short enough that
    a month is not."""

    aging_ms: int = 30 * 60_000
    """D: without it, an endless stream of brand-new accounts could hold back an old one for ever. Three
    of the largest jobs (c_max): where a job takes longer than D, all are old as soon as the fleet is full."""

    aged_one_in: int = 40
    """At most one part in this many of a tier's GPU time starts for its age, so that overload, where
    everything is old, does not turn the fair order into order of arrival. Of the time, not of the starts: one
    giant in four starts was nine tenths of the time on a recorded trace of training jobs. On a recorded day
    of image jobs at 130 % load, one part in ten cost light accounts a fifth more waiting than one in forty.
    Eight GPUs still start an old picture of a minute every five minutes."""

    affinity_ms: int = 60_000
    """theta: to save the loading of a model, a job may be passed over by one that is this much behind it. It
    is one picture's worth: about what the loading costs."""

    fast_usage_factor: float = 1.0
    """How much of its fast GPU time an account is remembered for in relax: all use is use."""

    max_predicted_ms: int = 600_000
    """c_max, the largest cost that is admitted: every bound on a wait has one job's cost in it."""

    max_losses: int = 3
    """A job that lost this many workers is more likely the cause than the victim."""

    park_patience_ms: int = 10_000
    """A run parked this long is the first to get any GPU open to relax. Moving it costs an encode, so a park
    that is over sooner, as most are, had better be sat out where the run's latents are."""

    parks_before_spared: int = 3
    """A run parked this often is parked again only if no other can be: each park delays the same owner."""

    steps_worth_parking: int = 2
    """A run with fewer steps left beyond the park is about to end, and parked only if no other can be."""

    relax_floor_permille: int = 50
    """While relax work waits, fast leaves it this share of the GPUs, rounded up: relax is a promise too."""

    relax_floor_from_gpus: int = 4
    """A fleet of fewer GPUs has no floor: one of three would be a third of what fast is paid for."""

    relax_first_one_in: int = 10
    """Where there is no floor, relax work that has waited `aging_ms` takes one in this many of the starts
    that fast would have, and is not parked for fast."""

    def __post_init__(self) -> None:
        """Refuse, as a bug of the caller, numbers the formulas have no meaning for."""
        assert self.memory_span_ms >= 0
        assert self.memory_full_ms > 0
        assert self.half_life_ms > 0
        assert self.aging_ms >= 0
        assert self.aged_one_in >= 2
        assert self.affinity_ms >= 0
        assert self.fast_usage_factor >= 0
        assert self.max_predicted_ms > 0
        assert self.max_losses > 0
        assert self.park_patience_ms >= 0
        assert self.parks_before_spared >= 0
        assert self.steps_worth_parking >= 0
        assert 0 <= self.relax_floor_permille < 1000
        assert self.relax_floor_from_gpus >= 1
        assert self.relax_first_one_in >= 2
