"""Flags -> what a training script needs: first what is cheap (config, tokenizer, data), then the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from llava.conversation import SeparatorStyle, template, template_of
from llava.data.collate import Collator, PackingCollator
from llava.data.examples import ExampleBuilder
from llava.data.images import ImageLoader, open_image
from llava.errors import UserError, note
from llava.files import existing, read_object
from llava.model.builder import (
    assemble,
    blank_config,
    fresh_connector,
    load_image_processor,
    local_folder,
    model_settings,
    tower_shape,
)
from llava.model.chat_template import usual_template
from llava.model.checkpoint import read_connector
from llava.model.decoder import why_not
from llava.model.delta import Chain, Stage, Standing, lay_over, read_chain, saves_delta, with_adapter
from llava.model.dialects import EMBEDDINGS, HEAD, State
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.post_block.builder import block_settings, fresh_block
from llava.model.quantization import Quantization
from llava.tokenization import load_tokenizer
from llava.train.trainable import part_of

# What of a config is the run's and not the model's.
OF_THE_RUN = ("image_aspect_ratio", "tokenizer_model_max_length", "tokenizer_padding_side")


@dataclass
class ModelPlan:
    """A model that is known but not loaded: everything the data needs, and ``load`` for the weights."""

    chain: Chain
    tower: Path | None
    config: dict[str, Any]
    blank: bool  # a language model that gets a tower and a new connector
    new_block: bool  # --post_block put one in
    untied: bool  # lm_head trains and was the embeddings
    parts: frozenset[str]  # that train
    writes_delta: bool  # this process writes delta.json
    dtype: torch.dtype  # of the weights
    compute_dtype: torch.dtype
    attn_implementation: str | None
    seed: int
    tokenizer: PreTrainedTokenizerBase
    image_processor: Any
    adapter: Stage | None = None  # --lora_weight_path: a LoRA on the chain that trains on
    quantization: Quantization | None = None  # --bits

    @property
    def folder(self) -> Path:
        """The whole model at the root."""
        return self.chain.root_folder

    @property
    def connector(self) -> Path | None:
        """``--pretrain_mm_mlp_adapter``."""
        return self.chain.connector

    def load(self, adapted: bool = True) -> Any:
        """The model with its weights, but for a LoRA that trains on; a second call gives the same model again.

        ``adapted`` False leaves out what was saved beside that LoRA, too.
        """
        state, new = self._start()
        config = self.start_config()
        if self.adapter is not None and adapted:
            brought = self.adapter.tensors()
            state, new, config = lay_over(state, brought), {**new, **brought}, self.config
        model = self._assemble(config, state, self.chain.source)
        for name, parameter in model.named_parameters():
            # In full precision as it was saved: rounded first, what an earlier stage has moved it by would be lost.
            kept = part_of(name) in self.parts or name in new  # both are saved
            if kept and name in state and not hasattr(parameter, "ds_id"):
                parameter.data = state[name].float().clone()
        model.stands_on = Standing(frozenset(new), self.chain.card() if self.writes_delta else None)
        return model

    def _start(self) -> tuple[State, State]:
        """All weights but for what ``adapter`` brings, and those of them that no folder of the chain holds."""
        state = self.chain.state()
        new = self._new_tensors(state)
        return lay_over(state, new), new

    def start_state(self) -> State:
        """Weights that the run starts from, without ``adapter``; the head is there also where it is tied."""
        return _with_head(self._start()[0], self.start_config())

    def start_config(self) -> dict[str, Any]:
        """``config`` without what ``adapter`` brings."""
        if self.adapter is None:
            return self.config
        if self.chain.blank:
            return {**self.config, "post_block": None}
        own = [key for key in self.config if key.startswith("mm_") and key != "mm_projector_type"]
        own += [*OF_THE_RUN, *(["post_block"] if self.new_block else []), *(["tie_word_embeddings"] * self.untied)]
        return {**self.chain.config(), **{key: self.config[key] for key in own}}

    def _new_tensors(self, state: State) -> State:
        """What neither the model nor its deltas hold."""
        new: State = {}
        if self.connector is not None:
            new |= read_connector(self.connector)
        elif self.blank:
            new |= fresh_connector(self.config, self.seed)
        if self.new_block:
            new |= fresh_block(model_settings(self.config), self.seed)
        if self.untied:
            new[HEAD] = state[EMBEDDINGS].clone()
        return new

    def base_config(self) -> dict[str, Any]:
        """Config of the whole model at the root, for pictures and rows as this plan prepares them.

        Raises:
            UserError: the root is a language model, which knows no pictures.
        """
        root = self.chain.root()
        if root.blank:
            raise UserError(
                f"--reference_from base: {root.newest} is a language model, which sees no pictures; pass start"
            )
        config = {**root.config(), **{key: self.config[key] for key in OF_THE_RUN}}
        return {"mm_vision_config": self.config["mm_vision_config"], **config}

    def base_state(self) -> State:
        """Weights of the whole model at the root, without any delta; the head is there also where it is tied."""
        return _with_head(self.chain.root().state(), self.base_config())

    def load_base(self) -> Any:
        """The whole model at the root, without any delta."""
        return self._assemble(self.base_config(), self.base_state(), self.folder)

    def _assemble(self, config: dict[str, Any], state: State, source: Path) -> Any:
        options: dict[str, Any] = {"quantization": self.quantization, "file_of": self.chain.file_of}
        if self.attn_implementation:
            options["attn_implementation"] = self.attn_implementation
        return assemble(config, state, source, self.dtype, self.tower, **options)


def _with_head(state: State, config: dict[str, Any]) -> State:
    return {**state, HEAD: state[EMBEDDINGS]} if model_settings(config).tie_word_embeddings else state


def plan_model(model_args: Any, data_args: Any, train_args: Any, parts: set[str]) -> ModelPlan:
    """Read config, tokenizer and image processor of ``--model_name_or_path``: a LLaVA, or an LLM to build one on.

    Raises:
        UserError: a model that cannot be trained, or flags that do not fit it.
    """
    name, cache = model_args.model_name_or_path, train_args.cache_dir
    chain = read_chain(name, "--model_name_or_path", cache)
    whole = chain  # with an adapter that trains on
    if train_args.lora_weight_path:
        whole = with_adapter(chain, train_args.lora_weight_path, "--lora_weight_path")
    if whole is not chain and whole.newest.resolve() in (folder.resolve() for folder in chain.folders):
        raise UserError(f"--lora_weight_path {whole.newest} is in --model_name_or_path {name} too; pass it once")
    blank = whole.blank
    if blank:
        if not model_args.vision_tower:
            raise UserError(
                f"--model_name_or_path {name} is a language model; pass --vision_tower to make a LLaVA of it"
            )
        config, tower = blank_config(chain.newest, model_args, cache)
    else:
        config, tower = _existing_config(whole, model_args, cache)
    chain.tower = tower
    if model_args.pretrain_mm_mlp_adapter is not None:
        chain.connector = existing(model_args.pretrain_mm_mlp_adapter, "--pretrain_mm_mlp_adapter")
    own_connector = hasattr(train_args, "reference") and not train_args.hadpo_compat  # that a reference sees through
    if whole is not chain:
        _settle_connector(whole, chain.connector, own_connector)
    _keep_apart([*whole.folders, *([chain.connector.parent] if chain.connector else [])], train_args.output_dir)
    new_block = _put_block(config, model_args, parts, whole.newest)
    untied = _untie(config, parts, whole.newest)

    aspect = data_args.image_aspect_ratio or config.get("image_aspect_ratio") or "square"
    config.update(
        image_aspect_ratio=aspect,
        tokenizer_model_max_length=train_args.model_max_length,
        tokenizer_padding_side="right",
        tune_mm_mlp_adapter=parts == {"projector"},
        freeze_mm_mlp_adapter="projector" not in parts,
        mm_projector_lr=train_args.mm_projector_lr,
    )
    tokenizer_folder = whole.folder_with("tokenizer_config.json")
    tokenizer = load_tokenizer(
        tokenizer_folder, config.get("vocab_size"), model_max_length=train_args.model_max_length, padding_side="right"
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    _settle_template(model_args, config, tokenizer)
    # Weights that do not train may be as coarse as the arithmetic; DeepSpeed keeps float32 masters of its own.
    coarse = "backbone" not in parts or train_args.deepspeed
    plan = ModelPlan(
        chain=chain,
        tower=tower,
        config=config,
        blank=blank,
        new_block=new_block,
        untied=untied,
        parts=frozenset(parts),
        writes_delta=saves_delta(parts) and train_args.should_save,
        dtype=train_args.compute_dtype if coarse else torch.float32,
        compute_dtype=train_args.compute_dtype,
        attn_implementation=model_args.attn_implementation,
        seed=train_args.seed,
        tokenizer=tokenizer,
        image_processor=load_image_processor(*whole.folders, tower),
        adapter=whole.stages[-1] if whole is not chain else None,
        quantization=_quantization(train_args, parts),
    )
    if getattr(train_args, "reference_from", None) == "base":
        plan.base_config()  # refused here where there is none
    if own_connector and whole is not chain and chain.blank and chain.connector is None:
        raise UserError(
            f"--lora_weight_path: the reference would be {chain.newest} without the adapter, a language model, which "
            "sees no pictures; pass --pretrain_mm_mlp_adapter, or make a whole model of both first: "
            "python -m llava.model.export"
        )
    return plan


def _settle_template(model_args: Any, config: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Choose ``--version`` where it is not given, and enter it into ``config`` where nothing else would tell."""
    if model_args.version is None:
        model_args.version = usual_template(tokenizer, config)
    taught = template(model_args.version)
    # "plain" is a caption behind a picture: it teaches no way to talk.
    if taught.sep_style is not SeparatorStyle.PLAIN and taught != template(template_of(config)):
        config["mm_conv_mode"] = model_args.version


def _quantization(train_args: Any, parts: set[str]) -> Quantization | None:
    """``--bits``.

    Raises:
        UserError: a part trains with which the whole model would be saved.
    """
    bits = train_args.bits
    if bits == 16:
        return None
    whole = " and ".join(sorted(parts & {"backbone", "vision_tower"}))
    if whole:
        raise UserError(
            f"--bits {bits}: {whole} would train, but what is quantized stays frozen and is not saved; pass "
            "--lora_enable True, or choose with --tune: lora, projector, post_block, lm_head"
        )
    return Quantization(
        bits, train_args.compute_dtype, train_args.device, train_args.quant_type, train_args.double_quant
    )


def _settle_connector(whole: Chain, connector: Path | None, own_connector: bool) -> None:
    """A LoRA that trains on may bring a connector; one from elsewhere is then below it.

    Raises:
        UserError: nothing would see through that one.
    """
    if connector is None or "projector" not in whole.stages[-1].parts():
        return
    if not own_connector:
        raise UserError(
            f"--pretrain_mm_mlp_adapter {connector} has nothing to do: --lora_weight_path {whole.newest} brings a "
            "connector of its own; leave one of them out"
        )
    note(f"--pretrain_mm_mlp_adapter {connector} is the reference's; --lora_weight_path brings the policy's connector")


def _keep_apart(folders: Iterable[Path], output_dir: str) -> None:
    """A run must not write over, or rotate away, what it starts from: its deltas would stand on nothing."""
    output = Path(output_dir).expanduser().resolve()
    for folder in (path.resolve() for path in folders):
        if folder == output or (folder.parent == output and folder.name.startswith("checkpoint-")):
            raise UserError(f"--output_dir {output_dir}: the run starts from {folder}; choose another --output_dir")


def _put_block(config: dict[str, Any], model_args: Any, parts: set[str], folder: Path) -> bool:
    """Enter ``--post_block`` into ``config``; True where the model has none yet.

    Raises:
        UserError: it has another one, or none where one is to train.
    """
    own = config.get("post_block")
    if model_args.post_block is None:
        if model_args.post_block_config is not None:
            raise UserError("--post_block_config has nothing to do without --post_block; pass both")
        if "post_block" in parts and own is None:
            raise UserError(f"{folder} has no post block to train; pass --post_block")
        return False
    settings = block_settings(model_args.post_block, model_args.post_block_config)
    if own is not None and own != settings:
        raise UserError(
            f"--post_block {model_args.post_block}: {folder} has a block already, {own}, which is not {settings}; "
            "leave --post_block out to go on with it"
        )
    config["post_block"] = settings
    return own is None


def _untie(config: dict[str, Any], parts: set[str], folder: Path) -> bool:
    """Part lm_head from the embeddings where it alone trains; True where they were one tensor.

    Raises:
        UserError: the embeddings train and the head, the same tensor, does not.
    """
    if not model_settings(config).tie_word_embeddings:
        return False
    if "backbone" in parts:
        if "lm_head" not in parts:
            raise UserError(
                f"{folder}: lm_head and the embeddings are one tensor (tie_word_embeddings), so the backbone does not "
                "train without lm_head; let both train, or neither"
            )
        return False
    if "lm_head" not in parts:
        return False
    config["tie_word_embeddings"] = False
    note(f"{folder}: lm_head is parted from the embeddings (tie_word_embeddings), which do not train")
    return True


def _existing_config(chain: Chain, model_args: Any, cache: str | None) -> tuple[dict[str, Any], Path | None]:
    """A LLaVA's config with what the flags may change: the tower's place, the layer its features come from."""
    folder = chain.newest
    if model_args.vision_tower:
        config = chain.config()
        tower = local_folder(model_args.vision_tower, "--vision_tower", cache_dir=cache)
        shape = tower_shape(tower)
        if shape["hidden_size"] != config["mm_hidden_size"]:
            raise UserError(
                f"--vision_tower {model_args.vision_tower}: width {shape['hidden_size']}, but the connector of "
                f"{folder} takes {config['mm_hidden_size']}"
            )
        config.update(mm_vision_tower=model_args.vision_tower, mm_vision_config=shape)
    else:
        config, tower = chain.configured()
    own_type = config.get("mm_projector_type") or "linear"
    if model_args.mm_projector_type not in (None, own_type):
        raise UserError(
            f"--mm_projector_type {model_args.mm_projector_type}: {folder} has a connector of type {own_type}"
        )
    for key in ("mm_vision_select_layer", "mm_vision_select_feature"):
        if getattr(model_args, key) is not None:
            config[key] = getattr(model_args, key)
    return config, tower


def example_builder(plan: ModelPlan, version: str) -> ExampleBuilder:
    """Records -> examples, for this model and template."""
    return ExampleBuilder(
        tokenizer=plan.tokenizer,
        template=template(version),
        load_image=ImageLoader(plan.image_processor, plan.config["image_aspect_ratio"]),
        tokens_per_image=_tokens_per_image(PretrainedConfig(**plan.config)),
        max_length=plan.config["tokenizer_model_max_length"],
        vocab_size=plan.config.get("vocab_size", 32000),
    )


def row_builder(model_args: Any, max_length: int, cache: str | None = None) -> ExampleBuilder:
    """Records -> rows as a training of this model sees them; neither weights nor pictures are read.

    Raises:
        UserError: no model that could be trained, or a language model without a ``vision_tower``.
    """
    chain = read_chain(model_args.model_name_or_path, "--model_name_or_path", cache)
    if chain.blank and not model_args.vision_tower:
        raise UserError(
            f"--model_name_or_path {model_args.model_name_or_path} is a language model; pass --vision_tower, which "
            "tells how many tokens a picture takes"
        )
    read = blank_config(chain.newest, model_args, cache) if chain.blank else _existing_config(chain, model_args, cache)
    config = read[0]
    folder = chain.folder_with("tokenizer_config.json")
    tokenizer = load_tokenizer(folder, config.get("vocab_size"), model_max_length=max_length, padding_side="right")
    _settle_template(model_args, config, tokenizer)
    return ExampleBuilder(
        tokenizer=tokenizer,
        template=template(model_args.version),
        load_image=open_image,
        tokens_per_image=_tokens_per_image(PretrainedConfig(**config)),
        max_length=max_length,
        vocab_size=config.get("vocab_size", 32000),
    )


def _tokens_per_image(config: Any) -> int:
    with torch.device("meta"):
        return build_vision_tower(config).num_features


def collator(plan: ModelPlan, builder: ExampleBuilder, train_args: Any) -> Collator:
    """Examples -> batches, for this model: rows share their beginnings unless the flags or the model forbid it.

    Raises:
        UserError: they forbid it, and hidden states of trees are to be kept.
    """
    loader = builder.load_image
    settings = (plan.tokenizer.pad_token_id, plan.config["tokenizer_model_max_length"], loader.blank, loader.levels())
    reason = None if train_args.prefix_sharing else "--prefix_sharing False"
    reason = reason or why_not(PretrainedConfig(**plan.config), plan.attn_implementation)
    if reason is None:
        apart = train_args.cache_hidden is not None
        return PackingCollator(*settings, tokens_per_image=builder.tokens_per_image, apart=apart)
    if train_args.cache_hidden is not None:
        raise UserError(f"--cache_hidden keeps what rows that share beginnings give, which do not here: {reason}")
    if train_args.process_index == 0:
        note(f"rows are computed one by one: {reason}")
    return Collator(*settings)


def check_resumed(checkpoint: str | None, arguments: dict[str, Any], model_args: Any) -> None:
    """A run is gone on with only with the arguments it was started with; its ``--version``, which may have been chosen
    for it, is taken over.

    Raises:
        UserError: they differ; those that do are named.
    """
    card = Path(checkpoint).parent / "run.json" if checkpoint else None
    if card is None or not card.is_file():
        return
    before = {**BEFORE_THE_FLAG, **read_object(card).get("arguments", {})}
    if model_args.version is None:
        model_args.version = arguments["version"] = before.get("version")
    free = FREE_ON_RESUME | _settle_processes(checkpoint, before, arguments)
    differing = [
        f"{key} {before[key]!r} -> {value!r}"
        for key, value in arguments.items()
        if key not in free and before.get(key, value) != value
    ]
    if differing:
        raise UserError(
            f"{checkpoint} belongs to a run with other arguments ({'; '.join(differing[:5])}); choose another "
            "--output_dir, or pass --resume_from_checkpoint False to start afresh"
        )


# Whose product is the number of records of an optimizer step.
STEP_SIZE = ("world_size", "per_device_train_batch_size", "gradient_accumulation_steps")


def _settle_processes(checkpoint: str, before: dict[str, Any], arguments: dict[str, Any]) -> frozenset[str]:
    """Which arguments may differ because the run goes on on another number of processes, with the same global batch.

    Raises:
        UserError: it cannot; what can be done is said.
    """
    was, now = before.get("world_size", 1), arguments["world_size"]
    if was == now:
        return frozenset()
    sentence = f"{checkpoint} belongs to a run on {was} process(es), this one has {now}"
    afresh = "or pass --resume_from_checkpoint False to start afresh"
    if before.get("deepspeed") or arguments["deepspeed"]:
        raise UserError(
            f"{sentence}, and DeepSpeed's optimizer state lies in {was} part(s); start it on {was} again, {afresh}"
        )
    for flag in ("upstream_order", "group_by_image"):
        if arguments.get(flag):
            raise UserError(f"{sentence}, and --{flag} has another order there; start it on {was} again, {afresh}")
    size, size_now = (math.prod(int(values[key]) for key in STEP_SIZE) for values in (before, arguments))
    if size % now:
        raise UserError(f"{sentence}, which cannot share its {size} records a step; choose a divisor of that, {afresh}")
    if size != size_now:
        raise UserError(
            f"{sentence}; its optimizer steps had {size} records, these would have {size_now}: choose "
            f"--per_device_train_batch_size and --gradient_accumulation_steps whose product is {size // now}, {afresh}"
        )
    note(f"{sentence}; the global batch is the same, so it goes on; dropout draws other numbers")
    return frozenset(STEP_SIZE)


# What runs did before these flags were there.
BEFORE_THE_FLAG = {
    "loss_type": ["sigmoid"],
    "loss_weights": [1.0],
    "label_smoothing": 0.0,
    "hadpo_compat": False,
    "upstream_order": False,
}

# What may change between a run and its continuation without changing what is computed.
FREE_ON_RESUME = {
    "local_rank",
    "output_dir",
    "logging_dir",
    "logging_nan_inf_filter",
    "logging_steps",
    "report_to",
    "run_name",
    "save_steps",
    "save_strategy",
    "save_total_limit",
    "resume_from_checkpoint",
    "dataloader_num_workers",
    "dataloader_persistent_workers",
    "dataloader_pin_memory",
    "cache_dir",
    "cache_hidden",
    "reference_cache",
    "feature_cache",
    "caption_steps",
    "caption_images",
}
