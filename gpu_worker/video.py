"""A film as files to look at: H.264 in MP4, and an animated WebP. The same film gives the same bytes."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from PIL import Image

from gpu_worker.run import Film

_FRAMES_PER_SECOND = 12
# The last frame is what one wants to see; players begin again at once.
_LAST_SHOWN_S = 2
_RATE = Fraction(_FRAMES_PER_SECOND)
# Visibly the same as without loss, for pictures that begin as noise.
_MP4_QUALITY = "20"
_WEBP_QUALITY = 75
_WEBP_EFFORT = 2


@dataclass(frozen=True, kw_only=True)
class Video:
    """One file of a film."""

    content: bytes
    content_type: str
    suffix: str
    """Of its name, without a dot."""
    width: int
    height: int
    frames: int
    """Of the film, however long each is shown."""


def mp4(film: Film) -> Video:
    """Return a film as H.264 with 4:2:0 colours, which every player and browser shows.

    That has even sides: of an odd film the last column or row is left out.
    """
    assert film.frames, "a film has a frame at least: the finished grid"
    width, height = film.width - film.width % 2, film.height - film.height % 2
    with tempfile.TemporaryDirectory() as folder:
        # A file with a name: players begin before they have all of it where its table is moved to the front,
        # for which it is opened a second time.
        file = Path(folder) / "film.mp4"
        # Without what the muxer would write of itself.
        options = {"movflags": "faststart", "fflags": "+bitexact"}
        with av.open(str(file), "w", format="mp4", options=options) as container:
            stream = container.add_stream("libx264", rate=_RATE)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            context = stream.codec_context
            # x264 divides the work by threads, and the bits with it.
            context.thread_count = 1
            context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
            context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
            # Its AVX-512 code gave other bytes for about one in a hundred of equal films; in plain C, none of
            # 6,000 differed. The preset makes up for the time.
            stream.options = {"crf": _MP4_QUALITY, "preset": "veryfast", "x264-params": "asm=0"}
            for number, image in enumerate(_shown(film, (width, height))):
                colours = av.VideoFrame.from_image(image)  # type: ignore[no-untyped-call]
                frame = colours.reformat(
                    format="yuv420p",
                    dst_colorspace=Colorspace.ITU709,
                    dst_color_range=ColorRange.MPEG,
                    dst_color_primaries=ColorPrimaries.BT709,
                    dst_color_trc=ColorTrc.BT709,
                    threads=1,
                )
                frame.pts, frame.time_base = number, 1 / _RATE
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        content = file.read_bytes()
    return Video(
        content=content,
        content_type="video/mp4",
        suffix="mp4",
        width=width,
        height=height,
        frames=len(film.frames),
    )


def webp(film: Film) -> Video:
    """Return a film as an animated WebP that begins again and again."""
    assert film.frames, "a film has a frame at least: the finished grid"
    first, *others = _images(film, (film.width, film.height))
    each_ms = 1000 // _FRAMES_PER_SECOND
    file = io.BytesIO()
    first.save(
        file,
        "WEBP",
        save_all=True,
        append_images=others,
        duration=[each_ms] * len(others) + [_LAST_SHOWN_S * 1000],
        loop=0,
        quality=_WEBP_QUALITY,
        method=_WEBP_EFFORT,
    )
    return Video(
        content=file.getvalue(),
        content_type="image/webp",
        suffix="webp",
        width=film.width,
        height=film.height,
        frames=len(film.frames),
    )


def _images(film: Film, size: tuple[int, int]) -> Sequence[Image.Image]:
    whole = (Image.frombytes("RGB", (film.width, film.height), frame) for frame in film.frames)
    return [image.crop((0, 0, *size)) for image in whole]


def _shown(film: Film, size: tuple[int, int]) -> Sequence[Image.Image]:
    """Return an image for each instant: a frame that is shown longer is there more than once."""
    images = _images(film, size)
    return [*images, *[images[-1]] * (_LAST_SHOWN_S * _FRAMES_PER_SECOND - 1)]
