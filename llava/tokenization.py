"""Text -> ids, exactly as the models were trained, with the characters every id came from.

Checkpoints such as vicuna-7b-v1.5 and llava-v1.5-7b ship a SentencePiece model and no ``tokenizer.json``. Building a
fast tokenizer from that file loses the merge scores and the spaces that a text begins with; against the ids recorded
from the original programs transformers 5.23's AutoTokenizer gets 25 of 29 texts wrong and its LlamaTokenizer 6.
``SentencePieceTokenizer`` asks SentencePiece itself.
"""

from __future__ import annotations

import json
import shutil
from bisect import bisect_right
from collections.abc import Collection
from itertools import accumulate
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from llava.errors import UserError
from llava.files import read_object, refuse_pointer, write_json

SPACE = "▁"
HUGGINGFACE_TOKENS = ("<image>", "<pad>")  # that its LLaVA has and ours has not

Span = tuple[int, int]


class SentencePieceTokenizer(SentencePieceBackend):
    """Llama's SentencePiece tokenizer as LLaVA and HA-DPO used it (transformers 4.31, ``use_fast=False``).

    ``legacy`` decides what happens behind a special token: SentencePiece puts its leading space in front of the text
    there (``legacy=True``: "</s>USER" -> "▁US" "ER"), or that space is taken off again (``legacy=False``: "US" "ER").
    The released LLaVA-1.5 weights were trained with the latter; transformers 4.37 makes one piece "USER" of it.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(
        self,
        vocab_file: str,
        unk_token: Any = "<unk>",
        bos_token: Any = "<s>",
        eos_token: Any = "</s>",
        legacy: bool | None = None,
        add_bos_token: bool = True,
        add_eos_token: bool = False,
        **kwargs: Any,
    ) -> None:
        self.add_bos_token, self.add_eos_token = add_bos_token, add_eos_token
        super().__init__(
            vocab_file=vocab_file,
            unk_token=unk_token,
            bos_token=bos_token,
            eos_token=eos_token,
            # The parent would edit the SentencePiece model for legacy=False; the rule is applied here instead.
            legacy=True,
            **kwargs,
        )
        self.legacy = True if legacy is None else legacy  # transformers 4's default
        self.init_kwargs["legacy"] = self.legacy
        self.init_kwargs.update(add_bos_token=add_bos_token, add_eos_token=add_eos_token)

    def tokenize_with_spans(self, text: str) -> list[tuple[str, Span]]:
        """Pieces of ``text`` (no bos, no eos) with the characters ``text[start:end]`` that each stands for."""
        pieces: list[tuple[str, Span]] = []
        start = 0
        for section in self.tokens_trie.split(text):
            end = start + len(section)
            if section in self._added_tokens_encoder or section in self.all_special_tokens:
                pieces.append((section, (start, end)))
            else:
                pieces += self._section(section, start, first=start == 0)
            start = end
        return pieces

    def _section(self, section: str, start: int, first: bool) -> list[tuple[str, Span]]:
        """SentencePiece on the text between two special tokens."""
        found = self.sp_model.encode(section, return_type="proto")
        # SentencePiece counts UTF-8 bytes, spans count characters.
        chars = list(accumulate((len(c.encode()) for c in section), initial=0))
        pieces = [
            (p.piece, (start + bisect_right(chars, p.begin) - 1, start + bisect_right(chars, p.end) - 1))
            for p in found.pieces
        ]
        if self.legacy or first or section.startswith((" ", SPACE)):
            return pieces
        head, span = pieces[0]
        bare = head[len(SPACE) :]
        if not head.startswith(SPACE):
            return pieces
        if not bare:
            return pieces[1:]
        # A vocabulary may know "▁x" and not "x"; the original then emits <unk>, which loses the text.
        if self.sp_model.piece_to_id(bare) == self.sp_model.unk_id():
            return [(c, span) for c in bare] + pieces[1:]
        return [(bare, span), *pieces[1:]]

    def encode_with_spans(self, text: str) -> tuple[list[int], list[Span]]:
        """Ids of ``text`` without bos and eos, and the characters each id stands for."""
        pieces = self.tokenize_with_spans(text)
        return self.convert_tokens_to_ids([piece for piece, _ in pieces]), [span for _, span in pieces]

    def tokenize(self, text: str, **kwargs: Any) -> list[str]:
        """Pieces of ``text``, special tokens kept whole."""
        return [piece for piece, _ in self.tokenize_with_spans(text)]

    def _convert_token_to_id(self, token: str) -> int:
        return self.sp_model.piece_to_id(token)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Add bos and eos as the checkpoint's ``add_bos_token`` and ``add_eos_token`` say."""
        bos = [self.bos_token_id] if self.add_bos_token else []
        eos = [self.eos_token_id] if self.add_eos_token else []
        ids = bos + token_ids_0 + eos
        return ids if token_ids_1 is None else ids + bos + token_ids_1 + eos

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text of ``tokens``; the space that SentencePiece put in front of a text is taken off."""
        if not tokens:
            return ""
        text, plain, after_special = "", [], False
        if tokens[0].startswith(SPACE):
            tokens = [piece for piece in (tokens[0][len(SPACE) :], *tokens[1:]) if piece]
            # SentencePiece takes one leading space off by itself; it has just been taken off.
            text = " " if tokens and tokens[0].startswith(SPACE) else ""
        for index, token in enumerate(tokens):
            if token in self._added_tokens_encoder or token in self.all_special_tokens:
                if not after_special and index != 0:
                    text += " "
                text += self.sp_model.decode(plain) + token
                plain, after_special = [], True
            else:
                plain.append(token)
                after_special = False
        return text + self.sp_model.decode(plain)

    def _decode(self, token_ids: int | list[int], skip_special_tokens: bool = False, **kwargs: Any) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        return self.convert_tokens_to_string(self.convert_ids_to_tokens(ids, skip_special_tokens=skip_special_tokens))

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> tuple[str, ...]:
        """Write ``tokenizer.model`` and its JSON files, which LLaVA and HA-DPO read as well; no ``tokenizer.json``."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        model = folder / "tokenizer.model"
        if not model.exists() or not model.samefile(self.vocab_file):
            shutil.copyfile(self.vocab_file, model)
        special = {
            name: str(value)
            for name in ("bos_token", "eos_token", "unk_token", "pad_token")
            if (value := getattr(self, name, None)) is not None
        }
        write_json(folder / "special_tokens_map.json", special)
        config = {
            **special,
            "tokenizer_class": "LlamaTokenizer",
            "legacy": self.legacy,
            "add_bos_token": self.add_bos_token,
            "add_eos_token": self.add_eos_token,
            "clean_up_tokenization_spaces": False,
            "model_max_length": self.model_max_length,
            "padding_side": self.padding_side,
            "sp_model_kwargs": {},
        }
        write_json(folder / "tokenizer_config.json", config)
        written = [str(model), str(folder / "special_tokens_map.json"), str(folder / "tokenizer_config.json")]
        added = {t: i for t, i in self._added_tokens_encoder.items() if i >= self.sp_model.get_piece_size()}
        if added:
            write_json(folder / "added_tokens.json", added)
            written.append(str(folder / "added_tokens.json"))
        return tuple(written)


def encode_with_spans(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[Span]]:
    """Ids of ``text`` without bos and eos, and the characters each id stands for, for any tokenizer we load."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        return tokenizer.encode_with_spans(text)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return list(encoded["input_ids"]), [tuple(span) for span in encoded["offset_mapping"]]


def bos_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts in front of every text: ``[bos]`` for Llama, nothing for Qwen."""
    ids = tokenizer("").input_ids
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []


def vocabulary_size(folder: Path) -> int | None:
    """How many pieces a folder's tokenizer was made with, without tokens added since; None where that is not known."""
    if (folder / "tokenizer.model").is_file():
        try:
            return SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).get_piece_size()
        except RuntimeError:
            return None  # reading the tokenizer says what is wrong
    if (folder / "tokenizer.json").is_file():
        return len(read_object(folder / "tokenizer.json").get("model", {}).get("vocab", ())) or None
    return None


def added_tokens(folder: Path) -> dict[str, tuple[int, bool]]:
    """Tokens that a folder's files add to the vocabulary: id, and whether it is special."""
    config_file, json_file, added_file = (
        folder / name for name in ("tokenizer_config.json", "tokenizer.json", "added_tokens.json")
    )
    added: dict[str, tuple[int, bool]] = {}
    if json_file.is_file():
        added |= {t["content"]: (t["id"], t["special"]) for t in read_object(json_file).get("added_tokens") or ()}
    if config_file.is_file():
        table = read_object(config_file).get("added_tokens_decoder") or {}
        added |= {entry["content"]: (int(index), bool(entry.get("special"))) for index, entry in table.items()}
    if added_file.is_file():
        added |= {token: (index, token.startswith("<")) for token, index in read_object(added_file).items()}
    return added


def load_tokenizer(path: str | Path, vocab_size: int | None = None, **kwargs: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder or hub id.

    A folder with ``tokenizer.model`` whose class is Llama's, or which says ``legacy``, is read by SentencePiece; a
    Llama's with ``tokenizer.json`` alone is made to give the same ids; anything else is read by AutoTokenizer. Hugging
    Face's ``<image>`` and ``<pad>`` are left out of a Llama's where ``vocab_size`` rows leave none for them. ``kwargs``
    (``model_max_length``, ``padding_side``, ``cache_dir``) override what the files say.

    Raises:
        UserError: no tokenizer files, or files that cannot be read.
    """
    folder = Path(path)
    if not folder.is_dir():
        folder = _downloaded(str(path), kwargs.get("cache_dir"))
    config_file = folder / "tokenizer_config.json"
    config = read_object(config_file) if config_file.is_file() else {}
    config = {key: value for key, value in config.items() if value is not None}  # as where the key is missing
    if (folder / "tokenizer.model").is_file() and (
        config.get("tokenizer_class", "LlamaTokenizer").startswith("Llama") or "legacy" in config
    ):
        return _sentencepiece(folder, config, kwargs, vocab_size)
    pieces = _llama_pieces(folder)
    if pieces is not None:
        return _llama_of_json(folder, pieces, config, kwargs, vocab_size)
    try:
        return AutoTokenizer.from_pretrained(folder, **kwargs)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise UserError(
            f"{path}: no tokenizer can be read ({str(error).splitlines()[0]}); "
            "expected tokenizer.model or tokenizer.json with tokenizer_config.json"
        ) from None


def _downloaded(name: str, cache_dir: str | None) -> Path:
    """The tokenizer files of a hub id, in the hub's cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import HfHubHTTPError, LocalEntryNotFoundError

    try:
        patterns = ["*.json", "*.model", "*.txt", "*.jinja"]
        return Path(snapshot_download(name, cache_dir=cache_dir, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise UserError(
            f"{name}: neither a local folder nor a hub model that can be fetched ({type(error).__name__})"
        ) from None


def _rowless(added: dict[str, tuple[int, bool]], vocab_size: int | None) -> list[str]:
    """Hugging Face's tokens that a model of ``vocab_size`` rows has no row for."""
    return [t for t in HUGGINGFACE_TOKENS if vocab_size is not None and t in added and added[t][0] >= vocab_size]


def _settings(
    folder: Path, config: dict[str, Any], overrides: dict[str, Any], rowless: Collection[str]
) -> dict[str, Any]:
    """What a Llama tokenizer is made with; a special token among the ``rowless`` is ``<unk>`` instead."""
    special_file = folder / "special_tokens_map.json"
    special = read_object(special_file) if special_file.is_file() else {}
    settings: dict[str, Any] = {
        "padding_side": config.get("padding_side", "right"),  # transformers 4's default, which LLaVA relies on
        "model_max_length": config.get("model_max_length", int(1e30)),
    }
    for name in ("unk_token", "bos_token", "eos_token", "pad_token"):
        token = config.get(name) or special.get(name)
        token = token["content"] if isinstance(token, dict) else token
        if token:
            settings[name] = settings.get("unk_token", "<unk>") if token in rowless else token
    return {**settings, **{k: v for k, v in overrides.items() if k in ("model_max_length", "padding_side")}}


def _llama_pieces(folder: Path) -> dict[str, Any] | None:
    """``tokenizer.json`` where it is that of a Llama of the SentencePiece kind."""
    file = folder / "tokenizer.json"
    content = read_object(file) if file.is_file() else {}
    model = content.get("model") or {}
    return content if model.get("type") == "BPE" and model.get("byte_fallback") else None


def _llama_of_json(
    folder: Path, content: dict[str, Any], config: dict[str, Any], overrides: dict[str, Any], vocab_size: int | None
) -> PreTrainedTokenizerBase:
    """A Llama tokenizer of ``tokenizer.json``'s pieces, with ``SentencePieceTokenizer``'s rules about spaces.

    Without ``legacy`` the first word behind a special token may be another piece ("</s>USER" -> "USER", as in
    transformers 4.37): merges cannot be told that a space was there.
    """
    tokens = content.get("added_tokens") or []
    rowless = _rowless({t["content"]: (t["id"], t["special"]) for t in tokens}, vocab_size)
    prepends = "Prepend" in json.dumps(content.get("normalizer"))
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if config.get("legacy", prepends):
        steps, before = [{"type": "Prepend", "prepend": SPACE}, spaces], None
    else:
        # Metaspace takes a leading space for the one that SentencePiece puts in front.
        steps = [{"type": "Replace", "pattern": {"Regex": rf"\A[ {SPACE}]"}, "content": SPACE * 2}, spaces]
        before = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}
    content = {
        **content,
        "added_tokens": [t for t in tokens if t["content"] not in rowless],
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": before,
    }
    settings = _settings(folder, config, overrides, rowless)
    try:
        backend = Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # tokenizers raises nothing narrower
        raise UserError(f"{folder / 'tokenizer.json'}: cannot be read ({str(error).splitlines()[0]})") from None
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **settings)
    tokenizer.name_or_path = str(folder)
    return tokenizer


def _sentencepiece(
    folder: Path, config: dict[str, Any], overrides: dict[str, Any], vocab_size: int | None
) -> SentencePieceTokenizer:
    added = added_tokens(folder)
    rowless = _rowless(added, vocab_size)
    settings: dict[str, Any] = {
        **_settings(folder, config, overrides, rowless),
        "legacy": config.get("legacy"),
        "add_bos_token": config.get("add_bos_token", True),
        "add_eos_token": config.get("add_eos_token", False),
    }
    try:
        tokenizer = SentencePieceTokenizer(str(folder / "tokenizer.model"), **settings)
    except RuntimeError:
        refuse_pointer(folder / "tokenizer.model")
        raise UserError(
            f"{folder / 'tokenizer.model'}: no SentencePiece model (truncated?); download it again"
        ) from None
    tokenizer.name_or_path = str(folder)
    for token, (index, is_special) in sorted(added.items(), key=lambda item: item[1][0]):
        if token in rowless:
            continue
        if tokenizer.convert_tokens_to_ids(token) != index or token not in tokenizer._added_tokens_encoder:
            tokenizer.add_tokens([token], special_tokens=is_special)
        if tokenizer.convert_tokens_to_ids(token) != index:
            raise UserError(
                f"{folder}: added token {token!r} has id {index} in the tokenizer's files, but the next free id is "
                f"{tokenizer.convert_tokens_to_ids(token)}; the table of added tokens is incomplete"
            )
    return tokenizer
