"""What every user of a LLaVA needs around the model: image tokens in prompts, pictures to tensors, names of folders."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from transformers import StoppingCriteria

from llava.constants import IMAGE_TOKEN_INDEX
from llava.tokenization import bos_prefix

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenizer_image_token(
    prompt: str,
    tokenizer: PreTrainedTokenizerBase,
    image_token_index: int = IMAGE_TOKEN_INDEX,
    return_tensors: str | None = None,
) -> list[int] | torch.Tensor:
    """Ids of a prompt with one ``image_token_index`` for every ``<image>``.

    The text between two images is tokenized by itself, as at training; bos (where the tokenizer writes one) stands
    once, at the start. Returns a list, or a LongTensor of shape (L,) with ``return_tensors="pt"``.
    """
    chunks = [tokenizer(chunk).input_ids for chunk in prompt.split("<image>")]
    bos = len(bos_prefix(tokenizer))  # a text may begin with that token itself: SmolLM2's is <|im_start|>
    ids = list(chunks[0])
    for chunk in chunks[1:]:
        ids += [image_token_index, *chunk[bos:]]
    if return_tensors is None:
        return ids
    if return_tensors != "pt":
        raise ValueError(f"return_tensors={return_tensors!r}: only 'pt' is known")
    return torch.tensor(ids, dtype=torch.long)


def expand2square(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """The picture centred on a square of its longer side."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new(image.mode, (side, side), background)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def pad_to_square(image: Image.Image, image_processor: Any) -> Image.Image:
    """All of the picture, on a square of the processor's mean colour."""
    return expand2square(image, tuple(int(x * 255) for x in image_processor.image_mean))


def preprocess_image(image: Image.Image, image_processor: Any, image_aspect_ratio: str | None = None) -> torch.Tensor:
    """One RGB picture -> (3, H, W) float32: with 'pad' all of it on a square of the mean colour, else CLIP's crop."""
    if image_aspect_ratio == "pad":
        image = pad_to_square(image, image_processor)
    return image_processor.preprocess(image, return_tensors="pt")["pixel_values"][0]


def process_images(images: list[Image.Image], image_processor: Any, model_cfg: Any) -> torch.Tensor:
    """Pictures -> (N, 3, H, W) as the model's config (``image_aspect_ratio``) wants them."""
    aspect = getattr(model_cfg, "image_aspect_ratio", None)
    return torch.stack([preprocess_image(image.convert("RGB"), image_processor, aspect) for image in images])


def load_image_from_base64(image: str) -> Image.Image:
    """A picture from its base64 text."""
    return Image.open(io.BytesIO(base64.b64decode(image)))


class KeywordsStoppingCriteria(StoppingCriteria):
    """Stops ``generate`` when every row has written one of ``keywords``; for scripts written for upstream."""

    def __init__(self, keywords: list[str], tokenizer: PreTrainedTokenizerBase, input_ids: torch.Tensor) -> None:
        self.keywords = keywords
        self.tokenizer = tokenizer

    def __call__(self, output_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        # `generate` is given embeddings here, so that output_ids are the new ids alone.
        texts = self.tokenizer.batch_decode(output_ids)
        found = [any(keyword in text for keyword in self.keywords) for text in texts]
        return torch.tensor(found, device=output_ids.device)


def get_model_name_from_path(model_path: str) -> str:
    """Last part of a path; of a ``checkpoint-N`` folder the run's name comes first: ``run_checkpoint-N``."""
    parts = Path(model_path.strip("/")).parts
    return f"{parts[-2]}_{parts[-1]}" if parts[-1].startswith("checkpoint-") and len(parts) > 1 else parts[-1]
