"""A Llama-type decoder over a stream of trees (``llava.data.packing``): no padding, nothing computed twice.

The weights are those of transformers' layers and their modules are called one by one (so that LoRA, ZeRO-3's gathering
and quantization act as usual); what is different is the attention, which knows trees, and the last layer, which runs
only where a label is predicted: behind its keys and values nobody looks at the other positions again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from llava.model.fused import Lora, LoraLinear, NormedLoras, Rotary, SwiGLU, SwiGLULora

# Tokens that a CPU puts through the layers together. What a layer leaves behind then stays in the cache (5% faster for
# LoRA and 8% for the connector alone, and a fifth less memory, than four or eight trees together); a GPU takes all, and
# ZeRO-3 too, whose ranks must run the same layers the same number of times.
TOKENS_AT_A_TIME = 1024


def why_not(config: Any, attn_implementation: str | None = None) -> str | None:
    """What keeps a model of ``config`` from computing trees, or None; the kernel is a loaded model's own, or given."""
    kernel = attn_implementation or getattr(config, "_attn_implementation", None) or "sdpa"
    if kernel != "sdpa":
        return f"attn_implementation {kernel} takes no mask of trees (sdpa does)"
    windowed = any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ())
    if windowed or getattr(config, "use_sliding_window", False):
        return "the model attends within a sliding window"
    return None


class Block(NamedTuple):
    """Queries (so many, following those of the block before) that look at the first ``keys`` tokens of their tree."""

    queries: int
    keys: int
    mask: torch.Tensor | None  # (queries, keys) bool; None: causal, queries and keys being the same tokens


class Attention(NamedTuple):
    """Who sees whom: for every tree its length and its blocks."""

    lengths: list[int]
    blocks: list[list[Block]]


def sees(queries: torch.Tensor, start: int, end: int, subtree_end: torch.Tensor) -> torch.Tensor:
    """Mask (n, end - start): which tokens of a tree are ancestors of the tokens at ``queries`` (n,), or these."""
    keys = torch.arange(start, end, device=queries.device)
    return (keys <= queries[:, None]) & (queries[:, None] < subtree_end[start:end])


def full_attention(rows: dict[str, Any]) -> Attention:
    """Every token asks. A trunk is causal (the kernel skips what lies above the diagonal), its branches need a mask."""
    lengths, blocks = [], []
    for start, trunk_end, end, _ in rows["trees"]:
        lengths.append(end - start)
        trunk = Block(trunk_end - start, trunk_end - start, None)
        branches = torch.arange(trunk_end, end, device=rows["subtree_end"].device)
        mask = sees(branches, start, end, rows["subtree_end"])
        blocks.append([b for b in (trunk, Block(end - trunk_end, end - start, mask)) if b.queries])
    return Attention(lengths, blocks)


def label_attention(rows: dict[str, Any]) -> Attention:
    """Only positions that predict a label ask."""
    lengths, blocks = [], []
    of_trees = rows["queries"].split([tree[3] for tree in rows["trees"]])
    for (start, _, end, _), queries in zip(rows["trees"], of_trees, strict=True):
        lengths.append(end - start)
        mask = sees(queries, start, end, rows["subtree_end"])
        blocks.append([Block(len(queries), end - start, mask)] if len(queries) else [])
    return Attention(lengths, blocks)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attention: Attention, dropout: float = 0.0
) -> torch.Tensor:
    """q (Q, H, d), k and v (T, H', d) -> (Q, H, d)."""
    if k.shape[1] != q.shape[1]:  # grouped queries; the masked kernels want one key head for each
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    # split, and not slices: its backward is one concatenation instead of a zero-filled copy a slice.
    asking = iter(q.split([block.queries for blocks in attention.blocks for block in blocks]))
    seen = []
    for keys, values, blocks in zip(
        k.split(attention.lengths), v.split(attention.lengths), attention.blocks, strict=True
    ):
        for block in blocks:
            heads_first = (x.transpose(0, 1)[None] for x in (next(asking), keys[: block.keys], values[: block.keys]))
            out = F.scaled_dot_product_attention(
                *heads_first, attn_mask=block.mask, dropout_p=dropout, is_causal=block.mask is None
            )
            seen.append(out[0].transpose(0, 1))
    return torch.cat(seen) if seen else q  # a stretch of rows that were cut before their labels


def project(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """``layer(x)``; a plain LoRA layer in one go, without a full-size temporary for its two extra products."""
    lora = Lora.of(layer)
    return layer(x) if lora is None else LoraLinear.apply(x, *lora)


def project_normed(norm: nn.Module, layers: Sequence[nn.Module], x: torch.Tensor) -> Sequence[torch.Tensor]:
    """``[layer(norm(x)) for layer in layers]``; plain LoRA layers do not keep the normed x for the backward pass."""
    loras = [Lora.of(layer) for layer in layers]
    frozen = not norm.weight.requires_grad and not hasattr(norm.weight, "ds_id")
    if all(loras) and frozen and isinstance(norm, (LlamaRMSNorm, Qwen2RMSNorm)):
        return NormedLoras.apply(x, norm.weight, norm.variance_epsilon, *(part for lora in loras for part in lora))
    normed = norm(x)
    return [project(layer, normed) for layer in layers]


def gated(mlp: nn.Module, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``down_proj(act(gate) * up)``."""
    if mlp.config.hidden_act != "silu":
        return project(mlp.down_proj, mlp.act_fn(gate) * up)
    lora = Lora.of(mlp.down_proj)
    return mlp.down_proj(SwiGLU.apply(gate, up)) if lora is None else SwiGLULora.apply(gate, up, *lora)


class Rope(NamedTuple):
    """Cosines and sines of the positions of a stream (T, d) each, or of rows (B, L, d)."""

    cos: torch.Tensor
    sin: torch.Tensor

    def at(self, index: torch.Tensor) -> Rope:
        return Rope(self.cos[index], self.sin[index])

    def turn(self, x: torch.Tensor) -> torch.Tensor:
        """(..., H, d) -> (..., H, d)."""
        return Rotary.apply(x, self.cos[..., None, :], self.sin[..., None, :])


def decoder_layer(
    layer: nn.Module,
    x: torch.Tensor,
    rope: Rope,
    attention: Attention | None,
    queries: torch.Tensor | None = None,
    look: Callable[..., torch.Tensor] = attend,
) -> torch.Tensor:
    """One layer: (T, D) -> (T, D), or (Q, D) at the positions ``queries`` (Q,) alone.

    ``look`` stands in for ``attend``: a generation keeps the keys and values that pass there.
    """
    attn, mlp = layer.self_attn, layer.mlp
    if queries is None:
        q, k, v = project_normed(layer.input_layernorm, (attn.q_proj, attn.k_proj, attn.v_proj), x)
        asking = rope
    else:
        normed = layer.input_layernorm(x)
        k, v = project(attn.k_proj, normed), project(attn.v_proj, normed)  # (T, D')
        q = project(attn.q_proj, normed[queries])  # (Q, D)
        x, asking = x[queries], rope.at(queries)
    q, k, v = (part.unflatten(-1, (-1, attn.head_dim)) for part in (q, k, v))  # (Q, H, d), (T, H', d)
    dropout = attn.attention_dropout if layer.training else 0.0
    seen = look(asking.turn(q), rope.turn(k), v, attention, dropout)
    x = x + project(attn.o_proj, seen.flatten(1))  # (Q, D)
    gate, up = project_normed(layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj), x)
    return x + gated(mlp, gate, up)


def rope_at(decoder: nn.Module, x: torch.Tensor, positions: torch.Tensor) -> Rope:
    """The embedding of ``positions`` (T,), in the dtype of ``x``."""
    cos, sin = decoder.rotary_emb(x, positions[None])
    return Rope(cos[0], sin[0])


def layers_of(decoder: nn.Module) -> Sequence[nn.Module]:
    """The layers that run."""
    return decoder.layers[: decoder.config.num_hidden_layers]


def run_layers(
    decoder: nn.Module,
    x: torch.Tensor,
    rows: dict[str, Any],
    looks: Sequence[Callable[..., torch.Tensor]] | None = None,
    whole: bool = False,
) -> torch.Tensor:
    """Embeddings of a stream (T, D) -> normed hidden states of the positions that predict, (Q, D); ``whole``: of all.

    ``looks``: for every layer what stands in for ``attend``.
    """
    if looks is None and x.device.type == "cpu" and not hasattr(decoder.norm.weight, "ds_id"):
        stretches = list(_stretches(rows))
        if len(stretches) > 1:
            parts = x.split([len(stretch["position_ids"]) for stretch in stretches])
            done = [_run_stretch(decoder, *part, None, whole) for part in zip(parts, stretches, strict=True)]
            return torch.cat(done)
    return _run_stretch(decoder, x, rows, looks, whole)


def _stretches(rows: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A stream in stretches of whole trees, each of one tree or at most ``TOKENS_AT_A_TIME``."""
    parts: list[list[list[int]]] = []
    for tree in rows["trees"]:
        if not parts or tree[2] - parts[-1][0][0] > TOKENS_AT_A_TIME:
            parts.append([])
        parts[-1].append(tree)
    queries = iter(rows["queries"].split([sum(tree[3] for tree in trees) for trees in parts]))
    for trees in parts:
        start, end = trees[0][0], trees[-1][2]
        yield {
            "trees": [[begin - start, trunk_end - start, stop - start, n] for begin, trunk_end, stop, n in trees],
            "position_ids": rows["position_ids"][start:end],
            "subtree_end": rows["subtree_end"][start:end] - start,
            "queries": next(queries) - start,
        }


def _run_stretch(
    decoder: nn.Module,
    x: torch.Tensor,
    rows: dict[str, Any],
    looks: Sequence[Callable[..., torch.Tensor]] | None,
    whole: bool,
) -> torch.Tensor:
    """``run_layers`` of trees that go through together."""
    rope, attention = rope_at(decoder, x, rows["position_ids"]), full_attention(rows)
    *layers, last = layers_of(decoder)
    *many, final = looks or [attend] * (len(layers) + 1)
    for layer, look in zip(layers, many, strict=True):
        x = _checkpointed(layer, x, rope, attention, None, look)
    asking = (attention, None) if whole else (label_attention(rows), rows["queries"])
    x = _checkpointed(last, x, rope, *asking, final)
    return decoder.norm(x)


def _checkpointed(layer: nn.Module, x: torch.Tensor, *args: Any) -> torch.Tensor:
    """``decoder_layer``, its activations recomputed in the backward pass where gradient checkpointing is on."""
    run = functools.partial(decoder_layer, layer)
    if layer.gradient_checkpointing and layer.training and torch.is_grad_enabled():
        return layer._gradient_checkpointing_func(run, x, *args)
    return run(x, *args)
