"""Ids and labels against recordings of LLaVA's and HA-DPO's own preprocessing, and what a record must look like."""

from __future__ import annotations

import json
import shutil

import pytest

from llava.conversation import template
from llava.data.examples import ExampleBuilder
from llava.data.supervision import fill_template, image_first, tokenize_pieces
from llava.errors import UserError
from llava.tokenization import bos_prefix, load_tokenizer

# Upstream warns "tokenization mismatch", masks the whole record and trains on nothing; here the answer is learnt.
RESCUED = {
    "empty_question": "Nothing was asked.</s>",
    "contains_eos_text": "It ends text.</s>",
    "contains_unk_text": "Unknown <unk> token</s>",
    "contains_assistant_sep": "The word is ASSISTANT: yes</s>",
}
# The only two records whose upstream text has more marks than pictures; such rows shift every later picture of a batch.
TWO_MARKS_ONE_IMAGE = {"two_image_tokens_two_turns", "image_token_in_answer"}

RECORDINGS = ["HADPO_tf4.31.0_legacy0", "HADPO_tf4.31.0_legacy1", "LLaVA_tf4.37.2_legacy1"]


@pytest.fixture(scope="module")
def tokenizers(golden, tmp_path_factory):
    """The recorded tokenizer by its ``legacy`` flag."""
    legacy = tmp_path_factory.mktemp("legacy")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(golden / "tiny-llava-original" / name, legacy)
    config = json.loads((legacy / "tokenizer_config.json").read_text(encoding="utf-8"))
    (legacy / "tokenizer_config.json").write_text(json.dumps({**config, "legacy": True}), encoding="utf-8")
    return {False: load_tokenizer(golden / "tiny-llava-original"), True: load_tokenizer(legacy)}


@pytest.fixture(scope="module")
def tokenizer(tokenizers):
    return tokenizers[False]


@pytest.fixture(scope="module")
def recordings(golden):
    files = {name: golden / "labels" / f"{name}.json" for name in RECORDINGS}
    return {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items()}


def builder(tokenizer, name="v1", **options):
    settings = {"tokens_per_image": 16, "max_length": 2048, "vocab_size": 2000, **options}
    return ExampleBuilder(tokenizer=tokenizer, template=template(name), load_image=None, **settings)


def conversation_of(row):
    """The recorded record in template v1; where its marks outnumber its pictures, as upstream filled the template."""
    if row["name"] not in TWO_MARKS_ONE_IMAGE:
        return fill_template(row["name"], row["conversations"], template("v1"), n_images=int(row["has_image"]))
    conversation = template("v1")
    for turn in row["after_preprocess_multimodal"]:
        conversation.append_message(conversation.roles[turn["from"] == "gpt"], turn["value"])
    return conversation


def ids_and_labels(row, tokenizer):
    ids, labels = tokenize_pieces(conversation_of(row).training_pieces(), tokenizer)
    # Upstream's tokenizer cuts text-only records at once, those with a picture in the collator.
    end = None if row["has_image"] else row["model_max_length"]
    return ids[:end], labels[:end]


def text_of(labels, tokenizer):
    """The supervised text; runs of spaces become one, for decoding writes its own around special tokens."""
    return " ".join(tokenizer.decode([label for label in labels if label >= 0]).split())


@pytest.mark.parametrize("name", RECORDINGS)
def test_prompts_are_the_recorded_ones(recordings, name):
    rows = recordings[name]["v1"]
    assert len(rows) == 38
    for row in rows:
        assert conversation_of(row).get_prompt() == row["prompt"], row["name"]


@pytest.mark.parametrize("name", RECORDINGS)
def test_ids_are_the_recorded_ones(recordings, tokenizers, name):
    for row in recordings[name]["v1"]:
        assert ids_and_labels(row, tokenizers[recordings[name]["legacy"]])[0] == row["input_ids"], row["name"]


@pytest.mark.parametrize("name", RECORDINGS)
def test_labels_are_the_recorded_ones_wherever_upstream_kept_any(recordings, tokenizers, name):
    tokenizer = tokenizers[recordings[name]["legacy"]]
    differing = {}
    for row in recordings[name]["v1"]:
        labels = ids_and_labels(row, tokenizer)[1]
        if labels != row["labels"]:
            differing[row["name"]] = text_of(labels, tokenizer)
            assert "tokenization mismatch" in row["warning"]
            assert set(row["labels"]) == {-100}
    assert differing == RESCUED


@pytest.mark.parametrize("name", RECORDINGS)
def test_captions_have_the_recorded_ids_and_labels(recordings, tokenizers, name):
    rows = recordings[name]["plain"]
    assert len(rows) == 12
    for row in rows:
        conversation = fill_template(row["name"], row["conversations"], template("plain"), n_images=1)
        ids, labels = tokenize_pieces(conversation.training_pieces(), tokenizers[recordings[name]["legacy"]])
        assert (ids, labels) == (row["input_ids"], row["labels"]), row["name"]


def test_records_without_any_answer_are_the_others_that_upstream_warned_of(recordings, tokenizer):
    rows = recordings["HADPO_tf4.31.0_legacy0"]["v1"]
    warned = {row["name"]: row for row in rows if row["warning"]}
    assert set(warned) == set(RESCUED) | {"empty_answer", "empty_answer_noimage"}
    for name in ("empty_answer", "empty_answer_noimage"):
        with pytest.raises(UserError, match=f"{name}: no answer of 'gpt' with any text.*remove the record"):
            builder(tokenizer).tokenize(name, warned[name]["conversations"], n_images=int(warned[name]["has_image"]))


def test_records_with_more_marks_than_pictures_are_refused(recordings):
    for row in recordings["HADPO_tf4.31.0_legacy0"]["v1"]:
        if row["name"] in TWO_MARKS_ONE_IMAGE:
            with pytest.raises(UserError, match=r"2 <image> in the text for 1 image\(s\); write one <image> for every"):
                fill_template(row["name"], row["conversations"], template("v1"), n_images=1)


HI, MORE = {"from": "human", "value": "hi"}, {"from": "human", "value": "more"}
HELLO, BYE = {"from": "gpt", "value": "hello"}, {"from": "gpt", "value": "bye"}


@pytest.mark.parametrize(
    ("name", "learnt"),
    [
        ("v1", "hello</s> bye</s>"),
        ("llava_v1", "hello</s> bye</s>"),
        ("v0", "hello\n### bye\n###"),
        ("llava_llama_2", "hello </s> bye </s>"),
        ("mpt", "hello<|im_end|>bye<|im_end|>"),
        ("qwen", "hello<|im_end|>bye<|im_end|>"),
    ],
)
def test_answers_are_learnt_from_their_first_token_to_their_closing_separator(tokenizer, name, learnt):
    conversation = fill_template("r", [HI, HELLO, MORE, BYE], template(name), n_images=0)
    _, labels = tokenize_pieces(conversation.training_pieces(), tokenizer)
    pieces = tokenizer.convert_ids_to_tokens([label for label in labels if label >= 0])
    # Pieces such as "▁he" carry the space behind "ASSISTANT:". Bytes of characters that have no piece read "<0x0A>".
    text = "".join(bytes.fromhex(p[3:5]).decode() if p.startswith("<0x") else p.replace("▁", " ") for p in pieces)
    assert text.removeprefix(" ") == learnt


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A byte-level BPE tokenizer in Qwen's manner: ChatML marks, no bos, no unk; saved and loaded again."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=marks,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["There is a dog in the image. Is there a dog? Yes, there is."] * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    folder = tmp_path_factory.mktemp("qwen")
    fast.save_pretrained(folder)
    return load_tokenizer(folder)


def test_qwen_has_no_bos_and_learns_every_answer_with_its_end_mark(qwen):
    turns = [
        {"from": "human", "value": "<image>\nIs there a dog?"},
        {"from": "gpt", "value": "Yes, 一只狗 🐶."},
        {"from": "human", "value": "Sure?"},
        {"from": "gpt", "value": "Yes."},
    ]
    conversation = fill_template("r", turns, template("qwen"), n_images=1)
    ids, labels = tokenize_pieces(conversation.training_pieces(), qwen)

    assert bos_prefix(qwen) == []
    assert ids[0] == qwen.convert_tokens_to_ids("<|im_start|>")
    assert ids.count(-200) == 1
    assert len(ids) == len(labels)
    # What is left of the text once the picture is taken out is the text itself: nothing is lost, nothing twice.
    text = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<image>\nIs there a dog?<|im_end|>\n"
        "<|im_start|>assistant\nYes, 一只狗 🐶.<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n"
        "<|im_start|>assistant\nYes.<|im_end|>\n"
    )
    assert qwen.decode([i for i in ids if i != -200]) == text.replace("<image>", "")

    answers, current = [], []
    for label in [*labels, -100]:
        if label >= 0:
            current.append(label)
        elif current:
            answers.append(qwen.decode(current))
            current = []
    assert answers == ["Yes, 一只狗 🐶.<|im_end|>", "Yes.<|im_end|>"]
    assert all(label in (-100, i) for i, label in zip(ids, labels, strict=True))


def test_one_picture_moves_to_the_front_of_its_turn():
    v1 = template("v1")
    assert image_first("What is this?\n<image>", v1) == "<image>\nWhat is this?"
    assert image_first("Look at <image> and tell.", v1) == "<image>\nLook at  and tell."
    assert image_first("<image>", v1) == "<image>"
    assert image_first("<image>\n<image>\nCompare.", v1) == "<image>\nCompare."
    assert image_first("No picture.", v1) == "No picture."


def test_marks_around_the_picture():
    assert image_first("<image>\nhi", template("v1_mmtag")) == "<Image><image></Image>\nhi"
    assert image_first("<image>\nhi", template("v1"), use_im_start_end=True) == "<im_start><image><im_end>\nhi"


def test_several_pictures_keep_their_places(tokenizer):
    turns = [{"from": "human", "value": "First <image> then <image>: which?"}, HELLO]
    conversation = fill_template("r", turns, template("v1"), n_images=2)
    assert conversation.messages[0][1] == "First <image> then <image>: which?"
    ids, labels = tokenize_pieces(conversation.training_pieces(), tokenizer)
    assert ids.count(-200) == 2
    assert labels.count(-200) == 0


@pytest.mark.parametrize(("marks", "n_images"), [(1, 2), (3, 2), (0, 2), (1, 0)])
def test_marks_and_pictures_must_be_equally_many(marks, n_images):
    turns = [{"from": "human", "value": "<image> " * marks + "which?"}, HELLO]
    with pytest.raises(UserError, match=rf"r: {marks} <image> in the text for {n_images} image"):
        fill_template("r", turns, template("v1"), n_images)


def test_pictures_of_the_templates_own_example_are_not_counted():
    assert fill_template("r", [HI, HELLO], template("v0"), n_images=0).messages[2:] == [
        ["Human", "hi"],
        ["Assistant", "hello"],
    ]


def test_a_first_turn_of_gpt_is_dropped():
    conversation = fill_template("r", [BYE, HI, HELLO], template("v1"), n_images=0)
    assert conversation.messages == [["USER", "hi"], ["ASSISTANT", "hello"]]


def test_openai_speakers_are_understood():
    turns = [{"from": "user", "value": "hi"}, {"from": "assistant", "value": "hello"}]
    assert fill_template("r", turns, template("v1"), 0).messages == [["USER", "hi"], ["ASSISTANT", "hello"]]


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([HI, MORE], "r: turns must alternate between human and gpt, turn 1 does not"),
        ([HI, HELLO, BYE], "turn 2 does not"),
        ([{"from": "system", "value": "x"}, HI, HELLO], "r: turn 0: unknown speaker 'system'; expected one of human"),
        ([{"value": "x"}], "r: turn 0: no key 'from'"),
        ([{"from": "human", "text": "x"}], "r: turn 0: no key 'value'"),
        ([HI, {"from": "gpt", "value": None}], "r: turn 1: key 'value' must be a str, found NoneType"),
    ],
)
def test_turns_that_cannot_be_used_are_named(turns, message):
    with pytest.raises(UserError, match=message):
        fill_template("r", turns, template("v1"), n_images=0)


@pytest.mark.parametrize("turn", ["hi", "a word from me", None, ["human", "hi"]])
def test_a_turn_that_is_no_object_is_named(turn):
    with pytest.raises(UserError, match="r: turn 0"):
        fill_template("r", [turn, HELLO], template("v1"), n_images=0)


@pytest.mark.parametrize(("turns", "n_images"), [([HI, HELLO, MORE, BYE], 1), ([HI, HELLO], 0), ([HI], 1)])
def test_plain_wants_one_picture_and_one_caption(turns, n_images):
    with pytest.raises(UserError, match=r"template 'plain' takes one image.*use --version v1 for conversations"):
        fill_template("r", turns, template("plain"), n_images)


def test_ids_outside_the_vocabulary_are_refused_with_the_token(tokenizer):
    with pytest.raises(UserError, match=r"r: token id \d+ \('.+'\) is outside the model's vocabulary of 200;"):
        builder(tokenizer, vocab_size=200).tokenize("r", [HI, HELLO], n_images=0)


def test_the_cut_counts_a_picture_as_all_its_features(recordings, tokenizer):
    row = next(r for r in recordings["HADPO_tf4.31.0_legacy0"]["v1"] if r["name"] == "short_yes")
    assert row["labels"].count(-100) == 51  # then "▁Yes" "</s>"
    begin = 51 + 15 + 1  # the picture is one of the 51 and stands for 16; the answer comes next
    for max_length, kept in [(begin + 1, 2), (begin, 1), (begin - 1, 0), (None, 2)]:
        assert builder(tokenizer, max_length=max_length).surviving_labels(row["input_ids"], row["labels"]) == kept

    messages = []
    turns = row["conversations"]
    assert builder(tokenizer, max_length=begin).tokenize("r", turns, 1, cut=messages.append)[0] == row["input_ids"]
    assert messages == []
    builder(tokenizer, max_length=begin - 1).tokenize("r", turns, 1, cut=messages.append)
    assert messages == [
        f"r: the cut to {begin - 1} tokens leaves nothing to learn (the answer begins at token {begin}); "
        "raise --model_max_length"
    ]
