"""The default model's recipe: the same pictures with the same captions each time, and some left out."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image, ImageDraw
from transformers import CLIPTokenizer

from gpu_worker.default_model import packages
from gpu_worker.default_model.adapter import IMAGE_ENCODER, IP_ADAPTER, Adapter
from gpu_worker.default_model.captions import COLOURS_LEFT_OUT, GROUNDS_LEFT_OUT, caption
from gpu_worker.default_model.concepts import Concept, Style
from gpu_worker.default_model.networks import (
    WIDTH,
    new_autoencoder,
    new_picture_encoder,
    new_scheduler,
    new_text_encoder,
    new_tokenizer,
    new_unet,
    save_pipeline,
    tokens,
)
from gpu_worker.default_model.packages import Package, PackageUnusable
from gpu_worker.default_model.pictures import Sprite, Studio, captioned, is_left_out
from gpu_worker.default_model.train import Course
from gpu_worker.engine.adapters import loaded_adapter

pytestmark = pytest.mark.engine


def a_thing(name: str) -> Concept:
    nowhere = {style: Path(f"{style}.png") for style in Style}
    return Concept(name=name, aliases=(), words=("round",), kind="Objects", pictures=nowhere)


def a_studio(*names: str) -> Studio:
    image = Image.new("RGBA", (64, 64))
    ImageDraw.Draw(image).ellipse((0, 0, 63, 63), fill=(214, 40, 40, 255))
    things = [a_thing(name) for name in names]
    sprites = {(each.name, style): Sprite(image=image, hue=0) for each in things for style in Style}
    return Studio(things, sprites)


def test_one_seed_gives_the_same_pictures_and_captions() -> None:
    place = a_studio("apple", "ball", "cup")
    one, same, other = (captioned(place, 20, 64, 64, seed) for seed in (5, 5, 6))
    assert np.array_equal(one.pictures, same.pictures)
    assert one.captions == same.captions
    assert one.captions != other.captions


def test_what_is_left_out_is_in_no_scene() -> None:
    names = ["apple", "dog", "crown", "banana"]
    assert {*names} <= {*COLOURS_LEFT_OUT, *GROUNDS_LEFT_OUT}
    place, rng = a_studio(*names), random.Random(1)
    scenes = [place.scene(rng) for _ in range(4000)]
    assert not any(is_left_out(each) for each in scenes)
    coloured = {(each.concept.name, each.colour) for scene in scenes for each in scene.subjects}
    assert ("apple", "green") in coloured
    assert ("apple", "blue") not in coloured
    grounds = {
        (scene.subjects[0].concept.name, scene.ground_names) for scene in scenes if len(scene.subjects) == 1
    }
    assert ("dog", ("green",)) in grounds
    assert ("dog", ("purple",)) not in grounds


def test_a_caption_says_nothing_that_is_not_on_the_picture() -> None:
    place, rng = a_studio("apple", "cup"), random.Random(2)
    for _ in range(500):
        scene = place.scene(rng)
        said = caption(scene, rng)
        for each in place.things:
            assert (each.name in said) == any(subject.concept is each for subject in scene.subjects), said
        shown = {*scene.ground_names, *(each.colour for each in scene.subjects)}
        assert "purple" not in said or "purple" in shown
        assert "3d" not in said or scene.style is Style.SOLID
        assert "flat" not in said or scene.style is Style.FLAT


def test_the_tokenizer_reads_what_it_has_never_seen() -> None:
    tokenizer = new_tokenizer(["a red apple", "a cat on blue"] * 20)
    (row,) = tokens(tokenizer, ["Zoë’s ©at, 12 %"]).tolist()
    text = tokenizer.decode(row[1 : row.index(tokenizer.eos_token_id)])
    assert text.replace(" ", "") == "zoë’s©at,12%"


def test_the_schedule_ends_in_noise_alone() -> None:
    assert float(new_scheduler().alphas_cumprod[-1]) < 1e-6
    assert torch.all(new_scheduler().alphas_cumprod.diff() < 0)


def test_another_archive_than_the_recipe_s_is_refused(tmp_path: Path) -> None:
    package = Package(name="@some/pictures", version="1.0.0", sha512="AAAA", licence="MIT")
    (tmp_path / "some-pictures-1.0.0.tgz").write_bytes(b"other")
    with pytest.raises(PackageUnusable, match=r"is not @some/pictures 1\.0\.0"):
        packages.unpacked(package, tmp_path)


def test_what_is_trained_to_show_pictures_is_what_a_worker_loads(tmp_path: Path) -> None:
    torch.manual_seed(3)
    unet, encoder = new_unet().eval(), new_picture_encoder().eval()
    adapter = Adapter(unet)
    latents, texts, seen = torch.randn(2, 4, 16, 16), torch.randn(2, 32, WIDTH), torch.randn(2, WIDTH)
    times = torch.tensor([10, 900])
    before = adapter.predicted(latents, times, texts, seen)
    before.square().mean().backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for weight in adapter.modules.parameters():
            assert weight.grad is not None, "all of it is trained"
            weight -= weight.grad.sign() * 0.1
    trained = adapter.predicted(latents, times, texts, seen)
    assert not torch.allclose(before, trained, atol=1e-3), "it looks at the picture"
    encoder.half().save_pretrained(tmp_path / "adapter" / IMAGE_ENCODER)
    adapter.save(tmp_path / "adapter")
    loaded = loaded_adapter(tmp_path / "adapter", unet)
    shown = {"image_embeds": [seen[:, None]]}
    drawn = loaded.denoiser(latents, times, texts, added_cond_kwargs=shown).sample
    assert torch.allclose(drawn, trained, atol=2e-3), "but for its half precision"
    assert not any(weight.grad is not None for weight in unet.parameters()), "the rest stays as it is"


def test_training_goes_on_from_a_model_with_what_it_knows(tmp_path: Path) -> None:
    torch.manual_seed(4)
    model, run = tmp_path / "model", tmp_path / "run"
    tokenizer = new_tokenizer(["a cat on a mat"])
    known = {"vae": new_autoencoder(), "unet": new_unet(), "text_encoder": new_text_encoder(tokenizer)}
    save_pipeline(
        model,
        tokenizer=tokenizer,
        text_encoder=known["text_encoder"],
        autoencoder=known["vae"],
        unet=known["unet"],
    )
    new_picture_encoder().half().save_pretrained(model / IP_ADAPTER / IMAGE_ENCODER)

    course = Course(a_studio("apple", "cup"), run, torch.device("cpu"), start_from=model)
    again = tmp_path / "again"
    course.write_model(again)

    texts = ["a cat", "an apple"]
    kept = CLIPTokenizer.from_pretrained(again / "tokenizer")
    assert torch.equal(tokens(kept, texts), tokens(tokenizer, texts)), "not a tokenizer of its own"
    for part in (*known, f"{IP_ADAPTER}/{IMAGE_ENCODER}"):
        before, after = (
            safetensors.torch.load_file(next((folder / part).glob("*.safetensors")))
            for folder in (model, again)
        )
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before), part
    assert (run / "matching.safetensors").is_file(), "the lessons before drawing are done"
