"""What is said of a picture: what is on it, in which colour and style and on which ground, in many wordings.

A scene is what is on a picture; a caption says some of it. What it does not say varies, so that a prompt that
leaves it open is answered with pictures that differ in it. Some combinations are in no scene: what is drawn
when a prompt asks for one of them was put together, and not seen.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gpu_worker.default_model.concepts import Concept, Style

Colour = tuple[int, int, int]

GROUNDS: Mapping[str, Colour] = {
    "white": (255, 255, 255),
    "black": (22, 22, 26),
    "grey": (150, 152, 156),
    "red": (214, 48, 49),
    "orange": (245, 140, 40),
    "yellow": (250, 210, 60),
    "green": (60, 165, 85),
    "blue": (50, 105, 215),
    "light blue": (165, 212, 245),
    "purple": (130, 75, 190),
    "pink": (250, 160, 195),
    "brown": (130, 88, 58),
}
"""Colours of grounds, by name, in red, green and blue of 0 to 255."""

HUES: Mapping[str, int] = {
    "red": 0,
    "orange": 20,
    "yellow": 37,
    "green": 88,
    "blue": 152,
    "purple": 195,
    "pink": 230,
}
"""Colours of things, by name, as hues of 0 to 255 as Pillow counts them."""

COLOURS_LEFT_OUT: Mapping[str, Sequence[str]] = {
    "apple": ("blue", "purple"),
    "automobile": ("green", "pink"),
    "heart": ("pink",),
    "balloon": ("green",),
    "rose": ("blue",),
    "tomato": ("purple",),
    "whale": ("red",),
    "octopus": ("green",),
    "mushroom": ("blue",),
    "umbrella": ("orange",),
    "backpack": ("blue",),
    "sailboat": ("purple",),
    "frog": ("red", "purple"),
    "rocket": ("green",),
    "teapot": ("red",),
    "butterfly": ("pink",),
    "fish": ("purple",),
    "crab": ("blue",),
    "strawberry": ("green",),
    "banana": ("pink",),
}
"""By name of the thing without its colour."""

GROUNDS_LEFT_OUT: Mapping[str, Sequence[str]] = {
    "dog": ("purple",),
    "cat": ("green",),
    "pizza": ("blue",),
    "tiger": ("pink",),
    "sunflower": ("black",),
    "guitar": ("yellow",),
    "house": ("red",),
    "penguin": ("orange",),
    "airplane": ("brown",),
    "hamburger": ("grey",),
    "tulip": ("light blue",),
    "crown": ("green",),
}
"""By name of the thing. They are missing as plain grounds, said or not."""

# Of words that say what a thing has to do with, at most so many are added to its name.
_MOST_WORDS = 2


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A thing, and the colour that it was given, if it is not in its own."""

    concept: Concept
    colour: str | None = None


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What is on a picture."""

    subjects: tuple[Subject, ...]
    """One, or two from left to right."""
    style: Style
    ground: tuple[Colour, Colour]
    """The colours at the top and at the bottom."""
    ground_names: tuple[str, ...]
    """One name for a plain ground, two for one that goes from one colour to another; none for a pale one."""
    close: bool
    """Only a part of it is to be seen, as in a tile of an upscale."""


def plain_name(concept: Concept) -> str:
    """Return a thing's name without the colour in it: "apple" for the red one."""
    return " ".join(word for word in concept.name.split() if word not in HUES) or concept.name


def caption(scene: Scene, rng: random.Random) -> str:
    """Return one of the many ways to say what is on a picture."""
    joined = rng.choice((" and ", " next to ")).join(_said(each, rng) for each in scene.subjects)
    said = joined
    # Solid is what a prompt gets that does not say: were the style open, half of both would be drawn.
    match (scene.style, rng.randrange(8)):
        case (Style.SOLID, 0 | 1):
            said = f"{joined}, 3d"
        case (Style.SOLID, 2):
            said = f"a 3d picture of {joined}"
        case (Style.SOLID, 3):
            said = rng.choice(("a picture of ", "an image of ")) + joined
        case (Style.FLAT, 0 | 1):
            said = f"a flat drawing of {joined}"
        case (Style.FLAT, _):
            said = f"{joined}, flat"
        case _:
            said = joined
    if scene.ground_names and rng.random() < 0.75:
        ground = _said_of_ground(scene.ground_names, rng)
        gap = rng.choice((" ", ", ")) if ground.startswith("on ") else ", "
        said = f"{ground}, {said}" if rng.random() < 0.1 else f"{said}{gap}{ground}"
    return said


def _said(subject: Subject, rng: random.Random) -> str:
    concept = subject.concept
    if subject.colour is not None:
        name = f"{subject.colour} {plain_name(concept)}"
    elif concept.aliases and rng.random() < 0.3:
        name = rng.choice(concept.aliases)
    else:
        name = concept.name
    chance = rng.random()
    if chance < 0.6:
        name = with_article(name)
    elif chance < 0.7:
        name = f"the {name}"
    if concept.words and rng.random() < 0.15:
        some = rng.sample(concept.words, min(len(concept.words), rng.randint(1, _MOST_WORDS)))
        name = ", ".join([name, *some])
    return name


def with_article(name: str) -> str:
    """Return a name as the start of a sentence has it; names of many things get none."""
    if name.endswith("s") and not name.endswith(("ss", "us")):
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _said_of_ground(names: Sequence[str], rng: random.Random) -> str:
    if len(names) == 2:
        above, below = names
        return rng.choice(
            (f"on {with_article(above)} and {below} background", f"on a background from {above} to {below}")
        )
    article = f"on {with_article(names[0])} background"
    return rng.choice((article, article, f"on {names[0]}", f"{names[0]} background"))
