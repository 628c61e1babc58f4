"""Prompts of several parts: texts with weights of their own, and pictures.

The parts are composed: with `e_u` what the denoiser predicts without any of them and `e_i` what it predicts
with part `i` alone, the prediction is `e_u + g * sum(share_i * (e_i - e_u))` at guidance `g`. So a part of
negative share leads away from what it shows, and a share counts for what it is whatever the text's length
(Liu et al. 2022, Compositional Visual Generation with Composable Diffusion Models). A pipeline guides by
itself; what it takes for the prediction with the prompt is replaced by `e_u + sum(share_i * (e_i - e_u))`.

Where a pipeline does not ask for `e_u` (Flux, and whatever was distilled to need no guidance) texts are
blended instead: the same sum over their embeddings, with that of the empty text for `e_u`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch

from gpu_worker.contract import WHOLE_PPM, RenderSpec, TextPart
from gpu_worker.engine.adapters import PictureAdapter
from gpu_worker.engine.denoiser import DenoiserStandIn, denoiser_of, put_denoiser, sample_of
from gpu_worker.run import EngineFailure


class Joining(StrEnum):
    """How the parts of a prompt become one prediction."""

    NONE = "none"
    """There is one text, and no more."""
    COMPOSED = "composed"
    BLENDED = "blended"


class PartsUnknown(EngineFailure):
    """A pipeline encodes texts in a way that is not known here, so that their parts cannot be weighed."""

    def __init__(self, pipeline: Any) -> None:
        super().__init__(
            reason="MODEL_UNUSABLE",
            sentence=f"Parts of a prompt cannot be weighed with a {type(pipeline).__name__}.",
        )


@dataclass(frozen=True, kw_only=True)
class _Text:
    """What a text is for a denoiser. Each has one row for each picture of the grid."""

    embeddings: torch.Tensor
    pooled: torch.Tensor | None
    """Of families that have one; of shape (pictures, width)."""

    def in_call(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call to the denoiser with this text in place of the one that is there."""
        replaced = {**kwargs, "encoder_hidden_states": self.embeddings}
        if self.pooled is not None and "pooled_projections" in kwargs:
            replaced["pooled_projections"] = self.pooled
        elif self.pooled is not None:
            replaced["added_cond_kwargs"] = {**kwargs["added_cond_kwargs"], "text_embeds": self.pooled}
        return replaced


@dataclass(frozen=True, kw_only=True)
class _Picture:
    embeddings: torch.Tensor
    denoiser: Any

    def in_call(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call without text as one that shows this picture."""
        added = {**(kwargs.get("added_cond_kwargs") or {}), "image_embeds": [self.embeddings]}
        return {**kwargs, "added_cond_kwargs": added}


def text_parts(spec: RenderSpec) -> tuple[TextPart, ...]:
    """Return all text parts: what is left beside the pictures is one text's, where no parts are given."""
    if spec.parts:
        return spec.parts
    left_ppm = WHOLE_PPM - sum(abs(picture.share_ppm) for picture in spec.pictures)
    return (TextPart(text=spec.prompt, share_ppm=left_ppm),) if left_ppm else ()


def joining(spec: RenderSpec, pipeline: Any) -> Joining:
    """Return how a pipeline will join the parts of a prompt."""
    texts = text_parts(spec)
    if not spec.pictures and len(texts) == 1 and texts[0].share_ppm == WHOLE_PPM:
        return Joining.NONE
    if spec.pictures or _guides(pipeline, spec):
        return Joining.COMPOSED
    return Joining.BLENDED


def try_weighing(pipeline: Any) -> None:
    """Encode a part of a prompt for nobody. Raises PartsUnknown."""
    _conditioning(pipeline, "", 1)


def prompt_arguments(
    how: Joining,
    spec: RenderSpec,
    pictures: Sequence[bytes],
    *,
    pipeline: Any,
    adapter: PictureAdapter | None,
    check: Callable[[], None],
) -> dict[str, Any]:
    """Return what to call a run's copy of a pipeline with for its prompt; give it the denoiser to do it with.

    `pictures` are the files of the picture parts, which take an adapter. `check` is called before each is
    encoded, and before each text. Raises PartsUnknown.
    """
    texts = text_parts(spec)
    if how is Joining.NONE:
        return {"prompt": texts[0].text, "num_images_per_prompt": spec.images}
    encoded: list[tuple[float, _Text]] = []
    for text in texts:
        check()
        encoded.append((text.share_ppm / WHOLE_PPM, _conditioning(pipeline, text.text, spec.images)))
    if how is Joining.BLENDED:
        return _blended(_conditioning(pipeline, "", spec.images), encoded)
    parts: list[tuple[float, _Text | _Picture]] = [*encoded]
    for part, picture in zip(spec.pictures, pictures, strict=True):
        assert adapter is not None, "the model takes no pictures"
        check()
        embeddings = adapter.embeddings(picture, spec.images)
        parts.append((part.share_ppm / WHOLE_PPM, _Picture(embeddings=embeddings, denoiser=adapter.denoiser)))
    # A pipeline that guides says itself what it means by nothing: SDXL gives zeros, not an empty text.
    nothing = None if _guides(pipeline, spec) else _conditioning(pipeline, "", spec.images)
    put_denoiser(pipeline, _Composition(denoiser_of(pipeline), parts, nothing))
    return {"prompt": texts[0].text if texts else "", "num_images_per_prompt": spec.images}


class _Composition(DenoiserStandIn):
    """Predicts with each part alone and hands the sum to the pipeline."""

    def __init__(
        self,
        denoiser: Any,
        parts: Sequence[tuple[float, _Text | _Picture]],
        nothing: _Text | None,
    ) -> None:
        """`nothing` is given where the pipeline asks with its prompt alone."""
        super().__init__(denoiser)
        self._parts = parts
        self._nothing = nothing

    def _answer(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
        rows = sample_of(args, kwargs).shape[0]
        if self._nothing is not None:
            without = self._nothing.in_call(kwargs)
        else:
            # Pipelines that guide ask for both at once, without the prompt first.
            args = _first_half(args, rows)
            without = _first_half(kwargs, rows)
        predicted = self._asked(args, without)
        # Sums of several in half precision lose more than one.
        origin = predicted.float()
        total = origin.clone()
        for share, part in self._parts:
            denoiser = part.denoiser if isinstance(part, _Picture) else self._denoiser
            alone = denoiser(*args, return_dict=False, **part.in_call(without))[0]
            total += share * (alone.float() - origin)
        composed = total.to(predicted.dtype)
        return composed if self._nothing is not None else torch.cat([predicted, composed])


def _blended(origin: _Text, parts: Sequence[tuple[float, _Text]]) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "prompt_embeds": _sum(origin.embeddings, [(share, part.embeddings) for share, part in parts]),
        # Some pipelines repeat embeddings that they are given, others do not: here is a row for each.
        "num_images_per_prompt": 1,
    }
    if origin.pooled is not None:
        pooled = [(share, part.pooled) for share, part in parts if part.pooled is not None]
        arguments["pooled_prompt_embeds"] = _sum(origin.pooled, pooled)
    return arguments


def _sum(origin: torch.Tensor, parts: Sequence[tuple[float, torch.Tensor]]) -> torch.Tensor:
    total = origin.float()
    for share, part in parts:
        total = total + share * (part.float() - origin.float())
    return total.to(origin.dtype)


def _guides(pipeline: Any, spec: RenderSpec) -> bool:
    """Return whether a pipeline asks its denoiser for a prediction without the prompt too."""
    return (
        "do_classifier_free_guidance" in inspect.signature(pipeline.encode_prompt).parameters
        and spec.guidance_milli > 1000
        # Consistency models are told the guidance instead.
        and denoiser_of(pipeline).config.get("time_cond_proj_dim") is None
    )


def _conditioning(pipeline: Any, text: str, images: int) -> _Text:
    parameters = inspect.signature(getattr(pipeline, "encode_prompt", object)).parameters
    # Those with perturbed attention ask for a third prediction beside the two that are composed.
    if "num_images_per_prompt" not in parameters or hasattr(pipeline, "do_perturbed_attention_guidance"):
        raise PartsUnknown(pipeline)
    # Those that have further encoders give them the same text, if asked with None.
    optional = {"prompt_2": None, "prompt_3": None, "do_classifier_free_guidance": False}
    encoded = pipeline.encode_prompt(
        prompt=text,
        device=pipeline._execution_device,
        num_images_per_prompt=images,
        **{name: value for name, value in optional.items() if name in parameters},
    )
    match encoded:
        # Stable Diffusion; Stable Diffusion XL and 3; Flux, whose last are the places of the words.
        case (embeddings, None):
            return _Text(embeddings=embeddings, pooled=None)
        case (embeddings, None, pooled, None):
            return _Text(embeddings=embeddings, pooled=pooled)
        case (embeddings, pooled, _) if "do_classifier_free_guidance" not in parameters:
            return _Text(embeddings=embeddings, pooled=pooled)
        case _:
            raise PartsUnknown(pipeline)


def _first_half(value: Any, rows: int) -> Any:
    """Return `value` with the first half of each tensor of so many rows."""
    match value:
        case torch.Tensor() if value.ndim > 0 and value.shape[0] == rows:
            return value[: rows // 2]
        case dict():
            return {key: _first_half(each, rows) for key, each in value.items()}
        case list() | tuple():
            return type(value)(_first_half(each, rows) for each in value)
        case _:
            return value
