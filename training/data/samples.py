"""One sample schema for every data set and task."""

from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image


@dataclass(frozen=True)
class Sample:
    """An image, a context passage and a question, with the accepted answers.

    Attributes:
        id: unique and stable; corruptions draw their randomness from it and errors name it.
        image: a file, a PIL image, or `None` where the image is missing.
        context: a passage that describes the image, or `None` where it is missing.
        question: what is asked of both.
        answers: accepted answers, the first one is the training target.
        task: `"vqa"`, `"caption"` or `"retrieval"`.
    """

    id: str
    image: Path | Image.Image | None
    context: str | None
    question: str
    answers: tuple[str, ...] = ()
    task: str = "vqa"

    def load_image(self) -> Image.Image | None:
        """The image as RGB: transparency over white, 16-bit grey scaled to 8 bits.

        Raises:
            ValueError: naming this sample, if the file is missing, empty, truncated, no image, or too large to decode.
        """
        if self.image is None:
            return None
        try:
            image = self.image if isinstance(self.image, Image.Image) else Image.open(self.image)
            return to_rgb(image)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"sample {self.id!r}: image {self.image} cannot be read: {error}") from error

    def replace(self, **changes) -> "Sample":
        """A copy with some fields changed."""
        return replace(self, **changes)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL mode as RGB: transparency is laid over white, 16-bit and float grey are scaled to 8 bits."""
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):
        # Pillow clips instead of scaling when it converts these modes
        image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    elif image.mode == "F":
        low, high = image.getextrema()
        image = image.point(lambda value: value * (255 / max(high, 1e-12)) + 0) if high > 255 or low < 0 else image
        image = image.convert("L")
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
