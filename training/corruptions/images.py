"""Image corruptions: PIL image, severity 1..5, generator -> PIL image of the same size."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps


def _level(severity: int, *levels: float) -> float:
    return levels[severity - 1]


def _pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float32)


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def noise(image: Image.Image, severity: int, generator: np.random.Generator) -> Image.Image:
    """Gaussian noise on every pixel and channel."""
    pixels = _pixels(image)
    return _image(pixels + 255 * _level(severity, 0.1, 0.2, 0.35, 0.5, 0.7) * generator.standard_normal(pixels.shape))


def black(image: Image.Image, severity: int, generator: np.random.Generator) -> Image.Image:
    """A black image: what a broken camera or decoder delivers."""
    return Image.new("RGB", image.size)


def blur(image: Image.Image, severity: int, generator: np.random.Generator) -> Image.Image:
    """Gaussian blur, its radius relative to the image."""
    return image.filter(ImageFilter.GaussianBlur(_level(severity, 0.02, 0.04, 0.08, 0.12, 0.16) * max(image.size)))


def occlusion(image: Image.Image, severity: int, generator: np.random.Generator) -> Image.Image:
    """A gray rectangle over 30 to 90 percent of the image."""
    side = _level(severity, 0.3, 0.45, 0.6, 0.75, 0.9) ** 0.5
    width, height = round(side * image.width), round(side * image.height)
    left, top = generator.integers(0, [image.width - width + 1, image.height - height + 1])
    image = image.copy()
    image.paste((127, 127, 127), (int(left), int(top), int(left) + width, int(top) + height))
    return image


def invert(image: Image.Image, severity: int, generator: np.random.Generator) -> Image.Image:
    """Inverted colors, mixed with the original below severity 3."""
    return Image.blend(image, ImageOps.invert(image), _level(severity, 0.7, 0.85, 1.0, 1.0, 1.0))


def dark(image: Image.Image, severity: int, generator: np.random.Generator) -> Image.Image:
    """Underexposure."""
    return _image(_pixels(image) * _level(severity, 0.6, 0.4, 0.25, 0.15, 0.08))


def low_contrast(image: Image.Image, severity: int, generator: np.random.Generator) -> Image.Image:
    """Contrast reduced towards mid gray, as in fog."""
    return _image(127 + (_pixels(image) - 127) * _level(severity, 0.5, 0.3, 0.2, 0.1, 0.05))


def pixelate(image: Image.Image, severity: int, generator: np.random.Generator) -> Image.Image:
    """Large square pixels."""
    cells = int(_level(severity, 16, 10, 7, 5, 3))
    return image.resize((cells, cells), Image.Resampling.BOX).resize(image.size, Image.Resampling.NEAREST)


def stripes(image: Image.Image, severity: int, generator: np.random.Generator) -> Image.Image:
    """Diagonal stripes of a random color over the image, as behind a fence."""
    pixels, period = _pixels(image).copy(), image.width / 6
    rows, columns = np.mgrid[: image.height, : image.width]
    covered = ((rows + columns + generator.uniform(0, period)) % period) < period * _level(
        severity, 0.3, 0.45, 0.6, 0.75, 0.85
    )
    pixels[covered] = generator.uniform(0, 255, 3)
    return _image(pixels)


def jigsaw(image: Image.Image, severity: int, generator: np.random.Generator) -> Image.Image:
    """Tiles of the image in random order."""
    tiles = int(_level(severity, 2, 3, 4, 6, 8))
    edges_x = np.linspace(0, image.width, tiles + 1).astype(int)
    edges_y = np.linspace(0, image.height, tiles + 1).astype(int)
    out = Image.new("RGB", image.size)
    for target, source in enumerate(generator.permutation(tiles * tiles)):
        (to_y, to_x), (from_y, from_x) = divmod(target, tiles), divmod(int(source), tiles)
        tile = image.crop((edges_x[from_x], edges_y[from_y], edges_x[from_x + 1], edges_y[from_y + 1]))
        size = (int(edges_x[to_x + 1] - edges_x[to_x]), int(edges_y[to_y + 1] - edges_y[to_y]))
        out.paste(tile.resize(size), (int(edges_x[to_x]), int(edges_y[to_y])))
    return out


def solarize(image: Image.Image, severity: int, generator: np.random.Generator) -> Image.Image:
    """Values above a threshold inverted."""
    return ImageOps.solarize(image, int(_level(severity, 220, 190, 160, 130, 100)))


def color_cast(image: Image.Image, severity: int, generator: np.random.Generator) -> Image.Image:
    """One channel pair strengthened and the others weakened, as under colored light."""
    gain = generator.permutation([1.0, 1.0 - _level(severity, 0.3, 0.45, 0.6, 0.75, 0.9), 1.0])
    return _image(_pixels(image) * gain)


def salt_and_pepper(image: Image.Image, severity: int, generator: np.random.Generator) -> Image.Image:
    """A share of the pixels black or white."""
    pixels = _pixels(image).copy()
    draw = generator.random(pixels.shape[:2])
    share = _level(severity, 0.05, 0.1, 0.2, 0.35, 0.5)
    pixels[draw < share] = 255
    pixels[draw < share / 2] = 0
    return _image(pixels)


def clutter(image: Image.Image, severity: int, generator: np.random.Generator) -> Image.Image:
    """Colored discs, boxes and triangles scattered over the image, as stickers or raindrops on a lens."""
    image = image.copy()
    draw = ImageDraw.Draw(image)
    for _ in range(int(_level(severity, 2, 4, 7, 11, 16))):
        size = generator.uniform(0.1, 0.25) * max(image.size)
        x, y = generator.uniform(0, image.size)
        color = tuple(int(value) for value in generator.integers(0, 256, 3))
        kind = generator.integers(3)
        box = (x - size / 2, y - size / 2, x + size / 2, y + size / 2)
        if kind == 0:
            draw.ellipse(box, fill=color)
        elif kind == 1:
            draw.rectangle(box, fill=color)
        else:
            draw.polygon([(box[0], box[3]), (box[2], box[3]), (x, box[1])], fill=color)
    return image


def channel_swap(image: Image.Image, severity: int, generator: np.random.Generator) -> Image.Image:
    """Color channels rotated: looks like a clean image of another color, so it counts as a conflict."""
    red, green, blue = image.split()
    return Image.merge("RGB", (green, blue, red))


IMAGE_CORRUPTIONS: dict[str, Callable[[Image.Image, int, np.random.Generator], Image.Image]] = {
    function.__name__: function
    for function in (
        noise,
        black,
        blur,
        occlusion,
        invert,
        dark,
        low_contrast,
        pixelate,
        stripes,
        jigsaw,
        solarize,
        color_cast,
        salt_and_pepper,
        clutter,
        channel_swap,
    )
}
