"""Asks of 200 names whether what the model draws is nearest to pictures of what was asked for.

    python -m gpu_worker.default_model.nearest MODEL --data DIR

Each name is drawn once, and what came out is compared with every thing of the training set in both styles,
each in the middle of a white square. Two pictures are as near as the encoder says that learned which caption
belongs to which picture. It prints for how many names their own thing came first, or among the first five,
and the same for pictures of the training set in place of drawn ones: more than that cannot be asked for.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from transformers import CLIPVisionModelWithProjection

from gpu_worker.default_model.adapter import IMAGE_ENCODER, IP_ADAPTER
from gpu_worker.default_model.captions import GROUNDS, Scene, Subject, with_article
from gpu_worker.default_model.concepts import Concept, Style, concepts
from gpu_worker.default_model.contact_sheet import drawn, loaded
from gpu_worker.default_model.networks import SIDE, viewed
from gpu_worker.default_model.packages import FLAT, SOLID, WORDS, unpacked
from gpu_worker.default_model.pictures import Pixels, studio
from gpu_worker.default_model.shards import levels

_NAMES = 200
_SEED = 7
_FIRST_FEW = 5


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw, compare and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    given = parser.parse_args(arguments)
    things = concepts(*(unpacked(package, given.data) for package in (FLAT, SOLID, WORDS)))
    place = studio(things, given.data / "flat-enlarged")
    encoder = CLIPVisionModelWithProjection.from_pretrained(given.model / IP_ADAPTER / IMAGE_ENCODER).float()

    def embedded(pictures: Sequence[Pixels]) -> torch.Tensor:
        with torch.no_grad():
            parts = torch.split(torch.from_numpy(np.stack(pictures)), 64)
            found = [encoder(viewed(levels(part))).image_embeds for part in parts]
        return functional.normalize(torch.cat(found), dim=-1)

    shown = [(number, style) for number, each in enumerate(things) for style in each.pictures]
    known = embedded([place.portrait(things[number], style, SIDE) for number, style in shown])
    owners = torch.tensor([number for number, _ in shown])

    rng = random.Random(_SEED)  # noqa: S311
    asked = rng.sample(range(len(things)), _NAMES)

    def report(what: str, pictures: Sequence[Pixels]) -> list[int]:
        """Print the shares and return the place of each."""
        alike = embedded(pictures) @ known.T
        places = []
        for row, number in zip(alike, asked, strict=True):
            best = torch.full((len(things),), -1.0).scatter_reduce(0, owners, row, "amax")
            places.append(int((best > best[number]).sum()))
        first, few = (sum(each < most for each in places) / _NAMES for most in (1, _FIRST_FEW))
        print(f"{what}: {first:.1%} first, {few:.1%} among the first {_FIRST_FEW}")
        return places

    seen = []
    for number in asked:
        thing = things[number]
        scene = _alone(thing, rng.choice(tuple(thing.pictures)))
        seen.append(place.drawn(scene, SIDE, SIDE, rng))
    report("of the training set", seen)
    prompts = [with_article(things[number].name) for number in asked]
    pictures = [np.asarray(each) for each in drawn(loaded(given.model, given.device), prompts, _SEED)]
    places = report("drawn", pictures)
    missed = [things[number].name for number, each in zip(asked, places, strict=True) if each]
    print("not first:", ", ".join(missed))


def _alone(thing: Concept, style: Style) -> Scene:
    white = GROUNDS["white"]
    return Scene(
        subjects=(Subject(concept=thing),),
        style=style,
        ground=(white, white),
        ground_names=("white",),
        close=False,
    )


if __name__ == "__main__":
    main()
