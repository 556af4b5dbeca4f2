"""Steps of the forward that keep or move less than autograd would: the same arithmetic, less memory traffic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import FunctionCtx, once_differentiable

# Logits (float32) that exist at a time: 32 MB. Fewer rows make slower products, more rows leave the cache.
LOGITS_AT_A_TIME = 2**23


class Rotary(torch.autograd.Function):
    """Rotary position embedding (arXiv:2104.09864) of x (T, H, d), halves paired as in Llama; cos and sin (T, 1, d)."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        first, second = sin.chunk(2, dim=-1)
        return _turned(x, cos, -first, second)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        first, second = sin.chunk(2, dim=-1)
        return _turned(grad, cos, second, -first).to(ctx.dtype), None, None


def _turned(x: torch.Tensor, cos: torch.Tensor, of_second: torch.Tensor, of_first: torch.Tensor) -> torch.Tensor:
    """x cos, plus in its first half the second times ``of_second`` and in its second the first times ``of_first``."""
    out = x * cos
    into, halves = out.chunk(2, dim=-1), x.to(out.dtype).chunk(2, dim=-1)
    into[0].addcmul_(halves[1], of_second)
    into[1].addcmul_(halves[0], of_first)
    return out


class SwiGLU(torch.autograd.Function):
    """``silu(gate) * up`` (arXiv:2002.05202), keeping gate and up only."""

    @staticmethod
    def forward(ctx: FunctionCtx, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _swiglu_backward(grad, *ctx.saved_tensors)


def _swiglu_backward(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


class Lora(NamedTuple):
    """``x W' + b + s (x A') B'`` (LoRA, arXiv:2106.09685) with W and b frozen.

    Mixed precision is that of autocast: everything is multiplied in one dtype, gradients of A and B have theirs.
    """

    weight: torch.Tensor  # (out, in)
    bias: torch.Tensor | None
    a: torch.Tensor  # (r, in)
    b: torch.Tensor  # (out, r)
    scaling: float

    @classmethod
    def of(cls, layer: nn.Module) -> Lora | None:
        """What ``layer`` computes, where it is a LoRA layer and that is all it does; else None.

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
        return cls(base.weight, base.bias, a.weight, b.weight, layer.scaling[name])

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x (T, in) -> (T, out), and x A' (T, r) for the backward pass; the second product is added in place."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            out = F.linear(x, self.weight.to(x.dtype), bias)
            low = x @ self.a.to(x.dtype).T
            return out.addmm_(low, self.b.to(x.dtype).T, alpha=self.scaling), low

    def backward(
        self, grad: torch.Tensor, x: torch.Tensor, low: torch.Tensor, onto: torch.Tensor | None, needs_x: bool = True
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """Gradient of the output -> gradients of x (added to ``onto`` where there is one), A and B."""
        grad = grad.to(x.dtype)
        grad_low = (grad @ self.b.to(x.dtype)) * self.scaling  # (T, r)
        if needs_x:
            weight = self.weight.to(x.dtype)
            onto = grad @ weight if onto is None else onto.addmm_(grad, weight)
            onto.addmm_(grad_low, self.a.to(x.dtype))
        return onto, (grad_low.T @ x).to(self.a.dtype), (grad.T @ low).mul_(self.scaling).to(self.b.dtype)


class LoraLinear(torch.autograd.Function):
    """A ``Lora`` of x (T, in)."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: torch.Tensor, *lora: Any) -> torch.Tensor:
        ctx.x_dtype, ctx.scaling = x.dtype, lora[-1]
        x = x.to(compute_dtype(x, lora[0]))
        out, low = Lora(*lora).forward(x)
        ctx.save_for_backward(x, low, *lora[:4])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, low, *weights = ctx.saved_tensors
        lora = Lora(*weights, ctx.scaling)
        grad_x, grad_a, grad_b = lora.backward(grad, x, low, None, ctx.needs_input_grad[0])
        return None if grad_x is None else grad_x.to(ctx.x_dtype), None, None, grad_a, grad_b, None


class NormedLoras(torch.autograd.Function):
    """Several ``Lora`` of the same RMS-normed x (T, D) (arXiv:1910.07467, weight frozen), which is not kept."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: torch.Tensor, weight: torch.Tensor, eps: float, *flat: Any) -> Any:
        loras = [Lora(*flat[i : i + 5]) for i in range(0, len(flat), 5)]
        ctx.compute, ctx.scalings = compute_dtype(x, loras[0].weight), [lora.scaling for lora in loras]
        rate = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)  # (T, 1)
        normed = (weight * (x.float() * rate).to(x.dtype)).to(ctx.compute)
        outs, lows = zip(*(lora.forward(normed) for lora in loras), strict=True)
        ctx.save_for_backward(x, weight, rate, *lows, *_tensors(loras))
        return outs

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, rate, *rest = ctx.saved_tensors
        lows, loras = rest[: len(grads)], _loras(rest[len(grads) :], ctx.scalings)
        unit = x.float() * rate
        normed = (weight * unit.to(x.dtype)).to(ctx.compute)
        grad_normed, of_weights = None, []
        for grad, low, lora in zip(grads, lows, loras, strict=True):
            grad_normed, grad_a, grad_b = lora.backward(grad, normed, low, grad_normed, ctx.needs_input_grad[0])
            of_weights += [None, None, grad_a, grad_b, None]
        grad_x = None
        if ctx.needs_input_grad[0]:
            # y = w u, u = x r:  dx = r (w dy - u mean(u w dy))
            grad_unit = grad_normed.float().mul_(weight)
            grad_unit.addcmul_(unit, (unit * grad_unit).mean(-1, keepdim=True), value=-1)
            grad_x = grad_unit.mul_(rate).to(x.dtype)
        return grad_x, None, None, *of_weights


class SwiGLULora(torch.autograd.Function):
    """A ``Lora`` of ``silu(gate) * up`` (T, in), which is not kept."""

    @staticmethod
    def forward(ctx: FunctionCtx, gate: torch.Tensor, up: torch.Tensor, *lora: Any) -> torch.Tensor:
        ctx.compute, ctx.scaling = compute_dtype(gate, lora[0]), lora[-1]
        out, low = Lora(*lora).forward(F.silu(gate).mul_(up).to(ctx.compute))
        ctx.save_for_backward(gate, up, low, *lora[:4])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up, low, *weights = ctx.saved_tensors
        inner = F.silu(gate).mul_(up).to(ctx.compute)
        grad_inner, grad_a, grad_b = Lora(*weights, ctx.scaling).backward(grad, inner, low, None)
        return *_swiglu_backward(grad_inner.to(gate.dtype), gate, up), None, None, grad_a, grad_b, None


def _tensors(loras: Sequence[Lora]) -> list[torch.Tensor | None]:
    """What can be saved for the backward pass: all but the scalings."""
    return [tensor for lora in loras for tensor in lora[:4]]


def _loras(tensors: Sequence[torch.Tensor | None], scalings: Sequence[float]) -> list[Lora]:
    return [Lora(*tensors[4 * i : 4 * i + 4], scaling) for i, scaling in enumerate(scalings)]


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
