"""What the model says of a few pictures while it trains: ``captions.jsonl``, and pictures in TensorBoard."""

from __future__ import annotations

import io
import json
import textwrap
import weakref
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from transformers import GenerationConfig, TrainerCallback

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.data.images import ImageLoader, open_image
from llava.errors import BrokenImage, note
from llava.files import atomic_write, whole_lines
from llava.model.generation import Rules, grow_answers, rules
from llava.train.prompts import Prompt, first_answer, learner, pixel_loader, prompt_of, stream_of
from llava.train.saving import bare_model
from llava.train.watching import Drawn, Progress, TensorBoardOfAllParts

FILE = "captions.jsonl"
NEW_TOKENS = 40
LOOKED_AT = 1000  # records that are looked at for one with another picture
SIDE = 224  # pixels
LARGEST = 40_000  # bytes of a drawn picture
QUALITIES = (85, 70, 50, 30)  # of its JPEG, the first that is small enough
TEXT_SIZE = 12  # pixels
LETTERS = 36  # of a line below a picture


class Shown(NamedTuple):
    """A record whose picture is shown: its path, itself (small), what the model is asked, and the record's answer."""

    path: str
    picture: Image.Image
    prompt: Prompt
    reference: str


class ShownCaptions(TrainerCallback):
    """Greedy answers about ``--caption_images`` pictures before the first step, every ``--caption_steps``, at the end.

    The pictures are the first different ones from as many evenly spread places of the held-out records, or of those
    of the training where none are held out; the prompt is the record's up to its first answer. An answer is at most
    40 tokens and ends where the template's do.

    ``OUTPUT_DIR/captions.jsonl`` grows by a line a picture, ``{"step", "image", "prompt", "caption", "reference"}``;
    a run that goes on drops those behind its checkpoint. TensorBoard has a table of them (``captions``) and every
    picture with its caption below it (``captions/1``, ...).

    Every rank asks, since ZeRO-3 runs them in step; the first writes. The training is not changed: no random number is
    drawn, every module's mode is put back, and the time is left out of the rates.

    Raises:
        BrokenImage: a picture cannot be opened, and ``--skip_missing_images`` was not given.
    """

    def __init__(self, trainer: Any, progress: Progress, board: TensorBoardOfAllParts | None) -> None:
        self.trainer = weakref.proxy(trainer)  # else the two, and the data's workers, would outlive the run
        self.progress = progress
        self.board = board
        self.file = Path(trainer.args.output_dir) / FILE
        self._loader: ImageLoader | None = None
        self._shown: list[Shown] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self._drop_behind(state.global_step)
        if not state.global_step:
            self._show(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % args.caption_steps == 0 or state.global_step == state.max_steps:
            self._show(state.global_step)
            self.progress.pause()

    def _drop_behind(self, step: int) -> None:
        """Keep the lines up to a checkpoint's step; a run that begins keeps none."""
        if not self.file.exists():
            return
        kept = [line for line in whole_lines(self.file) if line["step"] <= step] if step else []
        with atomic_write(self.file) as file:
            file.writelines(_line(line) for line in kept)

    def _show(self, step: int) -> None:
        trainer = self.trainer
        device = trainer.args.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            if self._shown is None:
                self._shown = self._choose()
            captions = self._captions() if self._shown else []
        if not captions or not trainer.is_world_process_zero():
            return
        table = list(zip(self._shown, captions, strict=True))
        with self.file.open("a", encoding="utf-8") as file:
            file.write(
                "".join(
                    _line(
                        {
                            "step": step,
                            "image": shown.path,
                            "prompt": self._text(shown.prompt.ids),
                            "caption": caption,
                            "reference": shown.reference,
                        }
                    )
                    for shown, caption in table
                )
            )
        if self.board is not None:
            drawn = [draw(shown.picture, caption) for shown, caption in table]
            self.board.show("captions", markdown([(c, shown.reference) for shown, c in table]), drawn, step)

    def _choose(self) -> list[Shown]:
        """The records whose pictures are shown; each picture once."""
        trainer, shown = self.trainer, {}
        dataset = (trainer.eval_dataset if trainer.eval_dataset is not None else trainer.train_dataset).alone()
        self._loader = pixel_loader(dataset)
        wanted, size = trainer.args.caption_images, len(dataset)
        for start in torch.linspace(0, size - 1, min(wanted, size), dtype=torch.float64).long().tolist():
            for number in range(start, start + min(size, LOOKED_AT)):
                row = learner(dataset.outline(number % size))
                prompt = prompt_of(row)
                if not prompt.paths or prompt.paths[0] in shown:
                    continue
                try:
                    for path in prompt.paths:
                        self._loader(path, dataset.place(number % size))
                    picture = open_image(prompt.paths[0], dataset.place(number % size))
                except BrokenImage:
                    if not dataset.skip_missing_images:
                        raise
                    continue
                picture.thumbnail((SIDE, SIDE))
                shown[prompt.paths[0]] = Shown(prompt.paths[0], picture, prompt, self._reference(first_answer(row)))
                break
        if not shown:
            note("--caption_steps: no record with a picture was found, so no captions are shown")
        return list(shown.values())

    @torch.no_grad()
    def _captions(self) -> list[str]:
        trainer = self.trainer
        wrapped, bare = trainer.model_wrapped, bare_model(trainer.accelerator.unwrap_model(trainer.model))
        modes = {module: module.training for module in wrapped.modules()}
        wrapped.eval()
        try:
            with trainer.accelerator.autocast():
                return [self._answer(ids) for ids in self._answers(bare)]
        finally:
            for module, training in modes.items():
                module.training = training

    def _answers(self, bare: Any) -> list[list[int]]:
        """New ids of every answer."""
        prompts = [shown.prompt for shown in self._shown]
        device = self.trainer.args.device
        ends = self._ends()
        settings = GenerationConfig(
            do_sample=False,
            use_cache=True,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else None,
        )
        found = rules(bare, settings, self.trainer.tokenizer)
        if not isinstance(found, Rules):
            return [_row(bare, self._loader, prompt, settings, device) for prompt in prompts]
        stream, pictures, order = stream_of(bare, self._loader, prompts, device)
        grown = grow_answers(bare, stream, pictures, found)[0]
        answers: list[list[int]] = [[] for _ in prompts]
        for number, ids in zip(order, grown, strict=True):
            answers[number] = ids
        return answers

    def _ends(self) -> list[int]:
        """Ids that end an answer: the tokenizer's own, and the template's where that is one token."""
        tokenizer = self.trainer.tokenizer
        stop = tokenizer.convert_tokens_to_ids(self._stop)
        ends = {tokenizer.eos_token_id, None if stop == tokenizer.unk_token_id else stop}
        return sorted(end for end in ends if end is not None)

    @property
    def _stop(self) -> str:
        return self.trainer.train_dataset.builder.template.stop_string

    def _answer(self, ids: list[int]) -> str:
        text = self.trainer.tokenizer.decode(ids, skip_special_tokens=True)
        return text.split(self._stop)[0].strip()

    def _reference(self, ids: list[int]) -> str:
        # Not cut where the template's end first stands: a caption's lines end like a plain answer.
        text = self.trainer.tokenizer.decode(ids, skip_special_tokens=True)
        return text.strip().removesuffix(self._stop).strip()

    def _text(self, ids: list[int]) -> str:
        """A prompt as text, its pictures as <image>."""
        parts: list[list[int]] = [[]]
        for i in ids:
            parts.append([]) if i == IMAGE_TOKEN_INDEX else parts[-1].append(i)
        return DEFAULT_IMAGE_TOKEN.join(self.trainer.tokenizer.decode(p, skip_special_tokens=True) for p in parts)


def _row(
    bare: nn.Module, loader: ImageLoader, prompt: Prompt, settings: GenerationConfig, device: torch.device
) -> list[int]:
    """An answer by transformers' ``generate``, for models that take no trees."""
    levels, channels = loader.levels(), torch.arange(3)[:, None, None]
    pixels = torch.stack([levels[channels, loader(path, "").int()] for path in prompt.paths])
    ids = torch.tensor([prompt.ids], device=device)
    new = bare.generate(
        ids,
        images=pixels.to(device, bare.dtype),
        image_index=torch.arange(len(pixels))[None],
        attention_mask=torch.ones_like(ids, dtype=torch.bool),
        generation_config=settings,
    )
    return new[0].tolist()


def _line(content: dict[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False) + "\n"


def markdown(rows: list[tuple[str, str]]) -> str:
    """A table of (caption, reference), numbered from 1."""
    cells = [[text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ") for text in row] for row in rows]
    lines = ["| picture | caption | reference |", "|---|---|---|"]
    return "\n".join(lines + [f"| {number} | {c} | {r} |" for number, (c, r) in enumerate(cells, 1)])


def draw(picture: Image.Image, caption: str) -> Drawn:
    """A picture of at most 224 by 224 pixels with its caption below it, as a JPEG of at most 40 kB.

    Pillow's font lacks many scripts' letters, which it draws as boxes.
    """
    lines = textwrap.wrap(caption, LETTERS) or [""]
    font = ImageFont.load_default(TEXT_SIZE)
    if not isinstance(font, ImageFont.FreeTypeFont):  # Pillow without FreeType refuses what is not Latin
        lines = [line.encode("latin-1", "replace").decode("latin-1") for line in lines]
    step = TEXT_SIZE + 3
    sheet = Image.new("RGB", (SIDE, picture.height + step * len(lines) + 6), "white")
    sheet.paste(picture, ((SIDE - picture.width) // 2, 0))
    pen = ImageDraw.Draw(sheet)
    for number, line in enumerate(lines):
        pen.text((4, picture.height + 3 + step * number), line, fill="black", font=font)
    for quality in QUALITIES:
        file = io.BytesIO()
        sheet.save(file, "JPEG", quality=quality)
        if file.tell() <= LARGEST:
            break
    return Drawn(file.getvalue(), sheet.size)
