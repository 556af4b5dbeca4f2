"""Preference pairs: HA-DPO's choices and items to the letter, own pairs, and pairs that cannot be trained on."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import draw_picture, pixel_values

from llava.conversation import template
from llava.data.examples import ExampleBuilder
from llava.data.images import ImageLoader
from llava.data.preferences import Pair, PreferencePairs, read_desc_pairs, read_own_pairs, read_preferences
from llava.errors import UserError
from llava.model.builder import load_image_processor
from llava.tokenization import load_tokenizer


@pytest.fixture(scope="module")
def recorded(golden):
    return json.loads((golden / "dpo" / "dataset_items.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def builder(golden):
    return ExampleBuilder(
        tokenizer=load_tokenizer(golden / "tiny-llava-original"),
        template=template("v1"),
        load_image=ImageLoader(load_image_processor(golden / "tiny-clip", None), "pad"),
        tokens_per_image=16,
        max_length=2048,
        vocab_size=2000,
    )


@pytest.fixture
def flags(golden):
    """``flags(**changes)``: the data flags of a run over the recorded files."""

    def make(**changes):
        settings = {
            "vg_path": str(golden / "mini_vg"),
            "pope_data_path": str(golden / "hadpo_data" / "pope_data.json"),
            "desc_data_path": str(golden / "hadpo_data" / "desc_data.json"),
            "data_path": None,
            "eval_data_path": None,
            "image_folder": None,
        }
        return SimpleNamespace(**{**settings, **changes})

    return make


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "a.png"
    draw_picture(path, "a")
    return str(path)


def pair(image, prompt="Is there a dog?", chosen="No.", rejected="Yes."):
    return Pair("pairs.jsonl: line 1", image, prompt, chosen, rejected)


def written(path, content):
    lines = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    path.write_text(lines, encoding="utf-8")
    return str(path)


def json_lines(path, rows):
    return written(path, "".join(json.dumps(row) + "\n" for row in rows))


def test_hadpos_pairs_in_its_order_with_its_draws(golden, flags, recorded):
    pairs, held_out = read_preferences(flags())
    assert held_out == []
    assert len(recorded["list_data_dict"]) == 12
    for ours, theirs in zip(pairs, recorded["list_data_dict"], strict=True):
        question, chosen = (turn["value"] for turn in theirs["chosen_conversations"])
        assert ours.image == str(golden / theirs["image"])
        assert (f"<image>\n{ours.prompt}", ours.chosen) == (question, chosen)
        assert ours.rejected == theirs["reject_conversations"][1]["value"]


def test_items_have_the_recorded_ids_labels_and_pixels(golden, flags, builder, recorded):
    pairs = PreferencePairs(read_preferences(flags())[0], builder)
    assert len(pairs) == len(recorded["items"]) == 12
    with np.load(golden / "dpo" / "dataset_images.npz") as pixels:
        for index, item in enumerate(recorded["items"]):
            chosen, rejected, *_ = pairs[index]
            assert (chosen.input_ids, chosen.labels) == (item["chosen_input_ids"], item["chosen_labels"])
            assert (rejected.input_ids, rejected.labels) == (item["reject_input_ids"], item["reject_labels"])
            assert chosen.image_paths == rejected.image_paths == (pairs.pairs[index].image,)
            for row in (chosen, rejected):
                seen = pixel_values(builder.load_image, row.images[row.image_paths[0]])
                assert np.abs(seen.numpy() - pixels[f"item{index}"]).max() <= 1e-6
    with pytest.raises(IndexError):
        pairs[12]


def test_questions_the_base_model_got_right_are_skipped(golden, flags):
    questions = json.loads((golden / "hadpo_data" / "pope_data.json").read_text())
    assert [q["image_id"] for q in questions if q["correct"]] == [2315000]
    pairs, _ = read_preferences(flags(desc_data_path=None))
    assert len(pairs) == len(questions) - 1
    assert not any("2315000" in p.image for p in pairs)


def test_pairs_say_where_they_stand(flags):
    pairs, _ = read_preferences(flags())
    assert pairs[2].where.endswith("pope_data.json: record 3")
    assert pairs[4].where.endswith("desc_data.json: image 2315000")


def test_descriptions_come_twice_with_the_same_draw(flags):
    pairs, _ = read_preferences(flags(pope_data_path=None))
    assert pairs[:4] == pairs[4:]


def test_another_hadpo_layout_holds_the_same_descriptions(golden, flags, tmp_path):
    by_id = json.loads((golden / "hadpo_data" / "desc_data.json").read_text(encoding="utf-8"))
    listed = written(tmp_path / "desc.json", [{"image_id": int(i), **entry} for i, entry in by_id.items()])
    wheres = [f"{listed}: image {i}" for i in by_id]
    ours, _ = read_preferences(flags(pope_data_path=None, desc_data_path=listed))
    theirs, _ = read_preferences(flags(pope_data_path=None))
    assert [p._replace(where=q.where) for p, q in zip(ours, theirs, strict=True)] == theirs
    assert [p.where for p in ours[:4]] == wheres


def test_instructblips_spelling_of_reject_is_read(flags, tmp_path):
    entry = {"image_id": "2315007", "question": "Q?", "chosen": "No.", "rejected": "Yes."}
    pairs, _ = read_preferences(
        flags(desc_data_path=None, pope_data_path=written(tmp_path / "pope_data.json", [entry]))
    )
    assert [p[2:] for p in pairs] == [("Q?", "No.", "Yes.")]


OWN = [
    {"image": "a.png", "prompt": "Is there a dog?", "chosen": "No.", "rejected": "Yes."},
    {"image": "sub/b.png", "prompt": "Look at <image> and tell.", "chosen": "A cat.", "rejected": "A dog."},
]


def test_own_pairs_come_after_hadpos(flags, tmp_path):
    own = json_lines(tmp_path / "own.jsonl", OWN)
    pairs, _ = read_preferences(flags(data_path=own, vg_path=flags().vg_path))
    assert len(pairs) == 14
    assert pairs[12:] == read_own_pairs(own, None)


def test_own_pairs_as_lines_or_as_a_list(tmp_path):
    lines, listed = json_lines(tmp_path / "own.jsonl", OWN), written(tmp_path / "own.json", OWN)
    assert read_own_pairs(lines, "pics") == [
        Pair(f"{lines}: line 1", "pics/a.png", "Is there a dog?", "No.", "Yes."),
        Pair(f"{lines}: line 2", "pics/sub/b.png", "Look at <image> and tell.", "A cat.", "A dog."),
    ]
    assert [p[1:] for p in read_own_pairs(listed, "pics")] == [p[1:] for p in read_own_pairs(lines, "pics")]
    assert read_own_pairs(lines, None)[0].image == "a.png"


def test_the_picture_comes_first_wherever_the_prompt_has_its_mark(builder, picture):
    bare, marked, middle = (
        PreferencePairs([pair(picture, prompt=prompt)], builder)[0].chosen.input_ids
        for prompt in ("Is there a dog?", "<image>\nIs there a dog?", "Is there <image>a dog?")
    )
    assert bare == marked == middle
    assert bare.count(-200) == 1


def test_held_out_pairs_in_each_of_the_three_layouts(flags, tmp_path):
    pope, desc = flags().pope_data_path, flags().desc_data_path
    own = json_lines(tmp_path / "own.jsonl", OWN)
    listed = written(tmp_path / "own.json", OWN)
    for path, count, prompt in [
        (pope, 4, "Is there a dog in the image?"),
        (desc, 4, "Please provide a detailed description of the picture."),
        (own, 2, "Is there a dog?"),
        (listed, 2, "Is there a dog?"),
    ]:
        train, held_out = read_preferences(flags(eval_data_path=path))
        assert len(train) == 12
        assert len(held_out) == count
        assert held_out[0].prompt == prompt


def test_held_out_hadpo_files_need_visual_genome(flags, tmp_path):
    own = json_lines(tmp_path / "own.jsonl", OWN)
    without = {"vg_path": None, "pope_data_path": None, "desc_data_path": None, "data_path": own}
    for file in (flags().pope_data_path, flags().desc_data_path):
        with pytest.raises(UserError, match=r"--eval_data_path .*_data\.json is a HA-DPO file.*pass --vg_path"):
            read_preferences(flags(eval_data_path=file, **without))


def test_a_held_out_list_that_holds_no_records_is_named(flags, tmp_path):
    numbers = written(tmp_path / "numbers.json", [1, 2])
    with pytest.raises(UserError, match=r"numbers\.json: record 0: expected an object, found int"):
        read_preferences(flags(eval_data_path=numbers))


def test_visual_genome_may_lie_in_the_home_directory(golden, flags, builder, tmp_path, monkeypatch):
    (tmp_path / "vg").symlink_to(golden / "mini_vg")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(PreferencePairs(read_preferences(flags(vg_path="~/vg"))[0], builder)) == 12


def test_an_image_id_that_visual_genome_has_not_is_named(flags, tmp_path):
    file = written(tmp_path / "desc.json", {"999": {"chosen": ["a"], "rejected": ["b"]}})
    with pytest.raises(UserError, match=r"desc\.json: image 999: image id 999 is not in .*mini_vg/image_data\.json"):
        read_preferences(flags(desc_data_path=file))


def test_an_image_id_that_is_no_number_is_named(golden, flags, tmp_path):
    (tmp_path / "vg").mkdir()
    written(tmp_path / "vg" / "image_data.json", [{"image_id": "one", "url": "x/VG_100K/1.png"}])
    with pytest.raises(UserError, match=r"image_data\.json: record 0.*'?one'?"):
        read_preferences(flags(vg_path=str(tmp_path / "vg")))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ([], r"expected an object of image ids with 'chosen' and 'rejected' lists, and at least one"),
        ({}, r"expected an object of image ids with 'chosen' and 'rejected' lists, and at least one"),
        ({"2315000": ["a"]}, r"image 2315000: expected an object with 'chosen' and 'rejected', found list"),
        ({"2315000": {"chosen": ["a"]}}, r"image 2315000: no key 'rejected'"),
        ({"2315000": {"chosen": "a", "rejected": ["b"]}}, r"image 2315000: key 'chosen' must be a list, found str"),
        (
            {"2315000": {"chosen": [], "rejected": ["b"]}},
            r"image 2315000: key 'chosen' must be a list of texts with at",
        ),
        ({"2315000": {"chosen": ["a"], "rejected": [1]}}, r"image 2315000: key 'rejected' must be a list of texts"),
        ([{"chosen": ["a"], "rejected": ["b"]}], r"record 0: no key 'image_id'"),
        ([1], r"record 0"),
    ],
)
def test_descriptions_of_another_shape_are_named(golden, tmp_path, entry, message):
    class Nowhere:
        def path(self, where, image_id):
            return "a.png"

    with pytest.raises(UserError, match=rf"desc\.json: {message}"):
        read_desc_pairs(written(tmp_path / "desc.json", entry), Nowhere())


@pytest.mark.parametrize("key", ["image_id", "question", "chosen", "reject"])
def test_a_question_without_a_key_is_named(flags, tmp_path, key):
    entry = {"image_id": 2315007, "question": "Q?", "chosen": "No.", "reject": "Yes."}
    del entry[key]
    file = written(tmp_path / "pope.json", [entry])
    with pytest.raises(UserError, match=rf"pope\.json: record 0: no key '{key}'"):
        read_preferences(flags(pope_data_path=file))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": ""}, r"pairs\.jsonl: line 1: key 'chosen' is empty; remove the record"),
        ({"rejected": " \n"}, r"pairs\.jsonl: line 1: key 'rejected' is empty; remove the record"),
        ({"rejected": "No."}, r"pairs\.jsonl: line 1: 'chosen' and 'rejected' are the same text; remove the record"),
        ({"chosen": "A <image>."}, r"pairs\.jsonl: line 1 \(chosen\): 2 <image> in the text for 1 image"),
    ],
)
def test_a_pair_that_teaches_nothing_is_refused(builder, picture, change, message):
    with pytest.raises(UserError, match=message):
        PreferencePairs([pair(picture)._replace(**change)], builder)


def test_a_pair_whose_answer_is_cut_away_is_refused(builder, picture):
    from dataclasses import replace

    length = len(PreferencePairs([pair(picture)], builder)[0].chosen.input_ids)
    # "▁No" "." "</s>" are the last three; the picture is one of the others and stands for 16.
    begin = length - 2 + 15
    PreferencePairs([pair(picture)], replace(builder, max_length=begin))
    with pytest.raises(UserError, match=rf"line 1 \(chosen\): .*answer begins at token {begin}.*--model_max_length"):
        PreferencePairs([pair(picture)], replace(builder, max_length=begin - 1))


def test_no_pairs_at_all_are_refused(builder):
    with pytest.raises(UserError, match="no preference pairs"):
        PreferencePairs([], builder)


def test_missing_pictures_are_counted_before_training(builder, picture, capsys):
    pairs = [pair("gone.png"), pair(picture), pair("gone.png")]
    with pytest.raises(UserError, match=r"1 image\(s\) missing, in 2 of 3 records: gone\.png .*--vg_path"):
        PreferencePairs(pairs, builder)
    assert PreferencePairs(pairs, builder, skip_missing_images=True).pairs == [pairs[1]]


@pytest.fixture
def broken(golden, tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes((golden / "images" / "h_big_511x340.png").read_bytes()[:9000])
    return str(path)


def test_a_broken_picture_ends_the_run_by_its_name(builder, picture, broken):
    pairs = PreferencePairs([pair(picture), pair(broken)], builder)
    with pytest.raises(UserError, match=r"pairs\.jsonl: line 1: image .*broken\.png is broken or truncated"):
        pairs[1]


def test_a_broken_picture_is_replaced_by_the_next_pair_and_named_once(builder, picture, broken, capsys):
    pairs = PreferencePairs([pair(broken), pair(picture, chosen="Never.")], builder, skip_missing_images=True)
    for _ in range(3):
        assert pairs[0].chosen.input_ids == pairs[1].chosen.input_ids
        assert pairs[0].chosen.image_paths == (picture,)
    warnings = capsys.readouterr().err.splitlines()
    assert all(line.startswith("warning: ") and "broken.png" in line for line in warnings)
    assert len(warnings) == 1


def test_the_last_pair_is_replaced_by_the_first(builder, picture, broken):
    pairs = PreferencePairs([pair(picture), pair(broken)], builder, skip_missing_images=True)
    assert pairs[1].chosen.image_paths == (picture,)


def test_when_no_picture_opens_there_is_nothing_to_go_on_with(builder, broken):
    pairs = PreferencePairs([pair(broken)], builder, skip_missing_images=True)
    with pytest.raises(UserError, match="no picture of the data set can be opened"):
        pairs[0]


def test_modality_lengths_are_the_longer_sides_tokens(flags, builder, recorded):
    pairs = PreferencePairs(read_preferences(flags())[0], builder)
    wanted = [max(len(i["chosen_input_ids"]), len(i["reject_input_ids"])) for i in recorded["items"]]
    assert pairs.modality_lengths == wanted


def test_a_visual_genome_without_its_table_is_named(golden, flags, tmp_path):
    shutil.copytree(golden / "mini_vg" / "VG_100K", tmp_path / "vg" / "VG_100K")
    with pytest.raises(UserError, match=r"--vg_path .*image_data\.json: no such file"):
        read_preferences(flags(vg_path=str(tmp_path / "vg")))
