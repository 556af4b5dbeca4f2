#!/usr/bin/env python
"""Preference optimisation of a LLaVA: HA-DPO's data and flags, or your own pairs.

    deepspeed train_dpo.py --deepspeed zero_configs/zero3.json --lora_enable True --model_name_or_path ... \
        --vg_path ... --desc_data_path ... --pope_data_path ... --output_dir checkpoints/ha-dpo --beta 0.1

Runs the same under plain ``python``, ``torchrun`` and ``deepspeed``, with and without a GPU.
"""

from __future__ import annotations

from llava.errors import command_line
from llava.train.launch import prepare_processes


@command_line
def main() -> None:
    prepare_processes()
    from transformers import set_seed

    from llava.data.captions import Captions
    from llava.data.preferences import PreferencePairs, read_preferences
    from llava.distributed import read_world, say_device
    from llava.run_card import RunCard
    from llava.status import Status
    from llava.train.arguments import DPOTrainingArguments, ModelArguments, PreferenceArguments
    from llava.train.build import check_resumed, collator, example_builder, plan_model
    from llava.train.caches import cache_times, feature_folder
    from llava.train.checkpoints import checkpoint_to_resume
    from llava.train.hidden_cache import hidden_cache
    from llava.train.parsing import as_dict, parse
    from llava.train.reference import SharedReference, choose_reference
    from llava.train.reference_cache import chosen_cache
    from llava.train.sampler import samples_of_whole_steps
    from llava.train.trainable import choose_parts, put_lora, switch_on, table
    from llava.train.trainer import DPOTrainer

    model_args, data_args, train_args = parse((ModelArguments, PreferenceArguments, DPOTrainingArguments))
    parts = choose_parts(model_args, train_args)
    arguments = as_dict(model_args, data_args, train_args)
    checkpoint = checkpoint_to_resume(train_args)
    check_resumed(checkpoint, arguments, model_args)
    first = train_args.process_index == 0

    # Everything a user can have got wrong is found here, before gigabytes are read.
    plan = plan_model(model_args, data_args, train_args, parts)
    arguments["version"] = model_args.version  # as the plan has settled it
    builder = example_builder(plan, model_args.version)
    collate = collator(plan, builder, train_args)
    features = feature_folder(train_args.feature_cache, plan, parts)
    hidden = hidden_cache(train_args, plan, parts, model_args.version)
    cache = chosen_cache(train_args, plan, model_args.version)
    train_pairs, eval_pairs = read_preferences(data_args)
    pairs = PreferencePairs(train_pairs, builder, data_args.skip_missing_images)
    held_out = PreferencePairs(eval_pairs, builder, data_args.skip_missing_images) if eval_pairs else None
    if data_args.aux_data:
        aux = Captions(data_args.aux_data, data_args.image_folder, builder, data_args.skip_missing_images)
        pairs.bring(aux, train_args.seed)
    if train_args.upstream_order:
        samples_of_whole_steps(len(pairs), train_args)  # batches left over are refused here
    if first:
        counts = f"{len(pairs)} pairs, {len(held_out or ())} held out, {len(pairs.aux or ())} records for --aux_data"
        print(f"{counts}, in template {model_args.version}")
    card = RunCard(train_args.output_dir, arguments, data_args.files, train_args.seed)

    say_device(read_world(), train_args.device.type == "cuda")
    set_seed(train_args.seed)
    policy = plan.load()
    if "lora" in parts:
        policy = put_lora(policy, train_args)
    reference = choose_reference(
        policy, parts, plan, train_args.reference, train_args.reference_from, train_args.hadpo_compat
    )
    start = SharedReference(policy, {"post_block"}) if "post_block" in parts else None
    switch_on(policy, parts)
    if first:
        card.begin(resumed=checkpoint is not None)
        print(table(policy, train_args))
        print(f"reference: {reference.what} (--reference_from {train_args.reference_from})", flush=True)

    status = Status(train_args.output_dir, "train_dpo.py", "pairs", train_args.world_size, writer=first)
    trainer = DPOTrainer(
        policy,
        train_args,
        parts,
        pairs,
        held_out,
        collate,
        plan.tokenizer,
        plan.image_processor,
        features,
        hidden,
        start,
        reference=reference,
        beta=train_args.beta,
        loss_type=train_args.loss_type,
        loss_weights=train_args.loss_weights,
        label_smoothing=train_args.label_smoothing,
        cache=cache,
        aux_weight=train_args.aux_weight,
    )
    card.content["caches"] = cache_times(trainer)
    trainer.go(card, status, checkpoint)


if __name__ == "__main__":
    main()
