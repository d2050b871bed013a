"""What data sets of named pictures ask: their name, their kind, whether a keyword fits. A context lists keywords."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from modeling_dms.training.data.samples import CAPTION_QUESTION, Sample


# fmt: off
STOP_WORDS = {
    "a", "also", "an", "and", "called", "for", "in", "no", "of", "on", "or", "the", "to", "used", "very", "with",
}
# fmt: on


@dataclass(frozen=True)
class Picture:
    """A picture of which names and keywords are known.

    Attributes:
        id: unique and stable; what is withheld and asked is drawn by its hash.
        image: a file.
        names: accepted answers, the first one is the caption.
        group: a word for its kind, one of the keywords, or `None` where it has none.
        keywords: at least one, sorted.
    """

    id: str
    image: Path
    names: tuple[str, ...]
    group: str | None
    keywords: tuple[str, ...]

    @property
    def context(self) -> str:
        """The keywords; of half of the pictures that have several, all but one: the image tells what is withheld."""
        # sorted, so that the name cannot just be copied, and without other names, so that they do not tell everything
        words = list(self.keywords)
        drawn = _drawn(f"{self.id}-context")
        if len(words) > 1 and drawn % 2:
            del words[drawn // 2 % len(words)]
        return f"keywords: {', '.join(words)}."

    def described(self, task: str) -> Sample:
        """The sample for `"caption"` or `"retrieval"`."""
        return Sample(self.id, self.image, self.context, CAPTION_QUESTION, self.names[:1], task)

    def questions(self, others: Sequence["Picture"]) -> list[Sample]:
        """Up to three samples for `"vqa"`: the name, the group, and whether a keyword fits. The keyword is withheld or
        not, or, in half of the pictures, a keyword of one of `others` and wrong."""
        asked = [("name", "what is in the picture?", self.names)]
        if self.group:
            asked.append(("group", "what kind of picture is it?", (self.group,)))
        drawn = _drawn(self.id)
        answer, source = ("yes", self) if drawn % 2 else ("no", others[drawn // 2 % len(others)])
        words = [word for word in source.keywords if answer == "yes" or word not in self.keywords]
        if words:
            word = words[drawn // 2 % len(words)]
            asked.append(("keyword", f"does {word} describe the picture?", (answer,)))
        return [Sample(f"{self.id}-{kind}", self.image, self.context, text, answers) for kind, text, answers in asked]


def keywords_of(name: str, group: str | None) -> tuple[str, ...]:
    """The words of a name and the group, sorted, without those that say nothing alone."""
    words: Iterable[str | None] = (*re.findall(r"[\w\u2019-]+", name.lower()), group)
    return tuple(sorted({word for word in words if word and word not in STOP_WORDS}))


def _drawn(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
