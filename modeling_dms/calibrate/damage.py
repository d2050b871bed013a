"""Damage that calibration does to copies of its own clean samples: plain tensor operations on what the processor
returns, graded in severity.

They belong to no data set. A family used here never counts as unseen in an evaluation, unless it was left out of the
calibration.
"""

from collections.abc import Callable

import torch
from torch import Generator, Tensor
from torch.nn import functional as F


TEXT_FAMILIES = ("word_drop", "random_words", "misspelt", "shuffle")


def damaged_pictures(pictures: Tensor, family: str, severity: Tensor, generator: Generator) -> Tensor:
    """Damaged copies of pictures.

    Args:
        pictures: (n, 3, H, W), black is 0 and white is 1.
        family: one of `IMAGE_FAMILIES`.
        severity: (n,), from 0, hardly to be seen, to 1, hardly anything left.
        generator: on the CPU; all that is drawn is drawn from it.

    Returns:
        (n, 3, H, W), in steps of 1 / 255 as pictures come.

    Raises:
        ValueError: for an unknown family.
    """
    if family not in IMAGE_FAMILIES:
        raise ValueError(f"family must be one of {', '.join(IMAGE_FAMILIES)}, got {family!r}")
    if len(pictures) == 0:
        return pictures.float()
    damage = IMAGE_FAMILIES[family]
    found = [damage(p, s, generator) for p, s in zip(pictures.float(), severity.tolist(), strict=True)]
    return (torch.stack(found).clamp(0, 1) * 255).round() / 255


def _between(low: float, high: float, generator: Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def _below(count: int, generator: Generator) -> int:
    return int(torch.randint(count, (), generator=generator))


def _color(generator: Generator, like: Tensor) -> Tensor:
    """A color or, half of the time, a gray: (3, 1, 1)."""
    color = torch.rand(3, 1, 1, generator=generator).to(like)
    return color if _below(2, generator) else color[:1].expand(3, 1, 1)


def _resized(picture: Tensor, size: tuple[int, int], mode: str = "bilinear") -> Tensor:
    options = {"antialias": True} if mode == "bilinear" else {}
    return F.interpolate(picture[None], size=size, mode=mode, **options)[0]


def _smoothed(picture: Tensor, sigma: float) -> Tensor:
    radius = max(1, round(2.5 * sigma))
    place = torch.arange(-radius, radius + 1, device=picture.device).float()
    kernel = torch.exp(-place.pow(2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(len(picture), 1, 1, -1)
    padded = F.pad(picture[None], (radius,) * 4, mode="replicate")
    rows = F.conv2d(padded, kernel, groups=len(picture))
    return F.conv2d(rows, kernel.transpose(2, 3), groups=len(picture))[0]


def _moved(picture: Tensor, down: int, right: int) -> Tensor:
    """Moved by some pixels; what comes in repeats the edge."""
    height, width = picture.shape[-2:]
    rows = (torch.arange(height, device=picture.device) - down).clamp(0, height - 1)
    columns = (torch.arange(width, device=picture.device) - right).clamp(0, width - 1)
    return picture[:, rows][:, :, columns]


def _noise(picture: Tensor, severity: float, generator: Generator) -> Tensor:
    """Added or multiplied noise, fine or coarse, colored or gray; or single pixels black and white."""
    kind = _below(3, generator)
    if kind == 0:
        hit = torch.rand(1, *picture.shape[1:], generator=generator).to(picture)
        share = 0.01 + 0.4 * severity
        return torch.where(hit < share / 2, 0.0, torch.where(hit < share, 1.0, picture))
    drawn = torch.randn(picture.shape, generator=generator).to(picture)
    if _between(0, 1, generator) < 0.3:
        drawn = drawn[:1].expand_as(drawn)
    if _between(0, 1, generator) < 0.5:
        drawn = _smoothed(drawn, _between(0.3, 1.2, generator))
        drawn = drawn / drawn.std().clamp_min(1e-3)
    sigma = 0.02 + 0.6 * severity**1.5
    return picture + sigma * drawn if kind == 1 else picture * (1 + 1.5 * sigma * drawn)


def _blur(picture: Tensor, severity: float, generator: Generator) -> Tensor:
    """Out of focus, or moved along a line."""
    size = max(picture.shape[-2:])
    if _below(2, generator):
        return _smoothed(picture, (0.006 + 0.12 * severity**1.5) * size)
    length = max(3, round((0.02 + 0.3 * severity) * size))
    angle = torch.tensor(_between(0, torch.pi, generator))
    down, right = float(angle.sin()), float(angle.cos())
    steps = (torch.linspace(-0.5, 0.5, length) * length).tolist()
    return torch.stack([_moved(picture, round(step * down), round(step * right)) for step in steps]).mean(0)


def _occlusion(picture: Tensor, severity: float, generator: Generator) -> Tensor:
    """One large rectangle, stripes, or many small rectangles in front."""
    height, width = picture.shape[-2:]
    kind, share = _below(3, generator), 0.05 + 0.85 * severity
    if kind == 0:
        angle = torch.tensor(_between(0, torch.pi, generator))
        rows = torch.arange(height, device=picture.device)[:, None] * float(angle.sin())
        columns = torch.arange(width, device=picture.device) * float(angle.cos())
        period = max(4.0, _between(0.06, 0.3, generator) * width)
        phase = (rows + columns + _between(0, period, generator)) % period
        return torch.where(phase < share * period, _color(generator, picture), picture)
    out = picture.clone()

    def cover(tall: float, wide: float) -> None:
        h, w = max(1, min(height, round(tall))), max(1, min(width, round(wide)))
        top, left = _below(height - h + 1, generator), _below(width - w + 1, generator)
        out[:, top : top + h, left : left + w] = _color(generator, picture)

    if kind == 1:
        tall = min(1.0, share**0.5 * _between(0.7, 1.4, generator))
        cover(tall * height, share / tall * width)
    else:
        for _ in range(1 + round(12 * severity)):
            cover(_between(0.05, 0.3, generator) * height, _between(0.05, 0.3, generator) * width)
    return out


def _blank(picture: Tensor, severity: float, generator: Generator) -> Tensor:
    """One color, through which next to nothing shows."""
    keep = 0.06 * (1 - severity)
    return keep * picture + (1 - keep) * _color(generator, picture)


def _exposure(picture: Tensor, severity: float, generator: Generator) -> Tensor:
    """Too dark, too light, too little contrast, a bent brightness curve, or haze."""
    kind = _below(5, generator)
    if kind == 0:
        return picture * (0.85 - 0.82 * severity)
    if kind == 1:
        return picture * (1.2 + 5 * severity**1.5)
    if kind == 2:
        level = _between(0.2, 0.9, generator)
        return level + (picture - level) * (0.8 - 0.77 * severity)
    if kind == 3:
        power = 1.3 + 4 * severity
        return picture.clamp_min(1e-4) ** (power if _below(2, generator) else 1 / power)
    cells = 2 + _below(4, generator)
    uneven = torch.rand(1, cells, cells, generator=generator).to(picture)
    haze = _resized(uneven, (picture.shape[1], picture.shape[2]), "bicubic").clamp(0, 1)
    density = (0.5 * haze + 0.05 + 0.75 * severity).clamp(0, 0.97)
    return picture * (1 - density) + _between(0.7, 1, generator) * density


def _colors(picture: Tensor, severity: float, generator: Generator) -> Tensor:
    """Light of another color, channels exchanged, inverted or solarized, too much saturation."""
    kind = _below(5, generator)
    if kind == 0:
        gain = 1 - (0.1 + 0.85 * severity) * torch.rand(3, 1, 1, generator=generator).to(picture)
        return picture * gain / gain.max()
    if kind == 1:
        others = ((1, 0, 2), (0, 2, 1), (2, 1, 0), (1, 2, 0), (2, 0, 1))
        exchanged = picture[list(others[_below(len(others), generator)])]
        return picture + (0.4 + 0.6 * severity) * (exchanged - picture)
    if kind == 2:
        return picture + (0.6 + 0.4 * severity) * (1 - 2 * picture)
    if kind == 3:
        gray = picture.mean(0, keepdim=True)
        return gray + (picture - gray) * (1.5 + 5 * severity)
    return torch.where(picture > 0.95 - 0.6 * severity, 1 - picture, picture)


def _resolution(picture: Tensor, severity: float, generator: Generator) -> Tensor:
    """Coarse pixels, sharp or smooth; few levels; or blocks as strong compression leaves them."""
    height, width = picture.shape[-2:]
    kind = _below(4, generator)
    if kind < 2:
        cells = max(2, round(min(height, width) / (1.6 + 24 * severity**1.5)))
        coarse = _resized(picture, (cells, cells), "area")
        return _resized(coarse, (height, width), "nearest" if kind == 0 else "bilinear")
    if kind == 2:
        levels = max(1, round(9 - 8 * severity**0.6))
        return (picture * levels).round() / levels
    # pictures are resized after their compression: blocks need not be 8 pixels wide any more
    scale = _between(0.5, 2, generator)
    size = (max(16, round(height * scale) // 8 * 8), max(16, round(width * scale) // 8 * 8))
    return _resized(_compressed(_resized(picture, size), 0.04 + 1.2 * severity**1.5), (height, width))


def _compressed(picture: Tensor, step: float) -> Tensor:
    """Quantised as JPEG does it, coarser for high frequencies and for colors; sides are multiples of 8."""
    place = torch.arange(8.0, device=picture.device)
    cosine = 0.5 * torch.cos((2 * place[None] + 1) * place[:, None] * torch.pi / 16)
    cosine = torch.where(place[:, None] == 0, 8**-0.5, cosine)
    to_luminance = picture.new_tensor([[0.299, 0.587, 0.114], [-0.169, -0.331, 0.5], [0.5, -0.419, -0.081]])
    channels = torch.einsum("ij,jhw->ihw", to_luminance, picture)
    blocks = cosine @ channels.unfold(1, 8, 8).unfold(2, 8, 8) @ cosine.T  # (3, rows, columns, 8, 8)
    steps = step * (1 + 0.35 * (place[:, None] + place)) * picture.new_tensor([1, 1.5, 1.5]).view(3, 1, 1, 1, 1)
    blocks = cosine.T @ ((blocks / steps).round() * steps) @ cosine
    channels = blocks.transpose(2, 3).reshape(channels.shape)
    return torch.einsum("ij,jhw->ihw", torch.linalg.inv(to_luminance), channels)


def _order(picture: Tensor, severity: float, generator: Generator) -> Tensor:
    """Tiles exchanged, bands shifted sideways, or everything bent."""
    height, width = picture.shape[-2:]
    kind = _below(3, generator)
    if kind == 0:
        side = min(2 + round(6 * severity), height, width)
        whole = _resized(picture, (height // side * side, width // side * side))
        tiles = whole.unflatten(1, (side, -1)).unflatten(3, (side, -1))  # (3, side, h, side, w)
        order = torch.randperm(side * side, generator=generator)
        if bool((order == torch.arange(side * side)).all()):
            order = order.roll(1)
        tiles = tiles.permute(1, 3, 0, 2, 4).flatten(0, 1)[order]
        tiles = tiles.unflatten(0, (side, side)).permute(2, 0, 3, 1, 4)
        return _resized(tiles.flatten(1, 2).flatten(2, 3), (height, width))
    if kind == 1:
        out, by_channel = picture.clone(), _between(0, 1, generator) < 0.6
        inner = torch.randint(height + 1, (4 + round(10 * severity),), generator=generator).sort().values.tolist()
        for top, bottom in zip([0, *inner], [*inner, height], strict=True):
            shifts = [_between(-1, 1, generator) * (0.05 + 0.45 * severity) * width for _ in picture]
            for channel, shift in enumerate(shifts if by_channel else shifts[:1] * len(picture)):
                out[channel, top:bottom] = picture[channel, top:bottom].roll(round(shift), -1)
        return out
    cells = 3 + _below(6, generator)
    flow = torch.randn(1, 2, cells, cells, generator=generator).to(picture)
    flow = F.interpolate(flow, size=(height, width), mode="bicubic", align_corners=True)
    grid = F.affine_grid(torch.eye(2, 3).to(picture)[None], [1, 3, height, width], align_corners=False)
    grid = grid + (0.03 + 0.25 * severity) * flow.permute(0, 2, 3, 1)
    return F.grid_sample(picture[None], grid, padding_mode="reflection", align_corners=False)[0]


IMAGE_FAMILIES: dict[str, Callable[[Tensor, float, Generator], Tensor]] = {
    "noise": _noise,
    "blur": _blur,
    "occlusion": _occlusion,
    "blank": _blank,
    "exposure": _exposure,
    "color": _colors,
    "resolution": _resolution,
    "order": _order,
}
# of each modality, in the order of its detector
FAMILIES = (tuple(IMAGE_FAMILIES), TEXT_FAMILIES)


def damaged_texts(
    input_ids: Tensor, is_text: Tensor, family: str, severity: Tensor, vocabulary: Tensor, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Damaged copies of texts.

    Args:
        input_ids: (B, L).
        is_text: (B, L), True at the tokens of the text modality; only these change.
        family: one of `TEXT_FAMILIES`.
        severity: (B,), from 0, one token in ten, to 1, nearly all.
        vocabulary: (K,), the ids that a text may hold.
        generator: on the CPU.

    Returns:
        `input_ids` and `is_text` of the same shapes; a dropped token is no longer text, and at least one stays.

    Raises:
        ValueError: for an unknown family.
    """
    if family not in TEXT_FAMILIES:
        raise ValueError(f"family must be one of {', '.join(TEXT_FAMILIES)}, got {family!r}")
    ids, keep = input_ids.cpu().clone(), is_text.cpu().clone()
    pool = ids[keep]
    for row, strength in enumerate(severity.tolist()):
        places = keep[row].nonzero()[:, 0]
        count = len(places)
        if count == 0:
            continue
        hit = places[torch.randperm(count, generator=generator)[: max(1, round((0.1 + 0.85 * strength) * count))]]
        if family == "word_drop":
            keep[row, hit[: count - 1]] = False
        elif family == "random_words":
            # tokens of the whole batch, at their own frequency: words of this data's language, but not this text
            ids[row, hit] = pool[torch.randint(len(pool), (len(hit),), generator=generator)]
        elif family == "misspelt":
            # a misspelt word falls into pieces that do not belong together
            ids[row, hit] = vocabulary.cpu()[torch.randint(len(vocabulary), (len(hit),), generator=generator)]
        else:
            ids[row, hit] = ids[row, hit[torch.randperm(len(hit), generator=generator)]]
    return ids.to(input_ids.device), keep.to(is_text.device)
