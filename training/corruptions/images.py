"""Image corruptions: PIL image, severity 1..5, generator -> PIL image of the same size."""

import io
import itertools
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


def overexposed(image: Image.Image, severity: int, generator: np.random.Generator) -> Image.Image:
    """Too much light: values above a limit burn out to white."""
    return _image(_pixels(image) * _level(severity, 1.3, 1.7, 2.5, 4.0, 7.0))


def fog(image: Image.Image, severity: int, generator: np.random.Generator) -> Image.Image:
    """Patches of white haze, smooth and uneven."""
    haze = Image.fromarray(generator.integers(0, 256, (4, 4), dtype=np.uint8))
    density = np.asarray(haze.resize(image.size, Image.Resampling.BICUBIC), dtype=np.float32)[..., None] / 255
    density = np.clip(density * 0.6 + _level(severity, 0.1, 0.25, 0.4, 0.55, 0.7), 0, 0.97)
    return _image(_pixels(image) * (1 - density) + 255 * density)


def jpeg(image: Image.Image, severity: int, generator: np.random.Generator) -> Image.Image:
    """JPEG compression of quality 25 down to 1."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=int(_level(severity, 25, 15, 8, 4, 1)))
    return Image.open(file).convert("RGB")


def posterize(image: Image.Image, severity: int, generator: np.random.Generator) -> Image.Image:
    """Few levels a channel."""
    steps = int(_level(severity, 8, 6, 4, 3, 2)) - 1
    return _image(np.round(_pixels(image) / 255 * steps) / steps * 255)


def glitch(image: Image.Image, severity: int, generator: np.random.Generator) -> Image.Image:
    """Bands of rows displaced sideways, channel by channel, as after a transmission error."""
    pixels = _pixels(image).copy()
    share = _level(severity, 0.1, 0.2, 0.3, 0.4, 0.5)
    edges = np.sort(generator.integers(0, image.height + 1, 6 + 2 * severity))
    for top, bottom in itertools.pairwise(edges):
        for channel in range(3):
            shift = int(generator.uniform(-share, share) * image.width)
            pixels[top:bottom, :, channel] = np.roll(pixels[top:bottom, :, channel], shift, axis=1)
    return _image(pixels)


def swirl(image: Image.Image, severity: int, generator: np.random.Generator) -> Image.Image:
    """The picture twisted around a random point near its center."""
    pixels = _pixels(image)
    rows, columns = np.mgrid[: image.height, : image.width].astype(np.float32)
    center_y, center_x = generator.uniform(0.35, 0.65, 2) * (image.height, image.width)
    y, x = rows - center_y, columns - center_x
    radius = np.hypot(y, x)
    angle = np.arctan2(y, x) + _level(severity, 1, 2, 4, 6, 9) * np.exp(-radius / (0.25 * max(image.size)))
    source_y = (center_y + radius * np.sin(angle)).round().astype(int).clip(0, image.height - 1)
    source_x = (center_x + radius * np.cos(angle)).round().astype(int).clip(0, image.width - 1)
    return _image(pixels[source_y, source_x])


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
        overexposed,
        fog,
        jpeg,
        posterize,
        glitch,
        swirl,
        channel_swap,
    )
}
