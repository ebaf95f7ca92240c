"""Write calibration text in which later text needs earlier text exactly: records that are looked up again, and quotes.

    python recipes/recall_text.py BOOKS.jsonl.gz recall.txt [--characters 420000] [--seed 0]

BOOKS: as for bundle_text.py; its passages lie between a record and where it is asked for. What a cache must keep for
this is what ordinary text asks for least, and what context reconstruction asks for (KVzip, arXiv 2505.23416). Nothing
here is made as `kvcompress eval --retrieval` makes its prompts: records of nine kinds, other words, no city of its
list, no number of five digits. Deterministic. What it did stands in docs/measurements.md (Gemma 3).
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
from collections.abc import Callable
from pathlib import Path

#: Between documents.
SEPARATOR = "\n\f\n"
_BOOKS = (
    "Cranford",
    "Tom Jones",
    "The Enchanted April",
    "The Great Gatsby",
    "Jane Eyre",
    "Crime and Punishment",
    "The Republic",
    "Meditations",
    "Dracula",
    "Twenty years after",
    "Second Treatise",
    "The Blue Castle",
)
_FIRST = (
    "Agnes Bruno Clara Dev Elif Farid Greta Hugo Ines Jamal Karin Lars Mina Noor Otto Petra Quentin Rosa Samir Tilda"
)
_LAST = (
    "Abbot Brandt Cole Duarte Ekman Fisk Grove Hale Ito Jansen "
    "Kaplan Lund Mora Nagy Okoye Penn Quist Rahman Sato Thorne"
)
_GOODS = (
    "copper wire,green tea,roof tiles,lamp oil,cotton thread,ink,barley,window glass,soap,walnut boards,salt,candles"
)
_TOWNS = "Aalen Bergerac Cuenca Deventer Evora Fermo Gmunden Halden Ivrea Jerez Kotor Lund Mende Narva Olten Piran"
_SYLLABLES = "ba ce dor fen gal hu is jor kel lum mar nev os pra quil rit sol tan ul vek wyn xa yor zim"
_MONTHS = "January March April May July August October December"
#: Records that are open at a time; the oldest are asked for first.
_OPEN = 9

Record = tuple[str, tuple[str, ...]]
"""What is said first, and the ways in which it is asked for later."""


class Clerk:
    """Makes records up; each has a name that no other has."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self._said = rng, set[str]()
        self.kinds: tuple[Callable[[], Record], ...] = (
            self.extension,
            self.invoice,
            self.constant,
            self.row,
            self.birthday,
            self.word,
            self.ship,
            self.address,
            self.entry,
        )

    def _new(self, make: Callable[[], str]) -> str:
        while (name := make()) in self._said:
            pass
        self._said.add(name)
        return name

    def _number(self, *digits: int) -> str:
        n = self.rng.choice(digits)
        return str(self.rng.randrange(10 ** (n - 1), 10**n))

    def _coined(self) -> str:
        return "".join(self.rng.choices(_SYLLABLES.split(), k=self.rng.choice((2, 3))))

    def _person(self) -> str:
        return self._new(lambda: f"{self.rng.choice(_FIRST.split())} {self.rng.choice(_LAST.split())}")

    def _label(self, letters: int, digits: int) -> str:
        made = "".join(self.rng.choices("ABCDEFGHKLMNPRSTUVWXYZ", k=letters))
        return f"{made}-{self._number(digits)}{self.rng.choice('ABCDEFGH')}"

    def extension(self) -> Record:
        who, n = self._person(), self._number(3, 4)
        room = self._number(2, 3)
        return f"{who} sits in room {room}, extension {n}.", (
            f"To reach {who}, dial extension {n}.",
            f"\u2013 Where do I find {who}? \u2013 In room {room}.",
        )

    def invoice(self) -> Record:
        label, who, goods = self._label(2, 4), self._person(), self.rng.choice(_GOODS.split(","))
        price = f"{self._number(2, 3)}.{self._number(2)}"
        return f"Invoice {label}: {goods} for {who}, {price} euros.", (
            f"{who} had paid {price} euros for {goods} (invoice {label}).",
            f"Which invoice was that of {who}? It was {label}.",
        )

    def constant(self) -> Record:
        name, n = self._new(lambda: f"{self._coined()}_{self._coined()}".upper()), self._number(2, 3, 4)
        return f"    {name} = {n}", (f"    assert {name} == {n}", f"# {name} was set to {n} above")

    def row(self) -> Record:
        name, n, m = self._new(self._coined), self._number(3), self._number(2)
        return f"| {name} | {n} g | {m} cm |", (
            f"The {name} weighs {n} g and is {m} cm long.",
            f"How long is the {name}, as the table says? {m} cm.",
        )

    def birthday(self) -> Record:
        who, town = self._person(), self.rng.choice(_TOWNS.split())
        day = f"{self.rng.randrange(1, 29)} {self.rng.choice(_MONTHS.split())} {self.rng.randrange(1702, 1987)}"
        return f"{who} was born in {town} on {day}.", (
            f"{who}, who was born in {town}, had come into the world on {day}.",
            f"Born on {day}: {who}.",
        )

    def word(self) -> Record:
        name, other = self._new(self._coined), self._coined()
        goods, town = self.rng.choice(_GOODS.split(",")), self.rng.choice(_TOWNS.split())
        return f"{name} ({other}): a tool for {goods}, first made in {town}.", (
            f"What is a {name}? It is a tool for {goods}, also called {other}.",
            f"A {other}, or {name}, was first made in {town}.",
        )

    def ship(self) -> Record:
        name, who = self._new(self._coined).capitalize(), self._person()
        n, goods = self._number(2, 3), self.rng.choice(_GOODS.split(","))
        return f"The {name} sailed under {who} with {n} barrels of {goods}.", (
            f"And what had the {name} on board? {n} barrels of {goods}.",
            f"{who} brought the {name} home.",
        )

    def address(self) -> Record:
        who, street = self._person(), f"{self._coined().capitalize()} Street"
        n, phone = self._number(1, 2, 3), f"{self._number(3)} {self._number(4)}"
        return f"{who}, {n} {street}, telephone {phone}.", (
            f"The letter went to {who}, {n} {street}.",
            f"Call {who} at {phone}.",
        )

    def entry(self) -> Record:
        name = self._new(lambda: f"{self._coined()}-{self._number(2)}")
        value = "".join(self.rng.choices("0123456789abcdef", k=8))
        return f'  "{name}": "{value}",', (f'get("{name}") -> "{value}"', f'"{value}" is what "{name}" stands for.')


def quoted(passage: str, rng: random.Random) -> Record:
    """Return a passage as it stands, and some words out of it that are quoted later."""
    words = passage.split()
    start = rng.randrange(max(1, len(words) - 24))
    said = " ".join(words[start : start + 24])
    return passage, (f"It had said: “{said}”", f"To quote it once more: {said}")


def passages(texts: list[str], rng: random.Random) -> Callable[[], str]:
    """Return what draws a passage of a book: whole sentences, 200 to 700 characters, one line."""

    def draw() -> str:
        text = rng.choice(texts)
        at = rng.randrange(len(text) // 20, len(text) * 19 // 20)
        piece = re.sub(r"\s+", " ", text[at : at + 1400])
        sentences = re.split(r"(?<=[.!?]) (?=[A-Z“])", piece)[1:-1]
        found = ""
        wanted = rng.randrange(200, 700)
        while sentences and len(found) < wanted:
            found = f"{found} {sentences.pop(0)}".strip()
        return found if 150 < len(found) < 900 and "gutenberg" not in found.lower() else draw()

    return draw


def document(clerk: Clerk, draw: Callable[[], str], rng: random.Random, n_chars: int) -> str:
    """Return passages of books among which records stand, and are asked for a few hundred to 1,500 tokens later."""
    said: list[str] = []
    waiting: list[tuple[str, ...]] = []
    while sum(map(len, said)) < n_chars:
        make = rng.choice(clerk.kinds)
        block = [make() for _ in range(rng.choice((1, 2, 3)))]
        said.append("\n".join(first for first, _ in block))
        passage, later = quoted(draw(), rng)
        said.append(passage)
        waiting += [again for _, again in block]
        if rng.random() < 0.3:
            waiting.append(later)
        while len(waiting) > _OPEN:
            said.append(rng.choice(waiting.pop(rng.randrange(_OPEN // 2))))
    rng.shuffle(waiting)
    return "\n\n".join([*said, *(rng.choice(again) for again in waiting)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("books", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--characters", type=int, default=420000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with gzip.open(args.books, "rt", encoding="utf-8") as lines:
        books = [json.loads(line) for line in lines]
    texts = [next(b["text"] for b in books if name in b["title"]) for name in _BOOKS]
    rng, made = random.Random(args.seed), list[str]()
    draw = passages(texts, rng)
    while sum(map(len, made)) < args.characters:
        made.append(document(Clerk(rng), draw, rng, rng.randrange(5000, 9000)))
    args.output.write_text(SEPARATOR.join(made) + "\n", encoding="utf-8")
    print(f"{len(made)} documents, {sum(map(len, made))} characters")


if __name__ == "__main__":
    main()
