"""Talking to a model: streamed answers are those of ``generate``, whatever is kept between turns."""

from __future__ import annotations

import io
import itertools
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from conftest import draw_picture
from PIL import Image
from transformers import GenerationConfig

from llava import chat as chat_module
from llava.chat import Chat, load_picture
from llava.conversation import template
from llava.eval.answer import Answerer
from llava.mm_utils import preprocess_image, tokenizer_image_token


def chat_with(loaded, new_tokens=12, **settings):
    tokenizer, model, image_processor = loaded
    conversation = template("v1")
    rules = Answerer(model, tokenizer, image_processor, conversation, new_tokens)
    ends = rules.settings.eos_token_id
    ends = [ends] if isinstance(ends, int) else ends
    options = {"do_sample": False, "max_new_tokens": new_tokens, "eos_token_id": ends, "pad_token_id": 0, **settings}
    return Chat(model, tokenizer, image_processor, conversation, GenerationConfig(**options), rules.stop_text)


@pytest.fixture
def pictures(tmp_path):
    for name in "ab":
        draw_picture(tmp_path / f"{name}.png", name)
    return [Image.open(tmp_path / f"{name}.png").convert("RGB") for name in "ab"]


def from_scratch(chat, prompt, pictures, new_tokens):
    """transformers' ``generate`` on a whole conversation."""
    ids = torch.tensor([tokenizer_image_token(prompt, chat.tokenizer)])
    pixels = torch.stack([preprocess_image(p, chat.image_processor, chat.aspect) for p in pictures])
    settings = GenerationConfig(do_sample=False, max_new_tokens=new_tokens, eos_token_id=2, pad_token_id=0)
    new = chat.model.generate(ids, images=pixels, generation_config=settings)[0]
    return chat.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_turns_with_pictures_are_those_of_generate(loaded, pictures, monkeypatch):
    chat = chat_with(loaded)
    seen = []
    see = chat.model.see
    monkeypatch.setattr(chat.model, "see", lambda *pixels: seen.append(1) or see(*pixels))
    chat.show(pictures[0])
    first = "".join(chat.ask("What is this?"))
    assert chat.turns[0] == ("<image>\nWhat is this?", first.strip())
    chat.show(pictures[1])
    "".join(chat.ask("And this?"))
    third = "".join(chat.ask("Which is larger?"))
    assert len(seen) == 2  # each picture once
    turns, chat.turns = chat.turns, []
    prompts = []
    for question, answer in turns:
        prompts.append(chat.prompt(question))
        chat.turns.append((question, answer))
    for prompt, shown, (_, answer) in zip(prompts, (1, 2, 2), turns, strict=True):
        assert answer == from_scratch(chat, prompt, pictures[:shown], 12)
    assert third.strip() == turns[2][1]


def test_a_second_question_costs_its_own_tokens(loaded, pictures, monkeypatch):
    chat = chat_with(loaded)
    chat.show(pictures[0])
    "".join(chat.ask("What is this?"))
    read = []
    forward = chat._forward
    monkeypatch.setattr(chat, "_forward", lambda ids, *rest: read.append(ids.shape[1]) or forward(ids, *rest))
    "".join(chat.ask("Why?"))
    assert read[0] < 40  # the picture alone has 16, the system prompt some 40
    assert all(count == 1 for count in read[1:])


def test_sampling_is_the_seeds(loaded, pictures):
    said = []
    for seed in (0, 0, 1):
        chat = chat_with(loaded, do_sample=True, temperature=1.0, top_k=0)
        chat.draw.manual_seed(seed)
        chat.show(pictures[0])
        said.append("".join(chat.ask("What is this?")))
    assert said[0] == said[1] != said[2]


def test_what_is_shown_is_never_half_a_character_or_half_an_end(loaded):
    chat = chat_with(loaded)
    tokenizer = chat.tokenizer
    ids = tokenizer("你好###", add_special_tokens=False).input_ids  # bytes, in a vocabulary this small
    assert len(ids) > 4
    for stop in (None, "###"):
        chat.stop_text = stop
        shown = [chat._text(ids[: n + 1])[0] for n in range(len(ids))]
        assert all("\ufffd" not in text for text in shown)
        assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(shown))
        assert ("#" in shown[-1]) == (stop is None)
    assert chat._text(ids) == (shown[-1], True)


def test_an_answer_that_is_interrupted_is_remembered(loaded, pictures):
    chat = chat_with(loaded)
    chat.show(pictures[0])
    answer = chat.ask("What is this?")
    begun = next(answer)
    answer.close()
    assert chat.turns == [("<image>\nWhat is this?", begun.strip())]
    "".join(chat.ask("And now?"))
    fresh = chat_with(loaded)
    fresh.show(pictures[0])
    fresh.waiting, fresh.turns = 0, chat.turns[:1]
    "".join(fresh.ask("And now?"))
    assert fresh.turns[1] == chat.turns[1]


def test_a_conversation_that_is_too_long_is_refused_and_can_begin_anew(loaded, pictures, monkeypatch):
    chat = chat_with(loaded)
    monkeypatch.setattr(chat.model.config, "max_position_embeddings", 100)
    with pytest.raises(chat_module.UserError, match="the model takes 100; begin anew with /reset"):
        "".join(chat.ask("word " * 100))
    chat.reset()
    "".join(chat.ask("Hello"))
    assert len(chat.turns) == 1


@pytest.fixture
def run_chat(monkeypatch, capsys, golden):
    def run(*flags, typed=""):
        argv = ["chat", "--model-path", golden / "tiny-llava-original", "--temperature", 0, "--max-new-tokens", 8]
        monkeypatch.setattr(sys, "argv", [*map(str, argv), *map(str, flags)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        capsys.readouterr()
        code = 0
        try:
            chat_module.main()
        except SystemExit as exit_:
            code = exit_.code
        return code, *capsys.readouterr()

    return run


def test_one_question_and_the_same_from_a_pipe(run_chat, tmp_path):
    draw_picture(tmp_path / "a.png", "a")
    code, out, err = run_chat("--image-file", tmp_path / "a.png", "--query", "What is this?")
    assert code == 0, err
    assert out.strip()
    typed = f"/image {tmp_path / 'a.png'}\nWhat is this?\n/help\n/reset\n\nnever asked\n"
    code, piped, err = run_chat(typed=typed)
    assert code == 0 and piped == out
    assert "/image PATH|URL" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--image-file", "nothing.png"), "nothing.png is missing"),
        (("--temperature", "-1"), "--temperature -1: expected 0 or more"),
        (("--top_p", "0.5"), "--temperature 0 samples nothing"),
        (("--query", " "), "--query is empty"),
        (("--conv-mode", "v9", "--query", "x"), "--conv-mode v9: unknown template"),
        (("--max-new-tokens", "0"), "--max-new-tokens 0: expected 1 or more"),
    ],
)
def test_bad_input_is_one_line(run_chat, flags, message):
    code, out, err = run_chat(*flags)
    assert (code, out) == (2, "")
    assert message in err


def test_a_wrong_command_from_a_pipe_is_one_line(run_chat):
    code, _, err = run_chat(typed="/picture a.png\n")
    assert code == 2 and "expected one of /image PATH|URL" in err


def test_pictures_come_from_urls(tmp_path):
    draw_picture(tmp_path / "a.png", "a")
    content = {"/a.png": (tmp_path / "a.png").read_bytes(), "/page": b"<html>"}

    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            found = content.get(self.path)
            self.send_response(404 if found is None else 200)
            self.end_headers()
            self.wfile.write(found or b"")

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here = f"http://127.0.0.1:{server.server_port}"
    try:
        assert load_picture(f"{here}/a.png").tobytes() == load_picture(str(tmp_path / "a.png")).tobytes()
        for path, message in (("/b.png", "the server says 404"), ("/page", "no picture")):
            with pytest.raises(chat_module.UserError, match=message):
                load_picture(here + path)
    finally:
        server.shutdown()
        server.server_close()
    with pytest.raises(chat_module.UserError, match="cannot be fetched"):
        load_picture(f"{here}/a.png")
