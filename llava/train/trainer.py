"""The trainers: Hugging Face's loop with LLaVA's rates, batches and files, and DPO's step."""

from __future__ import annotations

import functools
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import Trainer
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from llava import interruption
from llava.distributed import refuse_lost_rank
from llava.errors import warn
from llava.files import publish, read_object, write_json
from llava.model.llava_arch import LabelScores, mean_loss
from llava.run_card import RunCard
from llava.status import Status
from llava.train.caches import FillCaches, fill_features, fill_reference
from llava.train.checkpoints import (
    STAGING,
    checkpoint_name,
    no_room,
    publish_checkpoint,
    room_for,
    rotate,
    sweep,
    write_failure,
)
from llava.train.effect import report
from llava.train.guards import Finite, StopWhenAsked, deaf_worker
from llava.train.hidden_cache import HiddenCache, fill_hidden
from llava.train.losses import Pairs, preference_loss
from llava.train.reference import Reference, SharedReference, carried_over
from llava.train.reference_cache import ReferenceCache
from llava.train.sampler import ImageSampler, ModalityLengthSampler, UpstreamSampler, samples_of_whole_steps
from llava.train.saving import load_trained, save_checkpoint
from llava.train.shown_captions import ShownCaptions
from llava.train.trainable import part_of, rate_of
from llava.train.watching import Meter, Progress, TensorBoardOfAllParts, tokens_in

# Of a batch (``llava.data.collate``): what no forward takes, and what has a line a row.
NOT_FOR_THE_MODEL = ("records", "reference_logps", "reference_rows", "aux_rows")
A_LINE_A_ROW = ("input_ids", "attention_mask", "labels", "image_index")


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
        self.run_name: str | None = None
        self._staging: Path | None = None
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        super().__init__(
            model=model, args=args, data_collator=collator, train_dataset=train_dataset, eval_dataset=eval_dataset
        )
        self.model_accepts_loss_kwargs = False
        for progress in (PrinterCallback, ProgressCallback):
            self.remove_callback(progress)
        self._stop = StopWhenAsked()
        self._finite = Finite(train_dataset, args)
        self.meter = Meter(args.device)
        self.rate_groups: dict[str, int] = {}
        self.add_callback(self._stop)
        if feature_folder is not None:
            self.add_callback(FillCaches(lambda: fill_features(self, feature_folder)))
        if hidden is not None:
            self.add_callback(FillCaches(lambda: fill_hidden(self, hidden)))

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        batch = {key: value for key, value in inputs.items() if key not in NOT_FOR_THE_MODEL}
        outputs = model(**batch, score_labels=True, use_cache=False)
        self._check_loss(outputs.loss)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        self._finite.saw(inputs.get("records"))
        builder = self.train_dataset.builder
        self.meter.saw(tokens_in(inputs, builder.tokens_per_image, builder.max_length))
        return super().training_step(model, inputs, num_items_in_batch)

    def _check_loss(self, loss: torch.Tensor) -> None:
        if loss.requires_grad:
            self._finite.check_loss(loss.detach(), self.state.global_step + 1)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        self._finite.check_gradient(norm, self.state.global_step + 1)
        return norm

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        loader = super()._get_dataloader(*args, **kwargs)
        inner = getattr(loader, "base_dataloader", loader)
        inner.worker_init_fn = functools.partial(deaf_worker, inner.worker_init_fn)
        # Else every iterator draws the workers' seed from what dropout draws from, persistent workers once in a run: a
        # run that goes on would draw once more than the one that was not stopped.
        inner.generator = torch.Generator().manual_seed(self.args.seed)
        return loader

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
                    group = rate_of(name, self.args), name in decaying
                    groups[group].append(parameter)
                    part = part_of(name)
                    part += "_gate" if part == "post_block" and name.endswith("gate") else ""
                    self.rate_groups.setdefault(part, list(groups).index(group))
            if len({rate for rate, _ in groups}) == 1:
                self.rate_groups = {}  # the one that is logged anyway is everybody's
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

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """With the rate of every part, where parts have rates of their own; every rank calls it."""
        if "loss" in logs:
            groups = self.optimizer.param_groups
            logs.update({f"learning_rate/{part}": float(groups[at]["lr"]) for part, at in self.rate_groups.items()})
            self.meter.meet(self.accelerator)
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Every checkpoint, also one in the middle, loads by itself."""
        model = self.accelerator.unwrap_model(self.model)
        folder = Path(output_dir or self.args.output_dir)
        save_checkpoint(model, self.parts, folder, self.tokenizer, self.image_processor, writer=self.args.should_save)
        self.accelerator.wait_for_everyone()

    def go(self, card: RunCard, status: Status, checkpoint: str | None) -> None:
        """Train, from the beginning or from ``checkpoint``, and save the run; ``status`` is its heartbeat.

        Raises:
            Stopped: a signal came; the run is saved and goes on when it is started again.
            UserError: a number is not finite, or the disk is full.
            LostRank: another rank has ended.
        """
        self.run_name = card.content["run"]
        progress, board = Progress(status.unit, status, self.meter), None
        self.add_callback(progress)
        if self.pop_callback(TensorBoardCallback) is not None:
            board = TensorBoardOfAllParts(card.goes_on, progress)
            self.add_callback(board)
        if self.args.caption_steps:
            self.add_callback(ShownCaptions(self, progress, board))
        self.args.eval_on_start = self.args.eval_on_start and checkpoint is None
        if self.args.should_save:
            sweep(Path(self.args.output_dir))
        with interruption.held():
            try:
                self.train(resume_from_checkpoint=checkpoint)
                with interruption.finishing():
                    self.finish(card)
                    status.update(state="finished")
                    interruption.ignore()
            except interruption.Stopped as stopped:
                status.stop(str(stopped))
                if self.args.should_save:
                    card.stop(str(stopped))
                raise
            except (OSError, SafetensorError, RuntimeError) as error:
                if why := write_failure(error):
                    raise no_room(Path(self.args.output_dir), why) from None
                if self.args.world_size > 1:
                    time.sleep(2)  # if a signal has ended the other rank, this one's own is on its way
                    interruption.stop_if_requested("what is written is kept")
                    refuse_lost_rank(error)
                raise

    def finish(self, card: RunCard) -> None:
        """Save the run: weights, trainer_state.json, run.json with the final metrics."""
        metrics = dict(self.state.log_history[-1]) if self.state.log_history else {}
        best = self.state.best_global_step
        saved = Path(self.state.best_model_checkpoint or "the last step").name
        if self.args.load_best_model_at_end and best and saved != checkpoint_name(best):
            warn(f"--load_best_model_at_end: step {best} was best, but has no checkpoint; the model is that of {saved}")
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
        """A checkpoint is written beside its place and named when it is proved whole (``llava.train.checkpoints``)."""
        output_dir, name = Path(self.args.output_dir), checkpoint_name(self.state.global_step)
        self._staging = output_dir / STAGING
        staged = self._staging / name
        asked, only_model = self._stop.asked, self.args.save_only_model
        self.args.save_only_model = only_model and not asked  # a run that is to go on needs all of it
        try:
            if self.args.should_save:
                room_for(output_dir)
                shutil.rmtree(self._staging, ignore_errors=True)  # a killed run may have left one
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            best = checkpoint_name(self.state.best_global_step or 0)
            if best == name or (output_dir / best).is_dir():
                self.state.best_model_checkpoint = str(output_dir / best)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.state.save_to_json(str(staged / TRAINER_STATE_NAME))  # the best one by its final name
                newest = publish_checkpoint(staged, self.run_name)
                rotate(output_dir, newest, self.args.save_total_limit, self.state.best_model_checkpoint, self.run_name)
        except Exception as error:
            if write_failure(error) and self.args.should_save:
                shutil.rmtree(output_dir / STAGING, ignore_errors=True)  # room for what the others write
            raise
        finally:
            self._staging, self.args.save_only_model = None, only_model
        self.accelerator.wait_for_everyone()
        if asked:
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
            raise interruption.Stopped(f"stopped by {asked} after step {self.state.global_step}; {name} is whole")

    def _maybe_log_save_evaluate(
        self, tr_loss: torch.Tensor, grad_norm: Any, model: nn.Module, *args: Any, **kw: Any
    ) -> None:
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, *args, **kw)
        if self._stop.asked:  # --save_strategy best saves only what is best
            self._save_checkpoint(model, None)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """Without deleting the newest checkpoint where another was best: the final model is still to be written."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    def _save_rng_state(self, output_dir: str) -> None:
        """Also what was added up since the last log line: a run that goes on shall log what it would have."""
        super()._save_rng_state(output_dir)
        sums = {"loss": self._tr_loss.item(), "last_logged": self._globalstep_last_logged, "metrics": self._log_sums()}
        write_json(Path(output_dir) / f"log_sums_{self.args.process_index}.json", sums)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        files = sorted(Path(checkpoint).glob("log_sums_*.json"), key=lambda path: int(path.stem.split("_")[-1]))
        for file in files[self.args.process_index :: self.args.world_size]:  # another number of ranks: shared out
            sums = read_object(file)
            self._tr_loss += sums["loss"] * self.args.world_size / len(files)
            self._add_log_sums(sums["metrics"])
        if files:
            self._globalstep_last_logged = read_object(files[0])["last_logged"]

    def _log_sums(self) -> dict[str, Any]:
        return {}

    def _add_log_sums(self, sums: dict[str, Any]) -> None:
        pass

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
        self._check_loss(total)
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

    def _log_sums(self) -> dict[str, Any]:
        return {name: pair.tolist() for name, pair in self._sums["train"].items()}

    def _add_log_sums(self, sums: dict[str, Any]) -> None:
        for name, pair in sums.items():
            known = self._sums["train"].get(name, 0)
            self._sums["train"][name] = known + torch.tensor(pair, dtype=torch.float64, device=self.args.device)

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
