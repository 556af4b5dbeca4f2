"""What a post block has done by the end of its run: small runs are easily spent on a block that changes no answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import LogitsProcessorList, StoppingCriteriaList

from llava.errors import warn
from llava.model.checkpoint import gathered
from llava.model.decoder import why_not
from llava.model.generation import Rules, grow_answers
from llava.train.prompts import learner, pixel_loader, prompt_of, stream_of
from llava.train.reference import SharedReference, carried_over
from llava.train.saving import bare_model

SAMPLE = 128  # records that are looked at
AT_A_TIME = 8
POSITIONS_AT_A_TIME = 256  # whose logits exist together
NEW_TOKENS = 24
LEAST = 0.01  # share of changed answers below which a run is warned of


@dataclass
class Effect:
    """The model as it is against the same with its block as it was at the start, over a sample of records."""

    gate: float | None  # mean |tanh(gate)|; None: blocks without one
    hidden: float  # |h - h0| / |h0| over the hidden states that predict a label
    logits: float  # the same of their logits, each row's mean taken off
    answers: int  # greedy answers
    changed: int  # of them, those that are another text now; 0 of 0 where the model takes no trees

    def __str__(self) -> str:
        gate = "none" if self.gate is None else f"{self.gate:.3g}"
        answers = f"{self.changed} of {self.answers} answers ({self.changed / max(self.answers, 1):.1%})"
        return (
            f"post block: gate {gate}; its training changed hidden states by {self.hidden:.2%}, logits by "
            f"{self.logits:.2%}, {answers if self.answers else 'answers were not compared'}"
        )


def report(trainer: Any, start: SharedReference) -> dict[str, float | int | None]:
    """Measure, print (first process), warn; every rank calls it, since ZeRO-3 runs them in step."""
    effect = measure(trainer, start)
    if trainer.is_world_process_zero():
        print(effect, flush=True)
    if effect.changed < LEAST * effect.answers:
        warn(
            f"the post block changed {effect.changed} of {effect.answers} answers: train longer, or raise "
            "--post_block_lr"
        )
    return vars(effect)


@torch.no_grad()
def measure(trainer: Any, start: SharedReference) -> Effect:
    """On held-out records where there are any, else on those of the training."""
    dataset = (trainer.eval_dataset if trainer.eval_dataset is not None else trainer.train_dataset).alone()
    chosen = torch.linspace(0, len(dataset) - 1, min(SAMPLE, len(dataset))).long().tolist()
    examples = [dataset[index] for index in chosen]
    model, bare = trainer.model_wrapped, bare_model(trainer.accelerator.unwrap_model(trainer.model))
    training = model.training
    model.eval()
    loader = pixel_loader(dataset)
    sums = torch.zeros(4, dtype=torch.float64)
    answers = changed = 0
    end = trainer.tokenizer.eos_token_id
    rules = Rules(NEW_TOKENS, [] if end is None else [end], LogitsProcessorList(), StoppingCriteriaList())
    # Not the trainer's own context, which leaves parts called past the wrapper in their weights' dtypes.
    with trainer.accelerator.autocast():
        for part in _parts(examples):
            sums += _distances(trainer, model, bare, start, part)
            if why_not(bare.config) is None:
                *questions, _ = stream_of(
                    bare, loader, [prompt_of(learner(each)) for each in part], trainer.args.device
                )
                now = grow_answers(bare, *questions, rules)[0]
                with start.forward_of(model):
                    before = grow_answers(bare, *questions, rules)[0]
                answers += len(now)
                changed += sum(a != b for a, b in zip(now, before, strict=True))
    model.train(training)
    hidden, hidden_0, logits, logits_0 = sums.sqrt().tolist()
    return Effect(_gate(bare.post_block), hidden / hidden_0, logits / logits_0, answers, changed)


def _parts(examples: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for at in range(0, len(examples), AT_A_TIME):
        yield examples[at : at + AT_A_TIME]


def _distances(trainer: Any, model: nn.Module, bare: Any, start: SharedReference, examples: Sequence[Any]) -> Any:
    """Sums of squares: change of hidden states, hidden states, change of logits, logits."""
    batch = trainer._prepare_inputs(trainer.data_collator(examples))
    batch = {key: value for key, value in batch.items() if key not in ("records", "reference_logps")}
    scores = model(**batch, score_labels=True, use_cache=False).scores
    known = carried_over(start, scores) if "rows" in batch else {}
    with start.forward_of(model):
        before = model(**{**batch, **known}, score_labels=True, use_cache=False).scores.hidden
    sums = torch.zeros(4, dtype=torch.float64)
    for now, then in zip(scores.hidden.split(POSITIONS_AT_A_TIME), before.split(POSITIONS_AT_A_TIME), strict=True):
        logits = [bare.head(hidden).float() for hidden in (now, then)]
        z, z_0 = (x - x.mean(-1, keepdim=True) for x in logits)
        terms = (now.float() - then.float(), then.float(), z - z_0, z_0)
        sums += torch.stack([x.square().sum().double().cpu() for x in terms])
    return sums


def _gate(block: nn.Module) -> float | None:
    gates = [p for name, p in block.named_parameters() if name.endswith("gate")]
    with gathered(gates):
        values = [torch.tanh(gate.float()).abs().flatten().cpu() for gate in gates]
    return float(torch.cat(values).mean()) if values else None
