"""LLaVA around a decoder.

    images -> vision tower -> connector --+
                   |                      +-> splice -> backbone -> [post block] -> gather labelled rows -> lm_head
    input_ids -----|----> embeddings -----+                              |
                   +----------- or behind the connector -----------------+

Each arrow is a call of its own (``see``, ``connect``, ``splice``, ``backbone``, ``head``), so that a prefix, a picture
or a part of the forward can be shared between rows, questions or models. Training calls ``forward`` only: under DDP and
ZeRO a part called past the wrapper is not synchronised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import CausalLMOutputWithPast

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.errors import UserError
from llava.model.decoder import Rope, rope_at, run_layers
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava.model.multimodal_projector.builder import build_vision_projector
from llava.model.post_block.base import PostBlock
from llava.model.post_block.sight import NEVER, RowSight, TreeSight

Images = torch.Tensor | Sequence[torch.Tensor]


class Spliced(NamedTuple):
    """Rows with their pictures in place; what the caller did not pass comes back as None, as upstream has it."""

    inputs_embeds: torch.Tensor  # (B, L', D)
    attention_mask: torch.Tensor | None  # (B, L') bool
    position_ids: torch.Tensor | None  # (B, L')
    labels: torch.Tensor | None  # (B, L')
    begins: torch.Tensor  # (B, K) where each picture of a row begins; NEVER where it has fewer


class Pictures(NamedTuple):
    """What is seen of N pictures."""

    seen: torch.Tensor | None  # (N, T, D_vision) by the tower; None where nobody asks for it
    features: torch.Tensor | None  # (N, T, D) behind the connector

    def as_block_wants(self, block: PostBlock | None) -> torch.Tensor | None:
        """Those features that the post block looks at."""
        return {None: None, "tower": self.seen, "connector": self.features}[block.looks_at if block else None]


@dataclass
class LlavaOutput(CausalLMOutputWithPast):
    """``labels`` are those of the spliced rows (B, L').

    With ``score_labels`` there are no logits but ``scores``.
    """

    labels: torch.Tensor | None = None
    scores: LabelScores | None = None


class LabelScores(NamedTuple):
    """What losses need of a batch of S rows with n labels, and what a second model can take over from the first."""

    logps: torch.Tensor  # (n,) log-probability of every label, float32
    mean_logits: torch.Tensor  # (n,) mean logit of the position that predicts it; no gradient
    rows: torch.Tensor  # (n,) which row a label belongs to
    counts: torch.Tensor  # (S,) labels of every row
    hidden: torch.Tensor  # (Q, D) what lm_head gets at the positions that predict
    features: torch.Tensor | None  # (N, T, D) pictures behind the connector
    seen: torch.Tensor | None  # (N, T, D_vision) and before it
    backbone: torch.Tensor | None  # (Q, D) what the post block gets; (T, D) where it looks at whole rows

    def row_sums(self, values: torch.Tensor) -> torch.Tensor:
        """(n,) -> (S,)."""
        # In float64: in float32 a long answer's sum, some -1000, is off by 3e-4, which a margin of rewards shows.
        sums = values.new_zeros(len(self.counts), dtype=torch.float64).index_add(0, self.rows, values.double())
        return sums.to(values.dtype)


class LlavaMetaModel:
    """Adds the tower and the connector to a decoder that names them in its config."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.vision_tower: CLIPVisionTower | None = None
        self.mm_projector: nn.Module | None = None
        if getattr(config, "mm_vision_config", None):
            self.vision_tower = build_vision_tower(config)
            self.mm_projector = build_vision_projector(config)

    def get_vision_tower(self) -> CLIPVisionTower | None:
        return self.vision_tower


class LlavaMetaForCausalLM:
    """The multimodal forward, for any causal LM whose backbone is a ``LlavaMetaModel``."""

    # The loss is already the mean over this batch's labels; the Trainer divides it by the accumulation steps.
    accepts_loss_kwargs = False

    def get_model(self) -> Any:
        return self.model

    def get_vision_tower(self) -> CLIPVisionTower | None:
        return self.model.get_vision_tower()

    def encode_images(
        self,
        images: Images | None,
        pixel_levels: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(N, 3, H, W) -> tower (N, T, D_vision) -> connector (N, T, D).

        Bytes are looked up in ``pixel_levels`` (3, 256); ``vision_features`` are the tower's output, kept from before.
        """
        return self.look(images, pixel_levels, vision_features).features

    def look(
        self,
        images: Images | None,
        pixel_levels: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
    ) -> Pictures:
        """``encode_images``, with what the tower saw."""
        seen = self.see(images, pixel_levels) if vision_features is None else vision_features
        return Pictures(seen, self.connect(seen))

    def connect(self, seen: torch.Tensor) -> torch.Tensor:
        """(N, T, D_vision) -> (N, T, D)."""
        # Parameters and not the tower's dtype: under autocast or ZeRO the two parts may differ.
        dtype = next((p.dtype for p in self.model.mm_projector.parameters()), seen.dtype)
        return self.model.mm_projector(seen.to(dtype))

    def see(self, images: Images, pixel_levels: torch.Tensor | None = None) -> torch.Tensor:
        """Pictures, as pixel values or as bytes -> the tower's features (N, T, D_vision)."""
        pixels = _stack(images)
        if pixel_levels is not None:
            channels = torch.arange(3, device=pixels.device)[:, None, None]
            pixels = pixel_levels[channels, pixels.int()]
        return self.model.vision_tower(pixels)

    def splice(
        self,
        input_ids: torch.Tensor,
        features: torch.Tensor,
        image_index: torch.Tensor | list[list[int]],
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        padding_side: str | None = None,
    ) -> Spliced:
        """Put each picture's features (N, T, D) where its -200 stands in ``input_ids`` (B, L).

        Padding is taken off by ``attention_mask``, rows are cut to ``config.tokenizer_model_max_length`` and padded
        again to the longest, on ``padding_side`` (default: ``config.tokenizer_padding_side``, else right). Positions
        count real tokens only.

        Raises:
            UserError: a row's number of -200 differs from its number of pictures (one unused picture is allowed to
                a row without any -200), or an id is outside the vocabulary.
        """
        index = image_index.tolist() if isinstance(image_index, torch.Tensor) else image_index
        keep = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        row_ids = [ids[mask] for ids, mask in zip(input_ids, keep, strict=True)]
        row_labels = [
            torch.full_like(ids, IGNORE_INDEX) if labels is None else labels[b][keep[b]]
            for b, ids in enumerate(row_ids)
        ]
        self._check_ids(input_ids, keep)
        text = self.get_input_embeddings()(input_ids.masked_fill(~keep | (input_ids == IMAGE_TOKEN_INDEX), 0))

        max_length = getattr(self.config, "tokenizer_model_max_length", None)
        embeds, new_labels, starts = [], [], []
        for b, (ids, labs) in enumerate(zip(row_ids, row_labels, strict=True)):
            slots = [slot for slot in index[b] if slot >= 0]
            marks = (ids == IMAGE_TOKEN_INDEX).nonzero().flatten().tolist()
            if len(marks) != len(slots) and not (len(marks) == 0 and len(slots) == 1):
                raise UserError(
                    f"row {b} of the batch: {len(marks)} <image> in the text for {len(slots)} image(s); "
                    "write one <image> for every image",
                    everywhere=False,
                )
            row = text[b][keep[b]]
            pieces, piece_labels, start = [], [], 0
            starts.append([mark + nth * (features.shape[1] - 1) for nth, mark in enumerate(marks)])
            for mark, slot in zip(marks, slots, strict=False):
                pieces += [row[start:mark], features[slot].to(row)]
                piece_labels += [labs[start:mark], labs.new_full((features.shape[1],), IGNORE_INDEX)]
                start = mark + 1
            # An empty slice of the features ties a text-only row to the connector, so that it gets its (zero) gradient
            # on every rank.
            pieces += [row[start:], features[0, :0].to(row)]
            piece_labels.append(labs[start:])
            embeds.append(torch.cat(pieces)[:max_length])
            new_labels.append(torch.cat(piece_labels)[:max_length])

        side = padding_side or getattr(self.config, "tokenizer_padding_side", None) or "right"
        lengths = torch.tensor([len(e) for e in embeds], device=input_ids.device)
        inputs_embeds = pad_sequence(embeds, batch_first=True, padding_side=side)  # (B, L', D)
        padded_labels = pad_sequence(new_labels, batch_first=True, padding_value=IGNORE_INDEX, padding_side=side)
        steps = torch.arange(inputs_embeds.shape[1], device=input_ids.device)
        shift = (inputs_embeds.shape[1] - lengths if side == "left" else torch.zeros_like(lengths))[:, None]
        real = (steps >= shift) & (steps < shift + lengths[:, None])  # (B, L')
        begins = torch.full((len(starts), max([1, *map(len, index)])), NEVER, device=input_ids.device)
        for b, row_starts in enumerate(starts):
            row_starts = [NEVER if start >= (max_length or NEVER) else start for start in row_starts]  # cut away
            begins[b, : len(row_starts)] = torch.tensor(row_starts, device=begins.device) + shift[b]
        return Spliced(
            inputs_embeds,
            None if attention_mask is None else real,
            None if position_ids is None else (steps - shift).clamp(min=0) * real,
            None if labels is None else padded_labels,
            begins,
        )

    def _check_ids(self, input_ids: torch.Tensor, keep: torch.Tensor) -> None:
        rows = self.config.vocab_size
        bad = keep & (input_ids != IMAGE_TOKEN_INDEX) & ((input_ids < 0) | (input_ids >= rows))
        if bad.any():
            b, position = bad.nonzero()[0].tolist()
            raise UserError(
                f"row {b} of the batch: token id {int(input_ids[b, position])} at position {position} is outside the "
                f"model's vocabulary of {rows}; the tokenizer belongs to another model",
                everywhere=False,
            )

    def backbone(self, **inputs: Any) -> Any:
        """Embeddings (B, L', D) -> last hidden states (B, L', D), with the decoder's own arguments."""
        return self.model(**inputs)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., D) -> logits (..., V)."""
        return self.lm_head(hidden)

    def prepare_inputs_labels_for_multimodal(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        past_key_values: Any,
        labels: torch.Tensor | None,
        images: Images | None,
        image_sizes: Any = None,
        image_index: torch.Tensor | None = None,
        padding_side: str | None = None,
        pixel_levels: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
    ) -> tuple[Any, ...]:
        """Upstream's name and order: ids and pictures -> (None, position_ids, mask, cache, inputs_embeds, labels).

        Nothing changes where there is no tower, no picture, or only the next token of a generation.
        """
        found = self._spliced(
            *(input_ids, attention_mask, position_ids, labels, images, image_index),
            *(pixel_levels, vision_features, padding_side),
        )
        if found is None:
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        row = found[0]
        return None, row.position_ids, row.attention_mask, past_key_values, row.inputs_embeds, row.labels

    def _spliced(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        labels: torch.Tensor | None,
        images: Images | None,
        image_index: torch.Tensor | None,
        pixel_levels: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        padding_side: str | None = None,
    ) -> tuple[Spliced, torch.Tensor | None] | None:
        """Rows with their pictures, and what the post block looks at, each row's in order, (B, K, T, D') or None.

        None where there is no tower, no picture, or only the next token of a generation.
        """
        nothing_to_see = images is None and vision_features is None
        if self.get_vision_tower() is None or nothing_to_see or input_ids.shape[1] == 1:
            return None
        pictures = self.look(images, pixel_levels, vision_features)
        if image_index is None:
            image_index = rows_in_order(input_ids, attention_mask, len(pictures.features))
        row = self.splice(input_ids, pictures.features, image_index, attention_mask, position_ids, labels, padding_side)
        wanted = pictures.as_block_wants(self.post_block)
        if wanted is None:
            return row, None
        slots = torch.zeros_like(row.begins)
        for b, of_row in enumerate(image_index.tolist() if isinstance(image_index, torch.Tensor) else image_index):
            real = [slot for slot in of_row if slot >= 0]
            slots[b, : len(real)] = torch.tensor(real, dtype=torch.long)
        return row, wanted[slots]

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        images: Images | None = None,
        image_sizes: Any = None,
        image_index: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        score_labels: bool = False,
        rows: dict[str, Any] | None = None,
        pixel_levels: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        backbone_hidden: torch.Tensor | None = None,
        hidden_at_labels: torch.Tensor | None = None,
        block_pictures: torch.Tensor | None = None,
        block_begins: torch.Tensor | None = None,
        **decoder_kwargs: Any,
    ) -> LlavaOutput:
        """Upstream's forward; see ``llava.data.collate`` for the batch.

        Without ``image_index`` pictures belong to rows in order of their -200. The loss is the mean over the batch's
        labels, in float32. ``score_labels`` runs the head only where the next token is labelled; ``rows``
        (``llava.data.packing``) does so for trees. What is already known of the batch can be passed:
        ``vision_features`` (N, T, D_vision) of the tower, and of another forward what its ``LabelScores`` call
        ``features`` (as ``image_features``), ``backbone`` (``backbone_hidden``) and ``hidden`` (``hidden_at_labels``).
        ``block_pictures`` (B, K, T, D') and ``block_begins`` (B, K) go with ``inputs_embeds``: what the post block
        looks at, and where in the row it begins.
        """
        if rows is not None:
            if hidden_at_labels is None and backbone_hidden is None and image_features is None:
                known = self.look(images, pixel_levels, vision_features)
            else:
                known = Pictures(vision_features, image_features)
            return self._score_trees(rows, known, backbone_hidden, hidden_at_labels)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if past:
            block_pictures = None  # generate() passes the prompt's again with every token; the cache holds them
        if inputs_embeds is None:
            found = self._spliced(
                *(input_ids, attention_mask, position_ids, labels, images, image_index, pixel_levels, vision_features)
            )
            if found is not None:
                row, block_pictures = found
                input_ids = None
                inputs_embeds, attention_mask, position_ids, labels, block_begins = row
                block_begins = block_begins + past
        outputs = self.backbone(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **decoder_kwargs,
        )
        hidden = outputs.last_hidden_state  # (B, L', D)
        if self.post_block is not None:
            cache = outputs.past_key_values
            sight = self._row_sight(hidden, attention_mask, position_ids, past, block_pictures, block_begins, cache)
            hidden = self.post_block(hidden, sight)
        if score_labels:
            return self._scored(hidden[:, :-1], labels)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else slice(None)
        keep = logits_to_keep if isinstance(logits_to_keep, torch.Tensor) else keep
        logits = self.head(hidden[:, keep])  # (B, L', V)
        return LlavaOutput(
            loss=None if labels is None else label_loss(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()),
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            labels=labels,
        )

    def _row_sight(
        self,
        hidden: torch.Tensor,
        mask: torch.Tensor | None,
        positions: torch.Tensor | None,
        past: int,
        pictures: torch.Tensor | None,
        begins: torch.Tensor | None,
        cache: Any,
    ) -> RowSight:
        """What the post block sees of padded rows (B, L', D)."""
        if mask is not None and not (isinstance(mask, torch.Tensor) and mask.ndim == 2):
            raise ValueError("a post block takes a mask (B, L) and transformers' dynamic cache")
        if positions is None:  # as the decoder counts
            positions = torch.arange(past, past + hidden.shape[1], device=hidden.device)[None]
        rope = Rope(*self.model.rotary_emb(hidden, positions))
        return RowSight(rope, mask, past, pictures, begins, cache, len(self.model.layers))

    def _score_trees(
        self,
        rows: dict[str, Any],
        pictures: Pictures,
        backbone: torch.Tensor | None,
        hidden: torch.Tensor | None,
    ) -> LlavaOutput:
        """Trees -> scores of their labels, each shared beginning computed once."""
        block = self.post_block
        if hidden is None:
            whole = block is not None and block.needs_rows
            if backbone is None:
                backbone = run_layers(self.model, self.embed_stream(rows, pictures.features), rows, whole=whole)
            elif not backbone.requires_grad:
                # As it came out of the last norm: a wrapper gives the outputs of half precision back as float32.
                backbone = backbone.to(self.model.norm.weight.dtype)
            if block is not None:
                hidden = block(backbone, self.tree_sight(rows, pictures, backbone))
            else:  # whole rows: what another model's block got
                hidden = backbone if len(backbone) == len(rows["queries"]) else backbone[rows["queries"]]
        logps, mean_logits = self.lm_head(hidden, rows["label_at"], rows["targets"])  # (U,) each
        index = rows["label_index"]
        scores = LabelScores(
            logps[index],
            mean_logits[index],
            rows["label_row"],
            rows["label_counts"],
            hidden,
            pictures.features,
            pictures.seen,
            None if block is None else backbone,
        )
        return LlavaOutput(loss=mean_loss(scores.logps), scores=scores)

    def tree_sight(self, rows: dict[str, Any], pictures: Pictures, like: torch.Tensor, looks: Any = None) -> TreeSight:
        """What the post block sees of a stream; ``like`` are hidden states."""
        rope = rope_at(self.model, like, rows["position_ids"])
        return TreeSight(rows, rope, self.post_block.needs_rows, pictures.as_block_wants(self.post_block), looks)

    def embed_stream(self, rows: dict[str, Any], features: torch.Tensor) -> torch.Tensor:
        """Ids and features of a stream -> embeddings (T, D)."""
        ids = rows["input_ids"]
        words = self.get_input_embeddings()(ids.masked_fill(ids == IMAGE_TOKEN_INDEX, 0))
        # Without any picture the connector still gets its (zero) gradient, on every rank.
        return words.index_copy(0, rows["image_at"], features.flatten(0, 1)[rows["feature_index"]].to(words))

    def _scored(self, hidden: torch.Tensor, labels: torch.Tensor) -> LlavaOutput:
        """Separate rows: hidden (B, L'-1, D), labels (B, L')."""
        labelled = labels[:, 1:] != IGNORE_INDEX
        hidden, targets = hidden[labelled], labels[:, 1:][labelled]  # (n, D), (n,)
        at = torch.arange(len(targets), device=targets.device)
        logps, mean_logits = self.lm_head(hidden, at, targets)
        scores = LabelScores(logps, mean_logits, labelled.nonzero()[:, 0], labelled.sum(1), hidden, None, None, None)
        return LlavaOutput(loss=mean_loss(logps), labels=labels, scores=scores)

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        images: Images | None = None,
        image_sizes: Any = None,
        image_index: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """New ids only (the prompt is not repeated), (B, n_new). Rows of different length are padded on the left."""
        inputs = kwargs.pop("input_ids", inputs)
        if "inputs_embeds" in kwargs:
            raise ValueError("generate() takes input ids and images; `inputs_embeds` is not supported")
        mask = torch.ones_like(inputs, dtype=torch.bool) if attention_mask is None else attention_mask
        # The next token is written at the right end of every row.
        found = self._spliced(inputs, mask, None, None, images, image_index, padding_side="left")
        if found is None:
            # As embeddings too, so that the prompt is not repeated whatever form of output is asked for.
            embeds = self.get_input_embeddings()(inputs)
            return super().generate(inputs_embeds=embeds, attention_mask=attention_mask, **kwargs)
        row, pictures = found
        if pictures is not None:
            kwargs |= {"block_pictures": pictures, "block_begins": row.begins}
        return super().generate(inputs_embeds=row.inputs_embeds, attention_mask=row.attention_mask, **kwargs)


def label_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood in float32: logits (n, V), labels (n,). Zero where nothing is labelled."""
    total = F.cross_entropy(logits.float(), labels, ignore_index=IGNORE_INDEX, reduction="sum")
    return total / (labels != IGNORE_INDEX).sum().clamp(min=1)


def mean_loss(logps: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of labels (n,); zero where there are none."""
    return -logps.sum() / max(len(logps), 1)


def _stack(images: Images) -> torch.Tensor:
    """Upstream's forms of a batch of pictures -> (N, 3, H, W)."""
    if isinstance(images, torch.Tensor) and images.ndim == 4:
        return images
    # A list holds one picture (3, H, W) or several (n, 3, H, W) an entry; a 5-D tensor is a batch of the latter.
    return torch.cat([image[None] if image.ndim == 3 else image for image in images])


def rows_in_order(input_ids: torch.Tensor, attention_mask: torch.Tensor | None, n_images: int) -> list[list[int]]:
    """Which pictures belong to which row when the caller passes them in order, as upstream's callers do.

    A row takes as many as it has -200. Upstream's collator also brings one unused picture for every text-only row, so
    those count as one where the numbers say so.

    Raises:
        UserError: the numbers fit neither way.
    """
    marks = input_ids == IMAGE_TOKEN_INDEX
    if attention_mask is not None:
        marks &= attention_mask.bool()
    counts = marks.sum(1).tolist()
    for taken in (counts, [max(count, 1) for count in counts]):
        if sum(taken) == n_images:
            starts = [sum(taken[:row]) for row in range(len(taken))]
            return [list(range(start, start + n)) for start, n in zip(starts, taken, strict=True)]
    rows = ", ".join(f"row {row}: {count}" for row, count in enumerate(counts))
    raise UserError(
        f"{n_images} image(s) for {sum(counts)} <image> in the batch ({rows}); write one <image> for every image"
    )
