"""One sample schema for every data set and task."""

import functools
import hashlib
import io
import logging
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import ExifTags, Image, ImageCms
from tqdm.auto import tqdm


logger = logging.getLogger(__name__)

TASKS = ("vqa", "caption", "retrieval")
SPLITS = ("train", "validation", "test")
# of what is never trained on
HELD_OUT_SPLITS = SPLITS[1:]
# what captions and retrieval ask, in every data set
CAPTION_QUESTION = "describe the picture."
# pixels of the longer side of a rendered drawing: no supported checkpoint takes larger images, so none is enlarged
SVG_SIZE = 384
# how a camera was held, in EXIF -> what turns its picture upright
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# largest values of grey levels that are numbers: floats from 0 to 1, 8 and 16 bits
GREY_RANGES = (1, 255, 65535)
# of what is left out so many are named, all are counted
NAMED = 5
# and why
UNREADABLE, UNANSWERED, UNASKABLE = "their images cannot be read", "they have no answer", "they cannot be asked"
TESTED = "what is fitted must not know the images that are evaluated; give other training data or another split"
# longer to shorter side: LLaVA's processor enlarges the *shorter* one to 336, which makes gigabytes of a single line
MAX_ASPECT = 100


@dataclass(frozen=True, eq=False)
class StoredImage:
    """An encoded image in a table of `datasets` on disk, which is read whenever it is used: a large data set does not
    fit into memory. Equal to another one of the same content.

    Attributes:
        table, column, place: where; what stands there has a field `bytes`.
    """

    table: Any
    column: str
    place: int

    def read(self) -> bytes:
        """The content of the file."""
        return self.table[self.place][self.column]["bytes"] or b""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StoredImage) and self.read() == other.read()

    def __hash__(self) -> int:
        return hash(self.read())


AnyImage = Path | Image.Image | bytes | StoredImage
# of a sample, what the modalities are
FIELDS = ("image", "context")


@dataclass(frozen=True)
class Sample:
    """An image, a context passage and a question, with the accepted answers.

    Attributes:
        id: unique and stable; corruptions draw their randomness from it and errors name it.
        image: a file (SVG too), an encoded file's bytes or their place in a table, a PIL image, or `None` where the
            image is missing. Files and bytes are decoded by `load_image` alone, so that a data set loads fast and a
            broken image names its sample.
        context: a passage that describes the image, or `None` where it is missing.
        question: what is asked of both.
        answers: accepted answers, the first one is the training target.
        task: `"vqa"`, `"caption"` or `"retrieval"`.
        damage: of image and context, 0 (clean) to 1 (missing or another sample's); set by `corrupt`.
        images, contexts: further images, of any form that `image` takes, and further passages.
        damaged_sources: of its images and then its passages that hold anything, counted from 1, those that a condition
            of the evaluation has damaged.

    Halves of surrogate pairs, which JSON may hold and neither tokenizers nor files take, become U+FFFD in all texts.
    """

    id: str
    image: AnyImage | None
    context: str | None
    question: str
    answers: tuple[str, ...] = ()
    task: str = "vqa"
    damage: tuple[float, float] = (0.0, 0.0)
    images: tuple[AnyImage, ...] = ()
    contexts: tuple[str, ...] = ()
    damaged_sources: tuple[int, ...] = ()

    def __post_init__(self):
        for name in ("id", "context", "question", "answers", "contexts"):
            value = getattr(self, name)
            fine = tuple(map(_well_formed, value)) if isinstance(value, tuple) else value and _well_formed(value)
            if fine != value:
                object.__setattr__(self, name, fine)

    def load_image(self) -> Image.Image | None:
        """The image as a viewer shows it, see `as_seen`.

        Raises:
            ValueError: naming this sample, if the file is missing, empty, truncated, no image, or too large to decode,
                or holds numbers that are no grey levels.
            ImportError: for an SVG without the `train` extra.
        """
        return None if self.image is None else self._loaded(self.image)

    def load_images(self) -> list[Image.Image]:
        """All of its images, the first one first; raises as `load_image`."""
        return [self._loaded(image) for image in (self.image, *self.images) if image is not None]

    def _loaded(self, image: AnyImage) -> Image.Image:
        image = image.read() if isinstance(image, StoredImage) else image
        try:
            return as_seen(_open(image))
        except ImportError:
            raise
        except Exception as error:  # Pillow's decoders stumble over broken files in every way, IndexErrors too
            given = f"of {len(image)} bytes" if isinstance(image, bytes) else image
            raise ValueError(f"sample {self.id!r}: image {given} cannot be read: {error}") from error

    @property
    def passages(self) -> list[str]:
        """All of its passages that hold anything, without the space around them."""
        found = (passage.strip() for passage in (self.context, *self.contexts) if passage)
        return [passage for passage in found if passage]

    @property
    def has_several(self) -> bool:
        """Whether it has several images or several passages."""
        return bool(self.images) or len(self.passages) > 1

    @property
    def source_names(self) -> tuple[str, ...]:
        """What its weights are of: image and context, or each image and each passage where there are several."""
        if not self.has_several:
            return FIELDS
        named = zip(FIELDS, (len(self.images) + (self.image is not None), len(self.passages)), strict=True)
        return tuple(f"{name} {number}" for name, count in named for number in range(1, count + 1))

    def replace(self, **changes) -> "Sample":
        """A copy with some fields changed."""
        return replace(self, **changes)


def holds(value: AnyImage | str | None) -> bool:
    """Whether there is an image, or a passage that says anything."""
    return bool(value.strip()) if isinstance(value, str) else value is not None


def split_of(sample_id: str) -> str:
    """`"train"` (80%), `"validation"` (10%) or `"test"` (10%), by a hash: an id is in the same split whatever else is
    in the data and in whatever order."""
    share = int.from_bytes(hashlib.sha256(sample_id.encode()).digest()[:8], "big") / 2**64
    return "train" if share < 0.8 else "validation" if share < 0.9 else "test"


def held_out_split_of(sample_id: str) -> str:
    """`"validation"` or `"test"`, a half each, by a hash: for what is never trained on."""
    return HELD_OUT_SPLITS[hashlib.sha256(sample_id.encode()).digest()[0] % 2]


def image_key(image: AnyImage | None) -> str | None:
    """What is the same for one image however it is referred to, and another for another: the SHA-256 of its encoded
    content, or of the pixels of a PIL image. A file that cannot be read has its path, no image has `None`."""
    if image is None:
        return None
    if isinstance(image, Image.Image):
        return hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).hexdigest()
    if isinstance(image, bytes | StoredImage):
        return hashlib.sha256(image if isinstance(image, bytes) else image.read()).hexdigest()
    try:
        found = image.stat()
        return _file_key(image, found.st_size, found.st_mtime_ns)
    except (OSError, ValueError):  # a path with a zero byte in it
        return str(image)


@functools.lru_cache(maxsize=2**20)
def _file_key(path: Path, size: int, modified: int) -> str:
    """Of a file that has not changed since, a reading is enough."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def image_keys(samples: Sequence[Sample]) -> list[str | None]:
    """The `image_key` of each sample's first image."""
    with ThreadPoolExecutor() as pool:
        keys = pool.map(lambda sample: image_key(sample.image), samples)
        return list(tqdm(keys, desc="reading images", total=len(samples), unit="", delay=3))


def kept(
    samples: Sequence[Sample],
    split: Callable[[Sequence[Sample]], tuple[list[Sample], dict[str, str]]],
    why: str,
    left_out: dict[str, str] | None = None,
) -> list[Sample]:
    """The samples that can be used; the others are named, counted and left out.

    Before a run rather than during it, so that no sample costs the others their result, and what a step of training
    sees depends on neither workers nor resumption.

    Args:
        split: into samples that can be used and the errors of the others by id.
        why: what the others have in common.
        left_out: the errors are added to it.

    Raises:
        ValueError: if none is left.
    """
    good, failed = split(samples)
    if not good:
        raise ValueError(
            f"none of the {len(samples)} samples can be used: {why}; {next(iter(failed.values()), 'there is none')}"
        )
    warn_left_out(failed.values(), len(samples), why)
    if left_out is not None:
        left_out |= failed
    return good


def warn_left_out(errors: Collection[str], total: int, why: str) -> None:
    """Names the first `NAMED` of those that are left out, and says how many there are."""
    for error in islice(errors, NAMED):
        logger.warning(f"left out: {error}")
    if errors:
        logger.warning(f"{len(errors)} of {total} samples left out: {why}")


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


def as_seen(image: Image.Image) -> Image.Image:
    """What a viewer shows of an image: its first frame in sRGB, upright, transparency over white. One that is more
    than `MAX_ASPECT` times as long as wide loses its ends.

    Raises:
        ValueError: as `to_rgb`.
        OSError: if the file is truncated.
    """
    image.load()
    rgb = to_rgb(image)
    try:
        turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # whatever Pillow's parser stumbles over: broken EXIF data are no reason to lose the pixels
        turn = None
    return trimmed(rgb if turn is None else rgb.transpose(turn))


def trimmed(image: Image.Image) -> Image.Image:
    """The middle of an image that is more than `MAX_ASPECT` times as long as wide; any other as it is."""
    longest = MAX_ASPECT * min(image.size)
    if max(image.size) <= longest:
        return image
    left, top = (max(0, (side - longest) // 2) for side in image.size)
    return image.crop((left, top, image.width - left, image.height - top))


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL mode as sRGB: transparency is laid over white, an embedded color profile is applied. Grey levels that
    are numbers are scaled to 8 bits: 16-bit files by their format, integers and floats by the smallest of
    `GREY_RANGES` that holds them.

    Raises:
        ValueError: for numbers outside of all ranges, negative, NaN or infinite.
    """
    profile, alpha = image.info.get("icc_profile"), None
    if image.mode.startswith(("I", "F")):
        image = _grey(image)
    if image.mode == "La":
        image = image.convert("LA")  # premultiplied grey converts to nothing else
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        image = image.convert("RGB")
    rgb = _in_srgb(image, profile)
    if alpha is not None:
        rgb.putalpha(alpha)
        rgb = Image.alpha_composite(Image.new("RGBA", rgb.size, "white"), rgb).convert("RGB")
    rgb.info = {}  # what it says of profile, transparency and orientation is done, and must not be done again
    return rgb


def _grey(image: Image.Image) -> Image.Image:
    """8 bits of modes I and F, which Pillow would clip instead of scaling."""
    values = np.asarray(image, dtype=np.float64)
    low, high = values.min(initial=0), values.max(initial=0)
    # Pillow reads 16-bit PGM as 32-bit integers
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
    ranges = GREY_RANGES[2:] if sixteen else GREY_RANGES if image.mode == "F" else GREY_RANGES[1:]
    top = next((top for top in ranges if high <= top), None)
    if low < 0 or top is None or not np.isfinite(values).all():
        accepted = " or ".join(f"0 to {top}" for top in ranges)
        raise ValueError(f"its grey levels range from {low:g} to {high:g}, expected {accepted}")
    return Image.fromarray((values * (255 / top)).round().astype(np.uint8))


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """An opaque image as RGB, by its own color profile where that can be read and fits."""
    if image.mode not in ("L", "CMYK", "LAB"):
        image = image.convert("RGB")
    if profile is not None:
        try:
            own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if image.mode == "L" and own.profile.xcolor_space.strip() == "RGB":
                image = image.convert("RGB")
            if "sRGB" not in (own.profile.profile_description or ""):
                return _converted(image, own)
        except (ImageCms.PyCMSError, OSError):  # viewers too show the pixels of a file whose profile is broken
            pass
    return _converted(image, ImageCms.createProfile("LAB")) if image.mode == "LAB" else image.convert("RGB")


def _converted(image: Image.Image, profile: Any) -> Image.Image:
    converted = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    return cast(Image.Image, converted)


def split_answered(samples: Sequence[Sample]) -> tuple[list[Sample], dict[str, str]]:
    """The samples with an answer, and of the others the error by id."""
    failed = {sample.id: f"sample {sample.id!r} has no answer" for sample in samples if not sample.answers}
    return [sample for sample in samples if sample.answers], failed


def split_readable(samples: Sequence[Sample], show_progress: bool = True) -> tuple[list[Sample], dict[str, str]]:
    """The samples whose images can be read, and of the others the error by id. A file is read once."""

    def problem(sample: Sample) -> str | None:
        try:
            sample.load_images()
        except ValueError as error:
            return str(error)
        return None

    def files(sample: Sample) -> tuple[Any, ...]:
        return tuple(i if isinstance(i, Path) else id(i) for i in (sample.image, *sample.images))

    checked = {files(sample): sample for sample in samples}
    with ThreadPoolExecutor() as pool:
        found = tqdm(
            pool.map(problem, checked.values()),
            desc="checking images",
            total=len(checked),
            unit="",
            disable=not show_progress,
        )
        broken = {key for key, error in zip(checked, found, strict=True) if error is not None}
    # an error names its own sample
    failed = {sample.id: cast(str, problem(sample)) for sample in samples if files(sample) in broken}
    return [sample for sample in samples if files(sample) not in broken], failed


def split_apart(samples: Sequence[Sample], keys: Collection[str | None]) -> tuple[list[Sample], dict[str, str]]:
    """The samples none of whose images has one of these keys, and of the others the error by id."""
    firsts = zip(samples, image_keys(samples), strict=True)
    found = {s.id: {first, *map(image_key, s.images)} - {None} for s, first in firsts}
    failed = {
        id_: f"sample {id_!r} has an image that is evaluated" for id_, own in found.items() if not own.isdisjoint(keys)
    }
    return [sample for sample in samples if sample.id not in failed], failed
