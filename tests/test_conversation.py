"""Prompt texts of every template against recordings and against text written out by hand, and what of it is learnt."""

from __future__ import annotations

import json

import pytest

from llava.conversation import conv_templates, default_conversation, template
from llava.errors import UserError

USER = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
HUMAN = USER.replace("user", "human")
LLAVA_LLAMA_2 = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
MPT = "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
EXAMPLE_QUESTION = "What are the key differences between renewable and non-renewable energy sources?"

UPSTREAM_NAMES = {
    "default",
    "v0",
    "v1",
    "vicuna_v1",
    "llama_2",
    "chatml_direct",
    "mistral_direct",
    "plain",
    "v0_plain",
    "llava_v0",
    "v0_mmtag",
    "llava_v1",
    "v1_mmtag",
    "llava_llama_2",
    "mpt",
}


def talk(name, *texts):
    """The template ``name`` with turns that alternate; ``None`` leaves the last one open."""
    conversation = template(name)
    for index, text in enumerate(texts):
        conversation.append_message(conversation.roles[index % 2], text)
    return conversation


def learnt(conversation):
    """Stretches of the training text that the model learns to write, without the space before an answer.

    Whether that space is one of them decides which tokens are learnt: see test_supervision.py.
    """
    stretches, open_ = [], False
    for piece in conversation.training_pieces():
        if piece.supervised and open_:
            stretches[-1] += piece.text
        elif piece.supervised and piece.text:
            stretches.append(piece.text)
        open_ = piece.supervised
    return [stretch.removeprefix(" ") for stretch in stretches]


def training_text(conversation):
    return "".join(piece.text for piece in conversation.training_pieces())


def test_every_upstream_template_but_mistral_instruct_is_there():
    assert set(conv_templates) >= UPSTREAM_NAMES | {"qwen", "qwen_1_5", "chatml"}


def test_the_default_conversation_is_vicuna_v1():
    assert default_conversation is conv_templates["v1"] is conv_templates["vicuna_v1"]


# name -> text of hi / hello / more / (open), as upstream's get_prompt writes it.
OPEN_SECOND_TURN = {
    "v1": f"{USER} USER: hi ASSISTANT: hello</s>USER: more ASSISTANT:",
    "llava_v1": f"{HUMAN} USER: hi ASSISTANT: hello</s>USER: more ASSISTANT:",
    "llava_v0": f"{HUMAN}###Human: hi###Assistant: hello###Human: more###Assistant:",
    "llava_llama_2": f"[INST] <<SYS>>\n{LLAVA_LLAMA_2}\n<</SYS>>\n\nhi [/INST] hello </s><s>[INST] more [/INST]",
    "mpt": (
        f"<|im_start|>system\n{MPT}<|im_end|><|im_start|>user\nhi<|im_end|><|im_start|>assistant\nhello<|im_end|>"
        "<|im_start|>user\nmore<|im_end|><|im_start|>assistant\n"
    ),
    "chatml_direct": (
        "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\nhi<|im_end|><|im_start|>assistant\n"
        "hello<|im_end|><|im_start|>user\nmore<|im_end|><|im_start|>assistant\n"
    ),
    "qwen": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\nhello<|im_end|>\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n"
    ),
}
OPEN_SECOND_TURN["chatml"] = OPEN_SECOND_TURN["mpt"]
OPEN_SECOND_TURN["mistral_direct"] = OPEN_SECOND_TURN["chatml_direct"]


@pytest.mark.parametrize("name", OPEN_SECOND_TURN)
def test_prompt_that_waits_for_the_second_answer(name):
    assert talk(name, "hi", "hello", "more", None).get_prompt() == OPEN_SECOND_TURN[name]


def test_v0_shows_its_example_first_when_it_generates():
    prompt = talk("v0", "hi", None).get_prompt()
    assert prompt.startswith(f"{HUMAN}###Human: {EXAMPLE_QUESTION}###Assistant: Renewable energy sources are those")
    assert prompt.endswith("can lead to economic and social instability.\n###Human: hi###Assistant:")


def test_llama_2_carries_metas_safety_text():
    prompt = talk("llama_2", "hi", None).get_prompt()
    assert prompt.startswith("[INST] <<SYS>>\nYou are a helpful, respectful and honest assistant. Always answer as")
    assert prompt.endswith("please don't share false information.\n<</SYS>>\n\nhi [/INST]")


@pytest.mark.parametrize(("name", "roles"), [("v0_mmtag", ("Human", "Assistant")), ("v1_mmtag", ("USER", "ASSISTANT"))])
def test_mmtag_templates_announce_their_marks(name, roles):
    conversation = talk(name, "hi", None)
    assert conversation.roles == roles
    assert conversation.system.endswith("with the following format: <Image>visual content</Image>.")
    assert conversation.version == name


# name -> text of hi / hello / more / bye as it is trained on, and the stretches of it that are learnt.
TWO_TURNS = {
    "v1": (f"{USER} USER: hi ASSISTANT: hello</s>USER: more ASSISTANT: bye</s>", ["hello</s>", "bye</s>"]),
    "llava_v1": (f"{HUMAN} USER: hi ASSISTANT: hello</s>USER: more ASSISTANT: bye</s>", ["hello</s>", "bye</s>"]),
    # "###" ends an answer wherever it stands: "\n###" is what generation stops at.
    "v0": (
        f"{HUMAN}\n\n### Human: hi\n### Assistant: hello\n### Human: more\n### Assistant: bye\n### ",
        ["hello\n###", "bye\n###"],
    ),
    "llava_llama_2": (
        f"[INST] <<SYS>>\n{LLAVA_LLAMA_2}\n<</SYS>>\n\nhi [/INST] hello </s><s>[INST] more [/INST] bye </s>",
        ["hello </s>", "bye </s>"],
    ),
    "mpt": (
        f"<|im_start|>system\n{MPT}<|im_end|><|im_start|>user\nhi<|im_end|><|im_start|>assistant\nhello<|im_end|>"
        "<|im_start|>user\nmore<|im_end|><|im_start|>assistant\nbye<|im_end|>",
        ["hello<|im_end|>", "bye<|im_end|>"],
    ),
    "chatml_direct": (
        "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\nhi<|im_end|><|im_start|>assistant\n"
        "hello<|im_end|><|im_start|>user\nmore<|im_end|><|im_start|>assistant\nbye<|im_end|>",
        ["hello<|im_end|>", "bye<|im_end|>"],
    ),
    "qwen": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\nhello<|im_end|>\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n"
        "bye<|im_end|>\n",
        ["hello<|im_end|>", "bye<|im_end|>"],
    ),
}
TWO_TURNS["llava_v0"] = TWO_TURNS["v0"]
TWO_TURNS["chatml"] = TWO_TURNS["mpt"]


@pytest.mark.parametrize("name", TWO_TURNS)
def test_training_text_of_two_turns_and_what_is_learnt_of_it(name):
    conversation = talk(name, "hi", "hello", "more", "bye")
    text, answers = TWO_TURNS[name]
    assert training_text(conversation) == text
    assert learnt(conversation) == answers


@pytest.mark.parametrize("name", sorted(set(TWO_TURNS) - {"v0", "llava_v0"}))
def test_what_is_trained_is_what_generation_writes(name):
    conversation = talk(name, "hi", "hello", "more", "bye")
    assert conversation.get_prompt() == training_text(conversation)


@pytest.mark.parametrize("name", ["plain", "v0_plain"])
def test_plain_is_a_picture_and_its_caption(name):
    conversation = talk(name, "<image>", "a dog")
    assert conversation.get_prompt() == training_text(conversation) == "<image>a dog\n"
    assert learnt(conversation) == ["a dog\n"]


@pytest.mark.parametrize(
    ("name", "stop"),
    [
        ("v0", "###"),
        ("v1", "</s>"),
        ("llava_v1", "</s>"),
        ("llama_2", "</s>"),
        ("plain", "\n"),
        ("mpt", "<|im_end|>"),
        ("chatml_direct", "<|im_end|>"),
        ("qwen", "<|im_end|>"),
    ],
)
def test_a_turn_ends_with_the_stop_string(name, stop):
    assert template(name).stop_string == stop
    assert learnt(talk(name, "<image>", "hello"))[0].endswith(stop)


def test_recorded_generation_prompts(golden):
    file = golden / "labels" / "HADPO_tf4.31.0_legacy0.json"
    rows = json.loads(file.read_text(encoding="utf-8"))["generation_prompts"]
    assert {row["template"] for row in rows} == {"v1", "llava_v1"}
    for row in rows:
        assert talk(row["template"], f"<image>\n{row['question']}", None).get_prompt() == row["prompt"]


def test_a_template_is_a_copy_that_keeps_nothing():
    talk("v0", "hi", "hello")
    assert len(template("v0").messages) == 2  # its example
    assert template("v1").messages == []


def test_an_unknown_template_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match=r"--conv-mode vicuna_v2: unknown template; known templates: .*vicuna_v1"):
        template("vicuna_v2", "--conv-mode")
