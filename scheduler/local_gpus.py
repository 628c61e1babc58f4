"""How many workers a local Ray has, and what they draw on: settled once, when a service starts."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Callable

from scheduler.settings import Settings

_WITHOUT_ANY = 2


def settled(settings: Settings, count_gpus: Callable[[], int]) -> Settings:
    """Return the settings of a local Ray on this machine; `count_gpus` is asked where GPUs may be drawn on.

    What they leave open is decided: a worker for each GPU, and two that draw on the CPU where there is none.
    Of workers that draw on no GPU there are as many as wanted. Settings of a cluster stay as they are.

    Raises RuntimeError, saying what to do, if they demand GPUs that are not there.
    """
    if settings.ray.address is not None:
        return settings
    workers, device = settings.ray.local_gpus, settings.worker.device
    if device != "cpu" and settings.worker.engine != "timed":
        gpus = count_gpus()
        if gpus == 0 and device == "cuda":
            raise RuntimeError(
                "worker.device = cuda, but no GPU can be used on this machine: `darkroom doctor` says "
                "what is wrong with them; with worker.device = auto, workers draw on the CPU"
            )
        if gpus == 0:
            # Said, because a hidden GPU is none: Ray gives a worker the GPU of its number, hidden or not.
            device = "cpu"
        elif workers > gpus:
            raise RuntimeError(
                f"ray.local_gpus = {workers}, but {gpus} GPUs can be used on this machine: set it to 0 for a "
                "worker on each of them, or worker.device = cpu for workers that need none"
            )
        else:
            workers = workers or gpus
    return settings.model_copy(
        update={
            "ray": settings.ray.model_copy(update={"local_gpus": workers or _WITHOUT_ANY}),
            "worker": settings.worker.model_copy(update={"device": device}),
        }
    )


def usable_gpus() -> int:
    """Return how many GPUs programs that are started here can draw on."""
    if importlib.util.find_spec("pynvml") is None or _torch_is_for_cpus():
        return 0
    import pynvml  # type: ignore[import-untyped]

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return 0  # no driver, so no GPU; `darkroom doctor` tells what is wrong with one that is there
    try:
        there: int = pynvml.nvmlDeviceGetCount()
    finally:
        pynvml.nvmlShutdown()
    return seen(there, os.environ.get("CUDA_VISIBLE_DEVICES"))


def seen(there: int, visible: str | None) -> int:
    """Return how many of `there` GPUs are left by `visible`, what CUDA_VISIBLE_DEVICES says; None: nothing.

    As CUDA reads it: what stands behind the first that does not exist is not seen either.
    """
    if visible is None:
        return there
    found = 0
    for name in (part.strip() for part in visible.split(",")):
        is_one = int(name) < there if name.isdecimal() else name.startswith(("GPU-", "MIG-"))
        if not (there and is_one):
            break
        found += 1
    return found


def _torch_is_for_cpus() -> bool:
    # Asked of its version, for importing it takes seconds.
    try:
        return importlib.metadata.version("torch").endswith("+cpu")
    except importlib.metadata.PackageNotFoundError:
        return True
