"""The drawings of OpenMoji's training split in a style that is not trained on: those of the font Noto Color Emoji (SIL
Open Font License 1.1), read where it is installed."""

import hashlib
import io
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont, features

from modeling_dms.training.data.openmoji import Drawing, drawings_of, samples_of
from modeling_dms.training.data.samples import HELD_OUT_SPLITS, TASKS, Sample, held_out_split_of


FONT = "NotoColorEmoji.ttf"
# the font holds bitmaps of this one size, 136 pixels wide
FONT_SIZE = 109
WIDTH = 136


def _font() -> ImageFont.FreeTypeFont:
    # without Raqm a sequence such as a family comes out as its parts
    if not features.check("raqm"):
        raise ImportError("noto needs Raqm, which Pillow has if it finds FriBiDi: sudo apt-get install libfribidi0")
    try:
        return ImageFont.truetype(FONT, FONT_SIZE)
    except OSError as error:
        raise FileNotFoundError(f"noto needs the font {FONT}: sudo apt-get install fonts-noto-color-emoji") from error


@lru_cache(maxsize=1)
def _glyphs() -> tuple[tuple[Drawing, str, bytes], ...]:
    """Drawing, split and PNG of every symbol of OpenMoji's training split for which the font has one glyph."""
    font = _font()
    found, concepts = [], {}
    for drawing in drawings_of("train"):
        left, top, right, bottom = font.getbbox(drawing.symbol)
        # a symbol that the font lacks is empty, a sequence that it lacks is several glyphs side by side
        if top >= bottom or right - left > WIDTH:
            continue
        image = Image.new("RGB", (WIDTH, WIDTH), "white")
        corner = (WIDTH - left - right) / 2, (WIDTH - top - bottom) / 2
        ImageDraw.Draw(image).text(corner, drawing.symbol, font=font, embedded_color=True)
        file = io.BytesIO()
        image.save(file, "PNG", compress_level=1)
        # glyphs that some concepts share (the flags of Norway and Svalbard) must not straddle splits
        concept = concepts.setdefault(hashlib.sha256(file.getvalue()).digest(), drawing.concept)
        found.append((drawing, held_out_split_of(f"noto-{concept}"), file.getvalue()))
    return tuple(found)


def load_noto(split: str, task: str = "caption") -> list[Sample]:
    """OpenMoji's training split with Noto's glyphs: a model has been trained on the names, questions and contexts, but
    not on the style. What the installed version of the font has no glyph for is left out.

    Args:
        split: `"validation"` or `"test"`, a half of the concepts each; they share no glyph.
        task: `"caption"`, `"retrieval"` or `"vqa"`, with the samples that `load_openmoji` gives.

    Raises:
        ValueError: for another split or task.
        FileNotFoundError: without the font.
        ImportError: without the `train` extra, or if Pillow has no Raqm.
    """
    if split not in HELD_OUT_SPLITS:
        raise ValueError(f"noto is for testing: split must be {' or '.join(HELD_OUT_SPLITS)}, got {split!r}")
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    return [
        sample.replace(id=sample.id.replace("openmoji", "noto", 1), image=png)
        for drawing, own_split, png in _glyphs()
        if own_split == split
        for sample in samples_of(drawing, task)
    ]
