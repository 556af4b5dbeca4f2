"""LLaVA-style models: training, preference optimisation, evaluation."""

from typing import Any


def __getattr__(name: str) -> Any:
    # ``from llava import LlavaLlamaForCausalLM`` works as upstream's, and scoring stays free of torch.
    if name == "LlavaLlamaForCausalLM":
        from llava.model import LlavaLlamaForCausalLM

        return LlavaLlamaForCausalLM
    raise AttributeError(f"module 'llava' has no attribute '{name}'")
