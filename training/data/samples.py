"""One sample schema for every data set and task."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
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
        damage: of image and context, 0 (clean) to 1 (missing or another sample's); set by `corrupt`.
    """

    id: str
    image: Path | Image.Image | None
    context: str | None
    question: str
    answers: tuple[str, ...] = ()
    task: str = "vqa"
    damage: tuple[float, float] = (0.0, 0.0)

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
