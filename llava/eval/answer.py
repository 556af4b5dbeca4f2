"""Questions about pictures -> answers of one model, greedy or sampled.

Questions about a picture are asked together: the picture is encoded once, what precedes the questions runs once, and
all of them are answered side by side (``llava.model.generation``). Models that cannot do so are asked by separate rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, LogitsProcessorList

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import Conversation
from llava.data.images import open_image
from llava.data.packing import pack_prompts
from llava.data.supervision import wrap_image_tokens
from llava.errors import UserError
from llava.mm_utils import preprocess_image, tokenizer_image_token
from llava.model.generation import Draw, Rules, Sampling, grow_answers, merged_config, rules

# At a time, at most: a CPU's products are near their best from some 40 rows on, any card is filled by 10,000 tokens.
PICTURES_ON_CPU, PICTURES_ON_CUDA = 8, 16
KEPT_ON_CPU = 2**30  # bytes of keys and values
QUESTIONS_OF_A_PICTURE = 6  # in one POPE set


class Question(NamedTuple):
    """A question and the path of its picture; ``where`` names its record in messages."""

    image: str
    text: str
    where: str


class Said(NamedTuple):
    """An answer; ``score`` is the probability of a yes among yes and no where it begins (None: not asked for)."""

    text: str
    score: float | None = None


class Answerer:
    """Answers in a conversation template, as HA-DPO's ``pope_eval.py`` asks: picture first, question, suffix.

    Greedy ones, or drawn as ``sampling`` says, or the likeliest of ``num_beams`` beams.
    ``rows_because`` says why questions are asked by separate rows, where they have to be.

    Raises:
        UserError: ``scores`` where the tokenizer begins "Yes" and "No" with the same token.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        image_processor: Any,
        template: Conversation,
        max_new_tokens: int = 512,
        suffix: str = "",
        scores: bool = False,
        sampling: Sampling | None = None,
        num_beams: int = 1,
    ) -> None:
        self.sampling = sampling
        self.model = model
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.template = template
        self.suffix = suffix
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
            do_sample=False,  # what is drawn is drawn by ``Draw``
            num_beams=num_beams,
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(set(ends)) or None,
            pad_token_id=ends[0] if pad is None and ends else pad,
            stop_strings=[self.stop_text] if self.stop_text else None,
            return_dict_in_generate=True,
            output_logits=scores,
        )
        found = rules(model, self.settings, tokenizer)
        self.rules = found if isinstance(found, Rules) else None
        self.rows_because = found if isinstance(found, str) else None
        self.yes_no = self._first_tokens() if scores else None

    def prompt(self, text: str, answer: str | None = None) -> str:
        """The template around one question about one picture, open for the answer (or with it)."""
        conversation = self.template.copy()
        question = f"{DEFAULT_IMAGE_TOKEN}\n{text}{self.suffix}"
        conversation.append_message(
            conversation.roles[0], wrap_image_tokens(question, self.template, self.use_im_start_end)
        )
        conversation.append_message(conversation.roles[1], answer)
        return conversation.get_prompt()

    def prepare(self, path: str, where: str) -> torch.Tensor:
        """A picture's pixel values, (3, H, W). Raises ``BrokenImage``."""
        return preprocess_image(open_image(path, where), self.image_processor, self.aspect)

    def answer(self, questions: Sequence[Question]) -> list[str]:
        """Answers of one batch of separate rows; a picture that several share is opened and encoded once."""
        paths = list(dict.fromkeys(question.image for question in questions))
        wheres = {question.image: question.where for question in questions}
        pixels = torch.stack([self.prepare(path, wheres[path]) for path in paths])
        return [said.text for said in self._rows(pixels, [(paths.index(q.image), q.text) for q in questions])]

    def ask(
        self,
        pixels: torch.Tensor,
        questions: Sequence[tuple[int, str]],
        batch_size: int,
        seeds: Sequence[int] | None = None,
    ) -> list[Said]:
        """Answers about pictures (N, 3, H, W): of every question its picture's number, in order, and its text.

        They are asked together; where that cannot be, or with ``batch_size`` 1, by so many separate rows at a time.
        Of answers that are sampled, each is drawn by its own of the ``seeds``.
        """
        if self.rules is not None and batch_size > 1:
            return self._trees(pixels, questions, seeds)
        if merged_config(self.model, self.settings).repetition_penalty not in (None, 1.0):
            batch_size = 1  # transformers counts the padding of a longer batch among a row's new tokens
        parts = [slice(start, start + batch_size) for start in range(0, len(questions), batch_size)]
        return [
            said
            for part in parts
            for said in self._rows(pixels, questions[part], None if seeds is None else seeds[part])
        ]

    def _draw(self, seeds: Sequence[int] | None) -> Draw | None:
        if self.sampling is None or seeds is None:
            return None
        return Draw(self.sampling, list(seeds), self.settings.max_new_tokens, self.model.device)

    @torch.inference_mode()
    def _rows(
        self, pixels: torch.Tensor, questions: Sequence[tuple[int, str]], seeds: Sequence[int] | None = None
    ) -> list[Said]:
        """Through transformers' ``generate``, padded on the left."""
        rows = [torch.tensor(tokenizer_image_token(self.prompt(text), self.tokenizer)) for _, text in questions]
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        shown = sorted({picture for picture, _ in questions})
        device = self.model.device
        draw = self._draw(seeds)
        out = self.model.generate(
            ids.to(device),
            images=pixels[shown].to(device, self.model.dtype),
            image_index=torch.tensor([[shown.index(picture)] for picture, _ in questions]),
            attention_mask=(torch.arange(ids.shape[1]) < lengths[:, None]).to(device),
            generation_config=self.settings,
            logits_processor=LogitsProcessorList([draw] if draw else []),
            tokenizer=self.tokenizer,
        )
        return self._said(out.sequences.tolist(), out.logits[0] if self.yes_no else None)

    @torch.inference_mode()
    def _trees(
        self, pixels: torch.Tensor, questions: Sequence[tuple[int, str]], seeds: Sequence[int] | None
    ) -> list[Said]:
        """All at once."""
        device = self.model.device
        rows = []
        for picture, text in questions:
            ids = tokenizer_image_token(self.prompt(text), self.tokenizer)
            if (marks := ids.count(IMAGE_TOKEN_INDEX)) != 1:
                raise UserError(f"{marks} <image> in the prompt of question {text!r} for 1 image; take it out")
            rows.append([(IMAGE_TOKEN_INDEX, picture) if i == IMAGE_TOKEN_INDEX else i for i in ids])
        shown = self.model.look(pixels.to(device, self.model.dtype))
        max_length = getattr(self.model.config, "tokenizer_model_max_length", None)
        stream = pack_prompts(rows, shown.features.shape[1], max_length)
        stream = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in stream.items()}
        new, first = grow_answers(self.model, stream, shown, self.rules, self._draw(seeds))
        return self._said(new, first if self.yes_no else None)

    def _said(self, new: list[list[int]], logits: torch.Tensor | None) -> list[Said]:
        """New ids and (where scores are wanted) logits (S, V) of the first of them -> answers."""
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        texts = [(text.split(self.stop_text)[0] if self.stop_text else text).strip() for text in texts]
        if logits is None:
            return [Said(text) for text in texts]
        yes, no = (logits[:, ids].double().logsumexp(-1) for ids in self.yes_no)
        return [Said(text, float(f"{p:.6g}")) for text, p in zip(texts, (yes - no).sigmoid().tolist(), strict=True)]

    def _first_tokens(self) -> tuple[list[int], list[int]]:
        """Ids with which "Yes" and "yes", and "No" and "no", begin where an answer begins."""
        opened = tokenizer_image_token(self.prompt("?"), self.tokenizer)
        found = []
        for words in (("Yes", "yes"), ("No", "no")):
            ids = set()
            for word in words:
                answered = tokenizer_image_token(self.prompt("?", word), self.tokenizer)
                if answered[: len(opened)] == opened and len(answered) > len(opened):
                    ids.add(answered[len(opened)])
                else:  # the word melts with what stands before it, which it cannot do behind a finished prompt
                    ids.add(self.tokenizer(word, add_special_tokens=False).input_ids[0])
            found.append(sorted(ids))
        if set(found[0]) & set(found[1]):
            raise UserError("--scores: this model's tokenizer begins 'Yes' and 'No' with the same token; leave it out")
        return found[0], found[1]


def default_batch_size(answerer: Answerer, on_cuda: bool) -> int:
    """Questions at a time: as many as fit, told from the model and the kind of card but not from what else runs there.

    So a run that goes on, or runs on more such cards, groups its questions as before. Separate rows are 6 at a time in
    float32, and 1 in half precision, which rounds a batch otherwise than a row.
    """
    model = answerer.model
    if answerer.rules is None:
        return 6 if model.dtype == torch.float32 else 1
    config = model.config
    head_dim = model.model.layers[0].self_attn.head_dim
    a_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * model.dtype.itemsize
    answers = QUESTIONS_OF_A_PICTURE * (32 + answerer.rules.max_new_tokens)
    a_picture = a_token * (model.get_vision_tower().num_features + 64 + answers)
    room, most = KEPT_ON_CPU, PICTURES_ON_CPU
    if on_cuda:
        weights = sum(p.nbytes for p in model.parameters())
        # A third: buffers that grow exist twice for a moment, and the layers need room of their own.
        room, most = (torch.cuda.mem_get_info(model.device)[1] - weights) // 3, PICTURES_ON_CUDA
    return QUESTIONS_OF_A_PICTURE * min(max(int(room // a_picture), 1), most)
