"""What the tests share: recordings, scripts run in this process, and a picture for every name."""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
sys.path.insert(0, str(ROOT))
from llava.interruption import SIGNALS  # noqa: E402

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session", autouse=True)
def scripts_return():
    """A script that ends its process where it was in a group (``leave_world``) would end the tests, and they would
    look as if all had passed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llava.errors.leave_world", lambda: None)
        yield


@pytest.fixture(scope="session")
def golden() -> Path:
    return GOLDEN


@pytest.fixture(scope="session")
def loaded():
    """tokenizer, model, image processor of the recorded checkpoint; tests must not change them."""
    from llava.model.builder import load_pretrained_model

    return load_pretrained_model(str(GOLDEN / "tiny-llava-original"), None)[:3]


@pytest.fixture
def run_script(monkeypatch, capsys, tmp_path):
    """``run_script("train_dpo", *flags) -> (exit code, stdout, stderr)``, in this process: imports are paid once."""

    def run(name: str, *flags: object):
        from accelerate.state import AcceleratorState, GradientState, PartialState

        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        monkeypatch.setattr("llava.status.current", None)  # of the script before
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, flags)])
        monkeypatch.setattr(sys, "orig_argv", ["python", f"{name}.py", *map(str, flags)])
        capsys.readouterr()
        code = 0
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        try:
            importlib.import_module(name).main()
        except SystemExit as exit_:
            code = exit_.code
        finally:  # the tests themselves answer signals as before
            for number, handler in handlers.items():
                signal.signal(number, handler)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def ran(monkeypatch):
    """How often the backbone ran over trees."""
    from llava.model import llava_arch

    count = []
    original = llava_arch.run_layers
    monkeypatch.setattr(llava_arch, "run_layers", lambda *a, **k: count.append(1) or original(*a, **k))
    return count


def pixel_values(loader, picture):
    """A loader's bytes (3, H, W) and what they mean, put together as the model does."""
    import torch

    assert picture.dtype == torch.uint8
    return torch.stack([values[bytes_.long()] for values, bytes_ in zip(loader.levels(), picture, strict=True)])


def draw_picture(path: Path, seed: str) -> None:
    """A small picture that stands in for a photograph, the same for the same seed."""
    from PIL import Image, ImageDraw

    draw = random.Random(seed)
    picture = Image.new("RGB", (draw.randint(40, 120), draw.randint(40, 120)), tuple(draw.choices(range(256), k=3)))
    pen = ImageDraw.Draw(picture)
    for _ in range(6):
        x, y = draw.randrange(picture.width), draw.randrange(picture.height)
        pen.rectangle(
            [x, y, x + draw.randint(4, 40), y + draw.randint(4, 40)], fill=tuple(draw.choices(range(256), k=3))
        )
    picture.save(path)


@pytest.fixture(scope="session")
def pope_world(tmp_path_factory) -> Path:
    """POPE's real questions about its first 60 images (``pope/``), and drawn pictures in COCO's place (``coco/``)."""
    world = tmp_path_factory.mktemp("pope")
    (world / "pope").mkdir()
    (world / "coco" / "val2014").mkdir(parents=True)
    for name in ("random", "popular", "adversarial"):
        file = f"coco_pope_{name}.json"
        text = (GOLDEN / "pope_questions" / file).read_text()
        (world / "pope" / file).write_text(text)
        for image in {json.loads(line)["image"] for line in text.splitlines()}:
            if not (world / "coco" / "val2014" / image).exists():
                draw_picture(world / "coco" / "val2014" / image, image)
    return world


@pytest.fixture
def dpo_flags(golden):
    return [
        *("--model_name_or_path", golden / "tiny-llava-original"),
        *("--vg_path", golden / "mini_vg"),
        *("--desc_data_path", golden / "hadpo_data" / "desc_data.json"),
        *("--pope_data_path", golden / "hadpo_data" / "pope_data.json"),
        *("--image_aspect_ratio", "pad", "--model_max_length", 2048),
        *("--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 1, "--num_train_epochs", 1),
        *("--learning_rate", 1e-3, "--warmup_steps", 0, "--beta", 0.1, "--dataloader_num_workers", 0),
        *("--save_strategy", "no", "--report_to", "none", "--gradient_checkpointing", False),
    ]


@pytest.fixture
def pretrain_flags(golden):
    return [
        *("--model_name_or_path", golden / "tiny-vicuna", "--vision_tower", golden / "tiny-clip"),
        *("--data_path", golden / "pretrain_data.json", "--image_folder", golden / "mini_vg"),
        *("--version", "plain", "--mm_projector_type", "mlp2x_gelu", "--mm_vision_select_layer", -2),
        *("--model_max_length", 2048, "--per_device_train_batch_size", 8, "--num_train_epochs", 1),
        *("--learning_rate", 1e-3, "--lr_scheduler_type", "constant", "--logging_steps", 1),
        *("--save_strategy", "no", "--report_to", "none", "--dataloader_num_workers", 0),
    ]


def succeed(result):
    code, out, err = result
    assert code == 0, err
    return out


def logs_of(folder):
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def losses_of(folder):
    return [log["loss"] for log in logs_of(folder) if "loss" in log]


@pytest.fixture(scope="session")
def qwen(tmp_path_factory):
    """A tiny Qwen1.5: grouped-query attention, biases, no bos, ChatML tokens, byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("qwen")
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=specials, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["a man riding a bicycle on a street, system user assistant"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=fast.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=fast.convert_tokens_to_ids("<|endoftext|>"),
        tie_word_embeddings=False,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder
