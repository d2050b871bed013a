"""Samples with several images and passages: read from tables, marked by the collator, weighed by every family that
takes them, and shown by `dms predict`."""

import json

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from modeling_dms.auto import CLASSES
from modeling_dms.training.apps.answer import load_for_answers
from modeling_dms.training.cli import app
from modeling_dms.training.data import PromptCollator, Sample, load_folder
from modeling_dms.training.data.samples import split_readable
from tests import families, processors


RED, BLUE = (Image.new("RGB", size, color) for size, color in (((48, 48), "red"), ((48, 48), "blue")))
ONE_IMAGE = ("blip-2", "instructblip")
TOGETHER = ("smolvlm", "idefics3")  # all images of a row


def sample(images: int, passages: int, name: str = "one") -> Sample:
    pictures, texts = (RED, BLUE, RED)[:images], ("a red box .", "on the left", "a blue box .")[:passages]
    return Sample(
        name,
        pictures[0] if pictures else None,
        texts[0] if texts else None,
        "what is the shape ?",
        ("red",),
        images=pictures[1:],
        contexts=texts[1:],
    )


# Mistral 3's processor is not made here
@pytest.mark.parametrize("family", [family for family in CLASSES if family != "mistral3"])
@torch.no_grad()
def test_every_family_weighs_what_its_processor_takes(family):
    model, collator = families.shared(family), PromptCollator(processors.processor(family))
    images = 1 if family in (*ONE_IMAGE, *TOGETHER) else 2
    batch = collator([sample(images, 2), sample(1, 1, "other")])
    ids = batch["source_ids"]
    assert ids[0].unique().tolist() == [*range(images + 3)]
    assert ids[1].unique().tolist() == [0, 1, 2]
    tokenizer = collator.processor.tokenizer
    for number, text in enumerate(("a red box .", "on the left"), images + 1):
        assert text in tokenizer.decode(batch["input_ids"][0][ids[0] == number])
    weights, signals = model.get_modality_weights(**batch)
    assert weights.shape == (2, images + 2)
    assert (weights[1, 2:] == 0).all()
    assert signals.agreement.shape == (2, images + 2, images + 2)


@pytest.mark.parametrize("family", ONE_IMAGE)
def test_what_takes_one_image_says_so(family):
    with pytest.raises(ValueError, match=r"sample 'one' has 2 images, .*Processor takes one a prompt"):
        PromptCollator(processors.processor(family))([sample(2, 1)])


def test_single_images_and_passages_are_modalities():
    batch = PromptCollator(processors.processor("llava"))([sample(1, 1), sample(0, 1, "b")])
    assert "modality_ids" in batch
    assert "source_ids" not in batch


def test_tables_hold_lists(tmp_path):
    for name in ("a", "b"):
        RED.save(tmp_path / f"{name}.png")
    row = {"question": "what?", "answers": "dog", "split": "train"}
    rows = [
        {
            "id": "0",
            "image": "a.png",
            "images": ["b.png"],
            "context": "one.",
            "contexts": ["two.", " ", "three."],
            **row,
        },
        {"id": "1", "images": ["a.png"], "contexts": ["only."], **row},
        {"id": "2", "image": "a.png", "contexts": None, **row},
    ]
    (tmp_path / "table.jsonl").write_text("\n".join(map(json.dumps, rows)))
    several, lists, plain = load_folder(tmp_path)
    assert several.passages == ["one.", "two.", "three."]
    assert (several.image, several.images) == (tmp_path / "a.png", (tmp_path / "b.png",))
    assert len(several.load_images()) == 2
    assert (lists.image, lists.images, lists.context, lists.contexts) == (tmp_path / "a.png", (), "only.", ())
    assert (plain.images, plain.context, plain.contexts) == ((), None, ())
    (tmp_path / "table.jsonl").write_text(json.dumps({**row, "images": "a.png", "contexts": "one."}))
    (single,) = load_folder(tmp_path)
    assert (single.image, single.passages) == (tmp_path / "a.png", ["one."])
    for column, of in (("contexts", "contexts"), ("images", "image")):
        (tmp_path / "table.jsonl").write_text(json.dumps({**row, column: [1]}))
        with pytest.raises(ValueError, match=f"row 1, column '{of}': expected"):
            load_folder(tmp_path)


def test_predict_shows_each(tmp_path, monkeypatch):
    monkeypatch.setattr(load_for_answers, "__defaults__", (60,))
    RED.save(tmp_path / "red.png")
    given = ["--context", "a red box.", "--context", "a blue box.", "--image", str(tmp_path / "red.png")]
    done = CliRunner().invoke(app, ["predict", "--question", "what color is it?", *given])
    assert done.exit_code == 0, done.output
    assert "image 1  context 1  context 2" in done.output
    assert "how far several agree is not known" in done.output
    weights = next(line for line in done.output.splitlines() if line.startswith("weight"))
    assert len(weights.split()) == 4


def test_what_is_wrong_with_a_further_image_or_passage_is_found_beforehand(tmp_path):
    """One sample must not cost the others their result in the middle of a run."""
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    good, bad = sample(2, 2), sample(2, 2, "bad").replace(images=(broken,))
    assert split_readable([good, bad])[0] == [good]
    assert "broken.png cannot be read" in split_readable([good, bad])[1]["bad"]

    collator = PromptCollator(processors.processor("blip-2"))
    one = sample(1, 1, "other")
    assert collator.split_askable([one, good])[0] == [one]
    assert "takes one a prompt" in collator.split_askable([one, good])[1]["one"]

    whole = PromptCollator(processors.processor("llava"))
    for images, passages in ((2, 1), (1, 3), (3, 3)):
        several = sample(images, passages)
        # all that can be cut is what the passages say
        ids = whole([several])["source_ids"][0]
        least = int(((ids == 0) | (ids <= images)).sum())
        for length, fits in ((least, True), (least - 1, False)):
            collator = PromptCollator(whole.processor, max_length=length)
            assert bool(collator.split_askable([several])[0]) == fits
            if fits:
                assert collator([several])["input_ids"].shape[1] == least
            else:
                with pytest.raises(ValueError, match=f"max_length={length}"):
                    collator([several])
