"""The networks of the model, in sizes that a few CPU hours can train, and their folder when they are done.

Pictures of 128 pixels are 16 by 16 latents of four channels: of that many channels stock pipelines know that
they are latents. The U-Net hears the text twice: pooled, in every layer, and word by word where it looks.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch.nn import functional
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

SIDE = 128
"""Pixels on a side of the pictures that it draws."""
LATENT_SIDE = SIDE // 8
CHANNELS = 4
TOKENS = 32
"""Read of a prompt, its start and end included."""
VIEW_SIDE = 96
"""Pixels on a side of what the picture encoder looks at."""
WIDTH = 192
"""Of texts, and of what is common to texts and pictures."""

# What processors of this kind of encoder take off pictures, and divide them by.
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_VOCABULARY = 3072
_START, _END = "<|startoftext|>", "<|endoftext|>"


def new_tokenizer(texts: Iterable[str]) -> CLIPTokenizer:
    """Return a tokenizer with the commonest pieces of words of `texts`; it can read any other text too."""
    # The byte alphabet of GPT-2's tokenizer: printable Latin-1 stands for itself, the rest is moved up.
    kept = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    moved = [byte for byte in range(256) if byte not in kept]
    letters = [chr(byte) for byte in sorted(kept)] + [chr(256 + i) for i in range(len(moved))]
    alphabet = [*letters, *(f"{letter}</w>" for letter in letters)]
    learned = _tokenizer(alphabet, []).train_new_from_iterator(texts, _VOCABULARY, show_progress=False)
    # What was learned knows of the alphabet what was in the texts, and reads the rest as the end of the text.
    state = json.loads(learned.backend_tokenizer.to_str())
    merges = [(left, right) for left, right in state["model"]["merges"]]
    return _tokenizer([*alphabet, *dict.fromkeys(left + right for left, right in merges)], merges)


def _tokenizer(pieces: Sequence[str], merges: Sequence[tuple[str, str]]) -> CLIPTokenizer:
    ids = {piece: number for number, piece in enumerate((*pieces, _START, _END))}
    return CLIPTokenizer(vocab=ids, merges=list(merges), model_max_length=TOKENS)


def tokens(tokenizer: CLIPTokenizer, texts: Iterable[str]) -> torch.Tensor:
    """Return the numbers of the texts' tokens, of shape (texts, TOKENS)."""
    found: torch.Tensor = tokenizer(
        list(texts), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
    ).input_ids
    return found


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Return an untrained text encoder; 1.9 million parameters."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            projection_dim=WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_picture_encoder() -> CLIPVisionModelWithProjection:
    """Return an untrained encoder of pictures; 1.7 million parameters."""
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=3 * WIDTH,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=VIEW_SIDE,
            patch_size=16,
            projection_dim=WIDTH,
        )
    )


def viewed(pictures: torch.Tensor) -> torch.Tensor:
    """Return pictures of shape (n, 3, h, w), -1 to 1, as the picture encoder takes them."""
    small = functional.interpolate(pictures, size=(VIEW_SIDE, VIEW_SIDE), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(each, device=small.device).view(1, 3, 1, 1) for each in (_MEAN, _STD))
    return ((small + 1) / 2 - mean) / std


def new_autoencoder() -> AutoencoderKL:
    """Return an untrained autoencoder of eight pixels to one; without attention it takes any size."""
    widths = (16, 32, 64, 128)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=8,
        sample_size=SIDE,
        scaling_factor=1.0,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def new_unet() -> UNet2DConditionModel:
    """Return an untrained denoiser; 7.5 million parameters."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIDE,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        layers_per_block=1,
        # Few where there are many latents, for there a CPU spends its time; many where the whole is decided.
        block_out_channels=(48, 96, 192),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        cross_attention_dim=WIDTH,
        attention_head_dim=6,  # of heads the number, whatever diffusers calls it
        norm_num_groups=16,
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )


def new_scheduler() -> DDIMScheduler:
    """Return the noise schedule: the cosine one, which suits few latents and ends in noise alone.

    So grounds can be of any brightness (Nichol and Dhariwal 2021; Lin et al. 2023). The prediction is v,
    which has a meaning at either end (Salimans and Ho 2022).
    """
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=True,
    )


def save_pipeline(
    folder: Path,
    *,
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    autoencoder: AutoencoderKL,
    unet: UNet2DConditionModel,
) -> None:
    """Save the model as half-precision safetensors in the layout of diffusers."""
    pipeline = StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    # Files take weights in one order only, whichever they were trained in.
    for part in (unet, autoencoder):
        part.to(memory_format=torch.contiguous_format)
    pipeline.to(torch.float16).save_pretrained(folder, safe_serialization=True)
