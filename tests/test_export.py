"""What other programs make of an export: their own classes against the recordings, and the way back bit for bit."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN, succeed
from PIL import Image
from safetensors.torch import load_file, save_file
from test_docs import blocks
from test_model import BATCHES, inputs_of
from test_tokenization import folder_with

from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import SeparatorStyle, conv_templates, template
from llava.errors import UserError
from llava.eval.answer import Answerer, Question
from llava.mm_utils import tokenizer_image_token
from llava.model import export
from llava.model.adapter import LORA_EXCLUDED
from llava.model.builder import load_pretrained_model
from llava.model.chat_template import chat_template
from llava.model.checkpoint import read_model_weights
from llava.model.delta import read_chain
from llava.model.hf_tokenizer import save_for_huggingface
from llava.tokenization import load_tokenizer

ORIGINAL = GOLDEN / "tiny-llava-original"
FEATURES = 16  # of one picture
README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def exported(out: Path, *flags: object, to: str = "hf") -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["export", "--to", to, "--out", str(out), *map(str, flags)])
        export.main()
    return out


@pytest.fixture(scope="module")
def huggingface(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("hf") / "export", "--model-path", ORIGINAL)


@pytest.fixture(scope="module")
def recorded():
    return np.load(GOLDEN / "forward" / "forward_HADPO_tf4.31.0.npz")


def their_model(folder, dtype=torch.float32):
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    return model


def their_logits(model, batch):
    """Logits (N, 2000) of all real positions; a picture's mark is repeated as their processor would do it."""
    image_id = model.config.image_token_index
    pictures, rows = [], []
    for ids, mask, picture in zip(batch["input_ids"], batch["attention_mask"], batch["images"], strict=True):
        ids = ids[mask.bool()].tolist()
        if IMAGE_TOKEN_INDEX in ids:  # a row of text alone brings a picture that nobody looks at
            pictures.append(picture)
        rows.append(torch.tensor([j for i in ids for j in ([image_id] * FEATURES if i == IMAGE_TOKEN_INDEX else [i])]))
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask.long(), pixel_values=torch.stack(pictures)).logits
    assert (logits[..., 2000:] <= logits[..., :2000].max(-1, keepdim=True).values).all()
    return logits[..., :2000], mask


def check_recorded(recorded, prefix, logits, mask):
    if prefix in recorded.files:
        wanted = torch.tensor(recorded[prefix])[mask]
        torch.testing.assert_close(logits[mask], wanted, atol=1e-4, rtol=0)
        return
    wanted = torch.tensor(recorded[f"{prefix}|every16th_vocab"])[mask]
    torch.testing.assert_close(logits[mask][:, ::16], wanted, atol=1e-4, rtol=0)
    wanted = torch.tensor(recorded[f"{prefix}|logsumexp"])[mask]
    torch.testing.assert_close(logits[mask].logsumexp(-1), wanted, atol=1e-4, rtol=0)


def test_transformers_own_class_gives_the_recorded_logits_and_ours(huggingface, recorded, loaded):
    model = their_model(huggingface)
    for batch in BATCHES:
        inputs = inputs_of(recorded, batch)
        logits, mask = their_logits(model, inputs)
        check_recorded(recorded, f"{batch}|logits", logits, mask)
        with torch.no_grad():
            ours = loaded[1](**inputs).logits
        torch.testing.assert_close(logits[mask], ours[mask], atol=1e-5, rtol=0)


def check_answers(folder, questions):
    """Template, ids, pixels and greedy ids of plain transformers."""
    from transformers import AutoProcessor

    model, processor = their_model(folder), AutoProcessor.from_pretrained(folder)
    recorded = np.load(GOLDEN / "preproc" / "pixel_values_HADPO_tf4.31.0.npz")
    for question in questions:
        content, images = [{"type": "text", "text": question["question"]}], None
        if question["image"]:
            content.append({"type": "image"})
            images = [Image.open(GOLDEN / "images" / question["image"])]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        assert text == question["prompt"]
        inputs = processor(images=images, text=text, return_tensors="pt")
        assert inputs.input_ids.tolist() == [with_features(question["input_ids"])]
        if images:
            assert (inputs.pixel_values[0].numpy() == recorded[f"{question['image']}|pad"]).all()
        new = model.generate(**inputs, max_new_tokens=24)[0].tolist()[inputs.input_ids.shape[1] :]
        assert new == question["output_ids"]
        # Among bytes that are no character SentencePiece still shows the letters; their decoder shows none of them.
        if not any(a < 259 and b < 259 and min(a, b) < 131 for a, b in pairwise(new)):
            assert processor.decode(new, skip_special_tokens=True).strip() == question["decoded_strip"]
    return model


def test_the_readmes_example_answers_as_we_do(huggingface, loaded, tmp_path, monkeypatch, capsys):
    (code,) = [code for code in blocks(README, "python") if "AutoProcessor" in code]
    (folder,) = set(re.findall(r'from_pretrained\("([^"]+)"', code))
    (tmp_path / folder).parent.mkdir()
    (tmp_path / folder).symlink_to(huggingface)
    monkeypatch.chdir(tmp_path)
    photo = GOLDEN / "images" / "a_wide_97x41.png"
    (name,) = re.findall(r'Image\.open\("([^"]+)"', code)
    (tmp_path / name).symlink_to(photo)
    exec(code.replace("max_new_tokens=512", "max_new_tokens=64"), {})  # bytes that are no text follow
    tokenizer, model, image_processor = loaded
    answerer = Answerer(model, tokenizer, image_processor, template("llava_v1"), max_new_tokens=64)
    (answer,) = answerer.answer([Question(str(photo), "Is there a dog in the image?", "here")])
    assert capsys.readouterr().out.strip() == answer.removesuffix("</s>").strip()


def with_features(ids):
    return [j for i in ids for j in ([2000] * FEATURES if i == IMAGE_TOKEN_INDEX else [i])]


def test_plain_transformers_answers_as_recorded(huggingface):
    from transformers import AutoProcessor

    questions = json.loads((GOLDEN / "forward" / "forward_HADPO_tf4.31.0.json").read_text())["generation"]
    model = check_answers(huggingface, questions)
    # Together as one by one: prompts of other lengths are padded on the left.
    processor = AutoProcessor.from_pretrained(huggingface)
    asked = [q for q in questions if q["image"]]
    images = [[Image.open(GOLDEN / "images" / q["image"])] for q in asked]
    inputs = processor(images=images, text=[q["prompt"] for q in asked], padding=True, return_tensors="pt")
    assert not inputs.attention_mask.bool().all()
    new = model.generate(**inputs, max_new_tokens=24)[:, inputs.input_ids.shape[1] :]
    assert new.tolist() == [q["output_ids"] for q in asked]


def test_a_lora_is_folded_in(tmp_path, recorded):
    folder = exported(
        tmp_path / "hf",
        "--model-path",
        GOLDEN / "tiny-llava-lora",
        "--model-base",
        ORIGINAL,
        "--max_shard_size",
        "500KB",
    )
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    questions = json.loads((GOLDEN / "forward" / "lora_generation_HADPO_tf4.31.0.json").read_text())
    model = check_answers(folder, questions)
    merged = np.load(GOLDEN / "forward" / "lora_merged_logits_HADPO_tf4.31.0.npz")
    check_recorded(merged, "logits_merged", *their_logits(model, inputs_of(recorded, "b2_mixed_len")))


def test_folding_changes_the_targets_alone_and_rounds_once(tmp_path):
    source, state, _ = original_in(tmp_path / "source", torch.float16)
    folder = GOLDEN / "tiny-llava-lora"
    out = exported(tmp_path / "out", "--model-path", folder, "--model-base", source, to="original")
    found = load_file(out / "model.safetensors")
    lora = torch.load(folder / "adapter_model.bin", weights_only=True)
    wanted = dict(state)
    for name, down in lora.items():
        if "lora_A" in name:
            target = name.removeprefix("base_model.model.").replace(".lora_A", "")
            change = 16 / 8 * lora[name.replace("lora_A", "lora_B")] @ down
            wanted[target] = (state[target].float() + change).half()
    beside = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
    wanted.update({name.removeprefix("base_model.model."): value.half() for name, value in beside.items()})
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if "layers" in name and "proj" in name:  # whatever the order in which a product's terms are added
            torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-3)
            assert not torch.equal(found[name], state[name])
        else:
            assert torch.equal(found[name], value), name


@pytest.mark.parametrize("kind", [{"use_rslora": True, "rank_pattern": {"up_proj": 2}}, {"use_dora": True}])
def test_other_kinds_of_lora_are_folded_as_peft_does(tmp_path, recorded, kind):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = load_pretrained_model(str(ORIGINAL), None)[1]
    targets = {"target_modules": ["q_proj", "up_proj"], "exclude_modules": LORA_EXCLUDED}
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=3, **targets, **kind)).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "lora")
    flags = ("--model-path", tmp_path / "lora", "--model-base", ORIGINAL)
    folder = exported(tmp_path / "hf", *flags)
    inputs = inputs_of(recorded, "b2_mixed_len")
    logits, mask = their_logits(their_model(folder), inputs)
    with torch.no_grad():
        wanted = model(**inputs).logits
    torch.testing.assert_close(logits[mask], wanted[mask], atol=1e-5, rtol=0)
    with pytest.raises(AssertionError):
        check_recorded(recorded, "b2_mixed_len|logits", logits, mask)


def test_plain_peft_puts_an_unmerged_lora_over_an_exported_base(huggingface, tmp_path, recorded):
    from peft import PeftModel

    flags = ("--model-path", GOLDEN / "tiny-llava-lora", "--model-base", ORIGINAL, "--no_merge")
    adapter = exported(tmp_path / "adapter", *flags)
    assert sorted(file.name for file in adapter.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    model = PeftModel.from_pretrained(their_model(huggingface), adapter)
    merged = np.load(GOLDEN / "forward" / "lora_merged_logits_HADPO_tf4.31.0.npz")
    for name in ("unmerged", "merged"):
        logits, mask = their_logits(model, inputs_of(recorded, "b2_mixed_len"))
        check_recorded(merged, "logits_merged", logits, mask)
        if name == "unmerged":
            assert not any("vision" in key for key, _ in model.named_parameters() if "lora_" in key)
            model = model.merge_and_unload()


def saved(folder, name, state):
    """``folder`` with the tensors ``state`` in its file ``name``."""
    torch.save(state, folder / name)
    return folder


def delta_with(folder, name, change, of=GOLDEN / "tiny-llava-lora"):
    """A copy of a recorded delta whose file ``name`` holds what ``change`` makes of its tensors."""
    shutil.copytree(of, folder)
    return saved(folder, name, change(torch.load(folder / name, weights_only=True)))


def test_weights_that_are_no_model_are_refused(tmp_path, run_script):
    source, state, _ = original_in(tmp_path / "source", torch.float32)
    half = shutil.copytree(source, tmp_path / "half")
    save_file({n: v for n, v in state.items() if "layers.1.mlp.up" not in n}, half / "model.safetensors")
    bare = shutil.copytree(GOLDEN / "tiny-llava-lora", tmp_path / "bare")
    (bare / "non_lora_trainables.bin").unlink()
    wide = delta_with(
        tmp_path / "wide",
        "mm_projector.bin",
        lambda found: {n: torch.cat([v, v]) if "mm_projector.2" in n else v for n, v in found.items()},
        GOLDEN / "tiny-llava-pretrain",
    )
    head = {"base_model.model.lm_head.weight": torch.zeros(2048, 64)}
    long = delta_with(tmp_path / "long", "adapter_model.bin", lambda found: {**found, **head})
    (long / "config.json").unlink()
    vicuna = GOLDEN / "tiny-vicuna"
    wrong = (
        "2 weights do not fit config.json, first: model.mm_projector.2.weight has shape (128, 64), expected (64, 64)"
    )
    for flags, where, said in (
        ((half,), half, "1 weights of the model in config.json are missing, first: model.layers.1.mlp.up_proj.weight"),
        ((bare, vicuna), vicuna, "4 weights of the model in config.json are missing, first: model.mm_projector.0"),
        ((wide, vicuna), wide / "mm_projector.bin", wrong),
        ((long, source), long / "adapter_model.bin", "lm_head.weight has shape (2048, 64), expected (2000, 64)"),
    ):
        path, base = (*flags, None)[:2]
        with pytest.raises(UserError) as refused:
            load_pretrained_model(str(path), base and str(base))
        assert str(refused.value).startswith(f"{where}: ") and said in str(refused.value)
        named = ("--model-path", path, *(("--model-base", base) if base else ()))
        for to in ("hf", "original"):
            code, _, err = run_script("llava.model.export", "--to", to, "--out", tmp_path / "out", *named)
            assert (code, err.splitlines()[-1]) == (2, f"error: {refused.value}")
            assert not (tmp_path / "out").exists()


def test_rows_of_a_padded_base_are_cut(huggingface, tmp_path):
    weights = load_file(huggingface / "model.safetensors")
    whole = {"model.language_model.embed_tokens": "model.embed_tokens", "lm_head": "lm_head"}
    beside = {
        f"base_model.model.{theirs}.weight": 2 * weights[f"language_model.{ours}.weight"]
        for theirs, ours in whole.items()
    }
    lora = delta_with(tmp_path / "lora", "adapter_model.bin", lambda found: {**found, **beside})
    (lora / "config.json").unlink()
    found = load_file(
        exported(tmp_path / "out", "--model-path", lora, "--model-base", huggingface, to="original")
        / "model.safetensors"
    )
    for name in whole.values():
        assert torch.equal(found[f"{name}.weight"], 2 * weights[f"language_model.{name}.weight"][:2000])


def test_an_unmerged_lora_names_what_it_lies_over(tmp_path, run_script, capsys):
    base, _, config = original_in(tmp_path / "base", torch.float32)
    lora = GOLDEN / "tiny-llava-lora"
    layers = {"layers_to_transform": [0, 1], "layers_pattern": "layers"}
    settings = json.loads((lora / "adapter_config.json").read_text())

    def unmerged(out, *flags):
        folder = exported(tmp_path / out, "--no_merge", *flags)
        assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] is None
        return folder, capsys.readouterr().out.strip().rpartition("over what --to hf makes of ")[2]

    head, carded = tmp_path / "head", shutil.copytree(lora, tmp_path / "carded")
    head.mkdir()
    save_file({"lm_head.weight": torch.ones(2000, 64)}, head / "delta.safetensors")
    for folder, below, parts in ((head, base, ["lm_head"]), (carded, head, ["lora", "projector"])):
        (folder / "config.json").write_text(json.dumps(config))
        card = read_chain(str(below), "--model-path").card()
        (folder / "delta.json").write_text(json.dumps({**card, "parts": parts}))
    (carded / "adapter_config.json").write_text(json.dumps({**settings, **layers}))
    out, named = unmerged("a", "--model-path", carded, "--model-base", base)
    assert named == str(head)
    written = json.loads((out / "adapter_config.json").read_text())
    assert [written[key] for key in layers] == [None, None]  # PEFT takes neither beside a pattern
    assert unmerged("b", "--model-path", lora, "--model-base", base)[1] == str(base)
    connector, vicuna = GOLDEN / "tiny-llava-pretrain", GOLDEN / "tiny-vicuna"
    assert unmerged("c", "--model-path", f"{connector},{lora}", "--model-base", vicuna)[1] == f"{vicuna},{connector}"

    other = delta_with(
        tmp_path / "other",
        "adapter_model.bin",
        lambda found: {n: torch.cat([v, v], 1) if "lora_A" in n else v for n, v in found.items()},
    )
    wide = delta_with(
        tmp_path / "wide", "non_lora_trainables.bin", lambda found: {n: torch.cat([v, v]) for n, v in found.items()}
    )
    for path, below, said in (
        (lora, vicuna, "lies over a language model, which is no LLaVA; leave out --no_merge"),
        (other, base, "has shape (8, 128), the model wants (8, 64); the adapter was trained on another model"),
        (wide, base, "model.mm_projector.0.weight has shape (128, 32), the model wants (64, 32)"),
    ):
        flags = ("--to", "hf", "--no_merge", "--model-path", path, "--model-base", below, "--out", tmp_path / "no")
        code, _, err = run_script("llava.model.export", *flags)
        assert (code, err.count("error: ")) == (2, 1)
        assert said in err
        assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_lora_on_a_tied_head_or_its_embeddings_parts_them(tmp_path, target):
    from peft import LoraConfig, get_peft_model

    base, state, _ = original_in(tmp_path / "base", torch.float32, tie_word_embeddings=True)
    save_file({n: v for n, v in state.items() if n != "lm_head.weight"}, base / "model.safetensors")
    torch.manual_seed(0)
    model = load_pretrained_model(str(base), None)[1]
    assert model.lm_head.weight is model.get_input_embeddings().weight
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = LoraConfig(r=4, target_modules=[target], exclude_modules=LORA_EXCLUDED)
        model = get_peft_model(model, settings).eval()
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(tmp_path / "lora", save_embedding_layers=False)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
    flags = ("--model-path", tmp_path / "lora", "--model-base", base)
    out = exported(tmp_path / "out", *flags, to="original")
    for path, below in ((tmp_path / "lora", str(base)), (out, None)):
        _, found, _, _ = load_pretrained_model(str(path), below)
        assert found.config.tie_word_embeddings is False
        with torch.no_grad():
            torch.testing.assert_close(found(input_ids=ids).logits, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("scaling", [{"type": "linear", "factor": 4.0}, {"rope_type": "dynamic", "factor": 2.0}])
def test_scaled_positions_are_written_as_transformers_4_31_wants_them(tmp_path, scaling):
    source, _, _ = original_in(tmp_path / "source", torch.float32, rope_scaling=dict(scaling))
    there = exported(tmp_path / "there", "--model-path", source)
    for name, path in (("straight", source), ("back", there)):
        config = json.loads(
            (exported(tmp_path / name, "--model-path", path, to="original") / "config.json").read_text()
        )
        kind = scaling.get("type") or scaling["rope_type"]
        assert config["rope_scaling"] == {"type": kind, "factor": scaling["factor"]}
        assert config.get("rope_theta", 10000.0) == 10000.0 and "rope_parameters" not in config


def test_a_lora_trained_here_goes_over_the_exported_base_in_plain_peft(
    huggingface, run_script, dpo_flags, tmp_path, recorded, monkeypatch
):
    """As the README says it: LoRA and connector, merged there, give our logits."""
    run = tmp_path / "run"
    succeed(run_script("train_dpo", *dpo_flags, "--lora_enable", True, "--lora_r", 4, "--output_dir", run))
    (code,) = [code for code in blocks(README, "python") if "PeftModel" in code]
    base, adapter = (tmp_path / name for name in re.findall(r'"(checkpoints/[^"]+)"', code))
    base.parent.mkdir()
    base.symlink_to(huggingface)
    exported(adapter, "--no_merge", "--model-path", run)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)
    batch = inputs_of(recorded, "b2_mixed_len")
    ours = load_pretrained_model(str(run), None)[1]
    with torch.no_grad():
        want = ours(**batch).logits
    found, mask = their_logits(names["model"], batch)
    torch.testing.assert_close(found[mask], want[mask], atol=1e-5, rtol=0)
    untrained, _ = their_logits(their_model(huggingface), batch)
    assert (want - untrained)[mask].abs().max() > 1e-3


def test_a_connector_is_written_with_its_language_model(tmp_path, recorded):
    folder = exported(
        tmp_path / "hf", "--model-path", GOLDEN / "tiny-llava-pretrain", "--model-base", GOLDEN / "tiny-vicuna"
    )
    wanted = np.load(GOLDEN / "forward" / "projector_only_logits_HADPO_tf4.31.0.npz")
    check_recorded(wanted, "logits", *their_logits(their_model(folder), inputs_of(recorded, "plain8")))
    # Pre-training crops: the processor must too.
    assert json.loads((folder / "preprocessor_config.json").read_text())["image_processor_type"] == "CLIPImageProcessor"
    from transformers import AutoProcessor

    pixels = np.load(GOLDEN / "preproc" / "pixel_values_HADPO_tf4.31.0.npz")
    image = Image.open(GOLDEN / "images" / "a_wide_97x41.png")
    seen = AutoProcessor.from_pretrained(folder)(images=image, text="<image>", return_tensors="pt").pixel_values[0]
    assert (seen.numpy() == pixels["a_wide_97x41.png|square"]).all()


def recording(name):
    return json.loads((GOLDEN / "labels" / f"HADPO_tf4.31.0_{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("legacy", [False, True])
def test_plain_transformers_comes_to_the_recorded_ids(tmp_path, legacy):
    from transformers import AutoTokenizer

    ours = load_tokenizer(folder_with(GOLDEN, tmp_path / "ours", legacy))
    (tmp_path / "theirs").mkdir()
    assert save_for_huggingface(ours, tmp_path / "theirs", "", "USER:") == (2000, 2001)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "theirs")
    assert not hasattr(tokenizer, "sp_model")
    recorded = recording(f"legacy{int(legacy)}")
    rows = [(r["text"], r["input_ids"]) for r in recorded["raw_tokenizer"] if r["text"] != "<image>"]
    rows += [(r["text"], r["input_ids"]) for r in recorded["tokenizer_image_token"]]
    rows += [(r["prompt"], r["input_ids"]) for r in recorded["generation_prompts"]]
    turns = [r for r in recorded["v1"] if len(r["input_ids"]) < r["model_max_length"]]
    rows += [(r["prompt"], r["input_ids"]) for r in turns]
    assert len(rows) == 75
    for text, ids in rows:
        assert tokenizer(text).input_ids == [2000 if i == IMAGE_TOKEN_INDEX else i for i in ids], text
    for text in ("USER: <image>\nWhat's   this? ASSISTANT:", "  <image>  a <image><image>▁b\n\n<image>\n", "a<image>"):
        wanted = tokenizer_image_token(text, ours)
        assert tokenizer(text).input_ids == [2000 if i == IMAGE_TOKEN_INDEX else i for i in wanted], text
    words = [r for r in recorded["raw_tokenizer"] if "</s>" not in r["text"]]
    assert [tokenizer.decode(r["input_ids"], skip_special_tokens=True) for r in words] == [
        r["decode_skip"] for r in words
    ]
    # And our own loader reads the same folder by SentencePiece, without the tokens that have no row.
    again = load_tokenizer(tmp_path / "theirs", 2000)
    assert (type(again), len(again), again.pad_token, again.legacy) == (type(ours), 2000, "<unk>", legacy)


def test_merges_go_by_the_scores_of_the_pieces(tmp_path):
    import random

    from sentencepiece import sentencepiece_model_pb2 as pb2
    from transformers import AutoTokenizer

    folder = folder_with(GOLDEN, tmp_path / "ours", True)
    proto = pb2.ModelProto.FromString((folder / "tokenizer.model").read_bytes())
    normal = [piece for piece in proto.pieces if piece.type == 1]
    scores = [piece.score for piece in normal]
    random.Random(0).shuffle(scores)
    for piece, score in zip(normal, scores, strict=True):
        piece.score = score
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    ours = load_tokenizer(folder)
    (tmp_path / "theirs").mkdir()
    save_for_huggingface(ours, tmp_path / "theirs", "", "USER:")
    tokenizer, plain = AutoTokenizer.from_pretrained(tmp_path / "theirs"), load_tokenizer(ORIGINAL)
    texts = [row["prompt"].replace("<image>", "") for row in recording("legacy1")["v1"]]
    assert sum(ours(text).input_ids != plain(text).input_ids for text in texts) > 30
    for text in texts:
        assert tokenizer(text).input_ids == ours(text).input_ids


def rendered(jinja, messages, **kwargs):
    from transformers.utils.chat_template_utils import render_jinja_template

    return render_jinja_template(conversations=[messages], chat_template=jinja, **kwargs)[0][0]


def test_the_chat_template_renders_the_recorded_prompts():
    jinja = chat_template(template("vicuna_v1"), "vicuna_v1")
    rows = recording("legacy0")["v1"]
    checked = 0
    for row in rows:
        turns = row["after_preprocess_multimodal"]
        if [turn["from"] for turn in turns] != ["human", "gpt"] * (len(turns) // 2):
            continue
        messages = [{"role": "user" if t["from"] == "human" else "assistant", "content": t["value"]} for t in turns]
        assert rendered(jinja, messages) == row["prompt"], row["name"]
        checked += 1
    assert checked > 35


@pytest.mark.parametrize("name", [n for n, c in conv_templates.items() if c.sep_style is not SeparatorStyle.PLAIN])
def test_every_template_with_turns_has_a_chat_template(name):
    conversation, jinja = template(name), chat_template(template(name), name)
    user, assistant = conversation.roles
    for role, text in ((user, '<image>\nHi {{ x }} "q"\\n'), (assistant, "yes"), (user, "é\n猫"), (assistant, None)):
        conversation.append_message(role, text)
    messages = [
        {"role": "user", "content": [{"type": "text", "text": 'Hi {{ x }} "q"\\n'}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
        {"role": "user", "content": "é\n猫"},
    ]
    assert rendered(jinja, messages, add_generation_prompt=True) == conversation.get_prompt()


def test_a_system_message_takes_the_place_of_the_templates_own():
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    wanted = {
        "llava_v1": "Be brief. USER: Hi ASSISTANT:",
        "llava_llama_2": "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]",
        "qwen": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    }
    for name, text in wanted.items():
        assert rendered(chat_template(template(name), name), said, add_generation_prompt=True) == text


def original_in(folder, dtype, **changes):
    """The recorded model with other settings, or in another dtype; its tower is outside."""
    folder.mkdir()
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        shutil.copy(ORIGINAL / name, folder)
    config = json.loads((ORIGINAL / "config.json").read_text())
    config.update(mm_vision_tower=str(GOLDEN / "tiny-clip"), torch_dtype=str(dtype).removeprefix("torch."), **changes)
    (folder / "config.json").write_text(json.dumps(config))
    state = {name: value.to(dtype) for name, value in read_model_weights(ORIGINAL).items()}
    save_file(state, folder / "model.safetensors")
    return folder, state, config


def same(found, wanted):
    assert found.keys() == wanted.keys()
    return all(found[n].dtype == wanted[n].dtype and torch.equal(found[n], wanted[n]) for n in wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_there_and_back_nothing_changes(tmp_path, dtype):
    source, state, config = original_in(tmp_path / "source", dtype)
    there = exported(tmp_path / "there", "--model-path", source)
    written = load_file(there / "model.safetensors")
    assert {value.dtype for value in written.values()} == {dtype}
    assert written["language_model.model.embed_tokens.weight"].shape == (2048, 64)

    back = exported(tmp_path / "back", "--model-path", there, to="original")
    assert same(load_file(back / "model.safetensors"), state)
    left = {"_name_or_path", "transformers_version", "max_length"}
    found = json.loads((back / "config.json").read_text())
    wanted = {**config, "model_type": "llava_llama"}
    assert {key: found.get(key, "absent") for key in wanted.keys() - left} == {
        k: wanted[k] for k in wanted.keys() - left
    }
    assert (back / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()
    for name in ("generation_config.json", "tokenizer_config.json"):
        kept = {k: v for k, v in json.loads((source / name).read_text()).items() if not isinstance(v, dict)}
        found = json.loads((back / name).read_text())
        assert {k: found[k] for k in kept if k in found} == {k: v for k, v in kept.items() if k in found}
        assert not {"temperature", "top_p"} & found.keys()

    again = exported(tmp_path / "again", "--model-path", back)
    assert same(load_file(again / "model.safetensors"), written)
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "chat_template.jinja"):
        assert (again / name).read_bytes() == (there / name).read_bytes()
    configs = [json.loads((folder / "config.json").read_text()) for folder in (there, again)]
    assert configs[0].items() <= {**configs[1], "text_config": configs[0]["text_config"]}.items()
    assert configs[0]["text_config"].items() <= configs[1]["text_config"].items()


def test_a_tower_that_is_no_longer_the_named_one_goes_along(tmp_path, recorded, loaded):
    source, state, _ = original_in(tmp_path / "source", torch.float32)
    there = exported(tmp_path / "there", "--model-path", source)
    weights = load_file(there / "model.safetensors")
    name = "vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias"
    save_file({**weights, name: weights[name] + 1}, there / "model.safetensors", metadata={"format": "pt"})
    back = exported(tmp_path / "back", "--model-path", there, to="original")
    found = load_file(back / "model.safetensors")
    tower = {n: v for n, v in found.items() if n.startswith("model.vision_tower.vision_tower.vision_model.")}
    assert torch.equal(tower[f"model.vision_tower.{name}"], weights[name] + 1)
    assert same({n: v for n, v in found.items() if n not in tower}, state)
    assert json.loads((back / "config.json").read_text())["unfreeze_mm_vision_tower"] is True
    _, model, _, _ = load_pretrained_model(str(back), None)
    with torch.no_grad():
        moved = model(**inputs_of(recorded, "b1_single")).logits
    assert (moved - torch.tensor(recorded["b1_single|logits"])).abs().max() > 1e-3


def test_a_tower_beside_the_source_is_found_from_everywhere(tmp_path, monkeypatch):
    config = json.loads((ORIGINAL / "config.json").read_text())
    (tmp_path / "world").mkdir()
    shutil.copytree(ORIGINAL, tmp_path / "world" / "source")
    tower = shutil.copytree(GOLDEN / "tiny-clip", tmp_path / "world" / config["mm_vision_tower"])
    (tmp_path / "other" / tower.name).mkdir(parents=True)  # of the same name, and another one
    for where, named in (("world", tower.name), ("other", str(tower))):
        there = exported(tmp_path / where / "there", "--model-path", tmp_path / "world" / "source")
        assert json.loads((there / "config.json").read_text())["mm_vision_tower"] == named
        back = exported(tmp_path / where / "back", "--model-path", there, to="original")
        assert json.loads((back / "config.json").read_text())["mm_vision_tower"] == named
        assert same(load_file(back / "model.safetensors"), read_model_weights(ORIGINAL))


def test_a_tower_that_comes_along_stays(tmp_path):
    source = GOLDEN / "tiny-llava-original-with-tower"
    out = exported(tmp_path / "out", "--model-path", source, to="original")
    wanted = torch.load(source / "pytorch_model.bin", weights_only=True)
    assert same(load_file(out / "model.safetensors"), {n: v for n, v in wanted.items() if "inv_freq" not in n})
    assert json.loads((out / "config.json").read_text())["unfreeze_mm_vision_tower"] is True


def test_a_trained_head_alone_changes(huggingface, tmp_path):
    delta = tmp_path / "head"
    delta.mkdir()
    shutil.copy(ORIGINAL / "config.json", delta)
    head = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
    save_file({"lm_head.weight": head}, delta / "delta.safetensors")
    card = read_chain(str(ORIGINAL), "--model-path").card()
    (delta / "delta.json").write_text(json.dumps({**card, "parts": ["lm_head"]}))
    found = load_file(exported(tmp_path / "hf", "--model-path", delta) / "model.safetensors")
    wanted = load_file(huggingface / "model.safetensors")
    grown = torch.cat([head, head.mean(0, keepdim=True).expand(48, -1)])
    assert same(found, {**wanted, "language_model.lm_head.weight": grown})


def test_a_post_block_stays_in_the_original_format_only(tmp_path, run_script, recorded):
    from llava.model.builder import model_settings
    from llava.model.post_block.builder import block_settings, fresh_block

    source, state, config = original_in(tmp_path / "source", torch.float32, post_block=block_settings("mlp", None))
    block = {name: value + 0.01 for name, value in fresh_block(model_settings(config), 0).items()}
    save_file({**state, **block}, source / "model.safetensors")
    out = exported(tmp_path / "out", "--model-path", source, to="original")
    found = load_file(out / "model.safetensors")
    assert same(found, {**state, **{f"model.{name}": value for name, value in block.items()}})
    logits = []
    for folder in (source, out):
        _, model, _, _ = load_pretrained_model(str(folder), None)
        with torch.no_grad():
            logits.append(model(**inputs_of(recorded, "b1_single")).logits)
    assert torch.equal(*logits)
    assert (logits[0] - torch.tensor(recorded["b1_single|logits"])).abs().max() > 1e-3

    code, _, err = run_script("llava.model.export", "--to", "hf", "--model-path", source, "--out", tmp_path / "no")
    assert code == 2
    assert err.strip().endswith("has no place for a post block; pass --to original")
    assert not (tmp_path / "no").exists()


REFUSED = [
    (["--conv-mode", "plain"], {}, "--conv-mode plain: has no turns"),
    (["--conv-mode", "llava_v9"], {}, "--conv-mode llava_v9: unknown template"),
    (["--max_shard_size", "5 apples"], {}, "--max_shard_size 5 apples: expected a size"),
    (["--max_shard_size", "0GB"], {}, "--max_shard_size 0GB: expected a size"),
    (["--no_merge"], {}, "is no LoRA; leave it out"),
    (["--no_merge", "--max_shard_size", "1GB"], {}, "--max_shard_size: an adapter is written in one file"),
    ([], {"pad_token_id": "x"}, "config.json: Validation error for field 'pad_token_id'"),
    (["--no_merge", "--conv-mode", "llava_v1"], {}, "--conv-mode: an adapter has no chat template"),
    (["--to", "original", "--conv-mode", "llava_v1"], {}, "--conv-mode is for --to hf"),
    (["--to", "original", "--no_merge"], {}, "--no_merge is for --to hf"),
    ([], {"mm_projector_type": "linear"}, "no place for a connector of type linear"),
    ([], {"mm_use_im_start_end": True}, "no place for mm_use_im_start_end"),
    ([], {"mm_vision_select_feature": "cls"}, "no place for mm_vision_select_feature cls"),
]


@pytest.mark.parametrize(("flags", "changes", "said"), REFUSED)
def test_what_cannot_be_said_there_is_refused_in_one_line(tmp_path, run_script, flags, changes, said):
    source, _, _ = original_in(tmp_path / "source", torch.float32, **changes)
    out = tmp_path / "deep" / "out"
    code, stdout, err = run_script("llava.model.export", "--to", "hf", "--model-path", source, "--out", out, *flags)
    assert (code, stdout) == (2, "")
    assert said in err
    assert err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.rglob("*") if path.parent != source) == ["source"]


def test_a_folder_that_holds_something_is_left_alone(tmp_path, run_script):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    for out, said in (
        ("out", "the folder is not empty"),
        ("out/mine", "is a file"),
        ("out/mine/x", "cannot be written"),
    ):
        flags = ("--to", "original", "--model-path", ORIGINAL, "--out", tmp_path / out)
        code, _, err = run_script("llava.model.export", *flags)
        assert (code, err.count("\n")) == (2, 1)
        assert said in err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_place_that_cannot_be_written_is_found_before_anything_is_read(tmp_path, run_script, monkeypatch):
    monkeypatch.setattr(export, "read_chain", lambda *args: pytest.fail("it was read"))
    (tmp_path / "mine").write_text("")
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "disk")
    for out, said in (("mine/x", "cannot be written (Not a directory)"), ("disk", "is a mount point")):
        code, _, err = run_script("llava.model.export", "--to", "hf", "--model-path", ORIGINAL, "--out", tmp_path / out)
        assert (code, err.count("\n")) == (2, 1)
        assert said in err


def test_links_and_the_working_directory_can_be_written_to(tmp_path, run_script, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far")
    monkeypatch.chdir(tmp_path / "empty")
    for out in (".", tmp_path / "link"):
        exported(out, "--model-path", ORIGINAL, to="original")
    assert (tmp_path / "link").is_symlink()
    for folder in ("empty", "far"):
        assert (tmp_path / folder / "model.safetensors").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "far", "link"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_export_leaves_nothing(tmp_path, run_script, monkeypatch, number, code):
    left = tmp_path / ".out.abc_1234"
    left.mkdir()
    (tmp_path / ".out.backup").mkdir()
    before = signal.getsignal(number)
    write = export.write_model_weights

    def interrupted(folder, *args):
        write(folder, *args)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(export, "write_model_weights", interrupted)
    flags = ("--to", "original", "--model-path", ORIGINAL, "--out", tmp_path / "out")
    found, _, err = run_script("llava.model.export", *flags)
    assert (found, signal.getsignal(number)) == (code, before)
    noted = f"note: {left}: left by an export that was killed, if none is running; delete it\n"
    assert err == f"{noted}interrupted; nothing was written\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.abc_1234", ".out.backup"]


def test_a_failure_midway_leaves_nothing(tmp_path, run_script, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "write_model_weights", full)
    for to in ("hf", "original"):
        flags = ("--to", to, "--model-path", ORIGINAL, "--out", tmp_path / "out")
        code, _, err = run_script("llava.model.export", *flags)
        assert code == 2
        assert err == f"error: --out {tmp_path / 'out'}: cannot be written (No space left on device)\n"
        assert list(tmp_path.iterdir()) == []


def test_a_llama_without_its_sentencepiece_model(huggingface, tmp_path, capsys):
    from transformers import AutoTokenizer

    source = tmp_path / "source"
    shutil.copytree(huggingface, source)
    (source / "tokenizer.model").unlink()
    exported(tmp_path / "out", "--model-path", source, to="original")
    assert "has no tokenizer.model, which LLaVA's own loader wants" in capsys.readouterr().err
    tokenizer = AutoTokenizer.from_pretrained(exported(tmp_path / "again", "--model-path", tmp_path / "out"))
    for row in recording("legacy0")["generation_prompts"]:
        assert tokenizer(row["prompt"]).input_ids == [2000 if i == IMAGE_TOKEN_INDEX else i for i in row["input_ids"]]


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(tmp_path, run_script, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1_000_000))
    flags = ("--to", "hf", "--model-path", ORIGINAL, "--out", tmp_path / "out")
    code, _, err = run_script("llava.model.export", *flags)
    assert code == 2
    assert "needs 1.6 MB, but 1.0 MB are free" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("head", ["untied", "tied", "parted"])
def test_a_qwen_of_transformers_there_and_back(tmp_path, recorded, qwen, head):
    from transformers import AutoTokenizer, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen2Config

    source, mark, tied = tmp_path / "source", 310, head != "untied"
    text = Qwen2Config.from_pretrained(qwen, tie_word_embeddings=tied)
    vision = CLIPVisionConfig.from_pretrained(GOLDEN / "tiny-clip")
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=mark, tie_word_embeddings=tied)
    ).eval()
    model.save_pretrained(source)
    if head == "parted":  # the config is wrong, and what is on disk counts
        weights = load_file(source / "model.safetensors")
        weights["language_model.lm_head.weight"] = torch.randn(320, text.hidden_size)
        save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
        model = their_model(source)
        assert not torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)
    tokenizer = AutoTokenizer.from_pretrained(qwen)
    tokenizer.save_pretrained(source)
    shutil.copy(GOLDEN / "tiny-clip" / "preprocessor_config.json", source)

    flat = exported(tmp_path / "flat", "--model-path", source, to="original")
    # transformers 4 knows no TokenizersBackend.
    assert json.loads((flat / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    again = exported(tmp_path / "again", "--model-path", flat)
    config = json.loads((again / "config.json").read_text())
    image_id = config["image_token_index"]
    assert (image_id, config["text_config"]["vocab_size"]) == (len(tokenizer), 320)  # there was room
    assert ("language_model.lm_head.weight" in load_file(again / "model.safetensors")) is (head != "tied")
    flags = [settings["tie_word_embeddings"] for settings in (config, config["text_config"])]
    assert flags == [head == "tied"] * 2
    ids = torch.tensor([[3, *[mark] * FEATURES, 40, 41]])
    pixels = torch.tensor(recorded["b1_single|images"])
    ours_tokenizer, ours, _, _ = load_pretrained_model(str(flat), None)
    with torch.no_grad():
        wanted = model(input_ids=ids, pixel_values=pixels).logits
        theirs = their_model(again)(input_ids=ids.where(ids != mark, image_id), pixel_values=pixels).logits
        got = ours(torch.tensor([[3, IMAGE_TOKEN_INDEX, 40, 41]]), images=pixels).logits
    assert torch.equal(theirs, wanted)
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)
    prompt = "<|im_start|>user\n<image>\na man  riding<|im_end|>\n"
    found = AutoTokenizer.from_pretrained(again)(prompt).input_ids
    assert [IMAGE_TOKEN_INDEX if i == image_id else i for i in found] == tokenizer_image_token(prompt, ours_tokenizer)
