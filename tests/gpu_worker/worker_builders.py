"""Builds what the worker's tests ask for: name only what a test is about."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

from gpu_worker.contract import RenderKind, RenderRequest, RenderSpec
from gpu_worker.settings import WorkerSettings


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
    }
    return WorkerSettings(**{**defaults, **changes})
