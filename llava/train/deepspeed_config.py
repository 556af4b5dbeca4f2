"""``--deepspeed FILE``: read, checked, and fitted to a machine without a GPU."""

from __future__ import annotations

import json
from typing import Any

from llava.errors import warn
from llava.files import existing, read_object


def deepspeed_config(config: str | dict[str, Any] | None, on_cpu: bool) -> dict[str, Any] | None:
    """``--deepspeed FILE`` read and checked; on the CPU, offload uses torch's AdamW, which needs no compiler.

    Raises:
        UserError: the file is missing, broken or no object.
    """
    if not config:
        return None
    if isinstance(config, str):
        source, config = config, read_object(existing(config, "--deepspeed"))
    else:
        source = "--deepspeed"
    for block, flag in (("optimizer", "--optim and per-group rates"), ("scheduler", "--lr_scheduler_type")):
        if block in config:
            warn(f"--deepspeed {source}: its '{block}' block overrides {flag}; remove it to have them obeyed")
    scale = config.get("fp16", {}).get("min_loss_scale")
    if isinstance(scale, float) and not scale.is_integer():
        warn(f"--deepspeed {source}: fp16.min_loss_scale {scale:g} must be a whole number for DeepSpeed; 1 is used")
        config = {**config, "fp16": {**config["fp16"], "min_loss_scale": 1}}
    if on_cpu:
        config = {**config, "zero_force_ds_cpu_optimizer": config.get("zero_force_ds_cpu_optimizer", False)}
        # Page-locked memory belongs to a device that is not there.
        zero = json.loads(json.dumps(config.get("zero_optimization", {})))
        for key in ("offload_optimizer", "offload_param"):
            if key in zero:
                zero[key].pop("pin_memory", None)
        config["zero_optimization"] = zero
    return config
