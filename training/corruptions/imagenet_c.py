"""The 19 image corruptions of ImageNet-C (Hendrycks and Dietterich, ICLR 2019; arXiv 1903.12261) from the package
`imagecorruptions-imaug`: PIL image, severity 1..5, generator -> PIL image of the same size.

Their strengths are set for images of about 224 pixels; on smaller ones the blurs and the spatter cover more.
"""

import threading
from collections.abc import Callable
from functools import partial

import numpy as np
from PIL import Image


MIN_SIZE = 32
# these two ignore numpy's global generator and take a `seed`
SEEDED = ("glass_blur", "impulse_noise")
_global_generator = threading.Lock()


def _corrupt(kind: str, image: Image.Image, severity: int, generator: np.random.Generator) -> Image.Image:
    if min(image.size) < MIN_SIZE:
        size = f"{image.width}x{image.height}"
        raise ValueError(f"ImageNet-C corruptions take images of at least {MIN_SIZE}x{MIN_SIZE} pixels, got {size}")
    try:
        from imagecorruptions import corruption_dict
    except ImportError as error:
        raise ImportError(
            'ImageNet-C corruptions need the package imagecorruptions-imaug: pip install "modeling-dms[eval]"'
        ) from error
    seed = int(generator.integers(2**32))
    # the package draws from numpy's global generator, which belongs to the caller
    with _global_generator, np.errstate(invalid="ignore"):
        state = np.random.get_state()
        np.random.seed(seed)
        try:
            corrupted = corruption_dict[kind](image, severity, **({"seed": seed} if kind in SEEDED else {}))
        finally:
            np.random.set_state(state)
    # a spatter of which no drop falls on a small image is 0 / 0
    corrupted = np.asarray(corrupted)
    return Image.fromarray(np.where(np.isfinite(corrupted), corrupted, np.asarray(image)).astype(np.uint8))


IMAGENET_C: dict[str, Callable[[Image.Image, int, np.random.Generator], Image.Image]] = {
    f"imagenet_c/{kind}": partial(_corrupt, kind)
    for kind in (
        "gaussian_noise",
        "shot_noise",
        "impulse_noise",
        "speckle_noise",
        "defocus_blur",
        "glass_blur",
        "motion_blur",
        "zoom_blur",
        "gaussian_blur",
        "snow",
        "frost",
        "fog",
        "spatter",
        "brightness",
        "contrast",
        "saturate",
        "elastic_transform",
        "pixelate",
        "jpeg_compression",
    )
}
