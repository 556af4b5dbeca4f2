"""Steps of the forward that keep or move less than autograd would: the same arithmetic, less memory traffic."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import FunctionCtx, once_differentiable

# Logits (float32) that exist at a time: 64 MB.
LOGITS_AT_A_TIME = 2**24


class SwiGLU(torch.autograd.Function):
    """``silu(gate) * up`` (arXiv:2002.05202), keeping gate and up only."""

    @staticmethod
    def forward(ctx: FunctionCtx, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


class LoraLinear(torch.autograd.Function):
    """``x W' + b + s (x A') B'`` (LoRA, arXiv:2106.09685), W frozen; products are added in place.

    Mixed precision is that of autocast: everything is multiplied in one dtype, gradients of A and B have theirs.
    """

    @staticmethod
    def adapter_of(layer: nn.Module) -> tuple[Any, ...] | None:
        """Arguments behind x, where ``layer`` is a LoRA layer that computes just this; else None.

        Left to PEFT: dropout, DoRA and other variants, several adapters, quantized and ZeRO-3-partitioned weights.
        """
        names = getattr(layer, "active_adapters", None)
        if names is None or len(names) != 1 or layer.disable_adapters or layer.merged:
            return None
        name, base = names[0], layer.base_layer
        if type(base) is not nn.Linear or name not in layer.lora_A or name in getattr(layer, "lora_variant", ()):
            return None
        a, b, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
        weights = (base.weight, a.weight, b.weight)
        plain = type(a) is nn.Linear and a.bias is None and b.bias is None and not base.weight.requires_grad
        drops = isinstance(dropout, nn.Dropout) and dropout.p > 0 and dropout.training
        partitioned = any(hasattr(weight, "ds_id") for weight in weights)
        # Without autocast PEFT multiplies each part in its own dtype.
        mixed = len({w.dtype for w in weights}) > 1 and not torch.is_autocast_enabled(base.weight.device.type)
        if not plain or drops or partitioned or mixed:
            return None
        return base.weight, base.bias, a.weight, b.weight, layer.scaling[name]

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        dtype = compute_dtype(x, weight)
        x_dtype, x = x.dtype, x.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            out = F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))  # (T, out)
            low = x @ a.to(dtype).T  # (T, r)
            out.addmm_(low, b.to(dtype).T, alpha=scaling)
        ctx.save_for_backward(x, weight, a, b, low)
        ctx.scaling, ctx.x_dtype = scaling, x_dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, a, b, low = ctx.saved_tensors
        dtype = x.dtype
        grad = grad.to(dtype)
        grad_low = (grad @ b.to(dtype)) * ctx.scaling  # (T, r)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight.to(dtype)).addmm_(grad_low, a.to(dtype)).to(ctx.x_dtype)
        grad_a = (grad_low.T @ x).to(a.dtype) if ctx.needs_input_grad[3] else None
        grad_b = (grad.T @ low).mul_(ctx.scaling).to(b.dtype) if ctx.needs_input_grad[4] else None
        return grad_x, None, None, grad_a, grad_b, None


class TokenLogps(torch.autograd.Function):
    """Log-probabilities of targets and the mean logit of their positions, in float32, some rows of logits at a time.

    ``hidden`` (Q, D), ``weight`` (V, D), ``at`` (U,) which of the hidden states predicts, ``targets`` (U,)
    -> ``(logps (U,), mean_logits (U,))``; the means carry no gradient.

    Logits are never kept. With p the softmax, d logp / d hidden = W[target] - p W does not depend on what comes
    behind, so it is made while the logits are there; only a trained W has them computed again in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden: torch.Tensor, weight: torch.Tensor, at: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = compute_dtype(hidden, weight)
        states, table = hidden.to(dtype), weight.to(dtype)
        logps = hidden.new_empty(len(targets), dtype=torch.float32)
        means, sums = torch.empty_like(logps), torch.empty_like(logps)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        slopes = hidden.new_empty(len(targets), hidden.shape[1]) if wants_hidden and not wants_weight else None
        with torch.autocast(hidden.device.type, enabled=False):
            for part in _parts(len(targets), len(weight)):
                logits = (states[at[part]] @ table.T).float()  # (u, V)
                sums[part] = logits.logsumexp(-1)
                logps[part] = logits.gather(-1, targets[part, None])[:, 0] - sums[part]
                means[part] = logits.mean(-1)
                if slopes is not None:
                    slopes[part] = (_slope_of_logits(logits, sums[part], targets[part]).to(dtype) @ table).to(slopes)
        ctx.save_for_backward(*((hidden, weight, at, targets, sums) if wants_weight else (slopes, at)))
        ctx.queries, ctx.dtype = len(hidden), dtype
        ctx.mark_non_differentiable(means)
        return logps, means

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if not ctx.needs_input_grad[1]:
            slopes, at = ctx.saved_tensors
            grad_hidden = slopes.new_zeros(ctx.queries, slopes.shape[1])
            return grad_hidden.index_add_(0, at, slopes * grad[:, None].to(slopes.dtype)), None, None, None
        hidden, weight, at, targets, sums = ctx.saved_tensors
        states, table = hidden.to(ctx.dtype), weight.to(ctx.dtype)
        grad_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for part in _parts(len(targets), len(weight)):
            rows = states[at[part]]
            slope = _slope_of_logits((rows @ table.T).float(), sums[part], targets[part])
            slope = slope.mul_(grad[part, None]).to(ctx.dtype)
            grad_weight += slope.T @ rows
            if grad_hidden is not None:
                grad_hidden.index_add_(0, at[part], (slope @ table).to(hidden.dtype))
        return grad_hidden, grad_weight.to(weight.dtype), None, None


def _parts(rows: int, vocabulary: int) -> list[slice]:
    size = max(1, LOGITS_AT_A_TIME // vocabulary)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _slope_of_logits(logits: torch.Tensor, sums: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """d logp / d logits = onehot(target) - softmax, written over ``logits``."""
    slope = logits.sub_(sums[:, None]).exp_().neg_()
    return slope.scatter_add_(-1, targets[:, None], torch.ones_like(sums)[:, None])


def compute_dtype(x: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """What a product of the two is computed in: autocast's dtype where it is on, else the weight's."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


class LMHead(nn.Linear):
    """``lm_head``: logits, or (``token_logps``) just what a loss needs of them."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, hidden: torch.Tensor, at: torch.Tensor | None = None, targets: torch.Tensor | None = None) -> Any:
        """(..., D) -> (..., V); with ``targets`` see ``TokenLogps``."""
        if targets is None:
            return super().forward(hidden)
        # Through the module's own forward, so that ZeRO-3 gathers the weight.
        return TokenLogps.apply(hidden, self.weight, at, targets)
