"""A language-model loss beside DPO's: the same forward, the pairs' own numbers untouched."""

from __future__ import annotations

import json
import math

import pytest
import torch
from conftest import logs_of, losses_of, succeed

from llava.conversation import template
from llava.data.captions import Captions
from llava.data.collate import Collator, Example, PackingCollator, PreferenceExample
from llava.data.examples import ExampleBuilder
from llava.data.images import ImageLoader
from llava.data.preferences import PreferencePairs, read_own_pairs
from llava.files import sha256
from llava.model import llava_arch
from llava.train import reference

PAIRED = ("rewards/chosen", "rewards/margins", "logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected")
LORA = ("--lora_enable", True, "--lora_r", 8)


@pytest.fixture
def aux(tmp_path, golden):
    """Five conversations, two of them without a picture."""
    records = json.loads((golden / "pretrain_data.json").read_text())[:5]
    for record in records[::3]:
        del record["image"]
        record["conversations"][0]["value"] = "What is it?"
    file = tmp_path / "aux.json"
    file.write_text(json.dumps(records))
    return ("--aux_data", file, "--image_folder", golden / "mini_vg")


@pytest.fixture
def run(run_script, dpo_flags, tmp_path):
    """``run(name, *flags)``: train_dpo on the recorded pairs; the folder it wrote and what it said."""

    def start(name, *flags):
        flags = [*dpo_flags, *flags, "--output_dir", tmp_path / name]
        return tmp_path / name, succeed(run_script("train_dpo", *flags))

    return start


def first(folder):
    return next(log for log in logs_of(folder) if "loss" in log)


def order(count, seed=42):
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("flags", [(), ("--prefix_sharing", False)], ids=["trees", "rows"])
def test_the_loss_is_dpos_and_the_weighted_loss_of_the_conversations(run, aux, loaded, golden, flags):
    weight = ("--aux_weight", 0.25, "--per_device_train_batch_size", 12)
    folder, said = run("out", *LORA, *aux, *weight, *flags)
    assert "12 pairs, 0 held out, 5 records for --aux_data" in said
    # All pairs are in the one batch: which records they bring is known.
    tokenizer, model, processor = loaded
    loader = ImageLoader(processor, "pad")
    builder = ExampleBuilder(tokenizer, template("v1"), loader, 16, max_length=2048, vocab_size=2000)
    captions = Captions(str(aux[1]), str(aux[3]), builder)
    brought = [captions[order(5)[number % 5]] for number in range(12)]
    batch = Collator(0, 2048, loader.blank, loader.levels())(brought)
    with torch.no_grad():
        wanted = model(**batch, score_labels=True, use_cache=False).loss.item()
    assert first(folder)["aux_loss"] == pytest.approx(wanted, abs=1e-4)
    assert first(folder)["loss"] == pytest.approx(math.log(2) + 0.25 * wanted, abs=1e-4)
    card = json.loads((folder / "run.json").read_text())
    assert card["data"][str(aux[1])]["sha256"] == sha256(aux[1])


@pytest.mark.parametrize("flags", [LORA, ("--tune", "lm_head"), ("--tune", "projector"), ("--reference", "copy")])
def test_the_pairs_numbers_stay_and_the_conversations_are_learnt(run, aux, flags):
    plain, _ = run("plain", *flags)
    folder, _ = run("out", *flags, *aux, "--num_train_epochs", 4)
    one, other = first(folder), first(plain)
    assert [one[name] for name in PAIRED] == pytest.approx([other[name] for name in PAIRED], rel=1e-4, abs=1e-4)
    assert abs(one["grad_norm"] - other["grad_norm"]) > 1e-2 * other["grad_norm"]
    learnt = [log["aux_loss"] for log in logs_of(folder) if "loss" in log]
    assert learnt[-1] < learnt[0]


def test_the_reference_is_asked_about_the_pairs_alone(run, aux, monkeypatch):
    asked = []
    score = llava_arch.LlavaMetaForCausalLM._score_trees

    def watch(self, rows, *args):
        asked.append((len(rows["label_counts"]), torch.is_grad_enabled()))
        return score(self, rows, *args)

    monkeypatch.setattr(llava_arch.LlavaMetaForCausalLM, "_score_trees", watch)
    run("out", *LORA, *aux)
    assert asked == 3 * [(12, True), (8, False)]


def test_a_kept_reference_knows_nothing_of_the_conversations(run, aux, tmp_path, monkeypatch):
    count = []
    forward_of = reference.SharedReference.forward_of
    monkeypatch.setattr(
        reference.SharedReference, "forward_of", lambda self, policy: count.append(1) or forward_of(self, policy)
    )
    cache = ("--reference", "cache", "--reference_cache", tmp_path / "reference.jsonl")
    plain, _ = run("plain", *LORA, *aux)
    count.clear()
    filled, _ = run("filled", *LORA, *aux, *cache)
    assert len(count) == 2  # eight distinct pairs, four at a time
    text = (tmp_path / "reference.jsonl").read_text()
    without, _ = run("without", *LORA, *cache)
    assert len(count) == 2 and (tmp_path / "reference.jsonl").read_text() == text
    assert losses_of(filled) == pytest.approx(losses_of(plain), abs=1e-5)
    assert losses_of(without) != pytest.approx(losses_of(plain), abs=1e-2)


@pytest.mark.parametrize("tune", [("--tune", "lm_head"), ("--tune", "post_block", "--post_block", "interaction")])
def test_conversations_go_with_kept_hidden_states_features_and_workers(run, aux, tmp_path, tune, monkeypatch):
    flags = (*tune, *aux, "--num_train_epochs", 2)
    plain, _ = run("plain", *flags)
    hidden = ("--cache_hidden", tmp_path / "hidden", "--feature_cache", tmp_path / "features")
    filled, said = run("filled", *flags, *hidden, "--dataloader_num_workers", 1)
    assert "hidden states: 13 records need about" in said
    ran = []
    layers = llava_arch.run_layers
    monkeypatch.setattr(llava_arch, "run_layers", lambda *a, **k: ran.append(1) or layers(*a, **k))
    monkeypatch.setattr("llava.train.trainer.report", lambda *_: None)
    again, _ = run("again", *flags, *hidden, "--reference", "cache")
    assert not ran
    for folder in (filled, again):
        assert losses_of(folder) == pytest.approx(losses_of(plain), abs=1e-5)
        wanted = [log["aux_loss"] for log in logs_of(plain) if "loss" in log]
        assert [log["aux_loss"] for log in logs_of(folder) if "loss" in log] == pytest.approx(wanted, abs=1e-4)


def test_held_out_pairs_bring_none(run, aux, golden, tmp_path):
    row = {"image": str(golden / "images" / "a_wide_97x41.png"), "prompt": "Is there a dog?"}
    (tmp_path / "held.jsonl").write_text(json.dumps({**row, "chosen": "No.", "rejected": "Yes."}) + "\n")
    folder, _ = run("out", *LORA, *aux, "--eval_data_path", tmp_path / "held.jsonl", "--eval_steps", 1)
    evals = [log for log in logs_of(folder) if "eval_loss" in log]
    assert evals and not any("eval_aux_loss" in log or "aux_loss" in log for log in evals)
    assert sum("aux_loss" in log for log in logs_of(folder)) == 3


def test_every_pair_brings_a_record_by_its_number(golden, loaded, aux):
    tokenizer, _, processor = loaded
    builder = ExampleBuilder(tokenizer, template("v1"), ImageLoader(processor, "pad"), 16, 2048, 2000)
    captions = Captions(str(aux[1]), str(aux[3]), builder)
    row = {"image": str(golden / "images" / "a_wide_97x41.png"), "prompt": "A dog?", "rejected": "No."}
    file = aux[1].with_name("pairs.jsonl")
    file.write_text("".join(json.dumps({**row, "chosen": f"Yes, {i}."}) + "\n" for i in range(8)))
    pairs = PreferencePairs(read_own_pairs(str(file), None), builder)
    assert pairs[0].aux is None
    pairs.bring(captions, 7)
    numbers = [pair.aux.number for pair in pairs]
    assert numbers == [order(5, 7)[i % 5] for i in range(8)] and sorted(numbers[:5]) == [*range(5)]
    assert [pair.aux.number for pair in pairs] == numbers
    assert pairs.alone()[3].aux is None and pairs[3].aux is not None


def test_rows_that_are_brought_stand_behind_the_pairs():
    def row(*ids, picture=None):
        images = {picture: torch.zeros(3, 2, 2)} if picture else {}
        return Example(list(ids), [-100, *ids[1:-1], ids[-1]], (picture,) if picture else (), images)

    def pair(n, aux):
        return PreferenceExample(row(1, -200, 10 + n, picture="p"), row(1, -200, 20 + n, picture="p"), n, None, aux)

    examples = [pair(0, row(1, 30)), pair(1, row(1, -200, 31, picture="q"))]
    settings = (0, 2048, lambda: torch.zeros(3, 2, 2))
    batch = Collator(*settings)(examples)
    assert batch["aux_rows"] == 2 and batch["input_ids"][:, -1].tolist() == [10, 11, 20, 21, 0, 31]
    assert batch["image_index"].flatten().tolist() == [0, 0, 0, 0, -1, 1]
    packed = PackingCollator(*settings, tokens_per_image=2)(examples)
    assert len(packed["rows"]["label_counts"]) == 6 and len(packed["reference_rows"]["label_counts"]) == 4
    assert packed["aux_rows"] == 2 and len(packed["images"]) == 2
    apart = PackingCollator(*settings, tokens_per_image=2, apart=True)(examples)
    assert len(packed["rows"]["trees"]) == 3  # one picture, one tree
    assert [end - start for start, _, end, _ in apart["rows"]["trees"]] == [5, 5, 2, 4]
    known = [example._replace(reference_logps=(-1.0, -2.0)) for example in examples]
    assert "reference_rows" not in PackingCollator(*settings, tokens_per_image=2)(known)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--aux_weight", 0), "error: --aux_weight 0.0: expected a positive number"),
        (("--aux_weight", 1, "--aux_data", "nothing.json"), "error: --aux_data nothing.json: no such file"),
    ],
)
def test_flags_that_cannot_be_used(run_script, dpo_flags, tmp_path, flags, message):
    code, _, err = run_script("train_dpo", *dpo_flags, *flags, "--output_dir", tmp_path / "out")
    assert code == 2 and message in err


def test_a_weight_of_nothing_is_noted(run_script, dpo_flags, tmp_path):
    flags = (*LORA, "--max_steps", 1, "--aux_weight", 1, "--output_dir", tmp_path / "out")
    code, _, err = run_script("train_dpo", *dpo_flags, *flags)
    assert code == 0 and "note: --aux_weight has nothing to do here: there is no --aux_data" in err
