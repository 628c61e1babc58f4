"""How unfairly relax is shared is a number that says what it should."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.fair_shares import HALF_LIFE_MS, FairShares

SECOND = 1_000


def after(seconds: int, weights: dict[str, int], gpus: dict[str, int]) -> FairShares:
    shares = FairShares(0)
    for second in range(1, seconds + 1):
        shares.seen(weights, gpus, second * SECOND)
    return shares


def test_equal_accounts_with_equal_gpus_are_shared_fairly() -> None:
    shares = after(600, {"ada": 1000, "ben": 1000}, {"ada": 2, "ben": 2})
    assert shares.error(["ada", "ben"]) == pytest.approx(0)


def test_who_waits_and_gets_nothing_is_wronged_by_all_it_is_due() -> None:
    shares = after(600, {"ada": 1000, "ben": 1000}, {"ada": 2})
    assert shares.error(["ben"]) == pytest.approx(0.5)


def test_who_has_little_and_wants_no_more_is_not_wronged() -> None:
    shares = after(600, {"ada": 1000, "ben": 1000}, {"ada": 3, "ben": 1})
    assert shares.error([]) == 0
    assert shares.error(["ada"]) == 0
    assert shares.error(["ben"]) == pytest.approx(0.25)


def test_a_heavier_plan_is_due_more() -> None:
    shares = after(600, {"basic": 1000, "pro": 3000}, {"basic": 1, "pro": 3})
    assert shares.error(["basic", "pro"]) == pytest.approx(0)


def test_a_newcomer_is_not_wronged_by_what_was_before_it_came() -> None:
    shares = after(3_600, {"ada": 1000}, {"ada": 4})
    shares.seen({"ada": 1000, "ben": 1000}, {"ada": 4}, 3_601 * SECOND)
    assert shares.error(["ben"]) < 0.001


def test_an_old_wrong_is_forgotten_by_half_in_each_half_life() -> None:
    shares = after(600, {"ada": 1000, "ben": 1000}, {"ada": 2})
    wrong = shares.error(["ben"])
    shares.seen({"ada": 1000, "ben": 1000}, {"ada": 1, "ben": 1}, 600 * SECOND + HALF_LIFE_MS)
    assert shares.error(["ben"]) < wrong / 2


def test_nothing_is_unfair_where_nothing_runs() -> None:
    assert after(60, {"ada": 1000}, {}).error(["ada"]) == 0


@given(
    st.lists(
        st.tuples(
            st.dictionaries(st.sampled_from("abcde"), st.integers(1, 5_000), min_size=1),
            st.integers(1, 10_000),
            st.randoms(use_true_random=False),
        ),
        max_size=20,
    )
)
def test_it_is_a_share(looks: list[tuple[dict[str, int], int, object]]) -> None:
    shares, now_ms = FairShares(0), 0
    for weights, later_ms, chance in looks:
        now_ms += later_ms
        gpus = {account: chance.randrange(4) for account in weights}  # type: ignore[attr-defined]
        shares.seen(weights, gpus, now_ms)
        assert 0 <= shares.error(weights) <= 1
