"""What `darkroom doctor` finds of the machine that it runs on: packages, limits, room, GPUs, weights."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import resource
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gpu_worker.models import ModelsFileWrong, read_models
from scheduler.client.diagnosis import Diagnosis, fail, ok, warn
from scheduler.settings import Settings

INSTALL = "pip install -c constraints.txt '.[server,worker]'"

LOW_BYTES = 10 * (1 << 30)
"""So much room on a disk is used up in days."""

_MIB = 1 << 20
_GIB = 1 << 30
_TOO_LOW_BYTES = _GIB
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - Ray's, and nothing of ours
# Ray keeps what it passes on there, and falls back to a slow disk below this.
_SHM_BYTES = 2 * _GIB
# Beside clients: the pool, Ray, pictures on their way, libraries.
_OPEN_FILES_BESIDE = 1_000
_PIN = re.compile(r"([\w.-]+)(?:\[.*?\])?==([\w.]+)")


def packages() -> Iterator[Diagnosis]:
    """Yield whether what is installed works together."""
    names = ("darkroom", "ray", "torch", "grpcio", "protobuf", "asyncpg")
    versions = {name: _version(name) for name in names}
    shown = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    wrong = [
        f"{name} {installed} instead of {wanted}"
        for name, wanted in _pinned().items()
        if (installed := _version(name)) and installed.partition("+")[0] != wanted
    ]
    # They are built against each other, and one that lags behind takes the others back with it.
    family = {
        dist.name: dist.version
        for dist in importlib.metadata.distributions()
        if dist.name and dist.name.startswith("grpcio")
    }
    if len(set(family.values())) > 1:
        wrong.append(
            "grpcio packages of several versions: " + ", ".join(sorted(map(" ".join, family.items())))
        )
    if wrong:
        yield fail("service packages", "; ".join(wrong), INSTALL)
    elif not versions["torch"]:
        yield ok("service packages", f"{shown}; no torch: this machine can hold no workers")
    else:
        yield ok("service packages", shown)


def _pinned() -> Mapping[str, str]:
    """Return the packages that this release works with in one version alone."""
    pinned = {}
    for requirement in importlib.metadata.requires("darkroom") or ():
        named, _, condition = requirement.partition(";")
        match = _PIN.fullmatch(named.strip())
        if match is not None and re.search(r"extra == .(server|worker).", condition):
            pinned[match[1]] = match[2]
    return pinned


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


# This machine


def open_files(settings: Settings) -> Diagnosis:
    """Return whether a front door can have as many connections open as its settings let in.

    What is known is this shell's limit. A unit has its own, and a shell may raise its own up to the hard one.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = settings.frontdoor.watches_at_once + settings.frontdoor.calls_at_once + _OPEN_FILES_BESIDE
    sentence = f"{soft:,} for a process of this shell, and a front door may come to need {wanted:,}"
    if soft >= wanted:
        return ok("open files", sentence)
    fix = f"ulimit -n {wanted}, or LimitNOFILE={wanted} in the unit"
    if hard >= wanted:
        return ok("open files", f"{sentence}: {fix}")
    return warn("open files", f"{sentence}; this shell cannot raise it.", fix)


def shared_memory(folder: Path = _SHARED_MEMORY) -> Diagnosis:
    """Return whether Ray has the memory that it passes things on in."""
    if not folder.is_dir():
        return warn(
            "shared memory",
            "There is no /dev/shm, so Ray keeps its objects on a disk.",
            "Mount a tmpfs there.",
        )
    usage = shutil.disk_usage(folder)
    sentence = f"{sized(usage.free)} of {sized(usage.total)} free in {folder}"
    if usage.free < _SHM_BYTES:
        return warn(
            "shared memory",
            f"{sentence}; below {sized(_SHM_BYTES)} Ray keeps its objects on a disk.",
            "docker run --shm-size=8g, or mount -o remount,size=8G /dev/shm",
        )
    return ok("shared memory", sentence)


def disk(folder: Path) -> Diagnosis:
    """Return whether there is room, and leave to write."""
    there = next(each for each in (folder, *folder.parents) if each.is_dir())
    free = shutil.disk_usage(there).free
    sentence = f"{sized(free)} free in {folder}"
    fix = "Make room, or choose another folder: data_dir in darkroom.toml."
    if not os.access(there, os.W_OK):
        return fail("disk", f"{there} cannot be written to.", fix)
    if free < _TOO_LOW_BYTES:
        return fail("disk", sentence, fix)
    return warn("disk", sentence, fix) if free < LOW_BYTES else ok("disk", sentence)


def graphics(settings: Settings) -> Iterator[Diagnosis]:
    """Yield what is found of the GPUs, where there is a driver to ask."""
    wanted = settings.worker.device == "cuda"
    if importlib.util.find_spec("pynvml") is None:
        if wanted or Path("/proc/driver/nvidia").exists():
            yield warn("GPUs", "What asks the driver is not installed.", "pip install nvidia-ml-py")
        else:
            yield ok("GPUs", "none here")
        return
    import pynvml  # type: ignore[import-untyped]

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as away:
        if wanted:
            yield fail("GPUs", f"The driver does not answer: {away}.", "nvidia-smi; install NVIDIA's driver")
        else:
            yield ok("GPUs", "none here, so workers of this machine draw on its CPU")
        return
    try:
        yield from cards(pynvml, device=settings.worker.device, torch=_version("torch"))
    except pynvml.NVMLError as trouble:
        yield fail("GPUs", f"The driver broke off: {trouble}.", "nvidia-smi; then look at dmesg")
    finally:
        pynvml.nvmlShutdown()


def cards(nvml: Any, *, device: str, torch: str) -> Iterator[Diagnosis]:
    """Yield what is found of the GPUs, by NVIDIA's library, which is told in; `torch` is its version."""
    driver = nvml.nvmlSystemGetDriverVersion()
    cuda = nvml.nvmlSystemGetCudaDriverVersion()
    cards = [nvml.nvmlDeviceGetHandleByIndex(number) for number in range(nvml.nvmlDeviceGetCount())]
    shown = ", ".join(
        f"{nvml.nvmlDeviceGetName(card)} with {sized(nvml.nvmlDeviceGetMemoryInfo(card).total)}"
        for card in cards
    )
    sentence = f"{shown}; driver {driver}, CUDA up to {cuda // 1000}.{cuda % 1000 // 10}"
    if device != "cpu" and torch.endswith("+cpu"):
        yield warn("GPUs", f"{sentence}; but torch is built for CPUs alone.", INSTALL)
    else:
        yield ok("GPUs", sentence)
    for number, card in enumerate(cards):
        try:
            errors = nvml.nvmlDeviceGetTotalEccErrors(
                card, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
            )
        except nvml.NVMLError_NotSupported:
            continue
        if errors:
            yield fail(
                f"GPU {number}",
                f"{errors} errors of its memory were not corrected since it was reset.",
                f"`darkroom admin drain` its worker, nvidia-smi --gpu-reset -i {number}; replace it if they "
                "come back",
            )


def weights(settings: Settings) -> Iterator[Diagnosis]:
    """Yield whether each model can be loaded here."""
    try:
        models = read_models(settings.models_file)
    except (ModelsFileWrong, OSError) as wrong:
        yield fail(
            "models", str(wrong), "Correct the models file; gpu_worker/models.toml describes every key."
        )
        return
    if settings.worker.engine == "timed":
        yield ok("models", "The engine is a stub that draws plain colours, without any.")
        return
    for name, entry in models.entries.items():
        if entry.source.startswith("builtin:"):
            yield ok(f"model {name}", "built in")
        elif entry.folder is not None:
            if (entry.folder / "model_index.json").is_file():
                yield ok(f"model {name}", str(entry.folder))
            else:
                sentence = f"{entry.folder} holds no diffusers model: model_index.json is not there."
                yield fail(f"model {name}", sentence, "Put the weights there, on every machine with workers.")
        elif _hub_folder(entry.source).is_dir():
            yield ok(f"model {name}", f"{entry.source}, fetched")
        else:
            yield warn(
                f"model {name}",
                f"{entry.source} was not fetched yet on this machine; the first job waits for it.",
                f"hf download {entry.source}",
            )


def _hub_folder(source: str) -> Path:
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    return cache / f"models--{source.replace('/', '--')}" / "snapshots"


def sized(size_bytes: int) -> str:
    """Return a size for people: `512 MiB`, `3.2 GiB`."""
    if size_bytes < _GIB:
        return f"{size_bytes / _MIB:.0f} MiB"
    return f"{size_bytes / _GIB:.1f} GiB"
