"""Preference pairs: HA-DPO's description and yes/no data over Visual Genome, and the user's own pairs.

HA-DPO's choices are kept to the letter, since they decide which pairs a published number was trained on: ``pope_data``
first, entries with ``correct`` skipped; then every image of ``desc_data`` twice, with one chosen answer, one rejected
answer and one of four prompts drawn by ``random.Random(42)``, in this order, the same draw both times.
"""

from __future__ import annotations

import copy
import math
import random
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.data.captions import Captions
from llava.data.collate import Example, PreferenceExample
from llava.data.examples import ExampleBuilder, SkippingDataset
from llava.data.images import drop_missing, join
from llava.errors import UserError
from llava.files import existing, field, read_json, read_records

SAMPLING_SEED = 42  # HA-DPO samples with 42 whatever --seed says

DESCRIPTION_PROMPTS = (
    "Describe this image in detail.",
    "Take a look at this image and describe what you notice.",
    "Please provide a detailed description of the picture.",
    "Could you describe the contents of this image for me?",
)


class Pair(NamedTuple):
    """One preference: where it stands in its file, its picture, the question and both answers."""

    where: str
    image: str
    prompt: str
    chosen: str
    rejected: str


class VisualGenome:
    """Image ids -> files under ``vg_path``, by way of its ``image_data.json``."""

    def __init__(self, vg_path: str, image_folder: str | None = None) -> None:
        self.root = join(image_folder, vg_path)
        existing(self.root, "--vg_path", directory=True)
        self.table = existing(Path(self.root) / "image_data.json", "--vg_path")
        self.files: dict[int, str] = {}
        for where, entry in read_records(self.table):
            url = field(where, entry, "url", str)
            number = field(where, entry, "image_id", (int, str))
            if not str(number).isdigit():
                raise UserError(f"{where}: image_id {number!r} is not a number")
            self.files[int(number)] = join(self.root, "/".join(url.split("/")[-2:]))

    def path(self, where: str, image_id: int | str) -> str:
        """File of an image id; ids that the table does not know are refused."""
        known = self.files.get(int(image_id)) if str(image_id).isdigit() else None
        if known is None:
            raise UserError(
                f"{where}: image id {image_id} is not in {self.table}; is --vg_path the right Visual Genome?"
            )
        return known


def read_pope_pairs(path: str, genome: VisualGenome) -> list[Pair]:
    """HA-DPO's ``pope_data.json``: questions that the base model got wrong, those it got right skipped."""
    pairs = []
    for where, entry in read_records(existing(path, "--pope_data_path")):
        if entry.get("correct"):
            continue
        rejected = "rejected" if "rejected" in entry and "reject" not in entry else "reject"  # InstructBLIP's spelling
        pairs.append(
            Pair(
                where,
                genome.path(where, field(where, entry, "image_id", (int, str))),
                field(where, entry, "question", str),
                field(where, entry, "chosen", str),
                field(where, entry, rejected, str),
            )
        )
    return pairs


def read_desc_pairs(path: str, genome: VisualGenome, seed: int = SAMPLING_SEED) -> list[Pair]:
    """HA-DPO's ``desc_data.json`` ({image id: {"chosen": [...], "rejected": [...]}}), one drawn pair an image."""
    file = existing(path, "--desc_data_path")
    content = read_json(file)
    if isinstance(content, list):  # the layout of HA-DPO's MiniGPT-4 and InstructBLIP files
        listed: dict[str, Any] = {}
        for index, entry in enumerate(content):
            image_id = str(field(f"{file}: record {index}", entry, "image_id", (int, str)))
            if image_id in listed:
                raise UserError(f"{file}: record {index}: image {image_id} was described before; join their lists")
            listed[image_id] = entry
        content = listed
    if not isinstance(content, dict) or not content:
        raise UserError(f"{file}: expected an object of image ids with 'chosen' and 'rejected' lists, and at least one")
    draw = random.Random(seed)
    pairs = []
    for image_id, entry in content.items():
        where = f"{file}: image {image_id}"
        if not isinstance(entry, dict):
            raise UserError(f"{where}: expected an object with 'chosen' and 'rejected', found {type(entry).__name__}")
        answers = {}
        for key in ("chosen", "rejected"):
            answers[key] = field(where, entry, key, list)
            if not answers[key] or not all(isinstance(a, str) for a in answers[key]):
                raise UserError(f"{where}: key '{key}' must be a list of texts with at least one")
        chosen, rejected = draw.choice(answers["chosen"]), draw.choice(answers["rejected"])
        pairs.append(Pair(where, genome.path(where, image_id), draw.choice(DESCRIPTION_PROMPTS), chosen, rejected))
    return pairs


def read_own_pairs(path: str, image_folder: str | None, flag: str = "--data_path") -> list[Pair]:
    """The user's pairs: JSON lines (or a JSON list) of ``{"image", "prompt", "chosen", "rejected"}``."""
    return [
        Pair(
            where,
            join(image_folder, field(where, entry, "image", str)),
            field(where, entry, "prompt", str),
            field(where, entry, "chosen", str),
            field(where, entry, "rejected", str),
        )
        for where, entry in read_records(existing(path, flag))
    ]


def read_preferences(data_args: Any) -> tuple[list[Pair], list[Pair]]:
    """Training pairs (``pope + 2 x desc``, then the user's own) and held-out pairs, from the flags."""
    genome = VisualGenome(data_args.vg_path, data_args.image_folder) if data_args.vg_path else None
    train: list[Pair] = []
    if data_args.pope_data_path:
        train += read_pope_pairs(data_args.pope_data_path, genome)
    if data_args.desc_data_path:
        train += 2 * read_desc_pairs(data_args.desc_data_path, genome)
    if data_args.data_path:
        train += read_own_pairs(data_args.data_path, data_args.image_folder)
    return train, _read_held_out(data_args.eval_data_path, genome, data_args.image_folder)


def _read_held_out(path: str | None, genome: VisualGenome | None, image_folder: str | None) -> list[Pair]:
    """``--eval_data_path`` in any of the three layouts, told by what the file holds."""
    if path is None:
        return []
    file = existing(path, "--eval_data_path")
    if file.suffix == ".jsonl":
        return read_own_pairs(path, image_folder, "--eval_data_path")
    content = read_json(file)
    first = content[0] if isinstance(content, list) and content and isinstance(content[0], dict) else {}
    is_desc = isinstance(content, dict) or isinstance(first.get("chosen"), list)
    if not is_desc and "question" not in first:
        return read_own_pairs(path, image_folder, "--eval_data_path")
    if genome is None:
        raise UserError(f"--eval_data_path {path} is a HA-DPO file, which names Visual Genome images; pass --vg_path")
    return read_desc_pairs(path, genome) if is_desc else read_pope_pairs(path, genome)


class PreferencePairs(SkippingDataset[PreferenceExample]):
    """Pairs ready for training: tokenized and checked at once (they are few), pictures loaded when asked for.

    With ``bring`` every pair comes with a record of another data set, ``aux``, for its language-model loss.

    Raises:
        UserError: a picture is missing, an answer is empty or wholly cut off, or chosen and rejected are the same.
    """

    def __init__(
        self,
        pairs: list[Pair],
        builder: ExampleBuilder,
        skip_missing_images: bool = False,
        flag: str = "--vg_path and --image_folder",
    ) -> None:
        if not pairs:
            raise UserError("no preference pairs: the files hold none that can be trained on")
        self.builder = builder
        self.skip_missing_images = skip_missing_images
        kept = drop_missing(
            [(pair.where, pair) for pair in pairs], lambda pair: [pair.image], skip_missing_images, flag
        )
        self.pairs = [pair for _, pair in kept]
        distinct = dict.fromkeys(self.pairs)  # HA-DPO lists every description twice
        rows = {pair: (self._row(pair, "chosen"), self._row(pair, "rejected")) for pair in distinct}
        self._rows = [rows[pair] for pair in self.pairs]
        self._logps: torch.Tensor | None = None  # (pairs, 2) of the reference, where they are known
        self.aux: Captions | None = None
        self._aux_order: list[int] = []

    def _row(self, pair: Pair, side: str) -> tuple[list[int], list[int]]:
        answer = getattr(pair, side)
        if not answer.strip():
            raise UserError(f"{pair.where}: key '{side}' is empty; remove the record")
        if pair.chosen == pair.rejected:
            raise UserError(f"{pair.where}: 'chosen' and 'rejected' are the same text; remove the record")
        question = pair.prompt if DEFAULT_IMAGE_TOKEN in pair.prompt else f"{DEFAULT_IMAGE_TOKEN}\n{pair.prompt}"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        return self.builder.tokenize(f"{pair.where} ({side})", turns, n_images=1, cut=_refuse)

    def __len__(self) -> int:
        return len(self.pairs)

    def place(self, index: int) -> str:
        return self.pairs[index].where

    def outline(self, index: int) -> PreferenceExample:
        pictures = (self.pairs[index].image,)
        chosen, rejected = (Example(*row, pictures, None, index) for row in self._rows[index])
        return PreferenceExample(chosen, rejected, index)

    def make(self, index: int) -> PreferenceExample:
        pair, outline = self.pairs[index], self.outline(index)
        chosen, hidden = self._complete(pair.where, outline.chosen)
        known = None if self._logps is None else tuple(self._logps[index].tolist())
        if known is not None and math.isnan(known[0]):
            raise UserError(
                f"{pair.where}: its picture could not be opened when the reference's log-probabilities were computed; "
                "start the run again",
                everywhere=False,
            )
        return PreferenceExample(
            chosen, outline.rejected._replace(images=chosen.images), index, known, self._aux_of(index), hidden
        )

    def bring(self, aux: Captions, seed: int) -> None:
        """Let every pair bring a record of ``aux``: pair i the (i mod m)-th of the m records in an order by ``seed``.

        A pair brings the same record in every epoch.
        """
        self.aux = aux
        self._aux_order = torch.randperm(len(aux), generator=torch.Generator().manual_seed(seed)).tolist()

    def _aux_of(self, index: int) -> Example | None:
        return None if self.aux is None else self.aux[self._aux_order[index % len(self._aux_order)]]

    def alone(self) -> PreferencePairs:
        pairs = copy.copy(self)
        pairs.aux = None
        return pairs

    def remember_reference(self, logps: torch.Tensor) -> None:
        """The reference's log-probabilities of all pairs, (pairs, 2): chosen, rejected."""
        self._logps = logps

    @property
    def picture_paths(self) -> list[str]:
        """The picture of every pair."""
        return [pair.image for pair in self.pairs]

    @property
    def modality_lengths(self) -> list[int]:
        """Text tokens of the longer side; every pair has a picture."""
        return [max(len(chosen[0]), len(rejected[0])) for chosen, rejected in self._rows]


def _refuse(message: str) -> None:
    # In DPO an answer without labels has log-probability 0 and pulls the loss to log 2 without a word.
    raise UserError(message)
