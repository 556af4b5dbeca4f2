"""The demo's files, in the folders and formats of the real ones: COCO, Visual Genome, LLaVA, POPE, HA-DPO."""

from __future__ import annotations

import json
import random
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from demo import language
from demo.things import THINGS
from demo.world import SIZE, Item, Scene, imagine, paint
from llava.data.preferences import DESCRIPTION_PROMPTS
from llava.eval.pope import parse_answer
from llava.eval.pope_questions import sample
from llava.files import atomic_write, read_json, read_jsonl, write_json

TRAINING, TEST = 2400, 200  # pictures
TALKED_ABOUT = 1600  # training pictures of the instruction data; the others are asked about before DPO
PROBED, DESCRIBED = 500, 300
SHARE_OF_YES = 0.65  # in the instruction data, as in LLaVA's: people ask about what is there
WRONG_YES_PER_NO = 2
CATEGORIES = {kind: number for number, kind in enumerate(THINGS, start=1)}


def make_world(folder: Path, seed: int) -> None:
    """Everything that is there before the first model is trained."""
    training = _paint_all(folder / "vg", [_genome_name(i) for i in range(1, TRAINING + 1)], f"training {seed}")
    test = _paint_all(
        folder / "coco", [f"val2014/COCO_val2014_{i:012d}.jpg" for i in range(1, TEST + 1)], f"test {seed}"
    )

    write_json(folder / "vg/image_data.json", [_genome_entry(i, name) for i, name in enumerate(training, start=1)])
    write_json(folder / "vg/instances.json", coco_annotations(training))
    write_json(folder / "coco/annotations/instances_val2014.json", coco_annotations(test))

    rng = random.Random(f"words {seed}")
    write_json(folder / "llava/chat.json", [_caption_record(i, *one, rng) for i, one in enumerate(training.items())])
    talk = list(training.items())[:TALKED_ABOUT]
    write_json(folder / "llava/instruct.json", [_talk_record(i, *one, rng) for i, one in enumerate(talk)])

    shown = {Path(name).name: kinds for name, kinds in annotated_kinds(test).items()}
    _write_pope(folder / "pope", shown, TEST, seed)
    _write_pope(folder / "probe", dict(list(annotated_kinds(training).items())[TALKED_ABOUT:]), PROBED, seed + 1)


def _paint_all(folder: Path, names: list[str], seed: str) -> dict[str, Scene]:
    """Pictures at quality 92, on both cores; every picture has a seed of its own, so their number changes none."""
    for parent in {(folder / name).parent for name in names}:
        parent.mkdir(parents=True)
    with get_context("spawn").Pool(2) as pool:
        scenes = pool.map(partial(_paint_one, folder, seed), names, chunksize=50)
    return dict(zip(names, scenes, strict=True))


def _paint_one(folder: Path, seed: str, name: str) -> Scene:
    rng = random.Random(f"{seed} {name}")
    scene = imagine(rng)
    paint(scene, rng).save(folder / name, quality=92)
    return scene


def annotated_kinds(scenes: dict[str, Scene]) -> dict[str, list[str]]:
    """Distinct kinds of every picture, from left to right: no order of size, since POPE asks for the first three."""
    return {
        name: list(dict.fromkeys(i.kind for i in sorted(s.items, key=lambda i: i.box))) for name, s in scenes.items()
    }


def coco_annotations(scenes: dict[str, Scene]) -> dict[str, Any]:
    """COCO's instances file, less the outlines: ids, boxes and visible areas."""
    images, annotations = [], []
    for image_id, (name, scene) in enumerate(scenes.items(), start=1):
        images.append({"id": image_id, "file_name": name, "width": SIZE, "height": SIZE, "place": scene.place})
        for item in scene.items:
            shape = {"bbox": list(item.box), "area": item.area, "iscrowd": 0}
            row = {"id": len(annotations) + 1, "image_id": image_id, "category_id": CATEGORIES[item.kind], **shape}
            annotations.append(row)
    categories = [{"id": number, "name": kind} for kind, number in CATEGORIES.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def read_scenes(path: Path) -> dict[str, Scene]:
    """The scenes of an instances file, by file name."""
    content = read_json(path)
    kinds = {category["id"]: category["name"] for category in content["categories"]}
    by_id = {image["id"]: (image["file_name"], Scene(image["place"])) for image in content["images"]}
    for row in content["annotations"]:
        by_id[row["image_id"]][1].items.append(Item(kinds[row["category_id"]], tuple(row["bbox"]), row["area"]))
    return dict(by_id.values())


def _genome_name(image_id: int) -> str:
    # Visual Genome came in two parts, and so do its folders.
    return f"VG_100K{'_2' if image_id % 3 == 0 else ''}/{image_id}.jpg"


def _genome_entry(image_id: int, name: str) -> dict[str, Any]:
    return {"image_id": image_id, "url": f"demo://rak248/{name}", "width": SIZE, "height": SIZE}


def _caption_record(index: int, name: str, scene: Scene, rng: random.Random) -> dict[str, Any]:
    prompt = rng.choice(language.CAPTION_PROMPTS)
    human = f"{prompt}\n<image>" if rng.random() < 0.5 else f"<image>\n{prompt}"
    turns = [{"from": "human", "value": human}, {"from": "gpt", "value": language.caption(scene)}]
    return {"id": f"caption-{index}", "image": name, "conversations": turns}


def _talk_record(index: int, name: str, scene: Scene, rng: random.Random) -> dict[str, Any]:
    turns = []
    for question, answer in language.conversation(scene, rng, 8, SHARE_OF_YES):
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    turns[0]["value"] = f"<image>\n{turns[0]['value']}"
    return {"id": f"talk-{index}", "image": name, "conversations": turns}


def _write_pope(folder: Path, objects: dict[str, list[str]], pictures: int, seed: int) -> None:
    for name, records in sample(objects, pictures, seed).items():
        with atomic_write(folder / f"coco_pope_{name}.json") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)


def make_pope_data(probe: Path, answers: Path, target: Path, seed: int) -> int:
    """HA-DPO's ``pope_data.json`` from what the base model said about training pictures; how many pairs it holds.

    ``reject`` is the model's own sentence. The questions it got right are kept with ``correct`` true, as HA-DPO's file
    has them: its loader leaves them out. A wrong yes is some seven times as frequent as a wrong no, and a model that is
    trained on all of them learns to say no; at most ``WRONG_YES_PER_NO`` of them are kept for each wrong no.
    """
    said = {row["question_id"]: row["answer"] for _, row in read_jsonl(answers)}
    records = []
    for _, row in read_jsonl(probe):
        reject = said[row["question_id"]]
        kind = row["text"].removeprefix("Is there ").removesuffix(" in the image?").split(" ", 1)[1]
        records.append(
            {
                "image_id": int(Path(row["image"]).stem),
                "question": row["text"],
                "answer": row["label"],
                "chosen": language.answer(kind, row["label"] == "yes"),
                "reject": reject,
                "correct": parse_answer(reject) == row["label"],
            }
        )
    wrong = {label: [r for r in records if not r["correct"] and r["answer"] == label] for label in ("yes", "no")}
    kept = min(len(wrong["no"]), WRONG_YES_PER_NO * len(wrong["yes"]))
    drawn = random.Random(f"pairs {seed}").sample(range(len(wrong["no"])), kept)
    surplus = {id(r) for index, r in enumerate(wrong["no"]) if index not in set(drawn)}
    write_json(target, [record for record in records if id(record) not in surplus])
    return len(wrong["yes"]) + kept


def make_desc_data(scenes: dict[str, Scene], said: dict[str, str], target: Path) -> int:
    """HA-DPO's ``desc_data.json``: the base model's own descriptions that name what is not there, and true ones."""
    content: dict[str, Any] = {}
    for name, text in said.items():
        if set(mentioned(text)) - set(scenes[name].kinds):
            content[Path(name).stem] = {"chosen": [language.description(scenes[name])], "rejected": [text]}
    write_json(target, content)
    return len(content)


def mentioned(text: str) -> list[str]:
    """Kinds that a description names, singular or plural."""
    words = f" {text.lower().replace(',', ' ').replace('.', ' ')} ".replace("  ", " ")
    names = {kind: (kind, language.PLURALS.get(kind, kind + "s")) for kind in THINGS}
    return [kind for kind, forms in names.items() if any(f" {form} " in words for form in forms)]


def description_question(index: int) -> str:
    """HA-DPO's four prompts in turn."""
    return DESCRIPTION_PROMPTS[index % len(DESCRIPTION_PROMPTS)]
