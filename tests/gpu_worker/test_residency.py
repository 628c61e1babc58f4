"""Which models stay in memory: who makes room, who never does, and what a parked run finds afterwards."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch

from gpu_worker.engine.residency import Residency

_CPU = torch.device("cpu")
_MS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Weights:
    memory_bytes: int
    modules: dict[str, torch.nn.Module] = field(
        default_factory=lambda: {"unet": torch.nn.Linear(2, 2, bias=False)}
    )


class Shelf:
    """A residency whose loads take the time they are told to."""

    def __init__(self, memory_bytes: int = 100, spare: torch.device | None = None) -> None:
        self.made: list[str] = []
        self.now_ns = 0
        self.residency = Residency(
            memory_bytes=memory_bytes, device=_CPU, spare=spare, now_ns=lambda: self.now_ns
        )

    def load(
        self,
        name: str,
        memory_bytes: int = 10,
        *,
        load_ms: int = 10,
        movable: bool = True,
        more_bytes: int = 0,
    ) -> None:
        self.residency.load(
            name,
            self._maker(name, memory_bytes, load_ms),
            needed_bytes=memory_bytes + more_bytes,
            movable=movable,
        )

    @property
    def names(self) -> set[str]:
        return set(self.residency.names())

    def _maker(self, name: str, memory_bytes: int, load_ms: int) -> Callable[[], Weights]:
        def make() -> Weights:
            self.made.append(name)
            self.now_ns += load_ms * _MS
            return Weights(memory_bytes=memory_bytes)

        return make


def test_what_is_in_memory_is_not_loaded_again() -> None:
    shelf = Shelf()
    shelf.load("a")
    shelf.load("b")
    shelf.load("a")
    assert shelf.made == ["a", "b"]
    assert shelf.residency.names() == ("a", "b")
    assert shelf.residency.memory_used_bytes() == 20


def test_of_equal_models_the_one_that_was_not_used_for_longest_makes_room() -> None:
    shelf = Shelf(memory_bytes=30)
    for name in ("a", "b", "c", "d", "b", "e"):
        shelf.load(name)
    # "a" went for "d". "b" was used since the first eviction, "c" was not.
    assert shelf.names == {"b", "d", "e"}


def test_a_large_model_goes_before_a_small_one_that_takes_as_long_to_load() -> None:
    shelf = Shelf(memory_bytes=60)
    shelf.load("small", 10)
    shelf.load("large", 40)
    shelf.load("next", 20)
    assert shelf.names == {"small", "next"}


def test_what_takes_long_to_load_stays_longer_but_not_for_ever() -> None:
    shelf = Shelf(memory_bytes=20)
    shelf.load("slow", load_ms=50)
    for number in range(4):
        shelf.load(f"quick {number}")
        assert shelf.names == {"slow", f"quick {number}"}
    for number in range(4, 8):
        shelf.load(f"quick {number}")
    assert "slow" not in shelf.names


def test_room_is_made_for_what_is_drawn_too_and_for_no_more_than_that() -> None:
    shelf = Shelf(memory_bytes=100)
    for name in ("a", "b", "c"):
        shelf.load(name)
    shelf.load("d", more_bytes=70)
    assert shelf.names == {"b", "c", "d"}
    with shelf.residency.held("d", Weights, needed_bytes=95):
        assert shelf.names == {"d"}


def test_the_model_of_whoever_has_the_device_never_makes_room() -> None:
    shelf = Shelf(memory_bytes=15)
    shelf.load("a")
    with shelf.residency.held("a", Weights):
        assert not shelf.residency.evict_coldest()
        shelf.load("network", movable=False)
        assert shelf.names == {"a", "network"}
        with shelf.residency.held("network", Weights):
            assert not shelf.residency.evict_coldest()
        assert shelf.residency.evict_coldest()
    assert shelf.names == {"a"}


def test_a_parked_runs_weights_are_moved_away_and_no_longer_count() -> None:
    shelf = Shelf(memory_bytes=10, spare=_CPU)
    shelf.load("a")
    with shelf.residency.held("a", Weights):
        shelf.load("b")
        assert shelf.names == {"b"}
        assert shelf.residency.memory_used_bytes() == 10


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs memory of its own")
def test_weights_that_are_moved_away_give_their_memory_back_and_keep_their_bits() -> None:
    gpu = torch.device("cuda")
    large = torch.nn.Linear(4096, 4096, device=gpu)
    before = large.weight.clone().cpu()
    residency = Residency(memory_bytes=10, device=gpu, spare=_CPU)
    residency.load("a", lambda: Weights(memory_bytes=10, modules={"unet": large}), needed_bytes=10)
    with residency.held("a", Weights):
        used_bytes = torch.cuda.memory_allocated()
        residency.load("b", lambda: Weights(memory_bytes=10), needed_bytes=10)
        assert used_bytes - torch.cuda.memory_allocated() >= 4096 * 4096 * 4
        residency.load("a", lambda: Weights(memory_bytes=10), needed_bytes=10)
        assert large.weight.is_cuda
        assert torch.equal(large.weight.cpu(), before)


def test_a_parked_run_gets_its_own_weights_back_and_not_others_that_are_equal() -> None:
    shelf = Shelf(memory_bytes=10, spare=_CPU)
    shelf.load("a")
    with shelf.residency.held("a", Weights) as weights:
        before = weights.modules["unet"].state_dict()["weight"].clone()
        shelf.load("b")
        shelf.load("a")
        assert shelf.names == {"a"}
        assert shelf.made == ["a", "b"]
        with shelf.residency.held("a", Weights) as again:
            assert again is weights
        assert torch.equal(weights.modules["unet"].state_dict()["weight"], before)
    assert shelf.names == {"a"}


def test_what_was_moved_away_is_dropped_when_the_parked_run_ends() -> None:
    shelf = Shelf(memory_bytes=10, spare=_CPU)
    shelf.load("a")
    with shelf.residency.held("a", Weights):
        shelf.load("b")
    shelf.load("a")
    assert shelf.made == ["a", "b", "a"]


def test_where_moving_gains_nothing_a_parked_runs_weights_stay() -> None:
    shelf = Shelf(memory_bytes=10, spare=None)
    shelf.load("a")
    with shelf.residency.held("a", Weights):
        shelf.load("b")
        assert shelf.names == {"a", "b"}
        assert shelf.residency.memory_used_bytes() == 20


def test_a_load_that_fails_leaves_nothing_behind() -> None:
    shelf = Shelf()

    def make() -> Weights:
        raise ValueError("no such file")

    with pytest.raises(ValueError, match="no such file"):
        shelf.residency.load("a", make, needed_bytes=1)
    assert shelf.names == set()
    shelf.load("a")
    assert shelf.names == {"a"}


def test_what_is_evicted_is_gone_from_memory() -> None:
    shelf = Shelf(memory_bytes=10)
    made: list[weakref.ref[torch.nn.Module]] = []

    def make() -> Weights:
        weights = Weights(memory_bytes=10)
        made.append(weakref.ref(weights.modules["unet"]))
        return weights

    shelf.residency.load("a", make, needed_bytes=10)
    assert made[0]() is not None
    shelf.load("b")
    assert made[0]() is None
