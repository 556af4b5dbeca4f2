"""Trees of rows: every row's own tokens, positions and labels are found again on its path."""

from __future__ import annotations

import random

import torch

from llava.data.collate import Collator, Example, PackingCollator, PreferenceExample
from llava.data.packing import pack

IMAGE = (-200, 0)
NOTHING = -100


def paths(rows):
    """What each token of the stream sees, from ``subtree_end`` alone."""
    end = rows["subtree_end"].tolist()
    seen = {}
    for start, _, stop, _ in rows["trees"]:
        for i in range(start, stop):
            seen[i] = [j for j in range(start, i + 1) if i < end[j]]
    return seen


def test_a_pair_shares_everything_up_to_the_first_word_that_differs():
    rows = pack(
        [[1, IMAGE, 5, 6, 7], [1, IMAGE, 5, 6, 8, 9]],
        [[NOTHING, NOTHING, NOTHING, 6, 7], [NOTHING, NOTHING, NOTHING, 6, 8, 9]],
        tokens_per_image=3,
    )
    assert rows["input_ids"].tolist() == [1, -200, -200, -200, 5, 6, 7, 8, 9]
    assert rows["position_ids"].tolist() == [0, 1, 2, 3, 4, 5, 6, 6, 7]  # the rejected answer's start again
    assert rows["trees"] == [[0, 6, 9, 3]]
    assert paths(rows)[8] == [0, 1, 2, 3, 4, 5, 7, 8]  # not 6, the chosen answer's
    assert rows["image_at"].tolist() == [1, 2, 3] and rows["feature_index"].tolist() == [0, 1, 2]
    # The 6 that both learn is one pair; 7 and 8 are predicted from the same place.
    assert rows["queries"].tolist() == [4, 5, 7]
    assert [
        (rows["queries"][at].item(), t) for at, t in zip(rows["label_at"], rows["targets"].tolist(), strict=True)
    ] == [
        (4, 6),
        (5, 7),
        (5, 8),
        (7, 9),
    ]
    assert rows["label_index"].tolist() == [0, 1, 0, 2, 3]
    assert rows["label_row"].tolist() == [0, 0, 1, 1, 1]
    assert rows["label_counts"].tolist() == [2, 3]


def test_questions_about_a_picture_are_one_tree_and_other_pictures_are_not():
    first, second = [1, 2, (-200, 0)], [1, 2, (-200, 1)]
    rows = [[*first, 10, 11], [*first, 10, 12], [*first, 20, 21], [*second, 10, 11], [1, 2, 3], [1, 2, 3]]
    packed = pack(rows, rows_as_labels(rows), tokens_per_image=4)
    lengths = [end - start for start, _, end, _ in packed["trees"]]
    assert lengths == [6 + 5, 6 + 2, 3, 3]  # text alone is not shared
    assert packed["feature_index"].tolist() == [*range(4), *range(4, 8)]


def rows_as_labels(rows):
    return [[NOTHING if isinstance(symbol, tuple) else symbol for symbol in row] for row in rows]


def test_any_rows_are_found_again_on_their_paths():
    draw = random.Random(0)
    for _ in range(40):
        rows = []
        for _ in range(draw.randint(1, 8)):
            text = [draw.randint(1, 3) for _ in range(draw.randint(0, 8))]
            rows.append([1, (-200, draw.randint(0, 1)), *text] if draw.random() < 0.7 else [1, *text])
            if draw.random() < 0.2:
                rows[-1].append((-200, 2))
        labels = [[t if not isinstance(t, tuple) and draw.random() < 0.6 else NOTHING for t in row] for row in rows]
        limit = draw.choice([None, 4, 7, 100])
        packed = pack(rows, labels, tokens_per_image=3, max_length=limit)
        check_rows(packed, rows, labels, limit)


def check_rows(packed, rows, labels, limit):
    ids, seen = packed["input_ids"].tolist(), paths(packed)
    features = dict(zip(packed["image_at"].tolist(), packed["feature_index"].tolist(), strict=True))
    for i, path in seen.items():
        assert packed["position_ids"][i] == len(path) - 1
    wanted_features = {i for i, token in enumerate(ids) if token == -200}
    assert set(features) == wanted_features
    # Each row expanded by hand, with the label of each token, as the splice of separate rows gives it.
    for number, (row, row_labels) in enumerate(zip(rows, labels, strict=True)):
        tokens, targets = [], []
        for symbol, label in zip(row, row_labels, strict=True):
            if isinstance(symbol, tuple):
                tokens += [("feature", symbol[1] * 3 + k) for k in range(3)]
                targets += [NOTHING] * 3
            else:
                tokens.append(symbol)
                targets.append(label)
        tokens, targets = tokens[:limit], targets[:limit]
        wanted = [(tokens[: i + 1], target) for i, target in enumerate(targets[1:]) if target != NOTHING]
        got = []
        for index, of_row in zip(packed["label_index"].tolist(), packed["label_row"].tolist(), strict=True):
            if of_row == number:
                at = packed["queries"][packed["label_at"][index]].item()
                above = [("feature", features[j]) if ids[j] == -200 else ids[j] for j in seen[at]]
                got.append((above, packed["targets"][index].item()))
        assert got == wanted
        assert packed["label_counts"][number] == len(wanted)


def test_a_batch_without_labels_still_asks_one_question():
    rows = pack([[1, 2, 3]], [[NOTHING] * 3], tokens_per_image=3)
    assert rows["queries"].tolist() == [0] and rows["trees"] == [[0, 3, 3, 1]]
    assert len(rows["targets"]) == len(rows["label_index"]) == 0


def test_the_collator_packs_what_it_would_have_padded():
    def row(ids):
        return Example(ids, [NOTHING, NOTHING, *ids[2:]], ("a",), {"a": torch.zeros(3, 2, 2, dtype=torch.uint8)})

    pair = PreferenceExample(row([1, -200, 5, 6]), row([1, -200, 5, 7, 8]), 3, (-1.0, -2.0))
    settings = (0, 2048, lambda: torch.zeros(3, 2, 2, dtype=torch.uint8), torch.ones(3, 256))
    padded = Collator(*settings)([pair])
    packed = PackingCollator(*settings, tokens_per_image=4)([pair])
    assert set(packed) == {"rows", "images", "pixel_levels", "records", "reference_logps"}
    assert packed["rows"]["input_ids"].tolist() == [1, -200, -200, -200, -200, 5, 6, 7, 8]
    for key in ("images", "pixel_levels", "records", "reference_logps"):
        assert torch.equal(packed[key], padded[key])
    assert packed["reference_logps"].tolist() == [-1.0, -2.0]
    assert padded["records"].tolist() == [3]
