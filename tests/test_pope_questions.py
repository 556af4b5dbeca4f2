"""Questions for a development set: POPE's sampling, counted by hand; its files' structure; what is refused."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from llava.eval import pope_questions
from llava.eval.pope import SETS, read_labels, read_questions_of
from llava.eval.pope_questions import read_annotations, same_picture, sample
from llava.files import read_json

ROOT = Path(__file__).resolve().parent.parent
REAL = ROOT / "tests/golden/pope_questions"

# Six pictures with kinds enough. Counted: a 5, b 4, c 4, d 3, e 2, f 1, g 1.
OBJECTS = {
    "1": ["a", "b", "c"],
    "2": ["a", "b", "c", "d"],
    "3": ["c", "a", "d"],
    "4": ["a", "z"],  # two kinds: not asked about, not counted
    "5": ["e", "a", "b"],
    "6": ["d", "e", "a"],
    "7": ["b", "c", "f", "g"],
}


def no_questions(records: list[dict], image: str) -> list[str]:
    kinds = [(r["text"].split()[3], r["label"]) for r in records if r["image"] == image]
    return [kind for kind, label in kinds if label == "no"]


@pytest.fixture
def by_hand() -> dict[str, list[dict]]:
    return sample(OBJECTS, pictures=6, seed=0)


def test_every_picture_is_asked_for_its_first_three_kinds_and_three_that_are_not_there(by_hand):
    for records in by_hand.values():
        assert [r["question_id"] for r in records] == list(range(1, 37))
        assert [r["label"] for r in records] == ["yes", "no"] * 18
        assert {r["image"] for r in records} == set("123567")
        for image in "123567":
            there = [r["text"].split()[3] for r in records if r["image"] == image and r["label"] == "yes"]
            absent = no_questions(records, image)
            assert there == OBJECTS[image][:3]
            assert len(set(absent)) == 3 and not set(absent) & set(OBJECTS[image]) and "z" not in absent


@pytest.mark.parametrize(
    ("image", "absent"),
    [
        ("1", ["d", "e", "f"]),
        ("2", ["e", "f", "g"]),
        ("3", ["b", "e", "f"]),
        ("5", ["c", "d", "f"]),
        ("6", ["b", "c", "f"]),
        ("7", ["a", "d", "e"]),
    ],
)
def test_popular_asks_for_what_most_pictures_show(by_hand, image, absent):
    assert no_questions(by_hand["popular"], image) == absent


@pytest.mark.parametrize(
    ("image", "absent"),
    [
        # a is seen with b 3, c 3, d 3, e 2; b with a 3, c 3, d 1, e 1, f 1, g 1; c with a 3, b 3, d 2, f 1, g 1.
        ("1", ["d", "e", "f"]),
        # a: e; b: f; c: g.
        ("2", ["e", "f", "g"]),
        # c: b; a: e; d with a 3, c 2, b 1, e 1: all of them there or asked, so one is drawn.
        ("3", ["b", "e", None]),
        # e with a 2, b 1, d 1: d; a: c; b: f.
        ("5", ["d", "c", "f"]),
        # d: c, which has 2; e: b; a: none is left.
        ("6", ["c", "b", None]),
        # b: a; c: d; f with b, c, g: one is drawn of what is left, which is e alone.
        ("7", ["a", "d", "e"]),
    ],
)
def test_adversarial_asks_for_what_is_seen_together(by_hand, image, absent):
    found = no_questions(by_hand["adversarial"], image)
    assert [kind if kind is None else found[i] for i, kind in enumerate(absent)] == absent
    assert all(kind in {"f", "g"} for kind, wanted in zip(found, absent, strict=True) if wanted is None)


def test_what_is_drawn_where_no_company_is_left_is_not_always_the_same():
    drawn = {no_questions(sample(OBJECTS, 6, seed)["adversarial"], "3")[2] for seed in range(20)}
    assert drawn == {"f", "g"}


def test_random_draws_evenly():
    objects = {str(n): ["a", "b", "c"] for n in range(2000)} | {"x": ["d", "e", "f"], "y": ["g", "h", "i"]}
    records = sample(objects, len(objects), seed=1)["random"]
    first = [r["text"].split()[3] for r in records if r["question_id"] % 6 == 2 and r["image"] not in "xy"]
    counts = {kind: first.count(kind) for kind in "defghi"}
    assert sum(counts.values()) == 2000
    # A sixth each; six standard deviations of a binomial are 100.
    assert all(abs(count - 2000 / 6) < 100 for count in counts.values()), counts


def test_a_seed_gives_the_questions_it_gave_before():
    """The numbers in the demo's README stand on its questions. Digests: demo/pope_questions.py at 49be6c8."""
    kinds = ["apple", "bench", "cat", "dog", "elephant", "fork", "guitar", "hat", "iron", "jug"]
    rng = random.Random(0)
    objects = {f"{n:012d}.jpg": rng.sample(kinds, rng.randint(2, 5)) for n in range(60)}
    digests = {
        name: hashlib.sha256("".join(json.dumps(r) + "\n" for r in records).encode()).hexdigest()[:16]
        for name, records in sample(objects, 40, 7).items()
    }
    assert digests == {
        "random": "4e319396c1ed8895",
        "popular": "a2031dbc97cd904d",
        "adversarial": "662d348223826713",
    }


def structure(folder: Path) -> None:
    """What holds in POPE's own files."""
    yes = []
    for name in SETS:
        file = folder / f"coco_pope_{name}.json"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        assert all(list(row) == ["question_id", "image", "text", "label"] for row in rows)
        assert [row["question_id"] for row in rows] == list(range(1, len(rows) + 1))
        assert [row["label"] for row in rows] == ["yes", "no"] * (len(rows) // 2)
        asked = [(row["image"], row["text"]) for row in rows]
        assert len(set(asked)) == len(asked)
        for start in range(0, len(rows), 6):
            assert len({row["image"] for row in rows[start : start + 6]}) == 1
        for _, text in asked:
            article, kind = text.removeprefix("Is there ").removesuffix(" in the image?").split(" ", 1)
            assert article == ("an" if kind[0] in "aeiou" else "a")
        yes.append([pair for pair, row in zip(asked, rows, strict=True) if row["label"] == "yes"])
    assert yes[0] == yes[1] == yes[2]


def test_popes_own_files_are_built_so():
    structure(REAL)


KINDS = ["person", "chair", "car", "dining table", "umbrella", "apple", "dog", "boat", "oven", "hot dog"]


def annotations(names: list[str]) -> dict:
    rng, numbers = random.Random(3), range(1, len(KINDS) + 1)
    images = [{"id": 10 * n, "file_name": name} for n, name in enumerate(names)]
    rows = [
        {"image_id": image["id"], "category_id": category, "iscrowd": 0}
        for image in images
        for category in rng.sample(numbers, 4) + rng.choices(numbers, k=3)
    ]
    rng.shuffle(rows)  # COCO's file does not go picture by picture either
    categories = [{"id": n, "name": kind} for n, kind in enumerate(KINDS, start=1)]
    return {"info": {}, "images": images, "annotations": rows, "categories": categories}


@pytest.fixture
def coco(tmp_path) -> Path:
    """Annotations of 30 pictures, 10 of which the first POPE file asks about."""
    asked = list(dict.fromkeys(image for image, _ in read_questions_of(REAL / "coco_pope_random.json").values()))[:10]
    file = tmp_path / "instances_val2014.json"
    names = asked + [f"COCO_val2014_{900000 + n:012d}.jpg" for n in range(20)]
    file.write_text(json.dumps(annotations(names)))
    return file


def run(monkeypatch, *flags: object) -> None:
    monkeypatch.setattr(sys, "argv", ["pope_questions", *map(str, flags)])
    pope_questions.main()


def refused(monkeypatch, capsys, *flags: object) -> str:
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, *flags)
    assert end.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def test_a_development_set_of_other_pictures(coco, tmp_path, monkeypatch, capsys):
    out = tmp_path / "data" / "pope_dev"
    flags = ("--annotations", coco, "--exclude", REAL, "--pictures", 12, "--seed", 5, "--out", out)
    run(monkeypatch, *flags)
    assert capsys.readouterr().out == (
        f"{out}: 12 of 20 pictures, 72 questions a set; 10 of the annotated pictures were excluded\n"
    )
    structure(out)
    shown = read_annotations(coco)
    tested = {image for image, _ in read_questions_of(REAL / "coco_pope_random.json").values()}
    for name in SETS:
        file = out / f"coco_pope_{name}.json"
        labels, asked = read_labels(file), read_questions_of(file)
        assert len(labels) == 72 and len({image for image, _ in asked.values()}) == 12
        for number, (image, text) in asked.items():
            assert image not in tested
            kind = text.removesuffix(" in the image?").split(" ", 3)[3]
            assert (kind in shown[image]) is (labels[number].label == "yes")

    made = read_json(out / "made.json")
    assert made["annotations"] == {"path": str(coco), "sha256": hashlib.sha256(coco.read_bytes()).hexdigest()}
    assert [Path(file["path"]).name for file in made["exclude"]] == [f"coco_pope_{s}.json" for s in sorted(SETS)]
    assert {k: made[k] for k in ("seed", "pictures", "excluded", "eligible")} == {
        "seed": 5,
        "pictures": 12,
        "excluded": 10,
        "eligible": 20,
    }

    stamps = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    run(monkeypatch, *flags)
    assert "the very same questions" in capsys.readouterr().err
    assert {file: file.stat().st_mtime_ns for file in out.iterdir()} == stamps
    (out / "coco_pope_popular.json").unlink()  # killed between two files
    run(monkeypatch, *flags)
    structure(out)

    other = [*flags[:-3], 6, *flags[-2:]]  # another seed
    assert "holds other questions" in refused(monkeypatch, capsys, *other)
    assert read_json(out / "made.json")["seed"] == 5


def test_kinds_come_in_the_order_of_annotation_and_once(tmp_path):
    file = tmp_path / "instances.json"
    names = [{"id": 1, "name": "cat"}, {"id": 7, "name": "dog"}]
    images = [{"id": 5, "file_name": "val2014/b.jpg"}, {"id": 4, "file_name": "a.jpg"}, {"id": 3, "file_name": "c.jpg"}]
    rows = [{"image_id": i, "category_id": c} for i, c in [(5, 7), (4, 1), (5, 1), (5, 7), (4, 1)]]
    file.write_text(json.dumps({"images": images, "annotations": rows, "categories": names}))
    assert read_annotations(file) == {"b.jpg": ["dog", "cat"], "a.jpg": ["cat"], "c.jpg": []}


def test_a_picture_is_known_in_every_edition_of_coco(tmp_path, monkeypatch):
    assert same_picture("COCO_val2014_000000310196.jpg") == same_picture("val2017/000000310196.jpg") == "000000310196"
    assert same_picture("COCO_train2014_000000000009.jpg") == "000000000009"
    assert same_picture("VG_100K/12.jpg") == "12.jpg"
    tested = {image for image, _ in read_questions_of(REAL / "coco_pope_random.json").values()}
    names = [f"{same_picture(image)}.jpg" for image in sorted(tested)] + [f"{n:012d}.jpg" for n in range(1, 7)]
    file = tmp_path / "instances_train2017.json"
    file.write_text(json.dumps(annotations(names)))
    run(monkeypatch, "--annotations", file, "--exclude", REAL, "--pictures", 6, "--out", tmp_path / "dev")
    asked = read_questions_of(tmp_path / "dev/coco_pope_popular.json")
    assert {image for image, _ in asked.values()} == set(names[-6:])


@pytest.mark.parametrize("layout", ["repository", "file"])
def test_excluded_questions_may_lie_in_popes_repository_or_be_one_file(coco, tmp_path, monkeypatch, capsys, layout):
    given = REAL / "coco_pope_random.json"
    if layout == "repository":
        given = tmp_path / "POPE"
        (given / "output/coco").mkdir(parents=True)
        (given / "output/coco/coco_pope_random.json").write_text((REAL / "coco_pope_random.json").read_text())
    run(monkeypatch, "--annotations", coco, "--exclude", given, "--pictures", 3, "--out", tmp_path / "dev")
    assert "10 of the annotated pictures were excluded" in capsys.readouterr().out


def test_all_pictures_may_be_asked_about_but_one_is_told(coco, tmp_path, monkeypatch, capsys):
    run(monkeypatch, "--annotations", coco, "--pictures", 30, "--out", tmp_path / "dev")
    assert "without --exclude" in capsys.readouterr().err


def without(key: str):
    return lambda content: content.pop(key)


def change(rows: str, index: int, **values: object):
    return lambda content: content[rows][index].update(values)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (without("categories"), "no key 'categories'"),
        (without("images"), "no key 'images'"),
        (change("images", 2, file_name=3), "images, record 2: key 'file_name' must be a str"),
        (change("images", 2, id=0), "images, record 2: the id 0 is there twice"),
        (lambda c: c["images"][2].update(file_name=c["images"][1]["file_name"]), "is there twice"),
        (lambda c: c["annotations"][4].pop("category_id"), "annotations, record 4: no key 'category_id'"),
        (change("annotations", 4, category_id=99), "no record of its category_id 99"),
        (change("annotations", 4, image_id=99), "no record of its image_id 99"),
        (change("categories", 1, name=""), "categories, record 1: an empty 'name'"),
        (lambda c: c["images"].insert(0, "x.jpg"), "images, record 0: expected an object"),
        (lambda c: c.update(annotations={}), "key 'annotations' must be a list"),
    ],
)
def test_what_is_no_instances_file_is_refused(coco, tmp_path, monkeypatch, capsys, spoil, told):
    content = json.loads(coco.read_text())
    spoil(content)
    coco.write_text(json.dumps(content))
    line = refused(monkeypatch, capsys, "--annotations", coco, "--pictures", 3, "--out", tmp_path / "dev")
    assert told in line and str(coco) in line and "instances_*.json" in line
    assert not (tmp_path / "dev").exists()


def test_other_mistakes_are_one_line(coco, tmp_path, monkeypatch, capsys):
    def tell(**changed: object) -> str:
        flags = {"annotations": coco, "exclude": REAL, "pictures": 3, "out": tmp_path / "dev"} | changed
        return refused(monkeypatch, capsys, *(part for k, v in flags.items() for part in (f"--{k}", v)))

    assert "20 pictures show at least 3 kinds" in tell(pictures=21)
    assert "at least 1" in tell(pictures=0)
    assert "invalid int" in tell(seed="x")
    assert "no such file" in tell(annotations=tmp_path / "none.json")
    (tmp_path / "list.json").write_text("[]")
    assert "expected a JSON object" in tell(annotations=tmp_path / "list.json")
    (tmp_path / "empty").mkdir()
    assert "no coco_pope_*.json there" in tell(exclude=tmp_path / "empty")
    assert "no such file" in tell(exclude=tmp_path / "none")
    assert "no key 'question_id'" in tell(exclude=REAL.parent / "hadpo_data/pope_data.json")
    assert "is a file" in tell(out=coco)
    assert "unknown flag" in tell(picture=3)


def test_too_few_kinds_to_ask_for(tmp_path, monkeypatch, capsys):
    content = annotations([f"{n}.jpg" for n in range(5)])
    for row in content["annotations"]:
        row["category_id"] = row["category_id"] % 5 + 1
    file = tmp_path / "instances.json"
    file.write_text(json.dumps(content))
    line = refused(monkeypatch, capsys, "--annotations", file, "--pictures", 3, "--out", tmp_path / "dev")
    assert "too few others" in line


def test_it_needs_no_torch():
    code = "import sys, llava.eval.pope_questions; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"
