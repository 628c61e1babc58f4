"""Pipelines of the shapes in use, tiny, with seeded random weights: as diffusers' own tests build them."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from gpu_worker.engine.stand_in import save_random_adapter
from gpu_worker.models import ModelEntry, Models
from tests.stand_in import stand_in_models

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_WIDTH = 32


def tiny_entry(family: str, folder: Path, scheduler: str = "", **changes: Any) -> ModelEntry:
    """Return the entry of a family's model in `folder`, which is built where it is not there.

    `scheduler` is the name of a class, or empty for the model's own. U-Nets have an adapter for pictures.
    """
    if not folder.exists():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            pipeline = _FAMILIES[family]()
        pipeline.save_pretrained(folder)
        if hasattr(pipeline, "unet"):
            save_random_adapter(pipeline.unet, folder / "ip_adapter")
    adapter = folder / "ip_adapter"
    entry = replace(
        stand_in_models().default,
        name=f"{family} {scheduler}".strip(),
        source=str(folder),
        scheduler=scheduler,
        ip_adapter=str(adapter) if adapter.exists() else "",
        weighted_parts=family != "z-image",
        default_width=64,
        default_height=64,
    )
    return replace(entry, **changes)


def png(number: int, width: int = 64, height: int = 48) -> bytes:
    """Return a picture's file; another for each number."""
    colours = torch.rand((height, width, 3), generator=torch.Generator().manual_seed(number))
    coarse = colours[::16, ::16].repeat_interleave(16, 0).repeat_interleave(16, 1)
    file = io.BytesIO()
    Image.fromarray((coarse * 255).to(torch.uint8).numpy()).save(file, "PNG")
    return file.getvalue()


def models_of(*entries: ModelEntry) -> Models:
    return Models(default=entries[0], entries={entry.name: entry for entry in entries})


def _sd() -> Any:
    return diffusers.StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(_clip_config()),
        tokenizer=_clip_tokenizer(),
        unet=_unet(cross_attention_dim=_WIDTH),
        scheduler=diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl() -> Any:
    return diffusers.StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(_clip_config()),
        text_encoder_2=CLIPTextModelWithProjection(_clip_config()),
        tokenizer=_clip_tokenizer(),
        tokenizer_2=_clip_tokenizer(),
        unet=_unet(
            cross_attention_dim=2 * _WIDTH,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            transformer_layers_per_block=(1, 2),
            projection_class_embeddings_input_dim=6 * 8 + _WIDTH,
        ),
        scheduler=diffusers.EulerDiscreteScheduler(),
    )


def _sd3() -> Any:
    return diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_projection_dim=32,
            joint_attention_dim=2 * _WIDTH,
            pooled_projection_dim=2 * _WIDTH,
            pos_embed_max_size=16,
        ),
        vae=_vae(shift_factor=0.06, scaling_factor=1.5),
        text_encoder=CLIPTextModelWithProjection(_clip_config()),
        text_encoder_2=CLIPTextModelWithProjection(_clip_config()),
        text_encoder_3=T5EncoderModel(_t5_config(2 * _WIDTH)),
        tokenizer=_clip_tokenizer(),
        tokenizer_2=_clip_tokenizer(),
        tokenizer_3=_t5_tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def _flux(**scheduling: Any) -> Any:
    return diffusers.FluxPipeline(
        transformer=diffusers.FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=_WIDTH,
            pooled_projection_dim=_WIDTH,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=True,
        ),
        vae=_vae(shift_factor=0.06, scaling_factor=1.5),
        text_encoder=CLIPTextModel(_clip_config()),
        text_encoder_2=T5EncoderModel(_t5_config(_WIDTH)),
        tokenizer=_clip_tokenizer(),
        tokenizer_2=_t5_tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**scheduling),
    )


def _z_image() -> Any:
    tokens = ["<|endoftext|>", "Ġ", *_LETTERS, *(f"Ġ{letter}" for letter in _LETTERS)]
    tokenizer = Qwen2Tokenizer(
        vocab={token: number for number, token in enumerate(tokens)}, merges=[], model_max_length=64
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} a{% endfor %}"
    encoder = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=_WIDTH,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.3,
    )
    return diffusers.ZImagePipeline(
        transformer=diffusers.ZImageTransformer2DModel(
            in_channels=4,
            dim=_WIDTH,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=_WIDTH,
            axes_dims=[4, 6, 6],
            axes_lens=[128, 64, 64],
        ),
        vae=_vae(shift_factor=0.06, scaling_factor=1.5),
        text_encoder=Qwen3Model(encoder),
        tokenizer=tokenizer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


_FAMILIES: Mapping[str, Callable[[], Any]] = {
    "sd": _sd,
    "sdxl": _sdxl,
    "sd3": _sd3,
    "flux": _flux,
    "z-image": _z_image,
    "flux-dynamic": lambda: _flux(use_dynamic_shifting=True),
}


def _unet(**changes: Any) -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        norm_num_groups=8,
        **changes,
    )


def _vae(**changes: Any) -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        block_out_channels=(16,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=128,
        **changes,
    )


def _clip_config() -> CLIPTextConfig:
    tokenizer = _clip_tokenizer()
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=_WIDTH,
        intermediate_size=37,
        num_hidden_layers=3,
        num_attention_heads=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        projection_dim=_WIDTH,
        # Else what a text says is lost among so few weights.
        initializer_range=0.3,
    )


def _clip_tokenizer() -> CLIPTokenizer:
    tokens = ["<|startoftext|>", "<|endoftext|>", *_LETTERS, *(f"{letter}</w>" for letter in _LETTERS)]
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(tokens)}, merges=[], model_max_length=77
    )


def _t5_config(width: int) -> T5Config:
    return T5Config(
        vocab_size=len(_t5_tokenizer()),
        d_model=width,
        d_kv=8,
        d_ff=37,
        num_layers=2,
        num_heads=4,
        initializer_factor=1.0,
    )


def _t5_tokenizer() -> T5Tokenizer:
    tokens = ["<pad>", "</s>", "<unk>", "\u2581", *_LETTERS]
    return T5Tokenizer(vocab=[(token, 0.0) for token in tokens], extra_ids=0, model_max_length=64)
