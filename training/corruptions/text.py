"""Text corruptions: text, severity 1..5, generator -> text."""

from collections.abc import Callable

import numpy as np


LETTERS = "abcdefghijklmnopqrstuvwxyz"
# common words and the words that matter, so that random text misleads as well as it distracts
RANDOM_WORDS = [
    "the",
    "a",
    "of",
    "and",
    "to",
    "in",
    "is",
    "it",
    "that",
    "for",
    "on",
    "with",
    "as",
    "was",
    "at",
    "by",
    "this",
    "from",
    "or",
    "one",
    "had",
    "not",
    "but",
    "what",
    "all",
    "were",
    "when",
    "we",
    "there",
    "can",
    "an",
    "your",
    "which",
    "said",
    "if",
    "do",
    "will",
    "each",
    "about",
    "how",
    "up",
    "out",
    "them",
    "then",
    "she",
    "many",
    "some",
    "so",
    "these",
    "would",
    "other",
    "into",
    "has",
    "more",
    "red",
    "blue",
    "green",
    "teal",
    "gray",
    "black",
    "brown",
    "yellow",
    "circle",
    "rectangle",
    "triangle",
    "picture",
    "shows",
    "image",
    "contains",
    "seen",
    "here",
    "drew",
    "paper",
]


def _share(severity: int) -> float:
    return (0.15, 0.3, 0.5, 0.7, 0.9)[severity - 1]


def random_words(text: str, severity: int, generator: np.random.Generator) -> str:
    """As many random words as the text has."""
    return " ".join(generator.choice(RANDOM_WORDS, max(1, len(text.split())))) + "."


def drop_words(text: str, severity: int, generator: np.random.Generator) -> str:
    """A share of the words left out, at least one kept."""
    words = text.split()
    keep = generator.random(len(words)) >= _share(severity)
    keep[generator.integers(len(words))] = True
    return " ".join(word for word, kept in zip(words, keep, strict=True) if kept)


def shuffle_words(text: str, severity: int, generator: np.random.Generator) -> str:
    """The words in random order."""
    return " ".join(generator.permutation(text.split()))


def typos(text: str, severity: int, generator: np.random.Generator) -> str:
    """A share of the letters replaced by random ones."""
    hit = generator.random(len(text)) < _share(severity)
    drawn = generator.choice(list(LETTERS), len(text))
    return "".join(new if h and old.isalpha() else old for old, new, h in zip(text, drawn, hit, strict=True))


def scramble(text: str, severity: int, generator: np.random.Generator) -> str:
    """Letters shuffled within a share of the words."""
    words = text.split()
    hit = generator.random(len(words)) < _share(severity)
    return " ".join(
        "".join(generator.permutation(list(word))) if h else word for word, h in zip(words, hit, strict=True)
    )


TEXT_CORRUPTIONS: dict[str, Callable[[str, int, np.random.Generator], str]] = {
    function.__name__: function for function in (random_words, drop_words, shuffle_words, typos, scramble)
}
