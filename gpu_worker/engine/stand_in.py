"""The stand-in model: a tiny pipeline of Stable Diffusion's shape with seeded random weights.

It shows nothing: its pictures are smooth coloured patterns that differ with prompt, seed and the pictures it
is shown. It is there so that everything around a model (steps, cancelling, previews, variations, metering)
runs for real on any machine, offline, at about three seconds a grid of four on one CPU thread.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import safetensors.torch
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from gpu_worker.engine.adapters import IMAGE_ENCODER

IP_ADAPTER = "ip_adapter"
"""Folder of its adapter, in its own."""

# Part of the folder's name: a new recipe is built beside the old, and never mixed with it.
_RECIPE = 2
_SEED = 6
_ADAPTER_SEED = 7
_TEXT_WIDTH = 64
_TOKENS_READ = 77
_START, _END = "<|startoftext|>", "<|endoftext|>"

# Gains and seed found by looking at pictures. Without gains the prompt hardly matters and all is grey.
_PROMPT_GAIN = 6.0
_TOKEN_GAIN = 8.0
_PREDICTION_GAIN = 3.0
_COLOUR_GAIN = 2.5
_PATCH_GAIN = 8.0
_SHOWN_GAIN = 6.0


def stand_in_folder(cache_dir: Path) -> Path:
    """Return the diffusers folder of the stand-in, building it on first use (about a second).

    Workers that start together may all build it: each in a folder of its own, the first to finish puts it in
    place, whole, and all get the same weights.
    """
    folder = cache_dir / f"stand-in-{_RECIPE}"
    if folder.is_dir():
        return folder
    cache_dir.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=cache_dir, prefix=".stand-in-"))
    try:
        pipeline = _pipeline()
        pipeline.save_pretrained(unfinished, safe_serialization=True)
        save_random_adapter(pipeline.unet, unfinished / IP_ADAPTER)
        unfinished.chmod(0o755)
        os.rename(unfinished, folder)
    except OSError:
        # A folder that is not empty is not renamed over: another worker was first.
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _pipeline() -> StableDiffusionPipeline:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(_SEED)
        tokenizer = _tokenizer()
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=_TEXT_WIDTH,
                intermediate_size=2 * _TEXT_WIDTH,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=_TOKENS_READ,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                initializer_range=0.05,
            )
        )
        unet = UNet2DConditionModel(
            sample_size=32,
            layers_per_block=1,
            block_out_channels=(32, 64, 96),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=_TEXT_WIDTH,
            attention_head_dim=16,
            norm_num_groups=8,
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(16, 32, 32, 32),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=8,
            sample_size=256,
            scaling_factor=3.0,
        )
        _smooth_kernels(unet)
        _smooth_kernels(vae)
        _scale(text_encoder, "token_embedding.weight", _TOKEN_GAIN)
        _scale(unet, "attn2.to_out.0.weight", _PROMPT_GAIN)
        _scale(unet, "conv_out.", _PREDICTION_GAIN)
        _scale(vae.decoder, "conv_out.", _COLOUR_GAIN)
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        # A random network does not predict noise. With v-prediction the picture is the network's while there
        # is much noise, and keeps what it has become as there is less: so it settles, and a variation that
        # starts late stays near its source.
        prediction_type="v_prediction",
        timestep_spacing="leading",
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_random_adapter(unet: UNet2DConditionModel, folder: Path) -> None:
    """Save an IP-Adapter for a U-Net, with seeded random weights and a tiny image encoder."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(_ADAPTER_SEED)
        encoder = CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=32,
                intermediate_size=64,
                projection_dim=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                image_size=32,
                patch_size=8,
                initializer_range=0.05,
            )
        )
        _scale(encoder, "patch_embedding.weight", _PATCH_GAIN)
        width = unet.config.cross_attention_dim
        # Of four words for each picture, as the ones in use have.
        weights = {
            "image_proj.proj.weight": torch.randn(4 * width, 32),
            "image_proj.proj.bias": torch.zeros(4 * width),
            "image_proj.norm.weight": torch.ones(width),
            "image_proj.norm.bias": torch.zeros(width),
        }
        for number, name in enumerate(unet.attn_processors):
            # Every other one looks at itself; those that look at the text are to look at pictures too.
            if name.endswith("attn2.processor"):
                attention = unet.get_submodule(name.removesuffix(".processor"))
                for key in ("to_k", "to_v"):
                    text_weight = attention.get_submodule(key).weight
                    picture_weight = torch.randn_like(text_weight) * text_weight.std() * _SHOWN_GAIN
                    weights[f"ip_adapter.{number}.{key}_ip.weight"] = picture_weight
    folder.mkdir(parents=True)
    encoder.save_pretrained(folder / IMAGE_ENCODER, safe_serialization=True)
    safetensors.torch.save_file(weights, folder / "ip_adapter.safetensors")


def _tokenizer() -> CLIPTokenizer:
    """Return a tokenizer without merges: each byte is a token, with a second one for ends of words."""
    # The byte alphabet of GPT-2's tokenizer: printable Latin-1 stands for itself, the rest is moved up.
    kept = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    moved = [byte for byte in range(256) if byte not in kept]
    letters = [chr(byte) for byte in sorted(kept)] + [chr(256 + i) for i in range(len(moved))]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), _START, _END]
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=[],
        model_max_length=_TOKENS_READ,
    )


def _smooth_kernels(module: torch.nn.Module) -> None:
    """Keep how convolutions mix channels, and make each blur: random kernels draw grit, blurs draw shapes."""
    blur = torch.outer(torch.tensor([1.0, 2.0, 1.0]), torch.tensor([1.0, 2.0, 1.0])) / 16
    for weight in module.parameters():
        if weight.ndim == 4 and weight.shape[-1] == 3:
            weight.copy_(weight.sum((2, 3), keepdim=True) * blur)


def _scale(module: torch.nn.Module, name: str, gain: float) -> None:
    found = [weight for full_name, weight in module.named_parameters() if name in full_name]
    assert found, name
    for weight in found:
        weight.mul_(gain)
