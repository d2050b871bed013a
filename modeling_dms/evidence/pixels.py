"""What the pixels of a picture say of its condition, before any network has looked at them.

Natural scene statistics: coefficients normalised by the contrast around them (BRISQUE, Mittal et al., IEEE TIP 2012;
at several scales as in NIQE, Mittal et al., IEEE SPL 2013), gradients, the spectrum of 8 x 8 blocks, colors. Beyond
those, our own choice: colors by brightness, how far the edges of the color channels agree, and edges that run through
the whole picture. Each number means little by itself; calibration learns how they are on clean pictures.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


PIXEL_STATISTICS = 216  # numbers a picture
SMALLEST = 32  # pixels; smaller pictures are enlarged
_GRAY = (0.299, 0.587, 0.114)
_QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)
_PAIRS = ((0, 1), (0, 2), (1, 2))  # of color channels
_EPS = 1e-6


def pixel_statistics(pictures: Tensor) -> Tensor:
    """Statistics of pictures, each by itself and whatever its size.

    Args:
        pictures: (n, 3, H, W), RGB, black is 0 and white is 1.

    Returns:
        (n, `PIXEL_STATISTICS`), float32 and finite, also for pictures of one color or one pixel.
    """
    with torch.no_grad(), torch.autocast(pictures.device.type, enabled=False):
        pictures = pictures.float()
        height, width = pictures.shape[-2:]
        if min(height, width) < SMALLEST:
            size = (max(height, SMALLEST), max(width, SMALLEST))
            pictures = F.interpolate(pictures, size=size, mode="nearest")
        gray = torch.einsum("nchw,c->nhw", pictures, pictures.new_tensor(_GRAY))[:, None]
        found = [
            *_contrast_and_gradients(gray),
            *_spectrum(gray),
            *_colors(pictures, gray),
            *_colors_by_brightness(pictures),
            *_agreement_of_channels(pictures),
            *_seams(pictures),
        ]
        return torch.stack(found, 1)


def _moments(values: Tensor) -> list[Tensor]:
    """Mean, log variance, skewness, log kurtosis and log mean size of all values of a picture: (n,) each."""
    values = values.flatten(1)
    mean = values.mean(1)
    centred = values - mean[:, None]
    variance = centred.pow(2).mean(1)
    return [
        mean,
        (variance + 1e-8).log(),
        centred.pow(3).mean(1) / (variance + 1e-8) ** 1.5,
        ((centred.pow(4).mean(1) + 1e-12) / (variance.pow(2) + 1e-12)).log(),
        (values.abs().mean(1) + _EPS).log(),
    ]


def _correlation(first: Tensor, second: Tensor) -> Tensor:
    """Of all values of a picture: (n, ...), (n, ...) -> (n,); 0 where one of them does not vary."""
    first, second = first.flatten(1), second.flatten(1)
    first, second = first - first.mean(1, keepdim=True), second - second.mean(1, keepdim=True)
    spread = first.pow(2).mean(1).sqrt() * second.pow(2).mean(1).sqrt()
    return (first * second).mean(1) / spread.clamp_min(1e-4)


def _quantiles(values: Tensor) -> list[Tensor]:
    """(n, C, H, W) -> (n, C) each, of every second row and column, which is as good and four times cheaper."""
    ordered = values[..., ::2, ::2].flatten(2).sort(-1).values
    return [ordered[..., round(share * (ordered.shape[-1] - 1))] for share in _QUANTILES]


def _contrast_and_gradients(gray: Tensor) -> list[Tensor]:
    place = torch.arange(7, device=gray.device) - 3.0
    kernel = torch.exp(-place.pow(2) / (2 * (7 / 6) ** 2))
    kernel = (kernel / kernel.sum())[None, None]

    def around(values: Tensor) -> Tensor:
        values = F.pad(values, (3, 3, 3, 3), mode="replicate")
        return F.conv2d(F.conv2d(values, kernel[..., None]), kernel[..., None, :])

    # rounding would look like contrast where bright pixels do not vary
    found, gray = [], gray - gray.mean((2, 3), keepdim=True)
    for _ in range(3):  # scales
        mean = around(gray)
        deviation = (around(gray * gray) - mean**2).clamp_min(1e-6).sqrt()
        normalised = (gray - mean) / (deviation + 1 / 255)
        found += _moments(normalised) + _moments(deviation.log())
        height, width = gray.shape[-2:]
        for down, right in ((0, 1), (1, 0), (1, 1)):
            neighbour = normalised[..., down:, right:]
            found += _moments(normalised[..., : height - down, : width - right] * neighbour)[:3]
        for step in (gray.diff(dim=3).abs(), gray.diff(dim=2).abs()):
            found += [(step < 0.5 / 255).float().flatten(1).mean(1), (step.flatten(1).mean(1) + _EPS).log()]
        gray = F.avg_pool2d(gray, 2)
    return found


def _spectrum(gray: Tensor) -> list[Tensor]:
    """Log mean energies of the cosine transform of 8 x 8 blocks."""
    place = torch.arange(8.0, device=gray.device)
    cosine = 0.5 * torch.cos((2 * place[None] + 1) * place[:, None] * torch.pi / 16)
    cosine = torch.where(place[:, None] == 0, 8**-0.5, cosine)
    blocks = gray[:, 0].unfold(1, 8, 8).unfold(2, 8, 8).flatten(1, 2)
    energies = (cosine @ blocks @ cosine.T).pow(2).mean(1)
    return list((energies + 1e-7).log().flatten(1).unbind(1))


def _colors(pictures: Tensor, gray: Tensor) -> list[Tensor]:
    channels = pictures.flatten(2)
    colorfulness = (pictures.amax(1) - pictures.amin(1)).flatten(1)
    found = [*channels.mean(2).unbind(1), *channels.std(2).unbind(1), colorfulness.mean(1), colorfulness.std(1)]
    found += [(pictures < 0.02).float().flatten(1).mean(1), (pictures > 0.98).float().flatten(1).mean(1)]
    found += [_correlation(channels[:, i], channels[:, j]) for i, j in _PAIRS]
    found += [quantile[:, 0] for quantile in _quantiles(gray)]
    # light of another color scales a channel
    for quantile in _quantiles(pictures):
        red, green, blue = (quantile.clamp_min(0) + 0.02).log().unbind(1)
        found += [red - green, blue - green]
    return found


def _colors_by_brightness(pictures: Tensor) -> list[Tensor]:
    """How many pixels are dark, darker, lighter and light, and their colors: shadows are not colored as lights are."""
    red, green, blue = pictures.flatten(2).unbind(1)
    brightness = (red + green + blue) / 3
    colorfulness = (pictures.amax(1) - pictures.amin(1)).flatten(1)
    found = []
    for low in (0.0, 0.25, 0.5, 0.75):
        within = ((brightness >= low) & (brightness <= low + 0.25)).float()
        count = within.sum(1) + 8
        found.append(within.mean(1))
        for color in (colorfulness, red - green, blue - (red + green) / 2):
            found.append((within * color).sum(1) / count)
    return found


def _agreement_of_channels(pictures: Tensor) -> list[Tensor]:
    """An edge shows in all channels at the same place; noise, and channels that were moved or inverted, do not."""
    half, found = F.avg_pool2d(pictures, 2), []
    for steps in (pictures.diff(dim=3), pictures.diff(dim=2), half.diff(dim=3), half.diff(dim=2)):
        found += [_correlation(steps[:, i], steps[:, j]) for i, j in _PAIRS]
    mean = pictures.mean(1)
    return found + [_correlation(pictures[:, i] - mean, mean) for i in range(3)]


def _seams(pictures: Tensor) -> list[Tensor]:
    """Edges that run from one side of the picture to the other, and whether they come at even distances."""
    found = []
    for steps in (pictures.diff(dim=3).abs().mean((1, 2)), pictures.diff(dim=2).abs().mean((1, 3))):
        profile = (steps.clamp_min(0) + 1e-3).log()  # (n, places)
        around = F.avg_pool1d(F.pad(profile[:, None], (3, 3), mode="replicate"), 7, 1)[:, 0]
        profile = profile - around
        highest, spread = profile.topk(4, 1).values, profile.std(1)
        found += [highest[:, 0], highest.mean(1), (spread + 1e-3).log(), profile.amin(1)]
        wave = (profile - profile.mean(1, keepdim=True)) / spread.clamp_min(1e-3)[:, None]
        found += [(wave[:, lag:] * wave[:, :-lag]).mean(1) for lag in range(1, 9)]
    return found
