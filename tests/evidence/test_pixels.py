"""What pixels say of a picture: finite whatever it shows, each picture by itself, and other for damaged ones."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from modeling_dms.evidence.pixels import PIXEL_STATISTICS, SMALLEST, pixel_statistics


bounded = settings(max_examples=25, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31)
sides = st.integers(1, 70)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def smooth(seed, count, height=48, width=48):
    """Reddish pictures with large and small structures, whose channels mostly agree: (n, 3, H, W)."""
    draw, found = generator(seed), torch.zeros(count, 3, height, width)
    for cells in (3, 6, 12, 24, 48):
        structure = torch.randn(count, 1, cells, cells, generator=draw)
        structure = structure + 0.3 * torch.randn(count, 3, cells, cells, generator=draw)
        found += F.interpolate(structure, size=(height, width), mode="bicubic") / cells
    return (torch.tensor([0.55, 0.5, 0.42]).view(3, 1, 1) + 0.35 * found).clamp(0, 1)


@pytest.fixture(scope="module")
def clean():
    """Mean and spread of the numbers of clean pictures."""
    numbers = pixel_statistics(smooth(0, 200))
    return numbers.mean(0), numbers.std(0).clamp_min(1e-4)


def deviation(pictures, clean):
    """How many clean spreads the numbers of pictures lie from the clean mean: (n, P)."""
    return ((pixel_statistics(pictures) - clean[0]) / clean[1]).abs()


def assert_finite(pictures):
    numbers = pixel_statistics(pictures)
    assert numbers.shape == (len(pictures), PIXEL_STATISTICS)
    assert numbers.dtype == torch.float32
    assert numbers.isfinite().all(), (~numbers.isfinite()).nonzero().tolist()
    assert not numbers.requires_grad


# ---- any picture


@bounded
@given(seed=seeds, count=st.integers(1, 3), height=sides, width=sides)
def test_pictures_of_any_size_have_as_many_finite_numbers(seed, count, height, width):
    assert_finite(torch.rand(count, 3, height, width, generator=generator(seed)))


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (SMALLEST - 1, SMALLEST), (40, 56)])
@pytest.mark.parametrize("color", [(0, 0, 0), (1, 1, 1), (0.3, 0.3, 0.3), (1, 0, 0), (0.2, 0.9, 0.5)])
def test_blank_pictures_have_finite_numbers(size, color):
    assert_finite(torch.tensor(color).float().view(1, 3, 1, 1).expand(2, 3, *size))


@bounded
@given(seed=seeds, height=sides, width=sides, period=st.integers(1, 9))
def test_pictures_of_two_colors_have_finite_numbers(seed, height, width, period):
    colors = torch.rand(2, 3, generator=generator(seed))
    place = (torch.arange(height)[:, None] // period + torch.arange(width) // period) % 2
    chance = (torch.rand(height, width, generator=generator(seed)) < 0.5).long()
    stripes = (torch.arange(width) // period % 2).expand(height, width)
    assert_finite(torch.stack([colors[some].permute(2, 0, 1) for some in (place, chance, stripes)]))


@bounded
@given(seed=seeds, height=sides, width=sides, scale=st.sampled_from([1.0, 30.0, 1e3]), shift=st.sampled_from([0, -30]))
def test_values_far_beyond_black_and_white_have_finite_numbers(seed, height, width, scale, shift):
    assert_finite(scale * torch.randn(2, 3, height, width, generator=generator(seed)) + shift)


def test_one_pixel_is_a_picture_of_one_color():
    pixel = torch.tensor([0.2, 0.9, 0.5]).view(1, 3, 1, 1)

    whole = pixel.expand(1, 3, SMALLEST, SMALLEST)
    torch.testing.assert_close(pixel_statistics(pixel), pixel_statistics(whole))


# ---- each by itself


def blank(seed, count, height, width):
    return torch.rand(count, 3, 1, 1, generator=generator(seed)).expand(-1, -1, height, width)


def drawn(seed, count, height, width):
    """A rectangle on a background of another color."""
    pictures, colors = blank(seed, count, height, width).clone(), blank(seed + 1, count, 1, 1)
    pictures[:, :, height // 4 : height // 2, width // 3 :] = colors
    return pictures


@pytest.mark.parametrize("make", [smooth, blank, drawn])
@bounded
@given(seed=seeds, count=st.integers(2, 5))
def test_numbers_of_a_batch_equal_those_of_its_rows(make, seed, count, clean):
    """In clean spreads, as the detector reads them: where nothing varies rounding must not become a number."""
    pictures = make(seed, count, 40, 56)
    numbers = pixel_statistics(pictures) / clean[1]
    rows = torch.cat([pixel_statistics(pictures[i : i + 1]) for i in range(count)]) / clean[1]

    torch.testing.assert_close(numbers, rows, atol=1e-2, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_precision_is_computed_in_single(dtype):
    pictures = smooth(0, 3).to(dtype)

    assert torch.equal(pixel_statistics(pictures), pixel_statistics(pictures.float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(pixel_statistics(pictures), pixel_statistics(pictures.float()))


def test_no_gradient_is_kept():
    assert_finite(smooth(0, 2).requires_grad_())


# ---- damage


def noisy(pictures):
    return (pictures + 0.05 * torch.randn(pictures.shape, generator=generator(3))).clamp(0, 1)


def blurred(pictures):
    kernel = torch.full((3, 1, 5, 5), 1 / 25)
    return F.conv2d(F.pad(pictures, (2, 2, 2, 2), mode="replicate"), kernel, groups=3)


def striped(pictures):
    return pictures.unflatten(3, (4, -1)).flip(3).flatten(3)


@pytest.mark.parametrize(
    "damage",
    [
        noisy,
        blurred,
        lambda pictures: pictures[:, [2, 1, 0]],
        lambda pictures: 1 - pictures,
        lambda pictures: 0.4 * pictures,
        striped,
    ],
    ids=["noise", "blur", "channels exchanged", "inverted", "dark", "bands exchanged"],
)
def test_damage_moves_some_number_by_several_clean_spreads(damage, clean):
    pictures = smooth(1, 40)
    before, after = deviation(pictures, clean), deviation(damage(pictures), clean)

    # of fresh clean pictures none does so in the median
    assert before.median(0).values.amax() < 1.5
    assert after.median(0).values.amax() > 5
    # nor is any damaged picture as near in all numbers as a clean one
    assert after.amax(1).amin() > 5


def test_the_channels_have_names():
    """Exchanging red and blue is not lost in sums over the channels, a mirrored picture is as good as the first."""
    pictures = smooth(1, 40)
    numbers = [pixel_statistics(some) for some in (pictures, pictures.flip(3), pictures.flip(1))]

    assert ((numbers[1] - numbers[0]).mean(0) / numbers[0].std(0)).abs().amax() < 0.5
    assert ((numbers[2] - numbers[0]).mean(0) / numbers[0].std(0)).abs().amax() > 5
