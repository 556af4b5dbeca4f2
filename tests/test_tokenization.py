"""Ids, pieces and decoded text against recordings of the original tokenizer, and the characters each id stands for."""

from __future__ import annotations

import json
import shutil

import pytest

from llava.errors import UserError
from llava.mm_utils import tokenizer_image_token
from llava.tokenization import SentencePieceTokenizer, bos_prefix, encode_with_spans, load_tokenizer

# legacy: false in tokenizer_config.json is recorded as legacy0, true or no such key as legacy1.
UNSET = "unset"

# Behind a special token transformers 4.37 drops a space that 4.31, with which the released weights were trained, keeps
# ("</s> " -> "▁▁"), and makes one piece "USER" of what 4.31 splits as it does behind a space ("US" "ER").
CHANGED_BY_4_37 = {" </s> ", "x </s> y", "yes</s>USER: hi"}


def recording(golden, name):
    return json.loads((golden / "labels" / f"{name}.json").read_text(encoding="utf-8"))


def folder_with(golden, folder, legacy):
    """A copy of the recorded tokenizer's folder that says ``legacy``, or nothing about it."""
    folder.mkdir(exist_ok=True)
    for name in ("tokenizer.model", "special_tokens_map.json"):
        shutil.copy(golden / "tiny-llava-original" / name, folder)
    config = json.loads((golden / "tiny-llava-original" / "tokenizer_config.json").read_text(encoding="utf-8"))
    del config["legacy"]
    if legacy is not UNSET:
        config["legacy"] = legacy
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_null_is_as_a_missing_key(golden, tmp_path):
    folder = folder_with(golden, tmp_path, None)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    nulls = dict.fromkeys(("tokenizer_class", "legacy", "padding_side", "add_bos_token"))
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **nulls}), encoding="utf-8")
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.legacy, tokenizer.padding_side, tokenizer("").input_ids) == (True, "right", [1])


def test_a_pointer_in_the_tokenizers_place(golden, tmp_path):
    folder = folder_with(golden, tmp_path, False)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (folder / name).write_text("version https://git-lfs.github.com/spec/v1\n")
        with pytest.raises(UserError, match=rf"{name}: a git-LFS pointer and not the file itself"):
            load_tokenizer(folder)


@pytest.fixture(scope="module")
def tokenizer(golden):
    return load_tokenizer(golden / "tiny-llava-original")


@pytest.fixture(scope="module")
def legacy_tokenizer(golden, tmp_path_factory):
    return load_tokenizer(folder_with(golden, tmp_path_factory.mktemp("legacy"), True))


@pytest.mark.parametrize(
    ("name", "legacy"),
    [("HADPO_tf4.31.0_legacy0", False), ("HADPO_tf4.31.0_legacy1", True), ("HADPO_tf4.31.0_legacy1", UNSET)],
)
def test_ids_pieces_and_decoded_text_are_the_recorded_ones(golden, tmp_path, name, legacy):
    tokenizer = load_tokenizer(folder_with(golden, tmp_path, legacy))
    rows = recording(golden, name)["raw_tokenizer"]
    assert len(rows) == 29
    for row in rows:
        ids = tokenizer(row["text"]).input_ids
        got = {
            "text": row["text"],
            "input_ids": ids,
            "tokens": tokenizer.convert_ids_to_tokens(ids),
            "decode_keep": tokenizer.decode(ids),
            "decode_skip": tokenizer.decode(ids, skip_special_tokens=True),
        }
        assert got == row


def test_the_folder_of_the_released_kind_is_read_with_its_own_legacy_flag(tokenizer, legacy_tokenizer):
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert (tokenizer.legacy, legacy_tokenizer.legacy) == (False, True)


def test_transformers_4_37_differs_only_behind_special_tokens(golden, tokenizer):
    rows = recording(golden, "LLaVA_tf4.37.2_legacy0")["raw_tokenizer"]
    assert {row["text"] for row in rows if tokenizer(row["text"]).input_ids != row["input_ids"]} == CHANGED_BY_4_37


def test_legacy_ids_did_not_change_until_transformers_4_37(golden, legacy_tokenizer):
    rows = recording(golden, "LLaVA_tf4.37.2_legacy1")["raw_tokenizer"]
    assert [legacy_tokenizer(row["text"]).input_ids for row in rows] == [row["input_ids"] for row in rows]


@pytest.mark.parametrize("name", ["HADPO_tf4.31.0_legacy0", "HADPO_tf4.31.0_legacy1"])
def test_prompts_with_images_have_the_recorded_ids(golden, tokenizer, legacy_tokenizer, name):
    recorded = recording(golden, name)
    tokenizer = legacy_tokenizer if recorded["legacy"] else tokenizer
    rows = [(row["text"], row["input_ids"]) for row in recorded["tokenizer_image_token"]]
    rows += [(row["prompt"], row["input_ids"]) for row in recorded["generation_prompts"]]
    assert len(rows) == 13
    for text, ids in rows:
        assert tokenizer_image_token(text, tokenizer) == ids, text


def test_prompt_ids_as_a_tensor_and_with_another_image_id(tokenizer):
    ids = tokenizer_image_token("a<image>b", tokenizer, image_token_index=-7, return_tensors="pt")
    assert ids.tolist() == [1, 259, -7, 275]  # recorded as [1, 259, -200, 275]
    with pytest.raises(ValueError, match="only 'pt'"):
        tokenizer_image_token("a", tokenizer, return_tensors="np")


TEXTS = [
    "A dog, a cat; don't  count spaces.",
    "这张图片里有一只猫和一条狗。",
    "🐶🐱 👨‍👩‍👧 ✈️ ok",
    "Une plage à l'été — שלום",
    "tab\there\nline",
    "yes</s>USER: hi",
    "猫</s>狗 <unk> é",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("legacy", [False, True])
def test_a_piece_stands_for_exactly_its_characters(tokenizer, legacy_tokenizer, text, legacy):
    pieces = (legacy_tokenizer if legacy else tokenizer).tokenize_with_spans(text)
    for piece, (start, end) in pieces:
        if piece.startswith("<0x"):  # one byte of a character: a newline, or a part of an emoji
            assert int(piece[3:5], 16) in text[start : start + 1].encode()
        else:
            # The space in front of a stretch of text is SentencePiece's own and stands for no character.
            assert text[start:end] in (piece.replace("▁", " "), piece.replace("▁", " ").removeprefix(" "))


@pytest.mark.parametrize("text", TEXTS)
def test_spans_cover_the_text_in_order_and_leave_nothing_out(tokenizer, text):
    position = 0
    for _, (start, end) in tokenizer.tokenize_with_spans(text):
        assert position - 1 <= start <= position  # a character of several bytes begins once for each of them
        position = max(position, end)
    assert position == len(text)


def test_spans_count_characters_not_bytes(tokenizer):
    # Each of the two Chinese characters takes three bytes in the text that SentencePiece sees.
    spans = dict(tokenizer.tokenize_with_spans("图a猫</s>b"))
    assert spans["</s>"] == (3, 7)
    assert spans["b"] == (7, 8)


def test_ids_with_spans_are_the_ids_without_bos(tokenizer):
    for text in TEXTS:
        ids, spans = encode_with_spans(tokenizer, text)
        assert [tokenizer.bos_token_id, *ids] == tokenizer(text).input_ids
        assert len(ids) == len(spans)
    assert bos_prefix(tokenizer) == [1]


@pytest.mark.parametrize("legacy", [False, True])
def test_a_saved_tokenizer_loads_with_the_same_ids(golden, tmp_path, legacy):
    first = load_tokenizer(folder_with(golden, tmp_path / "source", legacy), model_max_length=77, padding_side="left")
    first.add_tokens(["<im_start>", "<im_end>"], special_tokens=True)
    first.save_pretrained(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")

    # The vocabulary holds 2000 pieces, so added tokens begin at 2000.
    assert again("a<im_start>a").input_ids == first("a<im_start>a").input_ids
    assert again.convert_tokens_to_ids(["<im_start>", "<im_end>"]) == [2000, 2001]
    assert 2000 in again("a<im_start>a").input_ids
    assert (again.legacy, again.model_max_length, again.padding_side) == (legacy, 77, "left")
    assert (again.pad_token, again.unk_token, again.bos_token, again.eos_token) == ("<unk>", "<unk>", "<s>", "</s>")
    for text in TEXTS:
        assert again(text).input_ids == first(text).input_ids


def test_saving_into_its_own_folder_keeps_the_model_file(golden, tmp_path):
    tokenizer = load_tokenizer(folder_with(golden, tmp_path, False))
    before = (tmp_path / "tokenizer.model").read_bytes()
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == before
    assert load_tokenizer(tmp_path)("a").input_ids == [1, 259]


def test_added_tokens_of_either_file_keep_their_ids(golden, tmp_path):
    by_config = folder_with(golden, tmp_path / "config", False)
    config = json.loads((by_config / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {"2": {"content": "</s>", "special": True}, "2000": {"content": "<new>"}}
    (by_config / "tokenizer_config.json").write_text(json.dumps(config))
    by_file = folder_with(golden, tmp_path / "file", False)
    (by_file / "added_tokens.json").write_text(json.dumps({"<new>": 2000}))
    for folder in (by_config, by_file):
        assert load_tokenizer(folder)("a<new>").input_ids == [1, 259, 2000]


def test_an_incomplete_table_of_added_tokens_is_refused(golden, tmp_path):
    folder = folder_with(golden, tmp_path, False)
    (folder / "added_tokens.json").write_text(json.dumps({"<new>": 2005}))
    with pytest.raises(UserError, match=r"<new>.*2005.*next free id is 2000"):
        load_tokenizer(folder)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_padded_on_the_side_it_is_told(golden, side):
    tokenizer = load_tokenizer(golden / "tiny-llava-original", padding_side=side)
    batch = tokenizer(["a", "a b"], padding=True)
    short, padding = [1, 259], [0] * (len(batch.input_ids[1]) - 2)
    assert len(padding) > 0
    assert batch.input_ids[0] == (padding + short if side == "left" else short + padding)
    mask = [0] * len(padding) + [1, 1] if side == "left" else [1, 1] + [0] * len(padding)
    assert batch.attention_mask[0] == mask


def test_padding_is_on_the_right_where_the_files_do_not_say(golden, tmp_path):
    folder = folder_with(golden, tmp_path, False)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["padding_side"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(folder).padding_side == "right"


def test_texts_are_cut_to_the_length_that_is_asked_for(golden):
    tokenizer = load_tokenizer(golden / "tiny-llava-original", model_max_length=3)
    assert tokenizer("Hello world", truncation=True).input_ids == [1, 534, 480]  # recorded: [1, 534, 480, 1906, ...]


def test_a_missing_folder_names_itself(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        load_tokenizer(tmp_path / "nowhere")


def test_a_folder_without_tokenizer_files_names_itself_and_what_is_expected(tmp_path):
    with pytest.raises(UserError, match=rf"{tmp_path}.*tokenizer\.model"):
        load_tokenizer(tmp_path)


def test_broken_tokenizer_settings_name_the_file(golden, tmp_path):
    folder = folder_with(golden, tmp_path, False)
    (folder / "tokenizer_config.json").write_text('{"legacy": ')
    with pytest.raises(UserError, match=r"tokenizer_config\.json: broken JSON"):
        load_tokenizer(folder)


def test_a_damaged_tokenizer_model_names_itself(golden, tmp_path):
    folder = folder_with(golden, tmp_path, False)
    model = folder / "tokenizer.model"
    model.write_bytes(model.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"tokenizer\.model"):
        load_tokenizer(folder)
