"""Builds what the worker's tests ask for: name only what a test is about."""

from __future__ import annotations

import time
import uuid
from pathlib import Path
from typing import Any

from gpu_worker.contract import GpuTime, RenderKind, RenderRequest, RenderSpec
from gpu_worker.settings import WorkerSettings
from gpu_worker.worker import Worker
from tests.stand_in import STAND_IN_FILE


def a_spec(**changes: Any) -> RenderSpec:
    defaults: dict[str, Any] = {
        "kind": RenderKind.IMAGINE,
        "model": "stand-in",
        "prompt": "a lighthouse in fog",
        "width": 64,
        "height": 64,
        "steps": 4,
        "guidance_milli": 5000,
        "seed": 7,
    }
    return RenderSpec(**{**defaults, **changes})


def a_request(**changes: Any) -> RenderRequest:
    spec = a_spec(**changes.pop("spec", {}))
    defaults: dict[str, Any] = {
        "job_id": str(uuid.uuid4()),
        "attempt_id": str(uuid.uuid4()),
        "token": str(uuid.uuid4()),
        "epoch": 1,
        "tier": "fast",
        "spec": spec,
        "file_stem": "a_lighthouse_in_fog",
    }
    return RenderRequest(**{**defaults, **changes})


def some_settings(folder: Path, **changes: Any) -> WorkerSettings:
    defaults: dict[str, Any] = {
        "worker_id": "node-a/gpu-0",
        "release": "test",
        "artifacts_url": str(folder / "artifacts"),
        "cache_dir": folder / "cache",
        "engine": "timed",
        "device": "cpu",
        "memory_bytes": 1_000_000_000,
        "models_path": STAND_IN_FILE,
    }
    return WorkerSettings(**{**defaults, **changes})


def uses_that_are_the_wall_time(worker: Worker, *, began_s: float, made_s: float) -> GpuTime:
    """Return where a worker's time went, all of it to 1 %.

    It was made between the two instants, and its account opened somewhere in there; that is read between two
    others. Any of it may take long on a busy machine, and says nothing about the account.
    """
    asked_s = time.monotonic()
    uses = worker.report(1).gpu_time
    told_s = time.monotonic()
    assert (asked_s - made_s) * 990 <= sum(vars(uses).values()) <= (told_s - began_s) * 1010
    return uses
