"""One sample schema for every data set and task."""

import hashlib
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
from PIL import Image, ImageOps
from tqdm.auto import tqdm


TASKS = ("vqa", "caption", "retrieval")
SPLITS = ("train", "validation", "test")
# of what is never trained on
HELD_OUT_SPLITS = SPLITS[1:]
# what captions and retrieval ask, in every data set
CAPTION_QUESTION = "describe the picture."
# pixels of the longer side of a rendered drawing: no supported checkpoint takes larger images, so none is enlarged
SVG_SIZE = 384
# longer to shorter side: LLaVA's processor enlarges the *shorter* one to 336, which makes gigabytes of a single line
MAX_ASPECT = 100


@dataclass(frozen=True)
class Sample:
    """An image, a context passage and a question, with the accepted answers.

    Attributes:
        id: unique and stable; corruptions draw their randomness from it and errors name it.
        image: a file (SVG too), an encoded file's bytes, a PIL image, or `None` where the image is missing. Files and
            bytes are decoded by `load_image` alone, so that a data set loads fast and a broken image names its sample.
        context: a passage that describes the image, or `None` where it is missing.
        question: what is asked of both.
        answers: accepted answers, the first one is the training target.
        task: `"vqa"`, `"caption"` or `"retrieval"`.
        damage: of image and context, 0 (clean) to 1 (missing or another sample's); set by `corrupt`.

    Halves of surrogate pairs, which JSON may hold and neither tokenizers nor files take, become U+FFFD in all texts.
    """

    id: str
    image: Path | Image.Image | bytes | None
    context: str | None
    question: str
    answers: tuple[str, ...] = ()
    task: str = "vqa"
    damage: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self):
        for name in ("id", "context", "question", "answers"):
            value = getattr(self, name)
            fine = tuple(map(_well_formed, value)) if isinstance(value, tuple) else value and _well_formed(value)
            if fine != value:
                object.__setattr__(self, name, fine)

    def load_image(self) -> Image.Image | None:
        """The image as RGB, upright: transparency over white, 16-bit grey scaled to 8 bits. One that is more than
        `MAX_ASPECT` times as long as wide loses its ends.

        Raises:
            ValueError: naming this sample, if the file is missing, empty, truncated, no image, or too large to decode.
            ImportError: for an SVG without the `train` extra.
        """
        if self.image is None:
            return None
        try:
            return trimmed(to_rgb(_upright(_open(self.image))))
        except ImportError:
            raise
        except Exception as error:  # Pillow's decoders stumble over broken files in every way, IndexErrors too
            given = f"of {len(self.image)} bytes" if isinstance(self.image, bytes) else self.image
            raise ValueError(f"sample {self.id!r}: image {given} cannot be read: {error}") from error

    def replace(self, **changes) -> "Sample":
        """A copy with some fields changed."""
        return replace(self, **changes)


def split_of(sample_id: str) -> str:
    """`"train"` (80%), `"validation"` (10%) or `"test"` (10%), by a hash: an id is in the same split whatever else is
    in the data and in whatever order."""
    share = int.from_bytes(hashlib.sha256(sample_id.encode()).digest()[:8], "big") / 2**64
    return "train" if share < 0.8 else "validation" if share < 0.9 else "test"


def held_out_split_of(sample_id: str) -> str:
    """`"validation"` or `"test"`, a half each, by a hash: for what is never trained on."""
    return HELD_OUT_SPLITS[hashlib.sha256(sample_id.encode()).digest()[0] % 2]


def _well_formed(text: str) -> str:
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _open(image: Path | Image.Image | bytes) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, bytes):
        return Image.open(io.BytesIO(image))
    if image.suffix.lower() != ".svg":
        return Image.open(image)
    try:
        import resvg_py
    except ImportError as error:
        raise ImportError('SVG images need resvg-py: pip install "modeling-dms[train]"') from error
    # without the system's fonts a drawing is the same on every machine
    png = resvg_py.svg_to_bytes(
        svg_string=image.read_text(encoding="utf-8"), width=SVG_SIZE, height=SVG_SIZE, skip_system_fonts=True
    )
    return Image.open(io.BytesIO(png))


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF data say that the camera was held."""
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # whatever Pillow's parser stumbles over: broken EXIF data are no reason to lose the pixels
        return image


def trimmed(image: Image.Image) -> Image.Image:
    """The middle of an image that is more than `MAX_ASPECT` times as long as wide; any other as it is."""
    longest = MAX_ASPECT * min(image.size)
    if max(image.size) <= longest:
        return image
    left, top = (max(0, (side - longest) // 2) for side in image.size)
    return image.crop((left, top, image.width - left, image.height - top))


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL mode as RGB: transparency is laid over white, 16-bit and float grey are scaled to 8 bits."""
    if image.mode.startswith(("I", "F")):
        # Pillow clips instead of scaling when it converts these modes
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        values = values / 257 if values.max(initial=0) > 255 else values
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def split_readable(samples: Sequence[Sample], show_progress: bool = True) -> tuple[list[Sample], dict[str, str]]:
    """The samples whose image can be read, and of the others the error by id. A file is read once."""

    def problem(sample: Sample) -> str | None:
        try:
            sample.load_image()
        except ValueError as error:
            return str(error)
        return None

    files = {sample.image: sample for sample in samples if isinstance(sample.image, Path)}
    rest = [sample for sample in samples if not isinstance(sample.image, Path)]
    checked = [*files.values(), *rest]
    with ThreadPoolExecutor() as pool:
        found = list(
            tqdm(
                pool.map(problem, checked),
                desc="checking images",
                total=len(checked),
                unit="",
                disable=not show_progress,
            )
        )
    broken = {image for image, error in zip(files, found, strict=False) if error is not None}
    failed = {s.id: error for s, error in zip(rest, found[len(files) :], strict=True) if error is not None}
    # an error names its own sample
    failed |= {s.id: cast(str, problem(s)) for s in samples if isinstance(s.image, Path) and s.image in broken}
    return [sample for sample in samples if sample.id not in failed], failed
