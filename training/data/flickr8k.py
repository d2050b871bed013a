"""Flickr8k (Hodosh, Young and Hockenmaier, 2013): photographs with five human captions each, from the Hub or from a
folder of its published files, and questions made from the captions."""

import csv
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from modeling_dms.training.data.hub import read_parquet, with_stored_images
from modeling_dms.training.data.samples import CAPTION_QUESTION, SPLITS, TASKS, AnyImage, Sample


# Parquet, with the published splits
HUB_ID = "jxie/flickr8k"
CAPTIONS = 5
# of a folder, the first one that is there: a line of JSON a photograph, the published list, the list on Kaggle
CAPTION_FILES = ("captions.jsonl", "Flickr8k.token.txt", "captions.txt")
# the published lists of file names; without them a hash of the name decides
SPLIT_FILES = {
    "train": "Flickr_8k.trainImages.txt",
    "validation": "Flickr_8k.devImages.txt",
    "test": "Flickr_8k.testImages.txt",
}
# so many captions must say the same before it is asked
AGREEING = 3

# what is asked for, and the words that name it
THINGS = {
    "dog": "dog dogs puppy puppies",
    "man": "man men guy guys",
    "woman": "woman women lady ladies",
    "child": "child children kid kids boy boys girl girls baby babies toddler toddlers",
    "ball": "ball balls football baseball basketball",
    "bicycle": "bicycle bicycles bike bikes",
    "car": "car cars truck trucks van",
    "horse": "horse horses",
    "rock": "rock rocks rocky boulder boulders cliff",
    "tree": "tree trees forest woods",
    "hat": "hat hats cap caps helmet helmets",
    "water": "water pool lake ocean sea river pond stream creek wave waves",
    "snow": "snow snowy ice",
    "grass": "grass grassy lawn",
}
UNCOUNTED = {"water", "snow", "grass"}
ANIMALS = {
    "dog": THINGS["dog"],
    "horse": THINGS["horse"],
    "bird": "bird birds seagull duck ducks",
    "cat": "cat cats kitten",
    "cow": "cow cows bull",
    "sheep": "sheep goat goats",
}
PLACES = {
    "snow": THINGS["snow"],
    "water": THINGS["water"],
    "grass": THINGS["grass"],
    "street": "street streets road sidewalk",
    "beach": "beach sand shore",
}
NUMBERS = {"one": 1, "single": 1, "two": 2, "both": 2, "three": 3, "four": 4, "five": 5, "six": 6, "several": 3}
# one of them, and several
PERSON = {
    "person",
    "man",
    "guy",
    "woman",
    "lady",
    "boy",
    "girl",
    "child",
    "kid",
    "baby",
    "toddler",
    "player",
    "climber",
}
PEOPLE = {"people", "men", "guys", "women", "ladies", "boys", "girls", "children", "kids", "babies", "toddlers"}
CROWDS = {"group", "crowd", "team"}
# words between a number and what it counts: "two small brown dogs"
REACH = 3
COUNTED = {1: "one", 2: "two", 3: "more"}


@dataclass(frozen=True)
class Photograph:
    """A photograph and what people wrote of it.

    Attributes:
        id: unique and stable.
        image: a file, or an encoded one.
        captions: at least two.
    """

    id: str
    image: AnyImage | None
    captions: tuple[str, ...]

    @property
    def context(self) -> int:
        """Which caption is the context, by a hash of the id."""
        return _drawn(self.id) % len(self.captions)

    def described(self, split: str, task: str) -> list[Sample]:
        """Samples for `"caption"` and `"retrieval"`: a caption is the context, the others are the answers. To train
        on, there is one for each caption as the first answer, with the one before it as the context."""
        own = self.captions
        found = []
        for place in range(len(own)) if split == "train" else [self.context]:
            others = dict.fromkeys((*own[place + 1 :], *own[:place]))
            name = f"{self.id}-{place}" if split == "train" else self.id
            answers = tuple(caption for caption in others if caption != own[place])
            found.append(Sample(name, self.image, own[place], CAPTION_QUESTION, answers, task))
        return found


def load_flickr8k(split: str, task: str = "caption", folder: str | Path | None = None) -> list[Sample]:
    """Photographs with one of their captions as the context.

    Questions are made where captions agree (`AGREEING` of them say it and none says otherwise): whether a frequent
    thing is there, which animal, where (snow, water, grass, street, beach), and how many people (one, two, more).
    Each thing is asked for in as many photographs without it, drawn by a hash, as in those with it: the question
    alone does not tell. The context answers some of them and not others, see `told_by_context`.

    Args:
        split: `"train"`, `"validation"` or `"test"`: the published ones, or, in a folder without their lists, by the
            first eight hexadecimal digits of the SHA-256 of the file's name, modulo 100: below 60, below 70, the rest.
        task: `"caption"`, `"retrieval"` or `"vqa"`.
        folder: of the published files, read instead of the Hub's Parquet: one of `CAPTION_FILES`, perhaps
            `SPLIT_FILES`, and the photographs, in folders beneath it or beside each other.

    Raises:
        ValueError: for another split or task, or a file that is not as published.
        FileNotFoundError: without a file of captions or a photograph.
        ConnectionError, ImportError: as `load_hub`.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    photographs = _from_hub(split) if folder is None else _from_folder(Path(folder))[split]
    if task == "vqa":
        return _questions(photographs)
    return [sample for photograph in photographs for sample in photograph.described(split, task)]


def is_flickr8k(path: str | Path) -> bool:
    """Whether a folder holds captions as Flickr8k has them."""
    return _caption_file(Path(path)) is not None


# --- questions


def agreed(captions: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Questions on which captions agree, with their answers, by kind: each of `THINGS` that is named ("yes") or not
    ("no"), `"animal"`, `"place"`, `"people"`."""
    words = [set(re.findall(r"[a-z]+", caption.lower())) for caption in captions]
    found = {}
    for thing, names in THINGS.items():
        named = _named_by(words, names)
        if named == 0 or named >= AGREEING:
            article = "" if thing in UNCOUNTED else "a "
            found[thing] = (f"is there {article}{thing} in the picture?", "yes" if named else "no")
    for kind, question, choices in (
        ("animal", "which animal is in the picture?", ANIMALS),
        ("place", "where is the picture taken?", PLACES),
    ):
        counts = {choice: count for choice, names in choices.items() if (count := _named_by(words, names))}
        if len(counts) == 1 and max(counts.values()) >= AGREEING:
            found[kind] = (question, *counts)
    people = [count for caption in captions if (count := people_in(caption))]
    if len(people) >= AGREEING and len(set(people)) == 1:
        found["people"] = ("how many people are in the picture?", COUNTED[people[0]])
    return found


def _questions(photographs: Sequence[Photograph]) -> list[Sample]:
    """Samples for `"vqa"`, those of a photograph one after the other."""
    asked = {photograph.id: agreed(photograph.captions) for photograph in photographs}
    for thing in THINGS:
        answered = {name: own[thing][1] for name, own in asked.items() if thing in own}
        without = [name for name, answer in answered.items() if answer == "no"]
        without.sort(key=lambda name: _drawn(f"{name}-{thing}"))
        for name in without[len(answered) - len(without) :]:
            del asked[name][thing]
    return [
        Sample(f"{own.id}-{kind}", own.image, own.captions[own.context], question, (answer,))
        for own in photographs
        for kind, (question, answer) in asked[own.id].items()
    ]


def people_in(caption: str) -> int | None:
    """How many people a caption speaks of, 3 for more than two; 0 for none, `None` where it leaves open how many
    ("children play")."""
    words = re.findall(r"[a-z]+", caption.lower())
    total = 0
    for place, word in enumerate(words):
        number = next((NUMBERS[w] for w in reversed(words[max(0, place - REACH) : place]) if w in NUMBERS), None)
        if word in CROWDS:
            return 3
        if word in PERSON:
            total += 1
        elif word in PEOPLE:
            if number is None:
                return None
            total += number
    return min(total, 3)


def told_by_context(sample: Sample) -> bool:
    """Whether the context of a question's sample says its answer: it names the thing, the animal, the one place, or
    the number of people. That a thing is not there no caption says."""
    kind, answer = sample.id.rpartition("-")[2], sample.answers[0]
    words = [set(re.findall(r"[a-z]+", (sample.context or "").lower()))]
    if kind == "people":
        count = people_in(sample.context or "")
        return bool(count) and COUNTED[count] == answer
    named = {"animal": ANIMALS, "place": PLACES}.get(kind, THINGS)
    return answer != "no" and _named_by(words, named[kind if answer == "yes" else answer]) > 0


def _named_by(words: Sequence[set[str]], names: str) -> int:
    """How many captions hold one of the names."""
    return sum(not own.isdisjoint(names.split()) for own in words)


def _drawn(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


# --- reading


def _from_hub(split: str) -> list[Photograph]:
    columns = [f"caption_{number}" for number in range(CAPTIONS)]
    rows = read_parquet(HUB_ID, split, ["image", *columns])
    return [
        _photograph(f"{split}-{number}", image, [row[column] for column in columns])
        for number, (row, image) in enumerate(with_stored_images(rows, "image"))
    ]


@lru_cache(maxsize=1)
def _from_folder(folder: Path) -> Mapping[str, Sequence[Photograph]]:
    """The photographs by split, in the order of the file of captions."""
    file = _caption_file(folder)
    if file is None:
        raise FileNotFoundError(f"{folder}: expected one of {', '.join(CAPTION_FILES)}")
    places = {path.name: path for path in sorted(folder.rglob("*.jpg"))}
    lists = {split: file.parent / name for split, name in SPLIT_FILES.items()}
    listed = {
        name.strip(): split
        for split, path in lists.items()
        if path.exists()
        for name in path.read_text(encoding="utf-8").split()
    }
    found: dict[str, list[Photograph]] = {split: [] for split in SPLITS}
    for name, captions in _captions(file).items():
        split = listed.get(name) if listed else split_by_name(name)
        if split is None:  # published, but in none of the lists
            continue
        if name not in places:
            # the published list of captions names one photograph that is not among the published files
            if listed or file.name == "captions.jsonl":
                raise FileNotFoundError(f"{folder}: no photograph {name}")
            continue
        found[split].append(_photograph(Path(name).stem, places[name], captions))
    return found


def split_by_name(name: str) -> str:
    """The split of a photograph where there are no lists, see `load_flickr8k`."""
    share = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % 100
    return "train" if share < 60 else "validation" if share < 70 else "test"


def _caption_file(folder: Path) -> Path | None:
    if not folder.is_dir():
        return None
    # the published texts come in a folder of their own
    places = (place / name for place in (folder, folder / "Flickr8k_text") for name in CAPTION_FILES)
    return next((path for path in places if path.is_file()), None)


def _captions(file: Path) -> dict[str, list[str]]:
    """The captions by the photograph's file name."""
    found: dict[str, list[str]] = defaultdict(list)
    for place, name, captions in _lines(file):
        if not name or not all(isinstance(caption, str) for caption in captions):
            raise ValueError(f"{file}, line {place}: expected a photograph's name and its captions")
        found[name].extend(captions)
    return found


def _lines(file: Path) -> Iterator[tuple[int, str, list[str]]]:
    """The number of the line, the photograph's name, and the captions in that line."""
    with file.open(encoding="utf-8-sig", newline="") as lines:
        if file.suffix == ".jsonl":
            for place, line in enumerate(lines, 1):
                try:
                    row = json.loads(line)
                    yield place, Path(row["image"]).name, list(row["captions"])
                except (json.JSONDecodeError, KeyError, TypeError) as error:
                    raise ValueError(f"{file}, line {place}: expected `image` and `captions`: {error}") from error
        elif file.name == "captions.txt":
            for place, row in enumerate(csv.reader(lines), 1):
                if place > 1:
                    yield place, row[0] if row else "", row[1:2]
        else:
            for place, line in enumerate(lines, 1):
                name, _, caption = line.rstrip("\r\n").partition("\t")
                yield place, name.partition("#")[0], [caption] if caption else []


def _photograph(name: str, image: AnyImage | None, captions: Sequence[str]) -> Photograph:
    # published with a space in front of the full stop
    written = tuple(re.sub(r"\s+([.,])", r"\1", caption.strip()) for caption in captions)
    return Photograph(f"flickr8k-{name}", image, tuple(caption for caption in written if caption))
