"""Pipelines of the sizes of SDXL and of Flux with random weights: what a benchmark draws with on a GPU.

Denoisers, autoencoders and CLIP encoders have the published sizes. Flux's T5 encoder has two of its 24
layers: it runs once a job, and all of it would be 9 GB of random numbers more to write and to read.
Tokenizers read letters.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from gpu_worker.models import ModelEntry, read_models

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_SCHEDULERS = {
    "sdxl": lambda: diffusers.EulerDiscreteScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1
    ),
    "flux": lambda: diffusers.FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15
    ),
}


def large_entry(model: str, folder: Path) -> ModelEntry:
    """Build `sdxl` or `flux` in `folder`, in bfloat16, and return its entry."""
    torch.manual_seed(1)
    scheduler = _SCHEDULERS[model]()  # its tables are made with numpy, so not on the GPU
    # Billions of random numbers: minutes on a CPU, a moment on a GPU.
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        pipeline = _sdxl(scheduler) if model == "sdxl" else _flux(scheduler)
        torch.set_default_dtype(before)
    pipeline.save_pretrained(folder, max_shard_size="40GB")
    return replace(
        read_models(Path(__file__).parents[1] / "stand_in.toml").default,
        name=model,
        source=str(folder),
        scheduler="",
        ip_adapter="",
        dtype="bfloat16",
        steps=30 if model == "sdxl" else 28,
        guidance_milli=5000 if model == "sdxl" else 3500,
        default_width=1024,
        default_height=1024,
        max_side=1536,
    )


def _sdxl(scheduler: Any) -> Any:
    return diffusers.StableDiffusionXLPipeline(
        unet=diffusers.UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        ),
        vae=_vae(latent_channels=4, scaling_factor=0.13025),
        text_encoder=CLIPTextModel(_clip(768, layers=12, heads=12)),
        text_encoder_2=CLIPTextModelWithProjection(_clip(1280, layers=32, heads=20)),
        tokenizer=_clip_tokenizer(),
        tokenizer_2=_clip_tokenizer(),
        scheduler=scheduler,
    )


def _flux(scheduler: Any) -> Any:
    return diffusers.FluxPipeline(
        transformer=diffusers.FluxTransformer2DModel(
            in_channels=64,
            num_layers=19,
            num_single_layers=38,
            attention_head_dim=128,
            num_attention_heads=24,
            joint_attention_dim=4096,
            pooled_projection_dim=768,
            guidance_embeds=True,
            axes_dims_rope=(16, 56, 56),
        ),
        vae=_vae(latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, quant_conv=False),
        text_encoder=CLIPTextModel(_clip(768, layers=12, heads=12)),
        text_encoder_2=T5EncoderModel(
            T5Config(
                vocab_size=len(_t5_tokenizer()),
                d_model=4096,
                d_kv=64,
                d_ff=10240,
                num_layers=2,
                num_heads=64,
                feed_forward_proj="gated-gelu",
            )
        ),
        tokenizer=_clip_tokenizer(),
        tokenizer_2=_t5_tokenizer(),
        scheduler=scheduler,
    )


def _vae(*, latent_channels: int, quant_conv: bool = True, **changes: Any) -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=latent_channels,
        sample_size=1024,
        use_quant_conv=quant_conv,
        use_post_quant_conv=quant_conv,
        **changes,
    )


def _clip(width: int, *, layers: int, heads: int) -> CLIPTextConfig:
    tokenizer = _clip_tokenizer()
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _clip_tokenizer() -> CLIPTokenizer:
    tokens = ["<|startoftext|>", "<|endoftext|>", *_LETTERS, *(f"{letter}</w>" for letter in _LETTERS)]
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(tokens)}, merges=[], model_max_length=77
    )


def _t5_tokenizer() -> T5Tokenizer:
    tokens = ["<pad>", "</s>", "<unk>", "▁", *_LETTERS]
    return T5Tokenizer(vocab=[(token, 0.0) for token in tokens], extra_ids=0, model_max_length=512)
