"""LLaVA on Llama and Vicuna."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel

from llava.model.fused import LMHead
from llava.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel
from llava.model.post_block.builder import build_post_block


class LlavaConfig(LlamaConfig):
    """Llama's configuration with the ``mm_*`` fields; on disk also ``model_type: llava`` (the released v1.5)."""

    model_type = "llava_llama"


class LlavaLlamaModel(LlavaMetaModel, LlamaModel):
    config_class = LlavaConfig


class LlavaLlamaForCausalLM(LlavaMetaForCausalLM, LlamaForCausalLM):
    config_class = LlavaConfig

    def __init__(self, config: LlavaConfig) -> None:
        # Past LlamaForCausalLM's own __init__, which would build a second backbone.
        super(LlamaForCausalLM, self).__init__(config)
        self.model = LlavaLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.post_block = build_post_block(config)
        self.lm_head = LMHead(config.hidden_size, config.vocab_size)
        self.post_init()


AutoConfig.register("llava_llama", LlavaConfig)
AutoModelForCausalLM.register(LlavaConfig, LlavaLlamaForCausalLM)
