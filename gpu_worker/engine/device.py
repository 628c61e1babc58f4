"""The device an engine draws on: what it is called, how its time is measured, how far it may lag behind."""

from __future__ import annotations

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
        self._marks: list[tuple[Stage, torch.cuda.Event]] = []

    def enter(self, stage: Stage) -> None:
        self._marks.append((stage, _recorded()))

    def times(self) -> StageTimes:
        spent_ms = dict.fromkeys(Stage, 0.0)
        if self._marks:
            end = _recorded()
            end.synchronize()
            ends = [event for _, event in self._marks[1:]] + [end]
            for (stage, begin), until in zip(self._marks, ends, strict=True):
                spent_ms[stage] += begin.elapsed_time(until)
        return stage_times(spent_ms)


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
