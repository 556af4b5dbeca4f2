"""Scenes of the demo's world: who is there, where they stand, and the picture."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw

from demo.things import PLACES, THINGS, UNINVITED, Pen, Thing, shade

SIZE = 224  # pixels of a picture's side
OVERSAMPLING = 2  # drawn larger and scaled down: Pillow's shapes have hard edges
LEAST_VISIBLE = 0.5  # share of every thing that nothing may cover
HORIZON = 0.45
CLOUD = (245, 246, 248)


@dataclass
class Item:
    """One thing in a picture: its kind, bounding box (x, y, width, height) and visible area, in pixels."""

    kind: str
    box: tuple[float, float, float, float] = (0, 0, 0, 0)
    area: float = 0.0


@dataclass
class Scene:
    """A place and what is in it, largest first."""

    place: str
    items: list[Item] = field(default_factory=list)

    @property
    def kinds(self) -> list[str]:
        """Distinct kinds, in order."""
        return list(dict.fromkeys(item.kind for item in self.items))


def imagine(rng: random.Random) -> Scene:
    """A scene without a picture: 2 to 8 things that like each other's company, sometimes one that does not."""
    while True:
        place = rng.choices(list(PLACES), [p.weight for p in PLACES.values()])[0]
        company = PLACES[place].company
        kinds = [kind for kind in THINGS if rng.random() < company.get(kind, UNINVITED)]
        kinds += [kind for kind in kinds if rng.random() < 0.15]  # a second one of its kind
        if 2 <= len(kinds) <= 8:
            rng.shuffle(kinds)
            return Scene(place, [Item(kind) for kind in kinds])


def paint(scene: Scene, rng: random.Random) -> Image.Image:
    """Draw ``scene`` and fill in its items' boxes and areas; what finds no room leaves the scene.

    Later things may cover earlier ones, but ``LEAST_VISIBLE`` of each stays in sight.
    """
    side = SIZE * OVERSAMPLING
    canvas = _background(scene.place, side, rng)
    owner = np.full((side, side), -1, dtype=np.int16)  # which item a pixel shows
    whole: list[int] = []
    placed: list[Item] = []
    # What stands farther up is farther away, so it is drawn first.
    spots = sorted(((_spot(THINGS[item.kind], rng), item) for item in scene.items), key=lambda pair: pair[0][1])
    for (x, y), item in spots:
        layer = _draw(item.kind, side, y, rng)
        for _attempt in range(12):
            left, top = _corner(layer, x, y, side)
            mask = np.asarray(layer.getchannel("A")) > 127
            window = owner[top : top + mask.shape[0], left : left + mask.shape[1]]
            covered = np.bincount(window[mask & (window >= 0)], minlength=len(placed))
            visible = [np.count_nonzero(owner == i) - covered[i] for i in range(len(placed))]
            if all(v >= LEAST_VISIBLE * w for v, w in zip(visible, whole, strict=True)):
                canvas.paste(layer, (left, top), layer)
                window[mask] = len(placed)
                whole.append(int(mask.sum()))
                placed.append(item)
                break
            x = rng.uniform(0.08, 0.92)
    for index, item in enumerate(placed):
        rows, columns = np.nonzero(owner == index)
        scale = 1 / OVERSAMPLING
        item.box = tuple(
            round(float(v) * scale, 1) for v in (columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1)
        )  # type: ignore[assignment]
        item.area = round(rows.size * scale**2, 1)
    scene.items = sorted(placed, key=lambda item: -item.area)
    picture = canvas.resize((SIZE, SIZE), Image.Resampling.BOX)
    grain = np.random.default_rng(rng.randrange(2**32)).normal(0, 5, (SIZE, SIZE, 1))
    return Image.fromarray(np.clip(np.asarray(picture) + grain, 0, 255).astype(np.uint8))


def _spot(thing: Thing, rng: random.Random) -> tuple[float, float]:
    """Where it is: x of its centre and y of its lower edge, as shares of the side."""
    low, high = {"ground": (HORIZON + 0.08, 0.98), "air": (0.12, 0.45), "wall": (0.12, 0.35)}[thing.where]
    return rng.uniform(0.1, 0.9), rng.uniform(low, high)


def _draw(kind: str, side: int, y: float, rng: random.Random) -> Image.Image:
    thing = THINGS[kind]
    near = 0.65 + 0.5 * y if thing.where == "ground" else 0.9  # what is near looks larger
    height = thing.height * near * rng.uniform(0.75, 1.2) * side
    pen = Pen((max(8, round(height * thing.aspect * rng.uniform(0.88, 1.12))), max(8, round(height))))
    thing.draw(pen, shade(rng.choice(thing.colours), rng.uniform(0.75, 1.2)), rng)
    layer = pen.image
    if rng.random() < 0.5:
        layer = layer.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    layer = layer.rotate(rng.uniform(-9, 9), Image.Resampling.BILINEAR, expand=True)
    layer.thumbnail((side, side))  # a wide thing close by can be wider than the picture
    return layer


def _corner(layer: Image.Image, x: float, y: float, side: int) -> tuple[int, int]:
    """Top left pixel, so that the whole layer is inside."""
    width, height = layer.size
    left = round(x * side - width / 2)
    top = round(y * side - height)
    return max(0, min(left, side - width)), max(0, min(top, side - height))


def _background(place: str, side: int, rng: random.Random) -> Image.Image:
    above, below = (
        shade(rng.choice(colours), rng.uniform(0.85, 1.1)) for colours in (PLACES[place].above, PLACES[place].below)
    )
    canvas = Image.new("RGB", (side, side), above)
    pen = ImageDraw.Draw(canvas)
    horizon = round(side * (HORIZON + rng.uniform(-0.06, 0.06)))
    pen.rectangle([0, horizon, side, side], fill=below)
    if place in ("street", "park", "beach"):
        for _ in range(rng.randrange(4)):
            _cloud(pen, rng.uniform(0, side), rng.uniform(0, horizon * 0.6), side * rng.uniform(0.05, 0.12))
    if place == "street":
        for x in range(0, side, side // 5):  # houses
            top = horizon * rng.uniform(0.25, 0.75)
            wall = shade(rng.choice([(190, 150, 130), (170, 165, 160), (205, 190, 160)]), rng.uniform(0.8, 1.1))
            pen.rectangle([x, top, x + side // 5, horizon], fill=wall)
            for wy in range(round(top) + 12, horizon - 20, 34):
                for wx in range(x + 10, x + side // 5 - 20, 32):
                    pen.rectangle([wx, wy, wx + 14, wy + 18], fill=shade(wall, 0.6))
        for x in range(rng.randrange(60), side, 90):
            pen.rectangle([x, side * 0.8, x + 45, side * 0.815], fill=(230, 230, 225))
    elif place == "beach":
        pen.rectangle([0, horizon - side * 0.10, side, horizon], fill=(70, 140, 185))
    elif place == "park":
        for _ in range(60):
            x, y = rng.uniform(0, side), rng.uniform(horizon, side)
            pen.line([x, y, x + rng.uniform(-3, 3), y - 9], fill=shade(below, 0.75), width=2)
    else:
        for x in range(rng.randrange(40), side, 56 if place == "kitchen" else 90):
            pen.line([x, 0, x, horizon], fill=shade(above, 0.93), width=2)
        for i in range(1, 6):
            y = horizon + (side - horizon) * (i / 6) ** 1.5
            pen.line([0, y, side, y], fill=shade(below, 0.88), width=3)
    return canvas


def _cloud(pen: ImageDraw.ImageDraw, x: float, y: float, size: float) -> None:
    for i in range(4):
        dx, r = (i - 1.5) * size * 0.8, size * (0.6 + 0.3 * math.sin(i * 1.1))
        pen.ellipse([x + dx - r, y - r * 0.7, x + dx + r, y + r * 0.7], fill=CLOUD)
