"""A ladder says what a plain ranking says, however its keys come, change, go and are lifted."""

from __future__ import annotations

from random import Random

import pytest

from scheduler.policy.ranking import Ladder, Ranking


@pytest.mark.parametrize("height", [1, 7, 50, 10**6])
def test_a_ladder_has_the_order_of_a_ranking(height: int) -> None:
    draws = Random(height)
    ladder: Ladder[str] = Ladder(height)
    ranking: Ranking[str] = Ranking()
    lifted = []
    for _ in range(5_000):
        key = f"key-{draws.randrange(40)}"
        match draws.choice(["put", "put", "put", "discard", "lift", "lift_while", "put back"]):
            case "put" if not lifted:
                # Below 0 too: a tag that was corrected may be.
                entry = (draws.randint(-50, 200), draws.randrange(3), key)
                ladder.put(entry)
                ranking.put(entry)
            case "discard" if not lifted:
                ladder.discard(key)
                ranking.discard(key)
            case "lift" if ranking.first() is not None:
                lifted.append((ladder.lift(), ranking.lift()))
            case "lift_while":
                lifted += zip(ladder.lift_while({key}), ranking.lift_while({key}), strict=True)
            case "put back":
                for from_ladder, from_ranking in lifted:
                    ladder.put_back(from_ladder)
                    ranking.put_back(from_ranking)
                lifted.clear()
        assert ladder.first() == ranking.first()
        assert len(ladder) == len(ranking)
        assert all(one == other for one, other in lifted)


def test_the_dead_of_a_ladder_do_not_pile_up() -> None:
    ladder: Ladder[str] = Ladder(10)
    for number in range(10_000):
        ladder.put((number, f"key-{number % 3}"))
    held = len(ladder._heap) + sum(map(len, ladder._far.values()))
    assert held <= 2 * len(ladder) + 16
