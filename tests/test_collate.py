"""The batch: every picture once, rows that point to them, padding that is masked by length and by nothing else."""

from __future__ import annotations

import json

import pytest
import torch

from llava.data.collate import Collator, Example, PreferenceExample

BLANK = torch.full((3, 2, 2), -1.0)


def picture(value):
    return torch.full((3, 2, 2), float(value))


def row(ids, paths=(), labels=None):
    """A row whose picture ``"7"`` is filled with 7."""
    return Example(list(ids), list(labels or ids), tuple(paths), {path: picture(path) for path in paths})


def collate(*rows, max_length=None, pad=0):
    return Collator(pad, max_length, lambda: BLANK)(rows)


def test_ids_labels_and_mask_of_rows_of_different_length():
    batch = collate(row([1, 5, 6], labels=[-100, 5, 6]), row([1, 5, 6, 7, 8], labels=[-100, -100, 6, 7, 8]), pad=9)
    assert batch["input_ids"].tolist() == [[1, 5, 6, 9, 9], [1, 5, 6, 7, 8]]
    assert batch["labels"].tolist() == [[-100, 5, 6, -100, -100], [-100, -100, 6, 7, 8]]
    assert batch["attention_mask"].tolist() == [[True, True, True, False, False], [True] * 5]
    assert batch["attention_mask"].dtype == torch.bool
    assert batch["input_ids"].dtype == batch["labels"].dtype == batch["image_index"].dtype == torch.long


def test_every_distinct_picture_is_there_once():
    batch = collate(row([1, -200], ["7"]), row([1, -200], ["8"]), row([1, -200, 4], ["7"]))
    assert batch["images"][:, 0, 0, 0].tolist() == [7, 8]
    assert batch["image_index"].tolist() == [[0], [1], [0]]


def test_a_row_of_several_pictures_points_to_them_in_order():
    batch = collate(row([-200, 4, -200, -200], ["8", "7", "8"]), row([1, -200], ["7"]), row([1]))
    assert batch["images"][:, 0, 0, 0].tolist() == [8, 7]
    assert batch["image_index"].tolist() == [[0, 1, 0], [1, -1, -1], [-1, -1, -1]]


def test_text_only_rows_point_to_nothing():
    batch = collate(row([1, 2]), row([1, -200], ["7"]))
    assert batch["image_index"].tolist() == [[-1], [0]]
    assert len(batch["images"]) == 1


def test_a_batch_of_text_carries_one_blank_picture_that_no_row_points_to():
    batch = collate(row([1, 2]), row([1, 2, 3]))
    assert torch.equal(batch["images"], BLANK[None])
    assert batch["image_index"].tolist() == [[-1], [-1]]


def test_rows_are_cut_to_the_longest_length_allowed():
    batch = collate(row([1, 2, 3, 4, 5], labels=[-100, 2, 3, 4, 5]), row([1, 2]), max_length=3)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [1, 2, 0]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [1, 2, -100]]
    assert batch["attention_mask"].tolist() == [[True, True, True], [True, True, False]]


def test_a_picture_whose_mark_is_cut_off_is_dropped():
    batch = collate(row([1, -200, 3, -200], ["7", "8"]), row([1, 2, 3, -200], ["9"]), max_length=3)
    assert batch["images"][:, 0, 0, 0].tolist() == [7]
    assert batch["image_index"].tolist() == [[0], [-1]]


def test_when_every_mark_is_cut_off_the_blank_picture_steps_in():
    batch = collate(row([1, 2, 3, -200], ["9"]), max_length=3)
    assert torch.equal(batch["images"], BLANK[None])
    assert batch["image_index"].tolist() == [[-1]]


def test_a_preference_batch_holds_chosen_rows_then_rejected_rows():
    first = PreferenceExample(row([1, -200, 10], ["7"]), row([1, -200, 20, 21], ["7"]))
    second = PreferenceExample(row([1, -200, 11, 12], ["8"]), row([1, -200, 22], ["8"]))
    batch = collate(first, second)
    assert batch["input_ids"][:, 2].tolist() == [10, 11, 20, 22]
    assert batch["image_index"].tolist() == [[0], [1], [0], [1]]
    assert batch["images"][:, 0, 0, 0].tolist() == [7, 8]
    assert batch["attention_mask"].sum(1).tolist() == [3, 4, 4, 3]


def test_rows_have_the_recorded_length_and_ids_after_the_cut(golden):
    recorded = json.loads((golden / "labels" / "HADPO_tf4.31.0_legacy0.json").read_text(encoding="utf-8"))["v1"]
    assert sum(r["collated_len"] != len(r["input_ids"]) for r in recorded) == 2
    for r in recorded:
        paths = ["7"] * r["input_ids"].count(-200)
        batch = collate(row(r["input_ids"], paths, r["labels"]), max_length=r["model_max_length"])
        ids = r["input_ids"] if r["collated_input_ids"] == "same" else r["collated_input_ids"]
        assert batch["input_ids"].tolist() == [ids], r["name"]
        assert batch["input_ids"].shape[1] == r["collated_len"]
        assert batch["labels"].tolist() == [r["labels"][: r["collated_len"]]]


def test_a_text_with_the_padding_token_in_it_stays_attended(golden):
    recorded = json.loads((golden / "labels" / "HADPO_tf4.31.0_legacy0.json").read_text(encoding="utf-8"))["v1"]
    unk = next(r for r in recorded if r["name"] == "contains_unk_text")
    # Upstream hides both <unk> of this text, since <unk> is also its padding token.
    assert unk["attention_mask_zeros"] == [i for i, token in enumerate(unk["input_ids"]) if token == 0]
    assert len(unk["attention_mask_zeros"]) == 2
    batch = collate(row(unk["input_ids"], ["7"]), row(unk["input_ids"] + [5], ["7"]), pad=0)
    assert batch["attention_mask"].sum(1).tolist() == [len(unk["input_ids"]), len(unk["input_ids"]) + 1]


@pytest.mark.parametrize("pad", [None, 0])
def test_a_tokenizer_without_padding_token_pads_with_zero(pad):
    assert collate(row([1]), row([1, 2]), pad=pad)["input_ids"].tolist() == [[1, 0], [1, 2]]


def test_the_recorded_preference_batch(golden):
    """Collation of HA-DPO's eight distinct items, apart from its picture a row and its two tensors a kind."""
    items = json.loads((golden / "dpo" / "dataset_items.json").read_text(encoding="utf-8"))["items"]
    recorded = json.loads((golden / "dpo" / "dpo_golden.json").read_text(encoding="utf-8"))["batch_unique8"]
    pairs = [
        PreferenceExample(
            row(items[i]["chosen_input_ids"], [str(i)], items[i]["chosen_labels"]),
            row(items[i]["reject_input_ids"], [str(i)], items[i]["reject_labels"]),
        )
        for i in recorded["indices"]
    ]
    batch = collate(*pairs)
    assert batch["images"][:, 0, 0, 0].tolist() == recorded["indices"]
    assert batch["image_index"].flatten().tolist() == [*range(8), *range(8)]
    for half, side in ((slice(0, 8), "chosen"), (slice(8, 16), "reject")):
        for key in ("input_ids", "labels", "attention_mask"):
            wanted = torch.tensor(recorded["collated"][f"{side}_{key}"])
            length = wanted.shape[1]
            assert torch.equal(batch[key][half, :length].long(), wanted.long()), (side, key)
            assert not batch["attention_mask"][half, length:].any()
