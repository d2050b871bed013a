"""Flickr8k: the files in which it is published, its splits, and what is asked of its photographs."""

import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from modeling_dms.training.data import load_flickr8k, load_samples
from modeling_dms.training.data.flickr8k import (
    CAPTIONS,
    HUB_ID,
    SPLIT_FILES,
    THINGS,
    agreed,
    people_in,
    split_by_name,
    told_by_context,
)
from modeling_dms.training.data.samples import CAPTION_QUESTION, SPLITS, TASKS


DOG = (
    "A brown dog runs through the snow .",
    "A dog in snow .",
    "The dog plays in deep snow .",
    "A wet puppy outdoors .",
    "Two tracks, and a dog behind them .",
)


def jpeg(color="red"):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), color).save(buffer, "JPEG")
    return buffer.getvalue()


def name_in(split):
    return next(name for number in range(1000) if split_by_name(name := f"{number}_a.jpg") == split)


def write_photographs(folder: Path, names):
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_bytes(jpeg())


def as_jsonl(folder, captions):
    write_photographs(folder / "images", captions)
    rows = [{"image": f"images/{name}", "captions": own} for name, own in captions.items()]
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def as_published(folder, captions):
    write_photographs(folder / "Flicker8k_Dataset", captions)
    (folder / "Flickr8k_text").mkdir()
    lines = [f"{name}#{place}\t{caption}\n" for name, own in captions.items() for place, caption in enumerate(own)]
    (folder / "Flickr8k_text" / "Flickr8k.token.txt").write_text("".join(lines), encoding="utf-8")


def as_on_kaggle(folder, captions):
    write_photographs(folder / "Images", captions)
    lines = [f'{name},"{caption}"\n' for name, own in captions.items() for caption in own]
    (folder / "captions.txt").write_text("image,caption\n" + "".join(lines), encoding="utf-8")


@pytest.fixture
def captions():
    return {name_in(split): DOG for split in SPLITS}


@pytest.mark.parametrize("write", [as_jsonl, as_published, as_on_kaggle])
@pytest.mark.parametrize("task", TASKS)
def test_every_published_form_holds_the_same(write, task, captions, tmp_path):
    write(tmp_path / "data", captions)
    for split in SPLITS:
        found = load_samples(str(tmp_path / "data"), split, task)
        assert {sample.image.name for sample in found} == {name_in(split)}
        assert all(sample.load_image().size == (8, 6) for sample in found)
        assert len({sample.id for sample in found}) == len(found)
        assert {sample.task for sample in found} == {task}
        # the published space before the full stop is gone
        assert all(sample.context.endswith(("snow.", "outdoors.", "them.")) for sample in found)
        if task == "vqa":
            assert ("is there a dog in the picture?", ("yes",)) in {(s.question, s.answers) for s in found}
        else:
            assert len(found) == (CAPTIONS if split == "train" else 1)
            assert {s.question for s in found} == {CAPTION_QUESTION}
            assert all(s.context not in s.answers and len(s.answers) == CAPTIONS - 1 for s in found)


def test_each_caption_is_trained_on_once(captions, tmp_path):
    as_jsonl(tmp_path / "data", captions)
    found = load_flickr8k("train", folder=tmp_path / "data")
    assert sorted(sample.answers[0] for sample in found) == sorted({sample.context for sample in found})


def test_the_published_lists_decide_the_splits(captions, tmp_path):
    folder = tmp_path / "data"
    as_published(folder, captions)
    names = list(captions)
    for split, name in zip(SPLITS, names[1:] + names[:1], strict=True):
        (folder / "Flickr8k_text" / SPLIT_FILES[split]).write_text(f"{name}\n", encoding="utf-8")
    for split, name in zip(SPLITS, names[1:] + names[:1], strict=True):
        assert {sample.image.name for sample in load_flickr8k(split, folder=folder)} == {name}


def test_splits_by_name_are_fixed():
    shares = [split_by_name(f"{number}.jpg") for number in range(4000)]
    assert shares.count("train") / 4000 == pytest.approx(0.6, abs=0.03)
    assert shares.count("validation") / 4000 == pytest.approx(0.1, abs=0.02)
    assert split_by_name("1000268201_693b08cb0e.jpg") == "train"


def test_reads_the_hub(monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets")
    row = {"image": {"bytes": jpeg(), "path": None}} | {f"caption_{place}": text for place, text in enumerate(DOG)}
    features = datasets.Features(
        {"image": datasets.Image()} | {f"caption_{i}": datasets.Value("string") for i in range(5)}
    )
    table = datasets.Dataset.from_list([row, row], features=features)
    asked = []

    def load_dataset(name, split, streaming):
        asked.append((name, split))
        return table

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = load_samples("flickr8k", "validation", "caption")
    assert asked == [(HUB_ID, "validation")]
    assert [sample.id for sample in found] == ["flickr8k-validation-0", "flickr8k-validation-1"]
    assert found[0].load_image().size == (8, 6)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (
            lambda f: (f / "captions.jsonl").write_text('{"image": "a.jpg"}\n'),
            "captions.jsonl, line 1: expected `image`",
        ),
        (lambda f: (f / "captions.jsonl").write_text("no JSON\n"), "captions.jsonl, line 1: expected `image`"),
        (
            lambda f: (f / "captions.txt").write_text("image,caption\n,\n"),
            "captions.txt, line 2: expected a photograph",
        ),
    ],
)
def test_a_broken_file_is_named_with_its_line(write, message, tmp_path):
    write(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_flickr8k("train", folder=tmp_path)


def test_a_missing_photograph_or_file_is_named(captions, tmp_path):
    as_jsonl(tmp_path / "data", captions)
    gone = name_in("train")
    (tmp_path / "data" / "images" / gone).unlink()
    with pytest.raises(FileNotFoundError, match=f"no photograph {gone}"):
        load_flickr8k("train", folder=tmp_path / "data")
    with pytest.raises(FileNotFoundError, match=r"expected one of captions\.jsonl, Flickr8k\.token\.txt"):
        load_flickr8k("train", folder=tmp_path)


@pytest.mark.parametrize(
    ("split", "task", "message"), [("all", "vqa", "split must be"), ("test", "ocr", "task must be")]
)
def test_refuses_what_is_not_there(split, task, message):
    with pytest.raises(ValueError, match=message):
        load_flickr8k(split, task)


# --- questions


def test_asks_where_captions_agree():
    asked = agreed(DOG)
    assert asked["dog"] == ("is there a dog in the picture?", "yes")
    assert asked["snow"] == ("is there snow in the picture?", "yes")
    assert asked["animal"] == ("which animal is in the picture?", "dog")
    assert asked["place"] == ("where is the picture taken?", "snow")
    assert asked["car"] == ("is there a car in the picture?", "no")
    assert "people" not in asked


def test_asks_nothing_where_captions_disagree():
    asked = agreed(("a dog in snow", "a cat in snow", "a dog on grass", "a dog", "a dog"))
    assert "animal" not in asked  # one says cat
    assert "place" not in asked  # one says grass
    assert "snow" not in asked  # two say it


def test_a_thing_is_asked_for_as_often_where_it_is_not(tmp_path):
    names = [name for number in range(200) if split_by_name(name := f"{number}.jpg") == "test"]
    words = ("dog", "man", "car")
    captions = {
        name: [f"a {words[place % 3]}, seen by {seer}" for seer in "abcde"] for place, name in enumerate(names)
    }
    as_jsonl(tmp_path / "data", captions)
    found = load_flickr8k("test", "vqa", tmp_path / "data")
    for thing in THINGS:
        answers = [sample.answers[0] for sample in found if sample.id.endswith(f"-{thing}")]
        assert answers.count("yes") == answers.count("no") == sum(f"a {thing}," in own[0] for own in captions.values())


@pytest.mark.parametrize(
    ("caption", "people"),
    [
        ("A man and a woman sit.", 2),
        ("Two small children play.", 2),
        ("A boy in a red shirt.", 1),
        ("Three men and a dog.", 3),
        ("A crowd watches.", 3),
        ("Children play.", None),
        ("A dog runs.", 0),
        ("", 0),
    ],
)
def test_counts_people(caption, people):
    assert people_in(caption) == people


def test_says_what_the_context_tells(tmp_path, captions):
    as_jsonl(tmp_path / "data", captions)
    told = {
        sample.id.rpartition("-")[2]: told_by_context(sample)
        for sample in load_flickr8k("test", "vqa", tmp_path / "data")
    }
    sample = load_flickr8k("test", "vqa", tmp_path / "data")[0]
    assert told["dog"] == told["animal"] == ("dog" in sample.context or "puppy" in sample.context)
    assert told["snow"] == told["place"] == ("snow" in sample.context)
    assert not any(
        told[s.id.rpartition("-")[2]] for s in load_flickr8k("test", "vqa", tmp_path / "data") if s.answers == ("no",)
    )


@given(st.lists(st.text(max_size=60), min_size=CAPTIONS, max_size=CAPTIONS))
def test_any_captions_can_be_asked_about(texts):
    for question, answer in agreed(texts).values():
        assert question.endswith("?")
        assert answer
