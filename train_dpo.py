#!/usr/bin/env python
"""Preference optimisation of a LLaVA: HA-DPO's data and flags, or your own pairs.

    deepspeed train_dpo.py --deepspeed zero_configs/zero3.json --lora_enable True --model_name_or_path ... \
        --vg_path ... --desc_data_path ... --pope_data_path ... --output_dir checkpoints/ha-dpo --beta 0.1

Runs the same under plain ``python``, ``torchrun`` and ``deepspeed``, with and without a GPU.
"""

from __future__ import annotations

from pathlib import Path

from llava.errors import command_line
from llava.train.launch import prepare_processes


@command_line
def main() -> None:
    prepare_processes()
    from transformers import set_seed

    from llava.data.preferences import PreferencePairs, read_preferences
    from llava.run_card import RunCard
    from llava.train.arguments import DPOTrainingArguments, ModelArguments, PreferenceArguments, as_dict, parse
    from llava.train.build import check_resumed, collator, example_builder, plan_model
    from llava.train.caches import feature_folder
    from llava.train.reference import choose_reference
    from llava.train.reference_cache import ReferenceCache, reference_key
    from llava.train.trainable import add_lora, choose_parts, switch_on, table
    from llava.train.trainer import DPOTrainer, checkpoint_to_resume

    model_args, data_args, train_args = parse((ModelArguments, PreferenceArguments, DPOTrainingArguments))
    parts = choose_parts(model_args, train_args)
    arguments = as_dict(model_args, data_args, train_args)
    checkpoint = checkpoint_to_resume(train_args)
    check_resumed(checkpoint, arguments)
    first = train_args.process_index == 0

    # Everything a user can have got wrong is found here, before gigabytes are read.
    plan = plan_model(model_args, data_args, train_args, parts)
    builder = example_builder(plan, model_args.version)
    train_pairs, eval_pairs = read_preferences(data_args)
    pairs = PreferencePairs(train_pairs, builder, data_args.skip_missing_images)
    held_out = PreferencePairs(eval_pairs, builder, data_args.skip_missing_images) if eval_pairs else None
    if first:
        print(f"{len(pairs)} pairs" + (f", {len(held_out)} held out" if held_out else ""))
    data_files = (data_args.desc_data_path, data_args.pope_data_path, data_args.data_path, data_args.eval_data_path)
    card = RunCard(train_args.output_dir, arguments, data_files, train_args.seed)

    set_seed(train_args.seed)
    policy = plan.load()
    if "lora" in parts:
        policy = add_lora(policy, train_args)
    reference = choose_reference(policy, parts, plan.load, train_args.reference)
    cache = None
    if train_args.reference == "cache":
        folder = Path(train_args.output_dir).absolute().parent / "reference_cache"
        cache = ReferenceCache(train_args.reference_cache, folder, reference_key(plan, model_args.version))
    switch_on(policy, parts)
    if first:
        card.write(resumed=checkpoint is not None)
        print(table(policy, train_args.learning_rate, train_args.mm_projector_lr), flush=True)

    trainer = DPOTrainer(
        policy,
        train_args,
        parts,
        pairs,
        held_out,
        collator(plan, builder, train_args),
        plan.tokenizer,
        plan.image_processor,
        feature_folder(train_args.feature_cache, plan, parts),
        reference=reference,
        beta=train_args.beta,
        cache=cache,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.finish(card)


if __name__ == "__main__":
    main()
