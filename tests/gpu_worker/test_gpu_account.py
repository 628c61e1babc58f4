"""The closed account of a GPU thread's time, and the clock of a run's stages."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gpu_worker.contract import GpuTime, StageTimes
from gpu_worker.gpu_account import Doing, GpuAccount
from gpu_worker.run import Stage, WallStageClock

_MS = 1_000_000


def test_each_instant_has_one_use() -> None:
    account = GpuAccount(0)
    account.turn_to(Doing.LOAD, 10 * _MS)
    account.turn_to(Doing.RUN, 30 * _MS)
    account.turn_to(Doing.IDLE, 70 * _MS)
    account.count(40)
    assert account.read(75 * _MS) == GpuTime(idle_ms=15, load_ms=20, open_ms=40)
    account.settle(40, "relax")
    assert account.read(75 * _MS) == GpuTime(idle_ms=15, load_ms=20, relax_ms=40)


def test_what_the_thread_is_at_is_counted_up_to_now() -> None:
    account = GpuAccount(0)
    assert account.read(5 * _MS).idle_ms == 5
    account.turn_to(Doing.LOAD, 5 * _MS)
    assert account.read(8 * _MS).load_ms == 3
    account.turn_to(Doing.RUN, 8 * _MS)
    assert account.read(12 * _MS) == GpuTime(idle_ms=5, load_ms=3, open_ms=4)


@given(st.lists(st.tuples(st.sampled_from(Doing), st.integers(0, 5000)), max_size=30))
def test_uses_add_up_to_the_wall_time_however_the_thread_turns(turns: list[tuple[Doing, int]]) -> None:
    now_ms, account, doing = 0, GpuAccount(0), Doing.IDLE
    for following, spent_ms in turns:
        now_ms += spent_ms
        if doing is Doing.RUN:
            account.count(spent_ms)
            account.settle(spent_ms, "wasted" if spent_ms % 2 else "fast")
        account.turn_to(following, now_ms * _MS)
        doing = following
    read = account.read(now_ms * _MS)
    assert sum(vars(read).values()) == now_ms


def test_a_stage_clock_gives_every_instant_to_one_stage() -> None:
    instants = iter([100 * _MS, 111 * _MS, 150 * _MS, 157 * _MS])
    clock = WallStageClock(lambda: next(instants))
    clock.enter(Stage.ENCODE)
    clock.enter(Stage.DENOISE)
    clock.enter(Stage.DECODE)
    times = clock.times()
    assert times == StageTimes(encode_ms=11, denoise_ms=39, decode_ms=7)
    assert times.gpu_ms == 57


def test_a_run_that_never_began_took_no_time() -> None:
    assert WallStageClock().times() == StageTimes()
