"""LLaVA on Qwen1.5 and Qwen2."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen2Model

from llava.model.fused import LMHead
from llava.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel
from llava.model.post_block.builder import build_post_block


class LlavaQwen2Config(Qwen2Config):
    """Qwen2's configuration with the ``mm_*`` fields."""

    model_type = "llava_qwen2"


class LlavaQwen2Model(LlavaMetaModel, Qwen2Model):
    config_class = LlavaQwen2Config


class LlavaQwen2ForCausalLM(LlavaMetaForCausalLM, Qwen2ForCausalLM):
    config_class = LlavaQwen2Config

    def __init__(self, config: LlavaQwen2Config) -> None:
        # Past Qwen2ForCausalLM's own __init__, which would build a second backbone.
        super(Qwen2ForCausalLM, self).__init__(config)
        self.model = LlavaQwen2Model(config)
        self.vocab_size = config.vocab_size
        self.post_block = build_post_block(config)
        self.lm_head = LMHead(config.hidden_size, config.vocab_size)
        self.post_init()


AutoConfig.register("llava_qwen2", LlavaQwen2Config)
AutoModelForCausalLM.register(LlavaQwen2Config, LlavaQwen2ForCausalLM)
