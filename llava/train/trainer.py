"""The trainers: Hugging Face's loop with LLaVA's rates, batches and files, and DPO's step."""

from __future__ import annotations

import os
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from llava.errors import UserError
from llava.files import publish
from llava.model.llava_arch import LabelScores, mean_loss
from llava.run_card import RunCard
from llava.train.caches import FillCaches, fill_features, fill_reference
from llava.train.effect import report
from llava.train.hidden_cache import HiddenCache, fill_hidden
from llava.train.losses import Pairs, preference_loss
from llava.train.reference import Reference, SharedReference, carried_over
from llava.train.reference_cache import ReferenceCache
from llava.train.sampler import ImageSampler, ModalityLengthSampler, UpstreamSampler, samples_of_whole_steps
from llava.train.saving import load_trained, save_checkpoint
from llava.train.trainable import rate_of


class LlavaTrainer(Trainer):
    """Supervised training of the chosen ``parts``: the loss looks at labelled positions only."""

    # Losses are means over a batch; the loop divides them by the accumulation steps.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: nn.Module,
        args: Any,
        parts: set[str],
        train_dataset: Dataset,
        eval_dataset: Dataset | None,
        collator: Callable,
        tokenizer: Any,
        image_processor: Any,
        feature_folder: Path | None = None,
        hidden: HiddenCache | None = None,
        start: SharedReference | None = None,
    ) -> None:
        self.parts = parts
        self.start = start
        self._staging: Path | None = None
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        super().__init__(
            model=model, args=args, data_collator=collator, train_dataset=train_dataset, eval_dataset=eval_dataset
        )
        self.model_accepts_loss_kwargs = False
        for progress in (PrinterCallback, ProgressCallback):
            self.remove_callback(progress)
        self.add_callback(OneLinePerLog())
        if feature_folder is not None:
            self.add_callback(FillCaches(lambda: fill_features(self, feature_folder)))
        if hidden is not None:
            self.add_callback(FillCaches(lambda: fill_hidden(self, hidden)))

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs, score_labels=True, use_cache=False)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[torch.Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with every part at its own rate where a flag gives one."""
        if self.optimizer is None:
            model = model or self.model
            decaying = set(self.get_decay_parameter_names(model))
            groups: dict[tuple[float, bool], list[nn.Parameter]] = defaultdict(list)
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    groups[rate_of(name, self.args), name in decaying].append(parameter)
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = kind(
                [
                    {
                        "params": parameters,
                        "weight_decay": self.args.weight_decay if decays else 0.0,
                        "lr": rate,
                    }
                    for (rate, decays), parameters in groups.items()
                ],
                **options,
            )
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        if self.args.upstream_order:
            seen = samples_of_whole_steps(len(dataset), self.args)
            return UpstreamSampler(len(dataset), seen, self.args.world_size, *self._seed_and_epoch())
        if not self.args.group_by_modality_length:
            return super()._get_train_sampler(dataset)
        megabatch = self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
        return ModalityLengthSampler(dataset.modality_lengths, megabatch, *self._seed_and_epoch())

    def _seed_and_epoch(self) -> tuple[int, Callable[[], int]]:
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        # The loader's own count of epochs does not reach a sampler when a run is resumed; the state's is always right.
        return seed, lambda: int(self.state.epoch or 0)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Every checkpoint, also one in the middle, loads by itself."""
        model = self.accelerator.unwrap_model(self.model)
        folder = Path(output_dir or self.args.output_dir)
        save_checkpoint(model, self.parts, folder, self.tokenizer, self.image_processor, writer=self.args.should_save)
        self.accelerator.wait_for_everyone()

    def finish(self, card: RunCard) -> None:
        """Save the run: weights, trainer_state.json, run.json with the final metrics."""
        metrics = dict(self.state.log_history[-1]) if self.state.log_history else {}
        self.save_model()  # first: an evaluation that fails must not cost the run
        if self.eval_dataset is not None:
            metrics.update(self.evaluate())
        self.save_state()
        if self.start is not None:
            card.content["effect"] = report(self, self.start)
        if self.args.should_save:
            card.content["engine"] = {
                "model": _class_name(self.model_wrapped),
                "optimizer": _class_name(getattr(self.optimizer, "optimizer", self.optimizer)),
            }
            card.finish({**self._last_training_log(), **metrics})

    def _last_training_log(self) -> dict[str, Any]:
        return next((dict(log) for log in reversed(self.state.log_history) if "loss" in log), {})

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """A checkpoint is written beside its place and named when it is complete: no kill leaves half of one."""
        output_dir = Path(self.args.output_dir)
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._staging = output_dir / ".unfinished"
        if self.args.should_save:
            shutil.rmtree(self._staging, ignore_errors=True)  # a killed run may have left one
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
        finally:
            staged, self._staging = self._staging / name, None
        self.accelerator.wait_for_everyone()
        if self.state.best_global_step:
            best = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            self.state.best_model_checkpoint = str(best)
        if self.args.should_save:
            shutil.rmtree(output_dir / name, ignore_errors=True)
            os.replace(staged, output_dir / name)
            shutil.rmtree(staged.parent)
            rotate_checkpoints(
                output_dir=str(output_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()

    def save_state(self) -> None:
        """``trainer_state.json``, whole or not at all."""
        if self.is_world_process_zero():
            temporary = Path(self.args.output_dir) / f".{TRAINER_STATE_NAME}"
            self.state.save_to_json(str(temporary))
            publish(temporary, temporary.with_name(TRAINER_STATE_NAME))

    def _load_best_model(self) -> None:
        load_trained(self.accelerator.unwrap_model(self.model), Path(self.state.best_model_checkpoint))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trained(self.accelerator.unwrap_model(model or self.model), Path(resume_from_checkpoint))


def _class_name(thing: Any) -> str:
    """What really ran: under DeepSpeed the wrapped model must be its engine, not the model itself."""
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


# Of a batch (``llava.data.collate``): what is DPO's own, and what has a line a row.
NOT_FOR_THE_MODEL = ("pairs", "reference_logps", "reference_rows", "aux_rows")
A_LINE_A_ROW = ("input_ids", "attention_mask", "labels", "image_index")


class DPOTrainer(LlavaTrainer):
    """Preference optimisation; metrics carry TRL's names and are averaged over all ranks' pairs since the last log."""

    def __init__(
        self,
        *args: Any,
        reference: Reference,
        beta: float,
        loss_type: Sequence[str] = ("sigmoid",),
        loss_weights: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        cache: ReferenceCache | None = None,
        aux_weight: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.loss_type, self.loss_weights = loss_type, loss_weights or [1.0] * len(loss_type)
        self.label_smoothing = label_smoothing
        self.aux_weight = aux_weight
        self.reference = reference
        if cache is not None:
            self.add_callback(FillCaches(lambda: fill_reference(self, cache, reference)))
        self.beta = beta
        self._sums: dict[str, dict[str, torch.Tensor]] = {"train": {}, "eval": {}}
        reference.place(self.accelerator, self.args)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        # ---- one DPO step: rows 0..B-1 are the chosen answers, B..2B-1 the rejected ones, others aux ----
        batch = {key: value for key, value in inputs.items() if key not in NOT_FOR_THE_MODEL}
        policy = model(**batch, score_labels=True, use_cache=False)
        scores = policy.scores
        paired = len(scores.counts) - inputs.get("aux_rows", 0)  # 2B
        policy_chosen, policy_rejected = scores.row_sums(scores.logps)[:paired].chunk(2)  # (B,) each
        known = inputs.get("reference_logps")
        reference_chosen, reference_rejected = (
            self._ask_reference(model, inputs, scores) if known is None else known
        ).chunk(2)
        chosen_count, rejected_count = scores.counts[:paired].chunk(2)
        logps = (policy_chosen, policy_rejected, reference_chosen, reference_rejected)
        loss = preference_loss(
            Pairs(*logps, chosen_count, rejected_count, self.beta, self.label_smoothing),
            self.loss_type,
            self.loss_weights,
        )
        # --------------------------------------------------------------------------------------------------
        chosen_sum, rejected_sum = scores.row_sums(scores.mean_logits)[:paired].chunk(2)
        margins = loss.chosen_rewards - loss.rejected_rewards
        pairs = torch.ones_like(margins)
        self._add(
            "train" if model.training else "eval",
            {
                "rewards/chosen": (loss.chosen_rewards, pairs),
                "rewards/rejected": (loss.rejected_rewards, pairs),
                "rewards/accuracies": ((margins > 0).float(), pairs),
                "rewards/margins": (margins, pairs),
                "logps/chosen": (policy_chosen.detach(), pairs),
                "logps/rejected": (policy_rejected.detach(), pairs),
                "logits/chosen": (chosen_sum, chosen_count),
                "logits/rejected": (rejected_sum, rejected_count),
                **({f"loss/{name}": term for name, term in loss.terms.items()} if len(loss.terms) > 1 else {}),
            },
        )
        total = loss.loss
        if "aux_rows" in inputs:
            of_aux = scores.logps[scores.rows >= paired]
            self._add("train", {"aux_loss": (-of_aux.detach(), torch.ones_like(of_aux))})
            total = total + self.aux_weight * mean_loss(of_aux)
        return (total, policy) if return_outputs else total

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """On the device; DeepSpeed casts what is floating, but half precision would round log-probabilities to 1/2."""
        known = inputs.get("reference_logps")
        inputs = super()._prepare_inputs(inputs)
        return inputs if known is None else {**inputs, "reference_logps": known.to(self.args.device)}

    def _ask_reference(self, model: nn.Module, inputs: dict[str, Any], scores: LabelScores) -> torch.Tensor:
        """Log-probabilities of the pairs' rows, (2B,); what the frozen parts gave the policy is not computed again."""
        batch = {key: value for key, value in inputs.items() if key not in NOT_FOR_THE_MODEL}
        paired = len(scores.counts) - inputs.get("aux_rows", 0)
        known = {}
        if "rows" in batch:
            known = carried_over(self.reference, scores)
            if "reference_rows" in inputs and not known.keys() & {"hidden_at_labels", "backbone_hidden"}:
                batch["rows"] = inputs["reference_rows"]
        else:
            batch.update({key: batch[key][:paired] for key in A_LINE_A_ROW})
        with self.reference.forward_of(model) as reference_model:
            reference = reference_model(**{**batch, **known}, score_labels=True, use_cache=False).scores
        return reference.row_sums(reference.logps)[:paired]

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        if not self.args.group_by_image:
            return super()._get_train_sampler(dataset)
        return ImageSampler(dataset.picture_paths, self.args.train_batch_size, *self._seed_and_epoch())

    def _add(self, mode: str, terms: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        for name, (values, weights) in terms.items():
            if mode == "eval":  # the last batch of the ranks is filled up with pairs that were counted already
                values, weights = self.accelerator.gather_for_metrics((values, weights))
            pair = torch.stack([values.sum().double(), weights.sum().double()])
            self._sums[mode][name] = self._sums[mode].get(name, 0) + pair

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Every rank calls it, so the sums meet here."""
        mode = "train" if "loss" in logs else "eval" if "eval_loss" in logs else None
        if mode and self._sums[mode]:
            names = sorted(self._sums[mode])
            totals = self.accelerator.reduce(torch.stack([self._sums[mode][name] for name in names]), "sum")
            prefix = "eval_" if mode == "eval" else ""
            metrics = {
                prefix + n: (total / max(count, 1)) for n, (total, count) in zip(names, totals.tolist(), strict=True)
            }
            logs.update(metrics)
            if "eval_loss/sft" in metrics:  # of tokens: a mean of batches' means would hang on their size
                weighed = zip(self.loss_type, self.loss_weights, strict=True)
                logs["eval_loss"] = sum(weight * metrics[f"eval_loss/{name}"] for name, weight in weighed)
            self._sums[mode] = {}
        super().log(logs, start_time)


class OneLinePerLog(TrainerCallback):
    """Progress as plain lines, which a log file of a queued job can hold."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if state.is_world_process_zero and logs:
            values = " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in logs.items())
            print(f"step {state.global_step}/{state.max_steps} {values}", flush=True)


def checkpoint_to_resume(args: Any) -> str | None:
    """The folder to go on from: the newest of ``--output_dir``, or what ``--resume_from_checkpoint`` says.

    A ``checkpoint-N`` gets its name when it is complete, so the newest one is whole. ``False`` starts afresh.

    Raises:
        UserError: the folder that the flag names is no checkpoint, or the checkpoint has no optimizer state.
    """
    wanted = args.resume_from_checkpoint
    if wanted in ("False", "false"):
        return None
    if wanted in (None, "True", "true"):
        steps = {
            int(found[1]): folder
            for folder in Path(args.output_dir).glob("checkpoint-*")
            if (found := re.fullmatch(r"checkpoint-(\d+)", folder.name)) and (folder / TRAINER_STATE_NAME).is_file()
        }
        if not steps:
            return None
        wanted = str(steps[max(steps)])
    folder = Path(wanted)
    if not (folder / TRAINER_STATE_NAME).is_file():
        raise UserError(f"--resume_from_checkpoint {wanted}: no checkpoint of a run ({TRAINER_STATE_NAME} is missing)")
    if not ((folder / "optimizer.pt").is_file() or any(folder.glob("global_step*"))):
        raise UserError(
            f"{wanted} holds no optimizer state (--save_only_model), so the run cannot go on from it; choose another "
            "--output_dir, or pass --resume_from_checkpoint False to start afresh"
        )
    return wanted
