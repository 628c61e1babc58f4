"""The device an engine draws on: what it is called, how its time is measured, how far it may lag behind."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch

from gpu_worker.contract import StageTimes
from gpu_worker.run import Stage, StageClock, WallStageClock, stage_times
from gpu_worker.settings import machine_memory_bytes


def chosen_device(wanted: Literal["auto", "cuda", "cpu"]) -> torch.device:
    """Return the device; raises RuntimeError where a GPU is wanted and there is none."""
    if wanted == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    if wanted == "cuda":
        raise RuntimeError(
            "device = cuda, but torch finds no GPU here; install its driver, or set device = auto"
        )
    return torch.device("cpu")


def device_type(device: torch.device) -> str:
    """Return what two devices must have in common to draw equal bits."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def device_memory_bytes(device: torch.device) -> int:
    """Return all the memory there is: the GPU's, or the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return machine_memory_bytes()


def stage_clock(device: torch.device) -> StageClock:
    """Return a clock of this device's time for one run."""
    return CudaStageClock() if device.type == "cuda" else WallStageClock()


class CudaStageClock:
    """A stage clock of CUDA events: the time at which the GPU got there, not at which it was asked to."""

    def __init__(self) -> None:
        self._spent_ms = dict.fromkeys(Stage, 0.0)
        self._redone_ms = 0.0
        # From each mark on, time is its stage's; nobody's where that is None.
        self._marks: list[tuple[Stage | None, torch.cuda.Event]] = []
        self._paused: Stage | None = None

    def enter(self, stage: Stage) -> None:
        self._marks.append((stage, _recorded()))

    def pause(self) -> None:
        if self._marks:
            self._paused = self._marks[-1][0]
            self._marks.append((None, _recorded()))
            self._count()

    def resume(self) -> None:
        if self._paused is not None:
            self.enter(self._paused)

    def set_aside(self) -> None:
        self.times()
        self._redone_ms += sum(self._spent_ms.values())
        self._spent_ms = dict.fromkeys(Stage, 0.0)

    def times(self) -> StageTimes:
        if self._marks and self._marks[-1][0] is not None:
            self._marks.append((self._marks[-1][0], _recorded()))
        self._count()
        return stage_times(self._spent_ms)

    def redone_ms(self) -> int:
        return round(self._redone_ms)

    def _count(self) -> None:
        """Wait for the newest mark and count the time up to it."""
        if not self._marks:
            return
        self._marks[-1][1].synchronize()
        for (stage, begin), (_, until) in pairwise(self._marks):
            if stage is not None:
                self._spent_ms[stage] += begin.elapsed_time(until)
        del self._marks[:-1]


class Leash:
    """Keeps the caller at most one step ahead of the GPU.

    Kernels are queued, so without it a small model's whole loop would be asked for within a few steps of the
    GPU's time, and a stop at a boundary would come too late to save any.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._previous: torch.cuda.Event | None = None

    def step(self) -> None:
        """Mark the end of a step, and wait until the GPU has done the one before."""
        if self._on_gpu:
            mark = _recorded()
            if self._previous is not None:
                self._previous.synchronize()
            self._previous = mark


def _recorded() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event
