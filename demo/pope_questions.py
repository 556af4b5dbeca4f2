"""POPE's own sampling of questions from object annotations, its three sets over the same pictures.

Li et al., "Evaluating Object Hallucination in Large Vision-Language Models" (EMNLP 2023), section 5, and the program
that made the published files: of every picture with at least three kinds, the first three in annotation order are
asked for, and behind each a kind that is not there: drawn evenly (random), the most frequent one over the pictures
(popular), or the one seen most often together with the kind just asked for (adversarial).
"""

from __future__ import annotations

import random
from collections import Counter
from itertools import permutations
from typing import Any

from demo.language import question

LEAST_KINDS = 3  # also the number of questions of either answer per picture


def sample(objects: dict[str, list[str]], pictures: int, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Questions by set name, records in the format of ``coco_pope_{set}.json``.

    ``objects`` are the distinct kinds of every picture by file name; frequencies are counted over the drawn
    ``pictures``, as POPE does.
    """
    rng = random.Random(seed)
    eligible = sorted(name for name, kinds in objects.items() if len(kinds) >= LEAST_KINDS)
    drawn = rng.sample(eligible, min(pictures, len(eligible)))
    frequency = Counter(kind for name in drawn for kind in objects[name])
    together = Counter(pair for name in drawn for pair in permutations(objects[name], 2))
    vocabulary = sorted(frequency)

    by_frequency = sorted(vocabulary, key=lambda kind: -frequency[kind])
    by_company = {kind: sorted(vocabulary, key=lambda other: -together[kind, other]) for kind in vocabulary}
    candidates = {
        "random": lambda _: rng.sample(vocabulary, len(vocabulary)),
        "popular": lambda _: by_frequency,
        "adversarial": lambda kind: by_company[kind],
    }
    return {name: _ask(drawn, objects, choose) for name, choose in candidates.items()}


def _ask(drawn: list[str], objects: dict[str, list[str]], choose: Any) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    for name in drawn:
        asked: set[str] = set()
        for there in objects[name][:LEAST_KINDS]:
            absent = next(k for k in choose(there) if k not in asked and k not in objects[name])
            asked.add(absent)
            for kind, label in ((there, "yes"), (absent, "no")):
                number = len(records) + 1
                records.append({"question_id": number, "image": name, "text": question(kind), "label": label})
    return records
