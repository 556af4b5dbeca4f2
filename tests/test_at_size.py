"""Data of the published sets' size, in a run with data workers that is killed and goes on."""

from __future__ import annotations

import io
import json
import random
import zipfile

import forked
import numpy as np
import pytest
from conftest import GOLDEN
from forked import AtCall
from PIL import Image

RECORDS, PICTURED = 600_000, 20  # one record in so many has a picture
SIZE, BATCH, SAVE, KILLED = 2, 500, 100, 350
STEPS = RECORDS // (SIZE * BATCH)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A file of 600,000 records and the archive of its pictures."""
    folder, draw = tmp_path_factory.mktemp("data"), random.Random(0)
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for number in range(0, RECORDS, PICTURED):
            picture = io.BytesIO()
            Image.new("RGB", (8, 8), tuple(draw.randbytes(3))).save(picture, "PNG")
            archive.writestr(f"{number}.png", picture.getvalue())
    rows = []
    for number in range(RECORDS):
        image = {} if number % PICTURED else {"image": f"{number}.png"}
        asked = "What is this?" if number % PICTURED else "<image>\nWhat is this?"
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": f"It is number {number}."}]
        rows.append({"id": str(number), **image, "conversations": turns})
    (folder / "chat.json").write_text(json.dumps(rows))
    return folder


def seen_in(folder, steps):
    """Numbers of the records, ``(step, rank, batch)``."""
    return np.array(
        [
            [np.frombuffer((folder / f"{rank}-{step:05d}").read_bytes(), np.int64) for rank in range(SIZE)]
            for step in steps
        ]
    )


@pytest.mark.slow
def test_every_one_of_600000_records_is_seen_once_by_a_run_that_is_killed(data, tmp_path):
    flags = [
        *("--model_name_or_path", GOLDEN / "tiny-vicuna", "--vision_tower", GOLDEN / "tiny-clip"),
        *("--data_path", data / "chat.json", "--image_folder", data / "images.zip", "--version", "v1"),
        *("--tune_mm_mlp_adapter", True, "--group_by_modality_length", True, "--dataloader_num_workers", 4),
        *("--per_device_train_batch_size", BATCH, "--num_train_epochs", 1, "--model_max_length", 2048),
        *("--save_strategy", "steps", "--save_steps", SAVE, "--save_total_limit", 1, "--logging_steps", SAVE),
        *("--report_to", "none", "--output_dir", tmp_path / "out"),
    ]
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
        killed = folder is folders[0]
        die = AtCall("llava.train.trainer.LlavaTrainer.training_step", KILLED, after=True) if killed else None
        env = {"SEEN": str(folder)}
        run = forked.run("tests.recorded_training", flags, SIZE, env=env, die=die, timeout=900)
        assert run.codes == ([-9] * SIZE if killed else [0] * SIZE), run.text
    saved = KILLED // SAVE * SAVE
    assert (data / "chat.json.index").exists()
    assert "records read in" not in run.text  # the second run found the first one's index
    before, after = seen_in(folders[0], range(1, saved + 1)), seen_in(folders[1], range(saved + 1, STEPS + 1))
    assert len(list(folders[1].iterdir())) == SIZE * (STEPS - saved)  # the second run did no other step
    assert np.array_equal(np.sort(np.concatenate([before, after]).ravel()), np.arange(RECORDS))
    # What the first run did after its checkpoint is done again as it was.
    again = range(saved + 1, KILLED)
    assert np.array_equal(seen_in(folders[0], again), seen_in(folders[1], again))
