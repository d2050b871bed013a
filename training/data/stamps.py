"""Photographs from the stamps of Tux Paint (GPL-2), with the captions that come with them, read where the Debian
package `tuxpaint-stamps-default` is installed."""

import hashlib
import re
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from modeling_dms.training.data.pictures import Picture, keywords_of
from modeling_dms.training.data.samples import HELD_OUT_SPLITS, TASKS, Sample, held_out_split_of


FOLDER = Path("/usr/share/tuxpaint/stamps")
# the folders that say what kind of thing their stamps show
GROUPS = {
    "animals": "animal",
    "coins": "coin",
    "food": "food",
    "music": "instrument",
    "plants": "plant",
    "roadsigns": "sign",
    "tools": "tool",
    "vehicles": "vehicle",
}
# folders of drawings, some of them finely shaded
DRAWN = {"cartoon", "easter"}
# hardly two pixels of a photograph are the same, many of a drawing are; fewer colors than that are a tiny picture
MIN_COLORS_PER_PIXEL = 0.25
MIN_COLORS = 500
# the first sentence names what is shown, if it begins like a name and does not go on to explain it
NAME = re.compile(r"(?:an?|the) .+?(?=[.!?](?: |$)|$)", re.IGNORECASE)
MAX_WORDS = 9


def _is_photograph(path: Path) -> bool:
    pixels = np.asarray(Image.open(path).convert("RGBA"))  # (height, width, 4)
    opaque = pixels[pixels[..., 3] > 200][:, :3].astype(int)  # (pixels, 3)
    colors = len(np.unique(opaque @ [1, 256, 256**2]))
    return colors >= max(MIN_COLORS, MIN_COLORS_PER_PIXEL * len(opaque))


@lru_cache(maxsize=1)
def _stamps() -> tuple[Picture, ...]:
    """Every photograph with a caption that names it, once, in the order of the paths."""
    found = {}
    for path in sorted(FOLDER.rglob("*.png")):
        folders = path.relative_to(FOLDER).parts[:-1]
        described = path.with_suffix(".txt")
        if DRAWN.intersection(folders) or not described.exists():
            continue
        name = NAME.match(described.read_text(encoding="utf-8").partition("\n")[0].strip())
        if name is None or len(name[0].split()) > MAX_WORDS or not _is_photograph(path):
            continue
        caption = name[0].lower()
        group = next((GROUPS[folder] for folder in reversed(folders) if folder in GROUPS), None)
        # the digits of an amount say nothing alone
        keywords = tuple(word for word in keywords_of(caption, group) if word[0].isalpha())
        stamp = Picture("-".join(("stamps", *folders, path.stem)), path, (caption,), group, keywords)
        # one is in two folders
        found.setdefault(hashlib.sha256(path.read_bytes()).digest(), stamp)
    if not found:
        raise FileNotFoundError(f"no stamps in {FOLDER}: sudo apt-get install tuxpaint-stamps-default")
    return tuple(found.values())


def load_stamps(split: str, task: str = "caption") -> list[Sample]:
    """Photographs of things, cut out, on white. Drawings, stamps without a caption, and those whose caption does not
    name what they show but remarks on it are left out.

    Args:
        split: `"validation"` or `"test"`, a half of the captions each.
        task: `"caption"`, `"retrieval"` or `"vqa"`: as of `load_openmoji`, with the folder as the group.

    Raises:
        ValueError: for another split or task.
        FileNotFoundError: without the stamps.
    """
    if split not in HELD_OUT_SPLITS:
        raise ValueError(f"stamps are for testing: split must be {' or '.join(HELD_OUT_SPLITS)}, got {split!r}")
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    stamps = _stamps()
    chosen = [stamp for stamp in stamps if held_out_split_of(f"stamps-{stamp.names[0]}") == split]
    if task == "vqa":
        return [sample for stamp in chosen for sample in stamp.questions(stamps)]
    return [stamp.described(task) for stamp in chosen]
