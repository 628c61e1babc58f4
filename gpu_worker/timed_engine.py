"""An engine that draws nothing and takes a set time for each step.

For whatever is about everything around an engine: scheduling over real workers, preemption, checkpoints,
cancellation, watching, and the cost of the path itself at 0 ms a step. It gives back valid pictures, of one
colour each. A run's state is the number of its last step and a chain of hashes over all of them, which the
colours are made of: who goes on from the wrong place, or from another run's, gives back another picture.
"""

from __future__ import annotations

import functools
import hashlib
import io
import logging
import re
import time

from PIL import Image

from gpu_worker.contract import RenderKind, RenderSpec
from gpu_worker.image_seeds import image_seed
from gpu_worker.models import Models
from gpu_worker.run import (
    CutState,
    EngineFailure,
    Film,
    Inputs,
    RenderedImage,
    Rendering,
    RunControl,
    Stage,
    StageClock,
    WallStageClock,
)
from gpu_worker.settings import WorkerSettings, machine_memory_bytes

_log = logging.getLogger(__name__)

_MOST_FRAMES = 48
_CHECKPOINT = re.compile(rb"([1-9][0-9]*) ([0-9a-f]{64})")
# An empty safetensors file: the length of its header, and the header.
_NO_LATENTS = (2).to_bytes(8, "little") + b"{}"


class TimedEngine:
    """Knows the models by name only; a model is warm once it was asked for."""

    def __init__(self, models: Models, settings: WorkerSettings) -> None:
        self._models = models
        self._step_ms = settings.timed_step_ms
        self._memory_bytes = settings.memory_bytes or machine_memory_bytes()
        self._warm: dict[str, int] = {}

    @property
    def device_type(self) -> str:
        return f"timed {self._step_ms} ms"

    @property
    def memory_bytes(self) -> int:
        return self._memory_bytes

    def memory_used_bytes(self) -> int:
        return sum(self._warm.values())

    def warm_models(self) -> tuple[str, ...]:
        return tuple(self._warm)

    def models(self) -> tuple[str, ...]:
        return tuple(self._models.entries)

    def lacks_for_upscales(self) -> str:
        return ""

    def self_check(self) -> str:
        return ""

    def load(self, model: str, kind: RenderKind) -> bool:
        entry = self._models.entries.get(model)
        if entry is None:
            raise EngineFailure(reason="MODEL_MISSING", sentence=f"This worker has no model {model}.")
        cold = model not in self._warm
        if cold and self._step_ms:
            # A load is time that the GPU is somebody's and draws nothing.
            time.sleep(self._step_ms / 1000)
        self._warm = {**self._warm, model: entry.memory_bytes}
        return cold

    def stage_clock(self) -> WallStageClock:
        return WallStageClock()

    def render(
        self,
        spec: RenderSpec,
        inputs: Inputs,
        control: RunControl,
        clock: StageClock,
        checkpoint: bytes | None = None,
    ) -> Rendering:
        clock.enter(Stage.ENCODE)
        control.check()
        done, chain = 0, _chain_of(spec.seed)
        if checkpoint is not None and (restored := _restored(checkpoint)) is not None:
            done, chain = restored
            control.restored()
        clock.enter(Stage.UPSCALE if spec.kind.is_upscale else Stage.DENOISE)
        last = -(-spec.steps * spec.stop_percent // 100)
        for step in range(done + 1, last + 1):
            if self._step_ms:
                time.sleep(self._step_ms / 1000)
            chain = _next_of(chain, step)
            control.boundary(
                step,
                spec.steps,
                preview=lambda: functools.partial(_one_colour_png, spec.width, spec.height, spec.seed),
                cut=functools.partial(_cut, step, chain),
            )
        clock.enter(Stage.DECODE)
        for number in range(1, spec.images + 1):
            control.check(last=number == spec.images)
        seeds = [image_seed(spec.seed, index) for index in range(1, spec.images + 1)]
        film = Film(width=spec.width, height=spec.height, frames=_fade(spec, last)) if spec.video else None
        return Rendering(
            images=tuple(
                RenderedImage(
                    pixels=_drawn_colour(chain, seed) * (spec.width * spec.height),
                    width=spec.width,
                    height=spec.height,
                    seed=seed,
                )
                for seed in seeds
            ),
            latents=None if spec.kind.is_upscale else _NO_LATENTS,
            receipt={"engine": "timed", "model": spec.model, "steps": spec.steps, "device": self.device_type},
            film=film,
        )


def _chain_of(seed: int) -> bytes:
    return hashlib.sha256(b"darkroom-timed-1:%d" % seed).digest()


def _next_of(chain: bytes, step: int) -> bytes:
    return hashlib.sha256(b"%b:%d" % (chain, step)).digest()


def _drawn_colour(chain: bytes, seed: int) -> bytes:
    return hashlib.sha256(b"%b:%d" % (chain, seed)).digest()[:3]


def _cut(step: int, chain: bytes) -> CutState:
    return lambda: b"%d %b" % (step, chain.hex().encode())


def _restored(checkpoint: bytes) -> tuple[int, bytes] | None:
    """Return the step after which it was cut, and the chain up to there; None where it cannot be read."""
    if (content := _CHECKPOINT.fullmatch(checkpoint)) is None:
        _log.warning("checkpoint cannot be read bytes=%d", len(checkpoint))
        return None
    return int(content[1]), bytes.fromhex(content[2].decode())


def _fade(spec: RenderSpec, steps: int) -> tuple[bytes, ...]:
    """Return a frame of one colour for each step, up to a number that makes a short film."""
    count = min(steps, _MOST_FRAMES)
    colour = _colour(spec.seed)
    return tuple(
        bytes(part * number // count for part in colour) * (spec.width * spec.height)
        for number in range(1, count + 1)
    )


def _one_colour_png(width: int, height: int, seed: int) -> bytes:
    picture = Image.new("P", (width, height))
    picture.putpalette(_colour(seed))
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return file.getvalue()


def _colour(seed: int) -> bytes:
    return seed.to_bytes(8, "big")[-3:]
