"""Self-made corruptions: what they must change, what they must leave alone, and where their randomness comes from."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_dms.calibrate.damage import IMAGE_FAMILIES, TEXT_FAMILIES, corrupt_images, corrupt_texts


bounded = settings(max_examples=25, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31)
image_families = st.sampled_from(IMAGE_FAMILIES)
text_families = st.sampled_from(TEXT_FAMILIES)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(seed, *shape):
    return torch.randn(shape, generator=generator(seed))


def texts(seed, batch, length, share=0.6):
    """Token ids and which of them are text; ids of text lie below 100, all others above."""
    is_text = torch.rand(batch, length, generator=generator(seed)) < share
    ids = torch.randint(0, 100, (batch, length), generator=generator(seed + 1))
    return ids + 100 * ~is_text, is_text


def sharpness(images):
    """Mean squared difference of neighbouring pixels."""
    return images.diff(dim=-1).pow(2).mean() + images.diff(dim=-2).pow(2).mean()


# ---- both


def test_the_families_are_the_documented_ones():
    assert set(IMAGE_FAMILIES) == {"noise", "blank", "blur", "occlusion"}
    assert set(TEXT_FAMILIES) == {"word_drop", "random_words", "shuffle"}


@bounded
@given(seed=seeds, image_family=image_families, text_family=text_families)
def test_randomness_comes_from_the_generator_alone(seed, image_family, text_family):
    images, (ids, is_text) = normal(seed, 3, 3, 12, 12), texts(seed, 3, 20)

    def corrupt(draw):
        return corrupt_images(images, image_family, draw), *corrupt_texts(ids, is_text, text_family, draw)

    before = torch.get_rng_state()
    first = corrupt(generator(seed))
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)  # moves the global random state
    draw = generator(seed)
    again, another = corrupt(draw), corrupt(draw)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(again[0], another[0])
    assert not all(torch.equal(a, b) for a, b in zip(again[1:], another[1:], strict=True))


@bounded
@given(seed=seeds, image_family=image_families, text_family=text_families)
def test_inputs_are_not_changed_in_place(seed, image_family, text_family):
    images, (ids, is_text) = normal(seed, 2, 3, 8, 8), texts(seed, 2, 12)
    kept = images.clone(), ids.clone(), is_text.clone()
    corrupt_images(images, image_family, generator(seed))
    corrupt_texts(ids, is_text, text_family, generator(seed))

    assert all(torch.equal(a, b) for a, b in zip((images, ids, is_text), kept, strict=True))


@pytest.mark.parametrize("is_text", [[[True, True]], [[False, False]]])
def test_unknown_families_are_refused(is_text):
    with pytest.raises(ValueError, match=r"noise, blank, blur, occlusion.*'fog'"):
        corrupt_images(torch.zeros(1, 3, 4, 4), "fog", generator(0))
    with pytest.raises(ValueError, match=r"word_drop, random_words, shuffle.*'typos'"):
        corrupt_texts(torch.tensor([[5, 6]]), torch.tensor(is_text), "typos", generator(0))


# ---- images


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", IMAGE_FAMILIES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 200), (200, 1), (2, 2), (3, 64), (14, 14)])
@pytest.mark.parametrize("count", [1, 3])
def test_images_of_any_shape_and_precision_keep_both(count, shape, family, dtype):
    images = normal(0, count, 3, *shape).to(dtype)
    corrupted = corrupt_images(images, family, generator(0))

    assert corrupted.shape == images.shape
    assert corrupted.dtype == dtype
    assert corrupted.isfinite().all()
    # nothing brighter or darker than the data
    slack = 1e-2 * images.abs().max()
    assert corrupted.min() >= images.min() - slack
    assert corrupted.max() <= images.max() + slack


@bounded
@given(seed=seeds, family=image_families)
def test_every_image_is_corrupted(seed, family):
    images = normal(seed, 4, 3, 16, 16)
    corrupted = corrupt_images(images, family, generator(seed))

    assert ((corrupted - images).abs().amax((1, 2, 3)) > 0.05).all()


@bounded
@given(seed=seeds, family=image_families)
def test_every_image_has_a_strength_of_its_own(seed, family):
    # the corruption without the image: for identical images only the draws can differ
    images = normal(seed, 1, 3, 16, 16).repeat(12, 1, 1, 1)
    change = (corrupt_images(images, family, generator(seed)) - images).pow(2).mean((1, 2, 3))

    assert len(change.unique()) > 3


def test_noise_is_added_to_the_image_and_differs_between_pixels():
    images = torch.linspace(-2, 2, 32).expand(4, 3, 32, 32).clone()
    corrupted = corrupt_images(images, "noise", generator(0))

    assert sharpness(corrupted) > 2 * sharpness(images)
    for noisy, image in zip(corrupted, images, strict=True):
        assert torch.corrcoef(torch.stack([noisy.flatten(), image.flatten()]))[0, 1] > 0.3


@bounded
@given(seed=seeds)
def test_blank_images_have_one_value(seed):
    corrupted = corrupt_images(normal(seed, 4, 3, 9, 5), "blank", generator(seed))

    assert (corrupted.amax((1, 2, 3)) == corrupted.amin((1, 2, 3))).all()


@bounded
@given(seed=seeds, height=st.integers(24, 40), width=st.integers(24, 40))
def test_blur_smooths_and_keeps_what_is_constant(seed, height, width):
    rows, columns = normal(seed, 2, 3, height, 1), normal(seed, 2, 3, 1, width)
    constant = torch.full((2, 3, height, width), 0.7)

    for stripes in (rows.expand_as(constant), columns.expand_as(constant)):
        assert sharpness(corrupt_images(stripes, "blur", generator(seed))) < 0.75 * sharpness(stripes)
    torch.testing.assert_close(corrupt_images(constant, "blur", generator(seed)), constant)


def test_blur_does_not_mix_images_or_channels():
    images = normal(0, 2, 3, 16, 16)
    images[0, 1] = 0
    images[1, 2] = 0
    corrupted = corrupt_images(images, "blur", generator(0))

    assert not corrupted[0, 1].any()
    assert not corrupted[1, 2].any()
    assert corrupted[0, 2].any()


@bounded
@given(seed=seeds, height=st.integers(1, 24), width=st.integers(1, 24))
def test_occlusion_covers_one_rectangle_with_one_value(seed, height, width):
    images = normal(seed, 3, 3, height, width)
    corrupted = corrupt_images(images, "occlusion", generator(seed))

    for image, original in zip(corrupted, images, strict=True):
        changed = (image != original).any(0)
        rows, columns = changed.any(1).nonzero()[:, 0], changed.any(0).nonzero()[:, 0]
        covered = image[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert covered.unique().numel() == 1
        assert 0.15 * height * width - height - width - 1 <= changed.sum()
        assert changed.sum() < 0.95 * height * width or min(height, width) < 10


# ---- texts


@bounded
@given(seed=seeds, family=text_families, batch=st.integers(1, 4), length=st.integers(1, 20))
def test_only_text_changes(seed, family, batch, length):
    ids, is_text = texts(seed, batch, length)
    corrupted, still_text = corrupt_texts(ids, is_text, family, generator(seed))

    assert corrupted.shape == still_text.shape == ids.shape
    assert corrupted.dtype == ids.dtype
    assert still_text.dtype == torch.bool
    assert torch.equal(corrupted[~is_text], ids[~is_text])
    assert not still_text[~is_text].any()
    assert torch.equal(still_text.any(1), is_text.any(1))  # a text stays a text
    assert torch.isin(corrupted[is_text], ids[is_text]).all()  # words of this data


@pytest.mark.parametrize("family", TEXT_FAMILIES)
@pytest.mark.parametrize("count", [0, 1, 2])
def test_very_short_texts_keep_at_least_one_token(family, count):
    is_text = torch.zeros(40, 4, dtype=torch.bool)
    is_text[:, 1 : 1 + count] = True
    ids, still_text = corrupt_texts(torch.arange(4).repeat(40, 1), is_text, family, generator(0))

    assert (still_text.sum(1) >= min(count, 1)).all()
    assert torch.equal(ids[~is_text], torch.arange(4).repeat(40, 1)[~is_text])
    if count == 0:
        assert not still_text.any()


@bounded
@given(seed=seeds, length=st.integers(2, 40))
def test_word_drop_drops_a_share_of_the_words_and_keeps_the_rest_in_order(seed, length):
    ids, is_text = torch.arange(length).repeat(6, 1), torch.ones(6, length, dtype=torch.bool)
    corrupted, still_text = corrupt_texts(ids, is_text, "word_drop", generator(seed))

    assert torch.equal(corrupted, ids)
    dropped = length - still_text.sum(1)
    assert (dropped >= 1).all()
    assert (still_text.sum(1) >= 1).all()
    assert (dropped <= 0.9 * length + 1).all()
    assert (dropped >= 0.3 * length - 1).all()


def test_word_drop_differs_between_texts_in_share_and_place():
    ids, is_text = torch.arange(50).repeat(20, 1), torch.ones(20, 50, dtype=torch.bool)
    _, still_text = corrupt_texts(ids, is_text, "word_drop", generator(0))

    assert len(still_text.sum(1).unique()) > 5
    assert still_text.any(0).all()
    assert not still_text.all(0).any()


@bounded
@given(seed=seeds)
def test_random_words_come_from_the_other_texts(seed):
    ids = torch.arange(100).view(5, 20)
    corrupted, still_text = corrupt_texts(ids, torch.ones_like(ids, dtype=torch.bool), "random_words", generator(seed))
    foreign = corrupted // 20 != torch.arange(5)[:, None]

    assert still_text.all()
    assert foreign.any(1).all()
    assert ((corrupted != ids).float().mean(1) >= 0.3).all()
    assert len((corrupted != ids).sum(1).unique()) > 1


@bounded
@given(seed=seeds)
def test_shuffle_keeps_the_words_and_changes_their_order(seed):
    ids, is_text = torch.arange(80).view(4, 20), torch.ones(4, 20, dtype=torch.bool)
    is_text[:, :3] = False
    corrupted, still_text = corrupt_texts(ids, is_text, "shuffle", generator(seed))

    assert torch.equal(still_text, is_text)
    assert torch.equal(corrupted.sort(1).values, ids)
    assert (corrupted != ids).any(1).all()
