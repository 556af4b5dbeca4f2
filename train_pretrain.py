#!/usr/bin/env python
"""Supervised training of a LLaVA: connector pre-training, instruction tuning, LoRA.

    deepspeed train_pretrain.py --deepspeed zero_configs/zero2.json --version plain --tune_mm_mlp_adapter True \
        --model_name_or_path lmsys/vicuna-7b-v1.5 --vision_tower openai/clip-vit-large-patch14-336 \
        --data_path chat.json --image_folder images --output_dir checkpoints/pretrain

A language model with ``--vision_tower`` becomes a new LLaVA; a LLaVA checkpoint is gone on with. Runs the same under
plain ``python``, ``torchrun`` and ``deepspeed``, with and without a GPU.
"""

from __future__ import annotations

from llava.errors import command_line
from llava.train.launch import prepare_processes


@command_line
def main() -> None:
    prepare_processes()
    from transformers import set_seed

    from llava.data.mixture import Mixture, open_records
    from llava.distributed import read_world, say_device
    from llava.run_card import RunCard
    from llava.status import Status
    from llava.train.arguments import CaptionArguments, ModelArguments, PretrainTrainingArguments
    from llava.train.build import check_resumed, collator, example_builder, plan_model
    from llava.train.caches import cache_times, feature_folder
    from llava.train.checkpoints import checkpoint_to_resume
    from llava.train.hidden_cache import hidden_cache
    from llava.train.parsing import as_dict, parse
    from llava.train.reference import SharedReference
    from llava.train.sampler import samples_of_whole_steps
    from llava.train.trainable import choose_parts, put_lora, switch_on, table
    from llava.train.trainer import LlavaTrainer

    model_args, data_args, train_args = parse((ModelArguments, CaptionArguments, PretrainTrainingArguments))
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
    rest = (data_args.image_folder, builder, data_args.skip_missing_images, train_args.seed)
    captions = open_records(data_args.data_path, *rest)
    held_out = open_records(data_args.eval_data_path, *rest) if data_args.eval_data_path else None
    if train_args.upstream_order:
        samples_of_whole_steps(len(captions), train_args)  # batches left over are refused here
    if first:
        for data in (captions, held_out):
            if isinstance(data, Mixture):
                print(data.table())
        count = f"{len(captions)} records" + (f", {len(held_out)} held out" if held_out else "")
        print(f"{count}, in template {model_args.version}")
    files = [*captions.files, *(held_out.files if held_out else ())]
    card = RunCard(train_args.output_dir, arguments, files, train_args.seed)

    say_device(read_world(), train_args.device.type == "cuda")
    set_seed(train_args.seed)
    model = plan.load()
    if "lora" in parts:
        model = put_lora(model, train_args)
    start = SharedReference(model, {"post_block"}) if "post_block" in parts else None
    switch_on(model, parts)
    if first:
        card.begin(resumed=checkpoint is not None)
        print(table(model, train_args), flush=True)

    status = Status(train_args.output_dir, "train_pretrain.py", "records", train_args.world_size, writer=first)
    trainer = LlavaTrainer(
        model,
        train_args,
        parts,
        captions,
        held_out,
        collate,
        plan.tokenizer,
        plan.image_processor,
        features,
        hidden,
        start,
    )
    card.content["caches"] = cache_times(trainer)
    trainer.go(card, status, checkpoint)


if __name__ == "__main__":
    main()
