"""Choose the passages of public-domain books that are bundled as calibration text, and say where they come from.

    python recipes/bundle_text.py BOOKS.jsonl.gz kvcompress/assets/calibration

BOOKS: one book a line, {"title", "author", "ebook", "text"}, the publisher's header and footer removed. Writes a file
for each kind and SOURCES.md. What the project wrote itself (notes.txt) is not touched. Deterministic.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
from pathlib import Path
from typing import Any

#: Between passages, alone in its line; text files have no other use for a form feed.
SEPARATOR = "\f"
#: kind -> (characters of a passage, places in a book from 0 to 1, titles as they begin).
KINDS: dict[str, tuple[int, tuple[float, ...], tuple[str, ...]]] = {
    "narrative": (
        5600,
        (0.37,),
        (
            "Grimms' Fairy Tales",
            "The Wonderful Wizard of Oz",
            "The Count of Monte Cristo",
            "Cranford",
            "Don Quixote",
            "Dubliners",
            "Frankenstein",
            "Heart of Darkness",
            "Adventures of Huckleberry Finn",
            "Les Misérables",
            "Moby Dick",
            "Le Morte d'Arthur",
            "The Interesting Narrative of the Life of Olaudah Equiano",
            "Wuthering Heights",
            "Ulysses",
        ),
    ),
    "dialogue": (
        5600,
        (0.3, 0.62),
        (
            "The boys of Columbia High",
            "Anne of Green Gables",
            "The Brothers Karamazov",
            "The Picture of Dorian Gray",
            "Great Expectations",
            "Little Women",
            "Pride and Prejudice",
        ),
    ),
    "essays": (
        5600,
        (0.28, 0.71),
        (
            "The science of beauty",
            "How the Other Half Lives",
            "My Life",
            "The History of the Peloponnesian War",
            "Simple Sabotage",
            "Considerations on Representative Government",
            "Ponies past and present",
            "Leviathan",
        ),
    ),
    "plays": (
        5600,
        (0.45,),
        (
            "The Devil is an Ass",
            "A Doll's House",
            "Hamlet",
            "The Importance of Being Earnest",
            "The Tragical History of Doctor Faustus",
            "Romeo and Juliet",
            "Beowulf",
            "The divine comedy",
            "The Iliad",
            "Thus Spake Zarathustra",
        ),
    ),
}
_HEADER = """# Where the bundled calibration text comes from

`notes.txt` was written for this project and has its licence (Apache-2.0). Everything else is passages of books that are
in the public domain in the United States, from Project Gutenberg's plain texts without its header and footer; which
book, and where in it (in thousandths of its length), stands below. `recipes/bundle_text.py` chose and cut them:
passages are separated by a form feed, every other passage of prose has its lines joined to paragraphs.

"""


def passage(text: str, place: float, n_chars: int) -> str:
    """Return whole paragraphs from `place` (0 to 1) of a book on, about n_chars long."""
    start = text.index("\n\n", int(place * len(text))) + 2
    stop = text.index("\n\n", start + n_chars)
    return text[start:stop].strip("\n")


def joined_lines(text: str) -> str:
    """Return the text with one line a paragraph, as web pages and encyclopaedias have it."""
    return "\n\n".join(re.sub(r"\s*\n\s*", " ", paragraph) for paragraph in re.split(r"\n{2,}", text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("books", type=Path)
    parser.add_argument("directory", type=Path)
    args = parser.parse_args()
    with gzip.open(args.books, "rt", encoding="utf-8") as lines:
        books: list[dict[str, Any]] = [json.loads(line) for line in lines]
    rows = ["| file | book | author | ebook | from, in thousandths |", "|---|---|---|---|---|"]
    for kind, (n_chars, places, titles) in KINDS.items():
        found = []
        for place in places:
            for title in titles:
                book = next(b for b in books if b["title"].startswith(title))
                text = passage(book["text"], place, n_chars)
                if "gutenberg" in text.lower():
                    raise SystemExit(f"{title}: a passage names the publisher")
                found.append(joined_lines(text) if kind != "plays" and len(found) % 2 else text)
                rows.append(
                    f"| {kind}.txt | {book['title']} | {book['author']} | {book['ebook']} | {place * 1000:.0f} |"
                )
        content = f"\n{SEPARATOR}\n".join(found) + "\n"
        (args.directory / f"{kind}.txt").write_text(content, encoding="utf-8")
        print(f"{kind}: {len(found)} passages, {len(content)} characters")
    (args.directory / "SOURCES.md").write_text(_HEADER + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
