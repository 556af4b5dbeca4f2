"""Questions about pictures -> answers, greedily, one model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import Conversation
from llava.data.images import open_image
from llava.data.supervision import wrap_image_tokens
from llava.mm_utils import preprocess_image, tokenizer_image_token


class Question(NamedTuple):
    """A question and the path of its picture; ``where`` names its record in messages."""

    image: str
    text: str
    where: str


class Answerer:
    """Greedy answers in a conversation template, as HA-DPO's ``pope_eval.py`` asks: picture first, bare question."""

    def __init__(
        self, model: Any, tokenizer: Any, image_processor: Any, template: Conversation, max_new_tokens: int = 512
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.template = template
        self.aspect = getattr(model.config, "image_aspect_ratio", None)
        self.use_im_start_end = bool(getattr(model.config, "mm_use_im_start_end", False))
        ends = model.generation_config.eos_token_id
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        stop = template.stop_string
        stop_id = tokenizer.convert_tokens_to_ids(stop)
        self.stop_text = None  # a stop that is no token of its own ("###") is looked for in the text
        if stop_id is not None and stop_id != tokenizer.unk_token_id:
            ends.append(stop_id)
        else:
            self.stop_text = stop
        pad = tokenizer.pad_token_id
        self.settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(set(ends)) or None,
            pad_token_id=ends[0] if pad is None and ends else pad,
            stop_strings=[self.stop_text] if self.stop_text else None,
        )

    def prompt(self, text: str) -> str:
        """The template around one question about one picture, open for the answer."""
        conversation = self.template.copy()
        question = wrap_image_tokens(f"{DEFAULT_IMAGE_TOKEN}\n{text}", self.template, self.use_im_start_end)
        conversation.append_message(conversation.roles[0], question)
        conversation.append_message(conversation.roles[1], None)
        return conversation.get_prompt()

    @torch.inference_mode()
    def answer(self, questions: Sequence[Question]) -> list[str]:
        """Answers of one batch; a picture that several questions share is opened and encoded once."""
        paths = list(dict.fromkeys(question.image for question in questions))
        wheres = {question.image: question.where for question in questions}
        pixels = torch.stack(
            [preprocess_image(open_image(p, wheres[p]), self.image_processor, self.aspect) for p in paths]
        )
        rows = [torch.tensor(tokenizer_image_token(self.prompt(q.text), self.tokenizer)) for q in questions]
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        device = self.model.device
        new = self.model.generate(
            ids.to(device),
            images=pixels.to(device, self.model.dtype),
            image_index=torch.tensor([[paths.index(question.image)] for question in questions]),
            attention_mask=(torch.arange(ids.shape[1]) < lengths[:, None]).to(device),
            generation_config=self.settings,
            **({"tokenizer": self.tokenizer} if self.stop_text else {}),
        )
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [(text.split(self.stop_text)[0] if self.stop_text else text).strip() for text in texts]
