"""What can be drawn: each thing with its names, the words that go with it, and a picture in each style.

A thing is one emoji. The packages have about 1,200 that are pictures of something and differ in more than
skin or gender: letters, signs, flags and the faces of clocks are none. The model learns the three hundred
that are asked for first: what a few CPU hours can teach goes further there than as a trace of each of all.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any


class Style(StrEnum):
    """Which of the two sets a picture is from."""

    FLAT = "flat"
    SOLID = "3d"


@dataclass(frozen=True, kw_only=True)
class Concept:
    """A thing that has a name and is in at least one set."""

    name: str
    """As people say it: "red apple"."""
    aliases: Sequence[str]
    """What else it is called: "car" for the automobile."""
    words: Sequence[str]
    """What it has to do with: "fruit". Shared with others, so that none of them says what it is."""
    kind: str
    """The category: "Food & Drink"."""
    pictures: Mapping[Style, Path]
    """Of 64 pixels a side in the flat style and 256 in the other, on nothing."""


# Words that so few things have say what they are, more or less.
_MOST_SHARING = 2
# What people say, and neither package does.
_EVERYDAY: Mapping[str, Sequence[str]] = {
    "boat": ("sailboat", "motor boat", "speedboat", "canoe"),
    "camera": ("camera with flash", "video camera"),
    "car": ("automobile", "sport utility vehicle"),
    "computer": ("laptop", "desktop computer"),
    "cup": ("hot beverage", "teacup without handle"),
    "flower": ("hibiscus", "sunflower", "tulip", "blossom", "cherry blossom", "daisy"),
    "gift": ("wrapped gift",),
    "knife": ("kitchen knife",),
    "money": ("money bag", "dollar banknote"),
    "phone": ("mobile phone", "telephone"),
    "plane": ("airplane", "small airplane"),
    "ring": ("ring",),
    "shirt": ("t-shirt", "t shirt"),
    "smiley": ("grinning face", "smiling face with smiling eyes", "slightly smiling face"),
    "sun": ("sun with face",),
    "truck": ("delivery truck", "articulated lorry"),
}

LEARNED: Mapping[str, Sequence[str]] = {
    kind: tuple(" ".join(name.split()) for name in names.split(","))
    for kind, names in {
        "animals": """
            monkey, gorilla, dog, wolf, fox, raccoon, cat, lion, tiger, leopard, horse, unicorn, zebra,
            deer, cow, pig, ewe, goat, camel, llama, giraffe, elephant, rhinoceros, hippopotamus, mouse,
            rabbit, hedgehog, bat, bear, koala, panda, polar bear, sloth, kangaroo, chicken, rooster, baby
            chick, bird, penguin, eagle, duck, swan, owl, flamingo, peacock, parrot, frog, crocodile,
            turtle, snake, dragon, whale, dolphin, seal, fish, tropical fish, blowfish, shark, octopus,
            jellyfish, crab, lobster, shrimp, squid, snail, butterfly, lady beetle, ant, honeybee, spider,
            scorpion""",
        "plants": """
            rose, hibiscus, sunflower, tulip, cherry blossom, cactus, mushroom, evergreen tree, deciduous
            tree, palm tree, potted plant, seedling, four leaf clover, maple leaf""",
        "food": """
            grapes, watermelon, tangerine, lemon, banana, pineapple, mango, red apple, green apple, pear,
            peach, cherries, strawberry, blueberries, kiwi fruit, tomato, coconut, avocado, eggplant,
            potato, carrot, cucumber, broccoli, garlic, onion, ear of corn, hot pepper, bread, croissant,
            pretzel, bagel, pancakes, waffle, cheese wedge, bacon, hamburger, french fries, pizza, hot dog,
            sandwich, taco, egg, popcorn, sushi, doughnut, cookie, ice cream, soft ice cream, birthday cake,
            cupcake, pie, chocolate bar, candy, lollipop, honey pot, glass of milk, hot beverage, teapot,
            wine glass, cocktail glass, beer mug, spoon""",
        "outdoors": """
            mountain, volcano, house, castle, church, tent, globe showing europe africa, sun, sun with face,
            star, glowing star, crescent moon, full moon, ringed planet, cloud, cloud with rain, tornado,
            rainbow, umbrella, snowflake, snowman, fire, droplet""",
        "vehicles": """
            locomotive, bus, ambulance, fire engine, police car, taxi, automobile, racing car, tractor,
            motorcycle, bicycle, motor scooter, anchor, sailboat, canoe, ship, airplane, parachute,
            helicopter, rocket, flying saucer""",
        "clothes": """
            glasses, sunglasses, necktie, t shirt, jeans, scarf, socks, dress, backpack, handbag, luggage,
            running shoe, high heeled shoe, crown, top hat, graduation cap, lipstick, ring, gem stone,
            watch""",
        "objects": """
            alarm clock, hourglass done, bell, microphone, headphone, radio, saxophone, guitar, trumpet,
            violin, drum, mobile phone, telephone, battery, laptop, desktop computer, television, camera,
            candle, flashlight, light bulb, books, open book, newspaper, money bag, coin, envelope, package,
            pencil, paintbrush, briefcase, scissors, key, locked, hammer, axe, crossed swords, bomb, shield,
            wrench, screwdriver, gear, magnet, ladder, microscope, telescope, syringe, pill, door, bed,
            chair, toilet, bathtub, broom, bucket, soap, toothbrush, shopping cart, magnifying glass tilted
            left, calendar""",
        "play": """
            balloon, jack o lantern, christmas tree, wrapped gift, trophy, soccer ball, baseball,
            basketball, american football, tennis, bowling, boxing glove, kite, yo yo, crystal ball, magic
            wand, video game, game die, puzzle piece, teddy bear, artist palette, yarn, chess pawn, ticket""",
        "faces": """
            skull, ghost, alien, robot, grinning face, smiling face with smiling eyes, winking face, smiling
            face with heart eyes, smiling face with sunglasses, face with tears of joy, crying face, angry
            face, sleeping face, clown face, pile of poo, red heart, broken heart, alien monster""",
    }.items()
}
"""The names of what the model learns, sorted for people."""

_NOT_PICTURES = {"country-flag", "subdivision-flag", "family", "person-symbol"}
_SYMBOLS = {"geometric"}
_WOMAN, _MAN = 0x1F469, 0x1F468
_GENDERS = {0x2640, 0x2642}
_JOINER, _AS_PICTURE, _FACING_RIGHT = 0x200D, 0xFE0F, 0x27A1
_CLOCKS = range(0x1F550, 0x1F568)


def concepts(flat: Path, solid: Path, words: Path) -> tuple[Concept, ...]:
    """Return what is learned, in the order of Unicode's charts, from the folders of the three packages."""
    entries: list[dict[str, Any]] = json.loads((flat / "emoji.json").read_text())
    library: Mapping[str, Sequence[str]] = json.loads((words / "dist" / "emoji-en-US.json").read_text())
    solids = {path.stem: path for path in sorted((solid / "assets").glob("*.webp"))}
    kept = sorted((each for each in entries if _is_picture(each)), key=lambda each: int(each["sort_order"]))
    spoken = {each["unified"]: _spoken(each, library) for each in kept}
    sharing = Counter(word for said in spoken.values() for word in said)
    names = {said[0] for said in spoken.values()}
    learned = {name for some in LEARNED.values() for name in some}
    assert learned <= names, f"in no package: {sorted(learned - names)}"
    found = []
    for each in kept:
        name, *others = spoken[each["unified"]]
        if name not in learned:
            continue
        own = [*_also(name, each), *(word for word in others if sharing[word] <= _MOST_SHARING)]
        own = [word for word in dict.fromkeys(own) if word not in names]
        pictures = {}
        # Where the set lacks one, the package shows another vendor's, which may not be used.
        if each["has_img_google"]:
            pictures[Style.FLAT] = flat / "img" / "google" / "64" / each["image"]
        codes = each["unified"].lower()
        for stem in (codes, codes.replace("-fe0f", "")):
            if stem in solids:
                pictures[Style.SOLID] = solids[stem]
        if pictures:
            found.append(
                Concept(
                    name=name,
                    aliases=tuple(own),
                    words=tuple(word for word in others if word not in own and word not in names),
                    kind=each["category"],
                    pictures=pictures,
                )
            )
    assert len({each.name for each in found}) == len(found), "two things have one name"
    return tuple(found)


def _is_picture(entry: Mapping[str, Any]) -> bool:
    codes = [int(code, 16) for code in entry["unified"].split("-")]
    if entry["category"] == "Component" or entry["subcategory"] in _NOT_PICTURES:
        return False
    if entry["category"] == "Symbols" and entry["subcategory"] not in _SYMBOLS:
        return False
    of_a_gender = _GENDERS & {*codes} or (_JOINER in codes and codes[0] in (_WOMAN, _MAN))
    return not of_a_gender and _FACING_RIGHT not in codes and codes[0] not in _CLOCKS


def _also(name: str, entry: Mapping[str, Any]) -> list[str]:
    """Return what a thing is called for sure."""
    short = [_clean(each) for each in entry["short_names"]]
    also = [each for each in short if each.replace(" ", "").isalpha()]
    also += [word for word, things in _EVERYDAY.items() if name in things]
    if " " in name and entry["category"] not in ("People & Body", "Smileys & Emotion", "Flags"):
        # A birthday cake is a cake.
        also.append(name.split()[-1])
    return also


def _spoken(entry: Mapping[str, Any], library: Mapping[str, Sequence[str]]) -> list[str]:
    """Return a thing's names and words, its name first, each once."""
    text = "".join(chr(int(code, 16)) for code in entry["unified"].split("-"))
    said = library.get(text) or library[text.replace(chr(_AS_PICTURE), "")]
    words = [_clean(word) for word in [*said[:1], *entry["short_names"], *said[1:]]]
    return list(dict.fromkeys(word for word in words if re.fullmatch(r"[a-z0-9][a-z0-9' .&-]*[a-z.]", word)))


def _clean(word: str) -> str:
    return re.sub(r"[\s_-]+", " ", word.replace("’", "'")).strip().lower()
