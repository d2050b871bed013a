"""Generic corruptions that calibration makes of its own clean samples: plain tensor operations on what the processor
returns.

They belong to no data set. A family used here never counts as unseen in an evaluation.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


IMAGE_FAMILIES = ("noise", "blank", "blur", "occlusion")
TEXT_FAMILIES = ("word_drop", "random_words", "shuffle")


def _uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(count, generator=generator)


def corrupt_images(pixel_values: Tensor, family: str, generator: torch.Generator) -> Tensor:
    """Corrupted images, each with its own random strength.

    Args:
        pixel_values: (images, 3, H, W), normalised as the processor does it.
        family: one of `IMAGE_FAMILIES`.
        generator: on the CPU.
    """
    images = pixel_values.float()
    count, _, height, width = images.shape
    spread = images.std().clamp_min(1e-3)
    if family == "noise":
        strength = _uniform(count, 0.2, 1.5, generator).to(images)[:, None, None, None]
        drawn = torch.randn(images.shape, generator=generator).to(images)
        out = images + strength * spread * drawn
        return out.clamp(images.amin(), images.amax()).to(pixel_values.dtype)
    if family == "blank":
        # one value everywhere, from the darkest to the lightest the data show
        share = _uniform(count, 0, 1, generator).to(images)[:, None, None, None]
        level = images.amin() + share.round(decimals=1) * (images.amax() - images.amin())
        return level.expand_as(images).to(pixel_values.dtype)
    if family == "blur":
        return torch.cat([_blur(image[None], generator) for image in images]).to(pixel_values.dtype)
    if family == "occlusion":
        out = images.clone()
        side = _uniform(count, 0.3, 0.9, generator).sqrt()
        place = torch.rand(count, 3, generator=generator)
        for image, s, (x, y, share) in zip(out, side.tolist(), place.tolist(), strict=True):
            h, w = max(1, round(s * height)), max(1, round(s * width))
            top, left = round(y * (height - h)), round(x * (width - w))
            image[:, top : top + h, left : left + w] = images.amin() + share * (images.amax() - images.amin())
        return out.to(pixel_values.dtype)
    raise ValueError(f"family must be one of {', '.join(IMAGE_FAMILIES)}, got {family!r}")


def _blur(image: Tensor, generator: torch.Generator) -> Tensor:
    sigma = float(_uniform(1, 0.02, 0.12, generator)) * max(image.shape[-2:])
    radius = max(1, round(2.5 * sigma))
    kernel = torch.exp(-torch.arange(-radius, radius + 1, device=image.device).float().pow(2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(image.shape[1], 1, 1, -1)
    image = F.pad(image, (radius, radius, radius, radius), mode="replicate")
    image = F.conv2d(image, kernel, groups=image.shape[1])
    return F.conv2d(image, kernel.transpose(2, 3), groups=image.shape[1])


def corrupt_texts(
    input_ids: Tensor, is_text: Tensor, family: str, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Corrupted texts, each with its own random strength.

    Args:
        input_ids: (B, L).
        is_text: (B, L), True at the tokens of the text modality; only these change.
        family: one of `TEXT_FAMILIES`.
        generator: on the CPU.

    Returns:
        `input_ids` and `is_text` of the same shapes; a dropped token is no longer text, and at least one stays.
    """
    if family not in TEXT_FAMILIES:
        raise ValueError(f"family must be one of {', '.join(TEXT_FAMILIES)}, got {family!r}")
    ids, keep = input_ids.cpu().clone(), is_text.cpu().clone()
    pool = ids[keep]
    for row in range(len(ids)):
        places = keep[row].nonzero()[:, 0]
        count = len(places)
        if count == 0:
            continue
        if family == "word_drop":
            order = torch.randperm(count, generator=generator)
            dropped = round(float(_uniform(1, 0.3, 0.9, generator)) * count)
            keep[row, places[order[: min(max(dropped, 1), count - 1)]]] = False
        elif family == "random_words":
            # tokens of the whole batch, at their own frequency: words of this data's language, but not this text
            changed = torch.randperm(count, generator=generator)[
                : max(1, round(float(_uniform(1, 0.5, 1, generator)) * count))
            ]
            drawn = torch.randint(len(pool), (len(changed),), generator=generator)
            ids[row, places[changed]] = pool[drawn]
        else:
            ids[row, places] = ids[row, places[torch.randperm(count, generator=generator)]]
    return ids.to(input_ids.device), keep.to(is_text.device)
