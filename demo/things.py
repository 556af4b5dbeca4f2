"""Twenty-six kinds of things, drawn with Pillow in unit squares, and the five kinds of places they are seen in."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Points = list[tuple[float, float]]

RED, ORANGE, YELLOW, GREEN = (205, 45, 40), (235, 130, 35), (245, 205, 60), (60, 150, 70)
BLUE, PURPLE, PINK, BROWN = (50, 95, 185), (125, 75, 160), (235, 140, 170), (125, 80, 45)
BLACK, GREY, LIGHT, WHITE = (35, 35, 40), (120, 125, 130), (195, 200, 205), (245, 245, 240)
SKIN, TAN, CREAM, SILVER = (225, 175, 140), (200, 160, 105), (240, 225, 190), (170, 180, 190)


def shade(colour: Colour, factor: float) -> Colour:
    """Darker (``factor`` < 1) or lighter."""
    return tuple(max(0, min(255, round(channel * factor))) for channel in colour)  # type: ignore[return-value]


class Pen:
    """Shapes in unit coordinates, (0, 0) top left, on a transparent layer of ``size`` pixels."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.image = Image.new("RGBA", size, (0, 0, 0, 0))
        self.draw = ImageDraw.Draw(self.image)
        self.size = size

    def _scaled(self, points: Points) -> Points:
        return [(x * self.size[0], y * self.size[1]) for x, y in points]

    def box(self, x0: float, y0: float, x1: float, y1: float, colour: Colour, radius: float = 0.0) -> None:
        corners = self._scaled([(x0, y0), (x1, y1)])
        self.draw.rounded_rectangle(corners, radius * min(self.size), fill=colour)

    def oval(self, x0: float, y0: float, x1: float, y1: float, colour: Colour) -> None:
        self.draw.ellipse(self._scaled([(x0, y0), (x1, y1)]), fill=colour)

    def ring(self, x0: float, y0: float, x1: float, y1: float, colour: Colour, width: float) -> None:
        self.draw.ellipse(self._scaled([(x0, y0), (x1, y1)]), outline=colour, width=self._width(width))

    def shape(self, points: Points, colour: Colour) -> None:
        self.draw.polygon(self._scaled(points), fill=colour)

    def line(self, points: Points, colour: Colour, width: float) -> None:
        self.draw.line(self._scaled(points), fill=colour, width=self._width(width), joint="curve")

    def slice(self, box: tuple[float, float, float, float], start: float, end: float, colour: Colour) -> None:
        (x0, y0), (x1, y1) = self._scaled([(box[0], box[1]), (box[2], box[3])])
        self.draw.pieslice([x0, y0, x1, y1], start, end, fill=colour)

    def curve(self, box: tuple[float, float, float, float], start: float, end: float, c: Colour, width: float) -> None:
        (x0, y0), (x1, y1) = self._scaled([(box[0], box[1]), (box[2], box[3])])
        self.draw.arc([x0, y0, x1, y1], start, end, fill=c, width=self._width(width))

    def _width(self, width: float) -> int:
        return max(2, round(width * min(self.size)))


def person(p: Pen, c: Colour, rng: random.Random) -> None:
    trousers = rng.choice([BLACK, BLUE, BROWN, GREY])
    p.box(0.30, 0.58, 0.47, 1.0, trousers)
    p.box(0.53, 0.58, 0.70, 1.0, trousers)
    p.line([(0.28, 0.34), (0.08, 0.60)], SKIN, 0.13)
    p.line([(0.72, 0.34), (0.92, 0.60)], SKIN, 0.13)
    p.box(0.24, 0.27, 0.76, 0.64, c, 0.12)
    p.oval(0.30, 0.0, 0.70, 0.27, SKIN)
    p.slice((0.28, -0.02, 0.72, 0.24), 180, 360, rng.choice([BLACK, BROWN, YELLOW]))


def dog(p: Pen, c: Colour, rng: random.Random) -> None:
    p.line([(0.14, 0.48), (0.02, 0.18)], c, 0.09)
    for x in (0.14, 0.28, 0.56, 0.68):
        p.box(x, 0.62, x + 0.10, 1.0, shade(c, 0.85))
    p.box(0.10, 0.38, 0.78, 0.74, c, 0.2)
    p.box(0.62, 0.12, 0.90, 0.50, c, 0.12)
    p.box(0.80, 0.28, 1.0, 0.46, shade(c, 1.15), 0.08)
    p.oval(0.93, 0.28, 1.0, 0.37, BLACK)
    p.oval(0.56, 0.12, 0.70, 0.50, shade(c, 0.6))
    p.oval(0.79, 0.20, 0.85, 0.27, BLACK)


def cat(p: Pen, c: Colour, rng: random.Random) -> None:
    p.curve((0.60, 0.42, 1.0, 0.98), 270, 90, shade(c, 0.8), 0.09)
    p.oval(0.20, 0.42, 0.80, 1.0, c)
    p.shape([(0.22, 0.0), (0.24, 0.32), (0.46, 0.18)], c)
    p.shape([(0.78, 0.0), (0.76, 0.32), (0.54, 0.18)], c)
    p.oval(0.20, 0.10, 0.80, 0.55, c)
    for x in (0.36, 0.56):
        p.oval(x, 0.24, x + 0.09, 0.36, (150, 200, 80))
    p.shape([(0.46, 0.38), (0.54, 0.38), (0.50, 0.44)], PINK)
    for y in (0.40, 0.46):
        p.line([(0.10, y - 0.02), (0.36, y)], WHITE, 0.02)
        p.line([(0.64, y), (0.90, y - 0.02)], WHITE, 0.02)


def bird(p: Pen, c: Colour, rng: random.Random) -> None:
    p.shape([(0.0, 0.32), (0.25, 0.48), (0.20, 0.62)], shade(c, 0.7))
    p.oval(0.15, 0.34, 0.75, 0.80, c)
    p.oval(0.58, 0.14, 0.88, 0.50, c)
    p.shape([(0.85, 0.26), (1.0, 0.33), (0.85, 0.40)], ORANGE)
    p.shape([(0.25, 0.50), (0.60, 0.46), (0.38, 0.02)], shade(c, 0.6))
    p.oval(0.70, 0.23, 0.77, 0.32, BLACK)
    for x in (0.40, 0.52):
        p.line([(x, 0.78), (x, 1.0)], ORANGE, 0.04)


def car(p: Pen, c: Colour, rng: random.Random) -> None:
    p.shape([(0.18, 0.48), (0.32, 0.10), (0.70, 0.10), (0.86, 0.48)], c)
    p.shape([(0.26, 0.46), (0.36, 0.18), (0.49, 0.18), (0.49, 0.46)], (190, 220, 235))
    p.shape([(0.53, 0.46), (0.53, 0.18), (0.67, 0.18), (0.77, 0.46)], (190, 220, 235))
    p.box(0.0, 0.44, 1.0, 0.80, c, 0.12)
    p.box(0.92, 0.52, 1.0, 0.62, YELLOW)
    for x in (0.12, 0.66):
        p.oval(x, 0.60, x + 0.22, 1.0, BLACK)
        p.oval(x + 0.06, 0.71, x + 0.16, 0.89, LIGHT)


def bus(p: Pen, c: Colour, rng: random.Random) -> None:
    p.box(0.0, 0.0, 1.0, 0.86, c, 0.08)
    for x in (0.06, 0.24, 0.42, 0.60):
        p.box(x, 0.12, x + 0.14, 0.44, (185, 215, 230))
    p.box(0.79, 0.12, 0.95, 0.80, (160, 190, 205))
    p.box(0.0, 0.54, 0.76, 0.62, WHITE)
    for x in (0.12, 0.60):
        p.oval(x, 0.70, x + 0.17, 1.0, BLACK)


def bicycle(p: Pen, c: Colour, rng: random.Random) -> None:
    p.ring(0.0, 0.42, 0.40, 1.0, BLACK, 0.06)
    p.ring(0.60, 0.42, 1.0, 1.0, BLACK, 0.06)
    p.line([(0.20, 0.71), (0.36, 0.30), (0.70, 0.30), (0.48, 0.72), (0.20, 0.71)], c, 0.07)
    p.line([(0.36, 0.30), (0.48, 0.72)], c, 0.07)
    p.line([(0.80, 0.71), (0.68, 0.14), (0.82, 0.08)], c, 0.07)
    p.box(0.26, 0.18, 0.46, 0.26, BLACK)


def traffic_light(p: Pen, c: Colour, rng: random.Random) -> None:
    p.box(0.42, 0.5, 0.58, 1.0, GREY)
    p.box(0.18, 0.0, 0.82, 0.62, BLACK, 0.1)
    lit = rng.randrange(3)
    for i, colour in enumerate(((240, 50, 40), (250, 200, 40), (60, 210, 90))):
        p.oval(0.33, 0.04 + 0.19 * i, 0.67, 0.20 + 0.19 * i, colour if i == lit else shade(colour, 0.45))


def bench(p: Pen, c: Colour, rng: random.Random) -> None:
    for y in (0.05, 0.24):
        p.box(0.0, y, 1.0, y + 0.13, c)
    p.box(0.0, 0.50, 1.0, 0.64, shade(c, 1.2))
    for x in (0.10, 0.82):
        p.box(x, 0.05, x + 0.08, 1.0, BLACK)


def tree(p: Pen, c: Colour, rng: random.Random) -> None:
    p.box(0.41, 0.5, 0.59, 1.0, BROWN)
    p.oval(0.02, 0.18, 0.62, 0.70, c)
    p.oval(0.38, 0.20, 0.98, 0.72, shade(c, 0.85))
    p.oval(0.18, 0.0, 0.82, 0.50, shade(c, 1.15))


def flower(p: Pen, c: Colour, rng: random.Random) -> None:
    p.line([(0.5, 0.4), (0.5, 1.0)], GREEN, 0.09)
    p.oval(0.52, 0.66, 0.88, 0.82, GREEN)
    p.oval(0.12, 0.74, 0.48, 0.90, GREEN)
    for x, y in ((0.5, 0.12), (0.74, 0.28), (0.66, 0.54), (0.34, 0.54), (0.26, 0.28)):
        p.oval(x - 0.19, y - 0.13, x + 0.19, y + 0.13, c)
    p.oval(0.36, 0.25, 0.64, 0.45, YELLOW if c != YELLOW else BROWN)


def ball(p: Pen, c: Colour, rng: random.Random) -> None:
    p.oval(0.0, 0.0, 1.0, 1.0, WHITE)
    for start in (0, 120, 240):
        p.slice((0.0, 0.0, 1.0, 1.0), start + 20, start + 80, c)
    p.oval(0.38, 0.38, 0.62, 0.62, WHITE)


def kite(p: Pen, c: Colour, rng: random.Random) -> None:
    p.line([(0.5, 0.62), (0.38, 0.76), (0.58, 0.86), (0.44, 1.0)], BLACK, 0.03)
    p.shape([(0.5, 0.0), (0.95, 0.28), (0.5, 0.70), (0.05, 0.28)], c)
    p.shape([(0.5, 0.0), (0.95, 0.28), (0.5, 0.28)], shade(c, 0.6))
    p.shape([(0.05, 0.28), (0.5, 0.28), (0.5, 0.70)], shade(c, 1.4))


def umbrella(p: Pen, c: Colour, rng: random.Random) -> None:
    p.box(0.47, 0.1, 0.53, 0.95, BLACK)
    p.slice((0.0, 0.0, 1.0, 0.96), 180, 360, c)
    p.slice((0.0, 0.0, 1.0, 0.96), 225, 260, WHITE)
    p.slice((0.0, 0.0, 1.0, 0.96), 280, 315, WHITE)
    p.curve((0.47, 0.86, 0.67, 1.0), 0, 180, BLACK, 0.05)


def boat(p: Pen, c: Colour, rng: random.Random) -> None:
    p.box(0.47, 0.0, 0.52, 0.70, BROWN)
    p.shape([(0.54, 0.02), (0.54, 0.60), (0.94, 0.60)], WHITE)
    p.shape([(0.45, 0.12), (0.45, 0.60), (0.14, 0.60)], CREAM)
    p.shape([(0.0, 0.66), (1.0, 0.66), (0.82, 1.0), (0.18, 1.0)], c)


def chair(p: Pen, c: Colour, rng: random.Random) -> None:
    p.box(0.10, 0.0, 0.28, 1.0, c)
    p.box(0.10, 0.46, 0.90, 0.62, shade(c, 1.2))
    p.box(0.74, 0.60, 0.90, 1.0, c)
    p.box(0.10, 0.0, 0.34, 0.40, shade(c, 0.8))


def table(p: Pen, c: Colour, rng: random.Random) -> None:
    p.box(0.0, 0.0, 1.0, 0.22, shade(c, 1.15))
    for x in (0.06, 0.84):
        p.box(x, 0.22, x + 0.10, 1.0, c)
    p.box(0.10, 0.22, 0.90, 0.34, shade(c, 0.75))


def cup(p: Pen, c: Colour, rng: random.Random) -> None:
    p.ring(0.52, 0.25, 1.0, 0.80, shade(c, 0.8), 0.12)
    p.shape([(0.05, 0.12), (0.75, 0.12), (0.66, 1.0), (0.14, 1.0)], c)
    p.oval(0.05, 0.0, 0.75, 0.24, shade(c, 1.3))
    p.oval(0.12, 0.05, 0.68, 0.20, BROWN)


def bottle(p: Pen, c: Colour, rng: random.Random) -> None:
    p.box(0.36, 0.06, 0.64, 0.40, c)
    p.box(0.33, 0.0, 0.67, 0.09, RED)
    p.box(0.16, 0.32, 0.84, 1.0, c, 0.15)
    p.box(0.16, 0.54, 0.84, 0.82, CREAM)


def bowl(p: Pen, c: Colour, rng: random.Random) -> None:
    p.slice((0.0, -0.70, 1.0, 0.95), 0, 180, c)
    p.oval(0.0, 0.0, 1.0, 0.30, shade(c, 0.6))
    p.box(0.30, 0.88, 0.70, 1.0, shade(c, 0.8))


def apple(p: Pen, c: Colour, rng: random.Random) -> None:
    p.oval(0.02, 0.22, 0.62, 1.0, c)
    p.oval(0.38, 0.22, 0.98, 1.0, c)
    p.oval(0.16, 0.34, 0.34, 0.54, shade(c, 1.5))
    p.line([(0.5, 0.32), (0.56, 0.02)], BROWN, 0.08)
    p.oval(0.56, 0.04, 0.90, 0.20, GREEN)


def banana(p: Pen, c: Colour, rng: random.Random) -> None:
    p.curve((0.02, -0.75, 0.98, 0.95), 15, 165, c, 0.34)
    p.oval(0.0, 0.20, 0.14, 0.44, BROWN)
    p.oval(0.88, 0.20, 1.0, 0.40, shade(c, 0.6))


def clock(p: Pen, c: Colour, rng: random.Random) -> None:
    p.oval(0.0, 0.0, 1.0, 1.0, c)
    p.oval(0.10, 0.10, 0.90, 0.90, WHITE)
    for x, y in ((0.5, 0.17), (0.5, 0.83), (0.17, 0.5), (0.83, 0.5)):
        p.oval(x - 0.04, y - 0.04, x + 0.04, y + 0.04, BLACK)
    p.line([(0.5, 0.5), (0.5, 0.24)], BLACK, 0.06)
    p.line([(0.5, 0.5), (rng.choice([0.3, 0.68]), 0.58)], BLACK, 0.06)


def book(p: Pen, c: Colour, rng: random.Random) -> None:
    p.shape([(0.0, 0.14), (0.5, 0.24), (0.5, 1.0), (0.0, 0.88)], c)
    p.shape([(1.0, 0.14), (0.5, 0.24), (0.5, 1.0), (1.0, 0.88)], c)
    p.shape([(0.05, 0.04), (0.5, 0.16), (0.5, 0.90), (0.05, 0.78)], WHITE)
    p.shape([(0.95, 0.04), (0.5, 0.16), (0.5, 0.90), (0.95, 0.78)], CREAM)
    for y in (0.26, 0.42, 0.58):
        p.line([(0.12, y - 0.05), (0.44, y + 0.03)], GREY, 0.03)
        p.line([(0.56, y + 0.03), (0.88, y - 0.05)], GREY, 0.03)


def laptop(p: Pen, c: Colour, rng: random.Random) -> None:
    p.box(0.14, 0.0, 0.86, 0.70, BLACK, 0.04)
    p.box(0.19, 0.06, 0.81, 0.63, (110, 170, 220))
    p.box(0.25, 0.16, 0.55, 0.24, WHITE)
    p.box(0.25, 0.32, 0.68, 0.40, WHITE)
    p.shape([(0.12, 0.72), (0.88, 0.72), (1.0, 1.0), (0.0, 1.0)], SILVER)


def lamp(p: Pen, c: Colour, rng: random.Random) -> None:
    p.box(0.45, 0.4, 0.55, 0.94, BLACK)
    p.oval(0.22, 0.86, 0.78, 1.0, BLACK)
    p.shape([(0.30, 0.0), (0.70, 0.0), (0.98, 0.46), (0.02, 0.46)], c)
    p.oval(0.40, 0.40, 0.60, 0.54, (255, 245, 170))


class Thing(NamedTuple):
    """How a kind is drawn: ``height`` is its usual share of the picture, ``where`` its zone (ground, air or wall)."""

    draw: Callable[[Pen, Colour, random.Random], None]
    aspect: float  # width / height
    height: float
    colours: tuple[Colour, ...]
    where: str = "ground"


THINGS: dict[str, Thing] = {
    "person": Thing(person, 0.46, 0.42, (RED, BLUE, GREEN, YELLOW, WHITE, PURPLE)),
    "dog": Thing(dog, 1.3, 0.22, (BROWN, TAN, GREY, BLACK)),
    "cat": Thing(cat, 0.8, 0.22, (ORANGE, GREY, BLACK, CREAM)),
    "bird": Thing(bird, 1.2, 0.15, (BLUE, RED, BROWN, GREY), "air"),
    "car": Thing(car, 2.0, 0.21, (RED, BLUE, GREEN, WHITE, GREY, YELLOW)),
    "bus": Thing(bus, 1.9, 0.34, (RED, BLUE, ORANGE, GREEN)),
    "bicycle": Thing(bicycle, 1.5, 0.25, (RED, BLUE, GREEN, ORANGE)),
    "traffic light": Thing(traffic_light, 0.5, 0.36, (BLACK,)),
    "bench": Thing(bench, 1.8, 0.22, (BROWN, GREEN, GREY)),
    "tree": Thing(tree, 0.8, 0.48, (GREEN, (90, 160, 60), (45, 120, 80))),
    "flower": Thing(flower, 0.65, 0.22, (RED, PINK, YELLOW, PURPLE, WHITE)),
    "ball": Thing(ball, 1.0, 0.14, (RED, BLUE, BLACK, ORANGE)),
    "kite": Thing(kite, 0.75, 0.28, (RED, BLUE, GREEN, PURPLE), "air"),
    "umbrella": Thing(umbrella, 1.15, 0.32, (RED, BLUE, GREEN, PURPLE)),
    "boat": Thing(boat, 1.05, 0.30, (RED, BROWN, BLUE, GREEN)),
    "chair": Thing(chair, 0.7, 0.30, (BROWN, RED, BLUE, GREY)),
    "table": Thing(table, 1.7, 0.26, (BROWN, TAN, GREY)),
    "cup": Thing(cup, 1.0, 0.14, (RED, BLUE, WHITE, GREEN)),
    "bottle": Thing(bottle, 0.42, 0.24, (GREEN, BROWN, BLUE)),
    "bowl": Thing(bowl, 1.7, 0.12, (RED, BLUE, WHITE, GREEN)),
    "apple": Thing(apple, 0.95, 0.13, (RED, GREEN, YELLOW)),
    "banana": Thing(banana, 1.9, 0.11, (YELLOW, (225, 195, 50))),
    "clock": Thing(clock, 1.0, 0.17, (BLACK, BROWN, RED, BLUE), "wall"),
    "book": Thing(book, 1.4, 0.16, (RED, BLUE, GREEN, BROWN)),
    "laptop": Thing(laptop, 1.35, 0.20, (SILVER,)),
    "lamp": Thing(lamp, 0.65, 0.28, (YELLOW, RED, GREEN, CREAM)),
}


class Place(NamedTuple):
    """A kind of place: how often it is met, its two colours, and who is seen there with what probability."""

    weight: float
    above: tuple[Colour, ...]
    below: tuple[Colour, ...]
    company: dict[str, float]


SKY = ((175, 210, 240), (200, 220, 235), (235, 205, 180))
PLACES: dict[str, Place] = {
    "street": Place(0.25, SKY, ((130, 130, 135), (110, 112, 118), (150, 145, 140)), {
        "car": 0.70, "person": 0.65, "traffic light": 0.50, "bicycle": 0.45, "tree": 0.35, "bus": 0.35,
        "dog": 0.25, "bench": 0.20, "bird": 0.15, "umbrella": 0.15}),
    "park": Place(0.20, SKY, ((120, 175, 90), (140, 185, 105), (100, 150, 80)), {
        "tree": 0.75, "person": 0.60, "dog": 0.50, "bench": 0.50, "bird": 0.40, "flower": 0.40,
        "ball": 0.30, "kite": 0.25, "bicycle": 0.25}),
    "beach": Place(0.15, SKY, ((235, 215, 160), (225, 200, 150)), {
        "person": 0.65, "umbrella": 0.60, "boat": 0.50, "ball": 0.40, "bird": 0.40, "kite": 0.35,
        "chair": 0.25, "dog": 0.20, "bottle": 0.15}),
    "kitchen": Place(0.25, ((245, 235, 215), (215, 230, 225), (240, 220, 205)), ((190, 150, 115), (205, 200, 195)), {
        "table": 0.65, "chair": 0.55, "cup": 0.55, "bottle": 0.50, "bowl": 0.50, "apple": 0.40,
        "banana": 0.35, "clock": 0.35, "person": 0.30, "cat": 0.25, "flower": 0.15}),
    "study": Place(0.15, ((225, 225, 235), (230, 220, 205), (205, 215, 205)), ((150, 110, 85), (120, 115, 125)), {
        "book": 0.65, "laptop": 0.65, "lamp": 0.55, "chair": 0.55, "cup": 0.45, "table": 0.45,
        "clock": 0.40, "person": 0.35, "cat": 0.20, "bottle": 0.15}),
}  # fmt: skip
UNINVITED = 0.02  # any kind turns up anywhere now and then: a place alone does not give the answer
