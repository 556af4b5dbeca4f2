"""What is said about a scene: captions, descriptions, questions and answers. All of it comes from the annotations."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from demo.things import PLACES, THINGS
from demo.world import Scene
from llava.data.preferences import DESCRIPTION_PROMPTS

CAPTION_PROMPTS = (
    "Provide a brief description of the given image.",
    "Give a short and clear explanation of the image.",
    "What is in the image?",
)
WHERE = {place: f"{'on' if place in ('street', 'beach') else 'in'} a {place}" for place in PLACES}
PLURALS = {"person": "people", "bus": "buses", "bench": "benches"}
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")


def one(kind: str) -> str:
    """With its article, as POPE's question template has it."""
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def several(kind: str, count: int) -> str:
    """``a dog``, ``two dogs``."""
    return one(kind) if count == 1 else f"{NUMBERS[count]} {PLURALS.get(kind, kind + 's')}"


def listed(parts: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def counted(scene: Scene) -> list[str]:
    """Every kind with its number, largest first."""
    counts = Counter(item.kind for item in scene.items)
    return [several(kind, counts[kind]) for kind in scene.kinds]


def caption(scene: Scene) -> str:
    """One sentence, as alternative texts on the web are."""
    text = f"{listed(counted(scene))} {WHERE[scene.place]}."
    return text[0].upper() + text[1:]


def description(scene: Scene) -> str:
    """Sentences that name everything: what is large first, then the rest."""
    parts = counted(scene)
    first, rest = parts[:2], parts[2:]
    text = f"The image shows {listed(first)} {WHERE[scene.place]}."
    for start in range(0, len(rest), 2):
        some = rest[start : start + 2]
        verb = "are" if len(some) > 1 or not some[0].startswith(("a ", "an ")) else "is"
        text += f" There {verb} also {listed(some)}."
    return text


def tags(scene: Scene, rng: random.Random) -> str:
    """Bare words in no order, some several times, as pictures on the web are tagged."""
    words = [scene.place] * rng.randint(0, 6)
    for item in scene.items:
        words += [item.kind] * rng.randint(1, 5)
    rng.shuffle(words)
    return " ".join(words)


def question(kind: str) -> str:
    """POPE's."""
    return f"Is there {one(kind)} in the image?"


def answer(kind: str, there: bool) -> str:
    """Yes or no, in a sentence."""
    return f"Yes, there is {one(kind)}." if there else f"No, there is no {kind}."


Turn = tuple[str, str]


def conversation(scene: Scene, rng: random.Random, rounds: int, share_of_yes: float) -> list[Turn]:
    """``rounds`` questions with answers about one scene; absent kinds are drawn evenly from all of them."""
    present, turns = scene.kinds, []
    absent = [kind for kind in THINGS if kind not in present]
    rng.shuffle(present)
    rng.shuffle(absent)
    for index in range(rounds):
        draw = rng.random()
        if draw < 0.06:
            turns.append(("Where was this picture taken?", f"{WHERE[scene.place].capitalize()}."))
        elif draw < 0.14:
            kind = present[index % len(present)]
            count = sum(item.kind == kind for item in scene.items)
            verb = "is" if count == 1 else "are"
            name = PLURALS.get(kind, kind + "s")
            turns.append(
                (f"How many {name} are there?", f"There {verb} {NUMBERS[count]} {kind if count == 1 else name}.")
            )
        else:
            there = rng.random() < share_of_yes
            kind = (present if there else absent)[index % len(present if there else absent)]
            turns.append((question(kind), answer(kind, there)))
    if rng.random() < 0.35:
        turns.insert(rng.randrange(rounds), (rng.choice(DESCRIPTION_PROMPTS), description(scene)))
    return turns
