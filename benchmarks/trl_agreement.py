#!/usr/bin/env python
"""Our preference losses and whole runs of training against TRL's, number by number.

    python benchmarks/trl_agreement.py

Losses: TRL's own loss on drawn log-probabilities, in float64, with gradients. Runs: ten steps of ``train_dpo.py`` and
of TRL's trainer on the tests' tiny LLaVA and pairs, same weights, same tokens, each side with its own preparation of
pictures, in float32; the losses of all steps are compared, as a share of max(1, loss). ``--record`` writes TRL's
numbers for the tests. Needs requirements-bench.txt.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.duel import LOSS_TOLERANCE
from benchmarks.examples import hf_batch
from benchmarks.models import Geometry, common_name, fill_adapter, lora_config
from llava.files import read_object, write_json
from llava.train import trainable
from llava.train.losses import Pairs, preference_loss

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
RECORDINGS = GOLDEN / "trl"
DRAWN_TOLERANCE = 1e-6  # of the loss, and of the largest gradient
STEPS = 10
PAIRS = 4  # a step
LORA_R, LORA_ALPHA = 8, 16

MODEL, TOWER = GOLDEN / "tiny-llava-original", GOLDEN / "tiny-clip"
ROWS = Geometry(vocab_size=2000, image_size=56, patch_size=14)  # what of the model decides its rows


class Objective(NamedTuple):
    """What both sides minimise."""

    loss_type: tuple[str, ...] = ("sigmoid",)
    loss_weights: tuple[float, ...] = (1.0,)
    beta: float = 0.1
    label_smoothing: float = 0.0


class Run(NamedTuple):
    """Training of these parts (``--tune``)."""

    objective: Objective
    tune: str = "lora"


BETAS = (0.01, 0.1, 0.5, 1.0)
OBJECTIVES = [
    *(Objective((name,), beta=beta) for name in ("sigmoid", "hinge", "ipo", "sigmoid_norm") for beta in BETAS),
    *(Objective(("robust",), beta=beta, label_smoothing=wrong) for beta in (0.1, 0.5) for wrong in (0.0, 0.1, 0.4)),
    Objective(("sft",)),
    Objective(("sigmoid", "sft"), (1.0, 0.5)),
    Objective(("ipo", "hinge", "robust", "sigmoid_norm", "sft"), (0.3, 2.0, 0.7, 1.0, 0.1), 0.2, 0.2),
]
RUNS = {
    "LoRA, sigmoid": Run(Objective()),
    "LoRA, ipo": Run(Objective(("ipo",))),
    "LoRA, hinge": Run(Objective(("hinge",))),
    "LoRA, sigmoid_norm": Run(Objective(("sigmoid_norm",))),
    "LoRA, robust": Run(Objective(("robust",), label_smoothing=0.1)),
    "LoRA, sigmoid + 0.5 sft": Run(Objective(("sigmoid", "sft"), (1.0, 0.5))),
    "lm_head, ipo + 0.1 sft": Run(Objective(("ipo", "sft"), (1.0, 0.1)), "lm_head"),
    "language model, sigmoid": Run(Objective(), "backbone,lm_head"),
}


def draw(pairs: int = 6, seed: int = 0) -> dict[str, torch.Tensor]:
    """TRL's batch (2 B, L): random answers behind a prompt of 3 tokens, chosen ones first, and scores of all tokens.

    ``log_probs`` (2 B, L - 1) are the policy's, in float64 and zero outside answers; ``reference`` (2 B,) are sums.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 10, (2 * pairs,), generator=generator)
    at = torch.arange(3 + int(lengths.max()))
    mask = ((at >= 3) & (at < 3 + lengths[:, None])).long()
    shape = (2 * pairs, len(at) - 1)
    reference = -4 * torch.rand(shape, generator=generator, dtype=torch.float64) * mask[:, 1:]
    moved = reference + torch.randn(shape, generator=generator, dtype=torch.float64) * mask[:, 1:]
    return {"completion_mask": mask, "log_probs": moved, "reference": reference.sum(1)}


class Scored(NamedTuple):
    """A loss and its gradient by the log-probabilities of the answers, (2 B,): chosen and then rejected ones."""

    loss: float
    gradients: list[float]


def trl_loss(objective: Objective, drawn: dict[str, torch.Tensor]) -> Scored:
    """By ``DPOTrainer._compute_loss`` of a trainer with a model that says what was drawn."""
    from trl import DPOTrainer

    mask, log_probs = drawn["completion_mask"], drawn["log_probs"].clone().requires_grad_()
    zeros = torch.zeros_like(drawn["log_probs"])
    said = SimpleNamespace(log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())

    def model(**_: Any) -> SimpleNamespace:
        return said

    model.training = True
    trainer = SimpleNamespace(
        model=model,
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        loss_types=objective.loss_type,
        loss_weights=objective.loss_weights,
        beta=objective.beta,
        label_smoothing=objective.label_smoothing,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        ld_alpha=None,
        use_weighting=False,
        aux_loss_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    chosen, rejected = drawn["reference"].chunk(2)
    inputs = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask}
    loss = DPOTrainer._compute_loss(
        trainer, model, {**inputs, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}, False
    )
    loss.backward()
    first = log_probs.grad[:, 2]  # an answer's first token; its others have the same gradient, that of their sum
    return Scored(loss.item(), first.tolist())


def our_loss(objective: Objective, drawn: dict[str, torch.Tensor]) -> Scored:
    """By ``llava.train.losses``."""
    policy = drawn["log_probs"].sum(1).requires_grad_()
    counts = drawn["completion_mask"].sum(1)
    rows = (*policy.chunk(2), *drawn["reference"].chunk(2), *counts.chunk(2))
    pairs = Pairs(*rows, objective.beta, objective.label_smoothing)
    loss = preference_loss(pairs, objective.loss_type, objective.loss_weights).loss
    loss.backward()
    return Scored(loss.item(), policy.grad.tolist())


def apart(mine: Scored, other: Scored) -> float:
    """How far losses are apart, as a share of theirs, or gradients, as a share of the largest: the larger one."""
    gradients = max(abs(a - b) for a, b in zip(mine.gradients, other.gradients, strict=True))
    return max(abs(mine.loss - other.loss) / abs(other.loss), gradients / max(map(abs, other.gradients)))


def our_flags(run: Run, output_dir: Path) -> list[str]:
    """Of ``train_dpo.py``."""
    objective = run.objective
    flags = {
        "model_name_or_path": MODEL,
        "vg_path": GOLDEN / "mini_vg",
        "desc_data_path": GOLDEN / "hadpo_data" / "desc_data.json",
        "pope_data_path": GOLDEN / "hadpo_data" / "pope_data.json",
        "image_aspect_ratio": "pad",
        "model_max_length": 2048,
        "output_dir": output_dir,
        "tune": run.tune,
        **({"lora_r": LORA_R, "lora_alpha": LORA_ALPHA} if run.tune == "lora" else {}),
        "loss_type": " ".join(objective.loss_type),
        "loss_weights": " ".join(map(str, objective.loss_weights)),
        "beta": objective.beta,
        **({"label_smoothing": objective.label_smoothing} if objective.label_smoothing else {}),
        "gradient_checkpointing": False,
        "save_strategy": "no",
        **{key: value for key, value in LOOP.items() if key != "use_cpu"},
    }
    return [word for key, value in flags.items() for word in (f"--{key}", *str(value).split(" "))]


# The training loop of both sides.
LOOP = {
    "per_device_train_batch_size": PAIRS,
    "gradient_accumulation_steps": 1,
    "max_steps": STEPS,
    "train_sampling_strategy": "sequential",
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "optim": "adamw_torch",
    "logging_steps": 1,
    "report_to": "none",
    "use_cpu": True,
}


@contextlib.contextmanager
def same_adapter() -> Iterator[None]:
    """LoRAs of our trainer start where TRL's does, away from zero."""
    add_lora = trainable.add_lora

    def add(*args: Any) -> Any:
        model = add_lora(*args)
        fill_adapter(model)
        return model

    with mock.patch.object(trainable, "add_lora", add):
        yield


def losses_of(log: list[dict[str, Any]]) -> list[float]:
    """Of every step, from a trainer's log."""
    return [entry["loss"] for entry in log if "loss" in entry]


def our_run(run: Run) -> list[float]:
    """Losses of ``train_dpo.py``'s steps."""
    import train_dpo

    with tempfile.TemporaryDirectory() as folder:
        argv = ["train_dpo.py", *our_flags(run, Path(folder))]
        with same_adapter(), mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(sys.stderr):
            train_dpo.main()
        return losses_of(json.loads((Path(folder) / "trainer_state.json").read_text())["log_history"])


def trl_run(run: Run) -> list[float]:
    """Losses of the steps of TRL's ``DPOTrainer``; its batches are made of our tokens and of its own pictures."""
    from datasets import Dataset
    from transformers import LlavaProcessor
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
    from trl import DPOConfig, DPOTrainer

    pairs = our_pairs()
    pictures = LlavaImageProcessorPil.from_pretrained(TOWER, do_pad=True)
    numbers = [str(number) for number in range(len(pairs))]
    objective = run.objective
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        args = DPOConfig(
            output_dir=folder,
            beta=objective.beta,
            loss_type=list(objective.loss_type),
            loss_weights=list(objective.loss_weights),
            label_smoothing=objective.label_smoothing,
            max_length=None,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            disable_tqdm=True,
            **LOOP,
        )
        model = transformers_model()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable.part_of(common_name(name)) in run.tune.split(","))
        lora = run.tune == "lora"
        trainer = DPOTrainer(
            model=model,
            ref_model=None if lora else transformers_model(),
            args=args,
            data_collator=lambda rows: trl_batch(pairs, [int(row["prompt"]) for row in rows], pictures),
            train_dataset=Dataset.from_dict(dict.fromkeys(("images", "prompt", "chosen", "rejected"), numbers)),
            processing_class=LlavaProcessor(pictures, pairs.builder.tokenizer, patch_size=ROWS.patch_size),
            peft_config=lora_config(LORA_R, LORA_ALPHA) if lora else None,
        )
        if lora:
            fill_adapter(trainer.model)
        trainer.train()
        return losses_of(trainer.state.log_history)


def our_pairs() -> Any:
    """The pairs that ``train_dpo.py`` trains on."""
    from llava.data.preferences import PreferencePairs, read_preferences
    from llava.train.arguments import DPOTrainingArguments, ModelArguments, PreferenceArguments
    from llava.train.build import example_builder, plan_model
    from llava.train.parsing import parse

    flags = our_flags(Run(Objective()), Path(tempfile.gettempdir()) / "nothing-is-written")
    model_args, data_args, train_args = parse((ModelArguments, PreferenceArguments, DPOTrainingArguments), flags)
    plan = plan_model(model_args, data_args, train_args, {"lora"})
    return PreferencePairs(read_preferences(data_args)[0], example_builder(plan, model_args.version))


def trl_batch(pairs: Any, numbers: list[int], pictures: Any) -> dict[str, torch.Tensor]:
    """TRL's batch of these pairs; pictures are opened and prepared by transformers."""
    from PIL import Image

    examples = []
    for number in numbers:
        pair = pairs.outline(number)
        images = {
            path: pictures(images=Image.open(path).convert("RGB"), return_tensors="pt")["pixel_values"][0]
            for path in pair.chosen.image_paths
        }
        chosen, rejected = (side._replace(images=images) for side in (pair.chosen, pair.rejected))
        if ROWS.image_token in chosen.input_ids + rejected.input_ids:
            raise RuntimeError(f"pair {number} holds the id that stands for a picture, {ROWS.image_token}")
        examples.append(pair._replace(chosen=chosen, rejected=rejected))
    batch = hf_batch(examples, ROWS)
    batch["completion_mask"] = (batch.pop("labels") != -100).long()
    return batch


@torch.no_grad()
def transformers_model() -> Any:
    """The tests' model as ``LlavaForConditionalGeneration``."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    from llava.model.builder import load_pretrained_model

    settings = read_object(MODEL / "config.json")
    config = LlavaConfig(
        vision_config=CLIPVisionConfig.from_pretrained(TOWER),
        text_config=LlamaConfig(**{k: v for k, v in settings.items() if k in LlamaConfig().to_dict()}),
        image_token_id=ROWS.image_token,
        vision_feature_layer=settings["mm_vision_select_layer"],
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    ours = dict(load_pretrained_model(str(MODEL), None)[1].named_parameters())
    model = LlavaForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        parameter.copy_(ours[common_name(name)])
    return model


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help=f"write TRL's numbers to {RECORDINGS.relative_to(ROOT)}")
    args = parser.parse_args()
    drawn = draw()
    by_trl = [trl_loss(objective, drawn) for objective in OBJECTIVES]
    losses = max(apart(our_loss(o, drawn), other) for o, other in zip(OBJECTIVES, by_trl, strict=True))
    rows = [(f"{len(OBJECTIVES)} losses of drawn log-probabilities, with gradients", losses, DRAWN_TOLERANCE)]
    trajectories = {name: trl_run(run) for name, run in RUNS.items()}
    for name, run in RUNS.items():
        steps = zip(our_run(run), trajectories[name], strict=True)
        rows.append((f"{STEPS} steps: {name}", max(abs(a - b) / max(1, abs(b)) for a, b in steps), LOSS_TOLERANCE))
    print(f"| against TRL {version('trl')} | largest difference | allowed | agrees |\n|---|---:|---:|---|")
    for what, difference, allowed in rows:
        print(f"| {what} | {difference:.1e} | {allowed:g} | {'yes' if difference <= allowed else 'NO'} |")
    if args.record:
        record(drawn, by_trl, trajectories)
    return 0 if all(difference <= allowed for _, difference, allowed in rows) else 1


def record(drawn: dict[str, torch.Tensor], by_trl: list[Scored], trajectories: dict[str, list[float]]) -> None:
    """TRL's numbers, for the tests."""
    versions = {name: version(name) for name in ("trl", "transformers", "peft", "torch")}
    RECORDINGS.mkdir(exist_ok=True)
    inputs = {
        "policy": drawn["log_probs"].sum(1).tolist(),
        "reference": drawn["reference"].tolist(),
        "counts": drawn["completion_mask"].sum(1).tolist(),
    }
    cases = [{**o._asdict(), **scored._asdict()} for o, scored in zip(OBJECTIVES, by_trl, strict=True)]
    write_json(RECORDINGS / "losses.json", {"versions": versions, "inputs": inputs, "cases": cases})
    write_json(RECORDINGS / "trajectory.json", {"versions": versions, "losses": trajectories})


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
