"""Draws forty prompts with the model on one sheet, for people to judge.

    python -m gpu_worker.default_model.contact_sheet MODEL SHEET.png

The first thirty are of the training set, the last ten ask for what was left out of it or lies beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw

from gpu_worker.default_model.networks import SIDE
from gpu_worker.image_seeds import image_seed

PROMPTS: Sequence[str] = (
    "a red apple",
    "a cat",
    "a dog on a blue background",
    "a house",
    "a hamburger, 3d",
    "a slice of pizza",
    "a tree",
    "a rocket on a black background",
    "a guitar",
    "a car",
    "a sunflower",
    "a bicycle, flat",
    "a penguin",
    "a strawberry on a pink background",
    "a crown",
    "a robot",
    "an octopus",
    "a birthday cake",
    "a smiling face with sunglasses",
    "a rainbow",
    "a ghost, flat",
    "a red heart",
    "an umbrella",
    "a sailboat on a light blue background",
    "a mushroom",
    "a tiger",
    "a camera",
    "a key on a yellow background",
    "a soccer ball on a green background",
    "a butterfly",
    "a blue apple",
    "a red whale",
    "a green octopus",
    "a purple fish on a yellow background",
    "a penguin on an orange background",
    "a dog on a purple background",
    "a cat and a red apple",
    "a banana next to a rocket",
    "a puppy",
    "a hot dog on a background from orange to purple",
)

STEPS = 20
GUIDANCE = 3.0
_COLUMNS = 8
_LINE = 28


def drawn(
    pipeline: StableDiffusionPipeline, prompts: Sequence[str], seed: int, at_once: int = 8
) -> list[Image.Image]:
    """Return a picture of each prompt, the noise of each that of picture 1 of a job with `seed`."""
    pictures: list[Image.Image] = []
    for first in range(0, len(prompts), at_once):
        some = list(prompts[first : first + at_once])
        generators = [torch.Generator().manual_seed(image_seed(seed, 1)) for _ in some]
        answer = pipeline(
            some,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=generators,
            height=SIDE,
            width=SIDE,
        )
        pictures += answer.images
    return pictures


def loaded(folder: Path, device: torch.device) -> StableDiffusionPipeline:
    """Return the model in a folder, ready to draw; on a CPU in full precision."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    pipeline = StableDiffusionPipeline.from_pretrained(str(folder), dtype=dtype, local_files_only=True)
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sheet(pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Image.Image:
    """Return one picture of all, each above its prompt."""
    rows = -(-len(pictures) // _COLUMNS)
    whole = Image.new("RGB", (_COLUMNS * SIDE, rows * (SIDE + _LINE)), "white")
    pen = ImageDraw.Draw(whole)
    for number, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
        left, top = number % _COLUMNS * SIDE, number // _COLUMNS * (SIDE + _LINE)
        whole.paste(picture, (left, top))
        pen.multiline_text(
            (left + 2, top + SIDE + 1), _two_lines(prompt), fill="black", font_size=10, spacing=1
        )
    return whole


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw and write the sheet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("sheet", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    given = parser.parse_args(arguments)
    pictures = drawn(loaded(given.model, given.device), PROMPTS, given.seed)
    sheet(pictures, PROMPTS).save(given.sheet)


def _two_lines(prompt: str) -> str:
    if len(prompt) <= 24:
        return prompt
    cut = prompt.rfind(" ", 0, 25)
    return f"{prompt[:cut]}\n{prompt[cut + 1 :]}"


if __name__ == "__main__":
    main()
