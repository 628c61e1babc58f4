"""Pictures of scenes: things in a size, a place and a colour of their own, on a ground.

Everything is chosen by a generator that is given: one seed gives the same pictures with the same captions.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from gpu_worker.default_model.captions import (
    COLOURS_LEFT_OUT,
    GROUNDS,
    GROUNDS_LEFT_OUT,
    HUES,
    Colour,
    Scene,
    Subject,
    caption,
    plain_name,
)
from gpu_worker.default_model.concepts import Concept, Style
from gpu_worker.engine.super_resolution import SuperResolution, Tile, loaded_upscaler

Pixels = NDArray[np.uint8]

# Pixels on a side that pictures of things are kept with; those of the flat style are brought to it.
_KEPT_SIDE = 256
_UPSCALER = "builtin:realesrgan-x4"

# How often which kind of scene is drawn, in percent.
_SOLID, _PAIR, _CLOSE, _RECOLOURED = 85, 4, 3, 12
_PLAIN, _GRADIENT = 42, 6
_JITTER = 14
_PALE, _PALE_JITTER = (228, 228, 228), 24

# A thing can be given another colour where most of its coloured part is of one hue.
_NEAR_HUE = 20
_COLOURED_SATURATION = 70
_LEAST_COLOURED, _LEAST_OF_ONE_HUE = 0.35, 0.75
_NOT_RECOLOURED = {"People & Body", "Smileys & Emotion", "Flags"}


@dataclass(frozen=True, kw_only=True)
class Sprite:
    """A thing's picture on nothing, cut to what is there of it."""

    image: Image.Image
    hue: int | None
    """The one hue it has, 0 to 255; of what is many-coloured or grey, none."""


@dataclass(frozen=True, kw_only=True)
class Captioned:
    """Pictures of one size with what is said of them."""

    pictures: Pixels
    """Of shape (n, height, width, 3)."""
    captions: tuple[str, ...]
    close: tuple[bool, ...]
    """Which show a part of their scene."""


class Studio:
    """Draws scenes of the things it has pictures of."""

    def __init__(self, things: Sequence[Concept], sprites: Mapping[tuple[str, Style], Sprite]) -> None:
        """`sprites` by the thing's name and the style."""
        self.things = things
        self._sprites = sprites

    def scene(self, rng: random.Random) -> Scene:
        """Return a scene that is in the training set."""
        while True:
            style = Style.SOLID if rng.randrange(100) < _SOLID else Style.FLAT
            chance = rng.randrange(100)
            count = 2 if chance < _PAIR else 1
            things = rng.choices(self.things, k=count)
            ground, names = _ground(rng)
            scene = Scene(
                subjects=tuple(self._subject(each, style, rng) for each in things),
                style=style,
                ground=ground,
                ground_names=names,
                close=_PAIR <= chance < _PAIR + _CLOSE,
            )
            if all(style in each.pictures for each in things) and not is_left_out(scene):
                return scene

    def drawn(self, scene: Scene, width: int, height: int, rng: random.Random) -> Pixels:
        """Return a picture of a scene, of shape (height, width, 3)."""
        zoom = rng.uniform(1.6, 3.5) if scene.close else 1.0
        size = (round(width * zoom), round(height * zoom))
        canvas = _graded(scene.ground, *size)
        count = len(scene.subjects)
        for place, subject in enumerate(scene.subjects):
            cell = (size[0] // count, size[1])
            self._put(canvas, subject, scene.style, (place * cell[0], 0), cell, rng)
        if not scene.close:
            return np.asarray(canvas)
        left, top = rng.randrange(size[0] - width + 1), rng.randrange(size[1] - height + 1)
        return np.asarray(canvas.crop((left, top, left + width, top + height)))

    def portrait(self, thing: Concept, style: Style, side: int) -> Pixels:
        """Return a thing in the middle of a white square, of shape (side, side, 3)."""
        white = GROUNDS["white"]
        canvas = _graded((white, white), side, side)
        image = self._sprites[thing.name, style].image
        image = _within(image, round(side * 0.85))
        canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2), image)
        return np.asarray(canvas)

    def _subject(self, thing: Concept, style: Style, rng: random.Random) -> Subject:
        sprite = self._sprites.get((thing.name, style))
        if sprite is None or sprite.hue is None or rng.randrange(100) >= _RECOLOURED:
            return Subject(concept=thing)
        others = [name for name, hue in HUES.items() if _apart(hue, sprite.hue) > _NEAR_HUE]
        return Subject(concept=thing, colour=rng.choice(others))

    def _put(
        self,
        canvas: Image.Image,
        subject: Subject,
        style: Style,
        corner: tuple[int, int],
        cell: tuple[int, int],
        rng: random.Random,
    ) -> None:
        sprite = self._sprites[subject.concept.name, style]
        image = sprite.image
        if subject.colour is not None:
            assert sprite.hue is not None
            image = _recoloured(image, sprite.hue, HUES[subject.colour])
        image = _within(image, round(min(cell) * rng.uniform(0.8, 0.95)))
        left = corner[0] + round((cell[0] - image.width) * rng.uniform(0.25, 0.75))
        top = corner[1] + round((cell[1] - image.height) * rng.uniform(0.25, 0.75))
        canvas.paste(image, (left, top), image)


def is_left_out(scene: Scene) -> bool:
    """Return whether a scene has one of the combinations that are in no picture of the training set."""
    return any(
        (each.colour or "") in COLOURS_LEFT_OUT.get(plain_name(each.concept), ())
        or (
            len(scene.ground_names) == 1
            and scene.ground_names[0] in GROUNDS_LEFT_OUT.get(each.concept.name, ())
        )
        for each in scene.subjects
    )


def studio(things: Sequence[Concept], cache: Path) -> Studio:
    """Return a studio with pictures of all things; flat ones are enlarged once, into `cache`."""
    sprites = {}
    upscaler = loaded_upscaler(_UPSCALER, torch.device("cpu"))
    cache.mkdir(parents=True, exist_ok=True)
    for thing in things:
        for style, path in thing.pictures.items():
            kept = path
            if style is Style.FLAT:
                kept = cache / f"{path.stem}.png"
                if not kept.is_file():
                    _enlarged(Image.open(path).convert("RGBA"), upscaler).save(kept)
            image = Image.open(kept).convert("RGBA")
            box = image.getchannel("A").point(lambda alpha: 255 * (alpha > 8)).getbbox()
            cut = image.crop(box)
            hue = None if thing.kind in _NOT_RECOLOURED else _only_hue(cut)
            sprites[thing.name, style] = Sprite(image=cut, hue=hue)
    return Studio(things, sprites)


def captioned(place: Studio, count: int, width: int, height: int, seed: int) -> Captioned:
    """Return so many pictures of scenes of the training set."""
    rng = random.Random(seed)  # noqa: S311
    pictures, captions, close = [], [], []
    for _ in range(count):
        scene = place.scene(rng)
        pictures.append(place.drawn(scene, width, height, rng))
        captions.append(caption(scene, rng))
        close.append(scene.close)
    return Captioned(pictures=np.stack(pictures), captions=tuple(captions), close=tuple(close))


def _ground(rng: random.Random) -> tuple[tuple[Colour, Colour], tuple[str, ...]]:
    chance = rng.randrange(100)
    names = tuple(GROUNDS)
    if chance < _PLAIN:
        name = rng.choice(names)
        colour = _near(GROUNDS[name], rng)
        return (colour, colour), (name,)
    if chance < _PLAIN + _GRADIENT:
        above, below = rng.sample(names, 2)
        return (_near(GROUNDS[above], rng), _near(GROUNDS[below], rng)), (above, below)
    if rng.random() < 0.4:
        return (GROUNDS["white"],) * 2, ()
    top, bottom = _near(_PALE, rng, _PALE_JITTER), _near(_PALE, rng, _PALE_JITTER)
    return (top, bottom if rng.random() < 0.5 else top), ()


def _near(colour: Colour, rng: random.Random, most: int = _JITTER) -> Colour:
    red, green, blue = (min(255, max(0, level + rng.randint(-most, most))) for level in colour)
    return red, green, blue


def _graded(ground: tuple[Colour, Colour], width: int, height: int) -> Image.Image:
    down = np.linspace(0, 1, height)[:, None]
    rows = np.array(ground[0]) * (1 - down) + np.array(ground[1]) * down
    levels = np.broadcast_to(rows[:, None], (height, width, 3)).round().astype(np.uint8)
    return Image.fromarray(levels)


def _within(image: Image.Image, side: int) -> Image.Image:
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)


def _enlarged(image: Image.Image, upscaler: SuperResolution) -> Image.Image:
    """Return a picture on nothing at the size that is kept.

    The network knows colours only. From the picture on white and the same on black, both enlarged, follows
    how much of a pixel is there, and in which colour.
    """
    on = []
    for level in (0, 255):
        canvas = Image.new("RGB", image.size, (level,) * 3)
        canvas.paste(image, (0, 0), image)
        # The network does not see past a picture's edge.
        size = (_KEPT_SIDE, _KEPT_SIDE)
        whole = Tile(left=0, top=0, right=_KEPT_SIDE, bottom=_KEPT_SIDE)
        large = upscaler.enlarged(torch.from_numpy(np.array(canvas)), size, whole)
        on.append(large.numpy().astype(np.float32))
    black, white = on
    there = (255 - (white - black).mean(axis=2, keepdims=True)).clip(0, 255)
    colours = np.where(there > 0, black * 255 / np.maximum(there, 1), 0)
    return Image.fromarray(np.concatenate([colours, there], axis=2).clip(0, 255).round().astype(np.uint8))


def _only_hue(image: Image.Image) -> int | None:
    hue, saturation, value = (np.asarray(band) for band in image.convert("RGB").convert("HSV").split())
    there = np.asarray(image.getchannel("A")) > 128
    coloured = there & (saturation > _COLOURED_SATURATION) & (value > 60)
    if coloured.sum() < _LEAST_COLOURED * there.sum():
        return None
    counts = np.bincount(hue[coloured], minlength=256)
    ring = np.concatenate([counts[-_NEAR_HUE:], counts, counts[:_NEAR_HUE]])
    near = np.convolve(ring, np.ones(2 * _NEAR_HUE + 1, int), mode="valid")
    found = int(near.argmax())
    return found if near[found] >= _LEAST_OF_ONE_HUE * coloured.sum() else None


def _recoloured(image: Image.Image, own: int, wanted: int) -> Image.Image:
    """Return a picture whose parts of hue `own` have the hue `wanted`; what has another keeps it."""
    hue, saturation, value = image.convert("RGB").convert("HSV").split()
    levels = np.asarray(hue).astype(int)
    apart = (levels - own + 128) % 256 - 128
    changed = np.where(abs(apart) <= 2 * _NEAR_HUE, (wanted + apart // 2) % 256, levels).astype(np.uint8)
    merged = Image.merge("HSV", (Image.fromarray(changed), saturation, value)).convert("RGB")
    merged.putalpha(image.getchannel("A"))
    return merged


def _apart(one: int, other: int) -> int:
    return min((one - other) % 256, (other - one) % 256)
