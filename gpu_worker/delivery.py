"""From a completed render to files in the artifact store. The GPU is another run's by then."""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from gpu_worker.contract import ImageFile, RenderRequest
from gpu_worker.outputs import Artifacts, ArtifactsUnavailable, attempt_folder, image_name
from gpu_worker.run import RenderedImage, Rendering

_PNG = "image/png"


@dataclass(frozen=True, kw_only=True)
class Delivered:
    """Where everything is."""

    images: tuple[ImageFile, ...]
    latents_path: str


def deliver(
    artifacts: Artifacts,
    request: RenderRequest,
    rendering: Rendering,
    *,
    pauses_s: Sequence[float],
    stop: threading.Event,
) -> Delivered:
    """Write the pictures, and go on trying for a while if the store is away: they are made already.

    Raises ArtifactsUnavailable after the last try, or once `stop` is set.
    """
    for pause_s in (*pauses_s, None):
        try:
            return _written(artifacts, request, rendering)
        except ArtifactsUnavailable:
            if pause_s is None or stop.wait(pause_s):
                raise
    raise AssertionError("the last try returns or raises")


def _written(artifacts: Artifacts, request: RenderRequest, rendering: Rendering) -> Delivered:
    folder = attempt_folder(request.job_id, request.attempt_id)
    files = []
    for index, image in enumerate(rendering.images, start=1):
        name = image_name(request.job_id, request.file_stem, index)
        path = f"{folder}/{name}"
        content = _png(image)
        artifacts.put(path, content)
        files.append(
            ImageFile(
                index=index,
                path=path,
                file_name=name,
                content_type=_PNG,
                size_bytes=len(content),
                sha256=hashlib.sha256(content).hexdigest(),
                width=image.width,
                height=image.height,
                seed=image.seed,
            )
        )
    latents_path = f"{folder}/latents.safetensors"
    artifacts.put(latents_path, rendering.latents)
    return Delivered(images=tuple(files), latents_path=latents_path)


def _png(image: RenderedImage) -> bytes:
    file = io.BytesIO()
    Image.frombytes("RGB", (image.width, image.height), image.pixels).save(file, "PNG")
    return file.getvalue()
