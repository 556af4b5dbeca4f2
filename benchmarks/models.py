"""One model twice: ours, and transformers' ``LlavaForConditionalGeneration`` with the same weights.

Geometry is LLaVA-1.5's where it decides what there is to share (336 px, 576 image tokens, 32,000 words) and small
elsewhere (58 M parameters), so that a step takes seconds on two cores. Weights are random with a fixed seed: speed,
memory and agreement do not depend on what a model has learned.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llava.constants import IMAGE_TOKEN_INDEX

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Llama's ids; text of the benchmarks is drawn from what lies between them and the last id.
PAD, BOS, EOS = 0, 1, 2


@dataclass(frozen=True)
class Geometry:
    """Sizes of tower, connector (mlp2x_gelu) and decoder (Llama, untied head)."""

    vocab_size: int = 32_000
    hidden_size: int = 512
    layers: int = 8
    heads: int = 8
    intermediate_size: int = 1376
    image_size: int = 336
    patch_size: int = 14
    tower_hidden_size: int = 256
    tower_layers: int = 6
    tower_heads: int = 4
    tower_intermediate_size: int = 1024
    select_layer: int = -2

    @property
    def tokens_per_image(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def image_token(self) -> int:
        """The id that stands for a picture in transformers' model; no text contains it."""
        return self.vocab_size - 1


REAL = Geometry()
TINY = Geometry(
    vocab_size=96,
    hidden_size=32,
    layers=3,
    heads=2,
    intermediate_size=48,
    image_size=28,
    patch_size=7,
    tower_hidden_size=16,
    tower_layers=3,
    tower_heads=2,
    tower_intermediate_size=32,
)


def tower_config(geometry: Geometry) -> dict[str, Any]:
    """CLIP's vision configuration."""
    return {
        "hidden_size": geometry.tower_hidden_size,
        "intermediate_size": geometry.tower_intermediate_size,
        "num_hidden_layers": geometry.tower_layers,
        "num_attention_heads": geometry.tower_heads,
        "image_size": geometry.image_size,
        "patch_size": geometry.patch_size,
    }


def decoder_config(geometry: Geometry) -> dict[str, Any]:
    """Llama's configuration."""
    return {
        "vocab_size": geometry.vocab_size,
        "hidden_size": geometry.hidden_size,
        "intermediate_size": geometry.intermediate_size,
        "num_hidden_layers": geometry.layers,
        "num_attention_heads": geometry.heads,
        "num_key_value_heads": geometry.heads,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }


def image_processor(geometry: Geometry) -> Any:
    """CLIP's, at the model's size."""
    from transformers import CLIPImageProcessorPil

    side = geometry.image_size
    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def our_model(geometry: Geometry = REAL, seed: int = 0, post_block: str | None = None) -> Any:
    """``LlavaLlamaForCausalLM``, float32, in evaluation mode; ``post_block`` names one, which has its defaults."""
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
    from llava.model.post_block.builder import block_settings

    config = LlavaConfig(
        **decoder_config(geometry),
        mm_vision_config=tower_config(geometry),
        mm_hidden_size=geometry.tower_hidden_size,
        mm_projector_type="mlp2x_gelu",
        mm_vision_select_layer=geometry.select_layer,
        mm_vision_select_feature="patch",
        post_block=post_block and block_settings(post_block, None),
    )
    model = LlavaLlamaForCausalLM(config).eval()
    fill(model, seed)
    return model


def hf_model(geometry: Geometry = REAL, seed: int = 0) -> Any:
    """The same weights as ``LlavaForConditionalGeneration``."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**tower_config(geometry)),
        text_config=LlamaConfig(**decoder_config(geometry)),
        image_token_id=geometry.image_token,
        vision_feature_layer=geometry.select_layer,
        vision_feature_select_strategy="default",
        image_seq_length=geometry.tokens_per_image,
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config).eval()
    fill(model, seed)
    return model


OUR_NAME = (  # beginnings of transformers' names, and of ours
    ("model.language_model.", "model."),
    ("model.vision_tower.", "model.vision_tower.vision_tower."),
    ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
    ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
)


def common_name(name: str) -> str:
    """Our name of a parameter of either model, without the adapter's wrapping."""
    name = name.removeprefix("base_model.model.")
    if name.startswith("model.vision_tower.vision_tower."):  # ours already
        return name
    for theirs, ours in OUR_NAME:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


@torch.no_grad()
def fill(model: nn.Module, seed: int) -> None:
    """Every parameter from its common name and ``seed`` alone, so that two models need no exchange of weights.

    Products keep the size of what they multiply (1 / sqrt(fan in)) and logits spread by 2, so that answers differ
    between pictures and questions; an adapter's B is away from zero, so that policy and reference differ.
    """
    for name, parameter in model.named_parameters():
        name = common_name(name)
        generator = torch.Generator().manual_seed(int(hashlib.sha256(f"{seed} {name}".encode()).hexdigest()[:15], 16))
        parameter.normal_(generator=generator)
        if "norm" in name.split(".")[-2] or "norm" in name.split(".")[-1]:
            parameter.mul_(0.1).add_(1.0 if name.endswith("weight") else 0.0)
        elif "lora_B" in name or name.endswith("bias"):
            parameter.mul_(0.02)
        elif "embed" not in name or "patch_embedding" in name:
            parameter.div_(math.sqrt(parameter[0].numel()))
            if name.startswith("lm_head"):
                parameter.mul_(2.0)


def with_lora(model: nn.Module, r: int = 16, alpha: int = 32, seed: int = 0) -> nn.Module:
    """LoRA on the seven kinds of linear layers of the decoder; everything else is frozen. In training mode."""
    from peft import get_peft_model

    model = get_peft_model(model, lora_config(r, alpha))
    fill_adapter(model, seed)
    return model.train()


def lora_config(r: int = 16, alpha: int = 32) -> Any:
    from peft import LoraConfig

    decoder = rf"model\.(language_model\.)?layers\.\d+\.(self_attn|mlp)\.({'|'.join(LINEARS)})"
    return LoraConfig(r=r, lora_alpha=alpha, lora_dropout=0.0, target_modules=decoder, task_type="CAUSAL_LM")


def fill_adapter(model: nn.Module, seed: int = 0) -> None:
    """The same adapter for both models."""
    fill(_AdapterOnly(model), seed)


class _AdapterOnly:
    """A model's adapter as ``fill`` looks at it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def named_parameters(self) -> Any:
        return ((name, p) for name, p in self.model.named_parameters() if "lora_" in name)


def train_only(model: nn.Module, part: str) -> nn.Module:
    """Freeze everything whose common name does not contain ``part``."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part in common_name(name))
    return model.train()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Gradients of what trains, by common name."""
    return {common_name(name): p.grad for name, p in model.named_parameters() if p.grad is not None}


def expand_images(ids: list[int], geometry: Geometry) -> list[int]:
    """Our ids (-200 for a picture) -> transformers' (one image token for each of its features)."""
    expanded: list[int] = []
    for i in ids:
        expanded += [geometry.image_token] * geometry.tokens_per_image if i == IMAGE_TOKEN_INDEX else [i]
    return expanded


@torch.no_grad()
def logit_difference(geometry: Geometry, seed: int = 0, length: int = 12) -> float:
    """Largest difference between the two models' logits for one row of text around a picture."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(EOS + 1, geometry.image_token, (length,), generator=generator).tolist()
    ids = [BOS, *text[: length // 2], IMAGE_TOKEN_INDEX, *text[length // 2 :]]
    pixels = torch.randn(1, 3, geometry.image_size, geometry.image_size, generator=generator)
    ours = our_model(geometry, seed)(input_ids=torch.tensor([ids]), images=pixels).logits
    theirs = hf_model(geometry, seed)(
        input_ids=torch.tensor([expand_images(ids, geometry)]), pixel_values=pixels
    ).logits
    return float((ours - theirs).abs().max())
