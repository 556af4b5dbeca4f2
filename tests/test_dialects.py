"""Every form in which a LLaVA is kept on disk gives the logits and the answers recorded from the original programs."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import losses_of, succeed
from safetensors.torch import save_file
from test_model import answer, check_logits, inputs_of, questions

from llava.errors import UserError
from llava.mm_utils import tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import read_tensors

TOKENIZER = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")
PADDED = 2064


@pytest.fixture(scope="module")
def recorded(golden):
    return np.load(golden / "forward" / "forward_HADPO_tf4.31.0.npz")


@pytest.fixture(scope="module")
def released(golden):
    """The recorded weights under LLaVA's names, with the tower."""
    return torch.load(golden / "tiny-llava-original-with-tower" / "pytorch_model.bin", weights_only=True)


def renamed(state, *rules):
    """``state`` under other names: of the regular expressions that fit, the first one's replacement."""

    def name_of(name):
        fitting = (re.sub(pattern, new, name) for pattern, new in rules if re.search(pattern, name))
        return next(fitting, name)

    return {name_of(name): value for name, value in state.items() if not name.endswith("inv_freq")}


TOWER = r"^model\.vision_tower\.vision_tower\.vision_model\."
CONNECTOR = [
    (rf"^model\.mm_projector\.{at}\.", rf"{{}}multi_modal_projector.linear_{n}.") for at, n in ((0, 1), (2, 2))
]


def connector(prefix):
    return [(pattern, new.format(prefix)) for pattern, new in CONNECTOR]


# transformers 4.36 and the hub; 4.52 to 4.57; 5.
OLD = [
    (TOWER, "vision_tower.vision_model."),
    *connector(""),
    (r"^model\.", "language_model.model."),
    (r"^lm_head", "language_model.lm_head"),
]
RUNTIME_4 = [
    (TOWER, "model.vision_tower.vision_model."),
    *connector("model."),
    (r"^model\.", "model.language_model."),
]
RUNTIME_5 = [(TOWER, "model.vision_tower."), *RUNTIME_4[1:]]
SAVED_BY_5 = [(TOWER, "vision_tower."), *OLD[1:]]
WRAPPED = [(r"^", "module.")]
FLAT_TOWER = [(TOWER, "model.vision_tower.vision_tower.")]


def copied(golden, folder, *names, source="tiny-llava-original"):
    folder.mkdir(exist_ok=True)
    for name in names:
        shutil.copy(golden / source / name, folder)
    return folder


def write(file, content):
    file.write_text(json.dumps(content), encoding="utf-8")


def original_folder(golden, folder, state, model_type="llava", files=1, suffix="safetensors"):
    """A folder in LLaVA's format, its weights in one file or in several."""
    copied(golden, folder, *TOKENIZER, "generation_config.json")
    copied(golden, folder, "preprocessor_config.json", source="tiny-clip")
    if not any("vision_tower" in name for name in state):
        shutil.copytree(golden / "tiny-clip", folder / "tiny-clip")
    config = json.loads((golden / "tiny-llava-original" / "config.json").read_text())
    if any("vision_tower" in name for name in state):
        config["mm_vision_tower"] = str(golden / "tiny-clip")
    write(folder / "config.json", {**config, "model_type": model_type})
    stem, save = ("model", save_file) if suffix == "safetensors" else ("pytorch_model", torch.save)
    if files == 1:
        save(state, folder / f"{stem}.{suffix}")
        return folder
    shard_of = {name: f"{stem}-{at % files + 1:05d}-of-{files:05d}.{suffix}" for at, name in enumerate(state)}
    for shard in set(shard_of.values()):
        save({name: state[name] for name in state if shard_of[name] == shard}, folder / shard)
    write(folder / f"{stem}.{suffix}.index.json", {"metadata": {}, "weight_map": shard_of})
    return folder


def huggingface_config(golden, **changes):
    """As sparse as llava-hf's: what it leaves out is transformers' default."""
    text = json.loads((golden / "tiny-vicuna" / "config.json").read_text())
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "model_type")
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "ignore_index": -100,
        "image_token_index": 2000,
        "pad_token_id": 2001,
        "projector_hidden_act": "gelu",
        "text_config": {
            **{key: text[key] for key in sizes},
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-05,
            "torch_dtype": "float16",
            "vocab_size": PADDED,
        },
        "torch_dtype": "float16",
        "vision_config": json.loads((golden / "tiny-clip" / "config.json").read_text()),
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vocab_size": PADDED,
        **changes,
    }


def huggingface_tokenizer(golden, folder):
    """llava-hf's: <image> and <pad> behind the vocabulary, padding on the left."""
    copied(golden, folder, "tokenizer.model")
    config = json.loads((golden / "tiny-llava-original" / "tokenizer_config.json").read_text())
    added = {"2000": {"content": "<image>", "special": True}, "2001": {"content": "<pad>", "special": True}}
    config.update(pad_token="<pad>", padding_side="left", added_tokens_decoder=added)
    write(folder / "tokenizer_config.json", config)
    write(folder / "added_tokens.json", {"<image>": 2000, "<pad>": 2001})
    write(folder / "special_tokens_map.json", {"pad_token": "<pad>", "image_token": "<image>"})
    write(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": [2], "pad_token_id": 2001})
    return folder


def padded(state):
    """Rows behind the vocabulary that would win every argmax."""
    noise = 100 * torch.ones(PADDED - 2000, 64)
    return {
        n: torch.cat([v, noise]) if n in ("model.embed_tokens.weight", "lm_head.weight") else v
        for n, v in state.items()
    }


def huggingface_folder(golden, folder, state, rules=OLD, **changes):
    """A folder as on the hub: padded vocabulary, and an image processor that crops."""
    huggingface_tokenizer(golden, copied(golden, folder, "preprocessor_config.json", source="tiny-clip"))
    write(folder / "config.json", huggingface_config(golden, **changes))
    save_file(renamed(padded(state), *rules), folder / "model.safetensors")
    return folder


def check_recorded(golden, recorded, folder, base=None):
    """Logits, prompt ids and a greedy answer of what ``folder`` holds."""
    tokenizer, model, image_processor, _ = load_pretrained_model(str(folder), base)
    with torch.no_grad():
        out = model(**inputs_of(recorded, "b2_mixed_len"))
    check_logits(recorded, "b2_mixed_len|logits", out.logits)
    question = next(q for q in questions(golden) if q["image"])
    assert tokenizer_image_token(question["prompt"], tokenizer) == question["input_ids"]
    assert answer(golden, model, image_processor, question) == question["output_ids"]
    assert (len(tokenizer), tokenizer.pad_token, tokenizer.pad_token_id) == (2000, "<unk>", 0)
    assert model.config.vocab_size == 2000
    assert model.generation_config.eos_token_id in (2, [2])
    return model


ORIGINALS = {
    "one .bin, tower outside": {"suffix": "bin", "rules": None},
    "one .safetensors, tower outside": {"rules": None},
    "shards of .bin, llava_llama": {"suffix": "bin", "files": 3, "model_type": "llava_llama"},
    "shards of .safetensors": {"files": 3},
    "tower one level up": {"rules": FLAT_TOWER},
    "saved under DDP": {"rules": WRAPPED},
}


@pytest.mark.parametrize("form", ORIGINALS.values(), ids=ORIGINALS)
def test_original_folders(golden, recorded, released, tmp_path, form):
    form = dict(form)
    rules = form.pop("rules", [])
    state = {n: v for n, v in released.items() if rules is not None or "vision_tower" not in n}
    folder = original_folder(golden, tmp_path / "model", renamed(state, *(rules or [])), **form)
    check_recorded(golden, recorded, folder)


DIALECTS = {"4.36": OLD, "4.52": RUNTIME_4, "5": RUNTIME_5, "saved by 5": SAVED_BY_5}


@pytest.mark.parametrize("rules", DIALECTS.values(), ids=DIALECTS)
def test_huggingface_folders(golden, recorded, released, tmp_path, capsys, rules):
    model = check_recorded(golden, recorded, huggingface_folder(golden, tmp_path / "model", released, rules))
    assert (model.config.model_type, model.config.image_aspect_ratio) == ("llava_llama", "pad")
    assert len(re.findall("note: .*padded to squares", capsys.readouterr().err)) == 1


@pytest.mark.parametrize("original_names", [True, False])
def test_folders_that_transformers_writes(golden, recorded, released, tmp_path, original_names):
    from transformers import LlavaForConditionalGeneration

    first = huggingface_folder(golden, tmp_path / "first", released)
    theirs = LlavaForConditionalGeneration.from_pretrained(first, dtype=torch.float32)
    second = tmp_path / "second"
    theirs.save_pretrained(second, save_original_format=original_names)
    huggingface_tokenizer(golden, second)
    # What transformers 5's processor keeps of an image processor that pads by itself.
    image_processor = json.loads((first / "preprocessor_config.json").read_text())
    image_processor.update(image_processor_type="LlavaImageProcessor", do_pad=True)
    write(second / "processor_config.json", {"image_processor": image_processor})
    check_recorded(golden, recorded, second)


# --- what a config says and leaves out


def original(golden, folder, **changes):
    from llava.model.builder import read_config

    huggingface_tokenizer(golden, copied(golden, folder, "preprocessor_config.json", source="tiny-clip"))
    write(folder / "config.json", huggingface_config(golden, **changes))
    return read_config(folder, "--model-path")


def test_sizes_that_a_config_leaves_out_are_those_of_transformers(golden, tmp_path):
    sparse = {"model_type": "llama", "rms_norm_eps": 1e-05, "max_position_embeddings": 4096, "vocab_size": PADDED}
    config = original(golden, tmp_path / "model", text_config=sparse, vision_config=None)
    expected = {
        **{"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
        **{"max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "vocab_size": 2000, "pad_token_id": 0},
        **{"rope_theta": 10000.0, "rope_scaling": None, "bos_token_id": 1, "eos_token_id": 2},
        **{"mm_hidden_size": 1024, "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch"},
        "tie_word_embeddings": False,
    }
    assert {key: config[key] for key in expected} == expected
    tower = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    tower |= {"image_size": 336, "patch_size": 14, "projection_dim": 768, "hidden_act": "quick_gelu"}
    assert {key: config["mm_vision_config"][key] for key in tower} == tower


def test_what_a_config_says_is_kept(golden, tmp_path):
    text = huggingface_config(golden)["text_config"]
    text |= {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}, "tie_word_embeddings": True}
    config = original(
        golden,
        tmp_path / "model",
        text_config={**text, "num_key_value_heads": 2},
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        mm_vision_tower="openai/clip",
        image_aspect_ratio="square",
    )
    assert (config["rope_theta"], config["rope_scaling"]["rope_type"]) == (5e5, "linear")
    assert (config["rope_scaling"]["factor"], config["tie_word_embeddings"]) == (2.0, True)
    assert (config["num_key_value_heads"], config["mm_vision_tower"]) == (2, "openai/clip")
    assert (config["mm_vision_select_layer"], config["mm_vision_select_feature"]) == (-1, "cls_patch")
    assert config["image_aspect_ratio"] == "square"


def test_rows_that_the_tokenizer_has_pieces_for_are_kept(golden, tmp_path):
    text = huggingface_config(golden)["text_config"]
    assert original(golden, tmp_path / "a", image_token_index=1999)["vocab_size"] == PADDED
    assert original(golden, tmp_path / "b", text_config={**text, "vocab_size": 2067})["vocab_size"] == 2067
    (tmp_path / "c").mkdir()
    write(tmp_path / "c" / "tokenizer.json", {"added_tokens": [{"content": "<box>", "id": 2002, "special": False}]})
    assert original(golden, tmp_path / "c")["vocab_size"] == PADDED


# --- tokenizers


def test_a_llama_tokenizer_without_its_sentencepiece_model_gives_the_recorded_ids(golden, tmp_path):
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer, decoders, models, processors
    from transformers.tokenization_utils_base import generate_merges

    from llava.tokenization import load_tokenizer

    pieces = SentencePieceProcessor(model_file=str(golden / "tiny-llava-original" / "tokenizer.model"))
    ids = range(pieces.get_piece_size())
    vocabulary = {pieces.id_to_piece(i): i for i in ids}
    merges = generate_merges(vocabulary, {pieces.id_to_piece(i): pieces.get_score(i) for i in ids})
    model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    backend = Tokenizer(model)
    backend.decoder = decoders.ByteFallback()
    backend.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    backend.add_special_tokens(["<unk>", "<s>", "</s>", "<image>", "<pad>"])
    for legacy in (False, True):
        name = f"HADPO_tf4.31.0_legacy{int(legacy)}"
        rows = json.loads((golden / "labels" / f"{name}.json").read_text(encoding="utf-8"))
        folder = huggingface_tokenizer(golden, tmp_path / name)
        (folder / "tokenizer.model").unlink()
        backend.save(str(folder / "tokenizer.json"))
        config = json.loads((folder / "tokenizer_config.json").read_text())
        write(folder / "tokenizer_config.json", {**config, "legacy": legacy})
        tokenizer = load_tokenizer(folder, 2000)
        assert (len(tokenizer), tokenizer.pad_token_id) == (2000, 0)
        other = {row["text"] for row in rows["raw_tokenizer"] if tokenizer(row["text"]).input_ids != row["input_ids"]}
        assert other == (set() if legacy else {"yes</s>USER: hi"})  # one piece "USER", as in transformers 4.37
        for row in rows["tokenizer_image_token"]:
            assert tokenizer_image_token(row["text"], tokenizer) == row["input_ids"], row["text"]


def test_legacy_in_the_settings_means_sentencepiece_whatever_class_they_name(golden, tmp_path):
    from llava.tokenization import SentencePieceTokenizer, load_tokenizer

    folder = huggingface_tokenizer(golden, tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    write(folder / "tokenizer_config.json", {**config, "tokenizer_class": "PreTrainedTokenizerFast"})
    tokenizer = load_tokenizer(folder, 2000)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert "<image>" not in tokenizer.get_added_vocab()


# --- adapters and connectors


@pytest.fixture(scope="module")
def lora(golden):
    """The recorded adapter's two files."""
    names = ("adapter_model.bin", "non_lora_trainables.bin")
    return [torch.load(golden / "tiny-llava-lora" / name, weights_only=True) for name in names]


LORA, BESIDE = r"^base_model\.model\.model\.", r"^base_model\.model\.model\.mm_projector\."
PEFT_HF = [
    (rf"^base_model\.model\.model\.mm_projector\.{a}\.", rf"multi_modal_projector.linear_{n}.")
    for a, n in ((0, 1), (2, 2))
]
ADAPTERS = {
    "transformers 5": ([(LORA, "base_model.model.model.language_model.")], []),
    "transformers 4": ([(LORA, "base_model.model.language_model.model.")], [(BESIDE, "model.model.mm_projector.")]),
    "a state dict": ([(r"(lora_[AB])", r"\1.default")], [(BESIDE, "model.mm_projector.")]),
    "under DDP": ([(r"^", "module.")], [(BESIDE, "module.model.mm_projector.")]),
    "compiled": ([(r"^", "_orig_mod.")], [(BESIDE, "mm_projector.")]),
    "connector of transformers": ([], PEFT_HF),
}


@pytest.fixture(scope="module")
def huggingface_base(golden, released, tmp_path_factory):
    return huggingface_folder(golden, tmp_path_factory.mktemp("base") / "model", released)


@pytest.mark.parametrize("beside", ["non_lora_trainables.bin", "adapter_model.bin"])
@pytest.mark.parametrize(("rules", "connector_rules"), ADAPTERS.values(), ids=ADAPTERS)
def test_adapters(golden, recorded, lora, huggingface_base, tmp_path, rules, connector_rules, beside):
    weights, others = renamed(lora[0], *rules), renamed(lora[1], *connector_rules)
    copied(golden, tmp_path, "adapter_config.json", source="tiny-llava-lora")
    if beside == "adapter_model.bin":  # PEFT's modules_to_save, of a model that is Hugging Face's
        torch.save({**weights, **others}, tmp_path / beside)
        base = huggingface_base
    else:
        copied(golden, tmp_path, "config.json", source="tiny-llava-lora")
        torch.save(weights, tmp_path / "adapter_model.bin")
        torch.save(others, tmp_path / beside)
        base = golden / "tiny-llava-original"
    _, model, _, _ = load_pretrained_model(str(tmp_path), str(base))
    merged = np.load(golden / "forward" / "lora_merged_logits_HADPO_tf4.31.0.npz")
    with torch.no_grad():
        out = model(**inputs_of(recorded, "b2_mixed_len"))
    check_logits(merged, "logits_merged", out.logits)


WAYS = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.0.self_attn.v_proj": 32}},
    "one layer": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "the tower alone": {"target_modules": r".*vision_tower.*q_proj"},
    "whole modules": {"modules_to_save": ["lm_head", "mm_projector"]},
}


@pytest.mark.parametrize("settings", WAYS.values(), ids=WAYS)
def test_what_peft_can_make_of_a_lora_is_read_as_peft_has_it(recorded, loaded, tmp_path, settings):
    import copy

    from peft import LoraConfig, get_peft_model

    model, batch = loaded[1], inputs_of(recorded, "b1_single")
    settings = {"target_modules": r".*\.layers\..*self_attn\.[qv]_proj", "r": 4, "lora_alpha": 8, **settings}
    if "layers_to_transform" in settings:
        settings |= {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ".*vision_tower.*"}
    theirs = get_peft_model(copy.deepcopy(model), LoraConfig(**settings)).eval()
    with torch.no_grad():
        start = model(**batch).logits
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)) / 20
        want = theirs(**batch).logits
    theirs.save_pretrained(tmp_path)
    _, ours, _, _ = load_pretrained_model(str(tmp_path), model.name_or_path)
    with torch.no_grad():
        torch.testing.assert_close(ours(**batch).logits, want, atol=1e-4, rtol=0)
    assert (want - start).abs().max() > 0.05


def test_an_adapter_of_leaf_names_keeps_them_and_trains(golden, huggingface_base):
    from llava.model.adapter import LORA_EXCLUDED, load_adapter

    model = load_pretrained_model(str(huggingface_base), None)[1]
    settings = load_adapter(model, golden / "tiny-llava-lora", trainable=True).peft_config["default"]
    names = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert (settings.target_modules, settings.exclude_modules) == (names, LORA_EXCLUDED)
    assert (settings.r, settings.lora_alpha) == (8, 16)
    assert all(p.requires_grad for name, p in model.named_parameters() if "lora_" in name)


def test_training_starts_from_a_huggingface_folder(run_script, golden, huggingface_base, dpo_flags, tmp_path):
    """As it does from the original one, and what it saves stands on that folder."""
    runs = {"original": golden / "tiny-llava-original", "huggingface": huggingface_base}
    for name, base in runs.items():
        flags = [*dpo_flags, "--model_name_or_path", base, "--output_dir", tmp_path / name, "--lora_enable", True]
        succeed(run_script("train_dpo", *flags, "--max_steps", 3, "--logging_steps", 1, "--mm_projector_lr", 1e-3))
    want, got = (losses_of(tmp_path / name) for name in runs)
    assert len(want) == 3
    assert got == pytest.approx(want, rel=1e-6)
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = [
            load_pretrained_model(str(tmp_path / name), None)[1](torch.tensor([[1, -200, 300]]), images=pixels).logits
            for name in runs
        ]
    torch.testing.assert_close(logits[1], logits[0], atol=1e-5, rtol=0)
    moved = load_pretrained_model(str(runs["original"]), None)[1](torch.tensor([[1, -200, 300]]), images=pixels).logits
    assert (logits[0] - moved).abs().max() > 1e-3


CONNECTORS = {
    "bare": [(r"^model\.", "")],
    "doubled": [(r"^", "model.")],
    "PEFT's": [(r"^", "base_model.model.")],
    "transformers 4": connector(""),
    "transformers 5": connector("model."),
}


@pytest.mark.parametrize("rules", CONNECTORS.values(), ids=CONNECTORS)
def test_connectors(golden, tmp_path, rules):
    from llava.model.checkpoint import read_connector

    weights = torch.load(golden / "tiny-llava-pretrain" / "mm_projector.bin", weights_only=True)
    torch.save(renamed(weights, *rules), tmp_path / "mm_projector.bin")
    found = read_connector(tmp_path / "mm_projector.bin")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], value) for name, value in weights.items())


# --- dtypes


@pytest.mark.parametrize("kept", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("asked", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_have_the_dtype_that_was_asked_for(golden, released, tmp_path, kept, asked):
    state = {name: value.to(kept) for name, value in renamed(released).items()}
    folder = original_folder(golden, tmp_path / "model", state)
    model = load_pretrained_model(str(folder), None, dtype=asked)[1]
    assert {p.dtype for p in model.parameters()} == {asked}
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(model.get_parameter(name), state[name].to(asked))


# --- a Qwen as zero_nlp builds and trains it


@pytest.fixture(scope="module")
def zero_nlp(golden, qwen, tmp_path_factory):
    """Transformers' own class on a Qwen2 and a CLIP, with <image> as the tokenizer's last id, and its folder."""
    from transformers import AutoTokenizer, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen2Config

    folder = tmp_path_factory.mktemp("zero_nlp") / "model001"
    tokenizer = AutoTokenizer.from_pretrained(qwen)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    config = LlavaConfig(
        text_config=Qwen2Config.from_pretrained(qwen),
        vision_config=CLIPVisionConfig.from_pretrained(golden / "tiny-clip"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(1)
    model = LlavaForConditionalGeneration(config).eval()
    for parameter in model.parameters():  # norms and biases start at ones and zeros, which tell nothing apart
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    copied(golden, folder, "preprocessor_config.json", source="tiny-clip")
    return model, tokenizer, folder


def check_equal(theirs, tokenizer, ours, image_token):
    """Both give the same logits for a question with a picture: 16 <image> there are one mark here."""
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(2))
    question = "<|im_start|>user\n<image>\na man riding<|im_end|>\n"
    ids = tokenizer_image_token(question, tokenizer, return_tensors="pt")[None]
    at = ids[0].tolist().index(-200)
    expanded = torch.cat([ids[:, :at], torch.full((1, 16), image_token), ids[:, at + 1 :]], 1)
    with torch.no_grad():
        want = theirs(input_ids=expanded, pixel_values=pixels, attention_mask=torch.ones_like(expanded)).logits
        got = ours(ids, images=pixels).logits
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_a_qwen_gives_transformers_logits(zero_nlp, capsys):
    theirs, tokenizer, folder = zero_nlp
    own, model, _, _ = load_pretrained_model(str(folder), None)
    assert (model.config.model_type, model.config.vocab_size) == ("llava_qwen2", 320)
    assert model.config.image_aspect_ratio == "square"
    assert (own.pad_token, model.config.pad_token_id) == ("<|endoftext|>", tokenizer.pad_token_id)
    assert "padded to squares" not in capsys.readouterr().err
    check_equal(theirs, own, model, theirs.config.image_token_index)


def test_an_old_adapter_with_whole_modules_and_the_tower_in_it(golden, zero_nlp, tmp_path):
    import copy

    theirs, _, folder = zero_nlp
    draw = torch.Generator().manual_seed(3)
    merged, adapter, rank = copy.deepcopy(theirs), {}, 4
    with torch.no_grad():
        for name, module in merged.named_modules():
            leaf = name.rsplit(".", 1)[-1]
            if leaf not in ("q_proj", "k_proj", "v_proj", "o_proj"):  # what bare names met: CLIP's q, k and v as well
                continue
            a = torch.randn(rank, module.in_features, generator=draw)
            b = torch.randn(module.out_features, rank, generator=draw) / 10
            module.weight += 8 / rank * b @ a  # PEFT's alpha where it is not set
            old = name.replace("model.language_model.", "language_model.model.")
            old = old.replace("model.vision_tower.", "vision_tower.vision_model.")
            adapter |= {f"base_model.model.{old}.lora_A.weight": a, f"base_model.model.{old}.lora_B.weight": b}
        for name, parameter in merged.model.multi_modal_projector.named_parameters():
            parameter += torch.randn(parameter.shape, generator=draw) / 10
            adapter[f"base_model.model.multi_modal_projector.{name}"] = parameter.clone()
    assert any("vision_model.encoder.layers.2" in name for name in adapter)
    save_file(adapter, tmp_path / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_dropout": 0.05, "bias": "none"}
    settings["target_modules"] = ["q_proj", "k_proj", "v_proj", "o_proj"]
    write(tmp_path / "adapter_config.json", {**settings, "modules_to_save": ["multi_modal_projector"]})
    own, model, _, _ = load_pretrained_model(str(tmp_path), str(folder))
    check_equal(merged, own, model, theirs.config.image_token_index)

    from llava.model.delta import read_chain

    chain = read_chain(str(tmp_path), "--model-path", base=str(folder))
    chain.configured()
    assert chain.changed == {"lora", "projector", "vision_tower"}
    folded = chain.state()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(folded[name], value, atol=1e-6, rtol=0)


# --- what is refused


FOREIGN = {
    "llava_next": ({"model_type": "llava_next"}, r"LLaVA-1\.6 \(llava_next, anyres\).*expected LLaVA-1\.5"),
    "vipllava": ({"model_type": "vipllava"}, r"model_type 'vipllava'.*expected llava"),
    "clip": ({"model_type": "clip"}, r"is a CLIP, a vision tower; pass it as --vision_tower"),
    "mistral": (
        {"text_config": {"model_type": "mistral"}},
        "text_config has model_type 'mistral'; expected llama or q",
    ),
    "siglip": ({"vision_config": {"model_type": "siglip_vision_model"}}, "vision_config has model_type 'siglip_vision"),
    "layers": ({"vision_feature_layer": [-2, -5]}, r"vision_feature_layer \[-2, -5\].*one layer"),
    "relu": ({"projector_hidden_act": "relu"}, "projector_hidden_act relu.*expected gelu"),
    "no bias": ({"multimodal_projector_bias": False}, "multimodal_projector_bias false.*expected true"),
    "padding": ({"pad_token_id": "x"}, r"config\.json: key 'pad_token_id' must be a int, found str"),
    "strategy": ({"vision_feature_select_strategy": "some"}, r"config\.json: .*vision_feature_select_strategy"),
}


@pytest.mark.parametrize(("changes", "message"), FOREIGN.values(), ids=FOREIGN)
def test_models_of_another_kind(golden, tmp_path, changes, message):
    write(tmp_path / "config.json", huggingface_config(golden, **changes))
    with pytest.raises(UserError, match=message):
        load_pretrained_model(str(tmp_path), None)


WITHOUT_CONFIG = {
    "llava-v1.5-7b.Q4_K_M.gguf": r"holds GGUF files \(llama\.cpp\)",
    "adapter_model.safetensors": r"adapter_model\.safetensors without adapter_config\.json",
    "tokenizer.model": r"config\.json: no such file \(found tokenizer\.model\); expected the folder of a whole model",
}


@pytest.mark.parametrize(("name", "message"), WITHOUT_CONFIG.items(), ids=WITHOUT_CONFIG)
def test_folders_without_config(tmp_path, name, message):
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=message):
        load_pretrained_model(str(tmp_path), None)


def test_names_of_no_known_format(golden, released, tmp_path):
    folder = huggingface_folder(golden, tmp_path / "model", released, [(r"^", "transformer.")])
    with pytest.raises(UserError, match=r"no vision tower in the weights \(first: transformer\.lm_head"):
        load_pretrained_model(str(folder), None)
    text_only = [(TOWER, "vision_tower."), (r"^", "transformer.")]
    save_file(renamed(padded(released), *text_only), folder / "model.safetensors")
    with pytest.raises(UserError, match=r"of no known format \(first: transformer\.lm_head"):
        load_pretrained_model(str(folder), None)


def test_quantized_weights(golden, tmp_path):
    config = json.loads((golden / "tiny-llava-original" / "config.json").read_text())
    write(tmp_path / "config.json", {**config, "quantization_config": {"quant_method": "awq"}})
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match=r"quantized \(awq\)"):
        load_pretrained_model(str(tmp_path), None)


def test_a_vision_tower_that_is_a_llava(golden, huggingface_base):
    from llava.model.multimodal_encoder.builder import vision_config

    for folder in (golden / "tiny-llava-original", huggingface_base):
        with pytest.raises(UserError, match="model type 'llava' is not a CLIP vision tower"):
            vision_config(str(folder))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
DAMAGED = {
    "pointer.bin": (POINTER, "a git-LFS pointer and not the file itself; run git lfs pull"),
    "pointer.safetensors": (POINTER, "a git-LFS pointer and not the file itself; run git lfs pull"),
    "page.bin": (b"<!DOCTYPE html><html>", r"damaged weight file \(neither a zip nor a pickle\); download it again"),
    "short.bin": (b"xx", r"damaged weight file \(neither a zip nor a pickle\); download it again"),
    "empty.bin": (b"", "damaged weight file"),
}


@pytest.mark.parametrize(("name", "content", "message"), [(n, *rest) for n, rest in DAMAGED.items()], ids=DAMAGED)
def test_files_that_are_no_weights(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}: {message}"):
        read_tensors(tmp_path / name)


def test_a_tower_whose_shape_is_out_of_reach(golden, tmp_path):
    folder = shutil.copytree(golden / "tiny-llava-original-with-tower", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    write(folder / "config.json", {**config, "mm_vision_tower": "./gone"})
    with pytest.raises(UserError, match=r"gone: no such folder; the weights hold the tower, but its shape.*download"):
        load_pretrained_model(str(folder), None)


LAYER = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
SPOILT = {
    "other base": ({LAYER: torch.zeros(8, 128)}, {}, r"shape \(8, 128\).*trained on another model"),
    "more layers": ({LAYER.replace(".0.", ".7."): torch.zeros(8, 64)}, {}, r"model has not.*layers\.7.*another model"),
    "half": ({LAYER: None}, {}, r"1 LoRA weights are missing.*q_proj\.lora_A"),
    "other kind": ({}, {"peft_type": "IA3"}, r"adapter_config\.json: peft_type IA3.*expected LORA"),
    "bias": ({}, {"lora_bias": True}, "lora_bias cannot be loaded"),
    "pissa": ({}, {"init_lora_weights": "pissa"}, "init_lora_weights pissa cannot be loaded"),
    "text for a number": ({}, {"r": "8"}, r"adapter_config\.json: key 'r' must be a int, found str"),
    "list of patterns": ({}, {"rank_pattern": []}, "key 'rank_pattern' must be a dict, found list"),
    "pattern": ({}, {"alpha_pattern": {"w_pack": 4}}, "pattern w_pack fits none"),
    "longer head": (
        {"base_model.model.lm_head.weight": torch.zeros(50, 64)},
        {},
        r"lm_head\.weight has shape \(50, 64\)",
    ),
}


@pytest.mark.parametrize(("weights", "settings", "message"), SPOILT.values(), ids=SPOILT)
def test_adapters_that_do_not_fit(golden, lora, tmp_path, weights, settings, message):
    given = json.loads((golden / "tiny-llava-lora" / "adapter_config.json").read_text())
    write(tmp_path / "adapter_config.json", {**given, **settings})
    torch.save({k: v for k, v in {**lora[0], **weights}.items() if v is not None}, tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match=message):
        load_pretrained_model(str(tmp_path), str(golden / "tiny-llava-original"))


class Payload:
    """What a malicious pickle would run."""

    def __reduce__(self):
        return print, ("arbitrary code ran",)


@pytest.mark.parametrize("name", ["adapter_model.bin", "non_lora_trainables.bin", "mm_projector.bin"])
def test_pickles_that_could_run_code(golden, tmp_path, capsys, name):
    source = "tiny-llava-pretrain" if name == "mm_projector.bin" else "tiny-llava-lora"
    folder = shutil.copytree(golden / source, tmp_path / "delta")
    torch.save({"x": Payload()}, folder / name)
    with pytest.raises(UserError, match=f"{name}: refused: .*could run code"):
        load_pretrained_model(str(folder), str(golden / "tiny-llava-original"))
    assert "arbitrary code ran" not in capsys.readouterr().out


def test_a_lora_that_names_another_base_is_told(golden, tmp_path, capsys):
    from llava.model.delta import read_chain

    lora = shutil.copytree(golden / "tiny-llava-lora", tmp_path / "lora")
    read_chain(str(lora), "--model-path", None, str(golden / "tiny-llava-original"))
    assert capsys.readouterr().err == ""
    for _ in range(2):
        read_chain(str(lora), "--model-path", None, str(golden / "tiny-vicuna"))
    told = f"note: {lora} was trained on tiny-llava-original (its adapter_config.json), and is put on "
    assert capsys.readouterr().err.count(told) == 1
