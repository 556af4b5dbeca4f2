"""Runs on a frozen backbone: what they leave behind, what they stand on, and how they are put on one another."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from conftest import succeed
from safetensors.torch import load_file, save_file

from llava.model import checkpoint
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import content_hash, read_connector, read_model_weights, weight_files
from llava.model.delta import read_chain
from llava.train import trainer

HEAD = ["--tune", "lm_head"]
PROJECTOR = ["--tune", "projector"]
LORA = ["--tune", "lora", "--lora_r", 8, "--lora_alpha", 16]
KEEP = ["--save_strategy", "steps", "--save_steps", 1, "--save_total_limit", 5]


@pytest.fixture(autouse=True)
def away_from_home(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


def logits_of(model):
    """Logits of a fixed row with a picture, and of one without."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 1900, (2, 12), generator=random)
    ids[0, 4] = -200
    size = model.get_vision_tower().config.image_size
    inputs = {"input_ids": ids, "images": torch.randn(2, 3, size, size, generator=random)}
    training = model.training
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
    model.train(training)
    return logits


@pytest.fixture
def run(run_script, dpo_flags, tmp_path, golden, monkeypatch):
    """``run(name, *flags, model=...) -> (folder, logits of the model that was trained)``: two steps of train_dpo."""
    trained = []
    original = trainer.save_checkpoint

    def save(model, *args, **kwargs):
        trained.append(logits_of(model))
        original(model, *args, **kwargs)

    monkeypatch.setattr(trainer, "save_checkpoint", save)

    def train(name, *flags, model=golden / "tiny-llava-original"):
        flags = [*dpo_flags, "--max_steps", 2, "--model_name_or_path", model, *flags]
        succeed(run_script("train_dpo", *flags, "--output_dir", tmp_path / name))
        return tmp_path / name, trained[-1]

    return train


@pytest.fixture
def pope(run_script, pope_world, tmp_path):
    """``pope(model, base=None)``: pope_eval.py, answers of one token."""

    def ask(model, base=None):
        flags = ["--model-path", model, *(("--model-base", base) if base else ()), "--max_new_tokens", 1]
        flags += ["--coco_path", pope_world / "coco", "--pope_path", pope_world / "pope", "--set", "random"]
        return run_script("pope_eval", *flags, "--output_dir", tmp_path / "pope")

    return ask


def loads(name, logits, base=None):
    """The model loads, and is the one that was trained; its weights."""
    model = load_pretrained_model(str(name), base and str(base))[1]
    torch.testing.assert_close(logits_of(model), logits, atol=1e-4, rtol=0)
    return model.state_dict()


def card_of(folder):
    return json.loads((folder / "delta.json").read_text())


def names_in(folder):
    return set(load_file(folder / "delta.safetensors"))


def base_hash(folder):
    return content_hash(weight_files(folder))


def other_base(golden, folder):
    """A copy of the recorded model with one number changed."""
    shutil.copytree(golden / "tiny-llava-original", folder)
    shutil.copytree(golden / "tiny-clip", folder.parent / "tiny-clip", dirs_exist_ok=True)
    shard = sorted(folder.glob("pytorch_model-*.bin"))[0]
    state = torch.load(shard, weights_only=True)
    next(iter(state.values())).view(-1)[0] += 1
    torch.save(state, shard)
    return folder


def moved_base(golden, folder):
    shutil.copytree(golden / "tiny-llava-original", folder)
    shutil.copytree(golden / "tiny-clip", folder.parent / "tiny-clip", dirs_exist_ok=True)
    return folder


def refused(result, *parts):
    code, _, err = result
    assert code == 2, err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    for part in parts:
        assert str(part) in line, line


def rewrite(folder, change):
    card = card_of(folder)
    change(card)
    (folder / "delta.json").write_text(json.dumps(card))


# --- what a run leaves behind


def test_a_head_alone_is_kept_and_loads_by_itself(run, golden, tmp_path):
    folder, logits = run("head", *HEAD, *KEEP)
    base = read_model_weights(golden / "tiny-llava-original")
    for place in (folder, folder / "checkpoint-1"):
        assert names_in(place) == {"lm_head.weight"}
        size = base["lm_head.weight"].numel() * 4
        assert size < (place / "delta.safetensors").stat().st_size < size + 1024
        assert not [*place.glob("model*"), *place.glob("pytorch_model*")]
    card = card_of(folder)
    assert card == {
        "format": 1,
        "base": [
            {"path": str(golden / "tiny-llava-original"), "sha256": base_hash(golden / "tiny-llava-original")},
        ],
        "tower": {"path": str(golden / "tiny-clip"), "sha256": base_hash(golden / "tiny-clip")},
        "parts": ["lm_head"],
    }
    after = loads(folder, logits)
    changed = {key for key, value in base.items() if not torch.equal(after[key], value)}
    assert changed == {"lm_head.weight"}
    middle = load_pretrained_model(str(folder / "checkpoint-1"), None)[1].state_dict()
    assert {key for key in middle if not torch.equal(middle[key], after[key])} == {"lm_head.weight"}


def test_every_mixture_names_its_base_and_its_parts(run):
    folder, logits = run("both", "--tune", "projector,lm_head")
    assert card_of(folder)["parts"] == ["lm_head", "projector"]
    loads(folder, logits)
    folder, logits = run("lora", "--tune", "lora,lm_head", "--lora_r", 8)
    assert card_of(folder)["parts"] == ["lm_head", "lora"]
    assert not (folder / "delta.safetensors").exists()
    loads(folder, logits)
    folder, logits = run("tower", "--tune", "lora,vision_tower", "--lora_r", 8)
    assert card_of(folder)["parts"] == ["lora", "vision_tower"]
    loads(folder, logits)
    again, logits = run("head", *HEAD, model=folder)
    loads(again, logits)
    folder, logits = run("lora", *PROJECTOR)  # the same folder: nothing of the last run may stay
    assert card_of(folder)["parts"] == ["projector"]
    assert (folder / "mm_projector.bin").is_file() and not (folder / "adapter_config.json").exists()
    loads(folder, logits)
    folder, logits = run("lora", "--freeze_mm_mlp_adapter", True)
    assert not (folder / "delta.json").exists() and not (folder / "mm_projector.bin").exists()
    loads(folder, logits)


def test_a_new_block_is_kept_and_loads(run, golden):
    folder, logits = run("block", "--tune", "post_block", "--post_block", "mlp")
    assert all(name.startswith("post_block.") for name in names_in(folder))
    assert json.loads((folder / "config.json").read_text())["post_block"]["name"] == "mlp"
    loads(folder, logits)
    again, logits = run("head", *HEAD, model=folder)
    assert names_in(again) == {"lm_head.weight"}
    loads(again, logits)
    with_lora, logits = run("lora", *LORA, model=folder)
    loads(with_lora, logits)


def test_a_block_is_not_changed_by_flags(run, run_script, dpo_flags, tmp_path):
    folder, _ = run("block", "--tune", "post_block", "--post_block", "mlp")
    flags = [*dpo_flags, "--output_dir", tmp_path / "out", "--tune", "post_block"]
    here = ["--model_name_or_path", folder]
    refused(run_script("train_dpo", *flags, *here, "--post_block", "interaction"), "'mlp'", "'interaction'", folder)
    refused(run_script("train_dpo", *flags, *here, "--post_block_config", "x=1"), "without --post_block")
    refused(run_script("train_dpo", *flags), "has no post block to train; pass --post_block")


def test_a_connector_that_was_given_and_does_not_train_is_kept(run_script, pretrain_flags, tmp_path, golden):
    given = golden / "train" / "mm_projector_init.bin"
    flags = [*pretrain_flags, "--pretrain_mm_mlp_adapter", given, *HEAD, "--output_dir", tmp_path / "out"]
    succeed(run_script("train_pretrain", *flags))
    assert card_of(tmp_path / "out")["parts"] == ["lm_head", "projector"]
    after = load_pretrained_model(str(tmp_path / "out"), None)[1].state_dict()
    for key, value in read_connector(given).items():
        assert torch.equal(after[key], value)


# --- what it stands on


def test_a_connector_on_a_language_model_loads_by_itself(run_script, pretrain_flags, tmp_path, golden, pope):
    flags = [*pretrain_flags, "--tune_mm_mlp_adapter", True, "--output_dir", tmp_path / "connector"]
    succeed(run_script("train_pretrain", *flags))
    folder = tmp_path / "connector"
    assert [entry["path"] for entry in card_of(folder)["base"]] == [str(golden / "tiny-vicuna")]
    assert {path.name for path in folder.iterdir()} >= {"mm_projector.bin", "delta.json"}
    alone = load_pretrained_model(str(folder), None)[1]
    with_base = load_pretrained_model(str(folder), str(golden / "tiny-vicuna"))[1]
    (folder / "delta.json").unlink()  # as upstream writes it
    upstreams = load_pretrained_model(str(folder), str(golden / "tiny-vicuna"))[1]
    assert torch.equal(logits_of(alone), logits_of(with_base))
    assert torch.equal(logits_of(alone), logits_of(upstreams))
    refused(pope(folder), "holds only a connector", "--model-base")


def test_another_base_is_refused_with_both_hashes(run, run_script, dpo_flags, golden, tmp_path, pope):
    base = moved_base(golden, tmp_path / "base")
    folder, _ = run("head", *HEAD, model=base)
    was = base_hash(base)
    shutil.rmtree(base)
    other_base(golden, base)
    refused(pope(folder), f"{base} with sha256 {was}", f"{base} now has sha256 {base_hash(base)}", "--model-base")
    result = run_script("train_dpo", *dpo_flags, "--model_name_or_path", folder, "--output_dir", tmp_path / "out")
    refused(result, was, base_hash(base), f"--model_name_or_path BASE,{folder}")
    refused(pope(folder, base), f"--model-base {base} has sha256 {base_hash(base)}", f"with sha256 {was}")
    together = f"{base},{folder}"
    result = run_script("train_dpo", *dpo_flags, "--model_name_or_path", together, "--output_dir", tmp_path / "out")
    refused(result, was, base_hash(base), folder)


def test_a_base_that_moved_is_found_by_flag(run, run_script, dpo_flags, golden, tmp_path, pope):
    base = moved_base(golden, tmp_path / "base")
    projector, _ = run("projector", *PROJECTOR, model=base)
    folder, logits = run("head", *HEAD, model=projector)
    base = base.rename(tmp_path / "elsewhere")
    refused(pope(projector), tmp_path / "base", "is not there", "--model-base")
    result = run_script("train_dpo", *dpo_flags, "--model_name_or_path", projector, "--output_dir", tmp_path / "out")
    refused(result, f"--model_name_or_path BASE,{projector}")
    loads(folder, logits, base)  # also the base of its base
    loads(f"{base},{projector},{folder}", logits)
    again, logits = run("again", *HEAD, "--max_steps", 1, model=f"{base},{projector}")
    loads(again, logits)
    loads(again, logits, base)
    loads(again, logits, base.rename(tmp_path / "a third place"))


def test_a_tower_outside_is_known_by_content_too(run, golden, tmp_path, pope):
    base = moved_base(golden, tmp_path / "base")
    folder, _ = run("head", *HEAD, model=base)
    tower = tmp_path / "tiny-clip"
    was = base_hash(tower)
    state = torch.load(tower / "pytorch_model.bin", weights_only=True)
    next(v for v in state.values() if v.is_floating_point()).view(-1)[0] += 1
    torch.save(state, tower / "pytorch_model.bin")
    refused(pope(folder), "vision tower", was, base_hash(tower))


CARDS = [
    (lambda card: card.update(format=2), "format 2; expected 1"),
    (lambda card: card.pop("parts"), "no key 'parts'"),
    (lambda card: card.update(base=[]), "'base' is empty"),
    (lambda card: card["base"][0].pop("sha256"), "no key 'sha256'"),
]


@pytest.mark.parametrize(("change", "part"), CARDS, ids=["format", "parts", "empty", "sha256"])
def test_a_card_that_cannot_be_used(run, pope, change, part):
    folder, _ = run("head", *HEAD, "--max_steps", 1)
    rewrite(folder, change)
    refused(pope(folder), folder / "delta.json", part)


def test_a_delta_on_itself_is_refused(run, pope):
    folder, _ = run("head", *HEAD, "--max_steps", 1)
    rewrite(folder, lambda card: card["base"][0].update(path=str(folder)))
    refused(pope(folder), folder / "delta.json", "stands on itself")


def test_a_run_does_not_write_over_what_it_starts_from(run, run_script, dpo_flags, tmp_path):
    folder, _ = run("head", *HEAD, *KEEP)
    for model in (folder, folder / "checkpoint-1"):
        flags = [*dpo_flags, *HEAD, "--model_name_or_path", model, "--resume_from_checkpoint", False]
        refused(run_script("train_dpo", *flags, "--output_dir", folder), f"--output_dir {folder}", model)


def test_a_base_of_the_hub_is_recorded_by_its_id(run, golden, monkeypatch, pope):
    fetched = {"org/tiny": str(golden / "tiny-llava-original")}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: fetched.pop(name))
    folder, logits = run("head", *HEAD, model="org/tiny")
    assert card_of(folder)["base"][0]["path"] == "org/tiny"
    fetched["org/tiny"] = str(golden / "tiny-llava-original")
    loads(folder, logits)

    def offline(name, **_):
        raise OSError

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    refused(pope(folder), folder, "org/tiny, which is not there", "--model-base")
    loads(folder, logits, golden / "tiny-llava-original")


def test_a_card_without_its_weights(run, pope):
    folder, _ = run("head", *HEAD, "--max_steps", 1)
    (folder / "delta.safetensors").unlink()
    refused(pope(folder), f"{folder}: delta.json without its weights")


# --- one on another


def test_stages_stack(run, golden):
    projector, _ = run("projector", *PROJECTOR)
    head, logits = run("head", *HEAD, model=projector)
    assert [entry["path"] for entry in card_of(head)["base"]] == [str(projector)]
    assert card_of(head)["base"][0]["sha256"] == read_chain(str(projector), "--model-path").hashes[-1]
    after = loads(head, logits)
    loads(f"{projector},{head}", logits)
    loads(f"{golden / 'tiny-llava-original'},{projector},{head}", logits)
    connector = read_connector(projector / "mm_projector.bin")
    assert all(torch.equal(after[key], value) for key, value in connector.items())


def test_siblings_are_put_together(run, run_script, dpo_flags, golden, pope, tmp_path, capsys):
    projector, _ = run("projector", *PROJECTOR)
    head, _ = run("head", *HEAD)
    both = f"{projector},{head}"
    want = {
        **read_model_weights(golden / "tiny-llava-original"),
        **read_connector(projector / "mm_projector.bin"),
        **load_file(head / "delta.safetensors"),
    }
    for order in (both, f"{head},{projector}"):
        state = load_pretrained_model(order, None)[1].state_dict()
        assert all(torch.equal(state[key], value) for key, value in want.items())
    assert "both bring" not in capsys.readouterr().err
    code, _, err = pope(both)
    assert code == 0, err
    third, logits = run("third", *HEAD, model=both)
    assert [entry["path"] for entry in card_of(third)["base"]] == [str(projector), str(head)]
    after = loads(third, logits)
    assert all(torch.equal(after[key], want[key]) for key in want if key != "lm_head.weight")
    loads(f"{both},{third}", logits)
    refused(pope(f"{projector},{third}"), third, "before it")
    refused(pope(f"{head},{golden / 'tiny-llava-original'}"), "only the first of several")


def test_of_two_siblings_the_last_is_used_and_it_is_said(run, capsys):
    first, _ = run("first", *HEAD)
    last, logits = run("last", *HEAD, "--learning_rate", 1e-2)
    capsys.readouterr()
    loads(f"{first},{last}", logits)
    assert f"note: {last} and {first} both bring lm_head; that of {last} is used" in capsys.readouterr().err


def test_a_lora_below_is_folded_in(run, capsys):
    lora, below = run("lora", *LORA, "--learning_rate", 1e-2)
    head, logits = run("head", *HEAD, model=lora)
    merged = load_pretrained_model(str(lora), None)[1].state_dict()
    after = loads(head, logits)
    differing = {key for key in merged if not torch.equal(merged[key], after[key])}
    assert differing == {"lm_head.weight"}
    again, logits = run("again", *LORA, "--learning_rate", 1e-2, model=head)
    loads(again, logits)
    assert (logits - below).abs().max() > 1e-3


def test_upstreams_lora_is_gone_on_with_on_its_base(run, run_script, dpo_flags, golden, tmp_path):
    base, lora = golden / "tiny-llava-original", golden / "tiny-llava-lora"
    folder, logits = run("head", *HEAD, model=f"{base},{lora}")
    after = loads(folder, logits)
    merged = load_pretrained_model(str(lora), str(base))[1].state_dict()
    assert {key for key in merged if not torch.equal(merged[key], after[key])} == {"lm_head.weight"}
    result = run_script("train_dpo", *dpo_flags, "--model_name_or_path", lora, "--output_dir", tmp_path / "out")
    refused(result, "holds a LoRA adapter", f"--model_name_or_path BASE,{lora}")


def test_a_plan_gives_the_model_its_deltas_stand_on(run, golden, dpo_flags, tmp_path):
    from llava.train.arguments import DPOTrainingArguments, ModelArguments, PreferenceArguments
    from llava.train.build import plan_model
    from llava.train.parsing import parse
    from llava.train.reference_cache import reference_key

    folder, logits = run("lora", *LORA, "--tune", "lora,projector,lm_head")
    flags = [*dpo_flags, "--model_name_or_path", folder, "--output_dir", tmp_path / "out"]
    arguments = parse((ModelArguments, PreferenceArguments, DPOTrainingArguments), [str(flag) for flag in flags])
    plan = plan_model(*arguments, {"lm_head"})
    assert plan.chain.changed == {"lora", "projector", "lm_head"}
    torch.testing.assert_close(logits_of(plan.load()), logits, atol=1e-4, rtol=0)
    base = load_pretrained_model(str(golden / "tiny-llava-original"), None)[1]
    assert torch.equal(logits_of(plan.load_base()), logits_of(base))
    everything = plan.chain.files()
    assert [f for f in everything if f.parent == folder] == [
        folder / "adapter_model.safetensors",
        folder / "non_lora_trainables.bin",
    ]
    assert plan.chain.files({"lora", "projector", "lm_head"}) == plan.chain.root().files()
    start, from_base = (reference_key(plan, "v1", kind) for kind in ("start", "base"))
    assert start["model"] == content_hash(everything) != from_base["model"]
    assert from_base["model"] == content_hash(plan.chain.root().files())


@pytest.mark.slow
def test_stages_stack_under_zero_3(run, golden, tmp_path):
    """A LoRA below is folded into a model that is in one piece, though every other one is partitioned."""
    from test_launch import BIN, ROOT, SMALL, launch

    lora, _ = run("lora", *LORA, "--learning_rate", 1e-2)
    flags = SMALL.format(golden=golden, out=tmp_path / "head", batch=2).split()[6:]  # without its LoRA
    flags = ["--tune", "lm_head,projector", "--deepspeed", ROOT / "zero_configs" / "zero3.json", *flags]
    command = [BIN / "deepspeed", "--num_gpus", 2, "--master_port", 29883, "train_dpo.py", *flags]
    launch(*command, "--model_name_or_path", lora, "--max_steps", 1)
    below = load_pretrained_model(str(lora), None)[1].state_dict()
    after = load_pretrained_model(str(tmp_path / "head"), None)[1].state_dict()
    differing = {key for key in below if not torch.equal(below[key], after[key])}
    assert differing == {"lm_head.weight", *(key for key in below if "mm_projector" in key)}


# --- tied embeddings


@pytest.fixture
def tied(golden, tmp_path):
    """The recorded model with its head tied to the embeddings."""
    folder = moved_base(golden, tmp_path / "tied")
    state = read_model_weights(folder)
    state.pop("lm_head.weight")
    for file in folder.glob("pytorch_model*"):
        file.unlink()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    return folder


def test_a_head_that_trains_is_parted_from_the_embeddings(run, run_script, dpo_flags, tied, tmp_path):
    flags = [*dpo_flags, *HEAD, "--model_name_or_path", tied, "--max_steps", 2, "--output_dir", tmp_path / "said"]
    code, _, err = run_script("train_dpo", *flags)
    assert code == 0 and err.count("note: ") == 1 and "parted from the embeddings" in err
    folder, logits = run("head", *HEAD, model=tied)
    assert names_in(folder) == {"lm_head.weight"}
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    after = loads(folder, logits)
    embeddings = read_model_weights(tied)["model.embed_tokens.weight"]
    assert torch.equal(after["model.embed_tokens.weight"], embeddings)
    assert not torch.equal(after["lm_head.weight"], embeddings)
    projector, _ = run("projector", *PROJECTOR, model=tied)
    for order in (f"{folder},{projector}", f"{projector},{folder}"):  # the head stays parted
        state = load_pretrained_model(order, None)[1].state_dict()
        assert torch.equal(state["lm_head.weight"], after["lm_head.weight"])
        assert torch.equal(state["model.embed_tokens.weight"], embeddings)
    stacked, logits = run("stacked", *LORA, model=folder)
    loads(stacked, logits)


def test_tied_embeddings_do_not_train_without_the_head(run_script, dpo_flags, tied, tmp_path):
    flags = [*dpo_flags, "--tune", "backbone", "--model_name_or_path", tied, "--output_dir", tmp_path / "out"]
    refused(run_script("train_dpo", *flags), "tie_word_embeddings", tied)


# --- going on


BLOCK = ["--tune", "post_block,lm_head", "--post_block", "mlp"]


@pytest.mark.parametrize("flags", [HEAD, PROJECTOR, BLOCK, ["--tune", "lora,lm_head"]], ids=lambda flags: flags[1])
def test_a_run_goes_on_from_a_delta(run, tmp_path, flags):
    flags = [*flags, *KEEP]
    whole, logits = run("whole", *flags)
    shutil.copytree(whole / "checkpoint-1", tmp_path / "killed" / "checkpoint-1")
    shutil.copy(whole / "run.json", tmp_path / "killed")
    killed, again = run("killed", *flags)
    torch.testing.assert_close(again, logits, atol=1e-6, rtol=0)
    loads(killed, logits)


# --- hashes


def test_a_large_files_hash_is_remembered(monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoint, "WORTH_REMEMBERING", 4)
    read = []
    original = checkpoint.sha256
    monkeypatch.setattr(checkpoint, "sha256", lambda path: read.append(path) or original(path))
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")

    def hashed():
        checkpoint._hash_once.cache_clear()  # as another process
        return content_hash([file])

    first = hashed()
    assert hashed() == first and len(read) == 1
    memo = tmp_path / "xdg" / "llava" / "sha256.json"
    assert list(json.loads(memo.read_text())) == [str(file)]
    memo.write_text("{")
    assert hashed() == first and len(read) == 2
    file.write_bytes(b"WEIGHTS")
    os.utime(file, ns=(0, 0))
    assert hashed() != first
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))  # no folder can be made there
    assert hashed() != first


def test_the_hubs_name_of_a_file_is_its_hash(monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoint, "sha256", lambda path: pytest.fail("it was read"))
    blob = tmp_path / "blobs" / ("ab" * 32)
    blob.parent.mkdir()
    blob.write_bytes(b"weights")
    link = tmp_path / "snapshots" / "model.safetensors"
    link.parent.mkdir()
    link.symlink_to(blob)
    assert checkpoint._file_hash(link) == "ab" * 32
