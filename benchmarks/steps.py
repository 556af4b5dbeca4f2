"""Training steps as contenders: ours through the project's trainers, the others as their users run them.

All start from the same weights and the same tokens. A step is forward, backward and AdamW's update; ours also makes its
batch in every step, as the data loader does, while the others find theirs ready.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.examples import Drawing, DrawnPairs, hf_batch
from benchmarks.models import (
    PAD,
    Geometry,
    fill_adapter,
    gradients,
    hf_model,
    lora_config,
    our_model,
    train_only,
    with_lora,
)
from llava.data.collate import PackingCollator

BETA = 0.1
LEARNING_RATE = 1e-5
LORA_R = 16
LORA_ALPHA = 32


class Drawn(list):
    """Stands in for a data set where batches are drawn; a stream's tokens are counted without a builder's figures."""

    builder = SimpleNamespace(tokens_per_image=None, max_length=None)


class TrainerStep:
    """A step of a Hugging Face trainer, by its own ``training_step``."""

    def __init__(self, trainer: Any, batch: Callable[[], dict[str, Any]]) -> None:
        self.trainer, self.batch = trainer, batch
        trainer.current_gradient_accumulation_steps = 1  # as the training loop sets it
        self.optimizer = trainer.create_optimizer()

    def step(self) -> dict[str, Any]:
        return self._update(float(self.trainer.training_step(self.trainer.model, self.batch())))

    def _update(self, loss: float) -> dict[str, Any]:
        results = {"loss": loss, "gradients": gradients(self.trainer.model)}
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return results


def our_inputs(examples: Drawing, geometry: Geometry) -> dict[str, Any]:
    """Examples -> what our trainers' steps take."""
    blank = partial(torch.zeros, 3, geometry.image_size, geometry.image_size)
    return PackingCollator(PAD, None, blank, tokens_per_image=geometry.tokens_per_image)(examples())


def our_dpo(
    geometry: Geometry, examples: Drawing, seed: int = 0, cached: bool = False, checkpointing: bool = False
) -> TrainerStep:
    """``llava.train.trainer.DPOTrainer``; ``cached``: the reference's log-probabilities come with the batch."""
    from llava.train.arguments import DPOTrainingArguments
    from llava.train.reference import SharedReference
    from llava.train.trainer import DPOTrainer

    model = with_lora(our_model(geometry, seed), LORA_R, LORA_ALPHA, seed)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trainer = _our_trainer(
        DPOTrainer,
        DPOTrainingArguments,
        model,
        "lora",
        reference=SharedReference(model, {"lora"}),
        beta=BETA,
    )
    if not cached:
        return TrainerStep(trainer, partial(our_inputs, examples, geometry))
    known = reference_logps(model, our_inputs(examples, geometry)).view(2, -1).T.tolist()

    def with_logps() -> list[Any]:
        return [e._replace(reference_logps=tuple(logps)) for e, logps in zip(examples(), known, strict=True)]

    return TrainerStep(trainer, partial(our_inputs, with_logps, geometry))


@torch.no_grad()
def reference_logps(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """What the first epoch leaves behind: log-probabilities of whole answers, (2 B,), chosen and then rejected."""
    with model.disable_adapter():
        scores = model(**inputs).scores
    return scores.row_sums(scores.logps)


def our_frozen_dpo(
    geometry: Geometry, examples: Drawing, pairs: int, part: str, seed: int = 0, hidden: Path | None = None
) -> TrainerStep:
    """DPO of ``part`` (lm_head, or a post block with its defaults) alone, ``pairs`` a step from the trainer's loader.

    Examples are those of ``with_files``. ``hidden`` is the folder of ``--cache_hidden``, which is filled here by the
    trainer, as before its first step; every step then reads its records there, in this process.
    """
    from llava.train.arguments import DPOTrainingArguments
    from llava.train.hidden_cache import HiddenCache
    from llava.train.reference import SharedReference
    from llava.train.trainer import DPOTrainer

    model = train_only(our_model(geometry, seed, "interaction" if part == "post_block" else None), part)
    dataset = DrawnPairs(examples(), geometry)
    load = dataset.builder.load_image
    key = {"model": f"{geometry}, seed {seed}"}
    trainer = _our_trainer(
        DPOTrainer,
        DPOTrainingArguments,
        model,
        part,
        {
            "per_device_train_batch_size": pairs,
            "train_sampling_strategy": "sequential",
            "post_block_lr": LEARNING_RATE,
        },
        train_dataset=dataset,
        collator=PackingCollator(
            PAD,
            None,
            load.blank,
            load.levels(),
            tokens_per_image=geometry.tokens_per_image,
            apart=hidden is not None,
        ),
        hidden=hidden and HiddenCache(str(hidden), key, geometry.hidden_size, torch.float32),
        reference=SharedReference(model, {part}),
        beta=BETA,
    )
    with contextlib.redirect_stdout(sys.stderr):  # the table is what goes to stdout
        trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)
    return TrainerStep(trainer, _epochs(trainer.get_train_dataloader()).__next__)


def _epochs(loader: Iterable[Any]) -> Iterator[Any]:
    """Batches without end; every epoch reads its records again."""
    while True:
        yield from loader


def our_pretrain(geometry: Geometry, examples: Drawing, seed: int = 0) -> TrainerStep:
    """``llava.train.trainer.LlavaTrainer``, connector only."""
    from llava.train.arguments import PretrainTrainingArguments
    from llava.train.trainer import LlavaTrainer

    model = train_only(our_model(geometry, seed), "mm_projector")
    trainer = _our_trainer(LlavaTrainer, PretrainTrainingArguments, model, "projector")
    return TrainerStep(trainer, partial(our_inputs, examples, geometry))


def _our_trainer(
    kind: Any,
    arguments: Any,
    model: nn.Module,
    part: str,
    flags: dict[str, Any] | None = None,
    train_dataset: Any = None,
    collator: Any = None,
    **kwargs: Any,
) -> Any:
    args = arguments(
        output_dir=tempfile.mkdtemp(),
        learning_rate=LEARNING_RATE,
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
        **(flags or {}),
    )
    return kind(
        model=model,
        args=args,
        parts={part},
        train_dataset=Drawn([0]) if train_dataset is None else train_dataset,
        eval_dataset=None,
        collator=collator,
        tokenizer=None,
        image_processor=None,
        **kwargs,
    )


class PlainDPO:
    """HA-DPO's step on today's transformers: two models, a row for either answer, logits everywhere.

    Policy and reference are whole models, each encodes every picture for the chosen and for the rejected row, float32
    log-softmax over the vocabulary at every position, gradient checkpointing (HA-DPO's default). What trains is
    LoRA or, with ``head_alone``, lm_head. Every step takes the next ``pairs`` of the examples; None: all of them.
    """

    def __init__(
        self,
        geometry: Geometry,
        examples: Drawing,
        seed: int = 0,
        pairs: int | None = None,
        head_alone: bool = False,
    ) -> None:
        model = hf_model(geometry, seed)
        if head_alone:
            self.policy = train_only(model, "lm_head")
            # LLaVA and HA-DPO switch it on whatever trains. Only on the decoder, as theirs is: today's transformers
            # would have the tower back-propagate too.
            model.model.language_model.enable_input_require_grads()
        else:
            self.policy = with_lora(model, LORA_R, LORA_ALPHA, seed)
        self.policy.gradient_checkpointing_enable({"use_reentrant": False})
        self.reference = hf_model(geometry, seed).requires_grad_(False)
        drawn = examples()
        size = pairs or len(drawn)
        batches = [hf_batch(drawn[start : start + size], geometry) for start in range(0, len(drawn), size)]
        self.batches = itertools.cycle(batches)
        trained = [p for p in self.policy.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)

    def logps(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """(2 B,)."""
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        logits = model(**inputs, use_cache=False).logits[:, :-1].float()  # (2 B, L - 1, V)
        labels = batch["labels"][:, 1:]
        labelled = labels != -100
        per_token = logits.log_softmax(-1).gather(2, labels.masked_fill(~labelled, 0)[..., None])[..., 0]
        return (per_token * labelled).sum(-1)

    def step(self) -> dict[str, Any]:
        batch = next(self.batches)
        chosen, rejected = self.logps(self.policy, batch).chunk(2)
        with torch.no_grad():
            reference_chosen, reference_rejected = self.logps(self.reference, batch).chunk(2)
        margins = (chosen - rejected) - (reference_chosen - reference_rejected)
        loss = -F.logsigmoid(BETA * margins).mean()
        loss.backward()
        results = {"loss": loss.item(), "gradients": gradients(self.policy)}
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return results


def trl_dpo(geometry: Geometry, examples: Drawing, seed: int = 0, checkpointing: bool = False) -> TrainerStep:
    """TRL's ``DPOTrainer`` with PEFT (reference: the adapter off), fed our token ids past its processor."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(
        output_dir=tempfile.mkdtemp(),
        beta=BETA,
        learning_rate=LEARNING_RATE,
        max_length=None,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=checkpointing,
        report_to="none",
    )
    trainer = DPOTrainer(
        model=hf_model(geometry, seed),
        args=args,
        data_collator=lambda rows: rows,
        train_dataset=Dataset.from_dict({key: [""] for key in ("images", "prompt", "chosen", "rejected")}),
        processing_class=_processor(geometry),
        peft_config=lora_config(LORA_R, LORA_ALPHA),
    )
    fill_adapter(trainer.model, seed)
    batch = hf_batch(examples(), geometry)
    batch["completion_mask"] = (batch.pop("labels") != -100).long()
    return TrainerStep(trainer, lambda: dict(batch))


def _processor(geometry: Geometry) -> Any:
    """A processor that TRL asks for its special tokens and nothing else."""
    from tokenizers import Tokenizer, models
    from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, "<image>": 3}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )
    return LlavaProcessor(CLIPImageProcessorPil(), tokenizer, patch_size=geometry.patch_size)


class FullLogitsPretrain:
    """transformers' own loss over logits at every position, connector only."""

    def __init__(self, geometry: Geometry, examples: Drawing, seed: int = 0) -> None:
        self.model = train_only(hf_model(geometry, seed), "mm_projector")
        self.batch = hf_batch(examples(), geometry)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)

    def step(self) -> dict[str, Any]:
        loss = self.model(**self.batch, use_cache=False).loss
        loss.backward()
        results = {"loss": loss.item(), "gradients": gradients(self.model)}
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return results
