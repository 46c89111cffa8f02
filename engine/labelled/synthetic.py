"""Tasks made on the fly, of any length: each example a pure function of (task, split, length, number, seed).

Documents are paragraphs of sentences about made-up people and places. ``needle``, ``keys`` and ``duplicate`` ask for a
place in the text, so that a score can be drawn against length and depth; ``counting`` and ``listops`` for a digit.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import InputError

PER_LENGTH = 40  # examples
DEPTHS = 5  # parts of a text in which a needle is put in turn
PEOPLE = ("Ada", "Bruno", "Clara", "Dmitri", "Elsa", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Kira", "Leo", "Mona",
          "Nils", "Olga", "Pablo", "Rosa", "Sven", "Tessa", "Viktor")  # fmt: skip
PLACES = ("harbour", "library", "orchard", "station", "mill", "chapel", "market", "bridge", "garden", "workshop",
          "quarry", "school", "theatre", "bakery", "lighthouse", "stable")  # fmt: skip
THINGS = ("a red umbrella", "two letters", "an old map", "the broken clock", "a basket of plums", "some rope",
          "the blue ledger", "a copper kettle", "three candles", "a wooden chair", "the spare key",
          "a bag of flour")  # fmt: skip
DEEDS = ("carried {thing} to the {place}", "forgot {thing} at the {place}", "painted the door of the {place}",
         "waited near the {place} until evening", "asked for {thing} in the {place}",
         "repaired {thing} behind the {place}", "walked past the {place} without a word",
         "counted the windows of the {place}")  # fmt: skip
TIMES = ("In the morning", "After the rain", "On Tuesday", "Late at night", "Before lunch", "Once again", "That winter",
         "Years later")  # fmt: skip
CITIES = ("Lisbon", "Oslo", "Cairo", "Lima", "Quito", "Hanoi", "Dublin", "Riga", "Tunis", "Sofia", "Accra", "Havana",
          "Nairobi", "Vienna", "Bergen", "Osaka")  # fmt: skip
OPERATORS = ("MAX", "MIN", "MED", "SM")


def make(
    generator: str, lengths: Sequence[int], split: str, limit: int | None = None, seed: int = 0
) -> list[dict[str, Any]]:
    """The fields of ``Example``; ``limit``: of every length.

    Raises:
        InputError: there is no such generator.
    """
    if generator not in GENERATORS:
        raise InputError(f"generator: expected one of {', '.join(GENERATORS)}, got {generator!r}")
    made, count = [], (PER_LENGTH if split == "test" else 10 * PER_LENGTH) if limit is None else limit
    for length in lengths:
        for number in range(count):
            words = [seed, sum(map(ord, split)), length, number, list(GENERATORS).index(generator)]
            example = GENERATORS[generator](np.random.default_rng(words), length, number)
            example["about"] = {"length": length, **example.get("about", {})}
            made.append({"id": f"{generator}-{split}-{length}-{number}", **example})
    return made


def sentence(random: np.random.Generator) -> str:
    deed = DEEDS[random.integers(len(DEEDS))]
    deed = deed.format(thing=pick(random, THINGS), place=pick(random, PLACES))
    return f"{pick(random, TIMES)} {pick(random, PEOPLE)} {deed}."


def pick(random: np.random.Generator, words: Sequence[str]) -> str:
    return words[random.integers(len(words))]


def filler(random: np.random.Generator, num_words: int) -> list[str]:
    """Sentences of ``num_words`` words or a few more."""
    made, total = [], 0
    while total < num_words:
        made.append(sentence(random))
        total += made[-1].count(" ") + 1
    return made


def laid_out(sentences: Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
    """The text, in paragraphs of six sentences, and the characters of each."""
    text, spans = "", []
    for i, each in enumerate(sentences):
        text += "" if i == 0 else "\n\n" if i % 6 == 0 else " "
        spans.append((len(text), len(text) + len(each)))
        text += each
    return text, spans


def secret(city: str, random: np.random.Generator) -> str:
    return f"The secret number of {city} is {random.integers(1000, 10000)}."


def needle(random: np.random.Generator, length: int, number: int, num_keys: int = 1) -> dict[str, Any]:
    """One sentence of ``num_keys`` alike ones is asked for; that one lies in each depth of the text in turn."""
    body = filler(random, length - 8 * num_keys)
    cities = [CITIES[i] for i in random.permutation(len(CITIES))[:num_keys]]
    depth = number % DEPTHS
    for city in cities[1:]:
        body.insert(int(random.integers(len(body) + 1)), secret(city, random))
    place = int(len(body) * (depth + random.random()) / DEPTHS)
    body.insert(place, secret(cities[0], random))
    document, spans = laid_out(body)
    return {"question": f"What is the secret number of {cities[0]}?", "document": document, "reference": 1,
            "spans": (spans[place],), "about": {"depth": f"{(2 * depth + 1) / (2 * DEPTHS):.0%}"}}  # fmt: skip


def keys(random: np.random.Generator, length: int, number: int) -> dict[str, Any]:
    return needle(random, length, number, num_keys=8)


def duplicate(random: np.random.Generator, length: int, number: int) -> dict[str, Any]:
    """A paragraph of six sentences stands twice, at least a third of the text apart."""
    passage = " ".join(filler(random, 55))
    body = [" ".join(filler(random, 55)) for _ in range(max(4, length // 62 - 2))]
    first = int(random.integers(0, max(1, len(body) // 3)))
    second = int(random.integers(first + 1 + len(body) // 3, len(body) + 1))
    body.insert(second, passage)
    body.insert(first, passage)
    text, spans = "", []
    for each in body:
        text += "\n\n" if text else ""
        spans.append((len(text), len(text) + len(each)))
        text += each
    return {"question": "", "document": text, "reference": 1, "spans": (spans[first], spans[second + 1])}


def counting(random: np.random.Generator, length: int, number: int) -> dict[str, Any]:
    """0 to 9 times a sentence about one city, among as many about others."""
    count, city = int(random.integers(10)), pick(random, CITIES)
    others = [each for each in CITIES if each != city]
    body = filler(random, length - 8 * (count + 5))
    for name in [city] * count + [pick(random, others) for _ in range(5)]:
        body.insert(int(random.integers(len(body) + 1)), secret(name, random))
    document, _ = laid_out(body)
    return {"question": f"The secret number of {city}", "document": document, "reference": count, "truth": count}


def listops(random: np.random.Generator, length: int, number: int) -> dict[str, Any]:
    """Nested operations of about ``length`` tokens, each of 2 to 5 arguments."""
    words, value = expression(random, length)
    return {"question": "", "document": " ".join(words), "reference": value, "truth": value}


def expression(random: np.random.Generator, room: int) -> tuple[list[str], int]:
    if room < 5:
        digit = int(random.integers(10))
        return [str(digit)], digit
    operator, num = OPERATORS[random.integers(len(OPERATORS))], int(random.integers(2, 6))
    shares = random.dirichlet(np.ones(num)) * (room - 2)
    parts = [expression(random, int(share)) for share in shares]
    values = sorted(value for _, value in parts)
    value = {"MAX": values[-1], "MIN": values[0], "MED": values[len(values) // 2], "SM": sum(values) % 10}[operator]
    return [f"[{operator}", *(word for words, _ in parts for word in words), "]"], value


GENERATORS = {"needle": needle, "keys": keys, "duplicate": duplicate, "counting": counting, "listops": listops}
