"""Films as files: what players need, the same bytes each time, delivered beside the pictures."""

from __future__ import annotations

import hashlib
import io
import threading
from dataclasses import replace
from pathlib import Path

import av
import pytest
from PIL import Image, ImageChops
from worker_builders import a_request

from gpu_worker.contract import VideoFile
from gpu_worker.delivery import deliver
from gpu_worker.outputs import Artifacts
from gpu_worker.run import Film, RenderedImage, Rendering
from gpu_worker.video import mp4, webp


def a_film(frames: int = 5, width: int = 64, height: int = 48) -> Film:
    """Return a film that goes from red to green, and ends in halves of blue and white."""
    colours = [(255 - 200 * i // frames, 200 * i // frames, 30) for i in range(frames - 1)]
    images = [Image.new("RGB", (width, height), colour) for colour in colours]
    last = Image.new("RGB", (width, height), (255, 255, 255))
    last.paste((20, 40, 200), (0, 0, width // 2, height))
    return Film(width=width, height=height, frames=tuple(image.tobytes() for image in [*images, last]))


def frames_of(content: bytes) -> list[Image.Image]:
    with av.open(io.BytesIO(content)) as container:
        return [frame.to_image() for frame in container.decode(video=0)]


def mean_difference(one: Image.Image, other: Image.Image) -> float:
    histogram = ImageChops.difference(one, other).histogram()
    return sum((i % 256) * count for i, count in enumerate(histogram)) / sum(histogram)


def image_of(film: Film, number: int) -> Image.Image:
    return Image.frombytes("RGB", (film.width, film.height), film.frames[number])


def test_an_mp4_plays_everywhere_and_ends_long_enough_on_the_finished_grid() -> None:
    film = a_film()
    video = mp4(film)
    with av.open(io.BytesIO(video.content)) as container:
        (stream,) = container.streams.video
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == 12
        assert container.duration == pytest.approx((4 / 12 + 2) * av.time_base, rel=0.01)
    shown = frames_of(video.content)
    assert len(shown) == 4 + 24
    assert (video.width, video.height, video.frames) == (*shown[0].size, 5)
    for number in range(5):
        assert mean_difference(shown[number], image_of(film, number)) < 4
    assert mean_difference(shown[-1], image_of(film, -1)) < 4
    # The table comes first, so that a player can begin before it has the whole file.
    assert video.content.index(b"moov") < video.content.index(b"mdat")


def test_a_webp_is_animated_and_begins_again() -> None:
    film = a_film()
    video = webp(film)
    with Image.open(io.BytesIO(video.content)) as image:
        assert (image.format, image.size, image.n_frames, image.info["loop"]) == ("WEBP", (64, 48), 5, 0)
        durations = []
        for number in range(5):
            image.seek(number)
            assert mean_difference(image.convert("RGB"), image_of(film, number)) < 4
            durations.append(image.info["duration"])
    assert durations == [83, 83, 83, 83, 2000]


@pytest.mark.parametrize("make", [mp4, webp])
def test_the_same_film_gives_the_same_bytes(make: type) -> None:
    assert make(a_film()).content == make(a_film()).content
    assert make(a_film()).content != make(a_film(frames=4)).content


def test_a_film_of_one_frame_is_shown_as_long_as_any_last() -> None:
    film = a_film(frames=1)
    assert len(frames_of(mp4(film).content)) == 24
    with Image.open(io.BytesIO(webp(film).content)) as image:
        assert image.n_frames == 1


def test_sides_of_an_mp4_are_even() -> None:
    video = mp4(a_film(width=65, height=49))
    assert (video.width, video.height) == frames_of(video.content)[0].size == (64, 48)
    assert (webp(a_film(width=65, height=49)).width, webp(a_film(width=65, height=49)).height) == (65, 49)


def a_rendering() -> Rendering:
    pixels = Image.new("RGB", (8, 8), (1, 2, 3)).tobytes()
    return Rendering(
        images=(RenderedImage(pixels=pixels, width=8, height=8, seed=1),), latents=None, receipt={}
    )


def test_videos_are_delivered_beside_the_pictures(artifacts: Artifacts, tmp_path: Path) -> None:
    request, film = a_request(), a_film()
    rendering = replace(a_rendering(), film=film)
    delivered = deliver(artifacts, request, rendering, pauses_s=(), stop=threading.Event())
    expected = []
    for video in (mp4(film), webp(film)):
        name = f"{request.job_id}_a_lighthouse_in_fog.{video.suffix}"
        expected.append(
            VideoFile(
                path=f"jobs/{request.job_id}/{request.attempt_id}/{name}",
                file_name=name,
                content_type=f"{'video' if video.suffix == 'mp4' else 'image'}/{video.suffix}",
                size_bytes=len(video.content),
                sha256=hashlib.sha256(video.content).hexdigest(),
                width=64,
                height=48,
                frames=5,
            )
        )
    assert list(delivered.videos) == expected
    for file in delivered.videos:
        assert hashlib.sha256(artifacts.read(file.path)).hexdigest() == file.sha256


def test_without_a_film_there_is_no_video_and_without_latents_no_file_of_them(
    artifacts: Artifacts,
) -> None:
    request = a_request()
    delivered = deliver(artifacts, request, a_rendering(), pauses_s=(), stop=threading.Event())
    assert (delivered.videos, delivered.latents_path) == ((), None)
    assert [image.file_name for image in delivered.images] == [f"{request.job_id}_a_lighthouse_in_fog_1.png"]
