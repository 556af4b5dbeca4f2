"""4 and 8 bits (bitsandbytes): the decoder's linear layers, frozen; all else stays as it is without.

A model is quantized once, from full-size weights with every LoRA folded in, and where it will run. What is saved of it
afterwards is what trained on it; the quantized weights never are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llava.errors import UserError, note

# Names as transformers matches them: from the beginning of a module's path.
NEVER = ["model.mm_projector", "model.vision_tower", "post_block", "lm_head"]

KINDS = ("nf4", "fp4")

# Weights that share a scale in 4 bits, counted through the rows of a matrix.
BLOCK = 64

# Compute capability that bitsandbytes asks of an NVIDIA card, by bits (its installation guide).
CAPABILITY = {4: (6, 0), 8: (7, 5)}


@dataclass(frozen=True)
class Quantization:
    """How the decoder's linear layers are kept: 4 bits (QLoRA, arXiv:2305.14314) or 8 (LLM.int8, arXiv:2208.07339)."""

    bits: int
    compute_dtype: torch.dtype
    device: torch.device | str  # where the model is put
    kind: str = "nf4"  # of 4 bits: nf4 | fp4
    double: bool = True  # of 4 bits: their scales are quantized too

    @property
    def label(self) -> str:
        """What decides the numbers."""
        return f"4 bits {self.kind}{' double' if self.double else ''}" if self.bits == 4 else "8 bits"

    def options(self, state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Arguments of ``from_pretrained`` for weights ``state``; a device map may take the place of this one."""
        from transformers import BitsAndBytesConfig

        if self.bits == 8:
            config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=NEVER)
        else:
            wrong = _wrong_on_cpu(state) if torch.device(self.device).type == "cpu" else []
            if wrong:
                leaves = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in wrong}))
                note(
                    f"{leaves}: not quantized: on the CPU bitsandbytes computes 4-bit rows wrongly whose length is no "
                    f"multiple of {BLOCK}"
                )
            config = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_compute_dtype=self.compute_dtype,
                bnb_4bit_use_double_quant=self.double,
                bnb_4bit_quant_type=self.kind,
                llm_int8_skip_modules=NEVER + wrong,
            )
        return {"quantization_config": config, "device_map": {"": self.device}}


def _wrong_on_cpu(state: Mapping[str, torch.Tensor]) -> list[str]:
    """Layers of the decoder that bitsandbytes 0.50.2 computes with wrong scales on the CPU: an error of 26% and not 9%
    (rows of 16, 32, 48, 80, ... weights; it looks for a new scale at the beginning of every row).
    """
    return [
        name.removesuffix(".weight")
        for name, weight in state.items()
        if name.startswith("model.layers.") and weight.ndim == 2 and weight.shape[1] % BLOCK
    ]


def settle(model: Any) -> None:
    """``model``, quantized by ``from_pretrained``, as an ordinary model whose linear layers happen to be bitsandbytes'.

    transformers would not let it train without an adapter, be cast by DeepSpeed, or be saved without its quantization.
    """
    for mark in ("is_quantized", "hf_quantizer", "quantization_method"):
        model.__dict__.pop(mark, None)
    del model.config.quantization_config
    for layer in quantized_layers(model).values():
        layer.register_forward_pre_hook(_as_in_training)


def _as_in_training(layer: nn.Module, _: Any) -> None:
    """On the CPU evaluation would take other kernels: 4-bit weights are repacked for good and have no gradient then,
    8-bit ones meet activations rounded to 8 bits. The reference and the policy must be computed alike.
    """
    layer.training = True


def quantized_layers(model: nn.Module) -> dict[str, Any]:
    """bitsandbytes' linear layers by name."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    return {name: module for name, module in model.named_modules() if isinstance(module, (Linear4bit, Linear8bitLt))}


def full_size(parameter: nn.Parameter) -> int:
    """Weights that a parameter stands for: ZeRO-3 partitions them, 4 bits pack two into a byte."""
    state = getattr(parameter, "quant_state", None)
    return state.shape.numel() if state is not None else getattr(parameter, "ds_numel", parameter.numel())


def check_backend(flag: str, bits: int, device: torch.device | str) -> None:
    """Whether bitsandbytes is here and can do it on ``device``; cheap enough to ask before anything is read.

    Raises:
        UserError: it is missing, too old, or has nothing for this device.
    """
    from transformers.utils.import_utils import BITSANDBYTES_MIN_VERSION, is_bitsandbytes_available

    if not is_bitsandbytes_available():
        raise UserError(
            f"{flag} needs bitsandbytes {BITSANDBYTES_MIN_VERSION} or newer; pip install bitsandbytes, or leave the "
            "flag out"
        )
    device = torch.device(device)
    try:
        import bitsandbytes
        from bitsandbytes.cextension import lib
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"{flag}: bitsandbytes cannot be loaded ({str(error).splitlines()[0]}); python -m bitsandbytes says more"
        ) from None
    if device.type not in bitsandbytes.supported_torch_devices:
        known = ", ".join(sorted(bitsandbytes.supported_torch_devices))
        raise UserError(f"{flag}: bitsandbytes has nothing for a device '{device.type}'; expected one of {known}")
    if device.type != "cuda":
        return
    if not lib.compiled_with_cuda:
        raise UserError(
            f"{flag}: bitsandbytes has no library for torch's CUDA {torch.version.cuda}; python -m bitsandbytes says "
            "what it looked for"
        )
    found, wanted = torch.cuda.get_device_capability(device), CAPABILITY[bits]
    if torch.version.hip is None and found < wanted:
        other = "; 4 bits need 6.0" if bits == 8 and found >= CAPABILITY[4] else ""
        raise UserError(
            f"{flag}: this GPU ({torch.cuda.get_device_name(device)}) has compute capability {found[0]}.{found[1]}, "
            f"bitsandbytes' {bits} bits need {wanted[0]}.{wanted[1]}{other}"
        )
