"""From a completed render to files in the artifact store. The GPU is another run's by then."""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from PIL import Image

from gpu_worker.contract import ImageFile, RenderRequest, VideoFile
from gpu_worker.outputs import Artifacts, ArtifactsUnavailable, attempt_folder, image_name
from gpu_worker.run import Film, RenderedImage, Rendering
from gpu_worker.video import Video, mp4, webp

# As many as a grid has pictures. Both zlib and the disk let other threads work meanwhile.
_AT_ONCE = 4


@dataclass(frozen=True, kw_only=True)
class Delivered:
    """Where everything is."""

    images: tuple[ImageFile, ...]
    videos: tuple[VideoFile, ...]
    latents_path: str | None


def deliver(
    artifacts: Artifacts,
    request: RenderRequest,
    rendering: Rendering,
    *,
    pauses_s: Sequence[float],
    stop: threading.Event,
) -> Delivered:
    """Write the files, and go on trying for a while if the store is away: they are made already.

    Several at once: nobody hears of the result before the last of them. Raises ArtifactsUnavailable after the
    last try, or once `stop` is set.
    """
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        return _delivered(artifacts, request, rendering, threads, pauses_s=pauses_s, stop=stop)


def _delivered(
    artifacts: Artifacts,
    request: RenderRequest,
    rendering: Rendering,
    threads: Executor,
    *,
    pauses_s: Sequence[float],
    stop: threading.Event,
) -> Delivered:
    numbers = range(1, len(rendering.images) + 1)
    making = threads.map(partial(_image, request), rendering.images, numbers)
    videos = [_video(request, video) for video in _videos(rendering.film)]
    images = list(making)
    contents = {file.path: content for file, content in images}
    contents |= {file.path: content for file, content in videos}
    latents_path = None
    if rendering.latents is not None:
        latents_path = f"{_folder(request)}/latents.safetensors"
        contents[latents_path] = rendering.latents
    for pause_s in (*pauses_s, None):
        try:
            for _ in threads.map(artifacts.put, contents, contents.values()):
                pass
        except ArtifactsUnavailable:
            if pause_s is None or stop.wait(pause_s):
                raise
        else:
            return Delivered(
                images=tuple(file for file, _ in images),
                videos=tuple(file for file, _ in videos),
                latents_path=latents_path,
            )
    raise AssertionError("the last try returns or raises")


def _folder(request: RenderRequest) -> str:
    return attempt_folder(request.job_id, request.attempt_id)


def _image(request: RenderRequest, image: RenderedImage, index: int) -> tuple[ImageFile, bytes]:
    content = _png(image)
    name = image_name(request.job_id, request.file_stem, index)
    file = ImageFile(
        index=index,
        path=f"{_folder(request)}/{name}",
        file_name=name,
        content_type="image/png",
        size_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        width=image.width,
        height=image.height,
        seed=image.seed,
    )
    return file, content


def _videos(film: Film | None) -> tuple[Video, ...]:
    return () if film is None else (mp4(film), webp(film))


def _video(request: RenderRequest, video: Video) -> tuple[VideoFile, bytes]:
    name = f"{request.job_id}_{request.file_stem}.{video.suffix}"
    file = VideoFile(
        path=f"{_folder(request)}/{name}",
        file_name=name,
        content_type=video.content_type,
        size_bytes=len(video.content),
        sha256=hashlib.sha256(video.content).hexdigest(),
        width=video.width,
        height=video.height,
        frames=video.frames,
    )
    return file, video.content


def _png(image: RenderedImage) -> bytes:
    file = io.BytesIO()
    Image.frombytes("RGB", (image.width, image.height), image.pixels).save(file, "PNG")
    return file.getvalue()
