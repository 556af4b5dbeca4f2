"""Reading what users hand in: where a file is broken; writing: whole or not at all, readable as the umask allows."""

from __future__ import annotations

import os
import stat

import pytest

from llava.errors import UserError
from llava.files import (
    atomic_write,
    existing,
    field,
    publish,
    read_json,
    read_jsonl,
    read_records,
    sha256,
    write_json,
)


@pytest.fixture
def umask():
    """Set the umask for one test."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def written(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_broken_json_names_line_and_byte(tmp_path):
    # Each Chinese character is three bytes: what is no JSON begins at character 13, byte 17.
    file = written(tmp_path / "data.json", '{"a":1,\n"猫狗":oops}')
    assert file.read_bytes()[17:21] == b"oops"
    with pytest.raises(UserError, match=r"data\.json: broken JSON at line 2, byte 17: .*; mend that place or download"):
        read_json(file)


def test_a_json_file_that_was_cut_off_names_the_end(tmp_path):
    file = written(tmp_path / "data.json", '[{"id": 1},')
    with pytest.raises(UserError, match=r"data\.json: broken JSON at line 1, byte 11"):
        read_json(file)


def test_broken_jsonl_names_line_and_byte_of_the_file(tmp_path):
    file = written(tmp_path / "data.jsonl", '{"a": "猫"}\n\n{"b": }\n')
    assert file.read_bytes()[20:21] == b"}"
    with pytest.raises(UserError, match=r"data\.jsonl: broken JSON at line 3, byte 20"):
        read_jsonl(file)


def test_text_that_is_not_utf8_names_the_byte(tmp_path):
    with pytest.raises(UserError, match=r"data\.json: not UTF-8 text at byte 2; save the file as UTF-8"):
        read_json(written(tmp_path / "data.json", b'["\xff"]'))
    with pytest.raises(UserError, match=r"data\.jsonl: not UTF-8 text at byte 10; save"):
        read_jsonl(written(tmp_path / "data.jsonl", b'{"a": 1}\n"\xff"\n'))


def test_a_byte_order_mark_is_no_error(tmp_path):
    assert read_json(written(tmp_path / "a.json", b'\xef\xbb\xbf{"a": 1}')) == {"a": 1}
    assert read_jsonl(written(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"a": 1}\n{"a": 2}')) == [
        (1, {"a": 1}),
        (2, {"a": 2}),
    ]


def test_blank_lines_are_skipped_and_counted(tmp_path):
    assert read_jsonl(written(tmp_path / "a.jsonl", '\n{"a": 1}\r\n  \n{"a": 2}')) == [(2, {"a": 1}), (4, {"a": 2})]


def test_a_line_that_is_no_object_is_named(tmp_path):
    with pytest.raises(UserError, match=r"a\.jsonl: line 2: expected one JSON object a line, found list"):
        read_jsonl(written(tmp_path / "a.jsonl", "{}\n[]\n"))


def test_records_of_either_layout_say_where_they_stand(tmp_path):
    list_, lines = written(tmp_path / "a.json", '[{"a": 1}, {"a": 2}]'), written(tmp_path / "a.jsonl", '\n{"a": 1}\n')
    assert read_records(list_) == [(f"{list_}: record 0", {"a": 1}), (f"{list_}: record 1", {"a": 2})]
    assert read_records(lines) == [(f"{lines}: line 2", {"a": 1})]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "[]", r"a\.json: holds no records; expected at least one"),
        ("a.jsonl", "\n", r"a\.jsonl: holds no records"),
        ("a.json", '{"a": 1}', r"a\.json: expected a JSON list of records, found dict"),
        ("a.json", '[{}, "text"]', r"a\.json: record 1: expected an object, found str"),
    ],
)
def test_what_is_no_list_of_records_is_refused(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message):
        read_records(written(tmp_path / name, content))


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    for read in (read_json, read_jsonl, read_records):
        with pytest.raises(UserError, match=r"gone\.json: cannot be read: No such file"):
            read(tmp_path / "gone.json")
        with pytest.raises(UserError, match=rf"{tmp_path}: cannot be read: Is a directory"):
            read(tmp_path)


def test_a_field_must_be_there_and_of_its_kind():
    assert field("r", {"a": "x"}, "a", str) == "x"
    assert field("r", {"a": 3}, "a", (int, str)) == 3
    with pytest.raises(UserError, match=r"r: no key 'a' \(a str is expected; found the keys: b, c\); add it"):
        field("r", {"b": 1, "c": 2}, "a", str, "add it")
    with pytest.raises(UserError, match=r"r: key 'a' must be a int or str, found NoneType"):
        field("r", {"a": None}, "a", (int, str))
    with pytest.raises(UserError, match=r"r: key 'a' must be a int, found bool"):
        field("r", {"a": True}, "a", int)


def test_a_path_must_exist_and_be_what_the_flag_wants(tmp_path):
    file = written(tmp_path / "a", "")
    assert existing(file, "--data_path") == file
    assert existing(tmp_path, "--vg_path", directory=True) == tmp_path
    for path, directory, message in [
        (None, False, "--flag is missing: pass the path of a file"),
        ("", True, "--flag is missing: pass the path of a folder"),
        (tmp_path / "gone", False, "--flag .*gone: no such file"),
        (tmp_path, False, "expected a file"),
        (file, True, "expected a folder"),
    ]:
        with pytest.raises(UserError, match=message):
            existing(path, "--flag", directory=directory)


def test_a_home_directory_may_be_written_as_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert existing("~", "--flag", directory=True) == tmp_path


def test_a_file_appears_whole(tmp_path):
    with atomic_write(tmp_path / "new" / "a.txt") as file:
        file.write("猫")
        assert not (tmp_path / "new" / "a.txt").exists()
    assert (tmp_path / "new" / "a.txt").read_text(encoding="utf-8") == "猫"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_beside_it(tmp_path, error):
    written(tmp_path / "a.txt", "old")
    with pytest.raises(error), atomic_write(tmp_path / "a.txt") as file:
        file.write("half of the new")
        raise error
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_what_json_cannot_hold_leaves_nothing_behind(tmp_path):
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert list(tmp_path.iterdir()) == []


def test_json_comes_back_as_it_was(tmp_path):
    write_json(tmp_path / "a.json", {"猫": [1, None, 0.5]})
    assert read_json(tmp_path / "a.json") == {"猫": [1, None, 0.5]}
    assert "猫" in (tmp_path / "a.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_a_files_mode_follows_the_umask(tmp_path, umask, mask, mode):
    umask(mask)
    write_json(tmp_path / "a.json", {})
    written(tmp_path / "temporary", "x").chmod(0o600)
    publish(tmp_path / "temporary", tmp_path / "b")
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a.json", "b")] == [mode, mode]
    assert os.umask(0o022) == mask  # reading the umask sets it; it is put back


def test_bytes_can_be_written(tmp_path):
    with atomic_write(tmp_path / "a", "wb") as file:
        file.write(b"\x00\xff")
    assert (tmp_path / "a").read_bytes() == b"\x00\xff"


def test_sha256_of_a_file(tmp_path):
    # FIPS 180-2's example.
    assert sha256(written(tmp_path / "a", "abc")) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_an_error_is_one_line():
    assert str(UserError("first\nsecond")) == "first second"


def test_an_error_out_of_a_data_worker_is_its_last_line_told_by_every_rank():
    error = UserError(
        "Caught UserError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "x.py", line 1, in f\nllava.errors.UserError: record 3: image a.png is missing\n'
    )
    assert str(error) == "record 3: image a.png is missing"
    assert not error.everywhere
