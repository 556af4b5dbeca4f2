"""The reference model of DPO: the starting value of every tensor that trains.

Whatever is frozen is shared with the policy. With LoRA the reference is the policy with its adapter off; a connector
or head that trains too is kept as a copy (some 40 MB) and put in its place for the reference's forward. Only where the
backbone itself trains is a whole second model needed, and not even there when the log-probabilities are computed before
the first step (``FirstPolicy``). HA-DPO keeps one always, and feeds it the policy's connector: so does
``--hadpo_compat``, where the connector is shared though it trains.

Where the run goes on with a LoRA (``--lora_weight_path``), the reference is what is below: the LoRA off, and the parts
that were saved beside it in the state below.

With ``--reference_from base`` the starting value is that of the whole model on which the policy's deltas stand: their
tensors are put in place in the same way; mostly there is no post block then.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from llava.model.checkpoint import State, gathered
from llava.model.fused import LMHead
from llava.model.llava_arch import LabelScores
from llava.model.multimodal_projector.builder import build_vision_projector
from llava.model.post_block.builder import build_post_block

AS_LOADED = "the policy as it was loaded"
WITHOUT_ADAPTER = "the policy as it was loaded, without --lora_weight_path"
ITS_BASE = "the whole model that the policy's deltas stand on"

# A part's place in the model, and an empty module of its shape.
KEPT: dict[str, tuple[str, Callable[[Any], nn.Module | None]]] = {
    "projector": ("model.mm_projector", build_vision_projector),
    "post_block": ("post_block", build_post_block),
    "lm_head": ("lm_head", lambda config: LMHead(config.hidden_size, config.vocab_size)),
}


class SharedReference:
    """The policy with its adapter off (where that differs) and other modules in the place of those that differ.

    ``differs`` are the parts in which it is, or will be, another than the policy. Their values are the policy's now, or
    those of ``base``, which may have no post block. ``what`` says it in words.
    """

    def __init__(self, policy: nn.Module, differs: set[str], base: State | None = None, what: str = AS_LOADED) -> None:
        self.differs = differs
        self.what = what
        inner = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
        self.has_adapter = "lora" in differs
        self.kept: list[tuple[nn.Module, str, nn.Module | None]] = []
        for part, (path, build) in KEPT.items():
            if part not in differs:
                continue
            parent_path, _, name = path.rpartition(".")
            parent = inner.get_submodule(parent_path) if parent_path else inner
            absent = part == "post_block" and base is not None and not any(key.startswith(f"{path}.") for key in base)
            copy = None if absent else build(inner.config)
            if copy is not None:
                copy.requires_grad_(False).eval()
                live = dict(getattr(parent, name).named_parameters())
                for key, value in copy.named_parameters():
                    with gathered([live[key]]):
                        now = live[key].detach()
                        value.data = now.clone() if base is None else base[f"{path}.{key}"].to(now, copy=True)
            self.kept.append((parent, name, copy))
        self.policy = policy

    def place(self, accelerator: Any, train_args: Any) -> None:
        """Nothing to place: the policy is already where it belongs."""

    @contextlib.contextmanager
    def forward_of(self, policy: nn.Module) -> Iterator[nn.Module]:
        """``policy`` (the wrapped model) computing the reference's outputs, without gradients."""
        live = [parent._modules[name] for parent, name, _ in self.kept]
        with torch.no_grad(), self.policy.disable_adapter() if self.has_adapter else contextlib.nullcontext():
            try:
                for (parent, name, copy), module in zip(self.kept, live, strict=True):
                    for now in module.parameters() if copy is not None else ():  # none: an identity connector
                        copy.to(now.device, now.dtype)  # DeepSpeed casts after the copy was taken
                        break
                    parent._modules[name] = copy
                yield policy
            finally:
                for (parent, name, _), module in zip(self.kept, live, strict=True):
                    parent._modules[name] = module


class FirstPolicy:
    """The policy before its first step, as it is; it can be asked only then."""

    what = "the policy before its first step"

    def __init__(self, differs: set[str]) -> None:
        self.differs = differs

    def place(self, accelerator: Any, train_args: Any) -> None:
        """Nothing to place."""

    @contextlib.contextmanager
    def forward_of(self, policy: nn.Module) -> Iterator[nn.Module]:
        """``policy`` without gradients."""
        with torch.no_grad():
            yield policy


class CopiedReference:
    """A second model, loaded and frozen."""

    def __init__(self, model: nn.Module, differs: set[str], what: str) -> None:
        self.differs = differs
        self.what = f"a second model: {what}"
        self.model = model.requires_grad_(False).eval()
        self.arithmetic: Callable[[], Any] = contextlib.nullcontext

    def place(self, accelerator: Any, train_args: Any) -> None:
        """On the device; partitioned over the ranks like the policy where that is ZeRO-3."""
        plugin = accelerator.state.deepspeed_plugin
        if plugin is None or plugin.zero_stage != 3:
            # DeepSpeed casts the policy; the reference must round alike.
            dtype = train_args.compute_dtype if plugin is not None else None
            self.model = self.model.to(accelerator.device, dtype)
            if plugin is None:
                self.arithmetic = accelerator.autocast  # the policy's, which its wrapper brings with it
            return
        import deepspeed

        zero = {"stage": 3, "offload_param": plugin.deepspeed_config["zero_optimization"].get("offload_param")}
        config = {
            "train_micro_batch_size_per_gpu": train_args.per_device_train_batch_size,
            "zero_optimization": {k: v for k, v in zero.items() if v},
            "bf16": {"enabled": train_args.bf16},
            "fp16": {"enabled": train_args.fp16},
        }
        self.model = deepspeed.initialize(model=self.model, config=config)[0]
        self.model.eval()

    @contextlib.contextmanager
    def forward_of(self, policy: nn.Module) -> Iterator[nn.Module]:
        """The copy, without gradients."""
        with torch.no_grad(), self.arithmetic():
            yield self.model


Reference = SharedReference | FirstPolicy | CopiedReference


def choose_reference(
    policy: nn.Module, parts: set[str], plan: Any, kind: str = "auto", source: str = "start", hadpo_compat: bool = False
) -> Reference:
    """``--reference``: the cheapest one for ``parts`` that train (auto), or a whole second model (copy).

    With ``cache`` it is asked before the first step only. ``source`` is ``--reference_from``. ``plan`` loads again
    where a second model is needed.
    """
    from_base, below = source == "base", plan.adapter is not None
    differs = parts | (plan.adapter.parts() if below else set()) | (plan.chain.changed if from_base else set())
    what = ITS_BASE if from_base else WITHOUT_ADAPTER if below else AS_LOADED
    if hadpo_compat:
        differs -= {"projector"}
        what += ", but seeing through the policy's connector"
    # An adapter that trains is switched off; one that the chain folded in cannot be.
    shareable = set(KEPT) | ({"lora"} - plan.chain.changed if from_base else {"lora"})
    if kind != "copy" and differs <= shareable:
        base = None
        if differs & set(KEPT):
            base = plan.base_state() if from_base else plan.start_state() if below else None
        return SharedReference(policy, differs, base, what)
    if kind == "cache" and not (from_base or below):
        return FirstPolicy(differs)
    return CopiedReference(plan.load_base() if from_base else plan.load(adapted=False), differs, what)


def carried_over(reference: Reference, scores: LabelScores) -> dict[str, torch.Tensor]:
    """What the reference's forward need not compute again after the policy's, as arguments of ``forward``."""
    known = {}
    if "vision_tower" not in reference.differs:
        known["vision_features"] = scores.seen
        if "projector" not in reference.differs:
            known["image_features"] = scores.features
    if isinstance(reference, SharedReference):
        if reference.differs == {"lm_head"}:
            known["hidden_at_labels"] = scores.hidden
        elif reference.differs <= {"post_block", "lm_head"}:
            known["backbone_hidden"] = scores.backbone
    return {name: tensor.detach() for name, tensor in known.items() if tensor is not None}
