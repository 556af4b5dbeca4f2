"""Many answers at a time, grown on trees: what questions share (the picture above all) is computed once.

    stream of trees (``llava.data.packing``) -> prefill -> first tokens -> step -> second tokens -> step -> ...

A step puts the next token of every unfinished question through the layers together; each looks at its own ancestors:
the trunk of its picture, its question, and what it has answered so far. Keys and values are written in place behind
those of the tree. Every answer is the one that its question gets alone (``model.generate``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation import (
    GenerationMode,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llava.model.decoder import Attention, attend, decoder_layer, layers_of, rope_at, run_layers, sees, why_not
from llava.model.llava_arch import Pictures
from llava.model.post_block.sight import StepSight

# Processors that look at nothing but the new tokens of a row, so that rows of any prompt can go through them together.
ROW_WISE = (RepetitionPenaltyLogitsProcessor, NoRepeatNGramLogitsProcessor, SuppressTokensLogitsProcessor)

# Tokens per question that buffers have room for at first; they grow by half.
FIRST_ROOM = 16


@dataclass
class Rules:
    """How the next token is chosen and when an answer ends, as transformers' ``generate`` reads a configuration."""

    max_new_tokens: int
    ends: list[int]
    processors: LogitsProcessorList
    stops: StoppingCriteriaList


class Sampling(NamedTuple):
    """What is drawn from: the softmax of scores / ``temperature``, of the ``top_k`` likeliest tokens (0: of all).

    Of these, the likeliest that have the share ``top_p`` together (Holtzman et al. 2020).
    """

    temperature: float
    top_p: float = 1.0
    top_k: int = 50  # transformers' default, which LLaVA's programs leave as it is

    def warpers(self) -> LogitsProcessorList:
        """transformers' own, in its order."""
        kept = [TemperatureLogitsWarper(self.temperature)]
        kept += [TopKLogitsWarper(self.top_k)] if self.top_k else []
        kept += [TopPLogitsWarper(self.top_p)] if self.top_p < 1 else []
        return LogitsProcessorList(kept)


class Draw(LogitsProcessor):
    """Sampled tokens of S rows, each by numbers of its own seed: what a row gets does not depend on the rows beside it.

    As a processor of transformers' ``generate``, which then chooses greedily, it leaves nothing but the drawn tokens.
    """

    def __init__(self, sampling: Sampling, seeds: list[int], most: int, device: torch.device) -> None:
        self.warpers = sampling.warpers()
        numbers = [torch.rand(most, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds]
        self.numbers = torch.stack(numbers).to(device)  # (S, most)
        self.step = 0

    def tokens(self, written: torch.Tensor, scores: torch.Tensor, rows: torch.Tensor, step: int) -> torch.Tensor:
        """The token number ``step`` of ``rows`` (n,), from their scores (n, V): (n,)."""
        shares = self.warpers(written, scores).double().softmax(-1).cumsum(-1)
        at = self.numbers[rows, step, None] * shares[:, -1:]
        return torch.searchsorted(shares, at, right=True).clamp(max=scores.shape[1] - 1)[:, 0]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Of all rows, step after step."""
        rows = torch.arange(len(scores), device=scores.device)
        drawn = self.tokens(input_ids, scores, rows, self.step)
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter(1, drawn[:, None], 0.0)


def merged_config(model: Any, settings: GenerationConfig) -> GenerationConfig:
    """``settings`` over what the checkpoint's ``generation_config.json`` says, as ``model.generate`` merges them."""
    return model._prepare_generation_config(settings)[0]


def rules(model: Any, settings: GenerationConfig, tokenizer: Any) -> Rules | str:
    """The rules of ``settings`` for this model; or, in words, why its answers cannot be grown on trees."""
    if reason := why_not(model.config):
        return reason
    # Static scalings (linear, yarn, llama3) do not look at the length of the row.
    if getattr(model.model.rotary_emb, "rope_type", "default") in ("dynamic", "longrope"):
        return "the model turns its positions by the length of the row"
    config = merged_config(model, settings)
    mode = config.get_generation_mode()
    if mode is not GenerationMode.GREEDY_SEARCH:
        return f"generation_config.json asks for {mode.value}"
    if config.max_time is not None:
        return "generation_config.json sets max_time"
    model._prepare_special_tokens(config, device=model.device)  # some processors are made only where it knows the ends
    processors = model._get_logits_processor(config, input_ids_seq_length=0, device=model.device)
    if foreign := [type(p).__name__ for p in processors if not isinstance(p, ROW_WISE)]:
        return f"generation_config.json brings {', '.join(foreign)}"
    ends = config.eos_token_id
    stops = [StopStringCriteria(tokenizer, config.stop_strings)] if config.stop_strings else []
    return Rules(
        config.max_new_tokens,
        [] if ends is None else [ends] if isinstance(ends, int) else list(ends),
        processors,
        StoppingCriteriaList(stops),
    )


class Tree:
    """What the tokens of one tree left behind, layer by layer, and which of it each of its Q questions sees."""

    def __init__(
        self, layers: int, heads: int, head_dim: int, seen: torch.Tensor, room: int, like: torch.Tensor
    ) -> None:
        """``seen`` (Q, T): the ancestors of the questions' next tokens in the prefilled tree."""
        questions, self.length = seen.shape
        self.memory = like.new_empty(layers, 2, heads, self.length + room, head_dim)  # keys and values
        self.sight = seen.new_zeros(questions, self.length + room)
        self.sight[:, : self.length] = seen

    def add(self, questions: torch.Tensor) -> slice:
        """Places for one more token of each of ``questions`` (n,); nobody else sees them."""
        places = slice(self.length, self.length + len(questions))
        if places.stop > self.sight.shape[1]:
            room = max(places.stop, self.sight.shape[1] * 3 // 2) - self.sight.shape[1]
            # Half as much again each time: the copies of a long answer stay a fixed share of its work.
            memory = self.memory.new_empty(*self.memory.shape[:3], self.memory.shape[3] + room, self.memory.shape[4])
            memory[..., : self.length, :] = self.memory[..., : self.length, :]
            self.memory, self.sight = memory, F.pad(self.sight, (0, room))
        self.sight[questions, torch.arange(places.start, places.stop, device=questions.device)] = True
        self.length = places.stop
        return places


class Generation:
    """The state of a generation: S questions about pictures, in the trees of a stream.

    ``rows`` is a stream (``llava.data.packing``) whose ``queries`` (S,) are the last tokens of the questions, in the
    order of the trees; ``pictures`` are its N pictures. ``logits`` (S, V) are those of the
    first tokens.
    """

    def __init__(self, model: Any, rows: dict[str, Any], pictures: Pictures, new_tokens: int) -> None:
        self.model = model
        self.block = model.post_block
        self.layers = layers_of(model.model)
        self.positions = rows["position_ids"][rows["queries"]] + 1  # (S,) of the next tokens
        ids = rows["input_ids"][None]
        model._check_ids(ids, torch.ones_like(ids, dtype=torch.bool))
        x = model.embed_stream(rows, pictures.features)

        looks_back = self.block is not None and self.block.needs_rows
        kept = len(self.layers) + (len(self.block.layers) if looks_back else 0)  # layers whose keys and values are kept
        attn = self.layers[0].self_attn
        heads = model.config.num_key_value_heads
        counts = [tree[3] for tree in rows["trees"]]
        self.lengths = [end - start for start, _, end, _ in rows["trees"]]
        self.trees = [
            Tree(
                kept,
                heads,
                attn.head_dim,
                sees(queries, start, end, rows["subtree_end"]),
                len(queries) * min(new_tokens, FIRST_ROOM),
                x,
            )
            for (start, _, end, _), queries in zip(rows["trees"], rows["queries"].split(counts), strict=True)
        ]
        # Of every question: its tree, and its number there.
        self.tree_of = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(x.device)
        self.number = torch.cat([torch.arange(count) for count in counts]).to(x.device)
        looks = [self._remembering(number) for number in range(kept)]
        of_block = looks[len(self.layers) :]
        hidden = run_layers(model.model, x, rows, looks[: len(self.layers)], whole=looks_back)
        if self.block is not None:
            self.sight = model.tree_sight(rows, pictures, hidden, of_block)
            # (q, P) of every tree: what a question sees, all its answer's tokens see.
            self.shown = self.sight.seen_by_questions()
            hidden = self.block(hidden, self.sight)
        self.logits = self._head(hidden)

    def step(self, questions: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The next ``tokens`` (n,) of ``questions`` (n,), in order -> logits (n, V) of the ones behind."""
        x = self.model.get_input_embeddings()(tokens)  # (n, D)
        rope = rope_at(self.model.model, x, self.positions[questions])
        self.positions[questions] += 1
        counts = torch.bincount(self.tree_of[questions], minlength=len(self.trees)).tolist()
        growing, showing = [], []
        for number, (tree, asking) in enumerate(zip(self.trees, self.number[questions].split(counts), strict=True)):
            if len(asking):
                places = tree.add(asking)
                growing.append((tree, places, tree.sight[asking, : tree.length]))
                showing.append((number, asking))
        for number, layer in enumerate(self.layers):
            x = decoder_layer(layer, x, rope, None, look=self._recalling(number, growing))
        hidden = self.model.model.norm(x)
        if self.block is not None:
            first = len(self.layers)
            looks = [self._recalling(first + number, growing) for number in range(len(self.block.layers))]
            shown = [(number, self.shown[number][asking]) for number, asking in showing]
            hidden = self.block(hidden, StepSight(self.sight, rope, shown, looks))
        return self._head(hidden)

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.model.head(hidden).float()

    def _remembering(self, layer: int) -> Callable[..., torch.Tensor]:
        """``attend`` of the prefill, which keeps what passes."""

        def look(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attention: Attention, dropout: float
        ) -> torch.Tensor:
            for tree, keys, values in zip(self.trees, k.split(self.lengths), v.split(self.lengths), strict=True):
                tree.memory[layer, 0, :, : len(keys)] = keys.transpose(0, 1)
                tree.memory[layer, 1, :, : len(keys)] = values.transpose(0, 1)
            return attend(q, k, v, attention, dropout)

        return look

    @staticmethod
    def _recalling(layer: int, growing: list[tuple[Tree, slice, torch.Tensor]]) -> Callable[..., torch.Tensor]:
        """``attend`` of one step: new keys and values are written behind the old, and all of them looked at."""

        def look(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> torch.Tensor:
            seen, start = [], 0
            for tree, places, sight in growing:
                mine = slice(start, start + len(sight))
                tree.memory[layer, 0, :, places] = k[mine].transpose(0, 1)
                tree.memory[layer, 1, :, places] = v[mine].transpose(0, 1)
                seen.append(look_back(q[mine], *tree.memory[layer, :, :, : tree.length], sight))
                start = mine.stop
            return torch.cat(seen)

        return look


def look_back(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """q (n, H, d) on k and v (H', t, d) through ``mask`` (n, t) -> (n, H, d).

    The heads that share a key head ask as one head with more queries, instead of each having a copy of the keys.
    """
    n, heads, d = q.shape
    shared = heads // len(k)
    asking = q.view(n, len(k), shared, d).permute(1, 2, 0, 3).reshape(1, len(k), shared * n, d)
    out = F.scaled_dot_product_attention(asking, k[None], v[None], attn_mask=mask.repeat(shared, 1))
    return out.view(len(k), shared, n, d).permute(2, 0, 1, 3).reshape(n, heads, d)


@torch.inference_mode()
def grow_answers(
    model: nn.Module, rows: dict[str, Any], pictures: Pictures, rules: Rules, draw: Draw | None = None
) -> tuple[list[list[int]], torch.Tensor]:
    """New ids of every question of a stream (see ``Generation``), and the logits (S, V) of their first tokens.

    Of the likeliest tokens; where there is a ``draw``, of drawn ones.
    """
    state = Generation(model, rows, pictures, rules.max_new_tokens)
    first = logits = state.logits
    asking = torch.arange(len(logits), device=logits.device)  # questions that go on
    written = asking.new_empty(len(asking), 0)  # (n, t) their new tokens
    ends = torch.tensor(rules.ends, dtype=torch.long, device=logits.device)
    answers: list[list[int]] = [[] for _ in asking]
    while len(asking):
        scores = rules.processors(written, logits)
        tokens = scores.argmax(-1) if draw is None else draw.tokens(written, scores, asking, written.shape[1])
        written = torch.cat([written, tokens[:, None]], dim=1)
        done = torch.isin(tokens, ends)
        if rules.stops:
            done |= rules.stops(written, logits)
        if written.shape[1] >= rules.max_new_tokens:
            done |= True
        for question, ids in zip(asking[done].tolist(), written[done].tolist(), strict=True):
            answers[question] = ids
        asking, written, tokens = asking[~done], written[~done], tokens[~done]
        if len(asking):
            logits = state.step(asking, tokens)
    return answers, first
