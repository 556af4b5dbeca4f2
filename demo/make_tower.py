"""The demo's vision tower, from nothing: a small CLIP that learns what stands where in painted scenes.

    python -m demo.make_tower --output_dir demo/weights/tower

A real CLIP learns from 400 million captioned pictures. This one sees some thousand and is told more about each: which
kinds cover every patch, which are in the picture, and which place it is. The heads that say so are thrown away; what
ships is the transformer, and LLaVA reads its last but one layer as it does with the real one.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from demo.things import PLACES, THINGS
from demo.world import SIZE, imagine, paint
from llava.files import atomic_folder

CONFIG = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "image_size": 112,
    "patch_size": 16,
    "projection_dim": 128,
}
GRID = CONFIG["image_size"] // CONFIG["patch_size"]
KINDS = list(THINGS)
LEAST_COVER = 0.25  # share of a patch inside a thing's box that makes the patch show it


class Scenes(Dataset):
    """Painted on the way; number ``index`` is always the same scene, and no scene of the demo."""

    def __init__(self, seed: int, count: int, processor: CLIPImageProcessor) -> None:
        self.seed, self.count, self.processor = seed, count, processor

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Pixels (3, 112, 112), kinds on the grid (7, 7, kinds) as 0 and 1, and the place's number."""
        rng = random.Random(f"tower {self.seed} {index}")
        scene = imagine(rng)
        pixels = self.processor(paint(scene, rng), return_tensors="pt").pixel_values[0]
        grid = np.zeros((GRID, GRID, len(KINDS)), dtype=np.float32)
        edges = np.arange(GRID + 1) * SIZE / GRID
        for item in scene.items:
            x, y, width, height = item.box
            across = np.clip(np.minimum(edges[1:], x + width) - np.maximum(edges[:-1], x), 0, None)
            down = np.clip(np.minimum(edges[1:], y + height) - np.maximum(edges[:-1], y), 0, None)
            cover = np.outer(down, across)
            # A small thing may cover no patch by a quarter; the patch that shows most of it still counts.
            shown = cover >= min(LEAST_COVER * (SIZE / GRID) ** 2, 0.999 * cover.max())
            grid[shown, KINDS.index(item.kind)] = 1
        return pixels, torch.from_numpy(grid), list(PLACES).index(scene.place)


class Teacher(nn.Module):
    """The tower with the heads that are thrown away."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = CLIPVisionModel(CLIPVisionConfig(**CONFIG, attn_implementation="sdpa"))
        width = CONFIG["hidden_size"]
        self.patch_norm, self.patch_head = nn.LayerNorm(width), nn.Linear(width, len(KINDS))
        self.kinds_head, self.place_head = nn.Linear(width, len(KINDS)), nn.Linear(width, len(PLACES))
        nn.init.constant_(self.patch_head.bias, -3.0)  # few patches show any one kind

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits: patches (B, 49, kinds) from the last but one layer, kinds (B, kinds) and place (B, places)."""
        out = self.tower(pixels, output_hidden_states=True)
        patches = self.patch_norm(out.hidden_states[-2][:, 1:])
        return self.patch_head(patches), self.kinds_head(out.pooler_output), self.place_head(out.pooler_output)


@torch.no_grad()
def quality(model: Teacher, loader: DataLoader) -> str:
    """How well kinds are told on scenes that were not trained on: share of right ones at a threshold of one half."""
    right = missed = invented = total = 0
    for pixels, grid, _ in loader:
        there = grid.flatten(1, 2).amax(1) > 0
        said = model(pixels)[0].amax(1) > 0
        right += (there & said).sum().item()
        missed += (there & ~said).sum().item()
        invented += (~there & said).sum().item()
        total += there.sum().item()
    return f"of {total} things {right / total:.1%} seen, {invented / max(right + invented, 1):.1%} of the seen invented"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("demo/weights/tower"))
    parser.add_argument("--scenes", type=int, default=6000)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch_size", type=int, default=50)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    began = time.monotonic()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # on every machine: sums depend on their number
    side = CONFIG["image_size"]
    processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    # Painted once and kept: painting costs more than learning from it.
    painter = DataLoader(Scenes(args.seed, args.scenes, processor), batch_size=args.batch_size)
    kept = [(pixels.half(), grid.bool(), place) for pixels, grid, place in painter]
    print(f"{args.scenes} scenes painted, {time.monotonic() - began:.0f} s", flush=True)
    held_out = list(DataLoader(Scenes(args.seed + 1, 300, processor), batch_size=100))
    model = Teacher()
    steps = args.epochs * len(kept)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / 100, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(i / steps, 1))))
    )
    step = 0
    for epoch in range(args.epochs):
        pixels_of, grids, places = (torch.cat(parts) for parts in zip(*kept, strict=True))
        for chosen in torch.randperm(len(places)).split(args.batch_size):
            pixels, grid = pixels_of[chosen].float(), grids[chosen].float()
            mirrored = torch.rand(len(chosen)) < 0.5
            pixels[mirrored], grid[mirrored] = pixels[mirrored].flip(-1), grid[mirrored].flip(2)
            pixels = pixels * (1 + 0.1 * torch.randn(len(chosen), 1, 1, 1)) + 0.1 * torch.randn(len(chosen), 1, 1, 1)
            patches, kinds, place = model(pixels)
            grid = grid.flatten(1, 2)
            loss = 10 * bce(patches, grid) + bce(kinds, grid.amax(1)) + 0.2 * cross_entropy(place, places[chosen])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            step += 1
        model.eval()
        print(f"epoch {epoch + 1} loss {loss.item():.3f}, {quality(model, held_out)}, ", end="")
        print(f"{time.monotonic() - began:.0f} s", flush=True)
        model.train()
    with atomic_folder(args.output_dir) as folder:
        model.tower.half().save_pretrained(folder)
        processor.save_pretrained(folder)
    print(f"{args.output_dir}: {model.tower.num_parameters():,} parameters, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
