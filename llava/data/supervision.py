"""Conversation -> token ids and labels.

The text is rendered piece by piece and every piece says whether the model is to learn it (``Conversation.pieces``).
Each stretch of text between two pictures is tokenized once, whole, as it will be at generation, and a token is
supervised when it begins inside a supervised piece. Nothing is tokenized twice and subtracted, so no sample can lose
its labels to a mismatch of two tokenizations.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedTokenizerBase

from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_TOKEN,
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
)
from llava.conversation import Conversation, Piece, SeparatorStyle
from llava.errors import UserError
from llava.files import field
from llava.tokenization import bos_prefix, encode_with_spans

ROLES = {"human": 0, "user": 0, "gpt": 1, "assistant": 1}


def tokenize_pieces(pieces: Iterable[Piece], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Ids and labels of a rendered conversation: a label is its id where supervised, else ``IGNORE_INDEX``.

    ``<image>`` becomes ``IMAGE_TOKEN_INDEX`` in the ids (and, inside an answer, in the labels: the splice ignores it).
    """
    text, supervised = "", []
    for piece in pieces:
        text += piece.text
        supervised += [piece.supervised] * len(piece.text)
    supervised.append(False)  # a token may begin at the very end: the space put before an empty text

    input_ids = bos_prefix(tokenizer)
    labels = [IGNORE_INDEX] * len(input_ids)
    start = 0
    for number, chunk in enumerate(text.split(DEFAULT_IMAGE_TOKEN)):
        if number:
            input_ids.append(IMAGE_TOKEN_INDEX)
            labels.append(IMAGE_TOKEN_INDEX if supervised[start] else IGNORE_INDEX)
            start += len(DEFAULT_IMAGE_TOKEN)
        ids, spans = encode_with_spans(tokenizer, chunk)
        input_ids += ids
        labels += [i if supervised[start + s] else IGNORE_INDEX for i, (s, _) in zip(ids, spans, strict=True)]
        start += len(chunk)
    return input_ids, labels


def image_first(text: str, template: Conversation, use_im_start_end: bool = False) -> str:
    """A turn with its picture at the front, as LLaVA trains it: ``<image>\\nrest``, several marks becoming one."""
    if DEFAULT_IMAGE_TOKEN not in text:
        return text
    text = f"{DEFAULT_IMAGE_TOKEN}\n{text.replace(DEFAULT_IMAGE_TOKEN, '').strip()}".strip()
    return wrap_image_tokens(text, template, use_im_start_end)


def wrap_image_tokens(text: str, template: Conversation, use_im_start_end: bool) -> str:
    """Put the marks around ``<image>`` that the template (mmtag) or the checkpoint (``mm_use_im_start_end``) wants."""
    mark = DEFAULT_IMAGE_TOKEN
    if "mmtag" in template.version:
        mark = f"<Image>{mark}</Image>"
    if use_im_start_end:
        mark = f"{DEFAULT_IM_START_TOKEN}{mark}{DEFAULT_IM_END_TOKEN}"
    return text.replace(DEFAULT_IMAGE_TOKEN, mark)


def fill_template(
    where: str, turns: list[dict[str, Any]], template: Conversation, n_images: int, use_im_start_end: bool = False
) -> Conversation:
    """A record's turns in a template.

    ``turns`` is LLaVA's list of ``{"from": "human" | "gpt", "value": text}``. A first turn that is not the human's is
    dropped, as upstream does. With one image its mark moves to the front of the turn; with several every mark stays.

    Raises:
        UserError: turns that do not alternate, an unknown speaker, or a number of ``<image>`` that differs from the
            number of images.
    """
    conversation = template.copy()
    said = []
    for index, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise UserError(f"{where}: turn {index}: expected an object with 'from' and 'value', found {turn!r:.40}")
        speaker = field(f"{where}: turn {index}", turn, "from", str)
        if speaker not in ROLES:
            raise UserError(f"{where}: turn {index}: unknown speaker '{speaker}'; expected one of {', '.join(ROLES)}")
        said.append((ROLES[speaker], field(f"{where}: turn {index}", turn, "value", str)))
    if said and said[0][0] != 0:
        said = said[1:]
    for index, (role, text) in enumerate(said):
        if role != index % 2:
            raise UserError(f"{where}: turns must alternate between human and gpt, turn {index} does not")
        if n_images == 1:
            text = image_first(text, template, use_im_start_end)
        elif n_images > 1:
            text = wrap_image_tokens(text, template, use_im_start_end)
        conversation.append_message(conversation.roles[role], text)
    if template.sep_style is SeparatorStyle.PLAIN:
        if len(said) != 2 or n_images != 1:
            raise UserError(
                f"{where}: template 'plain' takes one image, one human turn and one answer; found {n_images} images "
                f"and {len(said)} turns; use --version v1 for conversations"
            )
        conversation.messages[0][1] = DEFAULT_IMAGE_TOKEN
    marks = sum((text or "").count(DEFAULT_IMAGE_TOKEN) for _, text in conversation.messages[conversation.offset :])
    if marks != n_images and not (marks == 0 and n_images == 1):  # one unused picture is upstream's habit
        raise UserError(
            f"{where}: {marks} <image> in the text for {n_images} image(s); write one <image> for every image"
        )
    return conversation
