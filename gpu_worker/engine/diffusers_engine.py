"""Draws with stock diffusers pipelines, on a GPU or on the CPU.

The same request gives the same bits on the same device type with the same software, whoever watches, and
however often it was parked, or cut and continued elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from gpu_worker.contract import RenderKind, RenderSpec
from gpu_worker.engine.device import chosen_device, device_memory_bytes, device_type, stage_clock
from gpu_worker.engine.drawing import drawn
from gpu_worker.engine.loading import LoadedModel, loaded_model, to_be_had
from gpu_worker.engine.memory_ladder import nothing_fails
from gpu_worker.engine.receipts import receipt_of
from gpu_worker.engine.residency import Residency
from gpu_worker.engine.self_check import self_check
from gpu_worker.engine.super_resolution import SuperResolution, lacks_of_upscaler, loaded_upscaler
from gpu_worker.engine.upscale import upscaled
from gpu_worker.models import Models
from gpu_worker.run import EngineFailure, Inputs, Rendering, RunControl, StageClock
from gpu_worker.settings import WorkerSettings

# It lies in memory beside the models, under a name that none of them has.
_UPSCALER = "builtin:upscaler"


class DiffusersEngine:
    """One device and the models in its memory."""

    def __init__(
        self,
        models: Models,
        settings: WorkerSettings,
        allocating: Callable[[str], None] = nothing_fails,
    ) -> None:
        """`allocating` is told where memory is about to be taken; see MemoryLadder."""
        self._threads = settings.threads
        torch.set_num_threads(settings.threads)
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
        self._models = models
        self._device = chosen_device(settings.device)
        self._device_type = device_type(self._device)
        self._memory_bytes = settings.memory_bytes or device_memory_bytes(self._device)
        self._cache_dir = settings.cache_dir
        self._to_be_had = tuple(name for name, entry in models.entries.items() if to_be_had(entry))
        self._lacks_for_upscales = lacks_of_upscaler(models.upscaler.source)
        self._residency = Residency(
            memory_bytes=self._memory_bytes,
            device=self._device,
            spare=torch.device("cpu") if self._device.type == "cuda" else None,
            allocating=allocating,
        )

    @property
    def device_type(self) -> str:
        return self._device_type

    @property
    def memory_bytes(self) -> int:
        return self._memory_bytes

    def memory_used_bytes(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.memory_reserved(self._device)
        return self._residency.memory_used_bytes()

    def warm_models(self) -> tuple[str, ...]:
        return tuple(name for name in self._residency.names() if name in self._models.entries)

    def models(self) -> tuple[str, ...]:
        return self._to_be_had

    def lacks_for_upscales(self) -> str:
        return self._lacks_for_upscales

    def self_check(self) -> str:
        return self._residency.ladder.done("self_check", lambda: self_check(self._device)) or ""

    def load(self, model: str, kind: RenderKind) -> bool:
        entry = self._models.entries.get(model)
        if entry is None:
            raise EngineFailure(reason="MODEL_MISSING", sentence=f"This worker has no model {model}.")
        torch.set_num_threads(self._threads)
        upscaler = self._models.upscaler
        try:
            loaded = self._residency.load(
                model,
                lambda: loaded_model(entry, self._device, self._cache_dir),
                needed_bytes=entry.memory_needed(entry.default_width, entry.default_height),
            )
            if loaded or not kind.is_upscale:
                return loaded
            return self._residency.load(
                _UPSCALER,
                lambda: loaded_upscaler(upscaler.source, self._device),
                needed_bytes=upscaler.memory_bytes,
                movable=False,
            )
        except torch.OutOfMemoryError as error:
            raise _out_of_memory(model) from error

    def stage_clock(self) -> StageClock:
        return stage_clock(self._device)

    def render(
        self,
        spec: RenderSpec,
        inputs: Inputs,
        control: RunControl,
        clock: StageClock,
        checkpoint: bytes | None = None,
    ) -> Rendering:
        # Both are settings of a thread, and each run has its own. The number of threads decides bits.
        torch.set_num_threads(self._threads)
        needed_bytes = self._models.memory_needed(spec.kind, spec.model, spec.width, spec.height)
        try:
            with (
                torch.no_grad(),
                self._residency.held(spec.model, LoadedModel, needed_bytes=needed_bytes) as model,
            ):
                if spec.kind.is_upscale:
                    return self._upscaled(spec, inputs, model, control, clock, checkpoint)
                return drawn(
                    spec,
                    inputs,
                    model=model,
                    device=self._device,
                    device_type=self._device_type,
                    control=control,
                    clock=clock,
                    checkpoint=checkpoint,
                )
        except torch.OutOfMemoryError as error:
            raise _out_of_memory(spec.model) from error

    def _upscaled(
        self,
        spec: RenderSpec,
        inputs: Inputs,
        model: LoadedModel,
        control: RunControl,
        clock: StageClock,
        checkpoint: bytes | None,
    ) -> Rendering:
        assert inputs.source is not None
        with self._residency.held(_UPSCALER, SuperResolution) as upscaler:
            return upscaled(
                spec,
                inputs.source,
                model=model,
                upscaler=upscaler,
                device=self._device,
                control=control,
                clock=clock,
                checkpoint=checkpoint,
                receipt=receipt_of(
                    spec,
                    inputs,
                    model=model,
                    pipeline=model.image_to_image,
                    device_type=self._device_type,
                ),
            )


def _out_of_memory(model: str) -> EngineFailure:
    return EngineFailure(
        reason="OUT_OF_MEMORY",
        sentence=f"This worker has too little memory for a job of this size with {model}.",
    )
