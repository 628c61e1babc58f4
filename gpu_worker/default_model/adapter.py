"""What shows pictures to the model: an IP-Adapter (Ye et al. 2023), trained for it when it draws already.

The words that a picture stands for are worked out from what the picture encoder of the matching lesson makes
of it, and looked at beside those of the text, by keys and values of their own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from gpu_worker.default_model.networks import WIDTH

IP_ADAPTER = "ip_adapter"
"""Where, in the model's folder, what shows it pictures lies."""
IMAGE_ENCODER = "image_encoder"
"""Where the picture encoder lies, beside the adapter's file."""

_WORDS = 4
"""That a picture stands for, as in the adapters in use."""
_OF_TEXT = ".attn2.processor"


class Adapter:
    """A copy of a denoiser that looks at pictures too; of its weights only those for that are trained."""

    def __init__(self, denoiser: UNet2DConditionModel) -> None:
        self._denoiser = copy.deepcopy(denoiser).requires_grad_(False)
        self._denoiser._load_ip_adapter_weights([_untrained(denoiser)], low_cpu_mem_usage=False)
        self._attention = {
            number: processor
            for number, (name, processor) in enumerate(self._denoiser.attn_processors.items())
            if name.endswith(_OF_TEXT)
        }
        self.modules = nn.ModuleDict(
            {
                "projection": self._denoiser.encoder_hid_proj,
                "attention": nn.ModuleList(self._attention.values()),
            }
        ).requires_grad_(True)
        """What is trained."""

    def predicted(
        self, latents: torch.Tensor, times: torch.Tensor, texts: torch.Tensor, seen: torch.Tensor
    ) -> torch.Tensor:
        """Return what is predicted of noisy latents, of shape (n, channels, h, w).

        `seen` is what the picture encoder made of a picture for each, of shape (n, WIDTH); 0 shows none.
        """
        shown = {"image_embeds": [seen[:, None]]}
        found: torch.Tensor = self._denoiser(latents, times, texts, added_cond_kwargs=shown).sample
        return found

    def save(self, folder: Path) -> None:
        """Save it in half precision, in the form in which adapters come, beside its picture encoder."""
        (layer,) = self._denoiser.encoder_hid_proj.image_projection_layers
        weights = {
            "image_proj.proj.weight": layer.image_embeds.weight,
            "image_proj.proj.bias": layer.image_embeds.bias,
            "image_proj.norm.weight": layer.norm.weight,
            "image_proj.norm.bias": layer.norm.bias,
        }
        for number, processor in self._attention.items():
            weights[f"ip_adapter.{number}.to_k_ip.weight"] = processor.to_k_ip[0].weight
            weights[f"ip_adapter.{number}.to_v_ip.weight"] = processor.to_v_ip[0].weight
        halves = {name: weight.detach().half().cpu().contiguous() for name, weight in weights.items()}
        safetensors.torch.save_file(halves, folder / "ip_adapter.safetensors")


def _untrained(denoiser: UNet2DConditionModel) -> Mapping[str, Mapping[str, torch.Tensor]]:
    """Return weights to begin with: pictures are looked at as texts are, once their words mean anything."""
    device = denoiser.device
    projection = nn.Linear(WIDTH, _WORDS * WIDTH)
    looked = {}
    for number, name in enumerate(denoiser.attn_processors):
        if name.endswith(_OF_TEXT):
            attention = denoiser.get_submodule(name.removesuffix(".processor"))
            for key in ("to_k", "to_v"):
                looked[f"{number}.{key}_ip.weight"] = attention.get_submodule(key).weight.detach().clone()
    return {
        "image_proj": {
            "proj.weight": projection.weight.detach().to(device),
            "proj.bias": projection.bias.detach().to(device),
            "norm.weight": torch.ones(WIDTH, device=device),
            "norm.bias": torch.zeros(WIDTH, device=device),
        },
        "ip_adapter": looked,
    }
