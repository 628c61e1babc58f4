"""Trains the default model: one command, the same weights from the same seed, to be stopped at any time.

    python -m gpu_worker.default_model.train --data DIR --run DIR [--device cuda] [--minutes 10]

It has five lessons, one after the other: pictures to latents and back (autoencoder), which caption belongs
to which picture (matching, where the text encoder learns its words), latents from captions (drawing),
pictures from latents once more, with those as they are now (finishing), and latents from pictures that it is
shown (adapting).
`--data` holds the archives of the three packages, or gets them from npm; `--run` holds what was learned so
far and, in its folder `model`, the model as it would be now. The same command goes on where the last one
ended. `--start-from` takes a model that was written before in place of the first two lessons, and draws on
with what it knows.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from gpu_worker.default_model.adapter import IMAGE_ENCODER, IP_ADAPTER, Adapter
from gpu_worker.default_model.captions import caption
from gpu_worker.default_model.concepts import concepts
from gpu_worker.default_model.networks import (
    CHANNELS,
    SIDE,
    new_autoencoder,
    new_picture_encoder,
    new_scheduler,
    new_text_encoder,
    new_tokenizer,
    new_unet,
    save_pipeline,
    tokens,
    viewed,
)
from gpu_worker.default_model.packages import FLAT, SOLID, WORDS, unpacked
from gpu_worker.default_model.pictures import Studio, studio
from gpu_worker.default_model.shards import SHARD_PICTURES, Shards, levels

_MODEL, _TOKENIZER = "model", "tokenizer"
_SEED = 20
_SAVE_SECONDS = 300
_LOG_STEPS = 50

# Captions that the tokenizer learns from, and how often each name is among them beside that.
_TOKENIZER_CAPTIONS, _TOKENIZER_NAMES = 20_000, 3

_CROP, _CROPS = 64, 16
_CROPS_OF_EACH = 2
# How much edges count beside levels, and how much it costs a latent to be exact.
_EDGES, _SPREAD = 0.5, 3e-4
_PAIRS = 64
_LATENTS = 32

# Latents are drawn from so many shards, of which one is made anew in so many steps.
_POOL, _POOL_STEPS = 16, 1024

# Of a thing seen closely only what is done late is learned: how close it is, no caption says.
_CLOSE_TIMES = 400
_DROPPED = 0.1
_FULL_SNR, _LEAST_WEIGHT = 5.0, 0.1

# Of what it is shown pictures for, half is said in words too.
_UNSAID, _UNSEEN = 0.5, 0.1
_ADAPTING_STEPS_OF_SHARD = 256

_REPRODUCING, _DRAWING, _FINISHING, _ADAPTING = 1, 3, 4, 5
# The last lesson is given other pictures than the first. Drawn latents are not quite those of a picture.
_FIRST_FINISHING, _DRAWN_NOISE = 100_000, 0.1
_FIRST_ADAPTING = 200_000
_FIRST_STEPS, _LAST_PART, _LEAST_RATE = 200, 0.3, 0.02
_HIGHEST_TEMPERATURE = 60.0


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What is learned until it is done."""

    name: str
    modules: nn.ModuleDict
    loss: Callable[[int], torch.Tensor]
    """Of a step, which is all that it may depend on."""
    steps: int
    batch: int
    rate: float
    average: float
    """How much of the averaged weights each step keeps."""


class Progress:
    """A lesson's weights, their average, and the optimiser's state: what a checkpoint holds."""

    def __init__(self, lesson: Lesson, folder: Path) -> None:
        self.lesson = lesson
        self.step = 0
        self._file = folder / f"{lesson.name}.checkpoint"
        self._log = folder / "log.jsonl"
        self._weights = list(lesson.modules.parameters())
        self._optimiser = torch.optim.AdamW(
            self._weights, lr=lesson.rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        self._averages = [weight.detach().clone() for weight in self._weights]
        if self._file.is_file():
            state = torch.load(self._file, weights_only=True)
            self.step = state["step"]
            lesson.modules.load_state_dict(state["modules"])
            self._optimiser.load_state_dict(state["optimiser"])
            for average, kept in zip(self._averages, state["averages"], strict=True):
                average.copy_(kept)

    def learn(self, until: float) -> bool:
        """Take steps until it is done, or `until` by `time.monotonic`; return whether it is done."""
        lesson = self.lesson
        lesson.modules.train()
        losses: list[float] = []
        wall, cpu, saved = time.monotonic(), time.process_time(), time.monotonic()
        while self.step < lesson.steps and time.monotonic() < until:
            for group in self._optimiser.param_groups:
                group["lr"] = lesson.rate * _share_of_rate(self.step, lesson.steps)
            loss = lesson.loss(self.step)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self._weights, 1.0)
            self._optimiser.step()
            self._optimiser.zero_grad()
            self.step += 1
            # The first steps are forgotten soon.
            kept = min(lesson.average, self.step / (self.step + 10))
            torch._foreach_lerp_(self._averages, [weight.detach() for weight in self._weights], 1 - kept)
            losses.append(loss.item())
            if self.step % _LOG_STEPS == 0:
                now, now_cpu = time.monotonic(), time.process_time()
                line = {
                    "lesson": lesson.name,
                    "step": self.step,
                    "loss": round(sum(losses) / len(losses), 5),
                    "pictures_per_s": round(len(losses) * lesson.batch / (now - wall), 1),
                    "pictures_per_cpu_s": round(len(losses) * lesson.batch / (now_cpu - cpu), 1),
                }
                with self._log.open("a") as log:
                    log.write(json.dumps(line) + "\n")
                print(line, flush=True)
                losses, wall, cpu = [], now, now_cpu
            if time.monotonic() - saved > _SAVE_SECONDS:
                self.save()
                saved = time.monotonic()
        self.save()
        return self.step == lesson.steps

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        state = {
            "step": self.step,
            "modules": self.lesson.modules.state_dict(),
            "optimiser": self._optimiser.state_dict(),
            "averages": self._averages,
        }
        unfinished = self._file.with_suffix(".unfinished")
        torch.save(state, unfinished)
        unfinished.rename(self._file)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Have the averaged weights in place of the last ones for a while."""
        last = [weight.detach().clone() for weight in self._weights]
        self.take(self._averages)
        yield
        self.take(last)

    def take_averages(self) -> None:
        """Put the averaged weights in place of the last ones."""
        self.take(self._averages)

    def take(self, weights: Sequence[torch.Tensor]) -> None:
        """Put weights in place of the last ones."""
        with torch.no_grad():
            for weight, value in zip(self._weights, weights, strict=True):
                weight.copy_(value)


def main(arguments: Sequence[str] | None = None) -> None:
    """Learn for a while."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the packages' archives")
    parser.add_argument("--run", type=Path, required=True, help="folder of what was learned so far")
    parser.add_argument("--start-from", type=Path, help="folder of a model that was written before")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--minutes", type=float, default=1e6, help="stop after so many")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--drawing-steps", type=int, default=18_000, help="length of the main lesson")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    until = time.monotonic() + 60 * given.minutes
    given.run.mkdir(parents=True, exist_ok=True)
    things = concepts(*(unpacked(package, given.data) for package in (FLAT, SOLID, WORDS)))
    place = studio(things, given.data / "flat-enlarged")
    course = Course(place, given.run, given.device, start_from=given.start_from)
    if course.learn(until, given.drawing_steps):
        print("done", flush=True)


class Course:
    """The five lessons, and what they have in common."""

    def __init__(
        self, place: Studio, run: Path, device: torch.device, *, start_from: Path | None = None
    ) -> None:
        """`run` is the folder of what was learned so far, `start_from` that of a model, if there is one."""
        self._run = run
        self._device = device
        if start_from is not None and not (run / _TOKENIZER).is_dir():
            # What a model knows, it knows by its own tokens.
            shutil.copytree(start_from / _TOKENIZER, run / _TOKENIZER)
        self._tokenizer = _learned_tokenizer(place, run / _TOKENIZER)
        self._shards = Shards(place, lambda texts: tokens(self._tokenizer, texts))
        torch.manual_seed(_SEED)
        self._autoencoder = new_autoencoder()
        self._text_encoder = new_text_encoder(self._tokenizer)
        self._picture_encoder = new_picture_encoder()
        self._unet = new_unet()
        for module in (self._autoencoder, self._text_encoder, self._picture_encoder, self._unet):
            module.to(device)
        for module in (self._autoencoder, self._unet):
            module.to(memory_format=torch.channels_last)
        self._alphas = new_scheduler().alphas_cumprod.to(device)
        self._nothing_said = tokens(self._tokenizer, [""])[0]
        self._temperature = nn.Parameter(torch.tensor(2.5, device=device))
        if start_from is not None:
            self._start_from(start_from)

    def _start_from(self, model: Path) -> None:
        """Take what a model knows, as after the lessons before drawing. What the run knows itself stays."""
        self._autoencoder.load_state_dict(AutoencoderKL.from_pretrained(model / "vae").state_dict())
        self._text_encoder.load_state_dict(CLIPTextModel.from_pretrained(model / "text_encoder").state_dict())
        encoder = CLIPVisionModelWithProjection.from_pretrained(model / IP_ADAPTER / IMAGE_ENCODER)
        self._picture_encoder.load_state_dict(encoder.state_dict())
        self._unet.load_state_dict(UNet2DConditionModel.from_pretrained(model / "unet").state_dict())
        for lesson in (self._reproducing(), self._matching()):
            if not self._result_of(lesson).is_file():
                _write_weights(lesson.modules, self._result_of(lesson))

    def learn(self, until: float, drawing_steps: int) -> bool:
        """Learn what is left of the lessons, and write the model; return whether all are done."""
        if not self._learned(self._reproducing(), until, self._normalise_latents):
            return False
        self._autoencoder.requires_grad_(False)
        if not self._learned(self._matching(), until):
            return False
        drawing = Lesson(
            name="drawing",
            modules=nn.ModuleDict({"unet": self._unet, "text_encoder": self._text_encoder}),
            loss=self._loss_of_drawing,
            steps=drawing_steps,
            batch=_LATENTS,
            rate=4e-4,
            average=0.9995,
        )
        progress = Progress(drawing, self._run)
        drawn = False
        while not drawn and time.monotonic() < until:
            drawn = progress.learn(min(until, time.monotonic() + _SAVE_SECONDS))
            with progress.averaged():
                self.write_model(self._run / _MODEL)
        vae = self._autoencoder
        finishing = Lesson(
            name="finishing",
            modules=nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv}),
            loss=self._loss_of_finishing,
            steps=2_000,
            batch=_CROPS,
            rate=1e-3,
            average=0.999,
        )
        finishing.modules.requires_grad_(True)
        if not drawn or not self._learned(finishing, until):
            return False
        progress.take_averages()
        self.write_model(self._run / _MODEL)
        torch.manual_seed(_SEED)
        adapter = Adapter(self._unet)
        adapting = Lesson(
            name="adapting",
            modules=adapter.modules,
            loss=partial(self._loss_of_adapting, adapter),
            steps=3_000,
            batch=_LATENTS,
            rate=2e-3,
            average=0.998,
        )
        if not self._learned(adapting, until):
            return False
        adapter.save(self._run / _MODEL / IP_ADAPTER)
        return True

    def _reproducing(self) -> Lesson:
        return Lesson(
            name="autoencoder",
            modules=nn.ModuleDict({"autoencoder": self._autoencoder}),
            loss=self._loss_of_reproducing,
            steps=5_000,
            batch=_CROPS,
            rate=1.5e-3,
            average=0.998,
        )

    def _matching(self) -> Lesson:
        texts_and_pictures = {"text_encoder": self._text_encoder, "picture_encoder": self._picture_encoder}
        return Lesson(
            name="matching",
            modules=nn.ModuleDict(
                {**texts_and_pictures, "temperature": nn.ParameterList([self._temperature])}
            ),
            loss=self._loss_of_matching,
            steps=2_000,
            batch=_PAIRS,
            rate=8e-4,
            average=0.99,
        )

    def _result_of(self, lesson: Lesson) -> Path:
        return self._run / f"{lesson.name}.safetensors"

    def _learned(self, lesson: Lesson, until: float, after: Callable[[], None] | None = None) -> bool:
        """Return whether a lesson was learned to its end; its modules have the averaged weights then."""
        result = self._result_of(lesson)
        if not result.is_file():
            progress = Progress(lesson, self._run)
            if not progress.learn(until):
                return False
            progress.take_averages()
            if after is not None:
                after()
            _write_weights(lesson.modules, result)
        lesson.modules.load_state_dict(safetensors.torch.load_file(result))
        return True

    def _loss_of_reproducing(self, step: int) -> torch.Tensor:
        generator = _generator(_REPRODUCING, step)
        wanted = self._crops(step, generator)
        posterior = self._autoencoder.encode(wanted).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(self._device)
        got = self._autoencoder.decode(posterior.mean + posterior.std * noise).sample
        spread: torch.Tensor = posterior.kl().mean() / posterior.mean[0].numel()
        return _unlike(got, wanted) + _SPREAD * spread

    def _loss_of_finishing(self, step: int) -> torch.Tensor:
        generator = _generator(_FINISHING, step)
        wanted = self._crops(_FIRST_FINISHING + step, generator)
        latents = self._encoded(wanted)
        noise = torch.randn(latents.shape, generator=generator).to(self._device)
        return _unlike(self._autoencoder.decode(latents + _DRAWN_NOISE * noise).sample, wanted)

    def _crops(self, step: int, generator: torch.Generator) -> torch.Tensor:
        """Return parts of pictures, of shape (_CROPS, 3, _CROP, _CROP)."""
        pictures = self._shards.pictures(step * _CROPS // (_CROPS_OF_EACH * SHARD_PICTURES)).pictures
        rows = torch.randint(len(pictures), (_CROPS,), generator=generator)
        corners = torch.randint(SIDE - _CROP + 1, (_CROPS, 2), generator=generator)
        crops = [
            torch.from_numpy(pictures[row, top : top + _CROP, left : left + _CROP])
            for row, (top, left) in zip(rows.tolist(), corners.tolist(), strict=True)
        ]
        return levels(torch.stack(crops)).to(self._device, memory_format=torch.channels_last)

    def _normalise_latents(self) -> None:
        """Give each channel of latents a mean of 0 and a spread of 1, by changing the layers next to them."""
        vae = self._autoencoder
        pictures = torch.split(torch.from_numpy(self._shards.pictures(0).pictures), _PAIRS)
        with torch.no_grad():
            latents = torch.cat([self._encoded(levels(some)) for some in pictures])
            mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
            inner, outer = vae.quant_conv, vae.post_quant_conv
            inner.bias[:CHANNELS] -= mean
            inner.bias[:CHANNELS] /= std
            inner.weight[:CHANNELS] /= std.view(-1, 1, 1, 1)
            inner.bias[CHANNELS:] -= 2 * std.log()
            outer.bias += (outer.weight * mean.view(1, -1, 1, 1)).sum((1, 2, 3))
            outer.weight *= std.view(1, -1, 1, 1)

    def _encoded(self, pictures: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            moved = pictures.to(self._device, memory_format=torch.channels_last)
            latents: torch.Tensor = self._autoencoder.encode(moved).latent_dist.mode()
        return latents

    def _loss_of_matching(self, step: int) -> torch.Tensor:
        shard = self._shards.pictures(step * _PAIRS // SHARD_PICTURES)
        first = step * _PAIRS % SHARD_PICTURES
        some = slice(first, first + _PAIRS)
        pictures = levels(torch.from_numpy(shard.pictures[some])).to(self._device)
        seen = self._picture_encoder(viewed(pictures)).image_embeds
        said = self._text_encoder(shard.tokens[some].to(self._device)).pooler_output
        alike = functional.normalize(seen, dim=-1) @ functional.normalize(said, dim=-1).T
        scores = alike * self._temperature.exp().clamp(max=_HIGHEST_TEMPERATURE)
        own = torch.arange(len(scores), device=self._device)
        return (functional.cross_entropy(scores, own) + functional.cross_entropy(scores.T, own)) / 2

    def _loss_of_drawing(self, step: int) -> torch.Tensor:
        generator = _generator(_DRAWING, step)
        newest = step // _POOL_STEPS
        pool = range(max(0, newest - _POOL + 1), newest + 1)
        number = pool[int(torch.randint(len(pool), (1,), generator=generator))]
        shard = self._shards.latents(pool, number, self._encoded)
        rows = torch.randint(len(shard.tokens), (_LATENTS,), generator=generator)
        latents = shard.latents[rows].float()
        most = torch.where(shard.close[rows], _CLOSE_TIMES, len(self._alphas))
        times = _times(most, generator).to(self._device)
        noise = torch.randn(latents.shape, generator=generator).to(self._device)
        unsaid = torch.rand(_LATENTS, generator=generator) < _DROPPED
        said = torch.where(unsaid[:, None], self._nothing_said, shard.tokens[rows]).to(self._device)
        texts = self._text_encoder(said).last_hidden_state
        return self._unlike_drawn(
            latents.to(self._device),
            times,
            noise,
            lambda noisy: self._unet(noisy, times, texts).sample,
        )

    def _unlike_drawn(
        self,
        latents: torch.Tensor,
        times: torch.Tensor,
        noise: torch.Tensor,
        predicted: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        alpha = self._alphas[times].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        wanted = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
        got = predicted(noisy.contiguous(memory_format=torch.channels_last))
        # What is left of the noise at the end is easy and shows little: as min-SNR weighting has it, but with
        # full weight where there is nearly but noise, for there it is decided what the picture is of.
        weight = (_FULL_SNR * (1 - alpha) / alpha).clamp(_LEAST_WEIGHT, 1.0)
        loss: torch.Tensor = ((got - wanted).square() * weight).mean()
        return loss

    def _loss_of_adapting(self, adapter: Adapter, step: int) -> torch.Tensor:
        generator = _generator(_ADAPTING, step)
        shard = self._shards.pictures(_FIRST_ADAPTING + step // _ADAPTING_STEPS_OF_SHARD)
        rows = torch.randint(len(shard.pictures), (_LATENTS,), generator=generator)
        pictures = levels(torch.from_numpy(shard.pictures[rows.numpy()])).to(self._device)
        times = _times(len(self._alphas), generator).to(self._device)
        unsaid = torch.rand(_LATENTS, generator=generator) < _UNSAID
        unseen = torch.rand(_LATENTS, generator=generator) < _UNSEEN
        said = torch.where(unsaid[:, None], self._nothing_said, shard.tokens[rows]).to(self._device)
        with torch.no_grad():
            latents = self._encoded(pictures)
            texts = self._text_encoder(said).last_hidden_state
            seen = self._picture_encoder(viewed(pictures)).image_embeds
        seen = torch.where(unseen[:, None].to(self._device), torch.zeros_like(seen), seen)
        noise = torch.randn(latents.shape, generator=generator).to(self._device)
        return self._unlike_drawn(
            latents, times, noise, lambda noisy: adapter.predicted(noisy, times, texts, seen)
        )

    def write_model(self, model: Path) -> None:
        """Write the model as it is now into a folder, whole or not at all, its picture encoder included."""
        unfinished = model.with_name(f".{model.name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        save_pipeline(
            unfinished,
            tokenizer=self._tokenizer,
            text_encoder=copy.deepcopy(self._text_encoder),
            autoencoder=copy.deepcopy(self._autoencoder),
            unet=copy.deepcopy(self._unet),
        )
        encoder = copy.deepcopy(self._picture_encoder).half()
        encoder.save_pretrained(unfinished / IP_ADAPTER / IMAGE_ENCODER, safe_serialization=True)
        shutil.rmtree(model, ignore_errors=True)
        unfinished.rename(model)


def _write_weights(modules: nn.Module, file: Path) -> None:
    weights = {name: each.contiguous() for name, each in modules.state_dict().items()}
    safetensors.torch.save_file(weights, file)


def _unlike(got: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return by how much pictures are not as wanted, in their levels and in their edges."""
    loss = functional.l1_loss(got, wanted)
    for axis in (2, 3):
        loss = loss + _EDGES * functional.l1_loss(got.diff(dim=axis), wanted.diff(dim=axis))
    return loss


def _share_of_rate(step: int, steps: int) -> float:
    """Return how much of its rate a lesson learns with: all of it, but at the start and in the last third."""
    left = (steps - step) / (_LAST_PART * steps)
    return min(1.0, (step + 1) / _FIRST_STEPS, max(left, _LEAST_RATE))


def _times(most: torch.Tensor | int, generator: torch.Generator) -> torch.Tensor:
    """Return times below `most`, of shape (_LATENTS,).

    What a picture is of is decided where there is nearly but noise: that is asked for more often.
    """
    return (torch.rand(_LATENTS, generator=generator).sqrt() * most).long()


def _generator(lesson: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed((_SEED * 10 + lesson) * 10_000_000 + step)


def _learned_tokenizer(place: Studio, folder: Path) -> CLIPTokenizer:
    if not folder.is_dir():
        rng = random.Random(_SEED)  # noqa: S311
        texts = [caption(place.scene(rng), rng) for _ in range(_TOKENIZER_CAPTIONS)]
        for each in place.things:
            texts += [each.name, *each.aliases, *each.words] * _TOKENIZER_NAMES
        new_tokenizer(texts).save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


if __name__ == "__main__":
    main()
