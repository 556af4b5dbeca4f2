"""What tuning changed inside a model, against transformers' own outputs and against attention written out by hand."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_generation import pictures
from test_post_block import with_block

from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import template
from llava.errors import UserError
from llava.eval import diagnose
from llava.eval.answer import Answerer
from llava.eval.diagnostics import read_diagnostics
from llava.interruption import EXIT_STOPPED
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.delta import read_chain

HADPO = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions. USER: <image>\n{} ASSISTANT:"
)


@pytest.fixture
def run(run_script, pope_world, golden, tmp_path):
    """``run(*flags) -> (exit code, stderr, diagnostics by set)``: the recorded LoRA and its base, one picture."""

    def run(*more, folder="out", tuned=golden / "tiny-llava-lora", base=golden / "tiny-llava-original", limit=1):
        flags = ["--coco_path", pope_world / "coco", "--pope_path", pope_world / "pope", "--limit", limit]
        flags += ["--model-path", tuned, "--output_dir", tmp_path / folder, *(["--model-base", base] if base else [])]
        code, _, err = run_script("llava.eval.diagnose", *flags, *more)
        return code, err, read_diagnostics(tmp_path / folder) if code == 0 else {}

    return run


@pytest.fixture
def loads(monkeypatch):
    """Names of the folders of the models that runs load."""
    names = []
    load = diagnose.load_pretrained_model
    monkeypatch.setattr(
        diagnose, "load_pretrained_model", lambda path, *a, **k: names.append(Path(path).name) or load(path, *a, **k)
    )
    return names


@pytest.fixture(scope="module")
def first_questions(pope_world):
    """The six questions about the first picture of the adversarial set."""
    lines = (pope_world / "pope" / "coco_pope_adversarial.json").read_text().splitlines()[:6]
    return [json.loads(line) for line in lines]


def inside(loaded, path, question):
    """(V,) logits, hidden states at every depth and (L, H, T) attention to the picture, as transformers gives them."""
    from PIL import Image

    tokenizer, model, image_processor = loaded
    ids = tokenizer_image_token(HADPO.format(question), tokenizer, return_tensors="pt")
    with Image.open(path) as picture:
        images = process_images([picture], image_processor, model.config)
    last = []  # of the last layer transformers lists only what the norm makes of it
    hook = model.model.layers[-1].register_forward_hook(lambda _, __, out: last.append(out))
    with torch.no_grad():
        out = model(input_ids=ids[None], images=images, output_hidden_states=True, output_attentions=True)
    hook.remove()
    begin = ids.tolist().index(IMAGE_TOKEN_INDEX)
    end = begin + out.logits.shape[1] - len(ids) + 1
    hidden = torch.stack([h[0, -1] for h in (*out.hidden_states[:-1], last[0], out.hidden_states[-1])])
    return out.logits[0, -1].double(), hidden, torch.stack([a[0, :, -1, begin:end] for a in out.attentions])


def test_numbers_are_those_of_a_plain_forward(run, golden, pope_world, tmp_path, first_questions):
    code, err, all_found = run("--set", "all")
    assert code == 0, err
    assert [(name, len(one.ids)) for name, one in all_found.items()] == [
        *(("random", 6), ("popular", 6), ("adversarial", 6))
    ]
    found = all_found["adversarial"]
    rows = [json.loads(line) for line in (tmp_path / "out" / "diagnostics_adversarial.jsonl").read_text().splitlines()]
    assert [(r["question_id"], r["image"], r["question"], r["label"]) for r in rows] == [
        (r["question_id"], r["image"], r["text"], r["label"]) for r in first_questions
    ]
    assert found.depth_names == ["embedding", "layer 1", "layer 2", "norm"]
    assert found.attention_block is None and found.map_block is None
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "diagnose.lock",
        *sorted(f"diagnostics_{n}.{s}" for n in all_found for s in ("json", "jsonl", "npz")),
    ]

    base_folder = str(golden / "tiny-llava-original")
    base = load_pretrained_model(base_folder, None, attn_implementation="eager")[:3]
    tuned = load_pretrained_model(str(golden / "tiny-llava-lora"), base_folder, attn_implementation="eager")[:3]
    # As LLaMA's tokenizer begins them behind "ASSISTANT:", each a token of its own or the same piece.
    yes, no = (
        {tokenizer_image_token(HADPO.format("?") + f" {word}", base[0])[len(open_ids(base[0]))] for word in words}
        for words in (("Yes", "yes"), ("No", "no"))
    )
    for place in (0, 5):
        path = pope_world / "coco" / "val2014" / rows[place]["image"]
        logits, hidden, weights = inside(base, path, rows[place]["question"])
        logits_after, hidden_after, weights_after = inside(tuned, path, rows[place]["question"])
        p, q = logits.log_softmax(0), logits_after.log_softmax(0)
        kl = F.kl_div(q, p, log_target=True, reduction="sum").item()
        assert kl > 1e-4
        assert found.kl[place] == pytest.approx(kl, abs=1e-5)
        for gaps, logp in ((found.base_gap, p), (found.tuned_gap, q)):
            assert gaps[place] == pytest.approx(math.log(sum_of(logp, yes) / sum_of(logp, no)), abs=1e-5)
        moved = (hidden_after - hidden).norm(dim=1) / hidden.norm(dim=1)
        assert moved[0] == 0 and (moved[1:] > 1e-3).all()
        np.testing.assert_allclose(found.hidden_change[place], moved, atol=1e-5)
        for shares, maps, w in (
            (found.attention_base, found.maps_base, weights),
            (found.attention_tuned, found.maps_tuned, weights_after),
        ):
            np.testing.assert_allclose(shares[place], w.sum(2).mean(1), atol=1e-5)
            wanted = w.mean((0, 1)).reshape(found.grid, found.grid)
            assert maps.dtype == np.float16
            np.testing.assert_allclose(maps[place], wanted, rtol=2e-3, atol=1e-7)  # float16 has 11 bits


def open_ids(tokenizer):
    return tokenizer_image_token(HADPO.format("?"), tokenizer)


def sum_of(logp, ids):
    return logp[sorted(ids)].exp().sum().item()


def test_gaps_are_those_of_the_scores_and_a_model_beside_itself_is_all_zero(
    run, loaded, golden, pope_world, tmp_path, first_questions
):
    """A whole model is compared with what its run.json names; here a copy of it."""
    tuned = tmp_path / "tuned"
    shutil.copytree(golden / "tiny-llava-original", tuned)
    (tmp_path / "tiny-clip").symlink_to(golden / "tiny-clip")
    card = {"arguments": {"model_name_or_path": "tiny-llava-original"}, "working_directory": str(golden)}
    (tuned / "run.json").write_text(json.dumps(card))
    code, err, found = run("--prompt", "llava", tuned=tuned, base=None)
    assert code == 0, err
    found = found["adversarial"]
    assert found.meta["base"] == str(golden / "tiny-llava-original")
    assert not found.kl.any() and not found.hidden_change.any()
    for before, after in (
        ("base_gap", "tuned_gap"),
        ("attention_base", "attention_tuned"),
        ("maps_base", "maps_tuned"),
    ):
        np.testing.assert_array_equal(getattr(found, before), getattr(found, after))

    tokenizer, model, image_processor = loaded
    suffix = "\nAnswer the question using a single word or phrase."
    answerer = Answerer(model, tokenizer, image_processor, template("vicuna_v1", ""), 1, suffix, scores=True)
    assert answerer.rules is not None  # on trees and with another kernel
    pixels = answerer.prepare(str(pope_world / "coco" / "val2014" / first_questions[0]["image"]), "")[None]
    said = answerer.ask(pixels, [(0, row["text"]) for row in first_questions], 6)
    np.testing.assert_allclose(1 / (1 + np.exp(-found.tuned_gap)), [one.score for one in said], atol=1e-4)


@torch.no_grad()
def test_attention_of_a_post_block_by_hand():
    """A Qwen2 with grouped queries; everything between the norm and the head is computed again from the weights."""
    model = with_block("interaction", "")
    model.set_attn_implementation("eager")
    ids = [1, 5, 9, IMAGE_TOKEN_INDEX, 4, 8, 30]
    seen = model.look(pictures(model, 1))
    with diagnose.Watch(model) as watch:
        glance = watch.glance(seen, ids)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())

    out = model(input_ids=torch.tensor([ids]), images=pictures(model, 1), output_hidden_states=True)
    torch.testing.assert_close(glance.logits, out.logits[0, -1])
    x = out.hidden_states[-1][0]  # (n, D) behind the norm
    torch.testing.assert_close(glance.hidden[-2], x[-1])
    layer, tokens = model.post_block.layers[0], len(seen.features[0])
    heads, size = model.config.num_attention_heads, layer.tokens.head_dim
    assert model.config.num_key_value_heads == heads // 2

    def rms(x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    def attend(attention, asking, source, positions=None):
        """(H, m) weights of the query ``asking`` (D,), and what they bring."""
        q = attention.q_proj(rms(asking)).view(heads, size)
        k, v = (proj(source).view(-1, heads // 2, size).repeat_interleave(2, 1) for proj in KV(attention))
        if positions is not None:
            q, k = turn(q[None], positions[-1:])[0], turn(k, positions)
        weights = torch.stack([(k[:, h] @ q[h] / size**0.5).softmax(0) for h in range(heads)])
        return weights, torch.cat([weights[h] @ v[:, h] for h in range(heads)])

    def turn(x, positions):
        angles = positions[:, None] / 10000 ** (torch.arange(0, size, 2) / size)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    weights, brought = attend(layer.tokens, x[-1], rms(x), torch.arange(len(x)))
    torch.testing.assert_close(glance.block_tokens, weights[:, 3 : 3 + tokens].mean(0)[None], atol=1e-5, rtol=0)
    state = x[-1] + layer.tokens.way.proj(brought)
    weights, brought = attend(layer.pictures, state, rms(seen.seen[0]))
    torch.testing.assert_close(glance.block_pictures, weights.mean(0)[None], atol=1e-5, rtol=0)
    state = state + layer.pictures.way.proj(brought)
    state = state + layer.mlp.way.proj(F.silu(layer.mlp.up(rms(state))))
    torch.testing.assert_close(glance.hidden[-1], state, atol=1e-5, rtol=1e-5)


def KV(attention):
    return attention.k_proj, attention.v_proj


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "options", "rows", "looks"),
    [
        ("interaction", "keys=connector,align=mlp,depth=2", 2, 2),
        ("interaction", "self_attention=false", 0, 1),
        ("interaction", "cross_attention=false,depth=3", 3, 0),
        ("mlp", "", 0, 0),
    ],
)
def test_what_a_block_does_not_have_is_not_there(name, options, rows, looks):
    model = with_block(name, options)
    model.set_attn_implementation("eager")
    seen = model.look(pictures(model, 1))
    with diagnose.Watch(model) as watch:
        glance = watch.glance(seen, [1, IMAGE_TOKEN_INDEX, 4, 8])
    tokens = len(seen.features[0])
    assert (glance.block_tokens.shape, glance.block_pictures.shape) == ((rows, tokens), (looks, tokens))
    torch.testing.assert_close(glance.block_pictures.sum(1), torch.ones(looks))
    shares = glance.block_tokens.sum(1)
    assert ((shares > 0) & (shares < 1)).all()


def test_a_new_block_is_compared_with_the_norm_of_its_base(run, golden, tmp_path):
    """A delta with a trained block; that it changes nothing below itself is seen."""
    tuned = block_delta(golden, tmp_path / "block")
    code, err, found = run("--set", "random", tuned=tuned, base=None)
    assert code == 0, err
    found = found["random"]
    assert found.depth_names == ["embedding", "layer 1", "layer 2", "norm", "post block"]
    assert not found.hidden_change[:, :-1].any() and (found.hidden_change[:, -1] > 0.01).all()
    np.testing.assert_array_equal(found.attention_base, found.attention_tuned)
    assert found.attention_block.shape == (6, 1)
    np.testing.assert_allclose(found.map_block.astype(float).sum((1, 2)), 1, atol=2e-3)
    assert found.meta["base"] == str(golden / "tiny-llava-original")


def block_delta(golden, folder):
    """A folder as training leaves it behind: a block of random weights over the recorded model."""
    from safetensors.torch import save_file

    from llava.model.post_block.builder import block_settings, fresh_block

    base = read_chain(str(golden / "tiny-llava-original"), "")
    _, model, *_ = load_pretrained_model(str(base.newest), None)
    model.config.post_block = block_settings("interaction", None)
    weights = fresh_block(model.config, 1)
    for key, value in weights.items():
        weights[key] = torch.randn(value.shape, generator=torch.Generator().manual_seed(0)) * 0.05
    folder.mkdir()
    save_file(weights, folder / "delta.safetensors")
    config = json.loads((base.newest / "config.json").read_text())
    config |= {"post_block": model.config.post_block, "mm_vision_tower": str(golden / "tiny-clip")}
    (folder / "config.json").write_text(json.dumps(config))
    entry = {"path": str(base.newest), "sha256": base.hashes[-1]}
    (folder / "delta.json").write_text(json.dumps({"format": 1, "base": [entry], "parts": ["post_block"]}))
    return folder


def test_the_base_of_two_deltas_whose_root_has_moved(golden, tmp_path):
    """Compared with the delta below the last one, which ``--model-base`` leads to or is."""
    for name in ("tiny-llava-original", "tiny-clip"):
        shutil.copytree(golden / name, tmp_path / "before" / name)
    one = block_delta(tmp_path / "before", tmp_path / "one")
    shutil.copytree(one, tmp_path / "two")
    entry = {"path": str(one), "sha256": read_chain(str(one), "").hashes[-1]}
    (tmp_path / "two" / "delta.json").write_text(json.dumps({"format": 1, "base": [entry], "parts": ["post_block"]}))
    (tmp_path / "before").rename(tmp_path / "after")
    root = tmp_path / "after" / "tiny-llava-original"
    base = diagnose.find_base(diagnose.named(str(tmp_path / "two"), str(root), "--model-path", None), None)
    assert (base.path, base.base, base.chain.folders) == (str(one), str(root), [one, root])
    one.rename(tmp_path / "moved")
    (tmp_path / "after").rename(tmp_path / "before")
    moved = str(tmp_path / "moved")
    base = diagnose.find_base(diagnose.named(str(tmp_path / "two"), moved, "--model-path", None), None)
    assert (base.path, base.base, base.chain.newest) == (moved, None, tmp_path / "moved")


def test_a_run_that_ends_early_goes_on_and_a_base_is_kept(run, golden, tmp_path, loads, monkeypatch):
    code, err, whole = run(limit=2, folder="whole")
    assert (code, loads) == (0, ["tiny-llava-original", "tiny-llava-lora"]), err
    calls = []
    keep_base, keep_tuned = diagnose.keep_base, diagnose.keep_tuned

    def count(name, keep, *args):
        calls.append(name)
        keep(*args)
        if len(calls) in (3, 15):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(diagnose, "keep_base", lambda *args: count("base", keep_base, *args))
    monkeypatch.setattr(diagnose, "keep_tuned", lambda *args: count("tuned", keep_tuned, *args))
    cache = tmp_path / "cache"
    code, err, _ = run("--base_cache", cache, limit=2)
    assert (code, calls) == (EXIT_STOPPED, ["base"] * 6), err  # the picture's others, then no other picture
    assert "stopped by SIGTERM" in err
    line = next(cache.glob("base.*.jsonl"))
    line.write_text(line.read_text()[:-20])  # as a machine that went down leaves it
    code, err, _ = run("--base_cache", cache, limit=2)
    assert (code, calls) == (EXIT_STOPPED, ["base"] * 13 + ["tuned"] * 6), err
    code, err, found = run("--base_cache", cache, limit=2)
    assert (code, calls[13:], loads[-1]) == (0, ["tuned"] * 12, "tiny-llava-lora"), err
    for name in ("ids", "kl", "hidden_change", "attention_tuned", "maps_base", "maps_tuned"):
        np.testing.assert_array_equal(getattr(found["adversarial"], name), getattr(whole["adversarial"], name))
    assert not list((tmp_path / "out").glob("diagnose_tuned*"))

    del loads[:]
    code, err, _ = run("--base_cache", cache, limit=2)
    assert (code, loads) == (0, []) and "is there already" in err
    code, err, other = run("--base_cache", cache, folder="other", limit=2)
    assert (code, loads) == (0, ["tiny-llava-lora"]), err
    np.testing.assert_array_equal(other["adversarial"].kl, whole["adversarial"].kl)


def test_bad_input_is_one_line(run, golden, tmp_path, monkeypatch, first_questions):
    def refused(*more, **what):
        code, err, _ = run(*more, **what)
        assert code == 2
        (line,) = [line for line in err.splitlines() if not line.startswith(("rank 0", "note", "warning"))]
        return line

    assert "--limit 0: expected 1 or more" in refused(limit=0)
    assert "pass that as --base" in refused(tuned=golden / "tiny-llava-original", base=None)
    assert "--base /nowhere: no such folder" in refused("--base", "/nowhere")
    assert "is a language model, which sees no pictures" in refused("--base", golden / "tiny-vicuna")
    assert "unknown flag --bse; did you mean --base?" in refused("--bse", "x")
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        patch.setattr("os._exit", sys.exit)
        assert "runs as one process" in refused()
    with monkeypatch.context() as patch:
        shapes = iter([{"layers": 2}, {"layers": 3}])
        shape_of = diagnose.shape_of
        patch.setattr(diagnose, "shape_of", lambda answerer: {**shape_of(answerer), **next(shapes)})
        patch.setattr(diagnose, "run_through", lambda *_: None)
        assert "--base has another layers (2) than --model-path (3)" in refused(folder="shapes")


def test_a_broken_picture_is_refused_or_left_out(run, golden, pope_world, tmp_path, first_questions, run_script):
    coco = tmp_path / "coco" / "val2014"
    coco.mkdir(parents=True)
    for file in (pope_world / "coco" / "val2014").iterdir():
        (coco / file.name).symlink_to(file)
    (coco / first_questions[0]["image"]).unlink()
    (coco / first_questions[0]["image"]).write_bytes(b"no picture")
    code, err, _ = run("--coco_path", coco.parent, limit=2)
    assert code == 2 and first_questions[0]["image"] in err.splitlines()[-1]
    code, err, found = run("--coco_path", coco.parent, "--skip_missing_images", limit=2)
    assert code == 0 and "its questions are left out" in err
    assert found["adversarial"].ids.tolist() == [7, 8, 9, 10, 11, 12]


@pytest.mark.slow
def test_a_tuned_qwen(run, run_script, qwen, golden, tmp_path):
    common = ["--version", "qwen", "--report_to", "none", "--save_strategy", "no", "--dataloader_num_workers", 0]
    common += ["--model_max_length", 1024, "--max_steps", 3, "--learning_rate", 1e-3]
    first, tuned = tmp_path / "llava-qwen", tmp_path / "tuned"
    code, _, err = run_script(
        "train_pretrain",
        *common,
        *("--model_name_or_path", qwen, "--vision_tower", golden / "tiny-clip", "--mm_projector_type", "mlp2x_gelu"),
        *("--mm_vision_select_layer", -2, "--data_path", golden / "pretrain_data.json"),
        *("--image_folder", golden / "mini_vg", "--train_type", "freeze_vision", "--output_dir", first),
    )
    assert code == 0, err
    code, _, err = run_script(
        "train_dpo",
        *common,
        *("--model_name_or_path", first, "--lora_enable", True, "--vg_path", golden / "mini_vg"),
        *("--pope_data_path", golden / "hadpo_data" / "pope_data.json", "--output_dir", tuned),
    )
    assert code == 0, err
    code, err, found = run("--conv-mode", "qwen", tuned=tuned, base=None)
    assert code == 0, err
    found = found["adversarial"]
    assert found.meta["base"] == str(first)
    assert (found.kl > 0).all() and (found.hidden_change[:, 1:] > 0).all()
    assert ((found.attention_tuned > 0) & (found.attention_tuned < 1)).all()


# ---- the reader ----


def written(folder, **changes):
    """Diagnostics of two questions with a block, two layers and a grid of 2, written out here."""
    card = {"format": 1, "questions": 2, "depth_names": ["embedding", "norm"], "layers": 2, "grid": 2}
    card |= {"block_layers": 1, **changes.pop("card", {})}
    numbers = {"base_gap": 1.5, "tuned_gap": -1, "hidden_change": [0, 0.25], "attention_base": [0.5, 0.25]}
    numbers |= {"attention_tuned": [0.25, 0.125], "attention_block": [0.75]}
    rows = [{"question_id": 5, "kl": 0.5, **numbers}, {"question_id": 3, "kl": 2, **numbers, **changes.pop("row", {})}]
    maps = {"ids": np.array([5, 3]), "map_block": np.full((2, 2, 2), 0.25, np.float16), **changes.pop("maps", {})}
    folder.mkdir(exist_ok=True)
    (folder / "diagnostics_popular.json").write_text(json.dumps(card))
    (folder / "diagnostics_popular.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    np.savez(folder / "diagnostics_popular.npz", **maps)
    return folder


def test_reading(tmp_path):
    assert read_diagnostics(tmp_path) == {}
    found = read_diagnostics(written(tmp_path))["popular"]
    assert (found.set_name, found.ids.tolist(), found.kl.tolist()) == ("popular", [5, 3], [0.5, 2.0])
    assert found.ids.dtype == np.int64 and found.depth_names == ["embedding", "norm"] and found.grid == 2
    assert found.hidden_change.tolist() == [[0, 0.25]] * 2 and found.tuned_gap.tolist() == [-1, -1]
    assert found.attention_block.tolist() == [[0.75]] * 2 and found.attention_tuned.tolist() == [[0.25, 0.125]] * 2
    assert found.maps_base is None and found.map_block.shape == (2, 2, 2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"card": {"format": 2}}, "format 2, expected 1"),
        ({"card": {"questions": 3}}, "2 lines, but diagnostics_popular.json says 3"),
        ({"row": {"kl": None}}, "line 2: key 'kl' must be a int or float, found NoneType"),
        ({"row": {"kl": math.nan}}, "line 2: key 'kl' holds nan, expected a number"),
        ({"row": {"hidden_change": [1.0]}}, "line 2: key 'hidden_change' has 1 numbers, expected 2"),
        ({"row": {"attention_block": ["x"]}}, "line 2: key 'attention_block' holds 'x', expected a number"),
        ({"maps": {"ids": np.array([3, 5])}}, "'ids' is not the question ids"),
        ({"maps": {"maps_base": np.zeros((2, 3, 2))}}, "maps_base has shape (2, 3, 2), expected (2, 2, 2)"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, changes, words):
    with pytest.raises(UserError) as error:
        read_diagnostics(written(tmp_path, **changes))
    assert words in str(error.value) and "run python -m llava.eval.diagnose again" in str(error.value)


def test_missing_and_broken_files_are_refused(tmp_path):
    (written(tmp_path / "a") / "diagnostics_popular.npz").unlink()
    with pytest.raises(UserError, match=r"popular\.npz: no such file"):
        read_diagnostics(tmp_path / "a")
    (written(tmp_path / "b") / "diagnostics_popular.npz").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(UserError, match=r"popular\.npz: cannot be read as arrays"):
        read_diagnostics(tmp_path / "b")


def test_reading_needs_no_torch():
    code = "import sys, llava.eval.diagnostics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent).returncode == 0
