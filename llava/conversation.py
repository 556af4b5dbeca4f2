"""Prompt templates: turns -> text, the same rendering for training and for generation.

``Conversation.pieces`` is the single source of the layout. It yields the text in order and says which parts the
model is trained to write; ``get_prompt`` joins them, ``llava.data.supervision`` labels them. Names, texts and
separators are those that LLaVA and HA-DPO checkpoints were trained with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from enum import Enum, auto
from typing import Any, NamedTuple

from llava.errors import UserError


class SeparatorStyle(Enum):
    """How turns are set apart."""

    SINGLE = auto()  # "Human: hi###Assistant: hello###"
    TWO = auto()  # "USER: hi ASSISTANT: hello</s>"
    MPT = auto()  # "<|im_start|>user\nhi<|im_end|><|im_start|>assistant\nhello<|im_end|>"
    PLAIN = auto()  # "<image>caption\n"
    LLAMA_2 = auto()  # "[INST] hi [/INST] hello </s><s>[INST] ..."
    CHATML = auto()  # MPT with a newline after every <|im_end|>, as Qwen writes it


class Piece(NamedTuple):
    """A stretch of a prompt; ``supervised`` text is what the model learns to write."""

    text: str
    supervised: bool = False


@dataclasses.dataclass
class Conversation:
    """A template together with its turns: ``messages`` is a list of ``[role, text or None]``."""

    system: str
    roles: tuple[str, str]
    messages: list[list[str | None]] = dataclasses.field(default_factory=list)
    offset: int = 0  # how many leading messages belong to the template (an example dialogue), not to the user
    sep_style: SeparatorStyle = SeparatorStyle.SINGLE
    sep: str = "###"
    sep2: str | None = None
    version: str = "Unknown"

    def append_message(self, role: str, message: str | None) -> None:
        """Add a turn; ``None`` leaves the turn open for the model to fill."""
        self.messages.append([role, message])

    def copy(self) -> Conversation:
        """An independent copy, turns included."""
        return dataclasses.replace(self, messages=[list(message) for message in self.messages])

    def get_prompt(self) -> str:
        """The text up to and including the last turn."""
        return "".join(piece.text for piece in self.pieces())

    def pieces(self) -> Iterator[Piece]:
        """The text in order, told apart into context and answers (closing separator included)."""
        return {
            SeparatorStyle.SINGLE: self._two,
            SeparatorStyle.TWO: self._two,
            SeparatorStyle.MPT: self._chatml,
            SeparatorStyle.CHATML: self._chatml,
            SeparatorStyle.PLAIN: self._plain,
            SeparatorStyle.LLAMA_2: self._llama_2,
        }[self.sep_style]()

    def training_pieces(self) -> Iterator[Piece]:
        """The layout that LLaVA trains on: that of ``pieces``, except for v0, whose turns it trains as '### Role: '."""
        return self._v0_training() if self.sep_style is SeparatorStyle.SINGLE else self.pieces()

    @property
    def stop_string(self) -> str:
        """What the model writes when its turn is over."""
        return self.sep2 or self.sep

    def _two(self) -> Iterator[Piece]:
        after_answer = self.sep if self.sep_style is SeparatorStyle.SINGLE else self.sep2
        yield Piece(self.system + self.sep)
        for role, message in self.messages:
            if not message:
                yield Piece(role + ":")
            elif role == self.roles[1]:
                yield Piece(role + ":")
                yield Piece(f" {message}{after_answer}", supervised=True)
            else:
                yield Piece(f"{role}: {message}{self.sep}")

    def _v0_training(self) -> Iterator[Piece]:
        yield Piece(f"{self.system}\n\n")
        after_answer = False
        for role, message in self.messages[self.offset :]:
            # The "###" that follows an answer is what stops generation, so it belongs to the answer.
            yield Piece(self.sep, supervised=after_answer)
            yield Piece(f" {role}:")
            after_answer = role == self.roles[1]
            # With the space before it: a token is learnt where it begins, and SentencePiece's "▁word" begins there.
            yield Piece(f" {message or ''}\n", supervised=after_answer)
        yield Piece(self.sep, supervised=after_answer)
        yield Piece(" ")

    def _chatml(self) -> Iterator[Piece]:
        newline = "\n" if self.sep_style is SeparatorStyle.CHATML else ""
        if self.system:
            yield Piece(self.system + self.sep + newline)
        for role, message in self.messages:
            yield Piece(role)
            if message:
                yield Piece(message + self.sep, supervised=role == self.roles[1])
                yield Piece(newline)

    def _plain(self) -> Iterator[Piece]:
        for index, (_, message) in enumerate(self.messages):
            if message is not None and index % 2 == 1:
                yield Piece(message + self.sep, supervised=True)
            elif message:
                # Pre-training sees the caption directly behind the picture.
                yield Piece(message)

    def _llama_2(self) -> Iterator[Piece]:
        system = f"<<SYS>>\n{self.system}\n<</SYS>>\n\n" if self.system else ""
        for index, (_, message) in enumerate(self.messages):
            if not message:
                continue
            if index % 2 == 0:
                opening = "" if index == 0 else self.sep
                yield Piece(f"{opening}[INST] {system if index == 0 else ''}{message} [/INST]")
            else:
                yield Piece(f" {message} {self.sep2}", supervised=True)


def _assistant_prompt(user: str) -> str:
    """LLaVA's system prompt, which names the other side 'human' or 'user' depending on the template."""
    return (
        f"A chat between a curious {user} and an artificial intelligence assistant. "
        f"The assistant gives helpful, detailed, and polite answers to the {user}'s questions."
    )


_MMTAG = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant is able to understand the visual content that the user provides, and assist the user with a "
    "variety of tasks using natural language.The visual content will be provided with the following format: "
    "<Image>visual content</Image>."
)

_VICUNA_V0_EXAMPLE: list[list[str | None]] = [
    ["Human", "What are the key differences between renewable and non-renewable energy sources?"],
    [
        "Assistant",
        "Renewable energy sources are those that can be replenished naturally in a relatively short amount of time, "
        "such as solar, wind, hydro, geothermal, and biomass. Non-renewable energy sources, on the other hand, are "
        "finite and will eventually be depleted, such as coal, oil, and natural gas. Here are some key differences "
        "between renewable and non-renewable energy sources:\n"
        "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable energy sources "
        "are finite and will eventually run out.\n"
        "2. Environmental impact: Renewable energy sources have a much lower environmental impact than non-renewable "
        "sources, which can lead to air and water pollution, greenhouse gas emissions, and other negative effects.\n"
        "3. Cost: Renewable energy sources can be more expensive to initially set up, but they typically have lower "
        "operational costs than non-renewable sources.\n"
        "4. Reliability: Renewable energy sources are often more reliable and can be used in more remote locations "
        "than non-renewable sources.\n"
        "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to different situations "
        "and needs, while non-renewable sources are more rigid and inflexible.\n"
        "6. Sustainability: Renewable energy sources are more sustainable over the long term, while non-renewable "
        "sources are not, and their depletion can lead to economic and social instability.\n",
    ],
]

_LLAMA_2_SYSTEM = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)

_LLAVA_LLAMA_2_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)


def _v0(system: str, version: str = "Unknown", example: list[list[str | None]] | None = None) -> Conversation:
    example = example or []
    return Conversation(system, ("Human", "Assistant"), example, len(example), SeparatorStyle.SINGLE, version=version)


def _v1(system: str, version: str = "v1") -> Conversation:
    return Conversation(
        system, ("USER", "ASSISTANT"), sep_style=SeparatorStyle.TWO, sep=" ", sep2="</s>", version=version
    )


def _llama_2(system: str) -> Conversation:
    return Conversation(
        system, ("USER", "ASSISTANT"), sep_style=SeparatorStyle.LLAMA_2, sep="<s>", sep2="</s>", version="llama_v2"
    )


def _chatml(system: str, style: SeparatorStyle, version: str) -> Conversation:
    return Conversation(
        f"<|im_start|>system\n{system}",
        ("<|im_start|>user\n", "<|im_start|>assistant\n"),
        sep_style=style,
        sep="<|im_end|>",
        version=version,
    )


conv_vicuna_v0 = _v0(_assistant_prompt("human"), example=_VICUNA_V0_EXAMPLE)
conv_vicuna_v1 = _v1(_assistant_prompt("user"))
conv_llava_v0 = _v0(_assistant_prompt("human"))
conv_llava_v1 = _v1(_assistant_prompt("human"))
conv_llava_v0_mmtag = _v0(_MMTAG, "v0_mmtag")
conv_llava_v1_mmtag = _v1(_MMTAG, "v1_mmtag")
conv_llava_plain = Conversation("", ("", ""), sep_style=SeparatorStyle.PLAIN, sep="\n")
conv_llama_2 = _llama_2(_LLAMA_2_SYSTEM)
conv_llava_llama_2 = _llama_2(_LLAVA_LLAMA_2_SYSTEM)
conv_mpt = _chatml(
    "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers.",
    SeparatorStyle.MPT,
    "mpt",
)
conv_chatml_direct = _chatml("Answer the questions.", SeparatorStyle.MPT, "mpt")
conv_qwen_1_5 = _chatml("You are a helpful assistant.", SeparatorStyle.CHATML, "qwen")

default_conversation = conv_vicuna_v1

conv_templates: dict[str, Conversation] = {
    "default": conv_vicuna_v0,
    "v0": conv_vicuna_v0,
    "v1": conv_vicuna_v1,
    "vicuna_v1": conv_vicuna_v1,
    "llama_2": conv_llama_2,
    "chatml_direct": conv_chatml_direct,
    "mistral_direct": conv_chatml_direct,
    "plain": conv_llava_plain,
    "v0_plain": conv_llava_plain,
    "llava_v0": conv_llava_v0,
    "v0_mmtag": conv_llava_v0_mmtag,
    "llava_v1": conv_llava_v1,
    "v1_mmtag": conv_llava_v1_mmtag,
    "llava_llama_2": conv_llava_llama_2,
    "mpt": conv_mpt,
    "chatml": conv_mpt,
    "qwen": conv_qwen_1_5,
    "qwen_1_5": conv_qwen_1_5,
}


def template_of(config: Any) -> str:
    """Name of the template that a model was last taught to talk in (``mm_conv_mode`` of its ``config.json``), else the
    usual one of its language model; ``config`` is an object or a dictionary.
    """

    def get(key: str) -> Any:
        return config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)

    own = get("mm_conv_mode")
    return own if own in conv_templates else "qwen" if "qwen2" in (get("model_type") or "") else "v1"


def template(name: str, flag: str = "--version") -> Conversation:
    """A fresh copy of the template called ``name``; unknown names are refused with the list of known ones."""
    if name not in conv_templates:
        raise UserError(f"{flag} {name}: unknown template; known templates: {', '.join(conv_templates)}")
    return conv_templates[name].copy()
