"""Flags of the training scripts: upstream's and ours, each checked before anything is loaded.

A flag does what it says. One that cannot be honoured is refused with the reason; one that upstream's commands carry
and that has nothing to do here gets a log line (``parsing.NOTHING_TO_DO``).
"""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.utils import is_torch_tf32_available

from llava.conversation import template
from llava.errors import UserError, note, warn
from llava.files import existing
from llava.model.post_block.builder import POST_BLOCKS
from llava.model.quantization import CAPABILITY, KINDS, check_backend
from llava.train.deepspeed_config import deepspeed_config
from llava.train.losses import LOSSES, SMOOTHED

REFERENCES = ("auto", "cache", "copy")
REFERENCES_FROM = ("start", "base")
TRAIN_TYPES = ("projector", "use_lora", "none", "freeze_vision")


@dataclass
class ModelArguments:
    """Which model, and which of its parts train."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "LLaVA checkpoint, or an LLM to build one on"}
    )
    version: str | None = field(
        default=None,
        metadata={
            "help": "conversation template: v0, v1, llava_v1, plain, llama_2, mpt, qwen (default: the one that the "
            "model was taught, else qwen where its tokenizer speaks ChatML, else v1)"
        },
    )
    vision_tower: str | None = field(default=None, metadata={"help": "CLIP folder or hub id"})
    mm_projector_type: str | None = field(default=None, metadata={"help": "linear | mlp<N>x_gelu | identity"})
    mm_vision_select_layer: int | None = field(
        default=None, metadata={"help": "hidden state of the tower (LLaVA-1.5: -2)"}
    )
    mm_vision_select_feature: str | None = field(default=None, metadata={"help": "patch | cls_patch"})
    pretrain_mm_mlp_adapter: str | None = field(
        default=None, metadata={"help": "connector to start from (mm_projector.bin)"}
    )
    mm_use_im_start_end: bool = field(default=False, metadata={"help": "only False: new tokens are not trained here"})
    mm_use_im_patch_token: bool = field(default=False, metadata={"help": "only False: the token is never used"})
    mm_patch_merge_type: str = field(default="flat", metadata={"help": "only flat: anyres is not supported"})
    freeze_backbone: bool = field(default=False, metadata={"help": "freeze the decoder; lm_head and connector train"})
    tune_mm_mlp_adapter: bool = field(default=False, metadata={"help": "train the connector only"})
    freeze_mm_mlp_adapter: bool = field(default=False, metadata={"help": "freeze the connector"})
    tune: str | None = field(
        default=None,
        metadata={"help": "exactly what trains: projector, post_block, lm_head, lora, backbone, vision_tower"},
    )
    tune_lm_head: bool = field(default=False, metadata={"help": "train lm_head (as --tune lm_head)"})
    tune_post_decoder: bool = field(default=False, metadata={"help": "train the post block (as --tune post_block)"})
    tune_post_interaction_block: bool = field(default=False, metadata={"help": "the same as --tune_post_decoder"})
    post_block: str | None = field(
        default=None, metadata={"help": f"put a new block between backbone and lm_head: {' | '.join(POST_BLOCKS)}"}
    )
    post_block_config: str | None = field(
        default=None, metadata={"help": "its options: k=v,k=v or a YAML or JSON file"}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "sdpa (default) | eager | flash_attention_2"}
    )

    def __post_init__(self) -> None:
        if not self.model_name_or_path:
            raise UserError(
                "--model_name_or_path is missing: pass a LLaVA checkpoint, or a language model with --vision_tower"
            )
        if self.version is not None:
            template(self.version)
        attention = self.attn_implementation
        if attention not in (None, "sdpa", "eager", "flash_attention_2"):
            raise UserError(f"--attn_implementation {attention}: expected sdpa, eager or flash_attention_2")
        for flag in ("mm_use_im_start_end", "mm_use_im_patch_token"):
            if getattr(self, flag):
                raise UserError(f"--{flag} True is not supported: LLaVA-1.5 uses no extra image tokens; pass False")
        if self.mm_patch_merge_type != "flat":
            raise UserError(f"--mm_patch_merge_type {self.mm_patch_merge_type} is LLaVA-1.6 (anyres); expected flat")
        if self.mm_vision_select_feature not in (None, "patch", "cls_patch"):
            raise UserError(f"--mm_vision_select_feature {self.mm_vision_select_feature}: expected patch or cls_patch")


@dataclass
class ImageArguments:
    """How pictures are found and prepared."""

    image_folder: str | None = field(default=None, metadata={"help": "folder that image paths are relative to"})
    image_aspect_ratio: str | None = field(
        default=None, metadata={"help": "pad | square (CLIP's centre crop); default: the checkpoint's, else square"}
    )
    skip_missing_images: bool = field(default=False, metadata={"help": "go on without missing and broken pictures"})
    lazy_preprocess: bool = field(
        default=False, metadata={"help": "accepted: records are always processed when needed"}
    )
    is_multimodal: bool = field(default=True, metadata={"help": "accepted: always true"})

    def __post_init__(self) -> None:
        if self.image_aspect_ratio == "anyres":
            raise UserError("--image_aspect_ratio anyres is LLaVA-1.6; expected pad or square")
        if self.image_aspect_ratio not in (None, "pad", "square"):
            raise UserError(f"--image_aspect_ratio {self.image_aspect_ratio}: expected pad or square")


@dataclass
class CaptionArguments(ImageArguments):
    """Data of train_pretrain.py."""

    data_path: str | None = field(
        default=None,
        metadata={"help": "LLaVA conversation JSON, a downloaded data set's folder with it, or a mixture (YAML)"},
    )
    eval_data_path: str | None = field(default=None, metadata={"help": "the same, held out"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data_path and Path(self.data_path).expanduser().is_dir():
            self._settle_folder(Path(self.data_path).expanduser())
        existing(self.data_path, "--data_path")
        if self.eval_data_path:
            existing(self.eval_data_path, "--eval_data_path")

    def _settle_folder(self, folder: Path) -> None:
        """``--data_path FOLDER``: its file of records, and its pictures where ``--image_folder`` names none."""
        files = sorted(file.name for file in folder.glob("*.json*") if not file.stem.endswith(("meta", "metadata")))
        if "chat.json" in files:
            files = ["chat.json"]
        if len(files) != 1:
            found = ", ".join(files) or "no .json"
            expected = "expected a file, or a folder with chat.json or one .json"
            raise UserError(f"--data_path {folder}: {expected}; found {found}")
        self.data_path = str(folder / files[0])
        taken = self.data_path
        if self.image_folder is None:
            places = [folder / name for name in ("images_dl", "images", "images.zip")]
            self.image_folder = str(next((place for place in places if place.exists()), folder))
            taken += f", and its pictures from {self.image_folder}"
        note(f"--data_path {folder}: a folder; {taken} is read")


@dataclass
class PreferenceArguments(ImageArguments):
    """Data of train_dpo.py: HA-DPO's files over Visual Genome, own pairs, or both."""

    vg_path: str | None = field(default=None, metadata={"help": "Visual Genome: image_data.json, VG_100K, VG_100K_2"})
    desc_data_path: str | None = field(default=None, metadata={"help": "HA-DPO's desc_data.json"})
    pope_data_path: str | None = field(default=None, metadata={"help": "HA-DPO's pope_data.json"})
    data_path: str | None = field(
        default=None, metadata={"help": "own pairs: JSONL of image, prompt, chosen, rejected"}
    )
    eval_data_path: str | None = field(
        default=None, metadata={"help": "held-out pairs: own JSONL, or a HA-DPO desc/pope file over --vg_path"}
    )
    aux_data: str | None = field(
        default=None,
        metadata={
            "help": "LLaVA conversations whose language-model loss is added to DPO's (--aux_weight): pair i brings "
            "record i mod m of the m, shuffled with --seed"
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.desc_data_path or self.pope_data_path or self.data_path):
            raise UserError(
                "no preference data: pass --desc_data_path and --pope_data_path with --vg_path, or --data_path"
            )
        if self.aux_data:
            existing(self.aux_data, "--aux_data")
        if (self.desc_data_path or self.pope_data_path) and not self.vg_path:
            raise UserError("--desc_data_path and --pope_data_path name Visual Genome images; pass --vg_path")

    @property
    def files(self) -> tuple[str | None, ...]:
        """All files of records."""
        return (self.desc_data_path, self.pope_data_path, self.data_path, self.eval_data_path, self.aux_data)


@dataclass
class LlavaTrainingArguments(TrainingArguments):
    """Hugging Face's arguments, LLaVA's own, and the names that transformers 5 dropped and commands still use."""

    optim: str = field(default="adamw_torch", metadata={"help": "optimizer"})
    report_to: str | None = field(default="tensorboard", metadata={"help": "tensorboard | wandb | none"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "only False: the collator needs all of it"})
    cache_dir: str | None = field(default=None, metadata={"help": "the hub's cache"})
    model_max_length: int = field(default=512, metadata={"help": "rows are cut to it, images expanded"})
    bits: int = field(
        default=16, metadata={"help": "16 | 8 | 4: of the frozen decoder's linear layers (bitsandbytes; QLoRA)"}
    )
    double_quant: bool = field(default=True, metadata={"help": "of --bits 4: quantize the scales too"})
    quant_type: str = field(default="nf4", metadata={"help": "of --bits 4: nf4 | fp4"})
    lora_enable: bool = field(default=False, metadata={"help": "train a LoRA on the language model"})
    lora_r: int = field(default=64, metadata={"help": "LoRA rank"})
    lora_alpha: int = field(default=16, metadata={"help": "LoRA scale is alpha / r"})
    lora_dropout: float = field(default=0.05, metadata={"help": "LoRA dropout"})
    lora_bias: str = field(default="none", metadata={"help": "only none"})
    lora_weight_path: str | None = field(
        default=None, metadata={"help": "LoRA adapter to start from, with what was saved beside it; its rank and alpha"}
    )
    mm_projector_lr: float | None = field(default=None, metadata={"help": "rate of the connector; 0 freezes it"})
    post_block_lr: float = field(default=1e-4, metadata={"help": "rate of the post block; 0 freezes it"})
    lm_head_lr: float | None = field(default=None, metadata={"help": "rate of lm_head; 0 freezes it"})
    group_by_modality_length: bool = field(default=False, metadata={"help": "batches of like kind and length"})
    upstream_order: bool = field(
        default=False, metadata={"help": "the order in which LLaVA's and HA-DPO's runs of the same size see the data"}
    )
    prefix_sharing: bool = field(
        default=True, metadata={"help": "compute what rows of a batch begin with alike only once (needs sdpa)"}
    )
    feature_cache: str | None = field(
        default=None, metadata={"help": "folder that keeps what the frozen tower sees of every picture"}
    )
    cache_hidden: str | None = field(
        default=None,
        metadata={"help": "folder that keeps what a frozen backbone gives lm_head or the post block, for every record"},
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "only False: a loss or gradient that is not finite ends the run"}
    )
    caption_steps: int = field(
        default=0, metadata={"help": "steps between looks at what the model says of a few pictures; 0: none"}
    )
    caption_images: int = field(default=4, metadata={"help": "how many pictures these are"})
    mpt_attn_impl: str | None = field(default="triton", metadata={"help": "belongs to MPT, which is not supported"})

    evaluation_strategy: str | None = field(default=None, metadata={"help": "older name of --eval_strategy"})
    warmup_ratio: float | None = field(default=None, metadata={"help": "share of the steps; --warmup_steps goes first"})
    logging_dir: str | None = field(default=None, metadata={"help": "where TensorBoard's files go"})
    warmup_steps: float | None = field(default=None, metadata={"help": "steps of linear warm-up; 0 means none"})

    def __post_init__(self) -> None:
        if self.evaluation_strategy is not None:
            self.eval_strategy = self.evaluation_strategy
        if self.warmup_steps is None:
            self.warmup_steps = self.warmup_ratio or 0
        if self.logging_dir is not None:
            os.environ["TENSORBOARD_LOGGING_DIR"] = self.logging_dir
        self.gradient_checkpointing_kwargs = self.gradient_checkpointing_kwargs or {"use_reentrant": False}
        if hasattr(self, "activation_checkpointing"):  # the names that transformers 5.23 moves to
            if self.activation_checkpointing is None:
                self.activation_checkpointing = self.gradient_checkpointing
            self.activation_checkpointing_kwargs = (
                self.activation_checkpointing_kwargs or self.gradient_checkpointing_kwargs
            )
            self.gradient_checkpointing, self.gradient_checkpointing_kwargs = None, None
        self._refuse()
        self._fit_machine()
        self.deepspeed = deepspeed_config(self.deepspeed, on_cpu=self.use_cpu)
        if self.deepspeed:
            self._settle_clipping(self.deepspeed)
        if self.bits != 16 and (self.deepspeed or {}).get("zero_optimization", {}).get("stage") == 3:
            raise UserError(
                f"--bits {self.bits}: ZeRO-3 cannot partition bitsandbytes' weights; use zero_configs/zero2.json"
            )
        try:
            super().__post_init__()
        except (ValueError, ImportError) as error:
            raise UserError(" ".join(str(error).split())) from None
        # Several cards in one process would mean DataParallel, which cuts a batch of shared pictures by rows.
        self._n_gpu = min(self._n_gpu, 1)
        if self.bits != 16:
            check_backend(f"--bits {self.bits}", self.bits, self.device)

    def _refuse(self) -> None:
        for name, least in AT_LEAST.items():
            if not least <= getattr(self, name) < math.inf:
                raise UserError(f"--{name} {getattr(self, name)}: expected {least} or more")
        for name in RATES:
            rate = getattr(self, name)
            if rate is not None and not 0 <= rate < math.inf:
                raise UserError(f"--{name} {rate}: expected 0 or more")
        if self.lora_dropout >= 1:
            raise UserError(f"--lora_dropout {self.lora_dropout}: expected less than 1")
        if self.bf16 and self.fp16:
            raise UserError("--bf16 True and --fp16 True: pass one of them")
        if not self.output_dir:
            raise UserError("--output_dir is missing: pass the folder to write to")
        loggers = [self.report_to] if isinstance(self.report_to, str) else self.report_to or []
        for name in loggers:
            if name not in ("tensorboard", "wandb", "none"):
                raise UserError(f"--report_to {name}: expected tensorboard, wandb or none")
        if self.output_dir and Path(self.output_dir).is_file():
            raise UserError(f"--output_dir {self.output_dir} is a file; expected a folder")
        if self.bits not in (16, *CAPABILITY):
            raise UserError(f"--bits {self.bits}: expected 16, 8 or 4")
        if self.quant_type not in KINDS:
            raise UserError(f"--quant_type {self.quant_type}: expected {' or '.join(KINDS)}")
        if self.warmup_ratio is not None and not 0 <= self.warmup_ratio < 1:
            raise UserError(f"--warmup_ratio {self.warmup_ratio:g}: expected 0 or more and less than 1")
        if self.upstream_order and self.group_by_modality_length:
            raise UserError("--upstream_order and --group_by_modality_length both choose the order; pass one")
        if self.upstream_order and self.data_seed is not None:
            raise UserError("--data_seed is not upstream's, where --seed decides the order; leave it out")
        if self.mpt_attn_impl != "triton":
            raise UserError("--mpt_attn_impl belongs to MPT models, which are not supported")
        if self.logging_nan_inf_filter:
            raise UserError("--logging_nan_inf_filter True would hide a loss that is not finite, which ends the run")
        if self.remove_unused_columns:
            raise UserError("--remove_unused_columns True is not supported: records become batches in the collator")
        if self.lora_bias != "none":
            raise UserError(f"--lora_bias {self.lora_bias} is not supported: Llama has no biases; pass none")
        for flag, nothing in (("label_smoothing_factor", 0), ("use_liger_kernel", False), ("push_to_hub", False)):
            if getattr(self, flag) != nothing:
                raise UserError(f"--{flag} is not supported by these trainers; leave it out")
        if self.train_sampling_strategy in ("group_by_length", "batch_rebalance"):
            raise UserError(
                f"--train_sampling_strategy {self.train_sampling_strategy} is not supported; "
                "pass --group_by_modality_length True"
            )
        if self.fsdp:
            raise UserError("--fsdp is not supported; use --deepspeed zero_configs/zero3.json")

    def _settle_clipping(self, config: dict[str, Any]) -> None:
        """``--max_grad_norm`` decides, unless DeepSpeed's file does (without a word DeepSpeed would clip at 1)."""
        config.setdefault("gradient_clipping", "auto")

    def _fit_machine(self) -> None:
        """What this machine cannot do is switched off with one line."""
        if not torch.accelerator.is_available():
            self.use_cpu = True
        if self.use_cpu or not torch.cuda.is_available():
            if self.tf32:
                warn("--tf32 True: there is no CUDA device; float32 stays float32")
            self.tf32 = None
        elif self.tf32 and not is_torch_tf32_available():
            warn("--tf32 True: this GPU is older than Ampere; float32 stays float32")
            self.tf32 = None
        if self.use_cpu and self.fp16:
            warn("--fp16 True: the CPU does not train in float16; float32 is used")
            self.fp16 = False
        wanted = [self.report_to] if isinstance(self.report_to, str) else list(self.report_to or ["none"])
        for name in wanted:
            if name == "wandb" and importlib.util.find_spec("wandb") is None:
                warn("--report_to wandb: wandb is not installed (pip install wandb); logging to TensorBoard")
                wanted = ["tensorboard" if n == "wandb" else n for n in wanted]
        self.report_to = wanted

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else torch.float32


@dataclass
class PretrainTrainingArguments(LlavaTrainingArguments):
    """train_pretrain.py: LLaVA's defaults."""

    train_type: str | None = field(
        default=None,
        metadata={"help": "projector | use_lora | none (everything) | freeze_vision (all but the tower)"},
    )
    caption_steps: int = field(
        default=500, metadata={"help": "steps between looks at what the model says of a few pictures; 0: none"}
    )

    def __post_init__(self) -> None:
        if self.train_type not in (None, *TRAIN_TYPES):
            raise UserError(f"--train_type {self.train_type}: expected one of {', '.join(TRAIN_TYPES)}")
        super().__post_init__()


@dataclass
class DPOTrainingArguments(LlavaTrainingArguments):
    """train_dpo.py: HA-DPO's defaults, except where upstream's flag did nothing (then its effective value)."""

    output_dir: str | None = field(default="./results", metadata={"help": "where everything is written"})
    learning_rate: float = field(default=5e-4, metadata={"help": "peak learning rate"})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "learning rate schedule"})
    warmup_steps: float | None = field(
        default=None, metadata={"help": "steps of linear warm-up; 0: none (default 100)"}
    )
    weight_decay: float = field(default=0.0, metadata={"help": "upstream says 0.05 and never applies it"})
    per_device_train_batch_size: int = field(default=4, metadata={"help": "pairs per device"})
    per_device_eval_batch_size: int = field(default=1, metadata={"help": "pairs per device"})
    gradient_accumulation_steps: int = field(default=4, metadata={"help": "batches per optimizer step"})
    gradient_checkpointing: bool | None = field(default=True, metadata={"help": "recompute activations, save memory"})
    logging_steps: float = field(default=1, metadata={"help": "steps between log lines"})
    save_total_limit: int | None = field(default=1, metadata={"help": "checkpoints kept"})
    lora_dropout: float = field(default=0.0, metadata={"help": "upstream says 0.05 and sets every dropout to 0"})
    run_name: str | None = field(default="dpo_llava-1.5", metadata={"help": "name of the run for the loggers"})

    reference: str = field(
        default="auto",
        metadata={
            "help": "auto: what trains, as it was at the start | cache: log-probabilities computed before the first "
            "step and kept on disk | copy: a second model"
        },
    )
    reference_cache: str | None = field(
        default=None, metadata={"help": "file of --reference cache (default: in reference_cache beside --output_dir)"}
    )
    reference_from: str = field(
        default="start",
        metadata={"help": "start: the policy as it is loaded | base: the whole model that its deltas stand on"},
    )
    hadpo_compat: bool = field(
        default=False,
        metadata={
            "help": "HA-DPO's exact arithmetic, faults included: the reference sees the policy's connector, which "
            "trains at --learning_rate; warm-up, order and flags without effect are HA-DPO's too"
        },
    )
    aux_weight: float = field(default=0.5, metadata={"help": "weight of the language-model loss on --aux_data"})
    group_by_image: bool = field(default=False, metadata={"help": "batches of pairs about the same picture"})
    beta: float = field(default=0.5, metadata={"help": "DPO's beta (HA-DPO's recipe: 0.1)"})
    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"], metadata={"help": f"one or more of {', '.join(LOSSES)}: their sum"}
    )
    loss_weights: list[float] | None = field(
        default=None, metadata={"help": "weights of --loss_type in the sum (default: 1 each)"}
    )
    label_smoothing: float = field(
        default=0.0, metadata={"help": f"share of labels that are wrong, for {' and '.join(SMOOTHED)}: 0 up to 0.5"}
    )
    rpo_alpha: float | None = field(default=None, metadata={"help": "not supported: use --loss_type sigmoid sft"})
    optimizer_type: str | None = field(default=None, metadata={"help": "HA-DPO's name of --optim"})
    max_prompt_length: int | None = field(default=None, metadata={"help": "not supported: use --model_max_length"})
    max_length: int | None = field(default=None, metadata={"help": "not supported: use --model_max_length"})
    log_freq: int | None = field(default=None, metadata={"help": "accepted: --logging_steps decides"})
    ignore_bias_buffers: bool = field(default=False, metadata={"help": "accepted: there are no such buffers"})

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise UserError(f"--beta {self.beta}: expected a positive number")
        self._settle_losses()
        if self.reference not in REFERENCES:
            raise UserError(f"--reference {self.reference}: expected one of {', '.join(REFERENCES)}")
        if self.reference_from not in REFERENCES_FROM:
            raise UserError(f"--reference_from {self.reference_from}: expected one of {', '.join(REFERENCES_FROM)}")
        if not 0 < self.aux_weight < math.inf:
            raise UserError(
                f"--aux_weight {self.aux_weight}: expected a positive number; without --aux_data leave it out"
            )
        if self.reference_cache and self.reference != "cache":
            raise UserError(f"--reference_cache has nothing to do with --reference {self.reference}; pass cache")
        for flag in ("group_by_modality_length", "upstream_order"):
            if self.group_by_image and getattr(self, flag):
                raise UserError(f"--group_by_image and --{flag} both choose the order; pass one")
        for flag in ("max_prompt_length", "max_length"):
            if getattr(self, flag) is not None:
                raise UserError(f"--{flag} did nothing upstream and is not supported; --model_max_length cuts rows")
        if self.hadpo_compat:
            self._become_hadpo()
        self.optim = self.optimizer_type or self.optim
        if self.warmup_steps is None and self.warmup_ratio is None:
            self.warmup_steps = 100
        super().__post_init__()

    def _settle_clipping(self, config: dict[str, Any]) -> None:
        if self.hadpo_compat and self.max_grad_norm:
            clips = "gradient_clipping" in config
            note(
                "--max_grad_norm: HA-DPO's zero2.json and zero3.json have no gradient_clipping, so its runs were not "
                f"clipped; --deepspeed has {'one, and this run is' if clips else 'none, nor is this run'}"
            )
            self.max_grad_norm = self.max_grad_norm if clips else 0.0
        super()._settle_clipping(config)

    def _become_hadpo(self) -> None:
        """Flags as HA-DPO takes them (transformers 4.31 settles the warm-up)."""
        for flag, (effective, reason) in WITHOUT_EFFECT_IN_HADPO.items():
            if getattr(self, flag) != effective:
                note(f"--{flag} has nothing to do with --hadpo_compat True: {reason}")
                setattr(self, flag, effective)
        if self.warmup_steps is None:
            self.warmup_steps = 100
        if self.warmup_steps == 0:
            self.warmup_steps = 0.03 if self.warmup_ratio is None else self.warmup_ratio
        elif self.warmup_ratio is not None:
            note(f"--warmup_ratio has nothing to do with --hadpo_compat True: --warmup_steps is {self.warmup_steps:g}")
        self.upstream_order = True

    def _settle_losses(self) -> None:
        if self.rpo_alpha is not None:
            raise UserError(
                "--rpo_alpha is not supported, TRL's releases did not agree on it; "
                f"pass --loss_type sigmoid sft --loss_weights 1 {self.rpo_alpha:g}"
            )
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        self.loss_type = [name for listed in self.loss_type for name in listed.split(",") if name]
        types = " ".join(self.loss_type)
        for name in self.loss_type:
            if name not in LOSSES:
                raise UserError(f"--loss_type {types}: no loss '{name}'; expected one or more of {', '.join(LOSSES)}")
            if self.loss_type.count(name) > 1:
                raise UserError(f"--loss_type {types}: '{name}' is named twice; --loss_weights says how much it counts")
        if self.loss_type == ["sft"]:
            raise UserError("--loss_type sft alone learns from no preference; train_pretrain.py does that")
        if self.loss_weights is None:
            self.loss_weights = [1.0] * len(self.loss_type)
        weights = " ".join(f"{weight:g}" for weight in self.loss_weights)
        if len(self.loss_weights) != len(self.loss_type):
            raise UserError(
                f"--loss_weights {weights}: {len(self.loss_weights)} for the {len(self.loss_type)} of --loss_type "
                f"{types}; expected as many"
            )
        if not all(0 < weight < math.inf for weight in self.loss_weights):
            raise UserError(f"--loss_weights {weights}: expected positive numbers")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"--label_smoothing {self.label_smoothing}: expected 0 or more and less than 0.5")
        if self.label_smoothing and not set(SMOOTHED) & set(self.loss_type):
            raise UserError(
                f"--label_smoothing has nothing to do with --loss_type {types}; only {' and '.join(SMOOTHED)} use it"
            )
        if "robust" in self.loss_type and not self.label_smoothing:
            note("--loss_type robust is sigmoid where --label_smoothing is 0")


RATES = ("learning_rate", "mm_projector_lr", "post_block_lr", "lm_head_lr")

# Numbers that must not be smaller.
AT_LEAST = {
    "model_max_length": 1,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "lora_r": 1,
    "lora_dropout": 0,
    "weight_decay": 0,
    "seed": 0,
    "dataloader_num_workers": 0,
    "caption_steps": 0,
    "caption_images": 1,
}

# With --hadpo_compat: flags that do nothing in HA-DPO, with their values there and what happens instead.
WITHOUT_EFFECT_IN_HADPO: dict[str, tuple[Any, str]] = {
    "mm_projector_lr": (None, "the connector trains at --learning_rate (--freeze_mm_mlp_adapter freezes it)"),
    "weight_decay": (0.0, "there is no weight decay"),
    "lora_dropout": (0.0, "every dropout is 0"),
    "group_by_modality_length": (False, "the order is random"),
    "optim": ("adamw_torch", "--optimizer_type chooses the optimizer"),
}
