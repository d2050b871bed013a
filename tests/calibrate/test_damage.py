"""Self-made damage: what it must change, what it must leave alone, and where its randomness comes from."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import Qwen2VLImageProcessorPil

from modeling_dms.calibrate.damage import FAMILIES, IMAGE_FAMILIES, TEXT_FAMILIES, damaged_pictures, damaged_texts
from modeling_dms.observe.pictures import changed_pictures, pictures_of


bounded = settings(max_examples=25, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31)
severities = st.floats(0, 1)
image_families = st.sampled_from([*IMAGE_FAMILIES])
text_families = st.sampled_from(TEXT_FAMILIES)
SHAPES = [(1, 1), (1, 200), (200, 1), (2, 2), (3, 64), (14, 14), (33, 20)]


def generator(seed):
    return torch.Generator().manual_seed(seed)


def pictures(seed, count, height=24, width=24):
    """Smooth colored pictures, in steps of 1 / 255."""
    coarse = torch.rand(count, 3, max(2, height // 6), max(2, width // 6), generator=generator(seed))
    smooth = F.interpolate(coarse, size=(height, width), mode="bilinear")
    return (smooth * 255).round() / 255


def damaged(given, family, severity, seed=0):
    """All pictures with one severity."""
    return damaged_pictures(given, family, torch.full((len(given),), float(severity)), generator(seed))


def texts(seed, batch, length, share=0.6):
    """Token ids and which of them are text; ids of text lie below 100, all others above."""
    is_text = torch.rand(batch, length, generator=generator(seed)) < share
    ids = torch.randint(0, 100, (batch, length), generator=generator(seed + 1))
    return ids + 100 * ~is_text, is_text


VOCABULARY = torch.arange(300, 400)


def corrupted(ids, is_text, family, severity, seed=0):
    """All texts with one severity."""
    strength = torch.full((len(ids),), float(severity))
    return damaged_texts(ids, is_text, family, strength, VOCABULARY, generator(seed))


def hit(counts, severity):
    """How many tokens of texts of so many tokens are hit."""
    return torch.tensor([max(1, round((0.1 + 0.85 * severity) * count)) if count else 0 for count in counts.tolist()])


# ---- both


def test_the_families_are_the_documented_ones():
    assert FAMILIES == (
        ("noise", "blur", "occlusion", "blank", "exposure", "color", "resolution", "order"),
        ("word_drop", "random_words", "misspelt", "shuffle"),
    )


@bounded
@given(seed=seeds, severity=severities, image_family=image_families, text_family=text_families)
def test_randomness_comes_from_the_generator_alone(seed, severity, image_family, text_family):
    images, (ids, is_text) = pictures(seed, 3), texts(seed, 3, 20)
    strength = torch.full((3,), severity)

    def damage(draw):
        return (
            damaged_pictures(images, image_family, strength, draw),
            *damaged_texts(ids, is_text, text_family, strength, VOCABULARY, draw),
        )

    before = torch.get_rng_state()
    first = damage(generator(seed))
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)  # moves the global random state
    again = damage(generator(seed))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("family", [*IMAGE_FAMILIES, *TEXT_FAMILIES])
def test_every_draw_is_another(family):
    draw, strength = generator(0), torch.full((6,), 0.5)
    images, (ids, is_text) = pictures(0, 6), texts(0, 6, 20)

    def damage():
        if family in IMAGE_FAMILIES:
            return [damaged_pictures(images, family, strength, draw)]
        return damaged_texts(ids, is_text, family, strength, VOCABULARY, draw)

    assert not all(torch.equal(a, b) for a, b in zip(damage(), damage(), strict=True))


@bounded
@given(seed=seeds, severity=severities, image_family=image_families, text_family=text_families)
def test_inputs_are_not_changed_in_place(seed, severity, image_family, text_family):
    images, (ids, is_text) = pictures(seed, 2), texts(seed, 2, 12)
    kept = images.clone(), ids.clone(), is_text.clone()
    damaged(images, image_family, severity, seed)
    corrupted(ids, is_text, text_family, severity, seed)

    assert all(torch.equal(a, b) for a, b in zip((images, ids, is_text), kept, strict=True))


@pytest.mark.parametrize("is_text", [[[True, True]], [[False, False]]])
def test_unknown_families_are_refused(is_text):
    with pytest.raises(ValueError, match=r"noise, blur, .*, order, got 'fog'"):
        damaged(torch.zeros(1, 3, 4, 4), "fog", 0.5)
    with pytest.raises(ValueError, match=r"word_drop, random_words, misspelt, shuffle, got 'typos'"):
        corrupted(torch.tensor([[5, 6]]), torch.tensor(is_text), "typos", 0.5)


@bounded
@given(
    seed=seeds,
    severity=severities,
    image_family=image_families,
    # random words are of the whole batch
    text_family=st.sampled_from([family for family in TEXT_FAMILIES if family != "random_words"]),
)
def test_a_batch_is_damaged_as_its_rows_are_in_turn(seed, severity, image_family, text_family):
    images, strength, draw = pictures(seed, 3), severity * torch.tensor([1.0, 0.2, 0.7]), generator(seed)
    rows = [damaged_pictures(images[i : i + 1], image_family, strength[i : i + 1], draw) for i in range(3)]
    assert torch.equal(damaged_pictures(images, image_family, strength, generator(seed)), torch.cat(rows))
    (ids, is_text), draw = texts(seed, 3, 20), generator(seed)
    rows = [
        damaged_texts(ids[i : i + 1], is_text[i : i + 1], text_family, strength[i : i + 1], VOCABULARY, draw)
        for i in range(3)
    ]
    whole = damaged_texts(ids, is_text, text_family, strength, VOCABULARY, generator(seed))
    assert all(torch.equal(w, torch.cat(parts)) for w, parts in zip(whole, zip(*rows, strict=True), strict=True))


# ---- pictures


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
@bounded
@given(seed=seeds, severity=severities, shape=st.sampled_from(SHAPES))
def test_pictures_of_any_shape_stay_pictures(family, seed, severity, shape):
    given_pictures = pictures(seed, 2, *shape)
    found = damaged(given_pictures, family, severity, seed)

    assert found.shape == given_pictures.shape
    assert found.isfinite().all()
    assert found.amin() >= 0
    assert found.amax() <= 1
    torch.testing.assert_close(found * 255, (found * 255).round(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_pictures_of_any_precision_are_damaged_in_single(family, dtype):
    images = pictures(0, 4).to(dtype)
    found = damaged(images, family, 0.5)

    assert found.dtype == torch.float32
    assert torch.equal(found, damaged(images.float(), family, 0.5))


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_severe_damage_changes_more_than_a_slight_one(family, seed):
    images = pictures(seed, 48)
    steps = [(damaged(images, family, severity, seed) - images).abs().mean((1, 2, 3)) for severity in (0, 0.5, 1)]

    assert steps[0].mean() < steps[1].mean() < steps[2].mean()
    assert steps[2].min() > 1 / 255  # whatever kind is drawn


@bounded
@given(seed=seeds, severity=severities)
def test_through_a_blank_picture_next_to_nothing_shows(seed, severity):
    found = damaged(pictures(seed, 4, 9, 5), "blank", severity, seed)

    assert (found.amax((2, 3)) - found.amin((2, 3)) <= 0.06 * (1 - severity) + 1.01 / 255).all()


@bounded
@given(seed=seeds, severity=st.floats(0.2, 1), height=st.integers(24, 40), width=st.integers(24, 40))
def test_blur_smooths_and_mixes_no_channels_or_pictures(seed, severity, height, width):
    images = torch.rand(2, 3, height, width, generator=generator(seed))
    images[0, 1], images[1, 2] = 0, 1
    found = damaged(images, "blur", severity, seed)

    def sharpness(some):
        return some.diff(dim=-1).pow(2).mean((2, 3)) + some.diff(dim=-2).pow(2).mean((2, 3))

    assert not found[0, 1].any()
    assert found[1, 2].eq(1).all()
    varied = sharpness(images) > 0
    assert (sharpness(found)[varied] < 0.75 * sharpness(images)[varied]).all()


@bounded
@given(seed=seeds, severity=severities, height=st.integers(1, 24), width=st.integers(1, 24))
def test_occlusion_covers_with_few_colors_and_leaves_the_rest(seed, severity, height, width):
    images = pictures(seed, 3, height, width)
    found = damaged(images, "occlusion", severity, seed)

    for image, original in zip(found, images, strict=True):
        changed = (image - original).abs().amax(0) > 1e-3
        assert len(image[:, changed].T.unique(dim=0)) <= 13


@pytest.mark.parametrize("severity", [0, 0.5, 1])
def test_order_keeps_most_values_and_moves_them(severity):
    images = pictures(0, 24, 32, 32)
    found = damaged(images, "order", severity)

    assert ((found.mean((2, 3)) - images.mean((2, 3))).abs().mean() < 0.05).all()
    assert ((found - images).abs().mean((1, 2, 3)) > 0.01).all()


# ---- pixels in the layouts of processors


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_padded_pictures_are_damaged_within_their_own_size(family):
    sizes, padded, seen = [(20, 24), (24, 12)], torch.full((2, 3, 24, 24), -1.0), []
    for place, (height, width) in enumerate(sizes):
        padded[place, :, :height, :width] = pictures(place, 1, height, width)[0]

    def damage(some):
        seen.append(some)
        return damaged(some, family, 0.5)

    found = changed_pictures(padded, damage, None, None, sizes)
    assert [tuple(some.shape[-2:]) for some in seen] == sizes
    for place, (height, width) in enumerate(sizes):
        own = padded[place : place + 1, :, :height, :width]
        assert torch.equal(found[place : place + 1, :, :height, :width], damaged(own, family, 0.5))
        assert found[place, :, height:].eq(-1).all()
        assert found[place, :, :, width:].eq(-1).all()


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_missing_tiles_stay_missing_and_the_others_do_not_become_so(family):
    tiles = pictures(0, 6).view(2, 3, 3, 24, 24)
    tiles[0, 2], tiles[1, 1:] = 0, 0
    there = torch.tensor([[True, True, False], [True, False, False]])
    found = changed_pictures(tiles, lambda some: damaged(some, family, 0.5))

    assert found.shape == tiles.shape
    assert torch.equal(found.flatten(2).any(2), there)
    torch.testing.assert_close(found[there], damaged(tiles[there], family, 0.5), atol=1e-6, rtol=0)
    assert torch.equal(pictures_of(tiles)[0], tiles[there])
    black = changed_pictures(tiles, torch.zeros_like)
    assert torch.equal(black.flatten(2).any(2), there)


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_flattened_patches_are_damaged_as_the_pictures_that_they_are_of(family):
    processor = Qwen2VLImageProcessorPil(do_resize=False, do_rescale=False, do_normalize=False, do_convert_rgb=False)
    vision = SimpleNamespace(
        patch_size=processor.patch_size,
        temporal_patch_size=processor.temporal_patch_size,
        spatial_merge_size=processor.merge_size,
    )
    images = [pictures(0, 1, 56, 84), pictures(1, 1, 84, 56)]

    def patches(some):
        given_pictures = [picture[0].numpy() for picture in some]
        return processor(given_pictures, return_tensors="pt", input_data_format="channels_first")

    made = patches(images)
    layout = made["image_grid_thw"], vision
    assert all(torch.equal(a, b) for a, b in zip(pictures_of(made["pixel_values"], *layout), images, strict=True))
    found = changed_pictures(made["pixel_values"], lambda some: damaged(some, family, 0.5), *layout)
    assert torch.equal(found, patches([damaged(image, family, 0.5) for image in images])["pixel_values"])


# ---- texts


@bounded
@given(seed=seeds, severity=severities, family=text_families, batch=st.integers(1, 4), length=st.integers(1, 20))
def test_only_text_changes(seed, severity, family, batch, length):
    ids, is_text = texts(seed, batch, length)
    found, still_text = corrupted(ids, is_text, family, severity, seed)

    assert found.shape == still_text.shape == ids.shape
    assert found.dtype == ids.dtype
    assert still_text.dtype == torch.bool
    assert torch.equal(found[~is_text], ids[~is_text])
    assert not still_text[~is_text].any()
    assert torch.equal(still_text.any(1), is_text.any(1))  # a text stays a text
    changed = (found != ids) | (still_text != is_text)
    assert (changed.sum(1) <= hit(is_text.sum(1), severity)).all()
    assert torch.isin(found[is_text], torch.cat([ids[is_text], VOCABULARY])).all()


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_a_severe_damage_changes_more_tokens_than_a_slight_one(family):
    ids, is_text = texts(0, 24, 40)
    counts = []
    for severity in (0, 0.5, 1):
        found, still_text = corrupted(ids, is_text, family, severity)
        counts.append(((found != ids) | (still_text != is_text)).sum(1).float().mean())

    assert 0 < counts[0] < counts[1] < counts[2]


@pytest.mark.parametrize("family", TEXT_FAMILIES)
@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("severity", [0, 1])
def test_very_short_texts_keep_at_least_one_token(severity, count, family):
    is_text = torch.zeros(40, 4, dtype=torch.bool)
    is_text[:, 1 : 1 + count] = True
    ids = torch.arange(4).repeat(40, 1)
    found, still_text = corrupted(ids, is_text, family, severity)

    assert (still_text.sum(1) >= min(count, 1)).all()
    assert torch.equal(found[~is_text], ids[~is_text])
    if count == 0:
        assert not still_text.any()


@bounded
@given(seed=seeds, severity=severities, length=st.integers(2, 40))
def test_word_drop_drops_a_share_of_the_words_and_keeps_the_rest_in_order(seed, severity, length):
    ids, is_text = torch.arange(length).repeat(6, 1), torch.ones(6, length, dtype=torch.bool)
    found, still_text = corrupted(ids, is_text, "word_drop", severity, seed)

    assert torch.equal(found, ids)
    assert torch.equal(length - still_text.sum(1), hit(is_text.sum(1), severity).clamp_max(length - 1))


def test_word_drop_drops_words_at_any_place():
    ids, is_text = torch.arange(50).repeat(20, 1), torch.ones(20, 50, dtype=torch.bool)
    _, still_text = corrupted(ids, is_text, "word_drop", 0.5)

    assert still_text.any(0).all()
    assert not still_text.all(0).any()


@bounded
@given(seed=seeds, severity=severities)
def test_random_words_come_from_the_texts_of_the_batch(seed, severity):
    ids, is_text = torch.arange(100).view(5, 20), torch.ones(5, 20, dtype=torch.bool)
    is_text[:, :3] = False
    found, still_text = corrupted(ids, is_text, "random_words", severity, seed)

    assert torch.equal(still_text, is_text)
    assert torch.isin(found[is_text], ids[is_text]).all()
    if severity > 0.5:
        foreign = found // 20 != torch.arange(5)[:, None]
        assert foreign.any(1).all()


@bounded
@given(seed=seeds, severity=severities)
def test_misspelt_words_become_pieces_from_the_whole_vocabulary(seed, severity):
    ids, is_text = texts(seed, 4, 30)
    found, still_text = corrupted(ids, is_text, "misspelt", severity, seed)

    assert torch.equal(still_text, is_text)
    assert torch.isin(found[found != ids], VOCABULARY).all()
    assert torch.equal((found != ids).sum(1), hit(is_text.sum(1), severity))


@bounded
@given(seed=seeds, severity=severities)
def test_shuffle_keeps_the_words_and_changes_their_order(seed, severity):
    ids, is_text = torch.arange(160).view(4, 40), torch.ones(4, 40, dtype=torch.bool)
    is_text[:, :3] = False
    found, still_text = corrupted(ids, is_text, "shuffle", severity, seed)

    assert torch.equal(still_text, is_text)
    assert torch.equal(found.sort(1).values, ids)
    if severity > 0.5:
        assert (found != ids).any(1).all()
