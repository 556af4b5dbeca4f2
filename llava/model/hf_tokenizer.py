"""Our tokenizers as files with which other programs come to the same ids.

A Llama's SentencePiece model becomes a ``tokenizer.json``. Classes that rebuild a tokenizer from ``tokenizer.model``
lose the scores of merges and the spaces that a text begins with; PreTrainedTokenizerFast takes the file as it is.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase
from transformers.tokenization_utils_base import generate_merges

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.errors import warn
from llava.files import read_object, write_json
from llava.tokenization import SPACE, SentencePieceTokenizer

PAD_TOKEN = "<pad>"
ADDED_TOKEN = ("lstrip", "normalized", "rstrip", "single_word", "special")
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


def save_for_huggingface(
    tokenizer: PreTrainedTokenizerBase, folder: Path, chat_template: str, role: str
) -> tuple[int, int]:
    """Write the tokenizer with ``<image>`` and a padding token of its own; returns the ids of both.

    ``<image>`` takes the next free id, and ``<pad>`` the one behind it where padding was another special token's id.
    ``role`` is what a template writes behind the end of an answer ("USER:").
    """
    specials = {name: str(token) for name in SPECIAL if (token := getattr(tokenizer, name, None)) is not None}
    new = [DEFAULT_IMAGE_TOKEN]
    if specials.get("pad_token") in (None, *(token for name, token in specials.items() if name != "pad_token")):
        specials["pad_token"] = PAD_TOKEN
        new.append(PAD_TOKEN)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "LlavaProcessor",
        **specials,
        "image_token": DEFAULT_IMAGE_TOKEN,
        "chat_template": chat_template,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": tokenizer.model_max_length,
        "padding_side": "left",  # of prompts that are answered together
    }
    if isinstance(tokenizer, SentencePieceTokenizer):
        backend = _llama_backend(tokenizer)
        llama, legacy = True, tokenizer.legacy
        config["legacy"] = legacy  # how the SentencePiece model beside it is to be read
        shutil.copyfile(tokenizer.vocab_file, folder / "tokenizer.model")
    else:
        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        backend.no_padding()
        backend.no_truncation()
        llama = _is_llama(backend)
        legacy = "Prepend" in str(backend.normalizer)
    if llama:
        _put_spaces(backend, legacy, [] if legacy else _cut_behind_answers(tokenizer, role))
    for token in new:
        # Llama's <image> is found in normalized text: the normalizer writes the space that begins the text behind it.
        normalized = llama and token == DEFAULT_IMAGE_TOKEN
        backend.add_special_tokens([AddedToken(token, normalized=normalized, special=True)])
    backend.save(str(folder / "tokenizer.json"))
    config["added_tokens_decoder"] = {
        index: {key: getattr(token, key) for key in ADDED_TOKEN} | {"content": token.content}
        for index, token in sorted(backend.get_added_tokens_decoder().items())
    }
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", {**specials, "image_token": DEFAULT_IMAGE_TOKEN})
    return backend.token_to_id(DEFAULT_IMAGE_TOKEN), backend.token_to_id(specials["pad_token"])


def save_for_llava(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the tokenizer as LLaVA's own loader, which uses transformers 4, reads it."""
    tokenizer.save_pretrained(folder)
    if isinstance(tokenizer, SentencePieceTokenizer):
        return
    if _is_llama(tokenizer.backend_tokenizer):
        warn(f"{tokenizer.name_or_path} has no tokenizer.model, which LLaVA's own loader wants: copy it to the export")
    file = folder / "tokenizer_config.json"
    config = {**read_object(file), "tokenizer_class": "PreTrainedTokenizerFast"}
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    write_json(file, config)


def _is_llama(backend: Tokenizer) -> bool:
    return bool(getattr(backend.model, "byte_fallback", False))


def _llama_backend(tokenizer: SentencePieceTokenizer) -> Tokenizer:
    """Byte-pair merges in the order of SentencePiece's scores."""
    model = tokenizer.sp_model
    pieces = [model.id_to_piece(index) for index in range(model.get_piece_size())]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    never_merged = {
        piece
        for index, piece in enumerate(pieces)
        if model.is_control(index) or model.is_byte(index) or model.is_unknown(index) or model.is_unused(index)
    }
    scores = {piece: model.get_score(index) for index, piece in enumerate(pieces)}
    backend = Tokenizer(
        BPE(
            vocab=vocabulary,
            merges=generate_merges(vocabulary, scores, never_merged),
            unk_token=model.id_to_piece(model.unk_id()),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bos = [tokenizer.bos_token] if tokenizer.add_bos_token else []
    eos = [tokenizer.eos_token] if tokenizer.add_eos_token else []
    if bos or eos:
        backend.post_processor = processors.TemplateProcessing(
            single=[*bos, "$A", *eos],
            pair=[*bos, "$A", *eos, *bos, "$B", *eos],
            special_tokens=[(token, vocabulary[token]) for token in dict.fromkeys(bos + eos)],
        )
    added = sorted(tokenizer.added_tokens_decoder.items())
    backend.add_tokens([AddedToken(str(t), normalized=False, special=t.special) for _, t in added])
    return backend


def _put_spaces(backend: Tokenizer, legacy: bool, cuts: list[Any]) -> None:
    """SentencePiece's rules about spaces.

    A stretch of text that it sees by itself begins with a space of its own: the first, those behind an ``<image>``
    (prompts are tokenized in pieces around it), and with ``legacy`` those behind other special tokens. Without
    ``legacy`` it is taken off again there, but for a text that begins with a space.
    """
    image = re.escape(DEFAULT_IMAGE_TOKEN)
    # "^" would be the start of every line.
    begins_with_space = normalizers.Replace(Regex(rf"\A[ {SPACE}]"), SPACE * 2)
    # Metaspace puts one in front of what does not begin with one.
    behind = rf"{image}(?=[ {SPACE}])" if legacy else rf"{image}(?!{image}|\z)"
    backend.normalizer = normalizers.Sequence(
        [begins_with_space, normalizers.Replace(Regex(behind), DEFAULT_IMAGE_TOKEN + SPACE)]
    )
    spaces = pre_tokenizers.Metaspace(prepend_scheme="always" if legacy else "first", split=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, spaces]) if cuts else spaces


def _cut_behind_answers(tokenizer: PreTrainedTokenizerBase, role: str) -> list[Any]:
    """The cut that keeps a turn behind ``</s>`` in the pieces it has behind a space ("▁US" "ER" -> "US" "ER").

    Byte-pair merges alone would make "USER" of it, and cannot be told what the first word of a text was merged with.
    """
    head, *rest = tokenizer.tokenize(f"{tokenizer.eos_token}{role}")[1:] or [""]
    if not head or not rest or not role.startswith(head):
        return []
    tail = role[len(head) :]
    return [pre_tokenizers.Split(Regex(rf"\A{re.escape(head)}(?={re.escape(tail)})"), "isolated")]
