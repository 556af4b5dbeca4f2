"""What may sit between the backbone and ``lm_head``."""

from llava.model.post_block.builder import POST_BLOCKS, block_settings, build_post_block, fresh_block

__all__ = ["POST_BLOCKS", "block_settings", "build_post_block", "fresh_block"]
