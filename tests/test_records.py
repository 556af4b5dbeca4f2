"""The index of a file of records: where each begins, what it holds, and that it is of this very file."""

from __future__ import annotations

import json
import os
import pickle
import random

import pytest

from llava.conversation import conv_templates
from llava.data import records
from llava.data.images import join
from llava.data.records import CONVERSATION, PAIR, UNKNOWN, RecordFile, missing_pictures
from llava.data.supervision import fill_template
from llava.errors import UserError
from llava.files import read_records


def record(*said, **more):
    return {"conversations": [{"from": ("human", "gpt")[n % 2], "value": v} for n, v in enumerate(said)], **more}


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """Small files have an index too."""
    monkeypatch.setattr(records, "KEPT_FROM", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "chat.json"
    path.write_text(json.dumps([record("<image>\nWhat?", "A café.", image="a.png"), record("Hi", "Hello there, 街.")]))
    return path


def test_offsets_words_and_names_by_hand(tmp_path):
    path = tmp_path / "data.json"
    # In UTF-8 é has 2 bytes, 街 3 and the smiling face 4.
    first = (
        '{"image": "é.png", "conversations": [{"from": "human", "value": "a b"}, {"from": "gpt", "value": "街 😀"}]}'
    )
    second = '{"image": ["x/y.png", "z.png"], "conversations": []}'
    path.write_text(f" [{first} ,\n{second}]\n", encoding="utf-8")
    file = RecordFile(path)
    length = len(first) + 1 + 2 + 3
    assert file.begins.tolist() == [2, 2 + length + 3]
    assert file.ends.tolist() == [2 + length, 2 + length + 3 + len(second)]
    assert file.words.tolist() == [2 + 2, 0]
    assert file.pictures.tolist() == [1, 2]
    assert [file.names_of(n) for n in range(2)] == [["é.png"], ["x/y.png", "z.png"]]
    assert file.all_names() == ["é.png", "x/y.png", "z.png"]
    assert file.where(1) == f"{path}: record 1"
    assert file[0]["conversations"][1]["value"] == "街 😀"


@pytest.mark.parametrize("window", [1, 7, 64, 4096])
@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_records_are_those_of_the_file_wherever_it_is_cut(tmp_path, monkeypatch, window, name, start):
    monkeypatch.setattr(records, "WINDOW", window)
    draw = random.Random(0)
    texts = ["plain", "naïve 街", '"quoted" \\ }, {"conversations": [', "a\u2028b", "\ud800", "tab\there", "😀"]
    rows = [record(draw.choice(texts), draw.choice(texts), image=draw.choice(texts), n=1.5e3) for _ in range(30)]
    lines = [json.dumps(row, ensure_ascii="\\ud800" in json.dumps(row) or n % 3 > 0) for n, row in enumerate(rows)]
    text = "\n\r\n".join(lines) + "\n" if name.endswith("l") else "[" + " ,\n\t".join(lines) + "]\n"
    (tmp_path / name).write_bytes((start + text).encode())
    file = RecordFile(tmp_path / name)
    assert [(file.where(n), file[n]) for n in range(len(file))] == read_records(tmp_path / name)
    assert [file.names_of(n) for n in range(30)] == [[row["image"]] for row in rows]
    assert file.all_names() == [row["image"] for row in rows]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b"[] x",
        b'[{"a": 1},]',
        b'[{"a": 1}, 3]',
        b'[{"a": 1} {"b": 2}]',
        b'[{"a": 1}, {"b": tru}]',
        b'[{"a": 1}',
        b'[{"a": 1}] 5',
        b'[{"a": "\xff"}]',
        b"version https://git-lfs.github.com/spec/v1\n",
        b'{"a": 1}\n3\n',
        b'{"a": 1}\n\n{"b": \n',
        b"\n\n",
    ],
)
@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_what_read_records_refuses_is_refused_with_its_words(tmp_path, content, name):
    path = tmp_path / name
    path.write_bytes(content)
    try:
        read_records(path)
    except UserError as error:
        with pytest.raises(UserError) as found:
            RecordFile(path)
        assert str(found.value) == str(error)
    else:
        assert [RecordFile(path)[0]] == [{"a": 1}] or content == b"{}"


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"none\.json: cannot be read: No such file"):
        RecordFile(tmp_path / "none.json")


def test_the_index_is_found_again(data, kept, capsys, monkeypatch):
    first = RecordFile(data)
    assert "chat.json: 2 records read in" in capsys.readouterr().err
    assert data.with_name("chat.json.index").is_file()
    monkeypatch.setattr(RecordFile, "_scan", None)  # the file is not read again
    again = RecordFile(data)
    assert capsys.readouterr().err == ""
    assert [again[n] for n in range(2)] == [first[n] for n in range(2)] == json.loads(data.read_text())
    assert again.words.tolist() == [4, 4]
    assert again.shapes.tolist() == [PAIR, CONVERSATION]


def test_a_file_that_was_changed_has_a_new_index(data, kept, capsys):
    RecordFile(data)
    before = data.stat()
    data.write_text(data.read_text().replace("What", "Whox"))
    os.utime(data, ns=(before.st_atime_ns, before.st_mtime_ns))  # the size and the time are the old ones
    assert RecordFile(data)[0]["conversations"][0]["value"] == "<image>\nWhox?"
    assert "it is made again" in capsys.readouterr().err


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[:-9], lambda raw: raw[:-7] + b"x" + raw[-6:], lambda raw: b"", bytes]
)
def test_a_damaged_index_is_made_again(data, kept, capsys, damage):
    RecordFile(data)
    index = data.with_name("chat.json.index")
    whole = index.read_bytes()
    index.write_bytes(damage(whole) if damage is not bytes else bytes(len(whole)))
    capsys.readouterr()
    assert RecordFile(data).words.tolist() == [4, 4]
    assert "it is made again" in capsys.readouterr().err
    assert index.read_bytes() == whole


def test_where_the_index_cannot_be_beside_the_file(data, kept, tmp_path, capsys):
    data.with_name("chat.json.index").mkdir()
    RecordFile(data)
    (index,) = (tmp_path / "cache" / "llava").iterdir()
    assert str(index) in capsys.readouterr().err
    index.unlink()
    index.mkdir()
    assert RecordFile(data).words.tolist() == [4, 4]
    assert "no index kept" in capsys.readouterr().err


def test_a_small_file_has_no_index(data):
    RecordFile(data)
    assert [path.name for path in data.parent.iterdir()] == ["chat.json"]


def test_a_pickle_of_it_does_not_carry_the_index(data, kept):
    file = RecordFile(data)
    raw = pickle.dumps(file)
    assert b"a.png" not in raw
    assert pickle.loads(raw)[1] == file[1]


def test_a_pickle_without_an_index_carries_all(data):
    file = RecordFile(data)
    assert pickle.loads(pickle.dumps(file))[1] == file[1]


def test_a_file_that_changes_in_use_is_named(data):
    file = RecordFile(data)
    data.write_text("[]")
    with pytest.raises(UserError, match=r"chat\.json: record 1: the file has changed while it is in use"):
        file[1]


@pytest.mark.parametrize(
    ("row", "shape"),
    [
        (record("<image>\nWhat?", "Red.", image="a"), PAIR),
        (record("What?", "Red.", image="a"), PAIR),  # one unused picture is upstream's habit
        (record("What?", "Red."), CONVERSATION),
        (record("<image>", "Red.", "And?", "Blue.", image="a"), CONVERSATION),
        (record("<image> <image>", "Red.", image=["a", "b"]), CONVERSATION),
        (record("<image>", "Red."), UNKNOWN),
        (record("<image>", "", image="a"), UNKNOWN),
        (record("What?", "A <image>.", image="a"), UNKNOWN),
        (record("<image>", "Red.", image={"a": 1}), UNKNOWN),
        (record("<image>", "Red.", image=["a", 3]), UNKNOWN),
        (record("<image>", "Red.", image=3), UNKNOWN),
        ({"conversations": [{"from": "gpt", "value": "Hi"}, {"from": "human", "value": "Hi"}]}, UNKNOWN),
        ({"conversations": [{"from": "human", "value": 3}]}, UNKNOWN),
        ({"conversations": "hi"}, UNKNOWN),
        ({}, UNKNOWN),
    ],
)
def test_what_is_known_of_turns(tmp_path, row, shape):
    (tmp_path / "data.json").write_text(json.dumps([row, record("Hi", "Ho", image="last")]))
    file = RecordFile(tmp_path / "data.json")
    assert file.shapes.tolist() == [shape, PAIR]
    assert file.names_of(1) == ["last"]


def test_what_is_taken_as_good_is_good(tmp_path):
    draw = random.Random(1)
    rows = []
    for _ in range(1500):
        texts = ["a", "", "<image>", "<image> b <image>", "c"]
        turns = [
            {"from": draw.choice(["human", "gpt"] if draw.random() < 0.1 else [["human", "user"], ["gpt"]][n % 2])}
            | {"value": draw.choice(texts[: 5 - 2 * (n % 2)][: 5 if draw.random() < 0.3 else 2])}
            for n in range(draw.randint(0, 4))
        ]
        rows.append({"conversations": turns, "image": draw.choice([None, "", "a", ["a"], ["a", "b"], []])})
    (tmp_path / "data.json").write_text(json.dumps(rows))
    file = RecordFile(tmp_path / "data.json")
    assert min((file.shapes == shape).sum() for shape in (UNKNOWN, CONVERSATION, PAIR)) > 20
    for number, row in enumerate(rows):
        for name, template in conv_templates.items():
            if file.shapes[number] >= (PAIR if "plain" in name else CONVERSATION):
                filled = fill_template("", row["conversations"], template, int(file.pictures[number]))
                assert any(piece.supervised and piece.text for piece in filled.training_pieces())


@pytest.mark.parametrize("folder", [None, "", ".", "/", "pictures", "pictures/", "~", "~/a", "/a//b/./c"])
@pytest.mark.parametrize("names", [["a.png", "b/c.png", "..a"], ["./a", "b"], ["/abs/a"], ["a//b"], ["~/a"], ["a/"]])
def test_paths_are_joined_as_everywhere(tmp_path, folder, names):
    (tmp_path / "data.json").write_text(json.dumps([record("x", "y", image=names)]))
    assert list(RecordFile(tmp_path / "data.json").paths(folder)) == [join(folder, name) for name in names]


def test_missing_pictures(data):
    assert missing_pictures(RecordFile(data), str(data.parent)) == {str(data.parent / "a.png")}
    (data.parent / "a.png").touch()
    assert missing_pictures(RecordFile(data), str(data.parent)) == set()
