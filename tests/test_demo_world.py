"""The demo's world: pictures, annotations, POPE's sampling, and files that the product's own loaders read."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from demo import data, language
from demo.things import PLACES, THINGS
from demo.world import LEAST_VISIBLE, SIZE, Item, Scene, imagine, paint
from llava.data.preferences import VisualGenome, read_desc_pairs, read_pope_pairs
from llava.eval.pope import SETS, read_labels, read_questions_of
from llava.eval.pope_questions import question
from llava.files import read_json

KITCHEN = Scene("kitchen", [Item("table"), Item("apple"), Item("person"), Item("person"), Item("cup")])


def test_a_seed_is_a_picture_and_its_annotations():
    def one(seed: int) -> tuple[bytes, list[Item]]:
        rng = random.Random(seed)
        scene = imagine(rng)
        return paint(scene, rng).tobytes(), scene.items

    assert one(1) == one(1)
    assert one(1) != one(2)


def test_things_stand_where_their_boxes_say_and_can_be_seen():
    for seed in range(30):
        rng = random.Random(seed)
        scene = imagine(rng)
        asked = Counter(item.kind for item in scene.items)
        picture = paint(scene, rng)
        assert picture.size == (SIZE, SIZE)
        assert not Counter(item.kind for item in scene.items) - asked
        areas = [item.area for item in scene.items]
        assert areas == sorted(areas, reverse=True)
        for item in scene.items:
            x, y, width, height = item.box
            assert x >= 0 and y >= 0 and x + width <= SIZE and y + height <= SIZE
            assert 0 < item.area <= width * height


def test_boxes_are_where_the_paint_is():
    for seed, kind in enumerate(THINGS):
        alone, nothing = Scene("study", [Item(kind)]), Scene("study")
        pictures = [np.asarray(paint(scene, random.Random(seed)), dtype=int) for scene in (alone, nothing)]
        rows, columns = np.nonzero((np.abs(pictures[0] - pictures[1]) > 60).any(axis=2))
        x, y, width, height = alone.items[0].box
        found = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        # Parts of a thing may have the colour of what is behind it, so the paint may end before the box does.
        assert x - 2 <= found[0] and y - 2 <= found[1] and found[2] <= x + width + 2 and found[3] <= y + height + 2
        assert (found[2] - found[0]) * (found[3] - found[1]) > 0.5 * width * height


def test_what_covers_a_thing_leaves_half_of_it(monkeypatch):
    """Every thing is painted alone on the same spot; what is left of it in the crowd is counted."""
    import demo.world as world

    layers = []
    draw = world._draw
    monkeypatch.setattr(world, "_draw", lambda *args: layers.append((args[0], draw(*args))) or layers[-1][1])
    rng = random.Random(5)
    scene = Scene("kitchen", [Item(kind) for kind in ("table", "chair", "bowl", "cup", "bottle", "person", "cat")])
    paint(scene, rng)
    whole = {kind: np.count_nonzero(np.asarray(layer.getchannel("A")) > 127) / 4 for kind, layer in layers}
    assert len(scene.items) >= 5
    for item in scene.items:
        assert item.area >= LEAST_VISIBLE * whole[item.kind] - 1


def test_places_have_company_and_things_turn_up_uninvited():
    rng = random.Random(0)
    scenes = [imagine(rng) for _ in range(2000)]
    assert set(PLACES) == {scene.place for scene in scenes}
    assert len(THINGS) >= 12
    seen = Counter(kind for scene in scenes for kind in scene.kinds)
    assert set(seen) == set(THINGS)
    cups = [scene.place for scene in scenes if "cup" in scene.kinds]
    assert 0.9 < sum(place in ("kitchen", "study") for place in cups) / len(cups) < 1


def test_what_is_said():
    assert language.caption(KITCHEN) == "A table, an apple, two people and a cup in a kitchen."
    assert language.description(KITCHEN) == (
        "The image shows a table and an apple in a kitchen. There are also two people and a cup."
    )
    assert language.question("umbrella") == "Is there an umbrella in the image?"
    assert [language.question(kind) for kind in THINGS] == [question(kind) for kind in THINGS]
    assert language.answer("bus", False) == "No, there is no bus."
    assert data.mentioned("There are two benches, a traffic light and people.") == ["person", "traffic light", "bench"]
    assert data.mentioned(language.description(KITCHEN)) == ["person", "table", "cup", "apple"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A world of a few pictures, in the layout of the whole one."""
    folder = tmp_path_factory.mktemp("world") / "world"
    patch = pytest.MonkeyPatch()
    for name, value in {"TRAINING": 12, "TEST": 6, "TALKED_ABOUT": 6, "PROBED": 6}.items():
        patch.setattr(data, name, value)
    data.make_world(folder, seed=3)
    patch.undo()
    return folder


def test_files_are_read_by_the_products_loaders(world, tmp_path):
    genome = VisualGenome(str(world / "vg"))
    assert len(genome.files) == 12
    labels = read_labels(world / "probe/coco_pope_adversarial.json")
    questions = read_questions_of(world / "probe/coco_pope_adversarial.json")
    rows = [
        {"question_id": n, "answer": language.answer("dog", n != 1)}  # yes to all but the first, which is there
        for n in labels
    ]
    said = tmp_path / "said.jsonl"
    said.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    wrong = data.make_pope_data(world / "probe/coco_pope_adversarial.json", said, tmp_path / "pope_data.json", 0)
    pairs = read_pope_pairs(str(tmp_path / "pope_data.json"), genome)
    records = read_json(tmp_path / "pope_data.json")
    assert len(pairs) == wrong == 1 + data.WRONG_YES_PER_NO
    right = len(labels) // 2 - 1
    assert len(records) == right + wrong and sum(record["correct"] for record in records) == right
    assert [p.rejected for p in pairs].count("No, there is no dog.") == 1
    for pair, record in zip(pairs, [r for r in records if not r["correct"]], strict=True):
        assert pair.prompt in {text for _, text in questions.values()}
        assert pair.chosen.startswith("Yes" if record["answer"] == "yes" else "No")
        assert Path(pair.image).is_file()

    scenes = data.read_scenes(world / "vg/instances.json")
    name = next(iter(scenes))
    lie = "The image shows a boat, a bus, a kite, a lamp and a clock in a kitchen."
    assert data.make_desc_data(scenes, {name: lie}, tmp_path / "desc_data.json") == 1
    (pair,) = read_desc_pairs(str(tmp_path / "desc_data.json"), genome)
    assert pair.rejected == lie and pair.chosen == language.description(scenes[name])
    truth = language.description(scenes[name])
    assert data.make_desc_data(scenes, {name: truth}, tmp_path / "none.json") == 0


def test_annotations_are_cocos_and_agree_with_the_questions(world):
    content = read_json(world / "coco/annotations/instances_val2014.json")
    assert {"images", "annotations", "categories"} <= set(content)
    kinds = {category["id"]: category["name"] for category in content["categories"]}
    there = {image["file_name"].split("/")[-1]: set() for image in content["images"]}
    names = {image["id"]: image["file_name"].split("/")[-1] for image in content["images"]}
    for row in content["annotations"]:
        there[names[row["image_id"]]].add(kinds[row["category_id"]])
    for name in SETS:
        file = world / f"pope/coco_pope_{name}.json"
        for number, label in read_labels(file).items():
            image, text = read_questions_of(file)[number]
            asked = text.removeprefix("Is there ").removesuffix(" in the image?").split(" ", 1)[1]
            assert (asked in there[image]) is (label.label == "yes")
            assert (world / "coco/val2014" / image).is_file()


def test_training_and_test_pictures_are_different(world):
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in world.glob("**/*.jpg")]
    assert len(digests) == len(set(digests)) == 18
