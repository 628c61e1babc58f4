"""What a worker process is told when it starts: one frozen, picklable value.

Standard library only, so that whoever starts workers can build it without torch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """Settings of one worker. Paths are as seen from the worker's own machine."""

    worker_id: str
    """The stable name of its slot: `node-a/gpu-0`."""
    release: str
    artifacts_url: str
    """Where pictures go: a folder or any URL that fsspec opens. Shared by all workers and front doors."""
    cache_dir: Path
    """For what can be made again: the stand-in model's weights."""
    models_path: Path | None = None
    """A models.toml; None for the one that comes with the package."""
    engine: Literal["diffusers", "timed"] = "diffusers"
    """`timed` draws nothing and takes `timed_step_ms` for each step: for measuring all but the engine."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """`auto` takes the GPU if there is one."""
    threads: int = 1
    """CPU threads of the engine; part of the device type on a CPU."""
    timed_step_ms: int = 0
    delivery_pauses_s: tuple[float, ...] = (0.5, 1, 2, 4, 8, 15, 30)
    """Between tries to write finished pictures while the store is away: about a minute, longer than a store's
    restart, shorter than anybody's patience with a GPU that waits."""
    preview_interval_ms: int = 250
    """Least time between two previews of one attempt."""
    most_parked: int = 3
    """Runs that may wait on the GPU for a newer one to end; of more, the oldest wait as checkpoints."""
    parked_memory_bytes: int = 256 * 1024**2
    """What they may hold of the GPU's memory together."""
    most_delivering: int = 2
    """Runs whose pictures may be on their way to the store while the next is drawn. A store that is away for
    longer than that stops the worker, before pictures fill the machine's memory."""
    checkpoint_every_steps: int = 5
    """Steps after which a run is cut, so that another worker can go on from there; also at every park. Where
    this one dies, so many are done again at most, and those that pass while a cut is being stored."""
    speed_permille: int = 1000
    """Speed against the reference class: 1000 is 1."""
    memory_bytes: int | None = None
    """What models and runs may use; None for all of the device's memory."""
    traces_endpoint: str | None = None
    """Collector that takes OTLP over HTTP (`http://collector:4318`); None: nothing is traced."""


def machine_memory_bytes() -> int:
    """Return all the memory of this machine: what a worker without a GPU may use if nobody says less."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
